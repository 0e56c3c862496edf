"""Class weights, smoothing and reductions as the numbers per class and per row that the kernels take.

With smoothing eps and class weights w, a label y costs (1 - eps)*w[y] at its own class and eps/C*w[c] at each
class: beta and gamma of the kernel contract. A row's gradient is multiplied by its scale, the upstream
gradient over what the mean divides by.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from logitloss._check import Float64


def per_class(weight: Float64 | None, label_smoothing: float, n_classes: int) -> tuple[Float64, Float64]:
    """Return beta and gamma."""
    weight = np.ones(n_classes) if weight is None else weight
    return (1.0 - label_smoothing) * weight, (label_smoothing / n_classes) * weight


def divided(total: float, divisor: float) -> float:
    """Divide as IEEE does: the mean of nothing is NaN."""
    if divisor:
        return total / divisor
    return math.nan if total == 0 or math.isnan(total) else math.copysign(math.inf, total)
