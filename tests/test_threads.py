"""Threads and processes: the same bits whatever their number, from many callers at once, and after a fork."""

import concurrent.futures
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import batch, frozen, probabilities

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
    """Kernels release the GIL and keep no state: threads of Python may all be inside."""
    dtype = np.dtype(np.float32)
    jobs = [((60, 10), 1), ((40, 1000), 2), ((3, 50_257), 3), ((700, 129), 2)] * 6

    def work(job):
        shape, threads = job
        logits, target = batch(shape, dtype)
        value, grad = ll.cross_entropy_value_and_grad(logits, target, num_threads=threads, backend=backend)
        soft = ll.cross_entropy(logits, probabilities(shape, dtype), num_threads=threads, backend=backend)
        return value, grad.tobytes(), soft

    expected = {job: work(job) for job in set(jobs)}
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, jobs)) == [expected[job] for job in jobs]


def loss_in_a_process(backend):
    """Return a loss large enough for several threads, and the number a child would use."""
    logits, target = batch((700, 129), np.dtype(np.float32))
    return ll.cross_entropy(logits, target, backend=backend), ll.get_num_threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_fork_after_use(backend):
    """A child of a process whose threads have run neither hangs nor errs, with one thread unless told."""
    logits, target = batch((700, 129), np.dtype(np.float32))
    expected = ll.cross_entropy(logits, target, num_threads=3, backend=backend)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            value, threads = loss_in_a_process(backend)
            os.write(writer, f"{value == expected} {threads}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with concurrent.futures.ThreadPoolExecutor(1) as pool, os.fdopen(reader) as pipe:
        answer = pool.submit(pipe.read)
        done, _ = concurrent.futures.wait([answer], timeout=30)
        if not done:
            os.kill(child, 9)
        os.waitpid(child, 0)
        assert answer.result() == "True 1"


def test_spawned_process(backend):
    expected, _ = loss_in_a_process(backend)
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_threads import loss_in_a_process\n"
        "print(repr(float(loss_in_a_process(sys.argv[2])[0])))\n"
    )
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", program, here, backend]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert float(run.stdout) == expected


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
