"""Few long rows shared among blocks: what a part of a row leaves, and how the parts come together.

A part leaves its statistics, (m, n, s, below, at, gaps) as `joins` of cuda_statistics gives them. The team
that finishes the row finds the largest logit of all parts, then expresses each in it, in the same order
always.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from logitloss._kernels.cuda_memory import device, load
from logitloss._kernels.cuda_results import record_loads
from logitloss._kernels.cuda_steps import larger, machine, plus, reduction

# Numbers that a part leaves.
PART = 6


@functools.cache
def merging(real_kind: str, kind: str, team: int) -> Any:
    """Return a function (shared, address of a row's parts, how many, lane) -> the row's statistics."""
    real = np.float64 if real_kind == "f64" else np.float32
    size = np.int64((8 if real_kind == "f64" else 4) * PART)
    steps, read, read_part = machine(real), load(real_kind, real), record_loads(real_kind, PART)
    share, gap_of, reference = steps.share, steps.gap_of, steps.reference
    zero, one, lowest = real(0), real(1), real(-np.inf)
    largest_of, sum_of = reduction(larger, real, team), reduction(plus, real, team)
    is_entropy, coefficients = kind == "entropy", kind == "coefficients"

    @device
    def express(part, m):
        """Return (n, s, below, at, gaps) of a part in terms of the row's m."""
        own, n, s, below, at, gaps = part
        down = share(own, m) if own != m else one
        if is_entropy and own != m:
            gaps = gaps * down + (s + n) * down * (m - own) if down > zero else zero
        if coefficients:
            gaps = gaps + gap_of(below + at, m, reference(own))
            if own != m:
                below, at = below + at, zero
        s = s * down if s != zero else zero
        if own != m:
            n, s = zero, s + n * down
        return n, s, below, at, gaps

    @device
    def merge(shared, parts, n_parts, lane):
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

    return merge
