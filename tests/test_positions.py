"""Positions that do not count: shifted, masked and ignored ones, against doing the same by hand."""

import json
import re
import tracemalloc

import numpy as np
import pytest
from cases import INTEGERS, rng_for
from command import invoke
from states import assert_same_figures

from logitloss import LinearLogits
from logitloss.evaluate import (
    DtypeError,
    EvaluationState,
    FileError,
    LabelError,
    LogitError,
    MaskError,
    ShapeError,
    StateError,
    evaluate,
    evaluate_files,
)
from logitloss.evaluate.rows import row_dtype
from logitloss.evaluate.stores import StoredArray, open_array

BACKEND = {"backend": "reference"}


class Listed(StoredArray):
    """An array in memory, read as a store's."""

    def __init__(self, array):
        super().__init__("listed", array.shape, array.dtype)
        self.array = array

    def _read(self, box):
        return self.array[box].copy()


def text(seed, shape=(5, 9), n_classes=11):
    """Return logits with the classes last, tokens some of which are to be ignored, a mask, and keys."""
    rng = rng_for("positions", seed)
    tokens = np.where(rng.random(shape) < 0.1, -100, rng.integers(0, n_classes, shape))
    logits = 3 * rng.standard_normal((*shape, n_classes), np.float32)
    return logits, tokens, rng.random(shape) < 0.7, rng.choice(["a", "b"], shape)


def by_hand(logits, tokens, **options):
    """Return the state of the shifted positions, cut off by hand."""
    if tokens.ndim == 1:  # a text all the same, and so a sequence
        logits, tokens = logits[None], tokens[None]
    state = evaluate(logits[..., :-1, :], tokens[..., 1:], axis=-1, **BACKEND, **options)
    state.shifted = tokens[..., :1].size
    return state


# ---- shift ----


@pytest.mark.parametrize("store", ["array", "c", "fortran", "packed", "listed", "batches"])
@pytest.mark.parametrize("trial", range(8))
def test_shift_is_slicing_by_hand(trial, store, tmp_path):
    rng = rng_for("shift", trial)
    shape = tuple(int(n) for n in rng.integers(1, 9, trial % 3 + 1))
    logits, tokens, *_ = text(trial, shape)
    chunk_rows = (None, 1, int(rng.integers(1, 70)))[trial % 3 if trial > 2 else 0]
    options = {"chunk_rows": chunk_rows, "per_class": bool(trial % 2)}
    wanted = by_hand(logits, tokens, **options)
    axis = int(rng.integers(-logits.ndim, logits.ndim))
    given = np.moveaxis(logits, -1, axis)
    options |= {"axis": axis, "shift": True, **BACKEND}
    if store == "array":
        found = evaluate(given, tokens, **options)
    elif store == "listed":
        found = evaluate(Listed(given), Listed(tokens), **options)
    elif store == "batches":
        found = evaluate(iter([(given, tokens)]), **options)
    else:
        paths = [tmp_path / "x.npy", tmp_path / "y.npy"]
        for path, array in zip(paths, (given, tokens), strict=True):
            if store == "packed":
                np.savez_compressed(path.with_suffix(".npz"), array)
            else:
                np.save(path, array.copy(order=store[0].upper()))
        if store == "packed":
            paths = [path.with_suffix(".npz") for path in paths]
        found = evaluate(*paths, **options)
    assert found == wanted


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_shift_of_hidden_states(in_file, chunk_rows, tmp_path):
    rng = rng_for("shifted hidden states")
    hidden, weight = rng.standard_normal((3, 7, 4), np.float32), rng.standard_normal((11, 4), np.float32)
    tokens = rng.integers(0, 11, (3, 7))
    mask = rng.integers(0, 2, (3, 7))
    options = {"chunk_rows": chunk_rows, **BACKEND}
    wanted = evaluate(LinearLogits(hidden[:, :-1], weight), tokens[:, 1:], mask=mask[:, 1:], **options)
    assert wanted.masked == (mask[:, 1:] == 0).sum()
    wanted.shifted = 3
    options["shift"] = True
    if not in_file:
        logits = LinearLogits(hidden, weight)
        assert evaluate(logits, tokens, mask=mask, **options) == wanted
        assert (logits.hidden is hidden, logits.shape) == (True, (3, 7, 11))
        return
    for name, array in {"h": hidden, "w": weight, "y": tokens, "m": mask}.items():
        np.save(tmp_path / f"{name}.npy", array)
    hidden_path, target_path, *more = (str(tmp_path / f"{name}.npy") for name in "hywm")
    options |= {"unembedding_path": more[0], "mask_path": more[1]}
    assert evaluate_files(hidden_path, target_path, **options).state == wanted


