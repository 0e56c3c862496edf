"""Vectors of the processor's width as values in Numba, so that a kernel says which instructions it means.

LLVM finds vectors in scalar loops where it can prove that order does not matter; a running largest logit, or
a sum whose bits are the same every time, it cannot. So kernels are written on `Vector` values: LLVM's own
vector types, of as many lanes as one register of this processor has. Arithmetic and comparisons are Python's
operators, a number beside a vector means all lanes, a comparison gives a mask.

`operations` returns the rest for one real type. Memory is addresses, as integers. What lies there (an item)
is any of `ITEMS`, and becomes the real type on its way into the register.
"""

from __future__ import annotations

import operator
from types import SimpleNamespace
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models, register_default
from numba.core.imputils import lower_cast
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin

# How functions that only kernels call are compiled: without the wrappers that Python would call, and by
# `inline` into each place, `outline` once
outline = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
inline = njit(error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)

# A register's size in bytes. LLVM makes two of one where it has less (SSE2, NEON).
VECTOR_BYTES = 64 if llvm.get_host_cpu_features().get("avx512f") else 32

# What can lie in memory, as the kernels' jobs number it
ITEMS = ("f16", "bf16", "f32", "f64", "bool", "i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64")

_BYTE, _INT32 = ir.IntType(8), ir.IntType(32)


class Vector(types.Type):
    """`n` lanes of a real type, of integers, or of booleans: then it is a mask."""

    def __init__(self, item: types.Type, n: int) -> None:
        self.item, self.n = item, n
        super().__init__(f"Vector({item}, {n})")

    @property
    def key(self) -> tuple[types.Type, int]:
        """What makes two of them the same."""
        return self.item, self.n


@register_default(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        item = ir.IntType(1) if fe_type.item == types.boolean else dmm.lookup(fe_type.item).get_value_type()
        super().__init__(dmm, fe_type, ir.VectorType(item, fe_type.n))


def _held(builder: Any, vector: ir.Constant) -> Any:
    """Return a vector constant as a value that LLVM keeps in a register, or as an operand on the stack.

    With sixteen registers it would else fill one of them anew, from a single number, at every turn of a loop.
    """
    if VECTOR_BYTES != 32:
        return vector
    count = vector.type.count
    n = min(count, VECTOR_BYTES // (8 if isinstance(vector.type.element, ir.DoubleType) else 4))
    kind = ir.VectorType(vector.type.element, n)
    one = ir.Constant(kind, vector.constant[:n])
    held = builder.asm(ir.FunctionType(kind, [kind]), "", "=x,0", [one], side_effect=False)
    held.attributes.add("nounwind")
    held.attributes.add("readnone")
    return held if n == count else builder.shuffle_vector(held, held, indices([0] * count))


def _splat(builder: Any, number: Any, vector: ir.VectorType) -> Any:
    if isinstance(number, ir.Constant):
        return _held(builder, ir.Constant(vector, [number.constant] * vector.count))
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, _INT32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), indices([0] * vector.count))


def indices(numbers: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT32, len(numbers)), numbers)


@lower_cast(types.Float, Vector)
@lower_cast(types.Integer, Vector)
def _cast_number(context: Any, builder: Any, given: types.Type, wanted: Vector, value: Any) -> Any:
    number = context.cast(builder, value, given, wanted.item)
    return _splat(builder, number, context.get_value_type(wanted))


def _common(*given: types.Type) -> types.Type | None:
    """Return the type of an operation on vectors and numbers: the vectors', or the widest number's."""
    vectors = {a for a in given if isinstance(a, Vector)}
    if not all(isinstance(a, (Vector, types.Float, types.Integer)) for a in given) or len(vectors) > 1:
        return None
    return vectors.pop() if vectors else max(given, key=lambda a: (isinstance(a, types.Float), a.bitwidth))


def _mask_of(vector: Vector) -> Vector:
    return Vector(types.boolean, vector.n)


