"""exp and log1p for the Numba twin on the processor, on numbers and vectors alike, about 1 ulp each.

exp(d) = 2**n * 2**f with n = round(d*log2(e)) and |f| <= 1/2. n is added to a large constant, which rounds it
and leaves it in the low bits; those moved to the exponent's place are the factor 2**n. (A factor, not an
addition to the exponent of 2**f: that would turn NaN into a number.) log1p is t times a polynomial in t - 1/2
up to 1, and beyond it the logarithm of a mantissa and an exponent.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from logitloss._kernels import numba_powers, vectors

if TYPE_CHECKING:
    from collections.abc import Callable

# Of one real type: what rounds to an integer, and polynomials from the highest power down. Minimax: that of
# 2**f is within 0.8 ulp before rounding, its fine one, for few terms whose errors do not average out, 0.07.
# That of log1p(t) is log1p(t)/t - 1, of t - 1/2.
_TERMS: dict[type, dict[str, Any]] = {
    np.float32: {
        "magic": "0x1.8p23",
        "bias": 127,
        "log2e": "0x1.715476p0",
        "exp2": "0x1.5bda40p-10 0x1.3ce8acp-7 0x1.c6b6d8p-5 0x1.ebf9c2p-3 0x1.62e42ap-1 0x1p0",
        "exp2_fine": "0x1.3eb2a0p-13 0x1.5f0b86p-10 0x1.3b320ap-7 0x1.c6af76p-5 0x1.ebfbd6p-3 "
        "0x1.62e430p-1 0x1p0",
        "log1p": "-0x1.a932f4p-9 0x1.584884p-8 -0x1.ba5cd6p-8 0x1.7b53cep-7 -0x1.510612p-6 0x1.2c1e28p-5 "
        "-0x1.153fb2p-4 0x1.0f9550p-3 -0x1.2773a6p-2 -0x1.833704p-3",
    },
    np.float64: {
        "magic": "0x1.8p52",
        "bias": 1023,
        "log2e": "0x1.71547652b82fep0",
        "exp2": "0x1.e3a76cecb450bp-28 0x1.b671aae394b99p-24 0x1.62c148885ff7cp-20 0x1.ffcb58d33d341p-17 "
        "0x1.4309126bad01ap-13 0x1.5d87fe9b8b9c2p-10 0x1.3b2ab6fbd6e65p-7 0x1.c6b08d703e198p-5 "
        "0x1.ebfbdff82c431p-3 0x1.62e42fefa3a12p-1 0x1p0",
        "exp2_fine": "0x1.e80e102deef7fp-32 0x1.e611a244666eap-28 0x1.b5260e1e7251fp-24 "
        "0x1.62bfcddd35308p-20 0x1.ffcbfbf896b77p-17 0x1.4309130c01a37p-13 0x1.5d87fe78b3bfdp-10 "
        "0x1.3b2ab6fba11f3p-7 0x1.c6b08d704a0d4p-5 0x1.ebfbdff82c59cp-3 0x1.62e42fefa39efp-1 0x1p0",
        "log1p": "-0x1.13788517c57adp-16 0x1.a559f644e23cbp-16 -0x1.1a86e5b7f73bep-16 0x1.cc425de24e74ap-16 "
        "-0x1.dd753a72cffc7p-15 0x1.7891983fc96f3p-14 -0x1.22096dd51788dp-13 0x1.cf98c8e149ef4p-13 "
        "-0x1.74d2ea026634p-12 0x1.2c73e06e26be4p-11 -0x1.e6f12ed14b88ep-11 0x1.8d3f99e229dp-10 "
        "-0x1.469c8b2ad1f49p-9 0x1.0f1192238ef22p-8 -0x1.c72c62f0cd62ap-8 0x1.83c50b0c3b617p-7 "
        "-0x1.50abf6cca9cbbp-6 0x1.2bec9fba5578ep-5 -0x1.1540afd54b032p-4 0x1.0f95b3dc0a107p-3 "
        "-0x1.2773a5da90bdbp-2 -0x1.833704d019ed0p-3",
    },
}


def elementary(jit: Callable[..., Any], real: Any, headroom: int | None = None) -> SimpleNamespace:
    """Return the functions for one real type; `jit` compiles one to be inlined.

    What is 1 comes out as 2**headroom, for the least exponentials to be normal numbers still.
    """
    fma, maximum, minimum, where = vectors.fma, vectors.maximum, vectors.minimum, vectors.where
    low_bits_as_exponent = vectors.low_bits_as_exponent
    exponent_of, mantissa_of = vectors.exponent_of, vectors.mantissa_of
    constants = _TERMS[real]
    exp2, exp2_fine, log1p_unit = (
        vectors.polynomial([float.fromhex(term) for term in constants[name].split()])
        for name in ("exp2", "exp2_fine", "log1p")
    )
    parts, power_of_parts = numba_powers.parts_of(real), numba_powers.power_of_parts
    part_terms = numba_powers.TERMS.get(parts, constants["exp2"])
    exp2_part = vectors.polynomial([float.fromhex(term) for term in part_terms.split()])
    zero, one, half, ln2 = real(0), real(1), real(0.5), real(np.log(2))
    infinity, log2e = real(np.inf), real(float.fromhex(constants["log2e"]))
    if headroom is None:
        headroom = 30 if real is np.float32 else 60
    bias = real(constants["bias"] + headroom)
    rounding = real(float.fromhex(constants["magic"]))
    part_rounding = real(rounding / parts)
    unit, times_power = real(2.0**-headroom), numba_powers.times_power
    # What the place of the exponent 0 is rounded to; and so far above the bound, exponentials are finite.
    biased, span = real(rounding + constants["bias"]), real(2 * (constants["bias"] - 1) * 0.6931)
    # At the floor, the exponent's place holds 0, a factor of 0.
    floor, magic = real(-bias * np.log(2)), real(rounding + bias)

    @jit
    def rounded(x):
        """Round to an integer."""
        return (x + rounding) - rounding

    def factors(constant: Any, exp2_of: Any, power_of: Any) -> tuple[Any, Any, Any]:
        """Return functions: what the others need of an integer k, and two factors of an exponential."""

        @jit
        def scale_of(k):
            """Return bound and magic."""
            return (k - bias) * ln2, (constant + bias) - k

        @jit
        def two_above(x, magic):
            """Return two factors of exp(x)*2**(headroom - k) for x from the bound on: 0 there, NaN at NaN."""
            shifted = fma(x, log2e, magic)
            fraction = fma(x, log2e, magic - shifted)
            return exp2_of(fraction), power_of(shifted)

        @jit
        def two_of(x, bound, magic):
            """Return the same for any x, 0 up to the bound."""
            return two_above(maximum(bound, x), magic)

        return scale_of, two_of, two_above

    scale_of, scaled_parts, _ = factors(rounding, exp2, low_bits_as_exponent)
    _, fine_parts, _ = factors(rounding, exp2_fine, low_bits_as_exponent)
    # Of vectors, for sums: sooner, and within 2 ulp where rounded by itself
    summed_scale_of, summed_parts, summed_above = factors(part_rounding, exp2_part, power_of_parts)

    @jit
    def exp_parts(d):
        """Return two factors of exp(d)*2**headroom, for d up to 2**6 or so; 0 at -inf, NaN at NaN."""
        return scaled_parts(d, floor, magic)

    @jit
    def exp_scaled(x, bound, magic):
        """Return exp(x)*2**(headroom - k) to the last bit or so."""
        unscaled, power = fine_parts(x, bound, magic)
        return unscaled * power

    if times_power is not None:

        @jit
        def exp_of_any(x, bound, magic):
            """exp_scaled of a vector, for x above what is finite, too: then infinite, or NaN."""
            shifted = fma(x, log2e, magic)
            return times_power(exp2_fine(fma(x, log2e, magic - shifted)), shifted - biased)
    else:

        @jit
        def exp_of_any(x, bound, magic):
            """exp_scaled of a vector, for x above what is finite, too: then the largest."""
            return exp_scaled(minimum(bound + span, x), bound, magic)

    @jit
    def exp_raised(d):
        """exp(d)*2**headroom to the last bit or so."""
        return exp_scaled(d, floor, magic)

    @jit
    def exp(d):
        """exp(d) to the last bit or so."""
        return exp_raised(d) * unit

    @jit
    def log1p_mantissa(t):
        """log1p(t) for 0 <= t <= 1."""
        return fma(t, log1p_unit(t - half), t)

    @jit
    def log1p(t):
        """log1p(t) for t >= 0; NaN at NaN."""
        one_plus = t + one
        is_small = t < one
        log = log1p_mantissa(where(is_small, t, mantissa_of(one_plus) - one))
        log = fma(where(is_small, zero, exponent_of(one_plus)), ln2, log)
        return where(t < infinity, log, t)

    return SimpleNamespace(
        scale_of=scale_of,
        scaled_parts=scaled_parts,
        summed_scale_of=summed_scale_of,
        summed_parts=summed_parts,
        summed_above=summed_above,
        exp_parts=exp_parts,
        exp_scaled=exp_scaled,
        exp_raised=exp_raised,
        exp_of_any=exp_of_any,
        exp=exp,
        rounded=rounded,
        exp2_unit=exp2_fine,
        log1p=log1p,
        log1p_unit=log1p_mantissa,
        headroom=headroom,
        unit=unit,
        log2e=log2e,
    )
