"""HDF5 files: what is mapped and what is decoded, links, types, what was never written, and damaged texts."""

import fcntl
import os
import re
import resource
import struct

import h5py
import ml_dtypes
import numpy as np
import pytest
from cases import rng_for
from chunks import write_hdf5

from logitloss.evaluate import FileError, FileWarning, evaluate, evaluate_files
from logitloss.evaluate.errors import OutputError
from logitloss.evaluate.stores import hdf5_texts, open_array
from logitloss.evaluate.stores.chunked import ChunkedArray
from logitloss.evaluate.stores.mapped import MappedArray

ARRAY = np.arange(60, dtype=np.float32).reshape(12, 5) + 1
TEXTS = ["a", "bb", "", "ccç"] * 3


def read(path, kind=None):
    stored = open_array(str(path))
    assert kind is None or isinstance(stored, kind)
    try:
        array = np.array(stored[()])
    finally:
        stored.close()
    assert (array.shape, array.dtype) == (stored.shape, stored.dtype)
    return array


def raises(path, message):
    with pytest.raises(FileError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.h5"


# ---- what can be read ----


@pytest.mark.parametrize("chunks", [None, (5, 2)], ids=["contiguous", "chunked"])
@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        ARRAY.astype(">f8"),
        ARRAY.astype(np.float16),
        ARRAY.astype(">u2"),
        ARRAY.astype(np.int64),
        ARRAY.astype(np.float16).view("V2"),
    ],
    ids=["float", "big-endian", "half", "uint16", "int64", "void"],
)
def test_numbers_come_back(path, array, chunks):
    write_hdf5(path, array, chunks)
    found = read(path, ChunkedArray if chunks else MappedArray)
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("array", [ARRAY > 7, ARRAY[:0], ARRAY[0, 0]], ids=["bool", "empty", "0-d"])
def test_other_arrays_come_back(path, array):
    write_hdf5(path, array)
    found = read(path)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "gzip", "shuffle": True, "fletcher32": True},
        {"compression": "lzf"},
        {"scaleoffset": 3},
        {"maxshape": (None, None)},
    ],
    ids=str,
)
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_filters_and_versions(path, options, libver):
    with h5py.File(path, "w", libver=libver) as file:
        file.create_dataset("x", data=ARRAY, chunks=(5, 2), **options)
    stored = open_array(str(path))
    assert stored.step == 5
    assert np.array_equal(stored[slice(4, 11),], ARRAY[4:11])
    assert np.array_equal(stored[()], ARRAY)
    stored.close()


def test_compact_datasets_and_user_blocks(path):
    with h5py.File(path, "w", userblock_size=1024) as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        kind, space = h5py.h5t.py_create(ARRAY.dtype), h5py.h5s.create_simple(ARRAY.shape)
        h5py.h5d.create(file.id, b"compact", kind, space, plist).write(h5py.h5s.ALL, h5py.h5s.ALL, ARRAY)
        file["plain"] = ARRAY
        file.create_dataset("never", (12,), "i8")
    assert np.array_equal(read(f"{path}::compact", ChunkedArray), ARRAY)
    assert np.array_equal(read(f"{path}::plain", MappedArray), ARRAY)
    with pytest.warns(FileWarning, match=f"^{path}::never: not written or lost: all of it"):
        assert read(f"{path}::never").tolist() == [0] * 12


@pytest.mark.parametrize("chunks", [None, (5,)], ids=["contiguous", "chunked"])
@pytest.mark.parametrize("length", [None, 6], ids=["any length", "fixed"])
def test_texts_are_keys(path, length, chunks):
    logits, target = rng_for("hdf5 keys").standard_normal((12, 5)), np.arange(12) % 5
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "k", data=[text.encode() for text in TEXTS], dtype=h5py.string_dtype(length=length), chunks=chunks
        )
        file["x"], file["y"] = logits, target
    found = read(f"{path}::k")
    assert found.dtype.kind == "U"
    assert found.tolist() == TEXTS
    state = evaluate(*(f"{path}::{name}" for name in "xy"), groups=f"{path}::k", chunk_rows=5)
    assert state == evaluate(logits, target, groups=np.array(TEXTS), chunk_rows=5)


