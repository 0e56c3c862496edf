"""asv_benchmarks/gpu.py: all of it runs at tiny sizes on the simulator; its figures come from known times."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import logitloss as ll

FOLDER = Path(__file__).parent.parent / "asv_benchmarks"
REASON = ll.backends().get("cuda")
pytestmark = [
    pytest.mark.skipif(not FOLDER.exists(), reason="there is no asv_benchmarks beside the tests"),
    pytest.mark.skipif(REASON is not None, reason=f"cuda: {REASON}"),
]


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("logitloss_gpu", FOLDER / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["logitloss_gpu"] = module
    spec.loader.exec_module(module)
    return module


def test_dry_run(tmp_path):
    saved = tmp_path / "gpu.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--dry-run", "--json", str(saved), "--work", "float32"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(saved.read_text())
    assert results["dry_run"]
    assert len(results["works"]) == len(results["values"]) == 5
    assert all(entry["right"] for entry in results["values"])
    assert results["tests"]["code"] == 0, results["tests"]["tail"]
    assert all(len(entry["times"]["copy"]) == 1 for entry in results["works"])
    for entry in results["works"]:
        reasons = ("ModuleNotFoundError", "NotImplementedError")
        assert all(reason.startswith(reasons) for reason in entry["left_out"].values())
    assert "floor 40" in done.stdout
    assert "values: 5 works checked, wrong: none" in done.stdout


def test_figures(gpu):
    work = gpu.Work(gpu.FUSED, (2048, 131072), "bfloat16")
    times = {"copy": [1.0, 2.0], "logitloss": [1.25, 2.5], "torch.compile": [1.5, 3.0], "torch": [5.0, 10.0]}
    entry = {
        "loss": work.loss,
        "shape": list(work.shape),
        "dtype": work.dtype,
        "times": times,
        "bytes": 10**12,
    }
    figures = gpu.figures_of(entry)
    assert figures["share"] == pytest.approx(0.8)
    assert figures["copy"] == pytest.approx(2 / 1.5)
    assert figures["factors"] == pytest.approx({"torch.compile": 1.2, "torch": 4.0})
    assert figures["missed"] == ["torch.compile"]
    forward = gpu.figures_of(entry | {"loss": gpu.FORWARD, "shape": [65536, 4096]})
    assert forward["share"] == pytest.approx(0.4)
    assert (forward["floor"], forward["missed"]) == (None, [])
    slow = {"copy": [2.0], "logitloss": [1.3], "without figures": [1.0]}
    beside = gpu.figures_of(entry | {"loss": gpu.FIGURES, "times": slow})
    assert beside["factors"]["without figures"] == pytest.approx(1 / 1.3)
    assert beside["missed"] == ["figures"]


def test_works_are_what_is_asked_for(gpu):
    works = gpu.works()
    assert len({work.name for work in works}) == len(works)
    for dtype in ("bfloat16", "float32"):
        for loss in (gpu.FORWARD, gpu.FUSED):
            classes = {w.shape[1] for w in works if (w.loss, w.dtype) == (loss, dtype)}
            assert classes >= {1 << n for n in (10, 12, 14, 15, 16, 17, 18)}
    # more than a cache of 60 MB holds
    assert all(work.shape[0] * work.shape[1] * 2 > 2e8 for work in works if work.shape[0] > 32)
