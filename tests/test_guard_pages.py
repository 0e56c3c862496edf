"""Nothing outside an array is read or written: each array lies flush against a page that ends the process.

Vector loops load whole registers; the row's tail, the last row of a batch and a label out of range are
where they would reach too far. All arrays of a call are placed so at once, ends first, then starts. The
sizes stand around every register width; values are checked as well, so that a masked lane shows.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from cases import INTEGERS, batch, probabilities, unfilled
from expected import batch_cross_entropy, batch_soft_cross_entropy
from memory import guarded, has_guard_pages
from ulp import assert_exact, result_dtype

import logitloss as ll

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(not has_guard_pages(), reason="needs mprotect"),
    pytest.mark.parametrize("side", ["end", "start"]),
]
CLASSES = (1, 2, 3, 7, 10, 15, 17, 31, 33, 63, 65, 129, 257)


def test_the_wall_stands(side):
    step = "array.ctypes.data + array.nbytes" if side == "end" else "array.ctypes.data - 1"
    program = (
        "import ctypes, numpy, memory\n"
        f"array = memory.guarded(numpy.arange(7.0), side={side!r})\n"
        "assert array.tolist() == [0, 1, 2, 3, 4, 5, 6]\n"
        f"ctypes.string_at({step}, 1)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, check=False)
    assert run.returncode in (-signal.SIGSEGV, -signal.SIGBUS)


@pytest.mark.parametrize("n_classes", CLASSES)
def test_cross_entropy(backend, dtype, side, n_classes):
    for n_rows in (1, 3, 17):
        shape = (n_rows, n_classes)
        logits, target = (guarded(array, side=side) for array in batch(shape, dtype))
        value, gradient = batch_cross_entropy(shape, dtype)
        grad = guarded(unfilled(shape, dtype), side=side)
        loss = guarded(unfilled(n_rows, result_dtype(dtype)), side=side)
        ll.cross_entropy(logits, target, reduction="none", out=loss, backend=backend)
        ll.cross_entropy_grad(logits, target, reduction="none", out=grad, backend=backend)
        assert_exact(loss, value)
        assert_exact(grad, gradient)
        ll.cross_entropy_value_and_grad(logits, target, reduction="none", out=logits, backend=backend)
        assert_exact(logits, gradient)


@pytest.mark.parametrize("n_classes", [*CLASSES, 2345])
def test_classes_apart(backend, dtype, side, n_classes):
    source, target = batch((3, n_classes), dtype)
    value, gradient = batch_cross_entropy((3, n_classes), dtype)
    for step in (2, -1):
        wide = np.full((3, abs(step) * (n_classes - 1) + 1), np.nan, dtype)
        wide[:, ::step] = source
        whole = guarded(wide, side=side)
        logits = whole[:, ::step]
        loss, grad = ll.cross_entropy_value_and_grad(logits, target, reduction="none", backend=backend)
        assert_exact(loss, value)
        assert_exact(grad, gradient)
        ll.cross_entropy_grad(logits, target, reduction="none", out=logits, backend=backend)
        assert_exact(logits, gradient)
        assert step == -1 or np.isnan(whole[:, 1::2].astype(float)).all()


@pytest.mark.parametrize("n_classes", CLASSES)
def test_probabilities(backend, dtype, side, n_classes):
    shape = (3, n_classes)
    logits = guarded(batch(shape, dtype)[0], side=side)
    target = guarded(probabilities(shape, dtype), side=side)
    value, gradient = batch_soft_cross_entropy(shape, dtype)
    grad = guarded(unfilled(shape, dtype), side=side)
    loss, _ = ll.cross_entropy_value_and_grad(logits, target, reduction="none", out=grad, backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 10, 17), (1, 33, 3), (2, 7, 16)], ids=str)
def test_classes_in_the_middle(backend, dtype, side, shape):
    last = (shape[0], shape[2], shape[1])
    source, labels = batch(last, dtype)
    logits, target = guarded(np.moveaxis(source, -1, 1), side=side), guarded(labels, side=side)
    value, gradient = batch_cross_entropy(last, dtype)
    grad = guarded(unfilled(shape, dtype), side=side)
    loss, _ = ll.cross_entropy_value_and_grad(logits, target, reduction="none", out=grad, backend=backend)
    assert_exact(loss, value)
    assert_exact(np.moveaxis(grad, 1, -1), gradient)


@pytest.mark.parametrize("stride", [2, -1, -3])
@pytest.mark.parametrize("n_classes", [3, 17, 130])
def test_strides_up_to_the_wall(backend, dtype, side, n_classes, stride):
    """Only the elements of the view are there to be touched: the last one ends at the wall."""
    source, target = batch((4, n_classes), dtype)
    value, gradient = batch_cross_entropy((4, n_classes), dtype)
    span = abs(stride) * (4 * n_classes - 1) + 1
    spans = [guarded(np.full(span, np.nan, dtype), side=side) for _ in "ab"]
    logits, grad = (memory[::stride].reshape(4, n_classes) for memory in spans)
    assert np.shares_memory(logits, spans[0])
    logits[...] = source
    loss, _ = ll.cross_entropy_value_and_grad(logits, target, reduction="none", out=grad, backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("n_classes", [3, 16, 100])
def test_labels_of_any_width(backend, side, integer, n_classes):
    dtype = np.dtype(np.float32)
    source, labels = batch((17, n_classes), dtype)
    logits, target = guarded(source, side=side), guarded(labels.astype(integer), side=side)
    value, _ = batch_cross_entropy((17, n_classes), dtype)
    assert_exact(ll.cross_entropy(logits, target, reduction="none", backend=backend), value)


@pytest.mark.parametrize("row", [0, 8, 16], ids=["first row", "middle row", "last row"])
@pytest.mark.parametrize("n_classes", [3, 16, 100])
def test_bad_labels_reach_no_memory(backend, dtype, side, n_classes, row):
    """A step outside, and so far outside that no page is there, in every function that takes labels."""
    source, labels = batch((17, n_classes), dtype)
    logits, target = guarded(source, side=side), guarded(labels, side=side)
    for bad in (-1, n_classes, 2**15, -(2**31), 2**40, -(2**40), 2**63 - 1, -(2**63)):
        target[row] = bad
        message = rf"target\[{row}\] is {bad}, but logits have {n_classes} classes"
        functions = (ll.cross_entropy, ll.cross_entropy_value_and_grad, ll.cross_entropy_grad, ll.nll_loss)
        for function in functions:
            with pytest.raises(IndexError, match=message):
                function(logits, target, backend=backend)


def test_elementwise(backend, dtype, side):
    for size in (1, 3, 15, 17, 31, 33, 65, 257):
        logits = guarded(batch((size, 1), dtype)[0][:, 0], side=side)
        target = guarded((np.arange(size) % 2).astype(np.uint8), side=side)
        weight = guarded(np.linspace(0.5, 2, size), side=side)
        grad = guarded(unfilled(size, dtype), side=side)
        value, gradient = oracle.bce_with_logits(logits, target, weight=weight, pos_weight=weight)
        options = {"weight": weight, "pos_weight": weight, "reduction": "none", "backend": backend}
        loss, _ = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, out=grad, **options)
        assert_exact(loss, value)
        assert_exact(grad, gradient)
        for name in ("sigmoid", "log_sigmoid"):
            getattr(ll, name)(logits, out=grad, backend=backend)
            assert_exact(grad, getattr(oracle, name)(logits))
        p = guarded(ll.sigmoid(logits, backend=backend), side=side)
        options = {"reduction": "none", "backend": backend}
        assert_exact(ll.binary_cross_entropy(p, target, **options), oracle.binary_cross_entropy(p, target))
        log_p = guarded(ll.log_sigmoid(logits, backend=backend), side=side)
        assert_exact(ll.kl_div(log_p, p, **options), oracle.kl_div(log_p, p))


@pytest.mark.parametrize("n_classes", CLASSES)
def test_functions_of_rows(backend, dtype, side, n_classes):
    source, labels = batch((3, n_classes), dtype)
    logits, target = guarded(source, side=side), guarded(labels, side=side)
    out = guarded(unfilled(logits.shape, dtype), side=side)
    for name in ("softmax", "log_softmax"):
        getattr(ll, name)(logits, out=out, backend=backend)
        assert_exact(out, getattr(oracle, name)(logits))
    row_out = guarded(unfilled(3, result_dtype(dtype)), side=side)
    for name in ("logsumexp", "entropy"):
        getattr(ll, name)(logits, out=row_out, backend=backend)
        assert_exact(row_out, getattr(oracle, name)(logits))
    weight = guarded(np.linspace(0.5, 2, n_classes), side=side)
    ll.nll_loss(logits, target, weight=weight, reduction="none", out=row_out, backend=backend)
    assert_exact(row_out, oracle.nll(logits, target, weight=weight))
    value, gradient = oracle.cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
    options = {"weight": weight, "label_smoothing": 0.1, "reduction": "none", "backend": backend}
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@pytest.mark.parametrize("n_classes", [2, 10, 21])
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_of_short_rows(backend, side, n_classes, axis):
    """Rows enough for blocks of any size, and a gradient too large for the cache: every row as if alone."""
    dtype = np.dtype(np.float32)
    for n_rows in (4096 + 13, 2**23 // n_classes + 5):
        logits, target = batch((n_rows, n_classes), dtype)
        logits = np.moveaxis(guarded(np.moveaxis(logits, 1, 1 - axis), side=side), 1 - axis, 1)
        grad = np.moveaxis(
            guarded(np.full_like(np.moveaxis(logits, 1, 1 - axis), np.nan), side=side), 1 - axis, 1
        )
        options = {"reduction": "none", "backend": backend}
        loss, _ = ll.cross_entropy_value_and_grad(logits, target, out=grad, **options)
        for first in (0, 61, n_rows // 2, n_rows - 19):
            rows = slice(first, first + 19)
            alone = ll.cross_entropy_value_and_grad(logits[rows], target[rows], **options)
            assert np.array_equal(loss[rows], alone[0])
            assert np.array_equal(grad[rows], alone[1])
