"""Files of arrays: `.npy` and `.npz` mapped, and one line about each that cannot be."""

import os
import re
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest

from logitloss.evaluate import FileError, evaluate, evaluate_files
from logitloss.evaluate.stores import open_array
from logitloss.evaluate.stores.mapped import POPULATE_READ, MappedArray

ARRAY = np.arange(60, dtype=np.float32).reshape(12, 5)


def raises(path, message):
    with pytest.raises(FileError) as caught:
        open_array(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- what can be read ----


@pytest.mark.parametrize(
    "array",
    [
        ARRAY,
        np.asfortranarray(ARRAY),
        ARRAY.astype(">f8"),
        ARRAY[:0],
        ARRAY[0, 0],
        ARRAY.view("V2"),
        ARRAY > 7,
    ],
    ids=["c", "fortran", "big-endian", "empty", "0-d", "void", "bool"],
)
def test_arrays_come_back(tmp_path, array):
    paths = [tmp_path / name for name in ("a.npy", "stored.npz", "packed.npz")]
    np.save(paths[0], array)
    np.savez(paths[1], a=array)
    np.savez_compressed(paths[2], a=array)
    for path in paths:
        mapped = open_array(str(path)).array
        assert mapped.dtype == array.dtype
        assert mapped.shape == array.shape
        assert mapped.tobytes() == array.tobytes()
        assert not mapped.flags.writeable or mapped.size == 0


def test_header_version_2(tmp_path):
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, ARRAY, version=(2, 0))
    assert np.array_equal(open_array(str(tmp_path / "a.npy")).array, ARRAY)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_named_arrays(tmp_path, save):
    path = tmp_path / "both.npz"
    save(path, logits=ARRAY, labels=np.arange(12))
    assert np.array_equal(open_array(f"{path}::logits").array, ARRAY)
    assert np.array_equal(open_array(f"{path}::labels").array, np.arange(12))
    raises(path, f"holds several arrays (logits, labels): name one, as in {path}::logits")
    raises(f"{path}::wrong", "no array named 'wrong'; there are: logits, labels")


def test_a_file_may_have_the_separator_in_its_name(tmp_path):
    path = tmp_path / "run::3.npy"
    np.save(path, ARRAY)
    assert np.array_equal(open_array(str(path)).array, ARRAY)


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read from /proc")
def test_released_pages_are_given_back(tmp_path):
    path = tmp_path / "large.npy"
    np.save(path, np.ones(1 << 20))
    mapped = open_array(str(path))

    def resident():
        with open("/proc/self/smaps", encoding="utf-8") as file:
            ours = re.search(rf"{re.escape(str(path))}\n.*?Rss:\s+(\d+) kB", file.read(), re.DOTALL)
        return int(ours.group(1))

    total = mapped.array.sum()
    assert resident() >= 8192
    mapped.release()
    assert resident() == 0
    assert mapped.array.sum() == total


def test_what_can_no_longer_be_read_is_told_before_it_is_used(tmp_path, monkeypatch):
    path = tmp_path / "large.npy"
    np.save(path, np.ones((1 << 10, 1 << 10)))
    mapped = open_array(str(path))
    parts = mapped.array[512:], mapped.array[512:].T, mapped.array[:, :3], mapped.array.copy()
    for part in parts:
        mapped.check(part)
    os.truncate(path, 1 << 20)
    for part in parts:
        with pytest.raises(FileError, match=r"large.npy: truncated while it was read: 1048576 of 8388736"):
            mapped.check(part)
    # as if the file were as long as before, and the disk did not give what is in it
    monkeypatch.setattr(MappedArray, "_check_length", lambda self: None)
    try:
        mapped.mapping.madvise(POPULATE_READ, 0, 1)
    except OSError:
        pytest.skip("no such advice before Linux 5.14")
    mapped.check(mapped.array[:10])
    for part in parts[:2]:
        with pytest.raises(FileError, match=r"large.npy: the disk failed while it was read"):
            mapped.check(part)


def test_files_evaluate_like_their_arrays(tmp_path):
    rng = np.random.default_rng(0)
    logits, target = rng.standard_normal((50, 4)), rng.integers(0, 4, 50)
    np.savez(tmp_path / "a.npz", x=logits, y=target)
    seen = []
    state, n_rows, n_bytes, skipped, _ = evaluate_files(
        f"{tmp_path}/a.npz::x",
        f"{tmp_path}/a.npz::y",
        chunk_rows=20,
        backend="reference",
        progress=lambda *counts: seen.append(counts),
    )
    assert state == evaluate(logits, target, chunk_rows=20, backend="reference")
    assert (n_rows, n_bytes, skipped) == (len(target), logits.nbytes, [])
    assert seen == [(done, 50, 32 * done) for done in (0, 20, 40, 50)]


def test_memory_does_not_grow_with_the_file(tmp_path, backend):
    x, y = str(tmp_path / "x.npy"), str(tmp_path / "y.npy")
    logits = np.zeros((500_000, 20), np.float32)
    np.save(x, logits)
    np.save(y, np.zeros(500_000, np.int32))
    size = logits.nbytes
    del logits
    # What the first call imports and compiles is no part of it; nor is one traced that the simulator skips.
    evaluate_files(x, y, chunk_rows=10_000, backend=backend)
    tracemalloc.start()
    state, *_ = evaluate_files(x, y, chunk_rows=10_000, backend=backend)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert state.compute().nll_nats == pytest.approx(np.log(20), rel=1e-6)
    assert peak < size / 4


# ---- what cannot ----


def test_missing_file(tmp_path):
    raises(tmp_path / "none.npy", "No such file or directory")
    raises(f"{tmp_path}/none.npz::x", "No such file or directory")


def test_things_that_are_no_files(tmp_path):
    raises(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe")
    raises(tmp_path / "pipe", "not a regular file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    np.save(tmp_path / "a.npy", ARRAY)
    (tmp_path / "a.npy").chmod(0)
    raises(tmp_path / "a.npy", "Permission denied")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"1.0 2.0\n", "neither a .npy nor a .npz file"),
        (b"\x93NU", "truncated or damaged .npy header"),
        (b"\x93NUMPY\x01\x00\xff\x7f{", "truncated or damaged .npy header"),
        (b"\x93NUMPY\x03\x00\x04\x00{}  ", ".npy version 3.0, expected 1.0 or 2.0"),
        (b"PK\x03\x04", "damaged or unsupported .npz file"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, message):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    raises(path, message)


def test_truncated_numbers(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, ARRAY)
    path.write_bytes(path.read_bytes()[:-7])
    raises(path, "truncated: (12, 5) of float32 takes 240 bytes, 233 are there")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_archive(tmp_path, save):
    path = tmp_path / "a.npz"
    save(path, a=ARRAY)
    path.write_bytes(path.read_bytes()[:-40])
    raises(path, "damaged or unsupported .npz file")


def test_objects_are_never_unpickled(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}, []], dtype=object), allow_pickle=True)
    raises(path, "holds Python objects, not plain numbers")


def test_records(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3, [("x", "f4"), ("y", "i4")]))
    raises(path, "not plain numbers")


def test_archives_of_nothing_and_of_names_without_archive(tmp_path):
    np.savez(tmp_path / "empty.npz")
    raises(tmp_path / "empty.npz", "holds no arrays")
    np.save(tmp_path / "a.npy", ARRAY)
    raises(f"{tmp_path}/a.npy::x", "not a .npz file, so it holds no named arrays")


def test_archive_of_something_else(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "nothing to see")
    raises(path, "neither a .npy nor a .npz file")
