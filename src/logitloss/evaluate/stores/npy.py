"""Arrays in `.npy` and `.npz` files.

Everything becomes one mapping of one `.npy` stream: a file, a stored member of an archive (mapped where it
lies), or a compressed member (unpacked to a file that has no name, so that it goes away by itself). The
header is read and checked here, because NumPy's own reader answers a file of another kind with a remark on
pickles.
"""

import math
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from lzma import LZMAError
from tokenize import TokenError
from typing import IO, Any, TypeVar

import numpy as np

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.mapped import MappedArray, map_array
from logitloss.evaluate.stores.stored import Place, no_warnings, unpacking

T = TypeVar("T")

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK"
# Versions of plain numbers; 3.0 is for records with names beyond Latin-1.
HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# What NumPy's header parser lets through on a header of nonsense, beside its own ValueError.
BAD_HEADER = (ValueError, TypeError, SyntaxError, TokenError, EOFError, MemoryError, RecursionError)
# What the zip reader lets through, beside its own error: lengths of nonsense, passwords, unknown methods.
BAD_ARCHIVE = (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, struct.error, zlib.error, LZMAError)
# Of the local file header that stands before a member's bytes: its length, where the lengths of the name and
# of the extra field that follow it are (APPNOTE.TXT, 4.3.7), and the flag of an encrypted member.
ZIP_LOCAL_HEADER, ZIP_LENGTHS, ZIP_ENCRYPTED = 30, slice(26, 30), 1
# What is unpacked at once
PIECE_BYTES = 1 << 20


def open_array(place: Place) -> MappedArray:
    """Map the array in a `.npy` file, or one in a `.npz` file."""
    return _read(place, _map)


def shape_of(place: Place) -> tuple[int, ...]:
    """Return the shape of the array, of which nothing but the header is read."""

    def shape(path: str, file: IO[bytes], start: int = 0, length: int | None = None) -> tuple[int, ...]:
        return _header(path, file, start)[0]

    return _read(place, shape)


def _read(place: Place, read: Callable[..., T]) -> T:
    """Open the `.npy` stream of a place, and return what `read` makes of path, file, start and length."""
    with open(place.file, "rb") as file:
        if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
            return _read_member(place, file, read)
        if place.name:
            raise FileError(place.path, "not a .npz file, so it holds no named arrays")
        return read(place.path, file)


def _map(path: str, file: IO[bytes], start: int = 0, length: int | None = None) -> MappedArray:
    """Map the `.npy` stream of `length` bytes from `start` on; by default the whole file."""
    if isinstance(file, zipfile.ZipExtFile):
        with ExitStack() as stack:
            with unpacking(path):
                unpacked = stack.enter_context(tempfile.TemporaryFile(prefix="logitloss-"))
                unpacked.writelines(_pieces(path, file))
                unpacked.flush()
            return _map(path, unpacked)
    shape, fortran_order, dtype = _header(path, file, start)
    if dtype.hasobject or dtype.subdtype is not None or dtype.names is not None or dtype.itemsize == 0:
        kind = "Python objects" if dtype.hasobject else f"elements of type {dtype}"
        raise FileError(path, f"holds {kind}, not plain numbers")
    end = None if length is None else start + length
    return map_array(path, file, file.tell(), end, shape, dtype, fortran_order=fortran_order)


def _pieces(path: str, file: IO[bytes]) -> Iterator[bytes]:
    """Read a file, of which no error is taken for one of where it goes."""
    try:
        while piece := file.read(PIECE_BYTES):
            yield piece
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from None


def _header(path: str, file: IO[bytes], start: int) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read shape, order and type, and leave the file where the numbers start."""
    file.seek(start)
    magic = file.read(len(NPY_MAGIC))
    if not magic:
        raise FileError(path, "the file is empty")
    if magic != NPY_MAGIC[: len(magic)]:
        raise FileError(path, "neither a .npy nor a .npz file")
    file.seek(start)
    try:
        version = np.lib.format.read_magic(file)
        if version not in HEADER_READERS:
            raise FileError(path, ".npy version {}.{}, expected 1.0 or 2.0".format(*version))
        with no_warnings():
            shape, fortran_order, dtype = HEADER_READERS[version](file)
        if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise ValueError(f"shape {shape}")
    except BAD_HEADER as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if "f1'" in reason:
            what = "of float8 as NumPy writes it and cannot read it; write its bits, array.view('V1')"
            raise FileError(path, f"{what}, and say --dtype f8_e5m2") from None
        raise FileError(path, f"truncated or damaged .npy header ({reason})") from None
    return shape, fortran_order, dtype


def _read_member(place: Place, file: IO[bytes], read: Callable[..., T]) -> T:
    """Return what `read` makes of one array of an archive; where it is packed, as a file that unpacks it."""
    path = place.path
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            info = members[place.chosen(list(members))]
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & ZIP_ENCRYPTED:
                file.seek(info.header_offset)
                lengths = struct.unpack("<HH", file.read(ZIP_LOCAL_HEADER)[ZIP_LENGTHS])
                start = info.header_offset + ZIP_LOCAL_HEADER + sum(lengths)
                return read(path, file, start, info.file_size)
            with archive.open(info) as packed:
                return read(path, packed)
    except BAD_ARCHIVE as error:
        raise FileError(path, f"damaged or unsupported .npz file ({error})") from None
