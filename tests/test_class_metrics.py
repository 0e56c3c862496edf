"""Figures of classes: as scikit-learn, SciPy and torchmetrics have them, however the rows are cut."""

import itertools
import json

import numpy as np
import pytest
import scipy.special
import scipy.stats
from cases import rng_for
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from states import assert_same_states
from ulp import exact

from logitloss import demo
from logitloss.evaluate import EvaluationState, ShapeError, VocabularyShards, evaluate
from logitloss.evaluate.calibration import Calibration
from logitloss.evaluate.counts import N_PROBABILITIES, N_RANKS
from logitloss.evaluate.labels import CONFUSIONS, MOST_CONFUSED
from logitloss.evaluate.moments import PLAIN, Moments

IGNORED = -100
LISTS = ("top_k", "accuracy_by_rank", "calibration")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Return the demo's held-out logits and labels."""
    paths = demo.run(tmp_path_factory.mktemp("digits"), backend="reference", say=lambda line: None)
    return tuple(np.load(path) for path in paths)


def random_batch(n_rows, n_classes, dtype=np.float32, seed=0):
    """Return logits, and labels that follow them, though less surely than they say."""
    rng = rng_for("class metrics", n_rows, n_classes, seed)
    logits = (3 * rng.standard_normal((n_rows, n_classes))).astype(dtype)
    noise = rng.gumbel(size=logits.shape)
    return logits, (0.6 * logits + noise).argmax(axis=1)


@pytest.fixture(params=["digits", (30_000, 7), (10_000, 100), (400, 5000)], ids=str)
def data(request):
    return request.getfixturevalue("digits") if request.param == "digits" else random_batch(*request.param)


def found(logits, labels, **options):
    """Return the figures of one evaluation in float64."""
    return evaluate(logits, labels, dtype="f64", backend="reference", **options).compute(top_k=(1, 2, 5, 50))


def probabilities(logits):
    return scipy.special.softmax(logits.astype(np.float64), axis=1)


# ---- as others have them ----


def test_loss_and_ranks_like_scikit_learn(data):
    logits, labels = data
    classes = np.arange(logits.shape[1])
    figures = found(logits, labels)
    wanted = sklearn_metrics.log_loss(labels, probabilities(logits), labels=classes)
    assert figures.nll_nats == pytest.approx(wanted, rel=1e-12)
    told = {line["k"]: line for line in figures.classes.top_k}
    assert list(told) == [k for k in (1, 2, 5, 50) if k < classes.size]
    for k, line in told.items():
        wanted = sklearn_metrics.top_k_accuracy_score(labels, logits, k=k, labels=classes)
        assert line["accuracy"] == wanted
        # a hit is 0 or 1
        hits = (logits > np.take_along_axis(logits, labels[:, None].astype(int), 1)).sum(axis=1) < k
        assert line["accuracy_standard_error"] == pytest.approx(scipy.stats.sem(hits), rel=1e-12)
    assert told[1]["accuracy"] == figures.accuracy
    by_rank = figures.classes.accuracy_by_rank
    assert len(by_rank) == min(classes.size, N_RANKS)
    for k, line in told.items():
        assert by_rank[k - 1] == line["accuracy"]
    logits, labels = logits[:500], labels[:500]  # it takes a row at a time
    wanted = sklearn_metrics.label_ranking_average_precision_score(classes == labels[:, None], logits)
    assert found(logits, labels).classes.mean_reciprocal_rank == pytest.approx(wanted, rel=1e-12)


def test_brier_score_like_scikit_learn(data):
    logits, labels = data
    p, classes = probabilities(logits), np.arange(logits.shape[1])
    wanted = sklearn_metrics.brier_score_loss(labels, p, labels=classes, scale_by_half=False)
    figures = found(logits, labels).classes
    assert figures.brier == pytest.approx(wanted, rel=1e-12)
    rows = ((p - (classes == labels[:, None])) ** 2).sum(axis=1)
    assert figures.brier_standard_error == pytest.approx(scipy.stats.sem(rows), rel=1e-12)


