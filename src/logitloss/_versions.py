"""What an installation consists of, for reports of errors: versions, how the kernels were built, backends.

The import of this file is left to the call, because `importlib.metadata` is slow to import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform

from logitloss import _backends
from logitloss._threads import get_num_threads

_LIBRARIES = ("logitloss", "numpy", "ml_dtypes", "numba", "click", "rich", "torch")


def show() -> None:
    """Print it, a fact a line."""
    for key, value in _facts().items():
        print(f"{key}: {value}")


def _facts() -> dict[str, str]:
    facts = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": platform.machine(),
    }
    facts |= {name: version(name) for name in _LIBRARIES}
    facts["threads"] = str(get_num_threads())
    facts |= _build()
    facts["Numba's threading layer"] = _threading_layer()
    for name, reason in _backends.backends().items():
        facts[f"backend {name}"] = reason or f"usable, is {_backends.get(name).name}"
    return facts


def version(name: str) -> str:
    """Return the version of an installed library."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _threading_layer() -> str:
    try:
        module = importlib.import_module("logitloss._kernels.numba_cpu")
    except ImportError as error:
        return f"unknown ({error})"
    return str(module.threading_layer())


def _build() -> dict[str, str]:
    try:
        module = importlib.import_module("logitloss._kernels.cython_cpu")
    except ImportError as error:
        return {"kernels": f"not built ({error})"}
    isas = ", ".join(module.available_isas())
    return {"instruction sets": isas} | {
        f"kernels' {key}": str(value) for key, value in module.build_info().items()
    }
