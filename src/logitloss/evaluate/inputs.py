"""`evaluate`: one call for logits in arrays, in files, and in batches as they come."""

import importlib
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from logitloss import _check
from logitloss.evaluate.errors import DtypeError, EvaluationError, ShapeError
from logitloss.evaluate.files import evaluate_files
from logitloss.evaluate.metrics import Loss
from logitloss.evaluate.padding import PaddingWarning
from logitloss.evaluate.shard import Options
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stores.stored import StoredArray
from logitloss.evaluate.stream import (
    SAVE_EVERY,
    Progress,
    Source,
    evaluate_blocks,
    evaluate_shards,
)
from logitloss.layer import LinearLogits

Array = npt.NDArray[Any]
Path = str | os.PathLike[str]


def evaluate(
    logits: npt.ArrayLike | LinearLogits | Path | Iterable[Sequence[Any]],
    target: npt.ArrayLike | Path | None = None,
    *,
    loss: Loss = "ce",
    per_class: bool = False,
    groups: npt.ArrayLike | Path | None = None,
    mask: npt.ArrayLike | Path | None = None,
    per_row: Array | Path | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    axis: int | None = None,
    dtype: str | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
    chunk_rows: int | None = None,
    state_file: Path | None = None,
    save_every: float = SAVE_EVERY,
    progress: Progress | None = None,
) -> EvaluationState:
    """Evaluate logits against labels, a block of rows at a time.

    Parameters
    ----------
    logits : array_like of float8, float16, bfloat16, float32 or float64; LinearLogits; path; or iterable
        Classes on `axis`; for "bce", a logit a label. May be memory-mapped, of any strides or byte order.
        Of hidden states, `LinearLogits` makes a block's at a time, the classes last. A path stands for what
        it does in `evaluate_files`. An iterable gives batches, (logits, target), (logits, target, groups) or
        (logits, target, groups or None, mask) each, and is asked for the next one, on the caller's thread,
        when one is evaluated: it may fill the same arrays again. Dask arrays are evaluated where their chunks
        are, see `logitloss.evaluate.dask.evaluate`.
    target : array_like or path
        Class labels (integers) of the rows' shape; for "bce", labels in [0, 1] of the logits' shape. Not
        beside batches, which bring their own.
    loss : {"ce", "bce"}
        Softmax cross-entropy or binary cross-entropy.
    per_class : bool
        Whether to keep figures of each class, too.
    groups : array_like of int, bool or str, or path, optional
        A key for each row, of the target's shape: each group of rows has a state of its own, too.
    mask : array_like of bool, or of 0 and 1, or path, optional
        Of the target's shape: rows where it is 0 do not count, whatever their label, and are told apart from
        those ignored.
    per_row : ndarray or path, optional
        Array for what becomes of each row, of the target's shape and `row_dtype(logits.dtype, loss)`; of
        files a file. Not of batches.
    ignore_index : int
        Rows with this label do not count.
    shift : bool
        Whether the logits at a position, along the target's last axis, predict the next position's label:
        then rows are all positions but the first of each sequence. Groups, mask and `per_row` are those of
        the label's position, and `per_row` says of the first that it does not count.
    axis : int, optional
        Where the classes are: 1 by default, or 0 for one row. Not for "bce".
    dtype : {"f8_e4m3", "f8_e5m2", "bf16", "f16", "f32", "f64"}, optional
        Type of the logits: void or unsigned data of its size is viewed as it, floating data is widened to it.
    num_threads, backend
        As in `logitloss.cross_entropy`; of hidden states one thread by default, as in
        `logitloss.linear_cross_entropy`.
    chunk_rows : int, optional
        Rows a block; by default as many as have 128 MiB of logits (48 of hidden states'), at most 262,144.
    state_file : path, optional
        Where the state is kept meanwhile. If there is one from a run that was stopped or killed, the
        evaluation goes on from there, and ends with the same figures to the last bit; `per_row` must hold
        then what that run wrote. Not for batches.
    save_every : float
        Seconds between two writes of it.
    progress : callable, optional
        Called at the start and after each block with the rows done, the rows there are (of batches, have
        come), and the bytes of logits (or hidden states) read since the start.

    Returns
    -------
    EvaluationState
        Its `compute()` gives the figures; it merges with those of other arrays.

    Raises
    ------
    ShapeError, DtypeError, LabelError, LogitError
        A ValueError, TypeError, IndexError and ValueError; an error about a row gives its place in the array
        that it names. What was counted until then is in the state file.
    MaskError
        A ValueError: the mask holds another number.
    FileError, StateError
        The state file cannot be read or written; it is of other inputs.
    KeyboardInterrupt
        After Ctrl-C. With a state file after SIGTERM, too, which else ends the process; then at the end of a
        block, when that file is written.

    Warns
    -----
    PaddingWarning
        Labels that count look like padding, by the rule of `logitloss.evaluate.padding.EndRuns.warnings`.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import evaluate
    >>> state = evaluate(np.zeros((1000, 10)), np.arange(1000) % 10, chunk_rows=7)
    >>> round(state.compute().perplexity, 9)
    10.0

    Of a text's 6 tokens, the first is not predicted, and the last two are padding:

    >>> tokens, kept = np.array([[3, 1, 4, 1, 0, 0]]), np.array([[1, 1, 1, 1, 0, 0]])
    >>> metrics = evaluate(np.zeros((1, 6, 5)), tokens, axis=-1, shift=True, mask=kept).compute()
    >>> metrics.count, metrics.shifted, metrics.masked
    (3, 1, 2)
    """
    options: dict[str, Any] = {
        "loss": loss,
        "per_class": per_class,
        "ignore_index": ignore_index,
        "shift": shift,
        "axis": axis,
        "dtype": dtype,
        "num_threads": num_threads,
        "backend": backend,
        "chunk_rows": chunk_rows,
    }
    kept: dict[str, Any] = {"state_file": state_file, "save_every": save_every, "progress": progress}
    if isinstance(logits, str | os.PathLike):
        paths = _paths(logits=logits, target=target, groups=groups, mask=mask, per_row=per_row)
        target_path = paths["target"]
        if target_path is None:
            raise ShapeError("target", "is missing: files of logits have their labels in others")
        state = evaluate_files(
            os.fspath(logits),
            target_path,
            groups_path=paths["groups"],
            mask_path=paths["mask"],
            per_row_path=paths["per_row"],
            **kept,
            **options,
        ).state
    elif any(hasattr(array, "__dask_graph__") for array in (logits, target, groups, mask)):
        beside: dict[str, Any] = {"per_row": per_row, "state_file": state_file, "progress": progress}
        for name, value in beside.items():
            if value is not None:
                raise ShapeError(name, "is not for Dask arrays")
        on_dask = importlib.import_module("logitloss.evaluate.dask")
        state = cast(EvaluationState, on_dask.evaluate(logits, target, groups=groups, mask=mask, **options))
    elif target is None:
        if hasattr(logits, "shape"):
            raise ShapeError("target", "is missing: an array of logits has its labels in another")
        beside = {"groups": groups, "mask": mask, "per_row": per_row, "state_file": state_file}
        for name, value in beside.items():
            if value is not None:
                raise ShapeError(name, "is for arrays and files, and there are batches: the target is None")
        batches = cast(Iterable[Sequence[Any]], logits)
        state = evaluate_batches(batches, Options(**options), progress)
    else:
        if not isinstance(per_row, np.ndarray | None):
            raise DtypeError("per_row", f"a {type(per_row).__name__}, expected an ndarray")
        source = _source(logits, target, groups, mask, per_row)
        state = evaluate_shards([source], Options(**options), **kept).state
    for line in state.end_runs.warnings():
        warnings.warn(line, PaddingWarning, stacklevel=2)
    return state


