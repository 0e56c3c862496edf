"""The histogram of losses: the bins by definition, at their edges, and however the rows are cut."""

import numpy as np
import pytest
from cases import rng_for

from logitloss.evaluate import EvaluationState, evaluate
from logitloss.evaluate.counts import N_LOSSES, count_rows
from logitloss.evaluate.histogram import LEAST, MOST, LossHistogram

EDGES = np.append(LEAST * np.outer(2.0 ** np.arange(30), [1, 1.25, 1.5, 1.75]), MOST)


N_ROWS = 50_000


def counted(losses):
    histogram = LossHistogram()
    histogram.add(count_rows(np.asarray(losses, np.float64)))
    return histogram.count


@pytest.fixture
def losses():
    """Return losses of every size, many blocks of them."""
    rng = rng_for("histogram")
    return rng.exponential(size=N_ROWS) * 10.0 ** rng.integers(-8, 5, N_ROWS)


def test_counts_like_numpy(losses):
    wanted = np.histogram(losses, [0, *EDGES, np.inf])[0]
    assert N_LOSSES == wanted.size == 122
    assert wanted.min() > 0
    np.testing.assert_array_equal(counted(losses), wanted)


def test_an_edge_is_in_the_bin_above_it():
    np.testing.assert_array_equal(counted(EDGES), [0] + [1] * 121)
    np.testing.assert_array_equal(counted(np.nextafter(EDGES, 0)), [1] * 121 + [0])


def test_what_has_no_bin_is_at_the_ends():
    """Shards of a vocabulary may round a loss of 0 to one below."""
    found = counted([0.0, -0.0, -1e-16, 5e-324, np.inf, 1e300])
    assert (found[0], found[-1], found.sum()) == (4, 2, 6)


def test_cutting_does_not_show(losses):
    whole, parts = LossHistogram(), [LossHistogram() for _ in range(3)]
    whole.add(count_rows(losses))
    for number, part in enumerate(np.array_split(losses, 11)):
        parts[number % 3].add(count_rows(part))
    parts[2].merge(parts[0])
    parts[2].merge(LossHistogram.from_list(parts[1].to_list()))
    assert parts[2] == whole


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_of_an_evaluation(loss, dtype):
    """Labels that do not count are in no bin, and those of infinite loss in the last."""
    rng = rng_for("histogram of", loss)
    logits = (4 * rng.standard_normal((500, 5) if loss == "ce" else 500)).astype(dtype)
    labels = rng.integers(0, 5 if loss == "ce" else 2, 500)
    labels[::9] = -100
    if loss == "ce":
        logits[4, labels[4]] = -np.inf
    else:
        logits[4], labels[4] = -np.inf, 1
    state = evaluate(logits, labels, loss=loss, chunk_rows=77, backend="reference")
    if loss == "ce":
        shifted = logits.astype(np.float64)
        lse = np.logaddexp.reduce(shifted, axis=1)
        losses = lse - np.take_along_axis(shifted, np.maximum(labels, 0)[:, None], 1)[:, 0]
    else:
        losses = np.logaddexp(0, np.where(labels == 1, -1, 1) * logits.astype(np.float64))
    wanted = np.histogram(losses[labels >= 0], [0, *EDGES, np.inf])[0]
    bins = state.compute().nll_histogram
    assert [line["count"] for line in bins] == wanted[wanted > 0].tolist()
    assert bins[-1] == {"low": MOST, "high": np.inf, "count": 1}
    assert sum(line["count"] for line in bins) == state.count == 500 - 56
    edges = [0.0, *EDGES.tolist(), np.inf]
    for line in bins[:-1]:
        assert edges.index(line["high"]) == edges.index(line["low"]) + 1


def test_of_groups_and_of_nothing():
    state = EvaluationState()
    state.update(np.zeros((3, 4)), [0, 1, 2], groups=[7, 7, 8], backend="reference")
    assert state.groups[7].compute().nll_histogram == [{"low": 1.25, "high": 1.5, "count": 2}]
    assert EvaluationState().compute().nll_histogram == []
