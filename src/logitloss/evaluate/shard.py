"""A shard: arrays that belong together, checked, told from others, and cut into blocks of rows.

A row is one label and what the model said of it. `blocks` cuts the target's shape into boxes of at most so
many rows, each a contiguous run in C order, so memory is bounded also where the first axis is short and the
others are long. Types are settled here, before the first block: what the kernels see is one of the four float
types, native and aligned, by copying at most a block. Where a shard's arrays come from is left to `files`.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import DtypeError, ShapeError
from logitloss.evaluate.metrics import Loss
from logitloss.evaluate.rows import row_dtype
from logitloss.evaluate.state import checked_groups
from logitloss.linear import LinearLogits

Array = npt.NDArray[Any]
Box = tuple[slice, ...]

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
# A block's logits, and its rows, each with some float64 of its own: past the cache these cost twice as much.
CHUNK_BYTES, CHUNK_ROWS = 64 << 20, 1 << 18
# Elements that a fingerprint is taken of, as far apart as can be: of all shards, and of each at least
SAMPLE, LEAST_SAMPLE = 2048, 64
AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of every shard alike; each as in `evaluate`."""

    loss: Loss = "ce"
    per_class: bool = False
    ignore_index: int = -100
    axis: int | None = None
    dtype: str | None = None
    num_threads: int | None = None
    backend: str | None = None
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        """Check what no array is needed for."""
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ShapeError("chunk_rows", f"is {self.chunk_rows}, must be at least 1")


class Kind(NamedTuple):
    """What shards that add up have in common: the classes, and of which kind groups' keys are."""

    n_classes: int | None
    groups: str | None


class Shard:
    """Logits and what belongs to their rows, as blocks of which the kernels are called.

    Parameters
    ----------
    logits, target, groups, loss, axis, dtype, chunk_rows
        As in `evaluate`.
    sample : int
        Elements of each array that its fingerprint is taken of.
    release : callable
        Lets go of the memory that was used to read arrays from files.

    Attributes
    ----------
    logits : ndarray or LinearLogits
        Classes last.
    rows : dict of ndarray
        "target" and, where there are any, "groups".
    per_row : ndarray or None
        Where what becomes of each row goes.
    dtype, row_dtype : dtype
        What is computed in, and what `per_row` has.
    chunk_rows : int
        Rows a block.
    """

    def __init__(
        self,
        logits: Array | LinearLogits,
        target: Array,
        groups: Array | None,
        options: Options,
        sample: int,
        release: Callable[[], None],
    ) -> None:
        self.row_bytes = _stored_bytes(logits) // max(1, target.size)
        self.logits, self.dtype, most_rows = _settled(logits, target, options)
        self.chunk_rows = options.chunk_rows or min(most_rows, CHUNK_ROWS)
        self.rows = {"target": target}
        if groups is not None:
            self.rows["groups"] = checked_groups(groups, target.shape)
        self.shape, self.size = target.shape, target.size
        self.row_dtype = row_dtype(self.dtype, options.loss)
        if not self.shape:
            self.logits = self.logits[None]
            self.rows = {name: array[None] for name, array in self.rows.items()}
        self.n_classes = self.logits.shape[-1] if options.loss == "ce" else None
        self.per_row: Array | None = None
        self._sampling = self.size, sample, release

    def store_rows(self, per_row: Array) -> None:
        """Say where what becomes of each row goes."""
        if per_row.dtype != self.row_dtype:
            raise DtypeError("per_row", f"of type {per_row.dtype}, expected {self.row_dtype}")
        if per_row.shape != self.shape:
            raise ShapeError("per_row", f"of shape {per_row.shape}, but the target has {self.shape}")
        self.per_row = per_row if self.shape else per_row[None]

    def checked_kind(self, before: "Kind | None") -> "Kind":
        """Return the kind, if it is that of the shards before: others would not add up."""
        groups = self.rows.get("groups")
        kind = Kind(self.n_classes, None if groups is None else groups.dtype.kind.replace("u", "i"))
        if before is not None and kind.n_classes != before.n_classes:
            raise ShapeError(
                "logits", f"of {kind.n_classes} classes, but shards before have {before.n_classes}"
            )
        if before is not None and groups is not None and kind.groups != before.groups:
            what = f"of type {groups.dtype}, but keys of shards before are of another"
            raise DtypeError("groups", what)
        return kind

    def blocks(self, done: int) -> Iterator[tuple[Box, int]]:
        """Boxes that follow the first `done` rows, each with the rows there are up to its end."""
        seen = 0
        if done < self.size:
            for box in blocks(self.rows["target"].shape, self.chunk_rows):
                seen += math.prod(part.stop - part.start for part in box)
                if seen > done:
                    yield box, seen

    def block(self, box: Box) -> tuple[Array, Array]:
        """Return logits and labels as the kernels take them."""
        return _native(self.logits[box], self.dtype), _native(self.rows["target"][box])

    def stored(self, box: Box) -> dict[str, Array]:
        """Return what logits (or hidden states), labels and keys are made of, nothing read."""
        logits = self.logits.hidden if isinstance(self.logits, LinearLogits) else self.logits
        return {name: array[box] for name, array in {"logits": logits, **self.rows}.items()}

    def described(self, done: int) -> dict[str, Any]:
        """Return what tells the first `done` rows from others, and the whole's shapes and types."""
        return {
            "done": done,
            **{name: elements.of(done) for name, elements in self._fingerprints.items()},
            "dtype": self.dtype.name,
            "chunk_rows": self.chunk_rows,
        }

    @cached_property
    def _fingerprints(self) -> "dict[str, _Fingerprint | _LinearFingerprint]":
        if isinstance(self.logits, LinearLogits):
            logits: Any = _LinearFingerprint(self.logits, *self._sampling)
        else:
            logits = _Fingerprint(self.logits, *self._sampling)
        rows = {name: _Fingerprint(array, *self._sampling) for name, array in self.rows.items()}
        return {"logits": logits, **rows}


