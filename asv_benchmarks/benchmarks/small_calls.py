"""Calls on a batch so small that the Python above the kernel is most of the time, against plain NumPy.

There is no `setup` here, so that asv times many calls at once.
"""

from functools import partial

import numpy as np

from logitloss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    cross_entropy_value_and_grad,
)

from .common import BACKENDS, PARAM_NAMES, binary_labels, labels, logits, paired_ratio

SHAPE = "32x10"
CALLS = 200


class SmallCalls:
    params = (BACKENDS, ("float32",), (SHAPE,), (1,))
    param_names = PARAM_NAMES
    version = "1"

    def time_cross_entropy(self, backend, dtype, shape, threads):
        cross_entropy(logits(dtype, shape), labels(shape), num_threads=threads, backend=backend)

    def time_cross_entropy_value_and_grad(self, backend, dtype, shape, threads):
        cross_entropy_value_and_grad(
            logits(dtype, shape), labels(shape), num_threads=threads, backend=backend
        )

    def time_binary_cross_entropy_with_logits(self, backend, dtype, shape, threads):
        binary_cross_entropy_with_logits(
            logits(dtype, shape), binary_labels(dtype, shape), num_threads=threads, backend=backend
        )

    def track_cross_entropy_over_numpy(self, backend, dtype, shape, threads):
        arrays = logits(dtype, shape), labels(shape)
        ours = partial(cross_entropy, *arrays, num_threads=threads, backend=backend)
        return paired_ratio(partial(repeat, ours), [partial(repeat, partial(numpy_cross_entropy, *arrays))])

    track_cross_entropy_over_numpy.unit = "times NumPy"


def repeat(call):
    for _ in range(CALLS):
        call()


def numpy_cross_entropy(logits, target):
    """What one would write without the package, stable but no more than that."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    lse = np.log(np.exp(shifted).sum(axis=1))
    return (lse - shifted[np.arange(len(target)), target]).mean()
