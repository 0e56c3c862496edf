"""Columns of Parquet files, unpacked a few rows at a time, so that row groups may be of any size.

A row group is where reading can begin; within one it goes from row to row. The file is read, not mapped: what
is wrong with a disk is an exception then, and what was read once is not needed again.
"""

import math
import os
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.columns import Column, column_index, pa
from logitloss.evaluate.stores.stored import Array, Place, far_apart, library, one_line

pq: Any = library("pyarrow.parquet", "arrow")

# Bytes of a file read at once, and of numbers unpacked at once: more is no faster
BUFFER_BYTES = BATCH_BYTES = 1 << 18
# What a string is taken for in these, while it is not known how long they are
STRING_BYTES = 64


def open_array(place: Place) -> "ParquetColumn":
    """Open a column of a file."""
    with open(place.file, "rb") as file:
        if not file.read(1):
            raise FileError(place.path, "the file is empty")
    with one_line(place.path, "damaged or unsupported Parquet file"):
        return ParquetColumn(place)


class ParquetColumn(Column):
    """A column of a Parquet file.

    Parameters
    ----------
    place : Place
        Where it is.
    """

    def __init__(self, place: Place) -> None:
        self.source = pa.OSFile(os.fsencode(place.file))  # of a str, only what UTF-8 can encode
        options = {"buffer_size": BUFFER_BYTES, "pre_buffer": False, "page_checksum_verification": True}
        self.file = pq.ParquetFile(self.source, **options)
        metadata, schema = self.file.metadata, self.file.schema_arrow
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        *entries, n_rows = accumulate(rows, initial=0)
        if min(rows, default=0) < 0 or n_rows != metadata.num_rows:
            raise FileError(place.path, f"damaged: row groups of {rows} rows, {metadata.num_rows} in all")
        super().__init__(place, schema.field(column_index(place, schema)), n_rows, entries)

    def _batches(self, entry: int, n_rows: int) -> Iterator[Any]:
        batches = self.file.iter_batches(
            batch_size=min(n_rows, self._rows_at_once),
            row_groups=list(range(entry, len(self.entries))),
            columns=[self.name],
            use_threads=False,
        )
        # a column whose name goes on after a dot comes, too
        return (batch.column(batch.schema.get_field_index(self.name)) for batch in batches)

    @property
    def _rows_at_once(self) -> int:
        row_bytes = math.prod(self._shape[1:]) * (self.dtype.itemsize or STRING_BYTES)
        return max(1, BATCH_BYTES // max(1, row_bytes))

    def samples(self, most: int) -> tuple[npt.NDArray[np.int64], Array]:
        """Return elements of the first rows of row groups far apart, and where they are in C order.

        For others a row group would have to be unpacked up to there.
        """
        places, elements = [np.zeros(0, np.int64)], [np.zeros(0, self.dtype)]
        rows, *inside = self._seen
        numbers = far_apart(len(self.entries), min(most, self.MOST_SAMPLES)).tolist()
        for number in numbers:
            start, stop = [*self.entries, self._shape[0]][number : number + 2]
            start, stop = max(start, rows.start), min(stop, rows.stop, start + self._rows_at_once)
            if start >= stop or not self.size:
                continue
            block = self._read((slice(start, stop), *inside))
            index = np.unravel_index(far_apart(block.size, most // len(numbers)), block.shape)
            elements.append(block[index].view(self.dtype))
            index = (index[0] + start - rows.start, *index[1:])
            places.append(np.ravel_multi_index([index[axis] for axis in self._axes], self.shape))
        order = np.argsort(np.concatenate(places))
        return np.concatenate(places)[order], np.concatenate(elements)[order]

    def close(self) -> None:
        """Let go of the file."""
        super().close()
        self.source.close()
