"""Between arrays and a block of rows as lanes: labels and numbers by row, logits and results by class.

Rows side by side are reals in memory as they are in lanes, and are read and written in place. Any others pass
through a tile, class-major: `rows.stride` bytes from one class to the next.
"""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
from logitloss._kernels import numba_items, numba_memory, numba_operations, numba_pieces, vectors
from logitloss._kernels.numba_job import job_steps, last_stride, place, run_length
from logitloss._kernels.vectors import inline, outline

LINE = 64

# A block: `n` rows from `first` on, `width` in whole vectors. `slots` is the address of what is kept by row,
# so many bytes a slot, `tile` and `other` those of two tiles.
Rows = namedtuple("Rows", "first n width slots slot_bytes stride tile other")

_SIZES = tuple(numba_items.itemsize(item) for item in numba_items.ITEMS)


def arrays(item: str) -> SimpleNamespace:
    """Return the functions for logits of such items."""
    real = np.float64 if item == "f64" else np.float32
    ops, steps = numba_operations.operations(real), job_steps(real)
    size, lanes, piece = ops.size, ops.lanes, numba_pieces.piece_items(real)
    kind, real_kind, item_size = (
        numba_items.ITEMS.index(item),
        numba_items.ITEMS.index(ops.item),
        numba_items.itemsize(item),
    )
    load, store, stream, splat, where = ops.load, ops.store, ops.stream, ops.splat, ops.where
    load_one, store_one, minimum, lanes_sum = ops.load_one, ops.store_one, ops.minimum, ops.lanes_sum
    load_run, store_run = steps.load_run, steps.store_run
    load_item, store_item = numba_items.loader(item, real), numba_items.storer(item, real)
    load_pieces = numba_pieces.piece_loader(item, real, lanes)
    store_pieces = numba_pieces.piece_storer(item, real, lanes)
    load_labels, load_any = numba_items.label_loader(real, lanes), numba_items.any_loader(real)
    zero, one, ignored, bad = real(0), real(1), real(-1), real(-2)

    @outline
    def labels_of(job, rows, to):
        """Bring labels to reals, -1 where ignored; return how many rows count, or -1 if a label is bad."""
        target, done, n_ignored, lowest = job.target, 0, 0, splat(zero)
        n_ignored_lanes = splat(zero)
        stride = last_stride(target)
        while done < rows.n:
            length = run_length(target, rows.first + done, rows.n - done)
            at = place(target, rows.first + done)
            whole = length - length % lanes if stride == _SIZES[target.kind] else 0
            for i in range(0, whole, lanes):
                # The next block's
                numba_memory.prefetch(at + (i + rows.n) * stride)
                label = load_labels(target.kind, at + i * stride, job.n_classes, job.ignore_index)
                store(to + (done + i) * size, label)
                lowest = minimum(label, lowest)
                n_ignored_lanes = n_ignored_lanes + where(label == ignored, one, zero)
            for i in range(whole, length):
                label = numba_items.load_label(target.kind, at + i * stride)
                number = real(label) if 0 <= label < job.n_classes else bad
                if label == job.ignore_index:
                    number = ignored
                    n_ignored += 1
                store_one(to + (done + i) * size, number)
                lowest = minimum(splat(number), lowest)
            done += length
        for i in range(rows.n, rows.width):
            store_one(to + i * size, ignored)
        if vectors.any_lane(lowest == bad):
            return -1
        return rows.n - n_ignored - np.intp(lanes_sum(n_ignored_lanes))

    @outline
    def fill(to, n, value):
        """Store one real n times, in whole vectors."""
        for i in range(0, n, lanes):
            store(to + i * size, splat(value))

    @outline
    def numbers(view, rows, otherwise, to):
        """Bring numbers by row to reals, `otherwise` where there are none."""
        if not view.address:
            fill(to, rows.width, otherwise)
            return
        stride, done = last_stride(view), 0
        while done < rows.n:
            length = run_length(view, rows.first + done, rows.n - done)
            at = place(view, rows.first + done)
            if stride == 0 and length == rows.n:
                fill(to, rows.width, load_any(view.kind, at))
            else:
                load_run(view.kind, at, stride, length, to + done * size)
            done += length

    @outline
    def are_beside(view, rows):
        """Whether the rows lie side by side, as reals that fill whole vectors."""
        return (
            view.kind == real_kind
            and last_stride(view) == size
            and rows.n == rows.width
            and run_length(view, rows.first, rows.n) == rows.n
        )

    @inline
    def has_pieces(view, n_classes):
        return view.kind == kind and view.class_stride == item_size and n_classes >= piece

    @outline
    def bring(view, rows, first_class, n_classes, tile):
        """Bring classes of all rows into a tile."""
        row_stride, done = last_stride(view), 0
        while done < rows.n:
            length = run_length(view, rows.first + done, rows.n - done)
            at = place(view, rows.first + done) + first_class * view.class_stride
            to = tile + done * size
            if has_pieces(view, n_classes):
                whole = length - length % lanes
                for i in range(0, whole, lanes):
                    for start in range(0, n_classes, piece):
                        c = min(start, n_classes - piece)
                        classes = load_pieces(at + i * row_stride + c * item_size, row_stride)
                        for k in range(piece):
                            store(to + i * size + (c + k) * rows.stride, classes[k])
                for i in range(whole, length):
                    for c in range(n_classes):
                        value = load_item(at + i * row_stride + c * item_size)
                        store_one(to + i * size + c * rows.stride, value)
            else:
                for c in range(n_classes):
                    from_class = at + c * view.class_stride
                    load_run(view.kind, from_class, row_stride, length, to + c * rows.stride)
            done += length
        for c in range(n_classes):
            for i in range(rows.n, rows.width):
                store_one(tile + c * rows.stride + i * size, zero)

    @outline
    def lanes_of(view, rows, first_class, n_classes):
        """Return where these classes are as lanes, in place or in the tile, and the bytes between classes."""
        if are_beside(view, rows):
            return place(view, rows.first) + first_class * view.class_stride, view.class_stride
        bring(view, rows, first_class, n_classes, rows.tile)
        return rows.tile, rows.stride

    @outline
    def stream_bytes(to, n, start):
        """Copy items around the cache, but for those that share a line with others."""
        head = min(n, -to & (LINE - 1))
        whole = head + (n - head) // LINE * LINE
        for i in range(0, head, item_size):
            store_item(to + i, load_item(start + i))
        for i in range(head, whole, LINE):
            for j in range(0, LINE, lanes * size):
                stream(to + i + j, load(start + i + j))
        for i in range(whole, n, item_size):
            store_item(to + i, load_item(start + i))

    @outline
    def put(view, rows, first_class, n_classes, streams):
        """Bring classes of all rows from the tile to where they belong."""
        row_stride, done = last_stride(view), 0
        while done < rows.n:
            length = run_length(view, rows.first + done, rows.n - done)
            at = place(view, rows.first + done) + first_class * view.class_stride
            start = rows.tile + done * size
            if has_pieces(view, n_classes):
                goes_around = streams and row_stride == n_classes * item_size
                # As it will lie in lines
                to = rows.other + (at & (LINE - 1)) if goes_around else at
                whole = length - length % lanes
                for i in range(0, whole, lanes):
                    for begin in range(0, n_classes, piece):
                        c = min(begin, n_classes - piece)
                        put_pieces(
                            start + i * size + c * rows.stride,
                            rows.stride,
                            to + i * row_stride + c * item_size,
                            row_stride,
                        )
                for i in range(whole, length):
                    for c in range(n_classes):
                        value = load_one(start + i * size + c * rows.stride)
                        store_item(to + i * row_stride + c * item_size, value)
                if goes_around:
                    stream_bytes(at, length * row_stride, to)
            else:
                for c in range(n_classes):
                    to_class = at + c * view.class_stride
                    store_run(view.kind, to_class, row_stride, length, start + c * rows.stride)
            done += length

    if piece == 4:

        @inline
        def put_pieces(start, step, to, stride):
            store_pieces(
                to, stride, (load(start), load(start + step), load(start + 2 * step), load(start + 3 * step))
            )

    else:

        @inline
        def put_pieces(start, step, to, stride):
            store_pieces(to, stride, (load(start), load(start + step)))

    return SimpleNamespace(
        labels_of=labels_of,
        fill=fill,
        numbers=numbers,
        are_beside=are_beside,
        bring=bring,
        lanes_of=lanes_of,
        put=put,
        put_items=steps.put_items,
        load_item=load_item,
    )
