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

# A kernel's factor is down to 2**-80 of the scale, of float64 to 2**-860. By the gradient's dtype: from which
# scale to which that is a normal number. All float16 has for less is 0.
NARROW, WIDE = (2.0**-40, 2.0**64), (2.0**-150, 2.0**700)
ORDINARY_SCALES = {"float32": NARROW, "bfloat16": NARROW, "float64": WIDE, "float16": (0.0, NARROW[1])}
# Class weights whose sums are finite
SUMMABLE = (0.0, 2.0**900)


def per_class(weight: Float64 | None, label_smoothing: float, n_classes: int) -> tuple[Float64, Float64]:
    """Return beta and gamma."""
    weight = np.ones(n_classes) if weight is None else weight
    with np.errstate(under="ignore"):
        return (1.0 - label_smoothing) * weight, (label_smoothing / n_classes) * weight


def balanced(
    weight: Float64, z_loss: float, size: float, least: float, most: float
) -> tuple[Float64, float, float]:
    """Return class weights that are of no extreme size, what goes with them, and what both lack.

    That is a power of two. A mean that divides by the weights' sum is the same without it.
    """
    if least <= size <= most or not 0 < size < math.inf:
        return weight, z_loss, 1.0
    # a large one no further than that, for the smaller ones' sake; and not beyond what can be divided by
    exponent = max(math.frexp(size)[1] - (math.frexp(most)[1] if size > 1 else 0), -1021)
    return np.ldexp(weight, -exponent), float(np.ldexp(z_loss, -exponent)), math.ldexp(1.0, exponent)


def rescaled(
    weight: Float64, z_loss: float, size: float, sizes: tuple[float, float]
) -> tuple[Float64, float, float]:
    """Do the same whatever the caller's floating-point settings, which compiled functions have none of."""
    with np.errstate(over="ignore", under="ignore"):
        return balanced(weight, z_loss, size, *sizes)


def weight_range(dtype: np.dtype[Any], reduction: str = "sum") -> tuple[float, float]:
    """Return from which size to which class weights are of no extreme one, by the logits' dtype.

    Rows that are not summed may be of any size above, as each has its own.
    """
    least, most = WIDE if dtype == np.float64 else NARROW
    return least, math.inf if reduction == "none" else most


def largest(weight: Float64, z_loss: float) -> float:
    """Return the largest size of class weights and what goes with them."""
    return max(float(np.abs(weight).max()), abs(z_loss))


def ordinary(scale: Array | float, dtype: np.dtype[Any]) -> tuple[Array | float, Float64 | None]:
    """Return scales that keep a gradient's digits, and what multiplies the result then, if anything must.

    They are a power of two apart.
    """
    if isinstance(scale, float) and NARROW[0] <= abs(scale) <= NARROW[1]:
        return scale, None  # as it is mostly; a dtype's name takes a microsecond
    least, most = ORDINARY_SCALES[dtype.name]
    size = np.abs(scale)
    is_other = (scale != 0) & ((size < least) | (size > most))
    if not np.any(is_other):
        return scale, None
    # A small one becomes 1 to 2, a large one just ordinary: 16-bit entries are rounded before that.
    top = np.where(size > most, math.frexp(most)[1] - 1, 1)
    shift = np.where(is_other, np.frexp(scale)[1] - top, 0)
    scaled = np.ldexp(scale, -shift)
    return scaled if np.ndim(scale) else float(scaled), np.ldexp(1.0, shift)


def multiply(array: Array, factor: Float64 | float) -> None:
    """Multiply losses or a gradient by powers of two, one for all or one for each row, and round but once."""
    with np.errstate(over="ignore", under="ignore"):
        np.multiply(array, factor, out=array, dtype=np.float64, casting="unsafe")


def divided(total: float, divisor: float) -> float:
    """Divide; the mean of nothing is NaN."""
    return total / divisor if divisor else math.nan
