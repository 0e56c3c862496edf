"""A linear layer's logits, made a few at a time: matrix products in tiles of some classes of some rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from logitloss import _check

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from logitloss._check import Array

    # Of the leading axes
    Index = tuple[Array, ...]

# Kernels' threads that have done their work wait for more of it, on the cores that BLAS goes on with: two of
# two cores cost a large layer a tenth of its time, a small one half.
THREADS = 1
# A tile has 2048 rows: BLAS has its full rate from a thousand on (256 take 1.3 times as long, 512 1.06).
TILE_CLASSES = 6400
TILE_BYTES = 58 << 20
# A row takes, beside logits and hidden states, so many bytes for its number, label and loss, and of several
# tiles for its figures and what `_joined` makes of each. However few its classes are, there are at a time no
# more rows than
NUMBERS_BYTES, FIGURES_BYTES, JOINED_BYTES = 64, 192, 64
MOST_ROWS = 1 << 18
# All logits of some rows, if none are to be kept
BLOCK_BYTES = 48 << 20
# Of a gradient's block: as each adds to all of the weight's gradient, it has as many rows as there are
# dimensions, and its logits the size of that gradient, but no fewer than
LEAST_ROWS = 512


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
        quotient = "" if softcap is None else f"softcap is {self.softcap:.3g}, and logit_scale / softcap"
        for name, number in {"softcap": self.softcap or 0.0, quotient or "logit_scale": self.scale}.items():
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
        row_bytes = self._row_bytes(min(TILE_CLASSES, self.n_classes)) + NUMBERS_BYTES
        if len(self.tiles) > 1:
            row_bytes += FIGURES_BYTES + JOINED_BYTES * len(self.tiles)
        return max(1, min(MOST_ROWS, TILE_BYTES // row_bytes))

    def rows_of_gradients(self) -> int:
        """Return how many rows' logits become gradients at a time."""
        n_buffers = 1 if self.softcap is None else 2
        row_bytes = self._row_bytes(n_buffers * self.n_classes, n_more=2) + NUMBERS_BYTES
        return int(max(self.weight.shape[1], LEAST_ROWS, min(MOST_ROWS, BLOCK_BYTES // row_bytes)))

    def _row_bytes(self, n_classes: int, n_more: int = 0) -> int:
        """Return what a row takes: logits; hidden states as read, as products take them, and scaled; more."""
        n_copies = 1 + (self.hidden.dtype != self.dtype) + (self.scale != 1) + n_more
        return int((n_classes + n_copies * self.hidden.shape[-1]) * self.dtype.itemsize)

    def states(self, rows: Index) -> Array:
        """Return the hidden states of some rows, scaled."""
        return self.scaled(np.atleast_2d(self.hidden)[rows])

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
