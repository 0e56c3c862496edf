"""Arrays as callers really have them: strided, reversed, broadcast, read-only, mapped, next to a wall.

`LAYOUTS` maps a name to a function that returns an array equal to its argument in another layout.
`guarded` puts an array flush against a page that may not be touched, so that a read or write one
element outside it ends the process instead of passing unseen. `untouched` reserves what need not be there.
"""

import ctypes
import mmap
import sys

import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded(array: np.ndarray, *, side: str = "end") -> np.ndarray:
    """Return a writable C-ordered copy whose `side` ("start" or "end") touches an inaccessible page."""
    array = np.ascontiguousarray(array).reshape(np.shape(array))
    pages = -(-max(array.nbytes, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    wall = base + pages * PAGE if side == "end" else base
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(PAGE), PROT_NONE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")
    offset = pages * PAGE - array.nbytes if side == "end" else PAGE
    raw = np.frombuffer(memory, np.uint8, array.nbytes, offset)
    copy = raw.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def untouched(shape, dtype) -> np.ndarray:
    """Return zeros of any size that take address space but, until written, no memory."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8).view(dtype).reshape(shape)


def has_guard_pages() -> bool:
    return sys.platform != "win32"


def contiguous(array):
    return array.copy(order="C")


def fortran(array):
    return array.copy(order="F")


def reversed_rows(array):
    return array[::-1].copy()[::-1]


def reversed_classes(array):
    return array[..., ::-1].copy()[..., ::-1]


def every_third(array):
    """Neither axis contiguous; what lies between is NaN, or a label no row has."""
    shape = tuple(3 * n for n in array.shape)
    filler = np.nan if array.dtype.kind not in "iub" else 77
    wide = np.full(shape, filler, array.dtype)
    view = wide[tuple(slice(1, None, 3) for _ in shape)]
    view[...] = array
    return view


def every_second_class(array):
    """What lies between is NaN, or a label no row has; nothing follows the last item."""
    filler = np.nan if array.dtype.kind not in "iub" else 77
    wide = np.full((*array.shape[:-1], max(2 * array.shape[-1] - 1, 0)), filler, array.dtype)
    view = wide[..., ::2]
    view[...] = array
    return view


def padded_rows(array):
    """Rows contiguous, but further apart than they are long, as a slice of a wider array is."""
    if array.ndim == 0:
        return array.copy()
    wide = np.full((*array.shape[:-1], array.shape[-1] + 5), np.nan if array.dtype.kind not in "iub" else 77)
    wide = wide.astype(array.dtype)
    view = wide[..., 3:-2]
    view[...] = array
    return view


def read_only(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def unaligned_start(array):
    """Starts one element after an aligned address."""
    flat = np.empty(array.size + 1, array.dtype)
    view = flat[1:].reshape(array.shape)
    view[...] = array
    return view


LAYOUTS = {
    "contiguous": contiguous,
    "fortran": fortran,
    "reversed_rows": reversed_rows,
    "reversed_classes": reversed_classes,
    "every_third": every_third,
    "every_second_class": every_second_class,
    "padded_rows": padded_rows,
    "read_only": read_only,
    "unaligned_start": unaligned_start,
}
WRITABLE_LAYOUTS = {name: make for name, make in LAYOUTS.items() if name != "read_only"}
