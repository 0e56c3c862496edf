"""Labels: every integer dtype to its limits, `ignore_index`, and bad labels, found in the pass and named.

The bad label is the first in C order of the rows however many threads looked, and leaves gradients'
outputs untouched, since those may be the logits themselves.
"""

import re

import numpy as np
import oracle
import pytest
from cases import INTEGERS, batch, unfilled
from memory import LAYOUTS
from ulp import assert_exact

import logitloss as ll

LABELLED = (
    ll.cross_entropy,
    ll.cross_entropy_grad,
    ll.cross_entropy_value_and_grad,
    ll.cross_entropy_and_lse,
    ll.nll_loss,
)


@pytest.mark.sanitize
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_integer_dtype_in_every_layout(backend, integer, layout):
    logits, target = batch((35, 100), np.dtype(np.float32))
    value, gradient = oracle.cross_entropy(logits, target)
    labels = LAYOUTS[layout](target.astype(integer))
    loss, grad = ll.cross_entropy_value_and_grad(logits, labels, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@pytest.mark.sanitize
@pytest.mark.parametrize("integer", INTEGERS, ids=str)
@pytest.mark.parametrize("n_classes", [1, 10, 100, 300])
def test_limits_of_every_integer_dtype(backend, integer, n_classes):
    """The extremes of the dtype are bad labels, also those over 2**63; the last class is good."""
    logits = np.zeros((20, n_classes), np.float32)
    for bad in {int(np.iinfo(integer).min), int(np.iinfo(integer).max)} - set(range(n_classes)):
        target = np.zeros(20, integer)
        target[1] = min(n_classes - 1, np.iinfo(integer).max)
        target[17:] = bad
        for function in LABELLED:
            with pytest.raises(IndexError, match=rf"^target\[17\] is {bad}, but"):
                function(logits, target, backend=backend)


@pytest.mark.parametrize("bad", [2**63, 2**63 + 5, 2**64 - 100, 2**64 - 1])
def test_unsigned_labels_over_two_to_the_63(backend, bad):
    """As a signed number each of these is negative: 2**64 - 100 must not pass for the ignored label."""
    target = np.array([1, 2, bad], np.uint64)
    for function in LABELLED:
        for ignored in (-100, -1, 2**63 - 1, -(2**63)):
            with pytest.raises(IndexError, match=rf"^target\[2\] is {bad}, but"):
                function(np.zeros((3, 5)), target, ignore_index=ignored, backend=backend)


@pytest.mark.parametrize(
    ("integer", "ignore_index"),
    [
        ("i1", -100),
        ("i2", -1),
        ("i4", -(2**31)),
        ("i8", -(2**63)),
        ("u1", 255),
        ("u8", 2**63 - 1),
        ("i4", 0),
        ("u4", 4),
    ],
)
def test_ignore_index_within_and_outside_the_classes(backend, dtype, integer, ignore_index):
    logits, target = batch((35, 10), dtype)
    target = target.astype(integer)
    target[::4] = ignore_index
    value, gradient = oracle.cross_entropy(logits, target, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index, "reduction": "none", "backend": backend}
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    exact_nll = oracle.nll(logits, target, ignore_index=ignore_index)
    assert_exact(ll.nll_loss(logits, target, **options), exact_nll)


@pytest.mark.parametrize("integer", ["u1", "u2", "u4", "u8", "i1"])
@pytest.mark.parametrize("ignore_index", [-100, -(2**40), 2**40])
def test_ignore_index_the_dtype_cannot_hold_matches_nothing(backend, integer, ignore_index):
    """-100 is 156 in eight bits: only the number counts, never its low bits."""
    target = np.arange(200 if integer == "u1" else 100).astype(integer)
    logits = np.zeros((target.size, 200))
    rows = ll.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none", backend=backend)
    assert rows.tolist() == pytest.approx([np.log(200)] * target.size)


@pytest.mark.parametrize("shape", [(1000, 7), (70, 129), (3, 20000)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_first_bad_label_is_named_whatever_the_threads(backend, shape, threads):
    logits, target = batch(shape, np.dtype(np.float32))
    target = target.copy()
    first = shape[0] // 3
    target[[first, shape[0] - 1]] = [-7, shape[1]]
    for function in LABELLED:
        with pytest.raises(IndexError, match=rf"^target\[{first}\] is -7, but .* {shape[1]} classes"):
            function(logits, target, num_threads=threads, backend=backend)


@pytest.mark.parametrize(("shape", "position"), [((35, 10), 0), ((35, 10), 34), ((70, 2000), 69)], ids=str)
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
def test_bad_label_leaves_out_untouched(backend, dtype, shape, position, options):
    source, target = batch(shape, dtype)
    target = target.copy()
    target[position] = shape[1]
    for function in (ll.cross_entropy_grad, ll.cross_entropy_value_and_grad):
        logits, out = source.copy(), unfilled(source.shape, dtype)
        for array in (logits, out):
            with pytest.raises(IndexError, match=rf"^target\[{position}\]"):
                function(logits, target, out=array, backend=backend, **options)
        assert logits.tobytes() == source.tobytes()
        assert np.isnan(out.astype(float)).all()


@pytest.mark.parametrize(
    ("shape", "axis", "index"),
    [
        ((10,), None, ()),
        ((6, 10), None, (4,)),
        ((10, 6), 0, (5,)),
        ((3, 10, 5), None, (1, 3)),
        ((3, 5, 10), -1, (2, 4)),
    ],
)
def test_bad_label_is_named_by_its_index(backend, shape, axis, index):
    rows = list(shape)
    rows.pop(1 if axis is None and len(shape) > 1 else axis or 0)
    target = np.zeros(rows, np.int32)
    target[index] = 12
    where = f"target[{', '.join(map(str, index))}]" if index else "target"
    message = f"{where} is 12, but logits have 10 classes: expected 0 <= target < 10 or ignore_index=-100"
    for function in LABELLED:
        with pytest.raises(IndexError, match=f"^{re.escape(message)}$"):
            function(np.zeros(shape), target, axis=axis, backend=backend)


def test_bad_label_of_a_weighted_mean(backend):
    """The denominator reads weight[label]: not before the label is known to be good."""
    weight = np.linspace(1, 2, 5)
    for function in LABELLED:
        with pytest.raises(IndexError, match=r"^target\[1\] is 100000000, but"):
            function(np.zeros((3, 5)), np.array([0, 10**8, 2]), weight=weight, backend=backend)
