"""Losses and gradients of cross-entropy against the oracle, over all sizes and all kinds of rows.

The zoo holds what is hard (growing and shifted rows, -inf in blocks, spikes, subnormals), the sizes stand
on both sides of every vector and block width; see `cases`. Weights, smoothing, probabilities and z-loss
are in `test_formulas`.
"""

import functools

import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import CLASSES, ROWS, VOCABULARIES, batch, frozen, rng_for, unfilled, zoo
from expected import batch_cross_entropy, zoo_cross_entropy, zoo_rows
from ulp import assert_exact, result_dtype

import logitloss as ll

SMALL = (1, 3, 10, 16, 17, 129, 1000)
EXTREME_WEIGHTS = [
    {"weight": [1e-300, 1e300, 1]},
    {"weight": [1e300, 1e300, 1], "z_loss": 1e-10},
    {"weight": [5e-324, 1, 1], "label_smoothing": 0.1},
]


@pytest.mark.parametrize("n_classes", CLASSES + VOCABULARIES)
def test_value_and_gradient(backend, dtype, n_classes):
    logits, target = zoo(n_classes, dtype)
    value, gradient = zoo_cross_entropy(n_classes, dtype)
    out = unfilled(logits.shape, dtype)
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, reduction="none", out=out, backend=backend)
    assert grad is out
    assert loss.dtype == result_dtype(dtype)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    # The value alone takes a path of its own.
    out = unfilled(target.shape, result_dtype(dtype))
    assert ll.cross_entropy(logits, target, reduction="none", out=out, backend=backend) is out
    assert_exact(out, value)


@pytest.mark.parametrize("n_classes", SMALL)
def test_gradient_alone(backend, dtype, n_classes):
    logits, target = zoo(n_classes, dtype)
    out = unfilled(logits.shape, dtype)
    assert ll.cross_entropy_grad(logits, target, reduction="none", out=out, backend=backend) is out
    assert_exact(out, zoo_cross_entropy(n_classes, dtype)[1])


@pytest.mark.parametrize("n_classes", SMALL)
def test_lse_beside_the_loss(backend, dtype, n_classes):
    logits, target = zoo(n_classes, dtype)
    loss, lse = ll.cross_entropy_and_lse(logits, target, reduction="none", backend=backend)
    assert lse.dtype == np.float64
    assert_exact(loss, zoo_cross_entropy(n_classes, dtype)[0])
    assert_exact(lse, zoo_rows("wide_lse", n_classes, dtype), dtype=dtype)


@pytest.mark.parametrize("n_classes", SMALL)
def test_gradient_from_a_kept_lse(backend, dtype, n_classes):
    logits, target = zoo(n_classes, dtype)
    _, lse = ll.cross_entropy_and_lse(logits, target, backend=backend)
    out = unfilled(logits.shape, dtype)
    ll.cross_entropy_grad(logits, target, lse=lse, reduction="none", out=out, backend=backend)
    # Half an ulp of the float64 lse is an error of |lse|/2 ulp in each float64 probability. Narrower
    # logits bring the error of their log-sum, counted in nats.
    size = np.abs(lse) if dtype == np.float64 else zoo_rows("wide_lse", n_classes, dtype).scale.astype(float)
    assert_exact(out, zoo_cross_entropy(n_classes, dtype)[1], extra=size[:, None] + 4)


@pytest.mark.parametrize("n_classes", [3, 100, 700])
@pytest.mark.parametrize("size", [4e4, 5e4, 1e5, 3e5, 5e7])
def test_gradient_from_the_lse_of_large_logits(backend, dtype, n_classes, size):
    """The lse of a row that stands so high has digits that its logits' type has not."""
    size, low = (min(size, 6e4), -6e4) if dtype == np.float16 else (size, -1e30)
    logits = np.full((2, n_classes), low, dtype)
    logits[0, :2], logits[1, 1:3] = size, size
    _, lse = ll.cross_entropy_and_lse(logits, [0, 0], reduction="none", backend=backend)
    found = ll.cross_entropy_grad(logits, [0, 0], lse=lse, reduction="none", backend=backend)
    wanted = np.zeros((2, n_classes))
    wanted[0, :2], wanted[1, 1:3], wanted[1, 0] = (-0.5, 0.5), 0.5, -1.0
    # half an ulp of the lse, as float64, and four of the result's type
    error = np.spacing(np.abs(lse)).max() + 4 * float(np.spacing(np.array(0.5, dtype)))
    np.testing.assert_allclose(found.astype(float), wanted, rtol=0, atol=error)


