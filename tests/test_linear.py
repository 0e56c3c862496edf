"""Cross-entropy of a linear layer's logits, value and gradients, against extended precision."""

import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from cases import rng_for
from command import invoke
from ulp import Exact, assert_exact, exact, result_dtype

import logitloss as ll
from logitloss.evaluate import DtypeError, ShapeError, StateError, evaluate, evaluate_files
from logitloss.layer import TILE_CLASSES

IGNORED = -100
LAYERS = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"softcap": 2.5},
    "all": {"softcap": 1.5, "logit_scale": 2.0, "label_smoothing": 0.1, "z_loss": 0.01},
}


def layer(dtype, has_bias=True, rows=(3, 17), dimensions=12, n_classes=23):
    """Return hidden states, weight, target (some ignored) and bias."""
    rng = rng_for("linear", dtype.name, has_bias, rows)
    hidden = rng.standard_normal((*rows, dimensions)).astype(dtype)
    weight = rng.standard_normal((n_classes, dimensions)).astype(dtype)
    target = rng.integers(0, n_classes, rows)
    target[..., ::4] = IGNORED
    return hidden, weight, target, rng.standard_normal(n_classes).astype(dtype) if has_bias else None


def expected(
    hidden, weight, target, bias, upstream, softcap=None, logit_scale=1, label_smoothing=0, z_loss=0, w=None
):
    """Return losses, and the gradients of upstream times their sum, by definition."""
    rows, n_classes = target.shape, len(weight)
    h, a = exact(hidden).reshape(-1, weight.shape[1]), exact(weight)
    y, counts = target.reshape(-1), target.reshape(-1) != IGNORED
    cap = np.longdouble(softcap or np.inf)
    x = logit_scale * (h @ a.T + (0 if bias is None else exact(bias)))
    x = cap * np.tanh(x / cap) if softcap else x
    lse = np.log(np.exp(x).sum(axis=1, keepdims=True))
    w = np.ones(n_classes) if w is None else w
    g = np.tile(label_smoothing / n_classes * w.astype(np.longdouble), (len(y), 1))
    g[counts, y[counts]] += (1 - label_smoothing) * w[y[counts]]
    g[~counts] = 0
    loss = (g * (lse - x)).sum(axis=1) + z_loss * counts * lse[:, 0] ** 2
    p = np.exp(x - lse)
    slope = (g.sum(axis=1, keepdims=True) + 2 * z_loss * counts[:, None] * lse) * p - g
    slope *= upstream * logit_scale * (1 - (x / cap) ** 2)
    return loss.reshape(rows), (slope @ a).reshape(hidden.shape), slope.T @ h, slope.sum(axis=0)


def assert_close(actual, wanted, dtype):
    """Products in float32 or float64 round, and results of two bytes are rounded once more."""
    error = np.abs(exact(actual) - wanted).max() / np.abs(wanted).max()
    assert error < {"float64": 1e-13, "float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype.name]


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("options", LAYERS)
def test_value_and_gradients(backend, dtype, options, has_bias, blocks, monkeypatch):
    if blocks == "many":
        monkeypatch.setattr("logitloss.layer.TILE_CLASSES", 7)
        monkeypatch.setattr("logitloss.layer.TILE_BYTES", 3000)
        monkeypatch.setattr("logitloss.layer.BLOCK_BYTES", 0)
        monkeypatch.setattr("logitloss.layer.LEAST_ROWS", 10)
    arrays = layer(dtype, has_bias)
    kinds = {"sum": 1, "mean": 1 / np.count_nonzero(arrays[2] != IGNORED), "none": 1}
    for reduction, upstream in kinds.items():
        loss, *gradients = expected(*arrays, upstream, **LAYERS[options])
        wanted = loss if reduction == "none" else loss.sum() * upstream
        call = {**LAYERS[options], "reduction": reduction, "backend": backend}
        value = ll.linear_cross_entropy(*arrays, **call)
        same, *found = ll.linear_cross_entropy_value_and_grad(*arrays, **call)
        assert value.dtype == (result_dtype(dtype) if reduction == "none" else np.float64)
        assert_close(value, wanted, result_dtype(dtype))
        assert_close(same, wanted, result_dtype(dtype))
        for actual, gradient, array in zip(found, gradients, (*arrays[:2], arrays[3]), strict=True):
            if array is None:
                assert actual is None
            else:
                assert (actual.dtype, actual.shape) == (dtype, array.shape)
                assert_close(actual, gradient, dtype)


def test_class_weights():
    hidden, weight, target, bias = layer(np.dtype(np.float64))
    w = rng_for("class weights").random(len(weight))
    loss, *gradients = expected(hidden, weight, target, bias, 1, label_smoothing=0.2, w=w)
    divisor = w[target[target != IGNORED]].sum()
    found = ll.linear_cross_entropy_value_and_grad(
        hidden, weight, target, bias, class_weight=w, label_smoothing=0.2
    )
    for actual, wanted in zip(found, (loss.sum(), *gradients), strict=True):
        assert_close(actual, wanted / divisor, np.dtype(np.float64))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}])
