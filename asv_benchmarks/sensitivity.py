"""What compare.py finds, and what it does not: `python asv_benchmarks/sensitivity.py`, for once a week.

In a clone of the repository it commits a slower row pass: more arithmetic on each vector of logits, of which
nothing comes, about 30 % of a value's time. Compared with the commit before, series of cross-entropy must be
called slower, and none of binary cross-entropy, which takes another way. Before that it compares the commit,
time after time, with one that differs in name alone: nothing may be called slower. A line says what came of
each comparison; the status is 1 if one of them went wrong.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import click
from compare import HERE, compare, default_series, slower

PLANTED_IN = "_kernels/c/row.h"
# The start of the function that adds a few vectors of logits, `p`, to a row's sum
AT = r"INLINE void V\(sum_group\)\([^{]*\{\n"
PLANT = """\
    for (int j = 0; j < V(AT_ONCE); j++) {
        V(vector) idle = p[j];
        for (int k = 0; k < 7; k++)
            idle = V(fma)(idle, V(all)(0.5f), p[j]);
        __asm__ volatile("" ::"x"(idle[0]));
    }
"""


@click.command()
@click.option("--same", default=10, show_default=True, help="Comparisons of the commit with itself.")
@click.option("--commit", default="HEAD", show_default=True)
def main(same, commit):
    """Prove that a slowdown of 30 % is found, and that nothing is where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder)
        git(clone, "clone", "--quiet", "--shared", HERE.parent, ".")
        git(clone, "checkout", "--quiet", "-B", "main", commit)
        git(clone, "commit", "--allow-empty", "--message", "the same")
        outcomes = [outcome(clone, is_planted=False) for _ in range(same)]
        plant(clone / PLANTED_IN)
        git(clone, "commit", "--all", "--message", "a slower row pass")
        outcomes.append(outcome(clone, is_planted=True))
    sys.exit(not all(outcomes))


def outcome(clone, is_planted):
    """Compare the last two commits, print what came of it, and return whether that is what must come."""
    start = perf_counter()
    _, output = compare(clone, "main^", "main", default_series())
    found = slower(output)
    is_right = bool(found) == is_planted and all(series.startswith("cross_entropy_") for series in found)
    series = ", ".join(f"{series.partition('(')[0]} {ratio:.2f}" for series, ratio in found.items())
    verdict, commit = "right" if is_right else "WRONG", "planted" if is_planted else "the same"
    click.echo(f"{verdict}  {commit:8}  {perf_counter() - start:4.0f} s  slower: {series or 'none'}")
    return is_right


def plant(path):
    planted, times = re.subn(AT, lambda start: start[0] + PLANT, path.read_text())
    if times != 1:
        raise click.ClickException(f"{path.name} has no one place to put the slowdown: see AT")
    path.write_text(planted)


def git(folder, *arguments):
    identity = ("-c", "user.name=sensitivity", "-c", "user.email=")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
