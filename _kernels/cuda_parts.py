"""Few long rows shared among blocks: what a part of a row leaves, and how the parts come together.

A part leaves its statistics as `joins` of cuda_statistics gives them: six numbers, and for figures two
integers. The team that finishes the row finds the largest logit of all parts, then expresses each in it, in
the same order always.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from logitloss._kernels.cuda_memory import ITEM_BYTES, device, integer_load, load, store_integer
from logitloss._kernels.cuda_results import record_loads, record_stores
from logitloss._kernels.cuda_statistics import NONE, NOWHERE
from logitloss._kernels.cuda_steps import larger, machine, plus, reduction, smaller

# Numbers that a part leaves.
PART = 6


def part_bytes(real_kind: str, kind: str) -> int:
    """Return how much a part leaves."""
    return PART * ITEM_BYTES[real_kind] + (16 if kind == "figures" else 0)


@functools.cache
def part_stores(real_kind: str, kind: str) -> Any:
    """Return a function (address, statistics, first class) that stores what a part leaves."""
    write, write_integer = record_stores(real_kind, PART), store_integer("i8")
    integers = np.int64(PART * ITEM_BYTES[real_kind])
    if kind != "figures":

        @device
        def store_sums(address, part, begin):
            write(address, part)

        return store_sums

    @device
    def store_figures(address, part, begin):
        write(address, part[:PART])
        write_integer(address + integers, part[-2])
        write_integer(address + integers + 8, begin + part[-1])

    return store_figures


@functools.cache
def merging(real_kind: str, kind: str, team: int) -> Any:
    """Return a function (shared, shared_integer, address of a row's parts, how many, lane) -> statistics."""
    real = np.float64 if real_kind == "f64" else np.float32
    size, integers = np.int64(part_bytes(real_kind, kind)), np.int64(PART * ITEM_BYTES[real_kind])
    read_integer = integer_load("i8")
    steps, read, read_part = machine(real), load(real_kind, real), record_loads(real_kind, PART)
    share, gap_of = steps.share, steps.gap_of
    zero, one, lowest = real(0), real(1), real(-np.inf)
    largest_of, sum_of = reduction(larger, real, team), reduction(plus, real, team)
    count_of, first_of = reduction(plus, np.int64, team), reduction(smaller, np.int64, team)
    is_figures, coefficients = kind == "figures", kind == "coefficients"
    is_entropy = is_figures or kind == "entropy"

    @device
    def express(part, m):
        """Return (n, s, below, at, gaps) of a part in terms of the row's m."""
        own, n, s, below, at, gaps = part
        down = share(own, m) if own != m else one
        # A part of -inf only has no such sums.
        if is_entropy and own != m:
            gaps = gaps * down + (s + n) * down * (m - own) if down > zero else zero
        if is_figures and own != m:
            below = (below + n) * down * down if down > zero else zero
        if coefficients:
            gaps = gaps + (gap_of(below + at, m, own) if own > lowest else zero)
            if own != m:
                below, at = below + at, zero
        s = s * down if s != zero else zero
        if own != m:
            n, s = zero, s + n * down
        return n, s, below, at, gaps

    @device
    def merge(shared, shared_integer, parts, n_parts, lane):
        m, p = lowest, np.int64(lane)
        while p < n_parts:
            m = larger(read(parts + p * size), m)
            p += team
        m = largest_of(shared, m)
        n = s = below = at = gaps = zero
        p = np.int64(lane)
        while p < n_parts:
            more = express(read_part(parts + p * size), m)
            n, s, below, at, gaps = n + more[0], s + more[1], below + more[2], at + more[3], gaps + more[4]
            p += team
        n, s = sum_of(shared, n), sum_of(shared, s)
        if is_entropy or coefficients:
            below, at, gaps = sum_of(shared, below), sum_of(shared, at), sum_of(shared, gaps)
        return m, n, s, below, at, gaps

    if not is_figures:
        return merge

    @device
    def merge_figures(shared, shared_integer, parts, n_parts, lane):
        sums = merge(shared, shared_integer, parts, n_parts, lane)
        before, top, p = NONE, NOWHERE, np.int64(lane)
        while p < n_parts:
            part = parts + p * size
            before += read_integer(part + integers)
            if read(part) == sums[0]:
                top = smaller(top, read_integer(part + integers + 8))
            p += team
        return (*sums, count_of(shared_integer, before), first_of(shared_integer, top))

    return merge_figures
