"""A block of rows of the softmax family, a row in each lane: short rows, and rows side by side (`axis=1`).

What a row keeps (`recurrence`) is a vector's lane here. The common loss of few classes has a way of its own
(`numba_lanes_labels`). For all else the largest logit of a range of classes is sought first. Exponentials are
relative to a power of two near its own, 2**headroom too large, and go to a tile; of each and the largest so
far, the smaller joins the others' sum, so that the top stays out and nobody asks where it is. Where a tile
holds all classes of the block the exponentials stay for the second pass, which then only multiplies. Where it
does not, classes go by ranges, and a row that rises brings its sum along. Where figures are wanted, tops and
their classes are found first, and one sweep over logits and exponentials sums all that is.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from logitloss._kernels import numba_items, numba_memory, numba_operations
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
from logitloss._kernels.numba_lanes_entries import entries
from logitloss._kernels.numba_lanes_finish import (
    BETA,
    LABEL,
    LABEL_GAMMA,
    LOSS,
    LSE,
    LSE_IN,
    N_SLOTS,
    SCALE,
    TARGET_LOGIT,
    finisher,
)
from logitloss._kernels.numba_lanes_labels import AHEAD, LABELS_MOST_CLASSES, REGISTERS, labels
from logitloss._kernels.numba_lanes_sums import CHAIN, sums
from logitloss._kernels.vectors import inline, outline
from numba.extending import register_jitable

# Fewer classes go by lanes wherever they lie.
FEW_CLASSES = 48
# As labels, reals can number these.
MOST_CLASSES = 1 << 24
# A block of short rows stays in the nearest cache, rows side by side make long runs of each class.
BLOCK_ROWS = 1024
SHORT_BYTES = 1 << 14
TILE_BYTES = 1 << 17
LEAST_BESIDE = 128


@register_jitable
def _stride(block, size):
    """Return the bytes between classes: the rows' and a line, to stay out of one set of the cache."""
    return block * size + LINE


@register_jitable
def _classes_in_tile(block, n_classes, size):
    most = TILE_BYTES // _stride(block, size)
    return n_classes if n_classes <= most else most // CHAIN * CHAIN


