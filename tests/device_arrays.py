"""Arrays on a device as libraries have them: real ones where they are installed, minimal ones everywhere.

Each library here puts a NumPy array on the device, and brings one of its arrays back. The minimal ones hold
memory of the package's own allocator, which on the simulator is the host's; DLPack's capsules are NumPy's,
changed to say that the data lie on a device.
"""

import ctypes
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from logitloss._kernels.cuda_arrays import DeviceArray


class Interface:
    """An array with nothing but `__cuda_array_interface__`, of whatever the keywords say."""

    def __init__(self, memory, **changes):
        self.memory = memory
        self.changes = changes

    @property
    def dtype(self):
        return self.memory.dtype

    @property
    def __cuda_array_interface__(self):
        described = {
            "shape": self.memory.shape,
            "typestr": self.memory.dtype.str,
            "data": (self.memory.address, False),
            "strides": self.memory.strides,
            "version": 3,
        }
        return described | self.changes


class DLPack:
    """An array with nothing but DLPack."""

    def __init__(self, memory):
        self.memory = memory
        self.streams = []

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        is_bfloat16 = self.memory.dtype.name == "bfloat16"
        stand_in = np.empty(self.memory.shape, np.int16 if is_bfloat16 else self.memory.dtype)
        capsule = stand_in.__dlpack__()
        tensor = pointer(capsule)
        ctypes.c_void_p.from_address(tensor).value = self.memory.address
        ctypes.c_int32.from_address(tensor + 8).value = 2
        if is_bfloat16:
            ctypes.c_uint8.from_address(tensor + 20).value = 4
        return capsule


def pointer(capsule):
    """Return the address of a capsule's DLTensor."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return get(capsule, b"dltensor")


def to_host(array):
    """Bring back what has an interface and is contiguous."""
    if hasattr(array, "copy_to_host"):
        return array.copy_to_host()
    described = array.__cuda_array_interface__
    dtype = array.dtype if described["typestr"].endswith("V2") else np.dtype(described["typestr"])
    return DeviceArray(described["data"][0], dtype, tuple(described["shape"])).to_host()


# ---- a library each ----


class Library:
    """Arrays that only have a protocol come back as the package's own, which have all of them."""

    def __init__(self, array_type):
        self.array_type = array_type

    def to_device(self, array):
        return self.array_type(DeviceArray.from_host(array))

    def to_host(self, array):
        return to_host(array)

    def owns(self, array):
        return type(array).__name__ == "CudaArray"


class Numba(Library):
    def __init__(self):
        from numba import cuda

        self.cuda = cuda
        self.array_type = type(cuda.to_device(np.zeros(1)))

    def to_device(self, array):
        return self.cuda.to_device(array)

    def owns(self, array):
        return isinstance(array, self.array_type)


class LikeCuPy(Library):
    """A module that has what is used of CuPy."""

    def __init__(self, monkeypatch):
        class Array(Interface):
            device = types.SimpleNamespace(id=0)

        Array.__module__ = "cupy"
        super().__init__(Array)
        stream = types.SimpleNamespace(ptr=0)
        cupy = types.ModuleType("cupy")
        cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)
        cupy.empty = lambda shape, dtype: Array(DeviceArray.empty(shape, dtype))
        cupy.asarray = self.asarray
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    def asarray(self, carrier):
        told = carrier.__cuda_array_interface__
        assert told.get("stream") is None, "it would wait for its own stream"
        dtype, shape = np.dtype(told["typestr"]), told["shape"]
        return self.array_type(DeviceArray(told["data"][0], dtype, shape, told["strides"], carrier))

    def owns(self, array):
        return type(array) is self.array_type


class LikeTorch(Library):
    """A module that has what is used of PyTorch, whose interface is of version 2 and names no stream."""

    def __init__(self, monkeypatch):
        class Array(Interface):
            device = types.SimpleNamespace(index=0)
            is_cuda, requires_grad = True, False

            @property
            def dtype(self):
                return f"torch.{self.memory.dtype.name}"

        Array.__module__ = "torch._tensor"
        super().__init__(lambda memory: Array(memory, version=2))
        self.made = Array
        stream = types.SimpleNamespace(cuda_stream=0)
        torch = types.ModuleType("torch")
        torch.cuda = types.SimpleNamespace(current_stream=lambda device: stream)
        torch.float32, torch.float64, torch.bfloat16 = np.float32, np.float64, ml_dtypes.bfloat16
        torch.empty = lambda shape, dtype, device: self.array_type(DeviceArray.empty(shape, dtype))
        torch.as_tensor = self.as_tensor
        monkeypatch.setitem(sys.modules, "torch", torch)

    def as_tensor(self, carrier, device):
        assert device.index == 0
        told = carrier.__cuda_array_interface__
        memory = DeviceArray(told["data"][0], told["typestr"], told["shape"], told["strides"], carrier)
        return self.array_type(memory)

    def to_host(self, array):
        return array.memory.to_host()

    def owns(self, array):
        return type(array) is self.made


class LikeJAX(Library):
    """A module that has what is used of JAX, and reads capsules as NumPy does."""

    def __init__(self, monkeypatch):
        class Array(DLPack):
            dtype = property(lambda self: self.memory.dtype)

        Array.__module__ = "jax"
        super().__init__(Array)
        jax, dlpack = types.ModuleType("jax"), types.ModuleType("jax.dlpack")
        jax.dlpack, dlpack.from_dlpack = dlpack, self.from_dlpack
        monkeypatch.setitem(sys.modules, "jax", jax)
        monkeypatch.setitem(sys.modules, "jax.dlpack", dlpack)

    def from_dlpack(self, ours):
        assert ours.__dlpack_device__() == (2, 0)
        memory = DeviceArray(ours.address, ours.dtype, ours.shape, ours.strides, ours.__dlpack__(stream=7))
        return self.array_type(memory)

    def to_host(self, array):
        return array.memory.to_host()

    def owns(self, array):
        return type(array) is self.array_type


class Installed(Library):
    """A library that is here with a device."""

    def __init__(self, name):
        self.module = pytest.importorskip(name)
        self.name = name
        try:
            self.array_type = type(self.to_device(np.zeros(1, np.float32)))
        except Exception as error:
            pytest.skip(f"{name} has no device: {' '.join(str(error).split())[:80]}")

    def to_device(self, array):
        if self.name == "torch":
            return self.module.from_numpy(np.array(array)).cuda()
        if self.name == "cupy":
            return self.module.asarray(array)
        return self.module.device_put(array, self.module.devices("gpu")[0])

    def to_host(self, array):
        if self.name == "torch":
            return array.cpu().numpy()
        return self.module.asnumpy(array) if self.name == "cupy" else np.asarray(array)

    def owns(self, array):
        return isinstance(array, self.array_type)


LIBRARIES = {
    "numba": lambda monkeypatch: Numba(),
    "interface": lambda monkeypatch: Library(Interface),
    "dlpack": lambda monkeypatch: Library(DLPack),
    "like cupy": LikeCuPy,
    "like torch": LikeTorch,
    "like jax": LikeJAX,
    "torch": lambda monkeypatch: Installed("torch"),
    "cupy": lambda monkeypatch: Installed("cupy"),
    "jax": lambda monkeypatch: Installed("jax"),
}
