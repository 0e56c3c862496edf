"""logitloss beside its peers: `python asv_benchmarks/peers.py` (`--quick` for a look, `--help` for the rest).

For each task the limit of memory, logitloss and every installed peer take turns, round after round in one
process; a figure is the median, a ratio the median of the ratios within a round. Before that, all must agree
on the value and the gradient. What each runs is in contenders.py, the limit in benchmarks/limits.py.
"""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import click
import numpy as np
from benchmarks import common, limits
from contenders import MAKERS, OURS, Task
from rich.console import Console
from rich.table import Table

DTYPE = "float32"
SHAPES = ("1024x131072", "131072x1000", "4000000x10", "67108864")
QUICK_SHAPES = ("1024x1000", "1048576")
LIMIT = "memory's limit"
LIBRARIES = ("logitloss", "numpy", "scipy", "scikit-learn", "torch", "jax", "optax")
# Threads of an OpenMP or Eigen pool spin for a while after their work; the next contender waits that out.
PAUSE = 0.01
RTOL = 1e-4


@click.command()
@click.option(
    "--shape", "shapes", multiple=True, help="NxC for cross-entropy, N for binary; may be repeated."
)
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(MAKERS)), help="Only these.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", default=common.thread_count("all"), show_default=True, type=click.IntRange(min=1))
@click.option("--quick", is_flag=True, help="Small shapes and three rounds: whether it works, not how fast.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every time.")
def main(shapes, peers, rounds, threads, quick, as_json):
    """Measure mean losses of float32 logits, and their gradients, against the limit and the peers."""
    shapes = shapes or (QUICK_SHAPES if quick else SHAPES)
    rounds = min(rounds, 3) if quick else rounds
    wanted = {OURS, *peers} if peers else set(MAKERS)
    console = Console()
    machine = describe_machine(threads)
    if not as_json:
        console.print(
            *(f"{name}: {value}" for name, value in machine.items()),
            sep="\n",
            soft_wrap=True,
            highlight=False,
        )
    results = []
    for shape in shapes:
        for fused in (False, True):
            task = make_task(shape, fused, threads)
            times = measure(task, wanted, rounds)
            results.append({"task": title(shape, fused), "seconds": times})
            if not as_json:
                console.print(table(**results[-1]))
        for cached in (common.logits, common.labels, common.binary_labels, common.gradient):
            cached.cache_clear()
    if as_json:
        click.echo(json.dumps({"machine": machine, "results": results}, indent=1))


def make_task(shape, fused, threads):
    binary = "x" not in shape
    logits = common.logits(DTYPE, shape)
    target = common.binary_labels(DTYPE, shape) if binary else common.labels(shape)
    for array in (logits, target):
        # PyTorch warns of arrays it may not write.
        array.flags.writeable = True
    return Task(logits, target, common.gradient(DTYPE, shape), fused, threads)


def title(shape, fused):
    loss = "cross-entropy" if "x" in shape else "binary cross-entropy"
    return f"{loss}, {'value and gradient' if fused else 'value'}, {DTYPE} {shape}"


def measure(task, wanted, rounds):
    """Return the times of each contender, one per round; the limit's are those of its fastest manner."""
    calls = {name: call for name in MAKERS if name in wanted and (call := made(name, task))}
    check_agreement(calls)
    manners = {(LIMIT, number): call for number, call in enumerate(limit_of(task))}
    times = {name: [] for name in (*manners, *calls)}
    for _ in range(rounds):
        for name, call in (*manners.items(), *calls.items()):
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    fastest = min(manners, key=lambda manner: median(times[manner]))
    return {LIMIT: times[fastest], **{name: times[name] for name in calls}}


def made(name, task):
    """Return the contender's function, or None where its library is missing or has no such work."""
    try:
        return MAKERS[name](task)
    except (ImportError, NotImplementedError):
        if name == OURS:
            raise
        return None


def limit_of(task):
    """Return passes over the memory that the task cannot do without; class labels are too few to count."""
    arrays = (task.logits, task.target) if task.binary else (task.logits,)
    if not task.fused:
        return limits.reads(*arrays, threads=task.threads)
    passes = limits.triads if task.binary else limits.copies
    return passes(task.out, *arrays, threads=task.threads)


def check_agreement(calls):
    """Run each contender once, which also warms it up, and compare it with logitloss."""
    value, grad = sampled(calls[OURS]())
    for name, call in calls.items():
        other_value, other_grad = sampled(call())
        if not np.isclose(other_value, value, rtol=RTOL, atol=0):
            raise click.ClickException(f"{name} computes {other_value}, logitloss {value}")
        if grad is not None and np.abs(other_grad - grad).max() > RTOL * np.abs(grad).max():
            raise click.ClickException(f"{name} and logitloss differ in the gradient")


def sampled(result):
    """Return the value, and enough of the gradient to compare: all of it would be another gigabyte."""
    value, grad = result
    return float(value), None if grad is None else np.asarray(grad).reshape(-1)[::97].copy()


def table(task, seconds):
    rows = Table(title=task, title_justify="left", title_style="bold")
    rows.add_column("")
    for heading in ("ms", "times the limit", "logitloss is faster by"):
        rows.add_column(heading, justify="right")
    for name, times in seconds.items():
        peer = name != LIMIT and not name.startswith(OURS)
        rows.add_row(
            name,
            f"{1000 * median(times):.2f}",
            f"{paired(times, seconds[LIMIT]):.2f}",
            f"{paired(times, seconds[OURS]):.2f}x" if peer else "",
        )
    return rows


def paired(ours, others):
    return median(a / b for a, b in zip(ours, others, strict=True))


def describe_machine(threads):
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except ModuleNotFoundError:
            continue
    return {
        "processor": processor(),
        "processors in use": f"{threads} of {os.cpu_count()}",
        "backend": common.BACKENDS[0],
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "libraries": ", ".join(f"{name} {number}" for name, number in found.items()),
    }


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
