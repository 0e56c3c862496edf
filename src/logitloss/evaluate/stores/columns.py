"""Columns of tables, as Arrow has them in memory: numbers, lists of them as further axes, strings.

A column comes in arrays, one for each record batch. `Column` keeps its place among them, so that blocks in
order go on where the last one ended; for one before that, or far ahead, reading begins anew at the last of
`entries` before it. A block that lies in one array is a view of it, others are put together. How arrays are
read is left to `arrow` and `parquet`.
"""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from logitloss.evaluate.errors import FileError
from logitloss.evaluate.stores.stored import Array, Box, Place, StoredArray, library, one_line

pa: Any = library("pyarrow", "arrow")

# Rows of strings that are looked through at once for the longest
AT_ONCE = 1 << 16


# Some rows, and the number of the first
Rows = tuple[Any, int]


@dataclass(slots=True)
class Cursor:
    """The arrays that follow, the one that was read last, and its first row."""

    following: Iterator[Any]
    array: Any
    first: int

    @property
    def end(self) -> int:
        """The row after the array's last."""
        return self.first + len(self.array)


class Column(StoredArray):
    """A column of a table.

    Parameters
    ----------
    place : Place
        Where it is.
    field : pyarrow.Field
        Its name and type.
    n_rows : int
        Of the table.
    entries : list of int
        The rows at which reading can begin, the first of them 0.
    """

    def __init__(self, place: Place, field: Any, n_rows: int, entries: list[int]) -> None:
        dtype = _dtype(_element(field.type))
        if dtype is None:
            what = f"column {field.name!r} holds {field.type}, expected numbers, lists of them, or strings"
            raise FileError(place.path, what)
        super().__init__(place.path, (n_rows,), dtype)  # as far as is known before a row is read
        self.name, self.entries = field.name, entries
        self.cursors: list[Cursor] = []  # at most one; the list is shared by all that are views of this
        self.lengths: list[int] = []  # of the lists on each level
        self._flat(next(self._arrays(0, min(1, n_rows)), (pa.nulls(0, field.type), 0)))
        self.cursors.clear()
        if dtype.kind == "U":
            dtype = np.dtype(f"U{self._longest_string()}")
            self.cursors.clear()
        super().__init__(place.path, (n_rows, *_inner_shape(field.type, self.lengths)), dtype)
        self._element_dtype = dtype  # which stays where this is viewed under another

    @abstractmethod
    def _batches(self, entry: int, n_rows: int) -> Iterator[Any]:
        """Return the column's arrays from an entry on, of which so many rows are wanted at once."""

    def _use(self, part: Array) -> None:
        """Make sure that a part can be read, of which it is not known whether it is a view of the file."""

    def _used(self, part: Array) -> None:
        """Let go of a part that was copied."""

    def close(self) -> None:
        """Let go of the file."""
        self.cursors.clear()

    def _read(self, box: Box) -> Array:
        with one_line(self.path, "damaged or unsupported"):
            rows, inside = box[0], (slice(None), *box[1:])
            block = None
            for array, first in self._arrays(rows.start, rows.stop):
                part = self._numbers((array, first))[inside]
                self._use(part)
                if len(part) == rows.stop - rows.start:
                    return part
                if block is None:
                    block = np.empty((rows.stop - rows.start, *part.shape[1:]), part.dtype)
                block[first - rows.start : first - rows.start + len(part)] = part
                self._used(part)
            return np.empty((0, *self._shape[1:]), self._element_dtype)[inside] if block is None else block

    def _arrays(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield the arrays that rows are in, cut to them."""
        if start < stop and not self._is_near(start):
            entry = bisect_right(self.entries, start) - 1
            self.cursors[:] = [Cursor(self._batches(entry, stop - start), (), self.entries[entry])]
        while start < stop:
            (cursor,) = self.cursors
            while cursor.end <= start:
                array = next(cursor.following, None)
                if array is None:
                    raise FileError(self.path, f"truncated: {cursor.end} of {self._shape[0]} rows are there")
                array.validate(full=True)
                cursor.first, cursor.array = cursor.end, array
            part = cursor.array.slice(start - cursor.first, stop - start)
            yield part, start
            start += len(part)

    def _is_near(self, row: int) -> bool:
        """Whether a row is reached by going on, and no entry lies between that would be faster."""
        if not self.cursors or row < self.cursors[0].first:
            return False
        end = self.cursors[0].end
        return row <= end or bisect_right(self.entries, row) == bisect_right(self.entries, end)

    def _numbers(self, rows: Rows) -> Array:
        """Return some rows as NumPy's array; a view of numbers where it can be."""
        flat = self._flat(rows)
        if self._element_dtype.kind == "U":
            indices, strings = self._strings(flat)
            numbers = np.array(strings, self._element_dtype)[indices]
        else:
            numbers = _plain(flat, self._element_dtype)
        return numbers.reshape(len(rows[0]), *self._shape[1:])

    def _flat(self, rows: Rows) -> Any:
        """Return the elements of some rows, or raise FileError for a null or for lists of other lengths.

        The lengths are those of the first lists that are seen.
        """
        (array, first), level, per_row = rows, 0, 1
        while True:
            if array.null_count:
                row = first + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) // per_row
                raise FileError(self.path, f"column {self.name!r} holds a null", (row,))
            if isinstance(array.type, pa.BaseExtensionType):
                array = array.storage
                continue
            if pa.types.is_fixed_size_list(array.type):
                length = array.type.list_size
            elif _is_list(array.type):
                lengths = np.diff(array.offsets.to_numpy())
                known = level < len(self.lengths)
                length = self.lengths[level] if known else int(lengths[0]) if len(lengths) else 0
                if (lengths != length).any():
                    place = int(np.argmax(lengths != length))
                    what = f"column {self.name!r} holds a list of {lengths[place]}, others are of {length}"
                    raise FileError(self.path, what, (first + place // per_row,))
            else:
                break
            if level == len(self.lengths):
                self.lengths.append(length)
            level, per_row, array = level + 1, per_row * max(1, length), array.flatten()
        if pa.types.is_dictionary(array.type) and array.dictionary.null_count:
            raise FileError(self.path, f"column {self.name!r} holds a null in its dictionary")
        return array

    def _strings(self, flat: Any) -> tuple[Array, list[str]]:
        """Return strings as indices into different ones."""
        encoded = flat if pa.types.is_dictionary(flat.type) else flat.dictionary_encode()
        strings = encoded.dictionary.to_pylist()
        for string in strings:
            if string and string.endswith("\0"):  # which NumPy's texts leave out
                raise FileError(self.path, f"column {self.name!r} holds {string!r}, which ends in a NUL")
        return encoded.indices.to_numpy(), strings

    def _longest_string(self) -> int:
        longest, n_rows = 1, self._shape[0]
        for start in range(0, n_rows, AT_ONCE):
            for rows in self._arrays(start, min(start + AT_ONCE, n_rows)):
                longest = max(longest, *map(len, self._strings(self._flat(rows))[1]))
            self.release()
        return longest


def column_index(place: Place, schema: Any) -> int:
    """Return the number of the column that is meant."""
    name = place.chosen(schema.names)
    index: int = schema.get_field_index(name)
    if index < 0:
        raise FileError(place.path, f"holds several columns named {name!r}")
    return index


def _plain(flat: Any, dtype: np.dtype[Any]) -> Array:
    """Return numbers as an array, a view but of bits and of dictionaries."""
    if pa.types.is_dictionary(flat.type):
        numbers: Array = _plain(flat.dictionary, dtype)[flat.indices.to_numpy()]
    elif dtype.kind == "V":
        every = np.frombuffer(flat.buffers()[1] or b"", dtype)
        numbers = every[flat.offset : flat.offset + len(flat)]
    else:
        numbers = flat.to_numpy(zero_copy_only=dtype.kind != "b")
    return numbers


def _element(type_: Any) -> Any:
    """Return the type of the elements of lists and tensors; of tensors in another order their own."""
    while True:
        order = getattr(type_, "permutation", None)
        if order is not None and order != sorted(order):
            return type_
        if isinstance(type_, pa.BaseExtensionType):
            type_ = type_.storage_type
        elif pa.types.is_fixed_size_list(type_) or _is_list(type_):
            type_ = type_.value_type
        else:
            return type_


def _inner_shape(type_: Any, lengths: list[int]) -> list[int]:
    """Return the axes within a row, of lists of such lengths, some of which are tensors."""
    axes: list[int] = []
    for length in lengths:
        inner = [length]
        while isinstance(type_, pa.BaseExtensionType):
            if isinstance(type_, pa.FixedShapeTensorType):
                inner = type_.shape
            type_ = type_.storage_type
        axes += inner
        type_ = type_.value_type
    return axes


def _is_list(type_: Any) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_))


def _dtype(type_: Any) -> np.dtype[Any] | None:
    """Return the dtype of a type of elements, if there is one; of strings without their length."""
    types = pa.types
    if types.is_dictionary(type_):
        return _dtype(type_.value_type)
    if types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_):
        return np.dtype("U")
    if types.is_fixed_size_binary(type_) and type_.byte_width in (1, 2):
        return np.dtype(f"V{type_.byte_width}")
    if types.is_boolean(type_):
        return np.dtype(np.bool_)
    if types.is_floating(type_) or types.is_integer(type_):
        kind = "f" if types.is_floating(type_) else "u" if types.is_unsigned_integer(type_) else "i"
        return np.dtype(f"{kind}{type_.bit_width // 8}")
    return None
