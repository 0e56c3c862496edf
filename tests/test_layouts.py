"""Arrays in every layout: strided, reversed, broadcast, Fortran-ordered, read-only, memory-mapped, in place.

A layout changes how a kernel walks, never what it returns, and inputs come back bit for bit as they were.
Values are those of the oracle, not of the contiguous call: the two may take different paths.
"""

import numpy as np
import oracle
import pytest
from cases import batch, probabilities, unfilled
from expected import batch_cross_entropy, batch_soft_cross_entropy
from memory import LAYOUTS, WRITABLE_LAYOUTS
from ulp import assert_exact, exact, result_dtype

import logitloss as ll

# Few classes with rows over a block of 16; a vector and a tail; several blocks of 128 and a tail.
SHAPES = [(35, 7), (5, 33), (3, 300)]


def bits(array):
    return np.array(array).tobytes()


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_target(backend, dtype, layout, shape):
    logits, target = (LAYOUTS[layout](array) for array in batch(shape, dtype))
    before = bits(logits), bits(target)
    value, gradient = batch_cross_entropy(shape, dtype)
    out = unfilled(shape, dtype)
    loss, _ = ll.cross_entropy_value_and_grad(logits, target, reduction="none", out=out, backend=backend)
    assert_exact(loss, value)
    assert_exact(out, gradient)
    assert_exact(ll.cross_entropy(logits, target, reduction="none", backend=backend), value)
    assert_exact(ll.cross_entropy_grad(logits, target, reduction="none", backend=backend), gradient)
    assert (bits(logits), bits(target)) == before


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_probability_targets(backend, dtype, layout, shape):
    logits = LAYOUTS[layout](batch(shape, dtype)[0])
    target = LAYOUTS[layout](probabilities(shape, dtype))
    before = bits(logits), bits(target)
    value, gradient = batch_soft_cross_entropy(shape, dtype)
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)
    assert (bits(logits), bits(target)) == before


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_gradient_into_the_logits(backend, dtype, layout, shape):
    source, target = batch(shape, dtype)
    value, gradient = batch_cross_entropy(shape, dtype)
    logits = WRITABLE_LAYOUTS[layout](source)
    options = {"reduction": "none", "backend": backend}
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, out=logits, **options)
    assert grad is logits
    assert_exact(loss, value)
    assert_exact(logits, gradient)
    logits = WRITABLE_LAYOUTS[layout](source)
    ll.cross_entropy_grad(logits, target, out=logits, **options)
    assert_exact(logits, gradient)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_gradient_of_probabilities_into_the_logits(backend, dtype, layout):
    source = batch((5, 33), dtype)[0]
    value, gradient = batch_soft_cross_entropy((5, 33), dtype)
    logits = WRITABLE_LAYOUTS[layout](source)
    loss, _ = ll.cross_entropy_value_and_grad(
        logits, probabilities((5, 33), dtype), reduction="none", out=logits, backend=backend
    )
    assert_exact(loss, value)
    assert_exact(logits, gradient)


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_out(backend, dtype, layout, shape):
    logits, target = batch(shape, dtype)
    value, gradient = batch_cross_entropy(shape, dtype)
    grad_out = WRITABLE_LAYOUTS[layout](unfilled(shape, dtype))
    ll.cross_entropy_grad(logits, target, reduction="none", out=grad_out, backend=backend)
    assert_exact(grad_out, gradient)
    loss_out = WRITABLE_LAYOUTS[layout](unfilled(target.shape, result_dtype(dtype)))
    ll.cross_entropy(logits, target, reduction="none", out=loss_out, backend=backend)
    assert_exact(loss_out, value)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["every_third", "every_second_class", "padded_rows"])
