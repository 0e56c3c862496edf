"""Rows counted: bins by their definition, sums against exact ones, for any instruction set and threads."""

import math

import ml_dtypes
import numpy as np
import pytest
from cases import INTEGERS, rng_for

import logitloss
from logitloss._backends import ISAS, counter
from logitloss.evaluate.counts import LAYOUT, MOMENTS, N_LOGITS, N_PROBABILITIES, N_RANKS, count_rows
from logitloss.evaluate.errors import ShapeError
from logitloss.evaluate.histogram import LEAST, MOST
from logitloss.evaluate.ranking import LIMIT

pytestmark = pytest.mark.sanitize
FLOATS = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
# Some tiles, and blocks, and what is left
SIZES = (0, 1, 7, 511, 513, 1 << 14, 50_000)


@pytest.fixture(params=ISAS)
def isa(request):
    """Return the name of C rows that run here."""
    name = f"cython-{request.param}"
    if reason := logitloss.backends()[name]:
        pytest.skip(f"{name}: {reason}")
    return name


def rows(n, real=np.float32):
    """Return losses and figures of rows, of which some are ignored and some losses infinite."""
    rng = rng_for("counts", n)
    loss = rng.exponential(size=n) * 10.0 ** rng.integers(-9, 3, n)
    rank = np.where(rng.random(n) < 0.5, 1, rng.integers(1, 200, n))
    top = rng.random(n) ** np.where(rng.random(n) < 0.3, 1e-6, 1)
    figures = np.stack([rank, rng.integers(0, 200, n), top, 4 * rng.random(n), rng.random(n) * (1 - top)], 1)
    loss[::97] = np.inf
    loss[5::89], figures[5::89] = 0, 0
    return loss.astype(real), figures


