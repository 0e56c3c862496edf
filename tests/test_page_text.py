"""The pages of `--report` as text: what is refused, and what a page says of what it does not show."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from command import invoke, printed

import logitloss
from logitloss.evaluate.errors import OutputError
from logitloss.evaluate.report.charts import Scale


@pytest.fixture
def pair(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((20, 3)))
    np.save(tmp_path / "y.npy", np.arange(20) % 3)
    return tmp_path / "x.npy", tmp_path / "y.npy"


def test_a_page_that_cannot_be_written_is_refused_at_once(pair, tmp_path):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "link.html").symlink_to("none/r.html")
    for path, status, message in (
        (pair[1], 2, "does not end in .html"),
        (tmp_path / "none" / "r.html", 2, "there is no directory for"),
        (tmp_path / "folder.html", 2, "is a directory"),
        (tmp_path / "link.html", 1, f"logitloss: {tmp_path}/none/r.html: No such file or directory\n"),
        (tmp_path / f"{'x' * 245}.html", 1, "x.html: File name too long\n"),
    ):
        result = invoke("eval", "no.npy", "no.npy", "--report", path)
        assert result.exit_code == status
        assert message in result.stderr
    files = ["folder.html", "link.html", "x.npy", "y.npy"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_figures_are_told_where_the_page_cannot_be_written(pair, tmp_path, monkeypatch):
    def full(path, page):
        raise OutputError(path, "No space left on device")

    monkeypatch.setattr(logitloss.cli, "write_page", full)
    result = invoke("eval", *pair, "--json", "--report", tmp_path / "r.html")
    assert (result.exit_code, json.loads(result.stdout)["count"]) == (1, len(np.load(pair[1])))
    assert result.stderr == f"logitloss: {tmp_path}/r.html: No space left on device\n"


def test_a_page_of_what_was_not_asked_for(pair, tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    printed("eval", *pair, "--report", path)
    page = path.read_text(encoding="utf-8")
    assert "With --per-class this page shows" in page
    assert 'id="groups"' not in page


def test_pages_of_little_and_of_extremes(tmp_path):
    """No row; none that counts; one of no loss, of infinite loss; a sum that overflows; classes few, many."""
    path = tmp_path / "page.html"
    for logits, labels, words in (
        (np.zeros((0, 3)), np.zeros(0, int), "labels ignored"),
        (np.zeros((2, 3)), [-100, -100], "labels ignored"),
        (1.7e308 * np.eye(5), [1, 2, 3, 4, 0], "class 0"),
        ([[800.0, 0.0]], [0], "No label was taken for another."),
        ([[0.0, -np.inf]], [1], "labels of infinite loss"),
        (np.zeros((3, 1)), [0, 0, 0], "class 0"),
        (np.eye(1025)[:3], [0, 1, 5], "of up to 1024 classes"),
    ):
        np.save(tmp_path / "x.npy", logits)
        np.save(tmp_path / "y.npy", labels)
        printed("eval", tmp_path / "x.npy", tmp_path / "y.npy", "--report", path, "--per-class")
        page = path.read_text(encoding="utf-8")
        assert words in page
        assert not re.search(r' (x|y|width|height|points|r)="[^"]*(nan|inf)', page)


def test_what_makes_figures_doubtful_is_told(tmp_path):
    tokens = np.random.default_rng(5).integers(1, 30, (9, 40))
    for number, text in enumerate(tokens):
        text[20 + number :] = 0
    np.save(tmp_path / "y.npy", tokens)
    np.save(tmp_path / "x.npy", np.zeros((9, 40, 30), np.float32))
    files, path = [tmp_path / "x.npy", tmp_path / "y.npy", "--axis", -1], tmp_path / "page.html"
    (line,) = json.loads(printed("eval", *files, "--json", "--report", path))["warnings"]
    assert "label 0 fills the end of 9 sequences" in line
    assert f'<p class="warning">Warning: {line}</p>' in path.read_text(encoding="utf-8")
    printed("eval", *files, "--ignore-index", 0, "--report", path)
    assert "Warning" not in path.read_text(encoding="utf-8")


def test_keys_are_drawn_without_what_a_page_must_not_hold(pair, tmp_path):
    np.save(tmp_path / "g.npy", np.array(["a\x1bb"] * len(np.load(pair[1]))))
    path = tmp_path / "page.html"
    printed("eval", *pair, "--group-by", tmp_path / "g.npy", "--report", path)
    page = path.read_text(encoding="utf-8")
    assert ("a\ufffdb" in page, "\x1b" in page) == (True, False)


def test_a_page_has_the_first_groups_of_many(tmp_path):
    arrays = {
        "x": np.zeros((201, 2)),
        "y": np.zeros(201, int),
        "g": np.char.add("key", np.arange(201).astype(str)),
    }
    files = [tmp_path / f"{name}.npy" for name in arrays]
    for file, array in zip(files, arrays.values(), strict=True):
        np.save(file, array)
    printed("eval", *files[:2], "--group-by", files[2], "--report", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The first 200 of 201 groups; the JSON of --json has all." in page
    assert len(set(re.findall(r"\bkey\d+", page))) == 200


def test_keys_and_names_are_printed_without_what_steers_a_terminal(pair, tmp_path):
    labels = np.load(pair[1])
    np.save(tmp_path / "g.npy", np.array(["a\x1b]0;b\x07", "c\x9b2J", "é"])[labels])
    names = [tmp_path / name / "p\x1b[1m" for name in ("x", "y")]
    for name, array in zip(names, (np.load(pair[0]), labels), strict=True):
        name.mkdir(parents=True)
        for number in range(2):
            np.save(name / f"{number}.npy", array)
    np.save(names[0] / "1.npy", np.full((20, 3), np.nan))
    rows = tmp_path / "r\x1b[1m"
    shown = printed("eval", *pair, "--group-by", tmp_path / "g.npy")
    keys = re.findall(r"^(\S*\ufffd\S*|é) ", shown, re.MULTILINE)
    assert keys == ["a\ufffd]0;b\ufffd", "c\ufffd2J", "é"]
    shown += printed("eval", *names, "--on-error", "skip")
    assert f"skipped {tmp_path}/x/p\ufffd[1m/1.npy: row 0: " in shown
    (tmp_path / "a.json").write_text(printed("eval", *pair, "--per-row", f"{rows}.npy", "--json"))
    shown += printed("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert f"of row-wise differences ({tmp_path}/r\ufffd[1m.npy, " in shown
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def test_names_of_files_that_are_no_text(tmp_path):
    (tmp_path / "\udcff").mkdir()
    np.save(tmp_path / "\udcff" / "x.npy", np.zeros((3, 2)))
    np.save(tmp_path / "y.npy", np.zeros(3, int))
    path = tmp_path / "page.html"
    printed("eval", tmp_path / "\udcff" / "x.npy", tmp_path / "y.npy", "--report", path, "--json")
    assert r"\udcff/x.npy" in path.read_text(encoding="utf-8")
    (tmp_path / "a.json").write_text(
        printed("eval", tmp_path / "\udcff" / "x.npy", tmp_path / "y.npy", "--json")
    )
    (tmp_path / "a.json").rename(tmp_path / "\udcff" / "a:apple:.json")
    program = [sys.executable, "-c", "from logitloss.cli import main; main()", "compare"]
    files = [os.fsencode(tmp_path / "\udcff" / "a:apple:.json")] * 2
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*program, *files], env=environment, capture_output=True, text=True, check=True)
    assert r"\udcff/a:apple:.json" in done.stdout


@pytest.mark.parametrize(
    ("scale", "wanted"),
    [
        (Scale(0, 1, 0, 250), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Scale(0.9, 1, 200, 0), [0.9, 0.92, 0.94, 0.96, 0.98, 1]),
        (Scale(1, 10, 0, 200), [2, 4, 6, 8, 10]),
        (Scale(1, 100, 0, 300, is_log=True), [1, 2, 5, 10, 20, 50, 100]),
        (Scale(1.25, 20, 0, 300, is_log=True), [2, 5, 10, 20]),
        (Scale(2**-20, 1024, 0, 300, is_log=True), [1e-6, 1e-4, 1e-2, 1, 100]),
    ],
)
def test_ticks(scale, wanted):
    assert scale.ticks() == pytest.approx(wanted)
