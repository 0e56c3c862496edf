"""Arrays in Zarr stores of versions 2 and 3, directories or ZIP archives (`.zarr.zip`), read by zarr-python.

An array stands for itself; of a group, `PATH::name/in/group` picks one. Consolidated metadata is not read: it
may be older than the array. The store is watched for chunks that it does not have. Of a shard that it has,
the chunks left out are fill values that nothing tells of.
"""

import os
import warnings
from typing import Any

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.chunked import ChunkedArray
from logitloss.evaluate.stores.stored import Array, Box, Place, library, one_line

zarr: Any = library("zarr", "zarr")


def open_array(place: Place) -> "ZarrArray":
    """Open an array, or one of a group."""
    path = place.path
    with one_line(path, "no Zarr store, or a damaged one"), warnings.catch_warnings(action="ignore"):
        if os.path.isdir(place.file):
            store = _Watched(zarr.storage.LocalStore(place.file, read_only=True))
        else:
            store = _Watched(zarr.storage.ZipStore(place.file, mode="r"))
        try:
            found = zarr.open(store, mode="r")
        except FileNotFoundError:
            raise FileError(path, "neither a Zarr array nor a group of them") from None
        if isinstance(found, zarr.Group):
            group = zarr.open_group(store, mode="r", use_consolidated=False)
            members = dict(group.members(max_depth=None))
            arrays = {name: member for name, member in members.items() if isinstance(member, zarr.Array)}
            found = arrays[place.chosen(sorted(arrays))]
        elif place.name:
            raise FileError(path, "an array, not a group, so it holds no named arrays")
        store.is_watched = True
        return ZarrArray(path, found, store)


class ZarrArray(ChunkedArray):
    """An array that zarr-python reads."""

    def __init__(self, path: str, array: Any, store: "_Watched") -> None:
        if any(getattr(codec, "codec_id", "") == "pickle" for codec in (*array.filters, *array.compressors)):
            raise FileError(path, "holds pickled Python objects, which are not read")
        self.array, self.store = array, store
        super().__init__(path, array.shape, array.dtype, array.chunks)

    def _decode(self, box: Box) -> Array:
        found: Array = self.array[box]
        return found

    @property
    def absent(self) -> str:
        """Chunks that were asked for in vain."""
        missing = self.store.missing
        if not missing:
            return ""
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"chunk {next(iter(missing))}{more}, of fill value {self.array.fill_value}"

    def close(self) -> None:
        """Let go of the store, and warn of chunks that it does not have."""
        super().close()
        self.store.close()


class _Watched(zarr.storage.WrapperStore):  # type: ignore[misc]
    """A store, and which keys it was asked for and does not have, once that is watched."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.is_watched = False
        self.missing: dict[str, None] = {}

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return what the store has under a key, or None."""
        value = await super().get(key, prototype, byte_range)
        if value is None and self.is_watched:
            self.missing[key] = None
        return value
