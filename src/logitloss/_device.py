"""Arrays that lie on a CUDA device already: taken where they are, and results handed back in their own kind.

The first array of a call makes a `Call`. It knows the caller's library and stream, turns the other arguments
into `CudaArray`s, which `_check` and `_call` treat as they treat NumPy's, has outputs made by that library,
and stands in for the kernels, whose work it queues on that stream.

With check="raise" a call waits once, for the number of the first bad row; with check="deferred" that number
stays on the device until `raise_deferred`. Where no stream of the caller's can be known (JAX and others that
have DLPack alone), each kernel is waited for, since the memory's owner would not know that it is in use.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from logitloss import _backends, _check, _coefficients, _dlpack
from logitloss._deferred import defer
from logitloss._kernels import cuda_device
from logitloss._kernels.cuda_arrays import DeviceArray
from logitloss._libraries import describe, found, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from logitloss._check import Array, Shape

# What a call may bring along from the host, if it is a single number; class weights may be an array.
_NUMBERS = ("weight", "pos_weight", "grad_output")


# ---- our arrays ----


class Flags(NamedTuple):
    """What `_check` asks of an array's flags."""

    aligned: bool
    behaved: bool


class CudaArray(DeviceArray):  # type: ignore[misc]
    """A DeviceArray as the checks take it, with what it takes to hand it to any library.

    What a caller gets whose own kind cannot be made: any library takes it by `__cuda_array_interface__` or
    DLPack, without a copy.
    """

    __slots__ = ("_call", "is_theirs", "is_writeable", "stream")

    def __init__(
        self,
        call: Call | None,
        told: _dlpack.Described,
        owner: object,
        is_writeable: bool,
        stream: int | None = None,
    ) -> None:
        super().__init__(told.address, told.dtype, told.shape, told.strides, owner)
        self._call = call
        self.is_writeable = is_writeable
        # whether `owner` is the array as the caller has it, or gets it
        self.is_theirs = False
        self.stream = call.stream if call is not None else stream or 0

    @property
    def call(self) -> Call:
        """The call it takes part in."""
        assert self._call is not None
        return self._call

    @property
    def flags(self) -> Flags:
        aligned = not any(number % self.dtype.itemsize for number in (self.address, *self.strides))
        return Flags(aligned, aligned and self.is_writeable)

    def _view(self, shape: Shape, strides: Shape) -> CudaArray:
        told = _told(self)._replace(shape=shape, strides=strides)
        return CudaArray(self._call, told, self.owner, self.is_writeable, self.stream)

    def transpose(self, *axes: Any) -> CudaArray:
        """Return a view with the axes in another order, given one by one or as a tuple."""
        order = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple) else axes
        return self._view(tuple(self.shape[i] for i in order), tuple(self.strides[i] for i in order))

    def squeeze(self, axes: tuple[int, ...]) -> CudaArray:
        """Return a view without those axes, which have length 1."""
        kept = [i for i in range(self.ndim) if i not in axes]
        return self._view(tuple(self.shape[i] for i in kept), tuple(self.strides[i] for i in kept))

    def broadcast_to(self, shape: Shape) -> CudaArray:
        """Return a view of a larger shape, by NumPy's rules."""
        return self._view(shape, super().broadcast_to(shape).strides)

    def astype(self, dtype: Any) -> DeviceArray:
        """Return an array of a float dtype in C order: a copy where it is not one already."""
        is_one = self.dtype == dtype and self.is_contiguous
        return self if is_one else self.call.scaled(self, 1.0, dtype)

    def to_host(self, stream: int | None = None) -> Array:
        """Return a copy on the host, made after what this array's stream has been given."""
        there: Array = super().to_host(self.stream if stream is None else stream)
        return there

    def item(self, stream: int | None = None) -> Any:
        """Return the only item as a Python number, waiting for it."""
        return self.to_host(stream).item()

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: tuple[int, ...]) -> Any:
        """Return one item, waiting for it."""
        address = self.address + sum(int(i) * step for i, step in zip(index, self.strides, strict=True))
        return DeviceArray(address, self.dtype, (), (), self.owner).item(self.stream)

    def carrier(self) -> _Carrier:
        """Return what has the interface without a stream: for who is on it already."""
        return _Carrier(self)

    def shadow(self) -> Array:
        """Return a NumPy array that says it lies there: to compare places by, not to be read."""
        return _shadow(self)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**_interface(self), "stream": self.stream or 1}

    def __dlpack_device__(self) -> tuple[int, int]:
        return _dlpack.CUDA, cuda_device.get().number

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
        **_: object,
    ) -> object:
        """Return a capsule; what is asked of a newer protocol cannot be had."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError("neither a copy nor another device can be had, but where the array lies")
        if stream != -1 and (stream or 1) != (self.stream or 1):
            cuda_device.get().synchronize(self.stream)
        return _dlpack.write(
            self.address, self.dtype, self.shape, self.strides, self.__dlpack_device__()[1], self.owner
        )


def _told(array: DeviceArray) -> _dlpack.Described:
    return _dlpack.Described(array.address, array.dtype, array.shape, array.strides, -1, "")


def _interface(array: DeviceArray) -> dict[str, Any]:
    address = array.address if array.size else 0
    return {
        "shape": array.shape,
        "typestr": array.dtype.str,
        "data": (address, False),
        "strides": None if array.is_contiguous else array.strides,
        "version": 3,
    }


class _Carrier:
    def __init__(self, array: CudaArray) -> None:
        self.owner = array.owner
        self.__cuda_array_interface__ = _interface(array)


class _OnHost:
    def __init__(self, array: DeviceArray) -> None:
        self.owner = array.owner
        self.__array_interface__ = _interface(array)


def _shadow(array: DeviceArray) -> Array:
    return np.asarray(_OnHost(array))


# ---- a call ----


def begin(name: str, value: Any) -> CudaArray:
    """Return the array that decides that a call's work is done on the device."""
    return Call(name, value).taken(name, value)


