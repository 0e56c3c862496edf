"""Items in memory, of any kind, as reals: loads and stores of one, of a vector, of a pair of vectors.

Memory is addresses, as integers. An item is of one of `ITEMS` and becomes the real type on its way into a
register, and back on its way out. Where its kind is known when a kernel is compiled, a function is made for
it; else one asks for the kind at run time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from logitloss._kernels.vectors import BYTE, INT32, Vector, call, constant, inline, splat
from numba import types
from numba.extending import intrinsic

# As the kernels' jobs number them
ITEMS = ("f16", "bf16", "f32", "f64", "bool", "i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64")


def stored_type(item: str) -> ir.Type:
    if item in ("f32", "f64"):
        return ir.FloatType() if item == "f32" else ir.DoubleType()
    if item == "f16":
        return ir.HalfType()
    return ir.IntType(8 if item == "bool" else int(item.lstrip("biuf")))


def itemsize(item: str) -> int:
    """Return how many bytes an item takes."""
    return 1 if item == "bool" else int(item.lstrip("biuf")) // 8


def to_real(builder: Any, item: str, value: Any, real: ir.Type) -> Any:
    """Return items as reals."""
    lanes = (
        (lambda kind: ir.VectorType(kind, value.type.count))
        if isinstance(value.type, ir.VectorType)
        else (lambda kind: kind)
    )
    if item == "bf16":
        wide = lanes(ir.IntType(32))
        value = builder.shl(builder.zext(value, wide), constant(wide, 16))
        value, item = builder.bitcast(value, lanes(ir.FloatType())), "f32"
    if item in ("f16", "f32", "f64"):
        own, wanted = ITEMS.index(item), ITEMS.index("f64" if isinstance(real, ir.DoubleType) else "f32")
        if own == wanted:
            return value
        return (builder.fpext if own < wanted else builder.fptrunc)(value, lanes(real))
    if item == "bool":
        value = builder.icmp_unsigned("!=", value, constant(value.type, 0))
    signed = item.startswith("i")
    return (builder.sitofp if signed else builder.uitofp)(value, lanes(real))


def from_real(builder: Any, item: str, value: Any) -> Any:
    """Return reals as items, rounded to the nearest, to even between two."""
    vector = isinstance(value.type, ir.VectorType)
    lanes = (lambda kind: ir.VectorType(kind, value.type.count)) if vector else (lambda kind: kind)
    real = value.type.element if vector else value.type
    if item in ("f16", "bf16") and isinstance(real, ir.DoubleType):
        # In one step it would be a function of a library that Numba does not have.
        real = ir.FloatType()
        value = builder.fptrunc(value, lanes(real))
    if item == "bf16":
        bits = lanes(ir.IntType(32))
        number = builder.bitcast(value, bits)
        high = builder.lshr(number, constant(bits, 16))
        tie = builder.add(builder.and_(high, constant(bits, 1)), constant(bits, 0x7FFF))
        rounded = builder.lshr(builder.add(number, tie), constant(bits, 16))
        quiet = builder.or_(high, constant(bits, 0x40))
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, quiet, rounded), lanes(ir.IntType(16)))
    stored = stored_type(item)
    if isinstance(stored, ir.IntType):
        return (builder.fptosi if item.startswith("i") else builder.fptoui)(value, lanes(stored))
    if stored == real:
        return value
    widens = isinstance(stored, ir.DoubleType)
    return (builder.fpext if widens else builder.fptrunc)(value, lanes(stored))


def loader(item: str, real: Any, n: int = 1) -> Any:
    """Return a function that loads n items next to each other as a vector of reals, or one as a number."""
    number = types.float64 if real is np.float64 else types.float32
    result = Vector(number, n) if n > 1 else number
    stored = ir.VectorType(stored_type(item), n) if n > 1 else stored_type(item)

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], stored.as_pointer()))
            value.align = itemsize(item)
            return to_real(builder, item, value, context.get_value_type(number))

        return result(types.intp), generate

    return load


def byte_loader(real: Any, n: int) -> Any:
    """Return a function that loads n bytes as a vector of reals, none above `largest`."""
    number = types.float64 if real is np.float64 else types.float32
    stored = ir.VectorType(BYTE, n)

    @intrinsic
    def load(typingctx: Any, address: Any, largest: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], stored.as_pointer()))
            value.align = 1
            bound = splat(builder, builder.trunc(args[1], BYTE), stored)
            value = builder.select(builder.icmp_unsigned("<", value, bound), value, bound)
            return to_real(builder, "u8", value, context.get_value_type(number))

        return Vector(number, n)(types.intp, types.intp), generate

    return load


def _set_streamed(builder: Any, store: Any, n_bytes: int) -> None:
    """Let a store of so many bytes, on that bound or a line's, go around the cache."""
    store.align = min(n_bytes, 64)
    store.set_metadata("nontemporal", builder.module.add_metadata([INT32(1)]))


