"""Identities that hold for any logits, over inputs that hypothesis makes up and shrinks.

Where an identity is exact in floating point too (a shift by a power of two that rounds nothing, classes at
-inf) the bounds are the ordinary ones of two results; else they are stated.
"""

import numpy as np
import oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ulp import assert_exact

import logitloss as ll

settings.register_profile(
    "matrix",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("matrix")

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 70))
FINITE = st.floats(-300, 300, width=32)


@st.composite
def batches(draw, elements=FINITE):
    """Return logits of float32 or float64 and labels."""
    n_rows, n_classes = draw(SIZES)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    logits = draw(hnp.arrays(np.float32, (n_rows, n_classes), elements=elements)).astype(dtype)
    seed = draw(st.integers(0, 2**32 - 1))
    target = np.random.default_rng(seed).integers(0, n_classes, n_rows)
    return logits, target


def fused(logits, target, backend, **options):
    return ll.cross_entropy_value_and_grad(logits, target, reduction="none", backend=backend, **options)


def tolerance(dtype):
    """Two results, each within its bound of the exact one, with up to 100 nats of lead."""
    return 250 * np.finfo(dtype).eps


@given(case=batches(st.one_of(FINITE, st.just(-np.inf), st.floats(width=32))))
def test_any_float_at_all_is_within_the_bounds(backend, case):
    logits, target = case
    value, gradient = oracle.cross_entropy(logits, target)
    loss, grad = fused(logits, target, backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@given(case=batches(st.integers(-40, 40)), shift=st.sampled_from([-4096, -512, -64, 1, 64, 1024, 2**17]))
def test_a_shift_changes_nothing(backend, case, shift):
    """Integers shifted by integers stay exact, so the results agree to the bound."""
    logits, target = case
    loss, grad = fused(logits, target, backend)
    shifted_loss, shifted_grad = fused(logits + logits.dtype.type(shift), target, backend)
    rtol = tolerance(logits.dtype)
    assert np.allclose(shifted_loss, loss, rtol=rtol, atol=0)
    scale = np.abs(grad).max(axis=1, keepdims=True)
    assert (np.abs(shifted_grad - grad) <= rtol * scale).all()


@given(case=batches(), seed=st.integers(0, 2**32 - 1))
def test_classes_have_no_order(backend, case, seed):
    logits, target = case
    order = np.random.default_rng(seed).permutation(logits.shape[1])
    loss, grad = fused(logits, target, backend)
    new_loss, new_grad = fused(logits[:, order], np.argsort(order)[target], backend)
    rtol = tolerance(logits.dtype)
    assert np.allclose(new_loss, loss, rtol=rtol, atol=np.finfo(logits.dtype).tiny)
    scale = np.abs(grad).max(axis=1, keepdims=True)
    assert (np.abs(new_grad - grad[:, order]) <= rtol * scale).all()


@given(case=batches(), seed=st.integers(0, 2**32 - 1))
def test_rows_are_independent_of_their_neighbours(backend, case, seed):
    """Rows in another order, and so in other lanes, have the same bits."""
    logits, target = case
    order = np.random.default_rng(seed).permutation(len(logits))
    loss, grad = fused(logits, target, backend)
    new_loss, new_grad = fused(logits[order], target[order], backend)
    assert new_loss.tobytes() == loss[order].tobytes()
    assert new_grad.tobytes() == grad[order].tobytes()


@given(case=batches(), smoothing=st.sampled_from([0.0, 0.1, 1.0]))
def test_gradient_rows_sum_to_zero(backend, case, smoothing):
    logits, target = case
    _, grad = fused(logits, target, backend, label_smoothing=smoothing)
    sums = np.abs(grad.astype(np.longdouble).sum(axis=1))
    sizes = np.abs(grad).astype(np.longdouble).sum(axis=1) + smoothing
    # each entry of a row that is all subnormal may be off by its own last place
    least = 4 * logits.shape[1] * np.finfo(logits.dtype).smallest_subnormal
    assert (sums <= tolerance(logits.dtype) * sizes + least).all()


@given(case=batches(), cut=st.integers(0, 40), weighted=st.booleans())
def test_parts_merge(backend, case, cut, weighted):
    """The sum over a batch is that over its parts, and the mean their mean by weight of labels."""
    logits, target = case
    weight = np.linspace(0.5, 2, logits.shape[1]) if weighted else None
    options = {"weight": weight, "backend": backend}
    cut = min(cut, len(logits))
    parts = [(logits[:cut], target[:cut]), (logits[cut:], target[cut:])]
    whole = ll.cross_entropy(logits, target, reduction="sum", **options)
    sums = [ll.cross_entropy(*part, reduction="sum", **options) for part in parts]
    assert np.isclose(whole, sum(sums), rtol=1e-13)
    shares = [float(oracle.label_weight(labels, weight=weight)) for _, labels in parts]
    means = [ll.cross_entropy(*part, **options) for part in parts]
    total = sum(share * mean for share, mean in zip(shares, means, strict=True) if share)
    assert np.isclose(ll.cross_entropy(logits, target, **options), total / sum(shares), rtol=1e-13)


@given(case=batches(), cut=st.integers(1, 69))
def test_vocabulary_shards_merge(backend, case, cut):
    """The lse of a row is that of the lses of its parts: what distributed workers do."""
    logits, _ = case
    cut = min(cut, logits.shape[1])
    parts = [part for part in (logits[:, :cut], logits[:, cut:]) if part.shape[1]]
    lses = np.stack([ll.logsumexp(part, backend=backend) for part in parts], axis=1).astype(np.float64)
    merged = ll.logsumexp(lses, backend=backend)
    whole = ll.logsumexp(logits, backend=backend)
    scale = np.maximum(np.abs(logits).max(), np.log(logits.shape[1]) + 1)
    assert np.allclose(merged, whole, rtol=0, atol=8 * np.finfo(logits.dtype).eps * scale)


@given(case=batches(), extra=st.integers(1, 70), where=st.integers(0, 70))
def test_classes_at_minus_infinity_change_nothing(backend, case, extra, where):
    logits, target = case
    where = min(where, logits.shape[1])
    padding = np.full((len(logits), extra), -np.inf, logits.dtype)
    padded = np.concatenate([logits[:, :where], padding, logits[:, where:]], axis=1)
    labels = np.where(target < where, target, target + extra)
    loss, grad = fused(logits, target, backend)
    new_loss, new_grad = fused(padded, labels, backend)
    rtol = tolerance(logits.dtype)
    assert np.allclose(new_loss, loss, rtol=rtol, atol=np.finfo(logits.dtype).tiny)
    assert not new_grad[:, where : where + extra].any()
    kept = np.delete(new_grad, slice(where, where + extra), axis=1)
    assert (np.abs(kept - grad) <= rtol * np.abs(grad).max(axis=1, keepdims=True)).all()


@given(case=batches(), factor=st.sampled_from([0.0, 0.25, 1.0, 3.0]))
def test_losses_are_linear_in_the_weights(backend, case, factor):
    logits, target = case
    rng = np.random.default_rng(5)
    a, b = rng.uniform(0.1, 2, (2, logits.shape[1]))
    options = {"label_smoothing": 0.25}
    loss_a, grad_a = fused(logits, target, backend, weight=a, **options)
    loss_b, grad_b = fused(logits, target, backend, weight=b, **options)
    loss, grad = fused(logits, target, backend, weight=a + factor * b, **options)
    rtol = tolerance(logits.dtype)
    assert np.allclose(loss, loss_a + factor * loss_b, rtol=rtol)
    assert np.allclose(grad, grad_a + factor * grad_b, rtol=rtol, atol=rtol * 2 * (1 + factor))


@given(case=batches())
def test_probabilities_are_as_the_mixture_of_labels(backend, case):
    """A target that splits evenly between two labels costs the mean of both."""
    logits, target = case
    n_classes = logits.shape[1]
    other = (target + 1) % n_classes
    split = (np.eye(n_classes)[target] + np.eye(n_classes)[other]) / 2
    loss, grad = fused(logits, split, backend)
    (loss_a, grad_a), (loss_b, grad_b) = (fused(logits, labels, backend) for labels in (target, other))
    rtol = tolerance(logits.dtype)
    assert np.allclose(loss, (loss_a + loss_b) / 2, rtol=rtol, atol=np.finfo(logits.dtype).tiny)
    assert np.allclose(grad, (grad_a + grad_b) / 2, rtol=rtol, atol=rtol)


@given(
    x=hnp.arrays(np.float32, st.integers(1, 80), elements=st.floats(-1e4, 1e4, width=32)),
    sixteenths=st.integers(0, 16),
)
def test_binary_loss_is_that_of_two_classes(backend, x, sixteenths):
    """BCE of x is cross-entropy of the logits (0, x); and turns over with its label."""
    target = np.full(x.shape, sixteenths / 16)
    options = {"reduction": "none", "backend": backend}
    loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(x, target, **options)
    two = np.stack([np.zeros_like(x), x], axis=1)
    soft, soft_grad = ll.cross_entropy_value_and_grad(two, np.stack([1 - target, target], axis=1), **options)
    rtol = tolerance(np.float32)
    assert np.allclose(loss, soft, rtol=rtol, atol=1e-37)
    assert np.allclose(grad, soft_grad[:, 1], rtol=rtol, atol=rtol)
    turned, turned_grad = ll.binary_cross_entropy_with_logits_value_and_grad(-x, 1 - target, **options)
    assert np.allclose(turned, loss, rtol=rtol, atol=1e-37)
    assert np.allclose(-turned_grad, grad, rtol=rtol, atol=rtol)


@given(case=batches())
def test_softmax_and_its_logarithm_agree(backend, case):
    logits, _ = case
    p, log_p = ll.softmax(logits, backend=backend), ll.log_softmax(logits, backend=backend)
    rtol = tolerance(logits.dtype)
    assert np.allclose(p.sum(axis=1), 1, rtol=rtol)
    near = log_p > -80
    assert np.allclose(np.log(p[near]), log_p[near], rtol=rtol, atol=rtol)
    assert np.allclose(ll.entropy(logits, backend=backend), -(p * log_p).sum(axis=1), rtol=rtol, atol=rtol)
