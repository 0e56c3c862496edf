"""All validation: arguments come in as the user wrote them and leave as what the kernel contract asks for.

Each rule and each message stands here once. A message names the argument, what came and what was expected.
Nothing is copied but small things (labels given as a list, class weights, row scales): axes move as views.
A call with plain arrays and default arguments is the common case and must cost a microsecond, hence the quick
tests first and the explanations in functions of their own.

A call's first array, the logits, decides where it takes place. If it lies on a CUDA device, `_device` makes
of it, and of all that is to be `like` it, arrays that have what is asked here of NumPy's.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Float64 = NDArray[np.float64]
    # A result: a NumPy scalar where it has no axes.
    Value = np.floating[Any] | Array
    Shape = tuple[int, ...]

_FLOAT32, _FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
# The float dtypes a kernel reads, each with the dtype of its rows' losses; bfloat16 joins when it is first
# seen, because the package that defines it is not imported here.
_RESULT_DTYPES: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float16): _FLOAT32,
    _FLOAT32: _FLOAT32,
    _FLOAT64: _FLOAT64,
}
_FLOATS = "float16, bfloat16, float32 or float64 (native byte order)"
_INTEGERS = frozenset(np.dtype(code) for code in "bBhHiIlLqQ")
REDUCTIONS = ("none", "mean", "sum")
CHECKS = ("raise", "deferred")
# For `like`, where a call takes place on the host.
HOST = np.empty(0)


# ---- numbers ----


def integer(name: str, value: Any, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """Return an int from `least` to `most`."""
    try:
        number: int = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected an integer") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}: expected {least} <= {name} <= {most}")
    return number


def finite(name: str, value: Any) -> float:
    """Return a finite float."""
    if type(value) is float and value == 0:
        return 0.0  # as it is mostly
    number = _real_number(name, value)
    if not -np.inf < number < np.inf:
        raise ValueError(f"{name} is {number}: expected a finite number")
    return number


def positive(name: str, value: Any) -> float:
    """Return a finite float above 0."""
    number = finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} is {number}: expected {name} > 0")
    return number


def fraction(name: str, value: Any) -> float:
    """Return a float in [0, 1]."""
    if type(value) is float and value == 0:
        return 0.0
    number = _real_number(name, value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} is {number}: expected 0 <= {name} <= 1")
    return number


def _real_number(name: str, value: Any) -> float:
    if isinstance(value, str | bytes):
        raise TypeError(f"{name} is {value!r}: expected a real number")
    if isinstance(value, ndarray) and value.ndim:
        raise TypeError(f"{name} is an array of shape {value.shape}: expected a real number")
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}: expected a real number") from None
    except OverflowError:
        raise ValueError(f"{name} is more than float64 holds: expected a real number") from None


def unknown_option(name: str, value: object, allowed: tuple[str, ...]) -> ValueError:
    """Return the error for a word that is not among those allowed."""
    return ValueError(f"{name} is {value!r}: expected one of {', '.join(allowed)}")


# ---- arrays ----


def result_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the row results of logits of that dtype."""
    return _RESULT_DTYPES[dtype]


def is_on_device(array: Any) -> bool:
    """Whether an array that has been checked lies on a device."""
    return not isinstance(array, ndarray)


def call_of(array: Any) -> Any:
    """Return the call that an array of a device takes part in."""
    return array.call


def place_of(value: Any, like: Array) -> Array:
    """Return what stands for the place of an argument that may come from the host."""
    return like if type(like) is ndarray or call_of(like).has(value) else HOST


def placed(name: str, value: Any, like: Array | None) -> Array:
    """Return an array where the call takes place; `like` is None for the one that decides it."""
    array: Array
    if like is not None and type(like) is not ndarray:
        array = call_of(like).array(name, value)
        return array
    if type(value) is ndarray:
        return value
    if not isinstance(value, ndarray | np.generic) and (
        hasattr(value, "__dlpack_device__") or hasattr(value, "__cuda_array_interface__")
    ):
        from logitloss import _libraries

        if _libraries.found(value):
            if like is None:
                from logitloss import _device

                return _device.begin(name, value)
            raise TypeError(
                f"{name} of type {type(value).__name__} lies on a CUDA device: expected an array of the "
                "host, where this call takes place"
            )
    unmasked(name, value)
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:  # as the libraries do
        raise TypeError(
            f"{name} of type {type(value).__name__}: expected what NumPy makes an array of ({error})"
        ) from error