def _operator(function: Any, emit: Any, is_comparison: bool = False) -> None:
    @infer_global(function)
    class Typer(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if any(isinstance(a, Vector) for a in args) and not kws:
                common = _common(*args)
                if common is not None:
                    result = _mask_of(common) if is_comparison else common
                    return signature(result, *[common] * len(args))
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, *args)

    lower_builtin(function, Vector, Vector)(lower)
    lower_builtin(function, Vector)(lower)


def _compare(sign: str) -> Any:
    # != is true with NaN, all others false.
    unordered = sign == "!="
    return lambda b, x, y: (b.fcmp_unordered if unordered else b.fcmp_ordered)(sign, x, y)


_operator(operator.add, lambda b, x, y: b.fadd(x, y))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))
_operator(operator.neg, lambda b, x: b.fneg(x))
_operator(operator.and_, lambda b, x, y: b.and_(x, y))
_operator(operator.or_, lambda b, x, y: b.or_(x, y))
_operator(operator.invert, lambda b, x: b.not_(x))
for _sign, _function in (
    ("<", operator.lt),
    ("<=", operator.le),
    (">", operator.gt),
    (">=", operator.ge),
    ("==", operator.eq),
    ("!=", operator.ne),
):
    _operator(_function, _compare(_sign), is_comparison=True)


def _number(kind: types.Type) -> types.Type:
    return kind.item if isinstance(kind, Vector) else kind


def _constant(kind: ir.Type, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _is_real(kind: types.Type) -> bool:
    return isinstance(_number(kind), types.Float)


def call(builder: Any, name: str, result: ir.Type, args: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in args]), name
    )
    return builder.call(function, args)


def _overload_name(name: str, kind: ir.Type) -> str:
    lanes, number = (f"v{kind.count}", kind.element) if isinstance(kind, ir.VectorType) else ("", kind)
    return f"llvm.{name}.{lanes}{'f64' if isinstance(number, ir.DoubleType) else 'f32'}"


# ---- on numbers and vectors alike ----


def elementwise(emit: Any, n_args: int) -> Any:
    """Make an intrinsic of reals, each a number or a vector, from a function of builder, type and values."""

    def define(typingctx: Any, *given: types.Type) -> Any:
        common = _common(*given)
        if common is None or not _is_real(common):
            return None

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            values = [context.cast(builder, a, kind, common) for a, kind in zip(args, sig.args, strict=True)]
            return emit(builder, context.get_value_type(common), *values)

        return common(*given), generate

    # Numba reads the number of arguments off the signature.
    if n_args == 1:
        return intrinsic(lambda typingctx, x: define(typingctx, x))
    if n_args == 2:
        return intrinsic(lambda typingctx, x, y: define(typingctx, x, y))
    return intrinsic(lambda typingctx, x, y, z: define(typingctx, x, y, z))


fma = elementwise(lambda b, kind, x, y, z: call(b, _overload_name("fma", kind), kind, [x, y, z]), 3)
absolute = elementwise(lambda b, kind, x: call(b, _overload_name("fabs", kind), kind, [x]), 1)
# The second operand where one is NaN, as one instruction has it
maximum = elementwise(lambda b, kind, x, y: b.select(b.fcmp_ordered(">", x, y), x, y), 2)
minimum = elementwise(lambda b, kind, x, y: b.select(b.fcmp_ordered("<", x, y), x, y), 2)


def bits_of(kind: ir.Type) -> ir.Type:
    number = kind.element if isinstance(kind, ir.VectorType) else kind
    bits = ir.IntType(64 if isinstance(number, ir.DoubleType) else 32)
    return ir.VectorType(bits, kind.count) if isinstance(kind, ir.VectorType) else bits


def mantissa_bits(bits: ir.Type) -> int:
    number = bits.element if isinstance(bits, ir.VectorType) else bits
    return 52 if number.width == 64 else 23


def _emit_shifted(builder: Any, kind: ir.Type, x: Any) -> Any:
    bits = bits_of(kind)
    moved = builder.shl(builder.bitcast(x, bits), _constant(bits, mantissa_bits(bits)))
    return builder.bitcast(moved, kind)