@pytest.mark.parametrize(("shape", "shifted"), [((3, 1), 3), ((3, 0), 0), ((0, 4), 0), ((1,), 1), ((0,), 0)])
def test_texts_of_which_nothing_is_predicted(shape, shifted, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((*shape, 5)))
    np.save(tmp_path / "y.npy", np.zeros(shape, int))
    per_row = np.ones(shape, row_dtype(np.float64))
    for state in (
        evaluate(
            np.zeros((*shape, 5)), np.zeros(shape, int), axis=-1, shift=True, per_row=per_row, **BACKEND
        ),
        evaluate(tmp_path / "x.npy", tmp_path / "y.npy", axis=-1, shift=True, **BACKEND),
        evaluate([(np.zeros((*shape, 5)), np.zeros(shape, int))], axis=-1, shift=True, **BACKEND),
    ):
        assert (state.n_rows, state.shifted) == (0, shifted)
        assert np.isnan(state.compute().nll_nats)
    assert not per_row["counted"].any()


def test_shift_copies_nothing_whole():
    logits = np.zeros((8, 1000, 500), np.float32)
    tokens = np.zeros((8, 1000), np.int32)
    tokens[:, ::2] = 1
    options = {"axis": -1, "shift": True, "chunk_rows": 100, **BACKEND}
    evaluate(logits[:1], tokens[:1], **options)
    tracemalloc.start()
    evaluate(logits, tokens, **options)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < logits.nbytes / 4


def test_a_part_of_a_store_under_other_axes_and_types(tmp_path):
    array = rng_for("parts").integers(0, 2**16, (4, 5, 6)).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    for stored in (Listed(array), open_array(str(tmp_path / "a.npy"))):
        for order in [(0, 1, 2), (2, 0, 1), (1, 2, 0)]:
            part = stored.transpose(order).part(1, 1, 4).view(np.int16).part(1, 1, 3).part(2, 0, 2)
            plain = array.view(np.int16).transpose(order)[:, 2:4, :2]
            assert (part.shape, part.size, part.nbytes) == (plain.shape, plain.size, plain.nbytes)
            for box in [
                (),
                (slice(1, 3),),
                (slice(0, 2), slice(1, 2)),
                (slice(None), slice(None), slice(1, 2)),
            ]:
                assert np.array_equal(part[box], plain[box])
            again = part.transpose((2, 1, 0))
            assert np.array_equal(again[slice(1, 2),], plain.transpose((2, 1, 0))[1:2])
            places, elements = part.samples(1000)
            assert np.array_equal(elements, plain.ravel()[places])
            part.release((slice(0, 1),))
        assert np.array_equal(stored[()], array)


# ---- masks ----


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3, 200])
def test_a_mask_is_ignoring_by_hand(dtype, ignore_index):
    logits, tokens, mask, _ = text(str(dtype))
    tokens = np.where(tokens < 0, 5, tokens)
    wanted = evaluate(
        logits, np.where(mask, tokens, ignore_index), axis=-1, ignore_index=ignore_index, **BACKEND
    )
    # whatever label is masked
    labels = np.where(mask, tokens, 100).astype(dtype)
    for chunk_rows, integers in ((None, False), (7, True), (2, False)):
        found = evaluate(
            logits,
            labels,
            axis=-1,
            mask=mask.astype(np.uint8) if integers else mask,
            ignore_index=ignore_index,
            chunk_rows=chunk_rows,
            **BACKEND,
        )
        assert_same_figures(
            found.compute().to_dict(),
            wanted.compute().to_dict() | {"ignored": found.ignored, "masked": found.masked},
        )
        assert (found.masked, found.masked + found.ignored) == ((~mask).sum(), wanted.ignored)


def test_labels_that_no_mask_leaves_out_are_told_as_they_are():
    logits, tokens, mask, _ = text("far")
    tokens = np.where(tokens < 0, 0, tokens).astype(np.uint64)
    mask[2, 3] = True
    for label in (2**64 - 100, 2**63 - 1, 11):
        tokens[2, 3] = label
        with pytest.raises(LabelError, match=rf"^target: row \[2, 3\]: label {label} is outside 0 to 10"):
            evaluate(logits, tokens, axis=-1, mask=mask, **BACKEND)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float16, np.float64])
