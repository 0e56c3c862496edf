"""Cross-entropy of a linear layer's logits, as of a language model's last layer, which are never held whole.

For a value, BLAS makes a tile of logits, some classes of some rows, and the same kernels as for any logits
make of it what it adds to the losses (`_losses`). For gradients, all logits of some rows are made,
become their own gradient in place, and go back through the layer as two more products (`_Gradients`). So a
layer costs its matrix products and little else. Rows that do not count are left out of the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from logitloss import _call, _check, _coefficients
from logitloss.layer import THREADS, LinearLogits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import ArrayLike

    from logitloss._backends import Kernels
    from logitloss._check import Array, Float64, Value
    from logitloss.layer import Index

# Labels looked at at once
PIECE_ROWS = 1 << 18


def linear_cross_entropy(
    hidden: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    class_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    out: Array | None = None,
    num_threads: int | None = None,
    backend: str | None = None,
) -> Value:
    r"""Compute the cross-entropy of a linear layer's logits without holding them.

    The logits are :math:`z = \mathrm{logit\_scale} \cdot (\mathrm{hidden}\, \mathrm{weight}^T +
    \mathrm{bias})`, and with a softcap :math:`s` of Gemma's kind :math:`s \tanh(z / s)`. Of these it is
    `cross_entropy`.

    Parameters
    ----------
    hidden : array_like, shape (..., D)
        Hidden states: float16, bfloat16, float32 or float64.
    weight : array_like, shape (C, D)
        The layer's weight, a row for each class, as ``torch.nn.Linear`` keeps it; the same dtypes. Products
        are made in float64 if both are, else in float32.
    target : array_like, shape (...)
        Class labels: any integer dtype, values in [0, C) or `ignore_index`.
    bias : array_like, shape (C,), optional
        The layer's bias.
    softcap : float, optional
        The bound that the logits approach; above 0.
    logit_scale : float
        What hidden states, weight and bias come to is multiplied by this.
    class_weight : array_like, shape (C,), optional
        Weight of each class, `weight` of `cross_entropy`.
    ignore_index, label_smoothing, z_loss, reduction
        As in `cross_entropy`.
    num_threads : int, optional
        Threads of the kernels, by default one: products have those of NumPy's BLAS, which several would wait
        for, and hinder. Where cores are many, more are of use with ``OMP_WAIT_POLICY=passive``.
    out : ndarray, optional
        Array for the losses of ``reduction="none"``.
    backend : str, optional
        One of `backends` for the host, by default "cython".

    Returns
    -------
    numpy.float64 or ndarray
        The mean or sum in nats, or for "none" the losses of the rows: float32, or float64 where products are.

    Raises
    ------
    TypeError, ValueError, IndexError, ImportError
        As in `cross_entropy`.

    See Also
    --------
    linear_cross_entropy_value_and_grad, cross_entropy

    Notes
    -----
    Memory beyond inputs and outputs stays under 64 MB, whatever the batch: 61 MB of logits, hidden states and
    losses at a time. Beside, and of the same size for any batch, there are 6400 classes' weight if it must be
    converted, and three numbers a class if there are class weights or smoothing. Rows that are ignored take
    no part in the products. Softcap and scale are those of Gemma 2 (arXiv:2408.00118) and Cohere's Command
    models.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import linear_cross_entropy
    >>> hidden, weight = np.array([[1.0, 2.0]]), np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> print(linear_cross_entropy(hidden, weight, [2]).round(4))
    0.4076
    """
    return _run(
        LinearLogits(hidden, weight, bias, softcap, logit_scale),
        target,
        class_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        num_threads,
        backend,
        out,
    )


def linear_cross_entropy_value_and_grad(
    hidden: ArrayLike,
    weight: ArrayLike,
    target: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    class_weight: ArrayLike | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    num_threads: int | None = None,
    backend: str | None = None,
) -> tuple[Value, Array, Array, Array | None]:
    """Compute `linear_cross_entropy` and its gradient with respect to hidden states, weight and bias.

    Parameters
    ----------
    hidden, weight, target, bias, softcap, logit_scale, class_weight, ignore_index, label_smoothing
        As in `linear_cross_entropy`.
    z_loss, reduction, num_threads, backend
        As in `linear_cross_entropy`.

    Returns
    -------
    value : numpy.float64 or ndarray
        As from `linear_cross_entropy`.
    grad_hidden, grad_weight : ndarray
        The gradients of the value, of the dtypes and shapes of `hidden` and `weight`; for
        ``reduction="none"`` those of the losses' sum.
    grad_bias : ndarray or None
        The same of `bias`; None if there is none.

    Raises
    ------
    TypeError, ValueError, IndexError, ImportError
        As in `cross_entropy`.

    Notes
    -----
    Three products: the logits are made once, and become their gradient in place. Beyond inputs and outputs
    there are the logits (twice with a softcap) and hidden states of D rows at a time, hence about as much as
    the gradient of the weight takes, or those of 512 rows, or of as many as 50 MB hold, whichever is most;
    and the gradient of 6400 classes' weight. A gradient of two bytes is summed in float32 beside.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import linear_cross_entropy_value_and_grad
    >>> hidden, weight = np.array([[1.0, 2.0]]), np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> value, grad_hidden, grad_weight, _ = linear_cross_entropy_value_and_grad(hidden, weight, [2])
    >>> print(grad_hidden.round(2))
    [[-0.24 -0.09]]
    """
    layer = LinearLogits(hidden, weight, bias, softcap, logit_scale)
    gradients = _Gradients(layer)
    value = _run(
        layer,
        target,
        class_weight,
        ignore_index,
        label_smoothing,
        z_loss,
        reduction,
        num_threads,
        backend,
        gradients=gradients,
    )
    return value, *gradients.finished()


def _run(
    layer: LinearLogits,
    target: ArrayLike,
    class_weight: ArrayLike | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    num_threads: int | None,
    backend: str | None,
    out: Array | None = None,
    gradients: _Gradients | None = None,
) -> Value:
    """Return what the layer's logits cost; add its gradients, if wanted, to those given."""
    shape = layer.hidden.shape[:-1]
    # Logits that nobody holds: one number stands for all of them.
    like = np.broadcast_to(layer.dtype.type(0), (*shape, layer.n_classes))
    num_threads = THREADS if num_threads is None else num_threads
    kernels, _, threads = _call.start(like, reduction, num_threads, backend)
    labels, _ = _check.labels(target, like, len(shape), probabilities=False)
    weights = _check.class_weight(class_weight, layer.n_classes, like, "class_weight")
    ignored = _check.ignored(ignore_index, soft=False)
    smoothing = _check.fraction("label_smoothing", label_smoothing)
    z_loss = _check.finite("z_loss", z_loss)
    unit, sizes = 1.0, _coefficients.weight_range(layer.dtype, reduction)
    # A mean without smoothing is made of the labels' own weights, whatever the others are.
    is_of_labels = weights is not None and reduction == "mean" and not smoothing
    if weights is not None:
        first = _coefficients.SUMMABLE if is_of_labels else sizes
        size = _coefficients.largest(weights, z_loss)
        weights, z_loss, unit = _coefficients.rescaled(weights, z_loss, size, first)
    inputs = (layer.hidden, layer.weight, layer.bias, labels, weights)
    losses = _call.new_loss(reduction, shape, like, inputs, out)
    mean_weights = weights if reduction == "mean" else None
    divisor, bad = kernels.label_weight(labels, mean_weights, ignored, layer.n_classes, threads)
    if bad >= 0:
        raise _check.bad_label(labels, bad, layer.n_classes, ignored)
    if reduction != "mean":
        divisor = 1.0 / unit
    elif is_of_labels and weights is not None and labels.size:
        size = max(divisor / labels.size, abs(z_loss))
        weights, z_loss, unit = _coefficients.rescaled(weights, z_loss, size, sizes)
        divisor /= unit
    if losses is not None:
        losses[...] = 0
    beta, gamma = weights, None
    if smoothing:
        beta, gamma = _coefficients.per_class(weights, smoothing, layer.n_classes)
    scale, factor = _coefficients.ordinary(_coefficients.divided(1.0, divisor), layer.dtype)
    options = _Options(kernels, beta, gamma, ignored, z_loss, threads, scale, factor)
    total, all_labels = 0.0, np.atleast_1d(labels)
    most = layer.rows_of_tile() if gradients is None else layer.rows_of_gradients()
    for numbers in _counted(all_labels, ignored, most):
        rows = np.unravel_index(numbers, all_labels.shape)
        if gradients is None:
            found = _losses(layer, rows, all_labels[rows], options)
        else:
            found = gradients.add(rows, all_labels[rows], options)
        total += float(found.sum(dtype=np.float64))
        if losses is not None:
            np.atleast_1d(losses)[rows] = found
    if losses is not None and unit != 1:
        _coefficients.multiply(losses, unit)
    return _call.value(like, losses, total, divisor, out)


