"""All metrics of a batch in memory, chunk by chunk, against a plain read of the logits."""

from functools import partial

from logitloss.evaluate import evaluate

from . import limits
from .common import BoundByMemory, labels, logits, paired_ratio, thread_count


class Evaluation(BoundByMemory):
    def call(self, backend, dtype, shape, threads):
        return partial(
            evaluate,
            logits(dtype, shape),
            labels(shape),
            num_threads=thread_count(threads),
            backend=backend,
        )

    def time_evaluate(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_evaluate_over_read(self, backend, dtype, shape, threads):
        ours = self.call(backend, dtype, shape, threads)
        count = thread_count(threads)
        return paired_ratio(ours, limits.reads(logits(dtype, shape), threads=count), count)

    track_evaluate_over_read.unit = "times a read"
