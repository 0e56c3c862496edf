"""The limit of memory, in seconds: `limits.c`, compiled here for this processor and called through ctypes.

`reads`, `copies` and `triads` give functions of no arguments, each one pass over the arrays in another manner
(with and without software prefetch, reads also in several streams). Which manner is fastest differs between
machines and hours, so a caller times them all, and the limit is the fastest. `are_quiet` says whether the
cores are ours alone. Nothing here knows of the package that is measured.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("limits.c")
CACHE = Path(__file__).parent.parent / ".asv" / "limits"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fopenmp", "-march=native")
IN_ORDER = {"prefetched": 1, "plain": 0}
STREAMS = {"3 streams": 2}
# Of `crowding` in limits.c
QUIET = 1.2


def reads(*arrays, threads, manners=IN_ORDER):
    """Return the manners of reading all the arrays once."""
    spans = [(address(array), array.nbytes) for array in arrays]

    def read(manner):
        for start, size in spans:
            library().limit_read(start, size, threads, manner)

    return [functools.partial(read, manner) for manner in manners.values()]


def copies(out, array, *, threads):
    """Return the manners of copying `array` to `out`, past the caches."""
    arguments = address(out), address(array), array.nbytes, threads
    return [functools.partial(library().limit_copy, *arguments, ahead) for ahead in IN_ORDER.values()]


def triads(out, first, second, *, threads):
    """Return the manners of reading two arrays, the second perhaps of narrower type, and writing a third."""
    halvings = (first.itemsize // second.itemsize).bit_length() - 1
    arguments = address(out), address(first), address(second), first.nbytes, halvings, threads
    return [functools.partial(library().limit_triad, *arguments, ahead) for ahead in IN_ORDER.values()]


def are_quiet(threads):
    """Whether nobody else computes on these threads' cores just now."""
    return library().limit_crowding(threads) < QUIET


def address(array):
    if not array.flags.c_contiguous:
        raise ValueError("the limit is that of contiguous arrays")
    return array.ctypes.data


@functools.cache
def library():
    """Compile the passes, or take what an earlier process compiled from the same source."""
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS]
    # What the compiler knows of this processor is part of the key, for a folder that several machines share.
    processor = subprocess.run(
        [*command, "-dM", "-E", "-x", "c", os.devnull], check=True, capture_output=True
    ).stdout
    key = hashlib.sha256(SOURCE.read_bytes() + processor).hexdigest()[:16]
    built = CACHE / f"limits-{key}.so"
    if not built.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            fresh = Path(folder, built.name)
            subprocess.run([*command, str(SOURCE), "-o", str(fresh)], check=True)
            fresh.replace(built)
    loaded = ctypes.CDLL(str(built))
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    loaded.limit_read.argtypes = (pointer, size, number, number)
    loaded.limit_read.restype = ctypes.c_uint64
    loaded.limit_copy.argtypes = (pointer, pointer, size, number, number)
    loaded.limit_copy.restype = None
    loaded.limit_triad.argtypes = (pointer, pointer, pointer, size, number, number, number)
    loaded.limit_triad.restype = None
    loaded.limit_crowding.argtypes = (number,)
    loaded.limit_crowding.restype = ctypes.c_double
    return loaded
