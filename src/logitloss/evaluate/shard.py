"""A shard: arrays that belong together, checked, told from others, and cut into blocks of rows.

A row is one label and what the model said of it. `blocks` cuts the target's shape into boxes of at most so
many rows, each a contiguous run in C order, so memory is bounded also where the first axis is short and the
others are long. Types are settled here, before the first block: what the kernels see is one of the four float
types, native and aligned, by copying at most a block. Where a shard's arrays come from is left to `files`,
and how they are read to `stores`.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from logitloss import _check
from logitloss.evaluate.errors import DtypeError, ShapeError
from logitloss.evaluate.fingerprint import Fingerprint, LinearFingerprint
from logitloss.evaluate.metrics import Loss
from logitloss.evaluate.padding import MOST_LABELS
from logitloss.evaluate.positions import check_mask, counting, predicted
from logitloss.evaluate.rows import check_no_axis, row_dtype
from logitloss.evaluate.state import check_groups
from logitloss.evaluate.stores.stored import AnyArray, Array, Box, StoredArray, part
from logitloss.layer import LinearLogits

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "f8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "f8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
# By their size: types that may be the bits of floats, where a store has no type for those
RAW = {1: (np.dtype("V1"), np.dtype(np.uint8)), 2: (np.dtype("V2"), np.dtype(np.uint16))}
# A block's logits, and its rows, each with some float64 of its own: past the cache these cost twice as much.
CHUNK_BYTES, CHUNK_ROWS = 128 << 20, 1 << 18
# Of keys of groups, all as wide as the longest, as many times a block may be held: read ahead, and sorted
KEY_COPIES = 4


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked of every shard alike; each as in `evaluate`."""

    loss: Loss = "ce"
    per_class: bool = False
    ignore_index: int = -100
    shift: bool = False
    axis: int | None = None
    dtype: str | None = None
    num_threads: int | None = None
    backend: str | None = None
    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        """Check what no array is needed for."""
        # Python's numbers, which a state file can hold
        for name in ("per_class", "shift"):
            object.__setattr__(self, name, bool(getattr(self, name)))
        object.__setattr__(self, "ignore_index", _check.ignored(self.ignore_index, soft=False))
        if self.chunk_rows is not None:
            object.__setattr__(self, "chunk_rows", _check.integer("chunk_rows", self.chunk_rows))
            if self.chunk_rows < 1:
                raise ShapeError("chunk_rows", f"is {self.chunk_rows}, must be at least 1")
        if self.shift and self.loss != "ce":
            raise ShapeError("shift", f"is for labels of classes, not for loss {self.loss!r}")
        if self.dtype is not None and self.dtype not in FLOAT_DTYPES:
            raise DtypeError("dtype", f"is {self.dtype!r}, expected one of {', '.join(FLOAT_DTYPES)}")


class Kind(NamedTuple):
    """What shards that add up have in common: the classes, and of which kind groups' keys are."""

    n_classes: int | None
    keys: np.dtype[Any] | None

    def after(self, before: "Kind | None") -> "Kind":
        """Return the kind, if it is that of the shards before: others would not add up."""
        if before is None:
            return self
        # lists of which there is none have no length that would tell the classes
        n_classes = self.n_classes or before.n_classes
        if before.n_classes and n_classes != before.n_classes:
            raise ShapeError("logits", f"of {n_classes} classes, but shards before have {before.n_classes}")
        keys = self.keys or before.keys  # of rows without groups nothing is to be told
        if self.keys and before.keys and _kind_of(self.keys) != _kind_of(before.keys):
            what = f"of type {self.keys}, but keys of shards before are of type {before.keys}"
            raise DtypeError("groups", what)
        return Kind(n_classes, keys)


def _kind_of(keys: np.dtype[Any]) -> str:
    return keys.kind.replace("u", "i")


class Block(NamedTuple):
    """Some rows of a shard: logits, or hidden states, and what belongs to them, as the kernels take it.

    `seen` counts the shard's rows up to the end of these. `sequences` are the labels of sequences that end
    with them, whole also where the block has only their last rows, and which of these count.
    """

    box: Box
    seen: int
    logits: Array
    target: Array
    groups: Array | None
    mask: Array | None
    sequences: tuple[Array, Array] | None


