"""Binary cross-entropy of logits for the Numba twin on the processor: blocks of elements, in one real type.

With e = exp(-|x|), small = e/(1 + e), and q the sum of the weights `negative` and `positive` of its two terms
(1 - y, y and 1 when there are no others): slope = x < 0 ? -positive : negative
    loss = slope*x + q*log1p(e),   gradient = slope - sign(x)*q*small.
Where slope is 0 nothing cancels; where not, only what is small next to it.

A total alone needs no logarithm of every element where q is 1: the sum of log1p(e) is log1p of one number
joined from all e, taken once in 64 (and so by class where targets are 0 or 1 and the positive have one
weight). This plain way knows no 0*inf = 0, may overflow, and forward alone leaves subnormal numbers aside:
what calls it sums a block whose total is no ordinary number again with care.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from logitloss._kernels import numba_items, numba_memory, numba_operations, vectors
from logitloss._kernels.elementary import elementary
from logitloss._kernels.vectors import inline, outline

# Registers worked on step by step, and turns of so many that are summed in one chain, and their e joined
REGISTERS, CHAIN = 4, 16


class Operands(NamedTuple):
    """Addresses of reals, a whole number of turns. What lies behind the block's adds nothing to a total.

    A step is -1, or 0 where one vector is for all. `target` is of bytes, none above `largest`, if that is not
    0. `out` is 0 where it is not wanted, `stream` where `out` is no tile on its way there, around the cache.
    """

    x: int
    target: int
    largest: int
    weight: int
    weight_step: int
    pos_weight: int
    pos_weight_step: int
    scale: int
    scale_step: int
    loss: int
    out: int
    stream: int


def passes(real: Any) -> SimpleNamespace:
    """Return the passes over a block in one real type, or what makes one `fused` with the gradient's."""
    ops, narrow = numba_operations.operations(real, REGISTERS), numba_operations.operations(real)
    vector_bytes, size = ops.lanes * ops.size, ops.size
    chain_bytes, register_bytes = CHAIN * vector_bytes, narrow.lanes * size
    fma, absolute, maximum, where = ops.fma, ops.absolute, ops.maximum, ops.where
    load, store, splat, parts, lanes_sum = ops.load, ops.store, ops.splat, ops.parts, narrow.lanes_sum
    load_register, store_register, all_of = narrow.load, narrow.store, narrow.splat
    stream, load_one, store_one = narrow.stream, ops.load_one, ops.store_one
    load_bytes = numba_items.byte_loader(real, ops.lanes)
    flipped, has_minus, either, any_lane = (
        vectors.flipped,
        vectors.has_minus,
        vectors.either,
        vectors.any_lane,
    )
    fetch, fetch_bytes = numba_memory.fetcher(vector_bytes), numba_memory.fetcher(ops.lanes)
    near, flushed = elementary(inline, real), elementary(inline, real, headroom=0)
    exp_parts, exp_flushed, log1p, log1p_unit = near.exp_parts, flushed.exp_parts, near.log1p, near.log1p_unit
    # exp_parts' e are so much too large, and none is subnormal.
    above, unit = real(1 / near.unit), near.unit
    zero, one, infinity = real(0), real(1), real(np.inf)

    # ---- operands ----

    @inline
    def load_x(given, i):
        fetch(given.x + i)
        return load(given.x + i)

    @inline
    def load_target(given, i):
        if given.largest:
            at = given.target + i // size
            fetch_bytes(at)
            return load_bytes(at, given.largest)
        fetch(given.target + i)
        return load(given.target + i)

    # Results whose lines are complete go around the cache while the next are made: a burst of them would let
    # memory wait, and what was just stored could not be loaded across its vectors.

    @inline
    def drain(given, i):
        if given.stream and i > 0:
            first = i - vector_bytes + (-given.stream & 63)
            for j in range(0, vector_bytes, register_bytes):
                stream(given.stream + first + j, load_register(given.out + first + j))

    @outline
    def finish(given, n_bytes):
        """Store what is left before the first line that was drained, and after the last."""
        head = -given.stream & 63
        done = head + n_bytes - vector_bytes
        for i in range(0, head, size):
            store_one(given.stream + i, load_one(given.out + i))
        end = done + (n_bytes - done) // 64 * 64
        for i in range(done, end, register_bytes):
            stream(given.stream + i, load_register(given.out + i))
        for i in range(end, n_bytes, size):
            store_one(given.stream + i, load_one(given.out + i))

    # ---- sums ----

    @inline
    def in_one(chain):
        a, b, c, d = parts(chain)
        return (a + b) + (c + d)

    @inline
    def folded(total, lost, chain):
        """Add a chain, in one register, to a sum; what that loses to rounding is kept apart."""
        new = total + chain
        added = new - total
        return new, lost + ((total - (new - added)) + (chain - added))

    @inline
    def whole_sum(total, lost):
        return lanes_sum(where(absolute(total) < infinity, total + lost, total))

    @inline
    def with_e(product, e, unit):
        return fma(product, fma(e, unit, one), e)

    @inline
    def joined(product):
        """Join the registers of a product in one."""
        a, b, c, d = parts(product)
        return with_e(with_e(a, b, one), with_e(c, d, one), one)

    # ---- totals with all weights 1 ----

    @inline
    def plain_step(given, i, chain, product):
        x, y = load_x(given, i), load_target(given, i)
        fraction, power = exp_flushed(-absolute(x))
        e = fraction * power
        return chain + fma(x, -y, maximum(x, zero)), fma(product, one + e, e)

    @inline
    def plain_step_fused(given, i, chain, product):
        x, y = load_x(given, i), load_target(given, i)
        fraction, power = exp_parts(-absolute(x))
        e = fraction * power
        one_plus = fma(e, unit, one)
        slope = where(has_minus(x), zero, one) - y
        small = flipped(e, x) / one_plus
        store(given.out + i, fma(small, -unit, slope) * load(given.scale))
        return fma(slope, x, chain), fma(product, one_plus, e)

    def plain_pass(fused):
        step, product_unit = (plain_step_fused, unit) if fused else (plain_step, one)

        @outline
        def plain(given, n_bytes, products):
            total, lost = all_of(zero), all_of(zero)
            at, i = products, 0
            while i < n_bytes:
                end, chain, product = min(i + chain_bytes, n_bytes), splat(zero), splat(zero)
                while i < end:
                    chain, product = step(given, i, chain, product)
                    if fused:
                        drain(given, i)
                    i += vector_bytes
                total, lost = folded(total, lost, in_one(chain))
                store_register(at, joined(product * product_unit))
                at += register_bytes
            if fused and given.stream:
                finish(given, n_bytes)
            logs = all_of(zero)  # after all: one waits for no other
            for k in range(products, at, register_bytes):
                logs = logs + log1p(load_register(k))
            return whole_sum(*folded(total, lost, logs))

        return plain

    # ---- targets 0 and 1, and one weight for the positive: z = x with its sign changed for those,
    #      loss = max(z, 0) + log1p(e), gradient = sigmoid(z), each times a weight; two scales, by class ----

    def class_pass(fused):
        exp, e_unit = (exp_parts, unit) if fused else (exp_flushed, one)

        @inline
        def step(given, i, chain, product, positive_product, soft, pos_weight, scales):
            x, y = load_x(given, i), load_target(given, i)
            soft = either(soft, fma(y, y, -y))
            is_positive = y == one
            fraction, power = exp(-absolute(x))
            e = fraction * power
            z = where(is_positive, -x, x)
            chain = fma(where(is_positive, pos_weight, one), maximum(zero, z), chain)
            if fused:
                slope = where(has_minus(z), e, above) / fma(e, unit, one)
                store(given.out + i, slope * where(is_positive, load(scales + vector_bytes), load(scales)))
            negative, positive = where(is_positive, zero, e), where(is_positive, e, zero)
            product = with_e(product, negative, e_unit)
            return chain, product, with_e(positive_product, positive, e_unit), soft

        @outline
        def by_class(given, n_bytes, products, scales):
            """Return the total, or NaN if the targets are not of that kind after all."""
            total, lost, soft = all_of(zero), all_of(zero), splat(zero)
            pos_weight = load(given.pos_weight)
            at, i = products, 0
            while i < n_bytes:
                end, chain = min(i + chain_bytes, n_bytes), splat(zero)
                product, positive_product = splat(zero), splat(zero)
                while i < end:
                    chain, product, positive_product, soft = step(
                        given, i, chain, product, positive_product, soft, pos_weight, scales
                    )
                    if fused:
                        drain(given, i)
                    i += vector_bytes
                total, lost = folded(total, lost, in_one(chain))
                store_register(at, joined(product * e_unit))
                store_register(at + register_bytes, joined(positive_product * e_unit))
                at += 2 * register_bytes
            if fused and given.stream:
                finish(given, n_bytes)
            weight, logs = load_register(given.pos_weight), all_of(zero)
            for k in range(products, at, 2 * register_bytes):
                positive = log1p(load_register(k + register_bytes))
                logs = logs + fma(weight, positive, log1p(load_register(k)))
            total, lost = folded(total, lost, logs)
            a, b, c, d = parts(soft)
            is_soft = any_lane(either(either(a, b), either(c, d)) != zero)
            return np.nan if is_soft else whole_sum(total, lost)

        return by_class

    # ---- anything ----

    def weighted_pass(fused, careful):
        @inline
        def step(given, i, keep, spread):
            x, y = load_x(given, i), load_target(given, i)
            fraction, power = exp_parts(-absolute(x))
            e = fraction * (power * unit)
            negative, positive = one - y, y
            if careful:  # `negative` is no difference of rounded numbers
                negative, positive = fma(negative, keep, spread), fma(positive, keep, spread)
            positive = positive * load(given.pos_weight + (i & given.pos_weight_step))
            weight = load(given.weight + (i & given.weight_step))
            slope, q = where(has_minus(x), -positive, negative), negative + positive
            if fused:
                small = flipped(e, x) / (one + e)
                scale = load(given.scale + (i & given.scale_step)) * weight
                store(given.out + i, fma(-q, small, slope) * scale)
            if careful:  # 0*inf = 0; the exponential of NaN stays
                x = where((slope != zero) & (weight != zero), x, zero)
            loss = weight * fma(q, log1p_unit(e), slope * x)
            store(given.loss + i, loss)
            return loss

        @outline
        def weighted(given, n_bytes, keep, spread):
            total, lost = all_of(zero), all_of(zero)
            i = 0
            while i < n_bytes:
                end, chain = min(i + chain_bytes, n_bytes), splat(zero)
                while i < end:
                    chain = chain + step(given, i, keep, spread)
                    if fused:
                        drain(given, i)
                    i += vector_bytes
                total, lost = folded(total, lost, in_one(chain))
            if fused and given.stream:
                finish(given, n_bytes)
            return whole_sum(total, lost)

        return weighted

    # ---- sigmoid ----

    def sigmoid_pass(log):
        @outline
        def sigmoid(given, n_bytes):
            for i in range(0, n_bytes, vector_bytes):
                x = load_x(given, i)
                fraction, power = exp_parts(-absolute(x))
                e = fraction * (power * unit)
                if log:
                    store(given.out + i, where(x > zero, zero, x) - log1p_unit(e))
                else:
                    store(given.out + i, where(x > zero, one, e) / (one + e))
                drain(given, i)
            if given.stream:
                finish(given, n_bytes)

        return sigmoid

    return SimpleNamespace(
        sigmoid=sigmoid_pass,
        unit=unit,
        plain=plain_pass,
        by_class=class_pass,
        weighted=weighted_pass,
    )
