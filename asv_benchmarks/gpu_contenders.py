"""How each library does the works of gpu.py on arrays of the device, and how their time is taken.

Memory is the package's own; `tensor` is PyTorch's view of it. A peer's maker takes a task and returns a
function of no arguments, or raises where its library is missing or has no such function. Each call is timed
by events, after a copy that takes the batch out of the cache and, meanwhile, lets the host get ahead.
"""

import ctypes
import functools
import math
from dataclasses import dataclass
from time import perf_counter

import ml_dtypes
import numpy as np
from logitloss._kernels import cuda_device
from logitloss._kernels.cuda_arrays import DeviceArray

import logitloss as ll
from logitloss import _backends, _dlpack
from logitloss._device import CudaArray

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
COPY, OURS = "copy", "logitloss"
CALLS = {
    "cross-entropy": "cross_entropy",
    "cross-entropy and gradient": "cross_entropy_value_and_grad",
    "BCE and gradient": "binary_cross_entropy_with_logits_value_and_grad",
    "softmax": "softmax",
}
FIGURES = "cross-entropy and figures"
# Random numbers on the host, of which a batch is made of copies.
BLOCK = 1 << 22


# ---- arrays ----


def on_device(array):
    """Return NumPy's array on the device."""
    return taken(DeviceArray.from_host(array))


def taken(memory):
    """Return memory of the device as an array that any library takes."""
    told = _dlpack.Described(memory.address, memory.dtype, memory.shape, memory.strides, -1, "")
    return CudaArray(None, told, memory.owner, True)


def new(shape, dtype):
    return taken(DeviceArray.empty(shape, dtype))


def repeated(block, shape):
    """Return an array of the device filled with copies of a block of the host."""
    array, n_bytes = new(shape, block.dtype), math.prod(shape) * block.itemsize
    device = cuda_device.get()
    for start in range(0, n_bytes, block.nbytes):
        part = block.view(np.uint8)[: n_bytes - start]
        device.to_device(array.address + start, part, 0)
        device.synchronize(0)
    return array


def on_host(array):
    return DeviceArray(array.address, array.dtype, array.shape).to_host()


def number(value):
    return float(value if isinstance(value, float) else on_host(value))


@dataclass
class Task:
    """A work with its arrays."""

    work: object
    logits: object
    target: object
    out: object
    host_logits: np.ndarray  # the first rows, as far as a block goes
    host_target: np.ndarray | None

    @classmethod
    @functools.lru_cache(maxsize=1)
    def of(cls, work):
        dtype, shape = DTYPES[work.dtype], work.shape
        rng = np.random.default_rng(0)
        n = min(math.prod(shape), BLOCK)
        block = rng.standard_normal(n, np.float32).astype(dtype)
        logits, target, host_target = repeated(block, shape), None, None
        if work.loss == "BCE and gradient":
            labels = (rng.random(n, np.float32) < 0.5).astype(dtype)
            target, host_target = repeated(labels, shape), labels
        elif work.loss != "softmax":
            host_target = rng.integers(0, shape[1], shape[0])
            target = on_device(host_target)
        out = None if work.loss in ("cross-entropy", FIGURES) else new(shape, dtype)
        small = math.prod(shape) <= BLOCK
        if host_target is not None and host_target.dtype == dtype:
            host_target = host_target.astype(np.float64).reshape(shape) if small else None
        return cls(work, logits, target, out, block.reshape(shape) if small else block, host_target)

    @property
    def bytes(self):
        return self.logits.nbytes


def call_of(loss):
    return with_figures if loss == FIGURES else getattr(ll, CALLS[loss])


def with_figures(logits, target, out=None, backend="cuda"):
    """Return the mean and the rows' figures, which no public function gives of arrays of the device."""
    kernels = _backends.get(backend)
    figures = np.empty((len(target), 5)) if out is None else out
    arguments = (logits, target, -100, None, None, 0.0, 1.0, None, None, None, figures, None, 1)
    total, counted, _ = kernels.cross_entropy(*arguments)
    return (total / counted if out is None else kernels.divide(total, counted)), figures


# ---- contenders ----


def copy(task):
    """Copy the batch: the limit. Where a work writes nothing, to memory that is there for this alone."""
    there = task.out if task.out is not None else new(task.work.shape, task.logits.dtype)
    return functools.partial(copy_bytes, there.address, task.logits.address, task.bytes)


def copy_bytes(there, here, n_bytes):
    if cuda_device.is_simulated():
        ctypes.memmove(there, here, n_bytes)
    else:
        cuda_device.get()._driver.cuMemcpyDtoDAsync(there, here, n_bytes, 0)


def ours(task):
    """Return logitloss' function, whose labels are looked at after the round."""
    function, loss = call_of(task.work.loss), task.work.loss
    if loss == "softmax":
        return lambda: (0.0, function(task.logits, out=task.out))
    if loss == "cross-entropy":
        return lambda: (function(task.logits, task.target, check="deferred"), None)
    if loss == FIGURES:
        logits, target = (DeviceArray(x.address, x.dtype, x.shape) for x in (task.logits, task.target))
        figures = DeviceArray.empty((task.work.shape[0], 5), np.float64)
        return lambda: function(logits, target, figures)
    options = {"check": "deferred"} if loss.startswith("cross") else {}
    return lambda: function(task.logits, task.target, out=task.out, **options)


