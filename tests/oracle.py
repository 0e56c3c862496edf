"""Exact values and gradients of every loss, for the inputs as given, independent of the package.

The one idea: inputs go to extended precision unrounded, and each formula is written so that no two
large terms cancel. A row's log-partition is kept in two parts, its peak and the log of the sum over the
peak; the surprise of a class, `lse - x_c`, is then `(peak - x_c) + log1p(others)`, a sum of two
non-negative terms. Products with an exact zero are zero, also against infinity.

Classes are on the last axis. Reductions stand at the end. `test_oracle.py` checks this file with mpmath.
"""

import numpy as np
from ulp import Exact, exact


def times(coefficient, value):
    """Return the product in which 0 times anything is 0."""
    return np.where(coefficient == 0, 0, coefficient * value)


def nats_ahead(fraction):
    """Nats by which the target leads, read off a loss (or gradient) per unit of its coefficient."""
    fraction = np.abs(fraction)
    return np.where((fraction > 0) & (fraction < 1), -np.log(np.where(fraction > 0, fraction, 1)), 0)


def quiet(function):
    """Infinities and NaN in the inputs are cases here, not accidents."""
    return np.errstate(all="ignore")(function)


@quiet
def partition(logits):
    """Return `(x, peak, others)`: `lse = peak + log1p(others)`, others being relative to the peak."""
    x = exact(logits)
    peak = x.max(axis=-1, keepdims=True)
    terms = np.exp(x - peak)
    np.put_along_axis(terms, np.argmax(x, axis=-1)[..., None], 0, axis=-1)
    others = terms.sum(axis=-1, keepdims=True)
    # A row with a NaN or +inf, or with nothing but -inf, has no distribution.
    return x, peak, np.where(np.isfinite(peak), others, np.nan)


@quiet
def surprise(logits):
    """Return `lse - x_c` for every class."""
    x, peak, others = partition(logits)
    return (peak - x) + np.log1p(others)


@quiet
def logsumexp(logits) -> Exact:
    _, peak, others = partition(logits)
    value = np.where(np.isinf(peak), peak, peak + np.log1p(others))[..., 0]
    # Peak and log-sum may cancel: the error is that of the larger of the two.
    scale = np.where(np.isfinite(value), np.maximum(np.abs(peak), np.log1p(others))[..., 0], value)
    return Exact(value, scale, np.zeros_like(value))


@quiet
def wide_lse(logits) -> Exact:
    """Return the lse that comes in float64 whatever the logits: only the log of the sum has their error."""
    value, scale, nats = logsumexp(logits)
    if np.asarray(logits).dtype != np.float64:
        _, peak, others = partition(logits)
        tail = np.log1p(others)[..., 0]
        # 2**-29 takes an ulp of float32 to one of float64, in which the peak is added.
        scale = np.maximum(tail, np.ldexp(np.abs(peak[..., 0]), -29))
        nats = nats_ahead(tail)
    return Exact(value, np.where(np.isfinite(value), scale, value), nats)


@quiet
def softmax(logits) -> Exact:
    x, peak, others = partition(logits)
    value = np.exp(x - peak) / (1 + others)
    return Exact(value, value, peak - x)


@quiet
def log_softmax(logits) -> Exact:
    value = -surprise(logits)
    return Exact(value, value, nats_ahead(value))


@quiet
def entropy(logits) -> Exact:
    value = times(softmax(logits).value, surprise(logits)).sum(axis=-1)
    return Exact(value, value, nats_ahead(value))


@quiet
def figures(logits, target) -> tuple[np.ndarray, np.ndarray]:
    """Return the kernels' figures of each row, and the nats that its largest logit is ahead of all others."""
    x, _, others = partition(logits)
    labels = np.asarray(target)[..., None]
    number = np.arange(x.shape[-1])
    own = np.take_along_axis(x, labels, axis=-1)
    rank = 1 + (x > own).sum(axis=-1) + ((x == own) & (number < labels)).sum(axis=-1)
    top = np.argmax(x, axis=-1)
    others_squared = np.where(number == top[..., None], 0, softmax(logits).value ** 2).sum(axis=-1)
    columns = [rank, top, 1 / (1 + others[..., 0]), entropy(logits).value, others_squared]
    value = np.where(np.isnan(others), np.nan, np.stack(columns, axis=-1))
    return value, nats_ahead(others[..., 0])


