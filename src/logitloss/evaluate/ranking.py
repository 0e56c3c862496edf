"""How well logits rank positives above negatives, from a histogram: ROC AUC and average precision.

The bins are fixed, `STEP` of a logit wide between `-LIMIT` and `LIMIT`, and what is beyond is in the
outermost: so counts merge exactly. Within a bin the order is not known; how much that can matter is worked
out from the same counts, and is a bound, not an estimate.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.counts import N_LOGITS, Counts
from logitloss.evaluate.moments import counts_of

Int64 = npt.NDArray[np.int64]

LIMIT = 32
STEP = 2 * LIMIT / N_LOGITS


def _none() -> Int64:
    return np.zeros(0, np.int64)


@dataclass(slots=True, eq=False)
class Ranking:
    """Negatives and positives in each bin that is not empty, by the bin's number."""

    number: Int64 = field(default_factory=_none)
    negative: Int64 = field(default_factory=_none)
    positive: Int64 = field(default_factory=_none)

    def add(self, counts: Counts) -> None:
        """Add logits that were counted."""
        assert counts.logits is not None
        number = np.flatnonzero(counts.logits.any(axis=0))
        self._add(number, *counts.logits[:, number])

    def merge(self, other: "Ranking") -> None:
        """Add what another has seen."""
        self._add(other.number, other.negative, other.positive)

    def _add(self, number: Int64, negative: Int64, positive: Int64) -> None:
        whole, where = np.unique(np.concatenate([self.number, number]), return_inverse=True)
        ours, theirs = where[: self.number.size], where[self.number.size :]
        counts = []
        for before, more in ((self.negative, negative), (self.positive, positive)):
            sums = np.zeros(whole.size, np.int64)
            sums[ours] += before
            sums[theirs] += more
            counts.append(sums)
        self.number, (self.negative, self.positive) = whole, counts

    def to_dict(self) -> dict[str, list[int]]:
        """All of it, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("number", "negative", "positive")}

    def __eq__(self, other: object) -> bool:
        """Whether all counts are the same."""
        return isinstance(other, Ranking) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Ranking":
        """Read what `to_dict` wrote."""
        arrays = [counts_of(saved[name]) for name in ("number", "negative", "positive")]
        number = arrays[0]
        if len({array.size for array in arrays}) != 1:
            raise ValueError("ranking of bins and counts that are not as many")
        if (np.diff(number, append=N_LOGITS) <= 0).any():
            raise ValueError(f"ranking of bins out of order, or of more than {N_LOGITS}")
        return cls(*arrays)

    def roc_auc(self) -> tuple[float, float]:
        """Return the area under the ROC curve, and how far the exact one may be; NaN of one kind only.

        It is the share of pairs of a positive and a negative that are in order, those in one bin halved.
        """
        pairs = float(self.positive.sum()) * float(self.negative.sum())
        if not pairs:
            return float("nan"), float("nan")
        below = np.cumsum(self.negative) - self.negative
        halves = 0.5 * float((self.positive.astype(float) * self.negative).sum())
        in_order = float((self.positive.astype(float) * below).sum())
        return (in_order + halves) / pairs, halves / pairs

    def average_precision(self) -> tuple[float, float]:
        """Return the mean precision at the positives, and how far the exact one may be; NaN without any.

        Of a bin's positives all have the precision at its end, as equals have; in another order, that of each
        lies between those with all negatives of the bin before it, and with none.
        """
        total = int(self.positive.sum())
        if not total:
            return float("nan"), float("nan")
        positive, negative = self.positive[::-1].astype(float), self.negative[::-1].astype(float)
        filled = positive > 0
        true, false = np.cumsum(positive), np.cumsum(negative)
        positive, before, after = positive[filled], (false - negative)[filled], false[filled]
        last = true[filled]
        first = last - positive + 1  # of the bin, as many positives are at least as high
        end, highest, lowest = last / (last + after), last / (last + before), first / (first + after)
        bound = positive * np.maximum(highest - end, end - lowest)
        return float((positive * end).sum() / total), float(bound.sum() / total)
