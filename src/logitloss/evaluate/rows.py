"""Every figure of each row of a batch, in one pass of the kernels, or an error that names the first bad row.

The kernels tell that something is wrong (a bad label, a NaN loss) as they go; only then is the batch searched
for the row to name, so that sound input is read once. Sums over rows are left to `counts.py`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from logitloss import _backends, _check
from logitloss._kernels import FIGURES
from logitloss._threads import threads_for
from logitloss.binary import binary_cross_entropy_with_logits
from logitloss.evaluate.counts import Counts, count_rows
from logitloss.evaluate.errors import DtypeError, LabelError, LogitError, ShapeError
from logitloss.evaluate.metrics import Loss
from logitloss.evaluate.positions import Mask, as_bool, without_masked

Array = npt.NDArray[Any]


class Rows(NamedTuple):
    """Of each row, in C order: its loss in nats, and whether it counts (None: all do).

    A row that does not count has loss 0. Of classes there are the kernels' figures, the labels, and how many
    classes there are; of binary labels the labels and logits. `VocabularyShards` can lack both, and then know
    which rows are hits. `kept` is False where a mask leaves a row out (None: nowhere). `counts` may be there
    already; else `num_threads` find them.
    """

    loss: Array
    counted: Mask | None
    label: Array | None = None
    figures: npt.NDArray[np.float64] | None = None
    n_classes: int = 0
    logit: Array | None = None
    kept: Mask | None = None
    known_hit: Mask | None = None
    counts: Counts | None = None
    num_threads: int | None = None

    def chosen(self, rows: Array | slice) -> "Rows":
        """Return some of them."""
        parts: Any = (one[rows] if isinstance(one, np.ndarray) else one for one in self)
        return Rows(*parts)._replace(counts=None)

    def counted_parts(self, n_rows: int) -> Iterator["Rows"]:
        """Return those that count, of so many rows at a time."""
        for first in range(0, self.loss.size, n_rows):
            part = self.chosen(slice(first, first + n_rows))
            yield part if part.counted is None else part.chosen(np.flatnonzero(part.counted))

    def find_counts(self) -> Counts:
        """Return what they come to."""
        if self.counts is not None:
            return self.counts
        threads = self.num_threads
        if self.logit is not None:
            return count_rows(
                self.loss, self.counted, logits=self.logit, target=self.label, num_threads=threads
            )
        counts = count_rows(self.loss, self.counted, figures=self.figures, num_threads=threads)
        if self.known_hit is not None:
            counts.found["correct"] = np.count_nonzero(self.known_hit)
        return counts

    @property
    def hit(self) -> Mask:
        """Whether each is a hit; one that does not count is none."""
        if self.known_hit is not None:
            return self.known_hit
        if self.figures is not None:
            return np.equal(self.figures[:, FIGURES.index("rank")], 1)
        assert self.logit is not None
        assert self.label is not None
        hit: Mask = (self.logit > 0) == (self.label > 0.5)
        return hit if self.counted is None else hit & self.counted

    @property
    def brier(self) -> npt.NDArray[np.float64]:
        """The Brier score of each: of 1 - p of the label no digits are lost.

        The squares of the other classes are those of all but the top; of a miss the top is one of them, and
        the label is not.
        """
        assert self.figures is not None
        found = dict(zip(FIGURES, self.figures.T, strict=True))
        missing = np.expm1(-self.loss.astype(np.float64))
        p, top = 1 + missing, found["top_probability"]
        squares: npt.NDArray[np.float64] = missing**2 + found["others_squared"]
        is_miss = found["rank"] > 1
        squares[is_miss] += ((top - p) * (top + p))[is_miss]
        return squares

    def store(self, out: Array) -> None:
        """Write them to an array of `row_dtype`, of as many elements."""
        found: dict[str, Any] = {"loss": self.loss, "hit": self.hit, "counted": self.counted}
        if self.counted is None:
            found["counted"] = np.ones(self.loss.size, np.bool_)
        if self.figures is not None:
            found |= zip(FIGURES, self.figures.T, strict=True)
            found["brier"] = self.brier
        for name in out.dtype.names or ():
            out[name] = found[name].reshape(out.shape)

    @property
    def masked(self) -> int:
        """How many a mask leaves out."""
        return 0 if self.kept is None else self.kept.size - int(np.count_nonzero(self.kept))


def row_dtype(logits_dtype: npt.DTypeLike, loss: Loss = "ce") -> np.dtype[Any]:
    """Return the dtype of a record of a row's figures, which for classes has more of them."""
    real = np.float64 if np.dtype(logits_dtype) == np.float64 else np.float32
    fields: list[tuple[str, Any]] = [("loss", real), ("hit", np.bool_), ("counted", np.bool_)]
    if loss == "ce":
        fields += [("rank", np.int64), ("top", np.int64)]
        fields += [(name, real) for name in ("top_probability", "entropy", "brier")]
    return np.dtype(fields)


