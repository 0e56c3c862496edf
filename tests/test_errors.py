"""Every refusal: its type, and a message that names the argument, what came and what was expected.

The checks are in the Python layer, the same for every backend, so they run on the reference alone. What a
kernel finds in its pass (labels, probabilities out of range) is tested where those are.
"""

import re

import numpy as np
import pytest

import logitloss as ll
from logitloss.evaluate import EvaluationState, evaluate

X = np.zeros((4, 3), np.float32)
Y = np.array([0, 1, 2, 0])
HALF = np.full((4, 3), 0.5, np.float32)
ONES = np.ones((4, 3), np.float32)
FLOATS = "float16, bfloat16, float32 or float64 (native byte order)"

CE = ll.cross_entropy
GRAD = ll.cross_entropy_grad
FUSED = ll.cross_entropy_value_and_grad
BCE = ll.binary_cross_entropy_with_logits
LOGITS_FIRST = [
    (CE, Y),
    (GRAD, Y),
    (FUSED, Y),
    (ll.cross_entropy_and_lse, Y),
    (BCE, HALF),
    (ll.binary_cross_entropy_with_logits_grad, HALF),
    (ll.binary_cross_entropy_with_logits_value_and_grad, HALF),
    (ll.entropy,),
    (ll.logsumexp,),
    (ll.softmax,),
    (ll.log_softmax,),
    (ll.sigmoid,),
    (ll.log_sigmoid,),
]
NAMED_OTHERWISE = [
    ("scores", ll.logistic_loss, ONES),
    ("scores", ll.logistic_loss_grad, ONES),
    ("scores", ll.logistic_loss_value_and_grad, ONES),
    ("probabilities", ll.binary_cross_entropy, HALF),
    ("log_probabilities", ll.nll_loss, Y),
    ("log_probabilities", ll.kl_div, HALF),
]
FIRST = [("logits", *rest) for rest in LOGITS_FIRST] + NAMED_OTHERWISE
EVERY = [(function, (X, *rest)) for _, function, *rest in FIRST[:-6]] + [
    (function, (HALF, *rest)) for _, function, *rest in NAMED_OTHERWISE
]
REDUCED = [(f, args) for f, args in EVERY if "softmax" not in f.__name__ and "sigmoid" not in f.__name__]
REDUCED = [(f, args) for f, args in REDUCED if f is not ll.logsumexp]


def function_name(value):
    return value.__name__ if callable(value) else ""


def refused(error, message, function, *args, **options):
    """Assert that the call raises exactly that error with exactly that message."""
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:
        function(*args, **{"backend": "reference", **options})
    assert caught.type is error


@pytest.mark.parametrize(("name", "function", "rest"), [(n, f, r) for n, f, *r in FIRST], ids=function_name)
def test_dtype_of_the_first_argument(name, function, rest):
    refused(TypeError, f"{name} of dtype int64: expected {FLOATS}", function, np.zeros((4, 3), int), *rest)
    refused(TypeError, f"{name} of dtype complex64: expected {FLOATS}", function, X.astype("c8"), *rest)
    refused(TypeError, f"{name} of dtype object: expected {FLOATS}", function, X.astype(object), *rest)
    swapped = X.astype(X.dtype.newbyteorder())
    message = f"{name} of dtype float32 in foreign byte order: expected {FLOATS}"
    refused(TypeError, message, function, swapped, *rest)
    unaligned = np.zeros(49, np.uint8)[1:].view(np.float32).reshape(4, 3)
    message = f"{name} of dtype float32: expected elements aligned in memory, as np.array makes them"
    refused(ValueError, message, function, unaligned, *rest)


@pytest.mark.parametrize(("function", "args"), EVERY, ids=function_name)
def test_backend_and_threads(function, args):
    known = "cython, cython-avx512, cython-avx2, cython-baseline, numba, cuda, reference"
    refused(ValueError, f"backend is 'torch': expected one of {known}", function, *args, backend="torch")
    refused(ValueError, f"backend is []: expected one of {known}", function, *args, backend=[])
    for threads in (0, -1, 1025):
        message = f"num_threads is {threads}: expected 1 <= num_threads <= 1024"
        refused(ValueError, message, function, *args, num_threads=threads)
    refused(TypeError, "num_threads is 1.5: expected an integer", function, *args, num_threads=1.5)


