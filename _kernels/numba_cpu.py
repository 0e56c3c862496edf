"""The Numba backend on the processor: describes a call as a job and shares its blocks among threads.

Kernels are compiled for the kind of the logits' items when one is first asked for, and kept on disk. Each
does one block of a job (`numba_job`); blocks depend on shapes alone, and what they found is added in order:
so the result does not depend on the number of threads. `numba_rows` has rows of many classes, `numba_lanes`
short rows and rows side by side, `numba_elements` what has no classes. What the methods mean stands in the
contract, `__init__.py`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import itertools
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from llvmlite import ir
from logitloss._kernels import numba_elements, numba_lanes, numba_rows
from logitloss._kernels.numba_job import (
    BCE,
    BCE_WITH_LOGITS,
    ENTROPY,
    FOUND,
    GRADIENT,
    KERNEL,
    KL_DIV,
    KL_DIV_LOG_TARGET,
    LABELS,
    LOG_SIGMOID,
    LOG_SOFTMAX,
    NO_TARGET,
    NOTHING,
    PROBABILITIES,
    SIGMOID,
    SOFTMAX,
    Job,
    item_of,
    real_coefficients,
)
from numba import njit, prange, types
from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]

# What so many blocks found takes 1.5 MB, whatever the size of the batch.
ROUND_BLOCKS = 1 << 16
# How often a thread comes back for more blocks (as in cython_cpu.pyx)
TURNS = 64
# Labels alone: some microseconds' work
BLOCK_LABELS = 4096
PAGE = 4096
_NOTHING_FOUND = np.array((0.0, 0, -1), FOUND)


# ---- compiled kernels ----


@functools.cache
def _digest() -> str:
    """Return what tells these sources from others: a kernel is inlined from several files."""
    here = Path(__file__).parent
    names = ("vectors.py", "elementary.py", "recurrence.py", *sorted(p.name for p in here.glob("numba_*.py")))
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()


class _KernelCache(FunctionCache):
    """Numba's cache on disk, where a kernel goes by its name and the digest of all that it is made from."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self._kernel_name = name
        super().__init__(function)

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return sig, codegen.magic_tuple(), self._kernel_name, _digest()


class Kernel:
    """A kernel compiled, or from the disk if it has been before; other functions of Numba's can call it."""

    def __init__(self, function: Callable[..., None], name: str) -> None:
        self.function = njit(error_model="numpy", no_cpython_wrapper=True)(function)
        with contextlib.suppress(RuntimeError):  # no folder that can be written
            self.function._cache = _KernelCache(function, name)
        with global_compiler_lock:
            # Functions made for another type differ by a number alone, counted from 1 in each process: one
            # from the disk would stand for one compiled here. So each kernel counts from a place of its own.
            counted = FunctionIdentity._unique_ids
            first = hashlib.sha256(f"{name} {_digest()}".encode()).hexdigest()[:12]
            FunctionIdentity._unique_ids = itertools.count(int(first, 16))
            try:
                self.function.compile(KERNEL)
            finally:
                FunctionIdentity._unique_ids = counted
        compiled = self.function.overloads[KERNEL.args]
        self.address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_cfunc_wrapper_name)


@functools.cache
def kernel(module: str, name: str, item: str) -> Kernel:
    """Return the kernel of that name for such logits."""
    made = importlib.import_module(f"logitloss._kernels.{module}").kernels(item)
    return Kernel(getattr(made, name), f"{module}.{name}.{item}")


# ---- threads ----


@intrinsic
def _call(typingctx: Any, kernel: Any, job: Any, block: Any, scratch: Any, found: Any) -> Any:
    """Call a compiled kernel by its address."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer, integer = ir.IntType(8).as_pointer(), ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [pointer, integer, integer, pointer])
        called = builder.inttoptr(args[0], function.as_pointer())
        ends = (builder.inttoptr(args[i], pointer) for i in (1, 4))
        builder.call(called, [next(ends), args[2], args[3], next(ends)])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate


@intrinsic
def _take(typingctx: Any, taken: Any, some: Any) -> Any:
    """Add `some` to the integer at the address `taken`, at once for all threads; return what it was."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, args[1], "monotonic")

    return types.intp(types.intp, types.intp), generate


