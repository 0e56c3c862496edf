"""Columns of Arrow and Parquet files: any box of any type comes back, and one line about each that cannot."""

import os
import re
import sys
from functools import partial

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import rng_for
from children import run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import (
    BATCH,
    WRITERS,
    fixed,
    large_lists,
    lists,
    write_arrow,
    write_parquet,
    write_table,
)
from test_memory import EVALUATION

from logitloss.evaluate import FileError, ShapeError, StateError, evaluate, evaluate_files
from logitloss.evaluate.stores import open_array, parquet
from logitloss.evaluate.stores.stored import part


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """Return what writes columns to a file, and returns its path."""
    return partial(write_table, request.param, tmp_path)


def check(path, array, dtype=None):
    """Assert that a column is an array, in whole and in boxes."""
    stored = open_array(path)
    assert (stored.shape, stored.dtype) == (array.shape, dtype or array.dtype)
    assert np.array_equal(stored[()], array)
    rng = rng_for(path.rpartition("/")[2])
    for _ in range(8):
        box = tuple(slice(*sorted(rng.integers(0, size + 1, 2).tolist())) for size in array.shape)
        for some in (box, box[:1]):
            assert np.array_equal(stored[some], array[some])
    stored.close()


# ---- what can be read ----


def test_names_of_files_that_are_no_text(write, tmp_path):
    path = write(x=np.arange(5))
    other = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff" + os.fsencode(os.path.basename(path))))
    os.rename(path, other)
    check(other, np.arange(5))


def test_numbers_of_every_type(write):
    rng = rng_for("numbers")
    columns = {}
    for dtype in ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]:
        raw = rng.standard_normal(50) * 30
        columns[dtype] = np.abs(raw).astype(dtype) if dtype[0] == "u" else raw.astype(dtype)
    columns["bool"] = columns["f4"] > 0
    path = write(**columns)
    for name, array in columns.items():
        check(f"{path}::{name}", array)


@pytest.mark.parametrize("make", [fixed, lists, large_lists])
@pytest.mark.parametrize("shape", [(40, 5), (30, 3, 2), (14, 2, 1, 3), (1, 4)])
def test_lists_are_axes(write, make, shape):
    for dtype in (np.float32, np.float16, np.uint16):
        array = (100 * rng_for("lists").random(shape)).astype(dtype)
        check(f"{write(x=make(array))}::x", array)


def test_tensors(tmp_path):
    array = rng_for("tensors").standard_normal((40, 2, 3), np.float32)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    for suffix, writer in (("arrow", write_arrow), ("parquet", write_parquet)):
        path = str(tmp_path / f"t.{suffix}")
        writer(path, pa.table({"x": column}))
        check(path, array)
        turned = pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.float32(), [2, 3], permutation=[1, 0]), column.storage
        )
        writer(path, pa.table({"x": turned}))
        with pytest.raises(FileError, match=r"column 'x' holds extension<arrow.fixed_shape_tensor"):
            open_array(path)


def test_strings_and_dictionaries(write):
    words = np.array(["a", "", "été", "a longer one", "\N{GRINNING FACE}"])[
        rng_for("words").integers(0, 5, 60)
    ]
    numbers = pa.array(np.arange(60) % 7).dictionary_encode()
    path = write(
        plain=words.tolist(),
        large=pa.array(words.tolist(), pa.large_string()),
        dictionary=pa.array(words.tolist()).dictionary_encode(),
        numbers=numbers,
        nested=fixed(np.arange(120).reshape(60, 2)),
    )
    for name in ("plain", "large", "dictionary"):
        check(f"{path}::{name}", words, "<U12")
    check(f"{path}::numbers", np.arange(60) % 7)


