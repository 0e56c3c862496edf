"""asv_benchmarks/peers.py: it runs every work and check on small shapes, and draws what it measured.

What is tested is that the code runs, that the libraries found here agree, and the figures made of known
times: not how fast anything is.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "asv_benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="there is no asv_benchmarks beside the tests")
needs_compiler = pytest.mark.skipif(
    shutil.which(shlex.split(os.environ.get("CC", "cc"))[0]) is None, reason="the limit is compiled"
)
SVG = "{http://www.w3.org/2000/svg}"
# Two runs of two rounds, in seconds; who takes long had one turn in each.
RESULTS = {
    "machine": {"processor": "an abacus"},
    "rounds": 2,
    "repeats": 2,
    "works": [
        {
            "name": "cross-entropy 3x4",
            "floor": 0.75,
            "factors": {"torch": 8, "torch.compile": 2},
            "writes": False,
            "chart": True,
            "runs": [
                {
                    "logitloss": [[0.021, 0.02], [0.042, 0.04]],
                    "logitloss, one thread": [[0.05], [0.10]],
                    "logitloss, Numba": [[0.025], [0.05]],
                    "logitloss, figures": [[0.04], [0.08]],
                    "torch": [[0.2], [0.4]],
                    "torch.compile": [[0.03], [0.06]],
                    "numpy": [[1.0]],
                    "limit, plain": [[0.013, 0.012], [0.025, 0.024]],
                    "limit, 3 streams": [[0.01, 0.03], [0.02, 0.02]],
                    "limit of one thread, plain": [[0.02], [0.04]],
                }
            ]
            * 2,
        }
    ],
    "checks": [{"group": "MB a thread", "name": "cross-entropy 3x4", "runs": [[5.0, 4.0], [3.0, 4.0]]}],
}


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("logitloss_report", FOLDER / "report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def command(tmp_path, *options):
    saved = tmp_path / "results.json"
    line = [sys.executable, str(FOLDER / "peers.py"), "--quick", "--rounds", "1", "--threads", "2", *options]
    subprocess.run([*line, "--json", str(saved)], check=True, capture_output=True, text=True)
    return json.loads(saved.read_text())


PEERS = [
    ["numpy", "scipy", "scikit-learn", "torch"],
    pytest.param(["torch.compile", "optax"], marks=pytest.mark.slow),
]


@needs_compiler
@pytest.mark.parametrize("peers", PEERS, ids=lambda peers: peers[0])
def test_every_work(tmp_path, peers):
    options = [word for peer in peers for word in ("--peer", peer)]
    works = command(tmp_path, "--no-checks", *options)["works"]
    names = [work["name"] for work in works]
    assert len(names) == len(set(names)) == 23
    for work in works:
        assert 0.3 < work["floor"] < 0.8
        (run,) = work["runs"]
        assert {"logitloss", "limit, plain", "limit of one thread, plain"} <= set(run)
        assert "numpy" not in peers or "numpy" in run
        assert all(seconds > 0 for rounds in run.values() for turns in rounds for seconds in turns)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_every_kind_of_check(tmp_path):
    kinds = ("every second row", "every second class", "Fortran order", "microseconds", "MB a thread")
    rows = (*kinds[:-1], "outputs: binary cross-entropy")
    checks = command(tmp_path, *(word for row in rows for word in ("--row", row)))["checks"]
    assert {kind for kind in kinds if any(kind in check["group"] for check in checks)} == set(kinds)
    assert len(checks) == 12 + 2 + 6
    for check in checks:
        figure, bound = check["runs"][0]
        assert figure >= 0
        assert bound is None or bound > 0


def test_what_is_wrong_on_the_command_line(tmp_path):
    line = [sys.executable, str(FOLDER / "peers.py"), "--quick", "--json", str(tmp_path / "results.json")]
    for options, message in (
        (["--readme"], "--readme is for all of it"),
        (["--row", "nosuch"], "nothing has one of these in its name: nosuch"),
    ):
        done = subprocess.run([*line, *options], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@needs_compiler
def test_what_agrees():
    """NaN and infinity do not, whoever has them."""
    program = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1])\n"
        "import click, peers\n"
        "nan, inf = np.nan, np.inf\n"
        "for ours, theirs in ((1, 1), (1, 2), (1, nan), (nan, 1), (nan, nan), (inf, inf)):\n"
        "    found = {peers.OURS: ours, 'other': theirs}\n"
        "    calls = {name: lambda x=x: (1.0, np.full(98, x)) for name, x in found.items()}\n"
        "    try:\n        peers.check_agreement(calls, 1e-5)\n        print('agree')\n"
        "    except click.ClickException:\n        print('differ')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(FOLDER)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["agree", *["differ"] * 5]


def test_figures(report):
    (work,) = RESULTS["works"]
    f = report.figures(work)
    assert f.limit_ms == pytest.approx(15)
    assert f.ms["logitloss"] == pytest.approx(30)
    assert f.share["logitloss"] == pytest.approx(0.5)
    # of as many turns: ours are 21 and 42 ms then
    assert f.factor["torch"] == pytest.approx(200 / 21)
    # NumPy took part in the first round alone.
    assert f.factor["numpy"] == pytest.approx(1000 / 21)
    assert f.one_thread == pytest.approx(0.8)
    assert f.avx2 is None
    assert f.numba == pytest.approx(0.84)
    assert f.with_figures == pytest.approx(0.525)
    assert f.missed == ["limit", "torch.compile", "Numba", "figures"]
    assert report.figures(work, in_order=True).share["logitloss"] == pytest.approx(0.6)
    assert report.checked(RESULTS["checks"][0]) == (4.0, 4.0, True)


def test_chart(report):
    root = ElementTree.fromstring(report.chart(RESULTS))
    assert root.find(f"{SVG}title").text
    assert "logitloss 0.50" in root.find(f"{SVG}desc").text
    line = re.match(r"M(\S+) \S+L(\S+) (\S+)", root.find(f"{SVG}path").get("d"))
    limit, bottom = float(line[1]), float(line[3])
    assert limit == float(line[2])
    bars = root.findall(f"{SVG}rect")
    shares = [(float(bar.get("width"))) / (limit - float(bar.get("x"))) for bar in bars]
    assert shares == pytest.approx([0.5, 1 / 3, 0.05, 0.01], abs=1e-3)
    assert all(float(bar.get("y")) + float(bar.get("height")) <= bottom for bar in bars)
    for words in root.findall(f"{SVG}text"):
        # 7 pixels a character are more than a sans-serif of 12 takes on average.
        room = 7 * len(words.text) / (2 if words.get("text-anchor") == "middle" else 1)
        x = float(words.get("x"))
        assert words.get("text-anchor") == "start" or x >= room
        assert words.get("text-anchor") == "end" or x + room <= float(root.get("width"))


def test_readme_gets_the_figures(report, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "CHART", tmp_path / "speed.svg")
    before, after = report.MARKS
    readme.write_text(f"above\n{before}\nyesterday's\n{after}\nbelow\n")
    report.write_readme(RESULTS)
    text = readme.read_text()
    assert "| cross-entropy 3x4 | 15 | 30 | 0.50 | 0.84 | 0.53 | 1.4x | 9.5x | 48x |" in text
    assert "an abacus" in text
    assert "yesterday's" not in text
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert (tmp_path / "speed.svg").read_text() == report.chart(RESULTS)
    assert all(mark in (FOLDER.parent / "README.md").read_text(encoding="utf-8") for mark in report.MARKS)


@needs_compiler
@pytest.mark.parametrize("n", [0, 1, 63, 256, 1023, 1025, 5000])
def test_passes_of_the_limit_write_what_they_read(n):
    spec = importlib.util.spec_from_file_location("logitloss_limits", FOLDER / "benchmarks" / "limits.py")
    limits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(limits)
    zeros, bytes_of_zero = np.zeros(n, np.float32), np.zeros(n, np.uint8)
    for start in range(16):
        source, out = np.arange(start, start + n, dtype=np.float32), np.full(n + 16, -1, np.float32)
        passes = [
            *limits.copies(out[start:][:n], source, threads=2),
            *limits.triads(out[start:][:n], source, zeros, threads=3),
            *limits.triads(out[start:][:n], source, bytes_of_zero, threads=2),
        ]
        for write in passes:
            out[:] = -1
            write()
            assert np.array_equal(out[start:][:n], source)
            assert (out[:start] == -1).all()
            assert (out[start + n :] == -1).all()
        for read in limits.reads(source, threads=2, manners={**limits.IN_ORDER, **limits.STREAMS}):
            read()