def _emit_flipped(builder: Any, kind: ir.Type, x: Any, y: Any) -> Any:
    bits = bits_of(kind)
    minus = builder.bitcast(_constant(kind, -0.0), bits)
    signs = builder.and_(builder.bitcast(y, bits), minus)
    return builder.bitcast(builder.xor(builder.bitcast(x, bits), signs), kind)


def _emit_either(builder: Any, kind: ir.Type, x: Any, y: Any) -> Any:
    bits = bits_of(kind)
    return builder.bitcast(builder.or_(builder.bitcast(x, bits), builder.bitcast(y, bits)), kind)


def _emit_exponent(builder: Any, kind: ir.Type, x: Any) -> Any:
    bits = bits_of(kind)
    bias = 1023 if mantissa_bits(bits) == 52 else 127
    biased = builder.lshr(builder.bitcast(x, bits), _constant(bits, mantissa_bits(bits)))
    return builder.sitofp(builder.sub(biased, _constant(bits, bias)), kind)


def _emit_mantissa(builder: Any, kind: ir.Type, x: Any) -> Any:
    bits = bits_of(kind)
    width = mantissa_bits(bits)
    bias = 1023 if width == 52 else 127
    low = builder.and_(builder.bitcast(x, bits), _constant(bits, (1 << width) - 1))
    return builder.bitcast(builder.or_(low, _constant(bits, bias << width)), kind)


# The low bits of a real, moved to its exponent's place
low_bits_as_exponent = elementwise(_emit_shifted, 1)
# Of a positive normal number, x = mantissa * 2**exponent with 1 <= mantissa < 2
exponent_of = elementwise(_emit_exponent, 1)
mantissa_of = elementwise(_emit_mantissa, 1)
# The bits that either has
either = elementwise(_emit_either, 2)
# x with its sign changed where y has a minus, be it of zero or NaN
flipped = elementwise(_emit_flipped, 2)


def polynomial(terms: list[float]) -> Any:
    """Return the function with these terms, the highest power first.

    Many terms go even and odd powers by themselves, for half the latency.
    """

    def emit(builder: Any, kind: ir.Type, x: Any) -> Any:
        def constant(number: float) -> Any:
            value = _constant(kind, number)
            return _held(builder, value) if isinstance(kind, ir.VectorType) else value

        def chain(numbers: list[float], step: Any) -> Any:
            total = constant(numbers[0])
            for number in numbers[1:]:
                total = multiply_add(total, step, constant(number))
            return total

        def multiply_add(*args: Any) -> Any:
            return call(builder, _overload_name("fma", kind), kind, list(args))

        if len(terms) <= 8:
            return chain(terms, x)
        square, even, odd = builder.fmul(x, x), terms[::-1][::2][::-1], terms[::-1][1::2][::-1]
        return multiply_add(chain(odd, square), x, chain(even, square))

    return elementwise(emit, 1)


@intrinsic
def where(typingctx: Any, condition: Any, a: Any, b: Any) -> Any:
    """Return a where the condition holds, else b; both are computed."""
    common = _common(a, b)
    if isinstance(condition, Vector) and not isinstance(common, Vector):
        common = Vector(common, condition.n)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        chosen = [context.cast(builder, v, k, common) for v, k in zip(args[1:], sig.args[1:], strict=True)]
        return builder.select(args[0], *chosen)

    return common(condition, a, b), generate


@intrinsic
def has_minus(typingctx: Any, x: Any) -> Any:
    """Return the mask of lanes with a minus, be it of zero or NaN."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = bits_of(args[0].type)
        return builder.icmp_signed("<", builder.bitcast(args[0], bits), _constant(bits, 0))

    return _mask_of(x)(x), generate


@intrinsic
def any_lane(typingctx: Any, mask: Any) -> Any:
    """Whether a mask has a lane set."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.IntType(mask.n)
        return builder.icmp_unsigned("!=", builder.bitcast(args[0], bits), bits(0))

    return types.boolean(mask), generate


