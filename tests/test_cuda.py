"""What the CUDA backend does beyond the matrix: arrays on the device, chunks, parts of rows, missing devices.

All of it runs on the simulator too, where the device's memory is the host's.
"""

import os
import re
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import DTYPES, batch, unfilled
from ulp import assert_exact, result_dtype

import logitloss as ll
from logitloss import _backends

REASON = ll.backends().get("cuda")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}")
FLOAT32 = DTYPES["float32"]


@pytest.fixture
def cuda():
    return _backends.get("cuda")


def there(array):
    from logitloss._kernels.cuda_arrays import DeviceArray

    return DeviceArray.from_host(array)


def empty(shape, dtype):
    return there(np.full(shape, 77).astype(dtype))


def cross_entropy(cuda, logits, target, beta=None, gamma=None, z_loss=0.0, scale=1.0, **outputs):
    names = ("lse_in", "loss", "lse", "figures", "grad")
    given = [outputs.get(name) for name in names]
    return cuda.cross_entropy(logits, target, -100, beta, gamma, z_loss, scale, *given, 1)


def test_device_arrays_are_used_where_they_lie(cuda, dtype):
    logits, target = batch((5, 33), dtype)
    x, y, grad = there(logits), there(target), empty(logits.shape, dtype)
    loss = empty(5, result_dtype(dtype))
    total, counted, bad = cross_entropy(cuda, x, y, loss=loss, grad=grad)
    value, gradient = oracle.cross_entropy(logits, target)
    assert_exact(loss.to_host(), value)
    assert_exact(grad.to_host(), gradient)
    assert (counted.item(), bad.item()) == (5, -1)
    assert_exact(np.float64(total.item()), oracle.reduced(value), dtype=dtype)
    assert x.to_host().tobytes() == logits.tobytes()


@pytest.mark.parametrize("shape", [(5, 7), (5, 33), (2, 67), (1, 700)])
def test_figures_in_device_arrays(cuda, dtype, shape):
    """By a thread, a warp, a block and several blocks a row, with many equals."""
    logits, target = batch(shape, dtype)
    logits = np.round(logits.astype(float)).astype(dtype)
    loss, lse = empty(target.shape, result_dtype(dtype)), empty(target.shape, np.float64)
    figures = empty((*target.shape, 5), np.float64)
    cross_entropy(cuda, there(logits), there(target), loss=loss, lse=lse, figures=figures)
    assert_exact(loss.to_host(), oracle.cross_entropy(logits, target)[0])
    assert_exact(lse.to_host(), oracle.wide_lse(logits), dtype=dtype)
    expected, out = oracle.figures(logits, target)[0].astype(float), figures.to_host()
    assert np.array_equal(out[:, :2], expected[:, :2])
    np.testing.assert_allclose(out, expected, rtol=32 * np.finfo(result_dtype(dtype)).eps)


@pytest.mark.parametrize("offset", [1, 3, 4])
def test_rows_that_start_anywhere(cuda, dtype, offset):
    """Sixteen bytes are read at once from the first multiple of sixteen; no item outside a row is touched."""
    from logitloss._kernels.cuda_arrays import DeviceArray

    logits, target = batch((3, 67), dtype)
    wide = np.full((3, 75), np.nan, dtype)
    wide[:, offset : offset + 67] = logits
    whole, out = there(wide), there(np.full((3, 75), 7, dtype))
    start = offset * dtype.itemsize
    x = DeviceArray(whole.address + start, dtype, (3, 67), whole.strides, whole)
    grad = DeviceArray(out.address + start, dtype, (3, 67), out.strides, out)
    loss = empty(3, result_dtype(dtype))
    cross_entropy(cuda, x, there(target), loss=loss, grad=grad)
    value, gradient = oracle.cross_entropy(logits, target)
    assert_exact(loss.to_host(), value)
    written = out.to_host()
    assert_exact(written[:, offset : offset + 67], gradient)
    written[:, offset : offset + 67] = 7
    assert (written == 7).all()


def test_in_place_and_classes_apart(cuda, dtype):
    """As (N, C, H, W) has them: a row a thread, with the gradient over the logits."""
    source, target = batch((3, 4, 5, 7), dtype)
    planes = np.ascontiguousarray(np.moveaxis(source, -1, 1))
    x = there(planes)
    value, gradient = oracle.cross_entropy(source, target)
    loss = empty(target.shape, result_dtype(dtype))
    cross_entropy(cuda, x.axis_last(1), there(target), loss=loss, grad=x.axis_last(1))
    assert_exact(loss.to_host(), value)
    assert_exact(np.moveaxis(x.to_host(), 1, -1), gradient)


