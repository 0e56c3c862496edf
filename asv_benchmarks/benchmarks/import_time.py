"""What `import logitloss` adds to `import numpy`, each time in a fresh interpreter."""

import subprocess
import sys
from statistics import median

# The promise: no reader of a script waits for this package.
BOUND_MS = 40
PROGRAM = """
import numpy
from time import perf_counter
start = perf_counter()
import logitloss
print(1000 * (perf_counter() - start))
"""


class ImportTime:
    version = "1"
    timeout = 300

    def track_import_after_numpy(self):
        return median(import_ms() for _ in range(9))

    track_import_after_numpy.unit = "ms"


def import_ms():
    """Return the milliseconds one import takes in an interpreter that has NumPy already."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    return float(run.stdout)