def test_out_leaves_what_lies_between_alone(backend, dtype, layout):
    logits, target = batch((5, 33), dtype)
    out = LAYOUTS[layout](np.zeros((5, 33), dtype))
    whole = out.base
    outside = np.isnan(whole.astype(float))
    ll.cross_entropy_grad(logits, target, out=out, backend=backend)
    assert np.isnan(whole.astype(float)[outside]).all()
    assert outside.sum() == whole.size - out.size
    assert np.isfinite(out.astype(float)).all()


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=["rows", "classes", "everything"])
def test_broadcast_logits(backend, dtype, axes):
    source, target = batch((20, 33), dtype)
    index = tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(2))
    logits = np.broadcast_to(source[index], (20, 33))
    value, gradient = oracle.cross_entropy(logits, target)
    loss, grad = ll.cross_entropy_value_and_grad(logits, target, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


def test_broadcast_target_and_upstream(backend, dtype):
    logits, _ = batch((20, 33), dtype)
    target, upstream = np.broadcast_to(np.int16(4), 20), np.broadcast_to(np.float32(0.25), 20)
    _, gradient = oracle.cross_entropy(logits, target, scale=0.25)
    grad = ll.cross_entropy_grad(logits, target, upstream, reduction="none", backend=backend)
    assert_exact(grad, gradient)
    for shape in ((1, 33), (20, 1)):  # one for all rows, one for all classes
        soft = np.broadcast_to(probabilities(shape, dtype) / 33, (20, 33))
        value, gradient = oracle.soft_cross_entropy(logits, soft)
        loss, grad = ll.cross_entropy_value_and_grad(logits, soft, reduction="none", backend=backend)
        assert_exact(loss, value)
        assert_exact(grad, gradient)


@pytest.mark.parametrize("n_classes", [5, 60])
def test_targets_of_one_number_for_all_classes(backend, dtype, n_classes):
    """Of rows side by side: what is the same for all classes is not the same for all rows."""
    logits = batch((2, 64, n_classes), dtype)[0].transpose(0, 2, 1)
    soft = np.broadcast_to(np.linspace(0.01, 0.2, 128).astype(dtype).reshape(2, 1, 64), logits.shape)
    value, gradient = oracle.soft_cross_entropy(np.moveaxis(logits, 1, -1), np.moveaxis(soft, 1, -1))
    loss, grad = ll.cross_entropy_value_and_grad(logits, soft, reduction="none", backend=backend)
    assert_exact(loss, value)
    assert_exact(np.moveaxis(grad, 1, -1), gradient)


def test_memory_mapped_files(backend, dtype, tmp_path):
    logits, target = batch((20, 33), dtype)
    value, gradient = batch_cross_entropy((20, 33), dtype)
    paths = [tmp_path / name for name in ("logits", "target", "grad")]
    logits.tofile(paths[0])
    target.tofile(paths[1])
    mapped = np.memmap(paths[0], dtype, "r", shape=(20, 33))
    labels = np.memmap(paths[1], target.dtype, "r", shape=20)
    out = np.memmap(paths[2], dtype, "w+", shape=(20, 33))
    loss, grad = ll.cross_entropy_value_and_grad(mapped, labels, reduction="none", out=out, backend=backend)
    assert grad is out
    assert_exact(loss, value)
    out.flush()
    assert_exact(np.fromfile(paths[2], dtype).reshape(20, 33), gradient)
    assert paths[0].read_bytes() == logits.tobytes()


def test_lists_and_scalars(backend):
    assert ll.cross_entropy([[0.0, 0.0]], [1], backend=backend) == pytest.approx(np.log(2))
    assert ll.cross_entropy([0.0, 0.0], 1, backend=backend) == pytest.approx(np.log(2))
    assert ll.cross_entropy([[0.0, 0.0]], [[0.5, 0.5]], backend=backend) == pytest.approx(np.log(2))
    assert ll.binary_cross_entropy_with_logits(0.0, 1, backend=backend) == pytest.approx(np.log(2))


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", LAYOUTS)
def test_binary_arrays(backend, dtype, layout):
    make = LAYOUTS[layout]
    logits = make(batch((9, 37), dtype)[0])
    target, weight = make(probabilities((9, 37), dtype)), make(probabilities((9, 37), np.dtype(np.float32)))
    before = bits(logits), bits(target), bits(weight)
    value, gradient = oracle.bce_with_logits(logits, target, weight=exact(weight), pos_weight=exact(weight))
    options = {"weight": weight, "pos_weight": weight, "reduction": "none", "backend": backend}
    out = unfilled((9, 37), dtype)
    loss, _ = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, out=out, **options)
    assert_exact(loss, value)
    assert_exact(out, gradient)
    assert (bits(logits), bits(target), bits(weight)) == before


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_binary_in_place(backend, dtype, layout):
    source, target = batch((9, 37), dtype)[0], probabilities((9, 37), dtype)
    value, gradient = oracle.bce_with_logits(source, target)
    logits = WRITABLE_LAYOUTS[layout](source)
    loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(
        logits, target, reduction="none", out=logits, backend=backend
    )
    assert grad is logits
    assert_exact(loss, value)
    assert_exact(logits, gradient)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
