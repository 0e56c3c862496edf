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
from logitloss._kernels import vectors
from logitloss._kernels.elementary import elementary
from logitloss._kernels.vectors import inline, outline

PREFETCH_BYTES = 8192
# Vectors that are summed in one chain, and chains whose e are joined
CHAIN, JOINED = 32, 2


class Operands(NamedTuple):
    """Addresses of reals, a whole number of vectors. What lies behind the block's adds nothing to a total.

    A step is -1, or 0 where one vector is for all. `out` is 0 where it is not wanted, `stream` where `out` is
    no tile on its way there, around the cache.
    """

    x: int
    target: int
    weight: int
    weight_step: int
    pos_weight: int
    pos_weight_step: int
    scale: int
    scale_step: int
    loss: int
    out: int
    stream: int


def writer(ops: SimpleNamespace) -> SimpleNamespace:
    """Return the functions that send a tile's results around the cache, whole lines as they are complete."""
    load, stream, load_one, store_one = ops.load, ops.stream, ops.load_one, ops.store_one
    size, vector_bytes = ops.size, ops.size * ops.lanes

    @inline
    def start(to):
        """Return how many bytes of results come before the first whole line."""
        return -to % 64

    @inline
    def drained(to, tile, done, at):
        """Send the lines complete at `at`; return how far."""
        end = done + (at - done) // 64 * 64
        for i in range(done, end, vector_bytes):
            stream(to + i, load(tile + i))
        return end

    @inline
    def finish(to, tile, done, n_bytes):
        """Store what is left before the first line and after the last."""
        for i in range(0, min(start(to), n_bytes), size):
            store_one(to + i, load_one(tile + i))
        for i in range(done, n_bytes, size):
            store_one(to + i, load_one(tile + i))

    return SimpleNamespace(start=start, drained=drained, finish=finish)


