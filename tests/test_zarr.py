"""Zarr stores: what can be read of versions 2 and 3, chunks that are missing, and a line about the rest."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
import zipfile

import ml_dtypes
import numcodecs
import numpy as np
import pytest
import zarr
from cases import rng_for
from children import run_child
from chunks import write_zarr
from click.testing import CliRunner
from zarr.codecs import BloscCodec, GzipCodec, ShardingCodec, TransposeCodec, ZstdCodec

from logitloss.cli import main
from logitloss.evaluate import FileError, FileWarning, evaluate, evaluate_files
from logitloss.evaluate.stores import is_store, open_array

ARRAY = np.arange(60, dtype=np.float32).reshape(12, 5) + 1
TEXTS = np.array(["a", "bb", "", "ccç"] * 3)


def read(path):
    stored = open_array(str(path))
    try:
        array = stored[()]
    finally:
        stored.close()
    assert (array.shape, array.dtype) == (stored.shape, stored.dtype)
    return array


def raises(path, message, error=FileError):
    with pytest.raises(error) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- what can be read ----


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        ARRAY.astype(">f8"),
        ARRAY.astype(np.float16),
        ARRAY.astype(np.uint16),
        ARRAY.astype(np.int64),
        ARRAY.astype(np.float16).view("V2"),
        ARRAY > 7,
        ARRAY[:0],
        ARRAY[0, 0],
        TEXTS,
    ],
    ids=["float", "big-endian", "half", "uint16", "int64", "void", "bool", "empty", "0-d", "text"],
)
def test_arrays_come_back(tmp_path, version, array):
    chunks = tuple(max(1, size // 2) for size in array.shape)
    write_zarr(tmp_path / "a.zarr", np.asarray(array), chunks, zarr_format=version, fill_value=None)
    found = read(tmp_path / "a.zarr")
    assert found.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert np.array_equal(found, array)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["S6", np.dtypes.StringDType()], ids=["bytes", "any length"])
def test_texts_are_decoded(tmp_path, version, dtype):
    array = np.strings.encode(TEXTS, "utf-8").astype(dtype) if dtype == "S6" else TEXTS.astype(dtype)
    write_zarr(tmp_path / "a.zarr", array, (5,), zarr_format=version)
    found = read(tmp_path / "a.zarr")
    assert found.dtype.kind == "U"
    assert found.tolist() == TEXTS.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"zarr_format": 2, "compressors": None},
        {"zarr_format": 2, "compressors": {"id": "blosc", "cname": "lz4"}},
        {"zarr_format": 2, "order": "F", "filters": [numcodecs.Delta("<f4")]},
        {"zarr_format": 2, "chunk_key_encoding": {"name": "v2", "separator": "/"}},
        {"compressors": GzipCodec(level=1)},
        {"compressors": BloscCodec(cname="zstd")},
        {"compressors": ZstdCodec(checksum=True), "serializer": zarr.codecs.BytesCodec(endian="big")},
        {"shards": (8, 6)},
        {"shards": {"shape": (8, 6), "index_location": "start"}},
    ],
    ids=[
        "v2",
        "blosc of v2",
        "delta, Fortran order",
        "keys of v2",
        "gzip",
        "blosc",
        "big-endian",
        "shards",
        "index",
    ],
)
def test_codecs(tmp_path, options):
    write_zarr(tmp_path / "a.zarr", ARRAY, (4, 2), **options)
    stored = open_array(str(tmp_path / "a.zarr"))
    assert stored.step == 4
    assert np.array_equal(stored[()], ARRAY)
    assert np.array_equal(stored[slice(3, 9),], ARRAY[3:9])
    stored.close()


@pytest.mark.parametrize("kind", ["bf16", "f8_e4m3"])
def test_floats_that_zarr_has_no_type_for(tmp_path, kind):
    dtype = {"bf16": ml_dtypes.bfloat16, "f8_e4m3": ml_dtypes.float8_e4m3fn}[kind]
    rng = rng_for("zarr", kind)
    logits, target = rng.standard_normal((20, 4)).astype(dtype), rng.integers(0, 4, 20)
    write_zarr(tmp_path / "y.zarr", target, (7,))
    size = logits.itemsize
    for version in (2, 3):
        for raw in (f"u{size}", f"V{size}"):
            write_zarr(tmp_path / "x.zarr", logits.view(raw), (6, 3), zarr_format=version)
            found = evaluate(tmp_path / "x.zarr", tmp_path / "y.zarr", dtype=kind)
            assert found == evaluate(logits, target)


def test_groups(tmp_path):
    path = tmp_path / "g.zarr"
    for version in (2, 3):
        group = zarr.open_group(path, mode="w", zarr_format=version)
        raises(path, "holds no arrays")
        group.create_array("in/a/x", data=ARRAY)
        assert np.array_equal(read(path), ARRAY)
        group.create_array("y", data=np.arange(1, 13))
        assert np.array_equal(read(f"{path}::in/a/x"), ARRAY)
        assert np.array_equal(read(f"{path}::y"), np.arange(1, 13))
        raises(path, f"holds several arrays (in/a/x, y): name one, as in {path}::in/a/x")
        raises(f"{path}::in", "no array named 'in'; there are: in/a/x, y")
    raises(f"{path}/y::x", "an array, not a group, so it holds no named arrays")


def test_consolidated_metadata_may_be_old(tmp_path):
    path = tmp_path / "g.zarr"
    zarr.open_group(path, mode="w", zarr_format=2).create_array("x", data=ARRAY, chunks=(4, 5))
    zarr.consolidate_metadata(path, zarr_format=2)
    grown = zarr.open_array(path / "x", mode="r+")
    grown.resize((16, 5))
    grown[12:] = 7
    assert np.array_equal(read(f"{path}::x"), np.concatenate([ARRAY, np.full((4, 5), 7)]))


# ---- which stores there are ----


def test_stores_are_no_shards_and_may_be_some(tmp_path):
    rng = rng_for("zarr shards")
    logits, target = rng.standard_normal((30, 4)), rng.integers(0, 4, 30)
    for number in range(3):
        rows = slice(10 * number, 10 * number + 10)
        write_zarr(tmp_path / "x" / f"{number}.zarr", logits[rows], (4, 4), zarr_format=2 + number % 2)
        write_zarr(tmp_path / "y" / f"{number}.zarr", target[rows])
    wanted = evaluate(logits, target).compute().nll_nats
    for paths in ("x", "y"), ("x/*.zarr", "y/?.zarr"):
        found = evaluate_files(*(f"{tmp_path}/{path}" for path in paths))
        assert (found.n_rows, found.state.compute().nll_nats) == (30, pytest.approx(wanted, rel=1e-12))
    assert not is_store(str(tmp_path / "x"))
    for version in (2, 3):
        write_zarr(tmp_path / "plain", ARRAY, zarr_format=version)
        assert is_store(str(tmp_path / "plain"))
        assert np.array_equal(read(tmp_path / "plain"), ARRAY)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zipped_stores(tmp_path, method):
    write_zarr(tmp_path / "x", ARRAY, (5, 5))
    with zipfile.ZipFile(tmp_path / "x.zarr.zip", "w", method) as archive:
        for file in sorted((tmp_path / "x").rglob("*")):
            archive.write(file, file.relative_to(tmp_path / "x"))
    assert np.array_equal(read(tmp_path / "x.zarr.zip"), ARRAY)


def test_what_is_no_store(tmp_path):
    raises(tmp_path / "none.zarr", "No such file or directory")
    (tmp_path / "empty.zarr").mkdir()
    raises(tmp_path / "empty.zarr", "neither a Zarr array nor a group of them")
    (tmp_path / "file.zarr").write_text("text")
    raises(tmp_path / "file.zarr", "no Zarr store, or a damaged one (File is not a zip file)")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing to see")
    raises(tmp_path / "a.zip", "neither a Zarr array nor a group of them")
    write_zarr(tmp_path / "new.zarr", ARRAY)
    metadata = json.loads((tmp_path / "new.zarr/zarr.json").read_text())
    (tmp_path / "new.zarr/zarr.json").write_text(json.dumps({**metadata, "data_type": "bfloat16"}))
    raises(tmp_path / "new.zarr", "No Zarr data type found that matches 'bfloat16'")


def test_objects_are_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    codecs = {"id": "pickle", "protocol": 5}
    for filters, compressor, dtype in (
        ([codecs], None, "|O"),
        ([codecs], None, "<f4"),
        ([{"id": "shuffle", "elementsize": 4}, codecs], None, "<f4"),
        (None, codecs, "<f4"),
    ):
        metadata = {"zarr_format": 2, "shape": [4], "chunks": [4], "order": "C", "fill_value": 0}
        metadata |= {"dtype": dtype, "filters": filters, "compressor": compressor}
        (tmp_path / "x.zarr").mkdir(exist_ok=True)
        (tmp_path / "x.zarr/.zarray").write_text(json.dumps(metadata))
        (tmp_path / "x.zarr/0").write_bytes(pickle.dumps(Bomb()))
        raises(tmp_path / "x.zarr", "pickle")
    assert not (tmp_path / "unpickled").exists()


# ---- chunks that are not there ----


@pytest.mark.parametrize("options", [{"zarr_format": 2}, {}, {"shards": (8, 6)}], ids=str)
def test_lost_chunks_of_logits_are_an_error(tmp_path, options):
    path = tmp_path / "x.zarr"
    write_zarr(path, ARRAY, (4, 3), **options)
    lost = "1.0" if options.get("zarr_format") == 2 else "c/1/0"
    (path / lost).unlink()
    raises(path, f"not written or lost: chunk {lost}, of fill value 0.0; what would be read")
    write_zarr(tmp_path / "y.zarr", np.arange(12) % 5)
    result = CliRunner().invoke(main, ["eval", str(path), str(tmp_path / "y.zarr")])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("location", ["start", "end"])
def test_chunks_left_out_of_a_shard_are_an_error_of_logits(tmp_path, location):
    """As a writer leaves it that was stopped."""
    shards = {"shape": (8, 6), "index_location": location}
    array = zarr.create_array(tmp_path / "x.zarr", shape=(13, 5), chunks=(2, 3), shards=shards, dtype="f4")
    array[:12] = ARRAY
    raises(tmp_path / "x.zarr", "chunk (6, 0) of c/1/0 and 1 more")
    stored = open_array(str(tmp_path / "x.zarr"))
    assert np.array_equal(stored[slice(8),], ARRAY[:8])
    with pytest.raises(FileError, match="what would be read"):
        stored[slice(12, 13),]
    array[12] = 3
    assert np.array_equal(read(tmp_path / "x.zarr")[12], np.full(5, 3))


@pytest.mark.parametrize(
    "codecs",
    [
        [ShardingCodec(chunk_shape=(3, 5)), GzipCodec()],
        [TransposeCodec(order=(0, 1)), ShardingCodec(chunk_shape=(3, 5))],
        [ShardingCodec(chunk_shape=(6, 5), codecs=[ShardingCodec(chunk_shape=(3, 5))])],
    ],
    ids=["packed", "transposed", "nested"],
)
def test_shards_within_codecs_are_not_read(tmp_path, codecs):
    """Chunks that they leave out could not be told."""
    options = {"shape": (12, 5), "dtype": "f4", "chunk_shape": (12, 5), "zarr_format": 3, "fill_value": 0}
    with warnings.catch_warnings(action="ignore"):  # zarr's other function has no such codecs
        array = zarr.Array.create(str(tmp_path / "x.zarr"), codecs=codecs, **options)
    array[:3] = ARRAY[:3]
    raises(tmp_path / "x.zarr", "has shards within shards or within other codecs, which is not read")


def test_labels_left_out_are_a_warning(tmp_path):
    """zarr-python does not write chunks that hold nothing but the fill value."""
    rng = rng_for("zarr labels")
    logits, target = rng.standard_normal((40, 4)), np.repeat(np.arange(4), 10)
    write_zarr(tmp_path / "x.zarr", logits, (10, 4))
    write_zarr(tmp_path / "y.zarr", target, (5,))
    paths = [str(tmp_path / "x.zarr"), str(tmp_path / "y.zarr")]
    what = "not written or lost: chunk c/0 and 1 more, of fill value 0, which count as the fill value"
    with pytest.warns(FileWarning, match=f"y.zarr: {what}"):
        assert evaluate_files(*paths).state == evaluate(logits, target, chunk_rows=40)
    command = [sys.executable, "-c", "from logitloss.cli import main; main()", "eval", *paths, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, f"logitloss: {paths[1]}: {what}\n")
    assert json.loads(done.stdout)["count"] == 40


def test_a_shard_of_which_a_chunk_is_lost_is_skipped(tmp_path):
    for number in range(2):
        write_zarr(tmp_path / "x" / f"{number}.zarr", ARRAY, (4, 5))
        write_zarr(tmp_path / "y" / f"{number}.zarr", np.arange(1, 13) % 4 + 1)
    shutil.rmtree(tmp_path / "x/0.zarr/c/2")
    found = evaluate_files(f"{tmp_path}/x", f"{tmp_path}/y", on_error="skip", chunk_rows=4)
    assert found.state.count == 12
    assert [one.file for one in found.skipped] == [f"{tmp_path}/x/0.zarr"]


# ---- its threads and its absence ----


def test_a_process_that_has_read_may_fork_and_ends(tmp_path):
    write_zarr(tmp_path / "x.zarr", ARRAY, (5, 2))
    write_zarr(tmp_path / "y.zarr", np.arange(12) % 5)
    program = (
        "import os\n"
        "from logitloss.evaluate import evaluate\n"
        "before = evaluate(*sys.argv[1:], chunk_rows=4, backend='reference').to_dict()\n"
        "child = os.fork()\n"
        "same = evaluate(*sys.argv[1:], chunk_rows=4, backend='reference').to_dict() == before\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    print(same)\n"
        "else:\n"
        "    os._exit(not same)\n"
    )
    assert run_child(program, str(tmp_path / "x.zarr"), str(tmp_path / "y.zarr")) == "True\n"


@pytest.mark.parametrize(("module", "extra", "path"), [("zarr", "zarr", "a.zarr"), ("h5py", "hdf5", "a.h5")])
def test_a_missing_library_is_told_with_the_command(tmp_path, module, extra, path):
    if extra == "zarr":
        write_zarr(tmp_path / path, ARRAY)
    else:
        (tmp_path / path).touch()
    program = (
        f"sys.modules[{module!r}] = None\n"
        "from logitloss.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    print(end.code)\n"
    )
    printed = run_child(program, "eval", str(tmp_path / path), str(tmp_path / path))
    *line, code = printed.splitlines()
    assert (len(line), code) == (1, "1")
    assert line[0].startswith(f"logitloss: {module} ")
    assert line[0].endswith(f"pip install 'logitloss[{extra}]'")


def test_npy_files_need_none_of_the_libraries(tmp_path):
    np.save(tmp_path / "x.npy", ARRAY)
    np.save(tmp_path / "y.npy", np.arange(12) % 5)
    program = (
        "from logitloss.evaluate import evaluate\n"
        "evaluate(*sys.argv[1:], backend='reference')\n"
        "print({'zarr', 'numcodecs', 'h5py', 'pyarrow'} & set(sys.modules))\n"
    )
    assert run_child(program, str(tmp_path / "x.npy"), str(tmp_path / "y.npy")) == "set()\n"
