"""The CUDA backend on a GPU: `python asv_benchmarks/gpu.py` in one run (`--dry-run` for a look without one).

First the values of each work are compared with float64's, and the tests run on the device. Then each work
takes turns with a copy on the device, which is its limit, and with the peers installed. No work begins after
`--minutes`; what matters most comes first. The works are here, how each library does them in
gpu_contenders.py; the floors stand beside what was measured.
"""

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

ROOT = Path(__file__).parent.parent
SAVED = Path(__file__).parent / ".asv" / "gpu.json"
LIBRARIES = (
    "logitloss",
    "numba-cuda",
    "numpy",
    "torch",
    "triton",
    "liger-kernel",
    "cupy-cuda12x",
    "cupy-cuda13x",
)
FORWARD, FUSED, BINARY, SOFTMAX = "cross-entropy", "cross-entropy and gradient", "BCE and gradient", "softmax"
FIGURES = "cross-entropy and figures"
CLASSES = (131072, 32768, 4096, 262144, 65536, 16384, 1024)
COMPILED = (131072, 32768, 4096)
# A batch, and what is copied before each call: several times the cache, and long enough (a quarter of a
# millisecond on an H200) for the host to have launched all kernels by its end.
BATCH_BYTES, FLUSH_BYTES = 1 << 29, 1 << 29
# Shares of the copy's bandwidth, rows of 8192 classes and more; and how many times faster than these peers.
FLOORS = {FORWARD: 0.90, FUSED: 0.80, BINARY: 0.85}
LONG_ROW, FACTOR, FACTOR_OF_LONG_ROWS, LONGEST = 8192, 1.0, 1.5, 65536
FASTER_THAN = ("torch.compile", "Liger-Kernel")
# Of the speed of the same call without figures.
FLOOR_OF_FIGURES = 0.8
OVERHEAD_US = 40.0
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
# Passes over the batch: reads and writes.
PASSES = {FORWARD: 1, FIGURES: 1, FUSED: 2, BINARY: 3, SOFTMAX: 2}


@dataclass(frozen=True)
class Work:
    """One line of the table."""

    loss: str
    shape: tuple[int, int]
    dtype: str
    compiled: bool = False  # whether torch.compile takes part, at ten seconds or more each

    @property
    def name(self):
        return f"{self.loss} {'x'.join(map(str, self.shape))}, {self.dtype}"

    @property
    def floor(self):
        """The share of the copy's bandwidth to reach; batches that are no larger than the cache have none."""
        is_large = self.shape[0] * self.shape[1] >= 1 << 26
        return FLOORS.get(self.loss) if is_large and self.shape[1] >= LONG_ROW else None

    @property
    def factor(self):
        return FACTOR_OF_LONG_ROWS if self.shape[1] >= LONGEST else FACTOR