def test_a_mask_of_binary_labels(dtype):
    rng = rng_for("binary mask", str(dtype))
    logits, mask = rng.standard_normal((6, 8)), rng.random((6, 8)) < 0.6
    labels = rng.integers(0, 2, (6, 8)).astype(dtype)
    wanted = evaluate(logits[mask], labels[mask], loss="bce", **BACKEND).compute().to_dict()
    if dtype is not bool:
        labels[~mask] = 77
    logits[~mask] = np.nan
    found = evaluate(logits, labels, loss="bce", mask=mask, chunk_rows=5, **BACKEND).compute().to_dict()
    assert_same_figures(found, wanted | {"masked": (~mask).sum()})


def test_masked_rows_may_hold_anything():
    logits, tokens, mask, _ = text("anything")
    logits[~mask] = np.nan
    wanted = evaluate(logits[mask], tokens[mask], **BACKEND).compute()
    found = evaluate(logits, tokens, axis=-1, mask=mask, **BACKEND).compute()
    assert found.nll_nats == pytest.approx(wanted.nll_nats, rel=1e-12)


# ---- reasons ----


@pytest.mark.parametrize("trial", range(10))
def test_reasons_add_up_to_all_positions(trial):
    logits, tokens, mask, keys = text(trial, (4, 3, 8))
    tokens[0, 0, 3], mask[0, 0, 3] = 5, True
    logits[0, 0, 2, 5] = -np.inf
    options = {"axis": -1, "shift": True, "mask": mask, "groups": keys, **BACKEND}
    state = evaluate(logits, tokens, chunk_rows=trial + 1, **options)
    kept, is_ignored = mask[..., 1:], tokens[..., 1:] == -100
    assert state.shifted == 12
    assert state.masked == (~kept).sum()
    assert state.ignored == (kept & is_ignored).sum()
    assert state.infinite == 1
    assert state.count + state.ignored + state.masked + state.shifted == tokens.size
    for key, group in state.groups.items():
        of_key = keys[..., 1:] == key
        assert group.n_rows == of_key.sum()
        assert group.masked == (of_key & ~kept).sum()
        assert (group.shifted, group.end_runs.positions) == (0, 0)
    metrics = state.compute()
    counts = metrics.count, metrics.ignored, metrics.masked, metrics.shifted
    assert counts == (state.count, state.ignored, state.masked, 12)
    assert EvaluationState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
    twice = state.empty()
    twice.merge(state)
    twice.merge(state)
    assert (twice.masked, twice.shifted) == (2 * state.masked, 24)


def test_batches_bring_masks():
    logits, tokens, mask, keys = text("batches")
    options = {"axis": -1, "shift": True, **BACKEND}
    wanted = evaluate(logits, tokens, mask=mask, groups=keys, **options)
    parts = slice(0, 2), slice(2, 5)
    found = evaluate([(logits[p], tokens[p], keys[p], mask[p]) for p in parts], **options)
    assert found.shifted == wanted.shifted
    assert_same_figures(found.compute().to_dict(), wanted.compute().to_dict())
    assert evaluate([(logits, tokens, None, mask)], **options).groups == {}
    updated = EvaluationState()
    updated.update(logits, tokens, mask=mask, axis=-1, **BACKEND)
    assert updated == evaluate(logits, tokens, mask=mask, axis=-1, **BACKEND)
    wrong = mask.astype(int)
    wrong[3, 4] = 2
    batches = [(logits[p], tokens[p], None, wrong[p]) for p in parts]
    with pytest.raises(MaskError, match=r"mask of batch 1: row \[1, 4\]: is 2, expected 0 or 1"):
        evaluate(batches, **options)


