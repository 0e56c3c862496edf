"""The way every loss goes: check the arguments, make the outputs, run one kernel, reduce its total.

`cross_entropy` (class labels or probabilities) and `binary` (labels element by element) go all of it, for
the public functions, which differ only in the results they ask for. The other losses are put together from
the same steps in `categorical` and `binary`. Straight code and few calls: of a small batch's time, most is
spent here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import float64, ndarray

from logitloss import _backends, _check, _coefficients
from logitloss._threads import threads_for

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array, Shape, Value

FAR = 2.0**28


# ---- the steps ----


def start(
    logits: ArrayLike,
    reduction: str,
    num_threads: int | None,
    backend: str | None,
    check: str = "raise",
    name: str = "logits",
    reductions: tuple[str, ...] = _check.REDUCTIONS,
) -> tuple[_backends.Kernels, Array, int]:
    """Return the kernels to use, the logits, and the number of threads."""
    if not isinstance(reduction, str) or reduction not in reductions:
        raise _check.unknown_option("reduction", reduction, reductions)
    if not isinstance(check, str) or check not in _check.CHECKS:
        raise _check.unknown_option("check", check, _check.CHECKS)
    x = _check.floats(name, logits)
    kernels = _backends.get(backend) if type(x) is ndarray else kernels_for(x, backend, check)
    return kernels, x, threads_for(x.size, num_threads)


def kernels_for(logits: Array, backend: str | None, check: str = "raise") -> _backends.Kernels:
    """Return the kernels of that name; those of logits on a device do their work on the caller's stream."""
    if type(logits) is ndarray:
        return _backends.get(backend)
    kernels: _backends.Kernels = _check.call_of(logits).choose(backend, check)
    return kernels


def new_loss(
    reduction: str, rows: Shape, logits: Array, inputs: tuple[Array | None, ...], out: Array | None
) -> Array | None:
    """Return the array of the rows' losses if the reduction is to return them."""
    if reduction == "none":
        return _check.output(out, logits, rows, _check.result_dtype(logits.dtype), inputs)
    if out is not None:
        raise _check.no_output(reduction)
    return None


def value(logits: Array, loss: Array | None, total: Any, divisor: Any, out: Array | None = None) -> Value:
    """Return the rows' losses, or the total reduced."""
    if loss is not None:
        return _check.returned(loss, out)
    if type(logits) is ndarray:
        # most small batches' means come this way: one function call less
        return float64(total / divisor if divisor else _coefficients.divided(total, divisor))
    call = _check.call_of(logits)
    mean: Value = call.returned(call.divided(total, divisor))
    return mean


def checked_upstream(grad_output: ArrayLike, reduction: str, rows: Shape, like: Array) -> Array:
    """Return the upstream gradient: one number, or one for each row's loss if those are returned."""
    array = _check.reals("grad_output", grad_output, like)
    shape = rows if reduction == "none" and array.ndim else ()
    return _check.same_shape("grad_output", array, shape, "the loss's")


def scale_of(upstream: Array | None, divisor: Any, rows: Shape, logits: Array) -> Array | float:
    """Return what multiplies each row's gradient: an array of the rows' shape, or a number."""
    if type(logits) is not ndarray:
        there: Array | float = _check.call_of(logits).scale(upstream, divisor, rows)
        return there
    if upstream is not None and upstream.ndim:
        if divisor == 1:
            return upstream
        with np.errstate(under="ignore"):
            return upstream / float64(divisor)
    return _coefficients.divided(1.0 if upstream is None else float(upstream), divisor)


def is_far(lse: Array) -> bool:
    """Whether one is so large that its rounding shows in float32; NaN is not."""
    return lse.size > 0 and bool(np.fmax.reduce(lse, None) > FAR or np.fmin.reduce(lse, None) < -FAR)


