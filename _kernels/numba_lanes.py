"""A block of rows of the softmax family, a row in each lane: short rows, and rows side by side (`axis=1`).

What a row keeps (`recurrence`) is a vector's lane here. The largest logit of a range of classes is sought
first. Exponentials are relative to it, 2**headroom too large, and go to a tile; of each and the largest so
far, the smaller joins the others' sum, so that the top stays out and nobody asks where it is. Where a tile
holds all classes of the block the exponentials stay for the second pass, which then only multiplies. Where it
does not, classes go by ranges, and a row that rises brings its sum along.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels import vectors
from logitloss._kernels.elementary import elementary
from logitloss._kernels.numba_job import (
    ENTROPY,
    GRADIENT,
    LABELS,
    LOG_SOFTMAX,
    NOTHING,
    PROBABILITIES,
    block_range,
    coefficient,
    first_bad_label,
    job_steps,
    last_stride,
    place,
    run_length,
)
from logitloss._kernels.numba_lanes_arrays import LINE, Rows, arrays
from logitloss._kernels.numba_lanes_finish import (
    BEFORE,
    BETA,
    FACTOR,
    FROM,
    GAP,
    GAP_LOST,
    LABEL,
    LABEL_ENTRY,
    LABEL_GAMMA,
    LARGEST,
    LOG1P_OTHERS,
    LOSS,
    LOST,
    LSE,
    LSE_IN,
    N_SLOTS,
    PEAK,
    REFERENCE,
    SCALE,
    SUM,
    TARGET_LOGIT,
    TOP,
    TOP_ENTRY,
    TOP_WEIGHT,
    WEIGHT,
    WEIGHT_LOST,
    finisher,
    inline,
    jit,
)
from numba import carray

# Fewer classes go by lanes wherever they lie.
FEW_CLASSES = 48
# As labels, reals can number these.
MOST_CLASSES = 1 << 24
# A block of short rows stays in the nearest cache, rows side by side make long runs of each class.
BLOCK_ROWS = 1024
SHORT_BYTES = 1 << 14
TILE_BYTES = 1 << 17
# Sums take so many classes between roundings that are kept.
CHAIN = 8


def _stride(block: int, size: int) -> int:
    """Return the bytes between classes: the rows' and a line, to stay out of one set of the cache."""
    return block * size + LINE