@pytest.mark.parametrize("n_classes", [8, 700])
def test_gradient_from_the_lse_of_a_row_that_is_all_masked(backend, dtype, n_classes):
    """By the lowest number, beside which the lse has no room for the classes' logarithm."""
    logits = np.full((2, n_classes), ml_dtypes.finfo(dtype).min, dtype)
    _, lse = ll.cross_entropy_and_lse(logits, [0, 1], reduction="none", backend=backend)
    found = ll.cross_entropy_grad(logits, [0, 1], lse=lse, reduction="none", backend=backend)
    wanted = 1 / n_classes - np.eye(2, n_classes)
    np.testing.assert_allclose(
        found.astype(float), wanted, rtol=8 * float(ml_dtypes.finfo(dtype).eps), atol=0
    )
    # also beside a row that holds NaN
    logits[0] = np.nan
    _, lse = ll.cross_entropy_and_lse(logits, [-100, 1], reduction="none", backend=backend)
    beside = ll.cross_entropy_grad(logits, [-100, 1], lse=lse, reduction="none", backend=backend)
    assert np.array_equal(beside[1], found[1])
    assert not beside[0].any()


@pytest.mark.sanitize
@pytest.mark.parametrize("n_classes", [1, 2, 3, 10, 17, 100])
def test_batches_below_at_and_above_a_block_of_rows(backend, dtype, n_classes):
    for n_rows in ROWS:
        logits, target = batch((n_rows, n_classes), dtype)
        value, gradient = batch_cross_entropy((n_rows, n_classes), dtype)
        out = unfilled(logits.shape, dtype)
        options = {"reduction": "none", "backend": backend}
        loss, grad = ll.cross_entropy_value_and_grad(logits, target, out=out, **options)
        assert_exact(loss, value)
        assert_exact(grad, gradient)
        assert_exact(ll.cross_entropy(logits, target, **options), value)


@functools.cache
def special_rows(n_classes, dtype, special):
    """Return logits, and labels with their exact results."""
    source, target = batch((n_classes + 3, n_classes), dtype)
    logits = source.copy()
    diagonal = np.arange(n_classes)
    logits[diagonal, diagonal] = special
    labels = (target, np.arange(n_classes + 3) % n_classes)
    return frozen(logits), [(each, oracle.cross_entropy(logits, each)) for each in labels]


@pytest.mark.sanitize
@pytest.mark.parametrize("n_classes", [1, 2, 5, 16, 35, 130])
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_special_value_anywhere(backend, dtype, n_classes, special):
    """In row i class i is special, at the label or beside it; the last rows are ordinary."""
    logits, cases = special_rows(n_classes, dtype, special)
    for labels, (value, gradient) in cases:
        loss, grad = ll.cross_entropy_value_and_grad(logits, labels, reduction="none", backend=backend)
        assert_exact(loss, value)
        assert_exact(grad, gradient)
        assert_exact(ll.cross_entropy(logits, labels, reduction="none", backend=backend), value)


@pytest.mark.parametrize("raw", [37.0, 232.8, 1000.0, 1e20])
def test_raw_values_where_forms_of_the_loss_break(backend, dtype, raw):
    if dtype == np.float16 and raw > 6e4:
        pytest.skip("float16 ends at 65504")
    edges = np.array([0.0, raw, -raw, raw + 1, 1.0]).astype(dtype)
    logits = np.stack([row.ravel() for row in np.meshgrid(*[edges] * 3)], axis=1)
    for label in range(3):
        target = np.full(len(logits), label)
        value, gradient = oracle.cross_entropy(logits, target)
        loss, grad = ll.cross_entropy_value_and_grad(logits, target, reduction="none", backend=backend)
        assert_exact(loss, value)
        assert_exact(grad, gradient)