class _Fingerprint:
    """Elements of an array, far apart, of which a digest tells the array of so many rows from others.

    They are read once. A file may be repaired after the rows done, and its digest stays.
    """

    def __init__(self, array: Array, n_rows: int, sample: int, release: Callable[[], None]) -> None:
        places = np.unique(np.linspace(0, max(0, array.size - 1), min(array.size, sample)).astype(np.int64))
        self.elements = np.empty(places.size, array.dtype)
        for first in range(0, places.size, AT_ONCE):
            some = slice(first, first + AT_ONCE)
            self.elements[some] = array[np.unravel_index(places[some], array.shape)]
            release()  # of a file, what is mapped for one element may be megabytes
        self.rows = places // max(1, array.size // max(1, n_rows))
        self.shape, self.dtype = list(array.shape), array.dtype.str

    def of(self, done: int) -> dict[str, Any]:
        sample = self.elements[: np.searchsorted(self.rows, done)]
        digest = hashlib.blake2b(np.ascontiguousarray(sample).tobytes(), digest_size=16).hexdigest()
        return {"shape": self.shape, "dtype": self.dtype, "fingerprint": digest}


class _LinearFingerprint:
    """That of hidden states and of the layer, which all rows share."""

    def __init__(self, logits: LinearLogits, n_rows: int, sample: int, release: Callable[[], None]) -> None:
        self.hidden = _Fingerprint(logits.hidden, n_rows, sample, release)
        layer = {"weight": logits.weight, "bias": logits.bias}
        self.layer: dict[str, Any] = {
            name: None if array is None else _Fingerprint(array, 1, sample, release).of(1)
            for name, array in layer.items()
        }
        self.layer |= {"softcap": logits.softcap, "scale": logits.scale}

    def of(self, done: int) -> dict[str, Any]:
        return {"hidden": self.hidden.of(done), **self.layer}


