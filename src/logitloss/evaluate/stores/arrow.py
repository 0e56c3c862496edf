"""Columns of Arrow IPC files and streams (`.arrow`, `.feather`, `.ipc`), mapped: no number is copied.

A file is a stream of record batches between a magic and a footer, which tells where each batch is; a stream
is read from its start. The mapping is ours, so that pages are looked after as those of other mapped files
are. What is compressed is unpacked a record batch at a time, and of the one column alone.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.columns import Column, column_index, pa
from logitloss.evaluate.stores.mapped import MappedArray, map_array
from logitloss.evaluate.stores.stored import Array, Box, Place, library, one_line

ipc: Any = library("pyarrow.ipc", "arrow")

# What a file begins with, padded to eight bytes; what one of the format before; and what ends a stream
FILE_MAGIC, FEATHER_1_MAGIC, END = b"ARROW1\0\0", b"FEA1", b"\xff\xff\xff\xff\0\0\0\0"
# Bytes that may be mapped around one that is read, and messages that are looked at between two releases
MAPPED_AROUND, AT_ONCE = 2 << 20, 8


def open_array(place: Place) -> "ArrowColumn":
    """Open a column of a file or a stream."""
    with open(place.file, "rb") as file:
        size = file.seek(0, 2)
        if not size:
            raise FileError(place.path, "the file is empty")
        mapped = map_array(place.path, file, 0, None, (size,), np.dtype(np.uint8))
    with one_line(place.path, "damaged or unsupported Arrow file"):
        return ArrowColumn(place, mapped)


class ArrowColumn(Column):
    """A column of record batches in mapped bytes.

    Parameters
    ----------
    place : Place
        Where it is.
    mapped : MappedArray
        All bytes of the file.
    """

    def __init__(self, place: Place, mapped: MappedArray) -> None:
        self.mapped, self.lent = mapped, dict[tuple[int, ...], Array]()
        self.buffer, self.copied = pa.py_buffer(mapped.array), 0
        start = mapped.array[: len(FILE_MAGIC)].tobytes()
        if start.startswith(FEATHER_1_MAGIC):
            raise FileError(place.path, "a Feather file of version 1, expected version 2")
        self.is_file = start == FILE_MAGIC
        rows = self._rows_of_batches(place.path)
        schema = self._reader(None).schema
        self.index = column_index(place, schema)
        self.options = ipc.IpcReadOptions(included_fields=[self.index])
        if self.is_file:
            n_batches = self._reader(None).num_record_batches
            if n_batches != len(rows):
                raise FileError(place.path, f"damaged: {len(rows)} record batches, {n_batches} by the footer")
            # with a choice of columns, the reader of files copies them
            if rows and self._is_mapped(self._reader(None).get_batch(0).column(self.index)):
                self.options = None
        *entries, n_rows = accumulate(rows, initial=0)
        super().__init__(place, schema.field(self.index), n_rows, entries if self.is_file else [0])

    def _rows_of_batches(self, path: str) -> list[int]:
        """Return how many rows each record batch has, of which nothing is unpacked."""
        stream = self.buffer.slice(len(FILE_MAGIC)) if self.is_file else self.buffer
        source, nothing, rows = pa.BufferReader(stream), pa.schema([]), list[int]()
        for number, message in enumerate(ipc.MessageReader.open_stream(source)):
            if message.type == "record batch":
                rows.append(ipc.read_record_batch(message, nothing).num_rows)
            if number % AT_ONCE == 0:
                self.mapped.release()
        end = source.tell()
        if stream[max(0, end - len(END)) : end].to_pybytes() != END:
            raise FileError(path, "truncated: there is no end of the stream")
        if min(rows, default=0) < 0:
            raise FileError(path, f"damaged: a record batch of {min(rows)} rows")
        return rows

    def _reader(self, options: Any) -> Any:
        return (ipc.open_file if self.is_file else ipc.open_stream)(self.buffer, options=options)

    def _batches(self, entry: int, n_rows: int) -> Iterator[Any]:
        reader = self._reader(self.options)
        if self.is_file:
            batches = map(reader.get_batch, range(entry, reader.num_record_batches))
        else:
            batches = iter(reader)
        return (batch.column(self.index if self.options is None else 0) for batch in batches)

    def _is_mapped(self, array: Any) -> bool:
        """Whether what an array refers to is in the file, and not unpacked."""
        start, end = self.buffer.address, self.buffer.address + self.buffer.size
        return all(start <= buffer.address <= end for buffer in array.buffers() if buffer is not None)

    def _read(self, box: Box) -> Array:
        self.mapped.check(self.mapped.array[:0])
        block = super()._read(box)
        if np.may_share_memory(block, self.mapped.array):
            self.lent[_corner(box)] = block
        return block

    def _use(self, part: Array) -> None:
        self.mapped.check(part)

    def _used(self, part: Array) -> None:
        end = np.lib.array_utils.byte_bounds(part)[1] - self.buffer.address
        if 0 < end <= self.buffer.size:
            # and of what lies before it, which the system has mapped around it, once more
            start = max(0, min(self.copied, end) - MAPPED_AROUND)
            self.mapped.let_go(self.mapped.array[start:end])
            self.copied = end

    def release(self, box: Box = ()) -> None:
        """Let go of the pages that a box was read from."""
        self.mapped.let_go(self.lent.pop(_corner(self._stored(box)), None) if box else None)

    def close(self) -> None:
        """Let go of the file."""
        super().close()
        self.lent.clear()


def _corner(box: Box) -> tuple[int, ...]:
    return tuple(part.start for part in box)