@pytest.mark.parametrize("chunks", [None, (6, 3)], ids=["contiguous", "chunked"])
def test_bfloat16(path, chunks):
    rng = rng_for("hdf5 bfloat16")
    logits, target = rng.standard_normal((20, 4)).astype(ml_dtypes.bfloat16), rng.integers(0, 4, 20)
    custom = h5py.h5t.IEEE_F32LE.copy()
    custom.set_fields(15, 7, 8, 0, 7)
    custom.set_size(2)
    custom.set_ebias(127)
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if chunks:
        plist.set_chunk(chunks)
    with h5py.File(path, "w") as file:
        own = h5py.h5d.create(file.id, b"own", custom, h5py.h5s.create_simple(logits.shape), plist)
        own.write(h5py.h5s.ALL, h5py.h5s.ALL, logits.astype(np.float32))
        file.create_dataset("bits", data=logits.view(np.uint16), chunks=chunks)
        file.create_dataset("void", data=logits.view("V2"), chunks=chunks)
        file["y"] = target
    assert np.array_equal(read(f"{path}::own"), logits.astype(np.float32))
    for name in ("bits", "void"):
        found = evaluate(f"{path}::{name}", f"{path}::y", dtype="bf16")
        assert found == evaluate(logits, target)


def test_names_and_links(path):
    with h5py.File(path, "w") as file:
        file["in/a/x"] = ARRAY
        file["y"] = np.arange(12)
        file["soft"], file["broken"] = h5py.SoftLink("/in/a/x"), h5py.SoftLink("/none")
    for name in ("in/a/x", "/in/a/x", "soft"):
        assert np.array_equal(read(f"{path}::{name}"), ARRAY)
    raises(path, f"holds several arrays (in/a/x, y): name one, as in {path}::in/a/x")
    for name in ("in/a", "broken", "none"):
        raises(f"{path}::{name}", f"no array named {name!r}; there are: in/a/x, y")
    with h5py.File(path, "w"):
        pass
    raises(path, "holds no arrays")


@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_shards(tmp_path, suffix):
    rng = rng_for("hdf5 shards")
    logits, target = rng.standard_normal((30, 4)), rng.integers(0, 4, 30)
    for number in range(3):
        with h5py.File(tmp_path / f"{number}{suffix}", "w") as file:
            file["x"], file["y"] = (array[10 * number : 10 * number + 10] for array in (logits, target))
    wanted = evaluate(logits, target).compute().nll_nats
    for folder in (str(tmp_path), f"{tmp_path}/*{suffix}"):
        found = evaluate_files(f"{folder}::x", f"{folder}::y")
        assert (found.n_rows, found.state.compute().nll_nats) == (30, pytest.approx(wanted, rel=1e-12))


def test_files_that_are_locked_or_cannot_be_written(path):
    write_hdf5(path, ARRAY, (5, 5))
    path.chmod(0o400)
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert np.array_equal(read(path), ARRAY)


# ---- what cannot ----


def test_what_is_in_other_files(tmp_path, path):
    write_hdf5(tmp_path / "other.h5", ARRAY)
    layout = h5py.VirtualLayout(ARRAY.shape, ARRAY.dtype)
    layout[...] = h5py.VirtualSource(tmp_path / "other.h5", "x", ARRAY.shape)
    with h5py.File(path, "w") as file:
        file["link"] = h5py.ExternalLink(tmp_path / "other.h5", "/x")
        file["gone"] = h5py.ExternalLink(tmp_path / "none.h5", "/x")
        file.create_virtual_dataset("virtual", layout)
        file.create_dataset("external", data=ARRAY, external=[(tmp_path / "raw", 0, 240)])
    raises(f"{path}::link", f"a link to another file, {tmp_path}/other.h5: name that")
    raises(f"{path}::gone", "no array named 'gone'")
    for name in ("virtual", "external"):
        raises(f"{path}::{name}", "kept in other files (a virtual or external dataset)")


