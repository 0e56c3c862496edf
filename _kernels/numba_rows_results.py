"""From the sums of a row whose classes are many to its loss, and to what becomes of each of its logits.

The gradient or softmax is made of the logits, or of their exponentials where those were kept, while they are
in the cache. Results go around the cache where the whole is larger than that: by way of a tile, in which the
entries of the label and of the top are put in their place, or by whole lines but for the label's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels import numba_items, numba_memory, numba_operations, vectors
from logitloss._kernels.numba_job import (
    GRADIENT,
    LABELS,
    LOG_SOFTMAX,
    PROBABILITIES,
    coefficient,
    get,
    place,
    put,
)
from logitloss._kernels.numba_sums import CHAIN, DIRECT
from logitloss._kernels.vectors import lost_of, outline

# Registers that each of a pair of vectors takes where exponentials of 16-bit logits are streamed
TURN = 2


def results(
    item: str, ops: Any, elementary: Any, wide_elementary: Any, of_rows: Any, wide: Any
) -> SimpleNamespace:
    """Return the steps for rows of such items; `wide` are the steps of recurrence.py in float64."""
    real, lanes, size, splat, where = ops.real, ops.lanes, ops.size, ops.splat, ops.where
    lanes_from, lanes_sum = ops.lanes_from, ops.lanes_sum
    width, group = numba_items.itemsize(item), 2 * lanes
    load, load_exps = numba_items.loader(item, real, lanes), ops.load
    load_item, load_one = numba_items.loader(item, real), ops.load_one
    store, store_item = numba_items.storer(item, real, lanes), numba_items.storer(item, real)
    store_exps, load_wide = ops.store, numba_items.loader("f64", np.float64)
    load_pair, store_pair = (
        numba_items.pair_loader(item, real, lanes),
        numba_items.pair_storer(item, real, lanes),
    )
    exp_raised, unit = elementary.exp_raised, np.float64(elementary.unit)
    scaled_parts, scale_of, rounded = elementary.scaled_parts, elementary.scale_of, elementary.rounded
    exp2_unit, fma, direct = wide_elementary.exp2_unit, vectors.fma, DIRECT[real]
    log2e, wide_log2e = elementary.log2e, float(elementary.log2e)
    share, softmax_of, softmax_from = wide.share, wide.softmax_of, wide.softmax_from
    loss_of, gradient_of = wide.loss_of, wide.gradient_of
    page, tile_bytes, chunk = of_rows.page, of_rows.tile_bytes, of_rows.chunk
    apart, chunk_from, unpack = of_rows.apart, of_rows.chunk_from, of_rows.unpack
    classes_of, gammas_of = of_rows.classes_of, of_rows.gammas_of
    has_turns, pair = width == 2, numba_operations.operations(real, TURN)
    turn, splat_turn, keep_rolled = 2 * pair.lanes, pair.splat, vectors.keep_rolled
    fetch_group, fetch_turn = numba_memory.fetcher(group * width), numba_memory.fetcher(turn * width)
    load_turn = numba_items.pair_loader(item, real, pair.lanes)
    stream_turn = numba_items.pair_storer(item, real, pair.lanes, streams=True)
    stream_vector, line, zero = ops.stream, 64 // size, real(0)
    copy, stream = numba_memory.copy, numba_memory.stream
    # A factor that is no normal number loses digits.
    smallest = 2.0**-120 if real is np.float32 else 2.0**-1000

    @outline
    def finish(job, row, i, lse_in):
        """Fill in what the second pass needs; return the loss."""
        is_gradient, has_labels = job.operation == GRADIENT, job.target_kind == LABELS
        if job.lse_in.address:
            log1p_others, lse, p_top, p_others = softmax_from(row.m, row.s, lse_in)
        else:
            log1p_others, lse, p_top, p_others = softmax_of(row.m, row.s)
        beta, label_gamma, target_logit = 0.0, 0.0, row.m
        if has_labels:
            row.weight = job.gamma_sum - row.top_weight
            if row.live:
                beta = coefficient(job.beta, row.label, 1.0)
                if job.gamma:
                    label_gamma = np.float64(load_one(job.gamma + row.label * size))
                address = place(job.logits, i) + row.label * job.logits.class_stride
                target_logit = np.float64(load_item(address))
        loss = 0.0
        if row.live and job.target_kind <= PROBABILITIES:
            loss = loss_of(
                row.m, log1p_others, lse, row.weight, row.gap, row.top_weight, beta, target_logit, job.z_loss
            )
        put(job.loss, i, loss)
        put(job.lse, i, lse)
        row.log1p_others, row.reference, row.factor, row.gamma_factor = log1p_others, row.m, p_top, 0.0
        if job.lse_in.address and np.isfinite(lse_in):
            # A rounded lse, and what it lacks
            row.reference = np.float64(real(lse_in))
            row.factor = (
                share(row.reference, lse_in)
                if row.reference <= lse_in
                else 1.0 / share(lse_in, row.reference)
            )
        if not is_gradient:
            row.label, row.top = -1, -1
            return loss
        scale = get(job.scale, i, 1.0)
        alpha, at_top, at_label = gradient_of(
            row.m,
            log1p_others,
            lse,
            p_top,
            p_others,
            row.weight,
            row.top_weight,
            beta,
            label_gamma,
            target_logit,
            job.z_loss,
        )
        row.factor, row.gamma_factor = row.factor * (scale * alpha), scale
        if row.factor != row.factor:  # to 16 bits only the usual NaN is rounded as one
            row.factor = np.nan
        row.at_top, row.at_label = scale * at_top, scale * at_label
        if not (job.gamma != 0 or job.target_kind == PROBABILITIES):
            row.top = -1
        return loss

    # ---- the second pass ----

    @outline
    def scaled(exps, gamma, gamma_factor, factor, n, to):
        """Kept exponentials times a factor, less coefficients if there are any."""
        by, less = splat(real(factor)), splat(real(gamma_factor))
        for c in range(0, n, lanes):
            at = min(c, n - lanes)
            p = load_exps(exps + at * size) * by
            if gamma:
                p = p - load_exps(gamma + at * size) * less
            store(to + at * width, p)

    @outline
    def stream_scaled(exps, factor, n, to, label, at_label, tile):
        """Send kept exponentials times a factor, but for the label's, around the cache by whole lines."""
        by = splat(real(factor))
        head = min(-to % 64 // size, n)
        last = head + (n - head) // line * line
        for c in range(head):
            store_item(to + c * size, load_one(exps + c * size) * real(factor))
        for c in range(last, n):
            store_item(to + c * size, load_one(exps + c * size) * real(factor))
        own = head + (label - head) // line * line if head <= label < last else last
        c, stop = head, own
        while True:
            for i in range(c * size, stop * size, line * size):
                for j in range(0, line * size, lanes * size):
                    stream_vector(to + i + j, load_exps(exps + i + j) * by)
            if stop == last:
                break
            for j in range(0, line * size, lanes * size):
                store_exps(tile + j, load_exps(exps + own * size + j) * by)
            store_item(tile + (label - own) * size, real(at_label))
            stream(to + own * size, tile, line * size)
            c, stop = own + line, last
        if 0 <= label < head or last <= label < n:
            store_item(to + label * size, real(at_label))

    @outline
    def exponentials(x, gamma, gamma_factor, reference, factor, n, to):
        """Do the same from the logits: relative to a power of two, where that can be, or to the reference."""
        k, relative, minus = zero, unit, splat(real(reference))
        if abs(reference) <= direct:
            k, minus = rounded(real(reference) * log2e), splat(zero)
            relative *= exp2_unit(-fma(reference, wide_log2e, -np.float64(k)))
        lowest, shift = scale_of(k)
        bound, magic = splat(lowest), splat(shift)
        by, less = splat(real(factor * relative)), splat(real(gamma_factor))
        if gamma:
            for c in range(0, n, lanes):
                at = min(c, n - lanes)
                p, q = scaled_parts(load(x + at * width) - minus, bound, magic)
                store(to + at * width, (p * q) * by - load_exps(gamma + at * size) * less)
            return
        for c in range(0, n, group):
            at = min(c, n - group)
            fetch_group(x + at * width)
            v0, v1 = load_pair(x + at * width)
            p0, q0 = scaled_parts(v0 - minus, bound, magic)
            p1, q1 = scaled_parts(v1 - minus, bound, magic)
            store_pair(to + at * width, (p0 * q0) * by, (p1 * q1) * by)

    @outline
    def stream_exponentials(x, reference, factor, n, to):
        """Do the same of whole turns without coefficients, around the cache to where a line begins."""
        k = rounded(real(reference) * log2e)
        relative = unit * exp2_unit(-fma(reference, wide_log2e, -np.float64(k)))
        lowest, shift = scale_of(k)
        bound, magic, by = splat_turn(lowest), splat_turn(shift), splat_turn(real(factor * relative))
        for i in range(0, n * width, turn * width):
            fetch_turn(x + i)
            v0, v1 = load_turn(x + i)
            p0, q0 = scaled_parts(v0, bound, magic)
            p1, q1 = scaled_parts(v1, bound, magic)
            stream_turn(to + i, (p0 * q0) * by, (p1 * q1) * by)
            keep_rolled()

    @outline
    def logarithms(x, m, log1p_others, n, to):
        largest, rest = splat(real(m)), splat(real(log1p_others))
        for c in range(0, n, lanes):
            at = min(c, n - lanes)
            store(to + at * width, (load(x + at * width) - largest) - rest)

    @outline
    def entropy_of(x, m, log1p_others, n):
        """Return the sum of exp(x - m)*(lse - x)."""
        minus = splat(real(m))
        rest, total, lost = splat(real(log1p_others)), 0.0, 0.0
        for first in range(0, n, CHAIN * lanes):
            some = splat(zero)
            for c in range(first, min(n, first + CHAIN * lanes), lanes):
                at = min(c, n - lanes)
                d = load(x + at * width) - minus
                e = exp_raised(d)
                # 0*inf = 0; what the vector before has is left out.
                some = fma(e, where(lanes_from(c - at, lanes) & (e != zero), rest - d, zero), some)
            of_chain = np.float64(lanes_sum(some))
            lost += lost_of(total, of_chain)
            total += of_chain
        return (total + lost) * unit

    @outline
    def map_row(job, row, i, first, last, scratch, exps, marks):
        """Make the results of classes first ... last - 1 of row i."""
        stride, out = job.out.class_stride, place(job.out, i)
        has_gamma = job.operation == GRADIENT and (job.gamma != 0 or job.target_kind == PROBABILITIES)
        # Rows of 16-bit items; of others, exponentials are kept.
        can_stream = job.streams and stride == width and job.logits.class_stride == width and not has_gamma
        can_stream = can_stream and job.operation != LOG_SOFTMAX and abs(row.reference) <= direct
        c = first
        while c < last:
            n, gamma = chunk_from(c, last), 0
            to = out + c * stride
            if job.streams and not exps and c + n < last:
                n -= (to + n * stride) % 64 // width  # what follows begins a line
            source = exps + c * size if exps else place(job.logits, i) + c * job.logits.class_stride
            tile = apart(scratch + 2 * tile_bytes, source, page // 4)
            if not row.live:
                for j in range(0, n, lanes):
                    store(tile + min(j, n - lanes) * width, splat(zero))
            else:
                if has_gamma:
                    gamma = gammas_of(job, i, c, n, scratch + tile_bytes)
                is_kept, factor = False, 0.0
                if exps:
                    mark = marks + (c - first) // chunk * 16
                    factor = row.factor * share(load_wide(mark), row.m) * load_wide(mark + 8)
                    is_kept = abs(factor) > smallest
                if is_kept and gamma == 0 and stride == width and job.streams and row.top < 0:
                    stream_scaled(exps + c * size, factor, n, to, row.label - c, row.at_label, tile)
                    c += n
                    continue
                is_other = not (c <= row.label < c + n)
                if has_turns and can_stream and is_other and to % 64 == 0 and n % turn == 0:
                    x = place(job.logits, i) + c * width
                    stream_exponentials(x, row.reference, row.factor, n, to)
                    c += n
                    continue
                if is_kept:
                    scaled(exps + c * size, gamma, row.gamma_factor, factor, n, tile)
                else:
                    x = classes_of(job, i, c, n, scratch)
                    if job.operation == LOG_SOFTMAX:
                        logarithms(x, row.m, row.log1p_others, n, tile)
                    else:
                        exponentials(x, gamma, row.gamma_factor, row.reference, row.factor, n, tile)
                if c <= row.top < c + n:
                    store_item(tile + (row.top - c) * width, real(row.at_top))
                if c <= row.label < c + n:
                    store_item(tile + (row.label - c) * width, real(row.at_label))
            if stride != width:
                unpack(to, stride, n, tile)
            elif job.streams:
                stream(to, tile, n * width)
            else:
                copy(to, tile, n * width)
            c += n

    @outline
    def sum_entropy(job, row, i, first, last, scratch):
        total, lost, c = 0.0, 0.0, first
        while c < last:
            n = chunk_from(c, last)
            some = entropy_of(classes_of(job, i, c, n, scratch), row.m, row.log1p_others, n)
            lost += lost_of(total, some)
            total += some
            c += n
        return total + lost

    return SimpleNamespace(finish=finish, map_row=map_row, sum_entropy=sum_entropy)
