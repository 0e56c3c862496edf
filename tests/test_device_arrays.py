"""Arrays that lie on a device, through the public functions: taken there, and returned in their own kind.

Values are those of the reference on NumPy arrays: that the kernels are right is for the matrix to say. On the
simulator the device's memory is the host's, and libraries stand in that have the protocols alone.
"""

import ctypes
import gc
import re
import weakref

import numpy as np
import pytest
from cases import DTYPES
from device_arrays import LIBRARIES, DLPack, Interface, pointer, to_host

import logitloss as ll

REASON = ll.backends().get("cuda")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}")
rng = np.random.default_rng(0)
X = rng.standard_normal((4, 6)).astype(np.float32)
Y, SIGNS = np.array([0, 5, -100, 2]), np.sign(X)
T = rng.random((4, 6), np.float32)
LOG_P = np.log(T / T.sum(axis=1, keepdims=True))
CALLS = {
    "cross_entropy": (X, Y),
    "cross_entropy_and_lse": (X, Y),
    "cross_entropy_grad": (X, Y),
    "cross_entropy_value_and_grad": (X, Y),
    "nll_loss": (LOG_P, Y),
    "kl_div": (LOG_P, T),
    "entropy": (X,),
    "binary_cross_entropy_with_logits": (X, T),
    "binary_cross_entropy_with_logits_grad": (X, T),
    "binary_cross_entropy_with_logits_value_and_grad": (X, T),
    "binary_cross_entropy": (T, T),
    "logistic_loss": (X, SIGNS),
    "logistic_loss_grad": (X, SIGNS),
    "logistic_loss_value_and_grad": (X, SIGNS),
    "logsumexp": (X,),
    "softmax": (X,),
    "log_softmax": (X,),
    "sigmoid": (X,),
    "log_sigmoid": (X,),
}
SOME = ("cross_entropy_value_and_grad", "cross_entropy_and_lse", "softmax", "binary_cross_entropy")


@pytest.fixture(params=list(LIBRARIES))
def library(request, monkeypatch):
    return LIBRARIES[request.param](monkeypatch)


@pytest.fixture
def numba(monkeypatch):
    return LIBRARIES["numba"](monkeypatch)


def agree(library, results, expected, rtol=2e-6):
    """Assert that results are the library's arrays, of the dtypes, shapes and values expected."""
    if not isinstance(expected, tuple):
        results, expected = (results,), (expected,)
    for result, value in zip(results, expected, strict=True):
        assert library.owns(result)
        here = library.to_host(result)
        assert here.shape == np.shape(value)
        assert here.dtype == value.dtype or here.dtype == np.float32, "JAX has float64 only if told so"
        np.testing.assert_allclose(here.astype(float), np.asarray(value, float), rtol=rtol, atol=1e-7)


def check(library, name, *arguments, **options):
    """Compare a call on the device with one of the reference."""
    given = {key: library.to_host(value) if library.owns(value) else value for key, value in options.items()}
    expected = getattr(ll, name)(*arguments, backend="reference", **given)
    agree(library, getattr(ll, name)(*map(library.to_device, arguments), **options), expected)


@pytest.mark.parametrize("name", CALLS)
def test_every_function(numba, name):
    for reduction in ("mean", "sum", "none") if name in ("cross_entropy", "entropy", "kl_div") else ("",):
        check(numba, name, *CALLS[name], **({"reduction": reduction} if reduction else {}))


@pytest.mark.parametrize("name", SOME)
def test_every_library(library, name):
    check(library, name, *CALLS[name])


@pytest.mark.parametrize("kind", ["interface", "dlpack", "numba", "like torch"])
def test_every_dtype(monkeypatch, dtype, kind):
    if (kind, dtype.name) in (("numba", "bfloat16"), ("like torch", "float16")):
        pytest.skip("there are no such arrays")
    library = LIBRARIES[kind](monkeypatch)
    x = X.astype(dtype)
    expected = ll.cross_entropy_value_and_grad(x, Y, backend="reference", reduction="none")
    results = ll.cross_entropy_value_and_grad(*map(library.to_device, (x, Y)), reduction="none")
    assert [library.to_host(result).dtype for result in results] == [array.dtype for array in expected]
    agree(library, results, expected, rtol=2 ** -(7 if dtype.itemsize == 2 else 18))


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
@pytest.mark.parametrize("place", ["none", "host", "device", "float32"])
def test_class_weights_may_come_from_the_host(numba, place, smoothing):
    weight = np.linspace(0.5, 2, 6)
    if place == "none":
        weight = None
    elif place != "host":
        weight = numba.to_device(weight.astype(np.float32 if place == "float32" else float))
    for name in ("cross_entropy", "cross_entropy_value_and_grad"):
        check(numba, name, X, Y, weight=weight, label_smoothing=smoothing)
    check(numba, "cross_entropy_value_and_grad", X, T, weight=weight, label_smoothing=smoothing)


