"""Rows counted: how many fall into each bin, and sums over them, in one pass over their figures.

Whichever backend found the figures, they are counted by the C extension (`c/counts.h`), whose `row_counts` is
laid out as `LAYOUT` here. The states of an evaluation take these counts in, and know nothing of rows.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from logitloss import _backends
from logitloss._kernels import FIGURES
from logitloss._threads import threads_for
from logitloss.evaluate.errors import ShapeError
from logitloss.evaluate.moments import Compensated, Moments

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

# Ranks counted one by one, from 1 on; beside them those above, and 0, which there is not
N_RANKS = 100
# Parts of [0, 1] for probabilities
N_PROBABILITIES = 15
# Of losses, see `histogram`
N_LOSSES = 122
# Of logits of each kind of label, see `ranking`
N_LOGITS = 1 << 16
# To count a row is worth so many logits of a forward pass
LOGITS_A_ROW = 8

_SUM = ("<f8", 2)  # and what rounding took
_MOMENTS = np.dtype([("n", "<i8"), ("total", *_SUM), ("deviations", *_SUM)])
MOMENTS = ("loss", "brier", "reciprocal_rank", "confidence", "entropy")
LAYOUT = np.dtype(
    [
        ("counted", "<i8"),
        ("correct", "<i8"),
        ("bad", "<i8"),
        ("ranks", "<i8", N_RANKS + 2),
        ("losses", "<i8", N_LOSSES),
        ("bins", "<i8", N_PROBABILITIES),
        ("probability", "<f8", (N_PROBABILITIES, 2)),
        ("outcome", "<f8", (N_PROBABILITIES, 2)),
        ("moments", _MOMENTS, len(MOMENTS)),
    ]
)


class Counts(NamedTuple):
    """What rows come to.

    Attributes
    ----------
    found : record of LAYOUT
        Rows that count, hits among them, and labels outside [0, 1]; rows in the bins of ranks, losses and
        probabilities, of these also the sums of probabilities and of outcomes.
    logits : int64 array (2, N_LOGITS) or None
        Of binary labels, negative and positive: logits in the bins of `ranking`.
    """

    found: Any
    logits: Int64 | None

    @property
    def has_nan(self) -> bool:
        """Whether the loss of a row that counts is NaN."""
        return bool(np.isnan(self.found["moments"]["total"][MOMENTS.index("loss"), 0]))

    def moments(self, name: str) -> Moments:
        """Return one of MOMENTS; of the losses, those that are finite."""
        of_one = self.found["moments"][MOMENTS.index(name)]
        sums = (Compensated(*of_one[part].tolist()) for part in ("total", "deviations"))
        return Moments(int(of_one["n"]), *sums)


def count_rows(
    loss: Array,
    counted: Array | None = None,
    *,
    figures: Float64 | None = None,
    logits: Array | None = None,
    target: Array | None = None,
    ignored: int | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Counts:
    """Count rows, or binary labels.

    Parameters
    ----------
    loss : float32 or float64 array
        Nats.
    counted : bool array of the loss's shape, optional
        Which rows count. All by default, but those that are ignored.
    figures : float64 array of that shape and FIGURES, optional
        Of classes, as kernels tell them; of an ignored row they are 0.
    logits, target : arrays of the loss's shape, optional
        Of binary labels; those equal to `ignored` are.
    num_threads : int, optional
        The result does not depend on it.
    backend : str, optional
        Which C rows are to count; of any other backend, the default ones.

    Raises
    ------
    ShapeError
        A ValueError: one of them has another shape.
    """
    shapes = {"counted": loss.shape, "figures": (*loss.shape, len(FIGURES))}
    shapes |= {"logits": loss.shape, "target": loss.shape}
    for name, array in (("counted", counted), ("figures", figures), ("logits", logits), ("target", target)):
        if array is not None and array.shape != shapes[name]:
            raise ShapeError(name, f"of shape {array.shape}, expected {shapes[name]}")
    found = np.zeros((), LAYOUT)
    counted = None if counted is None else np.ascontiguousarray(counted, np.bool_)
    figures = None if figures is None else np.ascontiguousarray(figures, np.float64)
    ranking = None if logits is None else np.zeros((2, N_LOGITS), np.int64)
    threads = threads_for(LOGITS_A_ROW * loss.size, num_threads)
    _backends.counter(backend).count_rows(
        loss, counted, figures, logits, target, ignored, found, ranking, threads
    )
    return Counts(found, ranking)
