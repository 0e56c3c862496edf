"""Evaluation of shards: how they are found and paired, bad ones, and how a state goes on with them."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from cases import rng_for
from children import run_child
from click.testing import CliRunner

from logitloss.cli import main
from logitloss.evaluate import (
    DtypeError,
    EvaluationError,
    EvaluationState,
    FileError,
    LabelError,
    LogitError,
    ShapeError,
    StateError,
    evaluate,
    evaluate_files,
)
from logitloss.evaluate.files import shard_files

N_CLASSES, CHUNK_ROWS = 7, 10
SIZES = (31, 1, 20, 64, 0, 12, 9, 40, 33, 50, 25, 18)  # so many that the tenth is not the second
BAD = 3


class Shards:
    """A directory of logits, one of labels and one of keys, a file of each for each shard."""

    def __init__(self, folder):
        self.folder = folder
        rng = rng_for("shards")
        for name in ("logits", "labels", "keys"):
            (folder / name).mkdir()
        for number, size in enumerate(SIZES):
            self.save("logits", number, 3 * rng.standard_normal((size, N_CLASSES), np.float32))
            self.save(
                "labels", number, np.where(rng.random(size) < 0.1, -100, rng.integers(0, N_CLASSES, size))
            )
            self.save("keys", number, rng.choice(["a", "b"], size))
        self.paths = str(folder / "logits"), str(folder / "labels")

    def file(self, name, number):
        return str(self.folder / name / f"part-{number + 1}.npy")

    def save(self, name, number, array):
        np.save(self.file(name, number), array)

    def load(self, name, number):
        return np.load(self.file(name, number))

    def change(self, name, number, index, value):
        array = self.load(name, number)
        array[index] = value
        self.save(name, number, array)

    def state(self, *, without=(), groups=False):
        """Return what the arrays of one shard after another come to."""
        state = EvaluationState()
        for number in sorted(set(range(len(SIZES))) - set(without)):
            keys = self.load("keys", number) if groups else None
            arrays = self.load("logits", number), self.load("labels", number)
            state.merge(evaluate(*arrays, groups=keys, chunk_rows=CHUNK_ROWS, backend="reference"))
        return state

    def evaluate(self, *paths, **options):
        paths = paths or self.paths
        return evaluate_files(*map(str, paths), chunk_rows=CHUNK_ROWS, backend="reference", **options)

    def run(self, *options):
        command = ["eval", *self.paths, "--chunk-rows", CHUNK_ROWS, "--backend", "reference", *options]
        return CliRunner().invoke(main, list(map(str, command)))


@pytest.fixture
def shards(tmp_path):
    return Shards(tmp_path)


# ---- which shards there are ----


def test_shards_are_taken_in_natural_order(shards):
    expected = [shards.file("logits", number) for number in range(len(SIZES))]
    (shards.folder / "logits" / ".hidden.npy").touch()
    (shards.folder / "logits" / "notes.txt").touch()
    assert shard_files(shards.paths[0]) == expected
    assert shard_files(f"{shards.folder}/l*s/part-*.npy")[: len(SIZES)] == [
        shards.file("labels", number) for number in range(len(SIZES))
    ]
    assert shard_files(shards.file("logits", 3)) == [shards.file("logits", 3)]


def test_shards_come_to_what_their_arrays_do(shards):
    wanted = shards.state(groups=True)
    pattern = f"{shards.folder}/logits/part-*.npy"
    for logits in (shards.paths[0], pattern):
        found = shards.evaluate(logits, shards.paths[1], groups_path=str(shards.folder / "keys"))
        assert found.state == wanted
        assert (found.n_rows, found.n_bytes) == (sum(SIZES), 4 * N_CLASSES * sum(SIZES))
        assert found.skipped == []
    document = json.loads(shards.run("--json", "--group-by", shards.folder / "keys").stdout)
    assert document["nll_nats"] == wanted.compute().nll_nats
    assert document["logits"] == shards.paths[0]
    assert "skipped" not in document


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_shards_of_archives(shards, save):
    (shards.folder / "archives").mkdir()
    for number in range(len(SIZES)):
        arrays = {"x": shards.load("logits", number), "y": shards.load("labels", number)}
        save(shards.folder / "archives" / f"{number}.npz", **arrays)
    for path in (shards.folder / "archives", f"{shards.folder}/arch*/*.npz"):
        assert shards.evaluate(f"{path}::x", f"{path}::y").state == shards.state()


def test_shards_of_hidden_states(shards):
    rng = rng_for("hidden")
    (shards.folder / "hidden").mkdir()
    weight = rng.standard_normal((N_CLASSES, 4), np.float32)
    np.save(shards.folder / "weight.npy", weight)
    for number, size in enumerate(SIZES):
        hidden = rng.standard_normal((size, 4), np.float32)
        shards.save("hidden", number, hidden)
        shards.save("logits", number, hidden @ weight.T)
    made = {"unembedding_path": str(shards.folder / "weight.npy")}
    state_file = str(shards.folder / "state.json")
    found = shards.evaluate(shards.folder / "hidden", shards.paths[1], state_file=state_file, **made)
    wanted = shards.state().compute()
    assert found.state.compute().nll_nats == pytest.approx(wanted.nll_nats, rel=1e-6)
    assert found.n_bytes == 4 * 4 * sum(SIZES)
    assert shards.evaluate(
        shards.folder / "hidden", shards.paths[1], state_file=state_file, **made
    ) == found._replace(n_rows=0, n_bytes=0)
    np.save(shards.folder / "weight.npy", 2 * weight)
    with pytest.raises(StateError, match=r"with logits of .*hidden/part-1.npy"):
        shards.evaluate(shards.folder / "hidden", shards.paths[1], state_file=state_file, **made)


def test_shards_may_be_of_different_types(shards):
    shards.save("logits", 5, shards.load("logits", 5).astype(np.float16))
    shards.save("labels", 6, shards.load("labels", 6).astype(np.int8))
    assert shards.evaluate().state == shards.state()


def test_what_stands_for_no_shards_or_not_as_many(shards):
    logits, labels = shards.paths
    os.unlink(shards.file("labels", 4))
    (shards.folder / "empty").mkdir()
    for paths, message in (
        ((logits, labels), f"{labels}: stands for 11 files, but {logits} for 12 files"),
        ((shards.file("logits", 0), labels), f"for 11 files, but {shards.file('logits', 0)} for 1 file"),
        ((shards.folder / "empty", labels), "empty: a directory with no .npy or .npz files"),
        ((f"{logits}/none-*", labels), r"logits/none-*: no file matches"),
    ):
        with pytest.raises(FileError, match=re.escape(message)):
            shards.evaluate(*paths)


def test_a_file_may_have_a_patterns_name(shards):
    path = str(shards.folder / "logits[1-3].npy")
    np.save(path, shards.load("logits", 3))
    found = shards.evaluate(path, shards.file("labels", 3)).state
    assert found == shards.evaluate(shards.file("logits", 3), shards.file("labels", 3)).state


# ---- what becomes of each row ----


def test_each_shard_has_a_file_of_its_rows(shards):
    folder = shards.folder / "rows"
    state = shards.evaluate(per_row_path=str(folder)).state
    rows = [np.load(folder / f"part-{number + 1}.npy") for number in range(len(SIZES))]
    assert tuple(map(len, rows)) == SIZES
    together = np.concatenate(rows)
    assert together["counted"].sum() == state.count
    assert together["loss"].sum(dtype=np.float64) == pytest.approx(state.finite.total.value, rel=1e-12)
    for number, found in enumerate(rows):
        assert np.array_equal(found["counted"], shards.load("labels", number) != -100)


def test_rows_are_not_written_over_what_is_read(shards):
    message = "part-1.npy: is read, and cannot be written"
    for path in shards.paths:
        with pytest.raises(FileError, match=message):
            shards.evaluate(per_row_path=path)
    files = shards.file("logits", 0), shards.file("labels", 0)
    for path in files:
        with pytest.raises(FileError, match=message):
            shards.evaluate(*files, per_row_path=path)
    both = f"{shards.folder}/l*s/*.npy"
    with pytest.raises(FileError, match="would have files of the same name"):
        shards.evaluate(both, both, per_row_path=str(shards.folder / "rows"))
    assert shards.evaluate().state == shards.state()


# ---- bad shards ----


def cut(shards):
    with open(shards.file("logits", BAD), "r+b") as file:
        file.truncate(1000)
    return "logits", FileError, r"truncated: \(64, 7\) of float32 takes 1792 bytes, 872 are there"


def header(shards):
    with open(shards.file("labels", BAD), "r+b") as file:
        file.write(b"\x93NUMPY\x01\x00\xff\x7f{")
    return "labels", FileError, "truncated or damaged .npy header"


def missing(shards):
    os.unlink(shards.file("logits", BAD))
    os.symlink("nowhere", shards.file("logits", BAD))
    return "logits", FileError, "No such file or directory"


def fewer_labels(shards):
    shards.save("labels", BAD, shards.load("labels", BAD)[1:])
    return "labels", ShapeError, r"of shape \(63,\), but logits of shape \(64, 7\)"


def more_classes(shards):
    shards.save("logits", BAD, np.zeros((64, 8), np.float32))
    return "logits", ShapeError, "of 8 classes, but shards before have 7"


def other_keys(shards):
    shards.save("keys", BAD, np.arange(64))
    return "keys", DtypeError, "of type int64, but keys of shards before are of another"


def bad_label(shards):
    shards.change("labels", BAD, 37, 7)
    return "labels", LabelError, "row 37: label 7 is outside 0 to 6"


def bad_logit(shards):
    shards.change("labels", BAD, 63, 0)
    shards.change("logits", BAD, (63, 2), np.nan)
    return "logits", LogitError, "row 63: the logit of class 2 is nan"


@pytest.fixture(
    params=[cut, header, missing, fewer_labels, more_classes, other_keys, bad_label, bad_logit],
    ids=lambda spoil: spoil.__name__,
)
def bad(request, shards):
    """Spoil a shard, and return its file, the error and the reason."""
    name, error, reason = request.param(shards)
    return shards.file(name, BAD), error, reason


def options_of(shards):
    return {"groups_path": str(shards.folder / "keys"), "per_row_path": str(shards.folder / "rows")}


def test_a_bad_shard_fails_by_name_and_row(shards, bad):
    file, error, reason = bad
    with pytest.raises(error, match=f"^{re.escape(file)}: {reason}"):
        shards.evaluate(**options_of(shards))
    result = shards.run("--group-by", shards.folder / "keys")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"logitloss: {file}: ")
    assert result.stderr.count("\n") == 1


def test_a_bad_shard_is_skipped_whole(shards, bad):
    file, _, reason = bad
    told = []
    found = shards.evaluate(on_error="skip", on_skip=told.append, **options_of(shards))
    assert found.state == shards.state(without=[BAD], groups=True)
    assert found.skipped == told
    ((skipped, why),) = told
    assert skipped == file
    assert re.match(reason, why)
    assert len(os.listdir(shards.folder / "rows")) == len(SIZES) - 1
    options = ["--group-by", shards.folder / "keys", "--on-error", "skip"]
    result = shards.run(*options, "--json")
    assert result.exit_code == 0
    assert result.stderr == f"logitloss: skipped {file}: {why}\n"
    document = json.loads(result.stdout)
    assert document["skipped"] == [{"file": file, "reason": why}]
    assert document["count"] == found.state.count
    table = shards.run(*options).stdout
    assert re.search(r"^shards skipped +1 *$", table, re.MULTILINE)
    assert f"\nskipped {file}: {why}\n" in table


def test_nothing_is_skipped_of_sound_shards(shards):
    document = json.loads(shards.run("--json", "--on-error", "skip").stdout)
    assert document["skipped"] == []
    assert document["count"] == shards.state().count


def test_where_every_shard_is_bad_nothing_is_told(shards):
    for number in range(len(SIZES)):
        shards.save("logits", number, np.zeros(3, complex))
    result = shards.run("--on-error", "skip", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    *each, last = result.stderr.splitlines()
    assert len(each) == len(SIZES)
    assert last == f"logitloss: {shards.paths[0]}: nothing is left to evaluate: 12 files, skipped"


def test_a_file_cut_while_it_is_read(shards):
    def after(done, n_rows, n_bytes):
        if done == sum(SIZES[:BAD]) + CHUNK_ROWS:
            os.truncate(shards.file("logits", BAD), 128 + 28 * CHUNK_ROWS)

    with pytest.raises(
        FileError, match=r"part-4.npy: truncated while it was read: 408 of 1920 bytes are left"
    ):
        shards.evaluate(progress=after)
    shards.save("logits", BAD, np.ones((64, N_CLASSES)))
    assert [file for file, _ in shards.evaluate(on_error="skip", progress=after).skipped] == [
        shards.file("logits", BAD)
    ]


# ---- a state of shards ----


@pytest.fixture
def state_file(shards):
    return shards.folder / "state.json"


def test_after_repair_it_goes_on(shards, bad, state_file):
    error = bad[1]
    options = {"state_file": state_file, **options_of(shards)}
    with pytest.raises(error):
        shards.evaluate(**options)
    document = json.loads(state_file.read_text())
    before = sum(SIZES[:BAD])
    assert document["n_through"] == BAD
    assert document["done"] - before in (0, 30, 60)
    (shards.folder / "whole").mkdir()
    whole = Shards(shards.folder / "whole")
    for name in ("logits", "labels", "keys"):
        array = whole.load(name, BAD)
        if error is LogitError:
            array[63] = 0  # counted now; it may have been ignored
        if os.path.islink(shards.file(name, BAD)):
            os.unlink(shards.file(name, BAD))
        shards.save(name, BAD, array)
    found = shards.evaluate(**options)
    assert found.n_rows == sum(SIZES) - document["done"]
    assert found.state == shards.state(groups=True)
    rows = np.concatenate([np.load(shards.folder / "rows" / f"part-{i + 1}.npy") for i in range(len(SIZES))])
    assert rows["counted"].sum() == found.state.count
    assert shards.evaluate(**options).state == found.state


def test_what_failed_goes_on_without_the_shard(shards, bad, state_file):
    options = {"state_file": state_file, **options_of(shards)}
    with pytest.raises(EvaluationError):
        shards.evaluate(**options)
    wanted = shards.state(without=[BAD], groups=True)
    for _ in range(2):  # the second finds all done, and tells the same
        found = shards.evaluate(on_error="skip", **options)
        assert found.state == wanted
        assert [file for file, _ in found.skipped] == [bad[0]]
    assert found.n_rows == 0
    with pytest.raises(
        StateError, match=r"has skipped .*part-4.npy \(.*\), and goes on with --on-error skip"
    ):
        shards.evaluate(**options)


def stopped_in(shards, number, state_file, **options):
    """Stop in the middle of a shard, which is bad for that long."""
    labels = shards.load("labels", number)
    shards.change("labels", number, -1, N_CLASSES)
    with pytest.raises(LabelError):
        shards.evaluate(state_file=state_file, **options)
    shards.save("labels", number, labels)


@pytest.mark.parametrize("of", ["through", "begun"])
@pytest.mark.parametrize("what", ["size", "dtype", "logits", "labels", "keys"])
def test_a_state_of_other_shards_is_refused(shards, state_file, of, what):
    options = {"groups_path": str(shards.folder / "keys")}
    stopped_in(shards, 7, state_file, **options)
    number = {"through": 2, "begun": 7}[of]
    argument = {"labels": "target", "keys": "groups"}.get(what, "logits")
    if what == "size":
        for name in ("logits", "labels", "keys"):
            shards.save(name, number, shards.load(name, number)[:-1])
    elif what == "dtype":
        shards.save("logits", number, shards.load("logits", number).astype(np.float64))
    elif what == "logits":
        shards.change("logits", number, 0, 1.0)
    elif what == "labels":
        shards.change("labels", number, slice(0, 5), 6)
    else:
        shards.change("keys", number, slice(0, 5), "b")
    before = state_file.read_bytes()
    message = rf"with {argument} of .*part-{number + 1}.npy .*, this one has"
    for on_error in ("fail", "skip"):
        with pytest.raises(StateError, match=message):
            shards.evaluate(state_file=state_file, on_error=on_error, **options)
    assert state_file.read_bytes() == before


def test_a_state_of_other_options_or_as_many_shards_is_refused(shards, state_file):
    stopped_in(shards, 7, state_file)
    with pytest.raises(StateError, match=r"with options .*, this one has"):
        shards.evaluate(state_file=state_file, ignore_index=3)
    for name in ("logits", "labels"):
        os.unlink(shards.file(name, 11))
    with pytest.raises(StateError, match="with shards 12, this one has 11"):
        shards.evaluate(state_file=state_file)


def test_what_follows_may_be_replaced(shards, state_file):
    stopped_in(shards, 7, state_file)
    shards.change("logits", 7, 39, 1.0)
    shards.change("logits", 9, 0, 1.0)
    shards.save("logits", 10, np.ones((5, N_CLASSES)))
    shards.save("labels", 10, np.arange(5))
    assert shards.evaluate(state_file=state_file).state == shards.state()


def test_a_shard_that_is_through_and_gone_is_not_skipped(shards, state_file):
    stopped_in(shards, 7, state_file)
    os.truncate(shards.file("logits", 2), 50)
    for on_error in ("fail", "skip"):
        with pytest.raises(FileError, match=r"part-3.npy: truncated"):
            shards.evaluate(state_file=state_file, on_error=on_error)


def test_a_state_that_cannot_be_written_is_no_fault_of_a_shard(shards):
    with pytest.raises(FileError, match=r"missing/state.json: No such file"):
        shards.evaluate(on_error="skip", state_file=shards.folder / "missing" / "state.json", save_every=0)
    (shards.folder / "rows").touch()
    with pytest.raises(FileError, match="rows: File exists"):
        shards.evaluate(on_error="skip", per_row_path=str(shards.folder / "rows"))


# ---- progress ----


def test_progress_is_over_all_shards(shards):
    seen = []
    shards.evaluate(progress=lambda *counts: seen.append(counts))
    done = [count for count, *_ in seen]
    assert done[0] == 0
    assert done == sorted(set(done))
    assert seen[-1] == (sum(SIZES), sum(SIZES), 4 * N_CLASSES * sum(SIZES))
    cut(shards)
    seen.clear()
    shards.evaluate(on_error="skip", progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (sum(SIZES), sum(SIZES), 4 * N_CLASSES * (sum(SIZES) - SIZES[BAD]))


def test_a_terminal_is_told_the_speed_and_what_is_skipped(tmp_path):
    for name, array in (("x", np.zeros((100_000, 3), np.float16)), ("y", np.zeros(100_000, np.int8))):
        (tmp_path / name).mkdir()
        for number in range(3):
            np.save(tmp_path / name / f"{number}.npy", array)
    np.save(tmp_path / "y" / "1.npy", np.full(100_000, 3))
    program = [sys.executable, "-c", "from logitloss.cli import main; main()", "eval"]
    options = ["--chunk-rows", "5", "--on-error", "skip"]
    command = [*program, str(tmp_path / "x"), str(tmp_path / "y"), *options]
    terminal, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = ""

        def see(pattern):
            nonlocal shown
            while not re.search(pattern, shown):
                shown += os.read(terminal, 4096).decode(errors="replace")
                shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)

        see(r"[1-9]\d*/300000 rows [\d,]+ rows/s, \d+\.\d\d GB/s \d:\d\d:\d\d")
        see(r"\rlogitloss: skipped .*1.npy: row 0: label 3 is outside 0 to 2, .*\r\n")
        see(r"2\d*/300000 rows")
        process.kill()
    os.close(terminal)


# ---- memory ----

# MiB that README states, whatever the files' size; where threads are few
BOUND = 256


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is told in /proc")
def test_memory_stays_under_its_bound(tmp_path):
    """Files of holes: they take no disk, and are ten times the bound."""
    n_rows = 5 * (BOUND << 20) // (4 * 250)
    for name, shape, dtype in (("x", (n_rows, 250), np.float32), ("y", (n_rows,), np.int64)):
        (tmp_path / name).mkdir()
        for number in range(2):
            np.lib.format.open_memmap(tmp_path / name / f"{number}.npy", "w+", dtype, shape)
    options = ["--state", tmp_path / "state.json", "--save-every", "1", "--per-row", tmp_path / "rows"]
    program = (
        "import test_memory\n"
        "from logitloss.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(test_memory.peak())"
    )
    arguments = ["eval", tmp_path / "x", tmp_path / "y", "--threads", "2", "--json", *options]
    printed = run_child(program, *map(str, arguments))
    document, peak = printed.rsplit("\n", 2)[:2]
    assert json.loads(document)["count"] == 2 * n_rows
    assert int(peak) < BOUND << 10
