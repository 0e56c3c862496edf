"""The largest error of a loss and of a gradient, in units in the last place of float32 or float64.

The exact values are NumPy's in extended precision. The logits spread over a few nats, as those of a model do,
so that no row's loss is a small difference of large numbers.
"""

import functools

import numpy as np

from logitloss import binary_cross_entropy_with_logits, cross_entropy, cross_entropy_value_and_grad

from .common import BACKENDS, PARAM_NAMES, binary_labels, labels, logits

SHAPES = ("8192x10", "512x1000", "16x32768")
LEAST = 1e-3  # ulp: a change from no error at all has no ratio


class Accuracy:
    params = (BACKENDS, ("float32", "float64"), SHAPES, (1,))
    param_names = PARAM_NAMES
    version = "1"
    timeout = 300

    def track_max_ulp_of_losses(self, backend, dtype, shape, threads):
        exact, _ = exact_cross_entropy(dtype, shape)
        losses = cross_entropy(
            logits(dtype, shape), labels(shape), reduction="none", num_threads=threads, backend=backend
        )
        return max_ulp(losses, exact)

    def track_max_ulp_of_gradient(self, backend, dtype, shape, threads):
        _, exact = exact_cross_entropy(dtype, shape)
        _, gradient = cross_entropy_value_and_grad(
            logits(dtype, shape), labels(shape), reduction="sum", num_threads=threads, backend=backend
        )
        return max_ulp(gradient, exact)

    def track_max_ulp_of_binary_losses(self, backend, dtype, shape, threads):
        x, y = (array(dtype, shape) for array in (logits, binary_labels))
        losses = binary_cross_entropy_with_logits(
            x, y, reduction="none", num_threads=threads, backend=backend
        )
        wide = np.where(y == 1, -1, 1) * x.astype(np.longdouble)
        return max_ulp(losses, np.logaddexp(0, wide))

    track_max_ulp_of_losses.unit = "ulp"
    track_max_ulp_of_gradient.unit = "ulp"
    track_max_ulp_of_binary_losses.unit = "ulp"


@functools.cache
def exact_cross_entropy(dtype, shape):
    """Return losses and the gradient of their sum. 1 - p comes from the other classes, not by subtraction."""
    x = logits(dtype, shape).astype(np.longdouble)
    rows, target = np.arange(len(x)), labels(shape)
    from_target = np.exp(x - x[rows, target][:, None])
    from_target[rows, target] = 0
    others = from_target.sum(axis=1)
    gradient = from_target / (1 + others)[:, None]
    gradient[rows, target] = -others / (1 + others)
    return np.log1p(others), gradient


def max_ulp(found, exact):
    error = np.abs(found.astype(np.longdouble) - exact) / np.spacing(np.abs(exact).astype(found.dtype))
    return max(float(error.max()), LEAST)