def _paths(**arguments: Any) -> dict[str, str | None]:
    """Return paths as strings; beside a path, all is in files."""
    for name, value in arguments.items():
        if not (value is None or isinstance(value, str | os.PathLike)):
            raise DtypeError(name, f"a {type(value).__name__}, expected a path, since logits are one")
    return {name: None if value is None else os.fspath(value) for name, value in arguments.items()}


def evaluate_batches(
    batches: Iterable[Sequence[Any]], options: Options, progress: Progress | None
) -> EvaluationState:
    """Evaluate batches as they come; see `evaluate`."""
    state, kind = EvaluationState(options.loss, options.per_class), None
    n_rows = n_bytes = 0
    if progress is not None:
        progress(0, 0, 0)
    for number, batch in enumerate(batches):
        try:
            source = _of_batch(batch)
            shard = source.open(options, sample=0)
            kind = shard.kind.after(kind)
            part = evaluate_blocks(source, shard, options)
        except EvaluationError as error:
            error.argument += f" of batch {number}"
            raise
        except TypeError as error:  # of what is no array
            raise DtypeError(f"arrays of batch {number}", str(error)) from error
        state.merge(part.state)
        n_rows, n_bytes = n_rows + part.n_rows, n_bytes + part.n_bytes
        if progress is not None:
            progress(n_rows, n_rows, n_bytes)
    return state


def _of_batch(batch: Sequence[Any]) -> Source:
    if not isinstance(batch, tuple | list) or not 2 <= len(batch) <= 4:
        what = f"{len(batch)}" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
        wanted = "expected a tuple of logits, target and maybe groups and mask"
        raise ShapeError("arrays", f"{wanted}, not {what}")
    if batch[1] is None:
        raise ShapeError("target", "is None, expected labels")
    return _source(*batch)


def _source(
    logits: Any, target: Any, groups: Any = None, mask: Any = None, per_row: Array | None = None
) -> Source:
    """Return arrays to evaluate, of anything that NumPy makes arrays of."""
    arrays: dict[str, Any] = {"logits": logits, "target": target, "groups": groups, "mask": mask}
    if logits is None:
        raise ShapeError("logits", "is None, expected an array")
    for name, array in arrays.items():
        if not isinstance(array, LinearLogits | StoredArray | None):
            arrays[name] = _check.placed(name, array, _check.HOST)
    return Source(**arrays, per_row=per_row)
