"""Arrays in stores: boxes of them under other axes and types, read ahead, and batches as they come."""

import threading
import warnings
from contextlib import suppress
from contextvars import ContextVar
from functools import partial

import h5py
import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from cases import rng_for
from safetensors.numpy import save_file

from logitloss import LinearLogits
from logitloss.evaluate import (
    DtypeError,
    EvaluationState,
    FileError,
    LabelError,
    ShapeError,
    evaluate,
    evaluate_files,
)
from logitloss.evaluate.ahead import ahead
from logitloss.evaluate.files import shard_files
from logitloss.evaluate.shard import Options, Shard
from logitloss.evaluate.stores import Place, StoredArray, npy, open_array, split
from logitloss.evaluate.stores.stored import one_line


class Listed(StoredArray):
    """An array in memory, that says what was read of it."""

    def __init__(self, array, step=1):
        super().__init__("listed", array.shape, array.dtype)
        self.array, self.step, self.boxes = array, step, []

    def _read(self, box):
        self.boxes.append(box)
        return self.array[box].copy()


def problem(n=50, c=7, seed="stores"):
    rng = rng_for(seed)
    return rng.standard_normal((n, c), np.float32), rng.integers(0, c, n)


# ---- boxes ----


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_any_box_of_any_order_of_axes(order):
    array = rng_for("boxes").standard_normal((3, 4, 5), np.float32)
    stored, plain = Listed(array).transpose(order), array.transpose(order)
    assert (stored.shape, stored.ndim, stored.size, stored.nbytes) == (plain.shape, 3, 60, 240)
    for box in [(), (slice(1, 3),), (slice(0, 2), slice(1, 2)), (slice(None), slice(2), slice(1, None))]:
        assert np.array_equal(stored[box], plain[box])
    again = stored.transpose((1, 0, 2))
    assert np.array_equal(again[slice(1, 2), slice(0, 2)], plain.transpose((1, 0, 2))[1:2, 0:2])


def test_another_type_of_the_same_bits():
    bits = np.arange(12, dtype=np.uint16).reshape(3, 4) << 7
    stored = Listed(bits).view(ml_dtypes.bfloat16)
    assert stored.dtype == ml_dtypes.bfloat16
    assert np.array_equal(stored[(slice(1, 2),)], bits.view(ml_dtypes.bfloat16)[1:2])


def test_samples_are_elements_at_their_places():
    array = np.arange(600).reshape(20, 30)
    places, elements = Listed(array).samples(1000)
    assert np.array_equal(places, elements)
    assert (len(places), places[0], places[-1]) == (16, 0, 599)
    places, elements = Listed(array).transpose((1, 0)).samples(4)
    assert np.array_equal(elements, array.T.ravel()[places])


def test_what_a_store_keeps_together_is_read_at_once():
    logits, target = problem(100)
    shard = Shard(Listed(logits, step=16), target, None, Options(), sample=0)
    assert shard.chunk_rows % 16 == 0
    rows = Options(chunk_rows=10)
    assert Shard(Listed(logits, step=16), target, None, rows, sample=0).chunk_rows == 10
    assert Shard(Listed(logits, step=10**9), target, None, Options(), sample=0).chunk_rows > 100


def test_what_a_library_raises_is_a_line():
    with pytest.raises(FileError, match=r"^x.npy: damaged \(first\)$"), one_line("x.npy", "damaged"):
        raise RuntimeError("first\nsecond")
    with pytest.raises(FileError, match=r"^x.npy: damaged \(KeyError\)$"), one_line("x.npy", "damaged"):
        raise KeyError
    with pytest.raises(ImportError), one_line("x.npy", "damaged"):
        raise ImportError("a library")


def test_names_in_files(tmp_path):
    assert split("a/b.npz::x/y") == Place("a/b.npz::x/y", "a/b.npz", "x/y")
    assert split("a/b.npz") == Place("a/b.npz", "a/b.npz", "")
    (tmp_path / "a::b").touch()
    assert split(f"{tmp_path}/a::b").name == ""
    assert Place("f::b", "f", "b").chosen(["a", "b"]) == "b"
    assert Place("f", "f", "").chosen(["a"]) == "a"
    for name, names, message in [
        ("c", ["a", "b"], "f: no array named 'c'; there are: a, b"),
        ("", ["a", "b"], r"f: holds several arrays \(a, b\): name one, as in f::a"),
        ("", [], "f: holds no arrays"),
    ]:
        with pytest.raises(FileError, match=message):
            Place("f", "f", name).chosen(names)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet", ".h5", ".zarr"])
