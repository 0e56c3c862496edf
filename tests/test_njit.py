"""The functions inside a user's own compiled functions: the public ones' values, and errors as clear."""

import subprocess
import sys

import numba
import numpy as np
import pytest
from cases import batch, frozen, probabilities
from numba import njit, prange

import logitloss as ll

# Short rows and long, rows in the middle, and classes that do not lie next to each other
SHAPES = [((33, 10), 1), ((17, 129), 1), ((3, 5, 20), -1), ((4, 7, 30), 1)]


@njit
def every_result(logits, target, soft, weight):
    return (
        ll.cross_entropy(logits, target, axis=1),
        ll.cross_entropy(logits, target, weight=weight, label_smoothing=0.1, z_loss=1e-3, axis=1),
        ll.cross_entropy(logits, target, ignore_index=3, reduction="none", axis=1),
        ll.cross_entropy(logits, soft, reduction="sum", axis=1),
        ll.cross_entropy_value_and_grad(logits, target, weight=weight, axis=1),
        ll.cross_entropy_value_and_grad(logits, soft, label_smoothing=0.2, axis=1),
        ll.logsumexp(logits, axis=1),
        ll.softmax(logits, axis=1),
    )


def flat(results):
    return [array for result in results for array in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("name", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES[:2] + SHAPES[3:], ids=str)
def test_values_are_those_of_the_public_functions(shape, axis, name):
    dtype = np.dtype(name)
    logits = batch((*shape[:1], *shape[2:], shape[1]), dtype)[0]
    logits = frozen(np.moveaxis(logits, -1, 1))
    rows = shape[:1] + shape[2:]
    target = frozen(np.arange(np.prod(rows)).reshape(rows) % shape[1])
    soft = frozen(np.abs(logits))
    weight = np.linspace(0.5, 1.5, shape[1])
    found = flat(every_result(logits, target, soft, weight))
    expected = flat(every_result.py_func(logits, target, soft, weight))
    for actual, wanted in zip(found, expected, strict=True):
        wanted = np.asarray(wanted)
        assert np.asarray(actual).dtype == wanted.dtype
        assert np.asarray(actual).shape == wanted.shape
        np.testing.assert_allclose(actual, wanted, rtol=4 * np.finfo(dtype).eps, atol=2 * np.finfo(dtype).eps)


@njit
def binary_results(logits, target, weight):
    return (
        ll.binary_cross_entropy_with_logits(logits, target),
        ll.binary_cross_entropy_with_logits(logits, target, weight=weight, reduction="none"),
        ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, pos_weight=2.5),
        ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, label_smoothing=0.1),
    )


@pytest.mark.parametrize("target_dtype", [np.float32, np.uint8, np.bool_])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_binary_values(name, target_dtype):
    dtype = np.dtype(name)
    logits = batch((40, 129), dtype)[0]
    target = frozen((np.arange(logits.size).reshape(logits.shape) % 3 == 0).astype(target_dtype))
    weight = np.linspace(0, 1, 129)
    found = flat(binary_results(logits, target, weight))
    expected = flat(binary_results.py_func(logits, target, weight))
    for actual, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=8 * np.finfo(dtype).eps)


def test_inside_a_users_own_parallel_loop():
    @njit(parallel=True)
    def row_by_row(logits, target):
        losses = np.empty(len(logits))
        for row in prange(len(logits)):
            losses[row] = ll.cross_entropy(logits[row], target[row])
        return losses

    logits, target = batch((700, 129), np.dtype(np.float64))
    expected = ll.cross_entropy(logits, target, reduction="none")
    np.testing.assert_allclose(row_by_row(logits, target), expected, rtol=1e-14)
    threads = numba.get_num_threads()
    assert threads == numba.config.NUMBA_NUM_THREADS


