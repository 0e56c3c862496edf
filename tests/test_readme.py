"""README's "Offline evaluation", block by block, in an empty folder."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from logitloss import cross_entropy

README = Path(__file__).parents[1] / "README.md"
PROGRAM = [sys.executable, "-c", "from logitloss.cli import main; main()"]


def blocks():
    section = README.read_text(encoding="utf-8").split("\n## Offline evaluation\n")[1].split("\n## ")[0]
    return re.findall(r"^```(sh|python)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def printed(command, folder):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def figure(table, name):
    return re.search(rf"^{name} +(\S+)", table, re.MULTILINE).group(1)


@pytest.mark.skipif(not README.exists(), reason="README is in the repository alone")
def test_offline_evaluation_runs_as_shown(tmp_path):
    folder, outputs, programs = tmp_path, {}, []
    for language, text in blocks():
        if language == "python":
            programs.append(printed([sys.executable, "-c", text], folder))
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "cd":
                folder = folder / words[1]
            else:
                assert words[0] == "logitloss"
                *words, file = words if ">" in words else (*words, None)
                output = printed([*PROGRAM, *(word for word in words[1:] if word != ">")], folder)
                if file:
                    (folder / file).write_text(output)
                outputs[" ".join(words[1:])] = output
    perplexities = {
        figure(output, "perplexity")
        for command, output in outputs.items()
        if command.startswith(("eval", "merge"))
        and not {"--json", "bce", "skip", "--shift"} & set(command.split())
    }
    first = figure(outputs["eval logits.npy labels.npy"], "perplexity")
    # the made logits are rounded otherwise
    assert {round(float(perplexity), 5) for perplexity in perplexities} == {round(float(first), 5)}
    figures, states = programs[-2:]
    for line in states.splitlines():
        assert float(line) == pytest.approx(float(first), rel=1e-6)
    document = json.loads(outputs["eval logits.npy labels.npy --json"])
    assert float(figures.split()[0]) == pytest.approx(document["brier"], rel=1e-12)
    hardest = ast.literal_eval(figures.splitlines()[1])
    table = outputs["eval logits.npy labels.npy --per-class --top-k 3"]
    assert float(figure(table, hardest["class"])) == hardest["count"]
    assert 0.98 < float(figure(table, "top-3 accuracy").rstrip("%")) / 100 < 1
    binary = next(output for command, output in outputs.items() if "bce" in command)
    assert 0.95 < float(figure(binary, "ROC AUC")) < 1
    skipping = next(output for command, output in outputs.items() if "skip" in command)
    assert re.search(r"^skipped shards/logits/10.npy: truncated: ", skipping, re.MULTILINE)
    tokens, kept = np.load(folder / "tokens.npy"), np.load(folder / "mask.npy")
    losses = cross_entropy(np.load(folder / "next.npy")[:, :-1], tokens[:, 1:], axis=-1, reduction="none")
    padded, masked = (output for command, output in outputs.items() if "--shift" in command)
    assert float(figure(masked, "perplexity")) == pytest.approx(np.exp(losses[kept[:, 1:]].mean()), rel=1e-9)
    assert float(figure(padded, "perplexity")) == pytest.approx(np.exp(losses.mean()), rel=1e-9)
    reasons = {"counted": kept[:, 1:].sum(), "masked": (~kept[:, 1:]).sum(), "not predicted": len(tokens)}
    assert {name: int(figure(masked, f"labels {name}")) for name in reasons} == reasons
    assert len(os.listdir(folder / "shards" / "rows")) == 12
    assert {"run.json", "rows.npy", "odd.npy"} < set(os.listdir(folder))
    assert {"reliability.png", "losses.png", "ranks.png"} < set(os.listdir(folder))
    comparison = outputs["compare a.json b.json --report comparison.html"]
    assert re.search(r"(a|b) is (better|ahead)", comparison)
    assert "of row-wise differences (a.npy, b.npy)" in comparison
    # from shards to a report, and the same on two processes
    in_one, in_two = (
        re.sub(
            r"^(seconds|rows/s|GB/s) .*",
            "",
            outputs[f"eval tensors::logits tensors::labels {option}"],
            flags=re.M,
        )
        for option in ("--report report.html", "--dask local:2")
    )
    assert in_one == in_two
    assert figure(in_one, "labels counted") == figure(outputs["eval logits.npy labels.npy"], "labels counted")
    assert in_one.split()[:3] == ["value", "standard", "error"]
    for page in ("report.html", "classes.html", "comparison.html"):
        assert (folder / page).read_text(encoding="utf-8").startswith("<!doctype html>")
