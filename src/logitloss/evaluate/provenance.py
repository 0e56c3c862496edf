"""Where figures come from: what was asked for, of which arrays, and what worked it out, when.

Collected once, after the evaluation; JSON has it as `run`, and the page shows that.
"""

import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from logitloss import _backends
from logitloss._threads import get_num_threads
from logitloss._versions import version

LIBRARIES = ("logitloss", "numpy", "ml_dtypes", "numba")


def provenance(
    started: datetime,
    inputs: list[dict[str, Any]],
    options: Mapping[str, Any],
    *,
    num_threads: int | None,
    backend: str | None,
) -> dict[str, Any]:
    """Return what `Report.to_json` describes as `run`; of the options, those that say something."""
    name = _backends.get(backend).name
    return {
        "date": started.astimezone(UTC).isoformat(timespec="seconds"),
        "options": {key: value for key, value in options.items() if value is not None},
        "inputs": inputs,
        "backend": name,
        "instruction_set": name.removeprefix("cython-") if name.startswith("cython-") else None,
        "threads": num_threads or get_num_threads(),
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


def inputs_of(shards: Iterable[tuple[Mapping[str, str], Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return the arrays of shards, each once, from their files and what `Shard.described` says of them."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for files, described in shards:
        arrays = {role: about for role, about in described.items() if isinstance(about, dict)}
        if "hidden" in arrays.get("logits", ()):
            arrays |= arrays.pop("logits")
        for role, about in arrays.items():
            if isinstance(about, dict):
                file = files["logits" if role == "hidden" else role]
                found.setdefault((role, file), {"role": role, "file": file, **about})
    return list(found.values())