def binary(n, logits_dtype=np.float32, labels_dtype=np.float32):
    """Return losses, logits and labels, of which those of -100 are ignored where the dtype has it."""
    rng = rng_for("binary counts", n)
    logits = (rng.standard_normal(n) * 10.0 ** rng.integers(-3, 3, n)).astype(logits_dtype)
    logits[3::101], logits[4::103] = np.inf, -np.inf
    soft = np.dtype(labels_dtype).kind not in "biu"
    labels = (rng.random(n) if soft else rng.random(n) < 0.3).astype(labels_dtype)
    if soft:
        labels[: n // 2] = np.round(labels[: n // 2].astype(float)).astype(labels_dtype)
    if soft or np.dtype(labels_dtype).kind == "i":
        labels[2::59] = -100
    loss = logitloss.binary_cross_entropy_with_logits(
        logits, np.maximum(labels.astype(np.float64), 0), reduction="none"
    )
    return loss, logits, labels


def exact(values):
    """Return how many, the sum, and that of the squared deviations from the mean."""
    values = np.asarray(values, np.longdouble)
    mean = values.mean() if values.size else 0
    return values.size, float(values.sum()), float(((values - mean) ** 2).sum())


def assert_moments(counts, name, values):
    moments = counts.moments(name)
    n, total, deviations = exact(values)
    assert moments.count == n
    assert moments.total.value == pytest.approx(total, rel=1e-13, abs=1e-300)
    assert moments.deviations.value == pytest.approx(deviations, rel=1e-12, abs=1e-25 * (1 + total * total))


def assert_bins(counts, probability, outcome):
    number = np.maximum(np.ceil(probability * N_PROBABILITIES).astype(int), 1) - 1
    found = counts.found
    np.testing.assert_array_equal(found["bins"], np.bincount(number, minlength=N_PROBABILITIES))
    for name, values in (("probability", probability), ("outcome", outcome)):
        for i in range(N_PROBABILITIES):
            wanted = math.fsum(values[number == i])
            assert found[name][i].sum() == pytest.approx(wanted, rel=1e-13, abs=1e-300)


def assert_losses(counts, losses):
    edges = np.append(LEAST * np.outer(2.0 ** np.arange(30), [1, 1.25, 1.5, 1.75]), MOST)
    wanted = np.histogram(losses, [-np.inf, *edges, np.inf])[0]
    np.testing.assert_array_equal(counts.found["losses"], wanted)
    assert counts.found["counted"] == losses.size
    assert_moments(counts, "loss", losses[losses < np.inf])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_classes(isa, n, real):
    loss, figures = rows(n, real)
    counts = count_rows(loss, figures=figures, backend=isa)
    live = figures[:, 0] != 0
    loss, (rank, _, top, entropy, others) = loss[live].astype(np.float64), figures[live].T
    wide = loss.astype(np.longdouble)
    p = np.exp(-wide)
    squares = np.expm1(-wide) ** 2 + others + np.where(rank == 1, 0, (top - p) * (top + p))
    wanted = np.bincount(np.minimum(rank, N_RANKS + 1).astype(int), minlength=N_RANKS + 2)
    np.testing.assert_array_equal(counts.found["ranks"], wanted)
    assert counts.found["correct"] == np.count_nonzero(rank == 1)
    assert_losses(counts, loss)
    assert_bins(counts, top, (rank == 1).astype(float))
    columns = {"brier": squares, "reciprocal_rank": 1 / rank.astype(np.longdouble)}
    for name, values in {**columns, "confidence": top, "entropy": entropy}.items():
        assert_moments(counts, name, values)


@pytest.mark.parametrize("labels_dtype", [np.bool_, *INTEGERS, *FLOATS], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("logits_dtype", FLOATS, ids=lambda t: np.dtype(t).name)
def test_binary(isa, logits_dtype, labels_dtype):
    for n in SIZES:
        loss, logits, labels = binary(n, logits_dtype, labels_dtype)
        counts = count_rows(loss, logits=logits, target=labels, ignored=-100, backend=isa)
        assert_binary(counts, loss, logits, labels, labels != np.array(-100.0))


def assert_binary(counts, loss, logits, labels, live):
    loss, x, y = (array[live].astype(np.float64) for array in (loss, logits, labels))
    wide = x.astype(np.longdouble)
    with np.errstate(over="ignore"):
        p, rest = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
    assert_losses(counts, loss)
    assert_moments(counts, "brier", (p * (1 - y) - rest * y) ** 2)
    assert_bins(counts, p.astype(float), y)
    assert counts.found["correct"] == np.count_nonzero((x > 0) == (y > 0.5))
    assert counts.found["bad"] == 0
    place = np.clip(np.floor((x + LIMIT) * (N_LOGITS / (2 * LIMIT))), 0, N_LOGITS - 1).astype(int)
    for kind in (0, 1):
        wanted = np.bincount(place[(y > 0.5) == kind], minlength=N_LOGITS)
        np.testing.assert_array_equal(counts.logits[kind], wanted)


def test_rows_that_do_not_count(isa):
    rng = rng_for("rows that do not count")
    counted = rng.random(50_000) < 0.7
    loss, figures = rows(50_000)
    found = count_rows(loss, counted, figures=figures, backend=isa).found
    wanted = count_rows(loss[counted], figures=figures[counted], backend=isa).found
    np.testing.assert_array_equal(found["ranks"], wanted["ranks"])
    np.testing.assert_array_equal(found["losses"], wanted["losses"])
    loss, logits, labels = binary(50_000)
    counts = count_rows(loss, counted, logits=logits, target=labels, ignored=-100, backend=isa)
    assert_binary(counts, loss, logits, labels, counted & (labels != -100))
    assert_losses(count_rows(loss, counted, backend=isa), loss[counted].astype(np.float64))


def test_any_strides(isa):
    loss, logits, labels = binary(40_000, np.float16, np.int16)
    wanted = count_rows(loss, logits=logits, target=labels, ignored=-100, backend=isa)
    parts = []
    for array in (loss, logits, labels):
        spread = np.zeros((200, 3, 400), array.dtype)
        spread[:, 1, ::2] = array.reshape(200, 200)
        parts.append(np.asfortranarray(spread)[:, 1, ::2])
    counts = count_rows(parts[0], logits=parts[1], target=parts[2], ignored=-100, backend=isa)
    assert counts.found.tobytes() == wanted.found.tobytes()
    np.testing.assert_array_equal(counts.logits, wanted.logits)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_do_not_show(isa, threads):
    """More rows than are merged at once, of 256 blocks."""
    loss, figures = rows(5_000_000)
    loss_of_binary, logits, labels = binary(3_000_000)
    for n in (1, 50_000, len(loss)):
        wanted, found = (
            count_rows(loss[:n], figures=figures[:n], num_threads=count, backend=isa).found
            for count in (1, threads)
        )
        assert found.tobytes() == wanted.tobytes()
    wanted, found = (
        count_rows(loss_of_binary, logits=logits, target=labels, num_threads=count, backend=isa)
        for count in (1, threads)
    )
    assert found.found.tobytes() == wanted.found.tobytes()
    np.testing.assert_array_equal(found.logits, wanted.logits)


def test_ends_of_the_bins(isa):
    figures = np.zeros((4, 5))
    figures[:, 0] = 1, 2, N_RANKS, N_RANKS + 1
    figures[:, 2] = 0, 1 / N_PROBABILITIES, np.nextafter(1 / N_PROBABILITIES, 1), 1
    found = count_rows(np.zeros(4), figures=figures, backend=isa).found
    assert found["bins"].tolist() == [2, 1] + [0] * (N_PROBABILITIES - 3) + [1]
    assert np.flatnonzero(found["ranks"]).tolist() == [1, 2, N_RANKS, N_RANKS + 1]


def test_small_losses_keep_their_digits(isa):
    """Of a sure hit the squared error is that of 1 - p, which is far below p's rounding."""
    loss = np.array([1e-12, 3e-9, 2e-5, 0.1, 0.4])
    figures = np.zeros((5, 5))
    figures[:, 0] = 1
    for i in range(5):
        found = count_rows(loss[i : i + 1], figures=figures[i : i + 1], backend=isa)
        assert found.moments("brier").mean == pytest.approx(math.expm1(-loss[i]) ** 2, rel=4e-16)


@pytest.mark.parametrize("y", [np.nan, -0.5, 1.25, np.inf])
def test_labels_out_of_range_are_told(isa, y):
    target = np.full(700, 0.25)
    target[[3, 650]] = y
    found = count_rows(np.zeros(700), logits=np.zeros(700), target=target, ignored=-100, backend=isa).found
    assert found["bad"] == 2


def test_nan_is_told_and_reads_nothing_else(isa):
    for n in (1, 600, 20_000):
        loss, figures = np.zeros(n), np.full((n, 5), np.nan)
        loss[n // 2] = np.nan
        assert count_rows(loss, figures=figures, backend=isa).has_nan
        assert count_rows(loss, logits=loss, target=np.ones(n), backend=isa).has_nan
        assert not count_rows(np.ones(n), figures=figures, backend=isa).has_nan


def test_sums_that_overflow_are_not_finite(isa):
    moments = count_rows(np.full(600, 1e308), backend=isa).moments("loss")
    assert (moments.count, moments.total.value) == (600, np.inf)
    assert not np.isfinite(moments.deviations.value)


def test_another_layout_is_refused(isa):
    short = np.zeros((), np.dtype(LAYOUT.descr[:-1]))
    with pytest.raises(ValueError, match=r"counts of \d+ bytes, expected"):
        counter(isa).count_rows(np.zeros(3), None, None, None, None, None, short, None, 1)
    assert len(MOMENTS) == LAYOUT["moments"].shape[0]


@pytest.mark.parametrize("name", ["counted", "figures", "logits", "target"])
def test_arrays_of_another_shape_are_refused(name):
    arrays = {"counted": np.ones(3, bool), "figures": np.zeros((3, 5)), "logits": np.zeros(3)}
    arrays["target"] = np.zeros(3)
    with pytest.raises(ShapeError, match=f"{name}: of shape .*expected"):
        count_rows(np.zeros(3), **{name: arrays[name][:2]})
