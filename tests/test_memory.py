"""Memory: beside inputs and outputs a call takes 4 MB a thread at most, whatever the size and the layout.

Logits are of 8 MB and more and touched before the call, so that a copy would be seen. The calls are made in a
new process, whose peak of resident memory the system tells. An evaluation of files has a bound of its own.
"""

import json
import sys

import numpy as np
import pytest
from cases import DTYPES, INTEGERS
from children import run_child
from ulp import result_dtype

import logitloss as ll

THREADS = 2
MOST = 4096  # kB: what one thread may take, and here two do not
# The first pays for what a first call loads. Then long rows, short rows, and the most rows.
SHAPES = ((3, 5), (4, 1 << 20), (1 << 18, 16), (1 << 20, 4))
LAYOUTS = {
    "contiguous": lambda shape, dtype: np.ones(shape, dtype),
    "strided rows": lambda shape, dtype: np.ones((2 * shape[0], shape[1]), dtype)[::2],
    "strided classes": lambda shape, dtype: np.ones((shape[0], 2 * shape[1]), dtype)[:, ::2],
    "transposed": lambda shape, dtype: np.ones(shape[::-1], dtype).T,
}


def peak() -> int:
    """Return the most memory that was resident, in kB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def frugal(function, *arguments, **options):
    """Call, and assert that the peak rises by no more than is allowed above what is resident before."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is now what is resident
    before = peak()
    function(*arguments, num_threads=THREADS, **options)
    taken = peak() - before
    assert taken <= MOST, f"{function.__name__} with {list(options)}: {taken} kB"


def by_class(shape):
    """Options that cost some float64 of each class: little, but where classes are many and rows few."""
    return {"weight": np.ones(shape[1]), "label_smoothing": 0.1} if shape[1] < 100 else {}


def labels(make, shape, dtype):
    logits, grad = make(shape, dtype), make(shape, dtype)
    loss, options = np.ones(shape[0], result_dtype(dtype)), by_class(shape)
    for integer in INTEGERS[::3]:
        target = np.ones(3 * shape[0], integer)[::3]
        frugal(ll.cross_entropy, logits, target)
        frugal(ll.cross_entropy, logits, target, reduction="none", out=loss, **options)
        frugal(ll.cross_entropy_value_and_grad, logits, target, out=grad, **options)
    frugal(ll.cross_entropy_grad, logits, target, lse=np.ones(shape[0]), out=grad)
    frugal(ll.nll_loss, logits, target)


def probabilities(make, shape, dtype):
    logits, grad = make(shape, dtype), make(shape, dtype)
    for kind in (dtype, np.dtype(np.float64)):
        target = make(shape, kind)
        frugal(ll.cross_entropy, logits, target)
        frugal(ll.cross_entropy_value_and_grad, logits, target, out=grad, **by_class(shape))


def activations(make, shape, dtype):
    logits, out = make(shape, dtype), make(shape, dtype)
    rows = np.ones(shape[0], result_dtype(dtype))
    for function in (ll.softmax, ll.log_softmax, ll.sigmoid, ll.log_sigmoid):
        frugal(function, logits, out=out)
    frugal(ll.logsumexp, logits, out=rows)
    frugal(ll.entropy, logits, out=rows)


def binary(make, shape, dtype):
    logits, out = make(shape, dtype), make(shape, dtype)
    by_class, by_row = np.ones(shape[1], np.float32), np.ones((shape[0], 1), dtype)
    for kind in (dtype, np.dtype(np.uint8), np.dtype(np.float64)):
        target = make(shape, kind)
        frugal(ll.binary_cross_entropy_with_logits, logits, target, weight=by_class, pos_weight=2.0)
        frugal(
            ll.binary_cross_entropy_with_logits_value_and_grad,
            logits,
            target,
            weight=by_row,
            pos_weight=by_class,
            out=out,
        )
    frugal(ll.binary_cross_entropy, logits, target, weight=by_row)
    frugal(ll.logistic_loss_value_and_grad, logits, target, out=out)
    frugal(ll.kl_div, logits, make(shape, dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is told in /proc")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("family", [labels, probabilities, activations, binary], ids=lambda f: f.__name__)
def test_a_call_takes_little_memory(family, name):
    run_child(
        "import test_memory as t\n"
        "for layout, make in t.LAYOUTS.items():\n"
        "    for shape in t.SHAPES:\n"
        "        print(layout, shape, flush=True)\n"
        f"        t.{family.__name__}(make, shape, t.DTYPES[{name!r}])\n"
    )


# MiB that README states, whatever the files' size; where threads are few
EVALUATION = 400


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is told in /proc")
def test_one_long_key_takes_no_memory_of_its_own(tmp_path):
    """All keys of a block are as wide as the longest: of 60,000 rows these are 480 MB."""
    n_rows = 60_000
    keys = np.lib.format.open_memmap(tmp_path / "keys.npy", "w+", np.dtype("U2000"), (n_rows,))
    keys[7] = 2000 * "k"
    np.save(tmp_path / "x.npy", np.zeros((n_rows, 4), np.float32))
    np.save(tmp_path / "y.npy", np.zeros(n_rows, np.int64))
    program = (
        "import test_memory\n"
        "from logitloss.evaluate import evaluate\n"
        "state = evaluate(*sys.argv[1:3], groups=sys.argv[3])\n"
        "print(len(state.groups), test_memory.peak())"
    )
    n_groups, peak = run_child(
        program, *(str(tmp_path / f"{name}.npy") for name in ("x", "y", "keys"))
    ).split()
    assert int(n_groups) == 2
    assert int(peak) < EVALUATION << 10


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is told in /proc")
def test_an_evaluation_stays_under_its_bound(tmp_path):
    """Files of holes: they take no disk, and are ten times the bound."""
    n_rows = 5 * (EVALUATION << 20) // (4 * 250)
    for name, shape, dtype in (("x", (n_rows, 250), np.float32), ("y", (n_rows,), np.int64)):
        (tmp_path / name).mkdir()
        for number in range(2):
            np.lib.format.open_memmap(tmp_path / name / f"{number}.npy", "w+", dtype, shape)
    options = ["--state", tmp_path / "state.json", "--save-every", "1", "--per-row", tmp_path / "rows"]
    program = (
        "import test_memory\n"
        "from logitloss.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(test_memory.peak())"
    )
    arguments = ["eval", tmp_path / "x", tmp_path / "y", "--threads", "2", "--json", *options]
    printed = run_child(program, *map(str, arguments))
    document, peak = printed.rsplit("\n", 2)[:2]
    assert json.loads(document)["count"] == 2 * n_rows
    assert int(peak) < EVALUATION << 10
