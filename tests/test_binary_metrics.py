"""Figures of binary labels beside the loss: Brier score, calibration, ROC AUC and average precision."""

import json

import numpy as np
import pytest
from cases import rng_for
from sklearn import metrics as sklearn_metrics

from logitloss.evaluate import EvaluationState, LabelError, evaluate
from logitloss.evaluate.counts import N_PROBABILITIES, count_rows
from logitloss.evaluate.ranking import LIMIT, STEP, Ranking


def arrays(n=20_000, spread=3.0):
    rng = rng_for("binary metrics", n, spread)
    logits = spread * rng.standard_normal(n)
    return logits, (rng.random(n) < 1 / (1 + np.exp(-0.7 * logits - 0.2))).astype(np.int8)


def found(logits, labels, **options):
    return evaluate(logits, labels, loss="bce", backend="reference", **options).compute().binary


def test_like_scikit_learn():
    logits, labels = arrays()
    p = 1 / (1 + np.exp(-logits))
    figures = found(logits, labels)
    assert figures.brier == pytest.approx(sklearn_metrics.brier_score_loss(labels, p), rel=1e-13)
    auc, ap = (
        sklearn_metrics.roc_auc_score(labels, logits),
        sklearn_metrics.average_precision_score(labels, logits),
    )
    assert 0 < figures.roc_auc_error_bound < 1e-3
    assert 0 < figures.average_precision_error_bound < 1e-2
    assert abs(figures.roc_auc - auc) <= figures.roc_auc_error_bound
    assert abs(figures.average_precision - ap) <= figures.average_precision_error_bound


@pytest.mark.parametrize("decimals", [0, 1])
def test_equal_logits_are_ranked_exactly(decimals):
    logits, labels = arrays()
    logits = np.round(logits, decimals)  # two of them are in one bin only if they are equal
    figures = found(logits, labels)
    assert figures.roc_auc == pytest.approx(sklearn_metrics.roc_auc_score(labels, logits), rel=1e-13)
    wanted = sklearn_metrics.average_precision_score(labels, logits)
    assert figures.average_precision == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("trial", range(30))
def test_bounds_hold_for_any_order_within_bins(trial):
    rng = np.random.default_rng()
    n = int(rng.integers(2, 60))
    base = rng.integers(-3, 4, n) * STEP
    logits = base + rng.random(n) * STEP * 0.999
    labels = rng.integers(0, 2, n)
    labels[:2] = 0, 1
    figures = found(logits, labels)
    auc, ap = (
        sklearn_metrics.roc_auc_score(labels, logits),
        sklearn_metrics.average_precision_score(labels, logits),
    )
    assert abs(figures.roc_auc - auc) <= figures.roc_auc_error_bound + 1e-15
    assert abs(figures.average_precision - ap) <= figures.average_precision_error_bound + 1e-15


def test_logits_beyond_the_bins_are_equals():
    logits = np.array([-np.inf, -LIMIT - 1.0, LIMIT, 1e30, np.inf])
    labels = np.array([False, True, False, True, True])
    ranking = Ranking()
    ranking.add(count_rows(np.zeros(5), logits=logits, target=labels))
    assert ranking.number.size == 2
    area, bound = ranking.roc_auc()
    assert area == (2 + 0.5 * (1 + 2)) / 6
    assert bound == 0.5 * (1 + 2) / 6


def test_calibration_by_definition():
    logits, labels = arrays(3000)
    p = 1 / (1 + np.exp(-logits))
    table, gaps, total = [], 0.0, len(p)
    for i in range(N_PROBABILITIES):
        rows = (p > i / N_PROBABILITIES) & (p <= (i + 1) / N_PROBABILITIES)
        table.append((rows.sum(), p[rows].mean(), labels[rows].mean()))
        gaps += rows.sum() * abs(p[rows].mean() - labels[rows].mean())
    figures = found(logits, labels)
    assert [line["count"] for line in figures.calibration] == [count for count, *_ in table]
    for line, (_, probability, outcome) in zip(figures.calibration, table, strict=True):
        assert line["probability"] == pytest.approx(probability, rel=1e-12)
        assert line["outcome"] == pytest.approx(outcome, rel=1e-12)
    assert figures.expected_calibration_error == pytest.approx(gaps / total, rel=1e-10)
    worst = max(abs(probability - outcome) for _, probability, outcome in table)
    assert figures.maximum_calibration_error == pytest.approx(worst, rel=1e-10)


