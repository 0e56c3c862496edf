"""All metrics of a batch: in memory against a plain read of the logits, in a file against their loss."""

import functools
import os
import tempfile
from functools import partial

import numpy as np

from logitloss import cross_entropy
from logitloss.evaluate import evaluate

from . import limits
from .common import BACKENDS, BoundByMemory, labels, logits, paired_ratio, thread_count


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


class FileEvaluation(BoundByMemory):
    """A `.npy` file in the system's cache against the loss alone of the same array in memory."""

    # a process writes its file, so few of them
    params = (BACKENDS, ("float32",), ("128x1000", "131072x1000", "1024x131072"), ("all",))

    def setup(self, backend, dtype, shape, threads):
        files(dtype, shape)
        super().setup(backend, dtype, shape, threads)

    def call(self, backend, dtype, shape, threads):
        options = {"num_threads": thread_count(threads), "backend": backend}
        return partial(evaluate, *files(dtype, shape), **options)

    def track_file_over_forward(self, backend, dtype, shape, threads):
        ours, count = self.call(backend, dtype, shape, threads), thread_count(threads)
        array, target = logits(dtype, shape), labels(shape)
        forward = partial(cross_entropy, array, target, num_threads=count, backend=backend)
        return paired_ratio(ours, [forward], count)

    track_file_over_forward.unit = "times the forward"


@functools.cache
def folder():
    """Return a directory that goes with this process."""
    return tempfile.TemporaryDirectory(prefix="logitloss-benchmark-")


@functools.cache
def files(dtype, shape):
    """Write logits and labels, and return their files."""
    names = [os.path.join(folder().name, f"{name}-{dtype}-{shape}.npy") for name in ("logits", "labels")]
    for name, array in zip(names, (logits(dtype, shape), labels(shape)), strict=True):
        np.save(name, array)
    return names