def _share(kernel, job, first, n, scratch, scratch_bytes, found, found_bytes, n_threads, taken, turn):
    """Do n blocks: a thread takes some whenever it is free, as one may be slower than another."""
    for t in prange(n_threads):
        start = _take(taken, turn)
        while start < n:
            for b in range(start, min(start + turn, n)):
                _call(kernel, job, first + b, scratch + t * scratch_bytes, found + b * found_bytes)
            start = _take(taken, turn)


_SIGNATURE = types.void(*[types.intp] * 11)


@functools.cache
def _sharer(parallel: bool) -> Any:
    """Return `_share` with threads or without: on the disk, Numba itself would take one for the other."""
    share = njit(parallel=parallel, nogil=True)(_share)
    with contextlib.suppress(RuntimeError):  # no folder that can be written
        share._cache = _KernelCache(_share, f"share, parallel={parallel}")
    share.compile(_SIGNATURE)
    return share


@functools.cache
def threading_layer() -> str:
    """Return the name of the layer that Numba's threads are on; starts them."""
    numba.get_num_threads()
    return str(numba.threading_layer())


_alone = threading.Lock()


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    """Give this thread's parallel loops n threads, and what it had before afterwards.

    Numba's own layer of last resort ends the process when two threads of Python use it at once.
    """
    before = numba.get_num_threads()
    with _alone if threading_layer() == "workqueue" else contextlib.nullcontext():
        numba.set_num_threads(n)
        try:
            yield
        finally:
            numba.set_num_threads(before)


