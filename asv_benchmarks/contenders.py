"""How each library does the same work: what peers.py measures.

A maker takes a task and returns a function of no arguments that does it and returns (value, array), the array
being a gradient, or an activation, or None, in the library's own types. It imports its library, so that one
which is not installed says so by ImportError; work that a library cannot do, or that nobody would ask of it,
is a NotImplementedError. Each is written as a user of that library would, with all that can be prepared
outside the timed function prepared. Labels of other types are converted inside it for those who need floats.
"""

import functools
from dataclasses import replace

import numpy as np
from benchmarks import common
from works import ACTIVATIONS, BINARY


def logitloss(task, **options):
    """Arrays go to one that is there already, as a training loop would have it."""
    import logitloss as ll

    work, x = task.work, task.logits
    options = {"num_threads": task.threads, "out": task.out, **options}
    if work.loss in ACTIVATIONS:
        activation = functools.partial(getattr(ll, work.loss), x, axis=1, **options)
        return lambda: (0.0, activation())
    if work.loss == BINARY:
        name = "binary_cross_entropy_with_logits"
        options |= {"pos_weight": work.pos_weight} if work.pos_weight else {}
    else:
        name = "cross_entropy"
        options |= {"weight": task.weight, "label_smoothing": work.label_smoothing, "axis": 1}
    if work.gradient:
        return functools.partial(getattr(ll, name + "_value_and_grad"), x, task.target, **options)
    value = functools.partial(getattr(ll, name), x, task.target, **options)
    return lambda: (value(), None)


def logitloss_new(task):
    if task.out is None:
        raise NotImplementedError("there is no array")
    return logitloss(task, out=None)


def logitloss_one_thread(task):
    if task.threads == 1:
        raise NotImplementedError("the same")
    return logitloss(replace(task, threads=1))


def logitloss_avx2(task):
    if common.BACKENDS[0] != "cython-avx512":
        raise NotImplementedError("no AVX-512 to compare with")
    return logitloss(task, backend="cython-avx2")


def logitloss_numba(task):
    return logitloss(task, backend="numba")


def logitloss_figures(task):
    """Every figure of each row beside the value, as an evaluation has them from the kernel."""
    from logitloss._kernels import FIGURES

    from logitloss import _backends

    work = task.work
    if work.loss in (BINARY, *ACTIVATIONS) or work.gradient or work.weighted or work.target != "labels":
        raise NotImplementedError("rows of labels alone have figures")
    x, kernels = np.moveaxis(task.logits, 1, -1), _backends.get(None)
    figures = np.zeros((*task.target.shape, len(FIGURES)))
    arguments = (x, task.target, -100, None, None, 0.0, 1.0, None, None, None, figures, None, task.threads)

    def call():
        total, counted, _ = kernels.cross_entropy(*arguments)
        return total / counted, None

    return call


def single(array):
    """NumPy's and SciPy's functions are slow on two-byte floats, so one converts."""
    return array.astype(np.float32) if array.itemsize == 2 else array


def with_numpy(task, log_softmax=None):
    work, y = task.work, task.target
    n = task.logits.size // (1 if work.loss == BINARY else work.shape[1])

    def binary():
        x = task.logits
        small = np.exp(-np.abs(x))
        loss = np.log1p(small)
        if work.pos_weight:
            loss += np.maximum(-x, 0)
            value = (loss * (1 + (work.pos_weight - 1) * y) + (1 - y) * x).mean()
        else:
            value = (loss + np.maximum(x, 0) - x * y).mean()
        return value, (np.where(x >= 0, 1, small) / (1 + small) - y) / n if work.gradient else None

    def shifted_and_total():
        shifted = single(task.logits) - task.logits.max(axis=1, keepdims=True)
        exp = np.exp(shifted)
        return shifted, exp, exp.sum(axis=1, keepdims=True)

    def softmax():
        _, exp, total = shifted_and_total()
        exp /= total
        return 0.0, exp

    def log_p_and_p():
        if log_softmax:
            log_p = log_softmax(single(task.logits), axis=1)
            return log_p, np.exp(log_p) if work.gradient else None
        shifted, exp, total = shifted_and_total()
        shifted -= np.log(total)
        if work.gradient:
            exp /= total
        return shifted, exp

    def classes():
        log_p, p = log_p_and_p()
        if work.target == "probabilities":
            return -(y * log_p).sum(dtype=np.float64) / n, None
        at_target = np.expand_dims(y, 1)
        chosen = np.take_along_axis(log_p, at_target, axis=1)
        if work.weighted:
            w, eps = task.weight, work.label_smoothing
            smooth = eps / work.shape[1] * (log_p @ w).sum()
            return -((1 - eps) * (w[y] * chosen[:, 0]).sum() + smooth) / w[y].sum(), None
        if work.gradient:
            np.put_along_axis(p, at_target, np.take_along_axis(p, at_target, axis=1) - 1, axis=1)
            p /= n
        return -chosen.mean(dtype=np.float64), p if work.gradient else None

    if work.loss == "log_softmax":
        return lambda: (0.0, log_p_and_p()[0])
    return {BINARY: binary, "softmax": softmax}.get(work.loss, classes)