@intrinsic
def first_lane(typingctx: Any, mask: Any) -> Any:
    """Return the number of the first lane that is set; some is."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.IntType(mask.n)
        number = builder.cttz(builder.bitcast(args[0], bits), ir.IntType(1)(1))
        return builder.zext(number, ir.IntType(64))

    return types.intp(mask), generate


# ---- memory ----


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for a line of memory that will be read."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _BYTE.as_pointer())
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _INT32(0), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


def prefetcher(n_bytes: int) -> Any:
    """Return the function that asks for all lines of so many bytes, `ahead` of an address."""

    @intrinsic
    def prefetch_lines(typingctx: Any, address: Any, ahead: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            start = builder.gep(builder.inttoptr(args[0], _BYTE.as_pointer()), [args[1]])
            for offset in range(0, n_bytes, 64):
                line = builder.gep(start, [_INT32(offset)])
                call(builder, "llvm.prefetch.p0", ir.VoidType(), [line, _INT32(0), _INT32(3), _INT32(1)])
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return prefetch_lines


@intrinsic
def keep_rolled(typingctx: Any) -> Any:
    """Make LLVM leave the loop around it as it is: two turns at once take too many registers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def fence(typingctx: Any) -> Any:
    """Make streamed stores visible to other threads."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if llvm.get_process_triple().startswith("x86_64"):
            call(builder, "llvm.x86.sse.sfence", ir.VoidType(), [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


def _stored_type(item: str) -> ir.Type:
    if item in ("f32", "f64"):
        return ir.FloatType() if item == "f32" else ir.DoubleType()
    if item == "f16":
        return ir.HalfType()
    return ir.IntType(8 if item == "bool" else int(item.lstrip("biuf")))


def itemsize(item: str) -> int:
    """Return how many bytes an item takes."""
    return 1 if item == "bool" else int(item.lstrip("biuf")) // 8


def _to_real(builder: Any, item: str, value: Any, real: ir.Type) -> Any:
    """Return items as reals."""
    lanes = (
        (lambda kind: ir.VectorType(kind, value.type.count))
        if isinstance(value.type, ir.VectorType)
        else (lambda kind: kind)
    )
    if item == "bf16":
        wide = lanes(ir.IntType(32))
        value = builder.shl(builder.zext(value, wide), _constant(wide, 16))
        value, item = builder.bitcast(value, lanes(ir.FloatType())), "f32"
    if item in ("f16", "f32", "f64"):
        own, wanted = ITEMS.index(item), ITEMS.index("f64" if isinstance(real, ir.DoubleType) else "f32")
        if own == wanted:
            return value
        return (builder.fpext if own < wanted else builder.fptrunc)(value, lanes(real))
    if item == "bool":
        value = builder.icmp_unsigned("!=", value, _constant(value.type, 0))
    signed = item.startswith("i")
    return (builder.sitofp if signed else builder.uitofp)(value, lanes(real))


def _from_real(builder: Any, item: str, value: Any) -> Any:
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
        high = builder.lshr(number, _constant(bits, 16))
        tie = builder.add(builder.and_(high, _constant(bits, 1)), _constant(bits, 0x7FFF))
        rounded = builder.lshr(builder.add(number, tie), _constant(bits, 16))
        quiet = builder.or_(high, _constant(bits, 0x40))
        is_nan = builder.fcmp_unordered("uno", value, value)
        return builder.trunc(builder.select(is_nan, quiet, rounded), lanes(ir.IntType(16)))
    stored = _stored_type(item)
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
    stored = ir.VectorType(_stored_type(item), n) if n > 1 else _stored_type(item)

    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], stored.as_pointer()))
            value.align = itemsize(item)
            return _to_real(builder, item, value, context.get_value_type(number))

        return result(types.intp), generate

    return load


def byte_loader(real: Any, n: int) -> Any:
    """Return a function that loads n bytes as a vector of reals, none above `largest`."""
    number = types.float64 if real is np.float64 else types.float32
    stored = ir.VectorType(_BYTE, n)

    @intrinsic
    def load(typingctx: Any, address: Any, largest: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = builder.load(builder.inttoptr(args[0], stored.as_pointer()))
            value.align = 1
            bound = _splat(builder, builder.trunc(args[1], _BYTE), stored)
            value = builder.select(builder.icmp_unsigned("<", value, bound), value, bound)
            return _to_real(builder, "u8", value, context.get_value_type(number))

        return Vector(number, n)(types.intp, types.intp), generate

    return load


def _set_streamed(builder: Any, store: Any, n_bytes: int) -> None:
    """Let a store of so many bytes, on that bound or a line's, go around the cache."""
    store.align = min(n_bytes, 64)
    store.set_metadata("nontemporal", builder.module.add_metadata([_INT32(1)]))


