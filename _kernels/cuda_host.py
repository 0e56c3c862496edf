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
            self.host = device.pinned(n_bytes)
            self.address, self.owner = device.allocate(n_bytes)

    def view(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        return self.host[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def there(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceArray:
        return DeviceArray(self.address, dtype, shape, None, self.owner)


class _Slot:
    """A chunk on its way."""

    def __init__(self) -> None:
        self.stream = cuda_device.get().new_stream()
        self.buffers: dict[str, _Buffer] = {}
        self.busy = False

    def buffer(self, name: str, n_bytes: int) -> _Buffer:
        buffer = self.buffers.setdefault(name, _Buffer())
        buffer.reserve(n_bytes)
        return buffer

    def begin(
        self,
        index: tuple[Any, ...],
        inputs: dict[str, np.ndarray[Any, Any]],
        outputs: dict[str, np.ndarray[Any, Any]],
        call: Callable[[dict[str, DeviceArray], int], tuple[DeviceArray, ...]],
    ) -> None:
        """Send a chunk off."""
        device = cuda_device.get()
        arrays, self.waiting = {}, []
        for name, array in inputs.items():
            part = array[index]
            buffer = self.buffer(name, part.nbytes)
            there = buffer.there(part.shape, part.dtype)
            here = buffer.view(part.shape, part.dtype)
            np.copyto(here, part)
            device.to_device(there.address, here, self.stream)
            arrays[name] = there
        for name, array in outputs.items():
            part = array[index]
            buffer = self.buffer(name, part.nbytes)
            arrays[name] = buffer.there(part.shape, part.dtype)
            self.waiting.append((part, buffer.view(part.shape, part.dtype), arrays[name]))
        self.results = call(arrays, self.stream)
        for _, here, there in self.waiting:
            device.to_host(here, there.address, self.stream)
        self.numbers = self.buffer("results", 24).view((3,), np.dtype(np.int64))
        device.to_host(self.numbers, self.results[0].address, self.stream)
        self.busy = True

    def finish(self) -> tuple[float, int, int]:
        """Wait for the chunk, and return its total, the rows counted and its first bad row."""
        cuda_device.get().synchronize(self.stream)
        self.busy = False
        for part, here, _ in self.waiting:
            np.copyto(part, here)
        total = float(self.numbers[:1].view(np.float64)[0])
        return total, int(self.numbers[1]), int(self.numbers[2])


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
                    slot.begin(index, given, wanted, call)
                    under_way.append((slot, first[index].size // width))
        finally:
            for slot, _ in under_way:
                cuda_device.get().synchronize(slot.stream)
                slot.busy = False
    return total, counted, -1
