"""How each library computes the same loss: what peers.py measures.

A maker takes a task and returns a function of no arguments that does it and returns (value, gradient or
None), in the library's own types. It imports its library, so that one which is not installed says so by
ImportError; work that a library cannot do, or that nobody would ask of it, is a NotImplementedError. Each is
written as a user of that library would, with all that can be prepared outside the timed function prepared.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """A mean loss to compute: with labels of classes for (N, C) logits, or 0 and 1 for (N,) logits."""

    logits: np.ndarray
    target: np.ndarray
    out: np.ndarray
    fused: bool
    threads: int

    @property
    def binary(self):
        return self.logits.ndim == 1


def logitloss_into(task):
    """The gradient goes to an array that is there already, as a training loop would have it."""
    return logitloss_new(task, {"out": task.out} if task.fused else {})


def logitloss_new(task, options=None):
    import logitloss

    if options is None and not task.fused:
        raise NotImplementedError("the same as with out=, where there is no gradient")
    name = "binary_cross_entropy_with_logits" if task.binary else "cross_entropy"
    function = getattr(logitloss, name + "_value_and_grad" if task.fused else name)
    options = {"num_threads": task.threads, **(options or {})}

    def call():
        result = function(task.logits, task.target, **options)
        return result if task.fused else (result, None)

    return call


def with_numpy(task):
    x, y, n = task.logits, task.target, len(task.logits)

    def binary():
        small = np.exp(-np.abs(x))
        value = (np.maximum(x, 0) - x * y + np.log1p(small)).mean()
        if not task.fused:
            return value, None
        return value, (np.where(x >= 0, 1, small) / (1 + small) - y) / n

    def classes():
        shifted = x - x.max(axis=1, keepdims=True)
        at_target = shifted[np.arange(n), y]
        np.exp(shifted, out=shifted)
        total = shifted.sum(axis=1)
        value = (np.log(total) - at_target).mean()
        if not task.fused:
            return value, None
        shifted /= total[:, None]
        shifted[np.arange(n), y] -= 1
        shifted /= n
        return value, shifted

    return binary if task.binary else classes


def with_scipy(task):
    from scipy import special

    x, y, n = task.logits, task.target, len(task.logits)

    def binary():
        value = -(y * special.log_expit(x) + (1 - y) * special.log_expit(-x)).mean()
        return value, (special.expit(x) - y) / n if task.fused else None

    def classes():
        log_p = special.log_softmax(x, axis=1)
        value = -log_p[np.arange(n), y].mean()
        if not task.fused:
            return value, None
        p = np.exp(log_p, out=log_p)
        p[np.arange(n), y] -= 1
        p /= n
        return value, p

    return binary if task.binary else classes


def with_scikit_learn(task):
    """The compiled losses under LogisticRegression and HistGradientBoosting."""
    from sklearn._loss.loss import HalfBinomialLoss, HalfMultinomialLoss

    if not task.binary and task.logits.shape[1] > 10_000:
        raise NotImplementedError("meant for a handful of classes")
    loss = HalfBinomialLoss() if task.binary else HalfMultinomialLoss(n_classes=task.logits.shape[1])
    n = len(task.logits)
    arguments = {
        "y_true": task.target.astype(task.logits.dtype),
        "raw_prediction": task.logits,
        "sample_weight": np.full(n, 1 / n, task.logits.dtype),
        "n_threads": task.threads,
    }

    def value():
        return loss.loss(**arguments).sum(dtype=np.float64), None

    def value_and_grad():
        values, grad = loss.loss_gradient(**arguments)
        return values.sum(dtype=np.float64), grad

    return value_and_grad if task.fused else value


def with_torch(task, prepare=lambda loss: loss):
    import torch
    from torch.nn import functional

    torch.set_num_threads(task.threads)
    x, y = torch.from_numpy(task.logits), torch.from_numpy(task.target)
    leaf = x.detach().requires_grad_()
    loss = prepare(functional.binary_cross_entropy_with_logits if task.binary else functional.cross_entropy)

    def value():
        with torch.no_grad():
            return loss(x, y), None

    def value_and_grad():
        result = loss(leaf, y)
        (grad,) = torch.autograd.grad(result, leaf)
        return result.detach(), grad

    return value_and_grad if task.fused else value


def with_torch_compile(task):
    import torch

    # Each task is compiled for its own shape, whatever the tasks before it were.
    torch.compiler.reset()
    return with_torch(task, lambda loss: torch.compile(loss, dynamic=False))


def with_optax(task):
    """Under jax.jit, which takes its number of threads from the machine."""
    import jax
    import optax

    x, y = jax.numpy.asarray(task.logits), jax.numpy.asarray(task.target)

    def mean(x, y):
        if task.binary:
            return optax.sigmoid_binary_cross_entropy(x, y).mean()
        return optax.softmax_cross_entropy_with_integer_labels(x, y).mean()

    compiled = jax.jit(jax.value_and_grad(mean) if task.fused else mean)

    def call():
        result = jax.block_until_ready(compiled(x, y))
        return result if task.fused else (result, None)

    return call


OURS = "logitloss"
MAKERS = {
    OURS: logitloss_into,
    "logitloss, new array": logitloss_new,
    "numpy": with_numpy,
    "scipy": with_scipy,
    "scikit-learn": with_scikit_learn,
    "torch": with_torch,
    "torch.compile": with_torch_compile,
    "optax": with_optax,
}
