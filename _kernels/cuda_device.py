"""The device and its driver: memory, copies, streams, launches; or the simulator in their place.

`get` returns the one device of the process; `check` says cheaply whether there is one. With Numba's
simulator (NUMBA_ENABLE_CUDASIM=1) an address is one of the host, a copy is a copy, streams are all the same,
and the geometry is small, because each CUDA thread is a thread of Python.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import warnings
from typing import Any, NamedTuple

import numpy as np


class Geometry(NamedTuple):
    """How many threads share what."""

    block: int  # threads of a block
    warp: int  # threads of a warp
    cache_words: int  # of 32 bits a thread keeps in shared memory
    short_row: int  # up to so many classes a thread takes a row alone
    warp_row: int  # up to so many classes a warp takes a row, beyond it a block
    part_classes: int  # of a row that is shared among blocks
    many_rows: int  # from so many rows for each multiprocessor threads take a row each, if that joins loads


# 32 words of 256 threads are 32 kB of the 48 that a kernel may declare; the rest is left to the cache.
GEOMETRY = Geometry(256, 32, 32, 24, 2048, 1 << 15, 2048)
# What kernels are made of begins there: a maximum that keeps NaN.
LEAST_CAPABILITY = (8, 0)
COMPUTE_CAPABILITY = (75, 76)  # the driver's numbers of its two attributes
SIMULATED = Geometry(4, 2, 32, 8, 64, 128, 8)


def is_simulated() -> bool:
    """Whether Numba runs kernels on its simulator."""
    from numba.cuda.core import config

    return bool(config.ENABLE_CUDASIM)


@functools.cache
def geometry() -> Geometry:
    """Return the geometry kernels are made for."""
    return SIMULATED if is_simulated() else GEOMETRY


def check() -> None:
    """Raise ImportError, in the driver's own words, where kernels cannot run; Numba is not imported."""
    if importlib.util.find_spec("numba_cuda") is None:
        raise ImportError(
            "backend 'cuda' is missing: it needs numba-cuda; install it by "
            "`pip install 'logitloss[cuda12]'`, or 'logitloss[cuda13]' for a driver of CUDA 13"
        )
    if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        return
    words = _drivers_words()
    if words:
        raise ImportError(f"backend 'cuda' is missing: no device can be used ({words})")


def _drivers_words() -> str:
    """Return what the driver has to say against the use of a device, or nothing."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        return str(error)
    count, text = ctypes.c_int(0), ctypes.c_char_p()
    code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if code:
        driver.cuGetErrorString(code, ctypes.byref(text))
        return (text.value or b"error").decode() + f", CUDA error {code}"
    if not count.value:
        return "the driver finds no device"
    device, numbers = ctypes.c_int(0), (ctypes.c_int(0), ctypes.c_int(0))
    code = driver.cuDeviceGet(ctypes.byref(device), 0)
    for number, attribute in zip(numbers, COMPUTE_CAPABILITY, strict=True):
        code = code or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    found = tuple(number.value for number in numbers)
    if code or found >= LEAST_CAPABILITY:
        return ""
    return "compute capability {}.{}, {}.{} is needed".format(*found, *LEAST_CAPABILITY)


@functools.cache
def get() -> Any:
    """Return the device of the process."""
    check()
    return _Simulator() if is_simulated() else _Device()


class _Device:
    """The current device of the driver."""

    def __init__(self) -> None:
        from numba import cuda

        self.cuda = cuda
        context = cuda.current_context()
        self.number = int(context.device.id)
        self.multiprocessors = context.device.MULTIPROCESSOR_COUNT
        self._driver = importlib.import_module("numba.cuda.cudadrv.driver").driver
        self._streams: dict[int, Any] = {0: 0}
        self._launches: dict[tuple[Any, int, int, int], Any] = {}

    def _take_part(self) -> None:
        """Let this thread talk to the driver: Numba sees to it where it allocates or launches, not here."""
        self.cuda.current_context()

    def allocate(self, n_bytes: int) -> tuple[int, object]:
        """Return the address of new memory, and what keeps it."""
        memory = self.cuda.device_array(max(1, n_bytes), np.uint8)
        return int(memory.__cuda_array_interface__["data"][0]), memory

    def pinned(self, n_bytes: int) -> np.ndarray[Any, Any]:
        """Return host memory that copies can read and write on their own."""
        return self.cuda.pinned_array(n_bytes, np.uint8)

    def new_stream(self) -> int:
        stream = self.cuda.stream()
        self._streams[int(stream)] = stream
        return int(stream)

    def stream(self, handle: int) -> Any:
        if handle not in self._streams:
            self._streams[handle] = self.cuda.external_stream(handle)
        return self._streams[handle]

    def to_device(self, address: int, array: np.ndarray[Any, Any], stream: int) -> None:
        if array.nbytes:
            self._take_part()
            self._driver.cuMemcpyHtoDAsync(address, array.ctypes.data, array.nbytes, stream)

    def to_host(self, array: np.ndarray[Any, Any], address: int, stream: int) -> None:
        if array.nbytes:
            self._take_part()
            self._driver.cuMemcpyDtoHAsync(array.ctypes.data, address, array.nbytes, stream)

    def synchronize(self, stream: int) -> None:
        self._take_part()
        self._driver.cuStreamSynchronize(stream)

    def launch(self, kernel: Any, blocks: int, threads: int, stream: int, *arguments: Any) -> None:
        key = (kernel, blocks, threads, stream)
        launch = self._launches.get(key)
        if launch is None:
            if len(self._launches) > 1000:
                self._launches.clear()
            with warnings.catch_warnings():
                # small batches make small grids, which Numba warns of
                warnings.simplefilter("ignore")
                launch = self._launches[key] = kernel[blocks, threads, self.stream(stream)]
        launch(*arguments)


class _Simulator:
    """The host in the place of a device."""

    number, multiprocessors = 0, 2

    def __init__(self) -> None:
        shared = importlib.import_module("numba.cuda.simulator.kernelapi").FakeCUDAShared
        shared.array = _shared_array

    def allocate(self, n_bytes: int) -> tuple[int, object]:
        # on 16 bytes as the driver's allocations are, and full of what no result may show
        memory = np.full(n_bytes + 16, 0xA7, np.uint8)
        return -(-memory.ctypes.data // 16) * 16, memory

    def pinned(self, n_bytes: int) -> np.ndarray[Any, Any]:
        return np.empty(n_bytes, np.uint8)

    def new_stream(self) -> int:
        return 0

    def to_device(self, address: int, array: np.ndarray[Any, Any], stream: int) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def to_host(self, array: np.ndarray[Any, Any], address: int, stream: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def synchronize(self, stream: int) -> None:
        pass

    def launch(self, kernel: Any, blocks: int, threads: int, stream: int, *arguments: Any) -> None:
        # Its threads wait for each other by polling: in turns of Python's usual 5 ms, a block would take
        # 0.1 s. And NumPy's numbers warn of what floats do in silence on a device.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                kernel[blocks, threads](*arguments)
        finally:
            sys.setswitchinterval(interval)


def _shared_array(self: Any, shape: int, dtype: Any) -> Any:
    """Return a block's shared array by where it is made, in one step.

    The simulator's own looks first and makes then, so that two threads may each come by one of their own.
    """
    frame = sys._getframe(1)
    place = (frame.f_code, frame.f_lineno)
    return self._allocations.setdefault(place, np.empty(shape, dtype))
