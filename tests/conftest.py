"""The matrix: every test that asks for `backend` and `dtype` runs on all of them, from here.

A backend that cannot run here is skipped with the reason the package gives. LOGITLOSS_REQUIRE_BACKENDS, a
comma-separated list of names, turns such a skip into a failure.
"""

import os
import sys
from pathlib import Path

import pytest

# helper modules lie beside the tests, which are imported by path
sys.path.insert(0, str(Path(__file__).parent))

import simulator
from cases import DTYPES
from shards import BAD, SPOILERS, Shards
from ulp import WIDE

import logitloss

BACKENDS = ("reference", "numba", "cython-baseline", "cython-avx2", "cython-avx512", "cuda")
REQUIRED = {name.strip() for name in os.environ.get("LOGITLOSS_REQUIRE_BACKENDS", "").split(",")} - {""}


def pytest_configure(config):
    unknown = REQUIRED - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(f"LOGITLOSS_REQUIRE_BACKENDS names {sorted(unknown)}; known: {BACKENDS}")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """Return the name of a backend that runs here."""
    reason = logitloss.backends().get(request.param, "not known to logitloss.backends()")
    if reason is not None:
        report = pytest.fail if request.param in REQUIRED else pytest.skip
        report(f"{request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def simulated_size(request, monkeypatch):
    """Keep what goes through CUDA's simulator small."""
    params = getattr(request.node, "callspec", None) and request.node.callspec.params
    if params and params.get("backend") == "cuda" and simulator.is_used():
        simulator.limit(monkeypatch)


@pytest.fixture(scope="session", params=list(DTYPES))
def dtype(request):
    """Return one of the four floating dtypes."""
    if request.param == "float64" and not WIDE:
        pytest.skip("long double is no wider than double here: there is no oracle for float64")
    return DTYPES[request.param]


@pytest.fixture
def shards(tmp_path):
    """Return a data set in shards."""
    return Shards(tmp_path)


@pytest.fixture(params=SPOILERS, ids=lambda spoil: spoil.__name__)
def bad(request, shards):
    """Spoil one of the shards, and return the file, the error and the reason."""
    name, error, reason = request.param(shards)
    return shards.file(name, BAD), error, reason


# Of tests that name no backend: they share the kernels of one.
NUMBA_FILES = {"test_njit": "numba", "test_streams": "numba"}


def group_of(item):
    """Return the tests that one process takes, where several do: a file's, or those that share kernels."""
    params = getattr(item, "callspec", None) and item.callspec.params
    return (params or {}).get("backend") or NUMBA_FILES.get(item.path.stem, item.path.stem)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave the slow tests out unless `-m` says which are wanted, and most of what would be simulated."""
    if simulator.is_used():
        simulator.spread(items)
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
    if not config.getoption("markexpr"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