# ---- the whole way ----


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    axis: int | None,
    num_threads: int | None,
    backend: str | None,
    out: Array | None = None,
    *,
    check: str = "raise",
    wants_value: bool = True,
    wants_lse: bool = False,
    wants_grad: bool = False,
    grad_output: ArrayLike | None = None,
    lse: ArrayLike | None = None,
) -> tuple[Any, Any, Any]:
    """Return value, lse and gradient of softmax cross-entropy, None where not wanted.

    `out` is for the gradient, or for the losses where no gradient is wanted.
    """
    kernels, x, threads = start(logits, reduction, num_threads, backend, check)
    on_host = type(x) is ndarray
    axis = _check.class_axis("logits", x, axis)
    n_classes = x.shape[axis]
    labels, soft = _check.labels(target, x, axis)
    rows = labels.shape[:-1] if soft else labels.shape
    weights = None if weight is None else _check.class_weight(weight, n_classes, _check.place_of(weight, x))
    ignored = _check.ignored(ignore_index, soft)
    smoothing = _check.fraction("label_smoothing", label_smoothing)
    z_loss = _check.finite("z_loss", z_loss)
    unit = 1.0
    # A mean without smoothing is made of the labels' own weights, whatever the others are.
    is_of_labels = on_host and weights is not None and reduction == "mean" and not soft and not smoothing
    if type(weights) is ndarray and (on_host or reduction != "none"):
        sizes = _coefficients.SUMMABLE if is_of_labels else _coefficients.weight_range(x.dtype, reduction)
        size = _coefficients.largest(weights, z_loss)
        weights, z_loss, unit = _coefficients.rescaled(weights, z_loss, size, sizes)
    if type(weights) is ndarray and not on_host:
        weights = _check.class_weight(weights, n_classes, x)
    upstream = None if grad_output is None else checked_upstream(grad_output, reduction, rows, x)
    lse_in = None if lse is None else _check.lse(lse, rows, x)

    loss = lse_out = grad = None
    if wants_value:
        loss = new_loss(reduction, rows, x, (labels, weights), None if wants_grad else out)
    if wants_lse:
        lse_out = _check.empty(x, rows, float64)
    if wants_grad:
        inputs = (labels, weights, upstream, lse_in)
        grad = _check.output(out, x, x.shape, x.dtype, inputs, in_place=True)
        if lse_in is not None and (x.dtype == float64 or (on_host and is_far(lse_in))):
            # exp(x - lse) is wrong by the rounding of lse: 5000 ulp of float64 at an offset of 10000, and of
            # float32 where all of a row is masked by the lowest number.
            lse_in = None

    # The labels that count, or the sum of their weights, divide the mean; the gradient needs it first, and no
    # bad label may be found once an output is touched; on a device that would be one more wait.
    divisor: Any = 1.0 / unit
    if soft and reduction == "mean":
        divisor = x.size // n_classes / unit
    elif is_of_labels or (wants_grad and not soft and (on_host or reduction == "mean")):
        mean_weights = weights if reduction == "mean" else None
        label_weight, bad = kernels.label_weight(labels, mean_weights, ignored, n_classes, threads)
        if bad >= 0:
            raise _check.bad_label(labels, bad, n_classes, ignored)
        if reduction == "mean":
            divisor = label_weight
        if is_of_labels and weights is not None and labels.size:
            sizes, size = _coefficients.weight_range(x.dtype), max(divisor / labels.size, abs(z_loss))
            weights, z_loss, unit = _coefficients.rescaled(weights, z_loss, size, sizes)
            divisor /= unit

    scale: Array | float = 1.0
    factor: _check.Float64 | None = None
    if wants_grad:
        scale = scale_of(upstream, divisor, rows, x)
        if on_host and not isinstance(scale, float):
            scale = scale.astype(float64, copy=False)
        if on_host:
            scale, factor = _coefficients.ordinary(scale, x.dtype)
    x_rows, grad_rows = x, grad
    if axis != x.ndim - 1:
        x_rows = _check.axis_last(x, axis)
        grad_rows = None if grad is None else _check.axis_last(grad, axis)
    if soft:
        keep, spread = 1.0 - smoothing, smoothing / n_classes
        total = kernels.soft_cross_entropy(
            x_rows, labels, weights, keep, spread, z_loss, scale, lse_in, loss, lse_out, grad_rows, threads
        )
    else:
        beta, gamma = weights, None
        if smoothing and on_host:
            beta, gamma = _coefficients.per_class(weights, smoothing, n_classes)
        elif smoothing:
            beta, gamma = _check.call_of(x).per_class(
                weights, smoothing, n_classes, _check.result_dtype(x.dtype)
            )
        total, counted, bad = kernels.cross_entropy(
            x_rows,
            labels,
            ignored,
            beta,
            gamma,
            z_loss,
            scale,
            lse_in,
            loss,
            lse_out,
            None,
            grad_rows,
            threads,
        )
        if bad >= 0:
            raise _check.bad_label(labels, bad, n_classes, ignored)
        if reduction == "mean" and not wants_grad and not is_of_labels:
            divisor = counted
            if weights is not None:
                divisor, _ = kernels.label_weight(labels, weights, ignored, n_classes, threads)
    if factor is not None and grad_rows is not None:
        _coefficients.multiply(grad_rows, factor[..., None])
    if loss is not None and unit != 1:
        _coefficients.multiply(loss, unit)
    result = value(x, loss, total, divisor, out) if wants_value else None
    if lse_out is not None:
        return result, _check.returned(lse_out, None), grad
    return result, None, grad if on_host or grad is None else _check.theirs(grad)


