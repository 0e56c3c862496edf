"""Rows in lanes from their sums to losses, and to what the second pass needs; and where all that is kept."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
from logitloss._kernels import numba_items, numba_operations, recurrence, vectors
from logitloss._kernels.elementary import elementary
from logitloss._kernels.numba_job import ENTROPY, GRADIENT, LABELS, NOTHING, put_figures
from logitloss._kernels.vectors import inline, outline

# What is kept by row, as reals. LABEL is the class, -1 where the row is ignored, n_classes if there is none.
(LABEL, LARGEST, SUM, LOST, TARGET_LOGIT, BETA, SCALE, LOSS, FACTOR, LABEL_ENTRY, LOG1P_OTHERS) = range(11)
# Of rows with coefficients by class, or whose top is to be known: relative to REFERENCE, the largest logit
(REFERENCE, TOP, TOP_WEIGHT, WEIGHT, WEIGHT_LOST, GAP, GAP_LOST, LABEL_GAMMA, TOP_ENTRY) = range(11, 20)
# Of rows whose figures are wanted, in their place: the others' sums, and how many classes come before the
# label's
(SQUARE, SQUARE_LOST, SPREAD, SPREAD_LOST, N_BEFORE) = range(13, 18)
# Of rows with plain labels, in their place
(PLAIN_BOUND, PLAIN_MAGIC, OWN, OTHERS, IS_PLAIN, PLAIN_LOSS, PLAIN_FACTOR, PLAIN_ENTRY) = range(11, 19)
OTHERS_LOST = LOST
# Of a pass: what is taken from logits, what their exponentials are scaled by, the largest of these, and what
# was before this range
(FROM, BOUND, MAGIC, PEAK, BEFORE) = range(20, 25)
# float64, in two slots each if need be
LSE, LSE_IN, N_SLOTS = 25, 27, 29


def _expm1(functions: SimpleNamespace) -> Any:
    """Return the function for d <= 0, by its series near 0, where exp(d) - 1 would lose its digits."""
    terms = vectors.polynomial([1 / math.factorial(k) for k in range(18, 0, -1)])
    exp, where = functions.exp, vectors.where
    half, one = np.float64(0.5), np.float64(1)

    @inline
    def expm1(d):
        return where(d > -half, d * terms(d), exp(d) - one)

    return expm1


def finisher(real: Any, wide: Any, is_plain: bool) -> SimpleNamespace:
    """Return the functions that finish rows of one real type in another.

    If it `is_plain` there are no coefficients by class but beta, and no lse is given or wanted.
    """
    ops, functions = numba_operations.operations(wide), elementary(inline, wide)
    size = numba_items.itemsize("f64" if real is np.float64 else "f32")
    own = "f64" if real is np.float64 else "f32"
    take, give = numba_items.loader(own, wide, ops.lanes), numba_items.storer(own, wide, ops.lanes)
    steps = recurrence.steps(
        inline,
        SimpleNamespace(
            fma=ops.fma,
            absolute=ops.absolute,
            maximum=ops.maximum,
            minimum=ops.minimum,
            where=ops.where,
            exp=functions.exp,
            expm1=functions.exp if is_plain else _expm1(functions),
            log1p=functions.log1p,
        ),
        wide,
    )
    softmax_of, softmax_from = steps.softmax_of, steps.softmax_from
    loss_of, gradient_of, lanes_sum = steps.loss_of, steps.gradient_of, ops.lanes_sum
    load_f64 = numba_items.loader("f64", np.float64, ops.lanes)
    store_f64 = numba_items.storer("f64", np.float64, ops.lanes)
    load_one, fma = numba_items.loader("f64", np.float64), ops.fma
    splat, where, lanes, absolute = ops.splat, ops.where, ops.lanes, ops.absolute
    zero, one, infinity = wide(0), wide(1), wide(np.inf)

    @inline
    def whole(total, lost):
        """Return a sum with what it lost, if it is finite."""
        return where(absolute(total) < infinity, total + lost, total)

    @inline
    def peak_of(rows, at):
        """Return the largest exponential, or 1 where that is none: of rows without finite logits."""
        peak = take(at + PEAK * rows.slot_bytes)
        return where((peak > zero) & (peak < infinity), peak, one)

    @outline
    def total_of(rows):
        """Return the sum of the losses."""
        losses = np.float64(0)
        for at in range(rows.slots, rows.slots + rows.width * size, lanes * size):
            losses += lanes_sum(take(at + LOSS * rows.slot_bytes))
        return losses

    @outline
    def finish(job, rows, has_gamma):
        z_loss = zero if is_plain else wide(job.z_loss)
        has_labels, slot = job.target_kind == LABELS, rows.slot_bytes
        for i in range(0, rows.width, lanes):
            at = rows.slots + i * size
            m, peak = take(at + LARGEST * slot), peak_of(rows, at)
            others = whole(take(at + SUM * slot), take(at + LOST * slot))
            s = others / peak
            live = take(at + LABEL * slot) >= zero
            beta, target_logit, label_gamma = splat(zero), m, splat(zero)
            weight, gap, top_weight = splat(zero), splat(zero), splat(zero)
            if has_labels:
                beta = take(at + BETA * slot) if job.beta else splat(one)
                target_logit = take(at + TARGET_LOGIT * slot)
            if is_plain:
                log1p_others, lse, p_top, p_others = softmax_of(m, s)
            else:
                if has_gamma or job.operation == ENTROPY:
                    weight = whole(take(at + WEIGHT * slot), take(at + WEIGHT_LOST * slot))
                    gap = whole(take(at + GAP * slot), take(at + GAP_LOST * slot))
                    top_weight = take(at + TOP_WEIGHT * slot)
                    if job.operation == ENTROPY:  # whose coefficients are the exponentials
                        s = weight / peak
                    if has_labels:
                        label_gamma = take(at + LABEL_GAMMA * slot)
                if job.lse_in.address:
                    lse_in = load_f64(rows.slots + LSE_IN * slot + 8 * i)
                    log1p_others, lse, p_top, p_others = softmax_from(m + s * zero, s, lse_in)
                else:
                    log1p_others, lse, p_top, p_others = softmax_of(m, s)
                if job.lse.address:
                    store_f64(rows.slots + LSE * slot + 8 * i, lse)
            if not is_plain and job.operation == ENTROPY:
                loss = log1p_others + gap / peak * p_top
            else:
                loss = loss_of(m, log1p_others, lse, weight, gap, top_weight, beta, target_logit, z_loss)
            loss = where(live, loss, zero)
            give(at + LOSS * slot, loss)
            if job.operation == NOTHING:
                continue
            give(at + LOG1P_OTHERS * slot, log1p_others)
            factor, entry = p_top / peak, splat(zero)
            if is_plain:  # in float32 a rounding less is worth it
                factor = where(absolute(m) < infinity, one / (peak + others), factor)
            if job.operation == GRADIENT:
                alpha, at_top, entry = gradient_of(
                    m,
                    log1p_others,
                    lse,
                    p_top,
                    p_others,
                    weight,
                    top_weight,
                    beta,
                    label_gamma,
                    target_logit,
                    z_loss,
                )
                scale = where(live, take(at + SCALE * slot), zero)
                factor, entry = factor * alpha * scale, entry * scale
                if not is_plain:
                    give(at + SCALE * slot, scale)
                    give(at + TOP_ENTRY * slot, where(live, at_top * scale, zero))
            give(at + FACTOR * slot, where(live, factor, zero))
            give(at + LABEL_ENTRY * slot, entry)
        return total_of(rows)

    @outline
    def finish_figures(job, rows):
        """Store the figures of rows, and what a plain loss gives; return the losses' sum."""
        slot, vector_bytes = rows.slot_bytes, 8 * lanes
        for i in range(0, rows.width, lanes):
            at = rows.slots + i * size
            m, unit = take(at + LARGEST * slot), one / peak_of(rows, at)
            s = whole(take(at + SUM * slot), take(at + LOST * slot)) * unit
            square = whole(take(at + SQUARE * slot), take(at + SQUARE_LOST * slot)) * (unit * unit)
            spread = whole(take(at + SPREAD * slot), take(at + SPREAD_LOST * slot)) * unit
            live = take(at + LABEL * slot) >= zero
            log1p_others, lse, p_top, _ = softmax_of(m, s)
            give(at + LOSS * slot, where(live, (m - take(at + TARGET_LOGIT * slot)) + log1p_others, zero))
            if job.lse.address:
                store_f64(rows.slots + LSE * slot + 8 * i, lse)
            poison = log1p_others * zero
            figures = (
                take(at + N_BEFORE * slot) + (one + poison),
                take(at + TOP * slot) + poison,
                p_top,
                fma(spread, p_top, log1p_others),
                square * (p_top * p_top) + poison,
            )
            for k, values in enumerate(figures):
                store_f64(rows.tile + k * vector_bytes, where(live, values, zero))
            for lane in range(min(lanes, rows.n - i)):
                of_lane = rows.tile + 8 * lane
                put_figures(
                    job,
                    rows.first + i + lane,
                    (
                        load_one(of_lane),
                        load_one(of_lane + vector_bytes),
                        load_one(of_lane + 2 * vector_bytes),
                        load_one(of_lane + 3 * vector_bytes),
                        load_one(of_lane + 4 * vector_bytes),
                    ),
                )
        return total_of(rows)

    return SimpleNamespace(finish=finish, finish_figures=finish_figures)