def storer(item: str, real: Any, n: int = 1, streams: bool = False) -> Any:
    """Return a function that stores reals as items; around the cache if it `streams`, on a vector's bound."""
    number = types.float64 if real is np.float64 else types.float32
    given = Vector(number, n) if n > 1 else number
    stored = ir.VectorType(_stored_type(item), n) if n > 1 else _stored_type(item)

    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            reals = context.cast(builder, args[1], value, given)
            pointer = builder.inttoptr(args[0], stored.as_pointer())
            instruction = builder.store(_from_real(builder, item, reals), pointer)
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
            words, floats = ir.VectorType(_INT32, n), ir.VectorType(ir.FloatType(), n)
            value = builder.load(builder.inttoptr(args[0], words.as_pointer()))
            value.align = 2
            halves = (
                builder.shl(value, _constant(words, 16)),
                builder.and_(value, _constant(words, 0xFFFF0000)),
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
            words = ir.VectorType(_INT32, n)

            def rounded(value: Any) -> Any:
                bits = builder.bitcast(value, words)
                odd = builder.and_(builder.lshr(bits, _constant(words, 16)), _constant(words, 1))
                return builder.add(builder.add(bits, odd), _constant(words, 0x7FFF))

            low = builder.lshr(rounded(args[1]), _constant(words, 16))
            high = builder.and_(rounded(args[2]), _constant(words, 0xFFFF0000))
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
            values = [_constant(bits, -0x8000), _constant(bits, -1)]
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
            return _to_real(builder, item, value, ir.FloatType())

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
                stored = ir.VectorType(_stored_type(item), n) if n > 1 else _stored_type(item)
                value = builder.load(builder.inttoptr(args[1], stored.as_pointer()))
                value.align = itemsize(item)
                return _to_real(builder, item, value, context.get_value_type(number))

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
                stored = ir.VectorType(_stored_type(item), n) if n > 1 else _stored_type(item)
                pointer = builder.inttoptr(args[1], stored.as_pointer())
                builder.store(_from_real(builder, item, reals), pointer).align = itemsize(item)

            _switch(builder, args[0], ITEMS[:4], make)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, value), generate

    return store