def test_far_above_logits_that_are_all_positive(backend, dtype):
    """Ones longer than a chunk of 16-bit logits, of which neither the largest nor a negative one tells."""
    logits = (1 + np.abs(rng_for("positive").standard_normal((2, 8192)))).astype(dtype)
    logits[:, 5] = 1e4
    value, gradient = oracle.cross_entropy(logits, np.array([5, 6000]))
    loss, grad = ll.cross_entropy_value_and_grad(logits, [5, 6000], reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


def test_the_callers_floating_point_settings_have_no_say(backend, dtype):
    """Infinities, underflow and rounding to a narrow type raise nothing, and no mode is left behind."""
    logits = np.array([[np.inf, 1, 2], [np.nan, 1, 2], [-np.inf, -200, 300], [5e4, -5e4, 0]], dtype)
    with np.errstate(all="raise"):
        for options in ({}, {"label_smoothing": 0.1, "z_loss": 1.0}, {"weight": [0, 1, 2]}, *EXTREME_WEIGHTS):
            ll.cross_entropy_value_and_grad(logits, [0, 1, 1, 1], backend=backend, **options)
        soft = np.full((4, 3), 1 / 3).astype(dtype)
        for options in ({}, *EXTREME_WEIGHTS):
            ll.cross_entropy_value_and_grad(logits, soft, backend=backend, **options)
        for function in (ll.softmax, ll.log_softmax, ll.sigmoid, ll.log_sigmoid, ll.logsumexp, ll.entropy):
            function(logits, backend=backend)
        ll.binary_cross_entropy_with_logits_value_and_grad(logits, soft, backend=backend)
        ll.kl_div(logits, soft, backend=backend)
        ll.nll_loss(logits, [0, 1, 2, 0], weight=[0, 1, 2], backend=backend)
    assert np.float32(1e-40) * np.float32(1) > 0


@pytest.mark.parametrize("n_classes", [3, 17, 300])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced(backend, dtype, n_classes, reduction):
    logits, target = batch((33, n_classes), dtype)
    denominator = 33 if reduction == "mean" else 1
    value, gradient = oracle.cross_entropy(logits, target, scale=1 / np.longdouble(denominator))
    total = oracle.reduced(value, denominator)
    options = {"reduction": reduction, "backend": backend}
    both, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    for scalar in (ll.cross_entropy(logits, target, **options), both):
        assert type(scalar) is np.float64
        assert_exact(scalar, total, dtype=dtype)
    assert_exact(grad, gradient)
    assert_exact(ll.cross_entropy_grad(logits, target, **options), gradient)
    assert_exact(ll.cross_entropy_and_lse(logits, target, **options)[0], total, dtype=dtype)


def test_mean_is_the_default(backend):
    logits, target = batch((33, 17), np.dtype(np.float32))
    for function in (ll.cross_entropy, ll.cross_entropy_grad):
        default = function(logits, target, backend=backend)
        assert np.array_equal(default, function(logits, target, reduction="mean", backend=backend))


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_upstream_gradient_multiplies(backend, dtype, reduction):
    logits, target = batch((17, 10), dtype)
    upstream = np.linspace(-3, 3, 17) if reduction == "none" else -2.5
    scale = upstream / np.longdouble(17 if reduction == "mean" else 1)
    _, gradient = oracle.cross_entropy(logits, target, scale=scale)
    options = {"reduction": reduction, "backend": backend}
    assert_exact(ll.cross_entropy_grad(logits, target, upstream, **options), gradient)
    if reduction == "none":
        # One number serves all rows, and narrower floats do as well as float64.
        _, gradient = oracle.cross_entropy(logits, target, scale=0.5)
        assert_exact(ll.cross_entropy_grad(logits, target, 0.5, **options), gradient)
        assert_exact(ll.cross_entropy_grad(logits, target, np.full(17, 0.5, np.float16), **options), gradient)


@pytest.mark.parametrize(("upstream", "weight"), [(1e-50, 1e20), (1e40, 1e-20), (-1e60, 0)])
def test_upstream_gradients_beyond_float32(backend, dtype, upstream, weight):
    logits = np.array([[0.3, -2], [40, 0], [1, 2]], dtype)
    if dtype == np.float16 and upstream > 1:
        pytest.skip("float16 holds no entry of an ordinary scale here")
    target, weights = np.array([0, 0, 1]), np.array([weight, weight])
    expected = oracle.cross_entropy(logits, target, weight=weights, scale=np.longdouble(upstream))[1]
    options = {"weight": weights, "reduction": "sum", "backend": backend}
    assert_exact(ll.cross_entropy_grad(logits, target, upstream, **options), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [1e-300, 1e-44, 1e39, 1e300])
@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_beyond_float32(backend, dtype, reduction, size, soft):
    logits, target = batch((5, 4), dtype)
    if soft:
        target = np.random.default_rng(1).dirichlet(np.ones(4), 5)
    weight = np.array([1, 2, 0.5, 3])
    options = {"reduction": reduction, "label_smoothing": 0.125, "backend": backend}
    wanted, gradient = ll.cross_entropy_value_and_grad(logits, target, weight=weight, **options)
    found, grad = ll.cross_entropy_value_and_grad(logits, target, weight=size * weight, **options)
    factor = size if soft or reduction == "sum" else 1
    np.testing.assert_allclose(found, factor * wanted, rtol=1e-6)
    assert ll.cross_entropy(logits, target, weight=size * weight, **options) == pytest.approx(found, 1e-6)
    with np.errstate(over="ignore", under="ignore"):
        expected = (factor * gradient.astype(np.longdouble)).astype(dtype)
    if factor == 1 or dtype == np.float64:
        np.testing.assert_allclose(grad.astype(float), expected.astype(float), rtol=2e-2, atol=0)
    else:
        assert np.array_equal(np.isinf(grad), np.isinf(expected))


@pytest.mark.parametrize(
    "weight",
    [
        [1, 3e38],
        [1e-10, 1e27],
        [1e-30, 1e30],
        [1e-45, 1],
        [1e-300, 1],
        [5e-324, 1],
        [1e300, 1],
        [1e308, 1e308],
    ],
    ids=str,
)
def test_a_mean_is_of_the_weights_of_labels_that_are_there(backend, dtype, weight):
    logits, target = np.array([[11, 0], [3, 0]], dtype), [0, 0]
    wanted, gradient = ll.cross_entropy_value_and_grad(logits, target, backend=backend)
    options = {"weight": weight, "backend": backend}
    found, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    for value in (found, ll.cross_entropy(logits, target, **options)):
        assert value == pytest.approx(wanted, rel=1e-6)
    rtol = 4 * float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(grad.astype(float), gradient.astype(float), rtol=rtol, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_z_loss_beside_tiny_class_weights(backend, dtype, reduction):
    logits, target = batch((5, 4), dtype)
    soft = np.full(logits.shape, 0.25)
    for labels in (target, soft) if reduction == "sum" else (soft,):
        options = {"z_loss": 1e-3, "reduction": reduction, "backend": backend}
        wanted, gradient = ll.cross_entropy_value_and_grad(logits, labels, weight=np.zeros(4), **options)
        found, grad = ll.cross_entropy_value_and_grad(logits, labels, weight=np.full(4, 1e-60), **options)
        assert found == pytest.approx(wanted, rel=1e-6)
        np.testing.assert_allclose(grad.astype(float), gradient.astype(float), rtol=1e-2, atol=0)


def test_a_sum_of_float64_keeps_small_class_weights_beside_large_ones(backend):
    logits, weight = np.array([[1.0, 2, 3], [1, 2, 3]]), np.array([1e300, 1e-45, 1])
    options = {"reduction": "sum", "backend": backend}
    grad = ll.cross_entropy_grad(logits, [0, 1], weight=weight, **options)
    wanted = ll.cross_entropy_grad(logits[1:], [1], **options)
    np.testing.assert_allclose(grad[1] / 1e-45, wanted[0], rtol=1e-14)


def test_gradients_of_tiny_class_weights(backend):
    logits, options = np.array([[0, 33.3, 34]] * 40, np.float32), {"backend": backend}
    weight, target = np.full(3, 1e-116), np.ones(40, int)
    wanted = ll.cross_entropy_grad(logits, target, 1e-20, **options)
    found = ll.cross_entropy_grad(logits, target, 1e-20, weight=weight, **options)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("label_smoothing", [0, 0.1])
@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-42, 1e-46])
def test_rows_of_tiny_class_weights(backend, size, label_smoothing):
    rng = np.random.default_rng(8)
    logits, upstream = (4 * rng.standard_normal((6, 5))).astype(np.float32), 2.0 ** np.arange(6)
    target, weight = rng.integers(0, 5, 6), np.linspace(1, 3, 5)
    options = {"reduction": "none", "label_smoothing": label_smoothing}
    exact = {"weight": weight, "backend": "reference", **options}
    wanted, slopes = ll.cross_entropy_value_and_grad(logits.astype(float), target, **exact)
    options |= {"weight": size * weight, "backend": backend}
    with np.errstate(all="raise"):
        losses = ll.cross_entropy(logits, target, **options)
        found, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
        from_above = ll.cross_entropy_grad(logits, target, upstream, **options)
    pairs = (losses, wanted), (found, wanted), (grad, slopes), (from_above, slopes * upstream[:, None])
    for one, other in pairs:
        row = np.abs(other) if other.ndim == 1 else np.abs(other).max(axis=1, keepdims=True)
        assert (np.abs(one - size * other) <= np.maximum(1e-6 * size * row, 1e-45)).all()


def test_ignored_rows_do_not_count(backend, dtype):
    logits, target = batch((40, 10), dtype)
    target = target.copy()
    target[::3] = 7
    target[1] = 3
    options = {"ignore_index": 7, "backend": backend}
    value, gradient = oracle.cross_entropy(
        logits, target, ignore_index=7, scale=1 / oracle.label_weight(target, ignore_index=7)
    )
    mean, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    expected = oracle.reduced(value, oracle.label_weight(target, ignore_index=7))
    assert_exact(mean, expected, dtype=dtype)
    assert_exact(grad, gradient)
    rows = ll.cross_entropy(logits, target, reduction="none", **options)
    assert_exact(rows, value)
    assert not rows[::3].any()
    assert not grad[::3].any()


def test_ignored_rows_still_have_an_lse(backend, dtype):
    logits, target = batch((20, 17), dtype)
    target = np.where(np.arange(20) % 2, target, -100)
    _, lse = ll.cross_entropy_and_lse(logits, target, backend=backend)
    assert_exact(lse, oracle.wide_lse(logits), dtype=dtype)
