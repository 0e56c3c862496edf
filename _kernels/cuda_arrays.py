"""Arrays that lie on a device, as the CUDA kernels take them: an address, a dtype, a shape and strides.

A `DeviceArray` owns nothing but a reference: `owner` is whatever keeps the memory alive (an allocation of
ours, an array of another library). It is as much of an array as the package needs, so that a batch can be
checked and handed on without being touched; `describe` turns the arrays of one call into the integers that a
kernel reads.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

# What a kernel calls each dtype: the index into this table.
KINDS = ("f16", "bf16", "f32", "f64", "b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8")
_NAMES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64", "bool": "b1"}


@functools.cache
def kind_of(dtype: np.dtype[Any]) -> str:
    """Return what the kernels call a dtype."""
    return _NAMES.get(dtype.name) or f"{dtype.kind}{dtype.itemsize}"


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of an array in C order."""
    strides, step = [], itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))


class DeviceArray:
    """A strided array on the device: where it lies, and what keeps it there.

    Parameters
    ----------
    address : int
        Of the first item.
    dtype : numpy.dtype
        One of the package's dtypes, bfloat16 as `ml_dtypes` has it.
    shape : tuple of int
    strides : tuple of int, optional
        In bytes; without them the array is in C order.
    owner : object
        Kept alive as long as the array is.
    """

    __slots__ = ("address", "dtype", "owner", "shape", "strides")

    def __init__(
        self,
        address: int,
        dtype: Any,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        owner: object = None,
    ) -> None:
        self.address = address
        self.dtype = np.dtype(dtype)
        self.shape = shape
        self.strides = contiguous_strides(shape, self.dtype.itemsize) if strides is None else strides
        self.owner = owner

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        """Return a new array in C order, its memory as it was found."""
        from logitloss._kernels import cuda_device

        dtype = np.dtype(dtype)
        address, owner = cuda_device.get().allocate(math.prod(shape) * dtype.itemsize)
        return cls(address, dtype, shape, None, owner)

    @classmethod
    def from_host(cls, array: Any, stream: int = 0) -> DeviceArray:
        """Return a copy on the device, made before this returns."""
        from logitloss._kernels import cuda_device

        array = np.asarray(array, order="C")
        result = cls.empty(array.shape, array.dtype)
        cuda_device.get().to_device(result.address, array, stream)
        cuda_device.get().synchronize(stream)
        return result

    def to_host(self, stream: int = 0) -> np.ndarray[Any, Any]:
        """Return a copy on the host, made after what the stream has been given so far; for C order only."""
        from logitloss._kernels import cuda_device

        if not self.is_contiguous:
            raise ValueError(f"strides are {self.strides}: expected an array in C order")
        result = np.empty(self.shape, self.dtype)
        cuda_device.get().to_host(result, self.address, stream)
        cuda_device.get().synchronize(stream)
        return result

    def item(self, stream: int = 0) -> Any:
        """Return the only item as a Python number, waiting for it."""
        return self.to_host(stream).item()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        """Whether the items lie in C order without gaps."""
        expected = contiguous_strides(self.shape, self.dtype.itemsize)
        return self.size == 0 or all(
            length == 1 or stride == usual
            for length, stride, usual in zip(self.shape, self.strides, expected, strict=True)
        )

    def transpose(self, axes: tuple[int, ...]) -> DeviceArray:
        """Return a view with the axes in another order."""
        shape = tuple(self.shape[axis] for axis in axes)
        strides = tuple(self.strides[axis] for axis in axes)
        return DeviceArray(self.address, self.dtype, shape, strides, self.owner)

    def axis_last(self, axis: int) -> DeviceArray:
        """Return a view with one axis moved to the end."""
        axis %= self.ndim
        return self.transpose((*(i for i in range(self.ndim) if i != axis), axis))

    def broadcast_to(self, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view of a larger shape, by NumPy's rules."""
        new = len(shape) - self.ndim
        if new < 0 or any(n not in (1, m) for n, m in zip(self.shape, shape[new:], strict=True)):
            raise ValueError(f"shape {self.shape} does not broadcast to {shape}")
        strides = tuple(
            0 if length == 1 else step for length, step in zip(self.shape, self.strides, strict=True)
        )
        return DeviceArray(self.address, self.dtype, shape, (0,) * new + strides, self.owner)

    def __repr__(self) -> str:
        return f"DeviceArray({self.address:#x}, {self.dtype}, {self.shape}, strides={self.strides})"


def describe(
    shape: tuple[int, ...], arrays: list[DeviceArray | None], class_axis: list[bool]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return the joint shape of the rows and, for each array, (address, kind, class stride, *row strides).

    The row axes are joined where the strides of all arrays allow it, so that most batches have one; an array
    that is not there has address 0. `class_axis` says which arrays have a last axis beyond the rows.
    """
    present = [array is not None for array in arrays]
    strides = [() if array is None else array.strides[: len(shape)] for array in arrays]
    joined: list[int] = []
    kept: list[int] = []  # the innermost axis of each joined one
    for axis, length in enumerate(shape):
        if length == 1:
            continue
        if kept and all(
            not here or step[kept[-1]] == step[axis] * length
            for here, step in zip(present, strides, strict=True)
        ):
            joined[-1] *= length
            kept[-1] = axis
        else:
            joined.append(length)
            kept.append(axis)
    if not joined:
        joined, kept = [1], []
    views = []
    for array, step, has_classes in zip(arrays, strides, class_axis, strict=True):
        rows = tuple(step[axis] for axis in kept) if array is not None else (0,) * len(kept)
        rows = rows or (0,)
        if array is None:
            views.append((0, 0, 0, *rows))
        else:
            kind = KINDS.index(kind_of(array.dtype))
            views.append((array.address, kind, array.strides[-1] if has_classes else 0, *rows))
    return tuple(joined), views