def test_views_of_strings_and_dictionaries_that_grow(tmp_path):
    path = str(tmp_path / "x.arrow")
    words = ["a", "b"] * 20 + ["a much longer one", "c"] * 5
    write_arrow(path, pa.table({"x": pa.array(words, pa.string_view())}))
    check(path, np.array(words))
    schema = pa.schema([("x", pa.dictionary(pa.int8(), pa.string()))])
    for new, options in (
        (pa.ipc.new_stream, {}),
        (pa.ipc.new_stream, {"emit_dictionary_deltas": True}),
        (pa.ipc.new_file, {"emit_dictionary_deltas": True}),
    ):
        with new(path, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            for some, known in ((words[:40], ["a", "b"]), (words[40:], ["a", "b", "a much longer one", "c"])):
                codes = pa.array([known.index(word) for word in some], pa.int8())
                column = pa.DictionaryArray.from_arrays(codes, pa.array(known))
                writer.write_batch(pa.record_batch([column], schema=schema))
        check(path, np.array(words))


def test_bits_of_floats(write):
    rng = rng_for("bits")
    logits, target = rng.standard_normal((50, 6), np.float32), rng.integers(0, 6, 50)
    half, eighth = logits.astype(ml_dtypes.bfloat16), logits.astype(ml_dtypes.float8_e4m3fn)
    raw = pa.FixedSizeBinaryArray.from_buffers(pa.binary(2), half.size, [None, pa.py_buffer(half.tobytes())])
    path = write(
        words=fixed(half.view(np.uint16)),
        bytes=pa.FixedSizeListArray.from_arrays(raw, 6),
        eighth=lists(eighth.view(np.uint8)),
        y=target,
    )
    assert open_array(f"{path}::bytes").dtype == "V2"
    for name, array, dtype in (
        ("words", half, "bf16"),
        ("bytes", half, "bf16"),
        ("eighth", eighth, "f8_e4m3"),
    ):
        found = evaluate(f"{path}::{name}", f"{path}::y", dtype=dtype, chunk_rows=20)
        assert found == evaluate(array, target, chunk_rows=20)


@pytest.mark.parametrize("make", [fixed, lists])
def test_slices_are_those_of_the_values(write, make):
    """Offsets of a parent that its children do not know."""
    array = rng_for("slices").standard_normal((40, 3, 2), np.float32)
    keys = pa.array([f"k{i % 5}" for i in range(40)]).dictionary_encode()
    path = write(x=make(array)[7:33], key=keys[7:33], flag=pa.array(array[:, 0, 0] > 0)[7:33])
    check(f"{path}::x", array[7:33])
    check(f"{path}::key", np.array([f"k{i % 5}" for i in range(7, 33)]))
    check(f"{path}::flag", array[7:33, 0, 0] > 0)


def test_no_rows_and_empty_batches(tmp_path):
    schema = pa.schema([("x", pa.list_(pa.float32(), 3)), ("l", pa.list_(pa.float32())), ("s", pa.string())])
    empty = schema.empty_table()
    array = rng_for("empty").standard_normal((5, 3), np.float32)
    some = pa.table({"x": fixed(array), "l": lists(array), "s": list("abcde")}, schema=schema)
    for number, parts in enumerate([[empty], [], [empty, some, empty, empty, some, empty]]):
        arrow, stream, table = (str(tmp_path / f"{number}.{name}") for name in ("arrow", "ipc", "parquet"))
        for path, new in ((arrow, pa.ipc.new_file), (stream, pa.ipc.new_stream)):
            with new(path, schema) as writer:
                for each in parts:
                    for batch in each.to_batches() or [pa.RecordBatch.from_pylist([], schema)]:
                        writer.write_batch(batch)
        with pq.ParquetWriter(table, schema) as writer:
            for each in parts:
                writer.write_table(each)
        for path in (arrow, stream, table):
            full = number == 2
            assert open_array(f"{path}::l").shape == ((10, 3) if full else (0, 0))
            check(f"{path}::x", np.concatenate([array, array]) if full else np.zeros((0, 3), np.float32))
            check(f"{path}::s", np.array(list("abcde") * 2 if full else [], "U1"))


def test_nulls_that_are_allowed_but_not_there(write):
    array = rng_for("nullable").standard_normal((30, 4), np.float32)
    masked = pa.FixedSizeListArray.from_arrays(pa.array(array.ravel(), mask=np.zeros(120, bool)), 4)
    check(f"{write(x=masked, y=pa.array([1, 2] * 15))}::x", array)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_in_any_order_of_reading(tmp_path_factory, data):
    n_rows, batch = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 25))
    inner = data.draw(st.sampled_from([(), (3,), (2, 3)]))
    array = np.arange(n_rows * int(np.prod(inner)), dtype=np.float32).reshape(n_rows, *inner)
    make = data.draw(st.sampled_from([fixed, lists]))
    table = pa.table({"x": make(array)})
    folder = tmp_path_factory.mktemp("boxes")
    paths = [str(folder / name) for name in ("f.arrow", "s.arrow", "p.parquet")]
    for path, new in zip(paths, (pa.ipc.new_file, pa.ipc.new_stream), strict=False):
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=batch)
    pq.write_table(table, paths[2], row_group_size=batch)
    known = n_rows or make is fixed  # lists of which there is none have no length
    order = data.draw(st.permutations(range(array.ndim)))
    for path in paths if known else ():
        axis = data.draw(st.integers(0, array.ndim - 1))
        start, stop = sorted(data.draw(st.tuples(*2 * [st.integers(0, array.shape[axis])])))
        stored = open_array(path).part(axis, start, stop).transpose(order)
        plain = part(array, axis, start, stop).transpose(order)
        assert stored.shape == plain.shape
        for _ in range(4):
            ends = [sorted(data.draw(st.tuples(*2 * [st.integers(0, size)]))) for size in plain.shape]
            box = tuple(slice(*pair) for pair in ends)
            assert np.array_equal(stored[box], plain[box])
        places, elements = stored.samples(50)
        assert np.array_equal(elements, plain.ravel()[places])
        assert (np.diff(places) > 0).all()


