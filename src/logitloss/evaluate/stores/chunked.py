"""Arrays whose store keeps them in chunks, each packed apart: a chunk is unpacked once, in bounded memory.

A format says how a box of whole chunks is decoded. Blocks are cut where chunks end (`step`), so that most are
decoded straight into place, some chunks at a time. Where that cannot be, because all chunks side by side are
more than a block or another array cuts the blocks, a row of chunks is unpacked into a file that has no name,
and blocks are copied out of it.

Chunks that the store does not have count as its fill value, by the formats' rules. Of integers that is told
in a warning, as writers leave out chunks of labels that are all 0. Of floats it is an error: they would be
evaluated as if a model had said the same of every class. So it is of texts.
"""

import itertools
import math
import tempfile
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import numpy as np

from logitloss.evaluate.errors import FileError, FileWarning
from logitloss.evaluate.stores.stored import Array, Box, StoredArray, one_line, unpacking

# What is decoded at once, where a chunk is not larger: decoders hold it packed, unpacked and in place
PIECE_BYTES = 4 << 20
# What a text whose length is not known yet is taken for
TEXT_BYTES = 64


class ChunkedArray(StoredArray):
    """An array in chunks.

    Parameters
    ----------
    path : str
        For errors.
    shape, dtype
        As in the store; of texts (fixed or any length, in bytes or not) any, they are decoded to "U".
    chunks : tuple of int
        The shape of a chunk: ones where any box can be read for itself.
    """

    def __init__(
        self, path: str, shape: tuple[int, ...], dtype: np.dtype[Any], chunks: Sequence[int]
    ) -> None:
        super().__init__(path, shape, dtype)
        self.chunks = tuple(chunks)
        self._unpacked: _Unpacked | None = None
        self._refused: set[str] = set()  # of all views of the array
        self._step_along_first()
        if dtype.kind in "OT":
            self.dtype = np.dtype(f"V{TEXT_BYTES}")
            pieces = self._pieces(self._stored(()))
            self.dtype = max((self._text(piece).dtype for piece in pieces), default=np.dtype("U1"))
        elif dtype.kind == "S":
            self.dtype = np.dtype(f"U{dtype.itemsize}")
        self._decoded_dtype = self.dtype

    @abstractmethod
    def _decode(self, box: Box) -> Array:
        """Return what the store has in a box."""

    @property
    @abstractmethod
    def absent(self) -> str:
        """Which chunks were found to be missing, in words; empty if none."""

    def transpose(self, axes: Sequence[int]) -> Self:
        """Return the same with its axes in another order."""
        other = super().transpose(axes)
        other._step_along_first()
        return other

    def _step_along_first(self) -> None:
        self.step = self.chunks[self._axes[0]] if self._axes else 1

    def _read(self, box: Box) -> Array:
        with one_line(self.path, "damaged"):
            found = self._text(box) if self._decoded_dtype.kind == "U" else self._decode(box)
            self._check_absent()
            return np.asarray(found, self._decoded_dtype)

    def _text(self, box: Box) -> Array:
        """Return texts that may be bytes, as UTF-8, of one width."""
        found = np.asarray(self._decode(box))
        self._check_absent()
        if found.dtype.kind in "OT":
            texts = [one.decode() if isinstance(one, bytes) else str(one) for one in found.ravel().tolist()]
            for text in texts:
                if text.endswith("\0"):  # which NumPy's texts leave out
                    raise FileError(self.path, f"holds {text!r}, which ends in a NUL")
            return np.array(texts, "U").reshape(found.shape)
        return np.strings.decode(found, "utf-8") if found.dtype.kind == "S" else found.astype("U")

    def _check_absent(self) -> None:
        if self.absent and self.dtype.kind not in "iub":
            self._refused.add(self.absent)
            what = f"not written or lost: {self.absent}; what would be read is the fill value"
            raise FileError(self.path, what)

    def close(self) -> None:
        """Let go of the store, and warn of chunks that it does not have, if they were let through."""
        self._unpacked = None
        if self.absent and not self._refused:
            what = f"{self.path}: not written or lost: {self.absent}, which count as the fill value"
            warnings.warn(what, FileWarning, stacklevel=2)

    def _block(self, box: Box) -> Array:
        block = np.empty([part.stop - part.start for part in box], self.dtype)
        for part in self._ends_and_middle(box):
            within: Any = (*_within(part, box), ...)
            place = block[within]
            if self._is_whole(part):
                for piece in self._pieces(part):
                    place[_within(piece, part)] = self._read(piece).view(self.dtype)
            else:
                self._unpacked_around(part).copy(part, place.view(self._decoded_dtype))
        return block

    def _is_whole(self, box: Box) -> bool:
        """Whether a box is of whole chunks."""
        ends = zip(box, self.chunks, self._shape, strict=True)
        return all(
            part.start % chunk == 0 and (part.stop % chunk == 0 or part.stop == size)
            for part, chunk, size in ends
        )

    def _ends_and_middle(self, box: Box) -> Iterator[Box]:
        """Cut a box along the first axis, so that the middle is of whole chunks."""
        if not box:
            yield box
            return
        axis = self._axes[0]
        start, stop = box[axis].start, box[axis].stop
        first = min(stop, -(-start // self.step) * self.step)
        last = stop if stop == self._shape[axis] else max(first, stop // self.step * self.step)
        for low, high in itertools.pairwise((start, first, last, stop)):
            if low < high:
                yield *box[:axis], slice(low, high), *box[axis + 1 :]

    def _unpacked_around(self, part: Box) -> "_Unpacked":
        """Return the row of chunks that a box is in, unpacked."""
        axis = self._axes[0]
        low, high = part[axis].start // self.step, -(-part[axis].stop // self.step)
        row = slice(low * self.step, min(high * self.step, self._shape[axis]))
        around = tuple(row if i == axis else slice(0, size) for i, size in enumerate(self._shape))
        if self._unpacked is None or self._unpacked.box != around:
            self._unpacked = None  # its disk space, first
            unpacked = _Unpacked(self.path, around, axis, self._decoded_dtype)
            for piece in self._pieces(around):
                unpacked.append(piece, self._read(piece))
            self._unpacked = unpacked
        return self._unpacked

    def _pieces(self, box: Box) -> Iterator[Box]:
        """Cut a box where chunks end, into pieces of PIECE_BYTES, or a chunk if that is larger."""
        sizes = [max(1, min(chunk, size)) for chunk, size in zip(self.chunks, self._shape, strict=True)]
        for axis in reversed(range(len(sizes))):
            others = math.prod(sizes) // sizes[axis] * self.dtype.itemsize
            most = min(PIECE_BYTES // others, self._shape[axis])
            sizes[axis] = max(sizes[axis], most // self.chunks[axis] * self.chunks[axis])
        return _cut(box, sizes)


def _cut(box: Box, sizes: Sequence[int]) -> Iterator[Box]:
    """Cut a box where multiples of sizes are."""
    if not box:
        yield ()
        return
    (first, *others), (size, *other_sizes) = box, sizes
    for low in range(first.start - first.start % size, first.stop, size):
        part = slice(max(low, first.start), min(low + size, first.stop))
        yield from ((part, *rest) for rest in _cut(tuple(others), other_sizes))


def _within(part: Box, box: Box) -> Box:
    """Return where a part of a box is in it."""
    both = zip(part, box, strict=True)
    return tuple(slice(inner.start - outer.start, inner.stop - outer.start) for inner, outer in both)


class _Unpacked:
    """A box of an array, a piece after the other in a file that has no name; of each, rows are contiguous."""

    def __init__(self, path: str, box: Box, axis: int, dtype: np.dtype[Any]) -> None:
        self.path, self.box, self.axis, self.dtype = path, box, axis, dtype
        self.pieces: list[tuple[Box, int]] = []
        with self._unpacking():
            self.file = tempfile.TemporaryFile(prefix="logitloss-")  # noqa: SIM115
        weakref.finalize(self, self.file.close)

    def _unpacking(self) -> AbstractContextManager[None]:
        return unpacking(self.path, "a row of its chunks")

    def append(self, piece: Box, array: Array) -> None:
        """Put a piece behind those before."""
        self.pieces.append((piece, self.file.tell()))
        rows_first = np.ascontiguousarray(np.moveaxis(array, self.axis, 0))
        with self._unpacking():
            self.file.write(rows_first.reshape(-1).view(np.uint8).data)
            self.file.flush()

    def copy(self, part: Box, out: Array) -> None:
        """Write a part of the box to an array of its shape."""
        for piece, place in self.pieces:
            ends = zip(piece, part, strict=True)
            both = tuple(slice(max(p.start, q.start), min(p.stop, q.stop)) for p, q in ends)
            if any(one.start >= one.stop for one in both):
                continue
            rows = tuple(both[i] if i == self.axis else one for i, one in enumerate(piece))
            shape = [one.stop - one.start for one in rows]
            shape.insert(0, shape.pop(self.axis))
            row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
            self.file.seek(place + (rows[self.axis].start - piece[self.axis].start) * row_bytes)
            found = np.frombuffer(self.file.read(shape[0] * row_bytes), self.dtype).reshape(shape)
            out[_within(both, part)] = np.moveaxis(found, 0, self.axis)[_within(both, rows)]