def unmasked(name: str, value: object) -> None:
    """Refuse what NumPy would make an array of by dropping a mask."""
    if isinstance(value, ndarray) and np.ma.is_masked(value):
        raise TypeError(f"{name} is a masked array: expected a plain one, as its mask would be lost")


def floats(name: str, value: ArrayLike, like: Array | None = None) -> Array:
    """Return an array of one of the four float dtypes: the first of a call, or one `like` it."""
    array: Array = value if like is None and type(value) is ndarray else placed(name, value, like)
    if array.dtype not in _RESULT_DTYPES:
        if not _is_bfloat16(array.dtype):
            raise TypeError(f"{name} of dtype {_named(array.dtype)}: expected {_FLOATS}")
        _RESULT_DTYPES[array.dtype] = _FLOAT32
    if not array.flags.aligned:
        raise _misaligned(name, array)
    return array


def reals(name: str, value: ArrayLike, like: Array) -> Array:
    """Return an array of any real or bool dtype that a kernel can read."""
    array: Array = value if type(value) is type(like) is ndarray else placed(name, value, like)
    dtype = array.dtype
    if not (dtype in _RESULT_DTYPES or dtype in _INTEGERS or dtype == np.bool_ or _is_bfloat16(dtype)):
        raise TypeError(f"{name} of dtype {_named(dtype)}: expected bool, integers, {_FLOATS}")
    if not array.flags.aligned:
        raise _misaligned(name, array)
    return array


def _is_bfloat16(dtype: np.dtype[Any]) -> bool:
    return dtype.name == "bfloat16" and dtype.isnative


def _named(dtype: np.dtype[Any]) -> str:
    return dtype.name if dtype.isnative else f"{dtype.name} in foreign byte order"


def _misaligned(name: str, array: Array) -> ValueError:
    return ValueError(
        f"{name} of dtype {array.dtype}: expected elements aligned in memory, as np.array makes them"
    )


def broadcast(name: str, value: ArrayLike, like: Array) -> Array:
    """Return a view, of the shape of `like`, of any real array that broadcasts to it."""
    array, shape = reals(name, value, like), like.shape
    if array.shape == shape:
        return array
    try:
        return (
            np.broadcast_to(array, shape)
            if type(array) is ndarray
            else call_of(array).broadcast(array, shape)
        )
    except ValueError:
        raise ValueError(f"{name} of shape {array.shape}: expected one that broadcasts to {shape}") from None


def same_shape(name: str, array: Array, shape: Shape, whose: str) -> Array:
    """Return the array if it has that shape."""
    if array.shape != shape:
        raise ValueError(f"{name} of shape {array.shape}: expected {whose} shape {shape}")
    return array


# ---- the class axis ----


def class_axis(name: str, array: Array, axis: int | None) -> int:
    """Return where the classes are, counted from 0; by default as in PyTorch."""
    shape = array.shape
    ndim = len(shape)
    if ndim == 0:
        raise ValueError(f"{name} of shape (): expected at least one axis, that of the classes")
    if axis is None:
        number = 1 if ndim > 1 else 0
    else:
        number = integer("axis", axis)
        if not -ndim <= number < ndim:
            raise ValueError(
                f"axis is {number}, but {name} have shape {shape}: expected {-ndim} <= axis < {ndim}"
            )
        number %= ndim
    if shape[number] == 0:
        raise ValueError(f"{name} of shape {shape}: expected at least one class on axis {number}")
    return number


def axis_last(array: Array, axis: int) -> Array:
    """Move an axis (counted from 0) last, as a view."""
    ndim = array.ndim
    return array if axis == ndim - 1 else array.transpose(*range(axis), *range(axis + 1, ndim), axis)


