"""What is kept of binary labels beside their loss: squared errors, calibration, and how logits rank them."""

from dataclasses import dataclass, field
from typing import Any

from logitloss.evaluate.calibration import Calibration
from logitloss.evaluate.counts import Counts
from logitloss.evaluate.metrics import BinaryMetrics
from logitloss.evaluate.moments import Moments
from logitloss.evaluate.ranking import Ranking


@dataclass(slots=True)
class BinaryState:
    """Sums over logits and their labels in [0, 1]."""

    squares: Moments = field(default_factory=Moments)
    calibration: Calibration = field(default_factory=Calibration)
    ranking: Ranking = field(default_factory=Ranking)

    def add(self, counts: Counts) -> None:
        """Add what was counted."""
        self.squares.merge(counts.moments("brier"))
        self.calibration.add(counts)
        self.ranking.add(counts)

    def merge(self, other: "BinaryState") -> None:
        """Add what another has seen."""
        self.squares.merge(other.squares)
        self.calibration.merge(other.calibration)
        self.ranking.merge(other.ranking)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "squares": self.squares.to_dict(),
            "calibration": self.calibration.to_dict(),
            "ranking": self.ranking.to_dict(),
        }

    def counts(self) -> dict[str, int]:
        """Return how many labels each part has seen, which are as many."""
        ranked = self.ranking.negative.sum() + self.ranking.positive.sum()
        bins = self.calibration.count.sum()
        return {"squares": self.squares.count, "calibration": int(bins), "ranking": int(ranked)}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "BinaryState":
        """Read what `to_dict` wrote."""
        return cls(
            Moments.from_dict(saved["squares"]),
            Calibration.from_dict(saved["calibration"]),
            Ranking.from_dict(saved["ranking"]),
        )

    def compute(self) -> BinaryMetrics:
        """Return the figures."""
        return BinaryMetrics(
            self.squares.mean,
            self.squares.standard_error,
            *self.calibration.errors(),
            self.calibration.table(),
            *self.ranking.roc_auc(),
            *self.ranking.average_precision(),
        )
