"""The common loss of rows in lanes: labels of few classes, and no coefficients by class but the label's own.

A row's loss is log1p(others/own): `own` is the exponential of its label's logit, `others` the sum of the
rest, relative to the row's first logit. So neither its largest logit is sought nor its label's, and where the
label is far ahead the loss keeps its relative precision. Rows whose exponentials leave the range where that
holds (or hold NaN) go the general way, and the rest of their block keep what was found here.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from logitloss._kernels import numba_memory, numba_operations, vectors
from logitloss._kernels.elementary import elementary
from logitloss._kernels.numba_lanes_finish import (
    BETA,
    BOUND,
    FACTOR,
    FROM,
    IS_PLAIN,
    LABEL,
    LABEL_ENTRY,
    LOSS,
    MAGIC,
    OTHERS,
    OTHERS_LOST,
    OWN,
    PLAIN_BOUND,
    PLAIN_ENTRY,
    PLAIN_FACTOR,
    PLAIN_LOSS,
    PLAIN_MAGIC,
    SCALE,
)
from logitloss._kernels.numba_lanes_sums import DIRECT
from logitloss._kernels.vectors import inline, outline

# Of more the sum would need more roundings than a result may.
LABELS_MOST_CLASSES = 24
# Of a vector: the chain of one exponential is longer than a processor looks ahead.
REGISTERS = 2
# Rows side by side: so many bytes ahead of the sums, their logits are fetched
AHEAD = 512


def labels(real: type) -> SimpleNamespace:
    """Return the functions for one real type."""
    ops, functions = numba_operations.operations(real, REGISTERS), elementary(inline, real)
    load, store, splat, where, any_lane = ops.load, ops.store, ops.splat, ops.where, vectors.any_lane
    maximum, minimum, absolute, fma, lanes_sum = (
        ops.maximum,
        ops.minimum,
        ops.absolute,
        ops.fma,
        ops.lanes_sum,
    )
    scale_of, exp_of_any, rounded, log1p = (
        functions.scale_of,
        functions.exp_of_any,
        functions.rounded,
        functions.log1p,
    )
    size, vector_bytes = ops.size, ops.lanes * ops.size
    # Into the second-level cache: the first has no room for a block, its tile and the next block.
    fetch = numba_memory.fetcher(vector_bytes, ((0, 2),))
    zero, one, log2e, direct = real(0), real(1), functions.log2e, real(DIRECT[real])
    extreme = real(-functions.headroom)
    most, least = (real(2.0**80), real(2.0**-40)) if real is np.float32 else (real(2.0**400), real(2.0**-400))
    least_whole = real(2.0 ** (functions.headroom - 2))
    most_ratio = real(2.0**28 if real is np.float32 else 2.0**200)

    @inline
    def two_sum(a, b):
        """Return a + b rounded, and what rounding took."""
        total = a + b
        added = total - a
        return total, (a - (total - added)) + (b - added)

    def sweeping(is_kept):
        @inline
        def power_of(x, e, ahead, bound, magic):
            fetch(ahead)
            power = exp_of_any(load(x), bound, magic)
            if is_kept:
                store(e, power)
            return power

        # Said by which label it is not, AVX-512 takes one operation for own and one for the others.
        @inline
        def sum_one(x, step, e, e_step, ahead, ahead_step, label, number, bound, magic, own):
            power, is_other = power_of(x, e, ahead, bound, magic), label != number
            return where(is_other, own, power), where(is_other, power, zero)

        @inline
        def sum_two(x, step, e, e_step, ahead, ahead_step, label, number, bound, magic, own):
            own, others = sum_one(x, step, e, e_step, ahead, ahead_step, label, number, bound, magic, own)
            power = power_of(x + step, e + e_step, ahead + ahead_step, bound, magic)
            is_other = label != number + one
            return where(is_other, own, power), where(is_other, others + power, others)

        def joining(sum_some, n, sum_more):
            more = real(n)

            @inline
            def sum_both(x, step, e, e_step, ahead, ahead_step, label, number, bound, magic, own):
                own, others = sum_some(
                    x, step, e, e_step, ahead, ahead_step, label, number, bound, magic, own
                )
                x, e, ahead = x + n * step, e + n * e_step, ahead + n * ahead_step
                own, others_too = sum_more(
                    x, step, e, e_step, ahead, ahead_step, label, number + more, bound, magic, own
                )
                return own, others + others_too

            return sum_both

        def sweep(sum_some):
            @inline
            def add(rows, x, step, e, ahead, ahead_step, turn, then, first_class):
                slot, first = rows.slot_bytes, real(first_class)
                for i in range(0, rows.width * size, vector_bytes):
                    if i == turn:
                        ahead = then - i
                    at = rows.slots + i
                    bound, magic = load(at + PLAIN_BOUND * slot), load(at + PLAIN_MAGIC * slot)
                    own, others = sum_some(
                        x + i,
                        step,
                        e + i,
                        rows.stride,
                        ahead + i,
                        ahead_step,
                        load(at + LABEL * slot) - first,
                        zero,
                        bound,
                        magic,
                        load(at + OWN * slot),
                    )
                    store(at + OWN * slot, own)
                    if is_kept:  # a gradient has one rounding more: of the sum it needs what that loses, too
                        others, lost = two_sum(load(at + OTHERS * slot), others)
                        store(at + OTHERS_LOST * slot, lost + load(at + OTHERS_LOST * slot))
                        store(at + OTHERS * slot, others)
                    else:
                        store(at + OTHERS * slot, others + load(at + OTHERS * slot))

            return add

        # In pairs, and pairs of these: few roundings, whichever is the largest
        sum_three = joining(sum_two, 2, sum_one)
        sum_four = joining(sum_two, 2, sum_two)
        add_one, add_three = sweep(sum_one), sweep(sum_three)
        add_five, add_seven = sweep(joining(sum_three, 3, sum_two)), sweep(joining(sum_four, 4, sum_three))

        @outline
        def sum_labels(rows, x, step, n_classes, ahead, ahead_step, after_all):
            # Seven at most: classes a power of two apart share a set of the cache, of eight lines. So what is
            # fetched must be used soon: at the end of a sweep's rows the first of the next sweep.
            c, turn = 0, rows.width * size - AHEAD if after_all else -1
            while c < n_classes:
                left, start, e = n_classes - c, x + c * step, rows.tile + c * rows.stride
                n = 7 if left >= 7 else 5 if left >= 5 else 3 if left >= 3 else 1
                fetched, then = ahead + c * ahead_step, start + n * step if n < left else after_all
                if n == 7:
                    add_seven(rows, start, step, e, fetched, ahead_step, turn, then, c)
                elif n == 5:
                    add_five(rows, start, step, e, fetched, ahead_step, turn, then, c)
                elif n == 3:
                    add_three(rows, start, step, e, fetched, ahead_step, turn, then, c)
                else:
                    add_one(rows, start, step, e, fetched, ahead_step, turn, then, c)
                c += n

        return sum_labels

    sum_only, sum_and_keep = sweeping(False), sweeping(True)

    @outline
    def ratios(rows, is_weighted, has_gradient):
        """Store others/own of every row, and what the gradient needs; return whether all are in range."""
        slot, are_plain = rows.slot_bytes, splat(one)
        for i in range(0, rows.width * size, vector_bytes):
            at = rows.slots + i
            own, others = load(at + OWN * slot), load(at + OTHERS * slot)
            whole, is_live = own + others, load(at + LABEL * slot) >= zero
            is_plain = where((own > least) & (whole < most) & (whole > least_whole), one, zero)
            store(at + IS_PLAIN * slot, where(is_live, is_plain, zero))
            are_plain = where(is_live, minimum(is_plain, are_plain), are_plain)
            store(at + LOSS * slot, where(is_live, others / own, zero))
            if has_gradient:
                _, lost = two_sum(others, own)
                factor = load(at + SCALE * slot) / whole
                factor = factor - factor * ((lost + load(at + OTHERS_LOST * slot)) / whole)
                if is_weighted:
                    factor = factor * load(at + BETA * slot)
                factor = where(is_live, factor, zero)
                store(at + FACTOR * slot, factor)
                store(at + LABEL_ENTRY * slot, where(is_live, -(others * factor), zero))
        return not any_lane(are_plain == zero)

    @outline
    def losses(rows, is_weighted):
        """Make losses of those; return their sum."""
        slot, total = rows.slot_bytes, np.float64(0)
        for i in range(0, rows.width * size, vector_bytes):
            at = rows.slots + i
            loss = log1p(load(at + LOSS * slot))
            if is_weighted:
                loss = where(load(at + LABEL * slot) >= zero, loss * load(at + BETA * slot), zero)
            store(at + LOSS * slot, loss)
            total += lanes_sum(loss)
        return total

    @inline
    def joined(a, b):
        """(1 + a)*(1 + b) - 1."""
        return fma(a, b, a + b)

    @outline
    def total_only(rows):
        """Return the losses' sum alone, a logarithm for four rows; where that leaves the range, by losses."""
        total, highest = np.float64(0), splat(zero)
        at, end = rows.slots + LOSS * rows.slot_bytes, rows.width * size
        whole = end - end % (4 * vector_bytes)
        for i in range(at, at + whole, 4 * vector_bytes):
            a, b = load(i), load(i + vector_bytes)
            c, d = load(i + 2 * vector_bytes), load(i + 3 * vector_bytes)
            highest = maximum(maximum(maximum(a, b), maximum(c, d)), highest)
            total += lanes_sum(log1p(joined(joined(a, b), joined(c, d))))
        for i in range(at + whole, at + end, vector_bytes):
            total += lanes_sum(log1p(load(i)))
        return losses(rows, False) if any_lane(highest > most_ratio) else total

    @outline
    def plain_labels(
        rows, x, step, n_classes, is_kept, is_weighted, has_losses, ahead, ahead_step, after_all
    ):
        """Return whether all rows are in range, and the sum of their losses."""
        slot = rows.slot_bytes
        for i in range(0, rows.width * size, vector_bytes):
            at, first = rows.slots + i, load(x + i)
            is_direct = absolute(first) < direct
            bound, magic = scale_of(where(is_direct, rounded(where(is_direct, first, zero) * log2e), extreme))
            store(at + PLAIN_BOUND * slot, bound)
            store(at + PLAIN_MAGIC * slot, magic)
            store(at + OWN * slot, splat(zero))
            store(at + OTHERS * slot, splat(zero))
            store(at + OTHERS_LOST * slot, splat(zero))
        if is_kept:
            sum_and_keep(rows, x, step, n_classes, ahead, ahead_step, after_all)
        else:
            sum_only(rows, x, step, n_classes, ahead, ahead_step, after_all)
        are_plain = ratios(rows, is_weighted, is_kept)
        if are_plain and not has_losses and not is_weighted:
            return True, total_only(rows)
        return are_plain, losses(rows, is_weighted)

    @outline
    def keep_plain(rows):
        """Keep what was found, for rows whose result must not depend on those out of range."""
        slot = rows.slot_bytes
        for at in range(rows.slots, rows.slots + rows.width * size, vector_bytes):
            store(at + PLAIN_LOSS * slot, load(at + LOSS * slot))
            store(at + PLAIN_FACTOR * slot, load(at + FACTOR * slot))
            store(at + PLAIN_ENTRY * slot, load(at + LABEL_ENTRY * slot))

    @outline
    def restore_plain(rows):
        """Put it back; return the sum of all losses."""
        slot, total = rows.slot_bytes, np.float64(0)
        for at in range(rows.slots, rows.slots + rows.width * size, vector_bytes):
            is_plain = load(at + IS_PLAIN * slot) == one
            loss = where(is_plain, load(at + PLAIN_LOSS * slot), load(at + LOSS * slot))
            factor = where(is_plain, load(at + PLAIN_FACTOR * slot), load(at + FACTOR * slot))
            entry = where(is_plain, load(at + PLAIN_ENTRY * slot), load(at + LABEL_ENTRY * slot))
            store(at + LOSS * slot, loss)
            store(at + FACTOR * slot, factor)
            store(at + LABEL_ENTRY * slot, entry)
            store(at + FROM * slot, where(is_plain, zero, load(at + FROM * slot)))
            store(at + BOUND * slot, where(is_plain, load(at + PLAIN_BOUND * slot), load(at + BOUND * slot)))
            store(at + MAGIC * slot, where(is_plain, load(at + PLAIN_MAGIC * slot), load(at + MAGIC * slot)))
            total += lanes_sum(loss)
        return total

    return SimpleNamespace(plain_labels=plain_labels, keep_plain=keep_plain, restore_plain=restore_plain)
