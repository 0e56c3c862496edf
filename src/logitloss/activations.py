"""Functions of logits alone: logsumexp, softmax, sigmoid and the logarithms of the latter two.

They go the same way as the losses (check, kernel) without a reduction. What a kernel computes stands in
`logitloss._kernels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from logitloss import _backends, _call, _check
from logitloss._threads import threads_for

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array, Value


def logsumexp(
    logits: ArrayLike,
    *,
    axis: int | tuple[int, ...] = -1,
    keepdims: bool = False,
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Value:
    r"""Compute the logarithm of the sum of exponentials over one or more axes.

    :math:`\mathrm{lse}(x) = \log \sum_c e^{x_c}`.

    Parameters
    ----------
    logits : array_like, any shape of at least one axis
        float16, bfloat16, float32 or float64; may be read-only, memory-mapped or strided, or lie on a CUDA
        device, as in `cross_entropy`.
    axis : int or tuple of int
        The axes to sum over, by default the last.
    keepdims : bool
        Whether to keep those axes, with length 1.
    out : ndarray, optional
        Array for the result.
    num_threads : int, optional
        Threads to use; the result does not depend on it. See `set_num_threads`.
    backend : str, optional
        One of `backends`, by default "cython", or "cuda" where the logits lie on a CUDA device.

    Returns
    -------
    ndarray or NumPy scalar
        float32, or float64 for float64 logits; of logits on a device, an array of their kind.

    Raises
    ------
    TypeError, ValueError
        For a dtype; for a shape or a value.
    ImportError
        If the backend is missing: says how to get it.

    Notes
    -----
    One pass over the logits; each further axis is summed from the float64 result of the one before. -inf
    where all logits are -inf, +inf where one is +inf. Follows ``torch.logsumexp``; `cross_entropy_and_lse`
    gives float64.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import logsumexp
    >>> print(logsumexp(np.array([1000.0, 1000.0])).round(4))
    1000.6931
    """
    x = _check.floats("logits", logits)
    axes = _check.axes("logits", x, axis)
    kernels, threads = _call.kernels_for(x, backend), threads_for(x.size, num_threads)
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape) if keepdims or i not in axes)
    dtype = _check.result_dtype(x.dtype)
    result = _check.output(out, x, shape, dtype)
    for number in axes:
        rows = _check.axis_last(x, number)
        if number != axes[-1]:
            x = _check.empty(x, rows.shape[:-1], np.float64)
        else:
            x = result.squeeze(axes) if keepdims else result
        kernels.logsumexp(rows, x, threads)
    return _check.returned(result, out)


def softmax(
    logits: ArrayLike,
    *,
    axis: int = -1,
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Array:
    r"""Compute the softmax: :math:`p_c = e^{x_c} / \sum_k e^{x_k}`.

    Parameters
    ----------
    logits : array_like, any shape of at least one axis
        As in `logsumexp`.
    axis : int
        Where the classes are, by default last.
    out : ndarray, optional
        Array for the result, of the logits' dtype and shape; may be the logits themselves.
    num_threads, backend
        As in `logsumexp`.

    Returns
    -------
    ndarray
        Probabilities, of the logits' dtype and shape.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `logsumexp`.

    Notes
    -----
    The logits are read from memory once, the result written once; the largest logit is subtracted first, so
    nothing overflows. NaN where all logits are -inf or one is +inf. Follows ``torch.nn.functional.softmax``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import softmax
    >>> print(softmax(np.array([1.0, 2.0, 3.0])).round(2))
    [0.09 0.24 0.67]
    """
    return _softmax(logits, axis, out, num_threads, backend, log=False)


def log_softmax(
    logits: ArrayLike,
    *,
    axis: int = -1,
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Array:
    r"""Compute the logarithm of the softmax: :math:`x_c - \mathrm{lse}(x)`.

    Parameters
    ----------
    logits, axis, out, num_threads, backend
        As in `softmax`.

    Returns
    -------
    ndarray
        Log-probabilities in nats, of the logits' dtype and shape.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `logsumexp`.

    Notes
    -----
    As `softmax`, except that it keeps its relative precision near 0 too. Follows
    ``torch.nn.functional.log_softmax``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import log_softmax
    >>> print(log_softmax(np.array([0.0, 50.0])))
    [-5.00000000e+01 -1.92874985e-22]
    """
    return _softmax(logits, axis, out, num_threads, backend, log=True)


def _softmax(
    logits: ArrayLike, axis: int, out: Array | None, num_threads: int | None, backend: str | None, log: bool
) -> Array:
    x = _check.floats("logits", logits)
    axis = _check.class_axis("logits", x, _check.integer("axis", axis))
    on_host = type(x) is ndarray
    result = _check.output(out, x, x.shape, x.dtype, (), True)
    kernels = _backends.get(backend) if on_host else _call.kernels_for(x, backend)
    rows, result_rows = _check.axis_last(x, axis), _check.axis_last(result, axis)
    kernels.softmax(rows, result_rows, log, threads_for(x.size, num_threads))
    return result if on_host else _check.theirs(result)


def sigmoid(
    logits: ArrayLike, *, out: Array | None = None, num_threads: int | None = None, backend: str | None = None
) -> Value:
    r"""Compute the sigmoid of each logit: :math:`1 / (1 + e^{-x})`.

    Parameters
    ----------
    logits : array_like, any shape
        As in `logsumexp`.
    out : ndarray, optional
        Array for the result, of the logits' dtype and shape; may be the logits themselves.
    num_threads, backend
        As in `logsumexp`.

    Returns
    -------
    ndarray or NumPy scalar
        Probabilities, of the logits' dtype and shape.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `logsumexp`.

    Notes
    -----
    One pass; nothing overflows, and small probabilities keep their relative precision. Follows
    ``torch.sigmoid``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import sigmoid
    >>> print(sigmoid(np.array([-1000.0, 0.0, 1000.0])))
    [0.  0.5 1. ]
    """
    return _sigmoid(logits, out, num_threads, backend, log=False)


def log_sigmoid(
    logits: ArrayLike, *, out: Array | None = None, num_threads: int | None = None, backend: str | None = None
) -> Value:
    r"""Compute the logarithm of the sigmoid of each logit: :math:`-\log(1 + e^{-x})`.

    Parameters
    ----------
    logits, out, num_threads, backend
        As in `sigmoid`.

    Returns
    -------
    ndarray or NumPy scalar
        Log-probabilities in nats, of the logits' dtype and shape.

    Raises
    ------
    TypeError, ValueError, ImportError
        As in `logsumexp`.

    Notes
    -----
    One pass; exact limits at both ends: -exp(-x) for large x, x for large -x. Follows
    ``torch.nn.functional.logsigmoid``.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import log_sigmoid
    >>> print(log_sigmoid(np.array([-1000.0, 0.0, 50.0])))
    [-1.00000000e+03 -6.93147181e-01 -1.92874985e-22]
    """
    return _sigmoid(logits, out, num_threads, backend, log=True)


def _sigmoid(
    logits: ArrayLike, out: Array | None, num_threads: int | None, backend: str | None, log: bool
) -> Value:
    x = _check.floats("logits", logits)
    result = _check.output(out, x, x.shape, x.dtype, (), True)
    _call.kernels_for(x, backend).sigmoid(x, result, log, threads_for(x.size, num_threads))
    return _check.returned(result, out)
