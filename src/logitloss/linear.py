"""Cross-entropy of a linear layer's logits, as of a language model's last layer, which are never held whole.

For a value, BLAS makes a tile of logits, some classes of some rows, and the same kernels as for any logits
make of it what it adds to the losses (`_tiled_losses`). For gradients, all logits of some rows are made,
become their own gradient in place, and go back through the layer as two more products (`_Gradients`). So a
layer costs its matrix products and little else. Rows that do not count are left out of the products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from logitloss import _call, _check, _coefficients

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._backends import Kernels
    from logitloss._check import Array, Float64, Value

# A tile has 2048 rows. BLAS has its full rate from a thousand on (256 take 1.3 times as long, 512 1.06), and
# between products and kernels, threads of the one pool wait for those of the other.
TILE_CLASSES = 6400
TILE_BYTES = 58 << 20
# All logits of some rows, if none are to be kept
BLOCK_BYTES = 48 << 20
# Of a gradient's block: as each adds to all of the weight's gradient, it has as many rows as there are
# dimensions, and its logits the size of that gradient, but no fewer than
LEAST_ROWS = 512


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
    ignore_index, label_smoothing, z_loss, reduction, num_threads
        As in `cross_entropy`; products have the threads of NumPy's BLAS.
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
    Memory beyond inputs and outputs stays under 64 MB, whatever the batch: 61 MB of logits and hidden states
    at a time, and 6400 classes' weight if it must be converted. Rows that are ignored take no part in the
    products. Softcap and scale are those of Gemma 2 (arXiv:2408.00118) and Cohere's Command models.

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
    there are the logits and hidden states of D rows at a time (the logits twice with a softcap), hence about
    as much as the gradient of the weight takes, or of as many rows more as 50 MB hold; a gradient of two
    bytes is summed in float32 beside.

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
    kernels, _, threads = _call.start(like, reduction, num_threads, backend)
    labels, _ = _check.labels(target, like, len(shape), probabilities=False)
    weights = _check.class_weight(class_weight, layer.n_classes, like, "class_weight")
    ignored = _check.ignored(ignore_index, soft=False)
    smoothing = _check.fraction("label_smoothing", label_smoothing)
    z_loss = _check.finite("z_loss", z_loss)
    if weights is not None and reduction == "mean":
        weights, z_loss, _ = _coefficients.balanced(weights, z_loss)
    inputs = (layer.hidden, layer.weight, layer.bias, labels, weights)
    losses = _call.new_loss(reduction, shape, like, inputs, out)
    mean_weights = weights if reduction == "mean" else None
    divisor, bad = kernels.label_weight(labels, mean_weights, ignored, layer.n_classes, threads)
    if bad >= 0:
        raise _check.bad_label(labels, bad, layer.n_classes, ignored)
    if reduction != "mean":
        divisor = 1.0
    if losses is not None:
        losses[...] = 0
    beta, gamma = weights, None
    if smoothing:
        beta, gamma = _coefficients.per_class(weights, smoothing, layer.n_classes)
    options = _Options(kernels, beta, gamma, ignored, z_loss, threads)
    scale = _coefficients.divided(1.0, divisor)
    total = 0.0
    counted = np.flatnonzero(labels != ignored)
    n_rows = layer.rows_of_tile() if gradients is None else gradients.n_rows
    n_rows = -(-len(counted) // max(1, -(-len(counted) // n_rows)))  # blocks as equal as can be
    for first in range(0, len(counted), max(1, n_rows)):
        rows = np.unravel_index(counted[first : first + n_rows], np.atleast_1d(labels).shape)
        states, y = layer.scaled(np.atleast_2d(layer.hidden)[rows]), np.atleast_1d(labels)[rows]
        if gradients is None:
            found = _tiled_losses(layer, states, y, options)
        else:
            found = gradients.add(rows, states, y, options, scale)
        total += float(found.sum(dtype=np.float64))
        if losses is not None:
            np.atleast_1d(losses)[rows] = found
    return _call.value(like, losses, total, divisor, out)


class _Options(NamedTuple):
    kernels: Kernels
    beta: Float64 | None
    gamma: Float64 | None
    ignored: int
    z_loss: float
    threads: int


def _tiled_losses(layer: LinearLogits, states: Array, labels: Array, options: _Options) -> Float64:
    """Return the losses of rows that count, tile by tile along the classes.

    With g_c what multiplies a class's cost, a tile T adds its own loss, sum_T g_c*(lse_T - x_c), and by how
    much lse of all classes is above lse_T, as often as sum_T g_c says.
    """
    kernels, beta, gamma, _, z_loss, threads = options
    n = len(states)
    buffer = np.empty((n, min(TILE_CLASSES, layer.n_classes)), layer.dtype)
    part, tile_lse = np.empty(n, layer.dtype), np.empty(n)
    losses, g_sums, lses = np.zeros(n), [], []
    for tile in layer.tiles:
        weight = layer.weight_of(tile)
        x = buffer[:, : len(weight)]
        layer.fill(x, states, weight, tile)
        is_here = (labels >= tile.start) & (labels < tile.stop)
        here = np.where(is_here, labels.astype(np.int64) - tile.start, -1)
        g = np.where(is_here, 1.0 if beta is None else beta[labels], 0.0)
        tile_beta = None if beta is None else beta[tile]
        kernels.cross_entropy(
            x, here, -1, tile_beta, None, 0.0, 1.0, None, part, tile_lse, None, None, threads
        )
        tile_losses, infinite = part.astype(np.float64), _infinite(g)
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
        is_none = tile_lse == -np.inf
        losses += np.where(is_none, infinite, tile_losses)
        g_sums.append(np.where(is_none, 0.0, g))
        lses.append(tile_lse.copy())
    return _joined(losses, np.array(g_sums), np.array(lses), z_loss)


def _infinite(g: Float64) -> Float64:
    """Return g times infinity, and 0 for 0."""
    return np.where(g == 0, 0.0, np.copysign(np.inf, g))


def _joined(losses: Float64, g_sums: Float64, lses: Float64, z_loss: float) -> Float64:
    """Add to tiles' losses what lse of all is above theirs; a loss near 0 keeps its relative precision."""
    with np.errstate(invalid="ignore"):  # of poisoned rows
        for number, g in enumerate(g_sums if len(lses) > 1 else ()):
            rows = np.flatnonzero(g)
            above = np.delete(lses, number, axis=0)[:, rows] - lses[number, rows]
            highest = np.maximum(above.max(axis=0), 0)
            rest = np.exp(above - highest).sum(axis=0)
            more = highest + np.where(highest > 0, np.log(rest + np.exp(-highest)), np.log1p(rest))
            losses[rows] += g[rows] * more
        lse = np.logaddexp.reduce(lses, axis=0)
    losses[~(lses < np.inf).all(axis=0) | (lse == -np.inf)] = np.nan
    return losses + z_loss * lse**2 if z_loss else losses


