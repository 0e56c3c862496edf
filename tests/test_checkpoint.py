"""States as JSON, and evaluations that are stopped, killed and gone on with."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cases import rng_for
from command import invoke
from states import assert_same_states

import logitloss.evaluate.checkpoint
from logitloss.evaluate import EvaluationState, FileError, LabelError, ShapeError, StateError, evaluate
from logitloss.evaluate.rows import row_dtype

PROGRAM = [sys.executable, "-c", "from logitloss.cli import main; main()", "eval"]
N_ROWS, N_CLASSES, CHUNK_ROWS = 3000, 10, 7
KILLS = 50
# Of an evaluation's JSON, what differs from run to run; "run" has the date and the options
TIMES = {"seconds", "rows_per_second", "gigabytes_per_second", "run"}


def arrays(loss="ce"):
    rng = rng_for("checkpoint", loss)
    logits = 3 * rng.standard_normal((N_ROWS, N_CLASSES), np.float32)
    if loss == "bce":
        return logits[:, 0], rng.integers(0, 2, N_ROWS)
    target = rng.integers(0, N_CLASSES, N_ROWS)
    logits[5, target[5]] = -np.inf
    target[::11] = -100
    return logits, target


OPTIONS = ["--chunk-rows", str(CHUNK_ROWS), "--json", "--threads", "1"]


@pytest.fixture
def command(tmp_path):
    """Return a command that takes some hundred blocks, and writes its state after each."""
    names = []
    for name, array in zip("xy", arrays(), strict=True):
        names.append(str(tmp_path / f"{name}.npy"))
        np.save(names[-1], array)
    return [*PROGRAM, *names, *OPTIONS]


@pytest.fixture
def sharded(tmp_path):
    """Return one of the same rows in shards, of which two are bad: one at its start, one at its end."""
    x, y = arrays()
    y[[1500, 2399]] = N_CLASSES, N_CLASSES
    for name, array in (("x", x), ("y", y), ("keys", np.arange(N_ROWS) % 3)):
        (tmp_path / name).mkdir()
        for number, part in enumerate(np.split(array, range(300, N_ROWS, 300))):
            np.save(tmp_path / name / f"{number}.npy", part)
    paths = [str(tmp_path / name) for name in ("x", "y", "keys", "rows")]
    more = ["--on-error", "skip", "--group-by", paths[2], "--per-row", paths[3]]
    return [*PROGRAM, *paths[:2], *OPTIONS, *more]


@pytest.fixture
def texts(tmp_path):
    """Return one of the same rows as texts, shifted and masked, so that blocks end within them."""
    x, y = (array.reshape(30, 100, *array.shape[1:]) for array in arrays())
    y[:, 60:] = 3
    names = []
    for name, array in {"x": x, "y": y, "m": rng_for("mask").random(y.shape) < 0.9}.items():
        names.append(str(tmp_path / f"{name}.npy"))
        np.save(names[-1], array)
    more = ["--axis", "-1", "--shift", "--mask", names.pop(), "--per-row", str(tmp_path / "rows" / "all.npy")]
    (tmp_path / "rows").mkdir()
    return [*PROGRAM, *names, *OPTIONS, *more]


@pytest.fixture
def kept(tmp_path):
    return ["--state", str(tmp_path / "state.json"), "--save-every", "0"]


def figures(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return {name: value for name, value in json.loads(done.stdout).items() if name not in TIMES}


def records(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*")}


# ---- states ----


@pytest.mark.parametrize(("loss", "per_class"), [("ce", False), ("ce", True), ("bce", False)])
def test_a_state_survives_json_to_the_last_bit(loss, per_class):
    options = {"loss": loss, "per_class": per_class}
    state = evaluate(*arrays(loss), chunk_rows=CHUNK_ROWS, backend="reference", **options)
    saved = json.dumps(state.to_dict(), allow_nan=False)
    assert EvaluationState.from_dict(json.loads(saved)) == state
    empty = state.empty()
    assert (empty.loss, empty.per_class, empty.count, empty.ignored) == (loss, per_class, 0, 0)
    empty.merge(state)
    assert empty == state


def test_a_state_with_sums_beyond_float64_survives_json():
    state = EvaluationState()
    state.update(np.array([[5e307, -5e307]] * 3), [1, 1, 1], backend="reference")
    assert state.to_dict()["finite"]["total"][0] == "Infinity"
    found = EvaluationState.from_dict(json.loads(json.dumps(state.to_dict(), allow_nan=False)))
    assert found.finite.total.high == np.inf
    assert found.compute().nll_nats == np.inf


@pytest.mark.parametrize("trial", range(20))
def test_any_cutting_order_and_sharing_gives_the_same(trial):
    rng = np.random.default_rng()
    logits, target = arrays()
    whole = EvaluationState()
    whole.update(logits, target, backend="reference")
    cuts = np.sort(rng.integers(0, N_ROWS, 12))
    states = [EvaluationState() for _ in range(4)]
    for part in rng.permutation(len(cuts) + 1):
        rows = np.split(np.arange(N_ROWS), cuts)[part]
        states[rng.integers(4)].update(logits[rows], target[rows], backend="reference")
    rng.shuffle(states)
    left = EvaluationState.empty(whole)
    for state in states:
        left.merge(state)
    right = states[2]
    for state in (states[0], states[3], states[1]):
        state.merge(right)
        right = state
    for state in (left, right):
        assert_same_states(state, whole)


ONE = evaluate(np.zeros((1, 2)), np.zeros(1, int), backend="reference").to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, expected 3"),
        ({"histogram": [0] * 123}, "histogram of more than 122 bins"),
        ({"histogram": [-1]}, "-1 is no count"),
        ({"histogram": [0.0]}, "0.0 is no count"),
        ({"loss": "mse"}, "loss 'mse'"),
        ({"correct": -1}, "-1 is no count"),
        ({"correct": 1.5}, "1.5 is no count"),
        ({"finite": None}, "not a state"),
        ({"classes": None}, "not a state"),
        ({"finite": {"count": 1, "total": [0.0], "deviations": [0.0, 0.0]}}, "unpack"),
        ({"histogram": [10**30]}, "OverflowError"),
        ({"histogram": [2]}, "counts of 0 rows do not add up"),
        ({"correct": 1}, "counts of 0 rows do not add up"),
        ({"groups": [["a", EvaluationState().to_dict()]] * 2}, "or not each there once"),
        ({"groups": [[None, EvaluationState().to_dict()]]}, "keys are not all int, bool or str"),
        ({"groups": [[key, EvaluationState().to_dict()] for key in ("a", 1)]}, "keys are not all int, bool"),
        ({"groups": [["a", ONE]]}, "counts of 0 rows do not add up"),
    ],
)
def test_what_is_no_state_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EvaluationState.from_dict(EvaluationState().to_dict() | change)
    incomplete = EvaluationState().to_dict()
    del incomplete["finite"]
    with pytest.raises(ValueError, match="KeyError 'finite'"):
        EvaluationState.from_dict(incomplete)


# ---- going on ----


@pytest.mark.parametrize(
    ("of", "kills"), [("command", KILLS), ("sharded", KILLS // 2), ("texts", KILLS // 5)]
)
def test_killed_at_any_moment_it_ends_with_the_same_figures(of, kills, kept, tmp_path, request):
    command = request.getfixturevalue(of)
    start = time.monotonic()
    wanted = figures(command)
    long = time.monotonic() - start  # without the writes of the state, which take as long again and more
    rows = records(tmp_path / "rows")
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    in_the_middle = ends = 0
    while kills > 0:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen([*command, *kept], text=True, **pipes) as process:
            time.sleep(moments.uniform(0.2, 1.5) * long)
            process.kill()
            printed, _ = process.communicate()
        if process.returncode != 0:
            kills -= 1
            in_the_middle += os.path.exists(kept[1])
            continue
        ends += 1
        assert wanted.items() <= json.loads(printed).items(), f"seed {seed}"
        os.unlink(kept[1])
    assert figures([*command, *kept]) == wanted, f"seed {seed}"
    assert records(tmp_path / "rows") == rows, f"seed {seed}"
    assert in_the_middle > 0
    assert figures([*command, *kept]) == wanted, "a state of all rows is the end of it"


def test_stopped_by_a_signal_it_says_how_to_go_on(command, kept):
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            [*command, *kept],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's job in the background ignores Ctrl-C, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        ) as process:
            while not os.path.exists(kept[1]):
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(number)
            printed, said = process.communicate(timeout=60)
        assert process.returncode == 130
        assert printed == ""
        first, second = said.splitlines()
        with open(kept[1]) as file:
            done = json.load(file)["done"]
        assert 0 < done < N_ROWS
        where = f"interrupted after {done} of {N_ROWS} rows, which are in {kept[1]}"
        assert first == f"logitloss: {where}; this goes on from there:"
        assert second.startswith("logitloss eval ")
        assert second.endswith(" ".join(kept))
        wanted = figures(command)
        assert figures([*command, *kept]) == wanted
        os.unlink(kept[1])


def test_a_bad_row_loses_nothing_before_it(tmp_path):
    logits, target = arrays()
    state_file = tmp_path / "state.json"
    bad = target.copy()
    bad[2000] = N_CLASSES
    options = {"chunk_rows": 100, "state_file": state_file, "backend": "reference"}
    with pytest.raises(LabelError, match="row 2000"):
        evaluate(logits, bad, **options)
    assert json.loads(state_file.read_text())["done"] == 2000
    seen = []
    with pytest.raises(LabelError, match="row 2000"):
        evaluate(logits, bad, progress=lambda *counts: seen.append(counts), **options)
    assert seen == [(2000, N_ROWS, 0)]


def test_the_file_is_written_at_the_interval_and_at_the_end(tmp_path, monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr(logitloss.evaluate.checkpoint, "monotonic", lambda: next(now))
    saved = []
    save = logitloss.evaluate.checkpoint.Checkpoint.save

    def counted(self, standing):
        saved.append(standing.done)
        save(self, standing)

    monkeypatch.setattr(logitloss.evaluate.checkpoint.Checkpoint, "save", counted)
    logits, target = arrays()
    for every, expected in ((1e9, [N_ROWS]), (0, list(range(1000, N_ROWS + 1, 1000)))):
        saved.clear()
        options = {"chunk_rows": 1000, "state_file": tmp_path / f"{every}.json", "save_every": every}
        evaluate(logits, target, backend="reference", **options)
        assert saved == expected
    assert {path.name for path in tmp_path.iterdir()} == {"1000000000.0.json", "0.json"}


@pytest.mark.parametrize(
    "what", ["logits", "target", "options", "per_class", "per_row", "chunk_rows", "backend", "none"]
)
def test_a_state_of_other_inputs_is_refused(tmp_path, what):
    logits, target = arrays()
    options = {"chunk_rows": 100, "state_file": tmp_path / "state.json", "backend": "reference"}
    state = evaluate(logits, target, **options)
    if what == "logits":
        logits = logits + 1
    elif what == "target":
        target = target[::-1]
    elif what == "options":
        options["ignore_index"] = 3
    elif what == "per_class":
        options["per_class"], what = True, "options"
    elif what == "chunk_rows":
        options["chunk_rows"] = 50
    elif what == "backend":
        options["backend"] = "cython-baseline"
    elif what == "per_row":
        options["per_row"] = np.zeros(N_ROWS, row_dtype(np.float32))
    else:
        assert evaluate(logits, target, **options) == state
        return
    before = (tmp_path / "state.json").read_bytes()
    with pytest.raises(StateError, match=rf"state.json: is the state of an evaluation with {what} .*, this"):
        evaluate(logits, target, **options)
    assert (tmp_path / "state.json").read_bytes() == before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"version": 2, "state": {}, "done": 0}']
)
def test_what_holds_no_state_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"state.json: holds no state"):
        evaluate(*arrays(), state_file=path, backend="reference")
    assert path.read_bytes() == content


def test_rows_that_do_not_add_up_are_refused(tmp_path):
    path = tmp_path / "state.json"
    evaluate(*arrays(), state_file=path, backend="reference")
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"done": 1}))
    with pytest.raises(FileError, match="1 rows done, 3000 in shards, 3000 counted"):
        evaluate(*arrays(), state_file=path, backend="reference")
    path.write_text(json.dumps(document | {"n_through": 2}))
    with pytest.raises(FileError, match="2 shards through, 1 begun"):
        evaluate(*arrays(), state_file=path, backend="reference")
    path.write_text(json.dumps(document | {"version": 7}))
    with pytest.raises(StateError, match="of version 7, expected 2"):
        evaluate(*arrays(), state_file=path, backend="reference")


def test_numpys_numbers_are_in_a_state(tmp_path):
    options = {"chunk_rows": np.int64(100), "ignore_index": np.int64(-100), "backend": "reference"}
    options |= {"per_class": np.True_, "shift": np.False_}
    path = tmp_path / "state.json"
    assert evaluate(*arrays(), state_file=path, save_every=0, **options).count == 2727
    assert json.loads(path.read_text())["inputs"]["options"]["ignore_index"] == -100


def test_a_handler_that_is_not_pythons_stays(tmp_path, monkeypatch):
    """As where a program that embeds Python has set one: it could not be put back."""
    logits, target = arrays()
    kept = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    evaluate(logits, target, state_file=tmp_path / "state.json", backend="reference")
    monkeypatch.undo()
    assert kept(signal.SIGTERM) == signal.SIG_DFL


def test_a_state_that_is_no_file_is_refused(tmp_path):
    """To read a pipe would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe: not a regular file"):
        evaluate(*arrays(), state_file=tmp_path / "pipe", backend="reference")


def test_the_file_that_differs_is_named(tmp_path):
    logits, target = arrays()
    for name, array in {"x": logits, "y": target, "other": target + (target == 0)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    options = "--backend", "reference", "--state", tmp_path / "state.json"
    assert invoke("eval", tmp_path / "x.npy", tmp_path / "y.npy", *options).exit_code == 0
    result = invoke("eval", tmp_path / "x.npy", tmp_path / "other.npy", *options)
    assert result.exit_code == 1
    assert f"with target of {tmp_path / 'other.npy'} " in result.stderr


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    logits, target = arrays()
    target[0] = -1  # which is not come to
    with pytest.raises(FileError, match=r"missing/state.json: No such file or directory"):
        evaluate(logits, target, state_file=tmp_path / "missing" / "state.json", backend="reference")
    with pytest.raises(FileError, match="Is a directory"):
        evaluate(logits, target, state_file=tmp_path, backend="reference")
    with pytest.raises(ShapeError, match="save_every: is nan, expected seconds from 0 on"):
        evaluate(logits, target, state_file=tmp_path / "s.json", save_every=np.nan, backend="reference")
    assert not list(tmp_path.iterdir())
