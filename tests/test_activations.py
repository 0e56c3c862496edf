"""logsumexp, softmax, sigmoid and their logarithms, entropy, KL divergence and NLL against the oracle."""

import math

import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import CLASSES, batch, probabilities, unfilled, zoo
from expected import zoo_rows
from ulp import assert_exact, exact, result_dtype

import logitloss as ll

INF = np.inf


@pytest.mark.parametrize("n_classes", [*CLASSES, 50257])
@pytest.mark.parametrize("name", ["logsumexp", "entropy"])
def test_numbers_of_rows(backend, dtype, n_classes, name):
    logits, _ = zoo(n_classes, dtype)
    out = unfilled(len(logits), result_dtype(dtype))
    assert getattr(ll, name)(logits, out=out, backend=backend) is out
    assert_exact(out, zoo_rows(name, n_classes, dtype))


@pytest.mark.parametrize("n_classes", [*CLASSES, 50257])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_distributions(backend, dtype, n_classes, name):
    logits, _ = zoo(n_classes, dtype)
    out = unfilled(logits.shape, dtype)
    assert getattr(ll, name)(logits, out=out, backend=backend) is out
    assert_exact(out, zoo_rows(name, n_classes, dtype))


@pytest.mark.parametrize("name", ["sigmoid", "log_sigmoid"])
def test_sigmoids(backend, dtype, name):
    edges = np.array([0, 1e-30, 1e-5, 1, 17, 37, 87, 88.5, 100, 103.5, 104, 232.8, 745, 1000, 6e4, INF])
    x = np.concatenate([edges, -edges, [np.nan], np.linspace(-110, 110, 333)]).astype(dtype)
    out = unfilled(x.shape, dtype)
    assert getattr(ll, name)(x, out=out, backend=backend) is out
    assert_exact(out, getattr(oracle, name)(x))


@pytest.mark.parametrize(
    ("row", "lse"),
    [([-INF, -INF], -INF), ([INF, 0], INF), ([INF, -INF], INF), ([INF, INF], INF), ([np.nan, 1], np.nan)],
)
def test_rows_without_a_distribution(backend, dtype, row, lse):
    """Their logsumexp is what the definition gives, all else is NaN."""
    logits = np.tile(np.array([0.0, 0.0, *row, row[0]], dtype)[2:], (19, 1))
    out = ll.logsumexp(logits, backend=backend)
    assert np.array_equal(out, np.full(19, lse, out.dtype), equal_nan=True)
    for function in (ll.softmax, ll.log_softmax, ll.entropy):
        assert np.isnan(function(logits, backend=backend).astype(float)).all()


def test_logsumexp_with_nan_beside_infinity_is_nan(backend, dtype):
    logits = np.array([[INF, np.nan, 0], [np.nan, -INF, INF], [-INF, np.nan, -INF]], dtype)
    assert np.isnan(ll.logsumexp(logits, backend=backend)).all()


@pytest.mark.parametrize("n_classes", [1, 3, 60])
def test_nan_is_told_wherever_it_stands(backend, dtype, n_classes):
    logits = np.full((17, n_classes), -INF, dtype)
    logits[np.arange(17), np.arange(17) % n_classes] = np.nan
    assert np.isnan(ll.logsumexp(logits, backend=backend)).all()
    assert np.isnan(ll.logsumexp(logits.T, axis=0, backend=backend)).all()
    loss, lse = ll.cross_entropy_and_lse(logits, np.zeros(17, int), reduction="none", backend=backend)
    assert np.isnan([loss, lse]).all()


def test_sums_of_many_classes_in_float64(backend):
    """Of chunk after chunk, each sum is rounded: what that takes is not to grow with their number."""
    if backend == "cuda":
        pytest.skip("too many classes for the simulator")
    logits = np.full((1, 262_143), 0.7)
    logits[:, ::3] = 0.8
    p = np.exp(logits.astype(np.longdouble) - 0.8)
    p /= p.sum()
    for actual, wanted in (
        (ll.entropy(logits, backend=backend), -(p * np.log(p)).sum(axis=1)),
        (ll.softmax(logits, backend=backend), p),
    ):
        assert (np.abs(actual - wanted) <= 4 * np.spacing(wanted.astype(float))).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_entropy_reduced(backend, dtype, reduction):
    logits, _ = batch((2, 33, 10), dtype)
    expected = oracle.reduced(oracle.entropy(logits), 66 if reduction == "mean" else 1)
    assert_exact(ll.entropy(logits, reduction=reduction, backend=backend), expected, dtype=dtype)


def test_entropy_in_closed_form(backend, dtype):
    """Of n equal classes log n, whatever stands at -inf beside them; of one class 0."""
    logits = np.full((3, 64), 2.0, dtype)
    logits[1, ::2] = -INF
    logits[2, 1:] = -INF
    result = ll.entropy(logits, backend=backend)
    assert result.tolist() == pytest.approx([np.log(64), np.log(32), 0.0], rel=3e-7)


