"""An evaluation of files: logits, or hidden states and the last layer's weight, against labels."""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from logitloss.evaluate.errors import EvaluationError, ShapeError
from logitloss.evaluate.readers import open_array
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stream import evaluate, floats
from logitloss.linear import LinearLogits

Array = npt.NDArray[Any]


def evaluate_files(
    logits_path: str,
    target_path: str,
    *,
    unembedding_path: str | None = None,
    bias_path: str | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> tuple[EvaluationState, int, int]:
    """Evaluate logits in one file against labels in another, `.npy` or `.npz`.

    Parameters
    ----------
    logits_path, target_path : str
        The files; `PATH::name` for one array of several in a `.npz` file.
    unembedding_path, bias_path : str, optional
        Those of a last layer's weight and bias; then `logits_path` is that of its hidden states.
    softcap, logit_scale
        As in `logitloss.linear_cross_entropy`.
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
    paths = {"logits": logits_path, "target": target_path, "weight": unembedding_path, "bias": bias_path}
    mapped = {name: open_array(path) for name, path in paths.items() if path is not None}
    steps: list[int] = []  # the first and the last

    def block_done(done: int, n_rows: int) -> None:
        steps[1:] = [done]
        mapped["logits"].release()
        mapped["target"].release()
        if progress is not None:
            progress(done, n_rows)

    arrays = {name: one.array for name, one in mapped.items()}
    try:
        target = arrays.pop("target")
        logits: Array | LinearLogits = arrays["logits"]
        if unembedding_path is not None:
            for name, array in arrays.items():
                arrays[name], _ = floats(name, array, dtype if array.dtype.itemsize == 2 else None)
            logits, dtype = _linear(arrays, softcap, logit_scale), None
        state = evaluate(logits, target, dtype=dtype, progress=block_done, **options)
    except EvaluationError as error:
        error.argument = paths.get(error.argument) or error.argument
        raise
    n_rows = steps[-1] - steps[0]
    return state, n_rows, mapped["logits"].array.nbytes * n_rows // max(1, target.size)


def _linear(arrays: dict[str, Any], softcap: float | None, logit_scale: float) -> LinearLogits:
    try:
        return LinearLogits(arrays["logits"], arrays["weight"], arrays.get("bias"), softcap, logit_scale)
    except (TypeError, ValueError) as error:  # which start with what they are about
        name, _, what = str(error).partition(" ")
        raise ShapeError("logits" if name == "hidden" else name, what) from None
