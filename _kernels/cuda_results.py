"""What follows from the statistics of a row: p, lse, and the record for the second pass."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from logitloss._kernels.cuda_arrays import KINDS
from logitloss._kernels.cuda_memory import device, load, store
from logitloss._kernels.cuda_steps import machine

# Numbers in a record: see `cuda_classes.entry_of`.
RECORD = 10
# Below it 1 - p of the most likely class is summed from the others' p, above it lse alone gives it.
SMALL = 1e-3


@functools.cache
def distributions(real: type) -> Any:
    """Return a function (m, others) -> log1p_others, lse in float64, lse, p of m, 1 - p of m."""
    steps, double_log1p = machine(real), machine(np.float64).log1p

    softmax_of = steps.softmax_of

    @device
    def distribution(m, others, wants_wide):
        log1p_others, lse, p_top, p_others = softmax_of(m, others)
        wide_lse = np.float64(lse)
        if wants_wide and log1p_others == log1p_others:
            # so that exp(x - lse) is good in float32, where lse itself has that type's rounding
            wide_lse = np.float64(m) + double_log1p(np.float64(others))
        return log1p_others, wide_lse, lse, p_top, p_others

    return distribution


@functools.cache
def known_distributions(real: type) -> Any:
    """Return a function that gives the same where lse is known.

    Its arguments: m, others, lse, and whether m is but the label's logit, others not being known.
    """
    steps, expm1 = machine(real), machine(np.float64).expm1
    exp, nan, infinity, small = steps.exp, np.float64(np.nan), np.float64(np.inf), np.float64(SMALL)

    @device
    def distribution(m, others, lse, is_label):
        ahead = np.float64(m) - lse if abs(lse) < infinity else nan
        rest, p_top = -expm1(ahead), exp(real(ahead))
        p_others = real(rest) if is_label or rest > small else others * p_top
        return real(-ahead), lse, real(lse), p_top, p_others

    return distribution


@functools.cache
def likely_labels() -> Any:
    """Return a function (logit, lse) -> whether 1 - p must be summed from the other classes."""
    expm1, small = machine(np.float64).expm1, np.float64(SMALL)

    @device
    def is_likely(logit, lse):
        return -expm1(np.float64(logit) - lse) <= small

    return is_likely


@functools.cache
def gradient_records(real: type, coefficients: bool, known: bool) -> Any:
    """Return a function that makes the record of a gradient.

    Its arguments: the statistics (m, below, at) and what `distributions` gives, z_loss, scale, beta, the
    label's gamma and logit, whether there is a label, and whether the row counts.
    """
    steps = machine(real)
    exp, zero, one, two, nan = steps.exp, real(0), real(1), real(2), real(np.nan)

    @device
    def record(m, below, at, distribution, z_loss, scale, beta, gamma, logit, has_label, counts):
        _, wide_lse, lse, p_top, p_others = distribution
        slope = lse * (two * z_loss) if z_loss != zero else zero * lse
        alpha = beta + (below + at) + slope
        reference, factor = m, p_top
        if known:
            reference = lse
            factor = exp(real(np.float64(reference) - wide_lse))
            if p_top != p_top:
                factor = nan
        own = zero
        if has_label:
            if logit == m:
                # p*(others + own) - own, where p may be 1 but for the last digits
                own = p_top * (below + (at - gamma) + slope) - p_others * (beta + gamma)
            else:
                own = exp(logit - reference) * factor * alpha - (beta + gamma)
        weight = np.float64(alpha) * np.float64(factor)
        if not coefficients:
            weight = weight * scale
        return (
            reference,
            real(weight),
            real(scale * np.float64(own)),
            m,
            real(scale),
            beta + below + slope,
            at,
            p_top,
            p_others,
            one if counts else zero,
        )

    return record


@functools.cache
def softmax_records(real: type, log: bool) -> Any:
    """Return a function (m, distribution) -> the record of a softmax."""
    zero, one = real(0), real(1)

    @device
    def record(m, distribution):
        return (m, distribution[0] if log else distribution[3], zero, zero, one, zero, zero, zero, zero, one)

    return record


@functools.cache
def record_loads(real_kind: str, n: int) -> Any:
    """Return a function (address) -> a tuple of n numbers."""
    real = np.float64 if real_kind == "f64" else np.float32
    read, size = load(real_kind, real), np.int64(8 if real_kind == "f64" else 4)
    if n == 1:

        @device
        def load_one(address):
            return (read(address),)

        return load_one
    half = n // 2
    left, right, offset = record_loads(real_kind, half), record_loads(real_kind, n - half), half * size

    @device
    def load_some(address):
        return left(address) + right(address + offset)

    return load_some


@functools.cache
def record_stores(real_kind: str, n: int) -> Any:
    """Return a function (address, tuple of n numbers) that stores them."""
    real = np.float64 if real_kind == "f64" else np.float32
    write, size = store(real_kind, real), np.int64(8 if real_kind == "f64" else 4)
    if n == 1:

        @device
        def store_one(address, values):
            write(address, values[0])

        return store_one
    half = n // 2
    left, right, offset = record_stores(real_kind, half), record_stores(real_kind, n - half), half * size

    @device
    def store_some(address, values):
        left(address, values[:half])
        right(address + offset, values[half:])

    return store_some


@functools.cache
def float_stores() -> Any:
    """Return a function (view, address, float64) that stores it as the view's float64 or float32."""
    narrow, wide, wide_kind = store("f32", np.float64), store("f64", np.float64), KINDS.index("f64")

    @device
    def store_number(view, address, value):
        if view[1] == wide_kind:
            wide(address, value)
        else:
            narrow(address, value)

    return store_number
