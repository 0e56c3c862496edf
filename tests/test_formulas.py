"""Class weights, smoothing, z-loss and class probabilities: values, gradients and denominators.

Every combination goes through the oracle's formula and, once more, through the slope of the package's own
loss in float64, which no error in a shared formula can pass.
"""

import functools

import numpy as np
import oracle
import pytest
from cases import batch, frozen, make_row, probabilities, rng_for, unfilled
from expected import batch_cross_entropy, batch_soft_cross_entropy
from ulp import assert_exact

import logitloss as ll

SHAPES = [(17, 3), (20, 10), (5, 33), (40, 127), (3, 300)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_left_of_the_call_before(backend, dtype, bad):
    """Of rows that do not fill a vector the rest of it once held the weights of another call."""
    if backend == "cuda":
        pytest.skip("nothing there is kept on a stack")
    logits, weight = np.array([[1, 2, 3]], dtype), [1.0, 2.0, 1.0]
    wanted, grad = ll.cross_entropy_value_and_grad(logits, [0], weight=weight, backend=backend)
    for n_classes in (3, 24):
        poison = np.zeros((1000, n_classes), dtype), np.arange(1000) % n_classes
        ll.cross_entropy(*poison, weight=np.full(n_classes, bad), reduction="sum", backend=backend)
        assert ll.cross_entropy(logits, [0], weight=weight, backend=backend) == wanted
        found = ll.cross_entropy_value_and_grad(logits, [0], weight=weight, backend=backend)
        assert (found[0], found[1].tolist()) == (wanted, grad.tolist())


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("n_classes", [5, 60, 700])
def test_gradients_keep_their_digits_however_small_the_upstream_one(backend, n_classes, by_row):
    logits, target = batch((40, n_classes), np.dtype(np.float32))
    logits = logits.copy()
    logits[:, 0] -= 33  # what exponentials are relative to at first
    options = {"reduction": "none", "backend": backend}
    plain = ll.cross_entropy_grad(logits, target, **options)
    for upstream in (2.0**-41, -(2.0**-60), 2.0**-100):
        given = np.full(40, upstream) if by_row else upstream
        if by_row:
            given[::3] = 1
        found = ll.cross_entropy_grad(logits, target, given, **options)
        wanted = plain.astype(float) * np.broadcast_to(given, 40)[:, None]
        scale = np.abs(wanted).max(axis=1, keepdims=True)
        assert (np.abs(found - wanted) <= 4 * 2.0**-23 * scale).all()


@pytest.mark.parametrize("has_lse", [False, True])
@pytest.mark.parametrize("n_classes", [2, 6, 20, 64, 65, 300])
def test_a_class_that_weighs_more_than_all_others(backend, dtype, n_classes, has_lse):
    """It is the top, and the label is another: the top's entry is what is left of large terms."""
    logits = batch((7, n_classes), dtype)[0].copy()
    logits[:, 0], target = 14, np.ones(7, int)
    weight = np.ones(n_classes)
    weight[0] = 1e6
    options = {"weight": tuple(weight), "label_smoothing": 0.1}
    _, gradient = oracle.cross_entropy(logits, target, **options)
    options |= {"reduction": "none", "backend": backend}
    lse = ll.cross_entropy_and_lse(logits, target, **options)[1] if has_lse else None
    found = ll.cross_entropy_grad(logits, target, lse=lse, **options)
    extra = np.abs(lse).max() + 4 if has_lse else 0
    assert_exact(found, gradient, extra=extra)


def test_the_divisor_of_a_weighted_mean_is_exact(backend):
    rng, weight = rng_for("divisor"), np.array([0.1, 0.7, 0.3])
    n = 300 if backend == "cuda" else 20_000
    target = rng.integers(0, 3, n)
    logits = np.zeros((n, 3))
    grad = ll.cross_entropy_grad(logits, target, weight=weight, backend=backend)
    w = weight.astype(np.longdouble)[target]
    wanted = (np.full((n, 3), w[:, None] / 3) - w[:, None] * (np.arange(3) == target[:, None])) / w.sum()
    assert (np.abs(grad - wanted) <= 8 * np.spacing(np.abs(grad).max(axis=1, keepdims=True))).all()


# Weights are given as a tuple, so that exact results can be cached by their options.
COMBINATIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "little smoothing": {"label_smoothing": 1e-3},
    "all smoothing": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-3},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.25},
    "weight, smoothing, z-loss": {"weight": True, "label_smoothing": 0.25, "z_loss": 0.5},
}


