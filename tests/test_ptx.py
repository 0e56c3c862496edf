"""The CUDA kernels, compiled with no device for three compute capabilities: what the machine code is like.

Vector loads and stores are there where classes are contiguous, nothing lies in local memory, and a block's
registers leave room for as many blocks as the kernel's launch bounds say.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed"
)
CAPABILITIES = ("8.0", "9.0", "10.0")
# The register file of a multiprocessor, in registers of 32 bits, by the threads of a block.
REGISTERS_BY_THREADS = 65536 // 256


@pytest.fixture(scope="module")
def compiled():
    """Compile all kernels in a process of its own, since the simulator may be at work in this one."""
    program = Path(__file__).with_name("compile_ptx.py")
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0"}
    run = subprocess.run(
        [sys.executable, str(program), *CAPABILITIES],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(params=CAPABILITIES)
def kernels(request, compiled):
    return compiled[request.param]


def test_vectors_memory_and_registers(kernels):
    wrong = []
    for name, found in kernels.items():
        if found["vector"]:
            if not found["vector_loads"]:
                wrong.append(f"{name}: no load of sixteen bytes")
            if found["writes"] and not found["vector_stores"]:
                wrong.append(f"{name}: no store of sixteen bytes")
        if found["local"] or found["stack"] or found["spills"]:
            wrong.append(f"{name}: local memory, {found}")
        if found["registers"] is not None and found["registers"] * found["resident"] > REGISTERS_BY_THREADS:
            wrong.append(f"{name}: {found['registers']} registers for {found['resident']} blocks")
        if found["float32"] and "ex2.approx.f32" not in found["exponentials"]:
            wrong.append(f"{name}: {found['exponentials']}")
    assert not wrong, "\n".join(wrong)


def test_all_kinds_are_compiled(kernels):
    """One of each type, target, second pass and stage at least, and ptxas, if it is there, has seen all."""
    names = " ".join(kernels)
    parts = "f16 bf16 f32 f64 labels weighted softmax entropy figures parts second"
    for part in parts.split():
        assert part in names
    looked_at = {found["registers"] is not None for found in kernels.values()}
    assert len(looked_at) == 1
    if looked_at == {False}:
        pytest.skip("no ptxas among the installed packages: registers were not counted")
