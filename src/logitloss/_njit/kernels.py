"""The kernels that compiled code runs, by a table of their addresses.

Compiled code finds the table by its name, so it can be kept on disk, and nothing of a kernel is compiled into
it. An entry is 0 until the kernel is asked for.
"""

from __future__ import annotations

import ctypes
import traceback
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Of float16 Numba compiles no function for the CPU.
REALS = {types.float32: "f32", types.float64: "f64"}
LABEL_WEIGHT = ("numba_labels", "label_weight", "f32")
_KERNELS = (
    *(("numba_rows", "softmax_block", item) for item in REALS.values()),
    *(("numba_lanes", "softmax_block", item) for item in REALS.values()),
    *(("numba_elements", name, item) for name in ("bce", "bce_fused") for item in ("f32", "f64")),
    LABEL_WEIGHT,
)


NUMBERS = {kernel: number for number, kernel in enumerate(_KERNELS)}
_TABLE, _TABLE_NAME, _LOADER_NAME = np.zeros(len(NUMBERS), np.int64), "logitloss_kernels", "logitloss_load"


def _load_kernel(number: int) -> int:
    """Fill in an entry, compiling the kernel or loading it from the disk; return 0 if that fails."""
    try:
        from logitloss._kernels import numba_cpu

        _TABLE[number] = numba_cpu.kernel(*_KERNELS[number]).address
    except BaseException:  # compiled code cannot be told; it raises an error of its own
        traceback.print_exc()
        return 0
    return int(_TABLE[number])


_loader = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_load_kernel)


def register() -> None:
    """Make the table known to compiled code; to import this file makes the functions known to Numba."""
    llvm.add_symbol(_TABLE_NAME, _TABLE.ctypes.data)
    llvm.add_symbol(_LOADER_NAME, ctypes.cast(_loader, ctypes.c_void_p).value)


@intrinsic
def run_kernel(typingctx: Any, number: Any, job: Any, block: Any, scratch: Any, found: Any) -> Any:
    """Run a kernel by its number."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integer = ir.IntType(64)
        table = cgutils.add_global_variable(builder.module, ir.ArrayType(integer, len(NUMBERS)), _TABLE_NAME)
        load = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(integer, [integer]), _LOADER_NAME
        )
        address = cgutils.alloca_once_value(
            builder, builder.load(builder.gep(table, [integer(0), args[0]], inbounds=True))
        )
        is_new = builder.icmp_unsigned("==", builder.load(address), integer(0))
        with builder.if_then(is_new, likely=False):
            builder.store(builder.call(load, [args[0]]), address)
            is_missing = builder.icmp_unsigned("==", builder.load(address), integer(0))
            with builder.if_then(is_missing, likely=False):
                context.call_conv.return_user_exc(builder, RuntimeError, ("logitloss: no kernel was loaded",))
        kernel = ir.FunctionType(ir.VoidType(), [integer] * 4)
        builder.call(builder.inttoptr(builder.load(address), kernel.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), generate
