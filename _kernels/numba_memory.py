"""Lines and bytes of memory, whatever lies there: fetched ahead, copied, streamed around the cache."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from logitloss._kernels.numba_items import loader, storer
from logitloss._kernels.vectors import BYTE, INT32, VECTOR_BYTES, call, outline
from numba import types
from numba.extending import intrinsic


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for a line of memory that will be read."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], BYTE.as_pointer())
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, INT32(0), INT32(3), INT32(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


# How far behind what a loop reads lies what is fetched meanwhile, in bytes, and for which cache: LLVM's
# number of the first is 3, of the second 2. common.c has what was measured.
IS_INTEL = llvm.get_process_triple().startswith("x86_64") and not llvm.get_host_cpu_name().startswith("znver")
IN_ORDER = ((4096 + 2 * 64 if IS_INTEL else 8192, 2), (2048, 3))


def fetcher(n_bytes: int, places: tuple[tuple[int, int], ...] = IN_ORDER) -> Any:
    """Return the function that, where so many bytes are read, asks for all lines of what lies behind them.

    Without it memory and arithmetic take turns. Every line is asked for twice: the second-level cache has
    more requests under way than the first, to which a line then comes from there. No line may be left out, as
    those fetched keep the processor's own prefetchers from seeing a stream.
    """

    @intrinsic
    def fetch_ahead(typingctx: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            start = builder.inttoptr(args[0], BYTE.as_pointer())
            for offset in range(0, n_bytes, 64):
                for distance, cache in places:
                    line = builder.gep(start, [INT32(offset + distance)])
                    call(builder, "llvm.prefetch.p0", ir.VoidType(), [line, INT32(0), INT32(cache), INT32(1)])
            return context.get_dummy_value()

        return types.void(types.intp), generate

    return fetch_ahead


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


@intrinsic
def as_pointer(typingctx: Any, address: Any) -> Any:
    """Return an address as what `carray` takes."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], BYTE.as_pointer())

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
