"""Losses of yes or no against the oracle: with logits, on probabilities, and the logistic loss.

The logits run from -100 to 100 and through the values where a form of the loss breaks: 37 (where
`1 + exp(-x)` is 1 in float64), 88 and 104 (float32's exponential ends), 232.8, 745, 1000 and 1e20.
"""

import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import batch, frozen, probabilities, unfilled
from ulp import assert_exact, exact, result_dtype

import logitloss as ll

TARGETS = ["bool", "uint8", "int64", "float16", "float32", "float64"]
EDGES = [0, 1e-30, 1e-5, 0.5, 1, 16, 17, 37, 87, 88.5, 100, 103.5, 104, 232.8, 700, 745, 746, 1000, 6e4, 1e20]


def scores(dtype) -> np.ndarray:
    edges = np.array([edge for edge in EDGES if edge <= 6e4 or dtype != np.float16])
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    return frozen(
        np.concatenate([edges, -edges, [tiny, -tiny, 5 * tiny], np.linspace(-100, 100, 333)]).astype(dtype)
    )


@pytest.mark.parametrize("y", [0.0, 1.0, 0.5, 0.25, 0.9375])
def test_value_and_gradient(backend, dtype, y):
    logits = scores(dtype)
    target = np.full(logits.shape, y)
    value, gradient = oracle.bce_with_logits(logits, target)
    options = {"reduction": "none", "backend": backend}
    out = unfilled(logits.shape, dtype)
    loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, out=out, **options)
    assert grad is out
    assert_exact(loss, value)
    assert_exact(out, gradient)
    assert_exact(ll.binary_cross_entropy_with_logits_grad(logits, target, **options), gradient)
    out = unfilled(logits.shape, result_dtype(dtype))
    assert ll.binary_cross_entropy_with_logits(logits, target, out=out, **options) is out
    assert_exact(out, value)


@pytest.mark.parametrize("label", [-1, 1])
@pytest.mark.parametrize("label_dtype", ["int8", "int64", "float16", "float64"])
def test_logistic(backend, dtype, label, label_dtype):
    x = scores(dtype)
    target = np.full(x.shape, label, label_dtype)
    value, gradient = oracle.bce_with_logits(x, (target + 1) / 2)
    weight = np.float32(1.5)
    options = {"reduction": "none", "backend": backend}
    out = unfilled(x.shape, dtype)
    loss, _ = ll.logistic_loss_value_and_grad(x, target, out=out, **options)
    assert_exact(loss, value)
    assert_exact(out, gradient)
    assert_exact(ll.logistic_loss(x, target, **options), value)
    assert_exact(ll.logistic_loss_grad(x, target, **options), gradient)
    value, gradient = oracle.bce_with_logits(x, (target + 1) / 2, weight=weight)
    assert_exact(ll.logistic_loss(x, target, weight=weight, **options), value)
    assert_exact(ll.logistic_loss_grad(x, target, weight=weight, **options), gradient)


@pytest.mark.parametrize("target_dtype", TARGETS)
def test_target_dtypes(backend, dtype, target_dtype):
    logits, _ = batch((7, 37), dtype)
    target = probabilities((7, 37), np.dtype(np.float64))
    target = (target > 0.02 if np.dtype(target_dtype).kind in "bui" else 8 * target % 1).astype(target_dtype)
    value, gradient = oracle.bce_with_logits(logits, exact(target))
    options = {"reduction": "none", "backend": backend}
    loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


@pytest.mark.parametrize("shape", [(), (37,), (7, 1), (1, 37), (7, 37)], ids=str)
@pytest.mark.parametrize("weight_dtype", ["bfloat16", "int32", "float32", "float64"])
def test_weights_broadcast(backend, dtype, shape, weight_dtype):
    logits, _ = batch((7, 37), dtype)
    target = probabilities((7, 37), np.dtype(np.float32))
    size = int(np.prod(shape))
    weight = (1 + np.arange(size) % 5).reshape(shape).astype(weight_dtype)
    pos_weight = (1 + np.arange(size) % 3).reshape(shape).astype(weight_dtype)
    both = {"weight": weight, "pos_weight": pos_weight}
    for weights in ({"weight": weight}, {"pos_weight": pos_weight}, both):
        value, gradient = oracle.bce_with_logits(
            logits, target, label_smoothing=0.1, **{name: exact(array) for name, array in weights.items()}
        )
        options = {**weights, "label_smoothing": 0.1, "reduction": "none", "backend": backend}
        loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
        assert_exact(loss, value)
        assert_exact(grad, gradient)


