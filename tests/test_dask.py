"""Evaluation on Dask: of arrays however chunked, and of files on a cluster that may lose a worker."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import dask
import dask.array as da
import distributed
import ml_dtypes
import numpy as np
import pytest
from cases import rng_for
from children import run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from shards import BAD, SIZES, more_classes
from states import assert_same_figures, assert_same_states

from logitloss import LinearLogits
from logitloss.evaluate import (
    DtypeError,
    EvaluationError,
    LabelError,
    LogitError,
    MaskError,
    PaddingWarning,
    ShapeError,
    cluster,
    evaluate,
    evaluate_files,
)
from logitloss.evaluate import dask as on_dask
from logitloss.evaluate.errors import ClusterError, OutputError

N_CLASSES = 12
SCALING = Path(__file__).parent.parent / "asv_benchmarks" / "scaling.py"


@pytest.fixture(autouse=True)
def one_thread():
    """Tasks in their order in this thread, but where a cluster is asked for."""
    with dask.config.set(scheduler="synchronous"):
        yield


def problem(rows=(7, 9), dtype=np.float64, seed="dask"):
    rng = rng_for(seed)
    logits = (3 * rng.standard_normal((*rows, N_CLASSES))).astype(dtype)
    target = np.where(rng.random(rows) < 0.2, -100, rng.integers(0, N_CLASSES, rows))
    return logits, target, rng.choice(["a", "b"], rows)


@st.composite
def chunks_of(draw, size):
    cuts = draw(st.sets(st.integers(1, size - 1), max_size=3)) if size > 1 else set()
    return tuple(end - first for first, end in itertools.pairwise([0, *sorted(cuts), size]))


# ---- arrays ----


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.data())
def test_texts_shifted_masked_and_padded_come_to_the_figures_of_one_process(data):
    logits, target, groups = problem((12, 30))
    target = np.where(target < 0, 5, target)
    rng = rng_for("dask texts")
    for row, length in zip(target, rng.integers(12, 25, 12), strict=True):
        row[length:] = 3
    mask = (rng.random(target.shape) < 0.9) | (np.arange(30) > 10)
    target = np.where(mask, target, 99)  # which is no class
    options = {"axis": -1, "shift": data.draw(st.booleans()), "backend": "reference"}
    with pytest.warns(PaddingWarning):
        wanted = evaluate(logits, target, groups=groups, mask=mask, **options)
    assert wanted.masked > 0
    x, *rows = (
        da.from_array(one, chunks=tuple(data.draw(chunks_of(size)) for size in one.shape))
        for one in (logits, target, groups, mask)
    )
    with pytest.warns(PaddingWarning, match="label 3 fills the end of"):
        found = evaluate(x, rows[0], groups=rows[1], mask=rows[2], **options)
    assert_same_states(found, wanted)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.data())
def test_any_chunks_come_to_the_figures_of_one_process(data):
    axis = data.draw(st.integers(0, 2))
    logits, target, groups = problem()
    logits[2, 3, target[2, 3]] = -np.inf
    options = {"axis": axis, "backend": "reference", "per_class": True}
    moved = np.moveaxis(logits, -1, axis)
    wanted = evaluate(moved, target, groups=groups, **options)
    x = da.from_array(moved, chunks=tuple(data.draw(chunks_of(size)) for size in moved.shape))
    rows = [
        da.from_array(one, chunks=tuple(data.draw(chunks_of(size)) for size in one.shape))
        for one in (target, groups)
    ]
    found = evaluate(x, rows[0], groups=rows[1], chunk_rows=data.draw(st.sampled_from([None, 5])), **options)
    assert_same_states(found, wanted)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_whole_rows_have_the_very_figures_of_one_process(dtype):
    logits, target, groups = problem((40,), dtype)
    found = evaluate(da.from_array(logits, chunks=(7, -1)), target, groups=groups, backend="reference")
    assert_same_states(found, evaluate(logits, target, groups=groups, backend="reference"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_logits_cut_among_the_classes(dtype):
    logits, target, _ = problem((40,), dtype)
    found = evaluate(da.from_array(logits, chunks=(7, 5)), target, backend="reference")
    assert_same_states(found, evaluate(logits, target, backend="reference"), rel=2e-7)


def test_binary_labels():
    rng = rng_for("dask bce")
    logits, target = rng.standard_normal((30, 4)), rng.random((30, 4)) < 0.5
    found = evaluate(da.from_array(logits, chunks=(7, 3)), target, loss="bce", backend="reference")
    assert_same_states(found, evaluate(logits, target, loss="bce", backend="reference"))


@pytest.mark.parametrize("bits", [np.uint16, np.uint8])
def test_bits_of_floats(bits):
    logits, target, _ = problem((20,))
    dtype, name = {2: (ml_dtypes.bfloat16, "bf16"), 1: (ml_dtypes.float8_e4m3fn, "f8_e4m3")}[bits().itemsize]
    stored = logits.astype(dtype).view(bits)
    wanted = evaluate(stored, target, dtype=name, backend="reference")
    for chunks, rel in (((6, -1), 1e-12), ((6, 5), 2e-7)):
        x = da.from_array(stored, chunks=chunks)
        assert_same_states(evaluate(x, target, dtype=name, backend="reference"), wanted, rel)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.float8_e4m3fn])
def test_hidden_states_of_one_layer(dtype):
    rng = rng_for("dask hidden")
    hidden = rng.standard_normal((3, 20, 8)).astype(dtype)
    weight, bias = rng.standard_normal((N_CLASSES, 8), np.float32), rng.standard_normal(N_CLASSES, np.float32)
    target = rng.integers(0, N_CLASSES, (3, 20))
    made = {"softcap": 5.0, "logit_scale": 0.5}
    wide = hidden.astype(np.float32)
    wanted = evaluate(LinearLogits(wide, weight, bias, **made), target, backend="reference")
    for layer in ((weight, bias), (da.from_array(weight, chunks=5), da.from_array(bias))):
        x = da.from_array(hidden, chunks=(2, 7, 5))
        found = on_dask.evaluate(
            x, target, weight=layer[0], bias=layer[1], chunk_rows=3, backend="reference", **made
        )
        assert_same_states(found, wanted, rel=1e-5)


def test_nothing_is_put_together_along_the_classes():
    seen = []

    def chunk(block):
        seen.append(block.shape)
        return block

    logits, target, _ = problem((30,))
    x = da.from_array(logits, chunks=(10, 5)).map_blocks(chunk, dtype=logits.dtype, meta=logits[:0, :0])
    with dask.config.set({"optimization.fuse.active": False}):
        evaluate(x, target, backend="reference")
    assert sorted(seen) == sorted([(10, 5), (10, 5), (10, 2)] * 3)


def test_chunks_of_nothing():
    logits, target, _ = problem((20,))
    wanted = evaluate(logits, target, backend="reference")
    x = da.concatenate([da.zeros((0, N_CLASSES)), da.from_array(logits, chunks=(6, 5))])
    assert_same_states(evaluate(x, target, backend="reference"), wanted)
    for nothing in (da.zeros((0, 5)), da.zeros((0, 0), chunks=((0,), (0, 0)))):
        assert evaluate(nothing, np.zeros(0, int)) == evaluate(nothing.compute(), np.zeros(0, int))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("chunks", [(3, 4, -1), (3, 4, 5)])
def test_errors_count_rows_over_the_whole_array(chunks, shift):
    logits, target, _ = problem()
    x, options = da.from_array(logits, chunks=chunks), {"axis": -1, "shift": shift, "backend": "reference"}
    bad, mask = target.copy(), np.ones(target.shape, int)
    bad[5, 6], mask[4, 7] = N_CLASSES, 5
    told = r"target: row \[5, 6\]: label 12 is outside 0 to 11, and is not ignore_index=-100"
    for whole in (logits, x):
        with pytest.raises(LabelError, match=f"^{told}$"):
            evaluate(whole, bad, **options)
        with pytest.raises(MaskError, match=r"^mask: row \[4, 7\]: is 5, expected 0 or 1$"):
            evaluate(whole, target, mask=mask, **options)
    with pytest.raises(LabelError, match=f"^{told}$"):
        on_dask.evaluate(x, bad, weight=np.eye(N_CLASSES), **options)
    target[5, 6:8], logits[5, 6, 2] = 0, np.nan
    with pytest.raises(LogitError, match=r"logits: row \[5, 6\]: (the|a) logit (of class 2 )?is nan"):
        evaluate(da.from_array(logits, chunks=chunks), target, **options)


def test_what_does_not_go_together_is_told_before_anything_runs():
    def never(block):
        raise AssertionError("a task ran")

    logits, target, _ = problem((20,))
    x = da.from_array(logits, chunks=(6, -1)).map_blocks(never, dtype=logits.dtype, meta=logits[:0])
    y = da.from_array(target, chunks=5)
    weight = np.zeros((4, N_CLASSES))
    for error, message, arguments, options in [
        (ShapeError, "target: of shape (19,)", (x, y[:19]), {}),
        (DtypeError, "target: of type float64", (x, y * 1.0), {}),
        (DtypeError, "logits: a ndarray, expected a dask.array", (logits, y), {}),
        (ShapeError, "logits: has chunks of unknown sizes", (x[x[:, 0] > 0], y), {}),
        (ShapeError, "target: of shape (), and one row needs no Dask", (x[0], y[0]), {}),
        (ShapeError, "groups: of shape (3,)", (x, y), {"groups": np.arange(3)}),
        (ShapeError, "state_file: is not for Dask arrays", (x, y), {"state_file": "x.json"}),
        (ShapeError, "chunk_rows: is 0", (x, y), {"chunk_rows": 0}),
        (ShapeError, "target: is missing", (x,), {}),
        (ShapeError, "loss: is 'foo', expected 'ce' or 'bce'", (x, y), {"loss": "foo"}),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            evaluate(*arguments, **options)
    with pytest.raises(ShapeError, match="loss: is 'bce', but"):
        on_dask.evaluate(x, y, weight=weight, loss="bce")
    with pytest.raises(ShapeError, match=r"logits: of shape \(20, 12\)"):
        on_dask.evaluate(x, y, weight=weight[:, 1:])
    for of_layer in ({"bias": np.zeros(N_CLASSES)}, {"softcap": 3.0}, {"logit_scale": 0.5}):
        with pytest.raises(ShapeError, match=r"^weight: is missing: bias, softcap and logit_scale"):
            on_dask.evaluate(x, y, **of_layer)


# ---- without Dask ----

WITHOUT = """
import sys
sys.modules["dask"] = sys.modules["distributed"] = None
import numpy as np
from logitloss.evaluate import evaluate, evaluate_files
print(evaluate(np.zeros((2, 2)), np.zeros(2, int)).count)
np.save(sys.argv[1], np.zeros((2, 2)))
try:
    evaluate_files(sys.argv[1], sys.argv[1], dask="local")