def test_what_is_no_array_of_plain_elements(path):
    with h5py.File(path, "w") as file:
        file["records"] = np.zeros(3, [("x", "f4"), ("y", "i4")])
        file["lists"] = h5py.Empty("f4")
        file.create_dataset("ragged", (3,), dtype=h5py.vlen_dtype(np.int32))
        file.create_dataset("references", (3,), dtype=h5py.ref_dtype)
        file.create_dataset("arrays", (3,), dtype=np.dtype(("f4", (2,))))
    raises(f"{path}::lists", "an empty dataset, which has no shape")
    for name in ("records", "ragged", "references", "arrays"):
        raises(f"{path}::{name}", "not plain numbers or texts")


def test_files_of_other_kinds(path):
    for content in (b"", b"text", b"\x89HDF\r\n\x1a\n"):
        path.write_bytes(content)
        raises(path, "no HDF5 file, or a damaged one")
    raises(path.with_name("none.h5"), "No such file or directory")
    path.unlink()
    path.mkdir()
    raises(path, "not a regular file")


def test_truncated_numbers(path):
    write_hdf5(path, np.zeros(10000))
    os.truncate(path, 50000)
    raises(path, "truncated")


@pytest.mark.parametrize("chunks", [None, (5, 5)], ids=["contiguous", "chunked"])
def test_what_was_never_written(path, chunks):
    with h5py.File(path, "w") as file:
        for name, dtype in (("x", "f4"), ("y", "i8")):
            dataset = file.create_dataset(name, ARRAY.shape, dtype, chunks=chunks)
            if chunks:
                dataset[:5] = 1
    what = "2 of 3 chunks" if chunks else "all of it"
    raises(f"{path}::x", f"not written or lost: {what}; what would be read is the fill value")
    with h5py.File(path, "r+") as file:
        file.create_dataset("k", (12,), h5py.string_dtype(), chunks=chunks and (5,))
    raises(f"{path}::k", "not written or lost: ")
    with pytest.warns(FileWarning, match=f"::y: not written or lost: {what}, which count as the fill value"):
        assert read(f"{path}::y")[:5].sum() == (25 if chunks else 0)


def test_what_was_never_written_is_told_once(tmp_path, path):
    np.save(tmp_path / "x.npy", ARRAY)
    with h5py.File(path, "w") as file:
        file.create_dataset("y", (12,), "i8", chunks=(5,))
    with pytest.warns(FileWarning) as told:
        assert evaluate_files(str(tmp_path / "x.npy"), str(path)).n_rows == 12
    what = "not written or lost: 3 of 3 chunks, which count as the fill value"
    assert [str(one.message) for one in told] == [f"{path}: {what}"]


# ---- damaged texts ----


def test_no_texts(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("k", (0,), h5py.string_dtype())
    assert read(path).shape == (0,)


def heap_without_end(path):
    """Give the free space behind the texts no size, so that the HDF5 library never comes to its end."""
    content = bytearray(path.read_bytes())
    start = content.index(b"GCOL")
    place = start + 16
    while (number := struct.unpack_from("<H", content, place)[0]) != 0:
        place += 16 + -(-struct.unpack_from("<Q", content, place + 8)[0] // 8) * 8
    assert number == 0
    struct.pack_into("<Q", content, place + 8, 0)
    path.write_bytes(content)


def test_texts_that_a_full_disk_does_not_take(path):
    with h5py.File(path, "w") as file:
        file["k"] = np.array(["a" * 50] * 10_000, object)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(
            OutputError, match=r"a.h5: what it holds, unpacked, does not fit into .* written\)"
        ):
            open_array(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_damaged_texts_do_not_hang(path, monkeypatch):
    monkeypatch.setattr(hdf5_texts, "SECONDS", 5)
    with h5py.File(path, "w") as file:
        file["k"] = TEXTS
    assert read(path).tolist() == TEXTS
    heap_without_end(path)
    raises(path, "damaged: 5 seconds did not do to read some texts")


def test_what_the_library_says_of_damaged_texts_is_a_line(path):
    with h5py.File(path, "w") as file:
        file["k"] = TEXTS
    content = path.read_bytes()
    path.write_bytes(content.replace(b"GCOL", b"GCOX"))
    raises(path, "damaged (")
    path.write_bytes(re.sub(b"cc\xc3\xa7", b"cc\xff\xff", content))
    raises(path, "damaged ('utf-8' codec can't decode")
