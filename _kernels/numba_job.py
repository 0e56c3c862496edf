"""What a piece of work is to the Numba kernels on the processor, and where its items lie.

A job is one record in memory. It describes each array by address, kind of item, and strides, axes joined
where they can be, so that kernels are compiled for a kind of logits and never for a layout. Rows (elements)
count in C order. `job_steps` has the functions that find items, of any kind, and load or store runs of them:
for what is not the logits' hot path.
"""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from logitloss._kernels import numba_items, numba_memory, vectors
from logitloss._kernels.vectors import inline, outline
from numba import carray, types

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

# An array. `address` is 0 where it was not given. `axes` is the address of (shape, stride) pairs, strides in
# bytes; `class_stride` is that of the class axis, which is not among them. `kind` is a place in ITEMS.
VIEW = np.dtype([(name, "i8") for name in ("address", "kind", "class_stride", "n_axes", "axes")], align=True)

LABELS, PROBABILITIES, NO_TARGET = range(3)
# What becomes of each logit once its row's statistics are known
NOTHING, GRADIENT, SOFTMAX, LOG_SOFTMAX, ENTROPY = range(5)
# Losses of elements
BCE_WITH_LOGITS, BCE, KL_DIV, KL_DIV_LOG_TARGET, SIGMOID, LOG_SIGMOID = range(6)

# The names are the contract's. `operation` is what is done to each logit, or the loss of elements; `gamma` is
# the address of reals, `beta` and `figures` of float64. `parts` is where the statistics of long rows' parts
# are, or 0; `streams` whether `out` goes around the cache, `keeps` whether exponentials are kept for the
# second pass.
INTEGERS = ("operation", "target_kind", "n", "n_classes", "block", "ignore_index")
INTEGERS += ("beta", "gamma", "figures", "parts", "streams", "keeps", "signed")
REALS = ("gamma_sum", "target_scale", "target_offset", "z_loss", "label_smoothing")
VIEWS = ("logits", "target", "weight", "pos_weight", "scale", "lse_in", "loss", "lse", "out")
JOB = np.dtype(
    [
        *((name, "i8") for name in INTEGERS),
        *((name, "f8") for name in REALS),
        *((name, VIEW) for name in VIEWS),
    ],
    align=True,
)
_NUMBERS = struct.Struct(f"{len(INTEGERS)}q{len(REALS)}d{len(VIEW) * len(VIEWS)}q")
_NO_VIEW = (0,) * len(VIEW)
# What a block found: `bad` is the number of a row or element, or -1.
FOUND = np.dtype([("total", "f8"), ("counted", "i8"), ("bad", "i8")], align=True)

# A kernel does one block of a job: of the job's address, the block's number, the calling thread's own scratch
# memory, on a page's bound, and the address of what it finds.
KERNEL = types.void(types.intp, types.intp, types.intp, types.intp)

_PLACES = {item: place for place, item in enumerate(numba_items.ITEMS)}
_KINDS = {
    **{
        np.dtype(code): f"{'u' if code.isupper() else 'i'}{8 * np.dtype(code).itemsize}"
        for code in "bBhHiIlLqQ"
    },
    **{np.dtype(f"f{size}"): f"f{8 * size}" for size in (2, 4, 8)},
    np.dtype(bool): "bool",
}


def item_of(array: Array) -> str:
    """Return the name of the array's items."""
    return _KINDS.get(array.dtype, "bf16")


def real_of(array: Array) -> type[np.float32 | np.float64]:
    """Return the type that such logits are computed in."""
    return np.float64 if array.dtype == np.float64 else np.float32


def real_coefficients(coefficients: Array, logits: Array) -> Array:
    """Return numbers by class in that type."""
    with np.errstate(over="ignore", under="ignore"):
        return coefficients.astype(real_of(logits))