def test_entropy_and_confidence_like_scipy(data):
    logits, labels = data
    p = probabilities(logits)
    figures = found(logits, labels).classes
    for name, rows in (("entropy_nats", scipy.stats.entropy(p, axis=1)), ("confidence", p.max(axis=1))):
        assert getattr(figures, name) == pytest.approx(rows.mean(), rel=1e-12)
        error = getattr(figures, f"{name}_standard_error")
        assert error == pytest.approx(scipy.stats.sem(rows), rel=1e-11)


def test_calibration_by_definition(data):
    logits, labels = data
    p = probabilities(logits)
    confidence, hit = p.max(axis=1), p.argmax(axis=1) == labels
    bins = np.ceil(confidence * N_PROBABILITIES).astype(int) - 1
    wanted = [
        (i, np.count_nonzero(bins == i), confidence[bins == i].mean(), hit[bins == i].mean())
        for i in np.unique(bins)
    ]
    figures = found(logits, labels).classes
    told = [
        (b["low"] * N_PROBABILITIES, b["count"], b["probability"], b["outcome"]) for b in figures.calibration
    ]
    np.testing.assert_allclose(told, wanted, rtol=1e-12)
    gaps = np.array([abs(mean - share) for _, _, mean, share in wanted])
    counts = np.array([count for _, count, _, _ in wanted])
    assert figures.expected_calibration_error == pytest.approx((gaps * counts).sum() / len(hit), abs=1e-14)
    assert figures.maximum_calibration_error == pytest.approx(gaps.max(), abs=1e-14)


def test_like_torchmetrics(data):
    """Theirs are float32."""
    torch = pytest.importorskip("torch", reason="torchmetrics needs torch")
    theirs = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is missing")
    logits, labels = torch.from_numpy(data[0]), torch.from_numpy(data[1].astype(np.int64))
    n_classes = logits.shape[1]
    figures = found(*data)
    for k in (1, 2, 5):
        wanted = theirs.multiclass_accuracy(logits, labels, n_classes, average="micro", top_k=k)
        line = next(line for line in figures.classes.top_k if line["k"] == k)
        assert line["accuracy"] == pytest.approx(wanted.item(), rel=1e-6)
    p = torch.softmax(logits, dim=1)
    for norm, name in (("l1", "expected_calibration_error"), ("max", "maximum_calibration_error")):
        wanted = theirs.multiclass_calibration_error(p, labels, n_classes, n_bins=N_PROBABILITIES, norm=norm)
        assert getattr(figures.classes, name) == pytest.approx(wanted.item(), abs=1e-5)


