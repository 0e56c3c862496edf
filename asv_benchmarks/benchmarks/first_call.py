"""The Numba backend's first call in a new process: it compiles, or loads from the disk what was compiled."""

import os
import subprocess
import sys
import tempfile

PROGRAM = """
import numpy as np
import logitloss
from time import perf_counter
logits, target = np.zeros({shape}, np.float32), np.zeros({shape[0]}, int)
start = perf_counter()
logitloss.cross_entropy_value_and_grad(logits, target, backend="numba")
print(perf_counter() - start)
"""


class FirstCall:
    # Short rows, and rows of many classes: two kernels
    params = (("64x10", "64x1000"),)
    param_names = ("shape",)
    version = "1"
    timeout = 600

    def track_compiling(self, shape):
        with tempfile.TemporaryDirectory() as folder:
            return first_call(shape, folder)

    track_compiling.unit = "s"

    def track_from_disk(self, shape):
        with tempfile.TemporaryDirectory() as folder:
            first_call(shape, folder)
            return first_call(shape, folder)

    track_from_disk.unit = "s"


def first_call(shape, folder):
    """Return the seconds that the first call takes with Numba's cache in that folder."""
    program = PROGRAM.format(shape=tuple(map(int, shape.split("x"))))
    environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment
    )
    return float(run.stdout)
