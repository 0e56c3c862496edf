"""Arrays in files and stores of several formats, all as a `StoredArray` of which boxes are read.

A format is a module of this package with `open_array(place)`. It is told by the name's ending, and imported
when the first such file is met; a file of any other name is taken for `.npy` or `.npz`, which say what they
are.
"""

import glob
import importlib
import os
import re
import stat
from typing import Any

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.stored import Place, StoredArray

__all__ = ["SUFFIXES", "Place", "StoredArray", "is_store", "open_array", "shape_of", "split"]

# The module of each format, by the ending of its files' names
SUFFIXES = {
    ".npy": "npy",
    ".npz": "npy",
    ".safetensors": "safetensors",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".parquet": "parquet",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".zarr": "zarr",
    ".zip": "zarr",
}
# Files that make a directory a Zarr store, of version 3 or 2
ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")


def split(path: str) -> Place:
    """Return the file of a path, and the name in it that may follow (`PATH::name`); both may hold `::`."""
    found = Place(path, path, "")
    if "::" not in path or os.path.exists(path):
        return found
    ends = [match.start() for match in re.finditer("(?=::)", path)]
    places = [Place(path, path[:end], path[end + 2 :]) for end in reversed(ends)]
    is_there = (place for place in (*places, found) if _exists(place.file))
    return next(is_there, places[0])


def _exists(file: str) -> bool:
    """Whether there is a file of this name, or one that matches it."""
    if os.path.exists(file):
        return True
    return glob.has_magic(file) and any(True for _ in glob.iglob(file, recursive=True))


def is_store(folder: str) -> bool:
    """Whether a directory is a store of one of the formats, not a directory of shards."""
    if os.path.splitext(folder)[1].lower() == ".zarr":
        return os.path.isdir(folder)
    return any(os.path.isfile(os.path.join(folder, name)) for name in ZARR_FILES)


def open_array(path: str) -> StoredArray:
    """Open the array at a path; `PATH::name` says which, where there are several.

    Raises
    ------
    FileError
        It is missing, no array, truncated, or one of several and not named.
    ImportError
        The library that reads such files is not installed.
    """
    opened: StoredArray = _call("open_array", path)
    return opened


def shape_of(path: str) -> tuple[int, ...]:
    """Return the shape of the array that `open_array` would open, with as little read as can be."""
    shape: tuple[int, ...] = _call("shape_of", path)
    return shape


def _call(function: str, path: str) -> Any:
    place = split(path)
    form = SUFFIXES.get(os.path.splitext(place.file)[1].lower(), "npy")
    try:
        # What is no regular file is told before opening: a pipe that nobody writes to would never open.
        if not stat.S_ISREG(os.stat(place.file).st_mode):
            if not is_store(place.file):
                raise FileError(path, "not a regular file")
            form = "zarr"
        module = importlib.import_module(f"{__name__}.{form}")
        if hasattr(module, function):
            return getattr(module, function)(place)
        opened = module.open_array(place)
        opened.close()
        return opened.shape
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from None
