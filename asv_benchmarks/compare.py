"""Is the last commit slower than the one before? `python asv_benchmarks/compare.py [BASE COMMIT]`.

`asv continuous` builds both commits and takes rounds of the two in turns, each benchmark of a round in a
process of its own, so that a machine that drifts does so for both. Of each it has as many ratios to memory's
limit as there are rounds. A series has changed if its medians differ by over FACTOR and a rank test calls
that no chance (one in 500). By default the series are few: the default backend's, on batches that fit a
cache, where the arithmetic shows. What is measured stays apart from the results that the page shows.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).parent.resolve()
FACTOR = 1.15
# The fewest with which the rank test can call anything a change
ROUNDS = 7


@click.command()
@click.argument("base", default="HEAD^")
@click.argument("commit", default="HEAD")
@click.option("--bench", multiple=True, help="Other series: a regular expression, as of asv.")
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(min=ROUNDS))
def main(base, commit, bench, rounds):
    """Compare the speed of COMMIT with that of BASE; the status is 1 if it is slower."""
    run = compare(HERE.parent, base, commit, bench or default_series(), rounds)
    sys.exit(run.returncode)


def default_series():
    from benchmarks.common import BACKENDS

    return [rf"track_value\w*_over_\w+\('{BACKENDS[0]}', 'float32', '(1024x1000|1048576)', 1\)"]


def compare(repository, base, commit, bench, rounds=ROUNDS, **options):
    """Run `asv continuous` on two commits of that repository, with this checkout's suite and environment."""
    settings = write_settings(repository)
    asv(settings, "machine", "--yes", capture_output=True)
    counts = ["--factor", str(FACTOR), "--attribute", f"rounds={rounds}", "--record-samples"]
    series = [word for pattern in bench for word in ("--bench", pattern)]
    return asv(settings, "continuous", *counts, *series, base, commit, **options)


def write_settings(repository):
    """Write those of asv.conf.json with another repository and a folder of their own for results."""
    from asv.util import load_json

    kept = HERE / ".asv"
    settings = load_json(HERE / "asv.conf.json", js_comments=True) | {
        "repo": str(repository),
        "benchmark_dir": str(HERE / "benchmarks"),
        "env_dir": str(kept / "env"),
        "results_dir": str(kept / "compared"),
    }
    kept.mkdir(exist_ok=True)
    path = kept / "compare.conf.json"
    path.write_text(json.dumps(settings))
    return path


def asv(settings, *arguments, **options):
    return subprocess.run([sys.executable, "-m", "asv", "--config", settings, *arguments], **options)


def slower(output):
    """Return {series: ratio} of the lines of asv's table that it marks as slower."""
    lines = re.findall(r"^\| \+ .*\| *([\d.]+) *\| *(.*?) *\|$", output, re.MULTILINE)
    return {series: float(ratio) for ratio, series in lines}


if __name__ == "__main__":
    main()
