"""Where figures come from, as the JSON of a run tells it; and files that are replaced whole or not at all."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from click.testing import CliRunner

import logitloss
from logitloss.cli import main
from logitloss.evaluate.atomic import replacing
from logitloss.evaluate.errors import OutputError


def run_of(*arguments):
    result = CliRunner().invoke(main, ["eval", *map(str, arguments), "--json", "--backend", "reference"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["run"]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(2)
    np.save(tmp_path / "x.npy", rng.standard_normal((30, 4), np.float32))
    np.save(tmp_path / "y.npy", rng.integers(0, 4, 30))
    return tmp_path


def test_what_a_run_tells(folder):
    before = datetime.now(UTC).replace(microsecond=0)
    run = run_of(folder / "x.npy", folder / "y.npy", "--ignore-index", 2, "--threads", 1)
    assert before <= datetime.fromisoformat(run["date"]) <= before + timedelta(minutes=5)
    assert (run["backend"], run["instruction_set"], run["threads"]) == ("reference", None, 1)
    assert run["versions"]["logitloss"] == logitloss.__version__
    assert run["versions"]["numpy"] == np.__version__
    assert run["options"]["ignore_index"] == 2
    assert "axis" not in run["options"]
    logits, target = run["inputs"]
    assert (logits["role"], logits["file"]) == ("logits", str(folder / "x.npy"))
    assert (logits["shape"], logits["dtype"]) == ([30, 4], "<f4")
    assert (target["role"], target["shape"], target["dtype"]) == ("target", [30], "<i8")


def test_a_fingerprint_tells_contents_apart(folder):
    def prints():
        return [one["fingerprint"] for one in run_of(folder / "x.npy", folder / "y.npy")["inputs"]]

    first = prints()
    assert prints() == first
    logits = np.load(folder / "x.npy")
    logits[7, 2] += 1
    np.save(folder / "x.npy", logits)
    assert prints()[0] != first[0]
    assert prints()[1] == first[1]


def test_hidden_states_and_shards_are_told_once_each(folder):
    weight = np.eye(4, dtype=np.float32)
    np.save(folder / "weight.npy", weight)
    for name in ("x", "y"):
        (folder / name).mkdir()
        for number, part in enumerate(np.array_split(np.load(folder / f"{name}.npy"), 3)):
            np.save(folder / name / f"{number}.npy", part)
    hidden = ["--hidden", folder / "x", "--unembedding", folder / "weight.npy"]
    found = [(one["role"], one["file"]) for one in run_of(*hidden, folder / "y")["inputs"]]
    wanted = [("target", str(folder / "y" / f"{number}.npy")) for number in range(3)]
    wanted += [("hidden", str(folder / "x" / f"{number}.npy")) for number in range(3)]
    assert sorted(found) == sorted([*wanted, ("weight", str(folder / "weight.npy"))])


def test_a_state_goes_on_to_the_same(folder):
    command = [folder / "x.npy", folder / "y.npy", "--state", folder / "state.json"]
    assert run_of(*command)["inputs"] == run_of(*command)["inputs"] == run_of(*command[:2])["inputs"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")

    def fails():
        with replacing(path) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]
    with (
        pytest.raises(OutputError, match=r"none/page.html: No such file or directory"),
        replacing(tmp_path / "none" / "page.html"),
    ):
        pass
