"""Tensors in `.safetensors` files, mapped where they lie.

The format is a length of eight bytes, a header of JSON that gives each tensor's type, shape and place, and
the bytes (https://github.com/huggingface/safetensors#format). The header is read and checked here; no
library is needed, and none of the other tensors is looked at. Numbers may lie at any byte: the kernels get
an aligned copy of a block.
"""

import json
import math
import os
from typing import IO, Any

import ml_dtypes
import numpy as np

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.mapped import MappedArray, map_array
from logitloss.evaluate.stores.stored import Place

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"{kind}{8 * size}": np.dtype(f"<{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
# What the format allows a header
MOST_HEADER = 100_000_000
LENGTH_BYTES = 8
# What NumPy allows an array
MOST_AXES = 64


def open_array(place: Place) -> MappedArray:
    """Map the tensor that is meant."""
    with open(place.file, "rb") as file:
        tensors, start = _header(place.path, file)
        name = place.chosen(list(tensors))
        try:
            dtype, shape, begin, end = _tensor(tensors[name])
        except ValueError as error:
            raise FileError(place.path, f"damaged .safetensors header (tensor {name!r}: {error})") from None
        if dtype not in DTYPES:
            raise FileError(place.path, f"holds {dtype}, expected one of {', '.join(DTYPES)}")
        n_bytes = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != n_bytes:
            what = f"{shape} of {dtype} takes {n_bytes} bytes, but the header gives it {end - begin}"
            raise FileError(place.path, f"damaged .safetensors header (tensor {name!r}: {what})")
        return map_array(place.path, file, start + begin, start + end, shape, DTYPES[dtype])


def _header(path: str, file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """Return what the header says of each tensor, and where the bytes of all begin."""
    prefix = file.read(LENGTH_BYTES)
    if not prefix:
        raise FileError(path, "the file is empty")
    length = int.from_bytes(prefix, "little")
    there = os.fstat(file.fileno()).st_size - LENGTH_BYTES
    if length > MOST_HEADER:
        raise FileError(path, f"no .safetensors file: a header of {length} bytes, allowed are {MOST_HEADER}")
    if length > there:
        raise FileError(path, f"truncated: the header takes {length} bytes, {max(0, there)} are there")
    try:
        text = file.read(length).decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("no JSON object")
        tensors = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
        metadata = tensors.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("__metadata__ is no map of strings")
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(path, f"damaged .safetensors header ({reason})") from None
    return tensors, LENGTH_BYTES + length


def _tensor(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Return type, shape and place of a tensor, or raise ValueError."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise ValueError("its dtype is no string")
    for name, numbers in (("shape", shape), ("data_offsets", offsets)):
        # type, not isinstance: true is no number
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**60 for n in numbers):
            raise ValueError(f"its {name} is no list of sizes")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("its data_offsets are no begin and end")
    if len(shape) > MOST_AXES or math.prod(max(size, 1) for size in shape) >= 2**60:
        raise ValueError(f"its shape is {tuple(shape[:MOST_AXES])}, of {len(shape)} axes")
    return dtype, tuple(shape), *offsets


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands there twice")
        found[name] = value
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