@pytest.mark.parametrize("n_classes", [300, 517, 1001])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_parts_of_a_row_come_to_the_whole(cuda, dtype, n_classes, smoothing, monkeypatch):
    from logitloss._kernels import cuda_launch

    logits, target = batch((2, n_classes), dtype)
    stages = []
    kernel = cuda_launch.cuda_rows.rows_kernel
    monkeypatch.setattr(
        cuda_launch.cuda_rows, "rows_kernel", lambda spec: stages.append(spec.stage) or kernel(spec)
    )
    options = {"label_smoothing": smoothing, "reduction": "none", "backend": "cuda"}
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    if cuda_launch.cuda_device.is_simulated():
        assert stages == ["parts", "finish", "second"]
    value, gradient = oracle.cross_entropy(logits, target, label_smoothing=smoothing)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    assert_exact(ll.entropy(logits, axis=1, reduction="none", backend="cuda"), oracle.entropy(logits))
    assert_exact(ll.softmax(logits, axis=1, backend="cuda"), oracle.softmax(logits))


def test_parts_with_special_values(cuda):
    logits = np.zeros((4, 300), np.float32)
    logits[0, 250], logits[1, 7], logits[2] = np.nan, np.inf, -np.inf
    logits[3, :299] = -np.inf
    assert str(ll.logsumexp(logits, axis=1, backend="cuda")) == "[ nan  inf -inf   0.]"
    rows = [ll.cross_entropy(row[None], [299], reduction="none", backend="cuda")[0] for row in logits]
    assert np.array_equal(rows, [np.nan, np.nan, np.nan, 0], equal_nan=True)


@pytest.mark.parametrize("chunk_bytes", [1, 500, 4000])
def test_chunks_do_not_show(cuda, dtype, chunk_bytes, monkeypatch):
    from logitloss._kernels import cuda_host

    logits, target = batch((3, 7, 19), dtype)
    target = target.copy()
    target[1, 4] = -100
    upstream = np.linspace(-2, 3, 21).reshape(3, 7)
    options = {"reduction": "none", "backend": "cuda"}
    calls = {
        "rows": lambda: ll.cross_entropy_value_and_grad(logits, target, axis=-1, **options),
        "grad": lambda: (ll.cross_entropy_grad(logits, target, upstream, axis=-1, **options),),
        "mean": lambda: (ll.cross_entropy(logits, target, axis=-1, backend="cuda"),),
        "strided": lambda: (ll.softmax(logits[:, ::-1], axis=0, backend="cuda"),),
        "elements": lambda: ll.binary_cross_entropy_with_logits_value_and_grad(
            logits, logits > 0, weight=np.arange(19), **options
        ),
    }
    whole = {name: call() for name, call in calls.items()}
    monkeypatch.setattr(cuda_host, "CHUNK_BYTES", chunk_bytes)
    for name, call in calls.items():
        for one, other in zip(call(), whole[name], strict=True):
            if np.ndim(one):
                assert np.array(one).tobytes() == np.array(other).tobytes(), name
            else:
                assert one == pytest.approx(other, rel=1e-14), name


def test_first_bad_label_of_all_chunks_is_named(monkeypatch):
    from logitloss._kernels import cuda_host

    monkeypatch.setattr(cuda_host, "CHUNK_BYTES", 64)
    logits, target = batch((40, 5), FLOAT32)
    target = target.copy()
    target[[29, 35]] = [9, -3]
    with pytest.raises(IndexError, match=r"^target\[29\] is 9"):
        ll.cross_entropy(logits, target, backend="cuda")
    signs = np.ones((40, 5))
    signs[29, 2:] = 0
    with pytest.raises(ValueError, match=r"^target\[29, 2\]"):
        ll.logistic_loss(logits, signs, backend="cuda")


def test_results_have_the_same_bits_each_time():
    logits, target = batch((9, 130), FLOAT32)
    runs = {
        (float(value).hex(), grad.tobytes())
        for value, grad in (
            ll.cross_entropy_value_and_grad(logits, target, label_smoothing=0.1, backend="cuda")
            for _ in range(3)
        )
    }
    assert len(runs) == 1


def test_a_mean_stays_on_the_device(cuda):
    """The weights' sum divides the scale and the total without being looked at."""
    logits, target = batch((6, 11), FLOAT32)
    weight = np.linspace(0.5, 2, 11)
    x, y, grad = there(logits), there(target), empty(logits.shape, FLOAT32)
    divisor, bad = cuda.label_weight(y, weight, -100, 11, 1)
    scale = cuda.divide(1.0, divisor).broadcast_to((6,))
    total, _, _ = cross_entropy(cuda, x, y, beta=weight, scale=scale, grad=grad)
    expected = ll.cross_entropy_value_and_grad(logits, target, weight=weight, backend="reference")
    assert cuda.divide(total, divisor).item() == pytest.approx(float(expected[0]))
    np.testing.assert_allclose(grad.to_host(), expected[1], atol=1e-7)
    assert bad.item() == -1
    assert np.isnan(cuda.divide(0.0, 0).item())