def test_activations_in_place_and_not(backend, dtype, layout):
    source = batch((9, 37), dtype)[0]
    for name in ("softmax", "log_softmax", "sigmoid", "log_sigmoid"):
        function, expected = getattr(ll, name), getattr(oracle, name)(source)
        array = LAYOUTS[layout](source)
        before = bits(array)
        out = WRITABLE_LAYOUTS[layout](unfilled((9, 37), dtype))
        assert function(array, out=out, backend=backend) is out
        assert_exact(out, expected)
        assert bits(array) == before
        assert function(array, out=array, backend=backend) is array
        assert_exact(array, expected)


@pytest.mark.parametrize("n_classes", [61, 1000, 4999, 50257])
def test_results_too_large_for_the_cache(backend, dtype, n_classes):
    """A result is written while later rows are summed, and may share a line with them: each as if alone."""
    if backend == "reference":
        pytest.skip("the reference knows no caches")
    n_rows = 2**25 // (max(4, dtype.itemsize) * n_classes) + 70
    rng = np.random.default_rng()
    logits = (4 * rng.standard_normal((n_rows, n_classes))).astype(dtype)
    logits[3, 5], logits[4] = np.nan, np.linspace(-900, 800, n_classes)
    logits[5] += dtype.type(300)
    target = rng.integers(0, n_classes, n_rows)
    target[6], target[7] = -100, logits[7].argmax()
    calls = {
        "gradient": lambda x, y, out: ll.cross_entropy_grad(x, y, reduction="sum", out=out, backend=backend),
        "softmax": lambda x, y, out: ll.softmax(x, axis=1, out=out, backend=backend),
        "log_softmax": lambda x, y, out: ll.log_softmax(x, axis=1, out=out, backend=backend),
    }
    for name, call in calls.items():
        whole = call(logits, target, np.full_like(logits, 7))
        for first in (0, n_rows // 2, n_rows - 9):
            rows = slice(first, first + 9)
            alone = call(logits[rows], target[rows], None)
            assert np.array_equal(whole[rows], alone, equal_nan=True), (name, first)
        in_place = logits.copy()
        call(in_place, target, in_place)
        assert np.array_equal(whole, in_place, equal_nan=True), name


@pytest.mark.sanitize
@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize(
    ("n_classes", "n_beside"), [(1, 0), (10, 0), (24, 0), (2, 4099), (21, 1728), (9, 1032), (9, 1028)]
)
def test_gradients_of_few_classes_too_large_for_the_cache(backend, dtype, n_classes, n_beside, offset):
    """They are written while later rows are summed, from anywhere in a line on: each row as if alone."""
    if backend == "reference":
        pytest.skip("the reference knows no caches")
    n_planes = 2**25 // (max(4, dtype.itemsize) * n_classes * max(n_beside, 1)) + 3
    beside = (n_beside,) if n_beside else ()
    rng = np.random.default_rng()
    logits = (4 * rng.standard_normal((n_planes, n_classes, *beside), np.float32)).astype(dtype)
    target = rng.integers(0, n_classes, (n_planes, *beside))
    # Some go another way than their neighbours: ignored, or not in the range of a plain sum
    first_logit = np.moveaxis(logits, 1, -1)[..., 0]
    first_logit.flat[[200, 640, 900, -1]] = np.array([np.nan, -np.inf, 300, -300]).astype(dtype)
    target.flat[[3, 700, -2]] = -100
    memory = np.full(logits.size + 64, 9, dtype)
    out = memory[offset : offset + logits.size].reshape(logits.shape)
    options = {"axis": 1, "reduction": "none", "backend": backend}
    loss, _ = ll.cross_entropy_value_and_grad(logits, target, out=out, **options)
    assert (memory[:offset] == 9).all()
    assert (memory[offset + logits.size :] == 9).all()
    step = 2**20 // (n_classes * max(n_beside, 1))
    for first in range(0, n_planes, step):
        some = slice(first, first + step)
        alone = ll.cross_entropy_value_and_grad(logits[some], target[some], **options)
        assert np.array_equal(loss[some], alone[0], equal_nan=True)
        assert np.array_equal(out[some], alone[1], equal_nan=True)
    again, in_place = ll.cross_entropy_value_and_grad(logits, target, out=logits, num_threads=1, **options)
    assert np.array_equal(loss, again, equal_nan=True)
    assert np.array_equal(out, in_place, equal_nan=True)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("shape", "axis"), [((900, 1000, 10), -1), ((40, 7000, 2, 16), -1), ((6, 21, 300, 333), 1)]
)
@pytest.mark.parametrize("gap_axis", [1, 2])
def test_gradients_of_few_classes_between_gaps(backend, shape, axis, gap_axis):
    """Into a part of an array: rows that a gap divides go another way than those before and after it."""
    if not backend.startswith("cython"):
        pytest.skip("only the C rows take blocks of so many rows")
    rng = np.random.default_rng()
    logits = rng.standard_normal(shape, np.float32)
    target = rng.integers(0, shape[axis], np.delete(shape, axis))
    options = {"axis": axis, "reduction": "sum", "backend": backend}
    loss, expected = ll.cross_entropy_value_and_grad(logits, target, **options)
    whole = list(shape)
    whole[gap_axis] += 3
    memory = np.full(whole, 5, np.float32)
    out, gap = np.split(memory, [shape[gap_axis]], axis=gap_axis)
    assert ll.cross_entropy_value_and_grad(logits, target, out=out, **options)[0] == loss
    assert np.array_equal(out, expected)
    out[...] = logits
    ll.cross_entropy_value_and_grad(out, target, out=out, **options)
    assert np.array_equal(out, expected)
    assert (gap == 5).all()


