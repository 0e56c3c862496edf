"""The table of cases in which a loss could be defined one way or another, row by row.

Each test's id names the row it holds to. Values are written out by hand, in closed form, and so do not
rest on the oracle. A row of the table that is no pair of logits and target has a function of its own.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, INTEGERS, unfilled

import logitloss as ll

NAN, INF = math.nan, math.inf
LOG2, LOG3 = math.log(2), math.log(3)
LOG100 = math.log(100)
IGNORED = -100
# Half the classes of a row that is summed in several steps
N_FAR = 4500


class Case(NamedTuple):
    """A call of cross-entropy with what it returns."""

    logits: list
    target: list
    options: dict
    value: float
    gradient: list


def third(*numerators):
    return [n / 3 for n in numerators]


CASES = {
    "every row ignored, mean": Case(
        [[1, 2, 3], [4, 5, 6]], [IGNORED, IGNORED], {}, NAN, [[0, 0, 0], [0, 0, 0]]
    ),
    "every row ignored, sum": Case([[1, 2, 3]], [IGNORED], {"reduction": "sum"}, 0, [[0, 0, 0]]),
    "ignored row that holds NaN": Case(
        [[NAN, 1, 2], [0, 0, 0]], [IGNORED, 1], {}, LOG3, [[0, 0, 0], third(1, -2, 1)]
    ),
    "ignored row that holds inf": Case(
        [[INF, 1, -INF], [0, 0, 0]], [IGNORED, 1], {"z_loss": 0.0}, LOG3, [[0, 0, 0], third(1, -2, 1)]
    ),
    "-inf at another class": Case([[-INF, 0, 0]], [1], {}, LOG2, [[0, -0.5, 0.5]]),
    "-inf at the target": Case([[-INF, 0, 0]], [0], {}, INF, [[-1, 0.5, 0.5]]),
    "-inf with smoothing": Case([[-INF, 0, 0]], [1], {"label_smoothing": 0.3}, INF, [[-0.1, -0.3, 0.4]]),
    "-inf with smoothing: at the target": Case(
        [[-INF, 0, 0]], [0], {"label_smoothing": 0.3}, INF, [[-0.8, 0.4, 0.4]]
    ),
    "probability target 0 at -inf": Case([[-INF, 0, 0]], [[0.0, 0.25, 0.75]], {}, LOG2, [[0, 0.25, -0.25]]),
    "probability target over 0 at -inf": Case(
        [[-INF, 0, 0]], [[0.5, 0.25, 0.25]], {}, INF, [[-0.5, 0.25, 0.25]]
    ),
    "class weight 0 at -inf: with smoothing": Case(
        [[-INF, 0, 0]],
        [1],
        {"weight": [0, 1, 1], "label_smoothing": 0.3},
        0.9 * LOG2,  # 0.7 at the label and 0.1 at each class that weighs something
        [[0, 0.45 - 0.8, 0.45 - 0.1]],
    ),
    "class weight 0 at -inf: at the target": Case(
        [[-INF, 0, 0]], [0], {"weight": [0, 1, 1], "reduction": "sum"}, 0, [[0, 0, 0]]
    ),
    "class weight 0 at -inf: of probabilities": Case(
        [[-INF, 0, 0]], [[0.5, 0.25, 0.25]], {"weight": [0, 1, 1]}, 0.5 * LOG2, [[0, 0, 0]]
    ),
    "every logit -inf": Case([[-INF, -INF, -INF]], [0], {}, NAN, [[NAN, NAN, NAN]]),
    "any +inf: at the target": Case([[INF, 0, 1]], [0], {}, NAN, [[NAN, NAN, NAN]]),
    "any +inf: at another class": Case([[INF, 0, 1]], [2], {}, NAN, [[NAN, NAN, NAN]]),
    "any NaN in a row that counts": Case([[0, 1, NAN]], [0], {}, NAN, [[NAN, NAN, NAN]]),
    "any NaN in a row that counts: others are unharmed": Case(
        [[0, 1, NAN], [0, 0, 0]], [0, 1], {"reduction": "sum"}, NAN, [[NAN, NAN, NAN], third(1, -2, 1)]
    ),
    "any NaN in a row that counts: of probabilities": Case(
        [[NAN, 0, 0]], [[0.0, 0.5, 0.5]], {}, NAN, [[NAN, NAN, NAN]]
    ),
    "sum of weights 0, mean": Case([[1, 2, 3]], [1], {"weight": [1, 0, 1]}, NAN, [[NAN, NAN, NAN]]),
    "sum of weights 0, mean: with smoothing": Case(
        [[1, 2, 3]], [1], {"weight": [1, 0, 1], "label_smoothing": 0.1}, NAN, [[NAN, NAN, NAN]]
    ),
    "one class": Case([[3.5], [-2.0]], [0, 0], {"reduction": "sum"}, 0, [[0], [0]]),
}


def tolerance(dtype):
    return {"float16": 1e-3, "bfloat16": 8e-3, "float32": 5e-7, "float64": 1e-15}[dtype.name]


@pytest.mark.sanitize
@pytest.mark.parametrize("width", [1, 20], ids=["alone", "many rows"])
@pytest.mark.parametrize("row", CASES)
def test_row(backend, dtype, row, width):
    """Each case alone, and twenty times over, for the paths that take many rows at once."""
    case = CASES[row]
    logits = np.tile(np.array(case.logits, dtype), (width, 1))
    target = np.array(case.target)
    target = np.concatenate([target] * width)
    if target.dtype.kind == "f":
        target = target.astype(dtype)
    times = width if case.options.get("reduction") == "sum" else 1
    shrink = 1 if case.options.get("reduction") == "sum" else width
    out = unfilled(logits.shape, dtype)
    value, grad = ll.cross_entropy_value_and_grad(logits, target, out=out, backend=backend, **case.options)
    # Probabilities and rows are float32 for the narrow dtypes: their values are as good as float32's.
    loss_tolerance = tolerance(dtype) if dtype.itemsize > 2 else 5e-7
    for result in (value, ll.cross_entropy(logits, target, backend=backend, **case.options)):
        assert result == pytest.approx(times * case.value, rel=loss_tolerance, abs=0, nan_ok=True)
    expected = np.tile(np.array(case.gradient, float), (width, 1)) / shrink
    for result in (grad, ll.cross_entropy_grad(logits, target, backend=backend, **case.options)):
        assert np.allclose(result.astype(float), expected, rtol=0, atol=tolerance(dtype), equal_nan=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
@pytest.mark.parametrize(("row", "reduction"), [("empty batch, mean", "mean"), ("empty batch, sum", "sum")])
def test_empty_batch(backend, dtype, shape, row, reduction):
    logits = np.empty(shape, dtype)
    target = np.empty((shape[0], *shape[2:]), int)
    expected = NAN if reduction == "mean" else 0.0
    value, grad = ll.cross_entropy_value_and_grad(logits, target, reduction=reduction, backend=backend)
    assert value == pytest.approx(expected, nan_ok=True)
    assert grad.shape == shape
    assert grad.dtype == dtype
    soft = ll.cross_entropy(logits, np.empty(shape, dtype), reduction=reduction, backend=backend)
    assert soft == pytest.approx(expected, nan_ok=True)
    binary = ll.binary_cross_entropy_with_logits(logits, logits, reduction=reduction, backend=backend)
    assert binary == pytest.approx(expected, nan_ok=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [5, -1, 2**31, -(2**31), 2**62])
@pytest.mark.parametrize("row", ["label out of range: IndexError names row, label and range"])
def test_label_out_of_range(backend, dtype, row, bad):
    target = np.zeros((4, 30), np.int64)
    target[2, 7] = bad
    target[3, 1] = 99
    logits = np.zeros((4, 5, 30), dtype)
    message = rf"^target\[2, 7\] is {bad}, but logits have 5 classes: expected 0 <= target < 5"
    for function in (ll.cross_entropy, ll.cross_entropy_grad, ll.cross_entropy_value_and_grad):
        with pytest.raises(IndexError, match=message):
            function(logits, target, backend=backend)


@pytest.mark.parametrize("row", ["int32 labels: any integer dtype is accepted"])
def test_any_integer_dtype(backend, dtype, row):
    logits = np.array([[0, LOG2, -INF], [0, -INF, 0]], dtype)
    for integer in INTEGERS:
        value = ll.cross_entropy(logits, np.array([0, 2], integer), backend=backend)
        assert value == pytest.approx((LOG3 + LOG2) / 2, rel=2e-3)


@pytest.mark.parametrize("row", ["`logsumexp` of all -inf is -inf"])
def test_logsumexp_of_all_minus_inf(backend, dtype, row):
    logits = np.array([[-INF, -INF, -INF], [0, -INF, 0]], dtype)
    assert ll.logsumexp(logits, backend=backend).tolist() == [-INF, pytest.approx(LOG2)]
    _, lse = ll.cross_entropy_and_lse(logits, [0, 0], backend=backend)
    assert lse.tolist() == [-INF, pytest.approx(LOG2)]


@pytest.mark.parametrize("eps", [-0.1, -1e-300, 1.0000001, 2.0, NAN, INF])
@pytest.mark.parametrize("row", ["label_smoothing outside [0, 1]: ValueError both ways"])
def test_label_smoothing_outside(row, eps):
    for target in ([0], np.array([[0.5, 0.5]])):
        with pytest.raises(ValueError, match="label_smoothing"):
            ll.cross_entropy(np.zeros((1, 2)), target, label_smoothing=eps, backend="reference")
    with pytest.raises(ValueError, match="label_smoothing"):
        ll.binary_cross_entropy_with_logits([0.0], [1], label_smoothing=eps, backend="reference")


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("x", "y", "loss", "slope"),
    [
        (INF, 1, 0, 0),
        (INF, 0, INF, 1),
        (-INF, 1, INF, -1),
        (-INF, 0, 0, 0),
        (NAN, 0, NAN, NAN),
        (NAN, 1, NAN, NAN),
    ],
)
@pytest.mark.parametrize("row", ["BCE at x = +inf/-inf: the limits"])
def test_bce_limits(backend, dtype, row, x, y, loss, slope):
    logits, target = np.full(19, x, dtype), np.full(19, y)
    value, grad = ll.binary_cross_entropy_with_logits_value_and_grad(
        logits, target, reduction="none", backend=backend
    )
    assert np.array_equal(value, np.full(19, loss, value.dtype), equal_nan=True)
    assert np.array_equal(grad.astype(float), np.full(19, slope, float), equal_nan=True)
    value, grad = ll.logistic_loss_value_and_grad(logits, 2 * target - 1, reduction="none", backend=backend)
    assert np.array_equal(value, np.full(19, loss, value.dtype), equal_nan=True)
    assert np.array_equal(grad.astype(float), np.full(19, slope, float), equal_nan=True)


@pytest.mark.parametrize("row", ["BCE at 1e20, wrong side: 1e20"])
def test_bce_at_1e20(backend, dtype, row):
    far = 1e20 if dtype != np.float16 else 6e4
    logits = np.array([far, -far, far, -far], dtype)
    value, grad = ll.binary_cross_entropy_with_logits_value_and_grad(
        logits, [0, 1, 1, 0], reduction="none", backend=backend
    )
    assert value.tolist() == [float(logits[0]), float(logits[0]), 0, 0]
    assert grad.astype(float).tolist() == [1, -1, 0, 0]


@pytest.mark.parametrize("row", ["float16/bfloat16, mean of 4000 rows: float32 rows, float64 total"])
def test_mean_of_4000_narrow_rows(backend, dtype, row):
    # Loss log(79.72...): 4.3785; float16's own accumulator would stop at a multiple of 1/256.
    logits = np.zeros((4000, 79), dtype)
    logits[:, 0] = 0.546875
    others = 78 * math.exp(-0.546875)
    expected = math.log1p(others) + 0.546875
    value = ll.cross_entropy(logits, np.ones(4000, int), backend=backend)
    assert value == pytest.approx(expected, rel=3e-7 if dtype != np.float64 else 2e-15)


@pytest.mark.parametrize("row", ["the scalar of mean/sum: float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scalar_is_float64(backend, dtype, row, reduction):
    x, log_p, half = np.zeros((3, 4), dtype), np.full((3, 4), -1.5, dtype), np.full((3, 4), 0.5, dtype)
    options = {"reduction": reduction, "backend": backend}
    scalars = [
        ll.cross_entropy(x, [0, 1, 2], **options),
        ll.cross_entropy(x, half, **options),
        ll.cross_entropy_and_lse(x, [0, 1, 2], **options)[0],
        ll.cross_entropy_value_and_grad(x, [0, 1, 2], **options)[0],
        ll.nll_loss(log_p, [0, 1, 2], **options),
        ll.kl_div(log_p, half, **options),
        ll.entropy(x, **options),
        ll.binary_cross_entropy_with_logits(x, half, **options),
        ll.binary_cross_entropy_with_logits_value_and_grad(x, half, **options)[0],
        ll.binary_cross_entropy(half, half, **options),
        ll.logistic_loss(x, np.ones((3, 4)), **options),
        ll.logistic_loss_value_and_grad(x, np.ones((3, 4)), **options)[0],
    ]
    assert {type(scalar) for scalar in scalars} == {np.float64}
    assert all(np.isfinite(scalars))


@pytest.mark.parametrize("low", [-1e20, -1e30, None])
def test_classes_ruled_out_by_the_lowest_number(backend, dtype, low):
    """As many as a pass takes at a time, and the rest; their distance is more than an exponent holds."""
    lowest = float(ml_dtypes.finfo(dtype).min)
    logits = np.full((3, 2 * N_FAR), lowest if low is None else max(low, lowest), dtype)
    logits[0, N_FAR:], logits[1, :N_FAR], logits[2, [0, -1]] = 0, 0, 0
    value, grad = ll.cross_entropy_value_and_grad(logits, [-1 % (2 * N_FAR), 0, 0], backend=backend)
    counts = np.array([N_FAR, N_FAR, 2])
    assert value == pytest.approx(np.log(counts).mean(), rel=1e-6)
    assert ll.logsumexp(logits, backend=backend).astype(float) == pytest.approx(np.log(counts), rel=1e-2)
    p = (logits == 0) / counts[:, None]
    assert np.allclose(ll.softmax(logits, backend=backend).astype(float), p, rtol=1e-2, atol=0)
    p[[0, 1, 2], [-1, 0, 0]] -= 1
    assert np.allclose(grad.astype(float), p / 3, rtol=1e-2, atol=0)


@pytest.mark.sanitize
@pytest.mark.parametrize("low", [-250, -104, 3, 200])
@pytest.mark.parametrize("places", [slice(N_FAR), slice(N_FAR, None), slice(100, 2 * N_FAR - 100)], ids=str)
def test_a_stretch_of_classes_at_minus_infinity(backend, dtype, low, places):
    """They take no part, wherever the others are: 0 in softmax and gradient, exactly."""
    x = np.full((3, 2 * N_FAR), low, dtype)
    x[:, places] = -INF
    others = x[0] > -INF
    labels = np.full(3, np.flatnonzero(others)[-1])
    p = np.where(others, 1 / np.count_nonzero(others), 0)
    expected = p - (np.arange(2 * N_FAR) == labels[0])
    close = {"rtol": 8 * float(ml_dtypes.finfo(dtype).eps), "atol": 0}
    assert_rows(ll.softmax(x, backend=backend), p, **close)
    value, gradient = ll.cross_entropy_value_and_grad(x, labels, reduction="sum", backend=backend)
    assert value == pytest.approx(3 * math.log(np.count_nonzero(others)), rel=1e-6)
    assert_rows(gradient, expected, **close)
    soft = np.zeros(x.shape, dtype)
    soft[:, labels[0]] = 1
    assert_rows(ll.cross_entropy_grad(x, soft, reduction="sum", backend=backend), expected, **close)


def assert_rows(found, row, **close):
    np.testing.assert_allclose(found.astype(float), np.broadcast_to(row, found.shape), **close)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"weight": np.arange(2 * N_FAR)}], ids=str)
def test_smoothing_over_a_whole_stretch_at_minus_infinity(backend, dtype, options):
    logits = np.full((2, 2 * N_FAR), -INF, dtype)
    logits[0, -100:], logits[1, :100] = 0, 0
    options = {"reduction": "none", "backend": backend, **options}
    value = ll.cross_entropy(logits, [2 * N_FAR - 1, 50], **options)
    soft = np.full(logits.shape, 1 / 1024, dtype)
    if "weight" in options:
        assert value.astype(float) == pytest.approx([LOG100 * (2 * N_FAR - 1), LOG100 * 50], rel=1e-2)
    else:
        assert value.tolist() == [INF, INF]
        assert ll.cross_entropy(logits, soft, **options).tolist() == [INF, INF]


@pytest.mark.parametrize("row", ["a loss near 0: relative precision kept"])
@pytest.mark.parametrize("ahead", [9, 20, 40, 60])
def test_loss_near_zero(backend, dtype, row, ahead):
    """To first order the loss is the sum of the others' exponentials."""
    logits = np.zeros((20, 101), dtype)
    logits[np.arange(20), np.arange(20) * 5] = ahead
    expected = math.log1p(100 * math.exp(-ahead))
    epsilon = 2.0**-23 if dtype != np.float64 else 2.0**-52
    bound = (4 if dtype != np.float64 else 8) + max(0.0, -math.log(expected))
    value, grad = ll.cross_entropy_value_and_grad(
        logits, np.arange(20) * 5, reduction="none", backend=backend
    )
    assert value.tolist() == pytest.approx([expected] * 20, rel=bound * epsilon)
    slope = math.expm1(-expected)
    at_target = grad[np.arange(20), np.arange(20) * 5].astype(float)
    stored = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype.name, 0)
    # float16 has nothing below 6e-8, where a unit is all there is.
    floor = 2.0**-25 if dtype == DTYPES["float16"] else 0
    assert at_target.tolist() == pytest.approx([slope] * 20, rel=bound * epsilon + stored, abs=floor)