except ImportError as error:
    print(error)
"""


def test_nothing_needs_dask_but_dask(tmp_path):
    printed = run_child(WITHOUT, str(tmp_path / "x.npy"))
    assert printed.splitlines() == ["2", "dask is not installed: pip install 'logitloss[dask]'"]


# ---- threads ----

THREADS = """
import os
os.environ["OMP_NUM_THREADS"] = "1"  # as Dask has it in its workers
import dask, dask.array as da, numpy as np
import test_threads as t
from logitloss.evaluate import evaluate
x, y = np.zeros((30_000, 10), np.float32), np.zeros(30_000, int)
with dask.config.set(scheduler="synchronous"):
    for chunks in ((-1, -1), (-1, 5)):
        evaluate(da.from_array(x, chunks=chunks), y)
    before = t.n_tasks()
    evaluate(da.from_array(x, chunks=-1), y)
    print(t.n_tasks() - before)
    evaluate(da.from_array(x, chunks=(-1, 5)), y, num_threads=3)
    print(t.n_tasks() - before)
    evaluate(da.from_array(x, chunks=-1), y, num_threads=4)
    print(t.n_tasks() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_task_has_one_thread_or_what_is_asked_for():
    from logitloss._kernels.cython_cpu import build_info

    teams = [int(line) for line in run_child(THREADS).split()]
    assert teams == ([0, 2, 3] if build_info()["openmp"] else [0, 0, 0])


# ---- files on a cluster ----


@pytest.fixture(scope="module")
def client():
    """Return a client of two workers, each a process of its own."""
    options = {"n_workers": 2, "threads_per_worker": 1, "silence_logs": 50}
    options["dashboard_address"] = "127.0.0.1:0"
    with (
        distributed.LocalCluster(**options) as workers,
        distributed.Client(workers, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(cluster, "PIECE_BYTES", 600)  # two blocks of ten rows of seven float32


def test_files_come_to_the_figures_of_one_process(shards, client):
    options = {"groups_path": str(shards.folder / "keys"), "per_class": True}
    wanted = shards.evaluate(**options)
    seen = []
    found = shards.evaluate(dask=client, progress=lambda *counts: seen.append(counts), **options)
    assert_same_states(found.state, wanted.state)
    assert found[1:] == wanted[1:]
    assert len(seen) == sum(max(1, math.ceil(size / 20)) for size in SIZES)
    assert seen[-1] == (wanted.n_rows, wanted.n_rows, wanted.n_bytes)
    assert seen == sorted(seen)
    assert client.run(os.environ.get, "OMP_NUM_THREADS") == dict.fromkeys(client.run(os.getpid), "1")


def test_files_of_hidden_states(tmp_path, client):
    rng = rng_for("dask hidden files")
    arrays = {
        "h": rng.standard_normal((90, 6), np.float32),
        "w": rng.standard_normal((N_CLASSES, 6), np.float32),
        "b": rng.standard_normal(N_CLASSES, np.float32),
        "y": rng.integers(0, N_CLASSES, 90),
    }
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    hidden, weight, bias, target = (str(tmp_path / f"{name}.npy") for name in arrays)
    options = {"unembedding_path": weight, "bias_path": bias, "softcap": 9.0, "chunk_rows": 10}
    wanted = evaluate_files(hidden, target, **options)
    found = evaluate_files(hidden, target, dask=client, **options)
    assert_same_states(found.state, wanted.state)
    assert found[1:] == wanted[1:]


def test_a_bad_shard_is_told_as_by_one_process(shards, bad, client):
    options = {"groups_path": str(shards.folder / "keys")}
    with pytest.raises(EvaluationError) as there:
        shards.evaluate(**options)
    with pytest.raises(type(there.value), match=f"^{re.escape(str(there.value))}$"):
        shards.evaluate(dask=client, **options)
    told, options = [], {"on_error": "skip", "describe": True, **options}
    wanted = shards.evaluate(**options)
    found = shards.evaluate(on_skip=told.append, dask=client, **options)
    assert_same_states(found.state, wanted.state)
    assert found.skipped == wanted.skipped == told
    assert found.inputs == wanted.inputs


def test_a_full_disk_is_no_fault_of_a_shard(shards, monkeypatch):
    np.savez_compressed(shards.folder / "logits" / "part-2.npz", shards.load("logits", 1))
    os.unlink(shards.file("logits", 1))
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: full)
        with pytest.raises(OutputError, match=r"part-2.npz: .* does not fit into .* No space left on device"):
            shards.evaluate(dask="local", on_error="skip")


def test_what_is_skipped_does_not_decide_the_classes(shards, client):
    shards.save("logits", 0, np.zeros((SIZES[0], 5), np.float32))  # and there are labels of 5 and 6
    more_classes(shards)
    wanted = shards.evaluate(on_error="skip")
    found = shards.evaluate(on_error="skip", dask=client)
    assert_same_states(found.state, wanted.state)
    assert found.skipped == wanted.skipped
    assert [file for file, _ in found.skipped] == [shards.file("labels", 0), shards.file("logits", BAD)]


def test_the_command_on_a_cluster(shards, client):
    address = client.scheduler.address
    documents, inputs = [], []
    for options in ([], ["--dask", address]):
        result = shards.run("--json", "--per-class", "--group-by", shards.folder / "keys", *options)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        document = json.loads(result.stdout)
        for name in ("seconds", "rows_per_second", "gigabytes_per_second"):
            del document[name]
        run = document.pop("run")
        assert run["options"].get("dask") == (address if options else None)
        assert not options or run["threads"] == 1  # of a task
        inputs.append(run["inputs"])
        documents.append(document)
    assert_same_figures(documents[1], documents[0])
    assert inputs[1] == inputs[0]
    for options, message in (
        (["--state", "x.json"], "dask: keeps neither a state file nor a record of rows: --state, --per-row"),
        (["--per-row", "x.npy"], "dask: keeps neither a state file nor a record of rows: --state, --per-row"),
    ):
        result = shards.run("--dask", address, *options)
        assert (result.exit_code, result.stderr) == (1, f"logitloss: {message}\n")
    result = shards.run("--dask", "nowhere")
    assert result.exit_code == 1
    assert re.fullmatch(r"logitloss: dask: no scheduler at 'nowhere' \(.*\)\n", result.stderr)


def test_ctrl_c_cancels_what_is_not_done(tmp_path, client):
    np.save(tmp_path / "x.npy", np.zeros((50_000, 3)))
    np.save(tmp_path / "y.npy", np.zeros(50_000, int))
    # where the tests themselves run in the background, Ctrl-C is ignored
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from logitloss.evaluate import cluster; from logitloss.cli import main\n"
    program += "cluster.PIECE_BYTES = 24 * 100\nmain()"
    options = ["--chunk-rows", "1", "--dask", client.scheduler.address]
    command = [
        sys.executable,
        "-c",
        program,
        "eval",
        str(tmp_path / "x.npy"),
        str(tmp_path / "y.npy"),
        *options,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: any(client.processing().values()))
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=60)
    assert (process.returncode, *printed) == (130, "", "logitloss: interrupted\n")
    wait_until(lambda: not any(client.processing().values()))


def test_a_worker_that_is_killed_changes_nothing(shards, client):
    wanted = shards.evaluate()
    pids = set(client.run(os.getpid).values())
    victim, killed = min(pids), []

    def kill(done, n_rows, n_bytes):
        if not killed:
            killed.append(done)
            os.kill(victim, signal.SIGKILL)

    found = shards.evaluate(dask=client, progress=kill)
    assert killed[0] < sum(SIZES) / 2
    assert_same_states(found.state, wanted.state)
    assert found[1:] == wanted[1:]
    wait_until(lambda: len(client.run(os.getpid)) == 2)
    assert victim not in client.run(os.getpid).values()


@pytest.mark.skipif(not SCALING.exists(), reason="there is no asv_benchmarks beside the tests")
def test_the_measurement_of_scaling_runs():
    options = ["--gigabytes", "0.0001", "--classes", "10", "--workers", "1", "--rounds", "1"]
    printed = run_child(f"import runpy; runpy.run_path({str(SCALING)!r}, run_name='__main__')", *options)
    speed = r"[\d.]+ s, [\d.]+ GB/s"  # Dask may have something to say between the lines
    assert re.search(rf"^one process: {speed}$", printed, re.MULTILINE)
    assert re.search(rf"^1 workers: {speed}, [\d.]+ times as fast$", printed, re.MULTILINE)


@pytest.mark.parametrize("at", ["local:0", "local:two", "local:-1"])
def test_a_number_of_workers_that_is_none(shards, at):
    with pytest.raises(ClusterError, match=f"^dask: is '{at}', expected local:N, N from 1 on$"):
        shards.evaluate(dask=at)


def test_workers_that_always_die_end_in_a_line(shards, client, monkeypatch):
    monkeypatch.setattr(client.cluster.scheduler, "allowed_failures", 0)
    monkeypatch.setattr(cluster, "_piece", die)
    with pytest.raises(EvaluationError, match=r"^dask: the cluster gave up: Attempted to run task"):
        shards.evaluate(shards.file("logits", 1), shards.file("labels", 1), dask=client)
    wait_until(lambda: len(client.run(os.getpid)) == 2)


die = eval("lambda *arguments: __import__('os')._exit(1)")  # of no module: it travels by value


def wait_until(is_so):
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)
