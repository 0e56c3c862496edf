"""Compile the CUDA kernels without a device, and print what they are like as JSON.

Run as a program, `compile_ptx.py 8.0 9.0`, with compute capabilities, by test_ptx.
"""

import json
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numba.cuda.compiler
import numba.cuda.dispatcher
from logitloss._kernels import cuda_elements, cuda_rows, cuda_scaled, cuda_totals
from logitloss._kernels.cuda_classes import Rows
from logitloss._kernels.cuda_elements import Elements
from numba import types

LONG, DOUBLE = types.int64, types.float64
# One joined axis of rows: (address, kind, class stride, row stride)
VIEW, SHAPE = types.UniTuple(LONG, 4), types.UniTuple(LONG, 1)
ROWS = (*(VIEW,) * 7, SHAPE, *(LONG,) * 7, *(DOUBLE,) * 4, *(LONG,) * 3)
ELEMENTS = (*(VIEW,) * 7, SHAPE, LONG, types.UniTuple(DOUBLE, 3), DOUBLE, LONG)
LABELS = (*(VIEW,) * 3, SHAPE, *(LONG,) * 6)

ROW_SPECS = [
    *(Rows(item, "labels", "grad", "whole", 256, True) for item in ("f16", "bf16", "f32", "f64")),
    *(Rows(item, "labels", "none", "whole", 256, True) for item in ("bf16", "f64")),
    *(Rows(item, "weighted", "grad", "whole", 256, True) for item in ("bf16", "f64")),
    *(Rows("f32", target, "grad", "whole", 256, True) for target in ("f32", "f64")),
    Rows("f32", "labels", "grad", "whole", 256, True, known=True),
    *(Rows("f32", "none", second, "whole", 256, True) for second in ("softmax", "entropy")),
    *(Rows(item, "labels", "figures", "whole", 256, True) for item in ("f16", "bf16", "f32", "f64")),
    *(Rows("bf16", "labels", "figures", stage, 256, True) for stage in ("parts", "finish")),
    Rows("f64", "labels", "figures", "finish", 256, True),
    Rows("f32", "labels", "figures", "whole", 32, True),
    Rows("bf16", "labels", "figures", "whole", 1, False),
    *(Rows("f32", "labels", "grad", stage, 256, True) for stage in ("parts", "finish", "second")),
    Rows("f32", "labels", "grad", "whole", 32, True),
    Rows("f32", "labels", "grad", "whole", 1, False),
    Rows("f64", "f32", "grad", "whole", 32, False),
]
ELEMENT_SPECS = [
    Elements("bce_with_logits", "f32", "u1", False, True, True, True),
    Elements("bce_with_logits", "bf16", "b1", True, True, True, True),
    Elements("bce_with_logits", "f16", "f64", False, True, True, True),
    Elements("bce_with_logits", "f64", "f64", True, True, True, True),
    Elements("bce_with_logits", "f32", "i8", True, True, False),
    Elements("bce", "f32", "f32", True, False, True, True),
    Elements("kl_div", "bf16", "f32", False, False, False),
    Elements("sigmoid", "f16", "none", False, True, True),
]


def all_kernels():
    """Yield (name, function, signature, blocks resident, contiguous, writes classes or elements, item)."""
    for spec in ROW_SPECS:
        reads, writes = spec.stage != "finish", spec.writes_classes and spec.stage in ("whole", "second")
        function = cuda_rows.rows_function(spec)
        yield str(tuple(spec)), function, ROWS, spec.resident, spec.vector and reads, writes, spec.item
    for spec in ELEMENT_SPECS:
        function = cuda_elements.elements_function(spec)
        resident = cuda_elements.blocks_of(spec)
        yield str(tuple(spec)), function, ELEMENTS, resident, spec.vector, spec.grad, spec.item
    for item in ("none", "bf16", "f64"):
        yield f"labels {item}", cuda_totals.labels_function(item), LABELS, 4, False, False, "f64"
    yield "totals", cuda_totals.totals_function(), (LONG,) * 3, 1, False, False, "f64"
    for item in ("none", "f32", "f64"):
        signature = (VIEW, VIEW, SHAPE, LONG, DOUBLE, LONG)
        yield f"scaled {item}", cuda_scaled.scaled_function(item), signature, 4, False, item != "none", "f64"
    yield "divide", cuda_totals.divide_function(), (VIEW, VIEW, DOUBLE, DOUBLE, LONG), 1, False, False, "f64"


def find_ptxas():
    """Return the assembler of the installed packages, if they have one."""
    for name in ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "ptxas":
                return Path(file.locate())
    return None


def resources(ptxas, ptx, capability):
    """Return what the assembler says of registers, stack and spills."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [
            ptxas,
            "-v",
            "--gpu-name",
            f"sm_{capability[0]}{capability[1]}",
            file.name,
            "-o",
            "/dev/null",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = (
        re.search(pattern, said)
        for pattern in (r"Used (\d+) reg", r"(\d+) bytes stack", r"(\d+) bytes spill st")
    )
    return [0 if number is None else int(number[1]) for number in numbers]


def main():
    capabilities = {argument: tuple(map(int, argument.split("."))) for argument in sys.argv[1:]}
    first = next(iter(capabilities.values()))
    # Device functions are compiled once, for the current device, of which there is none.
    device = SimpleNamespace(compute_capability=first)
    numba.cuda.dispatcher.get_current_device = lambda: device
    ptxas, found = find_ptxas(), {argument: {} for argument in capabilities}
    for name, function, signature, resident, vector, writes, item in all_kernels():
        # cuda.compile_ptx in two steps: the first, types and LLVM's language, is the same for all
        # capabilities and takes ten times as long as the second.
        library, _ = numba.cuda.compiler._compile_pyfunc_with_fixup(
            function, signature, device=False, cc=first, abi="numba", **cuda_rows.options(resident)
        )
        for argument, capability in capabilities.items():
            ptx = library.get_asm_str(cc=capability)
            registers, stack, spills = resources(ptxas, ptx, capability) if ptxas else (None, 0, 0)
            found[argument][name] = {
                "vector": vector,
                "writes": writes,
                "float32": item != "f64" and vector and "bce'," not in name,
                "exponentials": sorted(set(re.findall(r"ex2\.[a-z0-9.]*f32", ptx))),
                "vector_loads": len(re.findall(r"ld\.global\.v4\.u32", ptx)),
                "vector_stores": len(re.findall(r"st\.global\.v4\.u32", ptx)),
                "local": bool(re.search(r"\.local\b", ptx)),
                "resident": resident,
                "registers": registers,
                "stack": stack,
                "spills": spills,
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
