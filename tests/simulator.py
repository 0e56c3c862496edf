"""CUDA's simulator, which runs each thread of a kernel as a thread of Python, and so some tests only.

Where it stands in for a device, a test is skipped once its calls have brought more logits than it can take in
a moment, and of many cases of one test and dtype it is given a few, spread evenly. All of that is here.
"""

import os
from pathlib import Path

import pytest

# A test may take some seconds, which is so many; a call takes as long as some hundred more.
LOGITS, LOGITS_OF_A_CALL = 15000, 500
# Cases of one test function and dtype.
CASES = 3


def choose():
    """Ask for the simulator where there is no device, before anything imports Numba, which reads it once."""
    wants_device = os.environ.get("LOGITLOSS_CUDA_DEVICE") == "1"
    if not wants_device and not Path("/dev/nvidia0").exists():
        os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")


choose()


def is_used():
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


class Allowance:
    """The logits that the test under way may still send through the simulator."""

    def __init__(self, run):
        self.run = run
        self.left = LOGITS

    def __call__(self, shape, inputs, outputs, call):
        size = max(array.size for array in inputs.values() if array is not None)
        self.left -= size + LOGITS_OF_A_CALL
        if self.left < 0:
            pytest.skip(
                f"too large for the simulator: over {LOGITS} logits, a call counting {LOGITS_OF_A_CALL}"
            )
        return self.run(shape, inputs, outputs, call)


def limit(monkeypatch):
    """Give the test under way its allowance."""
    from logitloss._kernels import cuda_host

    monkeypatch.setattr(cuda_host, "run", Allowance(cuda_host.run))


def spread(items):
    """Skip all but some cases of each test and dtype on this backend."""
    groups = {}
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if params and params.get("backend") == "cuda":
            groups.setdefault((item.module, item.originalname, str(params.get("dtype"))), []).append(item)
    for cases in groups.values():
        step = max(1, len(cases) / CASES)
        chosen = {int((n + 0.5) * step) for n in range(min(CASES, len(cases)))}
        reason = f"the simulator runs {CASES} of {len(cases)} cases of this test and dtype"
        for number, item in enumerate(cases):
            if number not in chosen:
                item.add_marker(pytest.mark.skip(reason=reason))
