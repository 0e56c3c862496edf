"""What kernels do with vectors of one real type, as one object."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from llvmlite import ir
from logitloss._kernels import vectors
from logitloss._kernels.numba_items import itemsize, loader, storer
from numba import types
from numba.extending import intrinsic


def operations(real: Any, registers: int = 1) -> SimpleNamespace:
    """Return the operations on vectors whose reals are of one type, with those of any type.

    A vector of several registers is worked on step by step: as each step waits for the one before, a
    processor looks ahead in one vector's chain no further than its end.
    """
    item = "f64" if real is np.float64 else "f32"
    number = types.float64 if real is np.float64 else types.float32
    n = registers * vectors.VECTOR_BYTES // itemsize(item)
    vector = vectors.Vector(number, n)

    @intrinsic
    def parts(typingctx: Any, x: Any) -> Any:
        """Return the registers of a vector."""
        width = n // registers

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            each = [
                builder.shuffle_vector(args[0], args[0], vectors.indices(list(range(i, i + width))))
                for i in range(0, n, width)
            ]
            return context.make_tuple(builder, sig.return_type, each)

        return types.UniTuple(vectors.Vector(number, width), registers)(vector), generate

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
                vectors.splat(builder, builder.trunc(a, lane) if lane.width < 64 else a, kind) for a in args
            )
            return builder.and_(
                builder.icmp_signed(">=", numbers, low), builder.icmp_signed("<", numbers, high)
            )

        return vectors.Vector(types.boolean, n)(types.intp, types.intp), generate

    @intrinsic
    def lanes_max(typingctx: Any, x: Any) -> Any:
        """Return the largest lane; any where one is NaN."""

        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            (high,), width = args, n
            while width > 1:
                width //= 2
                turned = builder.shuffle_vector(
                    high, high, vectors.indices([(i + width) % n for i in range(n)])
                )
                high = builder.select(builder.fcmp_ordered(">", high, turned), high, turned)
            return builder.extract_element(high, vectors.INT32(0))

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
                low = builder.shuffle_vector(total, total, vectors.indices(list(range(width))))
                high = builder.shuffle_vector(total, total, vectors.indices(list(range(width, 2 * width))))
                total = builder.fadd(low, high)
            return builder.extract_element(total, vectors.INT32(0))

        return types.float64(vector), generate

    return SimpleNamespace(
        real=real,
        item=item,
        size=itemsize(item),
        lanes=n,
        vector=vector,
        fma=vectors.fma,
        absolute=vectors.absolute,
        maximum=vectors.maximum,
        minimum=vectors.minimum,
        where=vectors.where,
        splat=splat,
        parts=parts,
        lanes_from=lanes_from,
        lanes_max=lanes_max,
        lanes_sum=lanes_sum,
        load=loader(item, real, n),
        store=storer(item, real, n),
        stream=storer(item, real, n, streams=True),
        load_one=loader(item, real),
        store_one=storer(item, real),
    )
