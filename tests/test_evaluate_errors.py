"""Arrays that cannot be evaluated: each gives one line that names the argument, the row and the value."""

import ml_dtypes
import numpy as np
import pytest

from logitloss import LinearLogits
from logitloss.evaluate import DtypeError, EvaluationState, LabelError, LogitError, ShapeError, evaluate
from logitloss.evaluate.rows import rows_of

IGNORED = -100
X, Y = np.zeros((4, 3)), np.zeros(4, int)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (
            X,
            Y[:3],
            {},
            ShapeError,
            r"target: of shape (3,), but logits of shape (4, 3) with the classes on axis 1 need (4,)",
        ),
        (
            np.zeros((2, 3, 5)),
            np.zeros((2, 3), int),
            {},
            ShapeError,
            "with the classes on the last axis, say --axis -1",
        ),
        (
            X[0],
            Y,
            {},
            ShapeError,
            "target: of shape (4,), but logits of shape (3,) with the classes on axis 0 need ()",
        ),
        (X, Y[:, None] + X.astype(int), {}, ShapeError, "for a label each logit, say --loss bce"),
        (X[0, 0], Y[0], {}, ShapeError, "logits: of shape (), which has no classes"),
        (
            X,
            Y[0],
            {"loss": "bce"},
            ShapeError,
            "target: of shape (), but binary labels need the logits', (4, 3)",
        ),
        (X, Y, {"axis": 2}, ShapeError, "logits: of shape (4, 3), which has no axis 2"),
        (X, Y, {"axis": -3}, ShapeError, "logits: of shape (4, 3), which has no axis -3"),
        (np.zeros((4, 0)), Y, {}, ShapeError, "logits: of shape (4, 0): no classes on axis 1"),
        (X, Y, {"chunk_rows": 0}, ShapeError, "chunk_rows: is 0, must be at least 1"),
        (X, Y.astype(float), {}, DtypeError, "target: of type float64, expected integers"),
        (
            X.astype(int),
            Y,
            {},
            DtypeError,
            "logits: of type int64, expected one of f8_e4m3, f8_e5m2, bf16, f16, f32, f64",
        ),
        (X.astype(complex), Y, {}, DtypeError, "logits: of type complex128"),
        (
            X,
            X,
            {"loss": "bce", "axis": 1},
            ShapeError,
            "axis: is 1, but binary cross-entropy has no axis of classes",
        ),
        (
            X,
            Y,
            {"loss": "bce"},
            ShapeError,
            "target: of shape (4,), but binary labels need the logits', (4, 3)",
        ),
        (
            X,
            X.astype(complex),
            {"loss": "bce"},
            DtypeError,
            "target: of type complex128, expected real numbers",
        ),
        (
            X,
            X.astype(np.longdouble),
            {"loss": "bce"},
            DtypeError,
            f"target: of type {np.dtype(np.longdouble)}, expected real numbers",
        ),
        (
            X,
            X.astype(ml_dtypes.float8_e5m2),
            {"loss": "bce"},
            DtypeError,
            "target: of type float8_e5m2, expected real numbers",
        ),
        (X, None, {}, ShapeError, "target: is missing: an array of logits has its labels in another"),
        (LinearLogits(X, X), None, {}, ShapeError, "target: is missing: an array of logits"),
        (X, "labels.npy", {}, DtypeError, "target: of type <U10, expected integers"),
        (X, Y, {"per_row": "rows.npy"}, DtypeError, "per_row: a str, expected an ndarray"),
        (X, Y, {"ignore_index": 0.5}, TypeError, "ignore_index is 0.5: expected an integer"),
        (X, Y, {"chunk_rows": 1.5}, TypeError, "chunk_rows is 1.5: expected an integer"),
        (None, Y, {}, ValueError, "logits: is None, expected an array"),
        ([(None, Y)], None, {}, ValueError, "logits of batch 0: is None, expected an array"),
    ],
)
def test_input_that_does_not_fit(logits, target, options, error, message):
    with pytest.raises(error) as caught:
        evaluate(logits, target, backend="reference", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, None])
@pytest.mark.parametrize("label", [3, -1, 127])
def test_bad_label_is_named_by_its_row(backend, chunk_rows, label):
    target = np.zeros(9, np.int8)
    target[6] = label
    target[8] = 99
    with pytest.raises(LabelError) as caught:
        evaluate(np.zeros((9, 3)), target, chunk_rows=chunk_rows, backend=backend)
    assert (
        str(caught.value) == f"target: row 6: label {label} is outside 0 to 2, and is not ignore_index=-100"
    )
    assert isinstance(caught.value, IndexError)