class Job:
    """What a job's record will hold, with what it points to."""

    def __init__(self, **numbers: float) -> None:
        self.numbers: dict[str, Any] = dict.fromkeys((*INTEGERS, *REALS), 0) | numbers
        self.views: dict[str, tuple[int, int, int]] = {}
        self.axes: dict[str, list[int]] = {}
        self.kept: list[object] = []

    def describe(self, name: str, array: Array | None, has_classes: bool = False) -> None:
        """Fill in an array, if there is one."""
        if array is None:
            return
        rows = array.ndim - 1 if has_classes else array.ndim
        axes: list[int] = []
        for size, stride in zip(array.shape[:rows], array.strides[:rows], strict=True):
            if axes and axes[-1] == stride * size:
                axes[-2:] = axes[-2] * size, stride
            elif size != 1:
                axes += size, stride
        class_stride = array.strides[-1] if has_classes else 0
        self.views[name] = (array.ctypes.data, _PLACES[item_of(array)], class_stride)
        self.axes[name] = axes
        self.kept.append(array)

    def last_stride(self, name: str) -> int:
        """Return the bytes from one row to the next, along a run of them."""
        return self.axes[name][-1] if self.axes[name] else 0

    def describe_number_or_array(self, name: str, value: Array | float) -> None:
        """Fill in an array, or a number that is the same for all; 1 needs none."""
        if isinstance(value, np.ndarray):
            self.describe(name, value)
        elif value != 1:
            self.describe(name, np.array(value, np.float64))

    def point_to(self, name: str, table: Array | None) -> None:
        """Fill in the address of a contiguous table, if there is one."""
        if table is not None:
            self.kept.append(table)
            self.numbers[name] = table.ctypes.data

    def record(self) -> Array:
        """Return the record, and behind it the axes."""
        n_axes = sum(map(len, self.axes.values()))
        memory = np.empty(_NUMBERS.size // 8 + n_axes, np.int64)
        end = memory.ctypes.data + _NUMBERS.size
        views: list[int] = []
        all_axes: list[int] = []
        for name in VIEWS:
            if name in self.views:
                axes = self.axes[name]
                views += *self.views[name], len(axes) // 2, end + 8 * len(all_axes)
                all_axes += axes
            else:
                views += _NO_VIEW
        _NUMBERS.pack_into(memory, 0, *self.numbers.values(), *views)
        memory[_NUMBERS.size // 8 :] = all_axes
        return memory


@inline
def job_at(address):
    """Return the job there."""
    return carray(numba_memory.as_pointer(address), (1,), JOB)[0]


@inline
def found_at(address):
    """Return the record there of what a block found."""
    return carray(numba_memory.as_pointer(address), (1,), FOUND)[0]


@inline
def axis_size(view, axis):
    """Return the size of one of the joined axes."""
    return numba_items.load_integer(view.axes + 16 * axis)


@inline
def axis_stride(view, axis):
    """Return its stride."""
    return numba_items.load_integer(view.axes + 16 * axis + 8)


@outline
def place(view, index):
    """Return the address of a row or element."""
    at = view.address
    for axis in range(view.n_axes - 1, 0, -1):
        size = axis_size(view, axis)
        at += index % size * axis_stride(view, axis)
        index //= size
    return at + index * axis_stride(view, 0) if view.n_axes else at


@inline
def last_stride(view):
    """Return the bytes from one row or element to the next, along a run of them."""
    return axis_stride(view, view.n_axes - 1) if view.n_axes else 0


@inline
def run_length(view, first, n):
    """Return how many of n items from `first` on are one run."""
    if not view.n_axes:
        return n
    size = axis_size(view, view.n_axes - 1)
    return min(n, size - first % size)


@inline
def block_range(job, block):
    """Return the block's first row or element, and how many it has."""
    first = block * job.block
    return first, min(job.block, job.n - first)


@inline
def label_of(job, row):
    """Return a row's label as int64."""
    return numba_items.load_label(job.target.kind, place(job.target, row))


@outline
def first_bad_label(job, first, n):
    """Return the first of n rows whose label is out of range, or -1."""
    for row in range(first, first + n):
        label = label_of(job, row)
        if label != job.ignore_index and not 0 <= label < job.n_classes:
            return row
    return -1


_SIZES = tuple(numba_items.itemsize(item) for item in numba_items.ITEMS)
_load_f64 = numba_items.loader("f64", np.float64)


@inline
def coefficient(table, label, default):
    """Return the float64 of a label in a table, or `default` where there is none."""
    return _load_f64(table + 8 * label) if table else default


_store_f64, _store_f32 = numba_items.storer("f64", np.float64), numba_items.storer("f32", np.float64)
_F64 = numba_items.ITEMS.index("f64")


@outline
def put(view, row, value):
    """Store the float64 result of a row, as float64 or float32, if it is wanted."""
    if view.address == 0:
        return
    if view.kind == _F64:
        _store_f64(place(view, row), value)
    else:
        _store_f32(place(view, row), value)


@inline
def put_figures(job, row, figures):
    """Store a tuple of float64, a row's FIGURES."""
    for k, value in enumerate(figures):
        _store_f64(job.figures + 8 * (len(figures) * row + k), value)


@outline
def get(view, row, default):
    """Return a row's float64 from such an array, or `default` where there is none."""
    return _load_f64(place(view, row)) if view.address else default


def job_steps(real: Any) -> SimpleNamespace:
    """Return the functions that take runs of any kind of item as one real type, and back."""
    own = "f64" if real is np.float64 else "f32"
    size, own_kind = numba_items.itemsize(own), numba_items.ITEMS.index(own)
    lanes = vectors.VECTOR_BYTES // size
    load_vector, store_vector = numba_items.loader(own, real, lanes), numba_items.storer(own, real, lanes)
    load_one, store_one = numba_items.loader(own, real), numba_items.storer(own, real)
    any_vector, any_one = numba_items.any_loader(real, lanes), numba_items.any_loader(real)
    put_vector, put_one = numba_items.any_storer(real, lanes), numba_items.any_storer(real)

    @outline
    def load_run(kind, address, stride, n, tile):
        """Bring n items, `stride` bytes apart, into the reals of a tile."""
        done = 0
        if stride == _SIZES[kind]:
            done = n - n % lanes
            for i in range(0, done, lanes):
                store_vector(tile + i * size, any_vector(kind, address + i * stride))
        for i in range(done, n):
            store_one(tile + i * size, any_one(kind, address + i * stride))

    @outline
    def store_run(kind, address, stride, n, tile):
        """Bring n reals of a tile to floats `stride` bytes apart."""
        done = 0
        if stride == _SIZES[kind]:
            done = n - n % lanes
            for i in range(0, done, lanes):
                put_vector(kind, address + i * stride, load_vector(tile + i * size))
        for i in range(done, n):
            put_one(kind, address + i * stride, load_one(tile + i * size))

    @outline
    def items(view, first, n, tile):
        """Return the address of n rows or elements from `first` on as reals, in place or in the tile."""
        stride = last_stride(view)
        if view.kind == own_kind and stride == size and run_length(view, first, n) == n:
            return place(view, first)
        done = 0
        while done < n:
            length = run_length(view, first + done, n - done)
            load_run(view.kind, place(view, first + done), stride, length, tile + done * size)
            done += length
        return tile

    @outline
    def put_items(view, first, n, tile):
        """Store the reals of a tile as rows or elements first ... first + n - 1."""
        done = 0
        while done < n:
            length = run_length(view, first + done, n - done)
            store_run(view.kind, place(view, first + done), last_stride(view), length, tile + done * size)
            done += length

    return SimpleNamespace(load_run=load_run, store_run=store_run, items=items, put_items=put_items)