def storer(item: str, real: Any, n: int = 1, streams: bool = False) -> Any:
    """Return a function that stores reals as items; around the cache if it `streams`, on a vector's bound."""
    number = types.float64 if real is np.float64 else types.float32
    given = Vector(number, n) if n > 1 else number
    stored = ir.VectorType(stored_type(item), n) if n > 1 else stored_type(item)

    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            reals = context.cast(builder, args[1], value, given)
            pointer = builder.inttoptr(args[0], stored.as_pointer())
            instruction = builder.store(from_real(builder, item, reals), pointer)
            instruction.align = itemsize(item)
            if streams:
                _set_streamed(builder, instruction, itemsize(item) * n)
            return context.get_dummy_value()

        return types.void(types.intp, value), generate

    return store


def pair_loader(item: str, real: Any, n: int) -> Any:
    """Return a function that loads 2*n items as two vectors, in which order is left to what is quickest."""
    if item != "bf16":
        load, width = loader(item, real, n), itemsize(item)

        @inline
        def load_pair(address):
            return load(address), load(address + n * width)

        return load_pair

    vector = Vector(types.float32, n)

    @intrinsic
    def load_words(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            words, floats = ir.VectorType(INT32, n), ir.VectorType(ir.FloatType(), n)
            value = builder.load(builder.inttoptr(args[0], words.as_pointer()))
            value.align = 2
            halves = (
                builder.shl(value, constant(words, 16)),
                builder.and_(value, constant(words, 0xFFFF0000)),
            )
            return context.make_tuple(
                builder, sig.return_type, [builder.bitcast(half, floats) for half in halves]
            )

        return types.UniTuple(vector, 2)(types.intp), generate

    return load_words


def pair_storer(item: str, real: Any, n: int, streams: bool = False) -> Any:
    """Return the function that stores such a pair; of NaN, none whose last bits are all set."""
    if item != "bf16":
        store, width = storer(item, real, n, streams), itemsize(item)

        @inline
        def store_pair(address, first, second):
            store(address, first)
            store(address + n * width, second)

        return store_pair

    vector = Vector(types.float32, n)

    @intrinsic
    def store_words(typingctx: Any, address: Any, first: Any, second: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            words = ir.VectorType(INT32, n)

            def rounded(value: Any) -> Any:
                bits = builder.bitcast(value, words)
                odd = builder.and_(builder.lshr(bits, constant(words, 16)), constant(words, 1))
                return builder.add(builder.add(bits, odd), constant(words, 0x7FFF))

            low = builder.lshr(rounded(args[1]), constant(words, 16))
            high = builder.and_(rounded(args[2]), constant(words, 0xFFFF0000))
            pointer = builder.inttoptr(args[0], words.as_pointer())
            instruction = builder.store(builder.or_(low, high), pointer)
            instruction.align = 2
            if streams:
                _set_streamed(builder, instruction, 4 * n)
            return context.get_dummy_value()

        return types.void(types.intp, vector, vector), generate

    return store_words


def half_seekers(item: str, n: int) -> tuple[Any, Any, Any]:
    """Return the functions that seek the largest of floats of 16 bits, n at a time, by their bits.

    As signed integers, floats that are not negative are in order, and above all that are; among those the
    smallest as unsigned integers is the largest. NaN is above all, or below.
    """
    bits = ir.VectorType(ir.IntType(16), n)
    vector = Vector(types.int16, n)

    @intrinsic
    def start(typingctx: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values = [constant(bits, -0x8000), constant(bits, -1)]
            return context.make_tuple(builder, sig.return_type, values)

        return types.UniTuple(vector, 2)(), generate

    @intrinsic
    def look(typingctx: Any, high: Any, low: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[2], bits.as_pointer()))
            value.align = 2
            found = [
                builder.select(builder.icmp_signed(">", args[0], value), args[0], value),
                builder.select(builder.icmp_unsigned("<", args[1], value), args[1], value),
            ]
            return context.make_tuple(builder, sig.return_type, found)

        return types.UniTuple(vector, 2)(vector, vector, types.intp), generate

    @intrinsic
    def largest(typingctx: Any, high: Any, low: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            one = ir.IntType(16)
            high = call(builder, f"llvm.vector.reduce.smax.v{n}i16", one, [args[0]])
            low = call(builder, f"llvm.vector.reduce.umin.v{n}i16", one, [args[1]])
            value = builder.select(builder.icmp_signed(">=", high, one(0)), high, low)
            if item == "f16":
                value = builder.bitcast(value, ir.HalfType())
            return to_real(builder, item, value, ir.FloatType())

        return types.float32(vector, vector), generate

    return start, look, largest


def _switch(builder: Any, kind: Any, items: tuple[str, ...], make: Any) -> Any:
    """Do `make(item)` for the item whose place is `kind`; return its value, if it has any."""
    ends = []
    last = builder.append_basic_block("chosen")
    blocks = [builder.append_basic_block(item) for item in items]
    switch = builder.switch(kind, blocks[0])
    for number, (item, block) in enumerate(zip(items, blocks, strict=True)):
        switch.add_case(kind.type(number), block)
        builder.position_at_end(block)
        ends.append((make(item), builder.block))
        builder.branch(last)
    builder.position_at_end(last)
    if ends[0][0] is None:
        return None
    value = builder.phi(ends[0][0].type)
    for end in ends:
        value.add_incoming(*end)
    return value


def any_loader(real: Any, n: int = 1) -> Any:
    """Return the function that loads items of a kind found out at run time."""
    number = types.float64 if real is np.float64 else types.float32
    result = Vector(number, n) if n > 1 else number

    @intrinsic
    def load(typingctx: Any, kind: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def make(item: str) -> Any:
                stored = ir.VectorType(stored_type(item), n) if n > 1 else stored_type(item)
                value = builder.load(builder.inttoptr(args[1], stored.as_pointer()))
                value.align = itemsize(item)
                return to_real(builder, item, value, context.get_value_type(number))

            return _switch(builder, args[0], ITEMS, make)

        return result(types.intp, types.intp), generate

    return load


def any_storer(real: Any, n: int = 1) -> Any:
    """Return the function that stores reals as floats of a kind found out at run time."""
    number = types.float64 if real is np.float64 else types.float32
    given = Vector(number, n) if n > 1 else number

    @intrinsic
    def store(typingctx: Any, kind: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            reals = context.cast(builder, args[2], value, given)

            def make(item: str) -> None:
                stored = ir.VectorType(stored_type(item), n) if n > 1 else stored_type(item)
                pointer = builder.inttoptr(args[1], stored.as_pointer())
                builder.store(from_real(builder, item, reals), pointer).align = itemsize(item)

            _switch(builder, args[0], ITEMS[:4], make)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, value), generate

    return store


@intrinsic
def load_label(typingctx: Any, kind: Any, address: Any) -> Any:
    """Return an integer of any kind as int64; from 2**63 on the lowest, which no label is."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.IntType(64)

        def make(item: str) -> Any:
            stored = ir.IntType(8 * itemsize(item))
            value = builder.load(builder.inttoptr(args[1], stored.as_pointer()))
            if item == "u64":
                is_over = builder.icmp_signed("<", value, wide(0))
                return builder.select(is_over, wide(-(2**63)), value)
            if stored.width == 64:
                return value
            return (builder.sext if item.startswith("i") else builder.zext)(value, wide)

        return _switch(builder, args[0], ITEMS, make)

    return types.int64(types.intp, types.intp), generate


@intrinsic
def load_integer(typingctx: Any, address: Any) -> Any:
    """Return an int64."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()))

    return types.int64(types.intp), generate


def label_loader(real: Any, n: int) -> Any:
    """Return a function that loads n labels of a kind as reals, -1 where ignored, -2 where out of range.

    There are fewer than 2**24 classes, which a float32 can number.
    """
    number = types.float64 if real is np.float64 else types.float32

    @intrinsic
    def load(typingctx: Any, kind: Any, address: Any, n_classes: Any, ignore_index: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            wide = ir.VectorType(ir.IntType(64), n)

            def make(item: str) -> Any:
                stored = ir.VectorType(ir.IntType(8 * itemsize(item)), n)
                value = builder.load(builder.inttoptr(args[1], stored.as_pointer()))
                value.align = itemsize(item)
                if item == "u64":
                    is_over = builder.icmp_signed("<", value, constant(wide, 0))
                    return builder.select(is_over, constant(wide, -(2**63)), value)
                if itemsize(item) == 8:
                    return value
                return (builder.sext if item.startswith("i") else builder.zext)(value, wide)

            labels = _switch(builder, args[0], ITEMS, make)
            is_class = builder.icmp_unsigned("<", labels, splat(builder, args[2], wide))
            is_ignored = builder.icmp_signed("==", labels, splat(builder, args[3], wide))
            narrow = ir.VectorType(INT32, n)
            value = builder.select(is_class, builder.trunc(labels, narrow), constant(narrow, -2))
            value = builder.select(is_ignored, constant(narrow, -1), value)
            return builder.sitofp(value, ir.VectorType(context.get_value_type(number), n))

        return Vector(number, n)(*[types.intp] * 4), generate

    return load
