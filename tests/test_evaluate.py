"""Evaluation of arrays: figures against formulas in float64, the same however the rows are cut."""

import itertools
import math

import numpy as np
import pytest
from cases import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from states import assert_same_states

from logitloss.evaluate import DtypeError, EvaluationState, evaluate
from logitloss.evaluate.moments import Compensated, Moments
from logitloss.evaluate.shard import blocks

IGNORED = -100
# Sums over float32 losses: each is rounded once, and the mean no better than the worst of them.
LOSS_EPSILON = {"float16": 2**-22, "bfloat16": 2**-22, "float32": 2**-22, "float64": 2**-50}


def batch(dtype=np.float32, rows=(101,), n_classes=10, seed=0):
    """Return logits with the classes last, and labels of which some are to be ignored."""
    rng = np.random.default_rng(seed)
    logits = (4 * rng.standard_normal((*rows, n_classes))).astype(dtype)
    target = rng.integers(0, n_classes, rows)
    target[rng.random(rows) < 0.1] = IGNORED
    return logits, target


def expected(logits, target):
    """Return losses and hits of the rows that count, in float64."""
    x = logits.astype(np.float64)[target != IGNORED]
    y = target[target != IGNORED]
    shifted = x - x.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_p, y[:, None], 1)[:, 0], x.argmax(-1) == y


def binary_batch(dtype=np.float32, shape=(50, 3), seed=1):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal(shape)).astype(dtype)
    target = rng.integers(0, 2, shape)
    target[rng.random(shape) < 0.1] = IGNORED
    return logits, target


def binary_expected(logits, target):
    x, y = logits.astype(np.float64)[target != IGNORED], target[target != IGNORED]
    return np.logaddexp(0, x) - x * y, (x > 0) == (y > 0.5)


def check(metrics, losses, hits, ignored, epsilon):
    n = losses.size
    assert metrics.count == n
    assert metrics.ignored == ignored
    assert metrics.infinite == 0
    assert metrics.nll_nats == pytest.approx(losses.mean(), rel=epsilon)
    assert metrics.nll_bits == pytest.approx(losses.mean() / math.log(2), rel=epsilon)
    assert metrics.nll_nats_standard_error == pytest.approx(
        losses.std(ddof=1) / math.sqrt(n), rel=4 * epsilon
    )
    assert metrics.nll_bits_standard_error == metrics.nll_nats_standard_error / math.log(2)
    assert metrics.perplexity == pytest.approx(math.exp(losses.mean()), rel=8 * epsilon)
    assert metrics.accuracy == hits.mean()
    assert metrics.accuracy_standard_error == pytest.approx(hits.std(ddof=1) / math.sqrt(n), rel=1e-12)


def same(a, b):
    """Whether two states agree as far as float64 sums can."""
    assert_same_states(a, b)
    a, b = a.compute(), b.compute()
    assert (a.count, a.ignored, a.infinite, a.accuracy) == (b.count, b.ignored, b.infinite, b.accuracy)
    assert a.nll_nats == pytest.approx(b.nll_nats, rel=1e-14)
    assert a.nll_nats_standard_error == pytest.approx(b.nll_nats_standard_error, rel=1e-12)


# ---- figures ----


def test_cross_entropy_figures(backend, dtype):
    logits, target = batch(dtype)
    state = EvaluationState()
    state.update(logits, target, backend=backend)
    ignored = np.count_nonzero(target == IGNORED)
    check(state.compute(), *expected(logits, target), ignored, LOSS_EPSILON[dtype.name])


def test_binary_figures(backend, dtype):
    logits, target = binary_batch(dtype)
    state = EvaluationState("bce")
    state.update(logits, target, backend=backend)
    ignored = np.count_nonzero(target == IGNORED)
    check(state.compute(), *binary_expected(logits, target), ignored, LOSS_EPSILON[dtype.name])


def test_soft_binary_labels():
    logits, target = np.array([-1.0, 0.0, 2.0, 2.0]), np.array([0.25, 0.5, 0.75, 0.25])
    metrics = evaluate(logits, target, loss="bce", backend="reference").compute()
    losses = np.logaddexp(0, logits) - logits * target
    assert metrics.nll_nats == pytest.approx(losses.mean(), rel=1e-15)
    assert metrics.accuracy == 0.75