@pytest.mark.parametrize(("function", "args"), REDUCED, ids=function_name)
def test_reduction(function, args):
    allowed = "none, mean, sum" + (", batchmean" if function is ll.kl_div else "")
    message = f"reduction is 'avg': expected one of {allowed}"
    refused(ValueError, message, function, *args, reduction="avg")


@pytest.mark.parametrize(
    ("function", "args"),
    [(f, a) for f, a in REDUCED if not f.__name__.endswith(("grad", "lse"))],
    ids=function_name,
)
def test_out_of_a_reduced_loss(function, args):
    message = "out is given with reduction='sum', whose result is a number: expected reduction='none'"
    refused(ValueError, message, function, *args, reduction="sum", out=np.zeros((4, 3)))


def folded(out):
    shape, strides = out.shape, out.strides
    return f"out has shape {shape} and strides {strides}: expected memory of its own for each element"


@pytest.mark.parametrize(
    ("function", "args"), [(f, a) for f, a in EVERY if f is not ll.cross_entropy_and_lse], ids=function_name
)
def test_out(function, args):
    options = {} if (function, args) not in REDUCED else {"reduction": "none"}
    grad = function.__name__.endswith("grad")
    shape = (4, 3) if grad else np.shape(function(*args, backend="reference", **options))
    wrong = (*shape, 2)
    message = f"out of shape {wrong}: expected the result's shape {shape}"
    refused(ValueError, message, function, *args, out=np.zeros(wrong, np.float32), **options)
    message = "out of dtype float64: expected float32"
    refused(TypeError, message, function, *args, out=np.zeros(shape), **options)
    message = "out is of type list: expected a NumPy array"
    refused(TypeError, message, function, *args, out=[0.0] * 4, **options)
    if shape:
        spread = np.lib.stride_tricks.as_strided(np.zeros(3, np.float32), shape, [0, 4][-len(shape) :])
        if 0 in spread.strides:
            refused(ValueError, folded(spread), function, *args, out=spread, **options)
    if len(shape) == 2:
        spread = np.lib.stride_tricks.as_strided(np.zeros(6, np.float32), shape, (4, 4))
        refused(ValueError, folded(spread), function, *args, out=spread, **options)
    masked = np.ma.masked_array(np.zeros(shape, np.float32), np.ones(shape, bool))
    message = "out is a masked array: expected a plain one, as its mask would be lost"
    refused(TypeError, message, function, *args, out=masked, **options)
    locked = np.zeros(shape, np.float32)
    locked.flags.writeable = False
    message = "out is read-only: expected an array that can be written"
    refused(ValueError, message, function, *args, out=locked, **options)


@pytest.mark.parametrize("function", [ll.softmax, ll.log_softmax, ll.sigmoid, ll.log_sigmoid])
def test_out_may_be_the_logits_by_another_view(function):
    """The stride of an axis of one element says nothing."""
    memory = np.arange(8, dtype=np.float32)
    expected = function(memory)
    function(memory[None], out=memory.reshape(1, -1))
    assert memory.tobytes() == expected.tobytes()


@pytest.mark.parametrize("function", [GRAD, FUSED, ll.softmax, ll.log_softmax, ll.sigmoid, ll.log_sigmoid])
def test_out_may_be_the_logits_but_not_part_of_them(function):
    message = (
        "out shares memory with part of the logits: expected memory of its own, "
        "or the logits, element for element"
    )
    args = (Y,) if function in (GRAD, FUSED) else ()
    memory = np.zeros((8, 3), np.float32)
    refused(ValueError, message, function, memory[:4], *args, out=memory[1:5])
    refused(ValueError, message, function, memory[:4], *args, out=memory[3::-1])
    square = np.zeros((3, 3), np.float32)
    refused(ValueError, message, function, square, *(a[:3] for a in args), out=square.T)
    # Interleaved, but apart: no overlap, though the bounds cross.
    result = function(memory[::2], *args, out=memory[1::2], backend="reference")
    assert not memory[::2].any()
    assert (result[-1] if function is FUSED else result) is not None


def test_out_is_no_input():
    message = "out shares memory with an input: expected memory of its own"
    target = HALF.copy()
    refused(ValueError, message, GRAD, X, target, out=target)
    refused(ValueError, message, ll.binary_cross_entropy_with_logits_grad, X, target, out=target)
    refused(ValueError, message, BCE, target, ONES, reduction="none", out=target)
    upstream = np.zeros(4, np.float32)
    row, out = np.zeros((1, 4), np.float32), upstream.reshape(1, 4)
    refused(ValueError, message, GRAD, row, [0], upstream[:1], reduction="none", out=out)