def test_classes_that_a_bias_rules_out(backend, options, monkeypatch):
    """A whole tile of them, and single ones, of weight 0."""
    monkeypatch.setattr("logitloss.layer.TILE_CLASSES", 7)
    hidden, weight, target, bias = layer(np.dtype(np.float64))
    bias[7:14] = bias[20] = -np.inf
    w = np.where(bias == -np.inf, 0.0, 1.5)
    target[0, :6] = 1, 8, 20, 22, 3, 13
    options = {"reduction": "none", "backend": backend, **options}
    logits = ll.LinearLogits(hidden, weight, bias)[:]
    with np.errstate(invalid="ignore"):
        for class_weight in (None, w):
            wanted = ll.cross_entropy(logits, target, axis=-1, weight=class_weight, **options)
            found = ll.linear_cross_entropy(
                hidden, weight, target, bias, class_weight=class_weight, **options
            )
            np.testing.assert_allclose(found, wanted, rtol=1e-13)
    assert np.isinf(wanted).any() == np.isinf(found).any()


@pytest.mark.parametrize("tile", [7, 11])  # the last one of 11 has one class
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_tiles_come_to_what_the_logits_do(z_loss, tile, monkeypatch):
    """At extremes, of which some are in the label's tile, some in others."""
    monkeypatch.setattr("logitloss.layer.TILE_CLASSES", tile)
    rng, inf = rng_for("tiles"), np.inf
    x = rng.standard_normal((9, 23))
    target = np.array([3, 3, 3, 12, 12, 12, 0, 22, 5])
    x[0, 20], x[1, 3], x[2, 9] = inf, inf, np.nan
    x[3, 12] += 60  # far ahead in its tile
    x[4, :7] += 900  # another tile is far ahead
    x[5, :] = -inf
    x[6, 7:] = -inf
    x[7, 14:21] = -inf
    x[8, 0] = 800.0

    def fill(self, out, states, weight, tile):
        out[...] = x[states[:, 0].astype(int), tile]

    monkeypatch.setattr(ll.LinearLogits, "fill", fill)
    rows, common = np.arange(9.0)[:, None], {"reduction": "none", "z_loss": z_loss}
    weight = rng.uniform(0.5, 2, 23)
    others = weight * np.where(np.arange(23) % 2, -1, 1)
    for options in ({}, {"weight": weight}, {"weight": others}, {"weight": others, "label_smoothing": 0.1}):
        wanted = ll.cross_entropy(x, target, **options, **common)
        options["class_weight"] = options.pop("weight", None)
        found = ll.linear_cross_entropy(rows, np.zeros((23, 1)), target, **options, **common)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shift", [0.0, -1e4, 1e12, -3e38])
def test_a_value_keeps_its_precision_at_any_shift(dtype, shift, label_smoothing):
    """Over several tiles; logits are what the bias says, and one is 20 ahead where that shows."""
    n_classes = 2 * TILE_CLASSES + 1
    bias = (rng_for("shift").standard_normal(n_classes) + shift).astype(result_dtype(dtype))
    target = np.array([0, 7000, n_classes - 1])
    bias[7000] += 20
    layer = np.zeros((3, 1), dtype), np.zeros((n_classes, 1), dtype), target, bias
    options = {"label_smoothing": label_smoothing, "reduction": "none"}
    x = exact(bias)
    top = x.argmax()
    cost = (x[top] - x) + np.log1p(np.exp(np.delete(x, top) - x[top]).sum())
    wanted = (1 - label_smoothing) * cost[target] + label_smoothing * cost.mean()
    rounding = np.maximum(-np.log(wanted), 0)
    assert_exact(ll.linear_cross_entropy(*layer, **options), Exact(wanted, wanted, rounding))