def test_axes(numba):
    x, y = rng.standard_normal((2, 5, 3)), np.array([[0, 4, 1], [2, 2, 3]])
    check(numba, "cross_entropy_value_and_grad", x, y)
    check(numba, "cross_entropy_value_and_grad", x, rng.integers(0, 3, (2, 5)), axis=-1)
    check(numba, "softmax", x, axis=1)
    for axis in (0, (0, 2), (0, 1, 2)):
        check(numba, "logsumexp", x.astype(np.float32), axis=axis, keepdims=True)
        check(numba, "logsumexp", x, axis=axis)


def test_strides(numba):
    wide = numba.to_device(np.repeat(X, 2, axis=1))
    agree(numba, ll.softmax(wide[:, ::2]), ll.softmax(X))
    agree(numba, ll.entropy(numba.to_device(X).T), ll.entropy(X.T))


@pytest.mark.parametrize("shape", [(0, 3), (0,)], ids=str)
def test_nothing(numba, shape):
    x = np.zeros(shape)
    check(numba, "sigmoid", x)
    check(numba, "binary_cross_entropy_with_logits_value_and_grad", x, x)
    if len(shape) == 2:
        check(numba, "cross_entropy_value_and_grad", x, np.zeros(0, int))


def test_upstream_gradients(numba):
    one, rows = np.array(0.5, np.float32), np.linspace(1, 2, 4, dtype=np.float32)
    for upstream in (0.5, numba.to_device(one)):
        number = 0.5
        x, y = numba.to_device(X), numba.to_device(Y)
        for options in ({}, {"reduction": "sum"}, {"weight": np.arange(6.0)}):
            expected = ll.cross_entropy_grad(X, Y, number, **options)
            agree(numba, ll.cross_entropy_grad(x, y, upstream, **options), expected)
        expected = ll.binary_cross_entropy_with_logits_grad(X, T, number)
        agree(numba, ll.binary_cross_entropy_with_logits_grad(x, numba.to_device(T), upstream), expected)
    expected = ll.cross_entropy_grad(X, Y, rows, reduction="none")
    wide = numba.to_device(np.repeat(rows, 2))
    for upstream in (numba.to_device(rows), numba.to_device(rows.astype(float)), wide[::2]):
        agree(numba, ll.cross_entropy_grad(x, y, upstream, reduction="none"), expected)


def test_a_known_lse(numba):
    x, y = numba.to_device(X), numba.to_device(Y)
    _, lse = ll.cross_entropy_and_lse(x, y)
    for options in ({}, {"label_smoothing": 0.25}, {"z_loss": 0.5}):
        agree(numba, ll.cross_entropy_grad(x, y, lse=lse, **options), ll.cross_entropy_grad(X, Y, **options))


def test_weights_of_elements(numba):
    for weight in (2, numba.to_device(np.linspace(1, 2, 6)), numba.to_device(np.ones((4, 1), np.int32))):
        check(numba, "binary_cross_entropy", T, T, weight=weight)
        check(
            numba, "binary_cross_entropy_with_logits_value_and_grad", X, T, weight=weight, pos_weight=weight
        )


