"""asv_benchmarks/instructions.py: what it makes of counts. That it counts is a step of its own in CI."""

import importlib.util
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "asv_benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="there is no asv_benchmarks beside the tests")


@pytest.fixture(scope="module")
def instructions():
    spec = importlib.util.spec_from_file_location("logitloss_instructions", FOLDER / "instructions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_growth_beyond_three_percent_is_named(instructions):
    recorded = {"cross-entropy": 1000, "softmax": 1000, "faster": 1000}
    assert instructions.judge(recorded, {"cross-entropy": 1030, "softmax": 1000, "faster": 10}) == []
    wrong = instructions.judge(recorded, {"cross-entropy": 1031, "softmax": 1000, "faster": 10})
    assert wrong == [
        "cross-entropy: 1000 instructions recorded, now 1031, +3.1%",
        "If that is meant, record it anew: python asv_benchmarks/instructions.py --record",
    ]


def test_no_work_is_left_out(instructions):
    assert instructions.judge({"a": 1}, {})[0] == "a: recorded, not counted"
    assert instructions.judge({}, {"a": 1})[0] == "a: counted, not recorded"


def test_the_flags_are_those_of_the_build(instructions):
    assert "-O3" in instructions.flags()
    assert "-ffp-contract=off" in instructions.flags()


def test_what_is_recorded_are_the_works_of_the_program(instructions):
    recorded = json.loads(instructions.RECORDED.read_text())["instructions"]
    source = (FOLDER / "instructions.c").read_text()
    assert len(recorded) > 10
    assert [name for name in recorded if f'"{name}"' not in source] == []