def test_names_in_files_may_hold_the_separator(tmp_path, suffix):
    name, array = "in::a:b", np.arange(5)
    (tmp_path / "run::1").mkdir()
    paths = [tmp_path / "run::1" / f"{number}::x{suffix}" for number in (1, 2)]
    for path in paths:
        if suffix == ".npz":
            np.savez(path, **{name: array, "y": array[:1]})
        elif suffix == ".safetensors":
            save_file({name: array, "y": array[:1]}, path)
        elif suffix == ".parquet":
            pq.write_table(pa.table({name: array, "y": array}), path)
        elif suffix == ".h5":
            with h5py.File(path, "w") as file:
                file[name], file["y"] = array, array[:1]
        else:
            zarr.create_array(path, name=name, data=array)
            zarr.create_array(path, name="y", data=array[:1])
    (tmp_path / "run").mkdir()  # which the paths begin with, too
    for folder in (paths[0].parent, f"{paths[0].parent}/*x{suffix}"):
        assert shard_files(f"{folder}::{name}") == [f"{path}::{name}" for path in paths]
    assert np.array_equal(open_array(f"{paths[1]}::{name}")[()], array)
    with pytest.raises(FileError, match=f"::{name}"):
        open_array(str(paths[0]))


# ---- several threads ----


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_filters_of_warnings_are_those_before(tmp_path, monkeypatch, suffix):
    """Of two threads, the first to read ends before the other, which began meanwhile."""
    path = str(tmp_path / f"x{suffix}")
    (np.save if suffix == ".npy" else zarr.save_array)(path, np.arange(5))
    read = npy.HEADER_READERS[1, 0] if suffix == ".npy" else zarr.open
    threads = [threading.Thread(target=open_array, args=(path,)) for _ in range(2)]
    has_begun, both = threading.Event(), threading.Barrier(2)

    def reading(*args, **options):
        has_begun.set()
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        if threading.current_thread() is threads[1]:
            threads[0].join(5)
        return read(*args, **options)

    monkeypatch.setitem(npy.HEADER_READERS, (1, 0), reading)
    monkeypatch.setattr(zarr, "open", reading)
    before = list(warnings.filters)
    threads[0].start()
    assert has_begun.wait(5)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert both.broken
    assert warnings.filters == before


# ---- what is read is evaluated ----


@pytest.mark.parametrize("chunk_rows", [7, 50, None])
def test_a_store_evaluates_like_its_array(chunk_rows):
    logits, target = problem()
    stored = evaluate(Listed(logits), Listed(target), chunk_rows=chunk_rows)
    assert stored == evaluate(logits, target, chunk_rows=chunk_rows)
    images = logits.reshape(5, 7, 10), target.reshape(5, 10)
    stored = evaluate(*map(Listed, images), chunk_rows=chunk_rows)
    assert stored == evaluate(*images, chunk_rows=chunk_rows)
    one = evaluate(Listed(logits[0]), Listed(target[0]))
    assert one == evaluate(logits[0], target[0])


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_eight_bits_are_computed_as_they_are(dtype, tmp_path):
    logits, target = problem()
    narrow = (4 * logits).astype(dtype)
    expected = evaluate(narrow.astype(np.float32), target).compute()
    name = {"float8_e4m3fn": "f8_e4m3", "float8_e5m2": "f8_e5m2"}[np.dtype(dtype).name]
    np.save(tmp_path / "bytes.npy", narrow.view(np.uint8))
    np.save(tmp_path / "void.npy", narrow.view("V1"))  # e4m3 as NumPy saves it; what it saves of e5m2 is none
    np.save(tmp_path / "y.npy", target)
    for found in (
        evaluate(narrow, target),
        evaluate(narrow, target, dtype="f32"),
        evaluate(narrow, target, dtype="bf16"),
        evaluate(narrow, target, dtype="f16"),
        evaluate(str(tmp_path / "bytes.npy"), tmp_path / "y.npy", dtype=name),
        evaluate(str(tmp_path / "void.npy"), tmp_path / "y.npy", dtype=name),
    ):
        assert found.compute().nll_nats == pytest.approx(expected.nll_nats, rel=1e-6)
        assert found.compute().accuracy == expected.accuracy
    with pytest.raises(
        DtypeError, match="of type uint8: if that is the bits of floats, say --dtype f8_e4m3 or f8_e5m2"
    ):
        evaluate(narrow.view(np.uint8), target)
    with pytest.raises(DtypeError, match="would lose digits"):
        evaluate(logits, target, dtype=name)


def test_hidden_states_of_eight_bits(tmp_path):
    rng = rng_for("hidden of eight bits")
    hidden = rng.standard_normal((40, 16)).astype(ml_dtypes.float8_e4m3fn)
    weight = rng.standard_normal((9, 16), np.float32)
    target = rng.integers(0, 9, 40)
    wide = evaluate(LinearLogits(hidden.astype(np.float32), weight), target)
    for name, array in {"h": hidden.view(np.uint8), "w": weight, "y": target}.items():
        np.save(tmp_path / f"{name}.npy", array)
    files = [str(tmp_path / f"{name}.npy") for name in "hyw"]
    state, *_ = evaluate_files(*files[:2], unembedding_path=files[2], dtype="f8_e4m3")
    assert state == wide


# ---- reading ahead ----