@pytest.mark.parametrize(("n_classes", "n_beside"), [(130, 1500), (450, 1500), (130, 22000)])
def test_images_of_many_classes(backend, dtype, n_classes, n_beside):
    """Blocks of pixels that no tile holds, some across images: each row right, in place too."""
    if not backend.startswith(("cython", "numba")):
        pytest.skip("only the processor's kernels have tiles of so many rows")
    rng = np.random.default_rng()
    logits = (4 * rng.standard_normal((3, n_classes, n_beside), np.float32)).astype(dtype)
    target = rng.integers(0, n_classes, (3, n_beside))
    logits[0, 3, 5], logits[1, :, 7], logits[2, :, 9] = np.nan, -np.inf, logits[2, :, 9] + 300
    target[0, 6] = -100
    some = np.concatenate([[5, 6, n_beside + 7, 2 * n_beside + 9], rng.integers(0, 3 * n_beside, 60)])
    rows, labels = np.moveaxis(logits, 1, -1).reshape(-1, n_classes)[some], target.ravel()[some]
    options = {"axis": 1, "backend": backend}
    calls = {
        "entropy": lambda x, out: ll.entropy(x, reduction="none", **options),
        "softmax": lambda x, out: ll.softmax(x, out=out, **options),
        "log_softmax": lambda x, out: ll.log_softmax(x, out=out, **options),
        "gradient": lambda x, out: ll.cross_entropy_grad(x, target, reduction="none", out=out, **options),
    }
    with np.errstate(invalid="ignore"):
        loss, gradient = oracle.cross_entropy(rows, labels)
        expected = {name: getattr(oracle, name)(rows) for name in list(calls)[:3]} | {"gradient": gradient}
    assert_exact(ll.cross_entropy(logits, target, reduction="none", **options).ravel()[some], loss)
    for name, call in calls.items():
        found = call(logits, np.full_like(logits, 7))
        if name == "entropy":
            assert_exact(found.ravel()[some], expected[name])
            continue
        assert_exact(np.moveaxis(found, 1, -1).reshape(-1, n_classes)[some], expected[name])
        in_place = logits.copy()
        call(in_place, in_place)
        assert np.array_equal(found, in_place, equal_nan=True), name


