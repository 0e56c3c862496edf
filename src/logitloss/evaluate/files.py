"""An evaluation of files: logits, or hidden states and the last layer's weight, against labels."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import EvaluationError, FileError, ShapeError
from logitloss.evaluate.metrics import Loss
from logitloss.evaluate.readers import open_array
from logitloss.evaluate.rows import row_dtype
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stream import FLOAT_DTYPES, evaluate, floats
from logitloss.linear import LinearLogits

Array = npt.NDArray[Any]


def evaluate_files(
    logits_path: str,
    target_path: str,
    *,
    loss: Loss = "ce",
    unembedding_path: str | None = None,
    bias_path: str | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    groups_path: str | None = None,
    per_row_path: str | None = None,
    state_file: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[EvaluationState, int, int]:
    """Evaluate logits in one file against labels in another, `.npy` or `.npz`.

    Parameters
    ----------
    logits_path, target_path : str
        The files; `PATH::name` for one array of several in a `.npz` file.
    loss
        As in `evaluate`.
    unembedding_path, bias_path : str, optional
        Those of a last layer's weight and bias; then `logits_path` is that of its hidden states.
    softcap, logit_scale
        As in `logitloss.linear_cross_entropy`.
    groups_path : str, optional
        That of the rows' keys.
    per_row_path : str, optional
        A `.npy` file to be written: a record for each row (`logitloss.evaluate.rows.row_dtype`).
    state_file
        As in `evaluate`; if there is one, the rows that it has seen are in the file of `per_row_path`.
    dtype
        As in `evaluate`; of the files of hidden states, weight and bias those whose type says nothing.
    progress, **options
        As in `evaluate`.

    Returns
    -------
    state : EvaluationState
        Its `compute()` gives the figures.
    n_rows : int
        Rows read: without those that a state file has seen before.
    n_bytes : int
        Bytes of logits, or hidden states, read for them.

    Raises
    ------
    EvaluationError
        Named for the file it is about.
    """
    paths = {
        "logits": logits_path,
        "target": target_path,
        "weight": unembedding_path,
        "bias": bias_path,
        "groups": groups_path,
    }
    mapped = {name: open_array(path) for name, path in paths.items() if path is not None}
    steps: list[int] = []  # the first and the last

    def block_done(done: int, n_rows: int) -> None:
        steps[1:] = [done]
        for name in ("logits", "target", "groups"):
            if name in mapped:
                mapped[name].release()
        if progress is not None:
            progress(done, n_rows)

    arrays = {name: one.array for name, one in mapped.items()}
    try:
        target, groups = arrays.pop("target"), arrays.pop("groups", None)
        logits: Array | LinearLogits = arrays["logits"]
        if unembedding_path is not None:
            for name, array in arrays.items():
                arrays[name], _ = floats(name, array, dtype if array.dtype.itemsize == 2 else None)
            logits, dtype = _linear(arrays, softcap, logit_scale), None
        per_row = None
        if per_row_path is not None:
            compute_dtype = logits.dtype if dtype is None else FLOAT_DTYPES[dtype]
            goes_on = state_file is not None and os.path.exists(state_file)
            per_row = _open_records(per_row_path, target.shape, row_dtype(compute_dtype, loss), goes_on)
        state = evaluate(
            logits,
            target,
            loss=loss,
            groups=groups,
            per_row=per_row,
            state_file=state_file,
            dtype=dtype,
            progress=block_done,
            **options,
        )
    except EvaluationError as error:
        error.argument = paths.get(error.argument) or error.argument
        raise
    n_rows = steps[-1] - steps[0]
    return state, n_rows, mapped["logits"].array.nbytes * n_rows // max(1, target.size)


def _open_records(path: str, shape: tuple[int, ...], dtype: np.dtype[Any], goes_on: bool) -> Array:
    """Map a new file of records, or the one that an evaluation goes on with."""
    try:
        if not goes_on:
            return np.lib.format.open_memmap(path, "w+", dtype, shape)
        records = np.lib.format.open_memmap(path, "r+")
    except (OSError, ValueError) as error:
        raise FileError(path, getattr(error, "strerror", None) or str(error)) from None
    if (records.shape, records.dtype) != (shape, dtype):
        what = (
            f"holds {records.dtype} of shape {records.shape}, but the state goes on with {dtype} of {shape}"
        )
        raise FileError(path, what)
    return records


def _linear(arrays: dict[str, Any], softcap: float | None, logit_scale: float) -> LinearLogits:
    try:
        return LinearLogits(arrays["logits"], arrays["weight"], arrays.get("bias"), softcap, logit_scale)
    except (TypeError, ValueError) as error:  # which start with what they are about
        name, _, what = str(error).partition(" ")
        raise ShapeError("logits" if name == "hidden" else name, what) from None