def test_views_of_device_arrays():
    array = there(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert (array.ndim, array.size, array.itemsize, array.nbytes) == (2, 6, 4, 24)
    assert array.is_contiguous
    assert not array.axis_last(0).is_contiguous
    assert array.axis_last(0).shape == (3, 2)
    assert array.transpose((1, 0)).strides == (4, 12)
    row = there(np.zeros((1, 3), ml_dtypes.bfloat16)).broadcast_to((4, 2, 3))
    assert row.strides == (0, 0, 2)
    with pytest.raises(ValueError, match="does not broadcast"):
        array.broadcast_to((3, 3))
    with pytest.raises(ValueError, match="C order"):
        array.axis_last(0).to_host()


def test_arrays_of_many_axes(cuda):
    """Axes that no stride joins: rows of four of them."""
    source, target = batch((2, 3, 2, 3, 5), FLOAT32)
    cut = (slice(None), slice(None, None, -2), slice(None), slice(None, None, 2))
    from logitloss._kernels.cuda_arrays import DeviceArray

    x, y = there(source), there(target)
    shape = source[cut].shape
    view = DeviceArray(x.address + 2 * x.strides[1], x.dtype, shape, source[cut].strides, x)
    labels = DeviceArray(y.address + 2 * y.strides[1], y.dtype, shape[:-1], target[cut].strides, y)
    loss = there(unfilled(shape[:-1], np.float32))
    cross_entropy(cuda, view, labels, loss=loss)
    assert_exact(loss.to_host(), oracle.cross_entropy(source[cut], target[cut])[0])


def test_totals_of_threads_do_not_mix(cuda):
    """The memory of a call's intermediate results is its own until it is through."""
    from logitloss._kernels import cuda_launch

    x = there(batch((40, 5), FLOAT32)[0])
    begun, through, kept = threading.Event(), threading.Event(), cuda_launch.add_up

    def slow(*arguments):
        begun.set()
        through.wait(0.5)
        return kept(*arguments)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as other:
        patch.setattr(cuda_launch, "add_up", slow)
        first = other.submit(cuda_scaled_total, x)
        begun.wait(5)
        patch.setattr(cuda_launch, "add_up", kept)
        second = cuda_scaled_total(there(np.ones(9)))
        through.set()
        assert second.item() == 9
        assert first.result().item() == pytest.approx(x.to_host().sum(dtype=float))


def cuda_scaled_total(array):
    from logitloss._kernels import cuda_scaled

    return cuda_scaled.total(array, 0)


def test_streams_of_threads_have_memory_of_their_own(cuda):
    from logitloss._kernels import cuda_launch

    with ThreadPoolExecutor(1) as other:
        theirs = [other.submit(cuda_launch.scratch, 1, stream).result() for stream in (0, 2)]
    ours = [cuda_launch.scratch(1, stream) for stream in (0, 2)]
    assert (theirs[0] == ours[0], theirs[1] == ours[1]) == (True, False)


def test_nothing_keeps_what_a_call_returned(cuda):
    x = batch((40, 5), FLOAT32)[0]
    result = ll.softmax(x, backend="cuda")
    kept = weakref.ref(result)
    del result
    assert kept() is None


def test_memory_that_is_not_had_is_not_counted_on(cuda, monkeypatch):
    from logitloss._kernels import cuda_device, cuda_host

    buffer, device = cuda_host._Buffer(), cuda_device.get()
    buffer.reserve(60)
    with monkeypatch.context() as patch:
        patch.setattr(device, "allocate", lambda n_bytes: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            buffer.reserve(60000)
    assert buffer.host.size == 60


@pytest.mark.parametrize(
    ("capability", "said"), [((7, 5), "compute capability 7.5, 8.0 is needed"), ((8, 0), "")]
)
def test_devices_too_old(monkeypatch, capability, said):
    from logitloss._kernels import cuda_device

    class Driver:
        def __init__(self, name):
            pass

        def cuInit(self, flags):
            return 0

        def cuDeviceGetCount(self, count):
            count._obj.value = 1
            return 0

        def cuDeviceGet(self, device, number):
            return 0

        def cuDeviceGetAttribute(self, number, attribute, device):
            number._obj.value = capability[attribute - 75]
            return 0

    monkeypatch.setattr(cuda_device.ctypes, "CDLL", Driver)
    assert cuda_device._drivers_words() == said


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        ("numba_cuda", "install it by `pip install 'logitloss\\[cuda12\\]'`"),
        ("", "no device can be used \\(.+\\)"),
    ],
)
def test_what_is_missing_is_said(hidden, says):
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {hidden!r} else find(name, *rest)\n"
        "import logitloss, numpy\n"
        "print(logitloss.backends()['cuda'])\n"
        "try:\n    logitloss.cross_entropy(numpy.zeros((2, 3)), [0, 1], backend='cuda')\n"
        "except ImportError as error:\n    print(error)\n"
        "print(logitloss.cross_entropy(numpy.zeros((2, 3)), [0, 1]), 'numba' in sys.modules)\n"
    )
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0", "CUDA_VISIBLE_DEVICES": "-1"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    reason, error, value = run.stdout.splitlines()
    assert reason == error
    assert re.search(says, error)
    assert value.startswith("1.098")
    assert value.endswith("False")
