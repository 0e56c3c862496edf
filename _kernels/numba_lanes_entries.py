"""From exponentials or logits of rows in lanes to the entries of `out`, in lanes too."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from logitloss._kernels import numba_operations
from logitloss._kernels.numba_lanes_arrays import LINE
from logitloss._kernels.numba_lanes_finish import (
    FACTOR,
    LABEL,
    LABEL_ENTRY,
    LARGEST,
    LOG1P_OTHERS,
    SCALE,
    TOP,
    TOP_ENTRY,
)
from logitloss._kernels.vectors import inline, outline


def entries(real: type) -> SimpleNamespace:
    """Return the functions for one real type."""
    ops = numba_operations.operations(real)
    load, store, stream, where = ops.load, ops.store, ops.stream, ops.where
    maximum, minimum, largest = ops.maximum, ops.minimum, real(np.finfo(real).max)
    load_one, store_one = ops.load_one, ops.store_one
    zero, size, vector_bytes = real(0), ops.size, ops.lanes * ops.size

    def product(load):
        """Return the function for an entry from its exponential."""

        @inline
        def entry(rows, at, e, g, number):
            # An exponential may be NaN or infinite where the row is ignored; where it is not, the factor is.
            p = minimum(maximum(load(e), zero), largest) * load(at + FACTOR * rows.slot_bytes)
            is_label = load(at + LABEL * rows.slot_bytes) == number
            return where(is_label, load(at + LABEL_ENTRY * rows.slot_bytes), p)

        return entry

    def product_with_gamma(load):
        """Return the same with a coefficient by class."""

        @inline
        def entry(rows, at, e, g, number):
            p = minimum(maximum(load(e), zero), largest) * load(at + FACTOR * rows.slot_bytes)
            result = p - load(g) * load(at + SCALE * rows.slot_bytes)
            is_top = load(at + TOP * rows.slot_bytes) == number
            result = where(is_top, load(at + TOP_ENTRY * rows.slot_bytes), result)
            is_label = load(at + LABEL * rows.slot_bytes) == number
            return where(is_label, load(at + LABEL_ENTRY * rows.slot_bytes), result)

        return entry

    def logarithm(load):
        """Return the function for a logarithm of softmax from the logit."""

        @inline
        def entry(rows, at, x, g, number):
            ahead = load(x) - load(at + LARGEST * rows.slot_bytes)
            return ahead - load(at + LOG1P_OTHERS * rows.slot_bytes)

        return entry

    def mapping(entry_by):
        """Return the function that turns a range of classes into entries of `out`, in lanes both."""
        entry, entry_of_one = entry_by(load), entry_by(load_one)

        @outline
        def map_range(rows, start, step, out, out_step, first_class, n_classes, streams):
            for c in range(n_classes):
                number = real(first_class + c)
                x, to, g = start + c * step, out + c * out_step, rows.other + c * rows.stride
                end = rows.n * size
                if streams:
                    # Whole lines go around the cache; what shares one with other rows does not.
                    head = min(end, -to & (LINE - 1))
                    whole = head + (end - head) // LINE * LINE
                    for i in range(0, head, size):
                        store_one(to + i, entry_of_one(rows, rows.slots + i, x + i, g + i, number))
                    for i in range(head, whole, LINE):
                        for j in range(i, i + LINE, vector_bytes):
                            stream(to + j, entry(rows, rows.slots + j, x + j, g + j, number))
                    for i in range(whole, end, size):
                        store_one(to + i, entry_of_one(rows, rows.slots + i, x + i, g + i, number))
                else:
                    for i in range(0, end, vector_bytes):
                        store(to + i, entry(rows, rows.slots + i, x + i, g + i, number))

        return map_range

    return SimpleNamespace(
        map_product=mapping(product), map_gamma=mapping(product_with_gamma), map_log=mapping(logarithm)
    )
