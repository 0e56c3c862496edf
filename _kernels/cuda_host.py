"""NumPy arrays through the device: chunk by chunk, so that a batch may be larger than the device's memory.

Two slots take turns, each with a stream, page-locked memory of the host and memory of the device: while one
chunk is computed, the next one is gathered and copied and the last one's results come back. Arrays need not
be contiguous; a chunk of them is, on the device.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from logitloss._kernels import cuda_device
from logitloss._kernels.cuda_arrays import DeviceArray

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A slot's chunk of all arrays together; copies of so much run at full speed.
CHUNK_BYTES = 1 << 25

_lock = threading.Lock()
_slots: list[Any] = []


def chunks(shape: tuple[int, ...], room: int) -> Iterator[tuple[Any, ...]]:
    """Cut an array of this shape, in C order, into indices of at most `room` items, at least one."""
    whole, axis = 1, len(shape)
    while axis > 0 and whole * shape[axis - 1] <= room:
        axis -= 1
        whole *= shape[axis]
    if axis == 0:
        yield (...,)
        return
    step = max(1, room // max(1, whole))
    for outer in np.ndindex(shape[: axis - 1]):
        for start in range(0, shape[axis - 1], step):
            yield (*outer, slice(start, start + step), ...)


class _Buffer:
    """Memory of the host and of the device for one array's chunks; it grows."""

    def __init__(self) -> None:
        self.host = np.empty(0, np.uint8)
        self.address, self.owner = 0, None

    def reserve(self, n_bytes: int) -> None:
        if self.host.size < n_bytes:
            device = cuda_device.get()
            host, there = device.pinned(n_bytes), device.allocate(n_bytes)
            self.host, (self.address, self.owner) = host, there

    def views(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], n_axes: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], DeviceArray]:
        """Return (what is copied, the array in it, the array there), for a chunk of `n_axes` row axes.

        Rows that are read by sixteen bytes start on sixteen.
        """
        *rows, last = shape if len(shape) > n_axes else (*shape, 1)
        pitch = last
        if last > cuda_device.geometry().short_row:
            pitch = -(-last * dtype.itemsize // 16) * 16 // dtype.itemsize
        size = math.prod(rows) * pitch
        self.reserve(size * dtype.itemsize)
        copied = self.host[: size * dtype.itemsize].view(dtype).reshape(*rows, pitch)
        here = copied[..., :last].reshape(shape)
        return copied, here, DeviceArray(self.address, dtype, shape, here.strides, self.owner)


class _Slot:
    """A chunk on its way."""

    def __init__(self) -> None:
        self.stream = cuda_device.get().new_stream()
        self.buffers: dict[str, _Buffer] = {}
        self.forget()

    def forget(self) -> None:
        """Let go of the caller's arrays."""
        self.waiting: list[Any] = []
        self.results: Any = None

    def buffer(self, name: str) -> _Buffer:
        return self.buffers.setdefault(name, _Buffer())

    def begin(
        self,
        index: tuple[Any, ...],
        n_axes: int,
        inputs: dict[str, np.ndarray[Any, Any]],
        outputs: dict[str, np.ndarray[Any, Any]],
        call: Callable[[dict[str, DeviceArray], int], tuple[DeviceArray, ...]],
    ) -> None:
        """Send a chunk off."""
        device = cuda_device.get()
        arrays: dict[str, DeviceArray] = {}
        for name, array in inputs.items():
            part = array[index]
            n = n_axes - array.ndim + part.ndim
            copied, here, arrays[name] = self.buffer(name).views(part.shape, part.dtype, n)
            np.copyto(here, part)
            device.to_device(arrays[name].address, copied, self.stream)
        for name, array in outputs.items():
            part = array[index]
            n = n_axes - array.ndim + part.ndim
            copied, here, arrays[name] = self.buffer(name).views(part.shape, part.dtype, n)
            self.waiting.append((part, copied, here, arrays[name].address))
        self.results = call(arrays, self.stream)
        for _, copied, _, address in self.waiting:
            device.to_host(copied, address, self.stream)
        self.numbers, _, _ = self.buffer("results").views((3, 1), np.dtype(np.int64), 1)
        device.to_host(self.numbers, self.results[0].address, self.stream)

    def finish(self) -> tuple[float, int, int]:
        """Wait for the chunk, and return its total, the rows counted and its first bad row."""
        cuda_device.get().synchronize(self.stream)
        for part, _, here, _ in self.waiting:
            np.copyto(part, here)
        self.forget()
        total = float(self.numbers[0].view(np.float64)[0])
        return total, int(self.numbers[1, 0]), int(self.numbers[2, 0])


def run(
    shape: tuple[int, ...],
    inputs: dict[str, np.ndarray[Any, Any] | None],
    outputs: dict[str, np.ndarray[Any, Any] | None],
    call: Callable[[dict[str, DeviceArray], int], tuple[DeviceArray, ...]],
) -> tuple[float, int, int]:
    """Run `call` on chunks of arrays whose first axes have this shape, and add up what it returns."""
    given = {name: array for name, array in inputs.items() if array is not None}
    wanted = {name: array for name, array in outputs.items() if array is not None}
    n_rows = math.prod(shape)
    total, counted, n_before = 0.0, 0, 0
    if n_rows == 0:
        return total, counted, -1
    arrays = (*given.values(), *wanted.values())
    row_bytes = sum(array.itemsize * math.prod(array.shape[len(shape) :]) for array in arrays)
    first = arrays[0]
    width = math.prod(first.shape[len(shape) :])
    with _lock:
        if not _slots:
            _slots.extend((_Slot(), _Slot()))
        # (slot, rows) of the chunks on their way, the earlier one first
        under_way: list[tuple[_Slot, int]] = []
        try:
            for number, index in enumerate((*chunks(shape, max(1, CHUNK_BYTES // max(1, row_bytes))), None)):
                while under_way and (index is None or len(under_way) == len(_slots)):
                    slot, n = under_way.pop(0)
                    part, rows, bad = slot.finish()
                    total, counted = total + part, counted + rows
                    if bad >= 0:
                        return total, counted, n_before + bad
                    n_before += n
                if index is not None:
                    slot = _slots[number % len(_slots)]
                    slot.begin(index, len(shape), given, wanted, call)
                    under_way.append((slot, first[index].size // width))
        finally:
            for slot, _ in under_way:
                cuda_device.get().synchronize(slot.stream)
                slot.forget()
    return total, counted, -1