def test_figures_of_every_backend_and_dtype(backend, dtype):
    """Rows of ignored labels and of infinite loss among them."""
    logits, labels = random_batch(260, 12, dtype)
    labels[::7] = IGNORED
    logits[3, labels[3]] = -np.inf
    state = evaluate(logits, labels, chunk_rows=131, backend=backend)
    figures = state.compute().classes
    live = labels != IGNORED
    x, y = exact(logits)[live], labels[live]
    p = np.exp(x - x.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    order = np.argsort(-x, axis=1, kind="stable")
    rank = 1 + (order == y[:, None]).argmax(axis=1)
    assert state.classes.ranks[:13].tolist() == np.bincount(rank, minlength=13).tolist()
    rel = 1e-13 if dtype == np.float64 else 1e-6
    assert figures.brier == pytest.approx(
        float(((p - (np.arange(12) == y[:, None])) ** 2).sum(1).mean()), rel=rel
    )
    assert figures.confidence == pytest.approx(float(p.max(axis=1).mean()), rel=rel)
    logs = np.log(np.where(p > 0, p, 1))
    assert figures.entropy_nats == pytest.approx(float(-(p * logs).sum(axis=1).mean()), rel=rel)
    assert figures.mean_reciprocal_rank == pytest.approx((1 / rank).mean(), rel=1e-14)


# ---- near 0, and where little is known ----


@pytest.mark.parametrize(("dtype", "rel"), [(np.float32, 1e-6), (np.float64, 1e-13)])
@pytest.mark.parametrize("ahead", [1, 10, 40, 80])
def test_a_brier_score_near_0_keeps_its_precision(backend, dtype, rel, ahead):
    logits = np.array([[ahead, 0, 0, 0]], dtype)
    others = exact(3 * np.exp(-exact(ahead)))
    wanted = float((others / (1 + others)) ** 2 * (1 + exact(1) / 3))
    figures = evaluate(logits, np.array([0]), backend=backend).compute().classes
    # float32 keeps none below 1e-38
    assert figures.brier == pytest.approx(wanted, rel=rel, abs=1e-38 if dtype == np.float32 else 0)


def test_a_sure_miss_costs_2():
    logits = np.array([[0.0, 1000.0], [0.0, -np.inf]])
    figures = evaluate(logits, np.array([0, 1]), backend="reference").compute()
    assert (figures.infinite, figures.classes.brier) == (1, 2.0)
    assert (figures.classes.confidence, figures.classes.expected_calibration_error) == (1.0, 1.0)
    assert (figures.classes.entropy_nats, figures.classes.mean_reciprocal_rank) == (0.0, 0.5)


def test_ranks_beyond_those_that_are_counted():
    logits = np.zeros((3, 500))
    labels = np.array([0, N_RANKS - 1, N_RANKS])
    state = evaluate(logits, labels, backend="reference")
    line = state.compute(top_k=[N_RANKS]).classes.top_k[0]
    assert (line["k"], line["accuracy"]) == (100, 2 / 3)
    assert state.compute().classes.mean_reciprocal_rank == pytest.approx((1 + 1 / 100 + 1 / 101) / 3)
    for k in (0, N_RANKS + 1):
        with pytest.raises(ValueError, match=f"top_k is {k}: expected 1 <= top_k <= 100"):
            state.compute(top_k=[k])


def test_top_k_as_far_as_there_are_classes():
    for n_classes, told in ((1, []), (2, [1]), (5, [1]), (6, [1, 5]), (11, [1, 5, 10])):
        state = evaluate(np.zeros((2, n_classes)), np.zeros(2, int), backend="reference")
        assert [line["k"] for line in state.compute().classes.top_k] == told


def test_numbers_that_are_asked_for():
    state = evaluate(np.zeros((2, 5)), np.zeros(2, int), backend="reference")
    metrics = state.compute(top_k=iter((2, np.int64(1), 2)), n_bytes=np.int32(7))
    assert [line["k"] for line in metrics.classes.top_k] == [2, 1]
    assert type(metrics.n_bytes) is int
    json.dumps(metrics.to_dict())
    for top_k, message in ((3, "3: expected numbers"), ((1.5,), "1.5: expected an integer")):
        with pytest.raises(TypeError, match=f"top_k is {message}"):
            state.compute(top_k=top_k)
    for name, number, message in (("n_bytes", np.nan, "an integer"), ("n_words", 1.5, "an integer")):
        with pytest.raises(TypeError, match=f"{name} is {number}: expected {message}"):
            state.compute(**{name: number})
    with pytest.raises(ValueError, match="n_words is 0: expected 1 <= n_words"):
        state.compute(n_words=0)


@pytest.mark.parametrize("shape", [(0,), (3, 1)])
def test_classes_of_no_rows_are_told(shape):
    """As of batches: shifted, a sequence of one label has none."""
    logits, target = np.zeros((*shape, 12)), np.zeros(shape, int)
    shifts = len(shape) > 1
    options = {"per_class": True, "axis": -1, "backend": "reference"}
    states = [evaluate(logits, target, shift=shifts, **options)]
    states.append(evaluate([(logits, target)], shift=shifts, **options))
    for state in states:
        metrics = state.compute()
        assert [line["k"] for line in metrics.classes.top_k] == [1, 5, 10]
        assert [line["class"] for line in metrics.per_class] == list(range(12))
        assert (metrics.count, metrics.shifted) == (0, target.size)
    if not shifts:
        updated = EvaluationState(per_class=True)
        updated.update(logits, target, axis=-1, backend="reference")
        assert updated == states[0]


def test_nothing_counted():
    figures = evaluate(np.zeros((2, 3)), np.full(2, IGNORED), backend="reference").compute().classes
    assert figures.calibration == figures.accuracy_by_rank == []
    assert [line["k"] for line in figures.top_k] == [1]
    numbers = [getattr(figures, name) for name in figures.__slots__ if name not in LISTS]
    assert np.isnan([*numbers, figures.top_k[0]["accuracy"]]).all()


def test_rows_without_figures_leave_none():
    """Not those of the other rows, which would pass for all."""
    state = EvaluationState()
    state.update(np.zeros((2, 3)), [0, 1], backend="reference")
    assert state.compute().classes.confidence == pytest.approx(1 / 3)
    shards = VocabularyShards([2])
    shards.update(np.zeros((1, 3)), 0, backend="reference")
    state.add(shards.rows())
    assert state.compute().classes is None
    assert "brier" not in state.compute().to_dict()
    with pytest.raises(ShapeError, match="per_class: needs rows with figures"):
        EvaluationState(per_class=True).add(shards.rows())


# ---- each class ----


def test_figures_of_each_class(data):
    logits, labels = data
    lines = found(logits, labels, per_class=True, chunk_rows=5000).per_class
    predicted = logits.argmax(axis=1)
    losses = -np.log(np.take_along_axis(probabilities(logits), labels[:, None].astype(int), 1)[:, 0])
    assert [line["class"] for line in lines] == list(range(logits.shape[1]))
    assert [line["predicted"] for line in lines] == np.bincount(predicted, minlength=len(lines)).tolist()
    recall = sklearn_metrics.recall_score(
        labels, predicted, labels=np.arange(len(lines)), average=None, zero_division=np.nan
    )
    np.testing.assert_array_equal([line["accuracy"] for line in lines], recall)
    for number, line in enumerate(lines):
        mine = losses[labels == number]
        assert line["count"] == mine.size
        assert line["nll_nats"] == pytest.approx(mine.mean() if mine.size else np.nan, rel=1e-11, nan_ok=True)


def test_confusions_like_scikit_learn(data):
    logits, labels = data
    n_classes = logits.shape[1]
    state = evaluate(logits, labels, per_class=True, chunk_rows=5000, backend="reference")
    found = state.compute().confusions
    if n_classes > MOST_CONFUSED:
        assert found is None
        assert "confusions" not in state.compute().to_dict()
        return
    wanted = sklearn_metrics.confusion_matrix(labels, logits.argmax(axis=1), labels=np.arange(n_classes))
    np.fill_diagonal(wanted, 0)
    np.testing.assert_array_equal(state.labels.confusions, wanted)
    counts = [pair["count"] for pair in found]
    assert counts == sorted(wanted[wanted > 0].tolist(), reverse=True)[:CONFUSIONS]
    assert counts == [wanted[pair["label"], pair["predicted"]] for pair in found]


def test_confusions_of_the_most_classes_and_of_one_more():
    for n_classes, wanted in (
        (MOST_CONFUSED, [{"label": MOST_CONFUSED - 1, "predicted": 0, "count": 2}]),
        (MOST_CONFUSED + 1, None),
    ):
        labels = np.full(2, n_classes - 1)
        state = evaluate(np.zeros((2, n_classes)), labels, per_class=True, backend="reference")
        assert state.compute().confusions == wanted
        few = state.empty()
        few.update(np.zeros((1, 2)), [1], backend="reference")
        few.merge(state)
        expected = None if wanted is None else [*wanted, {"label": 1, "predicted": 0, "count": 1}]
        assert few.compute().confusions == expected


def test_a_class_of_infinite_loss():
    logits, labels = np.array([[0.0, -np.inf], [0.0, 0.0], [0.0, 0.0]]), np.array([1, 1, 0])
    state = evaluate(logits, labels, per_class=True, chunk_rows=1, backend="reference")
    assert [line["nll_nats"] for line in state.compute().per_class] == [np.log(2), np.inf]
    saved = json.dumps(state.to_dict(), allow_nan=False)
    again = EvaluationState.from_dict(json.loads(saved))
    assert again == state
    again.merge(state)
    assert [line["nll_nats"] for line in again.compute().per_class] == [np.log(2), np.inf]


def test_states_of_more_and_fewer_classes_merge():
    few, many = EvaluationState(per_class=True), EvaluationState(per_class=True)
    few.update(np.zeros((1, 2)), [1], backend="reference")
    many.update(np.zeros((1, 4)), [3], backend="reference")
    one, other = few.empty(), few.empty()
    for state in (few, many):
        one.merge(state)
    for state in (many, few):
        other.merge(state)
    assert_same_states(one, other)
    assert [line["count"] for line in one.compute().per_class] == [0, 1, 0, 1]


def test_figures_of_each_class_go_with_their_like():
    with pytest.raises(ShapeError, match="per_class: is for classes, not for loss 'bce'"):
        EvaluationState("bce", per_class=True)
    with pytest.raises(ValueError, match="one of the states has figures of each class, the other has not"):
        EvaluationState().merge(EvaluationState(per_class=True))


# ---- however the rows are cut ----


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 300), max_size=6), st.randoms(use_true_random=False), st.sampled_from([3, 130])
)
def test_any_cutting_order_and_sharing_gives_the_same(cuts, random, n_classes):
    logits, labels = random_batch(300, n_classes, np.float64)
    labels[::9] = IGNORED
    logits[[4, 200], labels[[4, 200]]] = -np.inf
    groups = np.arange(300) % 3
    order = np.array(random.sample(range(300), 300))
    whole = EvaluationState(per_class=True)
    whole.update(logits, labels, groups=groups, backend="reference")
    states = [whole.empty() for _ in range(3)]
    for start, stop in itertools.pairwise([0, *sorted(cuts), 300]):
        rows = order[start:stop]
        random.choice(states).update(logits[rows], labels[rows], groups=groups[rows], backend="reference")
    random.shuffle(states)
    states[0] = EvaluationState.from_dict(json.loads(json.dumps(states[0].to_dict(), allow_nan=False)))
    states[1].merge(states[2])
    states[0].merge(states[1])
    assert_same_states(states[0], whole)


