"""How a team walks the classes of a row: reading, the pass for statistics, the pass that writes.

A row's place is (address, class stride, head, vectors, single): where classes are contiguous, `head` of them
come before the first multiple of 16 bytes, `vectors` whole sixteens follow, and the `single` ones are those
before and after. Other rows count their classes as vectors of one.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from logitloss._kernels.cuda_arrays import KINDS
from logitloss._kernels.cuda_device import geometry
from logitloss._kernels.cuda_figures import equals, position, positions
from logitloss._kernels.cuda_memory import (
    ITEM_BYTES,
    device,
    load,
    load_words,
    pack,
    store,
    store_words,
    unpack,
)
from logitloss._kernels.cuda_statistics import statistics
from logitloss._kernels.cuda_steps import BLOCK, WARP, gather, machine, smaller

FLOATS = KINDS[:4]
ZERO = np.int64(0)


class Rows(NamedTuple):
    """Which kernel over rows: each field is fixed when it is compiled."""

    item: str  # of the logits, and of what the second pass writes
    target: str  # "none", "labels", "weighted" (labels, and coefficients by class), or a float kind
    second: str  # "none", "grad", "softmax", "log_softmax"; "entropy" or "figures", which need no second pass
    stage: str  # "whole", "parts", "finish" or "second"
    team: int
    vector: bool
    known: bool = False  # lse is given

    @property
    def real(self) -> type:
        return np.float64 if self.item == "f64" else np.float32

    @property
    def real_kind(self) -> str:
        return "f64" if self.item == "f64" else "f32"

    @property
    def labelled(self) -> bool:
        return self.target in ("labels", "weighted")

    @property
    def soft(self) -> bool:
        return self.target in FLOATS

    @property
    def coefficients(self) -> bool:
        """Whether there is one for each class of a row."""
        return self.soft or self.target == "weighted"

    @property
    def writes_classes(self) -> bool:
        return self.second in ("grad", "softmax", "log_softmax")

    @property
    def statistics(self) -> str:
        if self.second in ("entropy", "figures"):
            return self.second
        return "coefficients" if self.coefficients else "plain"

    @property
    def width(self) -> int:
        """Classes in sixteen bytes, or one."""
        return 16 // ITEM_BYTES[self.item] if self.vector else 1

    @property
    def at_once(self) -> int:
        """How many loads come before the first use: 16 to 48 kB for a multiprocessor, as registers allow."""
        if self.item == "f64":
            return 2 if self.second == "grad" else 4
        return 2 if self.width == 8 and (self.second != "grad" or self.coefficients) else 4

    @property
    def cached(self) -> int:
        """Sixteens that a thread keeps in shared memory for the second pass."""
        caches = self.vector and self.writes_classes and self.stage == "whole"
        return geometry().cache_words // 4 if caches else 0

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds: the kernel may use 65536 / (256*resident) registers."""
        if self.second == "none" and self.item != "f64" and not self.coefficients:
            return 4
        if self.second == "figures":
            return 2 if self.item == "f64" else 3
        return 3 if self.item == "f32" and not self.coefficients and not self.known else 2


@device
def row_address(view, shape, row):
    """Return the address of a row of an array, or of an element."""
    offset = view[0]
    for axis in range(len(shape) - 1, -1, -1):
        if axis == 0:
            offset += row * view[3]
        else:
            before = row // shape[axis]
            offset += (row - before * shape[axis]) * view[3 + axis]
            row = before
    return offset


def placing(spec: Rows) -> Any:
    """Return a function (address, class stride, n) -> the place of so many classes."""
    width, vector = np.int64(spec.width), spec.vector
    by_size, by_width = ITEM_BYTES[spec.item].bit_length() - 1, spec.width.bit_length() - 1

    @device
    def place(address, stride, n):
        head, vectors, single = ZERO, n, ZERO
        if vector:
            head = smaller(n, ((16 - (address & 15)) & 15) >> by_size)
            vectors = (n - head) >> by_width
            single = n - vectors * width
        return address, stride, head, vectors, single

    return place


@functools.cache
def gammas(real_kind: str, target: str) -> Any:
    """Return a function (source, k) -> the coefficient of class k, in a tuple.

    A source is ((target's address, its class stride, weight's address), (target_scale, target_offset),
    (label, its logit, the next number above)).
    """
    real = np.float64 if real_kind == "f64" else np.float32
    size, zero = np.int64(ITEM_BYTES[real_kind]), real(0)
    load_real = load(real_kind, real)
    if target in FLOATS:
        # 1 - t of what float32 makes of t would be another number
        wide = np.float64 if target == "f64" else real
        load_target = load(target, wide)

        @device
        def soft_gamma(source, k):
            gamma = wide(source[1][0]) * load_target(source[0][0] + k * source[0][1]) + wide(source[1][1])
            if source[0][2] != 0:
                gamma = wide(load_real(source[0][2] + k * size)) * gamma
            return (real(gamma),)

        return soft_gamma
    if target == "weighted":

        @device
        def class_gamma(source, k):
            return (load_real(source[0][2] + k * size),)

        return class_gamma

    @device
    def no_gamma(source, k):
        return (zero,)

    return no_gamma


