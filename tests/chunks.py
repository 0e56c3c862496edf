"""Arrays in chunks, in memory and in every format, for the tests of boxes."""

import warnings

import h5py
import numpy as np
import zarr

from logitloss.evaluate.stores.chunked import ChunkedArray


class ListedChunks(ChunkedArray):
    """An array in memory that counts how often each chunk is decoded."""

    def __init__(self, array, chunks, absent=""):
        self.array, self.why_absent = array, absent
        self.decoded = np.zeros([-(-n // c) for n, c in zip(array.shape, chunks, strict=True)], int)
        super().__init__("listed", array.shape, array.dtype, chunks)

    def _decode(self, box):
        met = zip(box, self.chunks, strict=True)
        self.decoded[tuple(slice(part.start // chunk, -(-part.stop // chunk)) for part, chunk in met)] += 1
        return self.array[box].copy()

    @property
    def absent(self):
        return self.why_absent


def write_zarr(path, array, chunks=None, **options):
    """Write a Zarr array; of types whose place in version 3 is not settled, too."""
    with warnings.catch_warnings(action="ignore"):
        zarr.create_array(path, data=array, chunks=chunks or "auto", overwrite=True, **options)


def write_hdf5(path, array, chunks=None, **options):
    """Write a dataset `x`."""
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=array, chunks=chunks, **options)


WRITERS = {
    "zarr2": (".zarr", lambda *args: write_zarr(*args, zarr_format=2)),
    "zarr3": (".zarr", write_zarr),
    "hdf5": (".h5", lambda *args: write_hdf5(*args, compression="gzip", compression_opts=1)),
}