def tensor(array):
    """Return PyTorch's view of an array."""
    import torch

    if not cuda_device.is_simulated():
        return torch.from_dlpack(array)
    here = array.shadow()
    is_bfloat16 = array.dtype.name == "bfloat16"
    view = torch.from_numpy(here.view(np.int16) if is_bfloat16 else here)
    return view.view(torch.bfloat16) if is_bfloat16 else view


def with_torch(task, prepare=lambda function: function):
    import torch
    from torch.nn import functional

    if not (torch.cuda.is_available() or cuda_device.is_simulated()):
        raise NotImplementedError("PyTorch has no device")
    x, y = tensor(task.logits), None if task.target is None else tensor(task.target)
    if task.work.loss == "softmax":
        softmax = prepare(functools.partial(torch.softmax, dim=1))
        return lambda: softmax(x)
    is_binary = task.work.loss.startswith("BCE")
    loss = prepare(functional.binary_cross_entropy_with_logits if is_binary else functional.cross_entropy)
    if task.work.loss == "cross-entropy":

        def value():
            with torch.no_grad():
                return loss(x, y)

        return value
    leaf = x.detach().requires_grad_()

    def value_and_grad():
        result = loss(leaf, y)
        return result.detach(), torch.autograd.grad(result, leaf)

    return value_and_grad


def with_torch_compile(task):
    import torch

    if not task.work.compiled:
        raise NotImplementedError("no time to compile this one")
    torch.compiler.reset()
    return with_torch(task, lambda function: torch.compile(function, dynamic=False))


def with_liger(task):
    """Liger's kernel writes the gradient over the logits, whether it is wanted or not."""
    from liger_kernel.transformers.functional import liger_cross_entropy

    if not task.work.loss.startswith("cross"):
        raise NotImplementedError("has no such function")
    x, y = tensor(task.logits).clone().requires_grad_(task.work.loss != "cross-entropy"), tensor(task.target)
    logits = x.detach()

    def value():
        return liger_cross_entropy(logits, y)

    def value_and_grad():
        import torch

        result = liger_cross_entropy(x, y)
        return result.detach(), torch.autograd.grad(result, x)

    return value if task.work.loss == "cross-entropy" else value_and_grad


def with_triton(task):
    """A softmax of one program a row, as Triton's tutorial has it."""
    if task.work.loss != "softmax":
        raise NotImplementedError("a softmax alone")
    from triton_softmax import softmax

    x, out = tensor(task.logits), tensor(new(task.work.shape, task.logits.dtype))
    return lambda: softmax(x, out)


PEERS = {
    "torch.compile": with_torch_compile,
    "torch": with_torch,
    "Liger-Kernel": with_liger,
    "Triton": with_triton,
}


def without_figures(task):
    return lambda: ll.cross_entropy(task.logits, task.target, check="deferred")


def peers_of(loss):
    return {"without figures": without_figures} if loss == FIGURES else PEERS


# ---- time ----


class _HostEvent:
    def record(self):
        self.time = perf_counter()

    def elapsed_time(self, later):
        return 1e3 * (later.time - self.time)


def event():
    if cuda_device.is_simulated():
        return _HostEvent()
    from numba import cuda

    return cuda.event()


def milliseconds(first, second):
    if cuda_device.is_simulated():
        return first.elapsed_time(second)
    from numba import cuda

    return cuda.event_elapsed_time(first, second)


def take_turns(calls, rounds, flush_bytes):
    """Return the seconds of each call in each round; the order changes with the round."""
    device, times = cuda_device.get(), {name: [] for name in calls}
    here, there = new((flush_bytes,), np.uint8), new((flush_bytes,), np.uint8)
    names = list(calls)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start, end = event(), event()
            copy_bytes(there.address, here.address, flush_bytes)
            start.record()
            calls[name]()
            end.record()
            device.synchronize(0)
            times[name].append(milliseconds(start, end) / 1e3)
        ll.raise_deferred()
    return times


def overhead(n_calls):
    """Return microseconds of a call on a small batch, by library and by what is done about bad labels."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, 10), np.float32), rng.integers(0, 10, 32)
    found = {}
    for library, to_device in LIBRARIES.items():
        try:
            arrays = to_device(x), to_device(y)
        except Exception:  # not installed, or without a device
            continue
        for check in ("raise", "deferred"):
            call = functools.partial(ll.cross_entropy, *arrays, check=check)
            call()
            ll.raise_deferred()
            n = min(n_calls, 500)
            taken_by_rounds = []
            for _ in range(max(1, n_calls // n)):
                start = perf_counter()
                for _ in range(n):
                    call()
                taken_by_rounds.append((perf_counter() - start) / n)
                ll.raise_deferred()
            found[f"{library}, {check}"] = 1e6 * min(taken_by_rounds)
    return found


def _to_cupy(array):
    import cupy

    return cupy.asarray(array)


def _to_torch(array):
    import torch

    return torch.from_numpy(array).cuda()


def _to_numba(array):
    from numba import cuda

    return cuda.to_device(array)


LIBRARIES = {"CuPy": _to_cupy, "torch": _to_torch, "numba": _to_numba, "no library": on_device}


def device_name():
    if cuda_device.is_simulated():
        return "Numba's simulator"
    from numba import cuda

    name = cuda.current_context().device.name
    return name.decode() if isinstance(name, bytes) else str(name)