def test_gradient_into_an_array_that_is_there():
    @njit
    def into(logits, target, out):
        return ll.cross_entropy_value_and_grad(logits, target, out=out)[0]

    logits, target = batch((20, 60), np.dtype(np.float32))
    out = np.full_like(logits, np.nan)
    value, grad = ll.cross_entropy_value_and_grad(logits, target)
    assert into(logits, target, out) == pytest.approx(float(value), rel=1e-6)
    np.testing.assert_allclose(out, grad, rtol=1e-6, atol=1e-9)


@njit
def in_place(logits, target, out):
    return ll.cross_entropy_value_and_grad(logits, target, out=out)


@njit
def softmax_into(logits, out):
    return ll.softmax(logits, out=out)


def test_what_an_output_must_be():
    logits, target = batch((20, 60), np.dtype(np.float32))
    locked = np.zeros_like(logits)
    locked.flags.writeable = False
    memory = np.zeros((21, 60), np.float32)
    spread = np.lib.stride_tricks.as_strided(np.zeros(60, np.float32), (20, 60), (0, 4))
    for function, arguments in ((in_place, (target,)), (softmax_into, ())):
        with pytest.raises(numba.TypingError, match=r"out of type .*: expected an array that can be written"):
            function(logits, *arguments, locked)
        with pytest.raises(numba.TypingError, match=r"out of type .*: expected an array like the logits"):
            function(logits, *arguments, np.zeros((20, 60)))
        with pytest.raises(ValueError, match="out: expected an array whose elements are aligned"):
            function(logits, *arguments, np.zeros((20, 61 * 4), np.uint8)[:, 1:241].view(np.float32))
        with pytest.raises(ValueError, match="out: expected the logits' shape"):
            function(logits, *arguments, np.zeros((20, 61), np.float32))
        with pytest.raises(ValueError, match="out: reaches into the memory of an input"):
            function(memory[1:], *arguments, memory[:-1])
        with pytest.raises(ValueError, match="out: expected memory of its own for each element"):
            function(logits, *arguments, spread)
        with pytest.raises(ValueError, match="out: expected memory of its own for each element"):
            function(logits, *arguments, np.lib.stride_tricks.as_strided(memory, (20, 60), (4, 4)))
    assert not locked.any()
    wanted = ll.cross_entropy_grad(logits, target)
    memory[1:] = logits
    np.testing.assert_allclose(in_place(memory[1:], target, memory[1:])[1], wanted, rtol=1e-6, atol=1e-9)


@njit
def plain(logits, target):
    return ll.cross_entropy(logits, target)


def test_a_bad_label_is_named():
    logits, target = batch((20, 60), np.dtype(np.float32))
    bad = target.copy()
    bad[7] = 60
    with pytest.raises(IndexError, match=r"row 7, is 60, .* 60 classes: expected 0 <= target < 60"):
        plain(logits, bad)
    with pytest.raises(ValueError, match="target: expected the logits' shape without the class axis"):
        plain(logits, target[1:])
    with pytest.raises(IndexError, match=r"row 0, is 18446744073709551516, but logits have 60 classes"):
        plain(logits[0], np.uint64(2**64 - 100))
    bad[7] = -(2**63)
    with pytest.raises(IndexError, match=r"a label is -2\*\*63"):
        plain(logits, bad)
    large = target.astype(np.uint64)
    large[3] = 2**63 + 5
    with pytest.raises(IndexError, match="row 3"):
        njit(lambda x, y: ll.cross_entropy(x, y, ignore_index=-(2**63)))(logits, large)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_a_bad_label_leaves_out_as_it_was(reduction):
    scope = {"ll": ll}
    call = f"ll.cross_entropy_value_and_grad(x, y, reduction={reduction!r}, out=out)"
    exec(f"def function(x, y, out): return {call}", scope)
    logits, target = batch((200, 60), np.dtype(np.float32))
    bad, out = target.copy(), np.full_like(logits, 3)
    bad[-1] = 60
    with pytest.raises(IndexError, match="row 199"):
        njit(scope["function"])(logits, bad, out)
    assert (out == 3).all()


@njit
def weighted_binary(x, y, weight, pos_weight):
    return ll.binary_cross_entropy_with_logits(x, y, weight=weight, pos_weight=pos_weight, reduction="none")


