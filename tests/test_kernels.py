"""The kernel contract where the public functions do not reach: outputs together, missing outputs.

Every backend is called as the package calls it, with outputs prefilled, so that a kernel which leaves an
entry unwritten is seen here.
"""

import numpy as np
import oracle
import pytest
from cases import batch, unfilled, zoo
from memory import WRITABLE_LAYOUTS
from ulp import assert_exact, result_dtype

from logitloss import _backends


def cross_entropy(backend, logits, target, **wanted):
    """Call the kernel with what differs from the plain call, on two threads."""
    names = ("beta", "gamma", "z_loss", "scale", "lse_in", "loss", "lse", "figures", "grad")
    given = {"z_loss": 0.0, "scale": 1.0, **wanted}
    arguments = [given.pop(name, None) for name in names]
    assert not given
    return _backends.get(backend).cross_entropy(logits, target, -100, *arguments, 2)


def test_name(backend):
    assert _backends.get(backend).name == backend


@pytest.mark.sanitize
@pytest.mark.parametrize("n_classes", [1, 2, 10, 16, 33, 129, 1000])
def test_all_outputs_together(backend, dtype, n_classes):
    logits, target = zoo(n_classes, dtype)
    target = np.where(np.arange(len(target)) % 7 == 3, -100, target)
    n_rows = len(target)
    loss, lse = unfilled(n_rows, result_dtype(dtype)), unfilled(n_rows, np.float64)
    grad = unfilled(logits.shape, dtype)
    total, counted, bad = cross_entropy(backend, logits, target, loss=loss, lse=lse, grad=grad)
    value, gradient = oracle.cross_entropy(logits, target)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    assert_exact(lse, oracle.wide_lse(logits), dtype=dtype)
    assert_exact(np.float64(total), oracle.reduced(value), dtype=dtype)
    assert (counted, bad) == (int((target != -100).sum()), -1)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_outputs_of_any_strides(backend, dtype, layout):
    make = WRITABLE_LAYOUTS[layout]
    logits, target = batch((3, 35, 10), dtype)
    loss, lse = make(unfilled((3, 35), result_dtype(dtype))), make(unfilled((3, 35), np.float64))
    grad = make(unfilled(logits.shape, dtype))
    scale = make(np.linspace(0, 2, 105).reshape(3, 35))
    cross_entropy(backend, logits, target, scale=scale, loss=loss, lse=lse, grad=grad)
    value, gradient = oracle.cross_entropy(logits, target, scale=scale)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    assert_exact(lse, oracle.wide_lse(logits), dtype=dtype)


@pytest.mark.parametrize("outputs", [(), ("loss",), ("lse",), ("grad",), ("lse", "grad"), ("lse", "loss")])
def test_each_output_can_be_left_out(backend, outputs):
    """Total and outputs do not depend on what else is asked for, but for a last digit."""
    dtype = np.dtype(np.float32)
    for shape in ((35, 10), (5, 1000)):
        logits, target = batch(shape, dtype)
        types = {"loss": np.float32, "lse": np.float64, "grad": np.float32}
        shapes = {name: shape if name == "grad" else shape[:1] for name in types}
        every = {name: np.zeros(shapes[name], types[name]) for name in types}
        total, _, _ = cross_entropy(backend, logits, target, **every)
        some = {name: np.ones(shapes[name], types[name]) for name in outputs}
        alone, counted, bad = cross_entropy(backend, logits, target, **some)
        assert alone == pytest.approx(total, rel=1e-6)
        assert (counted, bad) == (shape[0], -1)
        for name in outputs:
            assert np.allclose(some[name], every[name], rtol=1e-6)


def test_scale_and_lse_by_strides_of_zero(backend, dtype):
    logits, target = batch((20, 10), dtype)
    logits, target = np.broadcast_to(logits[3], (20, 10)), np.broadcast_to(target[3], 20)
    lse_in = np.broadcast_to(oracle.wide_lse(logits[0]).value.astype(np.float64), 20)
    grad = unfilled((20, 10), dtype)
    cross_entropy(backend, logits, target, scale=np.broadcast_to(-0.5, 20), lse_in=lse_in, grad=grad)
    assert_exact(grad, oracle.cross_entropy(logits, target, scale=-0.5)[1], extra=8)


def test_a_poisoned_row_is_nan_whatever_its_coefficients(backend, dtype):
    logits = np.zeros((19, 4), dtype)
    logits[3, 1], logits[7, 2], logits[11] = np.nan, np.inf, -np.inf
    zeros = np.zeros(4)
    loss, grad = unfilled(19, result_dtype(dtype)), unfilled(logits.shape, dtype)
    cross_entropy(backend, logits, np.zeros(19, np.int64), beta=zeros, loss=loss, grad=grad)
    poisoned = np.isin(np.arange(19), [3, 7, 11])
    assert np.isnan(loss[poisoned]).all()
    assert np.isnan(grad[poisoned].astype(float)).all()
    assert not loss[~poisoned].any()
    assert not grad[~poisoned].any()


def test_a_given_lse_that_is_not_finite_poisons(backend, dtype):
    logits, target = np.zeros((20, 5), dtype), np.zeros(20, np.int64)
    lse_in = np.full(20, np.log(5.0))
    lse_in[[2, 9, 17]] = np.nan, np.inf, -np.inf
    grad = unfilled((20, 5), dtype)
    cross_entropy(backend, logits, target, lse_in=lse_in, grad=grad)
    bad = np.isin(np.arange(20), [2, 9, 17])
    assert np.isnan(grad[bad].astype(float)).all()
    assert np.isfinite(grad[~bad].astype(float)).all()


@pytest.mark.parametrize("integer", ["i1", "i8", "u4"])
def test_label_weight(backend, integer):
    target = (np.arange(1000) % 100).astype(integer)
    weight = np.linspace(0, 1, 100)
    kernels = _backends.get(backend)
    assert kernels.label_weight(target, None, -100, 100, 2) == (1000, -1)
    assert kernels.label_weight(target, None, 7, 100, 2) == (990, -1)
    total, bad = kernels.label_weight(target[::-2], weight, 7, 100, 3)
    expected = weight[target[::-2]].sum() - weight[7] * (target[::-2] == 7).sum()
    assert (total, bad) == (pytest.approx(expected, rel=1e-13), -1)
    assert kernels.label_weight(target, weight, -100, 50, 3)[1] == 50
