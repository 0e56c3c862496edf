"""What an evaluation has seen so far: `update` with batches, `merge` other states, `compute` the figures.

Counts are exact and sums compensated, so that how the rows were cut into batches, ordered or shared among
states does not show in the figures beyond float64 rounding. Rows whose loss is infinite are counted apart:
the sums stay those of the finite ones.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.metrics import Loss, Metrics
from logitloss.evaluate.moments import Moments, whole_number
from logitloss.evaluate.rows import binary_rows, cross_entropy_rows

# Of `to_dict`
VERSION = 1


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

    def update(
        self,
        logits: npt.ArrayLike,
        target: npt.ArrayLike,
        *,
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
        LabelError
            An IndexError: a label outside the classes, or outside [0, 1].
        LogitError
            A ValueError: a row that counts holds NaN or +inf, or nothing but -inf (for "bce": holds NaN).
        """
        logits, target = np.asarray(logits), np.asarray(target)
        if self.loss == "ce":
            rows = cross_entropy_rows(
                logits,
                target,
                ignore_index=ignore_index,
                axis=axis,
                num_threads=num_threads,
                backend=backend,
            )
        else:
            rows = binary_rows(
                logits, target, ignore_index=ignore_index, num_threads=num_threads, backend=backend
            )
        finite = rows.loss
        if finite.size and finite.max() == np.inf:
            finite = finite[finite != np.inf]
        self.finite.merge(Moments.of(finite))
        self.infinite += rows.loss.size - finite.size
        self.correct += rows.correct
        self.ignored += rows.ignored

    def merge(self, other: "EvaluationState") -> None:
        """Take in what `other` has seen."""
        if self.loss != other.loss:
            raise ValueError(f"other holds {other.loss!r} losses, this state holds {self.loss!r}")
        self.finite.merge(other.finite)
        self.infinite += other.infinite
        self.correct += other.correct
        self.ignored += other.ignored

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
            return cls(loss=saved["loss"], finite=Moments.from_dict(saved["finite"]), **counts)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a state of an evaluation: {type(error).__name__} {error}") from None

    @property
    def count(self) -> int:
        """Rows that counted."""
        return self.finite.count + self.infinite

    def compute(self) -> Metrics:
        """Figures of everything seen so far; NaN where nothing counted."""
        return Metrics(
            loss=self.loss,
            count=self.count,
            ignored=self.ignored,
            infinite=self.infinite,
            nll_nats=math.inf if self.infinite else self.finite.mean,
            nll_nats_standard_error=math.nan if self.infinite else self.finite.standard_error,
            accuracy=self.correct / self.count if self.count else math.nan,
        )
