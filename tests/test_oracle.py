"""The oracle against fifty-digit arithmetic, and the error measure against cases known by hand.

Without this the matrix would only show that two programs agree.
"""

import mpmath
import numpy as np
import oracle
import pytest
from cases import KINDS, make_row
from ulp import BOUND, WIDE, Exact, assert_exact, exact, ulp, ulp_error

FINITE = [kind for kind in KINDS if "inf" not in kind and kind != "one_finite"]

wide_enough = pytest.mark.skipif(not WIDE, reason="long double is no wider than double here")
# A pair of float64, through which results are read here, holds no more than this.
EPSILON = max(float(np.finfo(np.longdouble).eps), 1e-30)


def mp_surprise(row, label):
    """Return lse - x_label in 400 digits, from the definition."""
    with mpmath.workdps(400):
        values = [mpmath.mpf(float(x)) for x in row]
        peak = max(values)
        total = mpmath.fsum(mpmath.exp(x - peak) for x in values if x != -mpmath.inf)
        return peak + mpmath.log(total) - values[label]


def relative(actual, expected):
    """Relative distance of a long double from an mpmath number."""
    high = np.float64(actual)
    low = np.float64(actual - high)
    with mpmath.workdps(400):
        value = mpmath.mpf(float(high)) + mpmath.mpf(float(low))
        return float(abs(value - expected) / abs(expected)) if expected else float(abs(value))


@wide_enough
@pytest.mark.parametrize("kind", FINITE)
def test_surprise_is_exact_to_a_thousandth_of_a_double_ulp(kind):
    row = make_row(kind, 12, np.dtype(np.float64))
    surprise = oracle.surprise(row)
    for label in range(12):
        expected = mp_surprise(row, label)
        if expected > mpmath.mpf("1e-300"):
            # a nat of lead costs one rounding of the extended format
            ahead = max(0.0, -float(mpmath.log(expected)))
            assert relative(surprise[label], expected) < (4 + ahead) * EPSILON


@wide_enough
def test_gradient_keeps_the_target_entry_where_the_target_is_far_ahead():
    row = np.array([50.0, 1.0, -2.0, 0.5])
    _, gradient = oracle.cross_entropy(row, 0)
    with mpmath.workdps(60):
        terms = [mpmath.exp(mpmath.mpf(x) - 50) for x in row]
        expected = [term / mpmath.fsum(terms) for term in terms]
        expected[0] = -mpmath.fsum(terms[1:]) / mpmath.fsum(terms)
    for actual, value in zip(gradient.value, expected, strict=True):
        assert relative(actual, value) < 1e-17


@wide_enough
def test_bce_against_fifty_digits():
    x = np.array([-700.0, -40.0, -1e-3, 0.0, 2.5, 37.0, 500.0])
    y = np.array([0.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0])
    loss, gradient = oracle.bce_with_logits(x, y, weight=1.5, pos_weight=3.0)
    with mpmath.workdps(400):
        for i in range(x.size):
            xi, yi = mpmath.mpf(x[i]), mpmath.mpf(y[i])
            p = 1 / (1 + mpmath.exp(-xi))
            q = 1 - p
            expected = -1.5 * (3 * yi * mpmath.log(p) + (1 - yi) * mpmath.log(q))
            assert relative(loss.value[i], expected) < 1e-16
            expected = 1.5 * ((1 - yi) * p - 3 * yi * q)
            assert relative(gradient.value[i], expected) < 1e-16


def test_worked_numbers():
    logits = np.array([[0.1234, 0.5555, 0.3211]] * 3)
    loss, _ = oracle.cross_entropy(logits, [0, 1, 2])
    assert round(float(oracle.reduced(loss, 3).value), 4) == 1.1142
    assert np.round(oracle.softmax([1.0, 2.0, 3.0]).value.astype(float), 2).tolist() == [0.09, 0.24, 0.67]
    rows, _ = oracle.bce_with_logits([-0.0381] * 3, [1, 1, 0])
    assert np.round(rows.value.astype(float), 4).tolist() == [0.7124, 0.7124, 0.6743]


def test_ulp_is_the_spacing_of_the_format():
    for dtype in (np.float32, np.float64, np.float16):
        for value in (1.0, 1.5, 0.999, 3e-5, 0.0, 6e4, float(np.finfo(dtype).smallest_subnormal)):
            assert float(ulp(dtype(value), dtype)) == float(np.spacing(dtype(value)))
    assert float(ulp(1.0, "bfloat16")) == 2.0**-7


def test_error_of_neighbours_and_of_nothing_alike():
    one = np.float32(1)
    assert ulp_error(np.nextafter(one, np.float32(2)), exact(1)) == 1
    assert ulp_error(np.float32(np.nan), exact(1)) == np.inf
    assert ulp_error(one, exact(np.nan)) == np.inf
    assert ulp_error(np.float32(np.inf), exact(3e38)) == np.inf
    assert ulp_error(np.float32(-np.inf), exact(np.inf)) == np.inf
    assert ulp_error(np.float32(np.nan), exact(np.nan)) == 0
    assert ulp_error(np.float32(np.inf), exact(np.inf)) == 0
    assert ulp_error(np.float32(np.inf), exact(1e39)) == 0
    # half a unit of the stored format is free; the rest counts in float32 units
    assert ulp_error(np.float16(1), exact(1 + 2.0**-11)) == 0
    assert ulp_error(np.float16(1), exact(1 + 2.0**-11 + 2.0**-22)) == 2


def test_bound_refuses_what_is_outside():
    exact_one = Exact(exact([1.0]), exact([1.0]), np.array([0.0]))
    inside = np.array([1 + BOUND["float32"] * 2.0**-23], np.float32)
    assert_exact(inside, exact_one)
    with pytest.raises(AssertionError, match=r"entry \(0,\)"):
        assert_exact(inside + np.float32(2.0**-23), exact_one)