def test_binary_weights_are_numbers_or_broadcast():
    logits = batch((20, 60), np.dtype(np.float32))[0]
    target = (logits > 0).astype(np.float32)
    column, row = np.linspace(0.5, 2, 20)[:, None], np.arange(60, dtype=np.int32)
    for weights in ((2, column), (row, 0.5), (np.float32(3), True), (column, row), (None, row)):
        wanted = ll.binary_cross_entropy_with_logits(
            logits, target, weight=weights[0], pos_weight=weights[1], reduction="none"
        )
        np.testing.assert_allclose(weighted_binary(logits, target, *weights), wanted, rtol=1e-6)


@njit
def binary_in_place(x, y, weight, pos_weight, out):
    return ll.binary_cross_entropy_with_logits_value_and_grad(
        x, y, weight=weight, pos_weight=pos_weight, reduction="sum", out=out
    )


def test_an_output_is_apart_from_binary_weights():
    logits = batch((20, 60), np.dtype(np.float32))[0]
    target, out = (logits > 0).astype(np.float32), np.ones_like(logits)
    for weights in ((out[0], None), (None, out[:, :1])):
        with pytest.raises(ValueError, match="out: reaches into the memory of an input"):
            binary_in_place(logits, target, *weights, out)
    assert (out == 1).all()


@njit
def smoothed(x, y, weight):
    return ll.cross_entropy_value_and_grad(x, y, weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1e-20, 1e30, 1e300])
def test_a_mean_takes_class_weights_of_any_size(scale):
    logits, target = batch((300, 60), np.dtype(np.float32))
    weight = np.linspace(0.5, 2, 60) * scale
    wanted = ll.cross_entropy_value_and_grad(logits, target, weight=weight, label_smoothing=0.1)
    found = smoothed(logits, target, weight)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5, atol=1e-6 * np.abs(wanted[1]).max())


@njit
def weighted(x, y, weight):
    return ll.cross_entropy_value_and_grad(x, y, weight=weight)


@njit
def weighted_sum(x, y, weight):
    return ll.cross_entropy(x, y, weight=weight, reduction="sum")


@pytest.mark.parametrize(
    "weight", [[1e-300, 1], [1e-45, 1], [1e-30, 1e30], [1, 3e38], [1e308, 1e308]], ids=str
)
def test_a_mean_is_of_the_weights_of_labels_that_are_there(weight):
    logits, target, weight = np.array([[11, 0], [3, 0]], np.float32), np.zeros(2, int), np.array(weight)
    wanted = ll.cross_entropy_value_and_grad(logits, target)
    found = weighted(logits, target, weight)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
    soft = np.full((2, 2), 0.5)
    size = weight.max()
    for labels in (target, soft) if size < 1e300 else ():  # whose sum is beyond float64
        wanted = ll.cross_entropy(logits, labels, weight=weight / size, reduction="sum")
        found = weighted_sum(logits, labels, weight)
        assert found == pytest.approx(size * wanted, rel=1e-5)  # 11 nats ahead


@njit
def rows_and_grad(x, y, weight):
    return ll.cross_entropy_value_and_grad(x, y, weight=weight, reduction="none")


@njit
def sum_and_grad(x, y, weight):
    return ll.cross_entropy_value_and_grad(x, y, weight=weight, reduction="sum")


@pytest.mark.parametrize("size", [1e-30, 1e-36, 1e-42, 1e-46])
@pytest.mark.parametrize("function", [rows_and_grad, sum_and_grad])
def test_tiny_class_weights(function, size):
    logits, target = batch((30, 6), np.dtype(np.float32))
    weight = np.linspace(1, 3, 6)
    wanted = function(logits.astype(float), target, weight)
    for one, other in zip(function(logits, target, size * weight), wanted, strict=True):
        assert (np.abs(one - size * other) <= np.maximum(1e-5 * size * np.abs(other), 1e-45)).all()


