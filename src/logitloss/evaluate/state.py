"""What an evaluation has seen so far: `update` with batches, `merge` other states, `compute` the figures.

Counts are exact and sums compensated, so that how the rows were cut into batches, ordered or shared among
states does not show in the figures beyond float64 rounding. Rows whose loss is infinite are counted apart:
the sum stays that of the finite ones. Where rows have groups, each group has a state of its own beside. What
is kept beside the loss is in `classes.py` and `labels.py` for classes, in `binary.py` for binary labels.
Which rows do not count, and why, is in `positions.py`.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss import _check
from logitloss.evaluate.binary import BinaryState
from logitloss.evaluate.classes import TOP_K, ClassState
from logitloss.evaluate.counts import N_RANKS
from logitloss.evaluate.errors import DtypeError, ShapeError
from logitloss.evaluate.histogram import LossHistogram
from logitloss.evaluate.labels import LabelState
from logitloss.evaluate.metrics import Loss, Metrics
from logitloss.evaluate.moments import Moments, whole_number
from logitloss.evaluate.padding import EndRuns
from logitloss.evaluate.positions import check_mask, counting
from logitloss.evaluate.rows import Rows, first_index, rows_of
from logitloss.evaluate.stores.stored import StoredArray

# Of `to_dict`
VERSION = 3
# That do not add up to others
COUNTS = ("correct", "ignored", "masked", "shifted", "infinite")
Group = int | bool | str


@dataclass(slots=True)
class EvaluationState:
    """Sums over the rows seen so far.

    Parameters
    ----------
    loss : {"ce", "bce"}
        Softmax cross-entropy with class labels, or binary cross-entropy with a label in [0, 1] a logit.
    per_class : bool
        Keep figures of each class, too; of the whole, not in groups.

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
    >>> round(metrics.classes.brier, 4), round(metrics.classes.expected_calibration_error, 4)
    (0.5487, 0.4251)
    """

    loss: Loss = "ce"
    per_class: bool = False
    correct: int = 0
    ignored: int = 0
    masked: int = 0
    shifted: int = 0
    infinite: int = 0
    finite: Moments = field(default_factory=Moments)
    histogram: LossHistogram = field(default_factory=LossHistogram)
    classes: ClassState = field(default_factory=ClassState)
    labels: LabelState = field(default_factory=LabelState)
    binary: BinaryState = field(default_factory=BinaryState)
    end_runs: EndRuns = field(default_factory=EndRuns)
    groups: "dict[Group, EvaluationState]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.loss not in ("ce", "bce"):
            raise ShapeError("loss", f"is {self.loss!r}, expected 'ce' or 'bce'")
        if self.per_class and self.loss != "ce":
            raise ShapeError("per_class", f"is for classes, not for loss {self.loss!r}")

    def update(
        self,
        logits: npt.ArrayLike,
        target: npt.ArrayLike,
        *,
        groups: npt.ArrayLike | None = None,
        mask: npt.ArrayLike | None = None,
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
        mask : array_like of bool, or of 0 and 1, shape of the target, optional
            Rows where it is 0 do not count, whatever their label.
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
            A ValueError and a TypeError: groups or a mask of another shape or type; for "bce" an axis.
        MaskError
            A ValueError: the mask holds another number.
        LabelError
            An IndexError: a label outside the classes, or outside [0, 1].
        LogitError
            A ValueError: a row that counts holds NaN or +inf, or nothing but -inf (for "bce": holds NaN).
        """
        x, target = _check.placed("logits", logits, _check.HOST), _check.placed("target", target, _check.HOST)
        keys = None if groups is None else _check.placed("groups", groups, _check.HOST)
        if keys is not None:
            check_groups(keys, target.shape)
        kept = None if mask is None else _check.placed("mask", mask, _check.HOST)
        if kept is not None:
            check_mask(kept, target.shape)
        options = {"ignore_index": ignore_index, "num_threads": num_threads, "backend": backend}
        self.add(rows_of(x, target, self.loss, axis, kept, **options), keys)
        if self.loss == "ce" and target.ndim > 1:
            self.end_runs.add(target, counting(target, kept, ignore_index))

    def add(self, rows: Rows, groups: npt.NDArray[Any] | None = None) -> None:
        """Take in rows whose losses are known, as from `VocabularyShards`; `groups` are their keys.

        What raises leaves the state as it was.

        Raises
        ------
        ShapeError, DtypeError
            A ValueError and a TypeError: rows of the other loss, or without figures that are asked for; keys
            of another number or type.
        """
        if self.per_class and rows.figures is None:
            raise ShapeError(
                "per_class", "needs rows with figures, for which VocabularyShards need the target's logits"
            )
        if (rows.logit is not None) != (self.loss == "bce"):
            what = "binary labels" if rows.logit is not None else "classes"
            raise ShapeError("rows", f"of {what}, but this state holds {self.loss!r} losses")
        if groups is not None:
            n_rows = rows.loss.size  # of rows whose axes are not known here
            check_groups(groups, groups.shape if groups.size == n_rows else (n_rows,))
            check_characters(groups)
            if n_rows:
                self._check_keys(groups.flat[0].item(), "groups")
        counts = rows.find_counts()
        finite = counts.moments("loss")
        n_counted = int(counts.found["counted"])
        self.finite.merge(finite)
        self.histogram.add(counts)
        self.infinite += n_counted - finite.count
        self.correct += int(counts.found["correct"])
        self.ignored += rows.loss.size - n_counted - rows.masked
        self.masked += rows.masked
        if rows.figures is not None:
            self.classes.add(rows.n_classes, counts)
            if self.per_class:
                self.labels.add(rows)
        if rows.logit is not None:
            self.binary.add(counts)
        if groups is not None and groups.size:
            names, number = np.unique(groups, return_inverse=True)
            order = np.argsort(number, kind="stable", axis=None)
            ends = np.cumsum(np.bincount(number.ravel(), minlength=names.size))
            for name, members in zip(names.tolist(), np.split(order, ends[:-1]), strict=True):
                self.groups.setdefault(name, EvaluationState(self.loss)).add(rows.chosen(members))

    def add_classes(self, n_classes: int) -> None:
        """Take in that there are so many classes, whether a row has come or not."""
        self.classes.n_classes = max(self.classes.n_classes, n_classes)
        if self.per_class:
            self.labels.grow(n_classes)

    def merge(self, other: "EvaluationState") -> None:
        """Take in what `other` has seen."""
        if self.loss != other.loss:
            raise ValueError(f"other holds {other.loss!r} losses, this state holds {self.loss!r}")
        if self.per_class != other.per_class:
            raise ValueError("one of the states has figures of each class, the other has not")
        for key in other.groups:
            self._check_keys(key, "other's groups")
        self.finite.merge(other.finite)
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.histogram.merge(other.histogram)
        self.classes.merge(other.classes)
        self.labels.merge(other.labels)
        self.binary.merge(other.binary)
        self.end_runs.merge(other.end_runs)
        for key, group in other.groups.items():
            self.groups.setdefault(key, EvaluationState(self.loss)).merge(group)

    def _check_keys(self, key: Group, name: str) -> None:
        """Refuse a key of another type than those before: True would be 1."""
        before = next(iter(self.groups), key)
        if type(before) is not type(key):
            raise DtypeError(
                name, f"of type {type(key).__name__}, but keys before are of {type(before).__name__}"
            )

    def empty(self) -> "EvaluationState":
        """Return a state of the same kind that has seen nothing, to which others may be merged."""
        return EvaluationState(self.loss, self.per_class)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON holds, to the last bit: to be kept, or sent to who merges."""
        return {
            "version": VERSION,
            "loss": self.loss,
            **{name: getattr(self, name) for name in COUNTS},
            "finite": self.finite.to_dict(),
            "histogram": self.histogram.to_list(),
            "classes": self.classes.to_dict() if self.loss == "ce" else None,
            "labels": self.labels.to_dict() if self.per_class else None,
            "binary": self.binary.to_dict() if self.loss == "bce" else None,
            "end_runs": self.end_runs.to_dict(),
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
            counts = {name: whole_number(saved[name]) for name in COUNTS}
            groups = {key: cls.from_dict(group) for key, group in saved["groups"]}
            types = {type(key) for key in groups}
            if len(groups) < len(saved["groups"]) or len(types) > 1 or not types <= {int, bool, str}:
                raise ValueError("groups whose keys are not all int, bool or str, or not each there once")
            if any(one.loss != saved["loss"] or one.per_class or one.groups for one in groups.values()):
                raise ValueError("groups that are no plain states of the same loss")
            end_runs = EndRuns.from_dict(saved["end_runs"])
            finite = Moments.from_dict(saved["finite"])
            histogram = LossHistogram.from_list(saved["histogram"])
            classes, labels, binary = ClassState(), LabelState(), BinaryState()
            if saved["loss"] == "bce":
                binary = BinaryState.from_dict(saved["binary"])
            else:
                classes = ClassState.from_dict(saved["classes"])
            per_class = saved["labels"] is not None
            if per_class:
                labels = LabelState.from_dict(saved["labels"])
            state = cls(
                loss=saved["loss"],
                per_class=per_class,
                finite=finite,
                histogram=histogram,
                classes=classes,
                labels=labels,
                binary=binary,
                end_runs=end_runs,
                groups=groups,
                **counts,
            )
            state._check_counts()
            return state
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"not a state of an evaluation: {type(error).__name__} {error}") from None

    def _check_counts(self) -> None:
        """Refuse counts that no rows have."""
        everything = {"histogram": int(self.histogram.count.sum())}
        some = {"correct": self.correct, "groups": sum(group.count for group in self.groups.values())}
        figures: dict[str, int] = {}  # which rows of `VocabularyShards` may lack
        if self.loss == "bce":
            everything |= self.binary.counts()
        else:
            figures = self.classes.counts()
        if self.per_class:
            everything |= self.labels.counts()
        is_same = {*everything.values()} == {self.count} and len({*figures.values()}) <= 1
        if not is_same or max(*some.values(), *figures.values()) > self.count:
            found = everything | some | figures
            raise ValueError(f"counts of {self.count} rows do not add up: {found}")

    @property
    def count(self) -> int:
        """Rows that counted."""
        return self.finite.count + self.infinite

    @property
    def n_rows(self) -> int:
        """Rows seen: all positions but those shifted, of which there are none."""
        return self.count + self.ignored + self.masked

    def compute(
        self, *, n_bytes: int | None = None, n_words: int | None = None, top_k: Iterable[int] = TOP_K
    ) -> Metrics:
        """Return the figures of everything seen so far; NaN where nothing counted.

        Parameters
        ----------
        n_bytes, n_words : int, optional
            How many bytes and words the text has whose tokens counted.
        top_k : iterable of int
            For which k to tell top-k accuracy, from 1 to 100; those below the number of classes are told.
        """
        if n_bytes is not None:
            n_bytes = _check.integer("n_bytes", n_bytes, least=1)
        if n_words is not None:
            n_words = _check.integer("n_words", n_words, least=1)
        if not isinstance(top_k, Iterable):
            raise TypeError(f"top_k is {top_k!r}: expected numbers from 1 to {N_RANKS}")
        top_k = list(dict.fromkeys(_check.integer("top_k", k, least=1, most=N_RANKS) for k in top_k))
        has_figures = self.loss == "ce" and self.classes.count == self.count
        return Metrics(
            loss=self.loss,
            count=self.count,
            ignored=self.ignored,
            masked=self.masked,
            shifted=self.shifted,
            infinite=self.infinite,
            nll_nats=math.inf if self.infinite else self.finite.mean,
            nll_nats_standard_error=math.nan if self.infinite else self.finite.standard_error,
            nll_histogram=self.histogram.table(),
            accuracy=self.correct / self.count if self.count else math.nan,
            classes=self.classes.compute(top_k) if has_figures else None,
            per_class=self.labels.compute() if self.per_class else None,
            confusions=self.labels.most_confused() if self.per_class else None,
            binary=self.binary.compute() if self.loss == "bce" else None,
            n_bytes=n_bytes,
            n_words=n_words,
            warnings=tuple(self.end_runs.warnings()),
        )


def check_groups(groups: npt.NDArray[Any] | StoredArray, rows: tuple[int, ...]) -> None:
    """Refuse keys of groups if there is not one for each row."""
    if groups.dtype.kind not in "iubU":
        raise DtypeError("groups", f"of type {groups.dtype}, expected integers, bool or str")
    if groups.shape != rows:
        raise ShapeError("groups", f"of shape {groups.shape}, but the target has {rows}")


def check_characters(groups: npt.NDArray[Any]) -> None:
    """Refuse texts with what is no character, as of a damaged file: Python has no such text."""
    if groups.dtype.kind != "U" or not groups.itemsize or not groups.size:
        return
    native = np.ascontiguousarray(groups.astype(groups.dtype.newbyteorder("="), copy=False))
    codes = native.reshape(-1, 1).view(np.uint32).reshape(*groups.shape, -1)
    if codes.max() > sys.maxunicode:
        index = first_index(np.max(codes, axis=-1) > sys.maxunicode)
        raise DtypeError("groups", "holds what is no text: a code beyond the last character's", index)
