"""The losses without classes, for the Numba twin on the processor: a block of elements.

A block's operands are used where they lie if they are reals next to each other, else brought into tiles; so a
pass over them (`numba_bce`) knows one real type and whole vectors. Which pass it is depends on the weights
and on the targets. Losses of probabilities go by the C library's logarithm: no hot path.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
from logitloss._kernels import numba_items, numba_memory, numba_operations, vectors
from logitloss._kernels.numba_bce import REGISTERS, Operands, passes
from logitloss._kernels.numba_job import (
    BCE,
    BCE_WITH_LOGITS,
    KL_DIV,
    block_range,
    found_at,
    job_at,
    job_steps,
    last_stride,
    place,
    run_length,
)
from logitloss._kernels.vectors import inline, lost_of, outline
from numba.extending import register_jitable

PAGE = 4096
BLOCK_BYTES = 4 * PAGE
# Of a thread's memory: tiles for what is read, for losses, for results, and products of exponentials
LOSS_AT, OUT_AT, PRODUCTS_AT = 5 * BLOCK_BYTES, 6 * BLOCK_BYTES, 7 * BLOCK_BYTES + PAGE
SCRATCH_BYTES = PRODUCTS_AT + PAGE
# A smaller total may have lost digits.
ORDINARY = 2.0**-90
_BOOL, _U8 = numba_items.ITEMS.index("bool"), numba_items.ITEMS.index("u8")
# What lies behind the last logit: a loss of 0, and so is its exponential
_NEVER = -(2.0**100)


@register_jitable
def plan(size):
    """Return the elements of a block, of reals of that size, and the bytes of a thread's scratch memory."""
    return BLOCK_BYTES // size, SCRATCH_BYTES


