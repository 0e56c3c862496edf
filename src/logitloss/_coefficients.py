"""Class weights, smoothing and reductions as the numbers per class and per row that the kernels take.

With smoothing eps and class weights w, a label y costs (1 - eps)*w[y] at its own class and eps/C*w[c] at each
class: beta and gamma of the kernel contract. A row's gradient is multiplied by its scale, the upstream
gradient over what the mean divides by.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from logitloss._check import Array, Float64

# A kernel's factor is down to 2**-80 of the scale, of float64 to 2**-860. By the gradient's dtype: under
# which scale that may be no normal number, and what lifts such scales. All float16 has for them is 0.
NARROW, WIDE = (2.0**-40, 2.0**64), (2.0**-150, 2.0**700)
LEAST_SCALES = {"float32": NARROW, "bfloat16": NARROW, "float64": WIDE, "float16": (0.0, 1.0)}


def per_class(weight: Float64 | None, label_smoothing: float, n_classes: int) -> tuple[Float64, Float64]:
    """Return beta and gamma."""
    weight = np.ones(n_classes) if weight is None else weight
    return (1.0 - label_smoothing) * weight, (label_smoothing / n_classes) * weight


def lifted(scale: Array | float, dtype: np.dtype[Any]) -> tuple[Array | float, Array | float | None]:
    """Return scales that keep a gradient's digits, and what multiplies the result then, if anything must.

    They are a power of two apart.
    """
    if isinstance(scale, float) and not 0 < abs(scale) < NARROW[0]:
        return scale, None  # as it is mostly; a dtype's name takes a microsecond
    least, lift = LEAST_SCALES[dtype.name]
    is_small = (scale != 0) & (np.abs(scale) < least)
    if not np.any(is_small):
        return scale, None
    by = np.where(is_small, lift, 1.0)
    return (scale * by if np.ndim(scale) else float(scale * by)), 1 / by


def divided(total: float, divisor: float) -> float:
    """Divide as IEEE does: the mean of nothing is NaN."""
    if divisor:
        return total / divisor
    return math.nan if total == 0 or math.isnan(total) else math.copysign(math.inf, total)