@pytest.mark.parametrize("smoothing", [0.1, 0.01, 1e-3, 1e-6, 1.0])
@pytest.mark.parametrize("label", [0, 1])
def test_smoothing_of_labels(backend, dtype, label, smoothing):
    """What is left of the other class, smoothing/2, is no difference of rounded numbers."""
    logits = scores(dtype)
    target = np.full(logits.shape, label)
    value, gradient = oracle.bce_with_logits(logits, target, label_smoothing=smoothing)
    options = {"label_smoothing": smoothing, "reduction": "none", "backend": backend}
    loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


def test_float64_targets_of_narrow_logits(backend, dtype):
    """A target is taken as given: 1 - y of what float32 makes of 0.999 would be another number."""
    logits = scores(dtype)
    p = np.linspace(0, 1, 211).astype(dtype)
    for y in (0.9, 0.99, 0.999, 1 - 1e-9, 1e-9):
        loss = ll.binary_cross_entropy(p, np.full(p.shape, y), reduction="none", backend=backend)
        assert_exact(loss, oracle.binary_cross_entropy(p, np.full(p.shape, y)))
        target = np.full(logits.shape, y)
        value, gradient = oracle.bce_with_logits(logits, target)
        options = {"reduction": "none", "backend": backend}
        loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
        assert_exact(loss, value)
        assert_exact(grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(backend, dtype, reduction):
    """The mean divides by the number of elements, never by weights."""
    logits, _ = batch((7, 37), dtype)
    target, weight = np.arange(7 * 37).reshape(7, 37) % 2, np.linspace(0, 3, 37)
    count = np.longdouble(7 * 37 if reduction == "mean" else 1)
    value, gradient = oracle.bce_with_logits(logits, target, weight=weight, scale=1 / count)
    options = {"weight": weight, "reduction": reduction, "backend": backend}
    total, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    expected = oracle.reduced(value, count)
    assert_exact(total, expected, dtype=dtype)
    assert_exact(grad, gradient)
    assert_exact(ll.binary_cross_entropy_with_logits(logits, target, **options), expected, dtype=dtype)
    assert_exact(ll.logistic_loss(logits, 2 * target - 1, **options), expected, dtype=dtype)
    assert_exact(ll.logistic_loss_value_and_grad(logits, 2 * target - 1, **options)[1], gradient)


TOTALS = {
    "equal": lambda n: np.full(n, 0.3),
    "tiny": lambda n: np.full(n, -30.0),
    "subnormal": lambda n: -90.0 - np.arange(n) % 14,
    "mixed": lambda n: 40 * np.sin(np.arange(n)),
    "one of many": lambda n: np.where(np.arange(n) == 3333, 2.0, -60.0),
    "huge": lambda n: np.full(n, 6e4),
    "overflowing": lambda n: np.full(n, 1e38),
    "infinite but right": lambda n: np.where(np.arange(n) % 7 == 0, -np.inf, np.cos(np.arange(n))),
    "infinite and wrong": lambda n: np.where(np.arange(n) == 4444, np.inf, 1.0),
    "a NaN": lambda n: np.where(np.arange(n) == 4444, np.nan, 1.0),
}


@pytest.mark.parametrize("weights", [{}, {"pos_weight": 2.5}, {"weight": 0.5, "pos_weight": 3.0}], ids=str)
@pytest.mark.parametrize("case", TOTALS)
@pytest.mark.parametrize("target_dtype", ["bool", "uint8", "int64", "float32"])
def test_totals_of_many(backend, dtype, case, target_dtype, weights):
    """A total over some blocks and a rest is as good as its losses, tiny, huge or both."""
    n = 5003
    x, target = TOTALS[case](n), np.zeros(n, target_dtype)
    if dtype == np.float16:
        x = np.where(np.isfinite(x), np.minimum(x, 6e4), x)
    x[::2], target[::2] = -x[::2], 1
    logits = frozen(x.astype(dtype))
    value, gradient = oracle.bce_with_logits(logits, exact(target), **weights)
    expected = oracle.reduced(value)
    options = {**weights, "reduction": "sum", "backend": backend}
    total, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    assert_exact(ll.binary_cross_entropy_with_logits(logits, target, **options), expected, dtype=dtype)
    assert_exact(total, expected, dtype=dtype)
    assert_exact(grad, gradient)
    in_place = logits.copy()
    ll.binary_cross_entropy_with_logits_value_and_grad(in_place, target, out=in_place, **options)
    assert in_place.tobytes() == grad.tobytes()


@pytest.mark.parametrize(("x", "gap"), [(100, 0), (50, 1e-3), (30, 0.01), (1, 0.25), (-90, 1 - 1e-3)])
@pytest.mark.parametrize("target_dtype", ["float32", "float64"])
def test_totals_of_soft_labels(backend, dtype, x, gap, target_dtype):
    """What is left of a logit beside a label near its side"""
    logits = np.full(5003, x, dtype)
    label = 1 - gap if gap else np.nextafter(np.ones((), target_dtype), 0)
    target = np.full(5003, label, target_dtype)
    expected = oracle.reduced(oracle.bce_with_logits(logits, exact(target))[0])
    options = {"reduction": "sum", "backend": backend}
    assert_exact(ll.binary_cross_entropy_with_logits(logits, target, **options), expected, dtype=dtype)
    total, _ = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    assert_exact(total, expected, dtype=dtype)


@pytest.mark.parametrize(("upstream", "weight"), [(1e-50, 1e20), (1e-43, 1e20), (1e40, 1e-20), (-1e60, 0)])
def test_upstream_gradients_beyond_float32(backend, dtype, upstream, weight):
    x, target = np.array([[0.3, -2], [50, 1000]], dtype), np.array([[1, 0], [1, 1]])
    if dtype == np.float16 and upstream > 1:
        pytest.skip("float16 holds no entry of an ordinary scale here")
    if backend == "cuda" and dtype != np.float64:
        pytest.skip("on a device the scale of elements is a float32")
    expected = oracle.bce_with_logits(x, target, weight=weight, scale=np.longdouble(upstream))[1]
    options = {"weight": weight, "reduction": "sum", "backend": backend}
    assert_exact(ll.binary_cross_entropy_with_logits_grad(x, target, upstream, **options), expected)
    options["reduction"], upstreams = "none", np.full((2, 2), upstream)
    assert_exact(ll.binary_cross_entropy_with_logits_grad(x, target, upstreams, **options), expected)


def test_a_tiny_weight_of_the_positive(backend):
    x, target = np.array([0.3, -2] * 64, np.float32), np.ones(128, np.float32)
    expected = oracle.bce_with_logits(x, target, pos_weight=1e-28, scale=np.longdouble(1e-6))[1]
    options = {"pos_weight": 1e-28, "reduction": "sum", "backend": backend}
    assert_exact(ll.binary_cross_entropy_with_logits_grad(x, target, 1e-6, **options), expected)


def test_a_negative_weight_of_the_positive(backend):
    x, target = np.full(64, 95, np.float32), np.ones(64, np.float32)
    expected = oracle.reduced(oracle.bce_with_logits(x, target, pos_weight=-1e10)[0])
    options = {"pos_weight": -1e10, "reduction": "sum", "backend": backend}
    assert_exact(ll.binary_cross_entropy_with_logits(x, target, **options), expected, dtype=np.float32)


def test_gradient_over_large_logits(backend):
    """Too large for the cache, over the logits, and with blocks whose total is no plain sum."""
    n = 2**23
    logits = np.resize(np.cos(np.arange(9973, dtype=np.float32)), n)
    logits[::4099], target = -np.inf, np.zeros(n, np.uint8)
    logits[[5, -5]], target[[5, -5]] = np.inf, 1
    options = {"reduction": "sum", "backend": backend}
    total, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    assert total == pytest.approx(ll.binary_cross_entropy_with_logits(logits, target, **options))
    in_place = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, out=logits, **options)
    assert in_place[0] == total
    assert logits.tobytes() == grad.tobytes()