def test_one_block_is_read_while_another_is_used():
    begun = [threading.Event() for _ in range(4)]

    def read(number):
        begun[number].set()
        return number, threading.current_thread()

    for number, thread in ahead(partial(read, n) for n in range(4)):
        assert (thread is threading.current_thread()) == (number == 0)  # there is nothing to use meanwhile
        if number < 3:
            assert begun[number + 1].wait(10)
        assert not any(event.is_set() for event in begun[number + 2 :])


def test_what_cannot_be_read_is_raised_in_its_turn():
    def read(number):
        if number == 2:
            raise FileError("x.npy", "is gone")
        return number

    seen = []
    with pytest.raises(FileError, match=r"x.npy: is gone"):
        seen.extend(ahead(partial(read, n) for n in range(4)))
    numbers = ahead(partial(read, n) for n in range(4))
    assert [next(numbers), next(numbers)] == [0, 1]
    with pytest.raises(FileError):
        next(numbers)
    assert list(ahead(())) == []


# ---- batches ----


def test_batches_evaluate_like_their_arrays():
    logits, target = problem()
    keys = target % 3
    parts = [slice(0, 20), slice(20, 21), slice(21, 21), slice(21, 50)]
    seen = []
    state = evaluate(
        ((logits[part], target[part], keys[part]) for part in parts),
        per_class=True,
        progress=lambda *counts: seen.append(counts),
    )
    expected = EvaluationState(per_class=True)
    for part in parts:
        expected.update(logits[part], target[part], groups=keys[part])
    assert state == expected
    assert seen == [(n, n, 28 * n) for n in (0, 20, 21, 21, 50)]
    assert evaluate([(logits.tolist(), target.tolist())]).compute().count == 50
    assert evaluate(iter(())) == EvaluationState()


def test_batches_of_hidden_states_and_of_more_rows_than_a_block():
    rng = rng_for("batches of hidden states")
    hidden, weight, target = rng.standard_normal((30, 8)), rng.standard_normal((5, 8)), rng.integers(0, 5, 30)
    logits = LinearLogits(hidden, weight)
    state = evaluate([(logits, target)], chunk_rows=7)
    assert state == evaluate(logits, target, chunk_rows=7)


def test_bad_batches_are_named():
    logits, target = problem()
    bad = target.copy()
    bad[3] = 9
    with pytest.raises(LabelError, match=r"^target of batch 1: row 3: label 9 is outside 0 to 6"):
        evaluate([(logits, target), (logits, bad)])
    masked = np.ma.masked_array(logits, logits > 1)
    with pytest.raises(DtypeError, match=r"^arrays of batch 1: logits is a masked array"):
        evaluate([(logits, target), (masked, target)])
    with pytest.raises(ShapeError, match="logits of batch 1: of 3 classes, but shards before have 7"):
        evaluate([(logits, target), (logits[:, :3], target % 3)])
    for batch in [logits, (logits,), None]:
        with pytest.raises(ShapeError, match="arrays of batch 0: expected a tuple of logits, target"):
            evaluate([batch])
    with pytest.raises(ShapeError, match="state_file: is for arrays and files"):
        evaluate([(logits, target)], state_file="x.json")

    def failing():
        yield logits, target
        raise RuntimeError("the model is gone")

    with pytest.raises(RuntimeError, match="the model is gone"):
        evaluate(failing())


def test_batches_are_made_where_they_are_asked_for():
    """A generator has its caller's thread and context, and may fill the same arrays again."""
    logits, target = problem()
    setting, seen = ContextVar("setting"), []
    setting.set("the caller's")
    x, y = np.empty_like(logits), np.empty_like(target)

    def refilled():
        for number in range(3):
            seen.append((threading.current_thread(), setting.get(None)))
            x[...], y[...] = number * logits, (target + number) % 7
            yield x, y

    state = evaluate(refilled())
    assert seen == [(threading.current_thread(), "the caller's")] * 3
    assert state == evaluate([(number * logits, (target + number) % 7) for number in range(3)])


# ---- paths ----


def test_paths_in_place_of_arrays(tmp_path):
    logits, target = problem()
    np.save(tmp_path / "x.npy", logits)
    np.save(tmp_path / "y.npy", target)
    state = evaluate(tmp_path / "x.npy", tmp_path / "y.npy", groups=tmp_path / "y.npy", chunk_rows=20)
    assert state == evaluate(logits, target, groups=target, chunk_rows=20)
    with pytest.raises(DtypeError, match="target: a ndarray, expected a path, since logits are one"):
        evaluate(tmp_path / "x.npy", target)
    with pytest.raises(ShapeError, match="target: is missing"):
        evaluate(str(tmp_path / "x.npy"))


def test_pages_of_the_block_ahead_stay(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.arange(1 << 16, dtype=np.float64).reshape(64, 1024))
    mapped = open_array(str(path))
    for first in range(0, 64, 16):
        block = mapped[slice(first, first + 16),]
        ahead = mapped[slice(first + 16, first + 32),]
        mapped.release((slice(first, first + 16),))
        assert block[0, 0] == first * 1024
        assert ahead.sum() == np.arange((first + 16) * 1024, min(first + 32, 64) * 1024).sum()