@intrinsic
def load_label(typingctx: Any, kind: Any, address: Any) -> Any:
    """Return an integer of any kind as int64; over 2**63 the largest, which no label can be."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        wide = ir.IntType(64)

        def make(item: str) -> Any:
            stored = ir.IntType(8 * itemsize(item))
            value = builder.load(builder.inttoptr(args[1], stored.as_pointer()))
            if item == "u64":
                is_over = builder.icmp_signed("<", value, wide(0))
                return builder.select(is_over, wide(2**63 - 1), value)
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


# ---- rows of a few items each, a row in each lane ----


# A vector is taken as pieces of 16 bytes of reals, each from another row: so a load or store moves a whole
# piece, and a transpose stays within them.
def piece_items(real: Any) -> int:
    """Return how many items a piece has: so many classes of a row."""
    return 16 // np.dtype(real).itemsize


def _transposed_pieces(builder: Any, block: list[Any], lanes: int) -> list[Any]:
    """Return as many vectors as a piece has items, transposed within the pieces; it is its own inverse."""
    unit, n = 1, len(block)
    while unit < n:
        # Of two vectors, runs of `unit` items in turn: those from their pieces' low halves, and their high
        low = [
            i - i % n + i % n // (2 * unit) * unit + i % unit + i // unit % 2 * lanes for i in range(lanes)
        ]
        orders = [indices(low), indices([i + n // 2 for i in low])]
        block = block[::2] + block[1::2] if unit > 1 else block
        pairs = list(zip(block[::2], block[1::2], strict=True))
        block = [builder.shuffle_vector(*pair, order) for pair in pairs for order in orders]
        unit *= 2
    return block


def piece_loader(item: str, real: Any, lanes: int) -> Any:
    """Return a function that loads a piece of `lanes` rows `stride` bytes apart: a vector a class."""
    number, n = types.float64 if real is np.float64 else types.float32, piece_items(real)
    piece = ir.VectorType(_stored_type(item), n)
    result = types.UniTuple(Vector(number, lanes), n)

    @intrinsic
    def load(typingctx: Any, address: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def load_piece(row: int) -> Any:
                place = builder.add(args[0], builder.mul(args[1], args[1].type(row)))
                value = builder.load(builder.inttoptr(place, piece.as_pointer()))
                value.align = itemsize(item)
                return value

            def join(parts: list[Any]) -> Any:
                if len(parts) == 1:
                    return parts[0]
                low, high = join(parts[: len(parts) // 2]), join(parts[len(parts) // 2 :])
                return builder.shuffle_vector(low, high, indices(list(range(2 * low.type.count))))

            rows = [join([load_piece(row) for row in range(first, lanes, n)]) for first in range(n)]
            reals = [_to_real(builder, item, row, context.get_value_type(number)) for row in rows]
            return context.make_tuple(builder, sig.return_type, _transposed_pieces(builder, reals, lanes))

        return result(types.intp, types.intp), generate

    return load


def piece_storer(item: str, real: Any, lanes: int) -> Any:
    """Return the function that stores them."""
    n = piece_items(real)
    piece = ir.VectorType(_stored_type(item), n)

    @intrinsic
    def store(typingctx: Any, address: Any, stride: Any, classes: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            block = _transposed_pieces(builder, cgutils.unpack_tuple(builder, args[2], n), lanes)
            for first, reals in enumerate(block):
                items = _from_real(builder, item, reals)
                for row in range(first, lanes, n):
                    order = indices(list(range(row - first, row - first + n)))
                    place = builder.add(args[0], builder.mul(args[1], args[1].type(row)))
                    value = builder.shuffle_vector(items, items, order)
                    builder.store(value, builder.inttoptr(place, piece.as_pointer())).align = itemsize(item)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, classes), generate

    return store


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
                    is_over = builder.icmp_signed("<", value, _constant(wide, 0))
                    return builder.select(is_over, _constant(wide, 2**63 - 1), value)
                if itemsize(item) == 8:
                    return value
                return (builder.sext if item.startswith("i") else builder.zext)(value, wide)

            labels = _switch(builder, args[0], ITEMS, make)
            is_class = builder.icmp_unsigned("<", labels, _splat(builder, args[2], wide))
            is_ignored = builder.icmp_signed("==", labels, _splat(builder, args[3], wide))
            narrow = ir.VectorType(_INT32, n)
            value = builder.select(is_class, builder.trunc(labels, narrow), _constant(narrow, -2))
            value = builder.select(is_ignored, _constant(narrow, -1), value)
            return builder.sitofp(value, ir.VectorType(context.get_value_type(number), n))

        return Vector(number, n)(*[types.intp] * 4), generate

    return load


# ---- bytes ----


@intrinsic
def as_pointer(typingctx: Any, address: Any) -> Any:
    """Return an address as what `carray` takes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _BYTE.as_pointer())

    return types.voidptr(types.intp), generate


