"""Arrays in `.npy` and `.npz` files, mapped into memory whatever their size.

Everything becomes one mapping of one `.npy` stream: a file, a stored member of an archive (mapped where it
lies), or a compressed member (unpacked to a file that has no name, so that it goes away by itself). The
header is read and checked here, because NumPy's own reader answers a file of another kind with a remark on
pickles.
"""

import errno
import math
import mmap
import os
import shutil
import stat
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from lzma import LZMAError
from tokenize import TokenError
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import FileError

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
# Of madvise(2), which Python has no name for
POPULATE_READ = 22


class Mapped(NamedTuple):
    """An array and the mapping its bytes are in."""

    path: str
    array: npt.NDArray[Any]
    mapping: mmap.mmap

    def release(self) -> None:
        """Let go of the pages used so far; the system's file cache keeps them, the process does not."""
        if hasattr(self.mapping, "madvise"):
            self.mapping.madvise(mmap.MADV_DONTNEED)

    def check(self, part: npt.NDArray[Any]) -> None:
        """Map the pages of a part of the array, or raise FileError if they can no longer be read.

        Where kernels meet such a page, the system ends the process (SIGBUS). What is mapped here may still be
        cut off before it is used, but no disk is waited for in between.
        """
        self._check_length()
        if not part.size or sys.platform != "linux":
            return
        low, high = np.lib.array_utils.byte_bounds(part)
        if high - low > 2 * part.nbytes:  # scattered: the whole file might be between
            return
        start = low - (self.array.ctypes.data + self.array.nbytes - len(self.mapping))
        start, end = start - start % mmap.PAGESIZE, start + high - low
        if not 0 <= start < end <= len(self.mapping):  # a copy, of which nothing is mapped
            return
        try:
            self.mapping.madvise(POPULATE_READ, start, end - start)
        except OSError as error:
            self._check_length()
            if error.errno == errno.EFAULT:
                raise FileError(self.path, "the disk failed while it was read") from None
            # else the advice is none yet, as before Linux 5.14

    def _check_length(self) -> None:
        there = self.mapping.size()
        if there < len(self.mapping):
            what = f"truncated while it was read: {there} of {len(self.mapping)} bytes are left"
            raise FileError(self.path, what)


def open_array(path: str) -> Mapped:
    """Map the array in a `.npy` file, or one in a `.npz` file (`PATH::name` says which).

    Raises
    ------
    FileError
        It is missing, no array, truncated, or holds several arrays and `path` names none.
    """
    return _read(path, _map)


def shape_of(path: str) -> tuple[int, ...]:
    """Return the shape of the array that `open_array` would map, of which nothing but the header is read."""

    def shape(path: str, file: IO[bytes], start: int = 0, length: int | None = None) -> tuple[int, ...]:
        return _header(path, file, start)[0]

    return _read(path, shape)


def _read(path: str, read: Callable[..., T]) -> T:
    """Open the `.npy` stream of a path, and return what `read` makes of path, file, start and length."""
    file_name, separator, member = path.rpartition("::")
    if not separator or os.path.exists(path):
        file_name, member = path, ""
    try:
        # What is no regular file is told before opening: a pipe that nobody writes to would never open.
        if not stat.S_ISREG(os.stat(file_name).st_mode):
            raise FileError(path, "not a regular file")
        with open(file_name, "rb") as file:
            if file.read(len(ZIP_MAGIC)) == ZIP_MAGIC:
                return _read_member(path, file, member, read)
            if member:
                raise FileError(path, "not a .npz file, so it holds no named arrays")
            return read(path, file)
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from None


def _map(path: str, file: IO[bytes], start: int = 0, length: int | None = None) -> Mapped:
    """Map the `.npy` stream of `length` bytes from `start` on; by default the whole file."""
    if isinstance(file, zipfile.ZipExtFile):
        with tempfile.TemporaryFile(prefix="logitloss-") as unpacked:
            shutil.copyfileobj(file, unpacked, 1 << 20)
            unpacked.flush()
            return _map(path, unpacked)
    end = os.fstat(file.fileno()).st_size
    if length is not None:
        end = min(end, start + length)
    shape, fortran_order, dtype = _header(path, file, start)
    if dtype.hasobject or dtype.subdtype is not None or dtype.names is not None or dtype.itemsize == 0:
        kind = "Python objects" if dtype.hasobject else f"elements of type {dtype}"
        raise FileError(path, f"holds {kind}, not plain numbers")
    offset, n_bytes = file.tell(), math.prod(shape) * dtype.itemsize
    if offset + n_bytes > end:
        there = max(0, end - offset)
        raise FileError(path, f"truncated: {shape} of {dtype} takes {n_bytes} bytes, {there} are there")
    mapping = mmap.mmap(file.fileno(), offset + n_bytes, access=mmap.ACCESS_READ)
    if hasattr(mapping, "madvise"):
        mapping.madvise(mmap.MADV_SEQUENTIAL)
    array: npt.NDArray[Any] = np.ndarray(
        shape,
        dtype,
        mapping if n_bytes else None,
        offset if n_bytes else 0,
        order="F" if fortran_order else "C",
    )
    return Mapped(path, array, mapping)


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
        with warnings.catch_warnings(action="ignore"):
            shape, fortran_order, dtype = HEADER_READERS[version](file)
        if any(size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise ValueError(f"shape {shape}")
    except BAD_HEADER as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(path, f"truncated or damaged .npy header ({reason})") from None
    return shape, fortran_order, dtype


def _read_member(path: str, file: IO[bytes], member: str, read: Callable[..., T]) -> T:
    """Return what `read` makes of one array of an archive; where it is packed, as a file that unpacks it."""
    try:
        with zipfile.ZipFile(file) as archive:
            info = _choose(path, archive, member)
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & ZIP_ENCRYPTED:
                file.seek(info.header_offset)
                lengths = struct.unpack("<HH", file.read(ZIP_LOCAL_HEADER)[ZIP_LENGTHS])
                start = info.header_offset + ZIP_LOCAL_HEADER + sum(lengths)
                return read(path, file, start, info.file_size)
            with archive.open(info) as packed:
                return read(path, packed)
    except BAD_ARCHIVE as error:
        raise FileError(path, f"damaged or unsupported .npz file ({error})") from None


def _choose(path: str, archive: zipfile.ZipFile, member: str) -> zipfile.ZipInfo:
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    names = ", ".join(members)
    if member:
        if member not in members:
            raise FileError(path, f"no array named {member!r}; there are: {names}")
        return members[member]
    if not members:
        raise FileError(path, "holds no arrays")
    if len(members) > 1:
        raise FileError(
            path, f"holds several arrays ({names}): name one, as in {path}::{next(iter(members))}"
        )
    return next(iter(members.values()))