@quiet
def linear(logits, beta, target, gamma, z_loss=0.0, scale=1.0) -> tuple[Exact, Exact]:
    """Return loss and gradient rows of `beta*(lse - x_y) + sum_c gamma_c*(lse - x_c) + z_loss*lse**2`.

    `target` and `beta` have the rows' shape, `gamma` broadcasts to the logits, `scale` multiplies the
    gradient's rows.
    """
    x, peak, others = partition(logits)
    costs = surprise(logits)
    lse = logsumexp(logits).value[..., None]
    is_target = np.arange(x.shape[-1]) == np.asarray(target)[..., None]
    beta = np.broadcast_to(exact(beta), x.shape[:-1])[..., None]
    gamma = np.broadcast_to(exact(gamma), x.shape)
    z_loss = exact(z_loss)

    loss = times(beta * is_target, costs).sum(-1) + times(gamma, costs).sum(-1)
    loss = loss + times(z_loss, lse * lse)[..., 0]
    # A row without a distribution is NaN also where its coefficients are zero.
    loss = np.where(np.isnan(others[..., 0]), np.nan, loss)
    coefficient = (beta + gamma.sum(-1, keepdims=True))[..., 0]
    value = Exact(loss, loss, nats_ahead(loss / coefficient))

    p = np.exp(x - peak) / (1 + others)
    rest = np.where(np.argmax(x, axis=-1)[..., None] == np.arange(x.shape[-1]), others / (1 + others), 1 - p)
    spread = gamma.sum(-1, keepdims=True) + times(z_loss, 2 * lse)
    terms = (np.where(is_target, -beta * rest, beta * p), spread * p, -gamma)
    scale = np.broadcast_to(exact(scale), x.shape[:-1])[..., None]
    gradient = scale * (terms[0] + terms[1] + terms[2])
    # Terms of opposite sign may cancel in every entry: errors are relative to the row's largest term.
    largest = np.maximum.reduce([np.abs(term) for term in np.broadcast_arrays(*terms)])
    largest = largest.max(axis=-1, keepdims=True)
    return value, Exact(gradient, np.abs(scale) * largest, nats_ahead(largest / np.abs(beta + spread)))


@quiet
def cross_entropy(
    logits, target, *, weight=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, scale=1.0
) -> tuple[Exact, Exact]:
    """Return the rows' losses and gradients for class indices; zero where a row is ignored."""
    n_classes = np.shape(logits)[-1]
    target = np.asarray(target)
    ignored = target == ignore_index
    label = np.where(ignored, 0, target).astype(np.int64)
    weight = np.ones(n_classes) if weight is None else weight
    eps = exact(label_smoothing)
    value, gradient = linear(
        logits, (1 - eps) * exact(weight)[label], label, eps / n_classes * exact(weight), z_loss, scale
    )
    return drop(value, ignored), drop(gradient, ignored[..., None])


@quiet
def soft_cross_entropy(
    logits, target, *, weight=None, label_smoothing=0.0, z_loss=0.0, scale=1.0
) -> tuple[Exact, Exact]:
    """Return the rows' losses and gradients for class probabilities."""
    n_classes = np.shape(logits)[-1]
    weight = np.ones(n_classes) if weight is None else weight
    eps = exact(label_smoothing)
    gamma = exact(weight) * ((1 - eps) * exact(target) + eps / n_classes)
    value, gradient = linear(logits, 0.0, np.zeros(np.shape(logits)[:-1], np.int64), gamma, z_loss, scale)
    return value, gradient


def drop(rows: Exact, ignored) -> Exact:
    """Return the same with zeros in ignored rows."""
    return Exact(*(np.where(ignored, 0, part) for part in rows))


@quiet
def nll(log_probabilities, target, *, weight=None, ignore_index=-100) -> Exact:
    """Return the rows' negative log-likelihood."""
    x = exact(log_probabilities)
    target = np.asarray(target)
    ignored = target == ignore_index
    label = np.where(ignored, 0, target).astype(np.int64)
    value = -np.take_along_axis(x, label[..., None], axis=-1)[..., 0]
    if weight is not None:
        value = times(exact(weight)[label], value)
    return drop(Exact(value, value, np.zeros_like(value)), ignored)


