"""Sums over the classes of rows in lanes: of exponentials, and of coefficients by class.

Loops run over the rows, for few classes at a time, and what a row has so far waits in memory: a turn then
depends on none before it, and a processor does several at once.

Exponentials are relative to a power of two near that of the largest logit: exp(x - largest) would carry the
rounding of the difference, half an ulp for each nat of it.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from logitloss._kernels import numba_memory, numba_operations, vectors
from logitloss._kernels.elementary import elementary
from logitloss._kernels.numba_lanes_finish import (
    BEFORE,
    BOUND,
    FROM,
    GAP,
    GAP_LOST,
    LABEL,
    LARGEST,
    LOST,
    MAGIC,
    N_BEFORE,
    PEAK,
    REFERENCE,
    SPREAD,
    SPREAD_LOST,
    SQUARE,
    SQUARE_LOST,
    SUM,
    TARGET_LOGIT,
    TOP,
    TOP_WEIGHT,
    WEIGHT,
    WEIGHT_LOST,
)
from logitloss._kernels.vectors import add_kept, inline, outline

# Classes between two roundings that are kept
CHAIN = 8
# Beyond it a logit times log2(e) would lose digits, and logits whose exponentials count differ exactly.
DIRECT = {np.float32: 2.0**15, np.float64: 2.0**19}


def sums(real: type) -> SimpleNamespace:
    """Return the functions for one real type."""
    ops, functions = numba_operations.operations(real), elementary(inline, real)
    load, store, splat, where, any_lane = ops.load, ops.store, ops.splat, ops.where, vectors.any_lane
    fma, maximum, minimum, absolute = ops.fma, ops.maximum, ops.minimum, ops.absolute
    exp, exp_scaled, scale_of, rounded = (
        functions.exp,
        functions.exp_scaled,
        functions.scale_of,
        functions.rounded,
    )
    zero, one, infinity = real(0), real(1), real(np.inf)
    direct, log2e, unit = real(DIRECT[real]), functions.log2e, functions.unit
    next_above, most = vectors.next_above, real(np.finfo(real).max)
    size, vector_bytes = ops.size, ops.lanes * ops.size

    @inline
    def finite_or_zero(m):
        return where(absolute(m) < infinity, m, zero)

    @inline
    def refer(rows, at, largest):
        """Set what exponentials are relative to."""
        slot, is_direct = rows.slot_bytes, absolute(largest) < direct
        bound, magic = scale_of(rounded(where(is_direct, largest, zero) * log2e))
        store(at + FROM * slot, where(is_direct, zero, finite_or_zero(largest)))
        store(at + BOUND * slot, bound)
        store(at + MAGIC * slot, magic)

    @inline
    def scale_at(rows, at):
        """Return that again."""
        slot = rows.slot_bytes
        return load(at + FROM * slot), load(at + BOUND * slot), load(at + MAGIC * slot)

    @inline
    def power_of(logit, scale):
        """Return the exponential of a logit, relative to that."""
        reference, bound, magic = scale
        return exp_scaled(logit - reference, bound, magic)

    @outline
    def raise_largest(rows, x, step, n_classes):
        """Make the largest logits those of these classes too."""
        # Two or four at a time, the last of them again if need be. (Of one, LLVM makes a store of some lanes,
        # which is slow.)
        largest = rows.slots + LARGEST * rows.slot_bytes
        if n_classes < 4:
            step = step if n_classes > 1 else 0
            for c in range(max(1, n_classes - 1)):
                start = x + c * step
                for i in range(0, rows.width * size, vector_bytes):
                    high = maximum(load(start + i), load(largest + i))
                    store(largest + i, maximum(load(start + step + i), high))
            return
        for c in range(0, n_classes, 4):
            start = x + min(c, n_classes - 4) * step
            for i in range(0, rows.width * size, vector_bytes):
                at = start + i
                high = maximum(load(at), load(largest + i))
                high = maximum(load(at + step), high)
                high = maximum(load(at + 2 * step), high)
                store(largest + i, maximum(load(at + 3 * step), high))

    @outline
    def nan_of(x, step, n_classes, total):
        """Return the sum so far, NaN where a logit is."""
        for c in range(n_classes):
            logit = load(x + c * step)
            total = where(logit != logit, logit, total)
        return total

    @outline
    def begin_range(rows, x, step, is_first, n_classes):
        """Bring rows' largest logits and sums to where a range of classes can join them."""
        slot = rows.slot_bytes
        for i in range(rows.slots, rows.slots + rows.width * size, vector_bytes):
            if is_first:
                store(i + LARGEST * slot, splat(-infinity))
                store(i + SUM * slot, splat(zero))
                store(i + LOST * slot, splat(zero))
                store(i + PEAK * slot, splat(zero))
            store(i + BEFORE * slot, load(i + LARGEST * slot))
        raise_largest(rows, x, step, n_classes)
        for i in range(rows.slots, rows.slots + rows.width * size, vector_bytes):
            old, high, total = load(i + BEFORE * slot), load(i + LARGEST * slot), load(i + SUM * slot)
            magic_before = load(i + MAGIC * slot)
            refer(rows, i, high)
            if any_lane(high == infinity):
                total = nan_of(x + i - rows.slots, step, n_classes, total)
            store(i + BEFORE * slot, total)
            if not is_first:
                # The top so far joins the others where it is one no more.
                rises, peak = high > old, load(i + PEAK * slot)
                bound, magic = scale_of(magic_before - load(i + MAGIC * slot))
                factor = exp_scaled(splat(zero), bound, magic) * unit
                # From a logit beyond DIRECT or to one, the scales alone do not say it.
                is_far = rises & ((absolute(high) >= direct) | (absolute(old) >= direct))
                if any_lane(is_far):
                    new_peak = power_of(high, scale_at(rows, i))
                    factor_far = exp(old - finite_or_zero(high)) * (new_peak / maximum(peak, unit))
                    factor = where(is_far, factor_far, factor)
                factor = where(rises, where(peak > zero, factor, zero), one)
                store(i + SUM * slot, fma(total, factor, where(rises, factor * peak, zero)))
                store(i + LOST * slot, load(i + LOST * slot) * factor)
                store(i + PEAK * slot, where(rises, zero, peak))

    @outline
    def exp_range(rows, x, step, e, n_classes, ahead, ahead_step):
        """Store the exponentials of classes; fetch what will be read next meanwhile."""
        for c in range(0, n_classes - 1, 2):
            start, to, fetched = x + c * step, e + c * rows.stride, ahead + c * ahead_step
            for i in range(0, rows.width * size, vector_bytes):
                scale = scale_at(rows, rows.slots + i)
                numba_memory.prefetch(fetched + i)
                numba_memory.prefetch(fetched + ahead_step + i)
                first = power_of(load(start + i), scale)
                store(to + rows.stride + i, power_of(load(start + step + i), scale))
                store(to + i, first)
        if n_classes % 2:
            c = n_classes - 1
            start, to, fetched = x + c * step, e + c * rows.stride, ahead + c * ahead_step
            for i in range(0, rows.width * size, vector_bytes):
                numba_memory.prefetch(fetched + i)
                store(to + i, power_of(load(start + i), scale_at(rows, rows.slots + i)))

    @inline
    def join_one(e, step, peak):
        power = load(e)
        return minimum(peak, power), maximum(power, peak)

    def twice(join_half, half):
        @inline
        def join_both(e, step, peak):
            first, peak = join_half(e, step, peak)
            second, peak = join_half(e + half * step, step, peak)
            return first + second, peak

        return join_both

    # In pairs, and pairs of these: few roundings
    join_two = twice(join_one, 1)
    join_four = twice(join_two, 2)
    join_eight = twice(join_four, 4)

    def joining(join_some):
        @inline
        def join(rows, e):
            slot = rows.slot_bytes
            for i in range(0, rows.width * size, vector_bytes):
                at = rows.slots + i
                more, peak = join_some(e + i, rows.stride, load(at + PEAK * slot))
                total, lost = add_kept(load(at + SUM * slot), load(at + LOST * slot), more)
                store(at + SUM * slot, total)
                store(at + LOST * slot, lost)
                store(at + PEAK * slot, peak)

        return join

    sum_eight, sum_four = joining(join_eight), joining(join_four)
    sum_two, sum_one = joining(join_two), joining(join_one)

    @outline
    def sum_range(rows, x, step, e, is_kept, is_first, n_classes, ahead, ahead_step):
        """Add classes to rows' sums; their exponentials go to `e`, where they stay if they are kept."""
        begin_range(rows, x, step, is_first, n_classes)
        for c in range(0, n_classes, CHAIN):
            n = min(CHAIN, n_classes - c)
            to = e + c * rows.stride if is_kept else e
            exp_range(rows, x + c * step, step, to, n, ahead + c * ahead_step, ahead_step)
            if n == CHAIN:
                sum_eight(rows, to)
                continue
            if n & 4:
                sum_four(rows, to)
                to += 4 * rows.stride
            if n & 2:
                sum_two(rows, to)
                to += 2 * rows.stride
            if n & 1:
                sum_one(rows, to)
        for i in range(rows.slots, rows.slots + rows.width * size, vector_bytes):
            is_infinite = load(i + LARGEST * rows.slot_bytes) == infinity
            if any_lane(is_infinite):
                # Only a NaN counts beside +inf, which makes one of its own.
                total = where(
                    is_infinite, load(i + BEFORE * rows.slot_bytes), load(i + SUM * rows.slot_bytes)
                )
                store(i + SUM * rows.slot_bytes, total)
                lost = where(is_infinite, zero, load(i + LOST * rows.slot_bytes))
                store(i + LOST * rows.slot_bytes, lost)

    @outline
    def find_tops(rows, x, x_step, first_class, n_classes):
        """Find the largest logit and its class, first of equals."""
        for offset in range(0, rows.width * size, vector_bytes):
            high_at = rows.slots + REFERENCE * rows.slot_bytes + offset
            top_at = rows.slots + TOP * rows.slot_bytes + offset
            high, top = splat(-infinity), splat(zero)
            if first_class:
                high, top = load(high_at), load(top_at)
            for c in range(n_classes):
                logit = load(x + c * x_step + offset)
                top = where(logit > high, splat(real(first_class + c)), top)
                high = maximum(logit, high)
            store(high_at, high)
            store(top_at, top)
            store(rows.slots + LARGEST * rows.slot_bytes + offset, high)
            refer(rows, rows.slots + offset, high)
            peak = power_of(high, scale_at(rows, rows.slots + offset))
            store(rows.slots + PEAK * rows.slot_bytes + offset, peak)

    @outline
    def weigh_range(rows, x, x_step, g, first_class, n_classes):
        """Add the coefficients of a range of classes, in lanes at `g`, to rows' sums of them."""
        for offset in range(0, rows.width * size, vector_bytes):
            at = rows.slots + offset
            reference = finite_or_zero(load(at + REFERENCE * rows.slot_bytes))
            top = load(at + TOP * rows.slot_bytes)
            weight, weight_lost, gap, gap_lost = splat(zero), splat(zero), splat(zero), splat(zero)
            top_weight = splat(zero)
            if first_class:
                weight = load(at + WEIGHT * rows.slot_bytes)
                weight_lost = load(at + WEIGHT_LOST * rows.slot_bytes)
                gap = load(at + GAP * rows.slot_bytes)
                gap_lost = load(at + GAP_LOST * rows.slot_bytes)
                top_weight = load(at + TOP_WEIGHT * rows.slot_bytes)
            for c in range(n_classes):
                logit, gamma = load(x + c * x_step + offset), load(g + c * rows.stride + offset)
                is_top = top == splat(real(first_class + c))
                weight, weight_lost = add_kept(weight, weight_lost, where(is_top, zero, gamma))
                # 0*inf = 0
                gap, gap_lost = add_kept(
                    gap, gap_lost, where(gamma == zero, zero, gamma * (reference - logit))
                )
                top_weight = where(is_top, gamma, top_weight)
            store(at + WEIGHT * rows.slot_bytes, weight)
            store(at + WEIGHT_LOST * rows.slot_bytes, weight_lost)
            store(at + GAP * rows.slot_bytes, gap)
            store(at + GAP_LOST * rows.slot_bytes, gap_lost)
            store(at + TOP_WEIGHT * rows.slot_bytes, top_weight)

    @outline
    def sum_figures(rows, x, x_step, e, first_class, n_classes):
        """Add a range of classes to what figures need, their exponentials being in lanes at `e`.

        A class comes before the label's with at least its logit, as long as its number is lower, then with a
        larger one.
        """
        slot = rows.slot_bytes
        for offset in range(0, rows.width * size, vector_bytes):
            at = rows.slots + offset
            high, top = load(at + REFERENCE * slot), load(at + TOP * slot)
            reference, label = finite_or_zero(high), load(at + LABEL * slot)
            target = load(at + TARGET_LOGIT * slot)
            above = next_above(target)
            limit = where(label < real(first_class), above, target)
            total, lost, n_before = splat(zero), splat(zero), splat(zero)
            square, square_lost, spread, spread_lost = splat(zero), splat(zero), splat(zero), splat(zero)
            if first_class:
                total, lost, n_before = (
                    load(at + SUM * slot),
                    load(at + LOST * slot),
                    load(at + N_BEFORE * slot),
                )
                square, square_lost = load(at + SQUARE * slot), load(at + SQUARE_LOST * slot)
                spread, spread_lost = load(at + SPREAD * slot), load(at + SPREAD_LOST * slot)
            total_before = total
            for first in range(0, n_classes, CHAIN):
                some, some_squared, some_spread = splat(zero), splat(zero), splat(zero)
                for c in range(first, min(first + CHAIN, n_classes)):
                    logit, power = load(x + c * x_step + offset), load(e + c * rows.stride + offset)
                    number = splat(real(first_class + c))
                    limit = where(label == number, above, limit)
                    n_before = where(logit >= limit, n_before + one, n_before)
                    some_spread = fma(power, minimum(reference - logit, most), some_spread)  # not 0*inf
                    power = where(top == number, zero, power)
                    some, some_squared = some + power, fma(power, power, some_squared)
                total, lost = add_kept(total, lost, some)
                square, square_lost = add_kept(square, square_lost, some_squared)
                spread, spread_lost = add_kept(spread, spread_lost, some_spread)
            is_infinite = (high == infinity) | (high == -infinity)
            if any_lane(is_infinite):
                # Only a NaN counts beside +inf, which makes one of its own, and where it is the top.
                poison = nan_of(x + offset, x_step, n_classes, total_before)
                total, lost = where(is_infinite, poison, total), where(is_infinite, zero, lost)
            store(at + SUM * slot, total)
            store(at + LOST * slot, lost)
            store(at + N_BEFORE * slot, n_before)
            store(at + SQUARE * slot, square)
            store(at + SQUARE_LOST * slot, square_lost)
            store(at + SPREAD * slot, spread)
            store(at + SPREAD_LOST * slot, spread_lost)

    return SimpleNamespace(
        exp_range=exp_range,
        sum_range=sum_range,
        find_tops=find_tops,
        weigh_range=weigh_range,
        sum_figures=sum_figures,
    )
