"""Threads and processes: the same bits whatever their number, from many callers at once, and after a fork."""

import concurrent.futures
import itertools
import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import batch, frozen, probabilities
from children import run_child

import logitloss as ll

COUNTS = (1, 2, 3, 5)
# One row, which threads must share; rows of one vocabulary each; many short rows; classes in the middle.
SHAPES = [((1, 300_001), -1), ((3, 131_072), -1), ((700, 129), -1), ((7001, 10), -1), ((5, 33, 64), 1)]


def all_results(logits, target, axis, backend, threads) -> dict[str, bytes]:
    """Return the bits of everything that is computed from rows, by name."""
    soft = frozen(np.abs(logits))
    options = {"num_threads": threads, "backend": backend}
    rows = {"axis": axis, "ignore_index": 0, **options}
    weight = np.linspace(0.5, 1.5, logits.shape[axis])
    loss, lse = ll.cross_entropy_and_lse(logits, target, reduction="none", **rows)
    mean, grad = ll.cross_entropy_value_and_grad(logits, target, **rows)
    weighted, weighted_grad = ll.cross_entropy_value_and_grad(
        logits, target, weight=weight, label_smoothing=0.1, z_loss=1e-3, **rows
    )
    soft_mean, soft_grad = ll.cross_entropy_value_and_grad(logits, soft, axis=axis, **options)
    results = {
        "loss": loss,
        "lse": lse,
        "mean": mean,
        "grad": grad,
        "sum": ll.cross_entropy(logits, target, reduction="sum", **rows),
        "grad from lse": ll.cross_entropy_grad(logits, target, lse=lse, **rows),
        "weighted": weighted,
        "weighted grad": weighted_grad,
        "soft": soft_mean,
        "soft grad": soft_grad,
        "nll": ll.nll_loss(logits, target, weight=weight, **rows),
        "logsumexp": ll.logsumexp(logits, axis=axis, **options),
        "softmax": ll.softmax(logits, axis=axis, **options),
        "log_softmax": ll.log_softmax(logits, axis=axis, **options),
        "entropy": ll.entropy(logits, axis=axis, reduction="mean", **options),
    }
    return {name: np.asarray(result).tobytes() for name, result in results.items()}


@pytest.mark.parametrize("name", ["float32", "float64", "float16"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
def test_rows_have_the_same_bits(backend, shape, axis, name):
    if backend == "reference" and (name != "float32" or len(shape) == 2):
        pytest.skip("the reference takes no notice of threads: one case will do")
    logits = batch(shape, np.dtype(name))[0]
    n_rows = [n for number, n in enumerate(shape) if number != axis % len(shape)]
    target = frozen(np.arange(np.prod(n_rows)).reshape(n_rows) % shape[axis])
    expected = all_results(logits, target, axis, backend, 1)
    for threads in COUNTS[1:]:
        results = all_results(logits, target, axis, backend, threads)
        assert [key for key in expected if results[key] != expected[key]] == []


@pytest.mark.parametrize("size", [5, 40_000, 100_003])
def test_elements_have_the_same_bits(backend, dtype, size):
    logits = batch((size, 1), dtype)[0][:, 0]
    p = frozen(np.linspace(0, 1, size).astype(dtype))
    signs = frozen(np.where(np.arange(size) % 3, 1, -1).astype(np.int8))

    def results(threads):
        options = {"num_threads": threads, "backend": backend}
        return [
            np.asarray(part).tobytes()
            for part in (
                *ll.binary_cross_entropy_with_logits_value_and_grad(logits, p, pos_weight=2.0, **options),
                *ll.logistic_loss_value_and_grad(logits, signs, **options),
                ll.binary_cross_entropy(p, p, **options),
                ll.kl_div(logits, p, **options),
                ll.sigmoid(logits, **options),
                ll.log_sigmoid(logits, **options),
            )
        ]

    expected = results(1)
    for threads in COUNTS[1:]:
        assert results(threads) == expected


def test_in_place_has_the_same_bits(backend, dtype):
    source, target = batch((700, 129), dtype)
    expected = ll.cross_entropy_grad(source, target, num_threads=1, backend=backend)
    for threads in COUNTS:
        logits = source.copy()
        ll.cross_entropy_value_and_grad(logits, target, out=logits, num_threads=threads, backend=backend)
        fused = ll.cross_entropy_value_and_grad(source, target, num_threads=threads, backend=backend)[1]
        assert logits.tobytes() == fused.tobytes()
        alone = ll.cross_entropy_grad(source, target, num_threads=threads, backend=backend)
        assert alone.tobytes() == expected.tobytes()


def test_many_callers_at_once(backend):
    """Kernels release the GIL and keep no state: threads of Python may all be inside, each with its team."""
    jobs = [(job, threads) for threads in (1, 2, 3) for job in JOBS] * 4
    expected = {job: bits(job, backend, 1) for job in JOBS}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: bits(job[0], backend, job[1]), jobs))
    assert found == [expected[job] for job, _ in jobs]


# Rows of a block and less, some blocks, a vocabulary, many blocks.
JOBS = ((60, 10), (40, 1000), (3, 50_257), (700, 129))