@pytest.mark.parametrize("chunk_rows", [None, 3, 10])
def test_what_becomes_of_each_row_has_the_targets_shape(chunk_rows, tmp_path):
    logits, tokens, mask, _ = text("rows")
    for name, array in {"x": logits, "y": tokens, "m": mask}.items():
        np.save(tmp_path / f"{name}.npy", array)
    options = {"axis": -1, "shift": True, "chunk_rows": chunk_rows, **BACKEND}
    rows = np.ones(tokens.shape, row_dtype(np.float32))
    evaluate(logits, tokens, mask=mask, per_row=rows, **options)
    alone = np.zeros((5, 8), rows.dtype)
    evaluate(logits[:, :-1], tokens[:, 1:], mask=mask[:, 1:], axis=-1, per_row=alone, **BACKEND)
    assert np.array_equal(rows[:, 1:], alone)
    assert np.array_equal(rows[:, 0], np.zeros(5, rows.dtype))
    assert np.array_equal(rows["counted"][:, 1:], (mask & (tokens != -100))[:, 1:])
    paths = [tmp_path / f"{name}.npy" for name in "xymr"]
    evaluate(*paths[:2], mask=paths[2], per_row=paths[3], **options)
    assert np.array_equal(np.load(paths[3]), rows)


# ---- errors ----


@pytest.mark.parametrize("chunk_rows", [None, 1, 5])
def test_a_row_is_that_of_the_array_that_is_named(chunk_rows):
    logits, tokens, mask, _ = text("errors")
    options = {"axis": -1, "shift": True, "chunk_rows": chunk_rows, **BACKEND}
    for array, error, message in (
        (tokens, LabelError, r"^target: row \[2, 4\]: label 99 "),
        (logits, LogitError, r"^logits: row \[2, 4\]: the logit of class 0 is nan"),
        (mask.astype(int), MaskError, r"^mask: row \[2, 4\]: is 99, expected 0 or 1"),
    ):
        arrays = {"logits": logits.copy(), "target": np.abs(tokens) % 11, "mask": None}
        name = message.split(":")[0][1:]
        arrays[name] = array.copy() if name != "target" else arrays["target"]
        arrays[name][2, 4] = np.nan if name == "logits" else 99
        with pytest.raises(error, match=message):
            evaluate(**arrays, **options)
    for at in ((2, 8), (2, 0)):  # the last logits and the first label belong to no row
        x, y = logits.copy(), np.abs(tokens) % 11
        x[at if at[1] else (2, 8)] = np.nan
        y[2, 0] = 99
        assert evaluate(x, y, **options).count == 40


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": np.ones((5, 9))}, DtypeError, "mask: of type float64, expected bool, or integers 0 and 1"),
        ({"mask": np.ones((5, 8), bool)}, ShapeError, r"mask: of shape (5, 8), but the target has (5, 9)"),
        ({"mask": np.full((5, 9), -1)}, MaskError, "mask: row [0, 0]: is -1, expected 0 or 1"),
        ({"loss": "bce", "shift": True}, ShapeError, "shift: is for labels of classes, not for loss 'bce'"),
        (
            {"logits": np.zeros(3), "target": np.array(1), "axis": None, "shift": True},
            ShapeError,
            "target: of shape (), which has no axis of positions to shift",
        ),
        (
            {"target": np.zeros((5, 8), int), "shift": True},
            ShapeError,
            "target: of shape (5, 8), but logits of shape (5, 9, 11)",
        ),
    ],
)
def test_what_does_not_go_together_is_a_line(options, error, message):
    logits, tokens, *_ = text("wrong")
    with pytest.raises(error) as caught:
        evaluate(**{"logits": logits, "target": tokens, "axis": -1, **options}, **BACKEND)
    assert str(caught.value).startswith(message)
    if error is MaskError:
        with pytest.raises(MaskError):
            EvaluationState().update(logits, tokens, axis=-1, mask=options["mask"], **BACKEND)


# ---- files, shards and states ----


@pytest.fixture
def sharded(tmp_path):
    """Return folders of two shards of logits, tokens, masks and keys, of several sequences each."""
    for name in "xymg":
        (tmp_path / name).mkdir()
    for number in range(2):
        for name, array in zip("xymg", text(number, (3 + number, 9)), strict=True):
            np.save(tmp_path / name / f"{number}.npy", array)
    return {name: str(tmp_path / name) for name in "xymg"}


def options_of(folders, **more):
    return {
        "axis": -1,
        "shift": True,
        "mask_path": folders["m"],
        "groups_path": folders["g"],
        "chunk_rows": 5,
        **BACKEND,
        **more,
    }


