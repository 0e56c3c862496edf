"""Class weights, smoothing, reductions and upstream gradients as the numbers per class and per row of the kernels.

With smoothing eps and class weights w, a label y costs (1 - eps)*w[y] at its own class and eps/C*w[c] at each: beta
and gamma of the kernel contract. `mean` divides by the weights of the labels that count. What multiplies a whole
row's gradient, the upstream gradient over that divisor, is the row's scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from logitloss import _check

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array, Float64, Shape


def per_class(
    weight: Float64 | None, label_smoothing: float, n_classes: int
) -> tuple[Float64 | None, Float64 | None]:
    """Return beta and gamma, None standing for ones and zeros."""
    if not label_smoothing:
        return weight, None
    ones = np.ones(n_classes) if weight is None else weight
    return (1.0 - label_smoothing) * ones, (label_smoothing / n_classes) * ones


def divided(total: float, divisor: float) -> float:
    """Divide as IEEE does: an empty mean is NaN."""
    if divisor:
        return total / divisor
    return np.nan if total == 0 or total != total else np.copysign(np.inf, total)


def scale(grad_output: ArrayLike | None, reduction: str, divisor: float, shape: Shape) -> Array | None:
    """Return what multiplies each row's gradient, of the rows' shape (constant ones by strides of 0); None is 1."""
    upstream = None if grad_output is None else _check.reals("grad_output", grad_output)
    if reduction == "none" and upstream is not None and upstream.ndim:
        return _check.same_shape("grad_output", upstream, shape, "the loss's")
    if upstream is not None and upstream.ndim:
        _check.same_shape("grad_output", upstream, (), "the loss's")
    factor = divided(1.0 if upstream is None else float(upstream), divisor)
    if factor == 1.0:
        return None
    return np.ndarray(shape, np.float64, np.array(factor), strides=(0,) * len(shape))
