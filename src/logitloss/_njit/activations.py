"""`softmax` and `logsumexp`, in compiled functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba.core.errors import TypingError
from numba.extending import overload, register_jitable

import logitloss
from logitloss._njit.arguments import check_output, class_axis_of, constant_of, item_of, refuse
from logitloss._njit.cross_entropy import result_of
from logitloss._njit.pieces import checked_out, describe, keep, softmax_runner

if TYPE_CHECKING:
    from collections.abc import Callable


def _activation(item: str, ndim: int, axis: int, operation: int) -> Callable[..., Any]:
    from logitloss._kernels import numba_job
    from logitloss._kernels.numba_items import ITEMS

    run, job_type, kind, no_target = (
        softmax_runner(item),
        numba_job.JOB,
        ITEMS.index(item),
        numba_job.NO_TARGET,
    )
    output = "out" if operation != numba_job.NOTHING else "lse"
    out_kind = kind if output == "out" else ITEMS.index("f64" if item == "f64" else "f32")

    @register_jitable
    def body(logits, out):
        jobs, axes = np.zeros(1, job_type), np.zeros((2, 2 * ndim + 2), np.int64)
        job = jobs[0]
        if logits.shape[axis] == 0:
            raise ValueError("logits: expected at least one class")
        job.operation, job.target_kind, job.n_classes = operation, no_target, logits.shape[axis]
        job.n = logits.size // job.n_classes
        row_stride = describe(job.logits, logits, kind, axis, axes[0])
        if output == "out":
            describe(job.out, out, out_kind, axis, axes[1])
        else:
            describe(job.lse, out, out_kind, -1, axes[1])
        run(jobs, row_stride)
        keep(jobs, axes, logits, out)

    return body


@overload(logitloss.softmax, strict=False, prefer_literal=True)
def _softmax(logits, axis=-1, out=None, num_threads=None, backend=None):
    from logitloss._kernels.numba_job import SOFTMAX

    refuse(num_threads=num_threads, backend=backend)
    item = item_of("logits", logits)
    check_output(out, logits)
    body = _activation(item, logits.ndim, class_axis_of(axis, logits.ndim, -1), SOFTMAX)

    def compiled(logits, axis=-1, out=None, num_threads=None, backend=None):
        result = checked_out(out, logits, logits[:0])
        body(logits, result)
        return result

    return compiled


@overload(logitloss.logsumexp, strict=False, prefer_literal=True)
def _logsumexp(logits, axis=-1, keepdims=False, out=None, num_threads=None, backend=None):
    from logitloss._kernels.numba_job import NOTHING

    refuse(out=out, num_threads=num_threads, backend=backend)
    item, ndim = item_of("logits", logits), logits.ndim
    if constant_of("keepdims", keepdims, False):
        raise TypingError("keepdims is True: expected False in a compiled function")
    at = class_axis_of(axis, ndim, -1)
    body, value_of = _activation(item, ndim, at, NOTHING), result_of(None, ndim, at, "none")
    real = np.float64 if item == "f64" else np.float32

    def compiled(logits, axis=-1, keepdims=False, out=None, num_threads=None, backend=None):
        lse = np.empty(logits.size // max(1, logits.shape[at]), real)
        body(logits, lse)
        return value_of(logits, (0.0, 1.0, lse))

    return compiled
