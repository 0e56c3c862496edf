"""`logitloss merge`: states in files, of every way to write them, come to the report of their sum."""

import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import rng_for
from command import invoke
from states import assert_same_figures

from logitloss.evaluate import EvaluationState, StateError, evaluate, merge
from logitloss.evaluate.errors import OutputError
from logitloss.evaluate.merge import merge_files

N_CLASSES = 7


@pytest.fixture
def parts(tmp_path):
    """Arrays of three parts, and the state of each."""
    rng = rng_for("merge")
    parts = []
    for n_rows in (30, 1, 44):
        logits = rng.standard_normal((n_rows, N_CLASSES), np.float32)
        target = np.where(rng.random(n_rows) < 0.1, -100, rng.integers(0, N_CLASSES, n_rows))
        groups = rng.choice(["a", "b"], n_rows)
        parts.append((logits, target, groups))
    return parts


def state_of(part, **options):
    logits, target, groups = part
    return evaluate(logits, target, groups=groups, backend="reference", **options)


def written(path, *states):
    path.write_text("".join(json.dumps(state.to_dict()) + "\n" for state in states))
    return str(path)


def document_of(*arguments):
    result = invoke("merge", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


def test_states_of_every_kind_come_to_the_whole(parts, tmp_path):
    whole = state_of([np.concatenate(arrays) for arrays in zip(*parts, strict=True)])
    states = [state_of(part) for part in parts]
    logits, target, groups = parts[2]
    for name, array in {"x": logits, "y": target, "g": groups}.items():
        np.save(tmp_path / f"{name}.npy", array)
    files = [tmp_path / f"{name}.npy" for name in "xy"]
    saved = tmp_path / "state.json"
    options = ["--group-by", tmp_path / "g.npy", "--backend", "reference", "--state", saved]
    assert invoke("eval", *files, *options).exit_code == 0
    for paths in (
        [written(tmp_path / "a.json", states[0]), written(tmp_path / "b.json", *states[1:])],
        [written(tmp_path / "lines.json", *states)],
        [written(tmp_path / "two.json", *states[:2]), str(saved)],
    ):
        document = document_of(*paths)
        assert document.pop("states") == paths
        wanted = whole.compute().to_dict()
        assert not {"logits", "target", "seconds", "rows_per_second"} & set(document)
        assert_same_figures({name: document[name] for name in wanted}, json.loads(json.dumps(wanted)))
        for line in document["groups"]:
            wanted = whole.groups[line.pop("group")].compute().to_dict()
            del wanted["shifted"]
            assert_same_figures(line, json.loads(json.dumps(wanted)))


def test_a_state_that_is_indented_or_has_empty_lines(parts, tmp_path):
    states = [state_of(part) for part in parts[:2]]
    (tmp_path / "a.json").write_text(json.dumps(states[0].to_dict(), indent=2))
    (tmp_path / "b.json").write_text(json.dumps(states[1].to_dict()) + "\n\n")
    merged, skipped = merge_files([str(tmp_path / name) for name in ("a.json", "b.json")])
    states[0].merge(states[1])
    assert (merged.compute(), skipped) == (states[0].compute(), [])


def test_the_sum_is_written_and_merges_again(parts, tmp_path):
    paths = [written(tmp_path / f"{i}.json", state_of(part)) for i, part in enumerate(parts)]
    output = tmp_path / "some.json"
    assert document_of(*paths[:2], "--output", output)["count"] == sum((p[1] >= 0).sum() for p in parts[:2])
    again, whole = document_of(output, paths[2]), document_of(*paths)
    del again["states"], whole["states"]
    assert_same_figures(again, whole)
    assert EvaluationState.from_dict(json.loads(output.read_text())) == merge_files(paths[:2])[0]


def test_a_sum_that_cannot_be_written_leaves_the_one_before(parts, tmp_path, monkeypatch):
    path, output = written(tmp_path / "a.json", state_of(parts[0])), tmp_path / "sum.json"
    merge_files([path], str(output))
    before = output.read_text()

    def full(document, file, **options):
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(merge.json, "dump", full)
    with pytest.raises(OutputError, match=r"sum.json: No space left on device$"):
        merge_files([path], str(output))
    assert output.read_text() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.json", "sum.json"]


def test_a_sum_goes_to_what_is_no_file_too(parts, tmp_path):
    path = written(tmp_path / "a.json", state_of(parts[0]))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as reader:
        read = reader.submit(pipe.read_text)
        state, _ = merge_files([path], str(pipe))
        assert EvaluationState.from_dict(json.loads(read.result())) == state
    assert pipe.is_fifo()


def test_ranks_are_of_classes(tmp_path):
    path = written(tmp_path / "a.json", EvaluationState("bce"))
    result = invoke("merge", path, "--top-k", 3)
    assert (result.exit_code, "--top-k is for labels of classes" in result.stderr) == (2, True)


def test_table_and_options(parts, tmp_path):
    path = written(tmp_path / "a.json", state_of(parts[0], per_class=True))
    table = invoke("merge", path, "--top-k", 3, "--bytes", 100, "--words", 20).stdout
    assert re.search(r"^top-3 accuracy +\d", table, re.MULTILINE)
    assert re.search(r"^bits per byte +\d", table, re.MULTILINE)
    assert re.search(r"^perplexity per word +\d", table, re.MULTILINE)
    assert re.search(r"^class +labels", table, re.MULTILINE)
    assert not re.search(r"^(seconds|rows/s|GB/s)", table, re.MULTILINE)
    assert "count twice" in invoke("merge", "--help").stdout


def test_what_a_finished_run_has_skipped_is_told(shards, bad, tmp_path):
    saved = tmp_path / "state.json"
    options = ["--group-by", shards.folder / "keys"]
    assert shards.run("--on-error", "skip", "--state", saved, *options).exit_code == 0
    document = document_of(saved)
    assert [one["file"] for one in document["skipped"]] == [bad[0]]
    assert document["count"] == shards.state(without=[3]).count


def test_an_unfinished_run_is_refused(shards, tmp_path):
    saved = tmp_path / "state.json"
    shards.change("labels", 3, 37, 7)
    assert shards.run("--state", saved).exit_code == 1
    with pytest.raises(StateError, match=r"not through: 3 of 12 shards and 82 rows are done$"):
        merge_files([str(saved)])


def test_what_is_wrong_is_a_line_with_the_files_name(parts, tmp_path):
    state = state_of(parts[0])
    good = written(tmp_path / "good.json", state)
    logits, target, groups = parts[0]
    others = {
        "bce": EvaluationState("bce"),
        "labels": state_of(parts[0], per_class=True),
        "classes": state_of((logits[:, :3], target % 3, groups)),
        "keys": state_of((logits, target, np.arange(30) % 2)),
    }
    for name, one in others.items():
        written(tmp_path / f"{name}.json", one)
    texts = {
        "empty": "",
        "nothing": "{}\n",
        "list": "[1, 2]",
        "cut": json.dumps(state.to_dict(), indent=1)[:-30],
        "lines": json.dumps(state.to_dict()) + "\n{\n",
        "version": json.dumps(state.to_dict() | {"version": 1}),
        "run": json.dumps({"inputs": {}, "version": 2}),
        "deep": "[" * 100_000,
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\x93NUMPY\xff")
    for name, message in {
        "bce": r"is of loss bce, but what comes before is of ce",
        "labels": r"is of figures each class, but what comes before is of the whole",
        "classes": r"is of classes 3, but what comes before is of 7",
        "keys": r"is of keys int, but what comes before is of str",
        "empty": r"holds no state: it is empty",
        "nothing": r"holds no state of an evaluation \(.*'version'\)",
        "list": r"holds no state of an evaluation \(",
        "cut": r"holds no state: no JSON \(",
        "version": r"holds no state of an evaluation \(version 1, expected \d+\)",
        "run": r"holds no state of an evaluation \(",
        "deep": r"holds no state: no JSON \(",
        "binary": r"holds no state: it is no text",
        "missing": r"No such file or directory",
    }.items():
        path = tmp_path / f"{name}.json"
        result = invoke("merge", good, path)
        assert result.exit_code == 1
        assert re.fullmatch(rf"logitloss: {path}: {message}.*\n", result.stderr), result.stderr
    linked = tmp_path / "linked.json"
    linked.hardlink_to(good)
    for arguments, message in (
        ([tmp_path / "lines.json"], rf"{tmp_path}/lines.json, line 2: holds no state: no JSON"),
        ([good, good], rf"{good}: is given twice"),
        ([good, linked], rf"{linked}: is given twice"),
        ([good, "--output", good], rf"{good}: is another file of this command, and cannot be written"),
        ([good, "--output", tmp_path / "no" / "x.json"], r".*/no/x.json: No such file or directory"),
    ):
        result = invoke("merge", *arguments)
        assert result.exit_code == 1
        assert re.match(f"logitloss: {message}", result.stderr), result.stderr
        assert result.stderr.count("\n") == 1
    assert invoke("merge").exit_code == 2
