"""Whether probabilities are what they say: whether of those near 0.7 seven in ten come true.

Probabilities fall into bins of equal width. Of each bin there are the count, the sum of its probabilities and
the sum of its outcomes; the gap between their means is how far that bin is off.
"""

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.moments import two_sum

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

N_BINS = 15
# Numbers added up plainly before what sums lose to rounding is kept apart
PLAIN = 4096


class Bin(TypedDict):
    """A line of the reliability table."""

    low: float
    high: float
    count: int
    probability: float
    outcome: float


@dataclass(slots=True)
class Sums:
    """Float64 sums side by side, and the rounding errors they have made so far."""

    high: Float64
    low: Float64

    @classmethod
    def zeros(cls, n: int) -> "Sums":
        """Return n sums of nothing."""
        return cls(np.zeros(n), np.zeros(n))

    def add(self, values: Float64) -> None:
        """Add a number to each."""
        self.high, error = two_sum(self.high, values)
        self.low += error

    def merge(self, other: "Sums") -> None:
        """Add other sums, errors included."""
        self.add(other.high)
        self.low += other.low

    @property
    def values(self) -> Float64:
        """The sums."""
        return self.high + self.low


def _counts() -> Int64:
    return np.zeros(N_BINS, np.int64)


def _sums() -> Sums:
    return Sums.zeros(N_BINS)


@dataclass(slots=True, eq=False)
class Calibration:
    """Counts and sums of the bins, which are equal parts of [0, 1], each with its upper end."""

    count: Int64 = field(default_factory=_counts)
    probability: Sums = field(default_factory=_sums)
    outcome: Sums = field(default_factory=_sums)

    def add(self, probability: Float64, outcome: Float64) -> None:
        """Add probabilities, and what came true of them: 0 or 1, or a share."""
        for first in range(0, probability.size, PLAIN):
            p, y = probability[first : first + PLAIN], outcome[first : first + PLAIN]
            # the bin whose upper end is the first not below p
            number = np.maximum(np.ceil(p * N_BINS).astype(np.intp), 1) - 1
            self.count += np.bincount(number, minlength=N_BINS)
            for sums, values in ((self.probability, p), (self.outcome, y)):
                part: Any = np.bincount(number, values, N_BINS)
                sums.add(part)

    def merge(self, other: "Calibration") -> None:
        """Add what another has seen."""
        self.count = self.count + other.count
        self.probability.merge(other.probability)
        self.outcome.merge(other.outcome)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        sums = {"probability": self.probability, "outcome": self.outcome}
        return {"count": self.count.tolist()} | {
            name: [one.high.tolist(), one.low.tolist()] for name, one in sums.items()
        }

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same."""
        return isinstance(other, Calibration) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` wrote."""
        count = np.array(saved["count"], np.int64)
        sums = [Sums(*np.array(saved[name], np.float64)) for name in ("probability", "outcome")]
        if {count.shape, *(one.high.shape for one in sums)} != {(N_BINS,)} or (count < 0).any():
            raise ValueError(f"calibration of other than {N_BINS} bins")
        return cls(count, *sums)

    def table(self) -> list[Bin]:
        """Return the bins that hold something: their bounds, counts and means."""
        p, y = self.probability.values, self.outcome.values
        return [
            {
                "low": i / N_BINS,
                "high": (i + 1) / N_BINS,
                "count": int(self.count[i]),
                "probability": float(p[i] / self.count[i]),
                "outcome": float(y[i] / self.count[i]),
            }
            for i in np.flatnonzero(self.count).tolist()
        ]

    def errors(self) -> tuple[float, float]:
        """Return the expected calibration error, the mean gap, and the largest gap; NaN of nothing."""
        gaps = np.abs(self.probability.values - self.outcome.values)
        total = int(self.count.sum())
        if not total:
            return float("nan"), float("nan")
        filled = self.count > 0
        return float(gaps.sum() / total), float((gaps[filled] / self.count[filled]).max())
