"""Powers of two by instructions that some processors have: from a table in registers, and as a factor.

Of exponentials of which only the sum is wanted, 2**(i/parts) is looked up. Then what is left of the fraction
is so small that its polynomial has three terms less (float64 four), for a look-up and an addition of
integers. Where no instruction looks up as many, there is one part: the whole.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from logitloss._kernels import vectors

_FEATURES = llvm.get_host_cpu_features()
_INT32 = ir.IntType(32)

# The instruction for one register, of the table's registers and the numbers of parts, by the reals' bits
_LOOK_UPS: dict[int, tuple[str, int]] = {}
if _FEATURES.get("avx512f"):
    _LOOK_UPS = {32: ("llvm.x86.avx512.vpermi2var.d.512", 2), 64: ("llvm.x86.avx512.vpermi2var.q.512", 2)}
elif _FEATURES.get("avx2"):
    _LOOK_UPS = {32: ("llvm.x86.avx2.permd", 1)}


def parts_of(real: Any) -> int:
    """Return how many parts of the power there are."""
    bits = 8 * np.dtype(real).itemsize
    return _LOOK_UPS[bits][1] * 8 * vectors.VECTOR_BYTES // bits if bits in _LOOK_UPS else 1


# Polynomials by the number of parts, from the highest power down: minimax for 2**f, |f| <= 1/2/parts, within
# 0.45 ulp, 0.3 of eight parts, 0.07 of float64
TERMS = {
    8: "0x1.c6bb7ap-5 0x1.ec0f92p-3 0x1.62e430p-1 0x1p0",
    16: "0x1.430a49610efc6p-13 0x1.5d89be4c12513p-10 0x1.3b2ab6fb09b31p-7 0x1.c6b08d6e8a384p-5 "
    "0x1.ebfbdff82c594p-3 0x1.62e42fefa39fdp-1 0x1p0",
    32: "0x1.ebfcccp-3 0x1.62e584p-1 0x1p0",
}


def _emit_power(builder: Any, kind: ir.Type, shifted: Any) -> Any:
    bits = vectors.bits_of(kind)
    width = bits.element.width
    real = np.float64 if width == 64 else np.float32
    parts, mantissa = parts_of(real), vectors.mantissa_bits(bits)
    numbers = builder.bitcast(shifted, bits)
    place = mantissa - parts.bit_length() + 1
    power = builder.shl(numbers, ir.Constant(bits, [place] * bits.count))
    if parts > 1:
        power = builder.add(power, _looked_up(builder, bits, numbers, _table(real, parts, place)))
    return builder.bitcast(power, kind)


def _table(real: Any, parts: int, place: int) -> list[int]:
    """Return what 2**(i/parts) has in the mantissa's place less what i, moved there, adds to it."""
    powers = np.exp2(np.arange(parts, dtype=np.longdouble) / parts).astype(real)
    integer = np.int64 if real is np.float64 else np.int32
    return [int(p.view(integer) - real(1).view(integer)) - (i << place) for i, p in enumerate(powers)]


def _looked_up(builder: Any, bits: ir.VectorType, numbers: Any, table: list[int]) -> Any:
    name, n_registers = _LOOK_UPS[bits.element.width]
    lanes = len(table) // n_registers
    kind = ir.VectorType(bits.element, lanes)
    halves = [ir.Constant(kind, table[i : i + lanes]) for i in range(0, len(table), lanes)]
    found = []
    for i in range(0, bits.count, lanes):
        some = builder.shuffle_vector(numbers, numbers, vectors.indices(list(range(i, i + lanes))))
        args = [halves[0], some, *halves[1:]]
        found.append(vectors.call(builder, name, kind, args))
    return _joined(builder, found)


def _emit_scaled(builder: Any, kind: ir.VectorType, x: Any, n: Any) -> Any:
    is_double = isinstance(kind.element, ir.DoubleType)
    lanes, name, least = (8, "pd", -1023.0) if is_double else (16, "ps", -127.0)
    register, bits = ir.VectorType(kind.element, lanes), ir.IntType(lanes)
    zero, rounding = ir.Constant(register, [0.0] * lanes), _INT32(4)  # rounding as it is set
    is_normal = builder.fcmp_unordered(">", n, ir.Constant(kind, [least] * kind.count))
    scaled = []
    for i in range(0, kind.count, lanes):
        every = vectors.indices(list(range(i, i + lanes)))
        some = [builder.shuffle_vector(v, v, every) for v in (x, n, is_normal)]
        args = [*some[:2], zero, builder.bitcast(some[2], bits), rounding]
        scaled.append(vectors.call(builder, f"llvm.x86.avx512.mask.scalef.{name}.512", register, args))
    return _joined(builder, scaled)


def _joined(builder: Any, found: list[Any]) -> Any:
    while len(found) > 1:
        every = vectors.indices(list(range(2 * found[0].type.count)))
        found = [builder.shuffle_vector(a, b, every) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]


# Of vectors, where an instruction does it: x * 2**n, n an integer; 0 where no normal number has that n
times_power = vectors.elementwise(_emit_scaled, 2) if _FEATURES.get("avx512f") else None

# Of vectors: 2**n times the part of 2 that the lowest bits say, n standing above them
power_of_parts = vectors.elementwise(_emit_power, 1)
