"""Texts of any length in an HDF5 file, read by a process of its own, which may hang or end.

They lie in heaps, and the HDF5 library does not check these: a damaged one makes it loop for ever (2.0.0, an
object of size 0), or take gigabytes. So `python -m logitloss.evaluate.stores.hdf5_texts FILE NAME` writes
them, of one width, to a file that has no name, and a dot to stderr for each piece; where none comes for a
while, it is ended.
"""

import os
import select
import subprocess
import sys
import tempfile

import numpy as np

from logitloss.evaluate.errors import EvaluationError, FileError
from logitloss.evaluate.stores.mapped import MappedArray, map_array
from logitloss.evaluate.stores.stored import Array, Box, Place

# How long a piece (some 65,536 texts) may take, of a file that may be far away
SECONDS = 60.0
# Texts that are written at once
N_TEXTS = 1 << 14


def unpack_texts(place: Place, name: str, shape: tuple[int, ...]) -> MappedArray:
    """Map the texts of a dataset."""
    command = [sys.executable, "-m", __name__, place.file, name]
    with (
        tempfile.TemporaryFile(prefix="logitloss-") as unpacked,
        subprocess.Popen(command, stdout=unpacked, stderr=subprocess.PIPE) as child,
    ):
        assert child.stderr is not None
        said = part = b"."
        while part:
            if not select.select([child.stderr], [], [], SECONDS)[0]:
                child.kill()
                raise FileError(place.path, f"damaged: {SECONDS:.0f} seconds did not do to read texts")
            part = os.read(child.stderr.fileno(), 1 << 12)
            said += part
        if child.wait():
            why = said.decode(errors="replace").strip(".\n").rpartition("\n")[2]
            raise FileError(place.path, f"damaged ({why or f'reading ended with {child.returncode}'})")
        n_bytes = os.fstat(unpacked.fileno()).st_size
        width = max(1, n_bytes // max(1, int(np.prod(shape, dtype=object))) // 4)
        return map_array(place.path, unpacked, 0, None, shape, np.dtype(f"U{width}"))


def _write(file: str, name: str) -> None:
    """Write the texts of a dataset to stdout."""
    from logitloss.evaluate.shard import blocks
    from logitloss.evaluate.stores.hdf5 import Hdf5Array, h5py

    class Telling(Hdf5Array):
        def _decode(self, box: Box) -> Array:
            print(end=".", file=sys.stderr, flush=True)
            return super()._decode(box)

    with h5py.File(file, "r", locking=False) as opened:
        texts = Telling(file, opened, opened[name])
        for box in blocks(texts.shape, N_TEXTS):
            texts[box].tofile(sys.stdout.buffer)


if __name__ == "__main__":
    try:
        _write(*sys.argv[1:])
    except Exception as error:
        reason = error.reason if isinstance(error, EvaluationError) else str(error)
        sys.exit("\n" + (reason.partition("\n")[0] or type(error).__name__))
