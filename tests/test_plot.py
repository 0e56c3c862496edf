"""Plots: what matplotlib's artists hold, against the metrics they were drawn from."""

import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from cases import rng_for

from logitloss.evaluate import EvaluationState, VocabularyShards, evaluate
from logitloss.evaluate.plot import accuracy_by_rank, nll_histogram, reliability_diagram

mpl.use("Agg")
PLOTS = (reliability_diagram, nll_histogram, accuracy_by_rank)


@pytest.fixture
def pyplot():
    """Return pyplot, of which no figure is left open."""
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


@pytest.fixture(params=["ce", "bce"])
def metrics(request):
    rng = rng_for("plots", request.param)
    if request.param == "bce":
        logits = 3 * rng.standard_normal(900)
        return evaluate(logits, (logits + 3 * rng.standard_normal(900) > 0) + 0, loss="bce").compute()
    logits = 2 * rng.standard_normal((900, 6))
    logits[0, 2] = 60
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    labels[::8] = -100
    return evaluate(logits, labels, backend="reference").compute()


def test_reliability(metrics, pyplot):
    bins = (metrics.classes or metrics.binary).calibration
    ax = reliability_diagram(metrics)
    ideal, curve = ax.lines
    np.testing.assert_array_equal(ideal.get_xydata(), [[0, 0], [1, 1]])
    points = [[line["probability"], line["outcome"]] for line in bins]
    np.testing.assert_array_equal(curve.get_xydata(), points)
    (dots,) = ax.collections
    np.testing.assert_array_equal(dots.get_offsets(), points)
    shares = (dots.get_sizes() - 15) / 300
    np.testing.assert_allclose(shares, [line["count"] / metrics.count for line in bins], rtol=1e-12)
    assert ax.get_xlabel() == ("confidence" if metrics.classes else "predicted probability")


def test_histogram(metrics, pyplot):
    ax = nll_histogram(metrics)
    assert ax.get_xscale() == "log"
    bars, bins = ax.patches, metrics.nll_histogram
    start = np.array([bar.get_x() for bar in bars])
    end = start + [bar.get_width() for bar in bars]
    low, high = (np.array([line[key] for line in bins]) for key in ("low", "high"))
    np.testing.assert_allclose(start, np.where(low > 0, low, high / 2), rtol=1e-12)
    np.testing.assert_allclose(end, high, rtol=1e-12)
    area = np.log2(end / start) * [bar.get_height() for bar in bars]
    np.testing.assert_allclose(area, [line["count"] / metrics.count for line in bins], rtol=1e-9)
    assert area.sum() == pytest.approx(1)
    (mean,) = ax.lines
    assert list(mean.get_xdata()) == [metrics.nll_nats] * 2


def test_accuracy_by_rank(metrics, pyplot):
    if metrics.classes is None:
        with pytest.raises(ValueError, match="metrics have no ranks"):
            accuracy_by_rank(metrics)
        return
    (curve,) = accuracy_by_rank(metrics).lines
    assert curve.get_xdata().tolist() == [1, 2, 3, 4, 5, 6]
    assert curve.get_ydata().tolist() == metrics.classes.accuracy_by_rank
    assert curve.get_ydata()[0] == metrics.accuracy


def test_on_axes_that_are_given(pyplot):
    metrics = evaluate(np.eye(4), np.array([0, 1, 2, 0]), backend="reference").compute()
    _, axes = pyplot.subplots(3)
    for plot, ax in zip(PLOTS, axes, strict=True):
        assert plot(metrics, ax) is ax
        assert plot(metrics, ax=ax) is ax
    assert len(pyplot.get_fignums()) == 1


def test_nothing_counted_and_nothing_known(pyplot):
    nothing = EvaluationState().compute()
    assert not nll_histogram(nothing).patches
    assert accuracy_by_rank(nothing).lines[0].get_ydata().size == 0
    assert len(reliability_diagram(nothing).lines) == 2
    shards = VocabularyShards([1])
    shards.update(np.zeros((1, 3)), 0, backend="reference")
    state = EvaluationState()
    state.add(shards.rows())
    with pytest.raises(ValueError, match="metrics have no calibration"):
        reliability_diagram(state.compute())
    with pytest.raises(ValueError, match="metrics have no ranks"):
        accuracy_by_rank(state.compute())
    assert len(nll_histogram(state.compute()).patches) == 1


def test_without_matplotlib_the_command_is_named():
    code = (
        "import sys\n"
        "from logitloss.evaluate import EvaluationState\n"
        "from logitloss.evaluate.plot import nll_histogram\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "try:\n"
        "    nll_histogram(EvaluationState().compute())\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith("pip install 'logitloss[plot]'\n")
    assert done.stdout.startswith("drawing needs matplotlib")
