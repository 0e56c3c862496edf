"""Rows whose logits are shared out along the classes, as over the devices of a large model.

Of the classes so far a row keeps the largest logit m, the sum of exp(x - m) over the others, and of their
probabilities the entropy and the squares. Two such merge as parts of a row do in the kernels, so shards may
come in any order, from anywhere. A rank alone needs the target's logit beforehand, in shards that do not hold
it: `target_logits` finds it in a round before.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss import _backends, _check
from logitloss._kernels import FIGURES
from logitloss._threads import threads_for
from logitloss.evaluate.errors import DtypeError, LogitError, ShapeError
from logitloss.evaluate.rows import Rows, bad_label, first_index
from logitloss.evaluate.shard import blocks

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Logits compared with the targets' at once: the marks stay in the cache
AT_ONCE = 1 << 20


def target_logits(logits: npt.ArrayLike, target: npt.ArrayLike, first_class: int) -> Float64:
    """Return the target's logit of each row whose target is in a shard, else NaN.

    `np.fmax` makes one array of those of all shards.

    Parameters
    ----------
    logits : array_like of float16, bfloat16, float32 or float64
        A shard: of the target's shape and, on a last axis, the shard's classes.
    target : array_like of int
        Class labels, counted over all shards.
    first_class : int
        The number of the shard's first class.

    Returns
    -------
    ndarray of float64, the target's shape

    Raises
    ------
    ShapeError, DtypeError
        A ValueError and a TypeError.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import target_logits
    >>> logits, target = np.array([[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]]), np.array([1, 2])
    >>> np.fmax(target_logits(logits[:, :2], target, 0), target_logits(logits[:, 2:], target, 2))
    array([1.5, 5.5])
    """
    labels = _labels(target)
    x, first_class = _shard(logits, first_class, labels.shape)
    place = labels.astype(np.int64) - first_class
    is_here = (place >= 0) & (place < x.shape[-1])
    found = np.take_along_axis(x, np.where(is_here, place, 0)[..., None], axis=-1)[..., 0]
    return np.where(is_here, found.astype(np.float64), np.nan)


class VocabularyShards:
    """Cross-entropy of rows, and their figures, from shards of their logits.

    Parameters
    ----------
    target : array_like of int
        Class labels, counted over all shards.
    target_logit : array_like of float, the target's shape, optional
        The targets' logits, as `target_logits` finds them. Without, ranks cannot be counted, and of the rows
        loss and hit are all that is told.
    ignore_index : int
        Rows with this label do not count.

    Attributes
    ----------
    m, others : ndarray of float64, the target's shape
        The largest logit so far, -inf before there is one, and the sum of exp(x - m) over all other classes.
    top : ndarray of int64
        The class of the largest logit, the first of equals.
    entropy, others_squared : ndarray of float64
        As in the figures of a row (`logitloss._kernels`), over the classes so far.
    before : ndarray of int64
        How many classes come before the target, by their logits.
    target_logit : ndarray of float64
        The target's logit; NaN as long as no shard had it.
    seen : list of (int, int)
        Of each shard so far its first class and one more than its last, in order.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import EvaluationState, VocabularyShards, target_logits
    >>> logits, target = np.log([[1.0, 1.0, 2.0, 4.0]]), [2]
    >>> found = np.fmax(target_logits(logits[:, :2], target, 0), target_logits(logits[:, 2:], target, 2))
    >>> here, there = VocabularyShards(target, found), VocabularyShards(target, found)
    >>> here.update(logits[:, 2:], first_class=2)
    >>> there.update(logits[:, :2], first_class=0)
    >>> here.merge(there)
    >>> state = EvaluationState()
    >>> state.add(here.rows())
    >>> metrics = state.compute()
    >>> round(metrics.perplexity, 9), metrics.classes.mean_reciprocal_rank
    (4.0, 0.5)
    """

    def __init__(
        self, target: npt.ArrayLike, target_logit: npt.ArrayLike | None = None, *, ignore_index: int = -100
    ) -> None:
        self.target = _labels(target)
        shape = self.target.shape
        self.ignore_index = _check.ignored(ignore_index, soft=False)
        self.has_ranks = target_logit is not None
        self.target_logit: Float64 = np.full(shape, np.nan)
        if target_logit is not None:
            self.target_logit = np.asarray(target_logit, np.float64)
            if self.target_logit.shape != shape:
                what = f"of shape {self.target_logit.shape}, but the target has {shape}"
                raise ShapeError("target_logit", what)
        self.m: Float64 = np.full(shape, -np.inf)
        self.others: Float64 = np.zeros(shape)
        self.top: Int64 = np.full(shape, -1, np.int64)
        self.entropy: Float64 = np.zeros(shape)
        self.others_squared: Float64 = np.zeros(shape)
        self.before: Int64 = np.zeros(shape, np.int64)
        self.seen: list[tuple[int, int]] = []

    def update(
        self,
        logits: npt.ArrayLike,
        first_class: int,
        *,
        num_threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Take in a shard of all rows, which no other state that is to be merged may have.

        Parameters
        ----------
        logits : array_like of float16, bfloat16, float32 or float64
            Of the target's shape and, on a last axis, the shard's classes.
        first_class : int
            The number of the first of them.
        num_threads, backend
            As in `logitloss.cross_entropy`.

        Raises
        ------
        ShapeError
            A ValueError.
        TypeError
            Logits of another type.
        """
        kernels = _backends.get(backend)
        x, first_class = _shard(logits, first_class, self.target.shape)
        n_classes = x.shape[-1]
        place = self.target.astype(np.int64) - first_class
        is_here = (place >= 0) & (place < n_classes)
        # of a row whose target is elsewhere it is the first class: its loss and rank are not used
        labels = np.where(is_here, place, 0)
        loss = np.empty(labels.shape, _check.result_dtype(x.dtype))
        lse, figures = np.empty(labels.shape), np.empty((*labels.shape, len(FIGURES)))
        threads = threads_for(x.size, num_threads)
        kernels.cross_entropy(x, labels, -1, None, None, 0.0, 1.0, None, loss, lse, figures, None, threads)
        is_finite = np.isfinite(lse)
        rank, top, top_p, entropy, squares = np.where(is_finite, np.moveaxis(figures, -1, 0), 0.0)
        place_of_top = top.astype(np.int64)
        largest = np.take_along_axis(x, place_of_top[..., None], axis=-1)[..., 0].astype(np.float64)
        with np.errstate(divide="ignore", over="ignore"):
            # Near p = 1, 1/p - 1 has lost digits. That shows in no loss but the top's own, which has them:
            # any other is at least log 2.
            is_sure = is_here & (labels == place_of_top) & (top_p > 0.5)
            others = np.where(is_sure, np.expm1(loss, dtype=np.float64), 1 / top_p - 1)
        part = VocabularyShards(self.target, ignore_index=self.ignore_index)
        part.m = np.where(is_finite, largest, lse)
        part.others = np.where(is_finite, others, np.where(lse == -np.inf, 0.0, np.nan))
        part.top = first_class + place_of_top
        part.entropy, part.others_squared = entropy, squares
        part.target_logit = target_logits(x, self.target, first_class)
        self._check_target_logits(part.target_logit, is_here)
        part.seen = [(first_class, first_class + n_classes)]
        if self.has_ranks:
            among = np.where(is_finite, rank - 1, place).astype(np.int64)  # equals, where all are -inf
            elsewhere = _count_before(x, self.target_logit, place >= n_classes)
            part.before = np.where(is_here, among, elsewhere)
        self._merge(part)

    def _check_target_logits(self, found: Float64, is_here: npt.NDArray[np.bool_]) -> None:
        """Refuse a logit, given for a row that counts, which its class's shard has otherwise."""
        if self.has_ranks:
            differs = is_here & (self.target != self.ignore_index) & (found != self.target_logit)
            differs &= ~(np.isnan(found) | np.isnan(self.target_logit))
            if differs.any():
                index = first_index(differs)
                what = f"is {self.target_logit[index]}, but the shard that holds the class has {found[index]}"
                raise ShapeError("target_logit", what, index)

    def merge(self, other: "VocabularyShards") -> None:
        """Take in the shards that another state of the same rows has seen.

        Raises
        ------
        ShapeError
            Its target is another.
        """
        if self.ignore_index != other.ignore_index or not np.array_equal(self.target, other.target):
            raise ShapeError("other", "has another target, or ignores another label")
        if self.has_ranks != other.has_ranks:
            raise ShapeError("other", "one has the targets' logits from the start, the other has not")
        self._merge(other)

    def _merge(self, other: "VocabularyShards") -> None:
        is_first = (self.m > other.m) | ((self.m == other.m) & (self.top <= other.top)) | (other.top < 0)
        is_first &= self.top >= 0
        with np.errstate(invalid="ignore", over="ignore"):
            ahead = (self.m - other.m) + (np.log1p(self.others) - np.log1p(other.others))
            entropy, squares = np.zeros_like(self.m), np.zeros_like(self.m)
            for one, gap, has_top in ((self, ahead, is_first), (other, -ahead, ~is_first)):
                cost = np.logaddexp(0.0, -gap)  # minus the logarithm of the share that its classes have
                share = np.where(one.m == -np.inf, 0.0, np.exp(-cost))
                entropy += np.where(share == 0, 0.0, share * (one.entropy + cost))
                top_p = np.where(has_top, 0.0, 1 / (1 + one.others))
                squares += share * share * (one.others_squared + top_p * top_p)
            high, low = np.where(is_first, (self.m, other.m), (other.m, self.m))
            first, second = np.where(is_first, (self.others, other.others), (other.others, self.others))
            moved = np.where(low == -np.inf, 0.0, (1 + second) * np.exp(low - high))
        self.others = first + moved
        self.m = np.maximum(self.m, other.m)  # NaN where either is
        self.top = np.where(is_first, self.top, other.top)
        self.entropy, self.others_squared = entropy, squares
        self.before = self.before + other.before
        self.target_logit = np.fmax(self.target_logit, other.target_logit)
        self.seen = sorted([*self.seen, *other.seen])

    @property
    def n_classes(self) -> int:
        """One more than the last class so far."""
        return max((end for _, end in self.seen), default=0)

    def lse(self) -> Float64:
        """Return the rows' logsumexp over all shards so far."""
        with np.errstate(invalid="ignore"):  # of rows that do not count
            lse: Float64 = self.m + np.log1p(self.others)
        return lse

    def rows(self) -> Rows:
        """Return what the rows come to, once all shards are there: `EvaluationState.add` takes it.

        Without the targets' logits from the start, loss and hit are all that is known: of such rows no Brier
        score is told, no rank and no entropy.

        Raises
        ------
        ShapeError
            The shards do not hold each class once.
        LabelError
            A label is outside the classes.
        LogitError
            A row that counts holds NaN or +inf, or nothing but -inf.
        """
        self._check_classes()
        target, n_classes = self.target, self.n_classes
        counted = target != self.ignore_index
        is_bad = counted & ((target < 0) | (target >= n_classes))
        if is_bad.any():
            raise bad_label(target, first_index(is_bad), n_classes, self.ignore_index)
        with np.errstate(invalid="ignore"):  # of rows that do not count
            is_poisoned = counted & ~np.isfinite(self.m + self.others)
        if is_poisoned.any():
            index = first_index(is_poisoned)
            what = "every logit is -inf" if self.m[index] == -np.inf else f"a logit is {self.m[index]}"
            raise LogitError("logits", what, index)
        with np.errstate(invalid="ignore"):  # of rows that do not count
            loss = np.where(counted, (self.m - self.target_logit) + np.log1p(self.others), 0.0)
        marks = None if counted.all() else counted.ravel()
        if not self.has_ranks:
            hit = (counted & (self.top == target)).ravel()
            return Rows(loss.ravel(), marks, known_hit=hit)
        columns = (1 + self.before, self.top, 1 / (1 + self.others), self.entropy, self.others_squared)
        figures = np.where(counted[..., None], np.stack(columns, axis=-1), 0.0).reshape(-1, len(FIGURES))
        return Rows(loss.ravel(), marks, target.ravel(), figures, n_classes)

    def _check_classes(self) -> None:
        if not self.seen:
            raise ShapeError("logits", "no shard has been taken in")
        next_class = 0
        for first, end in self.seen:
            if first > next_class:
                raise ShapeError("logits", f"class {next_class} was in none of the shards")
            if first < next_class:
                raise ShapeError("logits", f"class {first} was in more than one of the shards")
            next_class = end