_bytes, _byte = loader("f32", np.float32, VECTOR_BYTES // 4), loader("u8", np.float32)
_put_bytes, _put_byte = storer("f32", np.float32, VECTOR_BYTES // 4), storer("u8", np.float32)
_stream_bytes = storer("f32", np.float32, VECTOR_BYTES // 4, streams=True)


@outline
def copy(to: int, source: int, n: int) -> None:
    """Copy bytes."""
    for i in range(0, n - n % VECTOR_BYTES, VECTOR_BYTES):
        _put_bytes(to + i, _bytes(source + i))
    for i in range(n - n % VECTOR_BYTES, n):
        _put_byte(to + i, _byte(source + i))


@outline
def stream(to: int, source: int, n: int) -> None:
    """Copy bytes, whole lines around the cache."""
    head = min(-to % 64, n)
    copy(to, source, head)
    lines = (n - head) // 64 * 64
    for i in range(head, head + lines, VECTOR_BYTES):
        _stream_bytes(to + i, _bytes(source + i))
    copy(to + head + lines, source + head + lines, n - head - lines)


# ---- of one real type ----


def operations(real: Any, registers: int = 1) -> SimpleNamespace:
    """Return the operations whose vectors have reals of one type, with those above.

    A vector of several registers is worked on step by step: as each step waits for the one before, a
    processor looks ahead in one vector's chain no further than its end.
    """
    item = "f64" if real is np.float64 else "f32"
    number = types.float64 if real is np.float64 else types.float32
    n = registers * VECTOR_BYTES // itemsize(item)
    vector = Vector(number, n)

    @intrinsic
    def parts(typingctx: Any, x: Any) -> Any:
        """Return the registers of a vector."""
        width = n // registers

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            each = [
                builder.shuffle_vector(args[0], args[0], indices(list(range(i, i + width))))
                for i in range(0, n, width)
            ]
            return context.make_tuple(builder, sig.return_type, each)

        return types.UniTuple(Vector(number, width), registers)(vector), generate

    @intrinsic
    def splat(typingctx: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return context.cast(builder, args[0], x, vector)

        return vector(x), generate

    @intrinsic
    def lanes_from(typingctx: Any, first: Any, last: Any) -> Any:
        """Return the mask of lanes first ... last - 1."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            # As narrow as the vector's own lanes, so that a comparison is one instruction
            lane = ir.IntType(8 * itemsize(item))
            kind = ir.VectorType(lane, n)
            numbers = ir.Constant(kind, list(range(n)))
            low, high = (
                _splat(builder, builder.trunc(a, lane) if lane.width < 64 else a, kind) for a in args
            )
            return builder.and_(
                builder.icmp_signed(">=", numbers, low), builder.icmp_signed("<", numbers, high)
            )

        return Vector(types.boolean, n)(types.intp, types.intp), generate

    @intrinsic
    def lane(typingctx: Any, x: Any, number_of: Any) -> Any:
        """Return one lane."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.extract_element(args[0], args[1])

        return x.item(x, types.intp), generate

    @intrinsic
    def lanes_max(typingctx: Any, x: Any) -> Any:
        """Return the largest lane; any where one is NaN."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            (high,), width = args, n
            while width > 1:
                width //= 2
                turned = builder.shuffle_vector(high, high, indices([(i + width) % n for i in range(n)]))
                high = builder.select(builder.fcmp_ordered(">", high, turned), high, turned)
            return builder.extract_element(high, _INT32(0))

        return number(vector), generate

    @intrinsic
    def lanes_sum(typingctx: Any, x: Any) -> Any:
        """Return the sum of the lanes, in float64."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            (total,), width = args, n
            if item == "f32":
                total = builder.fpext(total, ir.VectorType(ir.DoubleType(), n))
            while width > 1:
                width //= 2
                low = builder.shuffle_vector(total, total, indices(list(range(width))))
                high = builder.shuffle_vector(total, total, indices(list(range(width, 2 * width))))
                total = builder.fadd(low, high)
            return builder.extract_element(total, _INT32(0))

        return types.float64(vector), generate

    return SimpleNamespace(
        real=real,
        item=item,
        size=itemsize(item),
        lanes=n,
        vector=vector,
        fma=fma,
        absolute=absolute,
        maximum=maximum,
        minimum=minimum,
        where=where,
        splat=splat,
        parts=parts,
        lanes_from=lanes_from,
        lane=lane,
        lanes_max=lanes_max,
        lanes_sum=lanes_sum,
        load=loader(item, real, n),
        store=storer(item, real, n),
        stream=storer(item, real, n, streams=True),
        load_one=loader(item, real),
        store_one=storer(item, real),
    )
