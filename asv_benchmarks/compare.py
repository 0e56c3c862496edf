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
# With 7 the test can call something a change; with 10 it still does where another program spoilt one round.
LEAST_ROUNDS, ROUNDS = 7, 10


@click.command()
@click.argument("base", default="HEAD^")
@click.argument("commit", default="HEAD")
@click.option("--bench", multiple=True, help="Other series: a regular expression, as of asv.")
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(min=LEAST_ROUNDS))
def main(base, commit, bench, rounds):
    """Compare the speed of COMMIT with that of BASE; the status is 1 if it is slower, 2 if asv fails."""
    status, _ = compare(HERE.parent, base, commit, bench or default_series(), rounds, show=click.echo)
    sys.exit(status)


def default_series():
    from benchmarks.common import BACKENDS

    return [rf"track_value\w*_over_\w+\('{BACKENDS[0]}', 'float32', '(128x1000|1048576)', 1\)"]


def compare(repository, base, commit, series, rounds=ROUNDS, show=lambda line: None):
    """Run `asv continuous` on two commits of that repository; return its status and what it prints.

    The suite and the environment are this checkout's. Its status is 1 where it failed, too.

    Raises
    ------
    ClickException
        It printed no verdict; the status is 2 then.
    """
    asv = [sys.executable, "-m", "asv", "--config", write_settings(repository)]
    subprocess.run([*asv, "machine", "--yes"], check=True, capture_output=True)
    command = [*asv, "continuous", "--factor", str(FACTOR), "--attribute", f"rounds={rounds}"]
    command += ["--record-samples", *(f"--bench={pattern}" for pattern in series), base, commit]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout:
            lines.append(line.rstrip())
            if not lines[-1].endswith("n/a"):  # asv shows all parameters, and few were asked for
                show(lines[-1])
    output = "\n".join(lines)
    if run.returncode not in (0, 1) or "SIGNIFICANTLY" not in output:
        failed = click.ClickException(
            f"asv has not compared {base} and {commit}: {lines[-1] if lines else ''}"
        )
        failed.exit_code = 2
        raise failed
    return run.returncode, output


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


def slower(output):
    """Return {series: ratio} of the lines of asv's table that it marks as slower."""
    lines = re.findall(r"^\| \+ .*\| *([\d.]+) *\| *(.*?) *\|$", output, re.MULTILINE)
    return {series: float(ratio) for ratio, series in lines}


if __name__ == "__main__":
    main()
