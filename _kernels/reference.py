"""The reference backend: the kernel contract in NumPy, to be read as its specification.

Everything is computed in float64, whatever the dtype, on blocks of rows of bounded size, so that neither
logits nor probabilities are ever held whole. One idea carries the softmax family: per row, the coefficients g
of the classes (one-hot labels, class weights, smoothing and probability targets all come to that) give
    loss = sum_c g_c * (lse - x_c)        gradient_c = p_c * sum(g) - g_c
and both keep their relative precision because the largest logit stays out of the others' sum (class `_Rows`).
It leaves validation to the layer above and speed to the compiled backends; `num_threads` is ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Float64 = NDArray[np.float64]

name = "reference"

# Logits in a block: 512 kB of float64, so that a block and its temporaries stay within a core's cache.
BLOCK = 1 << 16


def _blocks(shape: tuple[int, ...], width: int = 1) -> Iterator[tuple[Any, ...]]:
    """Cut an array of this shape, in C order, into indices of about BLOCK // width elements."""
    room = max(1, BLOCK // width)
    whole, axis = 1, len(shape)
    while axis > 0 and whole * shape[axis - 1] <= room:
        axis -= 1
        whole *= shape[axis]
    if axis == 0:
        yield (...,)
        return
    step = max(1, room // max(1, whole))
    for outer in np.ndindex(shape[: axis - 1]):
        for start in range(0, shape[axis - 1], step):
            yield (*outer, slice(start, start + step), ...)


def _load(array: Array, index: tuple[Any, ...]) -> Float64:
    """One block, flat, as float64."""
    return np.array(array[index], dtype=np.float64, order="C").reshape(-1)


def _scale(scale: Array | float, index: tuple[Any, ...]) -> Float64:
    """One block of an array as float64; a number as an array of one."""
    return _load(scale, index) if isinstance(scale, np.ndarray) else np.array([scale], np.float64)


def _load_rows(array: Array, index: tuple[Any, ...]) -> Float64:
    """One block of rows as a float64 matrix."""
    return np.array(array[index], dtype=np.float64, order="C").reshape(-1, array.shape[-1])


def _store(array: Array | None, index: tuple[Any, ...], values: Array) -> None:
    """Write a block, rounded to the output's dtype, where that output is wanted."""
    if array is not None:
        view = array[index]
        view[...] = values.reshape(view.shape)


def _times(coefficient: Float64 | float, value: Float64) -> Float64:
    """Multiply with 0 * inf = 0 (and 0 * NaN = NaN)."""
    return np.where((coefficient == 0) & np.isinf(value), 0.0, coefficient * value)


class _Rows:
    """What one pass over a block of rows gives: the largest logit, where it is, and the others' sum.

    `largest` is exact, `others` is the sum of exp(x - largest) over the classes but `top`. A poisoned row has
    `others` NaN, and so has everything that follows from it.
    """

    def __init__(self, logits: Float64) -> None:
        self.logits = logits
        self.number = np.arange(len(logits))
        self.top = logits.argmax(axis=1)
        self.largest = logits[self.number, self.top]
        self.exps = np.exp(logits - self.largest[:, None])
        self.exps[self.number, self.top] = 0.0
        self.others = self.exps.sum(axis=1)
        self.others[~np.isfinite(self.largest)] = np.nan

    def lse(self) -> Float64:
        lse: Float64 = np.where(np.isfinite(self.largest), self.largest + np.log1p(self.others), self.largest)
        return lse

    def costs(self) -> Float64:
        """Return lse - x, a sum of two numbers that are not negative."""
        costs: Float64 = (self.largest[:, None] - self.logits) + np.log1p(self.others)[:, None]
        return costs

    def softmax(self) -> tuple[Float64, Float64]:
        """Return all p, and 1 - p of the largest."""
        total = 1.0 + self.others
        p = self.exps / total[:, None]
        p[self.number, self.top] = 1.0 / total
        return p, self.others / total

    def softmax_from(self, lse: Float64) -> tuple[Float64, Float64]:
        """Return the same from an lse computed before."""
        p = np.exp(self.logits - np.where(np.isfinite(lse), lse, np.nan)[:, None])
        without_top = p.copy()
        without_top[self.number, self.top] = 0.0
        return p, without_top.sum(axis=1)

    def figures(self, labels: Array) -> Float64:
        target = self.logits[self.number, labels][:, None]
        is_before = np.arange(self.logits.shape[1]) < labels[:, None]
        rank = 1 + ((self.logits > target) | (is_before & (self.logits == target))).sum(axis=1)
        p, _ = self.softmax()
        entropy = _times(p, self.costs()).sum(axis=1)
        top_p = p[self.number, self.top]
        p[self.number, self.top] = 0.0
        figures = np.stack([rank, self.top, top_p, entropy, (p * p).sum(axis=1)], axis=1)
        return np.where(np.isnan(self.others)[:, None], np.nan, figures)

    def losses(self, g: Float64, z_loss: float) -> Float64:
        loss: Float64 = _times(g, self.costs()).sum(axis=1)
        if z_loss:
            loss += z_loss * self.lse() ** 2
        return loss

    def gradients(self, g: Float64, z_loss: float, lse_in: Float64 | None) -> Float64:
        p, one_minus_top = self.softmax() if lse_in is None else self.softmax_from(lse_in)
        lse = self.lse() if lse_in is None else lse_in
        z_slope = 2.0 * z_loss * lse if z_loss else np.zeros(len(lse))
        rest = g.copy()
        rest[self.number, self.top] = 0.0
        # beta among many small gammas: in float64 their sum would lose what they differ by
        rest_sum = rest.sum(axis=1, dtype=np.longdouble).astype(np.float64)
        g_top = g[self.number, self.top]
        grad: Float64 = (rest_sum + g_top + z_slope)[:, None] * p - g
        # p*(rest + g) - g at the largest is p*rest - (1 - p)*g: there 1 - p may be far below the rounding of
        # p.
        grad[self.number, self.top] = p[self.number, self.top] * (rest_sum + z_slope) - one_minus_top * g_top
        return grad


def _labels(
    target: Array, index: tuple[Any, ...], ignore_index: int, n_classes: int
) -> tuple[Array, Array, int]:
    """Labels of a block (0 where ignored), the rows that count, and the first bad row of the block or -1."""
    labels = target[index].reshape(-1)
    counts = labels != ignore_index
    bad = counts & ((labels < 0) | (labels >= n_classes))
    if bad.any():
        return labels, counts, int(bad.argmax())
    return np.where(counts, labels, 0).astype(np.intp), counts, -1


def label_weight(
    target: Array, weight: Float64 | None, ignore_index: int, n_classes: int, num_threads: int
) -> tuple[float, int]:
    total, n_before = 0.0, 0
    for index in _blocks(target.shape):
        labels, counts, bad = _labels(target, index, ignore_index, n_classes)
        if bad >= 0:
            return total, n_before + bad
        n_before += len(labels)
        total += float(counts.sum() if weight is None else weight[labels[counts]].sum())
    return total, -1


@np.errstate(all="ignore")
def cross_entropy(
    logits: Array,
    target: Array,
    ignore_index: int,
    beta: Float64 | None,
    gamma: Float64 | None,
    z_loss: float,
    scale: Float64 | float,
    lse_in: Float64 | None,
    loss: Array | None,
    lse: Float64 | None,
    figures: Float64 | None,
    grad: Array | None,
    num_threads: int,
) -> tuple[float, int, int]:
    n_classes = logits.shape[-1]
    total, counted, n_before = 0.0, 0, 0
    for index in _blocks(target.shape, n_classes):
        labels, counts, bad = _labels(target, index, ignore_index, n_classes)
        if bad >= 0:
            return total, counted, n_before + bad
        n_before += len(labels)
        counted += int(counts.sum())
        rows = _Rows(_load_rows(logits, index))
        g = np.zeros_like(rows.logits)
        if gamma is not None:
            g += gamma
        g[rows.number, labels] += 1.0 if beta is None else beta[labels]
        losses = np.where(counts, rows.losses(g, z_loss), 0.0)
        total += float(losses.sum())
        _store(loss, index, losses)
        _store(lse, index, rows.lse())
        if figures is not None:
            _store(figures, index, np.where(counts[:, None], rows.figures(labels), 0.0))
        if grad is not None:
            only_grad = loss is None and lse is None
            known_lse = _load(lse_in, index) if lse_in is not None and only_grad else None
            slopes = _scale(scale, index)[:, None] * rows.gradients(g, z_loss, known_lse)
            _store(grad, index, np.where(counts[:, None], slopes, 0.0))
    return total, counted, -1


@np.errstate(all="ignore")
def soft_cross_entropy(
    logits: Array,
    target: Array,
    weight: Float64 | None,
    target_scale: float,
    target_offset: float,
    z_loss: float,
    scale: Float64 | float,
    lse_in: Float64 | None,
    loss: Array | None,
    lse: Float64 | None,
    grad: Array | None,
    num_threads: int,
) -> float:
    total = 0.0
    for index in _blocks(logits.shape[:-1], logits.shape[-1]):
        rows = _Rows(_load_rows(logits, index))
        g = target_scale * _load_rows(target, index) + target_offset
        if weight is not None:
            g *= weight
        losses = rows.losses(g, z_loss)
        total += float(losses.sum())
        _store(loss, index, losses)
        _store(lse, index, rows.lse())
        if grad is not None:
            known_lse = _load(lse_in, index) if lse_in is not None and loss is None and lse is None else None
            slopes = _scale(scale, index)[:, None] * rows.gradients(g, z_loss, known_lse)
            _store(grad, index, slopes)
    return total


@np.errstate(all="ignore")
def logsumexp(logits: Array, lse: Array, num_threads: int) -> None:
    for index in _blocks(logits.shape[:-1], logits.shape[-1]):
        _store(lse, index, _Rows(_load_rows(logits, index)).lse())


@np.errstate(all="ignore")
def softmax(logits: Array, out: Array, log: bool, num_threads: int) -> None:
    for index in _blocks(logits.shape[:-1], logits.shape[-1]):
        rows = _Rows(_load_rows(logits, index))
        _store(out, index, 0.0 - rows.costs() if log else rows.softmax()[0])


@np.errstate(all="ignore")
def entropy(logits: Array, out: Array, num_threads: int) -> None:
    for index in _blocks(logits.shape[:-1], logits.shape[-1]):
        rows = _Rows(_load_rows(logits, index))
        _store(out, index, rows.losses(rows.softmax()[0], 0.0))


@np.errstate(all="ignore")
def nll(
    log_probabilities: Array,
    target: Array,
    ignore_index: int,
    weight: Float64 | None,
    loss: Array | None,
    num_threads: int,
) -> tuple[float, int, int]:
    total, counted, n_before = 0.0, 0, 0
    for index in _blocks(target.shape):
        labels, counts, bad = _labels(target, index, ignore_index, log_probabilities.shape[-1])
        if bad >= 0:
            return total, counted, n_before + bad
        n_before += len(labels)
        counted += int(counts.sum())
        rows = log_probabilities[index]
        picked = np.take_along_axis(rows, labels.reshape(*rows.shape[:-1], 1), axis=-1)
        costs = -picked.astype(np.float64).reshape(-1)
        losses = np.where(counts, costs if weight is None else _times(weight[labels], costs), 0.0)
        total += float(losses.sum())
        _store(loss, index, losses)
    return total, counted, -1


@np.errstate(all="ignore")
def binary_cross_entropy_with_logits(
    logits: Array,
    target: Array,
    weight: Array | None,
    pos_weight: Array | None,
    label_smoothing: float,
    signed: bool,
    scale: Array | float,
    loss: Array | None,
    grad: Array | None,
    num_threads: int,
) -> tuple[float, int]:
    total, n_before = 0.0, 0
    for index in _blocks(logits.shape):
        x, t = _load(logits, index), _load(target, index)
        if signed and (bad := np.abs(t) != 1).any():
            return total, n_before + int(bad.argmax())
        n_before += len(x)
        y = 0.5 * t + 0.5 if signed else t
        keep, spread = 1.0 - label_smoothing, 0.5 * label_smoothing
        negative, positive = keep * (1 - y) + spread, keep * y + spread
        if pos_weight is not None:
            positive *= _load(pos_weight, index)
        factor = 1.0 if weight is None else _load(weight, index)
        small = np.log1p(np.exp(-np.abs(x)))
        if_negative, if_positive = np.maximum(x, 0) + small, np.maximum(-x, 0) + small
        losses = _times(factor, _times(negative, if_negative) + _times(positive, if_positive))
        total += float(losses.sum())
        _store(loss, index, losses)
        if grad is not None:
            slopes = factor * (negative * _sigmoid(x) - positive * _sigmoid(-x))
            _store(grad, index, _scale(scale, index) * slopes)
    return total, -1


def _sigmoid(x: Float64) -> Float64:
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


@np.errstate(all="ignore")
def binary_cross_entropy(
    probabilities: Array, target: Array, weight: Array | None, loss: Array | None, num_threads: int
) -> tuple[float, int]:
    total, n_before = 0.0, 0
    for index in _blocks(probabilities.shape):
        p, y = _load(probabilities, index), _load(target, index)
        bad = ~((p >= 0) & (p <= 1) & (y >= 0) & (y <= 1))
        if bad.any():
            return total, n_before + int(bad.argmax())
        n_before += len(p)
        losses = -(y * np.maximum(np.log(p), -100.0) + (1 - y) * np.maximum(np.log1p(-p), -100.0))
        if weight is not None:
            losses *= _load(weight, index)
        total += float(losses.sum())
        _store(loss, index, losses)
    return total, -1


@np.errstate(all="ignore")
def kl_div(
    log_probabilities: Array, target: Array, log_target: bool, loss: Array | None, num_threads: int
) -> float:
    total = 0.0
    for index in _blocks(log_probabilities.shape):
        log_q, t = _load(log_probabilities, index), _load(target, index)
        p, log_p = (np.exp(t), t) if log_target else (t, np.log(t))
        losses = np.where((p == 0) & ~np.isnan(log_q), 0.0, p * (log_p - log_q))
        total += float(losses.sum())
        _store(loss, index, losses)
    return total


@np.errstate(all="ignore")
def sigmoid(logits: Array, out: Array, log: bool, num_threads: int) -> None:
    for index in _blocks(logits.shape):
        x = _load(logits, index)
        _store(out, index, np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))) if log else _sigmoid(x))
