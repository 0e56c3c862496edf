"""Distance from an exact value in units in the last place, and the bounds the package promises.

One function, `ulp_error`, measures; one function, `assert_exact`, compares with the bound. The bound of a
row is 4 ulp in float32 and 8 in float64, plus one for each nat by which the row's target is ahead (the
difference of two logits is rounded once, and the exponential makes that error relative).

float16 and bfloat16 are computed in float32 and rounded once at the end: that half unit of the stored
type is granted, and what is left over is counted in float32 units. A NaN or an infinity against a number
is infinitely far away.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

# name -> (significand bits, exponent of the smallest normal number)
FORMATS = {
    "float16": (11, -14),
    "bfloat16": (8, -126),
    "float32": (24, -126),
    "float64": (53, -1022),
}
BOUND = {"float32": 4, "float64": 8}
# Whether long double can tell float64 results from exact ones; on some systems it is float64.
WIDE = bool(np.finfo(np.longdouble).eps < 2e-19)


class Exact(NamedTuple):
    """An exact value, the magnitude its error is relative to, and the nats of rounding it is granted."""

    value: np.ndarray
    scale: np.ndarray
    nats: np.ndarray


def result_dtype(dtype) -> np.dtype:
    """Float64 for float64, float32 for every other floating dtype."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def exact(array) -> np.ndarray:
    """Return the array in extended precision; every supported dtype converts without rounding."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    return array.astype(np.longdouble)


def ulp(value, dtype) -> np.ndarray:
    """Spacing of `dtype` at `value`, the subnormal spacing below its smallest normal number."""
    digits, smallest = FORMATS[np.dtype(dtype).name]
    value = np.asarray(value).astype(np.float64)
    _, exponent = np.frexp(value)
    exponent = np.where(value == 0, smallest, np.maximum(exponent - 1, smallest))
    return np.ldexp(1.0, exponent - digits + 1)


def ulp_error(actual, expected, *, scale=None, dtype=None) -> np.ndarray:
    """Return |actual - expected| in ulp of the result type at `scale` (default: at the expected value).

    `dtype` is the floating type the result was computed for, where `actual` is wider than that (the
    float64 scalar of a mean of float32 rows).
    """
    actual = np.asarray(actual)
    stored = actual.dtype
    unit = result_dtype(stored if dtype is None else dtype)
    value, expected = exact(actual), exact(expected)
    largest = exact(ml_dtypes.finfo(stored).max)
    expected = np.where(
        np.abs(expected) >= largest + ulp(largest, stored) / 2, np.copysign(np.inf, expected), expected
    )
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        distance = np.abs(value - expected)
        if stored.itemsize < unit.itemsize:
            distance = np.maximum(distance - ulp(expected, stored) / 2, 0)
        error = distance / ulp(expected if scale is None else scale, unit)
    same = (value == expected) | (np.isnan(value) & np.isnan(expected))
    finite = np.isfinite(value) & np.isfinite(expected)
    return np.where(same, 0, np.where(finite, error, np.inf)).astype(np.float64)


def assert_exact(actual, expected: Exact, *, dtype=None, extra=0.0) -> None:
    """Fail unless every entry is within its bound (`extra` ulp wider where a test says why)."""
    actual = np.asarray(actual)
    assert actual.shape == np.shape(expected.value)
    error = ulp_error(actual, expected.value, scale=expected.scale, dtype=dtype)
    unit = result_dtype(actual.dtype if dtype is None else dtype)
    bound = np.broadcast_to(BOUND[unit.name] + np.nan_to_num(expected.nats) + extra, error.shape)
    if (error > bound).any():
        worst = np.unravel_index(np.argmax(error - bound), error.shape)
        where = tuple(int(i) for i in worst)
        raise AssertionError(
            f"{int((error > bound).sum())} of {error.size} entries out of bounds; entry {where}: "
            f"{actual[worst]!r} is {error[worst]:.3g} ulp from {exact(expected.value)[worst]!r}, "
            f"bound {float(bound[worst]):.3g}"
        )
