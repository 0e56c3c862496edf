"""Kernels over elements.

Where all arrays are contiguous or constant a thread takes the elements of 16 bytes of logits at once, else
one element at a time. The arithmetic of an element is a function of (x, target, weight, pos_weight, options)
that returns its loss, its slope (or its result) and whether it is bad.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from logitloss._kernels.cuda_arrays import KINDS
from logitloss._kernels.cuda_classes import ZERO, row_address
from logitloss._kernels.cuda_memory import (
    ITEM_BYTES,
    device,
    load,
    load_words,
    pack,
    store,
    store_integer,
    store_words,
    switch,
    unpack,
)
from logitloss._kernels.cuda_rows import FOUND_BYTES, NONE_BAD, options
from logitloss._kernels.cuda_steps import (
    BLOCK,
    SHARED,
    add_exactly,
    gather,
    machine,
    plus,
    reduction,
    smaller,
)
from numba import cuda


class Elements(NamedTuple):
    """Which kernel over elements."""

    operation: str  # a name of `arithmetic`
    item: str
    target: str  # a kind, or "none"
    weights: bool  # whether there are weights of either sort
    grad: bool  # whether slopes or results are wanted
    vector: bool
    loss_vector: bool = False  # losses can be stored by sixteen bytes too


def arithmetic(operation: str, real: type, wide: type) -> Any:
    """Return the function of one element; what 1 - target needs is computed in the wider type."""
    steps = machine(real)
    exp, log1p, log, absolute, maximum = steps.exp, steps.log1p, steps.log, steps.absolute, steps.maximum
    softplus, sigmoid_of = steps.softplus, steps.sigmoid
    zero, one, half, wide_one = real(0), real(1), wide(0.5), wide(1)
    infinity, least_log = real(np.inf), real(-100)

    @device
    def times(coefficient, value):
        """Multiply with 0 * inf = 0."""
        return zero if coefficient == zero and absolute(value) == infinity else coefficient * value

    @device
    def bce_with_logits(x, t, weight, pos_weight, options):
        keep, spread, signed = wide(options[0]), wide(options[1]), options[2] != 0
        y = half * t + half if signed else t
        bad = signed and not (t == wide_one or t == -wide_one)
        negative, positive = real(keep * (wide_one - y) + spread), real(keep * y + spread) * pos_weight
        e = exp(-absolute(x))
        small = log1p(e)
        large_p = one / (one + e)
        small_p = e * large_p
        if_negative, if_positive = maximum(x, zero) + small, maximum(-x, zero) + small
        loss = times(weight, times(negative, if_negative) + times(positive, if_positive))
        p, q = (small_p, large_p) if x < zero else (large_p, small_p)
        if x != x:
            p = q = x
        return loss, weight * (negative * p - positive * q), bad

    @device
    def bce(x, t, weight, pos_weight, options):
        bad = not (x >= zero and x <= one and t >= wide(0) and t <= wide_one)
        log_p, log_q = maximum(log(x), least_log), maximum(log1p(-x), least_log)
        if bad:
            log_p = log_q = zero
        return -(real(t) * log_p + real(wide_one - t) * log_q) * weight, zero, bad

    @device
    def kl_div(x, t, weight, pos_weight, options):
        t = real(t)
        p, log_p = (exp(t), t) if options[0] != 0 else (t, log(t))
        return zero if p == zero and x == x else p * (log_p - x), zero, False

    @device
    def sigmoid(x, t, weight, pos_weight, options):
        return zero, sigmoid_of(x), False

    @device
    def log_sigmoid(x, t, weight, pos_weight, options):
        return zero, -softplus(-x), False

    functions = (bce_with_logits, bce, kl_div, sigmoid, log_sigmoid)
    return {function.__name__: function for function in functions}[operation]


@functools.cache
def elements_kernel(spec: Elements) -> Any:
    """Return the kernel of a specification."""
    return cuda.jit(elements_function(spec), **options(blocks_of(spec)))


def blocks_of(spec: Elements) -> int:
    """Return how many blocks a multiprocessor holds."""
    return 2 if "f64" in (spec.item, spec.target) else 3 if spec.grad else 4


def elements_function(spec: Elements) -> Any:
    """Return the kernel of a specification, not yet compiled."""
    item, vector, grad, loss_vector = spec.item, spec.vector, spec.grad, spec.loss_vector
    stored = "f64" if item == "f64" else "f32"
    # The Kullback-Leibler divergence is a difference of logarithms: float32 would round each of them.
    real = np.float64 if item == "f64" or spec.operation == "kl_div" else np.float32
    wide = np.float64 if spec.target == "f64" else real
    size, stored_size = np.int64(ITEM_BYTES[item]), np.int64(ITEM_BYTES[stored])
    width = 16 // ITEM_BYTES[item] if vector else 1
    compute = arithmetic(spec.operation, real, wide)
    load_x, store_loss = load(item, real), store(stored, real)
    store_out = store(item, real) if grad else store_loss
    writes_vectors = grad and vector
    has_target, has_weights = spec.target != "none", spec.weights
    load_target = load(spec.target, wide) if has_target else load_x
    load_weight = switch(KINDS, lambda kind: load(kind, real))
    load_scale, store_double, store_long = (
        switch(KINDS, lambda kind: load(kind, np.float64)),
        store("f64", np.float64),
        store_integer("i8"),
    )
    unpack_words = unpack(item, real)
    pack_words, pack_losses = pack(item), pack(stored)
    losses_of_words = 16 // ITEM_BYTES[stored]
    sum_double, min_integer = reduction(plus, np.float64, BLOCK), reduction(smaller, np.int64, BLOCK)
    one, wide_zero = real(1), wide(0)

    @device
    def read_target(source, k):
        return (load_target(row_address(source[0], source[1], k)),) if has_target else (wide_zero,)

    @device
    def read_weight(source, k):
        if has_weights and source[0][0] != 0:
            return (load_weight(source[0][1], row_address(source[0], source[1], k)),)
        return (one,)

    @device
    def read_scale(source, k):
        return (real(load_scale(source[0][1], row_address(source[0], source[1], k))),)

    @device
    def read_x(source, k):
        return (load_x(row_address(source[0], source[1], k)),)

    def results(n: int) -> Any:
        """Return a function of n elements: their losses, results, float64 total and first bad number."""
        if n == 1:

            @device
            def one_result(x, t, weight, pos_weight, scale, settings, k):
                loss, slope, bad = compute(x[0], t[0], weight[0], pos_weight[0], settings)
                return (loss,), (slope * scale[0],), np.float64(loss), k if bad else NONE_BAD

            return one_result
        half = n // 2
        left, right = results(half), results(n - half)

        @device
        def some_results(x, t, weight, pos_weight, scale, settings, k):
            losses, slopes, total, bad = left(
                x[:half], t[:half], weight[:half], pos_weight[:half], scale[:half], settings, k
            )
            more, other_slopes, rest, other_bad = right(
                x[half:], t[half:], weight[half:], pos_weight[half:], scale[half:], settings, k + half
            )
            return losses + more, slopes + other_slopes, total + rest, smaller(bad, other_bad)

        return some_results

    def stores(n: int) -> Any:
        """Return a function that stores n losses where they belong, by sixteen bytes if that is possible."""
        if loss_vector and n == losses_of_words:

            @device
            def store_sixteen(loss, shape, k, values):
                store_words(loss[0] + k * stored_size, pack_losses(values))

            return store_sixteen
        if n == 1:

            @device
            def store_one(loss, shape, k, values):
                store_loss(row_address(loss, shape, k), values[0])

            return store_one
        half = n // 2
        left, right = stores(half), stores(n - half)

        @device
        def store_some(loss, shape, k, values):
            left(loss, shape, k, values[:half])
            right(loss, shape, k + half, values[half:])

        return store_some

    def functions(n: int) -> Any:
        return (
            gather(read_target, n),
            gather(read_weight, n),
            gather(read_scale, n),
            results(n),
            stores(n),
            (one,) * n,
        )

    targets_one, weights_one, scales_one, result_one, store_one_loss, ones_one = functions(1)
    targets_all, weights_all, scales_all, result_all, store_all_losses, ones_all = functions(width)

    def elements(
        x, target, weight, pos_weight, scale, loss, out, shape, n_elements, settings, scale_number, results
    ):
        shared_double = cuda.shared.array(SHARED, np.float64)
        shared_integer = cuda.shared.array(SHARED, np.int64)
        total, lost, first_bad = np.float64(0), np.float64(0), NONE_BAD
        thread = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        threads = np.int64(cuda.gridDim.x) * BLOCK
        number = real(scale_number)
        head, n_vectors = n_elements, ZERO
        if vector:
            head = smaller(n_elements, ((16 - (x[0] & 15)) & 15) // size)
            n_vectors = (n_elements - head) // width
        i = thread
        while i < n_vectors:
            k = head + i * width
            values = unpack_words(load_words(x[0] + k * size)) if vector else read_x((x, shape), k)
            scales = ones_all
            if grad and scale[0] != 0:
                scales = scales_all((scale, shape), k, 1)
            losses, slopes, part, bad = result_all(
                values,
                targets_all((target, shape), k, 1),
                weights_all((weight, shape), k, 1),
                weights_all((pos_weight, shape), k, 1),
                scales,
                settings,
                k,
            )
            total, lost = add_exactly(total, lost, part)
            first_bad = smaller(first_bad, bad)
            if loss[0] != 0:
                store_all_losses(loss, shape, k, losses)
            if writes_vectors:
                store_words(out[0] + k * size, pack_words(scaled_all(slopes, number)))
            i += threads
        i = thread
        while i < n_elements - n_vectors * width:
            k = i if i < head else i + n_vectors * width
            scales = ones_one
            if grad and scale[0] != 0:
                scales = scales_one((scale, shape), k, 1)
            losses, slopes, part, bad = result_one(
                read_x((x, shape), k),
                targets_one((target, shape), k, 1),
                weights_one((weight, shape), k, 1),
                weights_one((pos_weight, shape), k, 1),
                scales,
                settings,
                k,
            )
            total, lost = add_exactly(total, lost, part)
            first_bad = smaller(first_bad, bad)
            if loss[0] != 0:
                store_one_loss(loss, shape, k, losses)
            if grad:
                store_out(row_address(out, shape, k), slopes[0] * number)
            i += threads
        total, first_bad = sum_double(shared_double, total - lost), min_integer(shared_integer, first_bad)
        if cuda.threadIdx.x == 0:
            to = results + np.int64(cuda.blockIdx.x) * FOUND_BYTES
            store_double(to, total)
            store_long(to + 8, ZERO)
            store_long(to + 16, first_bad)

    def scaling(n: int) -> Any:
        if n == 1:

            @device
            def scaled_one(values, by):
                return (values[0] * by,)

            return scaled_one
        half = n // 2
        left, right = scaling(half), scaling(n - half)

        @device
        def scaled_some(values, by):
            return left(values[:half], by) + right(values[half:], by)

        return scaled_some

    scaled_all = scaling(width)
    return elements
