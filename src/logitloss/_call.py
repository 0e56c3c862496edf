"""The way every loss goes: check the arguments, make the outputs, run one kernel, reduce its total.

`Call` holds what is common to a call with logits, a reduction, threads and a backend; `CrossEntropy` adds
class labels or probabilities with their weights, `Binary` labels element by element. The public functions
differ only in the outputs they ask for. Plain attributes and few calls: of a small batch's time, most is
spent here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from logitloss import _backends, _check, _coefficients
from logitloss._threads import threads_for

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array, Float64, Shape, Value


class Call:
    """Arguments common to all losses, and what becomes of the kernel's total."""

    __slots__ = ("divisor", "inputs", "kernels", "logits", "reduction", "rows", "threads", "total")

    rows: Shape
    # What divides the total: a mean over labels knows it after a pass over them, and is `unweighed` before.
    divisor: float
    # The arrays beside the logits, whose memory no output may share.
    inputs: tuple[Array | None, ...]
    total: float

    def __init__(
        self,
        logits: ArrayLike,
        reduction: str,
        num_threads: int | None,
        backend: str | None,
        name: str = "logits",
        reductions: tuple[str, ...] = _check.REDUCTIONS,
    ) -> None:
        self.kernels = _backends.get(backend)
        if reduction not in reductions:
            raise _check.unknown_reduction(reduction, reductions)
        self.reduction = reduction
        self.logits = _check.floats(name, logits)
        self.threads = threads_for(self.logits.size, num_threads)

    def new_loss(self, out: Array | None) -> Array | None:
        """Return the array of the rows' losses if the reduction is to return them."""
        if self.reduction == "none":
            dtype = _check.result_dtype(self.logits.dtype)
            return _check.output(out, self.rows, dtype, (self.logits, *self.inputs))
        if out is not None:
            raise _check.no_output(self.reduction)
        return None

    def new_grad(self, out: Array | None, *inputs: Array | None) -> Array:
        """Return the array of the gradient, which may be the logits."""
        x = self.logits
        return _check.output(out, x.shape, x.dtype, (*self.inputs, *inputs), in_place=x)

    def scale(self, grad_output: Array | None) -> Array | float:
        """Return what multiplies each row's gradient: an array of the rows' shape, or a number."""
        if grad_output is not None and grad_output.ndim:
            return grad_output
        upstream = 1.0 if grad_output is None else float(grad_output)
        return _coefficients.divided(upstream, self.divisor)

    def upstream(self, grad_output: ArrayLike | None) -> Array | None:
        """Return the upstream gradient: one number, or one for each row's loss if those are returned."""
        if grad_output is None:
            return None
        array = _check.reals("grad_output", grad_output)
        shape = self.rows if self.reduction == "none" and array.ndim else ()
        return _check.same_shape("grad_output", array, shape, "the loss's")

    def value(self, loss: Array | None, out: Array | None = None) -> Value:
        """Return the rows' losses, or the total reduced."""
        if loss is not None:
            return _check.returned(loss, out)
        return np.float64(_coefficients.divided(self.total, self.divisor))


