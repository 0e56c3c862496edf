"""Rows of a few items each, next to each other, to and from vectors with a row in each lane.

A vector is taken as pieces of 16 bytes of reals, each from another row: so a load or store moves a whole
piece, and a transpose stays within them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from logitloss._kernels import numba_items
from logitloss._kernels.vectors import Vector, indices
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


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
    piece = ir.VectorType(numba_items.stored_type(item), n)
    result = types.UniTuple(Vector(number, lanes), n)

    @intrinsic
    def load(typingctx: Any, address: Any, stride: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            def load_piece(row: int) -> Any:
                place = builder.add(args[0], builder.mul(args[1], args[1].type(row)))
                value = builder.load(builder.inttoptr(place, piece.as_pointer()))
                value.align = numba_items.itemsize(item)
                return value

            def join(parts: list[Any]) -> Any:
                if len(parts) == 1:
                    return parts[0]
                low, high = join(parts[: len(parts) // 2]), join(parts[len(parts) // 2 :])
                return builder.shuffle_vector(low, high, indices(list(range(2 * low.type.count))))

            rows = [join([load_piece(row) for row in range(first, lanes, n)]) for first in range(n)]
            reals = [numba_items.to_real(builder, item, row, context.get_value_type(number)) for row in rows]
            return context.make_tuple(builder, sig.return_type, _transposed_pieces(builder, reals, lanes))

        return result(types.intp, types.intp), generate

    return load


def piece_storer(item: str, real: Any, lanes: int) -> Any:
    """Return the function that stores them."""
    n = piece_items(real)
    piece = ir.VectorType(numba_items.stored_type(item), n)

    @intrinsic
    def store(typingctx: Any, address: Any, stride: Any, classes: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            block = _transposed_pieces(builder, cgutils.unpack_tuple(builder, args[2], n), lanes)
            for first, reals in enumerate(block):
                items = numba_items.from_real(builder, item, reals)
                for row in range(first, lanes, n):
                    order = indices(list(range(row - first, row - first + n)))
                    place = builder.add(args[0], builder.mul(args[1], args[1].type(row)))
                    value = builder.shuffle_vector(items, items, order)
                    builder.store(
                        value, builder.inttoptr(place, piece.as_pointer())
                    ).align = numba_items.itemsize(item)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, classes), generate

    return store
