"""How losses are spread: counts in fixed bins, each power of two in four equal parts.

The bins are those of a float64's first bits (its exponent and two bits more), so the bin of a loss is a shift
of its bits, exact on any machine, and counts merge exactly. They reach from 2**-20 to 2**10 nats, and what is
beyond has a bin at either end.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.counts import N_LOSSES, Counts
from logitloss.evaluate.moments import counts_of

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

LEAST, MOST = 2.0**-20, 2.0**10
# Bits of a float64 that do not tell its bin: of the 52 after the exponent, all but two
SHIFT = 50


class LossBin(TypedDict):
    """A bar of the histogram, of losses in nats from `low` on and below `high`."""

    low: float
    high: float
    count: int


class Bar(NamedTuple):
    """A bin as it is drawn over the logarithm of the loss: its area is the share of labels."""

    start: float
    end: float
    height: float
    bin: LossBin


def _place(loss: float) -> int:
    return int(np.float64(loss).view(np.int64)) >> SHIFT


FIRST = _place(LEAST)


def _edges() -> Float64:
    ends = (np.arange(FIRST, FIRST + N_LOSSES - 1) << SHIFT).view(np.float64)
    return np.concatenate([[0.0], ends, [np.inf]])


def _counts() -> Int64:
    return np.zeros(N_LOSSES, np.int64)


@dataclass(slots=True, eq=False)
class LossHistogram:
    """Counts of losses: of those below `LEAST`, in the bins, and from `MOST` on, infinity with them."""

    count: Int64 = field(default_factory=_counts)

    def add(self, counts: Counts) -> None:
        """Add what was counted."""
        self.count = self.count + counts.found["losses"]

    def merge(self, other: "LossHistogram") -> None:
        """Add what another has seen."""
        self.count = self.count + other.count

    def to_list(self) -> list[int]:
        """All of it, for JSON."""
        counts: list[int] = np.trim_zeros(self.count, "b").tolist()
        return counts

    def __eq__(self, other: object) -> bool:
        """Whether all counts are the same."""
        return isinstance(other, LossHistogram) and self.to_list() == other.to_list()

    @classmethod
    def from_list(cls, saved: list[Any]) -> "LossHistogram":
        """Read what `to_list` wrote."""
        counts, count = counts_of(saved), _counts()
        if counts.size > N_LOSSES:
            raise ValueError(f"histogram of more than {N_LOSSES} bins")
        count[: counts.size] = counts
        return cls(count)

    def table(self) -> list[LossBin]:
        """Return the bins that hold something."""
        edges = _edges().tolist()
        return [
            {"low": edges[i], "high": edges[i + 1], "count": int(self.count[i])}
            for i in np.flatnonzero(self.count).tolist()
        ]


def bars(bins: Iterable[LossBin], total: int, *, is_fine: bool = True) -> list[Bar]:
    """Return what to draw of a `table`: heights are shares of the labels, by each doubling of the loss.

    Those at the ends are drawn a doubling wide. Unless `is_fine`, a power of two is one bar.
    """
    merged: dict[float, LossBin] = {}
    for line in bins:
        low, high, count = float(line["low"]), float(line["high"]), line["count"]
        if not is_fine and LEAST <= low < MOST:
            low = 2.0 ** math.floor(math.log2(low))
            high = 2 * low
        count += merged[low]["count"] if low in merged else 0
        merged[low] = {"low": low, "high": high, "count": count}
    found = []
    for line in merged.values():
        start = line["low"] or line["high"] / 2
        end = min(line["high"], 2 * start)
        found.append(Bar(start, end, line["count"] / total / math.log2(end / start), line))
    return found
