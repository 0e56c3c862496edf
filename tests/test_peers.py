"""PyTorch as a peer, where it is installed: the same names, parameters and values, departures aside.

Torch computes in float64 here; results agree to float64's rounding, and gradients with its autograd.
"""

import numpy as np
import pytest
from cases import batch, frozen, probabilities

import logitloss as ll

torch = pytest.importorskip("torch", reason="PyTorch is not installed: there is no peer to compare with")
F = torch.nn.functional
DOUBLE = np.dtype(np.float64)
REDUCTIONS = ("none", "mean", "sum")


def agree(ours, theirs):
    theirs = theirs.detach().numpy()
    assert np.shape(ours) == theirs.shape
    assert np.allclose(ours, theirs, rtol=1e-12, atol=1e-14, equal_nan=True)


def tensor(array, **options):
    return torch.tensor(np.array(array), **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["labels", "probabilities"])
@pytest.mark.parametrize("shape", [(9,), (20, 9), (4, 9, 5), (2, 9, 3, 4)], ids=str)
def test_cross_entropy(backend, shape, kind, weighted, smoothing):
    rows = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    source, labels = batch((*rows, 9), DOUBLE)
    axis = 1 if len(shape) > 1 else 0
    logits = np.moveaxis(source, -1, axis)
    weight = np.linspace(0.5, 2, 9) if weighted else None
    if kind == "labels":
        target = np.where(np.arange(labels.size).reshape(rows) % 5 == 1, 3, labels)
        options = {"ignore_index": 3}
    else:
        target, options = np.moveaxis(probabilities((*rows, 9), DOUBLE), -1, axis), {}
    w = None if weight is None else tensor(weight)
    for reduction in REDUCTIONS:
        options |= {"label_smoothing": smoothing, "reduction": reduction}
        x = tensor(logits, requires_grad=True)
        theirs = F.cross_entropy(x, tensor(target), weight=w, **options)
        theirs.sum().backward()
        value, grad = ll.cross_entropy_value_and_grad(
            logits, target, weight=weight, backend=backend, **options
        )
        agree(value, theirs)
        agree(grad, x.grad)


@pytest.mark.parametrize(
    "case",
    [
        ([[1.0, 2.0, 3.0]], [-100], {}),
        ([[1.0, 2.0, 3.0]], [1], {"weight": [1.0, 0.0, 1.0]}),
        ([[-np.inf, 0.0, 0.0]], [1], {}),
        ([[-np.inf, 0.0, 0.0]], [0], {}),
        ([[-np.inf, 0.0, 0.0]], [1], {"label_smoothing": 0.3}),
        ([[-np.inf] * 3], [1], {}),
        ([[np.inf, 0.0, 1.0]], [0], {}),
        ([[np.inf, 0.0, 1.0]], [2], {}),
        ([[np.nan, 0.0, 1.0]], [2], {}),
        ([[1000.0, 0.0, -1000.0]], [2], {}),
        ([[37.0, 0.0, 232.8]], [1], {}),
    ],
    ids=str,
)
def test_rows_of_the_table_that_are_the_same(backend, case):
    logits, target, options = case
    weight = options.get("weight")
    weights = {} if weight is None else {"weight": torch.tensor(weight, dtype=torch.float64)}
    theirs = F.cross_entropy(
        torch.tensor(logits, dtype=torch.float64), torch.tensor(target), **{**options, **weights}
    )
    agree(ll.cross_entropy(np.array(logits), target, backend=backend, **options), theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_with_logits(backend, reduction, weighted):
    logits, target = batch((8, 5), DOUBLE)[0], probabilities((8, 5), DOUBLE)
    weights = {"weight": np.linspace(0.5, 2, 5), "pos_weight": np.linspace(3, 1, 5)} if weighted else {}
    x = tensor(logits, requires_grad=True)
    theirs = F.binary_cross_entropy_with_logits(
        x, tensor(target), reduction=reduction, **{name: tensor(w) for name, w in weights.items()}
    )
    theirs.sum().backward()
    value, grad = ll.binary_cross_entropy_with_logits_value_and_grad(
        logits, target, reduction=reduction, backend=backend, **weights
    )
    agree(value, theirs)
    agree(grad, x.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_binary_cross_entropy(backend, reduction):
    p, target = probabilities((8, 5), DOUBLE), np.linspace(0, 1, 40).reshape(8, 5)
    weight = np.linspace(0.5, 2, 5)
    options = {"reduction": reduction}
    theirs = F.binary_cross_entropy(tensor(p), tensor(target), tensor(weight).expand(8, 5), **options)
    agree(ll.binary_cross_entropy(p, target, weight=weight, backend=backend, **options), theirs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nll_loss(backend, reduction):
    log_p, target = batch((4, 5, 9), DOUBLE)
    log_p, weight = np.moveaxis(log_p, -1, 1), np.linspace(0.5, 2, 9)
    options = {"reduction": reduction, "ignore_index": 2}
    theirs = F.nll_loss(tensor(log_p), tensor(target), weight=tensor(weight), **options)
    agree(ll.nll_loss(log_p, target, weight=weight, backend=backend, **options), theirs)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
@pytest.mark.parametrize("log_target", [False, True])
def test_kl_div(backend, reduction, log_target):
    log_p = ll.log_softmax(batch((8, 5), DOUBLE)[0], backend="reference")
    target = probabilities((8, 5), DOUBLE) if not log_target else frozen(log_p[::-1].copy())
    options = {"reduction": reduction, "log_target": log_target}
    theirs = F.kl_div(tensor(log_p), tensor(target), **options)
    agree(ll.kl_div(log_p, target, backend=backend, **options), theirs)


def test_activations(backend):
    x = batch((4, 5, 9), DOUBLE, 30.0)[0]
    t = tensor(x)
    for axis in (0, 1, -1):
        options = {"axis": axis, "backend": backend}
        agree(ll.softmax(x, **options), t.softmax(axis))
        agree(ll.log_softmax(x, **options), t.log_softmax(axis))
        agree(ll.logsumexp(x, keepdims=True, **options), t.logsumexp(axis, keepdim=True))
    agree(ll.logsumexp(x, axis=(0, 2), backend=backend), t.logsumexp((0, 2)))
    agree(ll.sigmoid(x, backend=backend), t.sigmoid())
    agree(ll.log_sigmoid(x, backend=backend), F.logsigmoid(t))
    entropy = torch.distributions.Categorical(logits=t).entropy()
    agree(ll.entropy(x, backend=backend), entropy)
