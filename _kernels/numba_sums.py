"""The first pass over a row whose classes lie next to each other: its top, and the sums over the others.

A chunk of some classes is read once, as many as the first cache holds with ease. Its largest logit is known
by then: it was sought while the chunk before was summed, so that memory and arithmetic work at the same time.
If that is the row's, its predecessor joins the others. The sum is one flat loop over groups of two vectors,
cut where the top is; what ends within a group is a group that begins earlier, without the classes that are in
others. A chunk has at least a group.

The plain loop takes exponentials relative to a power of two near the top's, which costs nothing where logits
stand at no more than DIRECT. Elsewhere, and where classes have coefficients, they go relative to the top.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels import numba_items, numba_memory, numba_operations, vectors
from logitloss._kernels.numba_powers import parts_of
from logitloss._kernels.vectors import add_kept, inline, lost_of, outline

# Turns that one chain of additions adds up
CHAIN = 8
# Registers that the plain loop takes at a time, of float32, step by step: as each step waits for the one
# before, a processor does not look ahead far enough to fill its units with one or two.
TURN = 4
# The largest |x| whose multiple of log2(e) is taken apart exactly
DIRECT = {real: most / parts_of(real) for real, most in ((np.float32, 2.0**21), (np.float64, 2.0**30))}

# What is asked of memory beyond what a loop fetches, while a row's largest is searched: it would rest
LINES_MEANWHILE = 8
# What is known of a row, and at last what its second pass needs: an entry is p*factor - gamma*gamma_factor,
# but at the top and at the label, where those are >= 0; p is relative to `reference`, or kept. `k` and
# `relative` are of the last chunk: its exponentials are relative to 2**k, and `relative` times as large are
# relative to the top. `seen` is the address of a chunk whose last seen_n classes have been looked at. What
# follows `gap_lost` is of figures (numba_figures).
ROW = np.dtype(
    [
        *(
            (name, "f8")
            for name in ("m", "s", "weight", "gap", "top_weight", "k", "relative", "seen_largest")
        ),
        *(
            (name, "f8")
            for name in ("reference", "factor", "gamma_factor", "log1p_others", "at_top", "at_label")
        ),
        *(
            (name, "f8")
            for name in ("s_lost", "weight_lost", "gap_lost", "square", "spread", "n_before", "target_logit")
        ),
        *((name, "i8") for name in ("top", "label", "live", "seen", "seen_n")),
    ],
    align=True,
)


def sums(item: str, ops: Any, elementary: Any, wide_elementary: Any, wide: Any) -> SimpleNamespace:
    """Return the steps for rows of such items; `wide` are the steps of recurrence.py in float64."""
    real, lanes, size, splat, where = ops.real, ops.lanes, ops.size, ops.splat, ops.where
    fma, maximum, lanes_from, store, store_one = (
        ops.fma,
        ops.maximum,
        ops.lanes_from,
        ops.store,
        ops.store_one,
    )
    lanes_max, lanes_sum, load_real, load_one = ops.lanes_max, ops.lanes_sum, ops.load, ops.load_one
    summed_parts, summed_scale_of = elementary.summed_parts, elementary.summed_scale_of
    rounded = elementary.rounded
    any_lane, first_lane = vectors.any_lane, vectors.first_lane
    keep_rolled, share, merge_gaps = vectors.keep_rolled, wide.share, wide.merge_gaps
    exp_parts, exp2_unit, wide_fma = elementary.exp_parts, wide_elementary.exp2_unit, vectors.fma
    log2e, wide_log2e = elementary.log2e, float(elementary.log2e)
    unit, group, width = 2.0**-elementary.headroom, 2 * lanes, numba_items.itemsize(item)
    low, zero, infinity, nan, direct = real(-np.inf), real(0), np.inf, np.nan, DIRECT[real]
    load = numba_items.loader(item, real, lanes)
    # Others have a pair of registers for a turn, and one chain.
    is_float32, is_float64 = item == "f32", real is np.float64
    turn_ops = numba_operations.operations(real, TURN) if is_float32 else ops
    splat_turn, store_turn, parts = turn_ops.splat, turn_ops.store, turn_ops.parts
    turn = turn_ops.lanes if is_float32 else group
    load_turn = turn_ops.load if is_float32 else numba_items.pair_loader(item, real, lanes)
    fetch_vector, fetch_reals = numba_memory.fetcher(lanes * width), numba_memory.fetcher(lanes * size)
    fetch_group = numba_memory.fetcher(group * width)
    fetch_meanwhile = numba_memory.fetcher(LINES_MEANWHILE * 64, numba_memory.IN_ORDER[:1])

    # ---- the largest ----

    if width == 2:
        start, look, largest_of = numba_items.half_seekers(item, group)
    else:

        @inline
        def start():
            return splat(low), splat(low)

        @inline
        def look(high0, high1, x):
            return maximum(high0, load(x)), maximum(high1, load(x + lanes * width))

        @inline
        def largest_of(high0, high1):
            return lanes_max(maximum(high0, high1))

    @outline
    def look_at(x, n):
        """Return the largest of n classes, whole groups or at least one; anything where one is NaN."""
        high0, high1 = start()
        for c in range(0, n - n % group, group):
            high0, high1 = look(high0, high1, x + c * width)
        if n % group:
            high0, high1 = look(high0, high1, x + (n - group) * width)
        return largest_of(high0, high1)

    @outline
    def place_of(x, n, value):
        """Return the first place of a value that is there."""
        wanted, c = splat(value), 0
        while c < n - n % group and not any_lane(
            (load(x + c * width) == wanted) | (load(x + (c + lanes) * width) == wanted)
        ):
            c += group
        c = min(c, n - group)
        found = load(x + c * width) == wanted
        if any_lane(found):
            return c + first_lane(found)
        return c + lanes + first_lane(load(x + (c + lanes) * width) == wanted)

    @outline
    def has_nan(x, n):
        for c in range(0, n, lanes):
            v = load(x + min(c, n - lanes) * width)
            if any_lane(v != v):
                return True
        return False

    @inline
    def largest_in(row, x, n):
        """Return a chunk's largest, what has been seen of it included."""
        if row.seen != x:
            return look_at(x, n)
        if row.seen_n < n:
            rest = look_at(x, (n - row.seen_n + group - 1) // group * group)
            return maximum(rest, real(row.seen_largest))
        return real(row.seen_largest)

    # ---- sums ----

    if is_float32:

        @inline
        def in_one(chain):
            a, b, c, d = parts(chain)
            return (a + b) + (c + d)
    else:

        @inline
        def in_one(chain):
            return chain

    @inline
    def without(v, filler, at, skip):
        """Take out lane `at` of a vector, and the lanes before `skip`."""
        return where(lanes_from(skip, lanes) & ~lanes_from(at, at + 1), v, filler)

    def summing(turn: int, load_turn: Any, **steps: Any) -> Any:
        """Return the function that sums a chunk by such steps, so many classes a turn.

        `begin` returns what `add_part` needs, what `add_turn` needs, and empty sums; `fold` takes a chain of
        turns, begun by `zeros`, into the sums, and `ends` makes numbers of them.
        """
        begin, zeros, fold, ends = (steps[name] for name in ("begin", "zeros", "fold", "ends"))
        add_turn, add_part = steps["add_turn"], steps["add_part"]
        fetch_turn = numba_memory.fetcher(turn * width)

        @outline
        def sum_chunk(x, n, at, numbers, next_x, next_n, exps):
            """Return the sums of n classes but the one at `at`, and the largest of the next chunk's last."""
            of_part, of_turn, sums = begin(numbers)
            high0, high1 = start()
            whole = n - n % group
            ahead = next_x + (next_n - whole) * width if next_x else x
            if whole < n:
                sums = add_part(x, n - group, at, whole - n + group, of_part, sums, exps)
            for i in range(0, (next_n - whole) * width if next_x else 0, group * width):
                fetch_group(next_x + i)
            c, cut = 0, at - at % group if 0 <= at < whole else whole
            while True:
                while c < cut:
                    stop = min(cut, c + CHAIN * turn)
                    chain = zeros()
                    rest = (stop - c) % turn
                    for i in range(c, stop - rest, turn):
                        fetch_turn(ahead + i * width)
                        for j in range(0, turn, group):
                            high0, high1 = look(high0, high1, ahead + (i + j) * width)
                        chain = add_turn(load_turn(x + i * width), of_turn, chain, exps + i * size)
                        keep_rolled()
                    sums = fold(sums, chain)
                    if rest:
                        fetch_group(ahead + (stop - group) * width)
                        high0, high1 = look(high0, high1, ahead + (stop - group) * width)
                        sums = add_part(x, stop - group, -1, 0, of_part, sums, exps)
                    c = stop
                if c == whole:
                    return ends(sums), largest_of(high0, high1)
                fetch_group(ahead + c * width)
                high0, high1 = look(high0, high1, ahead + c * width)
                sums = add_part(x, c, at, 0, of_part, sums, exps)
                c, cut = c + group, whole

        return sum_chunk

    def plain(keeps: bool) -> Any:
        @inline
        def add_group(v0, v1, scale, total, exps):
            bound, magic = scale
            p0, q0 = summed_parts(v0, bound, magic)
            p1, q1 = summed_parts(v1, bound, magic)
            if keeps:
                store(exps, p0 * q0)
                store(exps + lanes * size, p1 * q1)
            return fma(p1, q1, fma(p0, q0, total))

        if is_float32:

            @inline
            def add_turn(v, scale, total, exps):
                bound, magic = scale
                p, q = summed_parts(v, bound, magic)
                if keeps:
                    store_turn(exps, p * q)
                return fma(p, q, total)
        else:

            @inline
            def add_turn(v, scale, total, exps):
                return add_group(v[0], v[1], scale, total, exps)

        @outline
        def add_part(x, c, at, skip, scale, sums, exps):
            """Add a group without the class `at`, and without the first `skip`."""
            some = add_group(
                without(load(x + c * width), low, at - c, skip),
                without(load(x + (c + lanes) * width), low, at - c - lanes, skip - lanes),
                scale,
                splat(zero),
                exps + c * size,
            )
            return join(sums, some)

        @inline
        def begin(scale):
            bound, magic = scale
            return (
                (splat(bound), splat(magic)),
                (splat_turn(bound), splat_turn(magic)),
                (splat(zero), splat(zero)),
            )

        @inline
        def zeros():
            return splat_turn(zero)

        @inline
        def join(sums, some):
            total, lost = sums
            if is_float64:  # of like terms rounding takes the same each time
                return add_kept(total, lost, some)
            return total + some, lost

        @inline
        def fold(sums, chain):
            return join(sums, in_one(chain))

        @inline
        def ends(sums):
            total, lost = sums
            return np.float64(lanes_sum(total)) + np.float64(lanes_sum(lost))

        sum_chunk = summing(
            turn,
            load_turn,
            begin=begin,
            zeros=zeros,
            add_turn=add_turn,
            add_part=add_part,
            fold=fold,
            ends=ends,
        )

        @outline
        def add_chunk(row, x, n, first, next_x, next_n, exps):
            """Add a chunk of n classes to the row, the first being number `first`; look at the next, if any.

            Nothing is done, and False returned, where the logits need sum_any.
            """
            largest = largest_in(row, x, n)
            top = row.m if row.m > largest else np.float64(largest)
            if not (abs(top) <= direct or top == -infinity):
                return False
            at = -1
            if largest > row.m:
                if next_x:
                    fetch_meanwhile(next_x)
                at = place_of(x, n, largest)
                raise_top(row, largest, first + at)
                k = rounded(largest * log2e)
                row.k, row.relative = k, exp2_unit(-wide_fma(row.m, wide_log2e, -np.float64(k))) * unit
            whole = n - n % group
            total, seen_largest = sum_chunk(x, n, at, summed_scale_of(real(row.k)), next_x, next_n, exps)
            if keeps and at >= 0:
                store_one(exps + at * size, real(1.0 / row.relative))
            add_to_sum(row, total * row.relative)
            row.seen, row.seen_n, row.seen_largest = next_x, whole, seen_largest
            return True

        return add_chunk

    @inline
    def add_to_sum(row, term):
        row.s_lost += lost_of(row.s, term)
        row.s += term

    @inline
    def raise_top(row, largest, top):
        """Make a larger logit the row's top; its predecessor joins the others."""
        factor = share(row.m, np.float64(largest))
        add_to_sum(row, 1.0)
        row.s, row.s_lost = row.s * factor, row.s_lost * factor
        row.m, row.top = largest, top

    # ---- sums of anything ----

    @inline
    def add_any_vector(v, g, reference, sum_, weight, gap, exps):
        p, q = exp_parts(v - reference)
        if exps:
            store(exps, p * q)
        return fma(p, q, sum_), weight + g, gap + where(g == zero, zero, g * (reference - v))

    @outline
    def sum_any(x, n, at, m, gamma, exps):
        """Return the sums of exponentials, gamma and gamma*(m - x) over n classes but the one at `at`."""
        reference = splat(m)
        total, weights, gaps = splat(zero), splat(zero), splat(zero)
        whole, c = n - n % lanes, n - lanes
        if whole < n:
            total, weights, gaps = add_any_vector(
                without(load(x + c * width), low, at - c, whole - c),
                without(load_real(gamma + c * size), zero, at - c, whole - c),
                reference,
                total,
                weights,
                gaps,
                exps + c * size if exps else 0,
            )
        c, cut = 0, at - at % lanes if 0 <= at < whole else whole
        while True:
            while c < cut:
                stop = min(cut, c + CHAIN * lanes)
                sum_, weight, gap = splat(zero), splat(zero), splat(zero)
                for i in range(c, stop, lanes):
                    fetch_vector(x + i * width)
                    fetch_reals(gamma + i * size)
                    sum_, weight, gap = add_any_vector(
                        load(x + i * width),
                        load_real(gamma + i * size),
                        reference,
                        sum_,
                        weight,
                        gap,
                        exps + i * size if exps else 0,
                    )
                    keep_rolled()
                total, weights, gaps = total + sum_, weights + weight, gaps + gap
                c = stop
            if c == whole:
                return lanes_sum(total) * unit, lanes_sum(weights), lanes_sum(gaps)
            total, weights, gaps = add_any_vector(
                without(load(x + c * width), low, at - c, 0),
                without(load_real(gamma + c * size), zero, at - c, 0),
                reference,
                total,
                weights,
                gaps,
                exps + c * size if exps else 0,
            )
            c, cut = c + lanes, whole

    @inline
    def fold_gammas(row):
        """Join what the sums of coefficients have lost."""
        row.weight, row.gap = row.weight + row.weight_lost, row.gap + row.gap_lost
        row.weight_lost, row.gap_lost = 0.0, 0.0

    @inline
    def fold(row):
        """Join what all sums have lost."""
        row.s, row.s_lost = row.s + row.s_lost, 0.0
        fold_gammas(row)

    @outline
    def add_any(row, x, n, first, gamma, exps):
        """Add a chunk of n classes with their coefficients to the row."""
        largest, at = largest_in(row, x, n), -1
        if largest > row.m:
            at = place_of(x, n, largest)
            top_weight = np.float64(load_one(gamma + at * size))
            fold_gammas(row)
            row.weight, row.gap, row.top_weight = merge_gaps(
                row.m, row.weight, row.gap, row.top_weight, np.float64(largest), 0.0, 0.0, top_weight
            )
            raise_top(row, largest, first + at)
        row.seen, row.relative = 0, unit
        if row.m == infinity:
            if has_nan(x, n):
                row.s = nan
            return
        reference = real(row.m) if row.m > -infinity else zero
        total, weight, gap = sum_any(x, n, at, reference, gamma, exps)
        add_to_sum(row, total)
        row.weight_lost += lost_of(row.weight, weight)
        row.gap_lost += lost_of(row.gap, gap)
        row.weight, row.gap = row.weight + weight, row.gap + gap
        if exps and at >= 0:
            store_one(exps + at * size, real(1.0 / unit))

    keeps = width > 2  # to read 16 bits again is less than to keep their exponentials
    return SimpleNamespace(
        add=plain(keeps=False),
        add_and_keep=plain(keeps=True) if keeps else None,
        add_any=add_any,
        fold=fold,
        add_to_sum=add_to_sum,
        summing=summing,
        largest_in=largest_in,
        place_of=place_of,
        has_nan=has_nan,
        without=without,
    )
