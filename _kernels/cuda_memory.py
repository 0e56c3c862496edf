"""Loads and stores by address, and conversions, as functions of the device.

Arrays reach a kernel as addresses. An item of any kind loads as a number of the type asked for; 16 bytes
load and store at once as four words, which `unpack` and `pack` turn into the items' numbers. Inline PTX says
exactly which instruction is meant; for the simulator each has a plain variant.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import ml_dtypes
import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.cuda.core import config
from numba.cuda.extending import intrinsic

SIMULATED = bool(config.ENABLE_CUDASIM)
ITEM_BYTES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
DTYPES = {
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "b1": np.dtype(np.bool_),
}
for _size in (1, 2, 4, 8):
    for _letter in "iu":
        DTYPES[f"{_letter}{_size}"] = np.dtype(f"{_letter}{_size}")

if SIMULATED:

    def device(function: Any) -> Any:
        """Make a function of the device: here a plain one is."""
        return function

else:
    device = cuda.jit(device=True, forceinline=True)

_LLVM = {
    types.int64: ("l", ir.IntType(64)),
    types.uint32: ("r", ir.IntType(32)),
    types.float32: ("f", ir.FloatType()),
    types.float64: ("d", ir.DoubleType()),
}


def ptx(text: str, result: Any, *arguments: Any, pure: bool = False) -> Any:
    """Return a function of one instruction or some; `result` is a type, a tuple of one type, or None."""
    many = isinstance(result, types.UniTuple)
    results = [result.dtype] * result.count if many else [result] if result is not None else []
    signature = (types.none if result is None else result)(*arguments)

    def code(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        outputs = [_LLVM[kind][1] for kind in results]
        if not outputs:
            returned = ir.VoidType()
        else:
            returned = outputs[0] if len(outputs) == 1 else ir.LiteralStructType(outputs)
        function = ir.FunctionType(returned, [_LLVM[kind][1] for kind in arguments])
        constraints = [f"={_LLVM[kind][0]}" for kind in results] + [_LLVM[kind][0] for kind in arguments]
        assembly = ir.InlineAsm(function, text, ",".join(constraints), side_effect=not pure)
        value = builder.call(assembly, values)
        if result is None:
            return context.get_dummy_value()
        if many:
            items = [builder.extract_value(value, i) for i in range(result.count)]
            return context.make_tuple(builder, result, items)
        return value

    return {
        1: lambda: intrinsic(lambda context, a: (signature, code)),
        2: lambda: intrinsic(lambda context, a, b: (signature, code)),
        3: lambda: intrinsic(lambda context, a, b, c: (signature, code)),
        4: lambda: intrinsic(lambda context, a, b, c, d: (signature, code)),
        5: lambda: intrinsic(lambda context, a, b, c, d, e: (signature, code)),
    }[len(arguments)]()


WORDS = types.UniTuple(types.uint32, 4)


def memory(address: int, dtype: Any, n: int) -> np.ndarray[Any, Any]:
    """Items at an address of the host."""
    n_bytes = n * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * n_bytes).from_address(int(address)), dtype)


# ---- one item ----

# bfloat16 is the upper half of a float32
_TO_F32 = {
    "f16": "{ .reg .b16 h; ld.global.b16 h, [$1]; cvt.f32.f16 $0, h; }",
    "bf16": "{ .reg .b16 h, z; ld.global.b16 h, [$1]; mov.b16 z, 0; mov.b32 $0, {z, h}; }",
    "f32": "ld.global.f32 $0, [$1];",
    "f64": "{ .reg .f64 d; ld.global.f64 d, [$1]; cvt.rn.f32.f64 $0, d; }",
}
_TO_F64 = {
    "f16": "{ .reg .b16 h; .reg .f32 f; ld.global.b16 h, [$1]; cvt.f32.f16 f, h; cvt.f64.f32 $0, f; }",
    "bf16": (
        "{ .reg .b16 h, z; .reg .f32 f; ld.global.b16 h, [$1]; mov.b16 z, 0; mov.b32 f, {z, h}; "
        "cvt.f64.f32 $0, f; }"
    ),
    "f32": "{ .reg .f32 f; ld.global.f32 f, [$1]; cvt.f64.f32 $0, f; }",
    "f64": "ld.global.f64 $0, [$1];",
}
_FROM_F32 = {
    "f16": "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; st.global.b16 [$0], h; }",
    "bf16": "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }",
    "f32": "st.global.f32 [$0], $1;",
    "f64": "{ .reg .f64 d; cvt.f64.f32 d, $1; st.global.f64 [$0], d; }",
}


@functools.cache
def integer_load(kind: str) -> Any:
    """Return a function address -> int64; what is over 2**63 comes out negative."""
    if SIMULATED:
        dtype = DTYPES["i8" if kind == "u8" else kind]
        return lambda address: np.int64(memory(address, dtype, 1)[0])
    bits = 8 * int(kind[1])
    letter = {"i": "s", "u": "u", "b": "u"}[kind[0]]
    load = ptx(f"ld.global.{letter}{bits} $0, [$1];", types.int64, types.int64)

    @device
    def load_integer(address):
        return load(address)

    return load_integer


@functools.cache
def label_load(kind: str) -> Any:
    """Return a function address -> label; from 2**63 on the lowest integer, which no label is."""
    read = integer_load(kind)
    if kind != "u8":
        return read
    lowest = np.int64(-(2**63))

    @device
    def load_label(address):
        label = read(address)
        return lowest if label < 0 else label

    return load_label


@functools.cache
def load(kind: str, real: type) -> Any:
    """Return a function address -> number of the real type; bool is 0 or 1, whatever its byte."""
    if SIMULATED:
        dtype = np.dtype(np.uint8) if kind == "b1" else DTYPES[kind]
        if kind == "b1":
            return lambda address: real(memory(address, dtype, 1)[0] != 0)
        return lambda address: real(memory(address, dtype, 1)[0])
    if kind in ITEM_BYTES:
        table, numba_type = (_TO_F32, types.float32) if real is np.float32 else (_TO_F64, types.float64)
        read = ptx(table[kind], numba_type, types.int64)

        @device
        def load_float(address):
            return read(address)

        return load_float
    read = integer_load(kind)
    if kind == "u8":

        @device
        def load_unsigned(address):
            return real(np.uint64(read(address)))

        return load_unsigned
    if kind == "b1":

        @device
        def load_bool(address):
            return real(1) if read(address) != 0 else real(0)

        return load_bool

    @device
    def load_number(address):
        return real(read(address))

    return load_number


@functools.cache
def store(kind: str, real: type) -> Any:
    """Return a function (address, number of the real type) that stores it rounded to a kind of float."""
    if SIMULATED:
        dtype = DTYPES[kind]

        def store_plain(address, value):
            memory(address, dtype, 1)[0] = value

        return store_plain
    if real is np.float32:
        return _wrapped_store(ptx(_FROM_F32[kind], None, types.int64, types.float32))
    text = {
        "f32": "{ .reg .f32 f; cvt.rn.f32.f64 f, $1; st.global.f32 [$0], f; }",
        "f64": "st.global.f64 [$0], $1;",
    }
    return _wrapped_store(ptx(text[kind], None, types.int64, types.float64))


@functools.cache
def store_integer(kind: str) -> Any:
    """Return a function (address, int64) that stores it as an integer of some bytes."""
    if SIMULATED:
        dtype = DTYPES[kind]

        def store_plain(address, value):
            memory(address, dtype, 1)[0] = value

        return store_plain
    return _wrapped_store(ptx(f"st.global.u{8 * int(kind[1])} [$0], $1;", None, types.int64, types.int64))


def _wrapped_store(write: Any) -> Any:
    @device
    def store_number(address, value):
        write(address, value)

    return store_number


@functools.cache
def switch(kinds: tuple[str, ...], make: Any) -> Any:
    """Return a function (kind number, address) that loads whichever of the kinds it is.

    The number is the same for all threads, so that none waits for another.
    """
    from logitloss._kernels.cuda_arrays import KINDS

    def join(rest: tuple[str, ...]) -> Any:
        number, read = KINDS.index(rest[0]), make(rest[0])
        if len(rest) == 1:

            @device
            def last(kind, address):
                return read(address)

            return last
        others = join(rest[1:])

        @device
        def choose(kind, address):
            return read(address) if kind == number else others(kind, address)

        return choose

    return join(kinds)


# ---- sixteen bytes ----

if SIMULATED:

    def load_words(address):
        return tuple(memory(address, np.uint32, 4))

    def store_words(address, words):
        memory(address, np.uint32, 4)[:] = words

else:
    _load_words = ptx("ld.global.v4.u32 {$0, $1, $2, $3}, [$4];", WORDS, types.int64)
    _store_words = ptx("st.global.v4.u32 [$0], {$1, $2, $3, $4};", None, types.int64, *[types.uint32] * 4)

    @device
    def load_words(address):
        """Sixteen bytes at an address that is a multiple of sixteen."""
        return _load_words(address)

    @device
    def store_words(address, words):
        _store_words(address, words[0], words[1], words[2], words[3])


_PAIR = types.UniTuple(types.float32, 2)
_UNPACK = {
    "f16": (
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
        _PAIR,
    ),
    "bf16": (
        "{ .reg .b16 l, h, z; mov.b16 z, 0; mov.b32 {l, h}, $2; mov.b32 $0, {z, l}; mov.b32 $1, {z, h}; }",
        _PAIR,
    ),
    "f32": ("mov.b32 $0, $1;", types.float32),
}


@functools.cache
def unpack(item: str, real: type) -> Any:
    """Return a function (four words) -> tuple of the numbers they hold."""
    if SIMULATED:
        dtype = DTYPES[item]
        return lambda words: tuple(np.array(words, np.uint32).view(dtype).astype(real))
    if item == "f64":
        join = ptx("mov.b64 $0, {$1, $2};", types.float64, types.uint32, types.uint32)

        @device
        def unpack_two(words):
            return (join(words[0], words[1]), join(words[2], words[3]))

        return unpack_two
    one = ptx(*_UNPACK[item], types.uint32)
    if item == "f32":

        @device
        def unpack_four(words):
            return (one(words[0]), one(words[1]), one(words[2]), one(words[3]))

        return unpack_four

    @device
    def unpack_eight(words):
        return one(words[0]) + one(words[1]) + one(words[2]) + one(words[3])

    return unpack_eight


@functools.cache
def pack(item: str) -> Any:
    """Return a function (tuple of numbers) -> four words; the numbers are rounded to the item's type."""
    if SIMULATED:
        dtype = DTYPES[item]
        return lambda values: tuple(np.array(values).astype(dtype).view(np.uint32))
    if item == "f64":
        split = ptx("mov.b64 {$0, $1}, $2;", types.UniTuple(types.uint32, 2), types.float64)

        @device
        def pack_two(values):
            return split(values[0]) + split(values[1])

        return pack_two
    if item == "f32":
        bits = ptx("mov.b32 $0, $1;", types.uint32, types.float32)

        @device
        def pack_four(values):
            return (bits(values[0]), bits(values[1]), bits(values[2]), bits(values[3]))

        return pack_four
    both = ptx(f"cvt.rn.{item}x2.f32 $0, $2, $1;", types.uint32, types.float32, types.float32)

    @device
    def pack_eight(values):
        return (
            both(values[0], values[1]),
            both(values[2], values[3]),
            both(values[4], values[5]),
            both(values[6], values[7]),
        )

    return pack_eight
