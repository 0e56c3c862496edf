"""Cross-entropy of a linear layer's logits against the bare matrix products, which hold all of them."""

import functools
from functools import partial

import numpy as np

from logitloss import linear_cross_entropy, linear_cross_entropy_value_and_grad

from .common import BACKENDS, PARAM_NAMES, labels, paired_ratio, read_only, sizes, thread_count


class LinearCrossEntropy:
    """Shapes are rows x classes x dimensions. Products have the threads of NumPy's BLAS, hence "all"."""

    params = (BACKENDS, ("float32",), ("256x5000x64", "2048x50257x1024"), ("all",))
    param_names = PARAM_NAMES
    version = "1"
    timeout = 600
    rounds = 1

    def setup(self, backend, dtype, shape, threads):
        if backend == "reference" and shape != self.params[2][0]:
            raise NotImplementedError("NumPy takes long; the small shape tells enough")
        layer(dtype, shape)

    def call(self, function, backend, dtype, shape, threads):
        hidden, weight, _, _ = layer(dtype, shape)
        rows = labels("x".join(shape.split("x")[:2]))
        return partial(function, hidden, weight, rows, num_threads=thread_count(threads), backend=backend)

    def track_value_over_product(self, backend, dtype, shape, threads):
        ours = self.call(linear_cross_entropy, backend, dtype, shape, threads)
        hidden, weight, logits, _ = layer(dtype, shape)
        product = partial(np.matmul, hidden, weight.T, out=logits)
        return paired_ratio(ours, [product], thread_count(threads))

    def track_value_and_grad_over_products(self, backend, dtype, shape, threads):
        ours = self.call(linear_cross_entropy_value_and_grad, backend, dtype, shape, threads)
        return paired_ratio(ours, [partial(products, *layer(dtype, shape))], thread_count(threads))

    track_value_over_product.unit = "times the product"
    track_value_and_grad_over_products.unit = "times the products"


def products(hidden, weight, logits, grad):
    """Multiply as forward and backward do, which is the least they can take."""
    np.matmul(hidden, weight.T, out=logits)
    np.matmul(logits.T, hidden, out=grad)
    return logits @ weight


@functools.cache
def layer(dtype, shape):
    """Return hidden states and weight, and arrays for all logits and for the weight's gradient."""
    n_rows, n_classes, n_dimensions = sizes(shape)
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((n_rows, n_dimensions), dtype)
    weight = rng.standard_normal((n_classes, n_dimensions), dtype) * n_dimensions**-0.5
    grad = np.empty_like(weight)
    return read_only(hidden), read_only(weight), np.empty((n_rows, n_classes), dtype), grad
