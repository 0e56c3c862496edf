"""What tells an array, up to some row, from others without reading it all: elements of it, far apart."""

import hashlib
from typing import Any

import numpy as np

from logitloss.evaluate.stores.stored import AnyArray, StoredArray, far_apart
from logitloss.layer import LinearLogits

# Elements that a fingerprint is taken of, as far apart as can be: of all shards, and of each at least
SAMPLE, LEAST_SAMPLE = 2048, 64


def sample_of(n_shards: int) -> int:
    """Return how many elements of an array are taken where there are so many shards."""
    return max(LEAST_SAMPLE, SAMPLE // max(1, n_shards))


class Fingerprint:
    """Elements of an array, far apart, of which a digest tells the array of so many rows from others.

    They are read once. A file may be repaired after the rows done, and its digest stays.
    """

    def __init__(self, array: AnyArray, n_rows: int, sample: int) -> None:
        if isinstance(array, StoredArray):
            places, self.elements = array.samples(sample)
        else:
            places = far_apart(array.size, sample)
            self.elements = array[np.unravel_index(places, array.shape)]
        self.rows = places // max(1, array.size // max(1, n_rows))
        self.shape, self.dtype = list(array.shape), array.dtype.str

    def of(self, done: int) -> dict[str, Any]:
        """Return shape, type and digest of so many rows."""
        sample = self.elements[: np.searchsorted(self.rows, done)]
        digest = hashlib.blake2b(np.ascontiguousarray(sample).tobytes(), digest_size=16).hexdigest()
        return {"shape": self.shape, "dtype": self.dtype, "fingerprint": digest}


class LinearFingerprint:
    """That of hidden states and of the layer, which all rows share."""

    def __init__(self, logits: LinearLogits, n_rows: int, sample: int) -> None:
        self.hidden = Fingerprint(logits.hidden, n_rows, sample)
        layer = {"weight": logits.weight, "bias": logits.bias}
        self.layer: dict[str, Any] = {
            name: None if array is None else Fingerprint(array, 1, sample).of(1)
            for name, array in layer.items()
        }
        self.layer |= {"softcap": logits.softcap, "scale": logits.scale}

    def of(self, done: int) -> dict[str, Any]:
        """Return those of so many rows, and of the layer."""
        return {"hidden": self.hidden.of(done), **self.layer}
