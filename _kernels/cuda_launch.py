"""Launches: which kernel fits a call on device arrays, in what grid, with what scratch memory.

Everything here is asynchronous: results are DeviceArrays that are valid once the stream has come that far.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from logitloss._kernels import cuda_device, cuda_elements, cuda_rows, cuda_totals
from logitloss._kernels.cuda_arrays import DeviceArray, describe, kind_of
from logitloss._kernels.cuda_classes import Rows
from logitloss._kernels.cuda_elements import Elements
from logitloss._kernels.cuda_parts import part_bytes
from logitloss._kernels.cuda_results import RECORD

if TYPE_CHECKING:
    from collections.abc import Callable

Results = tuple[DeviceArray, DeviceArray, DeviceArray]

_scratch: dict[tuple[int, int], DeviceArray] = {}
_slab: list[Any] = [None, 0]
SLAB_BYTES = 1 << 16
PER_THREAD = 2  # the handle of what is another stream in each thread


_lock = threading.RLock()


def one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep the launches of one call together: those of another thread may use the same scratch memory."""

    @functools.wraps(function)
    def locked(*args: Any, **options: Any) -> Any:
        with _lock:
            return function(*args, **options)

    return locked


def scratch(n_bytes: int, stream: int) -> int:
    """Return the address of memory for one call: calls on one stream follow each other and may share it."""
    key = stream, threading.get_ident() if stream == PER_THREAD else 0
    held = _scratch.get(key)
    if held is None or held.size < n_bytes:
        if held is not None:
            cuda_device.get().synchronize(stream)
        _scratch[key] = held = DeviceArray.empty((max(n_bytes, 1 << 20),), np.uint8)
    return held.address


def new_results() -> Results:
    """Return arrays for (total, counted, first_bad), 24 bytes that lie together."""
    if _slab[0] is None or _slab[1] + 32 > SLAB_BYTES:
        _slab[:] = DeviceArray.empty((SLAB_BYTES,), np.uint8), 0
    slab, offset = _slab
    _slab[1] += 32
    numbers = (np.float64, np.int64, np.int64)
    arrays = (DeviceArray(slab.address + offset + 8 * i, t, (), (), slab) for i, t in enumerate(numbers))
    return tuple(arrays)


def add_up(found: int, n_found: int, stream: int) -> Results:
    """Return what the blocks' entries come to."""
    results = new_results()
    arguments = (found, n_found, results[0].address)
    cuda_device.get().launch(
        cuda_totals.totals_kernel(), 1, cuda_device.geometry().block, stream, *map(np.int64, arguments)
    )
    return results


def coefficients(array: Any, dtype: Any) -> DeviceArray | None:
    """Return coefficients by class as a contiguous array of the device."""
    if array is None:
        return None
    if isinstance(array, DeviceArray):
        if array.dtype == dtype and array.is_contiguous:
            return array
        array = array.to_host()
    with np.errstate(over="ignore", under="ignore"):
        return DeviceArray.from_host(np.ascontiguousarray(array, dtype))


def address_of(array: DeviceArray | None) -> int:
    return 0 if array is None else array.address


@functools.lru_cache(maxsize=64)
def has_ignored(dtype: np.dtype[Any], ignore_index: int) -> bool:
    """Whether labels of this dtype can be the ignored one: the number counts, never its low bits."""
    limits = np.iinfo(dtype)
    return bool(limits.min <= ignore_index <= limits.max)


def real_of(dtype: np.dtype[Any]) -> type:
    return np.float64 if dtype == np.float64 else np.float32


def same_phase(a: DeviceArray, b: DeviceArray, n_axes: int) -> bool:
    """Whether whole sixteens begin at the same items of both arrays, in every row."""
    steps = zip(a.strides[:n_axes], b.strides[:n_axes], a.shape, strict=False)
    return (a.address - b.address) % 16 == 0 and all((s - t) % 16 == 0 or n == 1 for s, t, n in steps)


