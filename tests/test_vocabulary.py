"""Rows whose logits come in shards along the classes."""

import numpy as np
import pytest
from cases import rng_for
from ulp import exact

from logitloss.evaluate import (
    DtypeError,
    EvaluationState,
    LabelError,
    LogitError,
    ShapeError,
    VocabularyShards,
)

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


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ([np.nan, 0], LogitError, "logits: row 1: nan or inf among them, or only -inf"),
        ([np.inf, 0], LogitError, "logits: row 1"),
        ([-np.inf, -np.inf], LogitError, "logits: row 1"),
        ([0, 0], LabelError, "target: row 2: label 2 was in none of the shards"),
    ],
)
def test_rows_that_have_no_loss(row, error, message):
    shards = VocabularyShards([0, 1, 2])
    shards.update(np.array([[1.0, 2.0], row, [0, 0]]), 0, backend="reference")
    with pytest.raises(error, match=message):
        shards.rows()


def test_errors():
    with pytest.raises(DtypeError, match="target: of type float64, expected integers"):
        VocabularyShards([0.5])
    shards = VocabularyShards([0, 1])
    for logits in (np.zeros(2), np.zeros((3, 2)), np.zeros((2, 0)), np.zeros((2, 2, 2))):
        with pytest.raises(ShapeError, match=r"logits: of shape .*, expected \(2,\) and the classes"):
            shards.update(logits, 0)
    with pytest.raises(TypeError, match="logits of dtype int64"):
        shards.update(np.zeros((2, 2), int), 0)
    with pytest.raises(ValueError, match="first_class is -1"):
        shards.update(np.zeros((2, 2)), -1)
    for other in (VocabularyShards([1, 0]), VocabularyShards([0, 1], ignore_index=0)):
        with pytest.raises(ShapeError, match="other: has another target, or ignores another label"):
            shards.merge(other)
    assert (shards.top == -1).all()
