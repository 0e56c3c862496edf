"""Calls on a batch so small that the Python above the kernel is most of the time, against plain NumPy.

There is no `setup` here, so that asv times many calls at once; the inputs are made on import.
"""

from functools import partial

import numpy as np

from logitloss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    cross_entropy_value_and_grad,
)

from .common import BACKENDS, PARAM_NAMES, binary_labels, labels, logits, paired_ratio

DTYPE, SHAPE = "float32", "32x10"
LOGITS, LABELS, BINARY_LABELS = logits(DTYPE, SHAPE), labels(SHAPE), binary_labels(DTYPE, SHAPE)
CALLS = 200


class SmallCalls:
    params = (BACKENDS, (DTYPE,), (SHAPE,), (1,))
    param_names = PARAM_NAMES
    version = "5"
    timeout = 300

    def time_cross_entropy(self, backend, dtype, shape, threads):
        cross_entropy(LOGITS, LABELS, num_threads=threads, backend=backend)

    def time_cross_entropy_value_and_grad(self, backend, dtype, shape, threads):
        cross_entropy_value_and_grad(LOGITS, LABELS, num_threads=threads, backend=backend)

    def time_binary_cross_entropy_with_logits(self, backend, dtype, shape, threads):
        binary_cross_entropy_with_logits(LOGITS, BINARY_LABELS, num_threads=threads, backend=backend)

    def track_cross_entropy_over_numpy(self, backend, dtype, shape, threads):
        ours = partial(cross_entropy, LOGITS, LABELS, num_threads=threads, backend=backend)
        plain = partial(numpy_cross_entropy, LOGITS, LABELS)
        return paired_ratio(partial(repeat, ours), [partial(repeat, plain)], threads)

    track_cross_entropy_over_numpy.unit = "times NumPy"


def repeat(call):
    for _ in range(CALLS):
        call()


def numpy_cross_entropy(logits, target):
    """What one would write without the package, stable but no more than that."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    lse = np.log(np.exp(shifted).sum(axis=1))
    return (lse - shifted[np.arange(len(target)), target]).mean()
