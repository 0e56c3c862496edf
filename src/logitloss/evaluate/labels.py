"""What becomes of each class: how often it is the label, how often predicted and right, and what it costs.

Arrays as long as there are classes, which is why they are kept only where asked for; and of up to
`MOST_CONFUSED` classes a square one, of which class is taken for which. States of fewer classes merge as if
the others had not come up.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss._kernels import FIGURES
from logitloss.evaluate.metrics import ClassLine, Confusion
from logitloss.evaluate.moments import PLAIN, Sums, counts_of
from logitloss.evaluate.rows import Rows

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
COUNTS = ("count", "correct", "predicted")
TOP = FIGURES.index("top")
# Classes of which pairs are counted, in 8 MiB
MOST_CONFUSED = 1024
# Pairs that are told, of those that came up most
CONFUSIONS = 100


def _none() -> Int64:
    return np.zeros(0, np.int64)


@dataclass(slots=True, eq=False)
class LabelState:
    """Of each class: rows with that label, hits among them, predictions of it, and the rows' losses.

    `confusions[label, predicted]` counts misses; of more than `MOST_CONFUSED` classes it is empty.
    """

    count: Int64 = field(default_factory=_none)
    correct: Int64 = field(default_factory=_none)
    predicted: Int64 = field(default_factory=_none)
    losses: Sums = field(default_factory=lambda: Sums.zeros(0))
    confusions: Int64 = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def add(self, rows: Rows) -> None:
        """Add those of some rows that count."""
        self.grow(rows.n_classes)
        n_classes = self.count.size
        for part in rows.counted_parts(PLAIN):
            assert part.label is not None
            assert part.figures is not None
            label, top = part.label.astype(np.intp), part.figures[:, TOP].astype(np.intp)
            self.count += np.bincount(label, minlength=n_classes)
            self.correct += np.bincount(label, part.hit, n_classes).astype(np.int64)
            self.predicted += np.bincount(top, minlength=n_classes)
            losses: Any = np.bincount(label, part.loss, n_classes)
            self._add_losses(Sums(losses, np.zeros(n_classes)))
            if self.confusions.size:
                pairs = (label * n_classes + top)[~part.hit]
                np.add.at(self.confusions.ravel(), pairs, 1)  # the array itself, which is contiguous

    def _add_losses(self, losses: Sums) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # infinite ones stay what they are
            self.losses.merge(losses)

    def grow(self, n_classes: int) -> None:
        """Have so many classes, or more."""
        missing = n_classes - self.count.size
        if missing > 0:
            for name in COUNTS:
                setattr(self, name, np.pad(getattr(self, name), (0, missing)))
            self.losses = Sums(*(np.pad(part, (0, missing)) for part in (self.losses.high, self.losses.low)))
            before, size = self.confusions, n_classes if n_classes <= MOST_CONFUSED else 0
            self.confusions = np.zeros((size, size), np.int64)
            if size:
                self.confusions[: len(before), : len(before)] = before

    def merge(self, other: "LabelState") -> None:
        """Add what another has seen."""
        self.grow(other.count.size)
        seen = slice(0, other.count.size)
        for name in COUNTS:
            getattr(self, name)[seen] += getattr(other, name)
        theirs = Sums.zeros(self.count.size)
        theirs.high[seen], theirs.low[seen] = other.losses.high, other.losses.low
        self._add_losses(theirs)
        if self.confusions.size:
            self.confusions[seen, seen] += other.confusions

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        counts = {name: getattr(self, name).tolist() for name in COUNTS}
        pairs = np.flatnonzero(self.confusions)
        confusions = [pairs.tolist(), self.confusions.ravel()[pairs].tolist()]
        return counts | {"losses": self.losses.to_list(), "confusions": confusions}

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same."""
        return isinstance(other, LabelState) and self.to_dict() == other.to_dict()

    def counts(self) -> dict[str, int]:
        """Return how many rows each part has seen, which are as many."""
        counts = {"labels": int(self.count.sum()), "predicted": int(self.predicted.sum())}
        if self.confusions.size:
            counts["confused"] = int(self.correct.sum() + self.confusions.sum())
        return counts

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "LabelState":
        """Read what `to_dict` wrote."""
        count, correct, predicted = (counts_of(saved[name]) for name in COUNTS)
        losses = Sums.from_list(saved["losses"])
        if len({array.shape for array in (count, correct, predicted, losses.high, losses.low)}) != 1:
            raise ValueError("counts and losses of classes that are not as many")
        state = cls()
        state.grow(count.size)
        state.count, state.correct, state.predicted, state.losses = count, correct, predicted, losses
        pairs, counts = map(counts_of, saved["confusions"])
        if pairs.shape != counts.shape:
            raise ValueError("confusions of pairs and counts that are not as many")
        if (pairs >= state.confusions.size).any():
            raise ValueError("confusions of classes that there are not")
        state.confusions.ravel()[pairs] = counts
        return state

    def compute(self) -> list[ClassLine]:
        """Return a line for each class; NaN for what has no rows."""
        with np.errstate(invalid="ignore"):
            means = self.losses.values / self.count
            recalls = self.correct / self.count
        columns = (self.count, self.predicted, means, recalls)
        lines = zip(*(column.tolist() for column in columns), strict=True)
        return [
            {"class": number, "count": count, "predicted": predicted, "nll_nats": nll, "accuracy": recall}
            for number, (count, predicted, nll, recall) in enumerate(lines)
        ]

    def most_confused(self) -> list[Confusion] | None:
        """Return the pairs that came up most, of equals the lowest labels first; None if not kept."""
        n_classes = self.count.size
        if n_classes > MOST_CONFUSED:
            return None
        counts = self.confusions.ravel()
        pairs = np.flatnonzero(counts)
        pairs = pairs[np.argsort(-counts[pairs], kind="stable")[:CONFUSIONS]]
        return [
            {"label": pair // n_classes, "predicted": pair % n_classes, "count": count}
            for pair, count in zip(pairs.tolist(), counts[pairs].tolist(), strict=True)
        ]