@functools.cache
def several_gammas(real_kind: str, target: str, width: int, at_once: int) -> Any:
    """Return a function (source, k, step) -> those of `at_once` runs of `width` classes, `step` apart."""
    real = np.float64 if real_kind == "f64" else np.float32
    if target in FLOATS or target == "weighted":
        run = gather(gammas(real_kind, target), width)

        @device
        def read_run(source, k):
            return run(source, k, 1)

        return gather(read_run, at_once)
    zeros = (real(0),) * (width * at_once)

    @device
    def no_gammas(source, k, step):
        return zeros

    return no_gammas


@functools.cache
def unpacking(item: str, n: int) -> Any:
    """Return a function of 4*n words to the numbers they hold."""
    real = np.float64 if item == "f64" else np.float32
    if n == 1:
        return unpack(item, real)
    left, right, half = unpacking(item, n // 2), unpacking(item, n - n // 2), n // 2 * 4

    @device
    def unpack_some(words):
        return left(words[:half]) + right(words[half:])

    return unpack_some


@functools.cache
def keeping(n: int) -> Any:
    """Return a function that writes n words to shared memory, each a block's threads apart."""
    if n == 1:

        @device
        def keep_one(cache, at, words):
            cache[at] = words[0]

        return keep_one
    left, right, half = keeping(n // 2), keeping(n - n // 2), n // 2

    @device
    def keep_some(cache, at, words):
        left(cache, at, words[:half])
        right(cache, at + half * BLOCK, words[half:])

    return keep_some


@device
def read_words(address, i):
    return load_words(address + 16 * i)


@device
def kept_words(cache, at):
    return cache[at], cache[at + BLOCK], cache[at + 2 * BLOCK], cache[at + 3 * BLOCK]


@functools.cache
def reading(item: str) -> Any:
    """Return a function ((address, class stride), k) -> the logit of class k, in a tuple."""
    load_item = load(item, np.float64 if item == "f64" else np.float32)

    @device
    def read_one(row, k):
        return (load_item(row[0] + k * row[1]),)

    return read_one


def first_pass(spec: Rows) -> Any:
    """Return a function (cache, place, source, thread) -> the statistics of a thread's classes."""
    team, vector, width, at_once, cached = spec.team, spec.vector, spec.width, spec.at_once, spec.cached
    size = np.int64(ITEM_BYTES[spec.item])
    is_figures = spec.second == "figures"
    together = is_figures and team > 1
    kept = statistics(spec.real, spec.statistics)
    start, push_one, push, push_all = (
        kept.start,
        kept.pushes(1),
        kept.pushes(width),
        kept.pushes(width, at_once, together),
    )
    read_one, read_gamma = reading(spec.item), gammas(spec.real_kind, spec.target)
    read_gammas = several_gammas(spec.real_kind, spec.target, width, 1)
    read_all_gammas = several_gammas(spec.real_kind, spec.target, width, at_once)
    if is_figures:
        read_gamma, read_gammas, read_all_gammas = position, positions, positions
    read_all, read_all_words = gather(read_one, at_once), gather(read_words, at_once)
    unpack_one, unpack_all = unpacking(spec.item, 1), unpacking(spec.item, at_once)
    keep, keep_all = keeping(4), keeping(4 * at_once)
    step = np.int64(team * width)

    @device
    def pass_once(cache, place, source, thread):
        address, stride, head, vectors, n_single = place
        state, row, lane = start(), (address, stride), thread & (team - 1)
        aligned = address + head * size
        single = np.int64(lane)
        while single < n_single:
            k = single if single < head else vectors * width + single
            state = push_one(state, read_one(row, k), read_gamma(source, k))
            single += team
        # q counts the thread's sixteens: the first ones stay in shared memory
        i, q = np.int64(lane), 0
        ahead = np.int64((at_once - 1) * team)
        if together:
            # as far as the warp's last thread is ahead, so that all go round as often
            ahead += WARP - 1 - thread % WARP
        while i + ahead < vectors:
            k = head + i * width
            if vector:
                words = read_all_words(aligned, i, team)
                if q < cached:
                    keep_all(cache, q * 4 * BLOCK + thread, words)
                state = push_all(state, unpack_all(words), read_all_gammas(source, k, step))
            else:
                state = push_all(state, read_all(row, i, team), read_all_gammas(source, k, step))
            i += at_once * team
            q += at_once
        while i < vectors:
            k = head + i * width
            if vector:
                words = read_words(aligned, i)
                if q < cached:
                    keep(cache, q * 4 * BLOCK + thread, words)
                state = push(state, unpack_one(words), read_gammas(source, k, step))
            else:
                state = push(state, read_one(row, i), read_gammas(source, i, step))
            i += team
            q += 1
        return state

    if not (is_figures and vector):
        return pass_once
    equals_before = equals(spec.item, team, width)

    @device
    def pass_with_equals(cache, place, source, thread):
        state = pass_once(cache, place, source, thread)
        return (*state[:-2], state[-2] + equals_before(place, source[2], thread), state[-1])

    return pass_with_equals


@functools.cache
def entry_of(real_kind: str, second: str, coefficients: bool) -> Any:
    """Return a function (record, logit, gamma, is the label's) -> what the second pass writes.

    A record: 0 subtracted from logits; 1 factor; 2 the label's entry; 3 m; 4 scale; 5 what weighs on the
    classes but m; 6 gamma at m; 7 p of m; 8 1 - p of m; 9 whether the row counts.
    """
    real = np.float64 if real_kind == "f64" else np.float32
    exp, zero = machine(real).exp, real(0)

    @device
    def log_softmax(record, x, gamma, is_label):
        return (x - record[0]) - record[1]

    @device
    def softmax(record, x, gamma, is_label):
        return exp(x - record[0]) * record[1]

    @device
    def slope(record, x, gamma, is_label):
        value = record[2] if is_label else exp(x - record[0]) * record[1]
        return value if record[9] != zero else zero

    @device
    def slope_of_coefficients(record, x, gamma, is_label):
        value = exp(x - record[0]) * record[1] - gamma
        if x == record[3]:
            value = record[7] * (record[5] + (record[6] - gamma)) - record[8] * gamma
        value = record[2] if is_label else value * record[4]
        return value if record[9] != zero else zero

    if second == "grad":
        return slope_of_coefficients if coefficients else slope
    return log_softmax if second == "log_softmax" else softmax


@functools.cache
def entries(entry: Any, first: int, n: int) -> Any:
    """Return a function of tuples: the entries of n classes, of which number `label` is the label."""
    if n == 1:

        @device
        def one_entry(record, x, gamma, label):
            return (entry(record, x[0], gamma[0], label == first),)

        return one_entry
    half = n // 2
    left, right = entries(entry, first, half), entries(entry, first + half, n - half)

    @device
    def some_entries(record, x, gamma, label):
        return left(record, x[:half], gamma[:half], label) + right(record, x[half:], gamma[half:], label)

    return some_entries


def second_pass(spec: Rows) -> Any:
    """Return a function that writes the entries of a thread's share of the classes.

    Its arguments: cache, whether the first pass filled it, place, gammas, address and class stride of the
    output, record, the label's class or less than 0, thread.
    """
    team, vector, width, cached = spec.team, spec.vector, spec.width, spec.cached
    size = np.int64(ITEM_BYTES[spec.item])
    read_one, read_gamma = reading(spec.item), gammas(spec.real_kind, spec.target)
    read_gammas = several_gammas(spec.real_kind, spec.target, width, 1)
    entry = entry_of(spec.real_kind, spec.second, spec.coefficients)
    entry_of_one, entries_of_all = entries(entry, 0, 1), entries(entry, 0, width)
    store_item, unpack_one, pack_one = store(spec.item, spec.real), unpacking(spec.item, 1), pack(spec.item)

    @device
    def write(cache, filled, place, source, out, out_stride, record, label, thread):
        address, stride, head, vectors, n_single = place
        row, lane = (address, stride), thread & (team - 1)
        aligned, out_aligned = address + head * size, out + head * size
        single = np.int64(lane)
        while single < n_single:
            k = single if single < head else vectors * width + single
            values = entry_of_one(record, read_one(row, k), read_gamma(source, k), label - k)
            store_item(out + k * out_stride, values[0])
            single += team
        i, q = np.int64(lane), 0
        while i < vectors:
            k = head + i * width
            if vector:
                if q < cached and filled:
                    words = kept_words(cache, q * 4 * BLOCK + thread)
                else:
                    words = read_words(aligned, i)
                values = entries_of_all(record, unpack_one(words), read_gammas(source, k, 1), label - k)
                store_words(out_aligned + 16 * i, pack_one(values))
            else:
                values = entry_of_one(record, read_one(row, i), read_gamma(source, i), label - i)
                store_item(out + i * out_stride, values[0])
            i += team
            q += 1

    return write
