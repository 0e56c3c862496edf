"""A block of rows of the softmax family, a row in each lane: short rows, and rows side by side (`axis=1`).

What a row keeps (`recurrence`) is a vector's lane here. The largest logit of a range of classes is sought
first; of the exponentials relative to it, which are made 2**headroom too large, and the largest so far, the
smaller joins the others' sum: so the top stays out without a comparison of its place. Where all classes of the
block fit a tile the exponentials stay there for the second pass, which then only multiplies. Where they do
not, classes go by ranges, and a row that rises brings its sum along.
"""

from __future__ import annotations

from types import SimpleNamespace

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
    found_at,
    job_at,
    job_steps,
    last_stride,
    place,
    run_length,
)
from logitloss._kernels.numba_lanes_arrays import LINE, Rows, arrays
from logitloss._kernels.numba_lanes_finish import (
    BETA,
    FACTOR,
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
)
from logitloss._kernels.vectors import inline, outline
from numba.extending import register_jitable

# Fewer classes go by lanes wherever they lie.
FEW_CLASSES = 48
# As labels, reals can number these.
MOST_CLASSES = 1 << 24
# The logits of a block of short rows stay in the nearest cache, rows side by side make long runs of each class.
BLOCK_ROWS = 1024
SHORT_BYTES = 1 << 14
TILE_BYTES = 1 << 17
# Sums take so many classes between roundings that are kept.
CHAIN = 8


@register_jitable
def _stride(block, size):
    """Return the bytes between classes: a line more than the rows take, to stay out of one set of the cache."""
    return block * size + LINE


