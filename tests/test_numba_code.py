"""What LLVM makes of the Numba kernels: vectors as wide as there are, and no exponential by a call."""

import importlib
import platform
import re

import llvmlite.binding as llvm
import pytest
from logitloss._kernels.numba_job import KERNEL
from numba import njit

if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("reads x86 assembly", allow_module_level=True)

FEATURES = llvm.get_host_cpu_features()
REGISTER = "zmm" if FEATURES.get("avx512f") else "ymm"
WIDEST = {"f32": "ps", "f64": "pd"}


@pytest.mark.skipif(not FEATURES.get("fma"), reason="the processor has no fused multiply-add to look for")
@pytest.mark.parametrize("item", WIDEST)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numba_rows", "part_sums"),
        ("numba_rows", "figures_part"),
        ("numba_lanes", "softmax_block"),
        ("numba_lanes", "figures_block"),
        ("numba_elements", "bce"),
    ],
)
def test_exponentials_are_in_vectors_of_the_widest_kind(module, name, item):
    made = getattr(importlib.import_module(f"logitloss._kernels.{module}").kernels(item), name)
    kernel = njit(error_model="numpy", no_cpython_wrapper=True)(made)
    kernel.compile(KERNEL)
    code = kernel.inspect_asm(KERNEL.args)
    multiply_adds = re.findall(rf"vfn?madd\w*{WIDEST[item]}\s.*%{REGISTER}", code)
    # The polynomial of one exponential has five terms or more.
    assert len(multiply_adds) >= 5
    called = re.findall(r"\$?\b(?:exp|exp2|expf|exp2f|log|logf|log1p|log1pf|_ZGV\w+)\b(?!\w)", code)
    assert called == []