def test_operands_of_any_stride(backend, dtype):
    """Every operand strided, reversed, broadcast or of bytes gives the same bits as a plain copy of it."""
    rng = np.random.default_rng(5)
    wide = rng.normal(0, 4, (90, 2 * 61)).astype(dtype)
    bits = rng.random((90, 2 * 61)) < 0.4
    raw = np.where(bits, 3, 0).astype(np.uint8)  # as bool every byte but 0 is true
    column, row = rng.random((90, 1)), rng.random(61).astype(np.float32)
    cut = np.s_[::-1, ::2]
    for target in (
        bits[cut],
        bits[cut].astype(np.uint8),
        raw.view(bool)[cut],
        np.broadcast_to(np.uint8(1), (90, 61)),
    ):
        for weights in ({}, {"weight": column}, {"pos_weight": row}, {"weight": row, "pos_weight": column}):
            plain = {name: np.broadcast_to(array, (90, 61)).copy() for name, array in weights.items()}
            copies = wide[cut].copy(), np.where(target.copy(), 1, 0).astype(np.float32)
            for reduction in ("none", "mean"):
                options = {"reduction": reduction, "backend": backend}
                function = ll.binary_cross_entropy_with_logits_value_and_grad
                found = function(wide[cut], target, **weights, **options)
                expected = function(*copies, **plain, **options)
                for one, other in zip(found, expected, strict=True):
                    assert one.tobytes() == other.tobytes()
            contiguous = function(copies[0], np.ascontiguousarray(target), **plain, **options)
            assert contiguous[1].tobytes() == expected[1].tobytes()


