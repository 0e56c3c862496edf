"""The demo from end to end, and the picture of README."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import invoke

from logitloss.demo import load_digits

README_PICTURE = Path(__file__).parents[1] / ".readme" / "loss_curve.py"


def test_the_digits_are_the_data_set_of_the_note_beside_them():
    images, labels = load_digits()
    assert images.shape == (1797, 64)
    assert labels.shape == (1797,)
    assert images.dtype == labels.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 16)
    # counts of the ten digits and the sum of all pixels, as in scikit-learn's copy
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.sum(dtype=np.int64) == 561718


def test_demo_runs_end_to_end(backend, tmp_path):
    folder = tmp_path / "a new" / "folder"
    result = invoke("demo", "--output-dir", folder, "--backend", backend)
    assert result.exit_code == 0, result.output
    losses = [float(loss) for loss in re.findall(r"training loss (\S+) nats", result.stdout)]
    assert losses[0] == pytest.approx(np.log(10), abs=1e-4)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.07
    logits, labels = np.load(folder / "logits.npy"), np.load(folder / "labels.npy")
    assert (logits.shape, logits.dtype, labels.shape) == ((450, 10), np.float32, (450,))
    accuracy = np.mean(logits.argmax(1) == labels)
    assert accuracy > 0.95
    assert f"{accuracy:.4%}" in result.stdout

    command = shlex.split(re.search(r"^next: (.*)$", result.stdout, re.MULTILINE).group(1))
    assert command == ["logitloss", "eval", str(folder / "logits.npy"), str(folder / "labels.npy"), "--json"]
    figures = set()
    for options in (
        [],
        ["--chunk-rows", "1"],
        ["--chunk-rows", "7"],
        ["--chunk-rows", "1000", "--threads", "2"],
    ):
        again = invoke(*command[1:], "--backend", backend, *options)
        figures.add(json.loads(again.stdout)["nll_nats"])
    assert max(figures) - min(figures) <= 1e-12
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    nll = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(450), labels]
    assert max(figures) == pytest.approx(nll.mean(), rel=1e-6)


def test_demo_as_a_user_runs_it(tmp_path):
    """In a process of its own, with no choice of folder: a fresh one each time."""
    command = [sys.executable, "-c", "from logitloss.cli import main; main()", "demo"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (folder,) = tmp_path.iterdir()
    files = {"logits.npy", "labels.npy", "hidden.npy", "unembedding.npy"}
    assert {path.name for path in folder.iterdir()} == files
    assert f"next: logitloss eval {folder}/logits.npy {folder}/labels.npy" in done.stdout


def test_demo_where_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = invoke("demo", "--output-dir", tmp_path / "file", "--backend", "reference")
    assert result.exit_code == 1
    assert re.fullmatch(r"logitloss: \[Errno 17\] File exists: '.*/file'\n", result.stderr)


def test_demo_where_a_file_cannot_be_written(tmp_path):
    (tmp_path / "hidden.npy").mkdir()
    result = invoke("demo", "--output-dir", tmp_path, "--backend", "reference")
    assert (result.exit_code, result.stderr) == (1, f"logitloss: {tmp_path}/hidden.npy: Is a directory\n")


def test_demo_writes_over_nothing_but_its_own(tmp_path):
    command = ["demo", "--output-dir", tmp_path, "--backend", "reference"]
    for _ in range(2):
        assert invoke(*command).exit_code == 0
    for name in ("logits", "labels", "hidden", "unembedding"):
        path = tmp_path / f"{name}.npy"
        own = path.read_bytes()
        np.save(tmp_path / "theirs.npy", np.load(path)[:-1])
        for theirs in ((tmp_path / "theirs.npy").read_bytes(), b"my own"):
            path.write_bytes(theirs)
            result = invoke(*command)
            message = f"logitloss: {path}: is there and holds something else; choose another directory\n"
            assert (result.exit_code, result.stderr, path.read_bytes()) == (1, message, theirs)
        path.write_bytes(own)
    assert invoke("demo", "--output-dir", tmp_path, "--backend", "cython-baseline").exit_code == 0


@pytest.mark.skipif(not README_PICTURE.exists(), reason="README's pictures are in the repository alone")
def test_readme_picture_is_what_its_script_draws():
    script = runpy.run_path(str(README_PICTURE))
    assert script["PICTURE"].read_text(encoding="utf-8") == script["draw"]()
