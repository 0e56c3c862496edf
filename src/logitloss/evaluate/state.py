"""What an evaluation has seen so far: `update` with batches, `merge` other states, `compute` the figures.

Counts are exact and sums compensated, so that how the rows were cut into batches, ordered or shared among
states does not show in the figures beyond float64 rounding. Rows whose loss is infinite are counted apart:
the sums stay those of the finite ones. Where rows have groups, each group has a state of its own beside.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.binary import BinaryState
from logitloss.evaluate.errors import DtypeError, ShapeError
from logitloss.evaluate.metrics import Loss, Metrics
from logitloss.evaluate.moments import Moments, whole_number
from logitloss.evaluate.rows import Rows, rows_of

# Of `to_dict`
VERSION = 1
Group = int | bool | str


@dataclass(slots=True)
class EvaluationState:
    """Sums over the rows seen so far.

    Parameters
    ----------
    loss : {"ce", "bce"}
        Softmax cross-entropy with class labels, or binary cross-entropy with a label in [0, 1] a logit.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import EvaluationState
    >>> state, other = EvaluationState(), EvaluationState()
    >>> state.update(np.array([[2.0, 0.0], [0.0, 1.0]]), [0, 0])
    >>> other.update(np.array([[3.0, 0.0]]), [-100])
    >>> state.merge(other)
    >>> metrics = state.compute()
    >>> metrics.count, metrics.ignored, metrics.accuracy, round(metrics.nll_nats, 4)
    (2, 1, 0.5, 0.7201)
    """

    loss: Loss = "ce"
    correct: int = 0
    ignored: int = 0
    infinite: int = 0
    finite: Moments = field(default_factory=Moments)
    binary: BinaryState = field(default_factory=BinaryState)
    groups: "dict[Group, EvaluationState]" = field(default_factory=dict)

    def update(
        self,
        logits: npt.ArrayLike,
        target: npt.ArrayLike,
        *,
        groups: npt.ArrayLike | None = None,
        ignore_index: int = -100,
        axis: int | None = None,
        num_threads: int | None = None,
        backend: str | None = None,
    ) -> None:
        """Take in one batch; one that raises leaves the state as it was.

        Parameters
        ----------
        logits : array_like of float16, bfloat16, float32 or float64
            Classes on `axis`; for "bce", a logit a label.
        target : array_like of int, shape of the rows
            Class labels; for "bce", labels in [0, 1] of the logits' shape and any real type.
        groups : array_like of int, bool or str, shape of the target, optional
            Keys: a row counts in the state of its key, in `groups`, too.
        ignore_index : int
            Rows with this label do not count.
        axis : int, optional
            Where the classes are: 1 by default, or 0 for one row. Not for "bce".
        num_threads : int, optional
            As in `logitloss.cross_entropy`.
        backend : str, optional
            As in `logitloss.cross_entropy`.

        Raises
        ------
        ShapeError, DtypeError
            A ValueError and a TypeError: groups of another shape, or of no such keys.
        LabelError
            An IndexError: a label outside the classes, or outside [0, 1].
        LogitError
            A ValueError: a row that counts holds NaN or +inf, or nothing but -inf (for "bce": holds NaN).
        """
        target = np.asarray(target)
        keys = None if groups is None else checked_groups(np.asarray(groups), target.shape)
        options = {"ignore_index": ignore_index, "num_threads": num_threads, "backend": backend}
        self.add(rows_of(np.asarray(logits), target, self.loss, axis, **options), keys)

    def add(self, rows: Rows, groups: npt.NDArray[Any] | None = None) -> None:
        """Take in rows whose losses are known, as from `VocabularyShards`; `groups` are their keys."""
        losses = rows.of_counted(rows.loss).astype(np.float64, copy=False)
        finite = losses
        if losses.size and losses.max() == np.inf:
            finite = losses[losses != np.inf]
        self.finite.merge(Moments.of(finite))
        self.infinite += losses.size - finite.size
        self.correct += int(np.count_nonzero(rows.hit))
        self.ignored += rows.ignored
        if rows.logit is not None and rows.label is not None:
            labels = rows.of_counted(rows.label).astype(np.float64, copy=False)
            self.binary.add(rows.of_counted(rows.logit), labels)
        if groups is not None:
            names, number = np.unique(groups, return_inverse=True)
            order = np.argsort(number, kind="stable", axis=None)
            ends = np.cumsum(np.bincount(number.ravel(), minlength=names.size))
            for name, members in zip(names.tolist(), np.split(order, ends[:-1]), strict=True):
                self.groups.setdefault(name, self.empty()).add(rows.chosen(members))

    def merge(self, other: "EvaluationState") -> None:
        """Take in what `other` has seen."""
        if self.loss != other.loss:
            raise ValueError(f"other holds {other.loss!r} losses, this state holds {self.loss!r}")
        self.finite.merge(other.finite)
        self.infinite += other.infinite
        self.correct += other.correct
        self.ignored += other.ignored
        self.binary.merge(other.binary)
        for key, group in other.groups.items():
            self.groups.setdefault(key, self.empty()).merge(group)

    def empty(self) -> "EvaluationState":
        """Return a state of the same kind that has seen nothing, to which others may be merged."""
        return EvaluationState(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON holds, to the last bit: to be kept, or sent to who merges."""
        return {
            "version": VERSION,
            "loss": self.loss,
            "correct": self.correct,
            "ignored": self.ignored,
            "infinite": self.infinite,
            "finite": self.finite.to_dict(),
            "binary": self.binary.to_dict() if self.loss == "bce" else None,
            "groups": [[key, group.to_dict()] for key, group in self.groups.items()],
        }

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "EvaluationState":
        """Return the state that `to_dict` wrote.

        Raises
        ------
        ValueError
            It is of another version, or no state.
        """
        try:
            if saved["version"] != VERSION:
                raise ValueError(f"version {saved['version']!r}, expected {VERSION}")
            if saved["loss"] not in ("ce", "bce"):
                raise ValueError(f"loss {saved['loss']!r}, expected 'ce' or 'bce'")
            counts = {name: whole_number(saved[name]) for name in ("correct", "ignored", "infinite")}
            groups = {key: cls.from_dict(group) for key, group in saved["groups"]}
            finite = Moments.from_dict(saved["finite"])
            is_binary = saved["loss"] == "bce"
            binary = BinaryState.from_dict(saved["binary"]) if is_binary else BinaryState()
            return cls(loss=saved["loss"], finite=finite, binary=binary, groups=groups, **counts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of an evaluation: {type(error).__name__} {error}") from None

    @property
    def count(self) -> int:
        """Rows that counted."""
        return self.finite.count + self.infinite

    def compute(self, *, n_bytes: int | None = None, n_words: int | None = None) -> Metrics:
        """Return the figures of everything seen so far; NaN where nothing counted.

        Parameters
        ----------
        n_bytes, n_words : int, optional
            How many bytes and words the text has whose tokens counted.
        """
        return Metrics(
            loss=self.loss,
            count=self.count,
            ignored=self.ignored,
            infinite=self.infinite,
            nll_nats=math.inf if self.infinite else self.finite.mean,
            nll_nats_standard_error=math.nan if self.infinite else self.finite.standard_error,
            accuracy=self.correct / self.count if self.count else math.nan,
            binary=self.binary.compute() if self.loss == "bce" else None,
            n_bytes=n_bytes,
            n_words=n_words,
        )


def checked_groups(groups: npt.NDArray[Any], rows: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return keys of groups if there is one for each row."""
    if groups.dtype.kind not in "iubU":
        raise DtypeError("groups", f"of type {groups.dtype}, expected integers, bool or str")
    if groups.shape != rows:
        raise ShapeError("groups", f"of shape {groups.shape}, but the target has {rows}")
    return groups
