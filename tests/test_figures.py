"""What the kernels give of each row beside its loss: rank, top, top probability, entropy, and the others'
squared probabilities.

The columns that are counts must be exact. The others' relative error may be 32 units of the type they are
computed in, and one for each nat that the largest logit is ahead: the others' exponentials have that.
"""

import numpy as np
import oracle
import pytest
from cases import batch, rng_for, unfilled, zoo
from logitloss._kernels import FIGURES
from memory import LAYOUTS
from ulp import assert_exact, exact, result_dtype

import logitloss as ll
from logitloss import _backends

RANK, TOP = FIGURES.index("rank"), FIGURES.index("top")


def figures_of(backend, logits, target, *, loss=None, lse=None, num_threads=2):
    out = unfilled((*target.shape, len(FIGURES)), np.float64)
    kernels = _backends.get(backend)
    outputs = (loss, lse, out, None)
    _, counted, bad = kernels.cross_entropy(
        logits, target, -100, None, None, 0.0, 1.0, None, *outputs, num_threads
    )
    assert (counted, bad) == ((target != -100).sum(), -1)
    return out


def assert_figures(out, logits, target):
    """Compare with the oracle; ignored rows are all 0."""
    counted = target != -100
    expected, nats = oracle.figures(logits, np.where(counted, target, 0))
    expected = np.where(counted[..., None], expected, 0)
    assert np.array_equal(out[..., : TOP + 1], expected[..., : TOP + 1].astype(float), equal_nan=True)
    eps = np.finfo(result_dtype(logits.dtype)).eps
    bound = eps * (32 + nats[..., None]) * np.abs(expected[..., TOP + 1 :]) + 1e-37
    error = np.abs(out[..., TOP + 1 :] - expected[..., TOP + 1 :])
    is_right = (error <= bound) | (np.isnan(out) & np.isnan(expected))[..., TOP + 1 :]
    worst = np.unravel_index(np.nanargmax(np.where(is_right, 0, error / bound)), error.shape)
    row, name = worst[:-1], FIGURES[TOP + 1 + worst[-1]]
    assert is_right.all(), f"{name} of row {row}: {out[row]}, expected {expected[row]}"


@pytest.mark.sanitize
@pytest.mark.parametrize("n_classes", [1, 2, 7, 10, 16, 33, 64, 129, 1000, 4097])
def test_figures_of_hard_rows(backend, dtype, n_classes):
    """Losses and lse are what they are without figures."""
    logits, target = zoo(n_classes, dtype)
    target = np.where(np.arange(len(target)) % 7 == 3, -100, target)
    loss, lse = unfilled(len(target), result_dtype(dtype)), unfilled(len(target), np.float64)
    out = figures_of(backend, logits, target, loss=loss, lse=lse)
    assert_figures(out, logits, target)
    assert_exact(loss, oracle.cross_entropy(logits, target)[0])
    assert_exact(lse, oracle.wide_lse(logits), dtype=dtype)


@pytest.mark.parametrize("n_classes", [2, 10, 17, 48, 129, 1000, 9000, 50257])
def test_equals_rank_in_their_order(backend, dtype, n_classes):
    """Few values, so that most classes have equals, and in half of the rows the largest is there twice."""
    rng = rng_for("ties", n_classes)
    n_rows = 40 if n_classes < 5000 else 3
    logits = rng.integers(-2, 3, (n_rows, n_classes)).astype(dtype)
    target = rng.integers(0, n_classes, n_rows)
    for row in range(n_rows):
        first, second = sorted(rng.choice(n_classes, 2, replace=False))
        logits[row, [first, second]] = 4
        target[row] = [first, second, target[row]][row % 3]
    out = figures_of(backend, logits, target)
    assert_figures(out, logits, target)
    assert out[:2, RANK].tolist() == [1, 2]


