"""An array in a store, of which boxes are read: what an evaluation uses of an ndarray, and no more.

A format says how a box is read, as it lies in the store; which part of it is seen, along which axes and under
which type, is the same for all and stands here. What a format's library raises on a file that is not as it
should be becomes one line with the file's name.
"""

import copy
import importlib
import math
import os
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import EvaluationError, FileError, OutputError

Array = npt.NDArray[Any]
Box = tuple[slice, ...]

_one_at_a_time: threading.Lock


def _start() -> None:
    """Have a lock that is free: a forked child has no thread that could release its parent's."""
    global _one_at_a_time
    _one_at_a_time = threading.Lock()


_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)


class Place(NamedTuple):
    """Where an array is: the path as it was given, for errors, its file, and its name in there."""

    path: str
    file: str
    name: str

    def chosen(self, names: Sequence[str]) -> str:
        """Return the name of the array that is meant among those that the file holds."""
        there = ", ".join(names)
        if self.name:
            if self.name not in names:
                raise FileError(self.path, f"no array named {self.name!r}; there are: {there}")
            return self.name
        if not names:
            raise FileError(self.path, "holds no arrays")
        if len(names) > 1:
            what = f"holds several arrays ({there}): name one, as in {self.path}::{names[0]}"
            raise FileError(self.path, what)
        return names[0]


@contextmanager
def one_line(path: str, what: str) -> Iterator[None]:
    """Make what a library raises while it reads a file a line about the file."""
    try:
        yield
    except (EvaluationError, ImportError):
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(path, f"{what} ({reason})") from None


@contextmanager
def unpacking(path: str, what: str = "what it holds, unpacked,") -> Iterator[None]:
    """Tell that a temporary file cannot be written, which is no fault of what is unpacked to it."""
    try:
        yield
    except OSError as error:
        place = tempfile.tempdir or "any temporary folder"  # if none was found that can be written to
        raise OutputError(path, f"{what} does not fit into {place} ({error})") from None


@contextmanager
def no_warnings() -> Iterator[None]:
    """Ignore warnings, in one thread at a time: two that change the filters may leave them changed for good.

    So it is for NumPy's reader of headers, as CPython 3.11 parses on one thread at a time, or fails.
    """
    with _one_at_a_time, warnings.catch_warnings(action="ignore"):
        yield


def library(name: str, extra: str) -> Any:
    """Return an optional library, or raise ImportError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        command = f"pip install 'logitloss[{extra}]'"
        raise ImportError(f"{name} reads such files and cannot be imported ({error}): {command}") from None


class StoredArray(ABC):
    """An array of which boxes are read.

    Parameters
    ----------
    path : str
        For errors.
    shape, dtype
        As they are in the store.

    Attributes
    ----------
    step : int
        How many indices of the first axis the store keeps together: blocks of a multiple are read once.
    """

    MOST_SAMPLES = 16
    step = 1

    def __init__(self, path: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.path, self._shape, self.dtype = path, shape, np.dtype(dtype)
        self._axes = tuple(range(len(shape)))
        self._seen = tuple(slice(0, size) for size in shape)  # in the store's order of axes

    @abstractmethod
    def _read(self, box: Box) -> Array:
        """Return a box in the store's own order of axes; its slices have a start, an end and no step."""

    def _block(self, box: Box) -> Array:
        """Return a box that more follow after, where that is read otherwise."""
        return self._read(box)

    def release(self, box: Box = ()) -> None:  # noqa: B027
        """Let go of the memory that was used to read a box, by default any."""

    def close(self) -> None:  # noqa: B027
        """Let go of the store."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the axes."""
        return tuple(self._seen[axis].stop - self._seen[axis].start for axis in self._axes)

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self._axes)

    @property
    def size(self) -> int:
        """How many elements there are."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """How many bytes they are."""
        return self.size * self.dtype.itemsize

    def transpose(self, axes: Sequence[int]) -> Self:
        """Return the same with its axes in another order."""
        other = copy.copy(self)
        other._axes = tuple(self._axes[axis] for axis in axes)
        return other

    def part(self, axis: int, start: int, stop: int) -> Self:
        """Return the same without what lies before `start` and from `stop` on along an axis."""
        other, place = copy.copy(self), self._axes[axis]
        first = self._seen[place].start
        kept = slice(first + start, first + stop)
        other._seen = *self._seen[:place], kept, *self._seen[place + 1 :]
        return other

    def view(self, dtype: npt.DTypeLike) -> Self:
        """Return the same under another type of the same size."""
        other = copy.copy(self)
        other.dtype = np.dtype(dtype)
        return other

    def __getitem__(self, box: Box) -> Array:
        """Read a box: slices of the leading axes, all of the others."""
        block = self._block(self._stored(box))
        return block.view(self.dtype).transpose(self._axes)

    def _stored(self, box: Box) -> Box:
        """Return a box in the store's order of axes."""
        parts = dict(zip(self._axes, box, strict=False))
        stored = []
        for axis, seen in enumerate(self._seen):
            start, end, _ = parts.get(axis, slice(None)).indices(seen.stop - seen.start)
            stored.append(slice(seen.start + start, seen.start + end))
        return tuple(stored)

    def samples(self, most: int) -> tuple[npt.NDArray[np.int64], Array]:
        """Return elements far apart, and where they are in C order."""
        places = far_apart(self.size, min(most, self.MOST_SAMPLES))
        elements = np.empty(places.size, self.dtype)
        for number, index in enumerate(np.stack(np.unravel_index(places, self.shape), -1).tolist()):
            element = self._read(self._stored(tuple(slice(i, i + 1) for i in index)))
            elements[number] = element.view(self.dtype).ravel()[0]
        return places, elements


AnyArray = Array | StoredArray


def part(array: AnyArray, axis: int, start: int, stop: int) -> AnyArray:
    """Return an array without what lies before `start` and from `stop` on along an axis, as a view."""
    if isinstance(array, StoredArray):
        return array.part(axis, start, stop)
    return array[(slice(None),) * axis + (slice(start, stop),)]


def far_apart(size: int, number: int) -> npt.NDArray[np.int64]:
    """Return at most so many places of an array, as far apart as can be."""
    return np.unique(np.linspace(0, max(0, size - 1), min(size, number)).astype(np.int64))
