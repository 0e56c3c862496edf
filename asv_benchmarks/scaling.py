"""How `logitloss eval --dask` scales with workers: `python asv_benchmarks/scaling.py`, on a quiet machine.

The same file is evaluated by one process with one thread, then by clusters of 1, 2, ... workers of one thread
each, several times; the cluster's start is not counted. Everything is read once before, so the file should
fit in memory beside the system's cache. Figures must be the same.
"""

import math
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import distributed
import numpy as np

from logitloss.evaluate import evaluate_files


def write(folder: Path, n_rows: int, n_classes: int) -> tuple[str, str]:
    """Write logits and labels, and return their files."""
    rng = np.random.default_rng(0)
    files = str(folder / "logits.npy"), str(folder / "labels.npy")
    logits = np.lib.format.open_memmap(files[0], "w+", np.float32, (n_rows, n_classes))
    for first in range(0, n_rows, 1024):
        part = logits[first : first + 1024]
        part[...] = rng.standard_normal(part.shape, np.float32)
    logits.flush()
    np.save(files[1], rng.integers(0, n_classes, n_rows))
    return files


def seconds(files: tuple[str, str], rounds: int, **options) -> tuple[float, float]:
    """Return the median time of some rounds, after one that does not count, and the loss."""
    times = []
    for _ in range(1 + rounds):
        start = perf_counter()
        state = evaluate_files(*files, **options).state
        times.append(perf_counter() - start)
    return median(times[1:]), state.compute().nll_nats


@click.command()
@click.option("--gigabytes", type=float, default=4.0, show_default=True, help="Of logits.")
@click.option("--classes", type=int, default=50257, show_default=True)
@click.option("--workers", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--rounds", type=int, default=3, show_default=True)
def main(gigabytes: float, classes: int, workers: tuple[int, ...], rounds: int) -> None:
    """Print a line for one process, and for each number of workers."""
    with tempfile.TemporaryDirectory(prefix="logitloss-scaling-") as folder:
        files = write(Path(folder), max(1, round(gigabytes * 1e9 / (4 * classes))), classes)
        alone, nll = seconds(files, rounds, num_threads=1)
        click.echo(f"one process: {alone:.2f} s, {gigabytes / alone:.2f} GB/s")
        for number in workers:
            with (
                distributed.LocalCluster(
                    n_workers=number, threads_per_worker=1, dashboard_address="127.0.0.1:0"
                ) as cluster,
                distributed.Client(cluster, set_as_default=False) as client,
            ):
                took, found = seconds(files, rounds, dask=client)
            assert math.isclose(found, nll, rel_tol=1e-12)
            speed = f"{gigabytes / took:.2f} GB/s, {alone / took:.2f} times as fast"
            click.echo(f"{number} workers: {took:.2f} s, {speed}")


if __name__ == "__main__":
    main()