class LinearLogits:
    """The logits of a linear layer, made when they are asked for: `logits[rows]`.

    Parameters
    ----------
    hidden, weight, bias, softcap, logit_scale
        As in `linear_cross_entropy`; they may be memory-mapped.

    Attributes
    ----------
    shape : tuple of int
        (..., C)
    dtype : dtype
        float64 if that of both is, else float32.

    Raises
    ------
    TypeError, ValueError
        As in `linear_cross_entropy`.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss import LinearLogits
    >>> logits = LinearLogits(np.array([[1.0, 2.0]]), np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]))
    >>> logits.shape
    (1, 3)
    >>> print(logits[0])
    [2. 1. 3.]
    """

    def __init__(
        self,
        hidden: ArrayLike,
        weight: ArrayLike,
        bias: ArrayLike | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        self.hidden = _check.floats("hidden", hidden, _check.HOST)
        self.weight = _check.floats("weight", weight, _check.HOST)
        if self.weight.ndim != 2 or len(self.weight) == 0:
            raise ValueError(f"weight of shape {self.weight.shape}: expected (classes, dimensions)")
        self.n_classes, n_dimensions = self.weight.shape
        if self.hidden.shape[-1:] != (n_dimensions,):
            raise ValueError(
                f"hidden of shape {self.hidden.shape}: expected (..., {n_dimensions}), "
                f"the dimensions of weight of shape {self.weight.shape}"
            )
        is_double = self.hidden.dtype == self.weight.dtype == np.float64
        self.dtype = np.dtype(np.float64 if is_double else np.float32)
        self.softcap = None if softcap is None else _check.positive("softcap", softcap)
        # What hidden states and bias are multiplied by; with a softcap, in units of that
        self.scale = _check.finite("logit_scale", logit_scale) / (self.softcap or 1.0)
        most = float(np.finfo(np.float64 if is_double else np.float32).max)
        for name, number in {"softcap": self.softcap or 0.0, "logit_scale": self.scale}.items():
            if abs(number) > most:
                raise ValueError(f"{name} comes to {number:.3g}: expected what {self.dtype} can hold")
        self.bias = None
        if bias is not None:
            self.bias = _check.floats("bias", bias, _check.HOST)
            _check.same_shape("bias", self.bias, (self.n_classes,), "one number per class,")
        self.shape = (*self.hidden.shape[:-1], self.n_classes)
        self.ndim = len(self.shape)
        self.tiles = [
            slice(c, min(c + TILE_CLASSES, self.n_classes)) for c in range(0, self.n_classes, TILE_CLASSES)
        ]

    def __getitem__(self, rows: Any) -> Array:
        """Return the logits of some rows, an index of the leading axes."""
        if isinstance(self.hidden, np.ndarray):  # no index may reach the last axis
            rows = (*(rows if isinstance(rows, tuple) else (rows,)), slice(None))
        return self.of(self.hidden[rows])

    def of(self, hidden: Array) -> Array:
        """Return the logits of hidden states."""
        states = self.scaled(hidden)
        out = np.empty((*states.shape[:-1], self.n_classes), self.dtype)
        self.fill_all(
            out.reshape(-1, self.n_classes), states.reshape(out.size // self.n_classes, states.shape[-1])
        )
        return out

    def rows_at_once(self) -> int:
        """Return how many rows' logits should be asked for at a time."""
        return max(LEAST_ROWS, BLOCK_BYTES // self._row_bytes(self.n_classes))

    def rows_of_tile(self) -> int:
        """Return how many rows a tile of logits has."""
        return max(1, TILE_BYTES // self._row_bytes(min(TILE_CLASSES, self.n_classes)))

    def _row_bytes(self, n_classes: int) -> int:
        """Return what a row takes: logits; hidden states as read, in the dtype of products, and scaled."""
        n_copies = 1 + (self.hidden.dtype != self.dtype) + (self.scale != 1)
        return int((n_classes + n_copies * self.hidden.shape[-1]) * self.dtype.itemsize)

    def scaled(self, states: Array) -> Array:
        """Return hidden states times the scale."""
        states = states.astype(self.dtype, copy=False)
        return states if self.scale == 1 else states * self.dtype.type(self.scale)

    def weight_of(self, tile: slice) -> Array:
        """Return some classes' weight in the dtype of the products."""
        return self.weight[tile].astype(self.dtype, copy=False)

    def fill(self, out: Array, states: Array, weight: Array, tile: slice) -> None:
        """Make a tile's logits of scaled hidden states, given its weight."""
        np.matmul(states, weight.T, out=out)
        if self.bias is not None:
            out += self.bias[tile].astype(self.dtype) * self.dtype.type(self.scale)
        if self.softcap is not None:
            np.tanh(out, out=out)
            out *= self.dtype.type(self.softcap)

    def fill_all(self, out: Array, states: Array) -> None:
        """Make all classes' logits."""
        for tile in self.tiles:
            self.fill(out[:, tile], states, self.weight_of(tile), tile)


class _Gradients:
    """The gradients of a layer, to which each block of rows adds."""

    def __init__(self, layer: LinearLogits) -> None:
        self.layer = layer
        self.hidden = np.zeros_like(layer.hidden, order="C")
        self.weight = np.zeros(layer.weight.shape, layer.dtype)
        self.bias = None if layer.bias is None else np.zeros(layer.n_classes)
        self.product = np.empty((min(TILE_CLASSES, layer.n_classes), layer.weight.shape[1]), layer.dtype)
        self.n_rows = max(layer.weight.shape[1], layer.rows_at_once())
        self.buffers: list[Array] = []
        self.is_empty = True

    def add(
        self, rows: tuple[Array, ...], states: Array, labels: Array, options: _Options, scale: float
    ) -> Array:
        """Add those of some rows, and return the rows' losses."""
        layer = self.layer
        if not self.buffers:  # without a softcap the gradient takes the logits' place
            n_buffers = 1 if layer.softcap is None else 2
            self.buffers = [np.empty((len(states), layer.n_classes), layer.dtype) for _ in range(n_buffers)]
        logits, slopes = self.buffers[0][: len(states)], self.buffers[-1][: len(states)]
        layer.fill_all(logits, states)
        kernels, beta, gamma, ignored, z_loss, threads = options
        losses = np.empty(len(states), layer.dtype)
        kernels.cross_entropy(
            logits, labels, ignored, beta, gamma, z_loss, scale, None, losses, None, None, slopes, threads
        )
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
