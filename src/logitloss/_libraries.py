"""The libraries whose arrays may lie on a CUDA device: how such an array is recognised, read and made.

`found` tells one from all else, by `__cuda_array_interface__` or DLPack; `describe` reads where it lies.
`kind_of` gives what those protocols leave open: the caller's stream, and how that library makes an array. No
library is imported that the caller has not imported.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from logitloss import _dlpack
from logitloss._kernels.cuda_device import is_simulated

if TYPE_CHECKING:
    from collections.abc import Callable

    from logitloss._check import Shape

JAX = ("jax", "jaxlib")


class Kind(NamedTuple):
    """What must be known of a library of arrays; each function takes an array of the caller's last."""

    stream: Callable[[Any], int | None]  # the caller's; None if it cannot be known
    device: Callable[[Any], int | None]  # the device's number; None if the interface alone tells
    empty: Callable[[Shape, np.dtype[Any], Any], Any]  # a new array; None if it is ours to make
    adopt: Callable[[Any, Any], Any]  # theirs on the memory of a `CudaArray`


def _cupy() -> Kind:
    cupy = sys.modules["cupy"]
    return Kind(
        stream=lambda like: int(cupy.cuda.get_current_stream().ptr),
        device=lambda like: int(like.device.id),
        empty=lambda shape, dtype, like: cupy.empty(shape, dtype),
        adopt=lambda ours, like: cupy.asarray(ours.carrier()),
    )


def _torch() -> Kind:
    torch = sys.modules["torch"]
    return Kind(
        stream=lambda like: int(torch.cuda.current_stream(like.device).cuda_stream),
        device=lambda like: int(like.device.index or 0),
        empty=lambda shape, dtype, like: torch.empty(
            shape, dtype=getattr(torch, dtype.name), device=like.device
        ),
        adopt=lambda ours, like: torch.as_tensor(ours.carrier(), device=like.device),
    )


def _numba() -> Kind:
    cuda = importlib.import_module("numba.cuda")

    def adopt(ours: Any, like: Any) -> Any:
        if is_simulated():
            return type(like)(ours.shadow())
        return cuda.as_cuda_array(ours.carrier())

    return Kind(
        stream=lambda like: 0 if is_simulated() else int(like.stream),
        device=lambda like: None,
        empty=lambda shape, dtype, like: cuda.device_array(shape, dtype, stream=like.stream),
        adopt=adopt,
    )


def _jax() -> Kind:
    from_dlpack = importlib.import_module("jax.dlpack").from_dlpack
    return Kind(
        stream=lambda like: None,
        device=lambda like: None,
        empty=lambda shape, dtype, like: None,
        adopt=lambda ours, like: from_dlpack(ours),
    )


def _other() -> Kind:
    return Kind(
        stream=lambda like: 0 if hasattr(like, "__cuda_array_interface__") else None,
        device=lambda like: None,
        empty=lambda shape, dtype, like: None,
        adopt=lambda ours, like: ours,
    )


_KINDS = {"": _other, "cupy": _cupy, "torch": _torch, "numba": _numba, "jax": _jax, "jaxlib": _jax}
_known: dict[type, tuple[str, Kind]] = {}


def kind_of(array_type: type) -> tuple[str, Kind]:
    """Return the library of a type or of what it derives from, and what is known of it."""
    if array_type not in _known:
        libraries = (base.__module__.partition(".")[0] for base in array_type.__mro__)
        library = next((library for library in libraries if library in _KINDS), "")
        _known[array_type] = library, _KINDS[library]()
    return _known[array_type]


# ---- recognition ----


def found(value: Any) -> bool:
    """Whether an object is an array on a CUDA device."""
    if isinstance(value, np.ndarray | np.generic):
        return False
    if getattr(value, "requires_grad", False):
        raise TypeError("a tensor requires gradient, which would be lost: expected tensor.detach()")
    if getattr(type(value), "__cuda_ndarray__", False) or hasattr(value, "__cuda_array_interface__"):
        return True
    where = getattr(value, "__dlpack_device__", None)
    try:
        return where is not None and int(where()[0]) in (_dlpack.CUDA, _dlpack.CUDA_MANAGED)
    except BufferError as error:
        raise TypeError(f"an array that lies in pieces ({error}): expected one on one device") from None


def describe(
    name: str, value: Any, library: str, stream: int
) -> tuple[_dlpack.Described, bool, int | None, object]:
    """Return where an array lies, if it can be written, the stream it says is at work on it, its capsule."""
    interface = None
    if library not in JAX:  # whose interface does not say when the array is ready
        interface = getattr(value, "__cuda_array_interface__", None)
        if interface is None and getattr(value, "__cuda_ndarray__", False):  # in Numba's simulator
            interface = value.__array_interface__
    if interface is None:
        capsule = value.__dlpack__(stream=stream or 1)
        return _dlpack.read(capsule), library not in JAX, None, capsule
    if interface.get("mask") is not None:
        raise TypeError(f"{name} has a mask: expected an array without one")
    dtype: np.dtype[Any] | None = np.dtype(interface["typestr"])
    if interface["typestr"].endswith("V2") and "bfloat16" in str(getattr(value, "dtype", "")):
        dtype = _dlpack.bfloat16()
    address, is_readonly = interface["data"]
    strides = interface.get("strides")
    told = _dlpack.Described(
        int(address or 0),
        dtype,
        tuple(interface["shape"]),
        None if strides is None else tuple(strides),
        -1,
        interface["typestr"],
    )
    return told, not is_readonly, interface.get("stream"), None
