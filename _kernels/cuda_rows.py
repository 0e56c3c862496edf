"""Kernels over rows of classes: statistics, what follows from them, and a second pass, by a team a row.

A team is a thread, a warp or a block; its rows lie a grid apart. Where classes are contiguous it reads 16
bytes a time, several before it uses the first, and what lies before and after the whole sixteens by single
items. A second pass takes the row from shared memory as far as it fits there, and from the cache beyond.
Few long rows are cut into parts: one kernel takes the statistics of the parts, the next finishes the rows,
the last one passes over the parts again ("parts", "finish", "second"; all in one is "whole").

Arrays come as tuples of integers, (address, kind, class stride, *row strides), an address of 0 for one that
is not there. A block leaves its total, the rows counted and its first bad row in an entry of its own, and
`totals` adds the entries in order: no result depends on which block comes first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from logitloss._kernels.cuda_arrays import KINDS
from logitloss._kernels.cuda_device import geometry
from logitloss._kernels.cuda_memory import (
    ITEM_BYTES,
    SIMULATED,
    device,
    integer_load,
    load,
    load_words,
    pack,
    store,
    store_integer,
    store_words,
    switch,
    unpack,
)
from logitloss._kernels.cuda_statistics import statistics
from logitloss._kernels.cuda_steps import BLOCK, SHARED, gather, larger, machine, plus, reduction, smaller
from numba import cuda

FLOATS = KINDS[:4]
INTEGERS = KINDS[5:]
NONE_BAD = np.int64(2**63 - 1)
ZERO = np.int64(0)
SINGLE = np.float64


# What a row leaves for the second pass, as numbers of the real type: see `entries`.
RECORD = 10
# What a part of a row leaves: m, n, s, below, at, gaps.
PART = 6


class Rows(NamedTuple):
    """Which kernel: each field is fixed when it is compiled."""

    item: str  # of the logits, and of what the second pass writes
    target: str  # "none", "labels", "weighted" (labels, and coefficients by class), or a float kind
    second: str  # "none", "grad", "softmax", "log_softmax" or "entropy" (which needs no second pass)
    stage: str  # "whole", "parts", "finish" or "second"
    team: int
    vector: bool
    known: bool = False  # lse is given


@device
def row_address(view, shape, row):
    """Address of a row of an array."""
    offset = view[0]
    for axis in range(len(shape) - 1, -1, -1):
        if axis == 0:
            offset += row * view[3]
        else:
            before = row // shape[axis]
            offset += (row - before * shape[axis]) * view[3 + axis]
            row = before
    return offset


@functools.cache
def rows_kernel(spec: Rows) -> Any:
    """Return the kernel of a specification."""
    return cuda.jit(rows_function(spec), **options(blocks_of(spec)))


def blocks_of(spec: Rows) -> int:
    """Return how many blocks a multiprocessor holds: the kernel may use 65536 / (256*blocks) registers."""
    if spec.item == "f64" or has_coefficients(spec):
        return 2
    return 4 if spec.second == "none" else 3


def has_coefficients(spec: Rows) -> bool:
    """Whether there is a coefficient for each class of a row."""
    return spec.target == "weighted" or spec.target in FLOATS


def options(blocks: int) -> dict[str, Any]:
    """Return how to compile a kernel of which so many blocks are to be resident."""
    return {} if SIMULATED else {"launch_bounds": (BLOCK, blocks)}


def rows_function(spec: Rows) -> Any:
    """Return the kernel of a specification, not yet compiled."""
    item, team, vector, stage = spec.item, spec.team, spec.vector, spec.stage
    real = np.float64 if item == "f64" else np.float32
    real_kind = "f64" if item == "f64" else "f32"
    size, real_size = np.int64(ITEM_BYTES[item]), np.int64(ITEM_BYTES[real_kind])
    width = 16 // ITEM_BYTES[item] if vector else 1
    at_once = 2 if width == 8 or (item == "f64" and spec.second == "grad") else 4
    teams = BLOCK // team
    labelled = spec.target in ("labels", "weighted")
    soft = spec.target in FLOATS
    coefficients = has_coefficients(spec)
    second = spec.second in ("grad", "softmax", "log_softmax")
    passes_first, passes_second = stage in ("whole", "parts"), second and stage in ("whole", "second")
    finishes, is_grad, is_log = (
        stage in ("whole", "finish"),
        spec.second == "grad",
        spec.second == "log_softmax",
    )
    is_entropy, known, parted = spec.second == "entropy", spec.known, stage != "whole"
    is_parts, is_finish, is_second, is_whole = (stage == s for s in ("parts", "finish", "second", "whole"))
    caches = vector and passes_second and is_whole
    cached = geometry().cache_words // 4 if caches else 0
    cache_size = max(1, cached * 4 * BLOCK if caches else 1)

    steps = machine(real)
    double = machine(np.float64)
    kept = statistics(real, "entropy" if is_entropy else "coefficients" if coefficients else "plain", steps)
    start, push, push_width, push_all = (
        kept.start,
        kept.pushes(1),
        kept.pushes(width),
        kept.pushes(width * at_once),
    )
    join = kept.joins(team)
    sum_double, sum_integer, min_integer = (
        reduction(plus, np.float64, BLOCK),
        reduction(plus, np.int64, BLOCK),
        reduction(smaller, np.int64, BLOCK),
    )
    any_of, sum_team = reduction(larger, real, team), reduction(plus, real, team)
    no_record = (real(0),) * RECORD
    load_long, steps_gap_of, steps_reference = integer_load("i8"), steps.gap_of, steps.reference
    exp, share = steps.exp, steps.share
    zero, one, two, nan = real(0), real(1), real(2), real(np.nan)
    infinity, small = real(np.inf), np.float64(1e-3)
    lowest = real(-np.inf)
    absolute = steps.absolute
    softmax_of, loss_of = steps.softmax_of, steps.loss_of
    double_log1p, double_expm1 = double.log1p, double.expm1
    load_item, load_real, store_real = load(item, real), load(real_kind, real), store(real_kind, real)
    store_item, load_double, store_double = (
        store(item, real),
        load("f64", np.float64),
        store("f64", np.float64),
    )
    store_long, store_byte = store_integer("i8"), store_integer("u1")
    load_label = switch(INTEGERS, integer_load)
    float64_kind = KINDS.index("f64")
    unpack_words, pack_words = unpack(item, real), pack(item)
    wide = np.float64 if spec.target == "f64" else real
    load_target = load(spec.target, wide) if soft else load_real
    target_size = np.int64(ITEM_BYTES[spec.target]) if soft else real_size

    # ---- reading ----

    @device
    def read_one(row, k):
        return (load_item(row[0] + k * row[1]),)

    @device
    def read_words(row, i):
        return load_words(row[0] + 16 * i)

    def unpacks(n: int) -> Any:
        """Return a function of 4*n words to their numbers."""
        if n == 1:
            return unpack_words
        left, right, half = unpacks(n // 2), unpacks(n - n // 2), n // 2 * 4

        @device
        def unpack_some(words):
            return left(words[:half]) + right(words[half:])

        return unpack_some

    def keeps(n: int) -> Any:
        """Return a function that writes n words to shared memory, each a block's threads apart."""
        if n == 1:

            @device
            def keep_one(cache, at, words):
                cache[at] = words[0]

            return keep_one
        left, right, half = keeps(n // 2), keeps(n - n // 2), n // 2

        @device
        def keep_some(cache, at, words):
            left(cache, at, words[:half])
            right(cache, at + half * BLOCK, words[half:])

        return keep_some

    @device
    def kept_words(cache, at):
        return cache[at], cache[at + BLOCK], cache[at + 2 * BLOCK], cache[at + 3 * BLOCK]

    @device
    def read_record(at):
        return (
            load_real(at),
            load_real(at + real_size),
            load_real(at + 2 * real_size),
            load_real(at + 3 * real_size),
            load_real(at + 4 * real_size),
            load_real(at + 5 * real_size),
            load_real(at + 6 * real_size),
            load_real(at + 7 * real_size),
            load_real(at + 8 * real_size),
            load_real(at + 9 * real_size),
        )

    if soft:

        @device
        def read_gamma(source, k):
            # source: addresses and strides of target and weight; target_scale and target_offset
            t = load_target(source[0][0] + k * source[0][1])
            g = wide(source[1][0]) * t + wide(source[1][1])
            if source[0][2] != 0:
                g = wide(load_real(source[0][2] + k * real_size)) * g
            return (real(g),)

    elif coefficients:

        @device
        def read_gamma(source, k):
            return (load_real(source[0][2] + k * real_size),)

    else:

        @device
        def read_gamma(source, k):
            return (zero,)

    gather_gamma = gather(read_gamma, width)

    @device
    def read_gamma_vector(source, k):
        return gather_gamma(source, k, 1)

    if coefficients:
        read_all_gamma = gather(read_gamma_vector, at_once)
    else:
        zeros = (zero,) * (width * at_once)

        @device
        def read_all_gamma(source, k, step):
            return zeros

    read_all_words, unpack_all = gather(read_words, at_once), unpacks(at_once)
    keep_vector, keep_all = keeps(4), keeps(4 * at_once)
    read_all_single = gather(read_one, at_once)

    # ---- the second pass's entries ----
    # A record: 0 subtracted from logits; 1 factor; 2 the label's entry; 3 m, NaN where no entry is special;
    # 4 scale; 5 what the others weigh; 6 gamma at m; 7 p of m; 8 1 - p of m; 9 whether the row counts.

    if is_log:

        @device
        def entry(record, x, gamma, is_label):
            return (x - record[0]) - record[1]

    elif not is_grad:

        @device
        def entry(record, x, gamma, is_label):
            return exp(x - record[0]) * record[1]

    elif not coefficients:

        @device
        def entry(record, x, gamma, is_label):
            value = record[2] if is_label else exp(x - record[0]) * record[1]
            return value if record[9] != zero else zero

    else:

        @device
        def entry(record, x, gamma, is_label):
            value = exp(x - record[0]) * record[1] - gamma
            if x == record[3]:
                value = record[7] * (record[5] + (record[6] - gamma)) - record[8] * gamma
            value = record[2] if is_label else value * record[4]
            return value if record[9] != zero else zero

    def entries(first: int, n: int) -> Any:
        """Return a function of tuples: the entries of n classes, of which number `label` is the label."""
        if n == 1:

            @device
            def one_entry(record, x, gamma, label):
                return (entry(record, x[0], gamma[0], label == first),)

            return one_entry
        half = n // 2
        left, right = entries(first, half), entries(first + half, n - half)

        @device
        def some_entries(record, x, gamma, label):
            return left(record, x[:half], gamma[:half], label) + right(record, x[half:], gamma[half:], label)

        return some_entries

    entry_of_one, entries_of_vector = entries(0, 1), entries(0, width)
    if not coefficients:
        no_gamma = (zero,) * width

        @device
        def read_gamma_vector(source, k):
            return no_gamma

    # ---- the kernel ----

    def rows(
        logits,
        target,
        scale,
        lse_in,
        loss,
        lse,
        hit,
        out,
        shape,
        n_rows,
        n_classes,
        n_parts,
        ignore_index,
        ignores,
        beta,
        gamma,
        gamma_sum,
        target_scale,
        target_offset,
        z_loss,
        scale_number,
        parts,
        records,
        results,
    ):
        lane, in_block = cuda.threadIdx.x % team, cuda.threadIdx.x // team
        shared = cuda.shared.array(SHARED, real)
        shared_double = cuda.shared.array(SHARED, np.float64)
        shared_integer = cuda.shared.array(SHARED, np.int64)
        cache = cuda.shared.array(cache_size, np.uint32)
        total, counted, first_bad = np.float64(0), ZERO, NONE_BAD
        z = real(z_loss)
        n_work = n_rows * n_parts if is_parts or is_second else n_rows
        first_work = np.int64(cuda.blockIdx.x) * teams
        while first_work < n_work:
            work = first_work + in_block
            first_work += np.int64(cuda.gridDim.x) * teams
            active = work < n_work
            row, part = work, ZERO
            if is_parts or is_second:
                row = work // n_parts
                part = work - row * n_parts
            if not active:
                row = part = ZERO

            # What the target says of the row
            label, live = np.int64(-1), active
            if labelled and not is_second and active:
                label = load_label(target[1], row_address(target, shape, row))
                if ignores != 0 and label == ignore_index:
                    label, live = np.int64(-1), False
                elif label < 0 or label >= n_classes:
                    label, live = np.int64(-1), False
                    first_bad = smaller(first_bad, row)
            x_row = row_address(logits, shape, row)
            target_logit = zero
            if labelled and label >= 0:
                target_logit = load_item(x_row + label * logits[2])

            # The classes of this part, and how they split into sixteens
            begin, n = ZERO, n_classes
            if is_parts or is_second:
                length = (n_classes + n_parts - 1) // n_parts
                begin = part * length
                n = smaller(n_classes, begin + length) - begin
                if n < 0:
                    n = ZERO
            address = x_row + begin * logits[2]
            if not active:
                n = ZERO
            head, n_vectors = ZERO, n
            if vector:
                head = smaller(n, ((16 - (address & 15)) & 15) // size)
                n_vectors = (n - head) // width
            n_single = n - n_vectors * width if vector else ZERO
            source = (address, logits[2])
            aligned = (address + head * size, logits[2])
            weights = (ZERO, ZERO, gamma + begin * real_size if gamma != 0 else ZERO)
            if soft:
                t_row = row_address(target, shape, row) + begin * target[2]
                weights = (t_row, target[2], weights[2])
            gammas = (weights, (target_scale, target_offset))

            # ---- the first pass ----
            m, others, below, at, gaps, n_top = lowest, zero, zero, zero, zero, zero
            lse_given, ahead = np.float64(0), np.float64(0)
            skips = labelled and not live and lse[0] == 0
            if known:
                lse_given = load_double(row_address(lse_in, shape, row))
                if labelled:
                    # without a pass, but where the label is so likely that 1 - p must be summed
                    ahead = np.float64(target_logit) - lse_given
                    skips = skips or -double_expm1(ahead) > small or not ahead == ahead
            if passes_first:
                state = start()
                if not skips:
                    single = np.int64(lane)
                    while single < n_single:
                        k = single if single < head else n_vectors * width + single
                        state = push(state, read_one(source, k), read_gamma(gammas, k))
                        single += team
                    i, q = np.int64(lane), 0
                    step = np.int64(team * width)
                    while i + (at_once - 1) * team < n_vectors:
                        k = head + i * width
                        if vector:
                            words = read_all_words(aligned, i, team)
                            if caches and q < cached:
                                keep_all(cache, q * 4 * BLOCK + cuda.threadIdx.x, words)
                            state = push_all(state, unpack_all(words), read_all_gamma(gammas, k, step))
                        else:
                            x = read_all_single(source, i, team)
                            state = push_all(state, x, read_all_gamma(gammas, k, step))
                        i += at_once * team
                        q += at_once
                    while i < n_vectors:
                        k = head + i * width
                        if vector:
                            words = read_words(aligned, i)
                            if caches and q < cached:
                                keep_vector(cache, q * 4 * BLOCK + cuda.threadIdx.x, words)
                            state = push_width(state, unpack_words(words), read_gamma_vector(gammas, k))
                        else:
                            state = push(state, read_one(source, i), read_gamma(gammas, i))
                        i += team
                        q += 1
                m, n_top, others, below, at, gaps = join(shared, state)
            if is_parts:
                if lane == 0 and active:
                    to = parts + work * (PART * real_size)
                    store_real(to, m)
                    store_real(to + real_size, n_top)
                    store_real(to + 2 * real_size, others)
                    store_real(to + 3 * real_size, below)
                    store_real(to + 4 * real_size, at)
                    store_real(to + 5 * real_size, gaps)
            if is_finish:
                # A thread takes some parts of the row, and all merge as after a pass.
                p = np.int64(lane)
                while p < n_parts:
                    m = larger(load_real(parts + (row * n_parts + p) * (PART * real_size)), m)
                    p += team
                top = any_of(shared, m)
                m, p = top, np.int64(lane)
                while p < n_parts:
                    at_part = parts + (row * n_parts + p) * (PART * real_size)
                    part_m, part_n = load_real(at_part), load_real(at_part + real_size)
                    part_s = load_real(at_part + 2 * real_size)
                    part_below = load_real(at_part + 3 * real_size)
                    part_at = load_real(at_part + 4 * real_size)
                    part_gaps = load_real(at_part + 5 * real_size)
                    down = share(part_m, m)
                    if part_m == m:
                        n_top += part_n
                        down = one
                    else:
                        others += part_n * down
                    if is_entropy:
                        if down > zero and part_m != m:
                            part_gaps = part_gaps * down + (part_s + part_n) * down * (m - part_m)
                        elif part_m != m:
                            part_gaps = zero
                    if coefficients:
                        part_gaps += steps_gap_of(part_below + part_at, m, steps_reference(part_m))
                        if part_m != m:
                            part_below, part_at = part_below + part_at, zero
                    if part_s != zero:
                        others += part_s * down
                    below, at, gaps = below + part_below, at + part_at, gaps + part_gaps
                    p += team
                n_top, others = sum_team(shared, n_top), sum_team(shared, others)
                if coefficients or is_entropy:
                    below, at = sum_team(shared, below), sum_team(shared, at)
                    gaps = sum_team(shared, gaps)
            if finishes:
                if n_top > zero:
                    others = others + (n_top - one)

            # ---- what follows from the statistics ----
            record = no_record
            if finishes:
                log1p_others, row_lse, p_top, p_others = softmax_of(m, others)
                if known:
                    if not skips:
                        ahead = np.float64(m) - lse_given
                    if not absolute(real(lse_given)) < infinity:
                        ahead = np.float64(nan)
                    row_lse = real(lse_given)
                    log1p_others, p_top = real(-ahead), exp(real(ahead))
                    rest = real(-double_expm1(ahead))
                    p_others = rest if skips or -double_expm1(ahead) > small else others * p_top
                    if skips:
                        m = target_logit
                        if coefficients and label >= 0:
                            at = read_gamma(gammas, label)[0]
                            below = real(gamma_sum - np.float64(at))
                wide_lse = np.float64(row_lse)
                if lse[0] != 0 and active and lane == 0:
                    if log1p_others == log1p_others:
                        wide_lse = np.float64(m) + double_log1p(np.float64(others))
                    to = row_address(lse, shape, row)
                    if lse[1] == float64_kind:
                        store_double(to, wide_lse)
                    else:
                        store_real(to, real(wide_lse))
                if is_entropy:
                    if active and lane == 0:
                        value = log1p_others + gaps / (one + others)
                        to = row_address(out, shape, row)
                        if out[1] == float64_kind:
                            store_double(to, np.float64(value))
                        else:
                            store_real(to, value)
                b = zero
                if labelled and live:
                    b = one
                    if beta != 0:
                        b = real(load_double(beta + label * 8))
                if labelled or soft:
                    value = loss_of(m, log1p_others, row_lse, below, gaps, at, b, target_logit, z)
                    if not live:
                        value = zero
                    if lane == 0 and active:
                        total += np.float64(value)
                        if live:
                            counted += 1
                        if loss[0] != 0:
                            store_real(row_address(loss, shape, row), value)
                if labelled and hit[0] != 0:
                    # The first of equals is the largest: look before the label where there are others.
                    seen = zero
                    if n_top > one and target_logit == m and live:
                        k = np.int64(lane)
                        while k < label:
                            if load_item(x_row + k * logits[2]) == m:
                                seen = one
                            k += team
                    seen = any_of(shared, seen)
                    if lane == 0 and active:
                        is_hit = live and target_logit == m and seen == zero and others == others
                        store_byte(row_address(hit, shape, row), np.int64(1) if is_hit else ZERO)
                if second:
                    if is_grad:
                        factor = scale_number
                        if scale[0] != 0:
                            factor = load_double(row_address(scale, shape, row))
                        slope = row_lse * (two * z) if z != zero else zero * row_lse
                        alpha = b + (below + at) + slope
                        subtracted, p_scale = m, p_top
                        if known:
                            subtracted = real(lse_given)
                            p_scale = exp(real(np.float64(subtracted) - lse_given))
                            if not ahead == ahead:
                                p_scale = nan
                        own = zero
                        if labelled and live:
                            g = zero
                            if coefficients:
                                g = load_real(gamma + label * real_size)
                            if target_logit == m:
                                own = p_top * (below + (at - g) + slope) - p_others * (b + g)
                            else:
                                own = exp(target_logit - subtracted) * p_scale * alpha - (b + g)
                        weight = np.float64(alpha) * np.float64(p_scale)
                        if not coefficients:
                            weight = weight * factor
                        record = (
                            subtracted,
                            real(weight),
                            real(factor * np.float64(own)),
                            m,
                            real(factor),
                            b + below + slope,
                            at,
                            p_top,
                            p_others,
                            one if live else zero,
                        )
                    elif is_log:
                        record = (m, log1p_others, zero, nan, one, zero, zero, zero, zero, one)
                    else:
                        record = (m, p_top, zero, nan, one, zero, zero, zero, zero, one)
            if second and is_finish:
                if lane == 0 and active:
                    to = records + row * (RECORD * real_size + 8)
                    store_long(to, label)
                    for j in range(RECORD):
                        store_real(to + 8 + j * real_size, record[j])
            if is_second:
                to = records + row * (RECORD * real_size + 8)
                label = load_long(to)
                record = read_record(to + 8)

            # ---- the second pass ----
            if passes_second and active:
                out_row = row_address(out, shape, row) + begin * out[2]
                out_aligned = out_row + head * size
                place = label - begin if label >= 0 else np.int64(-1)
                if vector:
                    single = np.int64(lane)
                    while single < n_single:
                        k = single if single < head else n_vectors * width + single
                        x = read_one(source, k)
                        values = entry_of_one(record, x, read_gamma(gammas, k), place - k)
                        store_item(out_row + k * size, values[0])
                        single += team
                i, q = np.int64(lane), 0
                while i < n_vectors:
                    k = head + i * width
                    if vector:
                        if caches and q < cached and not skips:
                            words = kept_words(cache, q * 4 * BLOCK + cuda.threadIdx.x)
                        else:
                            words = load_words(aligned[0] + 16 * i)
                        values = entries_of_vector(
                            record, unpack_words(words), read_gamma_vector(gammas, k), place - k
                        )
                        store_words(out_aligned + 16 * i, pack_words(values))
                    else:
                        values = entry_of_one(record, read_one(source, i), read_gamma(gammas, i), place - i)
                        store_item(out_row + i * out[2], values[0])
                    i += team
                    q += 1
        if results != 0:
            total = sum_double(shared_double, total)
            counted = sum_integer(shared_integer, counted)
            first_bad = min_integer(shared_integer, first_bad)
            if cuda.threadIdx.x == 0:
                to = results + np.int64(cuda.blockIdx.x) * 24
                store_double(to, total)
                store_long(to + 8, counted)
                store_long(to + 16, first_bad)

    return rows
