"""Arrays of more than 2**31 elements, and elements more than 2**31 apart: no index is kept in 32 bits.

The arrays are zeros that were never written, which take no memory: reads all see the kernel's one zero page.
Only the passes of a compiled backend are fast enough to go over all of them.
"""

import math

import numpy as np
import oracle
import pytest
from cases import batch
from memory import untouched
from numpy.lib.stride_tricks import as_strided
from ulp import assert_exact

import logitloss as ll

FAR = 2**30 + 1  # elements from one row, or class, to the next: the third is beyond 2**31


@pytest.fixture
def compiled():
    """Return the name of the default backend."""
    reason = ll.backends()["cython"]
    if reason is not None:
        pytest.skip(reason)
    return "cython"


def test_more_elements_than_31_bits_count(compiled):
    """16385 rows of 131072: the last row lies past element 2**31."""
    shape = (2**14 + 1, 2**17)
    logits = untouched(shape, np.float16)
    logits[-1, -1] = 10
    target = np.zeros(shape[0], np.int32)
    target[-1] = shape[1] - 1
    rows = ll.cross_entropy(logits, target, reduction="none", backend=compiled)
    assert rows[:-1].tolist() == pytest.approx([math.log(shape[1])] * (shape[0] - 1), rel=5e-7)
    assert rows[-1] == pytest.approx(math.log1p((shape[1] - 1) * math.exp(-10)), rel=5e-7)
    target[-1] = -1
    with pytest.raises(IndexError, match=rf"^target\[{shape[0] - 1}\] is -1, but"):
        ll.cross_entropy(logits, target, backend=compiled)


@pytest.mark.sanitize
@pytest.mark.parametrize("axis", [0, 1], ids=["classes apart", "rows apart"])
def test_elements_further_apart_than_31_bits(backend, dtype, axis):
    memory = untouched(2 * FAR + 200, dtype)
    short = dtype.itemsize
    if axis == 0:
        source, target = batch((100, 3), dtype)
        view = as_strided(memory, (100, 3), (short, FAR * short))
    else:
        source, target = batch((3, 100), dtype)
        view = as_strided(memory, (3, 100), (FAR * short, short))
    view[...] = source
    value, gradient = oracle.cross_entropy(source, target)
    loss, grad = ll.cross_entropy_value_and_grad(view, target, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    ll.cross_entropy_value_and_grad(view, target, reduction="none", out=view, backend=backend)
    assert_exact(view, gradient)
    ll.sigmoid(view, out=view, backend=backend)
    assert_exact(view, oracle.sigmoid(grad))


def test_elementwise_over_31_bits(compiled):
    """2**31 + 2**15 elements of BCE: half of each row is right, half wrong."""
    row = np.where(np.arange(2**15) % 2, 2.0, -2.0).astype(np.float32)
    shape = (2**16 + 1, 2**15)
    logits, target = np.broadcast_to(row, shape), np.broadcast_to(np.uint8(1), shape)
    total = ll.binary_cross_entropy_with_logits(logits, target, reduction="sum", backend=compiled)
    expected = shape[0] * 2**14 * (2 * math.log1p(math.exp(-2)) + 2)
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_more_rows_than_31_bits_count(compiled):
    n_rows = 2**31 + 3
    logits = np.broadcast_to(np.zeros(2, np.float32), (n_rows, 2))
    target = untouched(n_rows, np.int8)
    target[-1] = -100
    assert ll.cross_entropy(logits, target, backend=compiled) == pytest.approx(math.log(2), rel=1e-6)
    target[-1] = 2
    with pytest.raises(IndexError, match=rf"^target\[{n_rows - 1}\] is 2, but"):
        ll.cross_entropy(logits, target, backend=compiled)
