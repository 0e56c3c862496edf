"""Where usual ways to a mean loss go wrong: their number and ours, which are README's table."""

import re
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import log_loss

from logitloss.evaluate import EvaluationState, evaluate

README = Path(__file__).parents[1] / "README.md"


def nll(logits, labels):
    return evaluate(np.asarray(logits), np.asarray(labels), backend="reference").compute().nll_nats


def clipped(dtype):
    """scikit-learn raises probabilities to the epsilon of their dtype."""
    logits = np.array([[0.0, 50.0]])
    p = softmax(logits, axis=1).astype(dtype)
    assert p[0, 0] > 0
    return log_loss([0], p, labels=[0, 1]), nll(logits, [0])


def rounded(ahead):
    """A probability that float32 cannot tell from 0 or 1 is one of these."""
    logits = np.array([[ahead, 0]], np.float32)
    with np.errstate(divide="ignore"):
        return -np.log(softmax(logits, axis=1)[0, 0]), nll(logits, [0])


def float32_state():
    """Each batch costs 73.68 nats, which in the end are added to a sum held in steps of 4 and 8."""
    batch, some, state = EvaluationState(), EvaluationState(), EvaluationState()
    batch.update(np.zeros((32, 10)), np.arange(32) % 10, backend="reference")
    for _ in range(1000):
        some.merge(batch)
    for _ in range(1000):
        state.merge(some)
    assert state.count == 32_000_000
    total = np.cumsum(np.full(1_000_000, batch.finite.total.value, np.float32))[-1]
    return total / state.count, state.compute().nll_nats


def mean_of_means():
    """A batch of one label has the weight of a batch of seven."""
    logits = np.log([[np.exp(-cost), -np.expm1(-cost)] for cost in (4, 1, 1, 1, 1, 1, 1, 1)])
    labels = np.zeros(8, int)
    return np.mean([nll(logits[:1], labels[:1]), nll(logits[1:], labels[1:])]), nll(logits, labels)


def costing(nats):
    """Return logits of two classes, of which the first costs so much."""
    return np.stack([-nats, np.log(-np.expm1(-nats))], axis=-1)


def over_padding():
    """The padding is learnt at once, and the shorter a text, the less it seems to cost."""
    n_tokens, position = np.array([[10], [90]]), np.arange(100)
    nats = np.where(position < n_tokens, 3, 0.01)
    labels = np.zeros(nats.shape, int)
    options = {"axis": -1, "mask": position < n_tokens, "backend": "reference"}
    return nats.mean(), evaluate(costing(nats), labels, **options).compute().nll_nats


def over_bos():
    """All texts begin with the same label, which nothing is to be learnt of."""
    nats = np.full((5, 21), 3.0)
    nats[:, 0] = 1e-9
    predicting = np.roll(costing(nats), -1, axis=1)  # the last logits are of no label
    options = {"axis": -1, "shift": True, "backend": "reference"}
    return nats.mean(), evaluate(predicting, np.zeros(nats.shape, int), **options).compute().nll_nats


CASES = {
    "clips float64": (lambda: clipped(np.float64), 36.04, 50),
    "clips float32": (lambda: clipped(np.float32), 15.94, 50),
    "softmax that is 0": (lambda: rounded(-200), np.inf, 200),
    "softmax that is 1": (lambda: rounded(20), 0, 2.061e-9),
    "float32 sum": (float32_state, 2.277, 2.303),
    "mean of means": (mean_of_means, 2.5, 1.375),
    "padding": (over_padding, 1.505, 3),
    "BOS": (over_bos, 2.857, 3),
}


@pytest.mark.parametrize("name", CASES)
def test_their_number_and_ours(name):
    case, theirs, ours = CASES[name]
    assert case() == pytest.approx((theirs, ours), rel=5e-4)


def test_torchmetrics_keeps_float32():
    aggregation = pytest.importorskip("torchmetrics.aggregation", reason="torchmetrics is missing")
    assert str(aggregation.MeanMetric().mean_value.dtype) == "torch.float32"


@pytest.mark.skipif(not README.exists(), reason="README is in the repository alone")
def test_readme_has_these_numbers():
    section = README.read_text(encoding="utf-8").split("\n## Offline evaluation\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (\S+) \| (\S+) \|$", section, re.MULTILINE)
    told = [tuple(map(float, row)) for row in rows if row != ("elsewhere", "here")]
    assert told == [(theirs, ours) for _, theirs, ours in CASES.values()]