def test_out_is_used_and_returned(library):
    if type(library).__name__ in ("LikeJAX", "Installed") and "jax" in getattr(library, "name", "jax"):
        with pytest.raises(ValueError, match="out is read-only"):
            ll.softmax(library.to_device(X), out=library.to_device(X))
        return
    x, y, out = (library.to_device(array) for array in (X, Y, np.full_like(X, np.nan)))
    assert ll.cross_entropy_grad(x, y, out=out) is out
    assert ll.softmax(x, out=x) is x
    back = library.to_host if library.array_type is not DLPack else lambda array: array.memory.to_host()
    np.testing.assert_allclose(back(out), ll.cross_entropy_grad(X, Y), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(back(x), ll.softmax(X), rtol=2e-6)


def refused(error, words, function, *arguments, **options):
    with pytest.raises(error, match=re.escape(words)) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error


def test_both_sides_are_not_mixed(numba):
    x, y, t = (numba.to_device(array) for array in (X, Y, T))
    refused(
        TypeError, "target of type ndarray lies on the host, but logits on a CUDA", ll.cross_entropy, x, Y
    )
    refused(TypeError, "target of type list lies on the host", ll.cross_entropy, x, Y.tolist())
    refused(TypeError, "lies on a CUDA device: expected an array of the host", ll.cross_entropy, X, y)
    refused(TypeError, "lies on a CUDA device", ll.cross_entropy, X, Y, weight=numba.to_device(np.ones(6)))
    refused(TypeError, "lies on a CUDA device", ll.binary_cross_entropy_with_logits, X, T, weight=t)
    refused(TypeError, "out is of type", ll.softmax, X, out=x)
    refused(TypeError, "out of type ndarray lies on the host", ll.softmax, x, out=X.copy())
    refused(TypeError, "expected an array of the device, or a number", ll.logistic_loss, x, t, weight=T)
    for backend in ("cython", "reference", "cython-avx2"):
        words = f"backend is '{backend}', but logits lie on a CUDA device: expected backend='cuda' or none"
        refused(TypeError, words, ll.softmax, x, backend=backend)
    agree(numba, ll.softmax(x, backend="cuda"), ll.softmax(X))


def test_what_a_check_refuses_on_the_host_it_refuses_there(numba):
    x, y = numba.to_device(X), numba.to_device(Y)
    refused(TypeError, "logits of dtype int64", ll.softmax, y)
    refused(TypeError, "logits of dtype complex64", ll.softmax, numba.to_device(X.astype(np.complex64)))
    refused(ValueError, "target of shape (3,): expected (4,)", ll.cross_entropy, x, numba.to_device(Y[:3]))
    refused(ValueError, "weight of shape (2,)", ll.cross_entropy, x, y, weight=numba.to_device(np.ones(2)))
    weight = numba.to_device(np.ones(5))
    refused(ValueError, "expected one that broadcasts", ll.logistic_loss, x, x, weight=weight)
    refused(
        TypeError, "lse of dtype float32", ll.cross_entropy_grad, x, y, lse=numba.to_device(X[:, 0].copy())
    )
    refused(TypeError, "out of dtype float64", ll.softmax, x, out=numba.to_device(X.astype(float)))
    refused(ValueError, "check is 'never': expected one of raise, deferred", ll.nll_loss, x, y, check="never")
    refused(ValueError, "check is 'never'", ll.cross_entropy, X, Y, check="never")


def test_out_that_shares_memory(numba):
    wide = numba.to_device(np.zeros((4, 8), np.float32))
    refused(ValueError, "shares memory with part of the logits", ll.softmax, wide[:, :6], out=wide[:, 1:7])
    loss = numba.to_device(np.zeros((4, 7), np.float32))
    ll.softmax(loss[:, :3], out=loss[:, 3:6])
    target = numba.to_device(T)
    refused(ValueError, "shares memory with an input", ll.logistic_loss_grad, wide[:, :6], target, out=target)


def test_interfaces_that_cannot_be_taken(monkeypatch):
    memory = LIBRARIES["interface"](monkeypatch).to_device(X).memory
    refused(TypeError, "logits has a mask", ll.softmax, Interface(memory, mask=object()))
    readonly = Interface(memory, data=(memory.address, True))
    refused(ValueError, "out is read-only", ll.softmax, readonly, out=readonly)
    refused(
        ValueError, "expected elements aligned", ll.softmax, Interface(memory, data=(memory.address + 1, 0))
    )

    class Tensor(Interface):
        requires_grad = True

    refused(TypeError, "requires gradient", ll.softmax, Tensor(memory))


def test_streams(monkeypatch):
    """The first array's stream is the call's; another array's is waited for."""
    from logitloss._kernels import cuda_device

    device, waited = cuda_device.get(), []
    if not cuda_device.is_simulated():
        pytest.skip("the streams are made up")
    monkeypatch.setattr(device, "synchronize", waited.append)
    memories = [LIBRARIES["interface"](monkeypatch).to_device(array).memory for array in (X, Y)]
    waited.clear()
    x, y = (Interface(memory, stream=stream) for memory, stream in zip(memories, (71, 73), strict=True))
    loss = ll.cross_entropy(x, y, check="deferred")
    assert waited == [73]
    assert loss.__cuda_array_interface__["stream"] == 71
    loss.__dlpack__(stream=71)
    assert waited == [73]
    loss.__dlpack__(stream=1)
    assert waited == [73, 71]
    loss.item()
    assert waited == [73, 71, 71]
    ll.raise_deferred()


def test_capsules_that_cannot_be_had(monkeypatch):
    result = ll.softmax(Interface(LIBRARIES["interface"](monkeypatch).to_device(X).memory))
    for options in ({"copy": True}, {"dl_device": (1, 0)}):
        with pytest.raises(BufferError, match="neither a copy nor another device"):
            result.__dlpack__(**options)


def test_class_weights_of_any_size_from_the_host(numba):
    x, y = map(numba.to_device, (X, Y))
    wanted = ll.cross_entropy_value_and_grad(X, Y, weight=np.linspace(0.5, 2, 6), label_smoothing=0.1)
    for scale in (1e-300, 1e-46, 1e39, 1e300):
        weight = scale * np.linspace(0.5, 2, 6)
        results = ll.cross_entropy_value_and_grad(x, y, weight=weight, label_smoothing=0.1)
        agree(numba, results, wanted, rtol=2**-18)
    weight = 1e-30 * np.linspace(0.5, 2, 6)
    rows = ll.cross_entropy(x, y, weight=weight, reduction="none")
    wanted = ll.cross_entropy(X, Y, weight=weight, reduction="none")
    np.testing.assert_allclose(numba.to_host(rows), wanted, rtol=2**-18)


def test_a_flag_that_cannot_be_read_is_kept(numba, monkeypatch):
    from logitloss._kernels import cuda_device

    x, bad = numba.to_device(X), numba.to_device(np.array([1, 2, 6, 3]))
    ll.cross_entropy(x, bad, check="deferred")
    with monkeypatch.context() as patch:
        patch.setattr(cuda_device.get(), "to_host", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ll.raise_deferred()
    with pytest.raises(IndexError, match="not allowed"):
        ll.raise_deferred()


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        (lambda x, y, t: ll.softmax(x), 0),
        (lambda x, y, t: ll.cross_entropy(x, t), 0),
        (lambda x, y, t: ll.binary_cross_entropy_with_logits_value_and_grad(x, t), 0),
        (lambda x, y, t: ll.entropy(x, reduction="mean"), 0),
        (lambda x, y, t: ll.cross_entropy(x, y), 1),
        (lambda x, y, t: ll.cross_entropy_value_and_grad(x, y), 1),
        (lambda x, y, t: ll.cross_entropy_value_and_grad(x, y, out=x), 1),
        (lambda x, y, t: ll.cross_entropy(x, y, check="deferred"), 0),
        (lambda x, y, t: ll.cross_entropy_value_and_grad(x, y, label_smoothing=0.5, check="deferred"), 0),
        (lambda x, y, t: ll.nll_loss(x, y, check="deferred"), 0),
    ],
)
def test_a_call_waits_for_its_labels_at_most(numba, monkeypatch, call, waits):
    from logitloss._kernels import cuda_device

    arrays = [numba.to_device(array) for array in (X, Y, T)]
    call(*arrays)
    ll.raise_deferred()
    waited = []
    monkeypatch.setattr(cuda_device.get(), "synchronize", waited.append)
    call(*arrays)
    assert len(waited) == waits
    monkeypatch.undo()
    ll.raise_deferred()