def test_mixed_dtypes_are_computed_in_float32():
    hidden, weight, target, _ = layer(np.dtype(np.float64), has_bias=False)
    arrays = hidden, weight.astype(np.float32), target
    value, grad_hidden, grad_weight, grad_bias = ll.linear_cross_entropy_value_and_grad(*arrays)
    assert (grad_hidden.dtype, grad_weight.dtype, grad_bias) == (np.float64, np.float32, None)
    loss, *_ = expected(*arrays, None, 1)
    assert_close(value, loss.sum() / np.count_nonzero(target != IGNORED), np.dtype(np.float32))
    assert ll.linear_cross_entropy(*arrays, reduction="none").dtype == np.float32


def test_errors_of_numbers_and_outputs():
    hidden, weight, target, _ = layer(np.dtype(np.float32), rows=(23,))
    for option, value in (("softcap", 1e39), ("logit_scale", -1e39)):
        with pytest.raises(ValueError, match=rf"{option} comes to -?1e\+39: expected what float32 can hold"):
            ll.linear_cross_entropy(hidden, weight, target, **{option: value})
    message = r"^softcap is 1e-50, and logit_scale / softcap comes to 1e\+50: expected what float32 can hold"
    with pytest.raises(ValueError, match=message):
        ll.linear_cross_entropy(hidden, weight, target, softcap=1e-50)
    class_weight = np.ones(23)
    arrays = hidden.astype(np.float64), weight.astype(np.float64), target
    with pytest.raises(ValueError, match="out shares memory with an input"):
        ll.linear_cross_entropy(*arrays, class_weight=class_weight, reduction="none", out=class_weight)
    assert class_weight.all()


def test_one_row_and_no_rows():
    hidden, weight, target, bias = layer(np.dtype(np.float64))
    one = ll.linear_cross_entropy(hidden[0, 1], weight, target[0, 1], bias, reduction="none")
    assert one.shape == ()
    assert one == pytest.approx(float(expected(hidden, weight, target, bias, 1)[0][0, 1]), rel=1e-13)
    value, grad, *_ = ll.linear_cross_entropy_value_and_grad(hidden[0, 1], weight, target[0, 1], bias)
    assert value == one
    assert grad.shape == (12,)
    for rows in (hidden[:0], np.zeros((2, 0, 12))):
        empty = target[:0] if len(rows) == 0 else np.zeros((2, 0), int)
        value, *gradients = ll.linear_cross_entropy_value_and_grad(rows, weight, empty, bias)
        assert np.isnan(value)
        assert gradients[0].shape == rows.shape
        assert not gradients[1].any()
        assert ll.linear_cross_entropy(rows, weight, empty, reduction="sum") == 0


def test_ignored_rows_may_hold_anything():
    hidden, weight, target, bias = layer(np.dtype(np.float32))
    wanted = ll.linear_cross_entropy_value_and_grad(hidden, weight, target, bias)
    spoilt = np.where(target[..., None] == IGNORED, np.nan, hidden)
    found = ll.linear_cross_entropy_value_and_grad(spoilt.astype(np.float32), weight, target, bias)
    for actual, array in zip(found, wanted, strict=True):
        assert np.array_equal(actual, array)
    assert not found[1][target == IGNORED].any()


def test_out_takes_the_losses():
    hidden, weight, target, bias = layer(np.dtype(np.float32))
    out = np.full(target.shape[::-1], np.nan, np.float32).T
    result = ll.linear_cross_entropy(hidden, weight, target, bias, reduction="none", out=out)
    assert result is out
    assert np.array_equal(out, ll.linear_cross_entropy(hidden, weight, target, bias, reduction="none"))


