"""logitloss beside its peers: `python asv_benchmarks/peers.py` (`--quick` for a look, `--help` for the rest).

For each work the limit of memory, logitloss and every installed peer take turns, round after round in one
process. Before that, all must agree on the value and the array. The works are in works.py, how each library
does them in contenders.py, the limit in benchmarks/limits.py, checks of other kinds in checks.py, and what is
made of the times in report.py.
"""

import gc
import json
import os
import platform
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import click
import numpy as np
import report
from benchmarks import common
from checks import checks
from contenders import MAKERS, OURS, PEERS
from rich.console import Console
from works import ACTIVATIONS, QUICK_SIZE, WORKS, limits_of, prepare

LIBRARIES = ("logitloss", "numpy", "numba", "scipy", "scikit-learn", "torch", "jax", "optax")
SAVED = Path(__file__).parent / ".asv" / "peers.json"
# Of a value, and of the largest entry of an array: float16 and bfloat16 results are rounded to 2**-11 and
# 2**-8, and peers round the terms too.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 3e-3, "bfloat16": 2e-2}


@click.command()
@click.option("--row", "rows", multiple=True, help="Only works and checks with this in the name.")
@click.option("--peer", "peers", multiple=True, type=click.Choice(list(PEERS)), help="Only these peers.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--runs", default=1, show_default=True, type=click.IntRange(min=1), help="Of everything.")
@click.option("--threads", default=common.thread_count("all"), show_default=True, type=click.IntRange(min=1))
@click.option("--quick", is_flag=True, help="Small shapes: whether it works, not how fast.")
@click.option("--checks/--no-checks", "with_checks", default=True, help="Layouts, small calls, memory.")
@click.option("--json", "saved", default=SAVED, type=click.Path(path_type=Path), help="Where results go.")
@click.option(
    "--from", "source", type=click.Path(exists=True, path_type=Path), help="Show saved results again."
)
@click.option(
    "--in-order/--in-streams",
    default=True,
    help="Whether the limit is of passes in order, or of reads in several streams a thread if faster.",
)
@click.option("--chart", "picture", type=click.Path(path_type=Path), help="Draw the chart there.")
@click.option("--readme", is_flag=True, help="Write README's figures and its chart.")
def main(rows, peers, rounds, runs, threads, quick, with_checks, saved, source, in_order, picture, readme):
    """Measure losses and activations, and their gradients, against the limit and the peers."""
    if readme and not source and (rows or peers or quick):
        raise click.UsageError("--readme is for all of it: no --row, --peer or --quick")
    if source:
        results = json.loads(source.read_text())
    else:
        wanted = {*MAKERS} - {*PEERS} | {*(peers or PEERS)}
        results = measure_all(rows, wanted, rounds, runs, threads, quick, with_checks, saved)
    machine = [f"{name}: {value}" for name, value in results["machine"].items()]
    # A file or a pipe has no width; a line of the table has one all the same.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(*machine, *report.tables(results, in_order), sep="\n", soft_wrap=not sys.stdout.isatty())
    if picture:
        picture.write_text(report.chart(results, in_order), encoding="utf-8")
    if readme:
        report.write_readme(results, in_order)


def measure_all(rows, wanted, rounds, runs, threads, quick, with_checks, saved):
    """Return what was measured, which is saved after every step, so that a long run is not lost."""
    machine = describe_machine(threads) | ({"shapes": f"{QUICK_SIZE} at most, for a look"} if quick else {})
    works = [work for work in WORKS if chosen(work.name, rows)]
    further = checks(WORKS, threads, rounds, quick) if with_checks else ()
    further = [check for check in further if chosen(": ".join(check[:2]), rows)]
    if not works and not further:
        raise click.UsageError(f"nothing has one of these in its name: {', '.join(rows)}")
    results = {
        "machine": machine,
        "rounds": rounds,
        "repeats": runs,
        "works": [
            {
                "name": w.name,
                "floor": w.floor,
                "factors": w.factors,
                "writes": w.gradient or w.loss in ACTIVATIONS,
                "chart": w.chart,
                "runs": [],
            }
            for w in works
        ],
        "checks": [{"group": group, "name": name, "runs": []} for group, name, _ in further],
    }
    saved.parent.mkdir(parents=True, exist_ok=True)
    steps = [partial(measure, work.quick() if quick else work, wanted, rounds, threads) for work in works]
    steps += [figure for _, _, figure in further]
    for number in range(runs):
        for entry, step in zip(results["works"] + results["checks"], steps, strict=True):
            start = perf_counter()
            entry["runs"].append(step())
            done = ": ".join(entry[key] for key in ("group", "name") if key in entry)
            click.echo(f"run {number + 1}, {perf_counter() - start:.0f} s: {done}", err=True)
            gc.collect()
            saved.write_text(json.dumps(results))
    return results


def chosen(name, rows):
    return not rows or any(row in name for row in rows)


def measure(work, wanted, rounds, threads):
    """Return the times, one per round, of each contender and of each manner of the limit."""
    task = prepare(work, threads)
    calls = {name: call for name in MAKERS if name in wanted and (call := made(name, task))}
    check_agreement(calls, work.tolerance or TOLERANCE[work.dtype])
    for name, count in ((report.LIMIT, threads), (report.LIMIT_OF_ONE, 1)):
        calls |= {f"{name}, {manner}": call for manner, call in limits_of(task, count).items()}
    return common.take_turns(calls, rounds)


def made(name, task):
    """Return the contender's function, or None where its library is missing or has no such work."""
    try:
        return MAKERS[name](task)
    except (ImportError, NotImplementedError):
        if name == OURS:
            raise
        return None


def check_agreement(calls, tolerance):
    """Run each contender, which also warms it up, and compare it with logitloss."""
    value, array = sampled(calls[OURS]())
    for name, call in calls.items():
        other_value, other_array = sampled(call())
        if not np.isclose(other_value, value, rtol=tolerance, atol=0):
            raise click.ClickException(f"{name} computes {other_value}, logitloss {value}")
        if array is None:
            continue
        if not np.abs(other_array - array).max() <= tolerance * np.abs(array).max() < np.inf:  # nor NaN
            raise click.ClickException(f"{name} and logitloss differ in the array")


def sampled(result):
    """Return the value, and enough of the array to compare: all of it would be another gigabyte."""
    value, array = result
    if array is None:
        return float(value), None
    some = array.reshape(-1)[::97]
    # NumPy knows nothing of PyTorch's bfloat16.
    some = some.double().numpy() if hasattr(some, "double") else np.asarray(some)
    return float(value), some.astype(np.float64)


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
