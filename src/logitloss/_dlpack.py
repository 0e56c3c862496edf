"""DLPack by ctypes: what a capsule says of an array, and a capsule for an array of ours.

The structures are those of dlpack.h without a version, which every library still reads and writes.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

CUDA, CUDA_MANAGED = 2, 13
# (code, bits) of each dtype; the codes are those of DLDataTypeCode.
_CODES = {np.dtype(f"{letter}{n}"): (code, 8 * n) for code, letter in enumerate("iu") for n in (1, 2, 4, 8)}
_CODES |= {np.dtype(f"f{n}"): (2, 8 * n) for n in (2, 4, 8)} | {np.dtype(bool): (6, 8)}
_BFLOAT16 = (4, 16)


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("number", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


class Described(NamedTuple):
    """Where an array lies and how; strides in bytes, None for C order."""

    address: int
    dtype: np.dtype[Any] | None  # None for a type that NumPy has not
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    device: int
    type_words: str


_api = ctypes.pythonapi
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
# A destructor sees a capsule that nobody holds any more: by its address, since a reference would revive it.
_asked = ctypes.c_void_p, ctypes.c_char_p
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, *_asked)(("PyCapsule_IsValid", _api))
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, *_asked)(("PyCapsule_GetPointer", _api))
# The structure, its shape and strides, and the memory's owner, by the structure's address, until deleted.
_held: dict[int, tuple[Any, ...]] = {}


def read(capsule: object) -> Described:
    """Return what a capsule says; it stays as it is, so that its own destructor frees it."""
    address = _api.PyCapsule_GetPointer(capsule, b"dltensor")
    tensor = _Managed.from_address(address).tensor
    code = (tensor.dtype.code, tensor.dtype.bits)
    dtype = None
    if tensor.dtype.lanes == 1:
        dtype = bfloat16() if code == _BFLOAT16 else next((d for d, c in _CODES.items() if c == code), None)
    ndim = tensor.ndim
    strides = None
    if tensor.strides and dtype is not None:
        strides = tuple(step * dtype.itemsize for step in tensor.strides[:ndim])
    return Described(
        (tensor.data or 0) + tensor.byte_offset,
        dtype,
        tuple(tensor.shape[:ndim]),
        strides,
        tensor.device.number,
        f"DLPack's code {code[0]} of {code[1]} bits",
    )


def write(
    address: int,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    device: int,
    owner: Any,
) -> object:
    """Return a capsule of an array of a CUDA device; `owner` is kept until whoever reads it is done."""
    managed, numbers = _Managed(), ctypes.c_int64 * len(shape)
    lengths, steps = numbers(*shape), numbers(*(step // dtype.itemsize for step in strides))
    tensor = managed.tensor
    tensor.data, tensor.device, tensor.ndim = address, _Device(CUDA, device), len(shape)
    tensor.dtype = _DataType(*_CODES.get(dtype, _BFLOAT16), 1)
    tensor.shape = ctypes.cast(lengths, ctypes.POINTER(ctypes.c_int64))
    tensor.strides = ctypes.cast(steps, ctypes.POINTER(ctypes.c_int64))
    managed.deleter = _delete
    held = ctypes.addressof(managed)
    _held[held] = (managed, lengths, steps, owner)
    return _api.PyCapsule_New(held, b"dltensor", ctypes.cast(_destroy, ctypes.c_void_p))


def bfloat16() -> np.dtype[Any]:
    """Return the dtype, whose package is imported by who needs it alone."""
    import ml_dtypes

    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def _forget(managed: int) -> None:
    _held.pop(managed, None)


def _forget_unread(capsule: int) -> None:
    if _is_valid(capsule, b"dltensor"):
        _forget(_pointer_of(capsule, b"dltensor"))


_delete = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_forget)
_destroy = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_forget_unread)
