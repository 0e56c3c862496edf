"""Evaluation of shards: which there are and how they go together, bad ones, and what a terminal is told."""

import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from cases import rng_for
from shards import BAD, CHUNK_ROWS, N_CLASSES, SIZES, cut, options_of

from logitloss.evaluate import FileError, ShapeError, StateError
from logitloss.evaluate.errors import OutputError
from logitloss.evaluate.files import shard_files

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
        ((shards.folder / "empty", labels), "empty: a directory with no files of .npy, .npz"),
        ((f"{logits}/none-*", labels), r"logits/none-*: no file matches"),
    ):
        with pytest.raises(FileError, match=re.escape(message)):
            shards.evaluate(*paths)


def test_a_file_counts_once_however_a_pattern_meets_it(shards):
    files = shard_files(f"{shards.folder}/**/**/logits/*.npy")
    assert files == [shards.file("logits", number) for number in range(len(SIZES))]


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
    message = "part-1.npy: is another file of this command, and cannot be written"
    for path in shards.paths:
        with pytest.raises(FileError, match=message):
            shards.evaluate(per_row_path=path)
    files = shards.file("logits", 0), shards.file("labels", 0)
    for path in files:
        with pytest.raises(FileError, match=message):
            shards.evaluate(*files, per_row_path=path)
    os.link(files[1], shards.folder / "other-name.npy")
    layer = {"unembedding_path": str(shards.folder / "w.npy"), "bias_path": str(shards.folder / "b.npy")}
    np.save(layer["unembedding_path"], np.ones((N_CLASSES, N_CLASSES), np.float32))
    np.save(layer["bias_path"], np.ones(N_CLASSES, np.float32))
    taken = [str(shards.folder / "other-name.npy"), *layer.values(), str(shards.folder / "s.npy")]
    for path in taken:
        with pytest.raises(FileError, match=f"^{re.escape(path)}: is another file of this command"):
            shards.evaluate(*files, per_row_path=path, state_file=taken[-1], **layer)
    both = f"{shards.folder}/l*s/*.npy"
    with pytest.raises(FileError, match="would have files of the same name"):
        shards.evaluate(both, both, per_row_path=str(shards.folder / "rows"))
    assert shards.evaluate().state == shards.state()


def test_rows_do_not_stand_among_what_is_read(shards):
    others = shards.folder / "others"
    others.mkdir()
    for number in range(len(SIZES)):
        os.rename(shards.file("labels", number), others / f"labels-{number}.npy")
    (shards.folder / "link").symlink_to("others")
    (others / "rows").mkdir()
    refused = [(others, others), (others, shards.folder / "link"), (f"{others}/*.npy", others)]
    refused += [(f"{others}/**/*.npy", folder) for folder in (others, others / "rows")]
    for labels, folder in refused:
        message = re.escape(f"{folder}: records there would be taken for shards of {labels}")
        with pytest.raises(OutputError, match=f"^{message}$"):
            shards.evaluate(shards.paths[0], str(labels), per_row_path=str(folder))
        assert len(os.listdir(others)) == len(SIZES) + 1
    for folder in (others, others / "rows"):
        for _ in range(2):
            found = shards.evaluate(shards.paths[0], f"{others}/labels-*.npy", per_row_path=str(folder))
            assert found.n_rows == sum(SIZES)


# ---- bad shards ----


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


def test_what_is_skipped_does_not_decide_the_classes(shards, tmp_path):
    shards.save("logits", 0, np.zeros((SIZES[0], 5), np.float32))  # and there are labels of 5 and 6
    found = shards.evaluate(on_error="skip", state_file=tmp_path / "state.json")
    assert [file for file, _ in found.skipped] == [shards.file("labels", 0)]
    assert found.state == shards.state(without=[0])


def test_what_is_to_become_of_errors_is_one_of_two(shards):
    for wrong in ("raise", "Fail"):
        with pytest.raises(ShapeError, match=f"on_error: is '{wrong}', expected 'fail' or 'skip'"):
            shards.evaluate(on_error=wrong)


def test_a_layers_options_are_not_for_logits(shards):
    for option in ({"softcap": 3.0}, {"logit_scale": 2.0}, {"bias_path": "none.npy"}):
        with pytest.raises(ShapeError, match="unembedding: is missing"):
            shards.evaluate(**option)


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
    options = ["--chunk-rows", "20", "--on-error", "skip"]
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