@pytest.mark.parametrize(("kind", "soft"), [(np.uint8, 3), (np.float32, 0.25)])
def test_one_soft_target_among_hard_ones(backend, dtype, kind, soft):
    logits = batch((96, 32), dtype)[0].reshape(-1)
    target = (np.arange(logits.size) % 3 == 0).astype(kind)
    target[1500] = soft
    for weight in (1.0, 2.5):
        value, gradient = oracle.bce_with_logits(logits, target, pos_weight=weight)
        loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(
            logits, target, pos_weight=weight, reduction="sum", backend=backend
        )
        assert loss == pytest.approx(float(np.sum(value.value)), rel=1e-6)
        assert_exact(grad, gradient)


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "int8", "bool"])
def test_upstream_gradients_of_any_type(backend, dtype, name):
    logits, _ = batch((3, 5), dtype)
    target, upstream = np.ones((3, 5)), (np.arange(15).reshape(3, 5) % 4).astype(name)
    options = {"reduction": "none", "backend": backend}
    found = ll.binary_cross_entropy_with_logits_grad(logits, target, upstream, **options)
    assert_exact(found, oracle.bce_with_logits(logits, target, scale=upstream.astype(float))[1])


@pytest.mark.parametrize("towards", [0, 2, -2, np.nan])
def test_a_label_next_to_one_is_none(backend, dtype, towards):
    labels = np.ones(100, np.float64 if dtype == np.float64 else np.float32)
    labels[3] = labels[90] = np.nextafter(labels[3], labels.dtype.type(towards))
    with pytest.raises(ValueError, match=rf"^target\[3\] is {labels[3]}"):
        ll.logistic_loss(np.zeros(100, dtype), labels, backend=backend)


def test_upstream_gradient(backend, dtype):
    logits, _ = batch((7, 37), dtype)
    target, upstream = np.arange(7 * 37).reshape(7, 37) % 2, np.linspace(-2, 2, 7 * 37).reshape(7, 37)
    _, gradient = oracle.bce_with_logits(logits, target, scale=upstream)
    functions = (ll.binary_cross_entropy_with_logits_grad, target), (ll.logistic_loss_grad, 2 * target - 1)
    for function, label in functions:
        options = {"reduction": "none", "backend": backend}
        assert_exact(function(logits, label, upstream, **options), gradient)
        half = oracle.bce_with_logits(logits, target, scale=0.5 / np.longdouble(7 * 37))[1]
        assert_exact(function(logits, label, 0.5, backend=backend), half)


@pytest.mark.parametrize(
    "options", [{}, {"pos_weight": 3.0}, {"weight": 0.5, "label_smoothing": 0.2}], ids=str
)
def test_gradient_is_the_slope_of_the_loss(backend, dtype, options):
    logits = np.linspace(-6, 6, 41).astype(dtype)
    target = np.linspace(0, 1, 41)
    options = {"reduction": "none", "backend": backend, **options}
    grad = ll.binary_cross_entropy_with_logits_grad(logits, target, **options)
    x, step = logits.astype(np.float64), 1e-5
    up, down = (ll.binary_cross_entropy_with_logits(x + s, target, **options) for s in (step, -step))
    tolerance = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-9}[dtype.name]
    expected = (up - down) / (2 * step)
    assert np.allclose(grad.astype(float), expected, rtol=tolerance, atol=1e-9 + tolerance / 10)


@pytest.mark.parametrize("y", [-0.5, 1.5, 3.0])
def test_targets_outside_zero_and_one_extrapolate(backend, dtype, y):
    logits = np.linspace(-20, 20, 81).astype(dtype)
    target = np.full(81, y)
    value, gradient = oracle.bce_with_logits(logits, target, pos_weight=2.0)
    options = {"pos_weight": 2.0, "reduction": "none", "backend": backend}
    loss, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    assert_exact(loss, value)
    assert_exact(grad, gradient)