# ---- how it is read ----


def test_one_batch_of_arrow_is_a_view_of_the_file(tmp_path):
    array = rng_for("views").standard_normal((40, 6), np.float32)
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        path = str(tmp_path / "x.arrow")
        table = pa.table(
            {"pad": np.arange(40, dtype=np.int8), "x": fixed(array), "l": lists(array), "h": array[:, 0]}
        )
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=20)
        for name in "xlh":
            stored = open_array(f"{path}::{name}")
            for rows in (slice(20, 31), slice(3, 20)):
                assert np.shares_memory(stored[rows,], stored.mapped.array)
                stored.release((rows,))
            assert not np.shares_memory(stored[slice(15, 25),], stored.mapped.array)
            assert not stored.lent


def test_blocks_in_order_go_on_where_the_last_ended(write):
    array = np.arange(200, dtype=np.float32).reshape(100, 2)
    stored = open_array(f"{write(x=fixed(array))}::x")
    begun, begin = [], stored._batches
    stored._batches = lambda entry, n_rows: begun.append(entry) or begin(entry, n_rows)
    for first in range(0, 100, 7):
        assert np.array_equal(stored[slice(first, first + 7),], array[first : first + 7])
    assert begun == [0]
    assert np.array_equal(stored[slice(3, 5),], array[3:5])
    assert np.array_equal(stored[slice(80, 90),], array[80:90])
    # what can be entered in the middle is
    assert begun == ([0, 0] if stored.entries == [0] else [0, 0, 80 // BATCH])


def test_files_evaluate_like_their_arrays(write, tmp_path):
    rng = rng_for("files")
    logits, target = 3 * rng.standard_normal((100, 7), np.float32), rng.integers(0, 7, 100)
    keys = np.array(["even", "odd"])[target % 2]
    path = write(logits=fixed(logits), label=target, key=keys.tolist())
    for chunk_rows in (10, 33, None):
        found = evaluate(f"{path}::logits", f"{path}::label", groups=f"{path}::key", chunk_rows=chunk_rows)
        assert found == evaluate(logits, target, groups=keys, chunk_rows=chunk_rows)
    hit = (logits > 0).astype(np.uint8)
    path = write(logits=fixed(logits), hit=lists(hit))
    found = evaluate(f"{path}::logits", f"{path}::hit", loss="bce", chunk_rows=20)
    assert found == evaluate(logits, hit, loss="bce", chunk_rows=20)


def test_images_of_more_positions_than_a_block(write):
    rng = rng_for("images")
    logits, target = rng.standard_normal((30, 3, 4, 5), np.float32), rng.integers(0, 3, (30, 4, 5))
    path = write(x=fixed(logits), y=lists(target))
    for chunk_rows in (8, 20, 70):
        found = evaluate(f"{path}::x", f"{path}::y", chunk_rows=chunk_rows)
        assert found == evaluate(logits, target, chunk_rows=chunk_rows)


def test_shards_of_tables_and_of_other_formats_together(write, tmp_path):
    rng = rng_for("shards of tables")
    logits, target = rng.standard_normal((90, 4), np.float32), rng.integers(0, 4, 90)
    paths = []
    for number, rows in enumerate((slice(0, 40), slice(40, 41), slice(41, 90))):
        path = write(f"part-{number}", logits=fixed(logits[rows]), label=target[rows])
        paths.append(path)
    wanted = evaluate(logits[:40], target[:40], chunk_rows=20)
    for rows in (slice(40, 41), slice(41, 90)):
        wanted.merge(evaluate(logits[rows], target[rows], chunk_rows=20))
    pattern = re.sub(r"part-0", "part-*", paths[0])
    for shards in (str(tmp_path), pattern):
        assert evaluate(f"{shards}::logits", f"{shards}::label", chunk_rows=20) == wanted
    np.savez(tmp_path / "part-1.npz", logits=logits[40:41], label=target[40:41])
    os.unlink(paths[1])
    assert evaluate(f"{tmp_path}::logits", f"{tmp_path}::label", chunk_rows=20) == wanted


def test_a_shard_without_rows_does_not_tell_its_classes(tmp_path):
    rng = rng_for("a shard without rows")
    logits, target = rng.standard_normal((50, 4), np.float32), rng.integers(0, 4, 50)
    wanted = evaluate(logits[:30], target[:30])
    wanted.merge(evaluate(logits[30:], target[30:]))
    for number, rows in enumerate((slice(0, 0), slice(0, 30), slice(30, 30), slice(30, 50))):
        table = pa.table({"x": lists(logits[rows]), "y": target[rows]})
        write_parquet(str(tmp_path / f"{number}.parquet"), table)
    assert evaluate(f"{tmp_path}::x", f"{tmp_path}::y") == wanted
    write_parquet(str(tmp_path / "4.parquet"), pa.table({"x": lists(logits[:, :3]), "y": target % 3}))
    with pytest.raises(ShapeError, match=r"4.parquet::x: of 3 classes, but shards before have 4"):
        evaluate(f"{tmp_path}::x", f"{tmp_path}::y")


def test_a_stopped_evaluation_goes_on_and_knows_its_rows(write, tmp_path):
    rng = rng_for("states")
    logits, target = rng.standard_normal((100, 7), np.float32), rng.integers(0, 7, 100)
    options = {"chunk_rows": 20, "state_file": str(tmp_path / "state.json"), "save_every": 0}

    def stop(done, total, n_bytes):
        if done == 60:
            raise KeyboardInterrupt

    path = write(x=fixed(logits), y=target)
    with pytest.raises(KeyboardInterrupt):
        evaluate(f"{path}::x", f"{path}::y", progress=stop, **options)
    target[0] += 1
    write(x=fixed(logits), y=target)
    with pytest.raises(StateError, match="with target of"):
        evaluate(f"{path}::x", f"{path}::y", **options)
    target[0] -= 1
    write(x=fixed(logits), y=target)
    found = evaluate_files(f"{path}::x", f"{path}::y", **options)
    assert found.n_rows == 40
    assert found.state == evaluate(logits, target, chunk_rows=20)


def test_samples_of_parquet_are_of_its_first_rows(tmp_path, monkeypatch):
    """Not from all over a row group, each of which would have to be unpacked."""
    monkeypatch.setattr(parquet, "BATCH_BYTES", 5 * 8)
    path = str(tmp_path / "x.parquet")
    write_parquet(path, pa.table({"x": np.arange(100)}))
    places, elements = open_array(path).samples(64)
    assert np.array_equal(places, elements)
    assert set((places % BATCH).tolist()) == set(range(5))
    assert set((places // BATCH).tolist()) == set(range(8))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is told in /proc")
@pytest.mark.parametrize("form", ["one row group", "small batches", "one batch", "tiny batches"])
def test_memory_does_not_grow_with_the_file(tmp_path, form):
    """More than the bound of an evaluation, read whole it would be seen."""
    n_rows, n_classes = 540_000, 250
    rows = fixed(np.zeros((2000, n_classes), np.float32))
    y = pa.table({"y": pa.chunked_array(270 * [np.zeros(2000, np.int32)])})
    pq.write_table(y, tmp_path / "y.parquet")
    path = str(tmp_path / ("x.parquet" if form == "one row group" else "x.arrow"))
    table = pa.table({"x": pa.chunked_array(270 * [rows])})
    if form == "one row group":
        pq.write_table(table, path, row_group_size=n_rows)
        assert pq.ParquetFile(path).num_row_groups == 1
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            sizes = {"one batch": n_rows, "small batches": 2000, "tiny batches": 15}
            writer.write_table(table.combine_chunks(), max_chunksize=sizes[form])
    program = (
        "import test_memory\n"
        "from logitloss.evaluate import evaluate\n"
        "print(evaluate(*sys.argv[1:], num_threads=2).count, test_memory.peak())"
    )
    count, peak = map(int, run_child(program, path, str(tmp_path / "y.parquet")).split())
    os.unlink(path)
    assert count == n_rows
    assert peak < EVALUATION << 10
