"""`binary_cross_entropy_with_logits` and its gradient, in compiled functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

import logitloss
from logitloss._njit.arguments import check_output, is_none, is_number, item_of, kind_of, reduction_of, refuse
from logitloss._njit.kernels import NUMBERS, run_kernel
from logitloss._njit.pieces import check_apart, checked_out, describe, divided, keep

if TYPE_CHECKING:
    from collections.abc import Callable


def _coefficients(name: str, given: Any, f64: int, wants_grad: bool) -> Callable[..., Any]:
    """Return the function that describes what multiplies elements, and returns what is to be kept for it."""
    if is_none(given):
        return register_jitable(lambda view, given, shape, axes, out: None)

    if is_number(given):

        def number(view, given, shape, axes, out):
            one = np.full(1, np.float64(given))
            describe(view, one, f64, -1, axes)
            return one

        return register_jitable(number)
    kind = kind_of(name, given)

    def array(view, given, shape, axes, out):
        if wants_grad:
            check_apart(out, given)
        describe(view, np.broadcast_to(given, shape), kind, -1, axes)
        return given

    return register_jitable(array)


def _binary(
    logits: Any, target: Any, weight: Any, pos_weight: Any, reduction: Any, wants_grad: bool
) -> Callable[..., Any]:
    from logitloss._kernels import numba_elements, numba_items, numba_job

    item, by = item_of("logits", logits), reduction_of(reduction)
    ndim, kind, target_kind = logits.ndim, numba_items.ITEMS.index(item), kind_of("target", target)
    # In double where the target is, as the Numba backend does
    is_double = types.float64 in (logits.dtype, target.dtype)
    block = NUMBERS["numba_elements", "bce_fused" if wants_grad else "bce", "f64" if is_double else "f32"]
    plan, size = numba_elements.plan, 8 if is_double else 4
    job_type, found_type, operation = numba_job.JOB, numba_job.FOUND, numba_job.BCE_WITH_LOGITS
    real: Any = np.float64 if item == "f64" else np.float32
    f64, real_kind = (
        numba_items.ITEMS.index("f64"),
        numba_items.ITEMS.index("f64" if item == "f64" else "f32"),
    )
    means, none = by == "mean", by == "none"
    weigh, weigh_positive = (
        _coefficients("weight", weight, f64, wants_grad),
        _coefficients("pos_weight", pos_weight, f64, wants_grad),
    )

    def body(logits, target, weight, pos_weight, label_smoothing, out):
        if target.shape != logits.shape:
            raise ValueError("target: expected the logits' shape")
        if not 0 <= label_smoothing <= 1:
            raise ValueError("label_smoothing: expected 0 <= label_smoothing <= 1")
        jobs, axes = np.zeros(1, job_type), np.zeros((7, 2 * ndim + 2), np.int64)
        job, found = jobs[0], np.zeros(1, found_type)
        job.operation, job.n, job.label_smoothing = operation, logits.size, label_smoothing
        describe(job.logits, logits, kind, -1, axes[0])
        describe(job.target, target, target_kind, -1, axes[1])
        divisor = np.float64(logits.size) if means else 1.0
        scale, loss = (
            np.full(1, divided(1.0, divisor)),
            np.empty(logits.size if none else 0, real),
        )
        weights = weigh(job.weight, weight, logits.shape, axes[2], out)
        positives = weigh_positive(job.pos_weight, pos_weight, logits.shape, axes[3], out)
        if none:
            describe(job.loss, loss, real_kind, -1, axes[4])
        if wants_grad:
            describe(job.out, out, kind, -1, axes[5])
            if means:
                describe(job.scale, scale, f64, -1, axes[6])
        block_size, scratch_bytes = plan(size)
        job.block = block_size
        memory, total = np.empty(scratch_bytes + 4096, np.uint8), 0.0
        scratch = (memory.ctypes.data + 4095) // 4096 * 4096
        for number in range((job.n + job.block - 1) // job.block):
            found[0].total, found[0].counted, found[0].bad = 0.0, 0, -1
            run_kernel(block, jobs.ctypes.data, number, scratch, found.ctypes.data)
            total += found[0].total
        keep(jobs, axes, found, memory, logits, target, weights, positives, scale, out)
        return total, divisor, loss

    return register_jitable(body)


def _binary_value_of(reduction: str) -> Callable[..., Any]:
    if reduction == "none":
        return register_jitable(lambda logits, found: found[2].reshape(logits.shape))
    return register_jitable(lambda logits, found: divided(found[0], found[1]))


@overload(logitloss.binary_cross_entropy_with_logits, strict=False, prefer_literal=True)
def _binary_value(
    logits,
    target,
    weight=None,
    pos_weight=None,
    label_smoothing=0.0,
    reduction="mean",
    out=None,
    num_threads=None,
    backend=None,
):
    refuse(out=out, num_threads=num_threads, backend=backend)
    body = _binary(logits, target, weight, pos_weight, reduction, wants_grad=False)
    value_of = _binary_value_of(reduction_of(reduction))

    def compiled(
        logits,
        target,
        weight=None,
        pos_weight=None,
        label_smoothing=0.0,
        reduction="mean",
        out=None,
        num_threads=None,
        backend=None,
    ):
        return value_of(logits, body(logits, target, weight, pos_weight, label_smoothing, logits))

    return compiled


@overload(logitloss.binary_cross_entropy_with_logits_value_and_grad, strict=False, prefer_literal=True)
def _binary_value_and_grad(
    logits,
    target,
    weight=None,
    pos_weight=None,
    label_smoothing=0.0,
    reduction="mean",
    out=None,
    num_threads=None,
    backend=None,
):
    refuse(num_threads=num_threads, backend=backend)
    check_output(out, logits)
    body = _binary(logits, target, weight, pos_weight, reduction, wants_grad=True)
    value_of = _binary_value_of(reduction_of(reduction))

    def compiled(
        logits,
        target,
        weight=None,
        pos_weight=None,
        label_smoothing=0.0,
        reduction="mean",
        out=None,
        num_threads=None,
        backend=None,
    ):
        grad = checked_out(out, logits, target)
        return value_of(logits, body(logits, target, weight, pos_weight, label_smoothing, grad)), grad

    return compiled
