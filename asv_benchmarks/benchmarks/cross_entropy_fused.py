"""Cross-entropy's value and gradient in one call, against a copy past the caches."""

from functools import partial

from logitloss import cross_entropy_value_and_grad

from . import limits
from .common import BoundByMemory, gradient, labels, logits, paired_ratio, thread_count


class CrossEntropyFused(BoundByMemory):
    def call(self, backend, dtype, shape, threads):
        return partial(
            cross_entropy_value_and_grad,
            logits(dtype, shape),
            labels(shape),
            out=gradient(dtype, shape),
            num_threads=thread_count(threads),
            backend=backend,
        )

    def time_value_and_grad(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_value_and_grad_over_copy(self, backend, dtype, shape, threads):
        ours = self.call(backend, dtype, shape, threads)
        count = thread_count(threads)
        copies = limits.copies(gradient(dtype, shape), logits(dtype, shape), threads=count)
        return paired_ratio(ours, copies, count)

    track_value_and_grad_over_copy.unit = "times a copy"
