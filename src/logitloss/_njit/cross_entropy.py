"""`cross_entropy` and its gradient, in compiled functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import overload, register_jitable

import logitloss
from logitloss._coefficients import SUMMABLE, weight_range
from logitloss._njit.arguments import (
    check_class_weight,
    check_ignore_index,
    check_output,
    class_axis_of,
    item_of,
    kind_of,
    reduction_of,
    refuse,
)
from logitloss._njit.kernels import LABEL_WEIGHT, NUMBERS, run_kernel
from logitloss._njit.pieces import (
    balanced,
    checked_out,
    describe,
    divided,
    exact_sum,
    is_shape_without,
    keep,
    largest,
    softmax_runner,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def _cross_entropy(item: str, target: Any, ndim: int, axis: int, reduction: str, wants_grad: bool) -> Any:
    """Return the compiled function's body: value, or value and gradient."""
    from logitloss._kernels import numba_job
    from logitloss._kernels.numba_items import ITEMS

    run, job_type, kind = softmax_runner(item), numba_job.JOB, ITEMS.index(item)
    label_weight, label_block = NUMBERS[LABEL_WEIGHT], 4096
    is_label = isinstance(target, types.Integer)
    is_soft = not is_label and isinstance(target.dtype, types.Float)
    label_type: Any = np.uint64 if target == types.uint64 else np.int64
    label_kind = ITEMS.index("u64" if label_type is np.uint64 else "i64")
    is_unsigned = target == types.uint64 or getattr(target, "dtype", None) == types.uint64
    target_kind = label_kind if is_label else kind_of("target", target)
    real: Any = np.float64 if item == "f64" else np.float32
    f64, real_kind = ITEMS.index("f64"), ITEMS.index("f64" if item == "f64" else "f32")
    operation = numba_job.GRADIENT if wants_grad else numba_job.NOTHING
    kinds = numba_job.PROBABILITIES if is_soft else numba_job.LABELS
    means, none = reduction == "mean", reduction == "none"
    scales, weight_sizes = weight_range(np.dtype(real)), weight_range(np.dtype(real), reduction)
    found_type = numba_job.FOUND

    @register_jitable
    def labels_of(target):
        return np.full(1, target, label_type) if is_label else target

    @register_jitable
    def weights_of(weight, n_classes):
        if weight is None:
            return np.ones(n_classes)
        if weight.shape != (n_classes,):
            raise ValueError("weight: expected one number per class")
        return weight.astype(np.float64)

    def body(logits, target, weight, ignore_index, label_smoothing, z_loss, out):
        n_classes = logits.shape[axis]
        if n_classes == 0:
            raise ValueError("logits: expected at least one class")
        if not 0 <= label_smoothing <= 1:
            raise ValueError("label_smoothing: expected 0 <= label_smoothing <= 1")
        if not np.isfinite(z_loss):
            raise ValueError("z_loss: expected a finite number")
        labels = labels_of(target)
        if is_soft:
            if ignore_index >= 0:
                raise ValueError("ignore_index: expected no such label, as target holds class probabilities")
            if labels.shape != logits.shape:
                raise ValueError("target: expected the logits' shape for class probabilities")
        elif not is_label and not is_shape_without(logits.shape, axis, labels.shape):
            raise ValueError("target: expected the logits' shape without the class axis")
        jobs, axes = np.zeros(1, job_type), np.zeros((6, 2 * ndim + 2), np.int64)
        job = jobs[0]
        job.operation, job.target_kind, job.ignore_index = operation, kinds, ignore_index
        if is_unsigned and ignore_index == LOWEST:
            job.ignore_index = -1  # no label; the lowest integer stands for 2**63 on
        job.n, job.n_classes, job.z_loss = logits.size // n_classes, n_classes, z_loss
        row_stride = describe(job.logits, logits, kind, axis, axes[0])
        describe(job.target, labels, target_kind, axis if is_soft else -1, axes[1])
        weights, unit = weights_of(weight, n_classes), 1.0
        # A mean without smoothing is made of the labels' own weights, whatever the others are.
        is_of_labels = means and not is_soft and label_smoothing == 0
        if weight is not None:
            least, most = SUMMABLE if is_of_labels else weight_sizes
            size = largest(weights, job.z_loss)
            weights, job.z_loss, unit = balanced(weights, job.z_loss, size, least, most)
        divisor = 1.0 / unit
        if means and is_soft:
            divisor = job.n / unit
        elif not is_soft and (wants_grad or (means and weight is not None)):  # no bad label may come later
            found, label_weights = np.zeros(1, found_type), 0.0
            job.beta, job.block = weights.ctypes.data if weight is not None else 0, label_block
            for number in range((job.n + label_block - 1) // label_block):
                found[0].total, found[0].bad = 0.0, -1
                run_kernel(label_weight, jobs.ctypes.data, number, 0, found.ctypes.data)
                label_weights += found[0].total
                if found[0].bad >= 0:
                    _raise_label(labels, found[0].bad, n_classes, ignore_index)
            job.beta = 0
            divisor = label_weights if means else divisor
            if is_of_labels and weight is not None and job.n:
                size = max(divisor / job.n, abs(job.z_loss))
                least, most = weight_sizes
                weights, job.z_loss, unit = balanced(weights, job.z_loss, size, least, most)
                divisor /= unit
        beta, gamma = weights, weights.astype(real)
        if is_soft:
            job.target_scale, job.target_offset = 1.0 - label_smoothing, label_smoothing / n_classes
            if weight is not None:
                job.gamma = gamma.ctypes.data
        else:
            if weight is not None or label_smoothing != 0:
                beta = (1.0 - label_smoothing) * weights
                job.beta = beta.ctypes.data
            if label_smoothing != 0:
                coefficients = label_smoothing / n_classes * weights
                gamma = coefficients.astype(real)
                job.gamma_sum = exact_sum(gamma)
                job.gamma = gamma.ctypes.data
        loss = np.empty(job.n if none else 0, real)
        if none:
            describe(job.loss, loss, real_kind, -1, axes[2])
        scale, factor = np.empty(0), 1.0
        if wants_grad:
            describe(job.out, out, kind, axis, axes[3])
            if means or unit != 1:
                least, most = scales
                whole = np.full(1, divided(1.0, divisor))
                scale, _, factor = balanced(whole, 0.0, abs(whole[0]), least, most)
                describe(job.scale, scale, f64, -1, axes[4])
        total, counted, bad = run(jobs, row_stride)
        if bad >= 0:
            _raise_label(labels, bad, n_classes, ignore_index)
        if means and not is_soft and not wants_grad and weight is None:
            divisor = np.float64(counted)
        if wants_grad and factor != 1:
            for index in np.ndindex(out.shape):
                out[index] *= factor
        if unit != 1:
            for row in range(loss.size):
                loss[row] *= unit
        keep(jobs, axes, logits, labels, weights, beta, gamma, scale, out)
        return total, divisor, loss

    return register_jitable(body)


LOWEST = -(2**63)


@register_jitable
def _raise_label(labels, row, n_classes, ignore_index):
    label = labels.flat[row]
    if label == LOWEST:  # which Numba cannot write out
        raise IndexError("target: a label is -2**63: expected a class, or ignore_index")
    if ignore_index == LOWEST:
        raise IndexError(f"target, row {row}, is {label}: expected 0 <= target < {n_classes}, or -2**63")
    raise IndexError(
        f"target, row {row}, is {label}, but logits have {n_classes} classes: "
        f"expected 0 <= target < {n_classes} or ignore_index={ignore_index}"
    )


def result_of(target: Any, ndim: int, axis: int, reduction: str) -> Callable[..., Any]:
    """Return the function that makes the value of total, divisor and the rows' losses."""
    if reduction != "none":
        return register_jitable(lambda logits, found: divided(found[0], found[1]))
    if ndim == 1:
        return register_jitable(lambda logits, found: found[2][0])

    def losses(logits, found):
        rows = logits.shape[1:]
        for i in range(axis):
            rows = tuple_setitem(rows, i, logits.shape[i])
        return found[2].reshape(rows)

    return register_jitable(losses)


def _shared(
    logits: Any, target: Any, weight: Any, ignore_index: Any, axis: Any, reduction: Any, wants_grad: bool
) -> tuple[Any, Any]:
    item, ndim = item_of("logits", logits), logits.ndim
    at, by = class_axis_of(axis, ndim, 1 if ndim > 1 else 0), reduction_of(reduction)
    if not isinstance(target, types.Integer) and not isinstance(target, types.Array):
        raise TypingError(f"target of type {target}: expected an array, or an integer for one row")
    number, n_axes = (target, 0) if isinstance(target, types.Integer) else (target.dtype, target.ndim)
    check_ignore_index(ignore_index)
    check_class_weight(weight)
    if isinstance(number, types.Boolean):
        raise TypingError(f"target of type {target}: expected integers, or floats")
    wanted = ndim if isinstance(number, types.Float) else ndim - 1
    if n_axes != wanted:
        raise TypingError(f"target of {n_axes} axes: expected {wanted}, beside logits of {ndim}")
    body = _cross_entropy(item, target, ndim, at, by, wants_grad)
    return body, result_of(target, ndim, at, by)


@overload(logitloss.cross_entropy, strict=False, prefer_literal=True)
def _value(
    logits,
    target,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
    axis=None,
    out=None,
    num_threads=None,
    backend=None,
):
    refuse(out=out, num_threads=num_threads, backend=backend)
    body, value_of = _shared(logits, target, weight, ignore_index, axis, reduction, wants_grad=False)

    def compiled(
        logits,
        target,
        weight=None,
        ignore_index=-100,
        label_smoothing=0.0,
        z_loss=0.0,
        reduction="mean",
        axis=None,
        out=None,
        num_threads=None,
        backend=None,
    ):
        found = body(logits, target, weight, ignore_index, label_smoothing, z_loss, logits)
        return value_of(logits, found)

    return compiled


@overload(logitloss.cross_entropy_value_and_grad, strict=False, prefer_literal=True)
def _value_and_grad(
    logits,
    target,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    reduction="mean",
    axis=None,
    out=None,
    num_threads=None,
    backend=None,
):
    refuse(num_threads=num_threads, backend=backend)
    check_output(out, logits)
    body, value_of = _shared(logits, target, weight, ignore_index, axis, reduction, wants_grad=True)
    has_array = isinstance(target, types.Array)

    def compiled(
        logits,
        target,
        weight=None,
        ignore_index=-100,
        label_smoothing=0.0,
        z_loss=0.0,
        reduction="mean",
        axis=None,
        out=None,
        num_threads=None,
        backend=None,
    ):
        grad = checked_out(out, logits, target if has_array else logits[:0])
        found = body(logits, target, weight, ignore_index, label_smoothing, z_loss, grad)
        return value_of(logits, found), grad

    return compiled
