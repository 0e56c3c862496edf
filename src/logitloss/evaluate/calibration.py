"""Whether probabilities are what they say: whether of those near 0.7 seven in ten come true.

Probabilities fall into bins of equal width. Of each bin there are the count, the sum of its probabilities and
the sum of its outcomes; the gap between their means is how far that bin is off.
"""

from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.counts import N_PROBABILITIES, Counts
from logitloss.evaluate.moments import Sums, counts_of

Int64 = npt.NDArray[np.int64]


class Bin(TypedDict):
    """A line of the reliability table."""

    low: float
    high: float
    count: int
    probability: float
    outcome: float


def _counts() -> Int64:
    return np.zeros(N_PROBABILITIES, np.int64)


def _sums() -> Sums:
    return Sums.zeros(N_PROBABILITIES)


@dataclass(slots=True, eq=False)
class Calibration:
    """Counts and sums of the bins, which are equal parts of [0, 1], each with its upper end."""

    count: Int64 = field(default_factory=_counts)
    probability: Sums = field(default_factory=_sums)
    outcome: Sums = field(default_factory=_sums)

    def add(self, counts: Counts) -> None:
        """Add probabilities that were counted, and what came true of them: 0 or 1, or a share."""
        self.count = self.count + counts.found["bins"]
        self.probability.merge(Sums(*counts.found["probability"].T))
        self.outcome.merge(Sums(*counts.found["outcome"].T))

    def merge(self, other: "Calibration") -> None:
        """Add what another has seen."""
        self.count = self.count + other.count
        self.probability.merge(other.probability)
        self.outcome.merge(other.outcome)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "count": self.count.tolist(),
            "probability": self.probability.to_list(),
            "outcome": self.outcome.to_list(),
        }

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same."""
        return isinstance(other, Calibration) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` wrote."""
        count = counts_of(saved["count"])
        sums = [Sums.from_list(saved[name]) for name in ("probability", "outcome")]
        if {count.shape, *(one.high.shape for one in sums)} != {(N_PROBABILITIES,)}:
            raise ValueError(f"calibration of other than {N_PROBABILITIES} bins")
        return cls(count, *sums)

    def table(self) -> list[Bin]:
        """Return the bins that hold something: their bounds, counts and means."""
        p, y = self.probability.values, self.outcome.values
        return [
            {
                "low": i / N_PROBABILITIES,
                "high": (i + 1) / N_PROBABILITIES,
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
