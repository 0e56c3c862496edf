"""Softmax and its logarithm against a copy past the caches, logsumexp against a plain read."""

from functools import partial

from logitloss import log_softmax, logsumexp, softmax

from . import limits
from .common import BoundByMemory, gradient, logits, paired_ratio, thread_count


class OneArrayToAnother(BoundByMemory):
    """A function of logits whose result has their shape."""

    def call(self, backend, dtype, shape, threads):
        arrays = {"out": gradient(dtype, shape), "num_threads": thread_count(threads)}
        return partial(type(self).function, logits(dtype, shape), backend=backend, **arrays)

    def over_copy(self, backend, dtype, shape, threads):
        ours = self.call(backend, dtype, shape, threads)
        count = thread_count(threads)
        copies = limits.copies(gradient(dtype, shape), logits(dtype, shape), threads=count)
        return paired_ratio(ours, copies, count)


class Softmax(OneArrayToAnother):
    function = staticmethod(softmax)

    def time_softmax(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_softmax_over_copy(self, backend, dtype, shape, threads):
        return self.over_copy(backend, dtype, shape, threads)

    track_softmax_over_copy.unit = "times a copy"


class LogSoftmax(OneArrayToAnother):
    function = staticmethod(log_softmax)

    def time_log_softmax(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_log_softmax_over_copy(self, backend, dtype, shape, threads):
        return self.over_copy(backend, dtype, shape, threads)

    track_log_softmax_over_copy.unit = "times a copy"


class LogSumExp(BoundByMemory):
    def call(self, backend, dtype, shape, threads):
        return partial(logsumexp, logits(dtype, shape), num_threads=thread_count(threads), backend=backend)

    def time_logsumexp(self, backend, dtype, shape, threads):
        self.call(backend, dtype, shape, threads)()

    def track_logsumexp_over_read(self, backend, dtype, shape, threads):
        ours = self.call(backend, dtype, shape, threads)
        count = thread_count(threads)
        return paired_ratio(ours, limits.reads(logits(dtype, shape), threads=count), count)

    track_logsumexp_over_read.unit = "times a read"
