"""BCE with logits: the value against a read of logits and labels, value and gradient against a triad."""

from functools import partial

from logitloss import binary_cross_entropy_with_logits, binary_cross_entropy_with_logits_value_and_grad

from . import limits
from .common import (
    BACKENDS,
    DTYPES,
    ELEMENTS,
    THREADS,
    BoundByMemory,
    binary_labels,
    gradient,
    logits,
    paired_ratio,
    thread_count,
)


class BinaryCrossEntropyForward(BoundByMemory):
    params = (BACKENDS, DTYPES, ELEMENTS, THREADS)

    def call(self, backend, dtype, shape, threads):
        return partial(
            binary_cross_entropy_with_logits,
            logits(dtype, shape),
            binary_labels(dtype, shape),
            num_threads=thread_count(threads),
            backend=backend,
        )

    def time_value(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_value_over_read(self, backend, dtype, shape, threads):
        ours = self.call(backend, dtype, shape, threads)
        arrays = logits(dtype, shape), binary_labels(dtype, shape)
        count = thread_count(threads)
        return paired_ratio(ours, limits.reads(*arrays, threads=count), count)

    track_value_over_read.unit = "times a read"


class BinaryCrossEntropyFused(BoundByMemory):
    params = (BACKENDS, DTYPES, ELEMENTS, THREADS)

    def call(self, backend, dtype, shape, threads):
        return partial(
            binary_cross_entropy_with_logits_value_and_grad,
            logits(dtype, shape),
            binary_labels(dtype, shape),
            out=gradient(dtype, shape),
            num_threads=thread_count(threads),
            backend=backend,
        )

    def time_value_and_grad(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_value_and_grad_over_triad(self, backend, dtype, shape, threads):
        ours = self.call(backend, dtype, shape, threads)
        arrays = gradient(dtype, shape), logits(dtype, shape), binary_labels(dtype, shape)
        count = thread_count(threads)
        return paired_ratio(ours, limits.triads(*arrays, threads=count), count)

    track_value_and_grad_over_triad.unit = "times a triad"
