"""The value of cross-entropy alone, against a plain read of the logits."""

from functools import partial

from logitloss import cross_entropy

from . import limits
from .common import BoundByMemory, labels, logits, paired_ratio, thread_count


class CrossEntropyForward(BoundByMemory):
    def call(self, backend, dtype, shape, threads):
        return partial(
            cross_entropy,
            logits(dtype, shape),
            labels(shape),
            num_threads=thread_count(threads),
            backend=backend,
        )

    def time_value(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_value_over_read(self, backend, dtype, shape, threads):
        ours = self.call(backend, dtype, shape, threads)
        count = thread_count(threads)
        return paired_ratio(ours, limits.reads(logits(dtype, shape), threads=count), count)

    track_value_over_read.unit = "times a read"
