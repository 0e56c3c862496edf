"""Which positions count: those predicted, that no mask leaves out, and whose label is none to ignore.

A position is one label of the target. One that does not count has one reason, the first of these that holds:

- shifted: nothing predicts it. With `shift`, the logits at a position of the target's last axis are those of
  the next label, so that the first of each sequence has none, and the last logits have no label.
- masked: the mask is 0 there, whatever label it holds, in the classes or not.
- ignored: the label is `ignore_index`.

All others count, and those of infinite loss are told apart among them. Padding that counts is found in
`padding.py`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import DtypeError, MaskError, ShapeError
from logitloss.evaluate.stores.stored import StoredArray

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]


def predicted(shape: tuple[int, ...], shift: bool) -> tuple[int, ...]:
    """Return the shape of a target's positions that are predicted."""
    if not shift:
        return shape
    if not shape:
        raise ShapeError("target", "of shape (), which has no axis of positions to shift")
    return *shape[:-1], max(0, shape[-1] - 1)


def check_mask(mask: Array | StoredArray, rows: tuple[int, ...]) -> None:
    """Refuse a mask that cannot be one of so many rows."""
    if mask.dtype.kind not in "biu":
        raise DtypeError("mask", f"of type {mask.dtype}, expected bool, or integers 0 and 1")
    if mask.shape != rows:
        raise ShapeError("mask", f"of shape {mask.shape}, but the target has {rows}")


def as_bool(mask: Array) -> Mask:
    """Return a mask of 0 and 1 as one of bool."""
    if mask.dtype == np.bool_:
        return mask
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        index = np.unravel_index(int(np.argmax(wrong)), mask.shape)
        raise MaskError("mask", f"is {mask[index]}, expected 0 or 1", tuple(int(i) for i in index))
    return np.asarray(mask != 0)


def counting(labels: Array, mask: Array | None, ignore_index: int) -> Mask:
    """Return which of some labels count."""
    counted = np.asarray(labels != ignore_index)
    return counted if mask is None else counted & (mask != 0)


def without_masked(labels: Array, mask: Mask | None, ignore_index: int) -> Array:
    """Return labels of classes, those that the mask leaves out as `ignore_index`."""
    if mask is None or mask.all():
        return labels
    limits = np.iinfo(labels.dtype)
    if not limits.min <= ignore_index <= limits.max:
        # no label of 2**63 - 1 or more is that of a class
        labels = np.minimum(labels, min(limits.max, 2**63 - 1)).astype(np.int64)
    return np.where(mask, labels, labels.dtype.type(ignore_index))
