"""Rows whose logits are shared out along the classes, as over the devices of a large model.

Of each shard a row keeps (m, s): its largest logit and the sum of exp(x - m); and the target's logit, if the
shard holds it. Two such merge as parts of a row do in the kernels, m to the larger and both s in terms of it,
so shards may come in any order, from anywhere.
"""

import numpy as np
import numpy.typing as npt

from logitloss import _backends, _check
from logitloss._threads import threads_for
from logitloss.evaluate.errors import DtypeError, LabelError, LogitError, ShapeError
from logitloss.evaluate.rows import Rows, first_index

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class VocabularyShards:
    """Cross-entropy of rows from shards of their logits.

    Parameters
    ----------
    target : array_like of int
        Class labels, counted over all shards.
    ignore_index : int
        Rows with this label do not count.

    Attributes
    ----------
    m, s : ndarray of float64, the target's shape
        The largest logit so far, -inf before there is one, and the sum of exp(x - m).
    top : ndarray of int64
        The class of the largest logit, the first of equals.
    target_logit : ndarray of float64
        The target's logit; NaN as long as no shard had it.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import EvaluationState, VocabularyShards
    >>> logits, target = np.log([[1.0, 1.0, 2.0, 4.0]]), [2]
    >>> here, there = VocabularyShards(target), VocabularyShards(target)
    >>> here.update(logits[:, 2:], first_class=2)
    >>> there.update(logits[:, :2], first_class=0)
    >>> here.merge(there)
    >>> state = EvaluationState()
    >>> state.add(here.rows())
    >>> round(state.compute().perplexity, 9)
    4.0
    """

    def __init__(self, target: npt.ArrayLike, *, ignore_index: int = -100) -> None:
        self.target = np.asarray(target)
        if self.target.dtype.kind not in "iu":
            what = f"of type {self.target.dtype}, expected integers: the labels of the classes"
            raise DtypeError("target", what)
        self.ignore_index = _check.ignored(ignore_index, soft=False)
        self.m: Float64 = np.full(self.target.shape, -np.inf)
        self.s: Float64 = np.zeros(self.target.shape)
        self.top = np.full(self.target.shape, -1, np.int64)
        self.target_logit: Float64 = np.full(self.target.shape, np.nan)

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
            As in `logitloss.logsumexp`.

        Raises
        ------
        ShapeError
            A ValueError.
        TypeError
            Logits of another type.
        """
        kernels = _backends.get(backend)
        x = _check.floats("logits", logits, _check.HOST)
        if x.ndim == 0 or x.shape[:-1] != self.target.shape or x.shape[-1] == 0:
            what = f"of shape {x.shape}, expected {self.target.shape} and the classes of the shard"
            raise ShapeError("logits", what)
        first_class = _check.integer("first_class", first_class, least=0)
        lse = np.empty(self.target.shape)
        kernels.logsumexp(x, lse, threads_for(x.size, num_threads))
        top = np.asarray(x.argmax(axis=-1))
        m = np.take_along_axis(x, top[..., None], axis=-1)[..., 0].astype(np.float64)
        with np.errstate(invalid="ignore"):
            s = np.where(np.isfinite(m), np.exp(lse - m), np.where(m == -np.inf, 0.0, np.nan))
        labels = self.target.astype(np.int64) - first_class
        is_here = (labels >= 0) & (labels < x.shape[-1]) & (self.target != self.ignore_index)
        places = np.where(is_here, labels, 0)[..., None]
        found = np.take_along_axis(x, places, axis=-1)[..., 0].astype(np.float64)
        self._merge(m, s, first_class + top, np.where(is_here, found, np.nan))

    def merge(self, other: "VocabularyShards") -> None:
        """Take in the shards that another state of the same rows has seen.

        Raises
        ------
        ShapeError
            Its target is another.
        """
        if self.ignore_index != other.ignore_index or not np.array_equal(self.target, other.target):
            raise ShapeError("other", "has another target, or ignores another label")
        self._merge(other.m, other.s, other.top, other.target_logit)

    def _merge(self, m: Float64, s: Float64, top: Int64, target_logit: Float64) -> None:
        high = np.maximum(self.m, m)  # NaN where either is

        def scaled(s: Float64, m: Float64) -> Float64:
            with np.errstate(invalid="ignore"):
                return np.where(m == -np.inf, 0.0, s * np.exp(m - high))

        self.s = scaled(self.s, self.m) + scaled(s, m)
        is_first = (m > self.m) | ((m == self.m) & (top < self.top)) | (self.top < 0)
        self.top = np.where(is_first, top, self.top)
        self.m = high
        self.target_logit = np.where(np.isnan(self.target_logit), target_logit, self.target_logit)

    def lse(self) -> Float64:
        """Return the rows' logsumexp over all shards so far."""
        with np.errstate(divide="ignore", invalid="ignore"):
            lse: Float64 = self.m + np.log(self.s)
        return lse

    def rows(self) -> Rows:
        """Return what the rows come to, once all shards are there: `EvaluationState.add` takes it.

        Loss and hit are all that is known: of such rows no Brier score is told, no rank and no entropy.

        Raises
        ------
        LabelError
            No shard held the class of a row that counts.
        LogitError
            A row that counts holds NaN or +inf, or nothing but -inf.
        """
        counted = self.target != self.ignore_index
        is_poisoned = counted & ~np.isfinite(self.s + self.m)
        if is_poisoned.any():
            raise LogitError("logits", "nan or inf among them, or only -inf", first_index(is_poisoned))
        is_missing = counted & np.isnan(self.target_logit)
        if is_missing.any():
            index = first_index(is_missing)
            raise LabelError("target", f"label {self.target[index]} was in none of the shards", index)
        with np.errstate(invalid="ignore"):  # of rows that do not count
            loss = np.where(counted, self.lse() - self.target_logit, 0.0)
        hit = counted & (self.top == self.target)
        return Rows(loss.ravel(), hit.ravel(), counted.ravel())