def test_weight_zero_takes_infinite_logits_away(backend, dtype):
    logits = np.array([np.inf, -np.inf, np.inf, 2.0], dtype)
    target, weight = np.array([0, 1, 1, 1]), np.array([0, 0, 0, 1])
    options = {"weight": weight, "reduction": "sum", "backend": backend}
    value, grad = ll.binary_cross_entropy_with_logits_value_and_grad(logits, target, **options)
    assert value == pytest.approx(np.log1p(np.exp(-2.0)))
    assert grad[:3].astype(float).tolist() == [0, 0, 0]


@pytest.mark.parametrize("target_dtype", TARGETS)
def test_on_probabilities(backend, dtype, target_dtype):
    largest_below_one = 1 - float(ml_dtypes.finfo(dtype).epsneg)
    tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    p = np.concatenate([[0, 1, tiny, largest_below_one, 1e-7, 0.5], np.linspace(0, 1, 211)]).astype(dtype)
    weight = np.linspace(0.5, 2, p.size)
    for label in (0, 1) if np.dtype(target_dtype).kind in "bui" else (0, 0.25, 1):
        target = np.full(p.shape, label, target_dtype)
        out = unfilled(p.shape, result_dtype(dtype))
        options = {"weight": weight, "reduction": "none", "out": out, "backend": backend}
        assert ll.binary_cross_entropy(p, target, **options) is out
        expected = oracle.binary_cross_entropy(p, exact(target), weight=weight)
        assert_exact(out, expected)
        mean = ll.binary_cross_entropy(p, target, weight=weight, backend=backend)
        assert_exact(mean, oracle.reduced(expected, p.size), dtype=dtype)


def test_logs_of_probabilities_are_held_at_minus_100(backend, dtype):
    loss = ll.binary_cross_entropy(
        np.array([0, 1, 0, 1], dtype), [1, 0, 0, 1], reduction="none", backend=backend
    )
    assert loss.tolist() == [100, 100, 0, 0]


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [-1e-3, 1.0625, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threads", [1, 3])
def test_bad_probability_or_target_is_named(backend, dtype, bad, threads):
    good = np.full((7, 6), 0.5, dtype)
    options = {"num_threads": threads, "backend": backend}
    for position in (0, 9, 40):
        spoilt = good.copy()
        spoilt.reshape(-1)[position:] = bad
        where = rf"\[{position // 6}, {position % 6}\] is "
        with pytest.raises(ValueError, match=rf"^probabilities{where}.*: expected a number in \[0, 1\]$"):
            ll.binary_cross_entropy(spoilt, good, **options)
        with pytest.raises(ValueError, match=rf"^target{where}.*: expected a number in \[0, 1\]$"):
            ll.binary_cross_entropy(good, spoilt, **options)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bad_element_far_inside_is_the_first(backend, threads):
    """Past the first block and the first thread's share, with another one behind it."""
    size, first = 200_000, 150_001
    x, half = np.zeros(size, np.float32), np.full(size, 0.5, np.float32)
    signs, p = np.ones(size, np.int8), half.copy()
    signs[[first, -1]], p[[first, -1]] = 0, 2
    options = {"num_threads": threads, "backend": backend}
    with pytest.raises(ValueError, match=rf"^target\[{first}\] is 0: "):
        ll.logistic_loss(x, signs, **options)
    with pytest.raises(ValueError, match=rf"^probabilities\[{first}\] is 2.0: "):
        ll.binary_cross_entropy(p, half, **options)
    with pytest.raises(ValueError, match=rf"^target\[{first}\] is 2.0: "):
        ll.binary_cross_entropy(half, p, **options)


@pytest.mark.sanitize
@pytest.mark.parametrize("bad", [0, 2, -2, 0.5, np.nan])
def test_bad_logistic_label_leaves_scores_alone(backend, dtype, bad):
    x = batch((300, 1), dtype)[0][:, 0].copy()
    before = x.tobytes()
    for position in (0, 17, 299):
        target = np.ones(300)
        target[position] = bad
        message = rf"^target\[{position}\] is {float(bad)}: expected -1 or \+1$"
        for function in (ll.logistic_loss_grad, ll.logistic_loss_value_and_grad):
            with pytest.raises(ValueError, match=message):
                function(x, target, out=x, num_threads=2, backend=backend)
    assert x.tobytes() == before