@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.nan, "the logit of class 2 is nan"),
        (np.inf, "the logit of class 2 is inf"),
        (None, "every logit is -inf"),
    ],
)
def test_bad_logit_is_named_by_its_row(backend, dtype, chunk_rows, value, what):
    logits = np.zeros((3, 4, 5), dtype)
    logits[1, 2] = -np.inf
    if value is not None:
        logits[1, 2, 2] = value
    with pytest.raises(LogitError) as caught:
        evaluate(logits, np.zeros((3, 4), int), axis=-1, chunk_rows=chunk_rows, backend=backend)
    assert str(caught.value) == f"logits: row [1, 2]: {what}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ignore_index": 0.5}, TypeError, "ignore_index is 0.5: expected an integer"),
        ({"ignore_index": None}, TypeError, "ignore_index is None: expected an integer"),
        ({"ignore_index": 2**80}, ValueError, f"ignore_index is {2**80}: expected "),
        ({"axis": 0}, ShapeError, "axis: is 0, but binary cross-entropy has no axis of classes"),
    ],
)
def test_options_of_binary_batches_are_checked(backend, options, error, message):
    state = EvaluationState("bce")
    with pytest.raises(error) as caught:
        state.update(X, X, backend=backend, **options)
    assert message in str(caught.value)
    assert state == EvaluationState("bce")


@pytest.mark.parametrize("ignored", [False, True])
def test_bad_binary_rows_are_named(backend, ignored):
    logits, target = np.zeros((4, 2)), np.zeros((4, 2))
    if ignored:
        target[0] = IGNORED
    target[2, 1] = 1.5
    with pytest.raises(LabelError) as caught:
        evaluate(logits, target, loss="bce", chunk_rows=3, backend=backend)
    assert (
        str(caught.value) == "target: row [2, 1]: label 1.5 is outside 0 to 1, and is not ignore_index=-100"
    )
    target[2, 1] = np.nan
    with pytest.raises(LabelError, match=r"row \[2, 1\]: label nan is outside"):
        evaluate(logits, target, loss="bce", backend=backend)
    target[2, 1], logits[3, 0] = 1, np.nan
    with pytest.raises(LogitError) as caught:
        evaluate(logits, target, loss="bce", chunk_rows=3, backend=backend)
    assert str(caught.value) == "logits: row [3, 0]: the logit is nan"


def test_a_refused_batch_leaves_the_state_alone(backend):
    state = EvaluationState()
    state.update(np.zeros((5, 3)), np.arange(5) % 3, backend=backend)
    before = state.compute()
    for logits, target in (([[0.0, np.nan], [1.0, 2.0]], [0, 1]), ([[0.0, 1.0], [1.0, 2.0]], [0, 2])):
        with pytest.raises((LabelError, LogitError)):
            state.update(logits, target, backend=backend)
    with pytest.raises(DtypeError, match="target: of type float64, expected integers"):
        state.update([[0.0, 1.0]], [[0.0, 1.0]], backend=backend)
    assert state.compute() == before


@pytest.mark.parametrize(
    ("loss", "groups", "error", "message"),
    [
        ("ce", np.zeros(3, int), ShapeError, r"groups: of shape \(3,\), but the target has \(4,\)"),
        ("ce", np.zeros(5, int), ShapeError, r"groups: of shape \(5,\), but the target has \(4,\)"),
        ("ce", np.zeros(4), DtypeError, "groups: of type float64, expected integers, bool or str"),
        ("bce", None, ShapeError, "rows: of classes, but this state holds 'bce' losses"),
    ],
)
def test_refused_rows_leave_the_state_alone(loss, groups, error, message):
    options = {"ignore_index": IGNORED, "num_threads": None, "backend": "reference"}
    rows, state = rows_of(X, Y, "ce", None, **options), EvaluationState(loss)
    with pytest.raises(error, match=message):
        state.add(rows, groups)
    assert state == EvaluationState(loss)
    binary = rows_of(X, X, "bce", None, **options)
    with pytest.raises(ShapeError, match="rows: of binary labels, but this state holds 'ce' losses"):
        EvaluationState().add(binary)
