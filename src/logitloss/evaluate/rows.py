"""Loss and hit of every row of a batch, in one pass of the kernels, or an error that names the first bad row.

The kernels tell that something is wrong (a bad label, a NaN loss) as they go; only then is the batch searched
for the row to name, so that sound input is read once. Sums over rows are left to `state.py`.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from logitloss import _backends, _check
from logitloss._threads import threads_for
from logitloss.binary import binary_cross_entropy_with_logits
from logitloss.evaluate.errors import DtypeError, LabelError, LogitError

Array = npt.NDArray[Any]


class Rows(NamedTuple):
    """What a batch contributes: losses of the rows that count (in nats), hits among them, rows ignored."""

    loss: npt.NDArray[np.float64]
    correct: int
    ignored: int


def cross_entropy_rows(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    ignore_index: int,
    axis: int | None,
    num_threads: int | None,
    backend: str | None,
) -> Rows:
    """Softmax cross-entropy of each row against its label."""
    kernels = _backends.get(backend)
    x = _check.floats("logits", logits, _check.HOST)
    place = _check.class_axis("logits", x, axis)
    labels, soft = _check.labels(target, x, place)
    if soft:
        raise DtypeError("target", f"of type {labels.dtype}, expected integers: the labels of the classes")
    ignore_index = _check.ignored(ignore_index, soft=False)
    x = _check.axis_last(x, place)
    loss = np.empty(labels.shape, _check.result_dtype(x.dtype))
    hit = np.empty(labels.shape, np.uint8)
    threads = threads_for(x.size, num_threads)
    # no class weights, smoothing, z-loss or lse; no lse and no gradient wanted
    _, counted, bad = kernels.cross_entropy(
        x, labels, ignore_index, None, None, 0.0, 1.0, None, loss, None, hit, None, threads
    )
    if bad >= 0:
        index = _index(bad, labels.shape)
        allowed = f"0 to {x.shape[-1] - 1}, and is not ignore_index={ignore_index}"
        raise LabelError("target", f"label {labels[index]} is outside {allowed}", index)
    if _any_nan(loss):
        index = _first(np.isnan(loss))
        raise LogitError("logits", _why_nan(x[index]), index)
    values = loss[labels != ignore_index] if counted < labels.size else loss.ravel()
    return Rows(values.astype(np.float64, copy=False), int(np.count_nonzero(hit)), labels.size - counted)


def binary_rows(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    ignore_index: int,
    num_threads: int | None,
    backend: str | None,
) -> Rows:
    """Binary cross-entropy of each logit against its label, a probability; a hit has both on one side."""
    x = _check.floats("logits", logits, _check.HOST)
    labels = _check.same_shape("target", _check.reals("target", target, x), x.shape, "the logits'")
    ignored = labels == ignore_index
    n_ignored = int(np.count_nonzero(ignored))
    if n_ignored:
        x, labels = x[~ignored], labels[~ignored]
    bad = ~((labels >= 0) & (labels <= 1))
    if bad.any():
        what = f"label {labels[bad][0]} is outside 0 to 1, and is not ignore_index={ignore_index}"
        raise LabelError("target", what, _first(_spread(bad, ignored)))
    loss = np.asarray(
        binary_cross_entropy_with_logits(
            x, labels, reduction="none", num_threads=num_threads, backend=backend
        )
    )
    if _any_nan(loss):
        raise LogitError("logits", "the logit is nan", _first(_spread(np.isnan(loss), ignored)))
    correct = np.count_nonzero((x > 0) == (labels > 0.5))
    return Rows(loss.ravel().astype(np.float64, copy=False), int(correct), n_ignored)


def _any_nan(loss: Array) -> bool:
    # the largest is NaN if any is, and to find it makes no array of marks
    return loss.size > 0 and bool(np.isnan(loss.max()))


def _first(marked: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the index of the first True in C order."""
    return _index(int(np.argmax(marked)), marked.shape)


def _index(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(number, shape))


def _spread(marked: npt.NDArray[np.bool_], ignored: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the marks of the labels that count, back where they stood among those ignored."""
    if marked.shape == ignored.shape:
        return marked
    places = np.zeros_like(ignored)
    places[~ignored] = marked
    return places


def _why_nan(row: Array) -> str:
    for bad, name in ((np.isnan(row), "nan"), (row == np.inf, "inf")):
        if bad.any():
            return f"the logit of class {int(np.argmax(bad))} is {name}"
    if (row == -np.inf).all():
        return "every logit is -inf"
    return "the loss is nan"
