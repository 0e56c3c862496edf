"""Vectors of the processor's width as values in Numba, so that a kernel says which instructions it means.

LLVM finds vectors in scalar loops where it can prove that order does not matter; a running largest logit, or
a sum whose bits are the same every time, it cannot. So kernels are written on `Vector` values: LLVM's own
vector types, of as many lanes as one register of this processor has. Arithmetic and comparisons are Python's
operators, a number beside a vector means all lanes, a comparison gives a mask.

Here is what does not depend on the real type; numba_operations.py has the rest, numba_items.py how items in
memory become reals on their way into a register.
"""

from __future__ import annotations

import operator
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

BYTE, INT32 = ir.IntType(8), ir.IntType(32)


@inline
def lost_of(total, term):
    """Return what total + term, of float64, loses to rounding (Knuth); nothing where that is not finite."""
    whole = total + term
    added = whole - total
    return (total - (whole - added)) + (term - added) if abs(whole) < np.inf else 0.0


@inline
def add_kept(total, lost, term):
    """Add a term, and to `lost` what rounding takes."""
    whole = total + term
    added = whole - total
    return whole, lost + ((total - (whole - added)) + (term - added))


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


def splat(builder: Any, number: Any, vector: ir.VectorType) -> Any:
    if isinstance(number, ir.Constant):
        return _held(builder, ir.Constant(vector, [number.constant] * vector.count))
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, INT32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), indices([0] * vector.count))


def indices(numbers: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(INT32, len(numbers)), numbers)


@lower_cast(types.Float, Vector)
@lower_cast(types.Integer, Vector)
def _cast_number(context: Any, builder: Any, given: types.Type, wanted: Vector, value: Any) -> Any:
    number = context.cast(builder, value, given, wanted.item)
    return splat(builder, number, context.get_value_type(wanted))


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


def constant(kind: ir.Type, value: float) -> ir.Constant:
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
    moved = builder.shl(builder.bitcast(x, bits), constant(bits, mantissa_bits(bits)))
    return builder.bitcast(moved, kind)


def _emit_flipped(builder: Any, kind: ir.Type, x: Any, y: Any) -> Any:
    bits = bits_of(kind)
    minus = builder.bitcast(constant(kind, -0.0), bits)
    signs = builder.and_(builder.bitcast(y, bits), minus)
    return builder.bitcast(builder.xor(builder.bitcast(x, bits), signs), kind)


def _emit_either(builder: Any, kind: ir.Type, x: Any, y: Any) -> Any:
    bits = bits_of(kind)
    return builder.bitcast(builder.or_(builder.bitcast(x, bits), builder.bitcast(y, bits)), kind)


def _emit_exponent(builder: Any, kind: ir.Type, x: Any) -> Any:
    bits = bits_of(kind)
    bias = 1023 if mantissa_bits(bits) == 52 else 127
    biased = builder.lshr(builder.bitcast(x, bits), constant(bits, mantissa_bits(bits)))
    return builder.sitofp(builder.sub(biased, constant(bits, bias)), kind)


def _emit_mantissa(builder: Any, kind: ir.Type, x: Any) -> Any:
    bits = bits_of(kind)
    width = mantissa_bits(bits)
    bias = 1023 if width == 52 else 127
    low = builder.and_(builder.bitcast(x, bits), constant(bits, (1 << width) - 1))
    return builder.bitcast(builder.or_(low, constant(bits, bias << width)), kind)


def _emit_next_above(builder: Any, kind: ir.Type, x: Any) -> Any:
    bits = bits_of(kind)
    number = builder.bitcast(builder.fadd(x, constant(kind, 0.0)), bits)  # of -0 that of 0
    width = bits.element.width if isinstance(bits, ir.VectorType) else bits.width
    step = builder.or_(builder.ashr(number, constant(bits, width - 1)), constant(bits, 1))
    return builder.bitcast(builder.add(number, step), kind)


# The low bits of a real, moved to its exponent's place
low_bits_as_exponent = elementwise(_emit_shifted, 1)
# Of a positive normal number, x = mantissa * 2**exponent with 1 <= mantissa < 2
exponent_of = elementwise(_emit_exponent, 1)
mantissa_of = elementwise(_emit_mantissa, 1)
# The next larger number; of infinity NaN, of -infinity the least
next_above = elementwise(_emit_next_above, 1)
# The bits that either has
either = elementwise(_emit_either, 2)
# x with its sign changed where y has a minus, be it of zero or NaN
flipped = elementwise(_emit_flipped, 2)


def polynomial(terms: list[float]) -> Any:
    """Return the function with these terms, the highest power first.

    Many terms go even and odd powers by themselves, for half the latency.
    """

    def emit(builder: Any, kind: ir.Type, x: Any) -> Any:
        def term(number: float) -> Any:
            value = constant(kind, number)
            return _held(builder, value) if isinstance(kind, ir.VectorType) else value

        def chain(numbers: list[float], step: Any) -> Any:
            total = term(numbers[0])
            for number in numbers[1:]:
                total = multiply_add(total, step, term(number))
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
        return builder.icmp_signed("<", builder.bitcast(args[0], bits), constant(bits, 0))

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


@intrinsic
def keep_rolled(typingctx: Any) -> Any:
    """Make LLVM leave the loop around it as it is: two turns at once take too many registers."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], side_effect=True)
        return context.get_dummy_value()

    return types.void(), generate