BAD_Y, BAD_SIGNS, BAD_T = np.array([1, 2, 6, -1]), np.where(X > 1, 0, SIGNS), np.where(X > 1, 1.5, T)
FIRST = tuple(int(i) for i in np.argwhere(X > 1)[0])


@pytest.mark.parametrize(
    ("function", "first", "target", "error", "value", "rest"),
    [
        (ll.cross_entropy, X, BAD_Y, IndexError, 6, "logits have 6 classes"),
        (ll.cross_entropy_value_and_grad, X, BAD_Y, IndexError, 6, "logits have 6 classes"),
        (ll.nll_loss, LOG_P, BAD_Y, IndexError, 6, "logits have 6 classes"),
        (ll.logistic_loss, X, BAD_SIGNS, ValueError, "0.0", "-1 or +1"),
        (ll.binary_cross_entropy, T, BAD_T, ValueError, 1.5, "in [0, 1]"),
    ],
)
def test_bad_labels(numba, function, first, target, error, value, rest):
    arrays = [numba.to_device(array) for array in (first, target)]
    place = ", ".join(map(str, FIRST if target.ndim == 2 else (2,)))
    with pytest.raises(error, match=re.escape(f"target[{place}] is {value}")) as caught:
        function(*arrays)
    assert rest in str(caught.value)
    function(*arrays, check="deferred")
    function(numba.to_device(T), numba.to_device(np.where(target > 0, 1, target * 0 + 1)), check="deferred")
    with pytest.raises(error, match=re.escape(f"target[{place}] is not allowed")) as caught:
        ll.raise_deferred()
    assert rest in str(caught.value)
    ll.raise_deferred()
    with pytest.raises(error):
        function(first, target, check="deferred")


