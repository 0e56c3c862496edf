"""Kernels over rows of classes: statistics, what follows from them, and a second pass, by a team a row.

A team is a thread, a warp or a block; its rows lie a grid apart. Where classes are contiguous it reads 16
bytes a time, several before it uses the first. A second pass takes the row from shared memory as far as it
fits there, and from the cache beyond. Few long rows are cut into parts: one kernel takes the statistics of
the parts, the next finishes the rows, the last one passes over the parts again ("parts", "finish", "second";
all in one is "whole").

Arrays come as tuples of integers, (address, kind, class stride, *row strides), an address of 0 for one that
is not there. A block leaves its total, the rows counted and its first bad row in an entry of its own, and
`totals` adds the entries in order: no result depends on which block comes first.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from logitloss._kernels.cuda_arrays import KINDS
from logitloss._kernels.cuda_classes import ZERO, Rows, first_pass, gammas, placing, row_address, second_pass
from logitloss._kernels.cuda_figures import figure_stores
from logitloss._kernels.cuda_memory import (
    ITEM_BYTES,
    SIMULATED,
    integer_load,
    label_load,
    load,
    store,
    store_integer,
    switch,
)
from logitloss._kernels.cuda_parts import PART, merging, part_bytes, part_stores
from logitloss._kernels.cuda_results import (
    RECORD,
    distributions,
    float_stores,
    gradient_records,
    known_distributions,
    likely_labels,
    record_loads,
    record_stores,
    softmax_records,
)
from logitloss._kernels.cuda_statistics import statistics
from logitloss._kernels.cuda_steps import BLOCK, SHARED, larger, machine, plus, reduction, smaller
from numba import cuda

INTEGERS = KINDS[5:]
NONE_BAD = np.int64(2**63 - 1)
# What a block leaves: its total, rows counted and first bad row.
FOUND_BYTES = 24


@functools.cache
def rows_kernel(spec: Rows) -> Any:
    """Return the kernel of a specification."""
    return cuda.jit(rows_function(spec), **options(spec.resident))


def options(resident: int) -> dict[str, Any]:
    """Return how to compile a kernel of which a multiprocessor is to hold so many blocks."""
    return {} if SIMULATED else {"launch_bounds": (BLOCK, resident)}


def rows_function(spec: Rows) -> Any:
    """Return the kernel of a specification, not yet compiled."""
    item, real, real_kind, team = spec.item, spec.real, spec.real_kind, spec.team
    teams, real_bytes = BLOCK // team, np.int64(ITEM_BYTES[spec.real_kind])
    labelled, soft, coefficients, known = spec.labelled, spec.soft, spec.coefficients, spec.known
    has_loss = labelled or soft
    is_grad, is_log, is_entropy, is_figures = (
        spec.second == name for name in ("grad", "log_softmax", "entropy", "figures")
    )
    is_whole, is_parts, is_finish, is_second = (
        spec.stage == stage for stage in ("whole", "parts", "finish", "second")
    )
    finishes, in_parts = is_whole or is_finish, is_parts or is_second
    passes_first, writes_classes = is_whole or is_parts, spec.writes_classes
    passes_second = writes_classes and (is_whole or is_second)
    cache_words = max(1, spec.cached * 4 * BLOCK)
    bytes_of_part, record_bytes = part_bytes(real_kind, spec.statistics), RECORD * real_bytes + 8

    place_of, walk = placing(spec), first_pass(spec)
    write = second_pass(spec) if writes_classes else None
    join = statistics(real, spec.statistics).joins(team)
    merge = merging(real_kind, spec.statistics, team)
    distribution_of, known_distribution_of = distributions(real), known_distributions(real)
    is_likely, loss_of = likely_labels(), machine(real).loss_of
    gradient_record = gradient_records(real, coefficients, known)
    softmax_record = softmax_records(real, is_log)
    read_gamma, above = gammas(real_kind, spec.target), machine(real).above
    sum_double, sum_integer = reduction(plus, np.float64, BLOCK), reduction(plus, np.int64, BLOCK)
    min_integer = reduction(smaller, np.int64, BLOCK)

    load_item, load_double = load(item, real), load("f64", np.float64)
    store_real, store_double = store(real_kind, real), store("f64", np.float64)
    store_long, load_long = store_integer("i8"), integer_load("i8")
    load_record, store_record = record_loads(real_kind, RECORD), record_stores(real_kind, RECORD)
    store_part = part_stores(real_kind, spec.statistics)
    store_number, store_figures = float_stores(), figure_stores()
    load_label = switch(INTEGERS, label_load)
    # Divisions by powers of two are shifts: of numbers that might be negative, they take registers.
    by_team = team.bit_length() - 1
    zero, one, lowest, none, nan = real(0), real(1), real(-np.inf), np.int64(-1), real(np.nan)
    no_record, no_statistics = (zero,) * RECORD, (lowest, *(zero,) * (PART - 1))
    if is_figures:
        no_statistics = (*no_statistics, ZERO, ZERO)

    def rows(
        logits,
        target,
        scale,
        lse_in,
        loss,
        lse,
        out,
        shape,
        n_rows,
        n_classes,
        n_parts,
        ignore_index,
        ignores,
        beta,
        gamma,
        target_scale,
        target_offset,
        z_loss,
        scale_number,
        parts,
        records,
        results,
    ):
        thread = cuda.threadIdx.x
        lane = thread & (team - 1)
        shared = cuda.shared.array(SHARED, real)
        shared_double = cuda.shared.array(SHARED, np.float64)
        shared_integer = cuda.shared.array(SHARED, np.int64)
        cache = cuda.shared.array(cache_words, np.uint32)
        total, counted, first_bad = np.float64(0), ZERO, NONE_BAD
        n_work = n_rows * n_parts if in_parts else n_rows
        first_work = np.int64(cuda.blockIdx.x) * teams
        # All threads go round as often, since a reduction needs them all.
        while first_work < n_work:
            work = first_work + (thread >> by_team)
            first_work += np.int64(cuda.gridDim.x) * teams
            active = work < n_work
            writer = active and lane == 0
            row = work // n_parts if in_parts else work
            if not active:
                row = ZERO
            label, counts = none, active
            if labelled and active and not is_second:
                label = load_label(target[1], row_address(target, shape, row))
                if ignores != 0 and label == ignore_index:
                    label, counts = none, False
                elif label < 0 or label >= n_classes:
                    label, counts, first_bad = none, False, smaller(first_bad, row)
            logits_row = row_address(logits, shape, row)
            logit = zero
            if label >= 0:
                logit = load_item(logits_row + label * logits[2])

            # The classes of the row, or of the part
            begin, n = ZERO, n_classes
            if in_parts:
                length = (n_classes + n_parts - 1) // n_parts
                begin = (work - row * n_parts) * length
                n = larger(smaller(n_classes, begin + length) - begin, ZERO)
            place = place_of(logits_row + begin * logits[2], logits[2], n if active else ZERO)
            weights = gamma + begin * real_bytes if gamma != 0 else ZERO
            own = (label - begin, logit, above(logit) if is_figures else logit)
            source = ((ZERO, ZERO, weights), (target_scale, target_offset), own)
            if soft:
                targets = row_address(target, shape, row) + begin * target[2]
                source = ((targets, target[2], weights), (target_scale, target_offset), own)

            # Without a first pass: rows that do not count, and those whose label is all that lse leaves open
            given, skips = np.float64(0), labelled and not counts and lse[0] == 0
            if known:
                given = load_double(row_address(lse_in, shape, row))
                if labelled and not is_likely(logit, given):
                    skips = True
            row_statistics = no_statistics
            if passes_first:
                state = walk(cache, place if not skips else place_of(ZERO, ZERO, ZERO), source, thread)
                row_statistics = join(shared, shared_integer, state)
            if is_parts and writer:
                store_part(parts + work * bytes_of_part, row_statistics, begin)
            if is_finish:
                row_parts = parts + row * n_parts * bytes_of_part
                row_statistics = merge(shared, shared_integer, row_parts, n_parts, lane)

            record = no_record
            if finishes:
                m, n_top, others, below, at, gaps = row_statistics[:PART]
                if n_top > zero:
                    others = others + (n_top - one)
                if known:
                    if skips and label >= 0:
                        m = logit
                    distribution = known_distribution_of(m, others, given, skips)
                else:
                    distribution = distribution_of(m, others, lse[0] != 0 and writer)
                log1p_others, wide_lse, real_lse = distribution[0], distribution[1], distribution[2]
                if lse[0] != 0 and writer:
                    store_number(lse, row_address(lse, shape, row), wide_lse)
                if is_entropy and writer:
                    value = log1p_others + gaps / (one + others)
                    store_number(out, row_address(out, shape, row), np.float64(value))
                if is_figures:
                    if writer:
                        right_others = others if log1p_others == log1p_others else nan
                        squares = below + (n_top - one) if n_top > zero else below
                        store_figures(
                            row_address(out, shape, row),
                            counts,
                            right_others,
                            gaps,
                            squares,
                            row_statistics[-2],
                            row_statistics[-1],
                        )
                    below = gaps = zero
                own_beta = zero
                if labelled and counts:
                    own_beta = real(load_double(beta + label * 8)) if beta != 0 else one
                if has_loss and writer:
                    value = zero
                    if counts:
                        counted += 1
                        value = loss_of(
                            m, log1p_others, real_lse, below, gaps, at, own_beta, logit, real(z_loss)
                        )
                    total += np.float64(value)
                    if loss[0] != 0:
                        store_real(row_address(loss, shape, row), value)
                if is_grad:
                    factor, own_gamma = scale_number, zero
                    if scale[0] != 0:
                        factor = load_double(row_address(scale, shape, row))
                    if labelled and coefficients and label >= 0:
                        own_gamma = read_gamma(source, label)[0]
                    record = gradient_record(
                        m,
                        below,
                        at,
                        distribution,
                        real(z_loss),
                        factor,
                        own_beta,
                        own_gamma,
                        logit,
                        label >= 0,
                        counts,
                    )
                elif writes_classes:
                    record = softmax_record(m, distribution)
            if writes_classes and is_finish and writer:
                store_long(records + row * record_bytes, label)
                store_record(records + row * record_bytes + 8, record)
            if is_second:
                label = load_long(records + row * record_bytes)
                record = load_record(records + row * record_bytes + 8)
            if passes_second:
                out_row = row_address(out, shape, row) + begin * out[2]
                own_class = label - begin if label >= begin else none
                write(
                    cache, is_whole and not skips, place, source, out_row, out[2], record, own_class, thread
                )
        if results != 0:
            total, counted = sum_double(shared_double, total), sum_integer(shared_integer, counted)
            first_bad = min_integer(shared_integer, first_bad)
            if thread == 0:
                to = results + np.int64(cuda.blockIdx.x) * FOUND_BYTES
                store_double(to, total)
                store_long(to + 8, counted)
                store_long(to + 16, first_bad)

    return rows
