"""Arrays that lie in a file as they do in memory, mapped: nothing is copied, and nothing stays resident."""

import errno
import math
import mmap
import os
import sys
from contextlib import suppress
from typing import IO

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.stored import Array, Box, StoredArray, far_apart

# Of madvise(2), which Python has no name for
POPULATE_READ = 22
# Elements of which samples are taken between two releases
AT_ONCE = 16


class MappedArray(StoredArray):
    """An array and the mapping its bytes are in, at its end.

    Parameters
    ----------
    path : str
        For errors.
    mapping : mmap
        Of the file, from its start to the array's end.
    array : ndarray
        The array in it.
    """

    def __init__(self, path: str, mapping: mmap.mmap, array: Array) -> None:
        super().__init__(path, array.shape, array.dtype)
        self.mapping, self.array = mapping, array

    def _read(self, box: Box) -> Array:
        part = self.array[box]
        self.check(part)
        return part

    def release(self, box: Box = ()) -> None:
        """Let go of the pages of a box; the system's file cache keeps them, the process does not."""
        self.let_go(self.array[self._stored(box)] if box else None)

    def let_go(self, part: Array | None) -> None:
        """Let go of the pages of a part of the array; of all, if it is none or scattered."""
        if hasattr(self.mapping, "madvise"):
            start, end = (0, 0) if part is None else self._span(part)
            if end:
                start = start + -start % mmap.PAGESIZE
                if start < end:
                    self.mapping.madvise(mmap.MADV_DONTNEED, start, end - start)
            else:
                self.mapping.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Bring to the disk what was written."""
        self.mapping.flush()

    def check(self, part: Array) -> None:
        """Map the pages of a part of the array, or raise FileError if they can no longer be read.

        Where kernels meet such a page, the system ends the process (SIGBUS). What is mapped here may still be
        cut off before it is used, but no disk is waited for in between.
        """
        self._check_length()
        start, end = self._span(part)
        if end == 0 or sys.platform != "linux":
            return
        start -= start % mmap.PAGESIZE
        try:
            self.mapping.madvise(POPULATE_READ, start, end - start)
        except OSError as error:
            self._check_length()
            if error.errno == errno.EFAULT:
                raise FileError(self.path, "the disk failed while it was read") from None
            # else the advice is none yet, as before Linux 5.14

    def _span(self, part: Array) -> tuple[int, int]:
        """Return where a part lies in the mapping; (0, 0) if it is nothing, or scattered over all of it."""
        if not part.size:
            return 0, 0
        low, high = np.lib.array_utils.byte_bounds(part)
        if high - low > 2 * part.nbytes:  # scattered: the whole file might be between
            return 0, 0
        start = low - (self.array.ctypes.data + self.array.nbytes - len(self.mapping))
        if not 0 <= start < start + high - low <= len(self.mapping):  # a copy, of which nothing is mapped
            return 0, 0
        return start, start + high - low

    def _check_length(self) -> None:
        there = self.mapping.size()
        if there < len(self.mapping):
            what = f"truncated while it was read: {there} of {len(self.mapping)} bytes are left"
            raise FileError(self.path, what)

    def samples(self, most: int) -> tuple[npt.NDArray[np.int64], Array]:
        """Return elements far apart, and where they are in C order."""
        places = far_apart(self.size, most)
        elements = np.empty(places.size, self.dtype)
        array = self.array.view(self.dtype)[self._seen].transpose(self._axes)
        for first in range(0, places.size, AT_ONCE):
            some = slice(first, first + AT_ONCE)
            elements[some] = array[np.unravel_index(places[some], array.shape)]
            self.release()  # what is mapped for one element may be megabytes
        return places, elements


def map_array(
    path: str,
    file: IO[bytes],
    offset: int,
    end: int | None,
    shape: tuple[int, ...],
    dtype: np.dtype[np.generic],
    *,
    fortran_order: bool = False,
) -> MappedArray:
    """Map an array that begins at `offset` of a file, and must be through by `end`, the file's if it is None.

    Raises
    ------
    FileError
        It is longer than that.
    """
    size = os.fstat(file.fileno()).st_size
    end = size if end is None else min(size, end)
    n_bytes = math.prod(shape) * dtype.itemsize
    if offset + n_bytes > end:
        there = max(0, end - offset)
        raise FileError(path, f"truncated: {shape} of {dtype} takes {n_bytes} bytes, {there} are there")
    mapping = mmap.mmap(file.fileno(), offset + n_bytes, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # where the system has none
            # Read from the disk in pieces of 2 MB, which are then mapped whole: 5 ns for each 4096 bytes in
            # place of 50 to 200, in which kernels read them.
            mapping.madvise(mmap.MADV_HUGEPAGE)
    array: Array = np.ndarray(
        shape,
        dtype,
        mapping if n_bytes else None,
        offset if n_bytes else 0,
        order="F" if fortran_order else "C",
    )
    return MappedArray(path, mapping, array)
