"""What is kept of binary labels beside their loss: squared errors, calibration, and how logits rank them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.activations import sigmoid
from logitloss.evaluate.calibration import Calibration
from logitloss.evaluate.metrics import BinaryMetrics
from logitloss.evaluate.moments import Moments
from logitloss.evaluate.ranking import Ranking

Float64 = npt.NDArray[np.float64]


@dataclass(slots=True)
class BinaryState:
    """Sums over logits and their labels in [0, 1]."""

    squares: Moments = field(default_factory=Moments)
    calibration: Calibration = field(default_factory=Calibration)
    ranking: Ranking = field(default_factory=Ranking)

    def add(self, logits: npt.NDArray[Any], labels: Float64) -> None:
        """Add logits and labels that count."""
        p = np.asarray(sigmoid(logits)).astype(np.float64, copy=False)
        self.squares.merge(Moments.of((p - labels) ** 2))
        self.calibration.add(p, labels)
        self.ranking.add(logits, labels > 0.5)

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
