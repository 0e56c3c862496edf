"""The losses inside functions that Numba compiles: found by its `numba_extensions` entry point.

Each overload describes its arrays as the Numba backend does, in compiled code, and runs that backend's
kernels block after block on the thread that called it: so a user's own `prange` is the only team. Parameters
are those of the public function; axis and reduction must be known when the function is compiled.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import intrinsic, overload, register_jitable

import logitloss

if TYPE_CHECKING:
    from collections.abc import Callable

_REALS = {types.float16: "f16", types.float32: "f32", types.float64: "f64"}
_LABEL_WEIGHT = ("numba_labels", "label_weight", "f32")
_KERNELS = (
    *(("numba_rows", "softmax_block", item) for item in _REALS.values()),
    *(("numba_lanes", "softmax_block", item) for item in _REALS.values()),
    *(("numba_elements", name, item) for name in ("bce", "bce_fused") for item in ("f32", "f64")),
    _LABEL_WEIGHT,
)


# ---- kernels by their address ----

# Compiled code refers to the kernels by a table, which it finds by name: so it can be kept on disk, and
# nothing of a kernel is compiled into it. An entry is 0 until the kernel is asked for.
_NUMBERS = {kernel: number for number, kernel in enumerate(_KERNELS)}
_TABLE, _TABLE_NAME, _LOADER_NAME = np.zeros(len(_NUMBERS), np.int64), "logitloss_kernels", "logitloss_load"


def _load_kernel(number: int) -> int:
    """Fill in an entry, compiling the kernel or loading it from the disk."""
    from logitloss._kernels import numba_cpu

    _TABLE[number] = numba_cpu.kernel(*_KERNELS[number]).address
    return int(_TABLE[number])


_loader = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_load_kernel)


def register() -> None:
    """Make the table known to compiled code; to import this file makes the functions known to Numba."""
    llvm.add_symbol(_TABLE_NAME, _TABLE.ctypes.data)
    llvm.add_symbol(_LOADER_NAME, ctypes.cast(_loader, ctypes.c_void_p).value)


register()


@intrinsic
def _run_kernel(typingctx: Any, number: Any, job: Any, block: Any, scratch: Any, found: Any) -> Any:
    """Run a kernel by its number."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        table = cgutils.add_global_variable(builder.module, ir.ArrayType(integer, len(_NUMBERS)), _TABLE_NAME)
        load = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(integer, [integer]), _LOADER_NAME
        )
        address = cgutils.alloca_once_value(
            builder, builder.load(builder.gep(table, [integer(0), args[0]], inbounds=True))
        )
        is_new = builder.icmp_unsigned("==", builder.load(address), integer(0))
        with builder.if_then(is_new, likely=False):
            builder.store(builder.call(load, [args[0]]), address)
        kernel = ir.FunctionType(ir.VoidType(), [integer] * 4)
        builder.call(builder.inttoptr(builder.load(address), kernel.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


# ---- what is known when a function is compiled ----


def _constant(name: str, given: Any, default: object) -> Any:
    if isinstance(given, types.Omitted):
        return given.value
    if isinstance(given, types.Literal):
        return given.literal_value
    if given == types.none:
        return None
    if isinstance(given, types.Type):
        raise TypingError(f"{name} is of type {given}: expected a constant, like {default!r}")
    return given


def _is_none(given: Any) -> bool:
    return given is None or given == types.none or (isinstance(given, types.Omitted) and given.value is None)


def _refuse(**given: Any) -> None:
    for name, value in given.items():
        if not _is_none(value):
            raise TypingError(f"{name} is of type {value}: expected None in a compiled function")


def _item(name: str, array: Any) -> str:
    if not isinstance(array, types.Array) or array.dtype not in _REALS or not array.aligned:
        raise TypingError(f"{name} of type {array}: expected an array of float16, float32 or float64")
    return _REALS[array.dtype]


def _kind(name: str, array: Any) -> int:
    from logitloss._kernels.numba_items import ITEMS

    number: Any = array.dtype if isinstance(array, types.Array) and array.aligned else None
    if number in _REALS:
        item = _REALS[number]
    elif isinstance(number, types.Boolean):
        item = "bool"
    elif isinstance(number, types.Integer):
        signed: Any = number
        item = f"{'i' if signed.signed else 'u'}{signed.bitwidth}"
    else:
        raise TypingError(f"{name} of type {array}: expected an array of numbers")
    return int(ITEMS.index(item))


def _reduction(given: Any) -> str:
    reduction = _constant("reduction", given, "mean")
    if reduction not in ("none", "mean", "sum"):
        raise TypingError(f"reduction is {reduction!r}: expected one of none, mean, sum")
    return str(reduction)


def _class_axis(given: Any, ndim: int, default: int) -> int:
    axis = _constant("axis", given, default)
    axis = default if axis is None else axis
    if not -ndim <= axis < ndim:
        raise TypingError(f"axis is {axis}: expected {-ndim} <= axis < {ndim}")
    return int(axis) % ndim


# ---- what compiled functions are made of ----


@register_jitable
def _keep(*arrays):
    """Keep arrays alive up to here, of which only addresses are used before."""


@register_jitable
def _describe(view, array, kind, class_axis, axes):
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
def _is_shape_without(shape, axis, rows):
    """Whether `rows` is `shape` without an axis."""
    are_same = True
    for i in range(len(rows)):
        are_same = are_same and rows[i] == shape[i + (i >= axis)]
    return are_same


@register_jitable
def _divided(total, divisor):
    return total / divisor if divisor else (np.nan if total == 0 or total != total else total * np.inf)


def _softmax_runner(item: str) -> Callable[..., Any]:
    """Return the function that does all blocks of a job of rows."""
    from logitloss._kernels import numba_items, numba_job, numba_lanes, numba_rows

    by_row, by_lane = (_NUMBERS[module, "softmax_block", item] for module in ("numba_rows", "numba_lanes"))
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
            _run_kernel(kernel, jobs.ctypes.data, number, scratch, found.ctypes.data)
            total += found[0].total
            counted += found[0].counted
            bad = found[0].bad
            if bad >= 0:
                break
        _keep(jobs, found, memory)
        return total, counted, bad

    return run


# ---- cross-entropy ----


def _cross_entropy(item: str, target: Any, ndim: int, axis: int, reduction: str, wants_grad: bool) -> Any:
    """Return the compiled function's body: value, or value and gradient."""
    from logitloss._kernels import numba_job
    from logitloss._kernels.numba_items import ITEMS

    run, job_type, kind = _softmax_runner(item), numba_job.JOB, ITEMS.index(item)
    label_weight, label_block = _NUMBERS[_LABEL_WEIGHT], 4096
    is_label = isinstance(target, types.Integer)
    is_soft = not is_label and isinstance(target.dtype, types.Float)
    target_kind = ITEMS.index("i64") if is_label else _kind("target", target)
    real: Any = np.float64 if item == "f64" else np.float32
    f64, real_kind = ITEMS.index("f64"), ITEMS.index("f64" if item == "f64" else "f32")
    operation = numba_job.GRADIENT if wants_grad else numba_job.NOTHING
    kinds = numba_job.PROBABILITIES if is_soft else numba_job.LABELS
    means, none = reduction == "mean", reduction == "none"
    found_type = numba_job.FOUND

    @register_jitable
    def labels_of(target):
        return np.full(1, target, np.int64) if is_label else target

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
        labels = labels_of(target)
        if is_soft:
            if labels.shape != logits.shape:
                raise ValueError("target: expected the logits' shape for class probabilities")
        elif not is_label and not _is_shape_without(logits.shape, axis, labels.shape):
            raise ValueError("target: expected the logits' shape without the class axis")
        jobs, axes = np.zeros(1, job_type), np.zeros((6, 2 * ndim + 2), np.int64)
        job = jobs[0]
        job.operation, job.target_kind, job.ignore_index = operation, kinds, ignore_index
        job.n, job.n_classes, job.z_loss = logits.size // n_classes, n_classes, z_loss
        row_stride = _describe(job.logits, logits, kind, axis, axes[0])
        _describe(job.target, labels, target_kind, axis if is_soft else -1, axes[1])
        weights = weights_of(weight, n_classes)
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
                job.gamma_sum, gamma = coefficients.sum(), coefficients.astype(real)
                job.gamma = gamma.ctypes.data
        divisor = 1.0
        if means and is_soft:
            divisor = np.float64(job.n)
        elif means and (wants_grad or weight is not None):
            found, kept, divisor = np.zeros(1, found_type), job.beta, 0.0
            job.beta, job.block = weights.ctypes.data if weight is not None else 0, label_block
            for number in range((job.n + label_block - 1) // label_block):
                found[0].total, found[0].bad = 0.0, -1
                _run_kernel(label_weight, jobs.ctypes.data, number, 0, found.ctypes.data)
                divisor += found[0].total
                if found[0].bad >= 0:
                    _raise_label(labels, found[0].bad, n_classes, ignore_index)
            job.beta = kept
        loss = np.empty(job.n if none else 0, real)
        if none:
            _describe(job.loss, loss, real_kind, -1, axes[2])
        scale = np.empty(0)
        if wants_grad:
            if out.shape != logits.shape:
                raise ValueError("out: expected the logits' shape")
            _describe(job.out, out, kind, axis, axes[3])
            if means:
                scale = np.full(1, _divided(1.0, divisor))
                _describe(job.scale, scale, f64, -1, axes[4])
        total, counted, bad = run(jobs, row_stride)
        if bad >= 0:
            _raise_label(labels, bad, n_classes, ignore_index)
        if means and not is_soft and not wants_grad and weight is None:
            divisor = np.float64(counted)
        _keep(jobs, axes, logits, labels, weights, beta, gamma, scale, out)
        return total, divisor, loss

    return register_jitable(body)


@register_jitable
def _raise_label(labels, row, n_classes, ignore_index):
    label = labels.flat[row]
    raise IndexError(
        f"target, row {row}, is {label}, but logits have {n_classes} classes: "
        f"expected 0 <= target < {n_classes} or ignore_index={ignore_index}"
    )


def _value_of(target: Any, ndim: int, axis: int, reduction: str) -> Callable[..., Any]:
    """Return the function that makes the value of total, divisor and the rows' losses."""
    if reduction != "none":
        return register_jitable(lambda logits, found: _divided(found[0], found[1]))
    if ndim == 1:
        return register_jitable(lambda logits, found: found[2][0])

    def losses(logits, found):
        rows = logits.shape[1:]
        for i in range(axis):
            rows = tuple_setitem(rows, i, logits.shape[i])
        return found[2].reshape(rows)

    return register_jitable(losses)


@register_jitable
def _output(out, like):
    return np.empty(like.shape, like.dtype) if out is None else out


def _shared(logits: Any, target: Any, axis: Any, reduction: Any, wants_grad: bool) -> tuple[Any, Any]:
    item, ndim = _item("logits", logits), logits.ndim
    at, by = _class_axis(axis, ndim, 1 if ndim > 1 else 0), _reduction(reduction)
    if not isinstance(target, types.Integer) and not isinstance(target, types.Array):
        raise TypingError(f"target of type {target}: expected an array, or an integer for one row")
    body = _cross_entropy(item, target, ndim, at, by, wants_grad)
    return body, _value_of(target, ndim, at, by)


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
    _refuse(out=out, num_threads=num_threads, backend=backend)
    body, value_of = _shared(logits, target, axis, reduction, wants_grad=False)

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
    _refuse(num_threads=num_threads, backend=backend)
    body, value_of = _shared(logits, target, axis, reduction, wants_grad=True)

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
        grad = _output(out, logits)
        found = body(logits, target, weight, ignore_index, label_smoothing, z_loss, grad)
        return value_of(logits, found), grad

    return compiled


# ---- activations ----


def _activation(item: str, ndim: int, axis: int, operation: int) -> Callable[..., Any]:
    from logitloss._kernels import numba_job
    from logitloss._kernels.numba_items import ITEMS

    run, job_type, kind, no_target = (
        _softmax_runner(item),
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
        row_stride = _describe(job.logits, logits, kind, axis, axes[0])
        if output == "out":
            _describe(job.out, out, out_kind, axis, axes[1])
        else:
            _describe(job.lse, out, out_kind, -1, axes[1])
        run(jobs, row_stride)
        _keep(jobs, axes, logits, out)

    return body


@overload(logitloss.softmax, strict=False, prefer_literal=True)
def _softmax(logits, axis=-1, out=None, num_threads=None, backend=None):
    from logitloss._kernels.numba_job import SOFTMAX

    _refuse(num_threads=num_threads, backend=backend)
    body = _activation(_item("logits", logits), logits.ndim, _class_axis(axis, logits.ndim, -1), SOFTMAX)

    def compiled(logits, axis=-1, out=None, num_threads=None, backend=None):
        result = _output(out, logits)
        if result.shape != logits.shape:
            raise ValueError("out: expected the logits' shape")
        body(logits, result)
        return result

    return compiled


@overload(logitloss.logsumexp, strict=False, prefer_literal=True)
def _logsumexp(logits, axis=-1, keepdims=False, out=None, num_threads=None, backend=None):
    from logitloss._kernels.numba_job import NOTHING

    _refuse(out=out, num_threads=num_threads, backend=backend)
    item, ndim = _item("logits", logits), logits.ndim
    if _constant("keepdims", keepdims, False):
        raise TypingError("keepdims is True: expected False in a compiled function")
    at = _class_axis(axis, ndim, -1)
    body, value_of = _activation(item, ndim, at, NOTHING), _value_of(None, ndim, at, "none")
    real: Any = np.float64 if item == "f64" else np.float32

    def compiled(logits, axis=-1, keepdims=False, out=None, num_threads=None, backend=None):
        lse = np.empty(logits.size // max(1, logits.shape[at]), real)
        body(logits, lse)
        return value_of(logits, (0.0, 1.0, lse))

    return compiled


# ---- binary cross-entropy ----


def _binary(logits: Any, target: Any, reduction: Any, wants_grad: bool) -> Callable[..., Any]:
    from logitloss._kernels import numba_elements, numba_items, numba_job

    item, by = _item("logits", logits), _reduction(reduction)
    ndim, kind, target_kind = logits.ndim, numba_items.ITEMS.index(item), _kind("target", target)
    # In double where the target is, as the Numba backend does
    is_double = types.float64 in (logits.dtype, target.dtype)
    block = _NUMBERS["numba_elements", "bce_fused" if wants_grad else "bce", "f64" if is_double else "f32"]
    plan, size = numba_elements.plan, 8 if is_double else 4
    job_type, found_type, operation = numba_job.JOB, numba_job.FOUND, numba_job.BCE_WITH_LOGITS
    real: Any = np.float64 if item == "f64" else np.float32
    f64, real_kind = (
        numba_items.ITEMS.index("f64"),
        numba_items.ITEMS.index("f64" if item == "f64" else "f32"),
    )
    means, none = by == "mean", by == "none"

    def kind_of(weight: Any) -> int:
        return 0 if _is_none(weight) else _kind("weight", weight)

    def body(logits, target, weight, pos_weight, label_smoothing, out):
        if target.shape != logits.shape:
            raise ValueError("target: expected the logits' shape")
        if not 0 <= label_smoothing <= 1:
            raise ValueError("label_smoothing: expected 0 <= label_smoothing <= 1")
        jobs, axes = np.zeros(1, job_type), np.zeros((7, 2 * ndim + 2), np.int64)
        job, found = jobs[0], np.zeros(1, found_type)
        job.operation, job.n, job.label_smoothing = operation, logits.size, label_smoothing
        _describe(job.logits, logits, kind, -1, axes[0])
        _describe(job.target, target, target_kind, -1, axes[1])
        divisor = np.float64(logits.size) if means else 1.0
        scale, loss = (
            np.full(1, _divided(1.0, divisor)),
            np.empty(logits.size if none else 0, real),
        )
        weights, positives = np.empty(0), np.empty(0)
        if weight is not None:
            weights = np.broadcast_to(np.asarray(weight), logits.shape).astype(np.float64).ravel()
            _describe(job.weight, weights, f64, -1, axes[2])
        if pos_weight is not None:
            positives = np.broadcast_to(np.asarray(pos_weight), logits.shape).astype(np.float64).ravel()
            _describe(job.pos_weight, positives, f64, -1, axes[3])
        if none:
            _describe(job.loss, loss, real_kind, -1, axes[4])
        if wants_grad:
            if out.shape != logits.shape:
                raise ValueError("out: expected the logits' shape")
            _describe(job.out, out, kind, -1, axes[5])
            if means:
                _describe(job.scale, scale, f64, -1, axes[6])
        block_size, scratch_bytes = plan(size)
        job.block = block_size
        memory, total = np.empty(scratch_bytes + 4096, np.uint8), 0.0
        scratch = (memory.ctypes.data + 4095) // 4096 * 4096
        for number in range((job.n + job.block - 1) // job.block):
            found[0].total, found[0].counted, found[0].bad = 0.0, 0, -1
            _run_kernel(block, jobs.ctypes.data, number, scratch, found.ctypes.data)
            total += found[0].total
        _keep(jobs, axes, found, memory, logits, target, weights, positives, scale, out)
        return total, divisor, loss

    return register_jitable(body)


def _binary_value_of(reduction: str) -> Callable[..., Any]:
    if reduction == "none":
        return register_jitable(lambda logits, found: found[2].reshape(logits.shape))
    return register_jitable(lambda logits, found: _divided(found[0], found[1]))


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
    _refuse(out=out, num_threads=num_threads, backend=backend)
    body = _binary(logits, target, reduction, wants_grad=False)
    value_of = _binary_value_of(_reduction(reduction))

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
    _refuse(num_threads=num_threads, backend=backend)
    body = _binary(logits, target, reduction, wants_grad=True)
    value_of = _binary_value_of(_reduction(reduction))

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
        grad = _output(out, logits)
        return value_of(logits, body(logits, target, weight, pos_weight, label_smoothing, grad)), grad

    return compiled