def binary(
    logits: ArrayLike,
    target: ArrayLike,
    weight: ArrayLike | None,
    pos_weight: ArrayLike | None,
    label_smoothing: float,
    signed: bool,
    reduction: str,
    num_threads: int | None,
    backend: str | None,
    out: Array | None = None,
    *,
    check: str = "raise",
    wants_value: bool = True,
    wants_grad: bool = False,
    grad_output: ArrayLike | None = None,
) -> tuple[Any, Any]:
    """Return value and gradient of binary cross-entropy of logits, None where not wanted.

    `signed` labels are -1 and +1. `out` is for the gradient, or for the losses where no gradient is wanted.
    """
    name = "scores" if signed else "logits"
    kernels, x, threads = start(logits, reduction, num_threads, backend, check, name)
    shape = x.shape
    labels = _check.same_shape("target", _check.reals("target", target, x), shape, f"the {name}'")
    weights = None if weight is None else _check.broadcast("weight", weight, x)
    positive = None if pos_weight is None else _check.broadcast("pos_weight", pos_weight, x)
    smoothing = _check.fraction("label_smoothing", label_smoothing)
    upstream = None if grad_output is None else checked_upstream(grad_output, reduction, shape, x)

    loss = grad = None
    inputs = (labels, weights, positive)
    if wants_value:
        loss = new_loss(reduction, shape, x, inputs, None if wants_grad else out)
    if wants_grad:
        grad = _check.output(out, x, shape, x.dtype, (*inputs, upstream), in_place=True)

    divisor = x.size if reduction == "mean" else 1.0
    scale, factor = scale_of(upstream, divisor, shape, x), None
    if wants_grad and type(x) is ndarray and (isinstance(scale, float) or scale.dtype == float64):
        scale, factor = _coefficients.ordinary(scale, x.dtype)

    outputs: tuple[tuple[Array | None, Array | None], ...] = ((loss, grad),)
    if signed and grad is not None and type(x) is ndarray and np.may_share_memory(grad, x):
        # A bad label ends the pass half-way, which would leave logits and gradients mixed: look at the labels
        # first; on a device that would be one more wait.
        outputs = ((None, None), (loss, grad))
    for loss_out, grad_out in outputs:
        total, bad = kernels.binary_cross_entropy_with_logits(
            x, labels, weights, positive, smoothing, signed, scale, loss_out, grad_out, threads
        )
        if bad >= 0:
            raise _check.bad_value("target", labels, bad, "-1 or +1")
    if factor is not None and grad is not None:
        _coefficients.multiply(grad, factor)
    result = value(x, loss, total, divisor, None if wants_grad else out) if wants_value else None
    return result, None if grad is None else _check.returned(grad, out)