def axes(name: str, array: Array, axis: int | tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes to sum over, counted from 0, the last first."""
    given = axis if isinstance(axis, tuple) else (axis,)
    numbers = {class_axis(name, array, integer("axis", number)) for number in given}
    if not numbers or len(numbers) < len(given):
        raise ValueError(f"axis is {axis}: expected one or more different axes")
    return tuple(sorted(numbers, reverse=True))


def first_axis(name: str, array: Array) -> int:
    """Return the length of the first axis."""
    if array.ndim == 0:
        raise ValueError(f"{name} of shape (): expected at least one axis for reduction='batchmean'")
    return len(array)


def labels(value: ArrayLike, logits: Array, axis: int, probabilities: bool = True) -> tuple[Array, bool]:
    """Return the target, and whether it holds class `probabilities`; then its classes are last."""
    shape = logits.shape
    rows = shape[:-1] if axis == len(shape) - 1 else shape[:axis] + shape[axis + 1 :]
    target: Array = value if type(value) is type(logits) is ndarray else placed("target", value, logits)
    if not target.flags.aligned:
        raise _misaligned("target", target)
    if target.dtype in _INTEGERS:
        if target.shape != rows:
            raise ValueError(
                f"target of shape {target.shape}: expected {rows} for class indices, "
                f"the shape {shape} without its class axis {axis}"
            )
        return target, False
    if not probabilities:
        raise TypeError(f"target of dtype {_named(target.dtype)}: expected integers, class indices")
    if target.dtype not in _RESULT_DTYPES and not _is_bfloat16(target.dtype):
        raise TypeError(
            f"target of dtype {_named(target.dtype)}: expected integers for class indices, "
            f"or {_FLOATS} for class probabilities"
        )
    if target.shape != shape:
        raise ValueError(
            f"target of shape {target.shape} and dtype {target.dtype}: expected the logits' shape {shape} "
            f"for class probabilities, or integers of shape {rows} for class indices"
        )
    return axis_last(target, axis), True


def class_weight(
    value: ArrayLike | None, n_classes: int, like: Array, name: str = "weight"
) -> Float64 | None:
    """Return the weights of the classes as the kernels take them; being few, they may come from the host."""
    if value is None:
        return None
    if type(like) is not ndarray:
        there: Float64 = call_of(like).class_weight(value, n_classes, like)
        return there
    weight = same_shape(name, reals(name, value, like), (n_classes,), "one number per class,")
    return np.ascontiguousarray(weight, dtype=np.float64)


def ignored(ignore_index: int, soft: bool) -> int:
    """Return the label of the rows that do not count."""
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        ignore_index = integer("ignore_index", ignore_index)
    if soft and ignore_index >= 0:
        raise ValueError(
            f"ignore_index is {ignore_index}, but target holds class probabilities: expected no such label"
        )
    return ignore_index


def lse(value: ArrayLike, rows: Shape, like: Array) -> Float64:
    """Return the rows' logsumexp, which must come in full precision."""
    array = placed("lse", value, like)
    if array.dtype != _FLOAT64:
        raise TypeError(
            f"lse of dtype {_named(array.dtype)}: expected float64, as cross_entropy_and_lse returns it "
            "(a rounded lse spoils the gradient)"
        )
    if not array.flags.aligned:
        raise _misaligned("lse", array)
    return same_shape("lse", array, rows, "the rows'")


def bad_label(target: Array, row: int, n_classes: int, ignore_index: int) -> IndexError:
    """Return the error for the label of a row that the kernel found to be out of range."""
    return IndexError(
        f"{_element('target', target, row)}, but logits have {n_classes} classes: "
        f"expected 0 <= target < {n_classes} or ignore_index={ignore_index}"
    )


def bad_value(name: str, array: Array, element: int, expected: str) -> ValueError:
    """Return the error for an element that the kernel found to be outside what is allowed."""
    return ValueError(f"{_element(name, array, element)}: expected {expected}")


def bad_probability(probabilities: Array, target: Array, element: int) -> ValueError:
    """Return the error for the element where the kernel found a probability or target outside [0, 1]."""
    value = float(probabilities[np.unravel_index(element, probabilities.shape)])
    name, array = ("target", target) if 0 <= value <= 1 else ("probabilities", probabilities)
    return bad_value(name, array, element, "a number in [0, 1]")


def _element(name: str, array: Array, number: int) -> str:
    index = tuple(int(i) for i in np.unravel_index(number, array.shape))
    return f"{name}[{', '.join(map(str, index))}] is {array[index]}" if index else f"{name} is {array[()]}"


# ---- outputs ----


def empty(like: Array, shape: Shape, dtype: Any) -> Array:
    """Return a new array where `like` is."""
    return np.empty(shape, dtype) if type(like) is ndarray else call_of(like).empty(shape, dtype)


def output(
    out: Array | None,
    logits: Array,
    shape: Shape,
    dtype: np.dtype[Any],
    inputs: tuple[Array | None, ...] = (),
    in_place: bool = False,
) -> Array:
    """Return the array for a result: `out` if it fits, else a new one.

    `out` may share memory with none of the inputs, and with the logits only `in_place`: element for element.
    """
    if out is None:
        return np.empty(shape, dtype) if type(logits) is ndarray else empty(logits, shape, dtype)
    if type(logits) is not ndarray:
        out = placed("out", out, logits)
    elif type(out) is not ndarray:
        if not isinstance(out, ndarray):
            raise TypeError(f"out is of type {type(out).__name__}: expected a NumPy array")
        unmasked("out", out)
    if out.dtype != dtype:
        raise TypeError(f"out of dtype {_named(out.dtype)}: expected {dtype.name}")
    same_shape("out", out, shape, "the result's")
    if not out.flags.behaved:
        if not out.flags.aligned:
            raise _misaligned("out", out)
        raise ValueError("out is read-only: expected an array that can be written")
    if (type(out) is not ndarray or not out.flags.c_contiguous) and folds(out):
        lies = f"out has shape {out.shape} and strides {out.strides}"
        raise ValueError(f"{lies}: expected memory of its own for each element")
    for array in inputs if in_place else (logits, *inputs):
        if array is not None and overlap(out, array):
            raise ValueError("out shares memory with an input: expected memory of its own")
    if in_place and overlap(out, logits) and not identical(out, logits):
        raise ValueError(
            "out shares memory with part of the logits: expected memory of its own, "
            "or the logits, element for element"
        )
    return out


def returned(result: Array, out: Array | None) -> Value:
    """Return a result as the caller gets it: `out` if given, a NumPy scalar if it has no axes."""
    if type(result) is not ndarray and is_on_device(result):
        return theirs(result)
    return result if result.ndim or result is out else result[()]


def theirs(result: Array) -> Array:
    """Return a result on a device as the caller's kind of array."""
    array: Array = call_of(result).returned(result)
    return array


def no_output(reduction: str) -> ValueError:
    """Return the error for an `out` where the result is one number."""
    return ValueError(
        f"out is given with reduction={reduction!r}, whose result is a number: expected reduction='none'"
    )


def folds(array: Array) -> bool:
    """Whether elements may share memory: an axis steps to what an axis of shorter steps reaches.

    Other ways to lie beside each other without sharing are strange enough to be refused with them. Numba
    compiles this, too.
    """
    for axis in range(array.ndim):
        step, reach = abs(array.strides[axis]), array.itemsize
        for other in range(array.ndim):
            shorter = abs(array.strides[other])
            if other != axis and (shorter < step or (shorter == step and other < axis)):
                reach += shorter * (array.shape[other] - 1)
        if array.shape[axis] > 1 and step < reach:
            return array.size > 0
    return False


def identical(a: Array, b: Array) -> bool:
    if is_on_device(a):
        return bool(call_of(a).is_same(a, b))
    return a is b or (
        a.ctypes.data == b.ctypes.data
        and a.shape == b.shape
        and a.dtype == b.dtype
        and all(s == t for n, s, t in zip(a.shape, a.strides, b.strides, strict=True) if n > 1)
    )


def overlap(a: Array, b: Array) -> bool:
    # Two arrays that own their memory have each its own. Else bounds of memory first; where those meet,
    # interleaved views may still be apart, which takes a search to see.
    if is_on_device(a):
        return bool(call_of(a).overlap(a, b))
    if a.flags.owndata and b.flags.owndata:
        return a is b
    return np.may_share_memory(a, b) and np.shares_memory(a, b)