def test_masked_arrays():
    masked = np.ma.masked_array(Y, [True, False, False, True])
    message = "{} is a masked array: expected a plain one, as its mask would be lost"
    refused(TypeError, message.format("target"), CE, X, masked)
    refused(TypeError, message.format("logits"), CE, np.ma.masked_array(X, np.isfinite(X)), Y)
    refused(TypeError, message.format("target"), evaluate, X, masked)
    refused(TypeError, message.format("target"), EvaluationState().update, X, masked)
    assert CE(np.ma.masked_array(X), np.ma.masked_array(Y)) == CE(X, Y)


@pytest.mark.parametrize("function", [CE, GRAD, FUSED, ll.cross_entropy_and_lse])
def test_target_of_cross_entropy(function):
    shapes = "expected (4,) for class indices, the shape (4, 3) without its class axis 1"
    message = f"target of shape (3,): {shapes}"
    refused(ValueError, message, function, X, Y[:3])
    message = (
        "target of shape (4,) and dtype float64: expected the logits' shape (4, 3) for class probabilities, "
        "or integers of shape (4,) for class indices"
    )
    refused(ValueError, message, function, X, Y.astype(float))
    swapped = Y.astype(Y.dtype.newbyteorder())
    for target, dtype in (
        (Y > 0, "bool"),
        (HALF.astype("c16"), "complex128"),
        (list("abca"), "str32"),
        (swapped, "int64 in foreign byte order"),
    ):
        expected = f"expected integers for class indices, or {FLOATS} for class probabilities"
        refused(TypeError, f"target of dtype {dtype}: {expected}", function, X, target)


@pytest.mark.parametrize("function", [CE, GRAD, FUSED, ll.cross_entropy_and_lse])
def test_options_of_cross_entropy(function):
    message = "label_smoothing is 1.5: expected 0 <= label_smoothing <= 1"
    refused(ValueError, message, function, X, Y, label_smoothing=1.5)
    message = "label_smoothing is 'a': expected a real number"
    refused(TypeError, message, function, X, Y, label_smoothing="a")
    refused(TypeError, message.replace("'a'", "b'1'"), function, X, Y, label_smoothing=b"1")
    message = "label_smoothing is an array of shape (2,): expected a real number"
    refused(TypeError, message, function, X, Y, label_smoothing=np.zeros(2))
    message = "reduction is ['sum']: expected one of none, mean, sum"
    refused(ValueError, message, function, X, Y, reduction=["sum"])
    message = "z_loss is more than float64 holds: expected a real number"
    refused(ValueError, message, function, X, Y, z_loss=10**400)
    refused(ValueError, "z_loss is inf: expected a finite number", function, X, Y, z_loss=np.inf)
    refused(TypeError, "z_loss is [1, 2]: expected a real number", function, X, Y, z_loss=[1, 2])
    refused(TypeError, "ignore_index is 0.5: expected an integer", function, X, Y, ignore_index=0.5)
    message = f"ignore_index is {2**63}: expected {-(2**63)} <= ignore_index <= {2**63 - 1}"
    refused(ValueError, message, function, X, Y, ignore_index=2**63)
    message = "ignore_index is 1, but target holds class probabilities: expected no such label"
    refused(ValueError, message, function, X, HALF, ignore_index=1)
    message = "weight of shape (4,): expected one number per class, shape (3,)"
    refused(ValueError, message, function, X, Y, weight=np.ones(4))
    message = f"weight of dtype complex128: expected bool, integers, {FLOATS}"
    refused(TypeError, message, function, X, Y, weight=np.ones(3, complex))


@pytest.mark.parametrize(
    ("function", "name", "rest"),
    [(CE, "logits", (Y,)), (ll.nll_loss, "log_probabilities", (Y,))]
    + [(f, "logits", ()) for f in (ll.softmax, ll.log_softmax, ll.entropy, ll.logsumexp)],
    ids=function_name,
)
def test_class_axis(function, name, rest):
    message = f"axis is 2, but {name} have shape (4, 3): expected -2 <= axis < 2"
    refused(ValueError, message, function, X, *rest, axis=2)
    message = f"axis is -3, but {name} have shape (4, 3): expected -2 <= axis < 2"
    refused(ValueError, message, function, X, *rest, axis=-3)
    refused(TypeError, "axis is 0.0: expected an integer", function, X, *rest, axis=0.0)
    message = f"{name} of shape (): expected at least one axis, that of the classes"
    refused(ValueError, message, function, np.float32(1), *(0 for _ in rest))
    message = f"{name} of shape (4, 0): expected at least one class on axis 1"
    refused(ValueError, message, function, X[:, :0], *rest)


