"""The `logitloss` command as a user meets it: output, exit codes, one line about whatever is wrong."""

import json
import math
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import logitloss.cli
from logitloss.cli import main
from logitloss.evaluate.report import Report

PROGRAM = [sys.executable, "-c", "from logitloss.cli import main; main()"]
SCHEMA = {
    "schema_version": int,
    "logits": str,
    "target": str,
    "loss": str,
    "count": int,
    "ignored": int,
    "masked": int,
    "shifted": int,
    "infinite": int,
    "nll_nats": float,
    "nll_bits": float,
    "nll_nats_standard_error": float,
    "nll_bits_standard_error": float,
    "nll_histogram": list,
    "perplexity": float,
    "accuracy": float,
    "accuracy_standard_error": float,
    "top_k": list,
    "accuracy_by_rank": list,
    "mean_reciprocal_rank": float,
    "mean_reciprocal_rank_standard_error": float,
    "brier": float,
    "brier_standard_error": float,
    "entropy_nats": float,
    "entropy_nats_standard_error": float,
    "confidence": float,
    "confidence_standard_error": float,
    "expected_calibration_error": float,
    "maximum_calibration_error": float,
    "calibration": list,
    "seconds": float,
    "rows_per_second": float,
    "gigabytes_per_second": float,
    "warnings": list,
    "run": dict,
}


def run(*arguments, backend="reference"):
    return CliRunner().invoke(main, ["eval", *map(str, arguments), "--backend", backend])


