"""Arrays that cannot be evaluated: each gives one line that names the argument, the row and the value."""

import numpy as np
import pytest

from logitloss.evaluate import DtypeError, EvaluationState, LabelError, LogitError, ShapeError, evaluate

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