@pytest.mark.parametrize("function", [ll.softmax, ll.log_softmax, ll.entropy])
def test_an_axis_by_default_last(function):
    refused(TypeError, "axis is None: expected an integer", function, X, axis=None)


def test_axes_of_logsumexp():
    refused(ValueError, "axis is (): expected one or more different axes", ll.logsumexp, X, axis=())
    refused(ValueError, "axis is (1, -1): expected one or more different axes", ll.logsumexp, X, axis=(1, -1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient(reduction):
    rows = "()" if reduction == "mean" else "(4,)"
    message = f"grad_output of shape (3,): expected the loss's shape {rows}"
    refused(ValueError, message, GRAD, X, Y, np.ones(3), reduction=reduction)
    message = f"grad_output of dtype complex128: expected bool, integers, {FLOATS}"
    refused(TypeError, message, GRAD, X, Y, 1j, reduction=reduction)
    rows = "()" if reduction == "mean" else "(4, 3)"
    for function, target in ((ll.binary_cross_entropy_with_logits_grad, HALF), (ll.logistic_loss_grad, ONES)):
        message = f"grad_output of shape (3,): expected the loss's shape {rows}"
        refused(ValueError, message, function, X, target, np.ones(3), reduction=reduction)


def test_lse():
    message = (
        "lse of dtype float32: expected float64, as cross_entropy_and_lse returns it "
        "(a rounded lse spoils the gradient)"
    )
    refused(TypeError, message, GRAD, X, Y, lse=np.zeros(4, np.float32))
    refused(ValueError, "lse of shape (3,): expected the rows' shape (4,)", GRAD, X, Y, lse=np.zeros(3))


@pytest.mark.parametrize(("name", "function"), [("logits", BCE), ("scores", ll.logistic_loss)])
def test_elementwise_shapes(name, function):
    message = f"target of shape (4,): expected the {name}' shape (4, 3)"
    refused(ValueError, message, function, X, Y)
    message = f"target of dtype complex64: expected bool, integers, {FLOATS}"
    refused(TypeError, message, function, X, ONES.astype("c8"))
    message = "weight of shape (4,): expected one that broadcasts to (4, 3)"
    refused(ValueError, message, function, X, ONES, weight=np.ones(4))
    message = "weight of shape (1, 4, 3): expected one that broadcasts to (4, 3)"
    refused(ValueError, message, function, X, ONES, weight=np.ones((1, 4, 3)))


def test_options_of_binary_cross_entropy():
    message = "pos_weight of shape (5,): expected one that broadcasts to (4, 3)"
    refused(ValueError, message, BCE, X, HALF, pos_weight=np.ones(5))
    message = "label_smoothing is -1.0: expected 0 <= label_smoothing <= 1"
    refused(ValueError, message, BCE, X, HALF, label_smoothing=-1)
    message = "target of shape (4,): expected the probabilities' shape (4, 3)"
    refused(ValueError, message, ll.binary_cross_entropy, HALF, Y)


def test_targets_of_nll_and_kl_div():
    message = "target of dtype float32: expected integers, class indices"
    refused(TypeError, message, ll.nll_loss, X, HALF)
    message = "target of shape (4,): expected the log_probabilities' shape (4, 3)"
    refused(ValueError, message, ll.kl_div, X, Y.astype(float))
    refused(TypeError, f"target of dtype int64: expected {FLOATS}", ll.kl_div, X, X.astype(int))
    message = "log_probabilities of shape (): expected at least one axis for reduction='batchmean'"
    refused(ValueError, message, ll.kl_div, np.float32(0), np.float32(1), reduction="batchmean")


def test_number_of_threads():
    for bad, error, message in (
        (0, ValueError, "n is 0: expected 1 <= n <= 1024"),
        ("2", TypeError, "n is '2': expected an integer"),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            ll.set_num_threads(bad)


def test_wrong_calls_leave_nothing_behind(backend):
    """After a refusal the next call is right."""
    with pytest.raises(ValueError, match="target of shape"):
        CE(X, Y[:2], backend=backend)
    assert CE(X, Y, backend=backend) == pytest.approx(np.log(3))
