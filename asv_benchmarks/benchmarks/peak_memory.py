"""What a call takes at its peak beyond inputs and outputs, which are there before."""

import contextlib
import ctypes
from functools import partial
from pathlib import Path

from logitloss import cross_entropy, cross_entropy_value_and_grad

from .common import BACKENDS, PARAM_NAMES, SHAPES, THREADS, gradient, labels, logits, thread_count

MEGABYTE = 2**20
SMALL = "2x64"  # rows of enough classes for the kernel of long rows
LEAST = 1e-3  # MB: a change from nothing at all has no ratio


class PeakMemory:
    params = (BACKENDS, ("float32", "bfloat16"), SHAPES[:3], THREADS)
    param_names = PARAM_NAMES
    version = "1"
    timeout = 300

    def setup(self, backend, dtype, shape, threads):
        if backend == "reference":
            raise NotImplementedError("NumPy makes arrays of the batch's size, as the reference may")
        if not Path("/proc/self/clear_refs").exists():
            raise NotImplementedError("only Linux sets the peak back")

    def track_value(self, backend, dtype, shape, threads):
        options = {"num_threads": thread_count(threads), "backend": backend}

        def call(shape):
            return partial(cross_entropy, logits(dtype, shape), labels(shape), **options)

        return peak_of(call, shape)

    def track_value_and_grad(self, backend, dtype, shape, threads):
        options = {"num_threads": thread_count(threads), "backend": backend}

        def call(shape):
            out = gradient(dtype, shape)
            out.fill(1)  # its pages are there from then on
            return partial(
                cross_entropy_value_and_grad, logits(dtype, shape), labels(shape), out=out, **options
            )

        return peak_of(call, shape)

    track_value.unit = track_value_and_grad.unit = "MB"


def peak_of(call, shape):
    """Return the MB that the call takes, once a small one has loaded or compiled what it needs."""
    call(SMALL)()
    return max(peak(call(shape)) / MEGABYTE, LEAST)


def peak(call):
    """Return the bytes that a call takes at its peak."""
    # What was freed goes back first, lest it be taken again uncounted.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    # Sets the peak back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
