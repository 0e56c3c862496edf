"""What peers.py checks beside the works: layouts, small calls, memory.

Each is a group, a name, and a function that returns a figure and the bound it should be under, or None.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict
from functools import partial

import numpy as np
from benchmarks import common
from benchmarks.peak_memory import MEGABYTE, peak
from contenders import OURS, PEERS, logitloss
from report import paired, typical
from works import CROSS_ENTROPY, HALF, Task, Work, prepare

SHAPES = (HALF, (65536, 1000))
LAYOUTS = {
    "every second row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every second class": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "Fortran order": np.asfortranarray,
}
SMALL, SMALL_CALLS = (32, 10), 1000
LAYOUT_BOUND, MEMORY_BOUND = 1.5, 4.0


def checks(works, threads, rounds, quick):
    for layout, shape, gradient in (
        (layout, shape, gradient) for layout in LAYOUTS for shape in SHAPES for gradient in (False, True)
    ):
        work = Work(CROSS_ENTROPY, shape, 0, gradient)
        measured = work.quick() if quick else work
        figure = partial(layout_cost, layout, measured, threads, rounds)
        yield f"time over a contiguous batch's, {layout}", work.name, figure
    for gradient in (False, True):
        work = Work(CROSS_ENTROPY, SMALL, 0, gradient)
        yield "microseconds (PyTorch eager's beside them)", work.name, partial(small_call, work, rounds)
    for work in works:
        measured = work.quick() if quick else work
        yield "MB a thread beyond inputs and outputs", work.name, partial(memory_in_child, measured, threads)


def layout_cost(layout, work, threads, rounds):
    """Return the time over that of the contiguous batch; a gradient has the logits' order."""
    task = prepare(work, threads)
    logits = LAYOUTS[layout](task.logits)
    out = None if task.out is None else np.full_like(logits, 1)
    other = Task(work, logits, task.target, None, out, threads)
    calls = {"contiguous": logitloss(task), layout: logitloss(other)}
    for call in calls.values():
        call()
    times = common.take_turns(calls, rounds)
    return paired(times[layout], times["contiguous"]), LAYOUT_BOUND


def small_call(work, rounds):
    """Return microseconds a call of ours and of PyTorch's, to which one thread is kindest."""
    task = prepare(work, 1)
    calls = {OURS: logitloss(task, num_threads=None)}
    with contextlib.suppress(ImportError):
        calls["torch"] = PEERS["torch"](task)
    for call in calls.values():
        repeat(call)
    times = common.take_turns({name: partial(repeat, call) for name, call in calls.items()}, rounds)
    micros = {name: 1e6 / SMALL_CALLS * typical(values) for name, values in times.items()}
    return micros[OURS], micros.get("torch")


def repeat(call):
    for _ in range(SMALL_CALLS):
        call()


def memory_in_child(work, threads):
    """Measure in a process of its own, where nothing freed before is there to be used again."""
    command = [sys.executable, __file__, json.dumps(asdict(work)), str(threads)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout) / threads, MEMORY_BOUND


def peak_memory(work, threads):
    """Return the MB that a call takes at its peak where its arrays, the kernels and the threads are there."""
    logitloss(prepare(Work(CROSS_ENTROPY, (threads, 2), 0), threads))()
    call = logitloss(prepare(work, threads))
    return peak(call) / MEGABYTE


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    print(peak_memory(Work(**{**fields, "shape": tuple(fields["shape"])}), int(sys.argv[2])))