def _labels(target: npt.ArrayLike) -> Array:
    _check.unmasked("target", target)
    labels = np.asarray(target)
    if labels.dtype.kind not in "iu":
        raise DtypeError("target", f"of type {labels.dtype}, expected integers: the labels of the classes")
    return labels


def _shard(logits: npt.ArrayLike, first_class: int, rows: tuple[int, ...]) -> tuple[Array, int]:
    x = _check.floats("logits", logits, _check.HOST)
    if x.ndim == 0 or x.shape[:-1] != rows or x.shape[-1] == 0:
        what = f"of shape {x.shape}, expected {rows} and the classes of the shard"
        raise ShapeError("logits", what)
    return x, _check.integer("first_class", first_class, least=0)


def _count_before(logits: Array, target_logit: Float64, has_lower: npt.NDArray[np.bool_]) -> Int64:
    """Count in each row the logits above the target's; those equal to it, too, in rows that `has_lower`."""
    counts = np.empty(target_logit.shape, np.int64)
    for box in blocks(counts.shape, max(1, AT_ONCE // logits.shape[-1])):
        x, least = logits[box], target_logit[box][..., None]
        is_before = x > least
        np.greater_equal(x, least, out=is_before, where=has_lower[box][..., None])
        counts[box] = np.count_nonzero(is_before, axis=-1)
    return counts