def works():
    """Return all works, the most telling first."""
    found = []
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        elements = BATCH_BYTES // size
        for n_classes in CLASSES:
            shape = (elements // n_classes, n_classes)
            compiled = dtype == "bfloat16" and n_classes in COMPILED
            found += [Work(loss, shape, dtype, compiled) for loss in (FORWARD, FUSED)]
        found.append(Work(BINARY, (elements // 65536, 65536), dtype, dtype == "bfloat16"))
        found += [Work(FIGURES, (elements // n, n), dtype) for n in COMPILED]
        found += [Work(SOFTMAX, (elements // n, n), dtype) for n in (4096, 32768)]
    few = ((1, 131072), (4, 262144), (32, 131072), (8, 32768))
    return found + [Work(loss, shape, "bfloat16") for shape in few for loss in (FORWARD, FUSED)]


@click.command()
@click.option("--dry-run", is_flag=True, help="Everything at tiny sizes, on Numba's simulator.")
@click.option("--minutes", default=7.5, show_default=True, help="After so long no further work is begun.")
@click.option("--test-minutes", default=2.5, show_default=True, help="The tests may take so long.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1))
@click.option("--work", "wanted", multiple=True, help="Only works with this in the name.")
@click.option("--json", "saved", default=SAVED, type=click.Path(path_type=Path), help="Where results go.")
def main(dry_run, minutes, test_minutes, rounds, wanted, saved):
    """Check and measure the CUDA backend; results are saved after every step."""
    begin = perf_counter()
    if dry_run:
        os.environ["NUMBA_ENABLE_CUDASIM"] = "1"
    # Numba reads the environment once.
    import gpu_contenders as contenders

    saved.parent.mkdir(parents=True, exist_ok=True)
    chosen = [work for work in works() if not wanted or any(words in work.name for words in wanted)]
    if dry_run:
        chosen = [replace(w, shape=(min(w.shape[0], 3), min(w.shape[1], 40)), compiled=False) for w in chosen]
        chosen, rounds = list(dict.fromkeys(chosen)), 1
    results = {"machine": machine(contenders), "dry_run": dry_run, "rounds": rounds, "works": []}
    results |= {"values": [], "tests": None, "overhead": {}}

    def step(words):
        click.echo(f"{perf_counter() - begin:5.0f} s: {words}", err=True)
        saved.write_text(json.dumps(results))

    for work in {(w.loss, w.dtype): w for w in reversed(chosen)}.values():
        small = replace(work, shape=(min(work.shape[0], 5), work.shape[1]))
        results["values"].append({"name": small.name, **values(contenders, small)})
        step(f"values of {small.name}")
    results["overhead"] = contenders.overhead(1 if dry_run else 2000)
    step("time of a small call")
    results["tests"] = tests(dry_run, 60 * test_minutes)
    step("tests: " + results["tests"]["summary"])
    for work in chosen:
        if perf_counter() - begin > 60 * minutes:
            click.echo(f"no time for {work.name}", err=True)
            continue
        times = measure(contenders, work, rounds, 1 << 12 if dry_run else FLUSH_BYTES)
        results["works"].append({**asdict(work), "name": work.name, **times})
        step(work.name)
    print("\n".join(report(results)))
    sys.exit(not all(entry["right"] for entry in results["values"]) or results["tests"]["code"] != 0)


def machine(contenders):
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    libraries = ", ".join(f"{name} {number}" for name, number in found.items())
    return {"device": contenders.device_name(), "libraries": libraries}


def values(contenders, work):
    """Return the largest error, relative to the largest entry, against float64's of the reference."""
    task = contenders.Task.of(work)
    value, array = contenders.ours(task)()
    given = [task.host_logits.astype(np.float64), *([] if task.host_target is None else [task.host_target])]
    expected = contenders.call_of(work.loss)(*given, backend="reference")
    expected_value, expected_array = (
        expected
        if work.loss in (FUSED, BINARY, FIGURES)
        else (0.0, expected)
        if work.loss == SOFTMAX
        else (expected, None)
    )
    errors = [abs(contenders.number(value) - expected_value) / max(abs(expected_value), 1e-30)]
    if array is not None:
        difference = np.abs(contenders.on_host(array).astype(np.float64) - expected_array).max()
        errors.append(difference / np.abs(expected_array).max())
    error = float(np.max(errors))  # NaN, if one is
    return {"error": error, "right": error <= TOLERANCE[work.dtype]}


def tests(dry_run, seconds):
    """Run the tests of the CUDA backend, on the device if there is one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")]
    environment = dict(os.environ)
    if dry_run:
        command[-1] += "/test_device_arrays.py"
        command += ["-k", "test_nothing"]
    else:
        command += ["-k", "cuda or device"]
        # Most of their time goes to compiling kernels, on the host.
        command += ["-n", "8"] if importlib.util.find_spec("xdist") else []
        environment |= {"LOGITLOSS_CUDA_DEVICE": "1", "LOGITLOSS_REQUIRE_BACKENDS": "cuda"}
        # JAX would take three quarters of the device's memory, in each process.
        environment |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output = process.communicate()[0] + "\nnot finished in time"
    lines = output.strip().splitlines() or [""]
    failed = [line for line in lines if re.match("FAILED|ERROR", line)]
    return {"code": process.returncode, "summary": lines[-1], "failed": failed[:50], "tail": lines[-40:]}


def measure(contenders, work, rounds, flush_bytes):
    """Return the times in seconds, one per round, of the copy and of each contender."""
    task = contenders.Task.of(work)
    calls = {contenders.COPY: contenders.copy(task), contenders.OURS: contenders.ours(task)}
    left_out = {}
    for name, maker in contenders.peers_of(work.loss).items():
        try:
            calls[name] = maker(task)
            calls[name]()
        except Exception as error:  # whatever a peer has to say must not end the run
            calls.pop(name, None)
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for call in calls.values():
        call()
    times = contenders.take_turns(calls, rounds, flush_bytes)
    return {"times": times, "left_out": left_out, "bytes": task.bytes}


def report(results):
    """Return the lines of the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="shares of the bandwidth of a copy, and how many times faster than others")
    peers = list(
        dict.fromkeys(n for w in results["works"] for n in w["times"] if n not in ("copy", "logitloss"))
    )
    for heading in ("work", "copy TB/s", "logitloss us", "of copy", "floor", *peers, "missed"):
        table.add_column(heading, justify="left" if heading in ("work", "missed") else "right")
    for entry in results["works"]:
        figures = figures_of(entry)
        floor, factors = figures["floor"], figures["factors"]
        table.add_row(
            entry["name"],
            f"{figures['copy']:.2f}",
            f"{figures['us']:.1f}",
            f"{figures['share']:.2f}",
            "" if floor is None else f"{floor:.2f}",
            *(f"{factors[peer]:.2f}x" if peer in factors else "" for peer in peers),
            ", ".join(figures["missed"]),
        )
    console = Console(width=200, highlight=False, record=True, file=io.StringIO())
    console.print(table)
    lines = [f"{name}: {value}" for name, value in results["machine"].items()]
    wrong = [entry for entry in results["values"] if not entry["right"]]
    lines.append(f"values: {len(results['values'])} works checked, wrong: {wrong or 'none'}")
    for name, microseconds in results["overhead"].items():
        lines.append(f"a call on {name}, 32x10: {microseconds:.1f} us (floor {OVERHEAD_US:.0f})")
    lines.append(f"tests: {results['tests']['summary']}")
    return [*lines, *results["tests"]["failed"], console.export_text()]


def figures_of(entry):
    """Return what the times of one work come to."""
    work = Work(entry["loss"], tuple(entry["shape"]), entry["dtype"])
    times = entry["times"]
    copied, moved = 2 * entry["bytes"], PASSES[work.loss] * entry["bytes"]
    share = median(
        (moved / ours) / (copied / copy) for ours, copy in zip(times["logitloss"], times["copy"], strict=True)
    )
    factors = {
        name: median(peer / ours for peer, ours in zip(values, times["logitloss"], strict=True))
        for name, values in times.items()
        if name not in ("copy", "logitloss")
    }
    missed = ["the copy"] if work.floor and share < work.floor else []
    missed += [name for name in FASTER_THAN if factors.get(name, work.factor) < work.factor]
    missed += ["figures"] if factors.get("without figures", 1.0) < FLOOR_OF_FIGURES else []
    return {
        "copy": copied / median(times["copy"]) / 1e12,
        "us": 1e6 * median(times["logitloss"]),
        "share": share,
        "floor": work.floor,
        "factors": factors,
        "missed": missed,
    }


if __name__ == "__main__":
    main()