def run(
    kernel: Kernel, job: Job, scratch_bytes: int, num_threads: int, n_blocks: int | None = None
) -> tuple[float, int, int]:
    """Run all blocks, ROUND_BLOCKS at a time; return total, number counted, and the first bad one or -1."""
    if n_blocks is None:
        n_blocks = -(-job.numbers["n"] // job.numbers["block"])
    n_threads = max(1, min(num_threads, n_blocks, numba.config.NUMBA_NUM_THREADS))
    scratch_bytes = -(-scratch_bytes // PAGE) * PAGE
    record, memory = job.record(), np.empty(n_threads * scratch_bytes + PAGE, np.uint8)
    scratch = -(-memory.ctypes.data // PAGE) * PAGE
    total, counted = 0.0, 0
    for first in range(0, n_blocks, ROUND_BLOCKS):
        n = min(ROUND_BLOCKS, n_blocks - first)
        found, taken = np.full(n, _NOTHING_FOUND), np.zeros(1, np.int64)
        args = (kernel.address, record.ctypes.data, first, n, scratch, scratch_bytes, found.ctypes.data)
        if n_threads == 1 or n == 1:
            _sharer(parallel=False)(*args, FOUND.itemsize, 1, taken.ctypes.data, n)
        else:
            turn = max(1, n // (TURNS * n_threads))
            with _threads(n_threads):
                _sharer(parallel=True)(*args, FOUND.itemsize, n_threads, taken.ctypes.data, turn)
        total += float(found["total"].sum())
        counted += int(found["counted"].sum())
        bad = found["bad"]
        if bad.max() >= 0:
            return total, counted, int(bad[bad >= 0][0])
    return total, counted, -1


# ---- the contract's operations ----

name = "numba"

# A second pass writes around the cache when its output is larger than any cache.
STREAM_FROM = 1 << 25


def ignored_label(target: Array, ignore_index: int) -> int:
    """Return the label to ignore: for unsigned ones never the lowest integer, which stands for 2**63 on."""
    return -1 if ignore_index == -(2**63) and target.dtype.kind == "u" else ignore_index


def label_weight(
    target: Array, weight: Array | None, ignore_index: int, n_classes: int, num_threads: int
) -> tuple[float, int]:
    job = Job(
        n=target.size,
        n_classes=n_classes,
        ignore_index=ignored_label(target, ignore_index),
        block=BLOCK_LABELS,
    )
    job.describe("target", target)
    job.point_to("beta", weight)
    total, _, bad = run(kernel("numba_labels", "label_weight", "f32"), job, 0, num_threads)
    return total, bad


def nll(
    log_probabilities: Array,
    target: Array,
    ignore_index: int,
    weight: Array | None,
    loss: Array | None,
    num_threads: int,
) -> tuple[float, int, int]:
    n_classes = log_probabilities.shape[-1]
    job = Job(
        n=target.size,
        n_classes=n_classes,
        ignore_index=ignored_label(target, ignore_index),
        block=BLOCK_LABELS,
    )
    job.describe("logits", log_probabilities, has_classes=True)
    job.describe("target", target)
    job.describe("loss", loss)
    job.point_to("beta", weight)
    return run(kernel("numba_labels", "nll", item_of(log_probabilities)), job, 0, num_threads)


def cross_entropy(
    logits: Array,
    target: Array,
    ignore_index: int,
    beta: Array | None,
    gamma: Array | None,
    z_loss: float,
    scale: Array | float,
    lse_in: Array | None,
    loss: Array | None,
    lse: Array | None,
    figures: Array | None,
    grad: Array | None,
    num_threads: int,
) -> tuple[float, int, int]:
    # Summed as they are used, so that the sum without one class is that of the others.
    gamma = None if gamma is None else real_coefficients(gamma, logits)
    job = Job(
        operation=NOTHING if grad is None else GRADIENT,
        target_kind=LABELS,
        ignore_index=ignored_label(target, ignore_index),
        gamma_sum=0.0 if gamma is None else gamma.sum(dtype=np.float64),
        z_loss=z_loss,
    )
    job.describe("target", target)
    job.point_to("beta", beta)
    job.point_to("gamma", gamma)
    job.describe_number_or_array("scale", scale)
    job.describe("lse_in", lse_in if loss is None and lse is None else None)
    job.describe("loss", loss)
    job.describe("lse", lse)
    job.point_to("figures", figures)
    return _run_softmax(job, logits, grad, num_threads)


def soft_cross_entropy(
    logits: Array,
    target: Array,
    weight: Array | None,
    target_scale: float,
    target_offset: float,
    z_loss: float,
    scale: Array | float,
    lse_in: Array | None,
    loss: Array | None,
    lse: Array | None,
    grad: Array | None,
    num_threads: int,
) -> float:
    job = Job(
        operation=NOTHING if grad is None else GRADIENT,
        target_kind=PROBABILITIES,
        target_scale=target_scale,
        target_offset=target_offset,
        z_loss=z_loss,
    )
    job.describe("target", target, has_classes=True)
    job.point_to("gamma", weight if weight is None else real_coefficients(weight, logits))
    job.describe_number_or_array("scale", scale)
    job.describe("lse_in", lse_in if loss is None and lse is None else None)
    job.describe("loss", loss)
    job.describe("lse", lse)
    return _run_softmax(job, logits, grad, num_threads)[0]


def logsumexp(logits: Array, lse: Array, num_threads: int) -> None:
    job = Job(operation=NOTHING, target_kind=NO_TARGET)
    job.describe("lse", lse)
    _run_softmax(job, logits, None, num_threads)


def softmax(logits: Array, out: Array, log: bool, num_threads: int) -> None:
    job = Job(operation=LOG_SOFTMAX if log else SOFTMAX, target_kind=NO_TARGET)
    _run_softmax(job, logits, out, num_threads)


def entropy(logits: Array, out: Array, num_threads: int) -> None:
    job = Job(operation=ENTROPY, target_kind=NO_TARGET)
    _run_softmax(job, logits, out, num_threads)


def _run_softmax(job: Job, logits: Array, out: Array | None, num_threads: int) -> tuple[float, int, int]:
    numbers, n_classes = job.numbers, logits.shape[-1]
    operation, n_rows = numbers["operation"], logits.size // n_classes
    numbers["n_classes"], numbers["n"] = n_classes, n_rows
    job.describe("logits", logits, has_classes=True)
    job.describe("out", out, has_classes=operation != ENTROPY)
    item = item_of(logits)
    row_bytes = n_classes * max(4, logits.itemsize)
    numbers["streams"] = out is not None and n_rows * row_bytes >= STREAM_FROM
    size, width = 8 if item == "f64" else 4, logits.itemsize
    are_beside = job.last_stride("logits") == width != logits.strides[-1]
    numbers["block"], scratch_bytes = numba_lanes.plan(n_rows, n_classes, size, width, are_beside)
    block_name = "figures_block" if numbers["figures"] else "softmax_block"
    if scratch_bytes:
        return run(kernel("numba_lanes", block_name, item), job, scratch_bytes, num_threads)
    has_lse = "lse_in" in job.views
    block, keeps, scratch_bytes = numba_rows.plan(operation, n_rows, n_classes, size, width, has_lse)
    numbers["block"], numbers["keeps"] = block, keeps
    if numba_rows.has_parts(n_rows, n_classes):
        return _run_parts(job, item, scratch_bytes, num_threads)
    return run(kernel("numba_rows", block_name, item), job, scratch_bytes, num_threads)


def _run_parts(job: Job, item: str, scratch_bytes: int, num_threads: int) -> tuple[float, int, int]:
    """Share few long rows among the threads: sums of parts, rows' losses, results of parts."""
    numbers = job.numbers
    n_rows, n_parts = numbers["n"], numba_rows.n_parts_of(numbers["n_classes"])
    numbers["block"], numbers["keeps"] = 1, False
    job.point_to("parts", np.empty(n_rows * (n_parts + 1) * numba_rows.ROW_BYTES, np.uint8))

    def each(name: str, n_blocks: int, num_threads: int) -> tuple[float, int, int]:
        return run(kernel("numba_rows", name, item), job, scratch_bytes, num_threads, n_blocks)

    sums, rows = ("figures_part", "figures_block") if numbers["figures"] else ("part_sums", "softmax_block")
    each(sums, n_rows * n_parts, num_threads)
    found = each(rows, n_rows, 1)  # sooner done than threads woken
    if found[2] < 0 and numbers["operation"] not in (NOTHING, ENTROPY):
        each("part_results", n_rows * n_parts, num_threads)
    return found


def binary_cross_entropy_with_logits(
    logits: Array,
    target: Array,
    weight: Array | None,
    pos_weight: Array | None,
    label_smoothing: float,
    signed: bool,
    scale: Array | float,
    loss: Array | None,
    grad: Array | None,
    num_threads: int,
) -> tuple[float, int]:
    job = Job(operation=BCE_WITH_LOGITS, signed=signed, label_smoothing=label_smoothing)
    job.describe("weight", weight)
    job.describe("pos_weight", pos_weight)
    job.describe_number_or_array("scale", scale)
    return _run_elements(job, logits, target, loss, grad, num_threads)


def binary_cross_entropy(
    probabilities: Array, target: Array, weight: Array | None, loss: Array | None, num_threads: int
) -> tuple[float, int]:
    job = Job(operation=BCE)
    job.describe("weight", weight)
    return _run_elements(job, probabilities, target, loss, None, num_threads)


def kl_div(
    log_probabilities: Array, target: Array, log_target: bool, loss: Array | None, num_threads: int
) -> float:
    job = Job(operation=KL_DIV_LOG_TARGET if log_target else KL_DIV)
    return _run_elements(job, log_probabilities, target, loss, None, num_threads)[0]


def sigmoid(logits: Array, out: Array, log: bool, num_threads: int) -> None:
    _run_elements(Job(operation=LOG_SIGMOID if log else SIGMOID), logits, None, None, out, num_threads)


def _run_elements(
    job: Job, x: Array, target: Array | None, loss: Array | None, out: Array | None, num_threads: int
) -> tuple[float, int]:
    # In double where the target is: a label near 1 must not be rounded before 1 - y is taken.
    is_double = x.dtype == np.float64 or (target is not None and target.dtype == np.float64)
    numbers, item = job.numbers, "f64" if is_double else "f32"
    numbers["n"] = x.size
    job.describe("logits", x)
    job.describe("target", target)
    job.describe("loss", loss)
    job.describe("out", out)
    numbers["streams"] = out is not None and out.size * max(4, x.itemsize) >= STREAM_FROM
    numbers["block"], scratch_bytes = numba_elements.plan(8 if is_double else 4)
    if numbers["operation"] == BCE_WITH_LOGITS:
        name = "bce" if out is None else "bce_fused"
    else:
        name = {SIGMOID: "sigmoid", LOG_SIGMOID: "log_sigmoid"}.get(numbers["operation"], "probability")
    total, _, bad = run(kernel("numba_elements", name, item), job, scratch_bytes, num_threads)
    return total, bad