@quiet
def kl_div(log_probabilities, target, *, log_target=False) -> Exact:
    """Return the pointwise `target * (log target - input)`."""
    x, t = exact(log_probabilities), exact(target)
    t, log_t = (np.exp(t), t) if log_target else (t, np.log(np.where(t == 0, 1, t)))
    value = times(t, log_t - x)
    scale = np.maximum(np.abs(times(t, log_t)), np.abs(times(t, x)))
    # exp(target) carries the rounding of its argument, a nat an ulp
    return Exact(value, scale, np.abs(np.nan_to_num(log_t)) if log_target else np.zeros_like(value))


@quiet
def sigmoid(logits) -> Exact:
    x = exact(logits)
    e = np.exp(-np.abs(x))
    value = np.where(x >= 0, 1, e) / (1 + e)
    value = np.where(np.isnan(x), np.nan, value)
    return Exact(value, value, np.maximum(-x, 0))


@quiet
def log_sigmoid(logits) -> Exact:
    x = exact(logits)
    value = np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))
    return Exact(value, value, nats_ahead(value))


@quiet
def bce_with_logits(
    logits, target, *, weight=1.0, pos_weight=1.0, label_smoothing=0.0, scale=1.0
) -> tuple[Exact, Exact]:
    """Return the elements' losses and gradients; `weight` and `pos_weight` broadcast."""
    eps = exact(label_smoothing)
    y, not_y = (1 - eps) * exact(target) + eps / 2, (1 - eps) * (1 - exact(target)) + eps / 2
    x, y, not_y, weight, pos_weight = np.broadcast_arrays(
        exact(logits), y, not_y, exact(weight), exact(pos_weight)
    )
    positive, negative = pos_weight * y, not_y
    q = negative + positive
    tail = np.log1p(np.exp(-np.abs(x)))
    linear_part = times(np.where(x >= 0, negative, positive), np.abs(x))
    loss = times(weight, linear_part + times(q, tail))
    loss = np.where(np.isnan(x), np.nan, loss)
    # Inside [0, 1] both parts are non-negative; outside they may cancel.
    size = times(weight, np.abs(linear_part) + times(np.abs(q), tail))
    value = Exact(loss, np.where(np.isnan(size), loss, size), nats_ahead(linear_part + tail))

    wrong, right = sigmoid(x).value, sigmoid(-x).value
    terms = (times(weight * negative, wrong), -times(weight * positive, right))
    scale = exact(scale)
    gradient = np.where(np.isnan(x), np.nan, scale * (terms[0] + terms[1]))
    size = np.abs(scale) * np.maximum(np.abs(terms[0]), np.abs(terms[1]))
    nats = np.maximum(
        np.where(terms[0] != 0, nats_ahead(wrong), 0), np.where(terms[1] != 0, nats_ahead(right), 0)
    )
    return value, Exact(gradient, size, nats)


@quiet
def binary_cross_entropy(probabilities, target, *, weight=1.0) -> Exact:
    """Return the elements' losses with each log clamped at -100."""
    p, y = exact(probabilities), exact(target)
    log_p, log_q = np.maximum(np.log(p), -100), np.maximum(np.log1p(-p), -100)
    value = -exact(weight) * (times(y, log_p) + times(1 - y, log_q))
    return Exact(value, value, np.zeros_like(value))


@quiet
def reduced(rows: Exact, denominator=1.0) -> Exact:
    """Return the sum of the rows over a denominator; each row brings its own share of the bound."""
    total = rows.value.sum()
    size = np.abs(rows.scale).sum()
    nats = (np.abs(rows.scale) * np.broadcast_to(rows.nats, np.shape(rows.scale))).sum() / size
    denominator = exact(denominator)
    value = total / denominator
    return Exact(value, np.where(np.isfinite(size), size / np.abs(denominator), value), nats)


def label_weight(target, *, weight=None, ignore_index=-100, n_classes=None):
    """Return the mean's denominator for class indices."""
    target = np.asarray(target)
    counted = target[target != ignore_index]
    return exact(counted.size if weight is None else exact(weight)[counted].sum())