def options_of(name: str, n_classes: int) -> dict:
    """Return the keyword arguments of a combination; one of the weights is zero."""
    options = dict(COMBINATIONS[name])
    if "weight" in options:
        weight = rng_for("weight", n_classes).uniform(0.25, 3, n_classes)
        weight[n_classes // 2] = 0
        options["weight"] = tuple(weight)
    return options


def slope(function, logits, step=1e-5):
    """Return the central differences of a scalar function of float64 logits."""
    result = np.empty_like(logits)
    for index in np.ndindex(logits.shape):
        moved = logits.copy()
        moved[index] += step
        up = function(moved)
        moved[index] -= 2 * step
        result[index] = (up - function(moved)) / (2 * step)
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_labels(backend, dtype, shape, name):
    logits, target = batch(shape, dtype)
    options = options_of(name, shape[1])
    value, gradient = batch_cross_entropy(shape, dtype, **options)
    out = unfilled(shape, dtype)
    loss, _ = ll.cross_entropy_value_and_grad(
        logits, target, reduction="none", out=out, backend=backend, **options
    )
    assert_exact(loss, value)
    assert_exact(out, gradient)
    assert_exact(ll.cross_entropy(logits, target, reduction="none", backend=backend, **options), value)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", COMBINATIONS)
def test_probabilities(backend, dtype, shape, name):
    logits, _ = batch(shape, dtype)
    target = probabilities(shape, dtype)
    options = options_of(name, shape[1])
    value, gradient = batch_soft_cross_entropy(shape, dtype, **options)
    out = unfilled(shape, dtype)
    loss, _ = ll.cross_entropy_value_and_grad(
        logits, target, reduction="none", out=out, backend=backend, **options
    )
    assert_exact(loss, value)
    assert_exact(out, gradient)
    assert_exact(ll.cross_entropy(logits, target, reduction="none", backend=backend, **options), value)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_reductions_of_labels(backend, dtype, name, reduction):
    logits, target = batch((20, 10), dtype)
    target = np.where(np.arange(20) % 5 == 1, -1, target)
    options = {"ignore_index": -1, **options_of(name, 10)}
    denominator = np.longdouble(1)
    if reduction == "mean":
        denominator = oracle.label_weight(target, weight=options.get("weight"), ignore_index=-1)
    value, gradient = oracle.cross_entropy(logits, target, scale=1 / denominator, **options)
    result, grad = ll.cross_entropy_value_and_grad(
        logits, target, reduction=reduction, backend=backend, **options
    )
    assert_exact(result, oracle.reduced(value, denominator), dtype=dtype)
    assert_exact(grad, gradient)
    assert_exact(
        ll.cross_entropy(logits, target, reduction=reduction, backend=backend, **options),
        oracle.reduced(value, denominator),
        dtype=dtype,
    )


@pytest.mark.parametrize("name", COMBINATIONS)
def test_mean_of_probabilities_divides_by_rows_never_by_weights(backend, dtype, name):
    logits, _ = batch((20, 10), dtype)
    target = probabilities((20, 10), dtype)
    options = options_of(name, 10)
    value, gradient = oracle.soft_cross_entropy(logits, target, scale=1 / np.longdouble(20), **options)
    result, grad = ll.cross_entropy_value_and_grad(logits, target, backend=backend, **options)
    assert_exact(result, oracle.reduced(value, 20), dtype=dtype)
    assert_exact(grad, gradient)


def test_probabilities_need_not_sum_to_one(backend, dtype):
    logits, _ = batch((9, 17), dtype)
    target = (2.5 * probabilities((9, 17), dtype).astype(float)).astype(dtype)
    value, gradient = oracle.soft_cross_entropy(logits, target)
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@pytest.mark.parametrize("target_dtype", ["float16", "float32", "float64"])
def test_probabilities_of_another_float_dtype(backend, dtype, target_dtype):
    logits, _ = batch((9, 17), dtype)
    target = probabilities((9, 17), np.dtype(target_dtype))
    value, gradient = oracle.soft_cross_entropy(logits, target)
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    assert grad.dtype == dtype


def test_one_hot_probabilities_cost_what_the_label_costs(backend, dtype):
    logits, target = batch((20, 10), dtype)
    one_hot = np.eye(10)[target].astype(dtype)
    value, gradient = batch_cross_entropy((20, 10), dtype, label_smoothing=0.1)
    loss, grad = ll.cross_entropy_value_and_grad(
        logits, one_hot, label_smoothing=0.1, reduction="none", backend=backend
    )
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@pytest.mark.parametrize("weight_dtype", ["int32", "uint8", "bool", "float16", "float32"])
def test_weights_of_any_real_dtype(backend, weight_dtype):
    dtype = np.dtype(np.float32)
    logits, target = batch((20, 10), dtype)
    weight = frozen(np.arange(10).astype(weight_dtype))
    value, _ = oracle.cross_entropy(logits, target, weight=weight)
    assert_exact(ll.cross_entropy(logits, target, weight=weight, reduction="none", backend=backend), value)
    strided = np.repeat(weight, 2)[::2]
    assert_exact(ll.cross_entropy(logits, target, weight=strided, reduction="none", backend=backend), value)


@pytest.mark.parametrize("name", COMBINATIONS)
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_gradient_is_the_slope_of_the_loss(backend, dtype, name, kind):
    logits, target = batch((4, 5), dtype)
    options = {"backend": backend, **options_of(name, 5)}
    if kind == "probabilities":
        target = probabilities((4, 5), dtype)
    grad = ll.cross_entropy_grad(logits, target, **options)
    expected = slope(lambda x: ll.cross_entropy(x, target, **options), logits.astype(np.float64))
    # Differences of the float64 loss are good to about 1e-10; the rest is the rounding of the dtype.
    tolerance = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-9}[dtype.name]
    assert np.allclose(grad.astype(np.float64), expected, rtol=tolerance, atol=tolerance / 100 + 1e-9)


