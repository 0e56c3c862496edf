"""What is kept of classes beside their loss: ranks, squared errors, entropy, confidence, calibration.

All of it follows from the kernels' figures of a row and its loss. Ranks are counted one by one up to
`N_RANKS`, so top-k accuracy is exact for any k up to that.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.calibration import Calibration
from logitloss.evaluate.counts import N_RANKS, Counts
from logitloss.evaluate.metrics import ClassMetrics, TopK, share_error
from logitloss.evaluate.moments import Moments, counts_of, whole_number

Int64 = npt.NDArray[np.int64]

# Which are told where there are more classes
TOP_K = (1, 5, 10)
MEANS = ("reciprocal_rank", "brier", "confidence", "entropy")


def _ranks() -> Int64:
    return np.zeros(N_RANKS + 2, np.int64)


@dataclass(slots=True, eq=False)
class ClassState:
    """Counts of the ranks 0 (which there is not) to `N_RANKS` and of those above; sums over rows."""

    n_classes: int = 0
    ranks: Int64 = field(default_factory=_ranks)
    reciprocal_rank: Moments = field(default_factory=Moments)
    brier: Moments = field(default_factory=Moments)
    entropy: Moments = field(default_factory=Moments)
    confidence: Moments = field(default_factory=Moments)
    calibration: Calibration = field(default_factory=Calibration)

    def add(self, n_classes: int, counts: Counts) -> None:
        """Add what was counted of rows with so many classes."""
        self.n_classes = max(self.n_classes, n_classes)
        self.ranks = self.ranks + counts.found["ranks"]
        for name in MEANS:
            getattr(self, name).merge(counts.moments(name))
        self.calibration.add(counts)

    def merge(self, other: "ClassState") -> None:
        """Add what another has seen."""
        self.n_classes = max(self.n_classes, other.n_classes)
        self.ranks = self.ranks + other.ranks
        for name in MEANS:
            getattr(self, name).merge(getattr(other, name))
        self.calibration.merge(other.calibration)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "n_classes": self.n_classes,
            "ranks": np.trim_zeros(self.ranks, "b").tolist(),
            **{name: getattr(self, name).to_dict() for name in MEANS},
            "calibration": self.calibration.to_dict(),
        }

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same."""
        return isinstance(other, ClassState) and self.to_dict() == other.to_dict()

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "ClassState":
        """Read what `to_dict` wrote."""
        counts, ranks = counts_of(saved["ranks"]), _ranks()
        if counts.size > ranks.size:
            raise ValueError(f"counts of more than {N_RANKS} ranks")
        ranks[: counts.size] = counts
        means = {name: Moments.from_dict(saved[name]) for name in MEANS}
        calibration = Calibration.from_dict(saved["calibration"])
        return cls(whole_number(saved["n_classes"]), ranks, calibration=calibration, **means)

    def counts(self) -> dict[str, int]:
        """Return how many rows each part has seen, which are as many."""
        means = {name: getattr(self, name).count for name in MEANS}
        return {"ranks": int(self.ranks.sum()), "calibration": int(self.calibration.count.sum()), **means}

    @property
    def count(self) -> int:
        """Rows seen."""
        return self.confidence.count

    def compute(self, top_k: Iterable[int]) -> ClassMetrics:
        """Return the figures, with top-k accuracies for each k below the number of classes."""
        up_to = np.cumsum(self.ranks)
        lines: list[TopK] = []
        for k in top_k:
            if k < self.n_classes:  # else it is 1
                share = float(up_to[k] / self.count) if self.count else float("nan")
                error = share_error(share, self.count)
                lines.append({"k": k, "accuracy": share, "accuracy_standard_error": error})
        shares = up_to[1 : min(self.n_classes, N_RANKS) + 1] / self.count if self.count else up_to[:0]
        return ClassMetrics(
            lines,
            shares.tolist(),
            self.reciprocal_rank.mean,
            self.reciprocal_rank.standard_error,
            self.brier.mean,
            self.brier.standard_error,
            self.entropy.mean,
            self.entropy.standard_error,
            self.confidence.mean,
            self.confidence.standard_error,
            *self.calibration.errors(),
            self.calibration.table(),
        )