def test_rows_that_hold_nan_or_infinities(backend, dtype):
    """Poisoned rows are NaN, ignored ones 0 whatever they hold; a target of -inf ranks like any other."""
    nan, inf = np.nan, np.inf
    rows = [[nan, 1, 0], [0, nan, 1], [1, 0, nan], [inf, 0, 1], [-inf] * 3, [0, -inf, 1], [-inf, 0, -inf]]
    logits, target = np.array(rows, dtype), np.array([1, 2, 0, 0, 0, 1, 2])
    out = figures_of(backend, logits, target)
    assert np.isnan(out[:5]).all()
    assert out[5:, RANK].tolist() == [3, 3]
    assert_figures(out, logits, target)
    assert not figures_of(backend, logits, np.full(7, -100)).any()


@pytest.mark.parametrize("n_classes", [1, 2, 10, 60, 1000])
def test_lse_of_such_rows(backend, dtype, n_classes):
    """It is what it is without figures."""
    nan, inf = np.nan, np.inf
    rows = np.zeros((9, n_classes), dtype)
    rows[0], rows[1], rows[2] = inf, -inf, nan
    rows[3, -1], rows[3, 0], rows[4, 0], rows[4, -1] = inf, inf, nan, inf
    rows[5], rows[5, 0] = -inf, nan
    rows[6], rows[6, -1] = -inf, nan
    rows[7], rows[7, 0] = -inf, inf
    logits = np.tile(rows, (4, 1))
    lse = unfilled(36, np.float64)
    figures_of(backend, logits, np.zeros(36, int), lse=lse)
    wanted = ll.cross_entropy_and_lse(logits, np.zeros(36, int), backend="reference")[1]
    np.testing.assert_allclose(lse, wanted, rtol=1e-6)
    np.testing.assert_allclose(ll.logsumexp(logits, backend=backend).astype(float), wanted, rtol=1e-2)


@pytest.mark.sanitize
@pytest.mark.parametrize("n_classes", [10, 35, 1000])
def test_a_target_of_no_probability(backend, dtype, n_classes):
    logits, _ = batch((20, n_classes), dtype)
    logits = np.where(np.arange(n_classes) % 3 == 1, -np.inf, logits.astype(float)).astype(dtype)
    target = np.full(20, 1 + 3 * ((n_classes - 2) // 6))
    assert_figures(figures_of(backend, logits, target), logits, target)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_classes", [10, 65])
def test_logits_of_any_strides(backend, dtype, layout, n_classes):
    logits, target = batch((3, 35, n_classes), dtype)
    laid = LAYOUTS[layout](logits)
    assert_figures(figures_of(backend, laid, target), logits, target)


def test_axis_of_classes_anywhere(backend, dtype):
    """Classes far apart, as of an image: 5 or 21 of them, more than a vector's rows beside each other."""
    for n_classes in (5, 21, 70):
        logits, target = batch((2, 300, n_classes), dtype)
        image = np.moveaxis(np.ascontiguousarray(np.moveaxis(logits, -1, 1)), 1, -1)
        assert_figures(figures_of(backend, image, target), logits, target)


@pytest.mark.parametrize("shape", [(3, 50257), (2, 600_000)])
def test_figures_of_long_rows(backend, dtype, shape):
    """Rows of several chunks, and of several parts that threads share; rising ones meet a new top in each."""
    logits, target = batch(shape, dtype)
    rising = np.sort(logits, axis=-1)
    for x in (logits, rising):
        alone = figures_of(backend, x, target, num_threads=1)
        assert_figures(alone, x, target)
        assert np.array_equal(alone, figures_of(backend, x, target, num_threads=3))


def test_one_class_more_likely_by_far(backend, dtype):
    """What the others come to keeps its relative precision: 1 - p, entropy and squares from 1e-8 to 1e-2."""
    ahead = np.linspace(5, 11, 40)
    logits = np.zeros((40, 12), dtype)
    logits[:, 3] = ahead.astype(dtype)
    out = figures_of(backend, logits, np.full(40, 3))
    assert_figures(out, logits, np.full(40, 3))
    assert (out[:, RANK] == 1).all()
    others = 11 * np.exp(-exact(logits[:, 3]))
    assert np.allclose(out[:, -1], ((others / (1 + others)) ** 2 / 11).astype(float), rtol=1e-5, atol=0)
