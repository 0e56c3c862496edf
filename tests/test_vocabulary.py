"""Rows whose logits come in shards along the classes."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from cases import rng_for
from states import assert_same_figures
from ulp import Exact, assert_exact, exact, result_dtype

from logitloss.evaluate import (
    DtypeError,
    EvaluationState,
    LabelError,
    LogitError,
    ShapeError,
    VocabularyShards,
    target_logits,
)
from logitloss.evaluate.rows import rows_of

ROWS, N_CLASSES, IGNORED = (6, 20), 100, -100


def arrays(dtype):
    rng = rng_for("vocabulary", dtype.name)
    logits = (4 * rng.standard_normal((*ROWS, N_CLASSES))).astype(dtype)
    logits[0] = np.round(logits[0])  # equals of the largest
    logits[1, :, :60] = -np.inf
    logits[2, :10] += dtype.type(500)
    target = rng.integers(60, N_CLASSES, ROWS)
    target[0] = logits[0].argmax(axis=-1)
    target[0, ::2] = N_CLASSES - 1 - logits[0, ::2, ::-1].argmax(axis=-1)
    target[3:, ::3] = IGNORED
    logits[3, 0] = np.nan  # ignored
    logits[4, 1, target[4, 1]] = -np.inf
    return logits, target


def assert_same(found, wanted):
    for counts in ("count", "correct", "ignored", "infinite"):
        assert getattr(found, counts) == getattr(wanted, counts)
    assert found.finite.total.value == pytest.approx(wanted.finite.total.value, rel=3e-7)
    assert found.finite.deviations.value == pytest.approx(wanted.finite.deviations.value, rel=3e-7)


@pytest.mark.parametrize("trial", range(5))
def test_any_shards_in_any_order_come_to_the_same(backend, dtype, trial):
    rng = np.random.default_rng()
    logits, target = arrays(dtype)
    wanted = EvaluationState()
    wanted.update(logits, target, axis=-1, backend="reference")
    cuts = [0, *np.sort(rng.choice(np.arange(1, N_CLASSES), 4, replace=False)), N_CLASSES]
    shards = [VocabularyShards(target) for _ in range(3)]
    for number in rng.permutation(5):
        first, end = int(cuts[number]), int(cuts[number + 1])
        shards[rng.integers(3)].update(logits[..., first:end], first, backend=backend)
    rng.shuffle(shards)
    shards[1].merge(shards[2])
    shards[0].merge(shards[1])
    found = EvaluationState()
    found.add(shards[0].rows())
    assert_same(found, wanted)
    live = target != IGNORED
    x = exact(logits)[live]
    m = x.max(axis=-1)
    lse = m + np.log(np.exp(x - m[:, None]).sum(axis=-1))
    np.testing.assert_allclose(shards[0].lse()[live], lse.astype(float), rtol=1e-6)


def test_one_row():
    shards = VocabularyShards(2)
    shards.update(np.log([1.0, 1.0]), 0, backend="reference")
    shards.update(np.log([2.0]), 2, backend="reference")
    rows = shards.rows()
    assert rows.loss.tolist() == [pytest.approx(np.log(2))]
    assert rows.hit.tolist() == [True]


def shared_out(logits, target, cuts, rng, **options):
    """Return what shards between the cuts come to, in both rounds, in any order and nesting."""
    parts = [(logits[..., first:end], first) for first, end in itertools.pairwise(cuts)]
    found = np.full(target.shape, np.nan)
    for part, first in parts:
        found = np.fmax(found, target_logits(part, target, first))
    shards = [VocabularyShards(target, found) for _ in range(3)]
    for number in rng.permutation(len(parts)):
        shards[rng.integers(3)].update(*parts[number], **options)
    rng.shuffle(shards)
    shards[1].merge(shards[2])
    shards[0].merge(shards[1])
    return shards[0].rows()


def assert_same_rows(found, wanted, rel):
    """Compare loss and figures of rows; of counts and marks every one."""
    for name in ("hit", "counted", "label"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name))
    assert np.array_equal(found.figures[:, :2], wanted.figures[:, :2])
    np.testing.assert_allclose(found.figures[:, 2:], wanted.figures[:, 2:], rtol=rel, atol=0)
    np.testing.assert_allclose(found.loss, wanted.loss, rtol=rel, atol=0)


@pytest.mark.parametrize("trial", range(3))
def test_all_figures_are_those_of_whole_rows(backend, dtype, trial):
    rng = rng_for("figures of shards", trial)
    logits, target = arrays(dtype)
    wanted = rows_of(logits, target, "ce", -1, ignore_index=IGNORED, num_threads=None, backend=backend)
    inner = np.sort(rng.choice(np.arange(1, N_CLASSES), 4, replace=False)).tolist()
    rel = {"float64": 2e-13}.get(dtype.name, 2e-5)
    for cuts in ([0, *inner, N_CLASSES], [0, N_CLASSES], range(N_CLASSES + 1)[:: 1 if trial else 50]):
        found = shared_out(logits, target, list(cuts), rng, backend=backend)
        assert found.n_classes == N_CLASSES
        assert_same_rows(found, wanted, rel)
    state, whole = EvaluationState(per_class=True), EvaluationState(per_class=True)
    state.add(found)
    whole.add(wanted)
    assert_same_figures(state.compute().to_dict(), whole.compute().to_dict(), rel)


@pytest.mark.parametrize("ahead", [0.0, 1.0, 20.0, 60.0, 300.0])
def test_what_is_near_nothing_keeps_its_digits(ahead):
    """A loss, an entropy and squares of 1e-26 and less, with the target in another shard than the rest."""
    rng = rng_for("ahead")
    logits = rng.standard_normal((12, 40)) - 700
    logits[:, 11] = logits.max(axis=1) + ahead
    target = np.full(12, 11)
    options = {"ignore_index": -100, "num_threads": None, "backend": "reference"}
    wanted = rows_of(logits, target, "ce", -1, **options)
    for cuts in ([0, 40], [0, 11, 12, 40], [0, 5, 20, 21, 40]):
        assert_same_rows(shared_out(logits, target, cuts, rng, backend="reference"), wanted, 1e-12)


def test_equals_rank_in_their_order_over_all_shards():
    rng = rng_for("equals")
    logits = rng.integers(-1, 2, (400, 12)).astype(np.float32)
    logits[:40] = -np.inf
    logits[np.arange(40), rng.integers(0, 12, 40)] = 1  # of the others, all are equal at -inf
    target = rng.integers(0, 12, 400)
    options = {"ignore_index": -100, "num_threads": None, "backend": "reference"}
    wanted = rows_of(logits, target, "ce", -1, **options)
    for cuts in ([0, 4, 8, 12], [0, 1, 11, 12], range(13)):
        found = shared_out(logits, target, list(cuts), rng, backend="reference")
        assert np.array_equal(found.figures[:, :2], wanted.figures[:, :2])


def test_shards_of_several_types_and_a_label_that_is_ignored_and_a_class():
    rng = rng_for("types")
    logits = np.round(4 * rng.standard_normal((50, 9)))
    target = rng.integers(0, 9, 50)
    found = np.fmax.reduce([target_logits(logits[:, i : i + 3], target, i) for i in (0, 3, 6)])
    assert np.array_equal(found, logits[np.arange(50), target])
    shards = VocabularyShards(target, found, ignore_index=4)
    for first, dtype in zip((0, 3, 6), (np.float16, np.float64, np.float32), strict=True):
        shards.update(logits[:, first : first + 3].astype(dtype), first, backend="reference")
    options = {"ignore_index": 4, "num_threads": None, "backend": "reference"}
    assert_same_rows(shards.rows(), rows_of(logits, target, "ce", -1, **options), 1e-6)


@pytest.mark.parametrize(
    ("row", "label", "error", "message"),
    [
        ([np.nan, 0], 1, LogitError, "logits: row 1: a logit is nan"),
        ([np.inf, 0], 1, LogitError, "logits: row 1: a logit is inf"),
        ([-np.inf, -np.inf], 1, LogitError, "logits: row 1: every logit is -inf"),
        ([0, 0], 5, LabelError, "target: row 2: label 5 is outside 0 to 4, and is not ignore_index=-100"),
        ([0, 0], -1, LabelError, "target: row 2: label -1 is outside 0 to 4"),
    ],
)
def test_rows_that_have_no_loss(row, label, error, message):
    shards = VocabularyShards([0, 1, label])
    rest = np.full((3, 3), -np.inf)
    shards.update(np.array([[1.0, 2.0], row, [0, 0]]), 0, backend="reference")
    shards.update(rest[:, :2], 2, backend="reference")
    shards.update(rest[:, 2:], 4, backend="reference")
    with pytest.raises(error, match=message):
        shards.rows()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([], "no shard has been taken in"),
        ([(1, 4)], "class 0 was in none of the shards"),
        ([(3, 4), (0, 2)], "class 2 was in none of the shards"),
        ([(2, 4), (0, 2), (2, 4)], "class 2 was in more than one of the shards"),
        ([(0, 4), (1, 3)], "class 1 was in more than one of the shards"),
    ],
)
def test_each_class_is_in_one_shard(held, message):
    logits, target = rng_for("held").standard_normal((2, 4)), [0, 3]
    one, other = VocabularyShards(target), VocabularyShards(target)
    for number, (first, end) in enumerate(held):
        (one, other)[number % 2].update(logits[:, first:end], first, backend="reference")
    for shards, more in ((one, other), (other, one)):
        merged = VocabularyShards(target)
        merged.merge(shards)
        merged.merge(more)
        with pytest.raises(ShapeError, match=f"^logits: {message}$"):
            merged.rows()


@pytest.mark.parametrize("ahead", [0, 0.5, 20, 60])
@pytest.mark.parametrize("shift", [0, 1e4, -1e12, 1e300])
def test_shards_keep_their_precision_at_any_shift(backend, dtype, shift, ahead):
    """Of rows whose target is ahead by so much, of others, and of equals, as all are if shifted far."""
    largest = float(ml_dtypes.finfo(dtype).max) / 2
    rng = rng_for("shift", dtype.name, shift, ahead)
    logits = rng.standard_normal((6, 40))
    logits[:, [9, 30]] += [[ahead], [ahead + 1]] * 3
    logits = (logits + np.clip(shift, -largest, largest)).astype(dtype)
    target = np.array([9, 30, 30, 9, 0, 39])
    x = exact(logits)
    top = x.argmax(axis=1)[:, None]
    m = np.take_along_axis(x, top, axis=1)
    others = np.exp(x - m)
    np.put_along_axis(others, top, 0, axis=1)
    wanted = (m - np.take_along_axis(x, target[:, None], axis=1))[:, 0] + np.log1p(others.sum(axis=1))
    bound = Exact(wanted, wanted, np.maximum(-np.log(wanted), 0))
    whole = rows_of(logits, target, "ce", -1, ignore_index=IGNORED, num_threads=None, backend=backend)
    for cuts in ([0, 10, 25, 40], [0, 9, 10, 40], [0, 31, 40]):
        found = shared_out(logits, target, cuts, rng, backend=backend)
        assert_exact(found.loss, bound, dtype=result_dtype(dtype))
        assert_same_rows(found, whole, {"float64": 2e-13}.get(dtype.name, 2e-5))


def test_errors():
    with pytest.raises(DtypeError, match="target: of type float64, expected integers"):
        VocabularyShards([0.5])
    shards = VocabularyShards([0, 1])
    for logits in (np.zeros(2), np.zeros((3, 2)), np.zeros((2, 0)), np.zeros((2, 2, 2))):
        with pytest.raises(ShapeError, match=r"logits: of shape .*, expected \(2,\) and the classes"):
            shards.update(logits, 0)
    untrue = VocabularyShards(np.array([0, 2]), np.array([1.0, 5.0]))
    untrue.update(np.array([[1.0, 0.0], [0.0, 1.0]]), 0)
    with pytest.raises(ShapeError, match=r"target_logit: row 1: is 5\.0, but the shard .* has 3\.0"):
        untrue.update(np.array([[2.0], [3.0]]), 2)
    with pytest.raises(TypeError, match="logits of dtype int64"):
        shards.update(np.zeros((2, 2), int), 0)
    with pytest.raises(ValueError, match="first_class is -1"):
        shards.update(np.zeros((2, 2)), -1)
    for other in (VocabularyShards([1, 0]), VocabularyShards([0, 1], ignore_index=0)):
        with pytest.raises(ShapeError, match="other: has another target, or ignores another label"):
            shards.merge(other)
    with pytest.raises(ShapeError, match=r"target_logit: of shape \(1,\), but the target has \(2,\)"):
        VocabularyShards([0, 1], [0.5])
    with pytest.raises(ShapeError, match="other: one has the targets' logits from the start"):
        shards.merge(VocabularyShards([0, 1], [0.5, 0.5]))
    with pytest.raises(DtypeError, match="target: of type float64, expected integers"):
        target_logits(np.zeros((1, 2)), [0.5], 0)
    assert (shards.top == -1).all()
