"""Results larger than the cache are written around it, which leaves the same bits and nothing beside them.

The Numba backend is told that every result is larger: so all widths, and places within a line, can be tried.
"""

import numpy as np
import pytest
from cases import frozen, rng_for
from logitloss._kernels import numba_cpu

import logitloss as ll

N_ROWS, PADDING = 7, 64


def results(logits, target, offset, threads):
    """Return the bits of all that is written per class, with what lies before and after it."""
    options = {"num_threads": threads, "backend": "numba"}
    functions = (
        lambda out: ll.cross_entropy_value_and_grad(logits, target, out=out, **options),
        lambda out: ll.softmax(logits, axis=1, out=out, **options),
        lambda out: ll.log_softmax(logits, axis=1, out=out, **options),
    )
    found = []
    for function in functions:
        memory = np.full(logits.size + 2 * PADDING, 9, logits.dtype)
        function(memory[offset : offset + logits.size].reshape(logits.shape))
        assert (memory[:offset] == 9).all()
        assert (memory[offset + logits.size :] == 9).all()
        found.append(memory.astype(np.float64))
    return found


@pytest.mark.parametrize("offset", [0, 1, 13, 32])
@pytest.mark.parametrize("n_classes", [10, 47, 1000, 2111, 9001])
def test_streamed_results_have_the_same_bits(monkeypatch, dtype, n_classes, offset):
    rng = rng_for("streams", n_classes)
    logits = (3 * rng.standard_normal((N_ROWS, n_classes))).astype(dtype)
    logits[2, 5], logits[3, -3], logits[4, 7] = -np.inf, np.nan, np.inf
    logits[5] = -3e4
    logits[5, n_classes // 2] = 7
    target = rng.integers(0, n_classes, N_ROWS)
    target[:2] = n_classes - 1, -100
    frozen(logits)
    expected = results(logits, target, offset, 1)
    monkeypatch.setattr(numba_cpu, "STREAM_FROM", 0)
    for threads in (1, 2):
        for found, wanted in zip(results(logits, target, offset, threads), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