def rows_of(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    loss: Loss,
    axis: int | None,
    mask: Array | None = None,
    **options: Any,
) -> Rows:
    """Return what a batch comes to, row by row; for "bce" each logit is a row."""
    kept = None if mask is None else as_bool(mask)
    if loss == "bce":
        check_no_axis(axis)
        return binary_rows(logits, target, kept=kept, **options)
    return cross_entropy_rows(logits, target, axis=axis, kept=kept, **options)


def check_no_axis(axis: int | None) -> None:
    """Refuse an axis of classes beside binary labels."""
    if axis is not None:
        raise ShapeError("axis", f"is {axis}, but binary cross-entropy has no axis of classes")


def cross_entropy_rows(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    kept: Mask | None,
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
    seen = without_masked(labels, kept, ignore_index)
    loss = np.empty(labels.shape, _check.result_dtype(x.dtype))
    figures = np.empty((*labels.shape, len(FIGURES)))
    threads = threads_for(x.size, num_threads)
    # no class weights, smoothing, z-loss or lse; no lse and no gradient wanted
    _, counted, bad = kernels.cross_entropy(
        x, seen, ignore_index, None, None, 0.0, 1.0, None, loss, None, figures, None, threads
    )
    if bad >= 0:
        raise bad_label(labels, _index(bad, labels.shape), x.shape[-1], ignore_index)
    counts = count_rows(loss, figures=figures, num_threads=num_threads, backend=backend)
    if counts.has_nan:
        index = first_index(np.isnan(loss))
        raise LogitError("logits", _why_nan(x[index]), index)
    return Rows(
        loss.ravel(),
        None if counted == labels.size else (seen != ignore_index).ravel(),
        labels.ravel(),
        figures.reshape(-1, len(FIGURES)),
        x.shape[-1],
        kept=None if kept is None else kept.ravel(),
        counts=counts,
        num_threads=num_threads,
    )


def bad_label(labels: Array, index: tuple[int, ...], n_classes: int, ignore_index: int) -> LabelError:
    """Return the error about a label that is none of the classes."""
    allowed = f"0 to {n_classes - 1}, and is not ignore_index={ignore_index}"
    return LabelError("target", f"label {labels[index]} is outside {allowed}", index)


def binary_rows(
    logits: npt.ArrayLike,
    target: npt.ArrayLike,
    *,
    kept: Mask | None,
    ignore_index: int,
    num_threads: int | None,
    backend: str | None,
) -> Rows:
    """Binary cross-entropy of each logit against its label, a probability; a hit has both on one side."""
    x = _check.floats("logits", logits, _check.HOST)
    labels = _check.same_shape("target", _check.reals("target", target, x), x.shape, "the logits'")
    ignore_index = _check.ignored(ignore_index, soft=False)
    loss = np.asarray(
        binary_cross_entropy_with_logits(
            x, labels, reduction="none", num_threads=num_threads, backend=backend
        )
    )
    marks, ignored = kept, None
    if abs(ignore_index) < 2**53:
        ignored = ignore_index
    else:  # labels are counted as doubles, of which this may be several integers
        marks = _not_ignored(labels, ignore_index, kept)
    counts = count_rows(
        loss,
        marks,
        logits=x,
        target=labels,
        ignored=ignored,
        num_threads=num_threads,
        backend=backend,
    )
    counted = None
    if counts.found["counted"] < loss.size:
        counted = _not_ignored(labels, ignore_index, kept)
        loss[~counted] = 0
    if counts.found["bad"]:
        bad = ~((labels >= 0) & (labels <= 1))
        index = first_index(bad if counted is None else bad & counted)
        what = f"label {labels[index]} is outside 0 to 1, and is not ignore_index={ignore_index}"
        raise LabelError("target", what, index)
    if counts.has_nan:
        raise LogitError("logits", "the logit is nan", first_index(np.isnan(loss)))
    return Rows(
        loss.ravel(),
        None if counted is None else counted.ravel(),
        labels.ravel(),
        logit=x.ravel(),
        kept=None if kept is None else kept.ravel(),
        counts=counts,
        num_threads=num_threads,
    )


def _not_ignored(labels: Array, ignore_index: int, kept: Mask | None) -> npt.NDArray[np.bool_]:
    """Return which labels count: compared as doubles, as a narrower type may round the integer to a label."""
    wide = labels if labels.dtype.kind in "iub" else labels.astype(np.float64)
    counted: npt.NDArray[np.bool_] = wide != ignore_index
    return counted if kept is None else counted & kept


def first_index(marked: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the index of the first True in C order."""
    return _index(int(np.argmax(marked)), marked.shape)


def _index(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(number, shape))


def _why_nan(row: Array) -> str:
    for bad, name in ((np.isnan(row), "nan"), (row == np.inf, "inf")):
        if bad.any():
            return f"the logit of class {int(np.argmax(bad))} is {name}"
    if (row == -np.inf).all():
        return "every logit is -inf"
    return "the loss is nan"
