"""Losses of yes or no: binary cross-entropy of logits and of probabilities, and the logistic loss.

All but `binary_cross_entropy` are the one kernel reached through `_call.binary`; the logistic loss is the
binary cross-entropy with the labels -1 and +1 for 0 and 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from logitloss import _call, _check

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array, Value


def binary_cross_entropy_with_logits(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Value:
    r"""Compute the binary cross-entropy of logits, element by element.

    With :math:`y = (1-\epsilon) t + \epsilon/2` each element costs
    :math:`w\,((1-y) \log(1 + e^x) + p\,y \log(1 + e^{-x}))`, w the weight and p the weight of the positive.

    Parameters
    ----------
    logits : array_like, any shape
        float16, bfloat16, float32 or float64; may be read-only, memory-mapped or strided, or lie on a CUDA
        device, as in `cross_entropy`. Never written, never copied.
    target : array_like, the logits' shape
        Labels 0 and 1, or probabilities of the positive: any real or bool dtype.
    weight, pos_weight : array_like, optional
        Weight of each element, and of its positive term: any real dtype, broadcast to the logits' shape.
    label_smoothing : float
        Share of the target drawn to one half, in [0, 1].
    reduction : {"mean", "sum", "none"}
        The mean divides by the number of elements.
    out : ndarray, optional
        Array for the losses of ``reduction="none"``.
    num_threads : int, optional
        Threads to use; the result does not depend on it. See `set_num_threads`.
    backend : str, optional
        One of `backends`, by default "cython", or "cuda" where the logits lie on a CUDA device.

    Returns
    -------
    numpy.float64 or ndarray
        The mean or sum in nats: float64 sums of blocks of elements. For "none" the losses of the elements:
        float32, or float64 for float64 logits. Of logits on a device, an array of their kind.

    Raises
    ------
    TypeError, ValueError
        For a dtype; for a shape or a value.
    ImportError
        If the backend is missing: says how to get it.

    Notes
    -----
    One pass over the arrays. One exponential, of -abs(x), serves loss and gradient: nothing overflows, and a
    loss near 0 keeps its relative precision. Infinite logits give the limits: 0 when right, +inf when wrong.
    Follows ``torch.nn.functional.binary_cross_entropy_with_logits``; smoothing as in Keras'
    BinaryCrossentropy.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import binary_cross_entropy_with_logits
    >>> logits = np.full(3, -0.0381)
    >>> print(binary_cross_entropy_with_logits(logits, [1, 1, 0]).round(4))
    0.6997
    """
    value: Value
    value, _ = _call.binary(
        logits, target, weight, pos_weight, label_smoothing, False, reduction, num_threads, backend, out
    )
    return value


def binary_cross_entropy_with_logits_grad(
    logits: ArrayLike,
    target: ArrayLike,
    grad_output: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Value:
    r"""Compute the gradient of `binary_cross_entropy_with_logits` with respect to the logits.

    For each element :math:`w\,((1-y)\,\sigma(x) - p\,y\,\sigma(-x))`; plainly, sigmoid minus target.

    Parameters
    ----------
    logits, target, weight, pos_weight, label_smoothing, reduction, num_threads, backend
        As in `binary_cross_entropy_with_logits`.
    grad_output : array_like, optional
        Upstream gradient, by default 1: a number, or for ``reduction="none"`` also one for each element.
    out : ndarray, optional
        Array for the gradient, of the logits' dtype and shape; may be the logits themselves.

    Returns
    -------
    ndarray or NumPy scalar
        The gradient, of the logits' dtype and shape.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `binary_cross_entropy_with_logits`.

    Notes
    -----
    One pass; gradients near 0 keep their relative precision.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import binary_cross_entropy_with_logits_grad
    >>> print(binary_cross_entropy_with_logits_grad(np.zeros(2), [0, 1]))
    [ 0.25 -0.25]
    """
    grad: Value
    _, grad = _call.binary(
        logits,
        target,
        weight,
        pos_weight,
        label_smoothing,
        False,
        reduction,
        num_threads,
        backend,
        out,
        wants_value=False,
        wants_grad=True,
        grad_output=grad_output,
    )
    return grad


def binary_cross_entropy_with_logits_value_and_grad(
    logits: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[Value, Value]:
    """Compute the binary cross-entropy of logits and its gradient together.

    The formulas are those of `binary_cross_entropy_with_logits` and `binary_cross_entropy_with_logits_grad`.

    Parameters
    ----------
    logits, target, weight, pos_weight, label_smoothing, reduction, num_threads, backend
        As in `binary_cross_entropy_with_logits`.
    out : ndarray, optional
        Array for the gradient, of the logits' dtype and shape; may be the logits themselves.

    Returns
    -------
    value : numpy.float64 or ndarray
        As from `binary_cross_entropy_with_logits`.
    grad : ndarray or NumPy scalar
        The gradient of the value, of the logits' dtype and shape; for ``reduction="none"`` that of the
        losses' sum.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `binary_cross_entropy_with_logits`.

    Notes
    -----
    One pass: each array is read once, the gradient written once.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import binary_cross_entropy_with_logits_value_and_grad
    >>> value, grad = binary_cross_entropy_with_logits_value_and_grad(np.zeros(2), [0, 1])
    >>> print(value.round(4), grad)
    0.6931 [ 0.25 -0.25]
    """
    results: tuple[Value, Value] = _call.binary(
        logits,
        target,
        weight,
        pos_weight,
        label_smoothing,
        False,
        reduction,
        num_threads,
        backend,
        out,
        wants_grad=True,
    )
    return results


def binary_cross_entropy(
    probabilities: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
    check: str = "raise",
) -> Value:
    r"""Compute the binary cross-entropy of probabilities, element by element.

    :math:`-w\,(y \log p + (1-y) \log(1-p))`, each logarithm held at -100 or above.

    Parameters
    ----------
    probabilities : array_like, any shape
        In [0, 1], of any dtype that `binary_cross_entropy_with_logits` takes for logits.
    target : array_like, the same shape
        In [0, 1], of any real or bool dtype.
    weight, reduction, out, num_threads, backend
        As in `binary_cross_entropy_with_logits`.
    check : {"raise", "deferred"}
        As in `cross_entropy`, of probabilities and targets outside [0, 1].

    Returns
    -------
    numpy.float64 or ndarray
        As from `binary_cross_entropy_with_logits`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `binary_cross_entropy_with_logits`; ValueError also if a probability or a target is outside [0,
        1] or NaN: names the first, and leaves `out` unspecified.

    Notes
    -----
    One pass. A probability near 1 has lost what told it from 1: with logits at hand, use
    `binary_cross_entropy_with_logits`. Follows ``torch.nn.functional.binary_cross_entropy``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import binary_cross_entropy
    >>> print(binary_cross_entropy(np.array([0.5, 1.0]), [1, 0], reduction="none").round(4))
    [  0.6931 100.    ]
    """
    kernels, p, threads = _call.start(probabilities, reduction, num_threads, backend, check, "probabilities")
    y = _check.same_shape("target", _check.reals("target", target, p), p.shape, "the probabilities'")
    weights = None if weight is None else _check.broadcast("weight", weight, p)
    loss = _call.new_loss(reduction, p.shape, p, (y, weights), out)
    total, bad = kernels.binary_cross_entropy(p, y, weights, loss, threads)
    if bad >= 0:
        raise _check.bad_probability(p, y, bad)
    return _call.value(p, loss, total, p.size if reduction == "mean" else 1.0, out)


def logistic_loss(
    scores: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
    check: str = "raise",
) -> Value:
    r"""Compute the logistic loss of scores against labels -1 and +1, element by element.

    :math:`w \log(1 + e^{-y s})`.

    Parameters
    ----------
    scores : array_like, any shape
        As the logits of `binary_cross_entropy_with_logits`, which they are.
    target : array_like, the same shape
        Labels -1 and +1, of any real dtype.
    weight, reduction, out, num_threads, backend
        As in `binary_cross_entropy_with_logits`.
    check : {"raise", "deferred"}
        As in `cross_entropy`, of labels neither -1 nor +1.

    Returns
    -------
    numpy.float64 or ndarray
        As from `binary_cross_entropy_with_logits`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `binary_cross_entropy_with_logits`; ValueError also if a label is neither -1 nor +1: names the
        first.

    Notes
    -----
    One pass. The same kernel as `binary_cross_entropy_with_logits` with (1 + target)/2 for target, so with
    the same precision. The loss of logistic regression: Hastie, Tibshirani, Friedman, "The Elements of
    Statistical Learning", section 10.5; ``torch.nn.functional.soft_margin_loss``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import logistic_loss
    >>> print(logistic_loss(np.array([0.0, 50.0]), [1, 1], reduction="none"))
    [6.93147181e-01 1.92874985e-22]
    """
    value: Value
    value, _ = _call.binary(
        scores, target, weight, None, 0.0, True, reduction, num_threads, backend, out, check=check
    )
    return value


def logistic_loss_grad(
    scores: ArrayLike,
    target: ArrayLike,
    grad_output: ArrayLike | None = None,
    *,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
    check: str = "raise",
) -> Value:
    r"""Compute the gradient of `logistic_loss` with respect to the scores.

    For each element :math:`-w\,y\,\sigma(-y s)`.

    Parameters
    ----------
    scores, target, weight, reduction, num_threads, backend, check
        As in `logistic_loss`.
    grad_output, out
        As in `binary_cross_entropy_with_logits_grad`.

    Returns
    -------
    ndarray or NumPy scalar
        The gradient, of the scores' dtype and shape.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `logistic_loss`; with a bad label `out` is unspecified, but scores that are also `out` are left
        as they were, unless they lie on a device.

    Notes
    -----
    One pass; in place, one more before it, for the labels, which costs the time of `logistic_loss`.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import logistic_loss_grad
    >>> print(logistic_loss_grad(np.zeros(2), [-1, 1]))
    [ 0.25 -0.25]
    """
    grad: Value
    _, grad = _call.binary(
        scores,
        target,
        weight,
        None,
        0.0,
        True,
        reduction,
        num_threads,
        backend,
        out,
        check=check,
        wants_value=False,
        wants_grad=True,
        grad_output=grad_output,
    )
    return grad


def logistic_loss_value_and_grad(
    scores: ArrayLike,
    target: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
    check: str = "raise",
) -> tuple[Value, Value]:
    """Compute the logistic loss and its gradient together.

    The formulas are those of `logistic_loss` and `logistic_loss_grad`.

    Parameters
    ----------
    scores, target, weight, reduction, num_threads, backend, check
        As in `logistic_loss`.
    out : ndarray, optional
        Array for the gradient, of the scores' dtype and shape; may be the scores themselves.

    Returns
    -------
    value : numpy.float64 or ndarray
        As from `logistic_loss`.
    grad : ndarray or NumPy scalar
        The gradient of the value, of the scores' dtype and shape; for ``reduction="none"`` that of the
        losses' sum.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `logistic_loss_grad`.

    Notes
    -----
    One pass; in place, one more before it, for the labels, which costs the time of `logistic_loss`.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import logistic_loss_value_and_grad
    >>> value, grad = logistic_loss_value_and_grad(np.zeros(2), [-1, 1])
    >>> print(value.round(4), grad)
    0.6931 [ 0.25 -0.25]
    """
    results: tuple[Value, Value] = _call.binary(
        scores,
        target,
        weight,
        None,
        0.0,
        True,
        reduction,
        num_threads,
        backend,
        out,
        check=check,
        wants_grad=True,
    )
    return results
