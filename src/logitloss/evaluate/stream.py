"""An evaluation of arrays of any size, a block of rows at a time.

A row is one label and what the model said of it. `blocks` cuts the target's shape into boxes of at most so
many rows, each a contiguous run in C order, so memory is bounded also where the first axis is short and the
others are long. Types are settled here, before the first block: what the kernels see is one of the four float
types, native and aligned, by copying at most a block.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from logitloss import _backends
from logitloss.evaluate.checkpoint import Checkpoint, described
from logitloss.evaluate.errors import DtypeError, EvaluationError, ShapeError
from logitloss.evaluate.metrics import Loss
from logitloss.evaluate.rows import row_dtype, rows_of
from logitloss.evaluate.state import EvaluationState, checked_groups
from logitloss.linear import LinearLogits

Array = npt.NDArray[Any]

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
}
# A block's logits, and its rows, each with some float64 of its own: past the cache these cost twice as much.
CHUNK_BYTES, CHUNK_ROWS = 64 << 20, 1 << 18
SAVE_EVERY = 30.0


def evaluate(
    logits: Array | LinearLogits,
    target: Array,
    *,
    loss: Loss = "ce",
    per_class: bool = False,
    groups: Array | None = None,
    per_row: Array | None = None,
    ignore_index: int = -100,
    axis: int | None = None,
    dtype: str | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
    chunk_rows: int | None = None,
    state_file: str | os.PathLike[str] | None = None,
    save_every: float = SAVE_EVERY,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationState:
    """Evaluate logits against labels, a block of rows at a time.

    Parameters
    ----------
    logits : ndarray of float16, bfloat16, float32 or float64, or LinearLogits
        Classes on `axis`; for "bce", a logit a label. May be memory-mapped, of any strides or byte order.
        Of hidden states, `LinearLogits` makes a block's at a time, the classes last.
    target : ndarray
        Class labels (integers) of the rows' shape; for "bce", labels in [0, 1] of the logits' shape.
    loss : {"ce", "bce"}
        Softmax cross-entropy or binary cross-entropy.
    per_class : bool
        Whether to keep figures of each class, too.
    groups : ndarray of int, bool or str, optional
        A key for each row, of the target's shape: each group of rows has a state of its own, too.
    per_row : ndarray, optional
        Array for what becomes of each row, of the target's shape and `row_dtype(logits.dtype, loss)`.
    ignore_index : int
        Rows with this label do not count.
    axis : int, optional
        Where the classes are: 1 by default, or 0 for one row. Not for "bce".
    dtype : {"bf16", "f16", "f32", "f64"}, optional
        Type of the logits: two-byte void or uint16 data is viewed as it, floating data is widened to it.
    num_threads, backend
        As in `logitloss.cross_entropy`.
    chunk_rows : int, optional
        Rows a block; by default as many as have 64 MiB of logits (48 of hidden states'), and at most 262,144.
    state_file : path, optional
        Where the state is kept meanwhile. If there is one from a run that was stopped or killed, the
        evaluation goes on from there, and ends with the same figures to the last bit.
    save_every : float
        Seconds between two writes of it.
    progress : callable, optional
        Called at the start and after each block with the rows done and the rows there are.

    Returns
    -------
    EvaluationState
        Its `compute()` gives the figures; it merges with those of other arrays.

    Raises
    ------
    ShapeError, DtypeError, LabelError, LogitError
        A ValueError, TypeError, IndexError and ValueError; an error about a row gives its place in `target`.
        What was counted until then is in the state file.
    FileError, StateError
        The state file cannot be read or written; it is of other inputs.
    KeyboardInterrupt
        After Ctrl-C or SIGTERM; with a state file at the end of a block, when that is written.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import evaluate
    >>> state = evaluate(np.zeros((1000, 10)), np.arange(1000) % 10, chunk_rows=7)
    >>> round(state.compute().perplexity, 9)
    10.0
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ShapeError("chunk_rows", f"is {chunk_rows}, must be at least 1")
    logits, compute_dtype, most_rows = _settled(logits, target, loss, axis, dtype)
    if chunk_rows is None:
        chunk_rows = min(most_rows, CHUNK_ROWS)
    rows = {"target": target}
    if groups is not None:
        rows["groups"] = checked_groups(groups, target.shape)
    if per_row is not None:
        _check_per_row(per_row, target, row_dtype(compute_dtype, loss))
    if target.ndim == 0:
        logits, rows = logits[None], {name: array[None] for name, array in rows.items()}
        target, per_row = rows["target"], None if per_row is None else per_row[None]
    state, done, checkpoint = EvaluationState(loss, per_class), 0, None
    if state_file is not None:
        inputs = {
            "logits": described(logits),
            **{name: described(array) for name, array in rows.items()},
            "options": {
                "loss": loss,
                "per_class": per_class,
                "ignore_index": ignore_index,
                "dtype": compute_dtype.name,
            },
            "chunk_rows": chunk_rows,
            "backend": _backends.get(backend).name,
        }
        checkpoint = Checkpoint(state_file, inputs, save_every, getattr(per_row, "flush", None))
        state, done = checkpoint.load() or (state, done)
    if progress is not None:
        progress(done, target.size)
    seen = 0
    with checkpoint.kept() if checkpoint else nullcontext():
        for block in blocks(target.shape, chunk_rows):
            seen += math.prod(part.stop - part.start for part in block)
            if seen <= done:
                continue
            x, labels = _native(logits[block], compute_dtype), _native(rows["target"][block])
            try:
                found = rows_of(
                    x,
                    labels,
                    loss,
                    None if loss == "bce" else -1,
                    ignore_index=ignore_index,
                    num_threads=num_threads,
                    backend=backend,
                )
            except EvaluationError as error:
                error.shift(tuple(part.start for part in block))
                raise
            state.add(found, rows["groups"][block] if "groups" in rows else None)
            if per_row is not None:
                found.store(per_row[block])
            if checkpoint is not None:
                checkpoint.after_block(state, seen, target.size)
            if progress is not None:
                progress(seen, target.size)
    return state


def _settled(
    logits: Array | LinearLogits, target: Array, loss: Loss, axis: int | None, dtype: str | None
) -> tuple[Array | LinearLogits, np.dtype[Any], int]:
    """Return the logits, classes last, the type to compute in, and how many rows a block has at most."""
    if isinstance(logits, LinearLogits):
        _check_linear(logits, target, loss, axis, dtype)
        return logits, logits.dtype, logits.rows_at_once()
    logits, compute_dtype = floats("logits", logits, dtype)
    row_bytes = compute_dtype.itemsize
    if loss == "ce":
        logits = _classes_last(logits, target, axis)
        row_bytes *= logits.shape[-1]
    else:
        _check_binary(logits, target, axis)
    return logits, compute_dtype, max(1, CHUNK_BYTES // max(1, row_bytes))


def blocks(shape: tuple[int, ...], n_rows: int) -> Iterator[tuple[slice, ...]]:
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


def _native(block: Array, dtype: np.dtype[Any] | None = None) -> Array:
    """Return the block as the kernels take it: a copy only if it is of another type or unaligned."""
    native = block.astype(dtype or block.dtype.newbyteorder("="), copy=False)
    return native if native.flags.aligned else native.copy()


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


def _check_linear(
    logits: LinearLogits, target: Array, loss: Loss, axis: int | None, dtype: str | None
) -> None:
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


def _check_per_row(per_row: Array, target: Array, dtype: np.dtype[Any]) -> None:
    if per_row.dtype != dtype:
        raise DtypeError("per_row", f"of type {per_row.dtype}, expected {dtype}")
    if per_row.shape != target.shape:
        raise ShapeError("per_row", f"of shape {per_row.shape}, but the target has {target.shape}")


def _check_binary(logits: Array, target: Array, axis: int | None) -> None:
    if axis is not None:
        raise ShapeError("axis", f"is {axis}, but binary cross-entropy has no axis of classes")
    if target.dtype.kind not in "biuf":
        raise DtypeError("target", f"of type {target.dtype}, expected real numbers: labels in [0, 1]")
    if target.shape != logits.shape:
        raise ShapeError(
            "target", f"of shape {target.shape}, but binary labels need the logits', {logits.shape}"
        )