class Shard:
    """Logits and what belongs to their rows, as blocks of which the kernels are called.

    Parameters
    ----------
    logits, target, groups, mask
        As in `evaluate`.
    options : Options
        What is asked for.
    sample : int
        Elements of each array that its fingerprint is taken of.

    Attributes
    ----------
    logits : ndarray, StoredArray or LinearLogits
        Classes last.
    rows : dict of ndarray or StoredArray
        "target" and, where there are any, "groups" and "mask"; shifted, they and the logits are those parts
        which have a row.
    shape, size
        Those of the rows.
    shifted : int
        Positions of the target that have no row.
    per_row : ndarray or None
        Where what becomes of each row goes.
    dtype, row_dtype : dtype
        What is computed in, and what `per_row` has.
    chunk_rows : int
        Rows a block.
    """

    def __init__(
        self,
        logits: AnyArray | LinearLogits,
        target: AnyArray,
        groups: AnyArray | None,
        options: Options,
        sample: int,
        mask: AnyArray | None = None,
    ) -> None:
        given = {"logits": logits, "target": target, "groups": groups, "mask": mask}
        for name, array in given.items():
            _check.unmasked(name, array)
        self.logits, self.dtype, most_rows = _settled(logits, target, options)
        self.rows: dict[str, AnyArray] = {"target": target}
        if groups is not None:
            check_groups(groups, target.shape)
            self.rows["groups"] = groups
            most_rows = min(most_rows, max(1, CHUNK_BYTES // (KEY_COPIES * max(1, groups.dtype.itemsize))))
        if mask is not None:
            check_mask(mask, target.shape)
            self.rows["mask"] = mask
        self.target_shape, self.shape = target.shape, predicted(target.shape, options.shift)
        self.size = math.prod(self.shape)
        self.shifted = target.size - self.size
        self.is_shifted, self.ignore_index = options.shift, options.ignore_index
        self.has_sequences = options.loss == "ce" and (options.shift or target.ndim > 1)
        if options.shift:
            self._shift()
        self.row_bytes = self.stored.nbytes // max(1, self.size)
        self.chunk_rows = options.chunk_rows or self._rows_of_steps(min(most_rows, CHUNK_ROWS))
        self.row_dtype = row_dtype(self.dtype, options.loss)
        if not self.shape:
            self.logits = np.asarray(self.logits[()])[None]
            self.rows = {name: np.asarray(array[()])[None] for name, array in self.rows.items()}
        self.n_classes = self.logits.shape[-1] if options.loss == "ce" else None
        self.per_row: Array | None = None
        self._sampling = self.size, sample

    @property
    def stored(self) -> AnyArray:
        """What is read for the logits: themselves, or hidden states."""
        return self.logits.hidden if isinstance(self.logits, LinearLogits) else self.logits

    def _shift(self) -> None:
        """Leave out the logits of the last position, and what belongs to the first label."""
        n = self.shape[-1]
        if isinstance(self.logits, LinearLogits):
            logits = copy.copy(self.logits)
            logits.hidden = cast(Array, part(logits.hidden, logits.hidden.ndim - 2, 0, n))
            logits.shape = *self.shape, logits.n_classes
            self.logits = logits
        else:
            self.logits = part(self.logits, self.logits.ndim - 2, 0, n)
        last, end = len(self.shape) - 1, self.target_shape[-1]
        self.rows = {name: part(array, last, end - n, end) for name, array in self.rows.items()}

    def _rows_of_steps(self, n_rows: int) -> int:
        """Return so many rows, or less, that what the logits' store keeps together is read once."""
        step = getattr(self.stored, "step", 1) * math.prod(self.shape[1:])
        return n_rows - n_rows % step if 1 < step <= n_rows else n_rows

    def store_rows(self, per_row: Array) -> None:
        """Say where what becomes of each row goes."""
        if isinstance(per_row, np.ndarray) and not per_row.flags.writeable:
            raise ShapeError("per_row", "is read-only, and cannot be written")
        if per_row.dtype != self.row_dtype:
            raise DtypeError("per_row", f"of type {per_row.dtype}, expected {self.row_dtype}")
        if per_row.shape != self.target_shape:
            raise ShapeError("per_row", f"of shape {per_row.shape}, but the target has {self.target_shape}")
        self.per_row = per_row if self.shape else per_row[None]
        if self.is_shifted:
            self.per_row = per_row[..., 1:]

    @property
    def kind(self) -> Kind:
        """What others must have that add up to it."""
        groups = self.rows.get("groups")
        return Kind(self.n_classes, None if groups is None else groups.dtype)

    def blocks(self, done: int) -> Iterator[tuple[Box, int]]:
        """Boxes that follow the first `done` rows, each with the rows there are up to its end."""
        seen = 0
        if done < self.size:
            for box in blocks(self.rows["target"].shape, self.chunk_rows):
                seen += math.prod(part.stop - part.start for part in box)
                if seen > done:
                    yield box, seen

    def read(self, box: Box, seen: int) -> Block:
        """Return a block, of which nothing is left to read."""
        logits = native(self.stored[box], None if isinstance(self.logits, LinearLogits) else self.dtype)
        rows = {name: native(array[box]) for name, array in self.rows.items()}
        whole, sequences = self._sequences_of(box), None
        if whole is not None:
            names = [name for name in ("target", "mask") if name in rows]
            target, *mask = (rows[name] if whole == box else self.rows[name][whole] for name in names)
            sequences = target, counting(target, mask[0] if mask else None, self.ignore_index)
        return Block(box, seen, logits, rows["target"], rows.get("groups"), rows.get("mask"), sequences)

    def _sequences_of(self, box: Box) -> Box | None:
        """Return the box of the sequences that end with a block, whole but for what is not looked at."""
        if not self.has_sequences or box[-1].stop < self.shape[-1]:
            return None
        n = self.shape[-1]
        return *box[:-1], slice(min(box[-1].start, max(0, n - MOST_LABELS)), n)

    def logits_of(self, block: Block) -> Array:
        """Return the logits of a block."""
        if not isinstance(self.logits, LinearLogits):
            return block.logits
        with np.errstate(invalid="ignore", over="ignore"):  # of rows that do not count
            return self.logits.of(block.logits)

    def release_logits(self, box: Box) -> None:
        """Let go of the memory that was used to read a block's logits."""
        if isinstance(self.stored, StoredArray):
            self.stored.release(box)

    def release_rows(self, box: Box) -> None:
        """Let go of the memory that was used to read what belongs to a block's rows."""
        whole = self._sequences_of(box) or box
        for array in self.rows.values():
            if isinstance(array, StoredArray):
                array.release(whole)

    def described(self, done: int) -> dict[str, Any]:
        """Return what tells the first `done` rows from others, and the whole's shapes and types."""
        return {
            "done": done,
            **{name: elements.of(done) for name, elements in self._fingerprints.items()},
            "dtype": self.dtype.name,
            "chunk_rows": self.chunk_rows,
        }

    @cached_property
    def _fingerprints(self) -> dict[str, Fingerprint | LinearFingerprint]:
        if isinstance(self.logits, LinearLogits):
            logits: Any = LinearFingerprint(self.logits, *self._sampling)
        else:
            logits = Fingerprint(self.logits, *self._sampling)
        rows = {name: Fingerprint(array, *self._sampling) for name, array in self.rows.items()}
        return {"logits": logits, **rows}


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


def floats(name: str, array: AnyArray, dtype: str | None) -> tuple[AnyArray, np.dtype[Any]]:
    """Return an array under a floating type, nothing copied, and the type to compute in."""
    stored = array.dtype.newbyteorder("=")
    wanted = stored if dtype is None else FLOAT_DTYPES[dtype]
    if stored in RAW.get(stored.itemsize, ()):
        if not array.dtype.isnative:
            raise DtypeError(name, f"of type {array.dtype}, whose bytes are not in this machine's order")
        if dtype is None or wanted.itemsize != stored.itemsize:
            size = ("one", "two")[stored.itemsize - 1]
            kind = f"{size}-byte void" if stored.kind == "V" else array.dtype
            one, other = (key for key, to in FLOAT_DTYPES.items() if to.itemsize == stored.itemsize)
            what = f"of type {kind}: if that is the bits of floats, say --dtype {one} or {other}"
            raise DtypeError(name, what)
        array, stored = array.view(wanted), wanted
    if stored not in FLOAT_DTYPES.values():
        raise DtypeError(name, f"of type {array.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    if not _widens(stored, wanted):
        raise DtypeError(name, f"of type {stored}, and --dtype {dtype} would lose digits of it")
    # eight bits are computed with as sixteen, which have them all
    return array, FLOAT_DTYPES["bf16"] if wanted.itemsize == 1 else wanted


def takes_dtype(array: AnyArray, dtype: str | None) -> bool:
    """Whether `floats` takes an array with this type: as what its bits are, or to widen it."""
    stored = array.dtype.newbyteorder("=")
    return dtype is None or stored in RAW.get(stored.itemsize, ()) or _widens(stored, FLOAT_DTYPES[dtype])


def _widens(stored: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    # NumPy knows of no cast of eight bits, all of whose numbers any wider type has
    is_small = stored in FLOAT_DTYPES.values() and stored.itemsize == 1
    return bool(np.can_cast(stored, wanted, "safe") or (is_small and wanted.itemsize > 1))


def linear(
    hidden: Any, dtype: np.dtype[Any], weight: Any, bias: Any, softcap: float | None, logit_scale: float
) -> LinearLogits:
    """Return the logits of hidden states that are still to be read, checked as if they were there.

    A layer that is no ndarray has its shapes and types checked alone.
    """
    stand_in = np.broadcast_to(np.zeros((), dtype), hidden.shape)
    layer: list[Any] = [
        one if one is None or isinstance(one, np.ndarray) else np.broadcast_to(one.dtype.type(0), one.shape)
        for one in (weight, bias)
    ]
    try:
        logits = LinearLogits(stand_in, layer[0], layer[1], softcap, logit_scale)
    except (TypeError, ValueError) as error:  # which start with what they are about
        name, _, what = str(error).partition(" ")
        raise ShapeError("logits" if name == "hidden" else name, what) from None
    logits.hidden = hidden  # of which nothing but boxes is wanted
    return logits


def native(block: Array, dtype: np.dtype[Any] | None = None) -> Array:
    """Return the block as the kernels take it: a copy only if it is of another type or unaligned."""
    native = block.astype(dtype or block.dtype.newbyteorder("="), copy=False)
    return native if native.flags.aligned else native.copy()


def _settled(
    logits: AnyArray | LinearLogits, target: AnyArray, options: Options
) -> tuple[AnyArray | LinearLogits, np.dtype[Any], int]:
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


def _classes_last(logits: AnyArray, target: AnyArray, axis: int | None) -> AnyArray:
    """Check that the target has the rows' shape, and return the logits with the classes last."""
    if target.dtype.kind not in "iu":
        raise DtypeError("target", f"of type {target.dtype}, expected integers: the labels of the classes")
    place = min(1, logits.ndim - 1) if axis is None else axis
    if logits.ndim == 0:
        raise ShapeError("logits", "of shape (), which has no classes")
    if not -logits.ndim <= place < logits.ndim:
        raise ShapeError("logits", f"of shape {logits.shape}, which has no axis {place}")
    order = [axis for axis in range(logits.ndim) if axis != place % logits.ndim]
    classes_last = logits.transpose((*order, place % logits.ndim))
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


def _check_linear(logits: LinearLogits, target: AnyArray, options: Options) -> None:
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


def _check_binary(logits: AnyArray, target: AnyArray, axis: int | None) -> None:
    check_no_axis(axis)
    labels = target.dtype.newbyteorder("=")
    is_float = labels in FLOAT_DTYPES.values() and labels.itemsize > 1
    if labels.kind not in "biu" and not is_float:
        raise DtypeError("target", f"of type {target.dtype}, expected real numbers: labels in [0, 1]")
    if target.shape != logits.shape:
        raise ShapeError(
            "target", f"of shape {target.shape}, but binary labels need the logits', {logits.shape}"
        )