class _Options(NamedTuple):
    kernels: Kernels
    beta: Float64 | None
    gamma: Float64 | None
    ignored: int
    z_loss: float
    threads: int
    scale: Array | float
    factor: Float64 | None


def _counted(labels: Array, ignored: int, most: int) -> Iterator[Array]:
    """Yield the numbers of the rows that count, at most so many at a time, in blocks as equal as can be.

    Labels are looked at a piece at a time, in any layout.
    """
    pieces = [slice(first, first + PIECE_ROWS) for first in range(0, labels.size, PIECE_ROWS)]
    n_counted = sum(np.count_nonzero(labels.flat[piece] != ignored) for piece in pieces)
    n_rows = -(-n_counted // max(1, -(-n_counted // most)))
    waiting = np.empty(0, np.intp)
    for piece in pieces:
        found = piece.start + np.flatnonzero(labels.flat[piece] != ignored)
        waiting = np.concatenate((waiting, found))
        while len(waiting) >= n_rows > 0:
            yield waiting[:n_rows]
            waiting = waiting[n_rows:]
    if len(waiting):
        yield waiting


def _losses(layer: LinearLogits, rows: Index, labels: Array, options: _Options) -> Array:
    """Return the losses of rows that count."""
    states = layer.states(rows)
    if len(layer.tiles) > 1:
        return _tiled_losses(layer, states, labels, options)
    kernels, beta, gamma, ignored, z_loss, threads, *_ = options
    logits = np.empty((len(states), layer.n_classes), layer.dtype)
    layer.fill_all(logits, states)
    losses = np.empty(len(states), layer.dtype)
    kernels.cross_entropy(
        logits, labels, ignored, beta, gamma, z_loss, 1.0, None, losses, None, None, None, threads
    )
    return losses


def _tiled_losses(layer: LinearLogits, states: Array, labels: Array, options: _Options) -> Float64:
    """Return the losses of rows whose classes are more than a tile has.

    With g_c what multiplies a class's cost, a tile T adds its own loss, sum_T g_c*(lse_T - x_c), and by how
    much lse of all classes is above lse_T, as often as sum_T g_c says.
    """
    from logitloss._kernels import FIGURES  # the kernels are loaded by the first call

    kernels, beta, gamma, _, z_loss, threads, *_ = options
    n = len(states)
    buffer = np.empty((n, layer.tiles[0].stop), layer.dtype)
    part, lse, figures = np.empty(n, layer.dtype), np.empty(n), np.empty((n, len(FIGURES)))
    losses, (g_sums, tops, rests) = np.zeros(n), np.empty((3, len(layer.tiles), n))
    for number, tile in enumerate(layer.tiles):
        weight = layer.weight_of(tile)
        x = buffer[:, : len(weight)]
        layer.fill(x, states, weight, tile)
        is_here = (labels >= tile.start) & (labels < tile.stop)
        # of a row whose label is elsewhere it is the first class, whose loss is not used
        here = np.where(is_here, labels.astype(np.int64) - tile.start, 0)
        kernels.cross_entropy(x, here, -1, None, None, 0.0, 1.0, None, part, lse, figures, None, threads)
        g = np.where(is_here, 1.0 if beta is None else beta[labels], 0.0)
        with np.errstate(invalid="ignore"):
            tile_losses = np.where(g == 0, 0.0, g * part)
        infinite = _infinite(g)
        if gamma is not None:
            nothing = np.broadcast_to(x.dtype.type(0), x.shape)
            kernels.soft_cross_entropy(
                x, nothing, gamma[tile], 0.0, 1.0, 0.0, 1.0, None, part, None, None, threads
            )
            tile_losses += part
            g += gamma[tile].sum()
            with np.errstate(invalid="ignore"):  # of opposite signs
                infinite += _infinite(gamma[tile]).sum()
        # Where all of a tile is -inf, a class of it that is asked for costs infinitely much.
        is_none, is_finite = lse == -np.inf, np.isfinite(lse)
        losses += np.where(is_none, infinite, tile_losses)
        g_sums[number] = np.where(is_none, 0.0, g)
        _, top, top_p, *_ = np.where(is_finite, figures.T, 0.0)
        tops[number] = np.where(is_finite, x[np.arange(n), top.astype(np.intp)], lse)
        rests[number] = -np.log(np.where(is_finite, top_p, 1.0))
    return _joined(losses, g_sums, tops, rests, z_loss)


def _infinite(g: Float64) -> Float64:
    """Return g times infinity, and 0 for 0."""
    return np.where(g == 0, 0.0, np.copysign(np.inf, g))


def _joined(losses: Float64, g_sums: Float64, tops: Float64, rests: Float64, z_loss: float) -> Float64:
    """Add to tiles' losses what lse of all is above theirs; a loss near 0 keeps its relative precision.

    lse of a tile comes as its largest logit and what is to be added to that: their sum would be rounded.
    """
    rows = np.arange(len(losses))
    with np.errstate(invalid="ignore", over="ignore"):  # of poisoned rows; of logits far apart
        lses = tops + rests
        highest = lses.argmax(axis=0)
        above = (tops[highest, rows] - tops) + (rests[highest, rows] - rests)
        others = np.exp(-above)
        others[highest, rows] = 0
        more = np.log1p(others.sum(axis=0))
        losses += np.where(g_sums == 0, 0.0, g_sums * (above + more)).sum(axis=0)
        lse = lses[highest, rows] + more
    losses[~np.isfinite(lses[highest, rows])] = np.nan
    return losses + z_loss * lse**2 if z_loss else losses


class _Gradients:
    """The gradients of a layer, to which each block of rows adds."""

    def __init__(self, layer: LinearLogits) -> None:
        self.layer = layer
        self.hidden = np.zeros_like(layer.hidden, order="C")
        self.weight = np.zeros(layer.weight.shape, layer.dtype)
        self.bias = None if layer.bias is None else np.zeros(layer.n_classes)
        self.product = np.empty((layer.tiles[0].stop, layer.weight.shape[1]), layer.dtype)
        self.buffers: list[Array] = []
        self.is_empty = True

    def add(self, rows: Index, labels: Array, options: _Options) -> Array:
        """Add those of some rows, and return the rows' losses."""
        layer = self.layer
        states = layer.states(rows)
        if not self.buffers:  # without a softcap the gradient takes the logits' place
            n_buffers = 1 if layer.softcap is None else 2
            self.buffers = [np.empty((len(states), layer.n_classes), layer.dtype) for _ in range(n_buffers)]
        logits, slopes = self.buffers[0][: len(states)], self.buffers[-1][: len(states)]
        layer.fill_all(logits, states)
        kernels, beta, gamma, ignored, z_loss, threads, scale, factor = options
        losses = np.empty(len(states), layer.dtype)
        kernels.cross_entropy(
            logits, labels, ignored, beta, gamma, z_loss, scale, None, losses, None, None, slopes, threads
        )
        if factor is not None:
            _coefficients.multiply(slopes, factor)
        if layer.softcap is not None:  # s - x**2/s, the slope of x = s*tanh(z/s) in z/s
            logits *= logits
            logits *= layer.dtype.type(-1 / layer.softcap)
            logits += layer.dtype.type(layer.softcap)
            slopes *= logits
        back = np.zeros_like(states)
        for tile in layer.tiles:
            part = slopes[:, tile]
            back += part @ layer.weight_of(tile)
            if self.is_empty:
                np.matmul(part.T, states, out=self.weight[tile])
            else:
                product = self.product[: part.shape[1]]
                np.matmul(part.T, states, out=product)
                self.weight[tile] += product
        self.is_empty = False
        back *= layer.dtype.type(layer.scale)
        np.atleast_2d(self.hidden)[rows] = back
        if self.bias is not None:
            self.bias += slopes.sum(axis=0, dtype=np.float64) * layer.scale
        return losses

    def finished(self) -> tuple[Array, Array, Array | None]:
        """Return them in the dtypes of what they belong to."""
        layer = self.layer
        bias = None
        if self.bias is not None and layer.bias is not None:
            bias = self.bias.astype(layer.bias.dtype, copy=False)
        return self.hidden, self.weight.astype(layer.weight.dtype, copy=False), bias
