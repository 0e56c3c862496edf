"""Arrays in chunks: any box comes back right, and a chunk is decoded once, in bounded memory."""

import json
import sys

import numpy as np
import pytest
from cases import rng_for
from children import run_child
from chunks import WRITERS, ListedChunks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_memory import EVALUATION

from logitloss.evaluate import FileError, FileWarning, evaluate
from logitloss.evaluate.stores import chunked, open_array


@st.composite
def boxes(draw):
    """Shapes, chunks, an order of axes, and some boxes of leading axes in that order."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    chunks = tuple(draw(st.integers(1, size)) for size in shape)
    order = draw(st.permutations(range(len(shape))))
    found = []
    for _ in range(draw(st.integers(1, 4))):
        leading = order[: draw(st.integers(0, len(shape)))]
        starts = [draw(st.integers(0, shape[axis])) for axis in leading]
        stops = [draw(st.integers(start, shape[axis])) for start, axis in zip(starts, leading, strict=True)]
        found.append(tuple(map(slice, starts, stops)))
    return tuple(shape), chunks, order, found


def check(stored, array, order, found, piece):
    stored, array = stored.transpose(order), array.transpose(order)
    assert stored.step == stored.chunks[order[0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "PIECE_BYTES", piece)
        for box in found:
            block = stored[box]
            assert (block.dtype, block.shape) == (array.dtype, array[box].shape)
            assert np.array_equal(block, array[box])
    places, elements = stored.samples(7)
    assert np.array_equal(elements, array.ravel()[places])


@settings(max_examples=200, deadline=None)
@given(boxes(), st.sampled_from([1, 40, 1 << 24]))
def test_any_box_of_an_array_in_chunks(case, piece):
    shape, chunks, order, found = case
    array = np.arange(np.prod(shape), dtype=np.float64).reshape(shape)
    check(ListedChunks(array, chunks), array, order, found, piece)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, deadline=None)
@given(boxes(), st.sampled_from([1, 40, 1 << 24]))
def test_any_box_of_a_file(tmp_path_factory, name, case, piece):
    shape, chunks, order, found = case
    array = rng_for(*shape).standard_normal(shape).astype(np.float32)
    suffix, write = WRITERS[name]
    path = str(tmp_path_factory.mktemp("box") / f"x{suffix}")
    write(path, array, chunks)
    stored = open_array(path)
    check(stored, array, order, found, piece)
    stored.close()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("chunk_rows", [7, 16, None])
def test_files_evaluate_like_their_arrays(tmp_path, name, chunk_rows):
    rng = rng_for("chunks")
    logits, target = rng.standard_normal((100, 9), np.float32), rng.integers(0, 9, 100)
    keys = np.array(["one", "two", "thrée"])[target % 3]
    suffix, write = WRITERS[name]
    paths = [str(tmp_path / f"{one}{suffix}") for one in "xyk"]
    write(paths[0], logits, (16, 4))
    write(paths[1], target, (33,))
    write(paths[2], keys.astype(np.dtypes.StringDType()), (40,))
    found = evaluate(paths[0], paths[1], groups=paths[2], chunk_rows=chunk_rows)
    # the kernels' sums are those of blocks, so the same are taken
    rows = chunk_rows or 100
    assert found.compute() == evaluate(logits, target, groups=keys, chunk_rows=rows).compute()
    wanted = evaluate(logits, target, groups=keys, chunk_rows=rows).groups
    assert {key: group.compute() for key, group in found.groups.items()} == {
        key: group.compute() for key, group in wanted.items()
    }
    narrow = str(tmp_path / f"narrow{suffix}")
    write(narrow, logits.reshape(5, 20, 9).transpose(0, 2, 1), (2, 4, 7))
    write(paths[1], target.reshape(5, 20), (5, 3))
    images = evaluate(narrow, paths[1], chunk_rows=chunk_rows)
    assert images.compute().nll_nats == pytest.approx(found.compute().nll_nats, rel=1e-12)


# ---- once, in bounded memory ----


@pytest.mark.parametrize(
    ("shape", "chunks", "order", "rows"),
    [
        ((60, 7), (8, 3), (0, 1), 8),  # blocks of whole chunks
        ((60, 7), (8, 3), (0, 1), 5),  # less than a row of chunks
        ((60, 7), (8, 3), (0, 1), 20),  # more, and not a multiple
        ((7, 60), (3, 8), (1, 0), 5),  # the classes first
        ((60, 7), (60, 7), (0, 1), 9),  # all in one chunk
    ],
)
def test_a_chunk_is_decoded_once(shape, chunks, order, rows):
    array = np.arange(420.0).reshape(shape)
    stored = ListedChunks(array, chunks).transpose(order)
    blocks = [stored[slice(first, first + rows),] for first in range(0, 60, rows)]
    assert np.array_equal(np.concatenate(blocks), array.transpose(order))
    assert (stored.decoded == 1).all()


def test_part_of_a_block_is_decoded_at_a_time(monkeypatch):
    monkeypatch.setattr(chunked, "PIECE_BYTES", 8 * 64)
    stored = ListedChunks(np.zeros((64, 32)), (4, 8))
    sizes = [np.prod([p.stop - p.start for p in piece]) for piece in stored._pieces(stored._stored(()))]
    assert set(sizes) == {64}
    assert sum(sizes) == 64 * 32
    large = ListedChunks(np.zeros((64, 32)), (64, 32))
    assert len(list(large._pieces(large._stored(())))) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is told in /proc")
@pytest.mark.parametrize("name", WRITERS)
def test_an_evaluation_of_chunks_stays_under_its_bound(tmp_path, name):
    """Rows of chunks (256 MiB) that are more than a block, and labels in one chunk."""
    n_rows, n_classes, chunks = 4096, 32768, (2048, 512)
    suffix, write = WRITERS[name]
    rng = rng_for("memory")
    logits = np.broadcast_to(rng.standard_normal(n_classes, np.float32), (n_rows, n_classes))
    write(str(tmp_path / f"x{suffix}"), logits, chunks)
    write(str(tmp_path / f"y{suffix}"), rng.integers(0, n_classes, n_rows), (n_rows,))
    told = json.loads(
        run_child(
            "import json, sys\n"
            "from test_memory import peak\n"
            "from logitloss.evaluate import evaluate\n"
            "state = evaluate(*sys.argv[1:], num_threads=2)\n"
            "print(json.dumps([peak(), state.count]))\n",
            *(str(tmp_path / f"{one}{suffix}") for one in "xy"),
        )
    )
    assert told[1] == n_rows
    assert told[0] < EVALUATION << 10


def test_a_full_disk_is_told(monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(chunked.tempfile, "TemporaryFile", lambda prefix: full)
        with pytest.raises(FileError, match=r"^listed: a row of its chunks does not fit .* No space left"):
            ListedChunks(np.zeros((64, 4)), (8, 4))[slice(3),]


# ---- chunks that are not there ----


def test_absent_chunks_are_an_error_of_logits_and_a_warning_of_labels():
    array = np.zeros((8, 4))
    with pytest.raises(FileError, match=r"^listed: not written or lost: chunk 3; what would be read"):
        ListedChunks(array, (2, 4), "chunk 3")[()]
    raw = ListedChunks(array.astype(np.uint16), (2, 4), "chunk 3")
    assert raw[()].sum() == 0
    with pytest.raises(FileError, match="what would be read"):
        raw.view(np.float16)[()]
    raw.close()  # no word more
    labels = ListedChunks(array.astype(np.uint16), (2, 4), "chunk 3")
    assert labels[()].sum() == 0
    with pytest.warns(FileWarning, match=r"^listed: not written or lost: chunk 3, which count as the fill"):
        labels.close()
    ListedChunks(array, (2, 4)).close()