@pytest.mark.parametrize("levels", [(-1e9, 0), (-32775, -32765), (32760, 32780), (-3e5, 3e5), (-np.inf, 4e4)])
def test_rows_that_rise_between_ranges_of_classes(backend, dtype, levels):
    """Of rows side by side no tile holds all classes, and what was summed first is brought along."""
    if backend == "cuda":
        pytest.skip("too many classes for the simulator")
    if dtype == np.float16 and levels[1] > 65504:
        pytest.skip("float16 ends at 65504")
    rng = np.random.default_rng()
    rows = rng.standard_normal((256, 450)).astype(np.float64)
    rows[:, :410] += levels[0]
    rows[:, 410:] += levels[1]
    with np.errstate(over="ignore"):  # -1e9 is -inf to float16
        logits, target = np.asfortranarray(rows.astype(dtype)), rng.integers(0, 450, 256)
    some = rng.integers(0, 256, 8)
    with np.errstate(invalid="ignore"):
        loss, gradient = oracle.cross_entropy(logits[some], target[some])
        softmax = oracle.softmax(logits[some])
    assert_exact(ll.cross_entropy(logits, target, reduction="none", backend=backend)[some], loss)
    found = ll.cross_entropy_grad(logits, target, reduction="none", backend=backend)
    assert_exact(found[some], gradient)
    assert_exact(ll.softmax(logits, backend=backend)[some], softmax)


@pytest.mark.parametrize("layout", ["contiguous", "every_second_class"])
def test_few_rows_longer_than_a_thread_takes(backend, dtype, layout):
    """Their parts are shared among the threads: the same bits for any number of them, and the right mean."""
    logits, target = batch((2, 2**18 + 77), dtype)
    logits = LAYOUTS[layout](logits)
    options = {"backend": backend, "label_smoothing": 0.1}
    value, grad = ll.cross_entropy_value_and_grad(logits, target, num_threads=1, **options)
    expected = oracle.cross_entropy(logits, target, label_smoothing=0.1)[0].value
    assert value == pytest.approx(float(np.mean(expected)), rel=1e-6)
    for threads in (2, 3):
        again = ll.cross_entropy_value_and_grad(logits, target, num_threads=threads, **options)
        assert again[0] == value
        assert np.array_equal(again[1], grad)


@pytest.mark.sanitize
@pytest.mark.parametrize("n_classes", [22000, 90000])
def test_few_rows_whose_classes_threads_share(backend, dtype, n_classes):
    """Rows side by side go to the threads by class: the same bits for any number of them, each row right."""
    if not backend.startswith("cython"):
        pytest.skip("only the C rows go to threads by class")
    n_rows = 96
    rng = np.random.default_rng()
    logits = (4 * rng.standard_normal((n_rows, n_classes), np.float32)).astype(dtype)
    target = rng.integers(0, n_classes, n_rows)
    if n_classes == 22000:  # which not all rows' first sums tell
        logits[3, 5], logits[4, -1], logits[5], logits[6, 1:] = np.nan, np.inf, -np.inf, -np.inf
        logits[7, 900] += 40
    target[7], target[9], target[10] = 900, -100, n_classes - 1
    logits = np.asfortranarray(logits)
    some = [0, 3, 4, 5, 6, 7, 8, 9, 10, n_rows - 1]
    calls = {
        "softmax": lambda out, **options: ll.softmax(logits, axis=1, out=out, **options),
        "log_softmax": lambda out, **options: ll.log_softmax(logits, axis=1, out=out, **options),
        "logsumexp": lambda _, **options: ll.logsumexp(logits, axis=1, **options),
    }
    found = []
    for threads in (1, 2, 3):
        options = {"num_threads": threads, "backend": backend}
        out = np.full_like(logits, 7)
        ours = list(ll.cross_entropy_value_and_grad(logits, target, reduction="none", out=out, **options))
        ours += [call(np.full_like(logits, 7), **options) for call in calls.values()]
        in_place = logits.copy(order="F")
        assert np.array_equal(ll.softmax(in_place, axis=1, out=in_place, **options), ours[2], equal_nan=True)
        found.append(ours)
    with np.errstate(invalid="ignore"):
        expected = [*oracle.cross_entropy(logits[some], target[some])]
        expected += [getattr(oracle, name)(logits[some]) for name in calls]
    for i, wanted in enumerate(expected):
        assert_exact(found[0][i][some], wanted)
        assert np.array_equal(found[0][i], found[1][i], equal_nan=True)
        assert np.array_equal(found[0][i], found[2][i], equal_nan=True)
    target[11] = n_classes
    with pytest.raises(IndexError, match=rf"target\[11\] is {n_classes}, but"):
        ll.cross_entropy(logits, target, backend=backend)