def test_flags_do_not_pile_up(numba, monkeypatch):
    from logitloss import _deferred

    monkeypatch.setattr(_deferred, "MOST", 3)
    x, y = numba.to_device(X), numba.to_device(Y)
    ll.cross_entropy(x, numba.to_device(BAD_Y), check="deferred")
    for _ in range(2):
        ll.cross_entropy(x, y, check="deferred")
    with pytest.raises(IndexError, match=r"target\[2\]"):
        ll.cross_entropy(x, y, check="deferred")
    ll.raise_deferred()


def test_nothing_keeps_the_arrays(monkeypatch):
    library = LIBRARIES["interface"](monkeypatch)
    x, y = library.to_device(X), library.to_device(Y)
    seen = [weakref.ref(x), weakref.ref(y)]
    gc.disable()
    try:
        results = ll.cross_entropy_value_and_grad(x, y, label_smoothing=0.1, check="deferred")
        del x, y
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
    ll.raise_deferred()
    assert np.isfinite(to_host(results[1])).all()


def test_a_result_is_taken_again(monkeypatch, dtype):
    library = LIBRARIES["interface"](monkeypatch)
    p = ll.softmax(library.to_device(X.astype(dtype)))
    expected = ll.entropy(ll.softmax(X.astype(dtype)))
    agree(library, ll.entropy(p), expected, rtol=1e-3)


def test_capsules_are_what_others_read(monkeypatch, dtype):
    """NumPy reads the capsule as one of the host's memory, which the simulator's is."""
    from logitloss._kernels import cuda_device

    from logitloss import _dlpack

    if not cuda_device.is_simulated() or dtype == DTYPES["bfloat16"]:
        pytest.skip("NumPy cannot read it")
    library = LIBRARIES["interface"](monkeypatch)
    result = ll.softmax(library.to_device(X.astype(dtype)))
    held = len(_dlpack._held)
    result.__dlpack__()
    assert len(_dlpack._held) == held, "a capsule that nobody read frees its array"
    capsule = result.__dlpack__()
    ctypes.c_int32.from_address(pointer(capsule) + 8).value = 1

    class Producer:
        def __dlpack_device__(self):
            return 1, 0

        def __dlpack__(self, **_):
            return capsules.pop()

    capsules = [capsule]
    del capsule
    array = np.from_dlpack(Producer())
    assert array.tobytes() == to_host(result).tobytes()
    assert len(_dlpack._held) == held + 1
    del array
    assert len(_dlpack._held) == held


def test_tensors_of_the_host_are_arrays_of_the_host():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    x, y = torch.from_numpy(X.copy()), torch.from_numpy(Y)
    assert ll.cross_entropy(x, y) == ll.cross_entropy(X, Y)
    assert type(ll.softmax(x)) is np.ndarray
    refused(TypeError, "logits of type Tensor: expected what NumPy makes", ll.softmax, x.bfloat16())
    refused(TypeError, "requires gradient", ll.softmax, x.requires_grad_())