@functools.cache
def vocabulary(kind, dtype):
    """Return a row of logits and a third everywhere, with the exact losses of both kinds of target."""
    logits = make_row(kind, 131072, dtype)[None]
    soft = np.full(logits.shape, 1 / 3).astype(dtype)
    smoothed, _ = oracle.cross_entropy(logits, [5], label_smoothing=0.3)
    return frozen(logits), frozen(soft), smoothed, oracle.soft_cross_entropy(logits, soft)


@pytest.mark.parametrize("kind", ["background", "normal", "rising"])
def test_sums_over_a_vocabulary(backend, dtype, kind):
    """Sums of 131072 terms that round the same way keep to the bound of a short row."""
    logits, soft, smoothed, (value, gradient) = vocabulary(kind, dtype)
    options = {"reduction": "none", "backend": backend}
    loss = ll.cross_entropy(logits, [5], label_smoothing=0.3, **options)
    assert_exact(loss, smoothed)
    loss, grad = ll.cross_entropy_value_and_grad(logits, soft, **options)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


def test_smoothing_at_a_large_offset_and_spread(backend, dtype):
    """Sums of gamma*(lse - x_c) must not be taken as differences of sums."""
    n_classes = 1000
    x = 3 * rng_for("offset smoothing").standard_normal((6, n_classes))
    x[:3] += 1e4 if dtype != np.float16 else 3e4
    x[3] -= np.linspace(0, 500, n_classes)
    x[4] += np.linspace(0, 500, n_classes)
    logits = x.astype(dtype)
    target = np.array([0, 999, 5, 0, 999, 17])
    value, gradient = oracle.cross_entropy(logits, target, label_smoothing=0.1)
    loss, grad = ll.cross_entropy_value_and_grad(
        logits, target, label_smoothing=0.1, reduction="none", backend=backend
    )
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    soft = probabilities((6, n_classes), dtype)
    value, gradient = oracle.soft_cross_entropy(logits, soft)
    loss, grad = ll.cross_entropy_value_and_grad(logits, soft, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