def test_shards_of_masks_go_with_those_of_logits(sharded):
    wanted = EvaluationState()
    for number in range(2):
        logits, tokens, mask, keys = text(number, (3 + number, 9))
        options = {"axis": -1, "shift": True, "mask": mask, "groups": keys, "chunk_rows": 5, **BACKEND}
        wanted.merge(evaluate(logits, tokens, **options))
    seen = []
    options = options_of(sharded, progress=lambda *counts: seen.append(counts))
    found = evaluate_files(sharded["x"], sharded["y"], **options)
    assert found.state == wanted
    assert (found.n_rows, found.n_bytes) == (56, 56 * 11 * 4)
    assert seen[-1] == (56, 56, 56 * 11 * 4)
    assert sum((wanted.count, wanted.ignored, wanted.masked, wanted.shifted)) == 63
    bad = np.load(f"{sharded['m']}/1.npy").astype(int)
    bad[3, 1] = 7
    np.save(f"{sharded['m']}/1.npy", bad)
    with pytest.raises(MaskError, match=rf"^{re.escape(sharded['m'])}/1.npy: row \[3, 1\]: is 7"):
        evaluate_files(sharded["x"], sharded["y"], **options_of(sharded))
    found = evaluate_files(sharded["x"], sharded["y"], on_error="skip", **options_of(sharded))
    assert found.skipped == [(f"{sharded['m']}/1.npy", "row [3, 1]: is 7, expected 0 or 1")]
    assert found.state.shifted == 3
    with pytest.raises(FileError, match=r"m/0.npy: stands for 1 file, but .*x for 2 files"):
        evaluate_files(sharded["x"], sharded["y"], **options_of(sharded, mask_path=f"{sharded['m']}/0.npy"))


class Stopped(Exception):
    """Whoever watches the progress has had enough."""


def test_going_on_after_any_block_ends_with_the_same_figures(sharded, tmp_path):
    paths, rows = (sharded["x"], sharded["y"]), tmp_path / "rows"
    wanted = evaluate_files(*paths, **options_of(sharded, per_row_path=str(rows)))
    records = [path.read_bytes() for path in sorted(rows.iterdir())]
    for block in range(1, 100):
        state_file, calls = tmp_path / f"{block}.json", []

        def stop(*counts, calls=calls, block=block):
            calls.append(counts)
            if len(calls) > block:
                raise Stopped

        options = options_of(sharded, state_file=state_file, save_every=0, per_row_path=str(rows))
        try:
            evaluate_files(*paths, progress=stop, **options)
        except Stopped:
            found = evaluate_files(*paths, **options)
            assert found.state == wanted.state
            assert found.n_rows == wanted.n_rows - calls[-1][0]
            assert [path.read_bytes() for path in sorted(rows.iterdir())] == records
        else:
            break
    assert block > 10


@pytest.mark.parametrize("what", ["mask", "another mask", "shift"])
def test_a_state_of_other_positions_is_refused(sharded, tmp_path, what):
    options = options_of(sharded, state_file=tmp_path / "state.json")
    evaluate_files(sharded["x"], sharded["y"], **options)
    if what == "mask":
        del options["mask_path"]
    elif what == "shift":
        options["shift"], what = False, "options"
    else:
        np.save(f"{sharded['m']}/0.npy", ~np.load(f"{sharded['m']}/0.npy"))
        what = "mask"
    with pytest.raises(StateError, match=rf"state.json: is the state of an evaluation with {what} "):
        evaluate_files(sharded["x"], sharded["y"], **options)


def run(*arguments):
    return invoke("eval", *arguments, "--axis", "-1", "--backend", "reference")


def test_the_command_tells_why_positions_do_not_count(sharded, tmp_path):
    options = [sharded["x"], sharded["y"], "--shift", "--mask", sharded["m"]]
    result = run(*options, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    state = evaluate_files(*options[:2], **options_of(sharded)).state
    document = json.loads(result.stdout)
    counts = {name: document[name] for name in ("count", "ignored", "masked", "shifted")}
    assert counts == {name: getattr(state, name) for name in counts}
    assert document["nll_nats"] == pytest.approx(state.compute().nll_nats, rel=1e-12)
    table = run(*options).stdout
    for name, number in (("masked", state.masked), ("ignored", state.ignored), ("not predicted", 7)):
        assert re.search(rf"^labels {name} +{number} *$", table, re.MULTILINE)
    assert "masked" not in run(*options[:2]).stdout
    flat = tmp_path / "flat.npy"
    np.save(flat, np.array(3))
    result = run(flat, flat, "--shift")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
