"""Tensors in `.safetensors` files: mapped wherever they lie, and one line about each header that is wrong."""

import json
import re

import numpy as np
import pytest
from cases import rng_for
from children import run_child
from safetensors.numpy import save_file

from logitloss.evaluate import DtypeError, FileError, evaluate
from logitloss.evaluate.stores import open_array
from logitloss.evaluate.stores.safetensors import DTYPES


def write(path, header, data=b"", length=None):
    """Write a file whose header is text, or made of a dict."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return str(path)


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def bits(dtype, shape, seed="safetensors"):
    """Return any bits as numbers; of bool only 0 and 1."""
    n_bytes = int(np.prod(shape)) * dtype.itemsize
    raw = rng_for(seed).integers(0, 2 if dtype.kind == "b" else 256, n_bytes, np.uint8)
    return raw.view(dtype).reshape(shape)


# ---- what can be read ----


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 2)])
def test_every_type_comes_back_from_bytes_written_by_hand(tmp_path, name, shape):
    array = bits(DTYPES[name], shape)
    header = {"__metadata__": {"format": "pt"}, "x": entry(name, shape, 3, 3 + array.nbytes)}
    stored = open_array(write(tmp_path / "x.safetensors", header, b"abc" + array.tobytes() + b"rest"))
    assert (stored.shape, stored.dtype) == (array.shape, array.dtype)
    assert stored[()].tobytes() == array.tobytes()


def test_what_the_library_writes_of_numpy(tmp_path):
    names = ("F64", "F32", "F16", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")
    arrays = {name: bits(DTYPES[name], (6, 5), name) for name in names}
    save_file(arrays, tmp_path / "all.safetensors", metadata={"by": "numpy"})
    for name, array in arrays.items():
        stored = open_array(f"{tmp_path}/all.safetensors::{name}")
        assert stored.dtype == array.dtype
        assert stored[()].tobytes() == array.tobytes()


def test_what_the_library_writes_of_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from safetensors.torch import save_file

    wide = rng_for("torch").standard_normal((30, 7), np.float32)
    types = {torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    tensors = {name: torch.from_numpy(wide).to(dtype) for dtype, name in types.items()}
    save_file(tensors, tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        array = open_array(f"{tmp_path}/t.safetensors::{name}")[()]
        assert array.dtype == DTYPES[name]
        assert np.array_equal(array.astype(np.float32), tensor.to(torch.float32).numpy())


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
def test_numbers_at_odd_places_evaluate_like_their_array(tmp_path, name):
    rng = rng_for("odd places")
    logits, target = rng.standard_normal((50, 7)).astype(DTYPES[name]), rng.integers(0, 7, 50)
    n = logits.nbytes
    header = {"logits": entry(name, (50, 7), 1, 1 + n), "label": entry("I64", (50,), 1 + n, 401 + n)}
    text = json.dumps(header).encode()
    text += b" " * (len(text) % 2)  # the header ends at an even place, and the logits begin behind one byte
    path = write(tmp_path / "x.safetensors", text, b"?" + logits.tobytes() + target.tobytes())
    assert not open_array(f"{path}::logits").array.flags.aligned
    found = evaluate(f"{path}::logits", f"{path}::label", chunk_rows=20)
    assert found == evaluate(logits, target, chunk_rows=20)


def test_shards_of_tensors(tmp_path):
    rng = rng_for("shards of tensors")
    logits, target = rng.standard_normal((40, 3), np.float32), rng.integers(0, 3, 40)
    for number, rows in enumerate(np.split(np.arange(40), [7, 7, 30])):
        save_file({"x": logits[rows], "y": target[rows]}, tmp_path / f"{number}.safetensors")
    for shards in (str(tmp_path), f"{tmp_path}/*.safetensors"):
        assert evaluate(f"{shards}::x", f"{shards}::y").compute().nll_nats == pytest.approx(
            evaluate(logits, target).compute().nll_nats, rel=1e-12
        )


def test_no_more_is_read_than_is_asked_for(tmp_path):
    """A file of a gibibyte, mostly a hole: one small tensor in it takes no memory of the others."""
    far = 1 << 30
    header = {"big": entry("BF16", (far // 2,), 0, far), "x": entry("F32", (2, 2), far, far + 16)}
    path = write(tmp_path / "x.safetensors", header)
    with open(path, "r+b") as file:
        file.seek(far, 2)
        file.write(np.arange(4, dtype=np.float32).tobytes())
    printed = run_child(
        "from test_memory import peak\n"
        "from logitloss.evaluate.stores import open_array\n"
        "before = peak()\n"
        "print(open_array(sys.argv[1] + '::x')[()].tolist(), open_array(sys.argv[1] + '::big').shape)\n"
        "assert peak() - before < 16384, (before, peak())",
        path,
    )
    assert printed == f"[[0.0, 1.0], [2.0, 3.0]] ({far // 2},)\n"


# ---- what cannot ----


def test_names(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry(), "b": entry()}, bytes(8))
    for name, what in [
        ("", "holds several arrays (a, b): name one, as in"),
        ("::c", "no array named 'c'; there are: a, b"),
        ("::__metadata__", "no array named '__metadata__'"),
    ]:
        with pytest.raises(FileError, match=re.escape(f"{path}{name}: {what}")):
            open_array(path + name)
    with pytest.raises(FileError, match="holds no arrays"):
        open_array(write(tmp_path / "none.safetensors", {"__metadata__": {}}))


@pytest.mark.parametrize(
    ("header", "length", "what"),
    [
        (b"", 1 << 62, "no .safetensors file: a header of 4611686018427387904 bytes, allowed are 100000000"),
        (b"{}", 100, "truncated: the header takes 100 bytes, 2 are there"),
        (b"", 0, "no JSON object"),
        (b'{"x"', None, "damaged .safetensors header"),
        (b"\xff{}", None, "damaged .safetensors header ('utf-8' codec"),
        (b' {"x": 1}', None, "no JSON object"),
        (b"{} {}", None, "Extra data"),
        (b'{"x":' + 200_000 * b"[", None, "recursion"),
        (b'{"x": 1' + 5000 * b"0" + b"}", None, "damaged .safetensors header (Exceeds the limit"),
        (b'{"x": NaN}', None, "NaN is no JSON"),
        (b'{"x": 1, "x": 2}', None, "'x' stands there twice"),
        ({"__metadata__": {"a": 1}, "x": entry()}, None, "__metadata__ is no map of strings"),
        ({"__metadata__": [], "x": entry()}, None, "__metadata__ is no map of strings"),
        ({"x": 1}, None, "tensor 'x': expected dtype, shape and data_offsets"),
        ({"x": {"dtype": "F32", "shape": [2]}}, None, "expected dtype, shape and data_offsets"),
        ({"x": entry(dtype=4)}, None, "its dtype is no string"),
        ({"x": entry(dtype="F4")}, None, "holds F4, expected one of F64, F32, F16, BF16, F8_E4M3"),
        ({"x": entry(shape=(-2,))}, None, "its shape is no list of sizes"),
        ({"x": entry(shape=(True, 2))}, None, "its shape is no list of sizes"),
        ({"x": entry(shape=(2.0,))}, None, "its shape is no list of sizes"),
        ({"x": entry(shape=(2**60,))}, None, "its shape is no list of sizes"),
        ({"x": entry(shape=(2**40, 2**40, 0))}, None, "its shape is (1099511627776, 1099511627776, 0)"),
        ({"x": entry(shape=70 * (1,), end=4)}, None, "of 70 axes"),
        ({"x": entry(begin=-8, end=0)}, None, "its data_offsets is no list of sizes"),
        ({"x": entry(begin=8, end=0)}, None, "its data_offsets are no begin and end"),
        ({"x": {**entry(), "data_offsets": [0, 8, 16]}}, None, "its data_offsets are no begin and end"),
        ({"x": entry(shape=(3,))}, None, "(3,) of F32 takes 12 bytes, but the header gives it 8"),
        ({"x": entry(shape=(4,), end=16)}, None, "truncated: (4,) of float32 takes 16 bytes, 8 are there"),
        ({"x": entry(begin=1 << 40, end=(1 << 40) + 8)}, None, "takes 8 bytes, 0 are there"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_headers_that_are_wrong(tmp_path, header, length, what):
    path = write(tmp_path / "x.safetensors", header, bytes(8) if isinstance(header, dict) else b"", length)
    with pytest.raises(FileError) as caught:
        open_array(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_and_types_that_are_no_logits(tmp_path):
    (tmp_path / "e.safetensors").touch()
    with pytest.raises(FileError, match="the file is empty"):
        open_array(str(tmp_path / "e.safetensors"))
    path = write(tmp_path / "x.safetensors", {"x": entry("I32", (2, 1)), "y": entry("I32")}, bytes(8))
    with pytest.raises(DtypeError, match=r"x.safetensors::x: of type int32, expected one of"):
        evaluate(f"{path}::x", f"{path}::y")