def test_smoothing_over_many_classes_keeps_the_gradients_digits():
    logits = np.random.default_rng(5).standard_normal((1, 50257))
    logits[0, 7] += 20
    found = smoothed(logits, np.array([5]), np.ones(50257))[1]
    wanted = ll.cross_entropy_grad(
        logits, [5], weight=np.ones(50257), label_smoothing=0.1, backend="reference"
    )
    assert np.abs(found - wanted).max() <= 8 * np.spacing(np.abs(wanted).max())


def test_a_kernel_that_cannot_be_loaded_is_an_error(monkeypatch):
    """As when loading it is interrupted: nothing is called then."""
    from logitloss._kernels import numba_cpu

    from logitloss._njit import kernels

    number = kernels.NUMBERS["numba_elements", "bce", "f64"]
    kept = kernels._TABLE[number]
    monkeypatch.setattr(numba_cpu, "kernel", lambda *_: 1 / 0)
    try:
        kernels._TABLE[number] = 0
        with pytest.raises(RuntimeError, match="no kernel was loaded"):
            weighted_binary(np.zeros(3), np.zeros(3), 1.0, 1.0)
    finally:
        kernels._TABLE[number] = kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x.astype(np.int32), y", "logits of type .*: expected an array of float32 or float64"),
        ("x, y, reduction='median'", "reduction is 'median': expected one of none, mean, sum"),
        ("x, y, axis=2", "axis is 2: expected -2 <= axis < 2"),
        ("x, y, num_threads=2", "num_threads is of type .*: expected None"),
        ("x.reshape(4, 5, 60), y[:4]", "target of 1 axes: expected 2, beside logits of 3"),
        ("x, 3", "target of 0 axes: expected 1, beside logits of 2"),
        ("x[0], y", "target of 1 axes: expected 0, beside logits of 1"),
        ("x, x[0]", "target of 1 axes: expected 2, beside logits of 2"),
        ("x, y > 3", "target of type .*bool.*: expected integers, or floats"),
        ("x, y, ignore_index=np.uint64(2**63)", "ignore_index is of type .*: expected a signed integer"),
        ("x, y, weight=3.0", "weight is of type .*: expected an array of one number per class"),
        ("x, y, weight=x", "weight is of type .*: expected an array of one number per class"),
        ("x, y, weight=x[0] * 1j", "weight of type .*: expected an array of numbers"),
        ("x, y, ignore_index=3.7", "ignore_index is of type .*: expected a signed integer"),
    ],
)
def test_what_cannot_be_compiled_says_why(arguments, message):
    scope = {"ll": ll, "np": np}
    exec(f"def function(x, y): return ll.cross_entropy({arguments})", scope)
    logits, target = batch((20, 60), np.dtype(np.float32))
    with pytest.raises(numba.TypingError, match=message):
        njit(scope["function"])(logits, target)


def test_numba_finds_them_by_the_entry_point_and_keeps_what_it_compiled(tmp_path):
    """A function kept on disk runs in a new process, which has compiled none of what it calls."""
    (tmp_path / "user.py").write_text(
        "import sys\n"
        "import numpy as np\n"
        "import logitloss as ll\n"
        "from numba import njit\n"
        "@njit(cache=True)\n"
        "def loss(x, y): return ll.cross_entropy(x, y)\n"
        "value = loss(np.zeros((3, 4), np.float32), np.arange(3))\n"
        "print(round(value, 6), sum(loss.stats.cache_hits.values()))\n"
    )
    run = [sys.executable, "user.py"]
    found = [
        subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
        for _ in range(2)
    ]
    assert found == [["1.386294", "0"], ["1.386294", "1"]]


def test_probabilities_are_taken_for_targets_of_the_logits_shape():
    logits = batch((20, 60), np.dtype(np.float32))[0]
    soft = probabilities((20, 60), np.dtype(np.float32))
    assert plain(logits, soft) == pytest.approx(float(ll.cross_entropy(logits, soft)), rel=1e-6)