def figures(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def files(tmp_path):
    """Write arrays, return their paths."""

    def write(**arrays):
        paths = []
        for name, array in arrays.items():
            paths.append(str(tmp_path / f"{name}.npy"))
            np.save(paths[-1], array)
        return paths

    return write


@pytest.fixture
def pair(files):
    """Two files: logits (20, 3), and labels of which three are to be ignored."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 20)
    labels[[2, 3, 5]] = -100
    return files(x=rng.standard_normal((20, 3)), y=labels)


def nll(logits, labels):
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1))[..., None] - shifted
    counted = labels >= 0
    return np.take_along_axis(losses[counted], labels[counted][:, None], -1).mean()


# ---- output ----


def test_json(pair, backend):
    result = run(*pair, "--json", backend=backend)
    assert result.exit_code == 0
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert {key: type(value) for key, value in document.items()} == SCHEMA
    expected = nll(np.load(pair[0]), np.load(pair[1]))
    assert document["nll_nats"] == pytest.approx(expected, rel=1e-14)
    assert document["nll_bits"] == pytest.approx(expected / math.log(2), rel=1e-14)
    assert document["perplexity"] == pytest.approx(math.exp(expected), rel=1e-14)
    assert [document[key] for key in ("logits", "target", "loss", "schema_version")] == [*pair, "ce", 3]
    assert (document["count"], document["ignored"], document["infinite"]) == (17, 3, 0)
    assert document["rows_per_second"] == pytest.approx(20 / document["seconds"])
    assert document["gigabytes_per_second"] == pytest.approx(480e-9 / document["seconds"])


def names_in(value):
    """Return the keys at any depth."""
    if isinstance(value, list):
        return set().union(*map(names_in, value))
    return set(value).union(*map(names_in, value.values())) if isinstance(value, dict) else set()


def test_the_schema_names_all_that_json_has(pair, files):
    documents = [figures(*pair, "--per-class", "--bytes", 7, "--words", 3, "--group-by", pair[1])]
    documents.append(figures(*files(a=np.zeros(3), b=np.arange(3) % 2), "--loss", "bce"))
    text = Report.to_json.__doc__
    for name in names_in(documents):
        assert re.search(rf"\b{re.sub('(_standard_error|_error_bound)$', '', name)}\b", text), name


def test_json_of_what_is_not_finite(files):
    paths = files(x=np.array([[0.0, -np.inf]]), y=np.array([1]))
    document = figures(*paths)
    assert document["nll_nats"] == document["perplexity"] == "Infinity"
    assert document["nll_nats_standard_error"] == "NaN"
    assert document["infinite"] == 1
    assert math.isinf(float(document["nll_nats"]))


def test_table(pair):
    result = run(*pair)
    assert result.exit_code == 0
    document = figures(*pair)
    lines = {re.split(r"\s{2,}", line.strip())[0]: line.split() for line in result.stdout.splitlines()}
    assert lines["negative log-likelihood, nats"][-2:] == [
        f"{document['nll_nats']:.10g}",
        f"{document['nll_nats_standard_error']:.2g}",
    ]
    assert lines["negative log-likelihood, bits"][-2] == f"{document['nll_bits']:.10g}"
    assert lines["perplexity"][-1] == f"{document['perplexity']:.10g}"
    assert lines["accuracy"][-2] == f"{document['accuracy']:.4%}"
    names = {"mean reciprocal rank": "mean_reciprocal_rank", "entropy, nats": "entropy_nats"}
    names |= {"confidence": "confidence", "Brier score": "brier"}
    for shown, name in names.items():
        error = document[f"{name}_standard_error"]
        assert lines[shown][-2:] == [f"{document[name]:.10g}", f"{error:.2g}"]
    for shown, name in (("expected", "expected"), ("largest", "maximum")):
        error = document[f"{name}_calibration_error"]
        assert lines[f"{shown} calibration error"][-1] == f"{error:.10g}"
    assert lines["labels counted"][-1] == "17"
    assert lines["labels ignored"][-1] == "3"
    assert {"seconds", "rows/s", "GB/s"} <= set(lines)
    assert "labels of infinite loss" not in lines


def test_table_tells_of_infinite_losses(files):
    result = run(*files(x=np.array([[0.0, -np.inf]]), y=np.array([1])))
    assert re.search(r"^labels of infinite loss +1 *$", result.stdout, re.MULTILINE)
    assert re.search(r"^negative log-likelihood, nats +inf +nan *$", result.stdout, re.MULTILINE)


# ---- options ----


@pytest.mark.parametrize(
    "options", [["--chunk-rows", 1], ["--chunk-rows", 7], ["--chunk-rows", 1000], ["--threads", 2]]
)
def test_chunks_and_threads_do_not_show(pair, options):
    assert figures(*pair, *options)["nll_nats"] == pytest.approx(figures(*pair)["nll_nats"], rel=1e-14)


def test_axis(files):
    logits, labels = np.random.default_rng(1).standard_normal((4, 6, 3)), np.arange(24).reshape(4, 6) % 3
    last, first, target = files(last=logits, first=np.moveaxis(logits, -1, 0), y=labels)
    expected = pytest.approx(nll(logits, labels), rel=1e-14)
    assert figures(last, target, "--axis", -1)["nll_nats"] == expected
    assert figures(first, target, "--axis", 0, "--chunk-rows", 5)["nll_nats"] == expected


@pytest.mark.parametrize("stored", ["V2", "u2", "f4"])
def test_bfloat16(files, stored):
    logits = np.random.default_rng(2).standard_normal((9, 3)).astype(ml_dtypes.bfloat16)
    labels = np.arange(9) % 3
    array = logits.astype(stored) if stored == "f4" else logits.view(stored)
    options = [] if stored == "f4" else ["--dtype", "bf16"]
    expected = nll(logits.astype(np.float64), labels)
    assert figures(*files(x=array, y=labels), *options)["nll_nats"] == pytest.approx(expected, rel=1e-6)


def test_numpy_saves_bfloat16_as_void(files):
    logits = np.random.default_rng(2).standard_normal((9, 3)).astype(ml_dtypes.bfloat16)
    paths = files(x=logits, y=np.arange(9) % 3)
    result = run(*paths)
    assert result.exit_code == 1
    message = "of type two-byte void: if that is the bits of floats, say --dtype bf16 or f16"
    assert result.stderr == f"logitloss: {paths[0]}: {message}\n"
    expected = nll(logits.astype(np.float64), np.arange(9) % 3)
    assert figures(*paths, "--dtype", "bf16")["nll_nats"] == pytest.approx(expected, rel=1e-6)


def test_ignore_index(pair, files):
    (other,) = files(other=np.where(np.load(pair[1]) == -100, 2, np.load(pair[1])))
    document = figures(pair[0], other, "--ignore-index", 2)
    labels = np.load(other)
    assert document["ignored"] == np.count_nonzero(labels == 2)
    assert document["nll_nats"] == pytest.approx(nll(np.load(pair[0]), np.where(labels == 2, -100, labels)))


def test_binary(files):
    logits, labels = np.array([-0.0381, 0.5, 2.0]), np.array([1, 1, 0])
    document = figures(*files(x=logits, y=labels), "--loss", "bce")
    assert document["loss"] == "bce"
    assert document["count"] == 3
    assert document["nll_nats"] == pytest.approx(
        np.mean(np.logaddexp(0, logits) - logits * labels), rel=1e-15
    )
    assert document["accuracy"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(pair, tmp_path, save):
    path = tmp_path / "both.npz"
    save(path, logits=np.load(pair[0]), labels=np.load(pair[1]))
    document = figures(f"{path}::logits", f"{path}::labels", "--chunk-rows", 6)
    assert document["nll_nats"] == pytest.approx(figures(*pair)["nll_nats"], rel=1e-14)
    assert document["logits"] == f"{path}::logits"


# ---- what is wrong, in one line ----


def fails(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f"logitloss: {message}\n"


def test_missing_file(pair):
    fails([pair[0], "none.npy"], "none.npy: No such file or directory")


def test_missing_file_beside_shards(pair, tmp_path):
    for number in range(2):
        (tmp_path / "y").mkdir(exist_ok=True)
        os.link(pair[1], tmp_path / "y" / f"{number}.npy")
    fails(["none", tmp_path / "y"], "none: No such file or directory")


def test_not_an_array(pair, tmp_path):
    path = tmp_path / "x.npy"
    path.write_text("0.1, 0.2\n")
    fails([path, pair[1]], f"{path}: neither a .npy nor a .npz file")


def test_truncated_file(pair):
    with open(pair[0], "r+b") as file:
        file.truncate(300)
    fails(pair, f"{pair[0]}: truncated: (20, 3) of float64 takes 480 bytes, 172 are there")


def test_wrong_shape(pair, files):
    (short,) = files(short=np.zeros(19, int))
    shapes = "of shape (19,), but logits of shape (20, 3) with the classes on axis 1 need (20,)"
    fails([pair[0], short], f"{short}: {shapes}")


def test_label_out_of_range(pair, files):
    labels = np.load(pair[1])
    labels[13] = 3
    (bad,) = files(bad=labels)
    message = f"{bad}: row 13: label 3 is outside 0 to 2, and is not ignore_index=-100"
    for options in ([], ["--chunk-rows", 4]):
        fails([pair[0], bad, *options], message)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_bad_logit(pair, files, value):
    logits = np.load(pair[0])
    logits[[2, 7], 1] = float(value)  # row 2 is ignored
    (bad,) = files(bad=logits)
    fails([bad, pair[1], "--chunk-rows", 3], f"{bad}: row 7: the logit of class 1 is {value}")


def test_axis_that_is_not_there(pair):
    fails([*pair, "--axis", 2], f"{pair[0]}: of shape (20, 3), which has no axis 2")


def test_unknown_options_are_usage_errors(pair):
    for options in (["--loss", "mse"], ["--chunk-rows", 0], ["--threads", 0], ["--ignore-index", 2**63]):
        result = run(*pair, *options)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save-every", 3], "--save-every is for --state"),
        (["--loss", "bce", "--top-k", 2], "--top-k is for labels of classes"),
    ],
)
def test_options_that_say_nothing_here_are_usage_errors(pair, options, message):
    result = run(*pair, *options)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (2, f"Error: {message}")


def test_a_page_is_not_written_over_another_file_of_the_command(pair, files, tmp_path):
    (groups,) = files(g=np.zeros(20, int))
    rows, state, page = tmp_path / "rows.npy", tmp_path / "state.json", tmp_path / "page.html"
    options = ["--group-by", groups, "--mask", groups, "--per-row", rows, "--state", state]
    rows.touch()
    state.touch()
    for taken in (*pair, groups, rows, state):
        page.symlink_to(taken)
        before = Path(taken).read_bytes()
        fails(
            [*pair, *options, "--report", page],
            f"{page}: is another file of this command, and cannot be written",
        )
        assert Path(taken).read_bytes() == before
        page.unlink()


def test_missing_backend(pair, monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("backend 'cython' is missing: build it")

    monkeypatch.setattr(logitloss.cli, "evaluate_files", missing)
    fails(pair, "backend 'cython' is missing: build it")


def test_out_of_memory(pair, monkeypatch):
    def exhausted(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(logitloss.cli, "evaluate_files", exhausted)
    fails(pair, "out of memory; fewer --chunk-rows take less")


# ---- a terminal, and Ctrl-C ----


@pytest.fixture
def long_work(files):
    """Return a command that takes some seconds, a row at a time."""
    x, y = files(x=np.zeros((200_000, 2), np.float16), y=np.zeros(200_000, np.int8))
    return [*PROGRAM, "eval", x, y, "--chunk-rows", "1", "--backend", "reference"]


def test_a_reader_that_has_heard_enough_ends_it_without_a_word(pair):
    command = [*PROGRAM, "eval", *pair, "--backend", "reference"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


def test_no_progress_without_a_terminal(pair):
    command = [*PROGRAM, "eval", *pair, "--backend", "reference"]
    for more in ({}, {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, **more}, check=False
        )
        assert done.returncode == 0
        assert done.stderr == ""
        assert "labels counted" in done.stdout


def test_progress_on_a_terminal_and_interrupt(long_work):
    terminal, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}

    def heed():
        # A shell's job in the background ignores Ctrl-C, and so would its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    options = {"stdout": subprocess.PIPE, "stderr": theirs, "env": environment, "preexec_fn": heed}
    with subprocess.Popen(long_work, **options) as process:
        os.close(theirs)
        shown = ""

        def see(pattern):
            # without the terminal's codes for colours and for moving about
            nonlocal shown
            while not re.search(pattern, re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)):
                shown += os.read(terminal, 4096).decode(errors="replace")

        see(r"[1-9]\d*/200000 rows")
        process.send_signal(signal.SIGINT)
        see(r"interrupted\r\n")
        output, _ = process.communicate(timeout=30)
    os.close(terminal)
    assert process.returncode == 130
    assert output == b""
    assert shown.endswith("logitloss: interrupted\r\n")
    assert "Traceback" not in shown


def test_interrupt_is_one_line(pair, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(logitloss.cli, "evaluate_files", interrupted)
    result = run(*pair)
    assert result.exit_code == 130
    assert result.stderr == "logitloss: interrupted\n"


def test_without_an_error_stream(pair, files):
    """Nothing that belongs there goes to stdout instead."""
    texts = np.random.default_rng(5).integers(1, 7, (9, 40))
    for number, text in enumerate(texts):
        text[20 + number :] = 0  # as padding, of which is warned
    x, y = files(padded=np.zeros((9, 40, 7)), texts=texts)
    command = shlex.join([*PROGRAM, "eval", x, y, "--axis", "-1", "--backend", "reference", "--json"])
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], capture_output=True, timeout=60, check=True)
    assert len(json.loads(done.stdout)["warnings"]) == 1


def test_a_reader_that_leaves_early_is_no_error_of_ours(pair):
    command = [*PROGRAM, "eval", *pair, "--backend", "reference"]
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(theirs)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


# ---- the rest ----


def test_help_and_version():
    assert "eval" in CliRunner().invoke(main, ["--help"]).stdout
    assert re.fullmatch(r"logitloss, version \d+\.\d+\S*\n", CliRunner().invoke(main, ["--version"]).stdout)


def test_versions():
    result = CliRunner().invoke(main, ["versions"])
    assert result.exit_code == 0
    assert "numpy" in result.stdout.lower()


def test_importing_the_package_imports_no_command_line():
    unwanted = {"click", "rich", "ml_dtypes", "logitloss.evaluate"}
    code = f"import logitloss, sys; assert not {unwanted} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- what may be asked for ----


def test_top_k(pair):
    assert [line["k"] for line in figures(*pair)["top_k"]] == [1]
    document = figures(*pair, "--top-k", 2, "--top-k", 3, "--top-k", 4)
    assert [line["k"] for line in document["top_k"]] == [2]
    line = next(line for line in run(*pair, "--top-k", 2).stdout.splitlines() if line.startswith("top-2"))
    assert line.split()[2] == f"{document['top_k'][0]['accuracy']:.4%}"
    assert run(*pair, "--top-k", 0).exit_code == run(*pair, "--top-k", 101).exit_code == 2


def test_a_line_for_each_class(pair, files):
    document = figures(*pair, "--per-class")
    labels = np.load(pair[1])
    assert [line["count"] for line in document["per_class"]] == np.bincount(labels[labels >= 0]).tolist()
    table = run(*pair, "--per-class").stdout.split("class ")[1].splitlines()[1:4]
    for line, shown in zip(document["per_class"], table, strict=True):
        numbers = [line["class"], line["count"], line["predicted"]]
        assert shown.split() == [*map(str, numbers), f"{line['nll_nats']:.6g}", f"{line['accuracy']:.4%}"]
    fails(
        [*files(a=np.zeros(3), b=np.ones(3, int)), "--loss", "bce", "--per-class"],
        "per_class: is for classes, not for loss 'bce'",
    )


def test_of_many_classes_those_are_shown_that_add_most_to_the_loss(files):
    logits = 50 * np.eye(60)[[*range(60), 0, 0]]
    paths = files(x=logits, y=np.array([*range(60), 57, 3]))
    table = run(*paths, "--per-class").stdout
    lines = table.split("class ")[1].splitlines()[1:]
    assert [int(line.split()[0]) for line in lines[:2]] == [3, 57]
    assert len(lines) == 41
    assert lines[-1].strip() == "those that add most to the loss; JSON has all 60"
    assert len(figures(*paths, "--per-class")["per_class"]) == 60


# ---- a text's bytes and words ----


def test_figures_by_byte_and_by_word(pair):
    found = figures(*pair, "--bytes", "11", "--words", "3")
    total = found["nll_nats"] * found["count"]
    assert (found["bytes"], found["words"]) == (11, 3)
    assert found["bits_per_byte"] == pytest.approx(total / 11 / math.log(2), rel=1e-14)
    assert found["perplexity_per_byte"] == pytest.approx(math.exp(total / 11), rel=1e-14)
    assert found["perplexity_per_word"] == pytest.approx(math.exp(total / 3), rel=1e-14)
    table = run(*pair, "--bytes", "11", "--words", "3").stdout
    for name, value in (("bits per byte", "bits_per_byte"), ("perplexity per word", "perplexity_per_word")):
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert line.rstrip().endswith(f" {found[value]:.10g}")
    assert "bits_per_byte" not in figures(*pair)