def kernels(item: str) -> SimpleNamespace:
    """Return the kernel for blocks in one real type, f32 or f64, of items of any kind."""
    real = np.float64 if item == "f64" else np.float32
    own_kind = numba_items.ITEMS.index("f64" if real is np.float64 else "f32")
    ops, steps, bce = numba_operations.operations(real, REGISTERS), job_steps(real), passes(real)
    lanes, size, vector_bytes = ops.lanes, ops.size, ops.lanes * ops.size
    load, store, splat, absolute = ops.load, ops.store, ops.splat, ops.absolute
    load_one, store_one, load_any = ops.load_one, ops.store_one, numba_items.any_loader(real)
    items, put_items, any_lane = steps.items, steps.put_items, vectors.any_lane
    load_byte, fence = numba_items.loader("u8", real), numba_memory.fence
    zero, half, one = real(0), real(0.5), real(1)
    unit = bce.unit

    # ---- operands ----

    @inline
    def is_run(view, stride, first, n):
        return last_stride(view) == stride and run_length(view, first, n) == n

    @inline
    def fits(view, first, n):
        """Whether a run of results can be computed where it is to be."""
        return view.address != 0 and view.kind == own_kind and is_run(view, size, first, n)

    @inline
    def fill(tile, first, end, number):
        for i in range(first, end):
            store_one(tile + i * size, number)

    @outline
    def operand(view, first, n, whole, behind, tile):
        """Return the address of n elements followed by `behind`."""
        at = items(view, first, n, tile)
        if n == whole:
            return at
        if at != tile:
            for i in range(0, n * size, size):
                store_one(tile + i, load_one(at + i))
        fill(tile, n, whole, behind)
        return tile

    @inline
    def is_number(view):
        return view.address == 0 or view.n_axes == 0 or (view.n_axes == 1 and last_stride(view) == 0)

    @inline
    def number_of(view):
        return load_any(view.kind, view.address) if view.address else one

    @outline
    def coefficient(view, first, n, whole, tile):
        """Return the same of coefficients, and their step: 1 where not given, and 0 behind the last."""
        if not is_number(view):
            return operand(view, first, n, whole, zero, tile), -1
        number = number_of(view)
        store(tile, splat(number))
        if n == whole:
            return tile, 0
        fill(tile, 0, n, number)
        fill(tile, n, whole, zero)
        return tile, -1

    @outline
    def unsign(target, n, tile):
        """Bring labels -1 and +1 into the tile as 0 and 1; return the first that is neither, or -1."""
        for i in range(0, n, lanes):
            t = load(target + i * size)
            if any_lane(absolute(t) != one):
                for j in range(i, i + lanes):
                    if abs(load_one(target + j * size)) != one:
                        return j
            store(tile + i * size, half * (t + one))
        return -1

    # ---- losses ----

    @outline
    def first_improbable(x, target, n):
        for i in range(0, n * size, size):
            p, y = load_one(x + i), load_one(target + i)
            if not (p >= zero and p <= one and y >= zero and y <= one):
                return i // size
        return -1

    @outline
    def probability_losses(operation, given, n):
        """Store the losses, and return their sum."""
        total, lost = 0.0, 0.0
        for i in range(0, n * size, size):
            x, y = np.float64(load_one(given.x + i)), np.float64(load_one(given.target + i))
            if operation == BCE:
                log_p, log_q = max(math.log(x), -100.0), max(math.log1p(-x), -100.0)
                weight = load_one(given.weight + (i & given.weight_step))
                loss = -weight * (y * log_p + (1.0 - y) * log_q)
            else:
                t, log_t = (y, math.log(y)) if operation == KL_DIV else (math.exp(y), y)
                loss = 0.0 if t == 0.0 and not math.isnan(x) else t * (log_t - x)
            store_one(given.loss + i, real(loss))
            lost += lost_of(total, loss)
            total += loss
        return total + lost

    @outline
    def sum_of(losses, n):
        """Return the total in float64, in four chains."""
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        for i in range(0, n - n % 4, 4):
            at = losses + i * size
            a, b = a + load_one(at), b + load_one(at + size)
            c, d = c + load_one(at + 2 * size), d + load_one(at + 3 * size)
        for i in range(n - n % 4, n):
            a += load_one(losses + i * size)
        return (a + b) + (c + d)

    # ---- blocks ----

    @outline
    def operands(job, first, n, scratch):
        """Return a block's operands, and the number of the first bad element or -1."""
        whole, bad = -(-n // lanes) * lanes, -1
        x = operand(job.logits, first, n, whole, real(_NEVER), scratch)
        target, largest, kind = x, 0, job.target.kind
        if (
            job.operation == BCE_WITH_LOGITS
            and kind in (_U8, _BOOL)
            and not job.signed
            and n == whole
            and is_run(job.target, 1, first, n)
        ):
            target, largest = place(job.target, first), 1 if kind == _BOOL else 255
        elif job.target.address:
            tile = scratch + BLOCK_BYTES
            target = operand(job.target, first, n, whole, real(-1 if job.signed else 0), tile)
            if job.signed:
                bad, target = unsign(target, whole, tile), tile
            elif job.operation == BCE:
                bad = first_improbable(x, target, n)
        weight, weight_step = coefficient(job.weight, first, n, whole, scratch + 2 * BLOCK_BYTES)
        pos_weight, pos_weight_step = coefficient(job.pos_weight, first, n, whole, scratch + 3 * BLOCK_BYTES)
        scale, scale_step = coefficient(job.scale, first, n, whole, scratch + 4 * BLOCK_BYTES)
        loss, out, stream = scratch + LOSS_AT, 0, 0
        if n == whole and fits(job.loss, first, n):
            loss = place(job.loss, first)
        if job.out.address:
            # A quarter of a page from where logits are read: those wait for what is written at their place
            tile = scratch + OUT_AT
            out = tile + (x // 64 * 64 + PAGE // 4 - tile) % PAGE
            # The logits may be needed again.
            if n == whole and fits(job.out, first, n) and place(job.out, first) != x:
                if job.streams:
                    stream = place(job.out, first)
                else:
                    out = place(job.out, first)
        given = Operands(
            x,
            target,
            largest,
            weight,
            weight_step,
            pos_weight,
            pos_weight_step,
            scale,
            scale_step,
            loss,
            out,
            stream,
        )
        return given, first + bad if bad >= 0 else -1

    @outline
    def finish(job, given, first, n, scratch):
        """Bring results from tiles to where they are to be."""
        if job.loss.address and given.loss == scratch + LOSS_AT:
            put_items(job.loss, first, n, given.loss)
        if given.stream:
            fence()
        elif scratch <= given.out < scratch + SCRATCH_BYTES:
            put_items(job.out, first, n, given.out)

    def bce_block(fused):
        plain, by_class = bce.plain(fused), bce.by_class(fused)
        weighted, careful = bce.weighted(fused, careful=False), bce.weighted(fused, careful=True)

        @outline
        def bce_total(job, given, n_bytes, products):
            """Return the total, and under which size it is to be taken again with care."""
            eps = job.label_smoothing
            has_one_scale = not fused or is_number(job.scale)
            scale = number_of(job.scale) if has_one_scale else one
            if eps != 0.0:
                return careful(given, n_bytes, real(1.0 - eps), real(0.5 * eps)), ORDINARY
            if job.weight.address == 0 and job.loss.address == 0 and has_one_scale:
                if job.pos_weight.address == 0:
                    return plain(given, n_bytes, products), ORDINARY
                # Those exponentials are too large: their unit goes into the scale, if it can.
                pos_weight = number_of(job.pos_weight) if is_number(job.pos_weight) else zero
                least = min(abs(scale), abs(pos_weight * scale)) if pos_weight != zero else abs(scale)
                can_scale = not fused or least > real(2.0**-60)
                y = real(load_byte(given.target)) if given.largest else load_one(given.target)
                # If the first is soft, others will be.
                if can_scale and is_number(job.pos_weight) and y in (zero, one):
                    scales = products + PAGE // 2
                    store(scales, splat(scale * unit))
                    store(scales + vector_bytes, splat(-pos_weight * scale * unit))
                    total = by_class(given, n_bytes, products, scales)
                    if not np.isnan(total):
                        return total, ORDINARY * max(1.0, abs(pos_weight))
            return weighted(given, n_bytes, one, zero), ORDINARY

        def block(jobs, number, scratch, results):
            job, found = job_at(jobs), found_at(results)
            first, n = block_range(job, number)
            given, found.bad = operands(job, first, n, scratch)
            if found.bad >= 0:
                return
            n_bytes = -(-n // lanes) * vector_bytes
            total, ordinary = bce_total(job, given, n_bytes, scratch + PRODUCTS_AT)
            if not ordinary <= abs(total) < np.inf:
                eps = job.label_smoothing
                careful(given, n_bytes, real(1.0 - eps), real(0.5 * eps))
                total = sum_of(given.loss, n)
            found.total = total
            finish(job, given, first, n, scratch)

        return block

    def probability_block(jobs, number, scratch, results):
        job, found = job_at(jobs), found_at(results)
        first, n = block_range(job, number)
        given, found.bad = operands(job, first, n, scratch)
        if found.bad >= 0:
            return
        found.total = probability_losses(job.operation, given, n)
        finish(job, given, first, n, scratch)

    def sigmoid_block(log):
        sigmoid = bce.sigmoid(log)

        def block(jobs, number, scratch, results):
            job = job_at(jobs)
            first, n = block_range(job, number)
            given, _ = operands(job, first, n, scratch)
            sigmoid(given, -(-n // lanes) * vector_bytes)
            finish(job, given, first, n, scratch)

        return block

    return SimpleNamespace(
        bce=bce_block(fused=False),
        bce_fused=bce_block(fused=True),
        probability=probability_block,
        sigmoid=sigmoid_block(log=False),
        log_sigmoid=sigmoid_block(log=True),
    )