@pytest.mark.parametrize("target_dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float64])
def test_binary_label_types(target_dtype, backend):
    logits = np.array([[1.5, -0.5], [-2.0, 0.25]], np.float32)
    target = np.array([[1, 0], [1, 0]]).astype(target_dtype)
    metrics = evaluate(logits, target, loss="bce", backend=backend).compute()
    losses = np.logaddexp(0, logits.astype(np.float64)) - logits * target.astype(np.float64)
    assert metrics.nll_nats == pytest.approx(losses.mean(), rel=1e-7)
    assert metrics.accuracy == 0.5


@pytest.mark.parametrize("axis", [None, 0, -1])
def test_one_label_has_no_standard_error(axis):
    metrics = evaluate(np.array([1.0, 2.0]), np.array(1), axis=axis, backend="reference").compute()
    assert metrics.nll_nats == pytest.approx(math.log1p(math.exp(-1)), rel=1e-15)
    assert math.isnan(metrics.nll_nats_standard_error)
    assert math.isnan(metrics.accuracy_standard_error)


def test_one_binary_label():
    metrics = evaluate(np.array(0.0), np.array(1), loss="bce", backend="reference").compute()
    assert (metrics.count, metrics.nll_bits) == (1, 1.0)


@pytest.mark.parametrize(
    ("target", "n_classes"), [(np.full(3, IGNORED), 4), (np.empty(0, int), 4), (np.empty(0, int), 0)]
)
def test_nothing_counted(target, n_classes):
    metrics = evaluate(np.zeros((target.size, n_classes)), target, backend="reference").compute()
    assert (metrics.count, metrics.ignored) == (0, target.size)
    for figure in (metrics.nll_nats, metrics.perplexity, metrics.accuracy, metrics.nll_bits_standard_error):
        assert math.isnan(figure)


def test_infinite_loss_is_a_result(backend):
    logits = np.array([[0.0, -np.inf], [0.0, 1.0], [-np.inf, 0.0]], np.float32)
    metrics = evaluate(logits, np.array([1, 1, 1]), chunk_rows=1, backend=backend).compute()
    assert (metrics.count, metrics.infinite) == (3, 1)
    assert metrics.nll_nats == metrics.nll_bits == metrics.perplexity == math.inf
    assert math.isnan(metrics.nll_nats_standard_error)
    assert metrics.accuracy == pytest.approx(2 / 3)


def test_infinite_binary_logits_are_limits(backend):
    logits = np.array([np.inf, -np.inf, -np.inf], np.float32)
    metrics = evaluate(logits, np.array([1, 0, 1]), loss="bce", backend=backend).compute()
    assert (metrics.count, metrics.infinite, metrics.nll_nats) == (3, 1, math.inf)


def test_perplexity_beyond_float64():
    metrics = evaluate(np.array([[0.0, 800.0]]), np.array([0]), backend="reference").compute()
    assert metrics.nll_nats == 800.0
    assert metrics.perplexity == math.inf


def test_ignored_rows_may_hold_anything(backend):
    logits, target = batch()
    logits[target == IGNORED] = np.nan
    metrics = evaluate(logits, target, backend=backend).compute()
    losses, hits = expected(logits, target)
    check(metrics, losses, hits, target.size - losses.size, 2**-22)


def test_ignored_binary_labels_may_face_nan(backend):
    logits, target = binary_batch()
    logits[target == IGNORED] = np.nan
    losses, hits = binary_expected(logits, target)
    metrics = evaluate(logits, target, loss="bce", backend=backend).compute()
    check(metrics, losses, hits, target.size - losses.size, 2**-22)


def test_ignore_index_is_free_to_choose(backend):
    logits, target = batch()
    renamed = np.where(target == IGNORED, 255, target).astype(np.uint8)
    same(
        evaluate(logits, target, backend=backend),
        evaluate(logits, renamed, ignore_index=255, backend=backend),
    )


# ---- the same however the rows are cut ----


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_chunks_and_threads_do_not_show(backend, dtype, chunk_rows, num_threads):
    logits, target = batch(dtype, rows=(1100,))
    whole = evaluate(logits, target, backend=backend)
    same(whole, evaluate(logits, target, chunk_rows=chunk_rows, num_threads=num_threads, backend=backend))


@pytest.mark.parametrize("n_classes", [1, 2, 17, 257])
def test_chunks_do_not_show_for_other_class_counts(backend, n_classes):
    logits, target = batch(rows=(100,), n_classes=n_classes)
    same(evaluate(logits, target, backend=backend), evaluate(logits, target, chunk_rows=3, backend=backend))


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
def test_binary_chunks_do_not_show(backend, chunk_rows):
    logits, target = binary_batch()
    whole = evaluate(logits, target, loss="bce", backend=backend)
    same(whole, evaluate(logits, target, loss="bce", chunk_rows=chunk_rows, backend=backend))


@given(st.lists(st.integers(0, 60), max_size=4), st.permutations(range(5)), st.booleans())
def test_states_merge_in_any_order(cuts, order, as_tree):
    logits, target = batch(np.float64, rows=(60,))
    edges = [0, *sorted(cuts), 60]
    states = []
    for start, stop in itertools.pairwise(edges):
        states.append(EvaluationState())
        states[-1].update(logits[start:stop], target[start:stop], backend="reference")
    states = [states[i] for i in order if i < len(states)]
    while len(states) > 1:
        last = states.pop()
        states[0 if as_tree else -1].merge(last)
    whole = EvaluationState()
    whole.update(logits, target, backend="reference")
    same(whole, states[0])


def test_states_of_different_losses_do_not_merge():
    with pytest.raises(ValueError, match="other holds 'bce' losses, this state holds 'ce'"):
        EvaluationState().merge(EvaluationState("bce"))


@given(st.lists(st.integers(0, 5), max_size=4).map(tuple), st.integers(1, 50))
@settings(max_examples=200)
def test_blocks_cover_a_shape_in_order(shape, n_rows):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    parts = [numbers[box].ravel() for box in blocks(shape, n_rows)]
    assert all(0 < part.size <= n_rows for part in parts)
    assert np.concatenate([*parts, np.empty(0)]).tolist() == list(range(numbers.size))


# ---- axes, strides and types ----


@pytest.mark.parametrize("chunk_rows", [1, 5, None])
def test_axes(backend, chunk_rows):
    last, target = batch(rows=(6, 4, 5), n_classes=7)
    whole = evaluate(last, target, axis=-1, backend=backend)
    losses, hits = expected(last, target)
    check(whole.compute(), losses, hits, target.size - losses.size, 2**-22)
    for axis in (0, 1, 2, None):
        logits = np.ascontiguousarray(np.moveaxis(last, -1, 1 if axis is None else axis))
        same(whole, evaluate(logits, target, axis=axis, chunk_rows=chunk_rows, backend=backend))


@pytest.mark.parametrize(
    "twist",
    [
        np.asfortranarray,
        lambda a: a.astype(a.dtype.newbyteorder(">")),
        lambda a: a[::-1][::-1],
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: np.frombuffer(b"x" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
    ],
    ids=["fortran", "big-endian", "reversed", "strided", "unaligned"],
)
def test_layouts(backend, twist):
    logits, target = batch(rows=(33,))
    twisted = twist(logits), twist(target)
    before = [array.tobytes() for array in twisted]
    for array in twisted:
        array.flags.writeable = False
    same(evaluate(logits, target, backend=backend), evaluate(*twisted, chunk_rows=10, backend=backend))
    assert [array.tobytes() for array in twisted] == before


@pytest.mark.parametrize("opaque", ["V2", "u2"])
@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_opaque_two_byte_logits(opaque, short, name):
    logits, target = batch(DTYPES[name])
    whole = evaluate(logits, target, backend="reference")
    same(whole, evaluate(logits.view(opaque), target, dtype=short, chunk_rows=9, backend="reference"))
    for dtype in (None, "f32"):
        with pytest.raises(DtypeError, match="if that is the bits of floats, say --dtype bf16 or f16"):
            evaluate(logits.view(opaque), target, dtype=dtype, backend="reference")
    swapped = logits.view("u2").astype(">u2")
    with pytest.raises(DtypeError, match="of type >u2, whose bytes are not in this machine's order"):
        evaluate(swapped, target, dtype=short, backend="reference")
    with pytest.raises(DtypeError, match="dtype: is 'float16', expected one of f8_e4m3,"):
        evaluate(logits, target, dtype="float16", backend="reference")


def test_dtype_widens(backend):
    logits, target = batch(np.float32)
    wide = evaluate(logits, target, dtype="f64", chunk_rows=9, backend=backend)
    losses, hits = expected(logits, target)
    check(wide.compute(), losses, hits, target.size - losses.size, 2**-50)


@pytest.mark.parametrize(("name", "short"), [("float64", "f32"), ("float32", "bf16"), ("float16", "bf16")])
def test_dtype_does_not_narrow(name, short):
    logits, target = batch(DTYPES[name])
    with pytest.raises(DtypeError, match=f"logits: of type {name}, and --dtype {short} would lose digits"):
        evaluate(logits, target, dtype=short, backend="reference")


def test_lists_are_arrays():
    logits, target = batch(rows=(33,))
    keys, kept = target % 3, target % 2
    whole = evaluate(logits, target, groups=keys, mask=kept, dtype="f64", backend="reference")
    lists = [array.tolist() for array in (logits, target, keys, kept)]
    same(whole, evaluate(*lists[:2], groups=lists[2], mask=lists[3], backend="reference"))
    assert evaluate(logits[0], 1, backend="reference").count == 1


# ---- sums ----


@given(st.lists(st.floats(-1e30, 1e30), max_size=50))
def test_compensated_sum(values):
    total = Compensated()
    for value in values:
        total.add(value)
    magnitude = math.fsum(map(abs, values))
    assert abs(total.value - math.fsum(values)) <= 2**-52 * abs(math.fsum(values)) + 2**-90 * magnitude


def test_compensated_sum_overflows_to_infinity():
    total = Compensated()
    for _ in range(3):
        total.add(1e308)
    assert total.value == math.inf


@given(
    st.lists(st.floats(0, 1e3), min_size=2, max_size=60),
    st.lists(st.integers(0, 60), max_size=6),
    st.sampled_from([0.0, 1e4, 1e8]),
)
def test_moments_are_those_of_the_whole(values, cuts, offset):
    values = np.array(values) + offset
    joined = Moments()
    for part in np.split(values, sorted(cuts)):
        joined.merge(Moments.of(part))
    mean = math.fsum(values) / len(values)
    spread = math.fsum((values - mean) ** 2)
    assert joined.count == len(values)
    assert joined.mean == pytest.approx(mean, rel=1e-15)
    # a mean is rounded to `blur`, and squares around it are off by that much times the deviation
    blur = 1e-15 * mean
    bound = 1e-13 * spread + len(values) * blur * (math.sqrt(spread / len(values)) + blur)
    assert abs(joined.deviations.value - spread) <= bound