@one_at_a_time
def rows(
    logits: DeviceArray,
    stream: int,
    *,
    target: DeviceArray | None = None,
    second: str = "none",
    out: DeviceArray | None = None,
    gamma: Any = None,
    beta: Any = None,
    ignore_index: int = 0,
    target_scale: float = 1.0,
    target_offset: float = 0.0,
    z_loss: float = 0.0,
    scale: Any = 1.0,
    lse_in: DeviceArray | None = None,
    loss: DeviceArray | None = None,
    lse: DeviceArray | None = None,
) -> Results:
    """Run the kernels over rows; `gamma` is what multiplies a class's coefficient or target."""
    device, geometry = cuda_device.get(), cuda_device.geometry()
    dtype, n_axes = logits.dtype, logits.ndim - 1
    shape, n_classes = logits.shape[:-1], logits.shape[-1]
    n_rows = math.prod(shape)
    if n_rows == 0:
        return add_up(0, 0, stream)
    real = real_of(dtype)
    soft = target is not None and target.ndim == logits.ndim
    target_kind = "none"
    if target is not None:
        target_kind = kind_of(target.dtype) if soft else "labels" if gamma is None else "weighted"
    if loss is not None or lse is not None or second != "grad" or target_kind == "weighted":
        lse_in = None  # the top's entry, of coefficients by class, is not made of the lse
    writes_classes = second in ("grad", "softmax", "log_softmax")
    scale_array = scale if isinstance(scale, DeviceArray) else None
    has_classes = [True, soft, False, False, False, False, second != "entropy"]
    merged, views = describe(shape, [logits, target, scale_array, lse_in, loss, lse, out], has_classes)

    # How a row is read and shared
    contiguous = logits.strides[-1] == logits.itemsize or n_classes == 1
    if out is not None and writes_classes:
        contiguous = contiguous and out.strides[-1] == out.itemsize and same_phase(logits, out, n_axes)
    enough_rows = n_rows >= geometry.many_rows * device.multiprocessors
    across_rows = not contiguous and views[0][-1] == logits.itemsize and enough_rows
    if n_classes <= geometry.short_row or across_rows:
        team = 1
    else:
        team = geometry.warp if n_classes <= geometry.warp_row else geometry.block
    vector = contiguous and team > 1
    spec = Rows(kind_of(dtype), target_kind, second, "whole", team, vector, lse_in is not None)
    resident = device.multiprocessors * spec.resident
    n_parts = 1
    if team == geometry.block:
        n_parts = min(-(-n_classes // geometry.part_classes), max(1, resident // n_rows))

    beta_there, gamma_there = coefficients(beta, np.float64), coefficients(gamma, real)
    real_bytes, teams = np.dtype(real).itemsize, geometry.block // team
    blocks = min(-(-n_rows // teams), resident)
    each = part_bytes(spec.real_kind, spec.statistics)
    parts_bytes = n_rows * n_parts * each if n_parts > 1 else 0
    parts_bytes = -(-parts_bytes // 8) * 8
    record_bytes = n_rows * (RECORD * real_bytes + 8) if n_parts > 1 else 0
    found = scratch(cuda_rows.FOUND_BYTES * blocks + parts_bytes + record_bytes, stream)
    parts = found + cuda_rows.FOUND_BYTES * blocks

    def launch(stage: str, n_blocks: int, results: int) -> None:
        device.launch(
            cuda_rows.rows_kernel(spec._replace(stage=stage)),
            n_blocks,
            geometry.block,
            stream,
            *(tuple(map(np.int64, view)) for view in views),
            tuple(map(np.int64, merged)),
            *map(np.int64, (n_rows, n_classes, n_parts, ignore_index)),
            np.int64(target is not None and not soft and has_ignored(target.dtype, ignore_index)),
            *map(np.int64, (address_of(beta_there), address_of(gamma_there))),
            *map(np.float64, (target_scale, target_offset, z_loss)),
            np.float64(1.0 if scale_array is not None else scale),
            *map(np.int64, (parts, parts + parts_bytes, results)),
        )

    if n_parts == 1:
        launch("whole", blocks, found)
    else:
        launch("parts", min(n_rows * n_parts, resident), 0)
        launch("finish", blocks, found)
        if writes_classes:
            launch("second", min(n_rows * n_parts, resident), 0)
    return add_up(found, blocks, stream)


@one_at_a_time
def elements(
    operation: str,
    x: DeviceArray,
    stream: int,
    *,
    target: DeviceArray | None = None,
    weight: DeviceArray | None = None,
    pos_weight: DeviceArray | None = None,
    settings: tuple[float, float, float] = (0.0, 0.0, 0.0),
    scale: Any = 1.0,
    loss: DeviceArray | None = None,
    out: DeviceArray | None = None,
) -> Results:
    """Run the kernel over elements."""
    device, geometry = cuda_device.get(), cuda_device.geometry()
    if x.size == 0:
        return add_up(0, 0, stream)
    scale_array = scale if isinstance(scale, DeviceArray) else None
    shape, views = describe(x.shape, [x, target, weight, pos_weight, scale_array, loss, out], [False] * 7)
    item, item_bytes = kind_of(x.dtype), x.itemsize
    x_view, loss_view, out_view = views[0], views[5], views[6]
    vector = (
        operation != "kl_div"
        and len(shape) == 1
        and x_view[3] == item_bytes
        and (out is None or (out_view[3] == item_bytes and (out_view[0] - x_view[0]) % 16 == 0))
    )
    loss_bytes = 8 if item == "f64" else 4
    head_bytes = -x_view[0] % 16 // item_bytes * loss_bytes
    loss_vector = vector and loss is not None and loss_view[3] == loss_bytes
    loss_vector = loss_vector and (loss_view[0] + head_bytes) % 16 == 0
    target_kind = "none" if target is None else kind_of(target.dtype)
    weights = weight is not None or pos_weight is not None
    spec = Elements(operation, item, target_kind, weights, out is not None, vector, loss_vector)
    n_each = 16 // item_bytes if vector else 1
    blocks = min(
        -(-x.size // (n_each * geometry.block)), device.multiprocessors * cuda_elements.blocks_of(spec)
    )
    found = scratch(cuda_rows.FOUND_BYTES * blocks, stream)
    device.launch(
        cuda_elements.elements_kernel(spec),
        blocks,
        geometry.block,
        stream,
        *(tuple(map(np.int64, view)) for view in views),
        tuple(map(np.int64, shape)),
        np.int64(x.size),
        tuple(map(np.float64, settings)),
        np.float64(1.0 if scale_array is not None else scale),
        np.int64(found),
    )
    return add_up(found, blocks, stream)


@one_at_a_time
def labels(
    x: DeviceArray | None,
    target: DeviceArray,
    ignore_index: int,
    n_classes: int,
    weight: Any,
    loss: DeviceArray | None,
    stream: int,
) -> Results:
    """Run the kernel over labels."""
    device, geometry = cuda_device.get(), cuda_device.geometry()
    if target.size == 0:
        return add_up(0, 0, stream)
    shape, views = describe(target.shape, [x, target, loss], [True, False, False])
    weight_there = coefficients(weight, np.float64)
    blocks = min(-(-target.size // geometry.block), 4 * device.multiprocessors)
    found = scratch(cuda_rows.FOUND_BYTES * blocks, stream)
    device.launch(
        cuda_totals.labels_kernel("none" if x is None else kind_of(x.dtype)),
        blocks,
        geometry.block,
        stream,
        *(tuple(map(np.int64, view)) for view in views),
        tuple(map(np.int64, shape)),
        *map(np.int64, (target.size, n_classes, ignore_index, has_ignored(target.dtype, ignore_index))),
        *map(np.int64, (address_of(weight_there), found)),
    )
    return add_up(found, blocks, stream)


@one_at_a_time
def divide(numerator: Any, divisor: Any, stream: int) -> DeviceArray:
    """Divide numbers or arrays of one item."""
    result = new_results()[0]
    sides = [side if isinstance(side, DeviceArray) else None for side in (numerator, divisor)]
    _, views = describe((), sides, [False, False])
    numbers = [
        0.0 if side is not None else float(given)
        for side, given in zip(sides, (numerator, divisor), strict=True)
    ]
    cuda_device.get().launch(
        cuda_totals.divide_kernel(),
        1,
        1,
        stream,
        *(tuple(map(np.int64, view)) for view in views),
        *map(np.float64, numbers),
        np.int64(result.address),
    )
    return result
