"""Datasets in HDF5 files: mapped where they lie in the file as they do in memory, else read by h5py.

Mapped are contiguous ones of numbers that NumPy has, so that nothing is copied. A type that it has not, as
bfloat16, is widened by the library. `PATH::group/name` picks one of several; links within the file are
followed. Files are not locked, as read-only media and network mounts may not allow it.
"""

import math
from contextlib import ExitStack
from typing import Any

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.chunked import ChunkedArray
from logitloss.evaluate.stores.hdf5_texts import unpack_texts
from logitloss.evaluate.stores.mapped import MappedArray, map_array
from logitloss.evaluate.stores.stored import Array, Box, Place, StoredArray, library, one_line

h5py: Any = library("h5py", "hdf5")

NO_FILE = "no HDF5 file, or a damaged one"


def open_array(place: Place) -> StoredArray:
    """Open the dataset of a file, or one of several."""
    with one_line(place.path, NO_FILE), ExitStack() as stack:
        file = stack.enter_context(h5py.File(place.file, "r", locking=False))
        dataset = _chosen(place, file)
        _check(place.path, file, dataset)
        if dataset.dtype.kind == "O" and dataset.size:
            return unpack_texts(place, dataset.name, dataset.shape)
        offset = _offset(dataset)
        if offset is not None:
            return _mapped(place, dataset, offset)
        stored = Hdf5Array(place.path, file, dataset)
        stack.pop_all()
        return stored


def shape_of(place: Place) -> tuple[int, ...]:
    """Return the shape of the dataset, of which nothing is read."""
    with one_line(place.path, NO_FILE), h5py.File(place.file, "r", locking=False) as file:
        dataset = _chosen(place, file)
        _check(place.path, file, dataset)
        shape: tuple[int, ...] = dataset.shape
        return shape


def _chosen(place: Place, file: Any) -> Any:
    """Return the dataset that is meant."""
    dataset = file.get(place.name) if place.name else None
    if isinstance(dataset, h5py.Dataset):
        return dataset
    names: list[str] = []
    file.visititems(lambda name, node: names.append(name) if isinstance(node, h5py.Dataset) else None)
    return file[place.chosen(names)]


def _check(path: str, file: Any, dataset: Any) -> None:
    """Refuse what is in another file, and what is no array of plain elements."""
    if dataset.file.filename != file.filename:
        raise FileError(path, f"a link to another file, {dataset.file.filename}: name that")
    if dataset.is_virtual or dataset.external:
        raise FileError(path, "kept in other files (a virtual or external dataset), which are not followed")
    if dataset.shape is None:
        raise FileError(path, "an empty dataset, which has no shape")
    dtype = dataset.dtype
    is_text = h5py.check_string_dtype(dtype) is not None
    if (dtype.hasobject and not is_text) or dtype.names is not None or dtype.subdtype is not None:
        raise FileError(path, f"holds elements of type {dtype}, not plain numbers or texts")


def _offset(dataset: Any) -> int | None:
    """Return where the numbers are in the file, if that is in one run and as they are in memory."""
    is_plain = dataset.dtype.kind in "iufV" and h5py.h5t.py_create(dataset.dtype).equal(dataset.id.get_type())
    is_written = dataset.id.get_storage_size() > 0  # else there is an offset all the same, after a user block
    if dataset.chunks is not None or not is_plain or not is_written:
        return None
    offset: int | None = dataset.id.get_offset()
    return offset


def _mapped(place: Place, dataset: Any, offset: int) -> MappedArray:
    there = dataset.id.get_storage_size()
    if there < dataset.nbytes:
        raise FileError(place.path, f"truncated: {dataset.nbytes} bytes, {there} are there")
    with open(place.file, "rb") as file:
        return map_array(place.path, file, offset, None, dataset.shape, dataset.dtype)


class Hdf5Array(ChunkedArray):
    """A dataset that h5py reads."""

    def __init__(self, path: str, file: Any, dataset: Any) -> None:
        self.file, self.dataset, shape = file, dataset, dataset.shape
        if dataset.chunks is None:  # in one run, of which any part can be read
            chunks = (1,) * len(shape)
            is_there = dataset.id.get_storage_size() > 0 or not dataset.size
            self._absent = "" if is_there else "all of it"
        else:
            chunks = dataset.chunks
            wanted = math.prod(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
            missing = wanted - dataset.id.get_num_chunks()
            self._absent = f"{missing} of {wanted} chunks" if missing > 0 else ""
        super().__init__(path, shape, dataset.dtype, chunks)

    def _decode(self, box: Box) -> Array:
        found: Array = self.dataset[box]
        return found

    @property
    def absent(self) -> str:
        """Chunks that the file has no place for."""
        return self._absent

    def close(self) -> None:
        """Let go of the file, and warn of chunks that it does not have."""
        super().close()
        self.file.close()