def test_memory_stays_bounded():
    n_classes, n_rows = 50_257, 1024
    rng = rng_for("memory")
    hidden = rng.standard_normal((n_rows, 16), np.float32)
    weight = rng.standard_normal((n_classes, 16), np.float32)
    target = rng.integers(0, n_classes, n_rows)
    own = hidden.nbytes + weight.nbytes
    for call, bound in (
        (ll.linear_cross_entropy, 64e6),
        (ll.linear_cross_entropy_value_and_grad, 128e6 + own),
    ):
        call(hidden[:1], weight, target[:1])
        tracemalloc.start()
        call(hidden, weight, target)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_rows * n_classes * 4 > 2e8 > bound > peak


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": np.zeros((2, 5))}, ValueError, r"hidden of shape \(2, 5\): expected \(..., 3\)"),
        ({"hidden": np.zeros((2, 3), int)}, TypeError, "hidden of dtype int64"),
        ({"weight": np.zeros(3)}, ValueError, r"weight of shape \(3,\): expected \(classes, dimensions\)"),
        ({"weight": np.zeros((0, 3))}, ValueError, "expected"),
        ({"bias": np.zeros(3)}, ValueError, r"bias of shape \(3,\): expected one number per class"),
        ({"target": np.zeros(3, int)}, ValueError, r"target of shape \(3,\): expected \(2,\)"),
        ({"target": np.zeros((2, 4))}, TypeError, "target of dtype float64: expected integers"),
        ({"target": [0, 4]}, IndexError, r"target\[1\] is 4, but logits have 4 classes"),
        ({"class_weight": [1.0]}, ValueError, r"class_weight of shape \(1,\)"),
        ({"softcap": 0}, ValueError, "softcap is 0.0: expected softcap > 0"),
        ({"logit_scale": np.inf}, ValueError, "logit_scale is inf: expected a finite number"),
        ({"label_smoothing": 2}, ValueError, "label_smoothing is 2.0"),
        ({"reduction": "all"}, ValueError, "reduction is 'all'"),
    ],
)
def test_errors(changes, error, message):
    arguments = {"hidden": np.zeros((2, 3)), "weight": np.zeros((4, 3)), "target": [0, 1]} | changes
    for call in (ll.linear_cross_entropy, ll.linear_cross_entropy_value_and_grad):
        with pytest.raises(error, match=message):
            call(**arguments)


# ---- evaluations of hidden states ----


def evaluated(arrays, **options):
    hidden, weight, target, bias = arrays
    logits = ll.LinearLogits(hidden, weight, bias, softcap=2.5, logit_scale=0.5)
    return evaluate(logits, target, backend="reference", **options)


def test_logits_are_made_when_asked_for():
    hidden, weight, _, bias = layer(np.dtype(np.float64))
    logits = ll.LinearLogits(hidden, weight, bias, softcap=2.5, logit_scale=0.5)
    assert (logits.shape, logits.ndim, logits.dtype) == ((3, 17, 23), 3, np.float64)
    wanted = 2.5 * np.tanh(0.5 * (hidden @ weight.T + bias) / 2.5)
    for rows in (np.s_[1], np.s_[:, 2:9], np.s_[2, 3], np.s_[0:0]):
        assert logits[rows].shape == wanted[rows].shape
        np.testing.assert_allclose(logits[rows], wanted[rows], rtol=1e-13)


def test_hidden_states_evaluate_like_their_logits(dtype, tmp_path):
    arrays = layer(dtype)
    hidden, weight, target, bias = arrays
    loss, *_ = expected(*arrays, 1, softcap=2.5, logit_scale=0.5)
    for chunk_rows in (None, 4):
        found = evaluated(arrays, chunk_rows=chunk_rows)
        assert (found.count, found.ignored) == ((target != IGNORED).sum(), (target == IGNORED).sum())
        tolerance = 1e-13 if dtype == np.float64 else 1e-6
        assert found.compute().nll_nats == pytest.approx(float(loss.sum() / found.count), rel=tolerance)
        wide = exact(hidden) @ exact(weight).T + exact(bias)
        assert found.correct == (wide.argmax(axis=-1) == target).sum()
    state_file = tmp_path / "state.json"
    assert evaluated(arrays, state_file=state_file) == evaluated(arrays)
    with pytest.raises(StateError, match="with logits"):
        evaluated((hidden, weight + weight, target, bias), state_file=state_file)


