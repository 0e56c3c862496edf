"""Rows whose classes are many, one after another, a block of them at a time.

A row is read once (`numba_sums`); what is known of it gives loss and lse at once, and the gradient or softmax
while its logits or their exponentials are in the cache (`numba_rows_results`). Classes that do not lie next
to each other are brought into a tile first, as they are. Few long rows are shared among the threads by parts.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels import (
    numba_items,
    numba_memory,
    numba_operations,
    numba_rows_results,
    recurrence,
    vectors,
)
from logitloss._kernels.elementary import elementary
from logitloss._kernels.numba_figures import figures
from logitloss._kernels.numba_job import (
    ENTROPY,
    GRADIENT,
    LABELS,
    NOTHING,
    PROBABILITIES,
    SOFTMAX,
    block_range,
    first_bad_label,
    found_at,
    get,
    job_at,
    job_steps,
    label_of,
    place,
    put,
)
from logitloss._kernels.numba_sums import ROW, sums
from logitloss._kernels.vectors import inline, outline
from numba import carray
from numba.extending import register_jitable

CHUNK_BYTES = 8192
BLOCK_ROWS = 64
# A block's logits are some work for a thread, and there are some blocks for each.
BLOCK_BYTES = 1 << 17
# A row's exponentials are kept for the second pass, if they are no more than this.
KEEP_BYTES = 1 << 20
# Threads share rows of more than a segment, if there are fewer rows than this.
SEGMENT, FEW_ROWS = 1 << 18, 64
PAGE = 4096
# A tile holds a chunk, which may have a group more, and starts where it is to within its page.
TILE_BYTES = CHUNK_BYTES + 2 * PAGE
ROW_BYTES = -(-ROW.itemsize // 64) * 64


@register_jitable
def plan(operation, n_rows, n_classes, size, width, has_lse):
    """Return a block's rows, whether exponentials are kept, and the bytes of scratch memory of a thread.

    `size` is that of the reals, `width` of the logits' items.
    """
    row_bytes = n_classes * size
    block = min(BLOCK_ROWS, max(1, BLOCK_BYTES // row_bytes))
    # To read 16 bits again is less than to keep their exponentials.
    keeps = operation in (GRADIENT, SOFTMAX) and width > 2 and not has_lse
    keeps = keeps and row_bytes <= KEEP_BYTES
    n_chunks = row_bytes // CHUNK_BYTES + 1
    return block, keeps, PAGE + 3 * TILE_BYTES + 16 * n_chunks + (row_bytes + PAGE if keeps else 0)


def has_parts(n_rows: int, n_classes: int) -> bool:
    """Whether threads share rows."""
    return n_classes > SEGMENT and n_rows < FEW_ROWS


def n_parts_of(n_classes: int) -> int:
    """Return how many parts a row has that threads share; the last may be longer than a segment."""
    return max(1, n_classes // SEGMENT)


def kernels(item: str) -> SimpleNamespace:
    """Return the kernels for logits of such items."""
    real: Any = np.float64 if item == "f64" else np.float32
    ops = numba_operations.operations(real)
    own, wide_own = elementary(inline, real), elementary(inline, np.float64)
    machine = SimpleNamespace(
        fma=vectors.fma,
        absolute=vectors.absolute,
        maximum=vectors.maximum,
        minimum=vectors.minimum,
        where=vectors.where,
        exp=wide_own.exp,
        expm1=math.expm1,
        log1p=wide_own.log1p,
    )
    wide = recurrence.steps(inline, machine, np.float64)
    made = sums(item, ops, own, wide_own, wide)
    add, add_and_keep, add_any = made.add, made.add_and_keep, made.add_any
    fold = made.fold
    has_kept = add_and_keep is not None
    if not has_kept:
        add_and_keep = add
    load_run = job_steps(real).load_run
    lanes, size, splat = ops.lanes, ops.size, ops.splat
    width, group, chunk = numba_items.itemsize(item), 2 * ops.lanes, CHUNK_BYTES // ops.size
    load_item, load_one = numba_items.loader(item, real), ops.load_one
    store_item, store_reals, store_real = numba_items.storer(item, real), ops.store, ops.store_one
    store_wide, merge, merge_gaps = numba_items.storer("f64", np.float64), wide.merge, wide.merge_gaps
    as_pointer, fence = numba_memory.as_pointer, numba_memory.fence
    infinity, zero, unit, row_type, expm1 = np.inf, real(0), np.float64(own.unit), ROW, math.expm1

    # ---- where things are ----

    @inline
    def row_at(address):
        return carray(as_pointer(address), (1,), row_type)[0]

    @inline
    def apart(address, read, distance):
        """Move on to the place that is so far from what is read meanwhile, within a page.

        A load waits for a store just before it to the same place of another page.
        """
        return address + (read // 64 * 64 + distance - address) % PAGE

    @inline
    def chunk_from(c, last):
        """Return how many classes the chunk that begins at c has: what follows has a group at least."""
        return chunk if last - c >= chunk + group else last - c

    @outline
    def pack(address, stride, n, tile):
        """Bring n items into a tile."""
        for i in range(n):
            store_item(tile + i * width, load_item(address + i * stride))

    @outline
    def unpack(address, stride, n, tile):
        """Bring a tile's items back."""
        for i in range(n):
            store_item(address + i * stride, load_item(tile + i * width))

    @outline
    def classes_of(job, i, c, n, tile):
        """Return the address of n classes of row i, in place or in the tile."""
        stride = job.logits.class_stride
        address = place(job.logits, i) + c * stride
        if stride == width:
            return address
        tile = apart(tile, address, PAGE // 2)
        pack(address, stride, n, tile)
        return tile

    @outline
    def gammas_of(job, i, c, n, tile):
        """Return the address of the coefficients of n classes of row i."""
        weight = job.gamma + c * size if job.gamma else 0
        if job.target_kind != PROBABILITIES:
            if weight:
                return weight
            for j in range(0, n + lanes, lanes):
                store_reals(tile + j * size, splat(zero))
            return tile
        target = job.target
        address = place(target, i) + c * target.class_stride
        scale, offset = real(job.target_scale), real(job.target_offset)
        plain = weight == 0 and scale == real(1) and offset == zero
        if plain and target.kind == real_kind and target.class_stride == size:
            return address
        tile = apart(tile, address, 3 * PAGE // 4)
        load_run(target.kind, address, target.class_stride, n, tile)
        if not plain:
            for j in range(n):
                w = load_one(weight + j * size) if weight else real(1)
                store_real(tile + j * size, w * (scale * load_one(tile + j * size) + offset))
        return tile

    real_kind = numba_items.ITEMS.index(ops.item)

    @inline
    def following(job, end, c, last, next_i):
        """Return the address of the chunk that is read next, and its classes: of class c, where one ends.

        It is the first of row next_i at a row's end. There is none (0) where that is -1, or in tiles.
        """
        if job.logits.class_stride == width and c < last:
            return end, chunk_from(c, last)
        if job.logits.class_stride == width and next_i >= 0:
            return place(job.logits, next_i), chunk_from(0, job.n_classes)
        return 0, 0

    # ---- the first pass ----

    @outline
    def begin(row):
        row.m, row.s, row.weight, row.gap, row.top_weight = -infinity, 0.0, 0.0, 0.0, 0.0
        row.k, row.relative, row.top = 0.0, unit, -1
        row.s_lost, row.weight_lost, row.gap_lost = 0.0, 0.0, 0.0

    @outline
    def set_target(job, row, i):
        row.label, row.live = -1, 1
        if job.target_kind == LABELS:
            row.label = label_of(job, i)
            row.live = row.label != job.ignore_index

    @outline
    def sum_row(job, row, i, first, last, next_i, scratch, exps, marks):
        """Add classes first ... last - 1 of row i; exps is where exponentials are kept, or 0."""
        has_gamma = job.gamma != 0 or job.target_kind == PROBABILITIES
        c = first
        while c < last:
            n, done = chunk_from(c, last), False
            x = classes_of(job, i, c, n, scratch)
            to = exps + c * size if exps else 0
            if not has_gamma:
                next_x, next_n = following(job, x + n * width, c + n, last, next_i)
                if has_kept and exps:
                    done = add_and_keep(row, x, n, c, next_x, next_n, to)
                else:
                    done = add(row, x, n, c, next_x, next_n, 0)
            if not done:
                gamma = gammas_of(job, i, c, n, scratch + TILE_BYTES)
                add_any(row, x, n, c, gamma, to)
            if exps:
                mark = marks + (c - first) // chunk * 16
                store_wide(mark, row.m)
                store_wide(mark + 8, row.relative)
            c += n
        fold(row)

    @outline
    def part_of(job, i, part):
        """Return the record of a part of row i that threads share; behind the parts is the row's own."""
        return row_at(job.parts + (i * (n_parts(job) + 1) + part) * ROW_BYTES)

    @inline
    def n_parts(job):
        return max(1, job.n_classes // SEGMENT)

    @outline
    def part_range(job, part):
        first = part * SEGMENT
        return first, job.n_classes if part + 1 == n_parts(job) else first + SEGMENT

    @outline
    def merge_parts(job, row, i):
        begin(row)
        for number in range(n_parts(job)):
            part = part_of(job, i, number)
            row.weight, row.gap, row.top_weight = merge_gaps(
                row.m, row.weight, row.gap, row.top_weight, part.m, part.weight, part.gap, part.top_weight
            )
            if part.m > row.m:
                row.top = part.top
            if part.m == infinity or row.m == infinity:
                # Only a NaN counts beside +inf.
                row.m, row.s = infinity, (row.s + part.s) * 0.0
            else:
                row.m, row.s = merge(row.m, row.s, part.m, part.s)

    # ---- blocks ----

    of_rows = SimpleNamespace(
        row_at=row_at,
        page=PAGE,
        tile_bytes=TILE_BYTES,
        chunk=chunk,
        apart=apart,
        chunk_from=chunk_from,
        classes_of=classes_of,
        gammas_of=gammas_of,
        unpack=unpack,
        following=following,
        begin=begin,
        set_target=set_target,
        n_parts=n_parts,
        part_of=part_of,
        part_range=part_range,
    )
    of_figures = figures(item, ops, own, made, of_rows, wide)
    of_results = numba_rows_results.results(item, ops, own, wide_own, of_rows, wide)
    finish, map_row, sum_entropy = of_results.finish, of_results.map_row, of_results.sum_entropy

    @outline
    def needs_no_pass(job, row, i, lse_in):
        """Whether a row follows from its label alone, and its sums then: it is ignored, or its lse is known.

        Where a known lse leaves a label little short of 1, the others must be summed.
        """
        if job.target_kind != LABELS or (not row.live and job.lse.address):
            return False
        if not row.live:
            row.m, row.s = 0.0, 0.0
            return True
        if not job.lse_in.address or job.gamma:
            return False
        logit = np.float64(load_item(place(job.logits, i) + row.label * job.logits.class_stride))
        if not -expm1(logit - lse_in) > 1e-3:
            return False
        row.m, row.s, row.top = logit, 0.0, row.label
        return True

    def softmax_block(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        if job.target_kind == LABELS:
            found.bad = first_bad_label(job, first, n)
            if found.bad >= 0:
                return
        row, tiles = row_at(scratch), scratch + PAGE
        marks = tiles + 3 * TILE_BYTES
        memory = marks + 16 * (job.n_classes // chunk + 1)
        total, counted = 0.0, 0
        row.seen = 0
        for i in range(first, first + n):
            begin(row)
            set_target(job, row, i)
            lse_in = get(job.lse_in, i, 0.0)
            exps = 0
            if not needs_no_pass(job, row, i, lse_in):
                if job.parts:
                    merge_parts(job, row, i)
                else:
                    if job.keeps:
                        exps = apart(memory, place(job.logits, i), PAGE // 4)
                    next_i = i + 1 if i + 1 < first + n else -1
                    sum_row(job, row, i, 0, job.n_classes, next_i, tiles, exps, marks)
            total += finish(job, row, i, lse_in)
            counted += row.live
            if job.operation == ENTROPY:
                entropy = sum_entropy(job, row, i, 0, job.n_classes, tiles)
                put(job.out, i, entropy * row.factor)
            elif job.operation != NOTHING and job.parts:
                keep_row(job, row, i)
            elif job.operation != NOTHING:
                map_row(job, row, i, 0, job.n_classes, tiles, exps, marks)
        if job.streams:
            fence()
        found.total, found.counted = total, counted

    @outline
    def keep_row(job, row, i):
        own_row = part_of(job, i, n_parts(job))
        own_row.m, own_row.reference, own_row.factor = row.m, row.reference, row.factor
        own_row.gamma_factor, own_row.log1p_others = row.gamma_factor, row.log1p_others
        own_row.at_top, own_row.at_label = row.at_top, row.at_label
        own_row.top, own_row.label, own_row.live = row.top, row.label, row.live

    def part_sums(jobs, block, scratch, results):
        job = job_at(jobs)
        i, part = block // n_parts(job), block % n_parts(job)
        first, last = part_range(job, part)
        row = part_of(job, i, part)
        begin(row)
        row.seen = 0
        sum_row(job, row, i, first, last, -1, scratch + PAGE, 0, 0)

    def part_results(jobs, block, scratch, results):
        job = job_at(jobs)
        i, part = block // n_parts(job), block % n_parts(job)
        first, last = part_range(job, part)
        map_row(job, part_of(job, i, n_parts(job)), i, first, last, scratch + PAGE, 0, 0)
        fence()

    return SimpleNamespace(
        softmax_block=softmax_block,
        part_sums=part_sums,
        part_results=part_results,
        figures_block=of_figures.figures_block,
        figures_part=of_figures.figures_part,
    )
