"""Where the classes are: one row, (N, C), (N, C, d1, ...), and any `axis`; results have the rows' shape."""

import numpy as np
import oracle
import pytest
from cases import batch, probabilities, unfilled
from expected import batch_cross_entropy, batch_soft_cross_entropy
from ulp import Exact, assert_exact, result_dtype

import logitloss as ll

# Shape of the rows, number of classes, and where they stand; None is PyTorch's rule.
PLACES = [
    ((), 10, None),
    ((), 33, 0),
    ((), 7, -1),
    ((5,), 17, None),
    ((5,), 17, -1),
    ((40,), 17, 0),
    ((2, 3), 17, None),
    ((4, 33), 10, None),
    ((2, 3), 33, -1),
    ((2, 3), 33, 2),
    ((2, 35), 3, 0),
    ((2, 35), 3, -3),
    ((2, 3, 5), 10, None),
    ((2, 3, 5), 10, 2),
    ((2, 3, 5), 130, -1),
    ((1, 1, 1), 1, None),
    ((2, 2, 2, 2, 3), 4, 3),
]


def place(array, axis):
    """Move the classes from the end to where the call expects them."""
    if axis is None:
        axis = 1 if array.ndim > 1 else 0
    return np.ascontiguousarray(np.moveaxis(array, -1, axis)).reshape(np.moveaxis(array, -1, axis).shape)


def placed(rows: Exact, axis) -> Exact:
    return Exact(*(place(np.broadcast_to(part, rows.value.shape), axis) for part in rows))


@pytest.mark.parametrize(("rows", "n_classes", "axis"), PLACES, ids=str)
def test_labels(backend, dtype, rows, n_classes, axis):
    source, target = batch((*rows, n_classes), dtype)
    logits = place(source, axis)
    value, gradient = batch_cross_entropy((*rows, n_classes), dtype)
    options = {"axis": axis, "reduction": "none", "backend": backend}
    out = unfilled(logits.shape, dtype)
    loss, _ = ll.cross_entropy_value_and_grad(logits, target, out=out, **options)
    assert_exact(loss, value)
    assert_exact(out, placed(gradient, axis))
    assert loss.dtype == result_dtype(dtype)
    assert_exact(ll.cross_entropy(logits, target, **options), value)
    loss, lse = ll.cross_entropy_and_lse(logits, target, **options)
    assert_exact(loss, value)
    assert_exact(lse, oracle.wide_lse(source), dtype=dtype)
    grad = ll.cross_entropy_grad(logits, target, lse=lse, **options)
    assert_exact(grad, placed(gradient, axis), extra=10)
    if not rows:
        assert isinstance(loss, result_dtype(dtype).type)
        assert type(lse) is np.float64


@pytest.mark.parametrize(("rows", "n_classes", "axis"), PLACES, ids=str)
def test_probabilities(backend, dtype, rows, n_classes, axis):
    shape = (*rows, n_classes)
    logits, target = place(batch(shape, dtype)[0], axis), place(probabilities(shape, dtype), axis)
    value, gradient = batch_soft_cross_entropy(shape, dtype)
    options = {"axis": axis, "reduction": "none", "backend": backend}
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    assert_exact(loss, value)
    assert_exact(grad, placed(gradient, axis))


@pytest.mark.parametrize(("rows", "n_classes", "axis"), PLACES, ids=str)
def test_functions_with_an_axis(backend, dtype, rows, n_classes, axis):
    source, target = batch((*rows, n_classes), dtype)
    logits = place(source, axis)
    options = {"axis": axis, "reduction": "none", "backend": backend}
    assert_exact(ll.nll_loss(logits, target, **options), oracle.nll(source, target))
    if axis is None:
        axis = 1 if rows else 0
    assert_exact(ll.softmax(logits, axis=axis, backend=backend), placed(oracle.softmax(source), axis))
    assert_exact(ll.log_softmax(logits, axis=axis, backend=backend), placed(oracle.log_softmax(source), axis))
    assert_exact(ll.entropy(logits, axis=axis, backend=backend), oracle.entropy(source))
    assert_exact(ll.logsumexp(logits, axis=axis, backend=backend), oracle.logsumexp(source))