def test_padding_of_hidden_states_may_hold_anything():
    """Without a warning of what comes of it."""
    hidden, weight, target, bias = layer(np.dtype(np.float32))
    wanted = evaluated((hidden, weight, target, bias))
    hidden = np.where((target == IGNORED)[..., None], np.float32(np.inf), hidden)
    assert np.isinf(hidden).any()
    assert evaluated((hidden, weight, target, bias)) == wanted


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "bce"}, ShapeError, "loss: is 'bce', but the logits of hidden states are those of classes"),
        ({"axis": 0}, ShapeError, "axis: is 0"),
        ({"dtype": "f64"}, DtypeError, "dtype: is f64"),
        ({"target": np.zeros(3, int)}, ShapeError, r"target: of shape \(3,\), but hidden .* need \(3, 17\)"),
        ({"target": np.zeros((3, 17))}, DtypeError, "target: of type float64, expected integers"),
    ],
)
def test_errors_of_evaluations(options, error, message):
    hidden, weight, target, _ = layer(np.dtype(np.float32))
    with pytest.raises(error, match=message):
        evaluate(ll.LinearLogits(hidden, weight), **{"target": target} | options)


@pytest.fixture
def files(tmp_path):
    arrays = layer(np.dtype(np.float32))
    names = {}
    for name, array in zip(("hidden", "unembedding", "labels", "bias"), arrays, strict=True):
        names[name] = str(tmp_path / f"{name}.npy")
        np.save(names[name], array)
    return names


def command(*arguments):
    return invoke("eval", *arguments, "--backend", "reference")


def test_the_command_takes_hidden_states(files):
    layer_options = [f"--{name}={files[name]}" for name in ("hidden", "unembedding", "bias")]
    shape_options = ["--softcap=2.5", "--logit-scale=0.5"]
    result = command(files["labels"], *layer_options, *shape_options, "--json")
    assert result.exit_code == 0, result.output
    wanted = evaluated(layer(np.dtype(np.float32))).compute()
    found = json.loads(result.stdout)
    assert (found["nll_nats"], found["accuracy"]) == (wanted.nll_nats, wanted.accuracy)
    assert (found["logits"], found["target"]) == (files["hidden"], files["labels"])


def test_a_type_widens_hidden_states_or_is_refused(files):
    arrays = layer(np.dtype(np.float32))
    hidden, weight, target, bias = arrays
    paths = {"unembedding_path": files["unembedding"], "bias_path": files["bias"]}
    wide = evaluate_files(files["hidden"], files["labels"], dtype="f64", backend="reference", **paths)
    exact_logits = hidden.astype(np.float64) @ weight.astype(np.float64).T + bias
    wanted = evaluate(exact_logits, target, axis=-1, backend="reference").compute()
    assert wide.state.compute().nll_nats == pytest.approx(wanted.nll_nats, rel=1e-14)
    with pytest.raises(DtypeError, match=r"hidden.npy: of type float32, and --dtype bf16 would lose digits"):
        evaluate_files(files["hidden"], files["labels"], dtype="bf16", **paths)
    np.save(files["unembedding"], weight.astype(ml_dtypes.bfloat16).view(np.uint16))
    found = evaluate_files(files["hidden"], files["labels"], dtype="bf16", backend="reference", **paths)
    weight = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    wanted = evaluate(hidden @ weight.T + bias, target, axis=-1, backend="reference").compute()
    assert found.state.compute().nll_nats == pytest.approx(wanted.nll_nats, rel=1e-6)


def test_errors_of_the_command(files):
    hidden, weight, labels = files["hidden"], files["unembedding"], files["labels"]
    for arguments, code, message in (
        ([labels, "--hidden", hidden], 2, "--hidden and --unembedding go together"),
        ([labels, "--unembedding", weight], 2, "--hidden and --unembedding go together"),
        ([hidden, labels, "--softcap", 3], 2, "--softcap and --logit-scale are for --hidden"),
        ([labels], 2, "expected LOGITS and TARGETS; 1 files are given"),
        ([hidden, labels, "--hidden", hidden, "--unembedding", weight], 2, "expected TARGETS alone"),
        (
            [labels, "--hidden", hidden, "--unembedding", hidden],
            1,
            f"{hidden}: of shape (3, 17, 12): expected (classes, dimensions)",
        ),
        (
            [labels, "--hidden", labels, "--unembedding", weight],
            1,
            f"{labels}: of type int64, expected one of f8_e4m3, f8_e5m2, bf16, f16, f32, f64",
        ),
        ([labels, "--hidden", hidden, "--unembedding", weight, "--bias", weight], 1, f"{weight}: of shape"),
        (
            [labels, "--hidden", hidden, "--unembedding", weight, "--logit-scale", "inf"],
            1,
            "logit_scale: is inf: expected a finite number",
        ),
    ):
        result = command(*arguments)
        assert result.exit_code == code, result.output
        assert message in result.output


