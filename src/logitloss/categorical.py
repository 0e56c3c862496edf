"""Losses of one class among many: softmax cross-entropy and its gradient.

Every function goes the same way: `_CrossEntropy` checks the arguments and turns them into what the kernels take, one
kernel call fills the outputs asked for, and the total is reduced. What a kernel computes stands in
`logitloss._kernels`, the rules for arguments in `_check`, the coefficients in `_coefficients`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from logitloss import _backends, _check, _coefficients
from logitloss._threads import threads_for

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array, Float64


class _CrossEntropy:
    """One call of cross-entropy: its checked arguments, and the total once `run` has filled the outputs."""

    __slots__ = (
        "axis",
        "divisor",
        "ignore_index",
        "kernels",
        "logits",
        "n_classes",
        "reduction",
        "rows",
        "smoothing",
        "soft",
        "target",
        "threads",
        "total",
        "weight",
        "z_loss",
    )

    def __init__(
        self,
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
    ) -> None:
        self.kernels = _backends.get(backend)
        self.reduction = _check.reduction(reduction)
        self.logits = x = _check.floats("logits", logits)
        self.axis = axis = _check.class_axis("logits", x, axis)
        self.target, self.soft = _check.labels(target, x, axis)
        self.rows = self.target.shape[:-1] if self.soft else self.target.shape
        self.n_classes = x.shape[axis]
        self.weight = None if weight is None else _check.class_weight(weight, self.n_classes)
        self.ignore_index = _check.ignored(ignore_index, self.soft)
        self.smoothing = label_smoothing and _check.fraction("label_smoothing", label_smoothing)
        self.z_loss = _check.finite("z_loss", z_loss) if z_loss else 0.0
        self.threads = threads_for(x.size, num_threads)
        # What `mean` divides by. Where it takes the labels' weights, it is known after a pass over them.
        self.divisor: float | None = None if reduction == "mean" else 1.0
        if self.divisor is None and self.soft:
            self.divisor = x.size // self.n_classes

    def inputs(self) -> tuple[Array | None, ...]:
        return self.target, self.weight

    def new_loss(self, out: Array | None) -> Array | None:
        """Return the array of the rows' losses, if the reduction is to return them."""
        if self.reduction == "none":
            dtype = _check.result_dtype(self.logits.dtype)
            return _check.output(out, self.rows, dtype, (self.logits, self.target, self.weight))
        if out is not None:
            _check.no_output(self.reduction)
        return None

    def new_grad(self, out: Array | None) -> Array:
        x = self.logits
        return _check.output(out, x.shape, x.dtype, (self.target, self.weight), in_place=x)

    def new_lse(self) -> Float64:
        return np.empty(self.rows, np.float64)

    def weigh_labels(self) -> None:
        """Find the divisor, and any bad label before an output is touched."""
        if not self.soft:
            weight = self.weight if self.reduction == "mean" else None
            counted, bad = self.kernels.label_weight(
                self.target, weight, self.ignore_index, self.n_classes, self.threads
            )
            self._refuse(bad)
            if self.divisor is None:
                self.divisor = counted

    def scale(self, grad_output: ArrayLike | None) -> Float64 | None:
        assert self.divisor is not None
        scale = _coefficients.scale(grad_output, self.reduction, self.divisor, self.rows)
        return None if scale is None else scale.astype(np.float64, copy=False)

    def run(
        self,
        loss: Array | None = None,
        lse: Float64 | None = None,
        grad: Array | None = None,
        scale: Float64 | None = None,
        lse_in: Float64 | None = None,
    ) -> None:
        """Call the kernel: fill the outputs asked for."""
        x = _check.axis_last(self.logits, self.axis)
        if grad is not None:
            grad = _check.axis_last(grad, self.axis)
        if self.soft:
            keep, spread = 1.0 - self.smoothing, self.smoothing / self.n_classes
            self.total = self.kernels.soft_cross_entropy(
                x, self.target, self.weight, keep, spread, self.z_loss, scale, lse_in, loss, lse, grad, self.threads
            )
            return
        beta, gamma = _coefficients.per_class(self.weight, self.smoothing, self.n_classes)
        self.total, counted, bad = self.kernels.cross_entropy(
            x,
            self.target,
            self.ignore_index,
            beta,
            gamma,
            self.z_loss,
            scale,
            lse_in,
            loss,
            lse,
            None,
            grad,
            self.threads,
        )
        self._refuse(bad)
        if self.divisor is None and self.weight is None:
            self.divisor = counted

    def value(self, loss: Array | None) -> np.float64 | Array:
        """Return the rows' losses, or the total reduced."""
        if loss is not None:
            return loss if loss.ndim else loss[()]
        if self.divisor is None:
            self.weigh_labels()
            assert self.divisor is not None
        return np.float64(_coefficients.divided(self.total, self.divisor))

    def _refuse(self, bad: int) -> None:
        if bad >= 0:
            raise _check.bad_label(self.target, bad, self.n_classes, self.ignore_index)


def cross_entropy(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    axis: int | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> np.float64 | Array:
    """Compute the cross-entropy of logits against labels or class probabilities."""
    call = _CrossEntropy(
        logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, axis, num_threads, backend
    )
    loss = call.new_loss(out)
    call.run(loss)
    return call.value(loss)


def cross_entropy_and_lse(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    axis: int | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[np.float64 | Array, np.float64 | Float64]:
    """Compute the cross-entropy and the rows' logsumexp in one pass."""
    call = _CrossEntropy(
        logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, axis, num_threads, backend
    )
    loss, lse = call.new_loss(None), call.new_lse()
    call.run(loss, lse)
    return call.value(loss), lse if lse.ndim else lse[()]


def cross_entropy_grad(
    logits: ArrayLike,
    target: ArrayLike,
    grad_output: ArrayLike | None = None,
    *,
    lse: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    axis: int | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Array:
    """Compute the gradient of `cross_entropy` with respect to the logits."""
    call = _CrossEntropy(
        logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, axis, num_threads, backend
    )
    lse_in = None if lse is None else _check.lse(lse, call.rows)
    grad = call.new_grad(out)
    call.weigh_labels()
    call.run(grad=grad, scale=call.scale(grad_output), lse_in=lse_in)
    return grad


def cross_entropy_value_and_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    axis: int | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[np.float64 | Array, Array]:
    """Compute `cross_entropy` and its gradient with one read of the logits and one write of the gradient."""
    call = _CrossEntropy(
        logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, axis, num_threads, backend
    )
    loss, grad = call.new_loss(None), call.new_grad(out)
    call.weigh_labels()
    call.run(loss, grad=grad, scale=call.scale(None))
    return call.value(loss), grad
