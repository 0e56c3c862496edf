"""Rows of many classes where figures are wanted: rank, top, its probability, entropy, the others' squares.

Kernels of their own, so that nobody else waits for their compilation. They walk rows as the plain loss does
(`numba_sums`), in one pass over memory, but take exponentials relative to the top wherever it stands: what
the entropy sums, e*(m - x), needs that difference anyway. A row keeps, of the others, square = sum e*e and
spread = sum e*(m - x) beside its sum, and of all classes, the top too, the number that come before the
target's: those of a larger logit, and those before it of an equal one. So the target's logit is loaded first.
All classes of a chunk are compared with one number, and in the target's own chunk its equals are seen to
afterwards.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels import numba_items, numba_memory, vectors
from logitloss._kernels.numba_job import (
    block_range,
    first_bad_label,
    found_at,
    job_at,
    label_of,
    place,
    put,
    put_figures,
)
from logitloss._kernels.vectors import inline, outline


def figures(item: str, ops: Any, elementary: Any, of_sums: Any, of_rows: Any, wide: Any) -> SimpleNamespace:
    """Return the kernels for rows of such items; `wide` are the steps of recurrence.py in float64."""
    real, lanes, splat, where, fma = ops.real, ops.lanes, ops.splat, ops.where, ops.fma
    maximum, lanes_from, lanes_sum = ops.maximum, ops.lanes_from, ops.lanes_sum
    summed_scale_of, summed_above = elementary.summed_scale_of, elementary.summed_above
    largest_in, place_of, has_nan = of_sums.largest_in, of_sums.place_of, of_sums.has_nan
    without, add_to_sum, fold_sums = of_sums.without, of_sums.add_to_sum, of_sums.fold
    row_at, begin, set_target = of_rows.row_at, of_rows.begin, of_rows.set_target
    chunk_from, classes_of, following = of_rows.chunk_from, of_rows.classes_of, of_rows.following
    n_parts, part_of, part_range = of_rows.n_parts, of_rows.part_of, of_rows.part_range
    share, softmax_of, page = wide.share, wide.softmax_of, of_rows.page
    next_above, prefetch = vectors.next_above, numba_memory.prefetch
    width, unit = numba_items.itemsize(item), np.float64(elementary.unit)
    load, load_item = numba_items.loader(item, real, lanes), numba_items.loader(item, real)
    low, zero, one, infinity, nan = real(-np.inf), real(0), real(1), np.inf, np.nan

    # ---- a chunk ----

    @inline
    def begin_sums(numbers):
        reference, limit = numbers
        lowest, magic = summed_scale_of(zero)
        given = splat(reference), splat(lowest), splat(magic), splat(limit)
        return given, given, zeros()

    @inline
    def zeros():
        return splat(zero), splat(zero), splat(zero), splat(zero)

    @inline
    def add(v, given, total, square, spread):
        reference, lowest, magic, _ = given
        d = maximum(lowest, v - reference)  # finite where the exponential is 0
        p, q = summed_above(d, magic)
        e = p * q
        return total + e, fma(e, e, square), fma(e, d, spread)

    @inline
    def add_turn(pair, given, sums, exps):
        total, square, spread, n_before = sums
        for v in pair:
            total, square, spread = add(v, given, total, square, spread)
            n_before = where(v >= given[3], n_before + one, n_before)
        return total, square, spread, n_before

    @outline
    def add_part(x, c, at, skip, given, sums, exps):
        """Add a group without the first `skip`; the class `at` counts, but is not summed."""
        total, square, spread, n_before = sums
        for i in range(0, 2 * lanes, lanes):
            v = load(x + (c + i) * width)
            others = without(v, low, at - c - i, skip - i)
            total, square, spread = add(others, given, total, square, spread)
            is_before = (v >= given[3]) & lanes_from(skip - i, lanes)
            n_before = where(is_before, n_before + one, n_before)
        return total, square, spread, n_before

    @inline
    def fold(sums, chain):
        return sums[0] + chain[0], sums[1] + chain[1], sums[2] + chain[2], sums[3] + chain[3]

    @inline
    def ends(sums):
        return lanes_sum(sums[0]), lanes_sum(sums[1]), lanes_sum(sums[2]), lanes_sum(sums[3])

    sum_chunk = of_sums.summing(
        2 * lanes,
        numba_items.pair_loader(item, real, lanes),
        begin=begin_sums,
        zeros=zeros,
        add_turn=add_turn,
        add_part=add_part,
        fold=fold,
        ends=ends,
    )

    @outline
    def n_equal(x, n, first, last, value):
        """Return how many of the classes first ... last - 1 of n have this value."""
        wanted, found, whole = splat(value), splat(zero), last - (last - first) % lanes
        for c in range(first, whole, lanes):
            found = where(load(x + c * width) == wanted, found + one, found)
        if whole < last:
            at = min(whole, n - lanes)
            is_equal = (load(x + at * width) == wanted) & lanes_from(whole - at, last - at)
            found = where(is_equal, found + one, found)
        return lanes_sum(found)

    @outline
    def add_chunk(row, x, n, first, next_x, next_n):
        """Add a chunk of n classes to the row, the first being number `first`; look at the next, if any."""
        largest, at = np.float64(largest_in(row, x, n)), -1
        if largest > row.m:
            at = place_of(x, n, real(largest))
            rise(row, largest)
            row.top = first + at
        if row.m == infinity:
            row.seen = 0
            if has_nan(x, n):
                row.s = nan
            return
        # Equals of the target come before it or not: as most of the chunk do, and then the rest is counted.
        target, own = real(row.target_logit), row.label - first
        is_late = own > n // 2
        limit = target if is_late else next_above(target)
        reference = real(row.m) if row.m > -infinity else zero
        sums, seen_largest = sum_chunk(x, n, at, (reference, limit), next_x, next_n, 0)
        total, square, spread, n_before = sums
        add_to_sum(row, total * unit)
        row.square += square * (unit * unit)
        row.spread -= spread * unit
        row.n_before += n_before
        if 0 <= own < n:
            row.n_before += -n_equal(x, n, own, n, target) if is_late else n_equal(x, n, 0, own, target)
        row.seen, row.seen_n, row.seen_largest = next_x, n - n % (2 * lanes), seen_largest

    # ---- a row ----

    @inline
    def rise(row, m):
        """Take a row's sums relative to a logit at least as large as its top, which joins the others."""
        if row.m > -infinity:
            factor = share(row.m, m) if row.m < m else 1.0
            add_to_sum(row, 1.0)
            row.s, row.s_lost = row.s * factor, row.s_lost * factor
            row.square = (row.square + 1.0) * (factor * factor)
            # 0 times an infinite rise is 0.
            row.spread = row.spread * factor + (row.s * (m - row.m) if row.s > 0.0 else 0.0)
        row.m = m

    @outline
    def merge_parts(job, row, i):
        for number in range(n_parts(job)):
            part = part_of(job, i, number)
            if part.m > row.m:
                rise(row, part.m)
                row.top = part.top
            else:
                rise(part, row.m)
            row.s, row.square, row.spread = row.s + part.s, row.square + part.square, row.spread + part.spread
            row.n_before += part.n_before
        fold_sums(row)

    @outline
    def sum_row(job, row, i, first, last, next_i, tile):
        """Add classes first ... last - 1 of row i."""
        c = first
        while c < last:
            n = chunk_from(c, last)
            x = classes_of(job, i, c, n, tile)
            next_x, next_n = following(job, x, c + n, last, next_i)
            add_chunk(row, x, n, c, next_x, next_n)
            c += n
        fold_sums(row)

    @inline
    def logit_at(job, i, label):
        return place(job.logits, i) + label * job.logits.class_stride

    @outline
    def begin_row(job, row, i):
        """Begin a row with the logit of its target, if that is a class."""
        begin(row)
        set_target(job, row, i)
        row.square, row.spread, row.n_before, row.target_logit = 0.0, 0.0, 0.0, infinity
        if row.live and 0 <= row.label < job.n_classes:
            row.target_logit = np.float64(load_item(logit_at(job, i, row.label)))

    @outline
    def finish(job, row, i):
        """Store a row's results; return its loss."""
        log1p_others, lse, p_top, _ = softmax_of(row.m, row.s)
        put(job.lse, i, lse)
        if not row.live:
            put(job.loss, i, 0.0)
            put_figures(job, i, (0.0, 0.0, 0.0, 0.0, 0.0))
            return 0.0
        loss, poison = (row.m - row.target_logit) + log1p_others, 0.0 * log1p_others
        put(job.loss, i, loss)
        entropy, squares = log1p_others + row.spread * p_top, row.square * (p_top * p_top)
        put_figures(job, i, (1.0 + row.n_before + poison, row.top + poison, p_top, entropy, squares))
        return loss

    # ---- blocks ----

    def figures_block(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        found.bad = first_bad_label(job, first, n)
        if found.bad >= 0:
            return
        row = row_at(scratch)
        total, counted = 0.0, 0
        row.seen = 0
        for i in range(first, first + n):
            if i + 1 < job.n:
                prefetch(logit_at(job, i + 1, label_of(job, i + 1)))
            begin_row(job, row, i)
            if job.parts:
                merge_parts(job, row, i)
            elif row.live or job.lse.address:
                next_i = i + 1 if i + 1 < first + n else -1
                sum_row(job, row, i, 0, job.n_classes, next_i, scratch + page)
            total += finish(job, row, i)
            counted += row.live
        found.total, found.counted = total, counted

    def figures_part(jobs, block, scratch, results):
        job = job_at(jobs)
        i, part = block // n_parts(job), block % n_parts(job)
        first, last = part_range(job, part)
        row = part_of(job, i, part)
        begin_row(job, row, i)
        row.seen = 0
        sum_row(job, row, i, first, last, -1, scratch + page)

    return SimpleNamespace(figures_block=figures_block, figures_part=figures_part)