def test_gradient_of_a_bias_of_many_rows():
    n = 300_000
    rng = rng_for("bias")
    hidden, weight = rng.standard_normal((n, 1), np.float32) / 10, np.full((2, 1), 0.1, np.float32)
    bias, target = np.array([-1, 1], np.float32), (np.arange(n) % 10 == 0).astype(int)
    found = ll.linear_cross_entropy_value_and_grad(hidden, weight, target, bias)[3]
    logits = hidden.astype(float) @ weight.T + bias
    wanted = ll.cross_entropy_grad(logits, target).sum(axis=0)
    np.testing.assert_allclose(found, wanted, rtol=2e-6)


@pytest.mark.parametrize("size", [1e-30, 1e30, 1e38])
def test_a_mean_is_that_of_weights_of_any_size(size):
    rng = rng_for("heavy")
    hidden, weight = rng.standard_normal((9, 4), np.float32), rng.standard_normal((5, 4), np.float32)
    target, classes = np.arange(9) % 5, np.linspace(0.5, 2, 5)
    found, wanted = (
        ll.linear_cross_entropy_value_and_grad(hidden, weight, target, class_weight=classes * by)
        for by in (size, 1)
    )
    for one, other in zip(found[:3], wanted[:3], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
    total, of_ones = (
        ll.linear_cross_entropy(hidden, weight, target, class_weight=classes * by, reduction="sum")
        for by in (size, 1)
    )
    assert total == pytest.approx(size * of_ones, rel=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(("n_rows", "n_dimensions"), [(60_000, 512), (2_000_000, 2)])
def test_memory_of_few_classes_stays_bounded(gradients, n_rows, n_dimensions):
    """Hidden states are copied, and labels looked at, a block at a time."""
    hidden, weight = np.ones((n_rows, n_dimensions), np.float16), np.ones((4, n_dimensions), np.float16)
    target = np.zeros((2, n_rows // 2), int).T
    target[::3, 0] = IGNORED
    function = ll.linear_cross_entropy_value_and_grad if gradients else ll.linear_cross_entropy
    tracemalloc.start()
    function(hidden.reshape(*target.shape, n_dimensions), weight, target, logit_scale=0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6 + gradients * hidden.nbytes


def test_gradients_of_a_weight_near_0():
    """By which the mean divides: the scale is more than float32 holds."""
    rng = rng_for("light")
    hidden, weight = rng.standard_normal((6, 4), np.float32), rng.standard_normal((5, 4), np.float32)
    options = {"class_weight": [1e-45, 1, 1, 1, 1]}
    _, grad_hidden, grad_weight, _ = ll.linear_cross_entropy_value_and_grad(
        hidden, weight, np.zeros(6, int), **options
    )
    slopes = ll.cross_entropy_grad(hidden @ weight.T, np.zeros(6, int), weight=options["class_weight"])
    assert np.abs(slopes).max() > 0.1
    np.testing.assert_allclose(grad_hidden, slopes @ weight, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad_weight, slopes.T @ hidden, rtol=1e-5, atol=1e-7)


def test_logits_are_indexed_by_rows_alone():
    logits = ll.LinearLogits(np.eye(3), np.arange(9.0).reshape(3, 3) * [[1], [2], [3]])
    assert np.array_equal(logits[..., 1], logits[:][1])
    for index in (np.s_[:, 0], np.s_[0, 1]):
        with pytest.raises(IndexError, match="too many indices"):
            logits[index]
    assert (
        ll.LinearLogits(np.zeros((3, 0)), np.zeros((4, 0)), np.arange(4.0))[:].tolist() == [[0, 1, 2, 3]] * 3
    )
