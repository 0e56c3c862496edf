"""Small kernels: over labels alone, over what blocks have found, and over two numbers.

Each block of a kernel leaves (total, rows counted, first bad row) in an entry of its own. One more block adds
them up in order, so that a result has the same bits each time.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from logitloss._kernels.cuda_arrays import KINDS
from logitloss._kernels.cuda_classes import ZERO, row_address
from logitloss._kernels.cuda_memory import integer_load, label_load, load, store, store_integer, switch
from logitloss._kernels.cuda_rows import FOUND_BYTES, INTEGERS, NONE_BAD, options
from logitloss._kernels.cuda_steps import BLOCK, SHARED, plus, reduction, smaller
from numba import cuda


@functools.cache
def labels_kernel(item: str) -> Any:
    """Return the kernel that adds up weights of labels ("none"), or negative log-likelihoods."""
    return cuda.jit(labels_function(item), **options(4))


def labels_function(item: str) -> Any:
    """Return the kernel over labels, not yet compiled."""
    picks = item != "none"
    real = np.float64 if item == "f64" else np.float32
    load_item = load(item, np.float64) if picks else load("f64", np.float64)
    load_double, store_double, store_long = (
        load("f64", np.float64),
        store("f64", np.float64),
        store_integer("i8"),
    )
    store_real = store("f64" if item == "f64" else "f32", real)
    load_label = switch(INTEGERS, label_load)
    sum_double, sum_integer, min_integer = (
        reduction(plus, np.float64, BLOCK),
        reduction(plus, np.int64, BLOCK),
        reduction(smaller, np.int64, BLOCK),
    )
    zero, infinity = np.float64(0), np.float64(np.inf)

    def labels(x, target, loss, shape, n_rows, n_classes, ignore_index, ignores, weight, results):
        shared_double = cuda.shared.array(SHARED, np.float64)
        shared_integer = cuda.shared.array(SHARED, np.int64)
        total, counted, first_bad = zero, ZERO, NONE_BAD
        row = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        while row < n_rows:
            label = load_label(target[1], row_address(target, shape, row))
            value = zero
            if ignores == 0 or label != ignore_index:
                if label < 0 or label >= n_classes:
                    first_bad = smaller(first_bad, row)
                else:
                    counted += 1
                    value = np.float64(1)
                    if weight != 0:
                        value = load_double(weight + label * 8)
                    if picks:
                        cost = -load_item(row_address(x, shape, row) + label * x[2])
                        is_free = value == zero and abs(cost) == infinity
                        value = zero if is_free else value * cost
            total += value
            if picks and loss[0] != 0:
                store_real(row_address(loss, shape, row), real(value))
            row += np.int64(cuda.gridDim.x) * BLOCK
        total, counted = sum_double(shared_double, total), sum_integer(shared_integer, counted)
        first_bad = min_integer(shared_integer, first_bad)
        if cuda.threadIdx.x == 0:
            to = results + np.int64(cuda.blockIdx.x) * FOUND_BYTES
            store_double(to, total)
            store_long(to + 8, counted)
            store_long(to + 16, first_bad)

    return labels


@functools.cache
def totals_kernel() -> Any:
    """Return the kernel of one block that adds up what the blocks of another have found."""
    return cuda.jit(totals_function(), **options(1))


def totals_function() -> Any:
    """Return that kernel, not yet compiled."""
    load_double, load_long = load("f64", np.float64), integer_load("i8")
    store_double, store_long = store("f64", np.float64), store_integer("i8")
    sum_double, sum_integer, min_integer = (
        reduction(plus, np.float64, BLOCK),
        reduction(plus, np.int64, BLOCK),
        reduction(smaller, np.int64, BLOCK),
    )

    def totals(found, n_found, result):
        shared_double = cuda.shared.array(SHARED, np.float64)
        shared_integer = cuda.shared.array(SHARED, np.int64)
        total, counted, first_bad = np.float64(0), ZERO, NONE_BAD
        i = np.int64(cuda.threadIdx.x)
        while i < n_found:
            total += load_double(found + i * FOUND_BYTES)
            counted += load_long(found + i * FOUND_BYTES + 8)
            first_bad = smaller(first_bad, load_long(found + i * FOUND_BYTES + 16))
            i += BLOCK
        total, counted = sum_double(shared_double, total), sum_integer(shared_integer, counted)
        first_bad = min_integer(shared_integer, first_bad)
        if cuda.threadIdx.x == 0:
            store_double(result, total)
            store_long(result + 8, counted)
            store_long(result + 16, np.int64(-1) if first_bad == NONE_BAD else first_bad)

    return totals


@functools.cache
def divide_kernel() -> Any:
    """Return the kernel of one thread that divides two numbers on the device."""
    return cuda.jit(divide_function(), **options(1))


def divide_function() -> Any:
    """Return that kernel, not yet compiled."""
    load_any = switch(KINDS, lambda kind: load(kind, np.float64))
    store_double = store("f64", np.float64)

    def divide(numerator, divisor, number, by, result):
        if numerator[0] != 0:
            number = load_any(numerator[1], numerator[0])
        if divisor[0] != 0:
            by = load_any(divisor[1], divisor[0])
        if by == np.float64(0):
            number, by = np.float64(np.nan), np.float64(1)
        store_double(result, number / by)

    return divide