class Call:
    """One call of a public function on arrays of the device: it has the methods of `Kernels`."""

    name = "cuda"

    def __init__(self, name: str, value: Any) -> None:
        self.name_of_first, self.like, self.check = name, value, "raise"
        self.kernels: Any = None
        _, self.kind = kind_of(type(value))
        stream = self.kind.stream(value)
        self.waits = stream is None
        self.stream = stream or 0
        self.capsules: list[object] = []

    def choose(self, backend: str | None, check: str = "raise") -> _backends.Kernels:
        """Return the kernels, if the backend is CUDA's; this is to be done before anything else with them."""
        if backend not in (None, Call.name):
            raise TypeError(
                f"backend is {backend!r}, but {self.name_of_first} lie on a CUDA device: "
                "expected backend='cuda' or none"
            )
        self.check = check
        self.kernels = _backends.get(Call.name)
        return cast("_backends.Kernels", self)

    # ---- arrays in ----

    def taken(self, name: str, value: Any) -> CudaArray:
        """Return an array of the device as ours."""
        library, kind = kind_of(type(value))
        told, is_writeable, stream, capsule = describe(name, value, library, self.stream)
        if capsule is not None:
            self.capsules.append(capsule)
            self.waits = True  # whose memory it is knows nothing of this stream
        if told.dtype is None:
            raise TypeError(f"{name} of {told.type_words}: expected a dtype of NumPy's or bfloat16")
        device = kind.device(value)
        device = told.device if device is None else device
        if device >= 0 and device != cuda_device.get().number:
            raise ValueError(
                f"{name} of device {device}: expected {cuda_device.get().number}, which this process uses"
            )
        if stream is not None and stream != (self.stream or 1):
            if library == "" and value is self.like:
                self.stream = 0 if stream == 1 else int(stream)
            else:
                cuda_device.get().synchronize(stream)
        array = CudaArray(self, told, value, is_writeable)
        array.is_theirs = True
        return array

    def has(self, value: Any) -> bool:
        """Whether an argument lies on the device."""
        return found(value)

    def array(self, name: str, value: Any) -> Any:
        """Return another argument as an array of the device, or what may come as a number from the host."""
        if found(value):
            return self.taken(name, value)
        if name in _NUMBERS and np.ndim(value) == 0:
            number = _check.reals(name, value, _check.HOST)
            return number if name == "grad_output" else self._from_host(_constant(float(number)))
        raise TypeError(
            f"{name} of type {type(value).__name__} lies on the host, but {self.name_of_first} on a CUDA "
            "device: expected an array of the device" + (", or a number" if name in _NUMBERS else "")
        )

    def _from_host(self, array: DeviceArray) -> CudaArray:
        return CudaArray(self, _told(array), array.owner, False)

    def class_weight(self, value: Any, n_classes: int, like: Array) -> DeviceArray:
        """Return class weights, which may come from the host, as float64."""
        if not found(value):
            return DeviceArray.from_host(_check.class_weight(value, n_classes, _check.HOST), self.stream)
        weight = _check.reals("weight", value, like)
        _check.same_shape("weight", weight, (n_classes,), "one number per class,")
        return cast("CudaArray", weight).astype(np.float64)

    def broadcast(self, array: CudaArray, shape: Shape) -> CudaArray:
        """Return a view of a larger shape; ValueError if there is none."""
        return array.broadcast_to(shape)

    def overlap(self, a: CudaArray, b: object) -> bool:
        """Whether arrays share memory."""
        return isinstance(b, DeviceArray) and _check.overlap(_shadow(a), _shadow(b))

    def is_same(self, a: CudaArray, b: DeviceArray) -> bool:
        """Whether arrays are one, element for element."""
        return _check.identical(_shadow(a), _shadow(b))

    # ---- arrays out ----

    def empty(self, shape: Shape, dtype: Any) -> CudaArray:
        """Return a new array, of the caller's kind where that can be."""
        told = _dlpack.Described(0, np.dtype(dtype), shape, None, -1, "")
        theirs = self.kind.empty(shape, np.dtype(dtype), self.like)
        if theirs is not None:
            return self.taken("result", theirs)
        address, owner = cuda_device.get().allocate(math.prod(shape) * np.dtype(dtype).itemsize)
        return CudaArray(self, told._replace(address=address), owner, True)

    def returned(self, result: DeviceArray) -> Any:
        """Return a result as the caller's kind of array."""
        if isinstance(result, CudaArray) and result.is_theirs:
            return result.owner
        # without the call, which holds the logits
        ours = CudaArray(None, _told(result), result.owner, True, self.stream)
        return self.kind.adopt(ours, self.like)

    # ---- numbers that stay on the device ----

    def divided(self, total: Any, divisor: Any) -> DeviceArray:
        """Divide numbers of either side."""
        result = self.kernels.divide(total, divisor, stream=self.stream)
        self._wait()
        return cast("DeviceArray", result)

    def scaled(self, array: DeviceArray, factor: float, dtype: Any) -> DeviceArray:
        """Return an array times a number."""
        return cast("DeviceArray", _scaled().scaled(array, factor, dtype, self.stream))

    def total(self, values: DeviceArray) -> DeviceArray:
        """Return the sum of all items."""
        return cast("DeviceArray", _scaled().total(values, self.stream))

    def scale(self, upstream: Any, divisor: Any, shape: Shape) -> Any:
        """Return what multiplies each row's gradient: a number, or float64 of the rows' shape."""
        if isinstance(upstream, CudaArray):
            if upstream.ndim:
                return upstream if upstream.dtype == np.float64 else upstream.astype(np.float64)
        else:
            upstream = 1.0 if upstream is None else float(upstream)
            if not isinstance(divisor, DeviceArray):
                return _coefficients.divided(upstream, divisor)
        return self.kernels.divide(upstream, divisor, stream=self.stream).broadcast_to(shape)

    def per_class(
        self, weight: DeviceArray | None, label_smoothing: float, n_classes: int, real: np.dtype[Any]
    ) -> tuple[DeviceArray | None, DeviceArray | None]:
        """Return beta and gamma of the contract, as the kernels of the device store them."""
        if not label_smoothing:
            return weight, None
        if weight is None:
            return _even(label_smoothing, n_classes, real)
        keep, spread = 1.0 - label_smoothing, label_smoothing / n_classes
        return self.scaled(weight, keep, np.float64), self.scaled(weight, spread, real)

    # ---- the kernels ----

    def __getattr__(self, operation: str) -> Any:
        kernel = getattr(self.kernels, operation)

        def run(*arguments: Any) -> Any:
            results = kernel(*arguments, stream=self.stream)
            self._wait()
            return results

        return run

    def _wait(self) -> None:
        if self.waits:
            cuda_device.get().synchronize(self.stream)

    def _first_bad(self, flag: DeviceArray, error: Callable[[Any, int], Exception], shape: Shape) -> int:
        """Return the number of the first bad row, or -1 if it is to be looked at later."""
        if self.check == "raise":
            return int(flag.item(self.stream))
        defer(flag, self.stream, error, shape)
        return -1

    def label_weight(self, *arguments: Any) -> tuple[Any, int]:
        """Sum the weights of the labels that count; the pass that follows finds the bad ones."""
        return self.kernels.label_weight(*arguments, stream=self.stream)[0], -1

    def cross_entropy(
        self,
        logits: Any,
        target: Any,
        ignore_index: int,
        beta: Any,
        gamma: Any,
        z_loss: float,
        scale: Any,
        lse_in: Any,
        *outputs: Any,
    ) -> tuple[Any, Any, int]:
        lse_in = None if gamma is not None else lse_in  # for which gamma would have to be added up here
        arguments = (logits, target, ignore_index, beta, gamma, z_loss, scale, lse_in, *outputs)
        total, counted, flag = self.kernels.cross_entropy(*arguments, stream=self.stream)
        error = functools.partial(_bad_label, n_classes=logits.shape[-1], ignore_index=ignore_index)
        self._wait()
        return total, counted, self._first_bad(flag, error, target.shape)

    def nll(
        self, log_probabilities: Any, target: Any, ignore_index: int, *further: Any
    ) -> tuple[Any, Any, int]:
        total, counted, flag = self.kernels.nll(
            log_probabilities, target, ignore_index, *further, stream=self.stream
        )
        n_classes = log_probabilities.shape[-1]
        error = functools.partial(_bad_label, n_classes=n_classes, ignore_index=ignore_index)
        self._wait()
        return total, counted, self._first_bad(flag, error, target.shape)

    def soft_cross_entropy(
        self,
        logits: Any,
        target: Any,
        weight: Any,
        target_scale: float,
        target_offset: float,
        z_loss: float,
        scale: Any,
        lse_in: Any,
        *outputs: Any,
    ) -> Any:
        if weight is not None:
            real, lse_in = _check.result_dtype(logits.dtype), None
            weight = weight if weight.dtype == real else self.scaled(weight, 1.0, real)
        arguments = (logits, target, weight, target_scale, target_offset, z_loss, scale, lse_in, *outputs)
        total = self.kernels.soft_cross_entropy(*arguments, stream=self.stream)
        self._wait()
        return total

    def binary_cross_entropy_with_logits(self, *arguments: Any) -> tuple[Any, int]:
        total, flag = self.kernels.binary_cross_entropy_with_logits(*arguments, stream=self.stream)
        target, signed = arguments[1], arguments[5]
        self._wait()
        return total, self._first_bad(flag, _bad_sign, target.shape) if signed else -1

    def binary_cross_entropy(self, probabilities: Any, target: Any, *further: Any) -> tuple[Any, int]:
        total, flag = self.kernels.binary_cross_entropy(probabilities, target, *further, stream=self.stream)
        self._wait()
        return total, self._first_bad(flag, _bad_probability, target.shape)


def _scaled() -> Any:
    return importlib.import_module("logitloss._kernels.cuda_scaled")


@functools.lru_cache(maxsize=64)
def _constant(number: float) -> DeviceArray:
    return DeviceArray.from_host(np.float64(number))


@functools.lru_cache(maxsize=16)
def _even(label_smoothing: float, n_classes: int, real: np.dtype[Any]) -> tuple[DeviceArray, DeviceArray]:
    """Return beta and gamma of classes that weigh the same."""
    beta, gamma = _coefficients.per_class(None, label_smoothing, n_classes)
    return DeviceArray.from_host(beta), DeviceArray.from_host(gamma.astype(real))


def _bad_label(target: Any, bad: int, n_classes: int, ignore_index: int) -> Exception:
    return _check.bad_label(target, bad, n_classes, ignore_index)


def _bad_sign(target: Any, bad: int) -> Exception:
    return _check.bad_value("target", target, bad, "-1 or +1")


def _bad_probability(target: Any, bad: int) -> Exception:
    return _check.bad_value("probabilities or target", target, bad, "numbers in [0, 1]")