def _classes_in_tile(block: int, n_classes: int, size: int) -> int:
    return min(n_classes, TILE_BYTES // _stride(block, size) // CHAIN * CHAIN)


def plan(record: Any, item: str) -> int:
    """Set the size of a block of rows; return the bytes of scratch, or 0 if rows do not go by lanes."""
    view, n_classes, size = record["logits"], int(record["n_classes"]), 8 if item == "f64" else 4
    n_axes, item_size = int(view["n_axes"]), vectors.itemsize(item)
    are_beside = (
        n_axes > 0
        and ctypes.c_int64.from_address(int(view["axes"]) + 16 * n_axes - 8).value == item_size
        and view["class_stride"] != item_size
    )
    if n_classes >= (MOST_CLASSES if are_beside else FEW_CLASSES):
        return 0
    most = (TILE_BYTES if are_beside else SHORT_BYTES) // (n_classes * size) - LINE // size
    # Where a tile cannot hold all classes, long runs are worth more than blocks for many threads: each class
    # begins on another page.
    are_long = are_beside and most < 64
    most = BLOCK_ROWS if are_long else min(most, BLOCK_ROWS)
    most = min(most, int(record["n"]) // (4 if are_long else 64))
    block = record["block"] = max(64, most // 64 * 64)
    stride = _stride(block, size)
    return N_SLOTS * stride + 2 * (_classes_in_tile(block, n_classes, size) * stride + LINE)


def kernels(item: str) -> SimpleNamespace:
    """Return the kernels for logits of such items."""
    real = np.float64 if item == "f64" else np.float32
    ops, of_arrays = vectors.operations(real), arrays(item)
    size, lanes, item_size = ops.size, ops.lanes, vectors.itemsize(item)
    load, store, splat, where, any_lane = ops.load, ops.store, ops.splat, ops.where, vectors.any_lane
    fma, maximum, minimum, absolute = ops.fma, ops.maximum, ops.minimum, ops.absolute
    functions = elementary(inline, real)
    exp_raised = functions.exp_raised
    zero, infinity, one_raised = real(0), real(np.inf), real(2.0**functions.headroom)
    finish_plain, finish = finisher(real, real, is_plain=True), finisher(real, np.float64, is_plain=False)
    vector_bytes = lanes * size
    load_one, store_one, stream, exp = ops.load_one, ops.store_one, ops.stream, functions.exp
    labels_of, numbers, fill, bring = of_arrays.labels_of, of_arrays.numbers, of_arrays.fill, of_arrays.bring
    beside, lanes_of, put = of_arrays.are_beside, of_arrays.lanes_of, of_arrays.put
    store_byte = vectors.storer("u8", real)
    put_items, load_item = of_arrays.put_items, of_arrays.load_item
    wide_steps = job_steps(np.float64)
    wide_load_run, wide_put_items = wide_steps.load_run, wide_steps.put_items

    @inline
    def finite_or_zero(m):
        return where(absolute(m) < infinity, m, zero)

    @inline
    def add(total, lost, term):
        """Add a term, and keep what is lost to rounding."""
        new = total + term
        added = new - total
        return new, lost + ((total - (new - added)) + (term - added))

    # ---- the first pass ----

    # Loops run over the rows, for few classes at a time, and what a row has so far waits in memory: a turn then
    # depends on none before it, and a processor does several at once.
    @jit
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

    @jit
    def nan_of(x, step, n_classes, total):
        """Return the sum so far, NaN where a logit is."""
        for c in range(n_classes):
            logit = load(x + c * step)
            total = where(logit != logit, logit, total)
        return total

    @jit
    def begin_range(rows, x, step, is_first, n_classes):
        """Bring rows' largest logits and sums to where a range of classes can join them."""
        slot = rows.slot_bytes
        for i in range(rows.slots, rows.slots + rows.width * size, vector_bytes):
            if is_first:
                store(i + LARGEST * slot, splat(-infinity))
                store(i + SUM * slot, splat(zero))
                store(i + LOST * slot, splat(zero))
            store(i + BEFORE * slot, load(i + LARGEST * slot))
        raise_largest(rows, x, step, n_classes)
        for i in range(rows.slots, rows.slots + rows.width * size, vector_bytes):
            old, high, total = load(i + BEFORE * slot), load(i + LARGEST * slot), load(i + SUM * slot)
            reference, peak = finite_or_zero(high), splat(zero)
            store(i + FROM * slot, reference)
            if any_lane(high == infinity):
                total = nan_of(x + i - rows.slots, step, n_classes, total)
            store(i + BEFORE * slot, total)
            if not is_first:
                # The top so far joins the others where it is one no more.
                rises = high > old
                factor = where(rises, exp(old - reference), splat(real(1)))
                store(i + SUM * slot, fma(total, factor, where(rises, factor * one_raised, zero)))
                store(i + LOST * slot, load(i + LOST * slot) * factor)
                peak = where(rises, zero, splat(one_raised))
            store(i + PEAK * slot, peak)

    @jit
    def exp_range(rows, x, step, e, n_classes, ahead, ahead_step):
        """Store the exponentials of classes, relative to FROM; fetch what will be read next meanwhile."""
        from_at = rows.slots + FROM * rows.slot_bytes
        for c in range(n_classes):
            start, to, fetched = x + c * step, e + c * rows.stride, ahead + c * ahead_step
            for i in range(0, rows.width * size, vector_bytes):
                vectors.prefetch(fetched + i)
                store(to + i, exp_raised(load(start + i) - load(from_at + i)))

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
                total, lost = add(load(at + SUM * slot), load(at + LOST * slot), more)
                store(at + SUM * slot, total)
                store(at + LOST * slot, lost)
                store(at + PEAK * slot, peak)

        return join

    sum_eight, sum_four = joining(join_eight), joining(join_four)
    sum_two, sum_one = joining(join_two), joining(join_one)

    @jit
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

    @jit
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
            store(rows.slots + FROM * rows.slot_bytes + offset, finite_or_zero(high))

    @jit
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
                weight, weight_lost = add(weight, weight_lost, where(is_top, zero, gamma))
                # 0*inf = 0
                gap, gap_lost = add(gap, gap_lost, where(gamma == zero, zero, gamma * (reference - logit)))
                top_weight = where(is_top, gamma, top_weight)
            store(at + WEIGHT * rows.slot_bytes, weight)
            store(at + WEIGHT_LOST * rows.slot_bytes, weight_lost)
            store(at + GAP * rows.slot_bytes, gap)
            store(at + GAP_LOST * rows.slot_bytes, gap_lost)
            store(at + TOP_WEIGHT * rows.slot_bytes, top_weight)

    @jit
    def gammas_of(job, rows, first_class, n_classes):
        """Bring the coefficients of a range of classes into the other tile."""
        if job.target_kind == LABELS:
            for c in range(n_classes):
                gamma = load_one(job.gamma + (first_class + c) * size)
                fill(rows.other + c * rows.stride, rows.width, gamma)
            return
        bring(job.target, rows, first_class, n_classes, rows.other)
        factor, summand = real(job.target_scale), real(job.target_offset)
        if job.gamma == 0 and factor == 1 and summand == 0:
            return
        for c in range(n_classes):
            weight = load_one(job.gamma + (first_class + c) * size) if job.gamma else real(1)
            for offset in range(0, rows.width * size, vector_bytes):
                at = rows.other + c * rows.stride + offset
                store(at, (load(at) * factor + summand) * weight)

    # ---- the second pass ----

    def product(load):
        """Return the function for an entry from its exponential."""

        @inline
        def entry(rows, at, e, g, number):
            # An exponential may be NaN where the row is ignored; where it is not, the factor is.
            p = maximum(load(e), zero) * load(at + FACTOR * rows.slot_bytes)
            is_label = load(at + LABEL * rows.slot_bytes) == number
            return where(is_label, load(at + LABEL_ENTRY * rows.slot_bytes), p)

        return entry

    def product_with_gamma(load):
        """Return the same with a coefficient by class."""

        @inline
        def entry(rows, at, e, g, number):
            p = maximum(load(e), zero) * load(at + FACTOR * rows.slot_bytes)
            result = p - load(g) * load(at + SCALE * rows.slot_bytes)
            is_top = load(at + TOP * rows.slot_bytes) == number
            result = where(is_top, load(at + TOP_ENTRY * rows.slot_bytes), result)
            is_label = load(at + LABEL * rows.slot_bytes) == number
            return where(is_label, load(at + LABEL_ENTRY * rows.slot_bytes), result)

        return entry

    def logarithm(load):
        """Return the function for a logarithm of softmax from the logit."""

        @inline
        def entry(rows, at, x, g, number):
            ahead = load(x) - load(at + LARGEST * rows.slot_bytes)
            return ahead - load(at + LOG1P_OTHERS * rows.slot_bytes)

        return entry

    def mapping(entry_by):
        """Return the function that turns a range of classes into entries of `out`, in lanes both."""
        entry, entry_of_one = entry_by(load), entry_by(load_one)

        @jit
        def map_range(rows, start, step, out, out_step, first_class, n_classes, streams):
            for c in range(n_classes):
                number = real(first_class + c)
                x, to, g = start + c * step, out + c * out_step, rows.other + c * rows.stride
                end = rows.n * size
                if streams:
                    # Whole lines go around the cache; what shares one with other rows does not.
                    head = min(end, -to & (LINE - 1))
                    whole = head + (end - head) // LINE * LINE
                    for i in range(0, head, size):
                        store_one(to + i, entry_of_one(rows, rows.slots + i, x + i, g + i, number))
                    for i in range(head, whole, LINE):
                        for j in range(i, i + LINE, vector_bytes):
                            stream(to + j, entry(rows, rows.slots + j, x + j, g + j, number))
                    for i in range(whole, end, size):
                        store_one(to + i, entry_of_one(rows, rows.slots + i, x + i, g + i, number))
                else:
                    for i in range(0, end, vector_bytes):
                        store(to + i, entry(rows, rows.slots + i, x + i, g + i, number))

        return map_range

    map_product, map_gamma, map_log = mapping(product), mapping(product_with_gamma), mapping(logarithm)

    @jit
    def second_pass(job, rows, in_tile, has_gamma, is_kept):
        are_beside = beside(job.out, rows)
        streams = job.streams and are_beside
        for c in range(0, job.n_classes, in_tile):
            n = min(in_tile, job.n_classes - c)
            start, step = rows.tile, rows.stride
            if not is_kept:
                start, step = lanes_of(job.logits, rows, c, n)
                if job.operation != LOG_SOFTMAX:
                    exp_range(rows, start, step, rows.tile, n, start, step)
                    start, step = rows.tile, rows.stride
            out, out_step = rows.tile, rows.stride
            if are_beside:
                out = place(job.out, rows.first) + c * job.out.class_stride
                out_step = job.out.class_stride
            if job.operation == LOG_SOFTMAX:
                map_log(rows, start, step, out, out_step, c, n, streams)
            elif has_gamma:
                gammas_of(job, rows, c, n)
                map_gamma(rows, start, step, out, out_step, c, n, streams)
            else:
                map_product(rows, start, step, out, out_step, c, n, streams)
            if not are_beside:
                put(job.out, rows, c, n, job.streams)
        if job.streams:
            vectors.fence()

    # ---- a block ----

    @jit
    def prepare(job, rows):
        """Bring what belongs to rows; return how many count, or -1 if a label is bad."""
        counted = rows.n
        label_at = rows.slots + LABEL * rows.slot_bytes
        if job.target_kind == LABELS:
            counted = labels_of(job, rows, label_at)
            if counted < 0:
                return counted
        else:
            # A class that no row has
            fill(label_at, rows.width, real(job.n_classes))
            for i in range(rows.n * size, rows.width * size, size):
                store_one(label_at + i, real(-1))
        if job.operation == GRADIENT:
            numbers(job.scale, rows, real(1), rows.slots + SCALE * rows.slot_bytes)
        if job.lse_in.address:
            load_wide(job.lse_in, rows)
        if job.target_kind == LABELS and (job.beta or job.gamma):
            for i in range(0, rows.n * size, size):
                label = max(0, np.intp(load_one(label_at + i)))
                beta = real(coefficient(job.beta, label, 1.0))
                store_one(rows.slots + BETA * rows.slot_bytes + i, beta)
                if job.gamma:
                    gamma = load_one(job.gamma + label * size)
                    store_one(rows.slots + LABEL_GAMMA * rows.slot_bytes + i, gamma)
        return counted

    @jit
    def load_wide(view, rows):
        done = 0
        to = rows.slots + LSE_IN * rows.slot_bytes
        while done < rows.n:
            length = run_length(view, rows.first + done, rows.n - done)
            at = place(view, rows.first + done)
            wide_load_run(view.kind, at, last_stride(view), length, to + 8 * done)
            done += length

    @jit
    def target_logits(job, rows):
        """Bring the logit of each row's label; that of some class where the row is ignored."""
        view, done = job.logits, 0
        label_at = rows.slots + LABEL * rows.slot_bytes
        to = rows.slots + TARGET_LOGIT * rows.slot_bytes
        stride, class_stride = last_stride(view), view.class_stride
        while done < rows.n:
            length = run_length(view, rows.first + done, rows.n - done)
            at = place(view, rows.first + done)
            for i in range(done, done + length):
                label = np.intp(maximum(load_one(label_at + i * size), zero))
                store_one(to + i * size, load_item(at + label * class_stride))
                at += stride
            done += length

    @jit
    def put_hits(job, rows):
        view, done = job.hit, 0
        label_at, top_at = rows.slots + LABEL * rows.slot_bytes, rows.slots + TOP * rows.slot_bytes
        sum_at = rows.slots + SUM * rows.slot_bytes
        while done < rows.n:
            length = run_length(view, rows.first + done, rows.n - done)
            to = place(view, rows.first + done)
            for i in range(done * size, (done + length) * size, size):
                total = load_one(sum_at + i)
                is_hit = load_one(label_at + i) == load_one(top_at + i) and total == total
                store_byte(to, real(1) if is_hit else zero)
                to += last_stride(view)
            done += length

    @jit
    def first_pass(job, rows, in_tile, has_gamma, is_kept):
        fits = in_tile == job.n_classes
        has_top = has_gamma or job.hit.address != 0 or job.operation == ENTROPY
        x, step = rows.tile, rows.stride
        if has_top:
            for c in range(0, job.n_classes, in_tile):
                n = min(in_tile, job.n_classes - c)
                x, step = lanes_of(job.logits, rows, c, n)
                find_tops(rows, x, step, c, n)
        for c in range(0, job.n_classes, in_tile):
            n = min(in_tile, job.n_classes - c)
            if not (has_top and fits):
                x, step = lanes_of(job.logits, rows, c, n)
            if job.operation == ENTROPY:
                exp_range(rows, x, step, rows.other, n, x, step)
            elif has_gamma:
                gammas_of(job, rows, c, n)
            if has_gamma or job.operation == ENTROPY:
                weigh_range(rows, x, step, rows.other, c, n)
            if job.operation != ENTROPY:
                # What is in the tile gives way to its exponentials.
                is_tile = x == rows.tile
                if is_tile and fits:
                    # Rows of few classes follow each other.
                    ahead, ahead_step = place(job.logits, rows.first + rows.n - 1), rows.n * item_size
                else:
                    ahead, ahead_step = x + rows.n * size, step
                sum_range(rows, x, step, rows.tile, is_kept or is_tile, c == 0, n, ahead, ahead_step)

    def softmax_block(jobs, block, scratch, results):
        job, found = carray(jobs, (1,))[0], carray(results, (1,))[0]
        first, n = block_range(job, block)
        stride = job.block * size + LINE
        in_tile = min(job.n_classes, TILE_BYTES // stride // CHAIN * CHAIN)
        tile = scratch + N_SLOTS * stride
        other = tile + in_tile * stride
        rows = Rows(first, n, (n + lanes - 1) // lanes * lanes, scratch, stride, stride, tile, other)
        counted = prepare(job, rows)
        if counted < 0:
            found.bad = first_bad_label(job, first, n)
            return
        found.counted = counted
        has_gamma = job.target_kind == PROBABILITIES or (job.target_kind == LABELS and job.gamma != 0)
        # Exponentials of all classes, for the second pass
        is_kept = (
            in_tile == job.n_classes
            and job.operation != NOTHING
            and job.operation != ENTROPY
            and job.operation != LOG_SOFTMAX
        )
        first_pass(job, rows, in_tile, has_gamma, is_kept)
        if job.target_kind == LABELS:
            target_logits(job, rows)
        is_plain = not (has_gamma or job.lse.address or job.lse_in.address or job.z_loss != 0)
        if is_plain and job.operation != ENTROPY:
            found.total = finish_plain(job, rows, False)
        else:
            found.total = finish(job, rows, has_gamma)
        if job.hit.address:
            put_hits(job, rows)
        if job.loss.address:
            put_items(job.loss, first, n, scratch + LOSS * stride)
        if job.lse.address:
            wide_put_items(job.lse, first, n, scratch + LSE * stride)
        if job.operation == ENTROPY:
            put_items(job.out, first, n, scratch + LOSS * stride)
        elif job.operation != NOTHING:
            second_pass(job, rows, in_tile, has_gamma, is_kept)

    return SimpleNamespace(softmax_block=softmax_block)
