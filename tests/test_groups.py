"""Groups of rows, each with figures of its own, and what becomes of each row."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
from cases import rng_for
from command import invoke
from states import assert_same_figures, assert_same_states

import logitloss as ll
from logitloss.evaluate import (
    DtypeError,
    EvaluationState,
    FileError,
    LabelError,
    ShapeError,
    StateError,
    evaluate,
)
from logitloss.evaluate.files import evaluate_files
from logitloss.evaluate.rows import row_dtype

ROWS, N_CLASSES, IGNORED = (40, 25), 10, -100
KEYS = {
    "numbers": np.array([7, -3, 2**40]),
    "flags": np.array([True, False]),
    "names": np.array(["de", "français", ""]),
}


def arrays(loss="ce", dtype=np.float32):
    rng = rng_for("groups", loss)
    if loss == "bce":
        logits, target = rng.standard_normal(ROWS).astype(dtype), rng.integers(0, 2, ROWS)
    else:
        logits, target = (
            rng.standard_normal((*ROWS, N_CLASSES)).astype(dtype),
            rng.integers(0, N_CLASSES, ROWS),
        )
        logits[3, 4, target[3, 4]] = -np.inf
    target[::5, ::3] = IGNORED
    return logits, target


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("keys", KEYS)
def test_a_group_is_evaluated_as_if_alone(loss, keys):
    logits, target = arrays(loss)
    groups = rng_for(keys).choice(KEYS[keys], ROWS)
    options = {"loss": loss, "backend": "reference", "axis": None if loss == "bce" else -1}
    whole = evaluate(logits, target, **options)
    for chunk_rows in (None, 7):
        state = evaluate(logits, target, groups=groups, chunk_rows=chunk_rows, **options)
        assert_same_figures(state.compute().to_dict(), whole.compute().to_dict())
        assert set(state.groups) == set(KEYS[keys].tolist())
        for key, group in state.groups.items():
            assert type(key) is type(KEYS[keys].tolist()[0])
            rows = groups == key
            assert_same_states(group, evaluate(logits[rows], target[rows], loss=loss, backend="reference"))
    saved = json.dumps(state.to_dict(), allow_nan=False)
    assert EvaluationState.from_dict(json.loads(saved)) == state


def test_groups_merge():
    logits, target = arrays()
    groups = rng_for("merge").choice(KEYS["names"], ROWS)
    groups[:20][groups[:20] == "de"] = ""  # a group that one part has not
    options = {"axis": -1, "backend": "reference"}
    whole = evaluate(logits, target, groups=groups, **options)
    state, other = (
        evaluate(logits[part], target[part], groups=groups[part], **options)
        for part in (slice(0, 20), slice(20, None))
    )
    state.merge(other)
    assert_same_states(state, whole)


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_what_becomes_of_each_row(loss, dtype):
    logits, target = arrays(loss, dtype)
    per_row = np.zeros(ROWS[::-1], row_dtype(dtype, loss)).T
    axis = -1 if loss == "ce" else None
    state = evaluate(logits, target, loss=loss, per_row=per_row, axis=axis, chunk_rows=7, backend="reference")
    live = target != IGNORED
    assert np.array_equal(per_row["counted"], live)
    if loss == "ce":
        losses = ll.cross_entropy(logits, target, axis=-1, reduction="none", backend="reference")
        hits = logits.argmax(axis=-1) == target
        own = np.take_along_axis(logits, np.where(live, target, 0)[..., None], axis=-1)
        is_before = np.arange(N_CLASSES) < target[..., None]
        rank = 1 + ((logits > own) | ((logits == own) & is_before)).sum(axis=-1)
        p = ll.softmax(logits.astype(np.float64), axis=-1)
        columns = {"rank": rank, "top": logits.argmax(axis=-1), "top_probability": p.max(axis=-1)}
        columns |= {
            "entropy": ll.entropy(logits, axis=-1, backend="reference"),
            "brier": ((p - (np.arange(N_CLASSES) == target[..., None])) ** 2).sum(axis=-1),
        }
        for name, column in columns.items():
            np.testing.assert_allclose(per_row[name], np.where(live, column, 0), rtol=1e-6)
    else:
        losses = ll.binary_cross_entropy_with_logits(
            logits, np.where(live, target, 0), reduction="none", backend="reference"
        )
        hits = (logits > 0) == (target == 1)
    assert np.array_equal(per_row["loss"], np.where(live, losses, 0))
    assert np.array_equal(per_row["hit"], hits & live)
    assert (per_row["hit"].sum(), per_row["counted"].sum()) == (state.correct, state.count)


def test_no_rows_are_in_no_group():
    state = EvaluationState()
    state.update(np.zeros((0, 3)), np.zeros(0, int), groups=np.zeros(0, int), backend="reference")
    assert state.groups == {}


def test_one_row():
    per_row = np.zeros((), row_dtype(np.float64))
    groups = np.array("a")
    state = evaluate(np.array([0.0, 0.0]), np.array(1), groups=groups, per_row=per_row, backend="reference")
    assert state.groups["a"].count == 1
    assert per_row["loss"] == np.log(2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"groups": np.zeros(3)}, DtypeError, "groups: of type float64, expected integers, bool or str"),
        ({"groups": np.zeros(3, int)}, ShapeError, r"groups: of shape \(3,\), but the target has \(40, 25\)"),
        ({"per_row": np.zeros(ROWS)}, DtypeError, "per_row: of type float64, expected"),
        ({"per_row": np.zeros(3, row_dtype(np.float32))}, ShapeError, r"per_row: of shape \(3,\)"),
        (
            {"per_row": np.broadcast_to(np.zeros((), row_dtype(np.float32)), ROWS)},
            ShapeError,
            "per_row: is read-only",
        ),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        evaluate(*arrays(), axis=-1, backend="reference", **options)


def test_keys_of_another_type_are_refused():
    state, other = EvaluationState(), EvaluationState()
    batch = np.zeros((2, 3)), np.array([0, 1])
    state.update(*batch, groups=np.array([True, False]), backend="reference")
    before = state.to_dict()
    with pytest.raises(DtypeError, match="groups: of type int, but keys before are of bool"):
        state.update(*batch, groups=np.array([1, 0]), backend="reference")
    other.update(*batch, groups=np.array([1, 0]), backend="reference")
    with pytest.raises(DtypeError, match="other's groups: of type int, but keys before are of bool"):
        state.merge(other)
    assert state.to_dict() == before


def test_a_key_that_is_no_text_is_refused(files, tmp_path):
    """As of a damaged file: Python has no such character, and what was counted stays."""
    codes = np.array([[97], [0x110000]], "u4")
    state = EvaluationState()
    for order in "<>":
        keys = codes.astype(f"{order}u4").view(f"{order}U1")[:, 0]
        with pytest.raises(DtypeError, match="groups: row 1: holds what is no text"):
            state.update(np.zeros((2, 3)), [0, 1], groups=keys, backend="reference")
    assert state.to_dict() == EvaluationState().to_dict()
    np.save(tmp_path / "g.npy", codes[[0] * (np.prod(ROWS) - 1) + [1]].view("U1").reshape(ROWS))
    keys, options = tmp_path / "g.npy", ("--axis", "-1", "--backend", "reference")
    result = invoke("eval", files["x"], files["y"], "--group-by", keys, *options)
    assert result.exit_code == 1
    assert result.stderr.startswith("logitloss: ")
    assert "g.npy: row [39, 24]: holds what is no text" in result.stderr


@pytest.fixture
def files(tmp_path):
    logits, target = arrays()
    names = {}
    for name, array in {"x": logits, "y": target, "g": rng_for("files").choice(KEYS["names"], ROWS)}.items():
        names[name] = str(tmp_path / f"{name}.npy")
        np.save(names[name], array)
    return names


def test_the_command_has_a_line_for_each_group(files, tmp_path):
    command = ["eval", files["x"], files["y"], "--axis", "-1", "--backend", "reference"]
    command += ["--group-by", files["g"], "--per-row", str(tmp_path / "rows.npy")]
    result = invoke(*command, "--json")
    assert result.exit_code == 0, result.output
    groups = np.load(files["g"])
    state = evaluate(*arrays(), groups=groups, axis=-1, backend="reference")
    found = json.loads(result.stdout)["groups"]
    assert [one["group"] for one in found] == sorted(state.groups) == ["", "de", "français"]
    for one in found:
        assert "shifted" not in one
        wanted = state.groups[one["group"]].compute()
        assert (one["count"], one["accuracy"]) == (wanted.count, wanted.accuracy)
        assert float(one["nll_nats"]) == wanted.nll_nats
    rows = np.load(tmp_path / "rows.npy")
    assert (rows["counted"].sum(), rows["hit"].sum()) == (state.count, state.correct)
    assert (rows["rank"] == 1).sum() == state.correct
    table = invoke(*command).stdout
    line = next(line for line in table.splitlines() if line.startswith("de "))
    wanted = state.groups["de"].compute()
    numbers = (wanted.accuracy, wanted.classes.brier, wanted.classes.expected_calibration_error)
    assert line.split()[-3:] == [f"{numbers[0]:.4%}", f"{numbers[1]:.4g}", f"{numbers[2]:.4g}"]


def test_keys_are_written_whole_and_as_they_are(files, tmp_path):
    keys = ["wikitext-103/validation/en:apple:", "wikitext-103/test/en"]
    np.save(files["g"], np.array(keys)[np.arange(np.prod(ROWS)) % 2].reshape(ROWS))
    command = ["eval", files["x"], files["y"], "--axis", "-1", "--backend", "reference", "--group-by"]
    table = invoke(*command, files["g"]).stdout.partition("group ")[2]
    column = "".join(line[: line.find("  ")].strip() for line in table.splitlines()[1:])
    assert column == keys[1] + keys[0]


def test_the_file_of_rows_goes_on_with_the_state(files, tmp_path):
    paths = {"per_row_path": str(tmp_path / "rows.npy"), "state_file": str(tmp_path / "state.json")}
    options = {"axis": -1, "chunk_rows": 7, "backend": "reference", **paths}
    wanted = np.zeros(ROWS, row_dtype(np.float32))
    evaluate(*arrays(), per_row=wanted, axis=-1, backend="reference")
    labels = np.load(files["y"])
    np.save(files["y"], np.where(np.arange(labels.size).reshape(ROWS) == 700, N_CLASSES, labels))
    with pytest.raises(LabelError):
        evaluate_files(files["x"], files["y"], **options)
    assert np.array_equal(np.load(paths["per_row_path"])[:27], wanted[:27])
    document = json.loads((tmp_path / "state.json").read_text())
    np.save(files["y"], labels)
    # as if the label had been mended before
    target = json.loads(json.dumps(document))
    evaluate_files(files["x"], files["y"], **options | {"state_file": str(tmp_path / "other.json")})
    target["inputs"] = json.loads((tmp_path / "other.json").read_text())["inputs"]
    (tmp_path / "state.json").write_text(json.dumps(target))
    rows = np.load(paths["per_row_path"])
    rows[28:] = np.zeros((), rows.dtype)
    np.save(paths["per_row_path"], rows)
    evaluate_files(files["x"], files["y"], **options)
    assert np.array_equal(np.load(paths["per_row_path"]), wanted)
    for spoilt, message in ((rows[:3], "holds .* of shape"), (None, "No such file")):
        (tmp_path / "rows.npy").unlink()
        if spoilt is not None:
            np.save(paths["per_row_path"], spoilt)
        with pytest.raises(FileError, match=rf"rows.npy: {message}"):
            evaluate_files(files["x"], files["y"], **options)


def test_records_that_the_state_did_not_write_are_refused(files, tmp_path):
    logits, target = arrays()
    paths = {"per_row_path": str(tmp_path / "rows.npy"), "state_file": str(tmp_path / "state.json")}
    options = {"axis": -1, "chunk_rows": 7, "backend": "reference"}
    np.save(tmp_path / "other.npy", logits[::-1])
    np.save(files["y"], np.where(np.arange(target.size).reshape(ROWS) == 700, N_CLASSES, target))
    with pytest.raises(LabelError):
        evaluate_files(files["x"], files["y"], state_file=paths["state_file"], **options)
    np.save(files["y"], target)
    evaluate_files(str(tmp_path / "other.npy"), files["y"], per_row_path=paths["per_row_path"], **options)
    before = (tmp_path / "rows.npy").read_bytes()
    message = r"state.json: is the state of an evaluation with per_row False, this one has True"
    with pytest.raises(StateError, match=message):
        evaluate_files(files["x"], files["y"], **options, **paths)
    assert (tmp_path / "rows.npy").read_bytes() == before
    # a state that did go on without them, after it had kept them, is one of these, too
    (tmp_path / "state.json").unlink()
    wanted = evaluate_files(files["x"], files["y"], **options, **paths).state
    assert evaluate_files(files["x"], files["y"], state_file=paths["state_file"], **options).state == wanted


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_records_of_other_rows_are_refused(files, tmp_path, loss, stops):
    """Those of a new array, or of another file that holds as many."""
    logits, target = arrays(loss)
    axis = -1 if loss == "ce" else None
    options = {"loss": loss, "axis": axis, "chunk_rows": 7, "backend": "reference"}
    options["state_file"] = tmp_path / "state.json"
    bad = target.copy()
    bad[28, 0] = N_CLASSES if stops else target[28, 0]
    rows = np.zeros(ROWS, row_dtype(np.float32, loss))
    with pytest.raises(LabelError) if stops else nullcontext():
        evaluate(logits, bad, per_row=rows, **options)
    kept = json.loads(options["state_file"].read_text())
    state = EvaluationState.from_dict(kept["part" if stops else "state"])
    has = f"has {state.correct} hits among {state.count} rows that count"
    with pytest.raises(
        StateError, match=f"state.json: {has}, but the records of them have 0 among 0; another"
    ):
        evaluate(logits, target, per_row=np.zeros_like(rows), **options)
    assert evaluate(logits, target, per_row=rows, **options).count == rows["counted"].sum()
    for name, array in {"x": logits, "y": bad, "other": logits[::-1]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    options |= {"state_file": tmp_path / "files.json", "per_row_path": str(tmp_path / "rows.npy")}
    with pytest.raises(LabelError) if stops else nullcontext():
        evaluate_files(files["x"], files["y"], **options)
    np.save(files["y"], target)
    other = {"state_file": None, "per_row_path": str(tmp_path / "others.npy")}
    evaluate_files(str(tmp_path / "other.npy"), files["y"], **options | other)
    del other["state_file"]
    with pytest.raises(StateError, match=r"files.json: has .* but the records of them have"):
        evaluate_files(files["x"], files["y"], **options | other)
    evaluate_files(files["x"], files["y"], **options)
    assert np.array_equal(np.load(options["per_row_path"]), rows)