@register_jitable
def _classes_in_tile(block, n_classes, size):
    return min(n_classes, TILE_BYTES // _stride(block, size) // CHAIN * CHAIN)


@register_jitable
def plan(n_rows, n_classes, size, width, are_beside):
    """Return a block's rows and the bytes of scratch memory of a thread; no bytes if rows do not go by lanes.

    `size` is that of the reals, `width` of the logits' items; rows may lie beside each other.
    """
    if n_classes >= (MOST_CLASSES if are_beside else FEW_CLASSES):
        return 0, 0
    most = (TILE_BYTES if are_beside else SHORT_BYTES) // (n_classes * size) - LINE // size
    # Where a tile cannot hold all classes, long runs are worth more than blocks for many threads: each class
    # begins on another page.
    are_long = are_beside and most < 64
    most = BLOCK_ROWS if are_long else min(most, BLOCK_ROWS)
    most = min(most, n_rows // (4 if are_long else 64))
    block = max(64, most // 64 * 64)
    stride = _stride(block, size)
    return block, N_SLOTS * stride + 2 * (_classes_in_tile(block, n_classes, size) * stride + LINE)


def kernels(item: str) -> SimpleNamespace:
    """Return the kernels for logits of such items."""
    real = np.float64 if item == "f64" else np.float32
    ops, of_arrays = vectors.operations(real), arrays(item)
    size, lanes = ops.size, ops.lanes
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

    @outline
    def restore_infinite(x, step, n_classes, high, before, total):
        """Return the sum, 0 but for NaN in rows that hold +inf."""
        total = where(high == infinity, before * zero, total)
        for c in range(n_classes):
            logit = load(x + c * step)
            total = where(logit != logit, logit, total)
        return total

    def summing(keeps):
        """Return the function that adds a range of classes to rows' sums and, if it `keeps`, stores exponentials."""

        @inline
        def add_one(x, x_step, e, e_step, reference, peak):
            power = exp_raised(load(x) - reference)
            if keeps:
                store(e, power)
            return minimum(peak, power), maximum(power, peak)

        def twice(add_half, half):
            @inline
            def add_both(x, x_step, e, e_step, reference, peak):
                first, peak = add_half(x, x_step, e, e_step, reference, peak)
                x, e = x + half * x_step, e + half * e_step
                second, peak = add_half(x, x_step, e, e_step, reference, peak)
                return first + second, peak

            return add_both

        # In pairs, and pairs of these: few roundings
        add_two = twice(add_one, 1)
        add_four = twice(add_two, 2)
        add_eight = twice(add_four, 4)

        @outline
        def sum_range(rows, x, x_step, e, e_step, is_first, n_classes):
            for offset in range(0, rows.width * size, vector_bytes):
                at = rows.slots + offset
                old, total, lost = splat(-infinity), splat(zero), splat(zero)
                if not is_first:
                    old = load(at + LARGEST * rows.slot_bytes)
                    total = load(at + SUM * rows.slot_bytes)
                    lost = load(at + LOST * rows.slot_bytes)
                before, high = total, old
                from_class, to_class = x + offset, e + offset
                for _ in range(n_classes):
                    high = maximum(load(from_class), high)
                    from_class += x_step
                reference = finite_or_zero(high)
                peak = splat(zero)
                if not is_first:
                    # The top so far joins the others where it is one no more.
                    rises = high > old
                    factor = where(rises, exp(old - reference), splat(real(1)))
                    total = fma(total, factor, where(rises, factor * one_raised, zero))
                    lost = lost * factor
                    peak = where(rises, zero, splat(one_raised))
                from_class = x + offset
                for _ in range(n_classes // 8):
                    more, peak = add_eight(from_class, x_step, to_class, e_step, reference, peak)
                    total, lost = add(total, lost, more)
                    from_class += 8 * x_step
                    to_class += 8 * e_step
                if n_classes & 4:
                    more, peak = add_four(from_class, x_step, to_class, e_step, reference, peak)
                    total, lost = add(total, lost, more)
                    from_class += 4 * x_step
                    to_class += 4 * e_step
                if n_classes & 2:
                    more, peak = add_two(from_class, x_step, to_class, e_step, reference, peak)
                    total, lost = add(total, lost, more)
                    from_class += 2 * x_step
                    to_class += 2 * e_step
                if n_classes & 1:
                    more, peak = add_one(from_class, x_step, to_class, e_step, reference, peak)
                    total, lost = add(total, lost, more)
                if any_lane(high == infinity):
                    total = restore_infinite(x + offset, x_step, n_classes, high, before, total)
                    lost = where(high == infinity, zero, lost)
                store(at + LARGEST * rows.slot_bytes, high)
                store(at + SUM * rows.slot_bytes, total)
                store(at + LOST * rows.slot_bytes, lost)

        return sum_range

    sum_range, sum_and_keep = summing(keeps=False), summing(keeps=True)

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
                weight, weight_lost = add(weight, weight_lost, where(is_top, zero, gamma))
                # 0*inf = 0
                gap, gap_lost = add(gap, gap_lost, where(gamma == zero, zero, gamma * (reference - logit)))
                top_weight = where(is_top, gamma, top_weight)
            store(at + WEIGHT * rows.slot_bytes, weight)
            store(at + WEIGHT_LOST * rows.slot_bytes, weight_lost)
            store(at + GAP * rows.slot_bytes, gap)
            store(at + GAP_LOST * rows.slot_bytes, gap_lost)
            store(at + TOP_WEIGHT * rows.slot_bytes, top_weight)

    @outline
    def exp_range(rows, m_at, x, x_step, e, n_classes):
        """Store the exponentials of a range of classes, relative to the logits at m_at."""
        for c in range(n_classes):
            for offset in range(0, rows.width * size, vector_bytes):
                d = load(x + c * x_step + offset) - finite_or_zero(load(m_at + offset))
                store(e + c * rows.stride + offset, exp_raised(d))

    @outline
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
        """An entry from its exponential."""

        @inline
        def entry(rows, at, e, g, number):
            # An exponential may be NaN where the row is ignored; where it is not, the factor is.
            p = maximum(load(e), zero) * load(at + FACTOR * rows.slot_bytes)
            is_label = load(at + LABEL * rows.slot_bytes) == number
            return where(is_label, load(at + LABEL_ENTRY * rows.slot_bytes), p)

        return entry

    def product_with_gamma(load):
        """The same with a coefficient."""

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
        """A logarithm of softmax from the logit."""

        @inline
        def entry(rows, at, x, g, number):
            ahead = load(x) - load(at + LARGEST * rows.slot_bytes)
            return ahead - load(at + LOG1P_OTHERS * rows.slot_bytes)

        return entry

    def mapping(entry_by):
        """Return the function that turns a range of classes into entries of `out`, in lanes both."""
        entry, entry_of_one = entry_by(load), entry_by(load_one)

        @outline
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

    @outline
    def second_pass(job, rows, in_tile, has_gamma, is_kept):
        are_beside = beside(job.out, rows)
        streams = job.streams and are_beside
        for c in range(0, job.n_classes, in_tile):
            n = min(in_tile, job.n_classes - c)
            start, step = rows.tile, rows.stride
            if not is_kept:
                start, step = lanes_of(job.logits, rows, c, n)
                if job.operation != LOG_SOFTMAX:
                    exp_range(rows, rows.slots + LARGEST * rows.slot_bytes, start, step, rows.tile, n)
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

    @outline
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

    @outline
    def load_wide(view, rows):
        done = 0
        to = rows.slots + LSE_IN * rows.slot_bytes
        while done < rows.n:
            length = run_length(view, rows.first + done, rows.n - done)
            at = place(view, rows.first + done)
            wide_load_run(view.kind, at, last_stride(view), length, to + 8 * done)
            done += length

    @outline
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

    @outline
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

    @outline
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
                exp_range(rows, rows.slots + REFERENCE * rows.slot_bytes, x, step, rows.other, n)
            elif has_gamma:
                gammas_of(job, rows, c, n)
            if has_gamma or job.operation == ENTROPY:
                weigh_range(rows, x, step, rows.other, c, n)
            if is_kept:
                sum_and_keep(rows, x, step, rows.tile, rows.stride, c == 0, n)
            else:
                sum_range(rows, x, step, rows.tile, rows.stride, c == 0, n)

    def softmax_block(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
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
