"""What the benchmarks share: the parameters, the inputs, and the ratio of two times.

asv runs each combination of parameters in a process of its own, and asv-runner runs `setup` again before each
timed call, so inputs are made once a process by cached functions, which `setup` calls ahead of the clock.
"""

import functools
import math
import os
from time import perf_counter, sleep

import numpy as np

import logitloss

from . import limits

PARAM_NAMES = ("backend", "dtype", "shape", "threads")
# Those that run here, best first. The names say the instruction set, so a series never mixes two.
BACKENDS = tuple(
    name
    for name in ("cython-avx512", "cython-avx2", "cython-baseline", "numba", "cuda", "reference")
    if logitloss.backends().get(name, "unknown") is None
)
DTYPES = ("float32", "bfloat16")
# The first fits the second cache (what lies in a cache that is shared swings with the neighbours); the others
# are half a gigabyte of float32 in long and middling rows, less in short.
SHAPES = ("128x1000", "1024x131072", "131072x1000", "4000000x10")
ELEMENTS = ("1048576", "67108864")
THREADS = (1, "all")
# Threads of an OpenMP or Eigen pool spin for a while after their work; who is next waits that out.
PAUSE = 0.01
LEAST_ROUNDS = 5
QUIET_SECONDS = 0.2
PATIENCE = 10.0
TURNS = 3
LINE = 64
# Seconds: who has taken as many in all has had enough turns.
ENOUGH = 1.0


class BoundByMemory:
    """Parameters and settings of a benchmark whose limit is a pass over memory."""

    params = (BACKENDS, DTYPES, SHAPES, THREADS)
    param_names = PARAM_NAMES
    version = "5"
    timeout = 300
    rounds = 1
    repeat = (3, 10, 2.0)

    def setup(self, backend, dtype, shape, threads):
        if backend == "reference" and shape != self.params[2][0]:
            raise NotImplementedError("NumPy takes seconds and gigabytes; the small shape tells enough")
        self.call(backend, dtype, shape, threads)


def paired_ratio(ours, others, threads):
    """Return our time over that of the fastest of the others, each ratio taken within one round.

    A processor's other hyperthread may belong to a neighbour, who slows arithmetic more than reading, for
    milliseconds or seconds: as long as there is patience, only rounds without one count, and of these the
    fastest tenth. The others are manners of one thing: the highest of the median ratios is that to the
    fastest manner. It is returned as a sample in asv's sense: where it runs several times, each in a process
    of its own, asv compares two commits by the spread, as it does with times.
    """
    contenders = (ours, *others)
    for contender in contenders:
        contender()
    rounds, quiet, quiet_seconds = [], [], 0.0
    give_up = perf_counter() + PATIENCE
    was_quiet = limits.are_quiet(threads)
    while quiet_seconds < QUIET_SECONDS or len(quiet) < LEAST_ROUNDS:
        if perf_counter() > give_up and len(rounds) >= LEAST_ROUNDS:
            break
        rounds.append([elapsed(contender) for contender in contenders])
        is_quiet = limits.are_quiet(threads)
        if was_quiet and is_quiet:
            quiet.append(rounds[-1])
            quiet_seconds += sum(rounds[-1])
        was_quiet = is_quiet
    counted = sorted(quiet if len(quiet) >= LEAST_ROUNDS else rounds, key=sum)
    times = np.array(counted[: max(LEAST_ROUNDS, len(counted) // 10)])
    ratio = float(np.median(times[:, :1] / times[:, 1:], axis=0).max())
    return {"samples": [ratio], "number": 1}


def take_turns(calls, rounds):
    """Return the times of each call by its name: of each round those of a few turns.

    The fastest of a round's turns is without a neighbour. The slow ones miss later turns, and rounds: who is
    compared with them has as many turns.
    """
    times = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for _ in range(rounds):
        turns = {}
        for _ in range(TURNS):
            for name, call in calls.items():
                if spent[name] < ENOUGH:
                    sleep(PAUSE)
                    seconds = elapsed(call)
                    spent[name] += seconds
                    turns.setdefault(name, []).append(seconds)
        for name, of_round in turns.items():
            times[name].append(of_round)
    return times


def elapsed(call):
    start = perf_counter()
    call()
    return perf_counter() - start


def thread_count(threads):
    """Return the number that "all" stands for: the processors this process may use."""
    if threads != "all":
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def sizes(shape):
    return tuple(int(size) for size in shape.split("x"))


def dtype_of(name):
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


@functools.cache
def logits(dtype, shape):
    return read_only(repeated(3 * random_block(), dtype, shape))


@functools.cache
def labels(shape):
    """Return a class per row."""
    n_rows, n_classes = sizes(shape)
    return read_only(np.random.default_rng(1).integers(0, n_classes, n_rows))


@functools.cache
def binary_labels(dtype, shape):
    """Return a label per element, 0 or 1, in the logits' dtype."""
    return read_only(repeated(random_block() > 0, dtype, shape))


@functools.cache
def gradient(dtype, shape):
    """Return the array that gradients go to."""
    out = aligned(dtype_of(dtype), sizes(shape))
    out[...] = 0
    return out


@functools.cache
def random_block():
    return np.random.default_rng(0).standard_normal(1_000_003, np.float32)


def repeated(block, dtype, shape):
    """Return an array of the block over and over: half a gigabyte of random numbers would take its time."""
    array = aligned(dtype_of(dtype), sizes(shape))
    flat, block = array.reshape(-1), block.astype(array.dtype)
    for start in range(0, flat.size, block.size):
        part = flat[start : start + block.size]
        part[:] = block[: part.size]
    return array


def aligned(dtype, shape):
    """Return an array that starts at a cache line: a read is then 1.6 times as fast, and it is luck else."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def read_only(array):
    array.flags.writeable = False
    return array