def bits(shape, backend, threads) -> bytes:
    """Return the bits of a value, a gradient and a loss of probabilities; no threads are the default's."""
    dtype = np.dtype(np.float32)
    options = {"num_threads": threads, "backend": backend}
    logits, target = batch(shape, dtype)
    value, grad = ll.cross_entropy_value_and_grad(logits, target, **options)
    soft = ll.cross_entropy(logits, probabilities(shape, dtype), **options)
    return value.tobytes() + grad.tobytes() + soft.tobytes()


def bits_of_all(threads) -> list[bytes]:
    """Return the bits from every backend on the processor, of all jobs at once on threads of Python."""
    backends = [name for name, reason in ll.backends().items() if reason is None and name != "cuda"]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda job: bits(*job, threads), itertools.product(JOBS, backends)))


def start_other_teams():
    """Let Numba and scikit-learn, each of which has a run-time of its own, start their threads."""
    import numba
    from sklearn.ensemble import HistGradientBoostingClassifier

    @numba.njit(parallel=True)
    def total(array):
        result = 0.0
        for i in numba.prange(len(array)):
            result += array[i]
        return result

    assert total(np.ones(100_000)) == 100_000
    x = np.arange(4000.0).reshape(2000, 2)
    HistGradientBoostingClassifier(max_iter=2).fit(x, np.arange(2000) % 2)


def n_tasks() -> int:
    """Return the number of the process's threads, whoever started them."""
    return len(os.listdir("/proc/self/task"))


def work_after(method):
    """Use teams of threads here and in child processes: same bits, and a forked child has but one thread."""
    expected = bits_of_all(1)
    assert bits_of_all(3) == expected
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(bits_of_all, [None, 1, 2, 3]) == [expected] * 4
        if sys.platform == "linux" and method == "fork":
            assert pool.apply(n_tasks) == 1
    assert bits_of_all(2) == expected


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with Numba and scikit-learn"])
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_processes_started_after_use(method, others):
    program = "import test_threads as t\n" + "t.start_other_teams()\n" * others
    run_child(program + f"t.work_after({method!r})")


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_team_under_the_break_even():
    """A small call starts no thread, though a large one does, on a build with OpenMP."""
    program = (
        "import logitloss as ll, numpy as np, test_threads as t\n"
        "from logitloss._threads import BREAK_EVEN\n"
        "ll.set_num_threads(4)\n"
        "before = t.n_tasks()\n"  # NumPy's BLAS has started some
        "for n in (1, 32, BREAK_EVEN // 10, BREAK_EVEN // 10 + 1):\n"
        "    logits, target = np.zeros((n, 10), np.float32), np.zeros(n, int)\n"
        "    ll.cross_entropy(logits, target)\n"
        "    ll.cross_entropy_value_and_grad(logits, target)\n"
        "    ll.binary_cross_entropy_with_logits_value_and_grad(logits, logits)\n"
        "    ll.softmax(logits)\n"
        "    print(t.n_tasks() - before)\n"
    )
    teams = [int(line) for line in run_child(program).split()]
    from logitloss._kernels.cython_cpu import build_info

    assert teams == [0, 0, 0, 3 if build_info()["openmp"] else 0]


def test_number_of_threads_is_kept_and_given_back():
    before = ll.get_num_threads()
    try:
        for n in (1, 3, np.int64(2)):
            ll.set_num_threads(n)
            assert ll.get_num_threads() == n
            assert type(ll.get_num_threads()) is int
    finally:
        ll.set_num_threads(before)
    assert ll.get_num_threads() == before


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("2,1", 2), ("nonsense", None), ("0", None)])
def test_omp_num_threads_is_honoured(value, expected):
    program = "import logitloss; print(logitloss.get_num_threads())"
    environment = {**os.environ, "OMP_NUM_THREADS": value}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) == (expected or processors())


def processors() -> int:
    """Return how many processors this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def test_numbas_threads_are_as_they_were():
    import numba

    numba.set_num_threads(1)
    try:
        bits((700, 129), "numba", 2)
        assert numba.get_num_threads() == 1
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


def test_many_callers_on_numbas_layer_of_last_resort():
    """Its own layer ends the process when two threads are inside at once; so they take turns."""
    program = (
        "import os\n"
        "os.environ |= {'NUMBA_THREADING_LAYER': 'workqueue', 'NUMBA_NUM_THREADS': '4'}\n"
        "import concurrent.futures, test_threads as t\n"
        "expected = {job: t.bits(job, 'numba', 1) for job in t.JOBS}\n"
        "jobs = [*t.JOBS] * 8\n"
        "with concurrent.futures.ThreadPoolExecutor(6) as pool:\n"
        "    found = list(pool.map(lambda job: t.bits(job, 'numba', 2), jobs))\n"
        "assert found == [expected[job] for job in jobs]\n"
        "import numba; print(numba.threading_layer())\n"
    )
    assert run_child(program).strip() == "workqueue"


def test_numba_keeps_loops_with_and_without_threads_apart(tmp_path):
    """On the disk too: a forked child ends in a loop with threads, and one without is slow."""
    program = (
        "from logitloss._kernels.numba_cpu import _SIGNATURE, _sharer\n"
        "for parallel in (False, True):\n"
        "    loop = _sharer(parallel).overloads[_SIGNATURE.args]\n"
        "    assert bool(loop.reload_init) == parallel  # starts the threads\n"
    )
    for _ in range(2):
        run_child(f"import os; os.environ['NUMBA_CACHE_DIR'] = {str(tmp_path)!r}\n{program}")