@pytest.mark.parametrize("chunk_rows", [1000, PLAIN + 1, None])
def test_blocks_do_not_show(chunk_rows):
    logits, labels = random_batch(3 * PLAIN + 5, 4)
    options = {"per_class": True, "backend": "reference"}
    whole = evaluate(logits, labels, chunk_rows=7001, **options)
    assert_same_states(evaluate(logits, labels, chunk_rows=chunk_rows, **options), whole)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("classes", {"ranks": [0] * (N_RANKS + 3)}, "of more than 100 ranks"),
        ("classes", {"ranks": [0, -1]}, "-1 is no count"),
        ("classes", {"ranks": [0, 1.9]}, "1.9 is no count"),
        ("classes", {"ranks": [0, "1"]}, "'1' is no count"),
        ("classes", {"ranks": [0, True]}, "True is no count"),
        ("classes", {"ranks": []}, "counts of 1 rows do not add up"),
        ("classes", {"brier": Moments(2).to_dict()}, "counts of 1 rows do not add up"),
        ("classes", {"confidence": Moments().to_dict()}, "counts of 1 rows do not add up"),
        ("classes", {"calibration": Calibration().to_dict()}, "counts of 1 rows do not add up"),
        ("classes", {"n_classes": -1}, "-1 is no count"),
        ("labels", {"correct": [1]}, "not as many"),
        ("labels", {name: [-1, 0] for name in ("count", "correct", "predicted")}, "-1 is no count"),
        ("labels", {"predicted": [1, 1]}, "counts of 1 rows do not add up"),
        ("labels", {"confusions": [[], []]}, "counts of 1 rows do not add up"),
        ("labels", {"confusions": [[2], []]}, "not as many"),
        ("labels", {"confusions": [[2], [-1]]}, "-1 is no count"),
        ("labels", {"confusions": [[4], [1]]}, "classes that there are not"),
    ],
)
def test_what_is_no_state_is_refused(part, change, message):
    state = EvaluationState(per_class=True)
    state.update(np.zeros((1, 2)), [1], backend="reference")
    saved = state.to_dict()
    saved[part] |= change
    with pytest.raises(ValueError, match=message):
        EvaluationState.from_dict(saved)