class CrossEntropy(Call):
    """Softmax cross-entropy with class indices (checked by the kernel) or class probabilities (`soft`)."""

    __slots__ = (
        "axis",
        "ignore_index",
        "n_classes",
        "smoothing",
        "soft",
        "target",
        "unweighed",
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
        Call.__init__(self, logits, reduction, num_threads, backend)
        x = self.logits
        self.axis = axis = _check.class_axis("logits", x, axis)
        self.n_classes = n_classes = x.shape[axis]
        self.target, self.soft = _check.labels(target, x, axis)
        self.rows = self.target.shape[:-1] if self.soft else self.target.shape
        self.weight = None if weight is None else _check.class_weight(weight, n_classes)
        self.ignore_index = _check.ignored(ignore_index, self.soft)
        self.smoothing = 0.0 if label_smoothing == 0 else _check.fraction("label_smoothing", label_smoothing)
        self.z_loss = 0.0 if z_loss == 0 else _check.finite("z_loss", z_loss)
        self.inputs = (self.target, self.weight)
        self.unweighed = reduction == "mean" and not self.soft
        self.divisor = x.size // n_classes if self.soft and reduction == "mean" else 1.0

    def weigh_labels(self) -> None:
        """Find the mean's divisor, and any bad label before an output is touched."""
        if not self.soft:
            weight = self.weight if self.unweighed else None
            total, bad = self.kernels.label_weight(
                self.target, weight, self.ignore_index, self.n_classes, self.threads
            )
            self._refuse(bad)
            if self.unweighed:
                self.divisor, self.unweighed = total, False

    def run(
        self,
        loss: Array | None = None,
        lse: Float64 | None = None,
        grad: Array | None = None,
        scale: Array | float = 1.0,
        lse_in: Float64 | None = None,
    ) -> None:
        """Call the kernel: fill the outputs asked for; find the total, and the divisor if unknown."""
        x, axis, n_classes, weight = self.logits, self.axis, self.n_classes, self.weight
        if axis != x.ndim - 1:
            x = _check.axis_last(x, axis)
            grad = None if grad is None else _check.axis_last(grad, axis)
        if not isinstance(scale, float):
            scale = scale.astype(np.float64, copy=False)
        if self.soft:
            keep, spread = 1.0 - self.smoothing, self.smoothing / n_classes
            self.total = self.kernels.soft_cross_entropy(
                x,
                self.target,
                weight,
                keep,
                spread,
                self.z_loss,
                scale,
                lse_in,
                loss,
                lse,
                grad,
                self.threads,
            )
            return
        ignored, target = self.ignore_index, self.target
        beta, gamma = (
            _coefficients.per_class(weight, self.smoothing, n_classes) if self.smoothing else (weight, None)
        )
        self.total, counted, bad = self.kernels.cross_entropy(
            x, target, ignored, beta, gamma, self.z_loss, scale, lse_in, loss, lse, None, grad, self.threads
        )
        self._refuse(bad)
        if self.unweighed and weight is None:
            self.divisor = counted
        elif self.unweighed:
            self.weigh_labels()

    def _refuse(self, bad: int) -> None:
        if bad >= 0:
            raise _check.bad_label(self.target, bad, self.n_classes, self.ignore_index)


class Binary(Call):
    """Binary cross-entropy of logits, element by element; `signed` labels are -1 and +1."""

    __slots__ = ("pos_weight", "signed", "smoothing", "target", "weight")

    def __init__(
        self,
        logits: ArrayLike,
        target: ArrayLike,
        weight: ArrayLike | None,
        pos_weight: ArrayLike | None,
        label_smoothing: float,
        signed: bool,
        reduction: str,
        num_threads: int | None,
        backend: str | None,
    ) -> None:
        Call.__init__(self, logits, reduction, num_threads, backend, "scores" if signed else "logits")
        self.rows = shape = self.logits.shape
        whose = "the scores'" if signed else "the logits'"
        self.target = _check.same_shape("target", _check.reals("target", target), shape, whose)
        self.weight = None if weight is None else _check.broadcast("weight", weight, shape)
        self.pos_weight = None if pos_weight is None else _check.broadcast("pos_weight", pos_weight, shape)
        self.inputs = (self.target, self.weight, self.pos_weight)
        self.signed = signed
        self.smoothing = 0.0 if label_smoothing == 0 else _check.fraction("label_smoothing", label_smoothing)
        self.divisor = self.logits.size if reduction == "mean" else 1.0

    def run(self, loss: Array | None = None, grad: Array | None = None, scale: Array | float = 1.0) -> None:
        """Call the kernel: fill the outputs asked for and find the total."""
        if self.signed and grad is not None and np.may_share_memory(grad, self.logits):
            # A bad label ends the pass half-way, which would leave logits and gradients mixed: look at the
            # labels first.
            self.run()
        self.total, bad = self.kernels.binary_cross_entropy_with_logits(
            self.logits,
            self.target,
            self.weight,
            self.pos_weight,
            self.smoothing,
            self.signed,
            scale,
            loss,
            grad,
            self.threads,
        )
        if bad >= 0:
            raise _check.bad_value("target", self.target, bad, "-1 or +1")

    def only_value(self, out: Array | None) -> Value:
        """Return the loss."""
        loss = self.new_loss(out)
        self.run(loss)
        return self.value(loss, out)

    def only_grad(self, grad_output: ArrayLike | None, out: Array | None) -> Value:
        """Return the gradient."""
        upstream = self.upstream(grad_output)
        grad = self.new_grad(out, upstream)
        self.run(grad=grad, scale=self.scale(upstream))
        return _check.returned(grad, out)

    def value_and_grad(self, out: Array | None) -> tuple[Value, Value]:
        """Return both from one pass."""
        loss, grad = self.new_loss(None), self.new_grad(out)
        self.run(loss, grad, self.scale(None))
        return self.value(loss), _check.returned(grad, out)
