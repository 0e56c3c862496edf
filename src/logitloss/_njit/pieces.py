"""What compiled functions are made of: descriptions of arrays, and the run of a job of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba.extending import register_jitable

from logitloss import _check, _coefficients
from logitloss._kernels.vectors import lost_of
from logitloss._njit.kernels import NUMBERS, run_kernel

if TYPE_CHECKING:
    from collections.abc import Callable


_folds = register_jitable(_check.folds)
balanced = register_jitable(_coefficients.balanced)
largest = register_jitable(_coefficients.largest)


@register_jitable
def keep(*arrays):
    """Keep arrays alive up to here, of which only addresses are used before."""


@register_jitable
def describe(view, array, kind, class_axis, axes):
    """Fill in an array's record; `axes` is for its joined axes. class_axis is -1 where there is none."""
    n = 0
    for axis in range(array.ndim):
        size, stride = array.shape[axis], array.strides[axis]
        if axis == class_axis:
            view.class_stride = stride
        elif n and axes[2 * n - 1] == stride * size:
            axes[2 * n - 2] *= size
            axes[2 * n - 1] = stride
        elif size != 1:
            axes[2 * n], axes[2 * n + 1] = size, stride
            n += 1
    view.address, view.kind = array.ctypes.data, kind
    view.n_axes, view.axes = n, axes.ctypes.data
    return axes[2 * n - 1] if n else 0


@register_jitable
def is_shape_without(shape, axis, rows):
    """Whether `rows` is `shape` without an axis; it has one less."""
    are_same = True
    for i in range(len(rows)):
        are_same = are_same and rows[i] == shape[i + (i >= axis)]
    return are_same


@register_jitable
def exact_sum(numbers):
    """Add up what one by one would lose the digits that gradients are made of."""
    total, lost = 0.0, 0.0
    for number in numbers:
        term = np.float64(number)
        lost += lost_of(total, term)
        total += term
    return total + lost


@register_jitable
def divided(total, divisor):
    return total / divisor if divisor else np.nan


def softmax_runner(item: str) -> Callable[..., Any]:
    """Return the function that does all blocks of a job of rows."""
    from logitloss._kernels import numba_items, numba_job, numba_lanes, numba_rows

    by_row, by_lane = (NUMBERS[module, "softmax_block", item] for module in ("numba_rows", "numba_lanes"))
    plan_rows, plan_lanes = numba_rows.plan, numba_lanes.plan
    size, width, found_type, page = (
        8 if item == "f64" else 4,
        numba_items.itemsize(item),
        numba_job.FOUND,
        4096,
    )

    @register_jitable
    def run(jobs, row_stride):
        """Return total, number counted, and the first bad row or -1."""
        job, found = jobs[0], np.zeros(1, found_type)
        are_beside = row_stride == width and job.logits.class_stride != width
        block, scratch_bytes = plan_lanes(job.n, job.n_classes, size, width, are_beside)
        by_lanes = scratch_bytes > 0
        if not by_lanes:
            has_lse = job.lse_in.address != 0
            block, keeps, scratch_bytes = plan_rows(job.operation, job.n, job.n_classes, size, width, has_lse)
            job.keeps = 1 if keeps else 0
        job.block = block
        memory = np.empty(scratch_bytes + page, np.uint8)
        scratch = (memory.ctypes.data + page - 1) // page * page
        total, counted, bad = 0.0, 0, -1
        for number in range((job.n + block - 1) // block):
            found[0].total, found[0].counted, found[0].bad = 0.0, 0, -1
            kernel = by_lane if by_lanes else by_row
            run_kernel(kernel, jobs.ctypes.data, number, scratch, found.ctypes.data)
            total += found[0].total
            counted += found[0].counted
            bad = found[0].bad
            if bad >= 0:
                break
        keep(jobs, found, memory)
        return total, counted, bad

    return run


@register_jitable
def _extent(array):
    """Return where an array's memory begins and ends."""
    low, high = array.ctypes.data, array.ctypes.data + array.itemsize
    for axis in range(array.ndim):
        reach = (array.shape[axis] - 1) * array.strides[axis]
        low, high = low + min(0, reach), high + max(0, reach)
    return low, high


@register_jitable
def check_apart(out, array):
    """Refuse an output whose memory reaches into an input's, be it between the input's elements."""
    low, high = _extent(out)
    first, end = _extent(array)
    if out.size > 0 and array.size > 0 and low < end and first < high:
        raise ValueError("out: reaches into the memory of an input, and is not the logits themselves")


@register_jitable
def checked_out(out, logits, target):
    """Return the array for a gradient, which may be the logits' own."""
    if out is None:
        return np.empty(logits.shape, logits.dtype)
    if out.shape != logits.shape:
        raise ValueError("out: expected the logits' shape")
    is_aligned = out.ctypes.data % out.itemsize == 0
    for axis in range(out.ndim):
        is_aligned = is_aligned and out.strides[axis] % out.itemsize == 0
    if not is_aligned:
        raise ValueError("out: expected an array whose elements are aligned")
    if _folds(out):
        raise ValueError("out: expected memory of its own for each element")
    are_same = out.ctypes.data == logits.ctypes.data
    for axis in range(out.ndim):
        are_same = are_same and (out.shape[axis] == 1 or out.strides[axis] == logits.strides[axis])
    if not are_same:
        check_apart(out, logits)
    check_apart(out, target)
    return out
