"""Losses of one class among many: cross-entropy and its gradient, NLL, Kullback-Leibler divergence, entropy.

Each function checks its arguments and asks a kernel for the outputs it returns; `_call` is the way all of
them go, `logitloss._kernels` says what a kernel computes, the docstrings say what a caller gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from logitloss import _call, _check

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array, Value


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
    check: str = "raise",
) -> Value:
    r"""Compute the cross-entropy of logits against class labels or class probabilities.

    With :math:`\ell_c = \mathrm{lse}(x) - x_c`, the cost of class c in nats, a label y costs
    :math:`(1-\epsilon) w_y \ell_y + \frac{\epsilon}{C} \sum_c w_c \ell_c + z\,\mathrm{lse}(x)^2` and class
    probabilities t cost :math:`\sum_c w_c ((1-\epsilon) t_c + \frac{\epsilon}{C}) \ell_c +
    z\,\mathrm{lse}(x)^2`.

    Parameters
    ----------
    logits : array_like, shape (C,), (N, C) or (N, C, d1, ...)
        float16, bfloat16, float32 or float64; may be read-only, memory-mapped or strided, or lie on a CUDA
        device (see Notes). Never written, never copied.
    target : array_like
        Class labels: any integer dtype, the logits' shape without the class axis, values in [0, C) or
        `ignore_index`. Or class probabilities: any of the logits' dtypes and their shape; a row need not sum
        to 1.
    weight : array_like, shape (C,), optional
        Weight of each class.
    ignore_index : int
        Rows with this label have loss 0 and gradient 0 whatever they hold.
    label_smoothing : float
        Share of the target spread evenly over the classes, in [0, 1].
    z_loss : float
        Factor of `lse**2`, which keeps the logits from drifting.
    reduction : {"mean", "sum", "none"}
        The mean divides by the sum of the weights of the labels that count; with class probabilities, by the
        number of rows.
    axis : int, optional
        Where the classes are: by default 1, or 0 if there is one axis. Language-model logits (B, T, V) take
        -1.
    out : ndarray, optional
        Array for the losses of ``reduction="none"``.
    num_threads : int, optional
        Threads to use; the result does not depend on it. See `set_num_threads`.
    backend : str, optional
        One of `backends`, by default "cython", or "cuda" where the logits lie on a CUDA device.
    check : {"raise", "deferred"}
        On a device, whether to wait until all labels are seen to be good, or to leave that to
        `raise_deferred`. On the host a bad label always raises.

    Returns
    -------
    numpy.float64 or ndarray
        The mean or sum in nats, accumulated in float64. For "none" the losses of the rows: float32, or
        float64 for float64 logits. Of logits on a device, an array of their kind.

    Raises
    ------
    TypeError, ValueError
        For a dtype; for a shape or a value.
    IndexError
        If a label is out of range: names the first such row.
    ImportError
        If the backend is missing: says how to get it.

    See Also
    --------
    cross_entropy_value_and_grad, cross_entropy_and_lse, nll_loss

    Notes
    -----
    One pass over the logits. The largest logit is left out of the sum of the others' exponentials, so that a
    loss near 0 keeps its relative precision. Where a coefficient is 0 its term is 0, at infinite logits too.
    Labels of integers are told from probabilities by dtype alone.

    Logits that carry ``__cuda_array_interface__`` or DLPack and lie on a CUDA device (CuPy, PyTorch, JAX,
    Numba) are taken there, on the caller's current stream. The other arrays must lie there too, except that
    class weights, and single numbers, may come from the host; but for float64 logits, what of weights there
    is beside the largest is float32's. Results are arrays of the logits' kind, of no axes for a mean or sum;
    nothing is copied to the host but the number of the first bad row, for which ``check="raise"`` waits. With
    a bad label, `out` is unspecified.

    Follows ``torch.nn.functional.cross_entropy`` except in the cases that README lists; the z-loss is that of
    Chowdhery et al., "PaLM" (2022), section 5.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import cross_entropy
    >>> logits = np.array([[0.1234, 0.5555, 0.3211]] * 3)
    >>> print(cross_entropy(logits, [0, 1, 2]).round(4))
    1.1142
    """
    value: Value
    value, _, _ = _call.cross_entropy(
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        axis,
        num_threads,
        backend,
        out,
        check=check,
    )
    return value


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
    check: str = "raise",
) -> tuple[Value, Value]:
    r"""Compute the cross-entropy and the rows' logsumexp in one pass.

    The loss is that of `cross_entropy`; :math:`\mathrm{lse}(x) = \log \sum_c e^{x_c}`.

    Parameters
    ----------
    logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, axis, num_threads, backend
        As in `cross_entropy`.
    check
        As in `cross_entropy`.

    Returns
    -------
    loss : numpy.float64 or ndarray
        As from `cross_entropy`.
    lse : numpy.float64 or ndarray of float64
        One number per row, in nats, also for ignored rows.

    Raises
    ------
    TypeError, ValueError, IndexError, ImportError
        As in `cross_entropy`.

    Notes
    -----
    `cross_entropy_grad` takes the lse and is then spared a pass. It is float64 because rounded
    to float32 it would spoil the gradient of logits with a large common offset.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import cross_entropy_and_lse
    >>> loss, lse = cross_entropy_and_lse(np.zeros((2, 4)), [0, 3])
    >>> print(lse.round(4))
    [1.3863 1.3863]
    """
    value, lse, _ = _call.cross_entropy(
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        axis,
        num_threads,
        backend,
        check=check,
        wants_lse=True,
    )
    return value, lse


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
    check: str = "raise",
) -> Array:
    r"""Compute the gradient of `cross_entropy` with respect to the logits.

    With :math:`g_c` what multiplies :math:`\ell_c` in the loss of a row and :math:`p = \mathrm{softmax}(x)`,
    the row's gradient is :math:`p_c (\sum_k g_k + 2 z\,\mathrm{lse}(x)) - g_c`; for a plain label, softmax
    minus target.

    Parameters
    ----------
    logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, axis, num_threads, backend
        As in `cross_entropy`.
    check
        As in `cross_entropy`.
    grad_output : array_like, optional
        Upstream gradient, by default 1: a number, or for ``reduction="none"`` also one for each row.
    lse : array_like of float64, optional
        The rows' logsumexp from `cross_entropy_and_lse`: saves a pass over logits of less than float64.
    out : ndarray, optional
        Array for the gradient, of the logits' dtype and shape; may be the logits themselves.

    Returns
    -------
    ndarray
        The gradient, of the logits' dtype and shape.

    Raises
    ------
    TypeError, ValueError, IndexError, ImportError
        As in `cross_entropy`; with a bad label `out` is left as it was, unless it lies on a device.

    Notes
    -----
    The logits are read from memory once, and the gradient written once; the labels are read twice. The entry
    of the largest logit comes from the sum of the others' exponentials, never from p - 1, so that gradients
    near 0 keep their relative precision. That takes an `lse` of more digits than the logits, so those of
    float64 are summed anew. Follows PyTorch's autograd of ``torch.nn.functional.cross_entropy``, save that
    ignored rows have gradient 0 even if they hold NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import cross_entropy_grad
    >>> print(cross_entropy_grad(np.array([[1.0, 2.0, 3.0]]), [2]).round(2))
    [[ 0.09  0.24 -0.33]]
    """
    grad: Array
    _, _, grad = _call.cross_entropy(
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        axis,
        num_threads,
        backend,
        out,
        check=check,
        wants_value=False,
        wants_grad=True,
        grad_output=grad_output,
        lse=lse,
    )
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
    check: str = "raise",
) -> tuple[Value, Array]:
    """Compute the cross-entropy and its gradient with respect to the logits together.

    The formulas are those of `cross_entropy` and `cross_entropy_grad`.

    Parameters
    ----------
    logits, target, weight, ignore_index, label_smoothing, z_loss, reduction, axis, num_threads, backend
        As in `cross_entropy`.
    check
        As in `cross_entropy`.
    out : ndarray, optional
        Array for the gradient, of the logits' dtype and shape; may be the logits themselves.

    Returns
    -------
    value : numpy.float64 or ndarray
        As from `cross_entropy`.
    grad : ndarray
        The gradient of the value, of the logits' dtype and shape; for ``reduction="none"`` that of the
        losses' sum.

    Raises
    ------
    TypeError, ValueError, IndexError, ImportError
        As in `cross_entropy`; with a bad label `out` is left as it was, unless it lies on a device.

    Notes
    -----
    The logits are read from memory once, and the gradient written once; the labels are read twice, to know
    the mean's divisor, and any bad label, before the gradient is written. Precision as in
    `cross_entropy_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import cross_entropy_value_and_grad
    >>> value, grad = cross_entropy_value_and_grad(np.array([[1.0, 2.0, 3.0]]), [2])
    >>> print(value.round(4), grad.round(2))
    0.4076 [[ 0.09  0.24 -0.33]]
    """
    value, _, grad = _call.cross_entropy(
        logits,
        target,
        weight,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        axis,
        num_threads,
        backend,
        out,
        check=check,
        wants_grad=True,
    )
    return value, grad


def nll_loss(
    log_probabilities: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    axis: int | None = None,
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
    check: str = "raise",
) -> Value:
    """Compute the negative log-likelihood of labels: minus the weighted log-probability of each.

    A label y costs ``-weight[y] * log_probabilities[y]``.

    Parameters
    ----------
    log_probabilities : array_like, shape (C,), (N, C) or (N, C, d1, ...)
        In nats, of any dtype that `cross_entropy` takes for logits.
    target : array_like
        Class labels: any integer dtype, that shape without the class axis.
    weight, ignore_index, reduction, axis, out, num_threads, backend, check
        As in `cross_entropy`.

    Returns
    -------
    numpy.float64 or ndarray
        As from `cross_entropy`.

    Raises
    ------
    TypeError, ValueError, IndexError, ImportError
        As in `cross_entropy`.

    Notes
    -----
    Reads one number per row. ``nll_loss(log_softmax(x, axis=1), t)`` is ``cross_entropy(x, t)``, which is as
    precise, faster, and holds no log-probabilities. Follows ``torch.nn.functional.nll_loss``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import nll_loss
    >>> print(nll_loss(np.log([[0.6, 0.3, 0.1]] * 3), [0, 1, 2], reduction="none").round(4))
    [0.5108 1.204  2.3026]
    """
    kernels, x, threads = _call.start(
        log_probabilities, reduction, num_threads, backend, check, "log_probabilities"
    )
    axis = _check.class_axis("log_probabilities", x, axis)
    labels, _ = _check.labels(target, x, axis, probabilities=False)
    n_classes = x.shape[axis]
    weights = _check.class_weight(weight, n_classes, x)
    ignore_index = _check.ignored(ignore_index, False)
    loss = _call.new_loss(reduction, labels.shape, x, (labels, weights), out)
    total, counted, bad = kernels.nll(_check.axis_last(x, axis), labels, ignore_index, weights, loss, threads)
    if bad >= 0:
        raise _check.bad_label(labels, bad, n_classes, ignore_index)
    divisor = 1.0
    if reduction == "mean":
        divisor = counted
        if weights is not None:
            divisor, _ = kernels.label_weight(labels, weights, ignore_index, n_classes, threads)
    return _call.value(x, loss, total, divisor, out)


def kl_div(
    log_probabilities: ArrayLike,
    target: ArrayLike,
    *,
    log_target: bool = False,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Value:
    r"""Compute the Kullback-Leibler divergence of log-probabilities from a target, element by element.

    Each element is :math:`t (\log t - x)`, or with `log_target` :math:`e^t (t - x)`.

    Parameters
    ----------
    log_probabilities : array_like, any shape
        The input x, in nats, of any dtype that `cross_entropy` takes for logits.
    target : array_like, same shape
        Probabilities t, or with `log_target` their logarithms, of any of those dtypes.
    log_target : bool
        Whether the target holds logarithms.
    reduction : {"mean", "batchmean", "sum", "none"}
        "mean" divides by the number of elements, "batchmean" by the length of the first axis: that is the
        divergence of the distributions in the rows, averaged.
    out, num_threads, backend
        As in `cross_entropy`; `out` has the elements' shape.

    Returns
    -------
    numpy.float64 or ndarray
        As from `cross_entropy`; "none" keeps the shape of the input.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `cross_entropy`.

    Notes
    -----
    One pass. An element with t = 0 is 0, also at an infinite x. Follows ``torch.nn.functional.kl_div``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import kl_div
    >>> p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    >>> print(kl_div(np.log(q), p, reduction="batchmean").round(4))
    0.5108
    """
    reductions = (*_check.REDUCTIONS, "batchmean")
    kernels, x, threads = _call.start(
        log_probabilities, reduction, num_threads, backend, "raise", "log_probabilities", reductions
    )
    t = _check.same_shape("target", _check.floats("target", target, x), x.shape, "the log_probabilities'")
    divisor = 1.0
    if reduction == "mean":
        divisor = x.size
    elif reduction == "batchmean":
        divisor = _check.first_axis("log_probabilities", x)
    loss = _call.new_loss(reduction, x.shape, x, (t,), out)
    total = kernels.kl_div(x, t, bool(log_target), loss, threads)
    return _call.value(x, loss, total, divisor, out)


def entropy(
    logits: ArrayLike,
    *,
    axis: int = -1,
    reduction: str = "none",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Value:
    r"""Compute the entropy of the softmax of logits, in nats.

    For each row :math:`-\sum_c p_c \log p_c` with :math:`p = \mathrm{softmax}(x)`.

    Parameters
    ----------
    logits : array_like, any shape of at least one axis
        As in `cross_entropy`.
    axis : int
        Where the classes are, by default last.
    reduction : {"none", "mean", "sum"}
        The mean divides by the number of rows.
    out, num_threads, backend
        As in `cross_entropy`.

    Returns
    -------
    numpy.float64 or ndarray
        As from `cross_entropy`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `cross_entropy`.

    Notes
    -----
    One pass. Classes of probability 0 add nothing, and an entropy near 0 keeps its relative precision.
    Follows ``torch.distributions.Categorical.entropy``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import entropy
    >>> print(entropy(np.zeros((2, 4))).round(4))
    [1.3863 1.3863]
    """
    kernels, x, threads = _call.start(logits, reduction, num_threads, backend)
    axis = _check.class_axis("logits", x, _check.integer("axis", axis))
    rows = _check.axis_last(x, axis)
    loss = _call.new_loss(reduction, rows.shape[:-1], x, (), out)
    values = _check.empty(x, rows.shape[:-1], np.float64) if loss is None else loss
    kernels.entropy(rows, values, threads)
    if loss is not None:
        return _check.returned(loss, out)
    total = values.sum() if type(x) is np.ndarray else _check.call_of(x).total(values)
    return _call.value(x, None, total, values.size if reduction == "mean" else 1.0)
