"""The losses without classes, for the Numba twin on the processor: a block of elements.

A block's operands are used where they lie if they are reals next to each other, else brought into tiles; so a
pass over them (`numba_bce`) knows one real type and whole vectors. Which pass it is depends on the weights
and on the targets. Losses of probabilities go by the C library's logarithm: no hot path.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from numba import carray, njit

from logitloss._kernels import numba_bce, vectors
from logitloss._kernels.numba_job import (
    BCE,
    BCE_WITH_LOGITS,
    KL_DIV,
    KL_DIV_LOG_TARGET,
    LOG_SIGMOID,
    SIGMOID,
    block_range,
    job_steps,
    last_stride,
    place,
    run_length,
)

BLOCK_BYTES = 1 << 14
PAGE = 4096
N_TILES = 7
_inline = njit(forceinline=True, error_model="numpy")
_apart = njit(error_model="numpy")
_BOOL, _U8 = vectors.ITEMS.index("bool"), vectors.ITEMS.index("u8")
# What lies behind the last logit: a loss of 0, and so is its exponential
_NEVER = -(2.0**100)


def plan(record: Any, item: str) -> int:
    """Decide how many elements a block has; return how many bytes of scratch memory a thread needs."""
    record["block"] = BLOCK_BYTES // (8 if item == "f64" else 4)
    return N_TILES * BLOCK_BYTES + 2 * PAGE


def kernels(item: str) -> SimpleNamespace:
    """Return the kernel for blocks in one real type, f32 or f64, of items of any kind."""
    real = np.float64 if item == "f64" else np.float32
    own_kind = vectors.ITEMS.index("f64" if real is np.float64 else "f32")
    ops, steps, bce = vectors.operations(real), job_steps(real), numba_bce.passes(real)
    lanes, size, vector_bytes = ops.lanes, ops.size, ops.lanes * ops.size
    load, store, splat, where, absolute = ops.load, ops.store, ops.splat, ops.where, ops.absolute
    load_one, store_one, load_any = ops.load_one, ops.store_one, vectors.any_loader(real)
    load_u8, load_bool = vectors.loader("u8", real, lanes), vectors.loader("bool", real, lanes)
    items, put_items, any_lane = steps.items, steps.put_items, vectors.any_lane
    plain, plain_fused, by_class, by_class_fused = bce.plain, bce.plain_fused, bce.by_class, bce.by_class_fused
    weighted, careful, sigmoid = bce.weighted, bce.careful, bce.sigmoid
    fence = vectors.fence
    zero, half, one = real(0), real(0.5), real(1)
    unit = bce.unit

    # ---- operands ----

    @_inline
    def is_run(view, stride, first, n):
        return last_stride(view) == stride and run_length(view, first, n) == n

    @_inline
    def fits(view, first, n):
        """Whether a run of results can be computed where it is to be."""
        return view.address != 0 and view.kind == own_kind and is_run(view, size, first, n)

    @_inline
    def fill(tile, first, end, number):
        for i in range(first, end):
            store_one(tile + i * size, number)

    @_apart
    def operand(view, first, n, whole, behind, tile):
        """Return the address of n elements followed by `behind`."""
        if (view.kind == _U8 or view.kind == _BOOL) and n == whole and is_run(view, 1, first, n):
            at = place(view, first)
            for i in range(0, n, lanes):
                reals = load_bool(at + i) if view.kind == _BOOL else load_u8(at + i)
                store(tile + i * size, reals)
            return tile
        at = items(view, first, n, tile)
        if n == whole:
            return at
        if at != tile:
            for i in range(0, n * size, size):
                store_one(tile + i, load_one(at + i))
        fill(tile, n, whole, behind)
        return tile

    @_inline
    def is_number(view):
        return view.address == 0 or view.n_axes == 0 or (view.n_axes == 1 and last_stride(view) == 0)

    @_inline
    def number_of(view):
        return load_any(view.kind, view.address) if view.address else one

    @_apart
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

    @_apart
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

    @_apart
    def is_hard(target, n):
        """Whether all targets are 0 or 1."""
        for i in range(0, n * size, vector_bytes):
            y = load(target + i)
            if any_lane((y != zero) & (y != one)):
                return False
        return True

    # ---- losses ----

    @_apart
    def first_improbable(x, target, n):
        for i in range(0, n * size, size):
            p, y = load_one(x + i), load_one(target + i)
            if not (p >= zero and p <= one and y >= zero and y <= one):
                return i // size
        return -1

    @_apart
    def probability_losses(operation, given, n):
        for i in range(0, n * size, size):
            x, y = float(load_one(given.x + i)), float(load_one(given.target + i))
            if operation == BCE:
                log_p, log_q = max(math.log(x), -100.0), max(math.log1p(-x), -100.0)
                weight = load_one(given.weight + (i & given.weight_step))
                loss = -weight * (y * log_p + (1.0 - y) * log_q)
            else:
                t, log_t = (y, math.log(y)) if operation == KL_DIV else (math.exp(y), y)
                loss = 0.0 if t == 0.0 and not math.isnan(x) else t * (log_t - x)
            store_one(given.loss + i, real(loss))

    @_apart
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

    @_inline
    def bce_total(job, given, n, whole, products, loss_tile):
        """Return the total, and fill what is wanted."""
        eps, n_bytes = job.label_smoothing, whole * size
        keep, spread = real(1.0 - eps), real(0.5 * eps)
        total, ordinary, scale = np.nan, 2.0**-90, one
        one_scale = given.out == 0 or is_number(job.scale)
        if one_scale:
            scale = number_of(job.scale)
        has_weights = job.weight.address != 0 or given.loss != 0 or not one_scale
        if eps != 0.0:
            total = careful(given, n_bytes, keep, spread)
        elif not has_weights and job.pos_weight.address == 0:
            total = plain_fused(given, n_bytes, products) if given.out else plain(given, n_bytes, products)
        else:
            # Made of exponentials that are too large: as long as their unit can be in the scale
            can_scale = given.out == 0 or abs(scale) > real(2.0**-60)
            if not has_weights and is_number(job.pos_weight) and can_scale and is_hard(given.target, whole):
                pos_weight = number_of(job.pos_weight)
                ordinary *= max(1.0, pos_weight)
                if given.out:
                    store(given.scale, splat(scale * unit))
                    store(given.scale + vector_bytes, splat(-pos_weight * scale * unit))
                    total = by_class_fused(given, n_bytes, products)
                else:
                    total = by_class(given, n_bytes, products)
            else:
                total = weighted(given, n_bytes, keep, spread)
        return total, ordinary

    def block(jobs, number, scratch, results):
        job, found = carray(jobs, (1,))[0], carray(results, (1,))[0]
        first, n = block_range(job, number)
        whole = -(-n // lanes) * lanes
        loss_tile, products = scratch + 5 * BLOCK_BYTES, scratch + N_TILES * BLOCK_BYTES + PAGE
        x = operand(job.logits, first, n, whole, real(_NEVER), scratch)
        target = x
        if job.target.address:
            tile = scratch + BLOCK_BYTES
            target = operand(job.target, first, n, whole, real(-1 if job.signed else 0), tile)
            bad = -1
            if job.signed:
                bad, target = unsign(target, whole, tile), tile
            elif job.operation == BCE:
                bad = first_improbable(x, target, n)
            if bad >= 0:
                found.bad = first + bad
                return
        weight, weight_step = coefficient(job.weight, first, n, whole, scratch + 2 * BLOCK_BYTES)
        pos_weight, pos_weight_step = coefficient(job.pos_weight, first, n, whole, scratch + 3 * BLOCK_BYTES)
        scale, scale_step = coefficient(job.scale, first, n, whole, scratch + 4 * BLOCK_BYTES)

        loss_fits = n == whole and fits(job.loss, first, n)
        loss = place(job.loss, first) if loss_fits else loss_tile if job.loss.address else 0
        # What may be written where logits are read is made in a tile, a quarter of a page from where they lie.
        base = scratch + 6 * BLOCK_BYTES
        out, stream, out_is_tile = 0, 0, False
        if job.out.address:
            out_is_tile = True
            out = base + (x // 64 * 64 + PAGE // 4 - base) % PAGE
            if n == whole and fits(job.out, first, n) and place(job.out, first) != x:
                out_is_tile = False
                if job.streams:
                    stream = place(job.out, first)
                else:
                    out = place(job.out, first)
        given = numba_bce.Operands(
            x, target, weight, weight_step, pos_weight, pos_weight_step, scale, scale_step, loss, out, stream
        )
        if job.operation == SIGMOID or job.operation == LOG_SIGMOID:
            sigmoid(given, whole * size, job.operation == LOG_SIGMOID)
        elif job.operation == BCE_WITH_LOGITS:
            total, ordinary = bce_total(job, given, n, whole, products, loss_tile)
            if not (abs(total) >= ordinary and abs(total) < np.inf):
                loss = loss if loss else loss_tile
                given = numba_bce.Operands(
                    x, target, weight, weight_step, pos_weight, pos_weight_step, scale, scale_step, loss, 0, 0
                )
                careful(given, whole * size, real(1.0 - job.label_smoothing), real(0.5 * job.label_smoothing))
                total = sum_of(loss, n)
            found.total = total
        else:
            loss = loss if loss else loss_tile
            given = numba_bce.Operands(
                x, target, weight, weight_step, pos_weight, pos_weight_step, scale, scale_step, loss, 0, 0
            )
            probability_losses(job.operation, given, n)
            found.total = sum_of(loss, n)
        if job.loss.address and not loss_fits:
            put_items(job.loss, first, n, loss_tile)
        if out_is_tile:
            put_items(job.out, first, n, out)
        if stream:
            fence()

    return SimpleNamespace(block=block)