@register_jitable
def plan(n_rows, n_classes, size, width, are_beside):
    """Return a block's rows and the bytes of scratch memory of a thread; no bytes if rows do not go by lanes.

    `size` is that of the reals, `width` of the logits' items; rows may lie beside each other.
    """
    if n_classes >= (MOST_CLASSES if are_beside else FEW_CLASSES):
        return 0, 0
    most = (TILE_BYTES if are_beside else SHORT_BYTES) // (n_classes * size) - LINE // size
    # Where a tile cannot hold all classes but in short runs, long ones are worth more than that and blocks
    # for many threads: each class begins on another page.
    are_long = are_beside and most < LEAST_BESIDE
    most = BLOCK_ROWS if are_long else min(most, BLOCK_ROWS)
    most = min(most, n_rows // (4 if are_long else 64))
    block = max(64, most // 64 * 64)
    stride = _stride(block, size)
    return block, N_SLOTS * stride + 2 * (_classes_in_tile(block, n_classes, size) * stride + LINE)


def kernels(item: str) -> SimpleNamespace:
    """Return the kernels for logits of such items."""
    real = np.float64 if item == "f64" else np.float32
    ops, of_arrays = numba_operations.operations(real), arrays(item)
    size, lanes, item_size = ops.size, ops.lanes, numba_items.itemsize(item)
    unit = lanes * REGISTERS
    of_sums, of_entries, of_labels = sums(real), entries(real), labels(real)
    plain_labels = of_labels.plain_labels
    keep_plain, restore_plain = of_labels.keep_plain, of_labels.restore_plain
    load, store, zero = ops.load, ops.store, real(0)
    exp_range, sum_range = of_sums.exp_range, of_sums.sum_range
    find_tops, weigh_range, sum_figures = of_sums.find_tops, of_sums.weigh_range, of_sums.sum_figures
    map_product, map_gamma, map_log = of_entries.map_product, of_entries.map_gamma, of_entries.map_log
    finish_plain = finisher(real, real, is_plain=True).finish
    of_finish = finisher(real, np.float64, is_plain=False)
    finish, finish_figures = of_finish.finish, of_finish.finish_figures
    vector_bytes = lanes * size
    load_one, store_one, maximum = ops.load_one, ops.store_one, ops.maximum
    labels_of, numbers, fill, bring = of_arrays.labels_of, of_arrays.numbers, of_arrays.fill, of_arrays.bring
    beside, lanes_of, put = of_arrays.are_beside, of_arrays.lanes_of, of_arrays.put
    put_items, load_item = of_arrays.put_items, of_arrays.load_item
    wide_steps = job_steps(np.float64)
    wide_load_run, wide_put_items = wide_steps.load_run, wide_steps.put_items

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
            numba_memory.fence()

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
    def first_pass(job, rows, in_tile, has_gamma, is_kept):
        fits = in_tile == job.n_classes
        has_top = has_gamma or job.operation == ENTROPY
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

    @outline
    def sum_labels(job, rows, is_kept):
        """Try rows with plain labels; return whether they all could go this way, and the losses' sum."""
        x, step = lanes_of(job.logits, rows, 0, job.n_classes)
        after_all = place(job.logits, rows.first + rows.n)
        ahead, ahead_step = x + AHEAD, step
        if x == rows.tile:
            # Rows of few classes follow each other.
            ahead, ahead_step, after_all = after_all, rows.n * item_size, 0
        has_losses = job.loss.address != 0
        return plain_labels(
            rows, x, step, job.n_classes, is_kept, job.beta != 0, has_losses, ahead, ahead_step, after_all
        )

    @outline
    def put_results(job, rows):
        """Bring losses and lse to where they belong."""
        if job.loss.address:
            put_items(job.loss, rows.first, rows.n, rows.slots + LOSS * rows.slot_bytes)
        if job.lse.address:
            wide_put_items(job.lse, rows.first, rows.n, rows.slots + LSE * rows.slot_bytes)

    @inline
    def rows_of(job, first, n, scratch):
        """Return the block's rows, and how many classes go into a tile."""
        stride = _stride(job.block, size)
        in_tile = _classes_in_tile(job.block, job.n_classes, size)
        tile = scratch + N_SLOTS * stride
        other = tile + in_tile * stride
        return Rows(first, n, (n + unit - 1) // unit * unit, scratch, stride, stride, tile, other), in_tile

    def figures_block(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        rows, in_tile = rows_of(job, first, n, scratch)
        found.counted = prepare(job, rows)
        if found.counted < 0:
            found.bad = first_bad_label(job, first, n)
            return
        x, step = rows.tile, rows.stride
        for c in range(0, job.n_classes, in_tile):
            n_some = min(in_tile, job.n_classes - c)
            x, step = lanes_of(job.logits, rows, c, n_some)
            find_tops(rows, x, step, c, n_some)
        target_logits(job, rows)
        after_all = place(job.logits, rows.first + rows.n)
        for c in range(0, job.n_classes, in_tile):
            n_some = min(in_tile, job.n_classes - c)
            if in_tile < job.n_classes:
                x, step = lanes_of(job.logits, rows, c, n_some)
            # Rows of few classes follow each other.
            ahead_step = rows.n * item_size if x == rows.tile else step
            exp_range(rows, x, step, rows.other, n_some, after_all + c * ahead_step, ahead_step)
            sum_figures(rows, x, step, rows.other, c, n_some)
        found.total = finish_figures(job, rows)
        put_results(job, rows)

    def softmax_block(jobs, block, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, block)
        rows, in_tile = rows_of(job, first, n, scratch)
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
        is_plain = not (has_gamma or job.lse.address or job.lse_in.address or job.z_loss != 0)
        are_labels = (
            is_plain
            and job.target_kind == LABELS
            and job.n_classes <= LABELS_MOST_CLASSES
            and (
                is_kept or (job.operation == NOTHING and beside(job.logits, rows)) or in_tile == job.n_classes
            )
        )
        is_done, total = False, np.float64(0)
        if are_labels:
            is_done, total = sum_labels(job, rows, is_kept)
        is_mixed = are_labels and not is_done
        if not is_done:
            if is_mixed:
                keep_plain(rows)
                is_kept = False
            first_pass(job, rows, in_tile, has_gamma, is_kept)
            if job.target_kind == LABELS:
                target_logits(job, rows)
            if is_plain and job.operation != ENTROPY:
                total = finish_plain(job, rows, False)
            else:
                total = finish(job, rows, has_gamma)
            if is_mixed:
                total = restore_plain(rows)
        found.total = total
        put_results(job, rows)
        if job.operation == ENTROPY:
            put_items(job.out, first, n, scratch + LOSS * rows.slot_bytes)
        elif job.operation != NOTHING:
            second_pass(job, rows, in_tile, has_gamma, is_kept)

    return SimpleNamespace(softmax_block=softmax_block, figures_block=figures_block)
