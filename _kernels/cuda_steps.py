"""Arithmetic of the device: what `recurrence.steps` needs of a machine, and sums over the threads of a team.

A team is the threads that share a row: one, a warp, or a block. A reduction leaves the same bits with each of
its threads, and adds in an order that the geometry alone decides. float32's exponential is `ex2.approx` with
the product's rounding made good, since a row of 100,000 equal terms would add up the same error as often.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels.cuda_device import geometry
from logitloss._kernels.cuda_memory import SIMULATED, device, ptx
from logitloss._kernels.recurrence import steps
from numba import cuda, types

BLOCK, WARP = geometry().block, geometry().warp
ALL_LANES = 0xFFFFFFFF
# Numbers in shared memory that a reduction needs.
SHARED = BLOCK if SIMULATED else BLOCK // WARP
_NUMBA = {np.float32: types.float32, np.float64: types.float64, np.int64: types.int64}


@functools.cache
def operations(real: type) -> SimpleNamespace:
    """Return what the machine does in its own way."""

    @device
    def maximum(a, b):
        return a if a > b else b

    @device
    def minimum(a, b):
        return a if a < b else b

    @device
    def where(condition, a, b):
        return a if condition else b

    # exp is 0 from here on
    lowest, infinity = real(-150 if real is np.float32 else -800), real(np.inf)

    if SIMULATED:
        return SimpleNamespace(
            maximum=maximum,
            minimum=minimum,
            where=where,
            larger=maximum,
            above=lambda a: np.nextafter(a, infinity),
            bounded=lambda a: lowest if a < lowest else a,
            exp_bounded=np.exp,
            absolute=abs,
            fma=lambda a, b, c: real(np.longdouble(a) * np.longdouble(b) + np.longdouble(c)),
            exp=np.exp,
            expm1=np.expm1,
            log1p=np.log1p,
            log=np.log,
        )

    number = _NUMBA[real]
    suffix = "f32" if real is np.float32 else "f64"
    fused = ptx(f"fma.rn.{suffix} $0, $1, $2, $3;", number, number, number, number, pure=True)

    @device
    def fma(a, b, c):
        return fused(a, b, c)

    @device
    def absolute(a):
        return abs(a)

    @device
    def expm1(a):
        return math.expm1(a)

    @device
    def log1p(a):
        return math.log1p(a)

    @device
    def log(a):
        return math.log(a)

    next_after = cuda.libdevice.nextafterf if real is np.float32 else cuda.libdevice.nextafter

    @device
    def above(a):
        return next_after(a, infinity)

    if real is np.float32:
        log2e = np.float32(math.log2(math.e))
        log2e_rest = np.float32(math.log2(math.e) - float(log2e))
        ln2 = np.float32(math.log(2))
        power = ptx("ex2.approx.f32 $0, $1;", number, number, pure=True)
        larger_or_nan = ptx("max.NaN.f32 $0, $1, $2;", number, number, number, pure=True)
        larger_of_two = ptx("max.f32 $0, $1, $2;", number, number, number, pure=True)

        @device
        def larger(a, b):
            return larger_of_two(a, b)

        @device
        def bounded(a):
            return larger_or_nan(a, lowest)

        @device
        def exp_bounded(a):
            product = a * log2e
            rest = fused(a, log2e_rest, fused(a, log2e, -product))
            e = power(product)
            return fused(e, rest * ln2, e)

        @device
        def exp(a):
            return exp_bounded(bounded(a))

    else:
        larger = maximum

        @device
        def bounded(a):
            return lowest if a < lowest else a

        @device
        def exp(a):
            return math.exp(a)

        exp_bounded = exp

    return SimpleNamespace(
        maximum=maximum,
        minimum=minimum,
        where=where,
        larger=larger,
        above=above,
        bounded=bounded,
        exp_bounded=exp_bounded,
        absolute=absolute,
        fma=fma,
        exp=exp,
        expm1=expm1,
        log1p=log1p,
        log=log,
    )


@functools.cache
def machine(real: type) -> SimpleNamespace:
    """Return the operations and the steps of one real type together."""
    ops = operations(real)
    return SimpleNamespace(**{**vars(ops), **vars(steps(device, ops, real))})


# ---- tuples ----


@functools.cache
def tree(leaf: Any, combine: Any, width: int) -> Any:
    """Return a function of a tuple that combines its leaves by halves."""
    if width == 1:

        @device
        def one(values, with_):
            return leaf(values[0], with_)

        return one
    half = width // 2
    first, second = tree(leaf, combine, half), tree(leaf, combine, width - half)

    @device
    def both(values, with_):
        return combine(first(values[:half], with_), second(values[half:], with_))

    return both


@functools.cache
def tree2(leaf: Any, combine: Any, width: int) -> Any:
    """Return the same of two tuples of one length."""
    if width == 1:

        @device
        def one(values, others, with_):
            return leaf(values[0], others[0], with_)

        return one
    half = width // 2
    first, second = tree2(leaf, combine, half), tree2(leaf, combine, width - half)

    @device
    def both(values, others, with_):
        return combine(
            first(values[:half], others[:half], with_), second(values[half:], others[half:], with_)
        )

    return both


@functools.cache
def gather(read: Any, width: int) -> Any:
    """Return a function that joins the tuples `read(source, at)` of positions `step` apart."""
    if width == 1:

        @device
        def one(source, at, step):
            return read(source, at)

        return one
    half = width // 2
    first, second = gather(read, half), gather(read, width - half)

    @device
    def both(source, at, step):
        return first(source, at, step) + second(source, at + half * step, step)

    return both


@device
def plus(a, b):
    return a + b


@device
def larger(a, b):
    return a if a > b else b


@device
def smaller(a, b):
    return a if a < b else b


_INFINITY, _NOTHING = np.float64(np.inf), np.float64(0)


@device
def add_exactly(total, lost, value):
    """Add to a compensated float64 sum; return it and what was lost. An infinite sum loses nothing."""
    value = value - lost
    after = total + value
    return after, (after - total) - value if abs(after) < _INFINITY else _NOTHING


# ---- teams ----


@functools.cache
def reduction(combine: Any, kind: type, team: int) -> Any:
    """Return a function (shared memory, number) -> the numbers of all threads of the team combined.

    All threads of the block must call it together. The shared memory holds SHARED numbers.
    """
    if team == 1:

        @device
        def alone(shared, value):
            return value

        return alone
    if SIMULATED:
        # no warp operations there: in turn, through shared memory
        def in_turn(shared, value):
            lane = cuda.threadIdx.x
            cuda.syncthreads()
            shared[lane] = value
            cuda.syncthreads()
            first = lane // team * team
            result = kind(shared[first])
            for other in range(first + 1, first + team):
                result = combine(result, kind(shared[other]))
            return result

        return cuda.jit(device=True)(in_turn)

    @device
    def of_warp(shared, value):
        for distance in (16, 8, 4, 2, 1):
            value = combine(value, cuda.shfl_xor_sync(ALL_LANES, value, distance))
        return value

    if team == WARP:
        return of_warp
    warps = team // WARP

    @device
    def of_block(shared, value):
        value = of_warp(shared, value)
        cuda.syncthreads()
        if cuda.threadIdx.x % WARP == 0:
            shared[cuda.threadIdx.x // WARP] = value
        cuda.syncthreads()
        result = shared[0]
        for warp in range(1, warps):
            result = combine(result, shared[warp])
        return result

    return of_block


@functools.cache
def of_warp(real: type) -> tuple[Any, Any]:
    """Return two functions for loops that a warp goes round together: any of conditions, largest of numbers.

    The simulator has a thread alone there, which changes how often a loop does something, not what.
    """
    if SIMULATED:
        return (lambda condition: condition), (lambda value: value)
    largest = reduction(larger, real, WARP)

    @device
    def any_of(condition):
        return cuda.any_sync(ALL_LANES, condition)

    @device
    def largest_of(value):
        return largest(value, value)

    return any_of, largest_of
