"""What is known of the arguments when a function is compiled: constants, and the types of arrays."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.errors import TypingError

from logitloss._njit.kernels import REALS


def constant_of(name: str, given: Any, default: object) -> Any:
    if isinstance(given, types.Omitted):
        return given.value
    if isinstance(given, types.Literal):
        return given.literal_value
    if given == types.none:
        return None
    if isinstance(given, types.Type):
        raise TypingError(f"{name} is of type {given}: expected a constant, like {default!r}")
    return given


def is_none(given: Any) -> bool:
    return given is None or given == types.none or (isinstance(given, types.Omitted) and given.value is None)


def refuse(**given: Any) -> None:
    for name, value in given.items():
        if not is_none(value):
            raise TypingError(f"{name} is of type {value}: expected None in a compiled function")


def item_of(name: str, array: Any) -> str:
    if not isinstance(array, types.Array) or array.dtype not in REALS or not array.aligned:
        raise TypingError(f"{name} of type {array}: expected an array of float32 or float64")
    return REALS[array.dtype]


def is_number(given: Any) -> bool:
    return isinstance(given, types.Number | types.Boolean)


def check_ignore_index(given: Any) -> None:
    given = given.value if isinstance(given, types.Omitted) else given
    if not isinstance(given, int | types.Integer) or given == types.uint64:
        raise TypingError(f"ignore_index is of type {given}: expected a signed integer")


def check_class_weight(given: Any) -> None:
    if not is_none(given) and (not isinstance(given, types.Array) or given.ndim != 1):
        raise TypingError(f"weight is of type {given}: expected an array of one number per class")
    if not is_none(given):
        kind_of("weight", given)


def kind_of(name: str, array: Any) -> int:
    from logitloss._kernels.numba_items import ITEMS

    number: Any = array.dtype if isinstance(array, types.Array) and array.aligned else None
    if number in REALS:
        item = REALS[number]
    elif isinstance(number, types.Boolean):
        item = "bool"
    elif isinstance(number, types.Integer):
        signed: Any = number
        item = f"{'i' if signed.signed else 'u'}{signed.bitwidth}"
    else:
        raise TypingError(f"{name} of type {array}: expected an array of numbers")
    return int(ITEMS.index(item))


def check_output(out: Any, logits: Any) -> None:
    if is_none(out):
        return
    if not isinstance(out, types.Array) or out.dtype != logits.dtype or out.ndim != logits.ndim:
        raise TypingError(f"out of type {out}: expected an array like the logits, {logits}")
    if not out.mutable:
        raise TypingError(f"out of type {out}: expected an array that can be written")


def reduction_of(given: Any) -> str:
    reduction = constant_of("reduction", given, "mean")
    if reduction not in ("none", "mean", "sum"):
        raise TypingError(f"reduction is {reduction!r}: expected one of none, mean, sum")
    return str(reduction)


def class_axis_of(given: Any, ndim: int, default: int) -> int:
    axis = constant_of("axis", given, default)
    axis = default if axis is None else axis
    if type(axis) is not int:
        raise TypingError(f"axis is {axis!r}: expected an integer")
    if not -ndim <= axis < ndim:
        raise TypingError(f"axis is {axis}: expected {-ndim} <= axis < {ndim}")
    return int(axis) % ndim
