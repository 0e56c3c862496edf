"""Every benchmark runs: the first combination of its parameters, which is the smallest, once.

asv finds benchmarks by name, so does this. Ratios of times are taken with a clock that ticks once a look:
what is tested is that the code runs and returns a number, not how fast.
"""

import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import pkgutil
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "asv_benchmarks" / "benchmarks"
PREFIXES = ("time_", "timeraw_", "track_", "mem_", "peakmem_")
NAME = "logitloss_benchmarks"


def load():
    """Import the benchmarks as a package of its own name, not as the common word `benchmarks`."""
    spec = importlib.util.spec_from_file_location(NAME, FOLDER / "__init__.py")
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)
    return [
        importlib.import_module(f"{NAME}.{module.name}") for module in pkgutil.iter_modules([str(FOLDER)])
    ]


def collect():
    """Return (class or module, name of the benchmark) for all there are."""
    found = []
    for module in load() if FOLDER.exists() else ():
        owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
        for owner in owners:
            if getattr(owner, "__module__", module.__name__) == module.__name__:
                members = inspect.getmembers(owner, inspect.isfunction)
                found += [(owner, name) for name, _ in members if name.startswith(PREFIXES)]
    return found


def first(params):
    """Return the first combination; asv allows a plain list where there is one parameter."""
    nested = params and all(isinstance(values, (list, tuple)) for values in params)
    return [values[0] for values in params] if nested else list(params[:1])


@pytest.mark.skipif(not FOLDER.exists(), reason="there is no asv_benchmarks beside the tests")
@pytest.mark.parametrize(
    ("owner", "name"), [pytest.param(o, n, id=f"{o.__name__.split('.')[-1]}.{n}") for o, n in collect()]
)
def test_smallest_case(owner, name, monkeypatch):
    common = sys.modules[f"{NAME}.common"]
    monkeypatch.setattr(common, "perf_counter", itertools.count(1).__next__)
    monkeypatch.setattr(common, "PATIENCE", 0)
    if "_over_" in name and shutil.which(shlex.split(os.environ.get("CC", "cc"))[0]) is None:
        pytest.skip("the limit of memory is compiled, and there is no compiler")
    benchmarks = owner() if inspect.isclass(owner) else owner
    arguments = first(getattr(owner, "params", ()))
    if hasattr(benchmarks, "setup"):
        try:
            benchmarks.setup(*arguments)
        except NotImplementedError as reason:  # asv skips it too
            pytest.skip(str(reason))
    result = getattr(benchmarks, name)(*arguments)
    if name.startswith("track_"):
        values = result["samples"] if isinstance(result, dict) else [result]
        assert values
        assert all(math.isfinite(value) and value > 0 for value in values)
    else:
        assert result is None or name.startswith(("mem_", "timeraw_"))


def test_one_threshold_of_the_page_is_for_each_benchmark():
    """asv takes the largest of those whose expression matches from the name's start, or 5 % without any."""
    if not FOLDER.exists():
        pytest.skip("there is no asv_benchmarks beside the tests")
    lines = FOLDER.with_name("asv.conf.json").read_text().splitlines()
    settings = json.loads("\n".join(line for line in lines if not line.lstrip().startswith("//")))
    for owner, name in collect():
        full = f"{owner.__module__.removeprefix(NAME + '.')}.{owner.__name__}.{name}"
        matching = [kind for kind in settings["regressions_thresholds"] if re.match(kind, full)]
        assert len(matching) == 1, f"{full}: {matching}"


def test_there_are_benchmarks_of_every_kind():
    if not FOLDER.exists():
        pytest.skip("there is no asv_benchmarks beside the tests")
    names = {f"{owner.__name__}.{name}".lower() for owner, name in collect()}
    operations = ("forward", "fused", "binary", "softmax", "evaluat")
    for kind in (*operations, "small", "import", "first", "accuracy", "memory"):
        assert any(kind in name for name in names), kind
