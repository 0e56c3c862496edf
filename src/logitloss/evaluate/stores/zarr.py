"""Arrays in Zarr stores of versions 2 and 3, directories or ZIP archives (`.zarr.zip`), read by zarr-python.

An array stands for itself; of a group, `PATH::name/in/group` picks one. Consolidated metadata is not read: it
may be older than the array. zarr-python gives fill values for chunks that are not there, and does not tell:
so the store is watched for those that it does not have, and the indices of shards for those left out.
"""

import math
import os
import re
from typing import Any

import numpy as np

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.chunked import ChunkedArray
from logitloss.evaluate.stores.stored import Array, Box, Place, library, no_warnings, one_line

zarr: Any = library("zarr", "zarr")
_Range: Any = zarr.abc.store.RangeByteRequest
_Suffix: Any = zarr.abc.store.SuffixByteRequest


def open_array(place: Place) -> "ZarrArray":
    """Open an array, or one of a group."""
    with one_line(place.path, "no Zarr store, or a damaged one"):
        with no_warnings():
            found, store = _opened(place)
        return ZarrArray(place.path, found, store)


def _opened(place: Place) -> tuple[Any, "_Watched"]:
    """Return zarr's array, and the store that it is in."""
    if os.path.isdir(place.file):
        store = _Watched(zarr.storage.LocalStore(place.file, read_only=True))
    else:
        store = _Watched(zarr.storage.ZipStore(place.file, mode="r"))
    try:
        found = zarr.open(store, mode="r")
    except FileNotFoundError:
        raise FileError(place.path, "neither a Zarr array nor a group of them") from None
    if isinstance(found, zarr.Group):
        group = zarr.open_group(store, mode="r", use_consolidated=False)
        members = dict(group.members(max_depth=None))
        arrays = {name: member for name, member in members.items() if isinstance(member, zarr.Array)}
        found = arrays[place.chosen(sorted(arrays))]
    elif place.name:
        raise FileError(place.path, "an array, not a group, so it holds no named arrays")
    return found, store


class ZarrArray(ChunkedArray):
    """An array that zarr-python reads."""

    def __init__(self, path: str, array: Any, store: "_Watched") -> None:
        if any(getattr(codec, "codec_id", "") == "pickle" for codec in (*array.filters, *array.compressors)):
            raise FileError(path, "holds pickled Python objects, which are not read")
        if _n_sharded(getattr(array.metadata, "codecs", ())) > bool(array.shards):
            what = "has shards within shards or within other codecs"
            raise FileError(path, f"{what}, which is not read: chunks they leave out would not be seen")
        self.array, self.store = array, store
        store.shards = _Shards(path, array) if array.shards else None
        store.missing = {}
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
        return f"chunk {min(missing)}{more}, of fill value {self.array.fill_value}"

    def close(self) -> None:
        """Let go of the store, and warn of chunks that it does not have."""
        super().close()
        self.store.close()


def _n_sharded(codecs: Any) -> int:
    """Return how many codecs among these and within them make shards."""
    inside = [codec.codecs for codec in codecs if isinstance(codec, zarr.codecs.ShardingCodec)]
    return len(inside) + sum(map(_n_sharded, inside))


class _Watched(zarr.storage.WrapperStore):  # type: ignore[misc]
    """A store, and the chunks that it was asked for and does not have."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.missing: dict[str, None] = {}
        self.shards: _Shards | None = None

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        """Return what the store has under a key, or None."""
        value = await super().get(key, prototype, byte_range)
        if value is None:
            self.missing[key] = None
        elif self.shards is not None:
            self.missing |= dict.fromkeys(self.shards.left_out(key, value, byte_range))
        return value


class _Shards:
    """Where the shards of an array have their indices, and which chunks these leave out.

    An index is a pair of integers for each chunk, its offset and length, all ones where there is none
    (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html).
    """

    NONE = 2**64 - 1

    def __init__(self, path: str, array: Any) -> None:
        self.shape, self.chunks = array.shape, array.chunks
        self.in_shard = [shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True)]
        coded = array.metadata.to_dict()["codecs"][0]["configuration"]
        names = [codec["name"] for codec in coded["index_codecs"]]
        endian = coded["index_codecs"][0].get("configuration", {}).get("endian")
        if names not in (["bytes"], ["bytes", "crc32c"]) or endian != "little":
            what = f"{endian}-endian {names}, expected little-endian bytes and crc32c"
            raise FileError(path, f"indices of shards are coded as {what}")
        self.n_bytes, self.n_check = 16 * math.prod(self.in_shard), 4 * (len(names) - 1)
        self.at_end = coded.get("index_location", "end") == "end"

    def left_out(self, key: str, value: Any, byte_range: Any) -> list[str]:
        """Return the chunks that a shard does not have, if its index is in what was read of it."""
        size = self.n_bytes + self.n_check
        if byte_range is None:
            value = value[-size:] if self.at_end else value[:size]
        elif byte_range != (_Suffix(size) if self.at_end else _Range(0, size)):
            return []
        index = np.frombuffer(value.to_bytes()[: self.n_bytes], "<u8").reshape(*self.in_shard, 2)
        shard = [int(number) for number in re.findall(r"\d+", key)[-index.ndim + 1 :]]
        chunks = np.argwhere((index == self.NONE).all(-1)) + np.multiply(shard, self.in_shard)
        inside = (chunks * self.chunks < self.shape).all(-1)  # a shard at the edge has room for more
        return [f"{tuple(chunk)} of {key}" for chunk in chunks[inside].tolist()]
