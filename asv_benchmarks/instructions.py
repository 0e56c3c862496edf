"""The C rows' instructions: `python asv_benchmarks/instructions.py`, with `--record` to keep what is counted.

Times tell what a user has of a change, and on a busy machine they tell it late. Instructions are the same to
the last one each time: callgrind counts those of `instructions.c`, small works on one thread with AVX2. A
work that takes over 3 % more than `instructions.json` says fails; its figures hold for the compiler it names.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

HERE = Path(__file__).parent
ROWS = HERE.parent / "_kernels" / "c"
RECORDED = HERE / "instructions.json"
MOST_GROWTH = 0.03


@click.command()
@click.option("--record", is_flag=True, help="Keep what is counted: for the commit that means to change it.")
def main(record):
    """Count the instructions of each work and compare them with those recorded."""
    with tempfile.TemporaryDirectory() as folder:
        program = compiled(Path(folder))
        names = run(program).stdout.splitlines()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            counts = dict(zip(names, pool.map(lambda n: counted(program, n), range(len(names))), strict=True))
    found = {"compiler": compiler(), "instructions": counts}
    if record:
        RECORDED.write_text(json.dumps(found, indent=2) + "\n")
    recorded = json.loads(RECORDED.read_text())
    report(recorded["instructions"], counts)
    if recorded["compiler"] != found["compiler"]:
        click.echo(f"not compared: recorded with {recorded['compiler']}, counted with {found['compiler']}")
        return
    wrong = judge(recorded["instructions"], counts)
    click.echo("\n".join(wrong) if wrong else f"no work takes over {MOST_GROWTH:.0%} more than recorded")
    sys.exit(bool(wrong))


def judge(recorded, counts):
    """Return a line for each work that grew too much, or that is in one of the two alone."""
    wrong = [f"{name}: counted, not recorded" for name in counts if name not in recorded]
    wrong += [f"{name}: recorded, not counted" for name in recorded if name not in counts]
    for name in counts.keys() & recorded.keys():
        before, now = recorded[name], counts[name]
        if now > before * (1 + MOST_GROWTH):
            wrong.append(f"{name}: {before} instructions recorded, now {now}, {now / before - 1:+.1%}")
    if wrong:
        wrong.append("If that is meant, record it anew: python asv_benchmarks/instructions.py --record")
    return wrong


def report(recorded, counts):
    for name, count in counts.items():
        before = recorded.get(name)
        change = "" if before is None else f"{count / before - 1:+8.2%}"
        click.echo(f"{count:12,d} {change}  {name}")


def compiled(folder):
    """Return the program, made with setup.py's own flags."""
    command = shlex.split(os.environ.get("CC", "cc"))
    sources = [HERE / "instructions.c", ROWS / "avx2.c", ROWS / "common.c"]

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        options = [*flags(), "-ffunction-sections", "-I", ROWS]
        subprocess.run([*command, *options, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(len(sources)) as pool:
        objects = list(pool.map(compile_one, sources))
    program = folder / "instructions"
    # What names the tables of other instruction sets is left out, and so need not be there.
    subprocess.run([*command, *objects, "-lm", "-Wl,--gc-sections", "-o", program], check=True)
    return program


def flags():
    """Return the list FLAGS of setup.py, which is no module to import."""
    body = ast.parse((HERE.parent / "setup.py").read_text()).body
    assigned = (node for node in body if isinstance(node, ast.Assign))
    return next(ast.literal_eval(node.value) for node in assigned if node.targets[0].id == "FLAGS")


def compiler():
    command = [*shlex.split(os.environ.get("CC", "cc")), "--version"]
    return run(*command).stdout.splitlines()[0]


def counted(program, number):
    """Return the instructions of one work."""
    tool = ["valgrind", "--tool=callgrind", "--toggle-collect=measured", "--callgrind-out-file=/dev/null"]
    return int(re.search(r"Collected : (\d+)", run(*tool, program, str(number)).stderr)[1])


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    main()