@pytest.mark.parametrize("weight", [None, np.linspace(0, 2, 33)], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nll(backend, dtype, reduction, weight):
    log_p, target = batch((2, 20, 33), dtype)
    log_p = -np.abs(log_p)
    target = np.where(np.arange(20) % 4 == 3, -100, target)
    expected = oracle.nll(log_p, target, weight=weight)
    result = ll.nll_loss(log_p, target, weight=weight, reduction=reduction, axis=-1, backend=backend)
    if reduction == "none":
        assert result.dtype == result_dtype(dtype)
        assert_exact(result, expected)
    else:
        denominator = oracle.label_weight(target, weight=weight) if reduction == "mean" else 1
        assert_exact(result, oracle.reduced(expected, denominator), dtype=dtype)


@pytest.mark.parametrize("weight", [None, np.linspace(1, 2, 17)], ids=["plain", "weighted"])
def test_cross_entropy_is_nll_of_log_softmax(backend, weight):
    for dtype, bound in ((np.float32, 1e-6), (np.float64, 1e-14)):
        logits, target = batch((40, 17), np.dtype(dtype))
        options = {"weight": weight, "backend": backend}
        log_p = ll.log_softmax(logits, axis=1, backend=backend)
        expected = ll.nll_loss(log_p, target, **options)
        assert ll.cross_entropy(logits, target, **options) == pytest.approx(expected, rel=bound)


def test_means_of_many_equal_losses(backend):
    """Added one by one, 4096 of 0.3 are 351 ulp off."""
    n = 3 * 4096
    p, log_p = np.full(n, 1 / 3), np.full((n, 2), -0.3)
    for found, wanted in (
        (ll.nll_loss(log_p, np.zeros(n, int), backend=backend), 0.3),
        (ll.binary_cross_entropy(p, np.ones(n), backend=backend), -math.log(1 / 3)),
        (ll.kl_div(log_p, np.full((n, 2), 0.3), backend=backend), 0.3 * (math.log(0.3) + 0.3)),
    ):
        assert found == pytest.approx(wanted, rel=1e-15)


def test_nll_of_infinite_log_probabilities(backend, dtype):
    log_p = np.array([[-INF, 0.0], [-INF, 0.0], [np.nan, -1.0]], dtype)
    options = {"reduction": "none", "backend": backend}
    assert ll.nll_loss(log_p, [0, 1, 1], **options).tolist() == [INF, 0, 1]
    assert ll.nll_loss(log_p, [0, 1, 1], weight=[0, 1], **options).tolist() == [0, 0, 1]
    assert ll.nll_loss(log_p, [-100, -100, 0], **options)[:2].tolist() == [0, 0]
    assert np.isnan(ll.nll_loss(log_p, [-100, -100, 0], **options)[2])


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("target_dtype", ["float16", "bfloat16", "float32", "float64"])
def test_kl_div(backend, dtype, log_target, target_dtype):
    log_p = ll.log_softmax(batch((9, 37), dtype)[0], backend="reference")
    target = probabilities((9, 37), np.dtype(np.float64))
    if log_target:
        target = np.log(np.maximum(target, 1e-30))
    target = target.astype(np.dtype(ml_dtypes.bfloat16) if target_dtype == "bfloat16" else target_dtype)
    out = unfilled((9, 37), result_dtype(dtype))
    options = {"log_target": log_target, "backend": backend}
    assert ll.kl_div(log_p, target, reduction="none", out=out, **options) is out
    expected = oracle.kl_div(log_p, target, log_target=log_target)
    assert_exact(out, expected)
    for reduction, denominator in (("mean", 9 * 37), ("batchmean", 9), ("sum", 1)):
        result = ll.kl_div(log_p, target, reduction=reduction, **options)
        assert_exact(result, oracle.reduced(expected, denominator), dtype=dtype)
    assert ll.kl_div(log_p, target, **options) == ll.kl_div(log_p, target, reduction="mean", **options)


def test_kl_div_of_distributions_that_are_nearly_equal(backend):
    """What is told is the difference of numbers far larger."""
    log_p, target = np.array([-2.3025851], np.float32), np.array([0.1], np.float32)
    wanted = float(target[0]) * (np.log(float(target[0])) - float(log_p[0]))
    found = ll.kl_div(log_p, target, reduction="sum", backend=backend)
    assert found == pytest.approx(wanted, rel=1e-7)


def test_kl_div_of_zero_probabilities(backend, dtype):
    """t*log t is 0 at 0, also where the log-probability is infinite; there is no NaN but from NaN."""
    log_p = np.array([-INF, -1, 0, -INF, np.nan], dtype)
    target = np.array([0, 0, 0, 0.5, 0], dtype)
    options = {"reduction": "none", "backend": backend}
    assert np.array_equal(ll.kl_div(log_p, target, **options), [0, 0, 0, INF, np.nan], equal_nan=True)
    log_target = np.array([-INF, -INF, 0, 0, 0], dtype)
    result = ll.kl_div(log_p, log_target, log_target=True, **options)
    assert np.array_equal(result, [0, 0, 0, INF, np.nan], equal_nan=True)


def test_kl_is_cross_entropy_minus_entropy(backend):
    """The identity README derives: KL(t || p) = CE(t, p) - H(t)."""
    both = batch((2, 20, 10), np.dtype(np.float64))[0]
    logits, other = both[0], both[1]
    t = ll.softmax(other, backend=backend)
    kl = ll.kl_div(ll.log_softmax(logits, backend=backend), t, reduction="batchmean", backend=backend)
    cross_entropy = ll.cross_entropy(logits, t, backend=backend)
    assert kl == pytest.approx(
        cross_entropy - ll.entropy(other, reduction="mean", backend=backend), rel=1e-13
    )


def test_exact_results_are_finite_where_expected():
    """The zoo is no test of NaN: every row has a distribution."""
    for n_classes in (1, 17, 1000):
        for dtype in (np.float16, np.float32, np.float64):
            assert np.isfinite(exact(zoo_rows("entropy", n_classes, np.dtype(dtype)).value)).all()
