"""Texts of any length in an HDF5 file, read by a process of its own, which may hang or crash.

They lie in heaps, and the HDF5 library does not check these: damaged ones make it loop for ever, take
gigabytes or crash (seen of 2.0.0). So `python -m logitloss.evaluate.stores.hdf5_texts FILE NAME SECONDS`
writes the texts of a dataset, of one width, to a file that has no name. An alarm ends it where a piece takes
longer than that.
"""

import os
import signal
import subprocess
import sys
import tempfile

import numpy as np

from logitloss.evaluate.errors import EvaluationError, FileError, OutputError
from logitloss.evaluate.stores.mapped import MappedArray, map_array
from logitloss.evaluate.stores.stored import Array, Box, Place, unpacking

# How long a piece (some 65,536 texts) may take, of a file that may be far away
SECONDS = 60
# Texts that are written at once
N_TEXTS = 1 << 14
# The exit status where they could not be written
NOT_WRITTEN = 3


def unpack_texts(place: Place, name: str, shape: tuple[int, ...]) -> MappedArray:
    """Map the texts of a dataset that is not empty."""
    # -P: a module of the current folder is none of those that are meant
    command = [sys.executable, "-P", "-m", __name__, place.file, name, str(SECONDS)]
    with unpacking(place.path):
        file = tempfile.TemporaryFile(prefix="logitloss-")  # noqa: SIM115
    with file as unpacked:
        done = subprocess.run(command, stdout=unpacked, stderr=subprocess.PIPE, check=False)
        if done.returncode == -signal.SIGALRM:
            raise FileError(place.path, f"damaged: {SECONDS} seconds did not do to read some texts")
        said = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if done.returncode == NOT_WRITTEN:
            with unpacking(place.path):
                raise OSError(said)
        if done.returncode:
            raise FileError(place.path, f"damaged ({said or f'reading ended with {done.returncode}'})")
        n_bytes = os.fstat(unpacked.fileno()).st_size
        width = n_bytes // int(np.prod(shape, dtype=object)) // np.dtype("U1").itemsize
        return map_array(place.path, unpacked, 0, None, shape, np.dtype(f"U{width}"))


def _write(file: str, name: str, seconds: str) -> None:
    """Write the texts of a dataset to stdout."""
    from logitloss.evaluate.shard import blocks
    from logitloss.evaluate.stores.hdf5 import Hdf5Array, h5py

    class Timed(Hdf5Array):
        def _decode(self, box: Box) -> Array:
            signal.alarm(int(seconds))
            return super()._decode(box)

    with h5py.File(file, "r", locking=False) as opened:
        texts = Timed(file, opened, opened[name])
        for box in blocks(texts.shape, N_TEXTS):
            piece = texts[box]
            try:
                piece.tofile(sys.stdout.buffer)
            except OSError as error:
                raise OutputError(file, str(error)) from None


if __name__ == "__main__":
    try:
        _write(*sys.argv[1:])
    except OutputError as error:
        print(error.reason, file=sys.stderr)
        sys.exit(NOT_WRITTEN)
    except Exception as error:  # a damaged file may raise anything
        reason = error.reason if isinstance(error, EvaluationError) else str(error)
        sys.exit(reason.partition("\n")[0] or type(error).__name__)
