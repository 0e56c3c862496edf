"""What the figures of a row ask of a pass beyond the loss: sums of two more terms, a count, the first of m.

The label's rank counts the classes of a larger logit, and those of an equal one and a lower number. One
comparison a class says both: with the label's logit before the label, with the next number above it from
there on. A run of contiguous classes has one such threshold; where the run holds the label it is the latter,
and `equals` counts what that leaves out.

What a push gets in the place of coefficients is (first class, step between runs, (label, its logit, the next
number above)).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from logitloss._kernels import FIGURES
from logitloss._kernels.cuda_memory import ITEM_BYTES, device, load
from logitloss._kernels.cuda_results import record_stores
from logitloss._kernels.cuda_steps import machine, tree

_NONE = np.int64(0)


@device
def position(source, k):
    return k, _NONE, source[2]


@device
def positions(source, k, step):
    return k, step, source[2]


@functools.cache
def classes(real: type, n: int) -> Any:
    """Return a function that adds up n classes, e of which is exp(x - r), and 0 at m.

    (logits, m, r, threshold, (h, q, count)) -> the sum of e; h and the sum of e*(r - x); q and that of e*e;
    count and how many reach the threshold.
    """
    if n == 1:
        steps, zero, one = machine(real), real(0), real(1)
        bounded, exp_bounded, fma, where = steps.bounded, steps.exp_bounded, steps.fma, steps.where

        @device
        def one_class(x, m, r, threshold, sums):
            # finite, since e may be 0
            distance = bounded(x[0] - r)
            e = where(x[0] == m, zero, exp_bounded(distance))
            count = sums[2] + where(x[0] >= threshold, one, zero)
            return e, fma(e, -distance, sums[0]), fma(e, e, sums[1]), count

        return one_class
    half = n // 2
    left, right = classes(real, half), classes(real, n - half)

    @device
    def some_classes(x, m, r, threshold, sums):
        first = left(x[:half], m, r, threshold, sums)
        second = right(x[half:], m, r, threshold, first[1:])
        return first[0] + second[0], second[1], second[2], second[3]

    return some_classes


@functools.cache
def runs(real: type, run: int, at_once: int) -> Any:
    """Return a function (logits, m, r, (class k, step, own), k, sums) that does the same of several runs."""
    if at_once == 1:
        add_up, length = classes(real, run), np.int64(run)

        @device
        def one_run(x, m, r, begin, k, sums):
            label, logit, above = begin[2]
            return add_up(x, m, r, logit if k + length <= label else above, sums)

        return one_run
    half = at_once // 2
    cut = half * run
    left, right = runs(real, run, half), runs(real, run, at_once - half)

    @device
    def some_runs(x, m, r, begin, k, sums):
        first = left(x[:cut], m, r, begin, k, sums)
        second = right(x[cut:], m, r, begin, k + half * begin[1], first[1:])
        return first[0] + second[0], second[1], second[2], second[3]

    return some_runs


@device
def _is(x, m):
    return x == m


@device
def _either(a, b):
    return a or b


@functools.cache
def first_equal(n: int) -> Any:
    """Return a function (logits, m) -> the number of the first that is m; one of them is."""
    if n == 1:

        @device
        def only(x, m):
            return _NONE

        return only
    half = n // 2
    left, right, among_left = first_equal(half), first_equal(n - half), tree(_is, _either, half)

    @device
    def one_of_some(x, m):
        return left(x[:half], m) if among_left(x[:half], m) else half + right(x[half:], m)

    return one_of_some


def equals(item: str, team: int, width: int) -> Any:
    """Return a function (place, own, thread) -> the thread's count of equals before the label, in its run."""
    load_item = load(item, np.float64 if item == "f64" else np.float32)
    size, run = np.int64(ITEM_BYTES[item]), np.int64(width)

    @device
    def equals_before(place, own, thread):
        address, _, head, vectors, _ = place
        label, logit, _ = own
        count, number = _NONE, label - head
        if number >= 0 and number < vectors * run:
            k = head + number // run * run + thread % team
            while k < label:
                if load_item(address + k * size) == logit:
                    count += 1
                k += team
        return count

    return equals_before


@functools.cache
def figure_stores() -> Any:
    """Return a function that stores the figures of a row, an ignored one's as 0.

    Its arguments: an address, whether the row counts, others (NaN if it is poisoned), the others' sums of
    exp(x - m)*(m - x) and of exp(x - m)**2, how many classes come before the label's, and the first of m.
    """
    log1p, write = machine(np.float64).log1p, record_stores("f64", len(FIGURES))
    zero, one, nothing = np.float64(0), np.float64(1), (np.float64(0),) * len(FIGURES)

    @device
    def store_figures(address, counts, others, distance, squares, before, top):
        others = np.float64(others)
        p_top, poison = one / (one + others), zero * others
        rank, first = one + np.float64(before) + poison, np.float64(top) + poison
        entropy = log1p(others) + np.float64(distance) * p_top
        others_squared = np.float64(squares) * p_top * p_top
        write(address, (rank, first, p_top, entropy, others_squared) if counts else nothing)

    return store_figures