@pytest.mark.parametrize(
    ("axis", "expected"),
    [(0, (3, 4, 5)), (-1, (2, 3, 4)), ((0, 2), (3, 5)), ((-1, 1), (2, 4)), ((3,), (2, 3, 4))],
)
@pytest.mark.parametrize("keepdims", [False, True])
def test_logsumexp_over_axes(backend, dtype, axis, expected, keepdims):
    logits, _ = batch((2, 3, 4, 5), dtype)
    axes = [number % 4 for number in (axis if isinstance(axis, tuple) else (axis,))]
    kept = [number for number in range(4) if number not in axes]
    rows = logits.transpose(*kept, *axes).reshape(*expected, -1)
    exact_rows = oracle.logsumexp(rows)
    if keepdims:
        shape = tuple(1 if number in axes else n for number, n in enumerate(logits.shape))
        exact_rows = Exact(*(part.reshape(shape) for part in exact_rows))
    out = unfilled(exact_rows.value.shape, result_dtype(dtype))
    result = ll.logsumexp(logits, axis=axis, keepdims=keepdims, out=out, backend=backend)
    assert result is out
    assert_exact(out, exact_rows)


def test_logsumexp_over_everything_is_a_scalar(backend, dtype):
    logits, _ = batch((2, 3, 4, 5), dtype)
    value = ll.logsumexp(logits, axis=(0, 1, 2, 3), backend=backend)
    assert isinstance(value, result_dtype(dtype).type)
    assert_exact(value, Exact(*(part[()] for part in oracle.logsumexp(logits.reshape(-1)))))


def test_results_of_no_axes_are_out_where_it_is_given(backend, dtype):
    logits, scalar = np.array([0.5, -0.5, 0.25], dtype), np.array(0.5, dtype)
    none = {"reduction": "none", "backend": backend}
    out = unfilled((), result_dtype(dtype))
    assert ll.cross_entropy(logits, 1, out=out, **none) is out
    assert_exact(out, oracle.cross_entropy(logits, 1)[0])
    assert ll.nll_loss(logits, 2, out=out, **none) is out
    assert_exact(out, oracle.nll(logits, 2))
    assert ll.entropy(logits, out=out, **none) is out
    assert_exact(out, oracle.entropy(logits))
    assert ll.logsumexp(logits, out=out, backend=backend) is out
    assert_exact(out, oracle.logsumexp(logits))
    assert ll.binary_cross_entropy_with_logits(scalar, 1, out=out, **none) is out
    assert_exact(out, oracle.bce_with_logits(scalar, 1)[0])
    out = unfilled((), dtype)
    assert ll.sigmoid(scalar, out=out, backend=backend) is out
    assert_exact(out, oracle.sigmoid(scalar))
    assert ll.binary_cross_entropy_with_logits_grad(scalar, 1, out=out, **none) is out
    assert_exact(out, oracle.bce_with_logits(scalar, 1)[1])


@pytest.mark.parametrize("n_classes", [5, 300_000])
def test_no_rows_of_some_classes(backend, dtype, n_classes):
    logits = np.empty((0, n_classes), dtype)
    assert ll.cross_entropy(logits, np.empty(0, int), reduction="none", backend=backend).shape == (0,)
    for function in (ll.softmax, ll.log_softmax, ll.sigmoid, ll.log_sigmoid):
        assert function(logits, backend=backend).shape == (0, n_classes)
    assert ll.logsumexp(logits, backend=backend).shape == (0,)
    assert ll.entropy(logits, backend=backend).shape == (0,)


def test_elementwise_functions_take_any_shape(backend, dtype):
    for shape in ((), (1,), (2, 3, 4), (0,)):
        x = np.full(shape, 0.5, dtype)
        loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(
            x, np.ones(shape, bool), reduction="none", backend=backend
        )
        value, gradient = oracle.bce_with_logits(x, np.ones(shape))
        assert_exact(loss, value)
        assert_exact(grad, gradient)
        assert_exact(ll.sigmoid(x, backend=backend), oracle.sigmoid(x))
        assert np.asarray(grad).dtype == dtype