def passes(real: Any) -> SimpleNamespace:
    """Return the passes over a block in one real type, or what makes one `fused` with the gradient's."""
    ops = vectors.operations(real)
    vector_bytes, chain_bytes = ops.lanes * ops.size, CHAIN * ops.lanes * ops.size
    fma, absolute, maximum, where = ops.fma, ops.absolute, ops.maximum, ops.where
    load, store, splat, lanes_sum = ops.load, ops.store, ops.splat, ops.lanes_sum
    flipped, has_minus = vectors.flipped, vectors.has_minus
    prefetch = vectors.prefetcher(chain_bytes)
    near, flushed = elementary(inline, real), elementary(inline, real, headroom=0)
    exp_parts, exp_flushed, log1p, log1p_unit = near.exp_parts, flushed.exp_parts, near.log1p, near.log1p_unit
    to = writer(ops)
    start, drained, finish = to.start, to.drained, to.finish
    # exp_parts' e are so much too large, and none is subnormal.
    above, unit = real(1 / near.unit), near.unit
    zero, one, infinity = real(0), real(1), real(np.inf)

    # ---- sums ----

    @inline
    def folded(total, lost, chain):
        """Add a chain to a sum; what that loses to rounding is kept apart."""
        new = total + chain
        added = new - total
        return new, lost + ((total - (new - added)) + (chain - added))

    @inline
    def whole_sum(total, lost):
        return lanes_sum(where(absolute(total) < infinity, total + lost, total))

    @inline
    def logs(products, n, total, lost):
        """Add log1p of n products that lie in memory."""
        chain = splat(zero)
        for k in range(n):
            chain = chain + log1p(load(products + k * vector_bytes))
        return folded(total, lost, chain)

    # ---- totals with all weights 1 ----

    @inline
    def plain_step(given, i, chain, product):
        x, y = load(given.x + i), load(given.target + i)
        fraction, power = exp_flushed(-absolute(x))
        e = fraction * power
        return chain + fma(x, -y, maximum(x, zero)), fma(product, one + e, e)

    @inline
    def plain_step_fused(given, i, chain, product):
        x, y = load(given.x + i), load(given.target + i)
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
            zeros = splat(zero)
            total, lost, product = zeros, zeros, zeros
            n_products, i = 0, 0
            done = start(given.stream)
            while i < n_bytes:
                prefetch(given.x + i, PREFETCH_BYTES)
                prefetch(given.target + i, PREFETCH_BYTES)
                end, chain = min(i + chain_bytes, n_bytes), zeros
                while i < end:
                    chain, product = step(given, i, chain, product)
                    i += vector_bytes
                total, lost = folded(total, lost, chain)
                if i % (JOINED * chain_bytes) == 0 or i == n_bytes:
                    store(products + n_products * vector_bytes, product * product_unit)
                    product = zeros
                    n_products += 1
                if fused and given.stream:
                    done = drained(given.stream, given.out, done, i)
            if fused and given.stream:
                finish(given.stream, given.out, done, n_bytes)
            return whole_sum(*logs(products, n_products, total, lost))

        return plain

    # ---- targets 0 and 1, and one weight for the positive: z = x with its sign changed for those,
    #      loss = max(z, 0) + log1p(e), gradient = sigmoid(z), each times a weight; two scales, by class ----

    @inline
    def class_step(given, i, chain, product, positive_product, pos_weight, scales):
        x, is_positive = load(given.x + i), load(given.target + i) == one
        fraction, power = exp_flushed(-absolute(x))
        e = fraction * power
        chain = fma(where(is_positive, pos_weight, one), maximum(zero, where(is_positive, -x, x)), chain)
        negative, positive = where(is_positive, zero, e), where(is_positive, e, zero)
        product = fma(product, one + negative, negative)
        return chain, product, fma(positive_product, one + positive, positive)

    @inline
    def class_step_fused(given, i, chain, product, positive_product, pos_weight, scales):
        x, is_positive = load(given.x + i), load(given.target + i) == one
        fraction, power = exp_parts(-absolute(x))
        e = fraction * power
        z = where(is_positive, -x, x)
        chain = fma(where(is_positive, pos_weight, one), maximum(zero, z), chain)
        slope = where(has_minus(z), e, above) / fma(e, unit, one)
        store(given.out + i, slope * where(is_positive, load(scales + vector_bytes), load(scales)))
        negative, positive = where(is_positive, zero, e), where(is_positive, e, zero)
        product = fma(product, fma(negative, unit, one), negative)
        return chain, product, fma(positive_product, fma(positive, unit, one), positive)

    def class_pass(fused):
        step, product_unit = (class_step_fused, unit) if fused else (class_step, one)

        @outline
        def by_class(given, n_bytes, products, scales):
            zeros, pos_weight = splat(zero), load(given.pos_weight)
            total, lost, product, positive_product = zeros, zeros, zeros, zeros
            n_products, i = 0, 0
            done = start(given.stream)
            while i < n_bytes:
                prefetch(given.x + i, PREFETCH_BYTES)
                prefetch(given.target + i, PREFETCH_BYTES)
                end, chain = min(i + chain_bytes, n_bytes), zeros
                while i < end:
                    chain, product, positive_product = step(
                        given, i, chain, product, positive_product, pos_weight, scales
                    )
                    i += vector_bytes
                total, lost = folded(total, lost, chain)
                if i % (JOINED * chain_bytes) == 0 or i == n_bytes:
                    at = products + 2 * n_products * vector_bytes
                    store(at, product * product_unit)
                    store(at + vector_bytes, positive_product * product_unit)
                    product, positive_product = zeros, zeros
                    n_products += 1
                if fused and given.stream:
                    done = drained(given.stream, given.out, done, i)
            if fused and given.stream:
                finish(given.stream, given.out, done, n_bytes)
            chain = zeros
            for k in range(n_products):
                at = products + 2 * k * vector_bytes
                chain = chain + fma(pos_weight, log1p(load(at + vector_bytes)), log1p(load(at)))
            return whole_sum(*folded(total, lost, chain))

        return by_class

    # ---- anything ----

    def weighted_pass(fused, careful):
        @inline
        def step(given, i, weight_at, pos_weight_at, keep, spread):
            x, y = load(given.x + i), load(given.target + i)
            fraction, power = exp_parts(-absolute(x))
            e = fraction * (power * unit)
            negative, positive = one - y, y
            if careful:  # `negative` is no difference of rounded numbers
                negative, positive = fma(negative, keep, spread), fma(positive, keep, spread)
            positive = positive * load(pos_weight_at)
            weight = load(weight_at)
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
            zeros = splat(zero)
            total, lost = zeros, zeros
            i, done = 0, start(given.stream)
            weight_at, pos_weight_at = given.weight, given.pos_weight
            weight_step, pos_weight_step = (
                vector_bytes & given.weight_step,
                vector_bytes & given.pos_weight_step,
            )
            while i < n_bytes:
                prefetch(given.x + i, PREFETCH_BYTES)
                prefetch(given.target + i, PREFETCH_BYTES)
                end, chain = min(i + chain_bytes, n_bytes), zeros
                while i < end:
                    chain = chain + step(given, i, weight_at, pos_weight_at, keep, spread)
                    weight_at += weight_step
                    pos_weight_at += pos_weight_step
                    i += vector_bytes
                total, lost = folded(total, lost, chain)
                if fused and given.stream:
                    done = drained(given.stream, given.out, done, i)
            if fused and given.stream:
                finish(given.stream, given.out, done, n_bytes)
            return whole_sum(total, lost)

        return weighted

    # ---- sigmoid ----

    def sigmoid_pass(log):
        @inline
        def step(given, i):
            x = load(given.x + i)
            fraction, power = exp_parts(-absolute(x))
            e = fraction * (power * unit)
            if log:
                store(given.out + i, where(x > zero, zero, x) - log1p_unit(e))
            else:
                store(given.out + i, where(x > zero, one, e) / (one + e))

        @outline
        def sigmoid(given, n_bytes):
            i, done = 0, start(given.stream)
            while i < n_bytes:
                prefetch(given.x + i, PREFETCH_BYTES)
                end = min(i + chain_bytes, n_bytes)
                while i < end:
                    step(given, i)
                    i += vector_bytes
                if given.stream:
                    done = drained(given.stream, given.out, done, i)
            if given.stream:
                finish(given.stream, given.out, done, n_bytes)

        return sigmoid

    return SimpleNamespace(
        sigmoid=sigmoid_pass,
        unit=unit,
        plain=plain_pass,
        by_class=class_pass,
        weighted=weighted_pass,
    )