def test_labels_between_0_and_1():
    logits, labels = np.array([-1.0, 2.0, 0.5]), np.array([0.25, 0.75, 0.5])
    figures = found(logits, labels)
    p = 1 / (1 + np.exp(-logits))
    assert figures.brier == pytest.approx(((p - labels) ** 2).mean(), rel=1e-14)
    assert figures.roc_auc == 1.0  # 0.75 alone is positive


@pytest.mark.parametrize("ignored", [2**53, -(2**63)])
def test_a_label_next_to_a_large_ignored_one_is_refused(ignored):
    """In float64 they are one number."""
    state = EvaluationState("bce")
    state.update(np.zeros(2), np.array([1, ignored]), ignore_index=ignored, backend="reference")
    assert (state.count, state.ignored) == (1, 1)
    with pytest.raises(LabelError, match=rf"row 1: label {ignored + 1} is outside 0 to 1"):
        state.update(np.zeros(2), np.array([1, ignored + 1]), ignore_index=ignored, backend="reference")


def test_labels_too_narrow_for_the_ignored_one():
    """Made one of theirs, the integer would be a label: inf, or a neighbour."""
    with pytest.raises(LabelError, match="row 0: label inf is outside 0 to 1"):
        evaluate(np.zeros(2), np.array([np.inf, 1], np.float16), loss="bce", ignore_index=2**62)
    labels = np.array([0, 1, 0, 1, 2**24, 1], np.float32)
    with pytest.raises(LabelError, match="row 4: label 16777216"):
        evaluate(np.zeros(6), labels, loss="bce", ignore_index=2**24 + 1, mask=np.arange(6) > 0)
    labels, mask = np.array([0, 1, 0], np.float16), np.array([0, 1, 1])
    state = evaluate(np.zeros(3), labels, loss="bce", ignore_index=-99999, mask=mask)
    assert (state.count, state.masked, state.ignored) == (2, 1, 0)


@pytest.mark.parametrize("label", [0, 1])
def test_labels_of_one_kind(label):
    figures = found(np.array([1.0, -1.0]), np.full(2, label))
    assert np.isnan(figures.roc_auc)
    if label:
        assert figures.average_precision == 1.0
    else:
        assert np.isnan(figures.average_precision)


def test_nothing():
    figures = found(np.zeros(0), np.zeros(0, int))
    assert all(np.isnan(value) for name, value in vars_of(figures).items() if name != "calibration")
    assert figures.calibration == []


def vars_of(figures):
    return {name: getattr(figures, name) for name in figures.__slots__}


@pytest.mark.parametrize("trial", range(10))
def test_any_cutting_and_order_gives_the_same(trial):
    rng = np.random.default_rng()
    logits, labels = arrays(5000)
    whole = found(logits, labels)
    states = [EvaluationState("bce") for _ in range(3)]
    for rows in np.array_split(rng.permutation(5000), 12):
        states[rng.integers(3)].update(logits[rows], labels[rows], backend="reference")
    state = EvaluationState.from_dict(json.loads(json.dumps(states[1].to_dict())))
    assert state == states[1]
    state.merge(states[2])
    state.merge(states[0])
    merged = state.compute().binary
    ranks = ("roc_auc", "roc_auc_error_bound", "average_precision", "average_precision_error_bound")
    for name in ranks:
        assert getattr(merged, name) == getattr(whole, name)
    assert merged.brier == pytest.approx(whole.brier, rel=1e-12)
    for line, other in zip(merged.calibration, whole.calibration, strict=True):
        assert line == pytest.approx(other, rel=1e-12)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("ranking", {"number": [3, 2]}, "not as many"),
        ("ranking", {"number": [3, 2], "negative": [0, 1], "positive": [1, 1]}, "out of order"),
        ("ranking", {"number": [2], "negative": [-1], "positive": [1]}, "-1 is no count"),
        ("ranking", {"number": [-1], "negative": [0], "positive": [1]}, "-1 is no count"),
        ("ranking", {"number": [1 << 16], "negative": [0], "positive": [1]}, "of more than 65536"),
        ("ranking", {"number": [2], "negative": [0], "positive": [1]}, "counts of 0 rows do not add up"),
        ("calibration", {"count": [1, 2]}, "other than 15 bins"),
        ("calibration", {"count": [-1] * N_PROBABILITIES}, "-1 is no count"),
        ("calibration", {"count": [1] * N_PROBABILITIES}, "counts of 0 rows do not add up"),
    ],
)
def test_what_is_no_state_is_refused(part, change, message):
    saved = EvaluationState("bce").to_dict()
    saved["binary"][part] |= change
    with pytest.raises(ValueError, match=message):
        EvaluationState.from_dict(saved)