def with_scipy(task):
    from scipy import special

    work, x = task.work, task.logits
    if work.loss == "softmax":
        return lambda: (0.0, special.softmax(x, axis=1))
    if work.loss != BINARY:
        return with_numpy(task, special.log_softmax)

    def binary():
        y = task.target.astype(x.dtype, copy=False)
        log_p = special.log_expit(x)
        if work.pos_weight:
            log_p *= 1 + (work.pos_weight - 1) * y
        value = ((1 - y) * x - log_p).mean()
        return value, (special.expit(x) - y) / x.size if work.gradient else None

    return binary


def with_scikit_learn(task):
    """The compiled losses under LogisticRegression and HistGradientBoosting."""
    from sklearn._loss.loss import HalfBinomialLoss, HalfMultinomialLoss

    work, x = task.work, task.logits
    binary = work.loss == BINARY
    if work.loss in ACTIVATIONS or work.weighted or work.pos_weight:
        raise NotImplementedError("has no such function")
    if not binary and (x.ndim > 2 or x.shape[1] > 10_000 or x.itemsize == 2 or work.target != "labels"):
        raise NotImplementedError("meant for a handful of classes")
    loss = HalfBinomialLoss() if binary else HalfMultinomialLoss(n_classes=x.shape[1])
    arguments = {
        "raw_prediction": x,
        "sample_weight": np.full(len(x), 1 / len(x), x.dtype),
        "n_threads": task.threads,
    }

    def call():
        y_true = task.target.astype(x.dtype, copy=False)
        if not work.gradient:
            return loss.loss(y_true, **arguments).sum(dtype=np.float64), None
        values, grad = loss.loss_gradient(y_true, **arguments)
        return values.sum(dtype=np.float64), grad

    return call


def with_torch(task, prepare=lambda function: function):
    import torch
    from torch.nn import functional

    torch.set_num_threads(task.threads)
    work = task.work

    def tensor(array):
        if array is not None and work.dtype == "bfloat16" and array.dtype == task.logits.dtype:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return None if array is None else torch.from_numpy(array)

    x, y, weight = tensor(task.logits), tensor(task.target), tensor(task.weight)
    if work.loss in ACTIVATIONS:
        activation = prepare(functools.partial(getattr(functional, work.loss), dim=1))
        return lambda: (0.0, activation(x))
    pos_weight = torch.tensor(work.pos_weight) if work.pos_weight else None

    def binary(x, y):
        return functional.binary_cross_entropy_with_logits(x, y.to(x.dtype), pos_weight=pos_weight)

    def classes(x, y):
        return functional.cross_entropy(x, y, weight=weight, label_smoothing=work.label_smoothing)

    loss = prepare(binary if work.loss == BINARY else classes)
    leaf = x.detach().requires_grad_()

    def value():
        with torch.no_grad():
            return loss(x, y), None

    def value_and_grad():
        result = loss(leaf, y)
        (grad,) = torch.autograd.grad(result, leaf)
        return result.detach(), grad

    return value_and_grad if work.gradient else value


def with_torch_compile(task):
    import torch

    # Each task is compiled for its own shape, whatever the tasks before it were.
    torch.compiler.reset()
    return with_torch(task, lambda function: torch.compile(function, dynamic=False))


@functools.cache
def jitted(loss, target, gradient):
    """Return the function under jax.jit, which keeps what it compiled for each shape."""
    import jax
    import optax

    if loss in ACTIVATIONS:
        return jax.jit(functools.partial(getattr(jax.nn, loss), axis=1))
    if loss == BINARY:
        losses = optax.sigmoid_binary_cross_entropy
    elif target == "probabilities":
        losses = functools.partial(optax.softmax_cross_entropy, axis=1)
    else:
        losses = functools.partial(optax.softmax_cross_entropy_with_integer_labels, axis=1)

    def mean(x, y):
        return losses(x, y).mean()

    return jax.jit(jax.value_and_grad(mean) if gradient else mean)


def with_optax(task):
    """JAX takes its number of threads from the machine."""
    import jax

    work = task.work
    if work.dtype == "float64":
        raise NotImplementedError("a setting of the whole process")
    if work.weighted or work.pos_weight:
        raise NotImplementedError("has no such option")
    function = jitted(work.loss, work.target, work.gradient)
    arrays = [jax.numpy.asarray(array) for array in (task.logits, task.target) if array is not None]

    def call():
        result = jax.block_until_ready(function(*arrays))
        if work.gradient:
            return result
        return (0.0, result) if work.loss in ACTIVATIONS else (result, None)

    return call


OURS = "logitloss"
NEW, ONE_THREAD, AVX2 = f"{OURS}, new array", f"{OURS}, one thread", f"{OURS}, AVX2"
NUMBA, FIGURES = f"{OURS}, Numba", f"{OURS}, figures"
PEERS = {
    "torch.compile": with_torch_compile,
    "torch": with_torch,
    "optax": with_optax,
    "numpy": with_numpy,
    "scipy": with_scipy,
    "scikit-learn": with_scikit_learn,
}
MAKERS = {
    OURS: logitloss,
    NEW: logitloss_new,
    ONE_THREAD: logitloss_one_thread,
    AVX2: logitloss_avx2,
    NUMBA: logitloss_numba,
    FIGURES: logitloss_figures,
    **PEERS,
}
