"""A strided array of any kind on the device, times a number: a copy in another float type, or its sum.

Coefficients by class and upstream gradients become what the other kernels take, and the values of rows add
up, without coming to the host.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from logitloss._kernels import cuda_device, cuda_launch
from logitloss._kernels.cuda_arrays import KINDS, DeviceArray, describe, kind_of
from logitloss._kernels.cuda_classes import ZERO, row_address
from logitloss._kernels.cuda_memory import load, store, store_integer, switch
from logitloss._kernels.cuda_rows import FOUND_BYTES, NONE_BAD, options
from logitloss._kernels.cuda_steps import BLOCK, SHARED, plus, reduction
from numba import cuda


def scaled(array: DeviceArray, factor: float, dtype: Any, stream: int) -> DeviceArray:
    """Return the array times the number, float32 or float64 and in C order."""
    out = DeviceArray.empty(array.shape, dtype)
    _launch(array, out, factor, stream)
    return out


def total(array: DeviceArray, stream: int) -> DeviceArray:
    """Return the sum of the items, a float64 of no axes."""
    return _launch(array, None, 1.0, stream)


@cuda_launch.one_at_a_time
def _launch(array: DeviceArray, out: DeviceArray | None, factor: float, stream: int) -> DeviceArray:
    device = cuda_device.get()
    if array.size == 0:
        return cuda_launch.add_up(0, 0, stream)[0]
    shape, views = describe(array.shape, [array, out], [False, False])
    blocks = min(-(-array.size // BLOCK), 4 * device.multiprocessors)
    found = cuda_launch.scratch(FOUND_BYTES * blocks, stream) if out is None else 0
    device.launch(
        scaled_kernel("none" if out is None else kind_of(out.dtype)),
        blocks,
        BLOCK,
        stream,
        *(tuple(map(np.int64, view)) for view in views),
        tuple(map(np.int64, shape)),
        np.int64(array.size),
        np.float64(factor),
        np.int64(found),
    )
    return cuda_launch.add_up(found, blocks, stream)[0] if out is None else out


@functools.cache
def scaled_kernel(item: str) -> Any:
    """Return the kernel for results of that kind, or that adds up ("none")."""
    return cuda.jit(scaled_function(item), **options(4))


def scaled_function(item: str) -> Any:
    """Return the kernel, not yet compiled."""
    stores = item != "none"
    real = np.float32 if item == "f32" else np.float64
    load_any = switch(KINDS, lambda kind: load(kind, np.float64))
    store_real, store_double = store(item if stores else "f64", real), store("f64", np.float64)
    store_long, sum_double = store_integer("i8"), reduction(plus, np.float64, BLOCK)

    def scaled(array, out, shape, n_items, factor, results):
        shared = cuda.shared.array(SHARED, np.float64)
        sum_of_items = np.float64(0)
        i = np.int64(cuda.blockIdx.x) * BLOCK + cuda.threadIdx.x
        while i < n_items:
            value = load_any(array[1], row_address(array, shape, i)) * factor
            sum_of_items += value
            if stores:
                store_real(row_address(out, shape, i), real(value))
            i += np.int64(cuda.gridDim.x) * BLOCK
        if not stores:
            sum_of_items = sum_double(shared, sum_of_items)
            if cuda.threadIdx.x == 0:
                to = results + np.int64(cuda.blockIdx.x) * FOUND_BYTES
                store_double(to, sum_of_items)
                store_long(to + 8, ZERO)
                store_long(to + 16, NONE_BAD)

    return scaled