def blocks(shape: tuple[int, ...], n_rows: int) -> Iterator[Box]:
    """Boxes of at most `n_rows` that cover `shape` in C order, each a contiguous run of it."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner > n_rows:
        for i in range(shape[0]):
            for box in blocks(shape[1:], n_rows):
                yield slice(i, i + 1), *box
    elif inner:
        whole = tuple(slice(0, size) for size in shape[1:])
        step = n_rows // inner
        for i in range(0, shape[0], step):
            yield slice(i, min(i + step, shape[0])), *whole


def floats(name: str, array: Array, dtype: str | None) -> tuple[Array, np.dtype[Any]]:
    """Return an array under a floating type, nothing copied, and the type to compute in."""
    stored = array.dtype.newbyteorder("=")
    wanted = stored if dtype is None else FLOAT_DTYPES[dtype]
    if stored in (np.dtype("V2"), np.dtype(np.uint16)):
        if dtype is None or wanted.itemsize != 2 or not array.dtype.isnative:
            kind = "two-byte void" if stored.kind == "V" else array.dtype
            raise DtypeError(name, f"of type {kind}: if that is the bits of floats, say --dtype bf16 or f16")
        return array.view(wanted), wanted
    if stored not in FLOAT_DTYPES.values():
        raise DtypeError(name, f"of type {array.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    if not np.can_cast(stored, wanted, "safe"):
        raise DtypeError(name, f"of type {stored}, and --dtype {dtype} would lose digits of it")
    return array, wanted


def _stored_bytes(logits: Array | LinearLogits) -> int:
    return (logits.hidden if isinstance(logits, LinearLogits) else logits).nbytes


def _native(block: Array, dtype: np.dtype[Any] | None = None) -> Array:
    """Return the block as the kernels take it: a copy only if it is of another type or unaligned."""
    native = block.astype(dtype or block.dtype.newbyteorder("="), copy=False)
    return native if native.flags.aligned else native.copy()


def _settled(
    logits: Array | LinearLogits, target: Array, options: Options
) -> tuple[Array | LinearLogits, np.dtype[Any], int]:
    """Return the logits, classes last, the type to compute in, and how many rows a block has at most."""
    if isinstance(logits, LinearLogits):
        _check_linear(logits, target, options)
        return logits, logits.dtype, logits.rows_at_once()
    logits, compute_dtype = floats("logits", logits, options.dtype)
    row_bytes = compute_dtype.itemsize
    if options.loss == "ce":
        logits = _classes_last(logits, target, options.axis)
        row_bytes *= logits.shape[-1]
    else:
        _check_binary(logits, target, options.axis)
    return logits, compute_dtype, max(1, CHUNK_BYTES // max(1, row_bytes))


def _classes_last(logits: Array, target: Array, axis: int | None) -> Array:
    """Check that the target has the rows' shape, and return the logits with the classes last."""
    if target.dtype.kind not in "iu":
        raise DtypeError("target", f"of type {target.dtype}, expected integers: the labels of the classes")
    place = min(1, logits.ndim - 1) if axis is None else axis
    if logits.ndim == 0:
        raise ShapeError("logits", "of shape (), which has no classes")
    if not -logits.ndim <= place < logits.ndim:
        raise ShapeError("logits", f"of shape {logits.shape}, which has no axis {place}")
    classes_last = np.moveaxis(logits, place, -1)
    rows = classes_last.shape[:-1]
    if target.shape != rows:
        hint = ""
        if axis is None and target.shape == logits.shape[:-1]:
            hint = "; with the classes on the last axis, say --axis -1"
        elif target.shape == logits.shape:
            hint = "; for a label each logit, say --loss bce"
        raise ShapeError(
            "target",
            f"of shape {target.shape}, but logits of shape {logits.shape} with the classes on axis {place} "
            f"need {rows}{hint}",
        )
    if classes_last.shape[-1] == 0 and target.size:
        raise ShapeError("logits", f"of shape {logits.shape}: no classes on axis {place}")
    return classes_last


def _check_linear(logits: LinearLogits, target: Array, options: Options) -> None:
    loss, axis, dtype = options.loss, options.axis, options.dtype
    if loss != "ce":
        raise ShapeError("loss", f"is {loss!r}, but the logits of hidden states are those of classes")
    if axis not in (None, -1, logits.ndim - 1):
        raise ShapeError("axis", f"is {axis}, but the logits of hidden states have their classes last")
    if dtype is not None:
        raise DtypeError(
            "dtype", f"is {dtype}, but the logits of hidden states are computed as {logits.dtype}"
        )
    if target.dtype.kind not in "iu":
        raise DtypeError("target", f"of type {target.dtype}, expected integers: the labels of the classes")
    if logits.ndim < 2 or target.shape != logits.shape[:-1]:
        raise ShapeError(
            "target",
            f"of shape {target.shape}, but hidden states of shape {logits.hidden.shape} need "
            f"{logits.shape[:-1] or 'a leading axis'}",
        )


def _check_binary(logits: Array, target: Array, axis: int | None) -> None:
    if axis is not None:
        raise ShapeError("axis", f"is {axis}, but binary cross-entropy has no axis of classes")
    if target.dtype.kind not in "biuf":
        raise DtypeError("target", f"of type {target.dtype}, expected real numbers: labels in [0, 1]")
    if target.shape != logits.shape:
        raise ShapeError(
            "target", f"of shape {target.shape}, but binary labels need the logits', {logits.shape}"
        )
