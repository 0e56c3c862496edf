"""Padding that counts: a warning where labels repeat at the ends of sequences as padding does.

Averaged over padding, a language model's loss says more of how long its texts are than of the model. What was
padded with a label of its own, or with the label that ends a text, cannot be told from text by one position.
It can by runs of a label: `EndRuns.warnings` has the rule.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.moments import whole_number

Array = npt.NDArray[Any]

# Of a sequence longer than this, so many labels at its end are looked at
MOST_LABELS = 1 << 18
# Equal labels in a row that make a run
LONG = 4
# A run at an end has at least so many positions more than this many times those of the label elsewhere
LEAST, TIMES = 16, 4
# Less than this share of the positions does not spoil the figures
SHARE = 1e-3
# Where runs are more than this share of all else, labels are not those of a text
MAP_SHARE = 0.5

PLACES = ("start", "end", "elsewhere")


class PaddingWarning(UserWarning):
    """Positions that count and look like padding."""


class Runs(NamedTuple):
    """Runs of one label in one place of their sequences: how many, of how many positions, how long."""

    number: int
    positions: int
    shortest: int
    longest: int

    def merged(self, other: "Runs") -> "Runs":
        """Return both together."""
        return Runs(
            self.number + other.number,
            self.positions + other.positions,
            min(self.shortest, other.shortest),
            max(self.longest, other.longest),
        )


@dataclass(slots=True)
class EndRuns:
    """Long runs of equal labels at the start, at the end and within sequences, which the last axis holds.

    Parameters
    ----------
    positions : int
        Positions that count, without sequences in which these are all of one label.
    runs : dict of Runs
        Those of at least 4 positions that count, by label and place.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate.padding import EndRuns
    >>> labels = np.arange(60).reshape(2, 30)
    >>> labels[0, 10:] = labels[1, 22:] = 0
    >>> runs = EndRuns()
    >>> runs.add(labels)
    >>> print(*runs.warnings())
    28 positions that count look like padding: label 0 fills the end of 2 sequences, for 8 to 20 positions \
each; leave them out with --mask, or with --ignore-index 0 if that label is nothing else
    """

    positions: int = 0
    runs: dict[tuple[int, str], Runs] = field(default_factory=dict)

    def add(self, labels: Array, counted: Array | None = None) -> None:
        """Take in whole sequences, and which of their positions count."""
        if labels.shape[-1] <= LONG:
            return
        labels = labels.reshape(-1, labels.shape[-1])[:, -MOST_LABELS:]
        length = labels.shape[1]
        is_same = np.zeros(labels.shape, np.bool_)
        np.equal(labels[:, 1:], labels[:, :-1], out=is_same[:, 1:])
        if counted is not None:
            counted = counted.reshape(-1, counted.shape[-1])[:, -MOST_LABELS:]
            is_same[:, 1:] &= counted[:, 1:] & counted[:, :-1]
        first = np.flatnonzero(~is_same)
        lengths = np.diff(first, append=labels.size)
        is_long = lengths >= LONG
        first, lengths = first[is_long], lengths[is_long]
        n_counted = np.full(len(labels), length) if counted is None else np.count_nonzero(counted, axis=1)
        is_all = lengths == n_counted[first // length]
        self.positions += int(n_counted.sum() - lengths[is_all].sum())
        first, lengths = first[~is_all], lengths[~is_all]
        if first.size:
            start = first % length
            place = np.where(start == 0, 0, np.where(start + lengths == length, 1, 2))
            self._add_runs(labels.ravel()[first].astype(np.int64), place, lengths)

    def _add_runs(self, label: Array, place: Array, lengths: Array) -> None:
        order = np.lexsort((place, label))
        label, place, lengths = label[order], place[order], lengths[order]
        is_first = np.ones(label.size, np.bool_)
        is_first[1:] = (label[1:] != label[:-1]) | (place[1:] != place[:-1])
        at = np.flatnonzero(is_first)
        columns = (
            np.diff(at, append=label.size),
            *(function.reduceat(lengths, at) for function in (np.add, np.minimum, np.maximum)),
        )
        keys = zip(label[at].tolist(), (PLACES[i] for i in place[at]), strict=True)
        for key, numbers in zip(
            keys, zip(*(column.tolist() for column in columns), strict=True), strict=True
        ):
            self._add(key, Runs(*numbers))

    def _add(self, key: tuple[int, str], runs: Runs) -> None:
        self.runs[key] = self.runs[key].merged(runs) if key in self.runs else runs

    def merge(self, other: "EndRuns") -> None:
        """Take in the sequences that `other` has seen."""
        self.positions += other.positions
        for key, runs in other.runs.items():
            self._add(key, runs)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"positions": self.positions, "runs": [[*key, *runs] for key, runs in self.runs.items()]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "EndRuns":
        """Read what `to_dict` wrote."""
        runs = {}
        for label, place, *numbers in saved["runs"]:
            if place not in PLACES:
                raise ValueError(f"runs at the {place!r} of sequences")
            runs[int(label), place] = Runs(*map(whole_number, numbers))
        return cls(whole_number(saved["positions"]), runs)

    def warnings(self) -> list[str]:
        """Return a line for each label whose runs at the start or the end of sequences look like padding.

        They do if all of this holds:

        - They have at least 16 positions more than 4 times those of its runs anywhere else. A text that is
          cut somewhere may end in a run of blanks, say; but then most such runs are not at the end.
        - They differ in length, or there is one. An ending that all sequences share is part of their form.
        - Other runs take at most half of the other positions. Else labels are those of a map, of tags or of
          states, in which neighbours are mostly equal, and a background that reaches the edge is no padding.
        - They are at least a thousandth of the positions. Fewer do not spoil the figures.

        Sequences that count for one label throughout are left out, as are those of a target of one axis,
        unless `shift` says that it is a text: there, classes in order are usual. So what is missed is padding
        to a length that all texts fall short of alike, by less than 4, or on both sides; what is found and is
        none, a label that texts of different length repeat at their end and hardly elsewhere.
        """
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        everywhere = sum(runs.positions for runs in self.runs.values())
        for (label, place), runs in sorted(self.runs.items()):
            if place == "elsewhere":
                continue
            n = runs.positions
            elsewhere = sum(
                self.runs[label, other].positions for other in PLACES if (label, other) in self.runs
            )
            stands_out = n >= LEAST + TIMES * (elsewhere - n)
            differs = runs.number == 1 or runs.shortest < runs.longest
            is_text = everywhere - n <= MAP_SHARE * (self.positions - n)
            if stands_out and differs and is_text and n >= SHARE * self.positions:
                of = "1 sequence" if runs.number == 1 else f"{runs.number:,} sequences"
                lengths = f"{n:,}" if runs.number == 1 else f"{runs.shortest:,} to {runs.longest:,}"
                each = "" if runs.number == 1 else " each"
                yield (
                    f"{n:,} positions that count look like padding: label {label} fills the {place} of {of}, "
                    f"for {lengths} positions{each}; leave them out with --mask, or with "
                    f"--ignore-index {label} if that label is nothing else"
                )
