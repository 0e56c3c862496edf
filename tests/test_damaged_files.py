"""Damaged files of every format: each ends in an array or in one line, never in another exception or a crash.

Bytes of a sound file are changed and cut off. The cases of a format run in a process of their own, since
libraries in C++ read some of them: one that ends the process, or hangs, fails with the file's bytes.
"""

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import run_child
from safetensors.numpy import save_file

from logitloss.evaluate import EvaluationError, evaluate_files
from logitloss.evaluate.stores import open_array

ARRAY = np.arange(60, dtype=np.float32).reshape(12, 5)
KEYS = [f"key {number % 3}" for number in range(12)]
CASES = 160


def with_numpy(save):
    def write(path, array):
        with open(path, "wb") as file:
            save(file, array)

    return write


def with_arrow(new, of=pa.array, compression=None):
    """Return a function that writes record batches of five rows, of what `of` makes of the array's rows."""

    def write(path, array):
        table = pa.table({"x": of(array.tolist())})
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with new(path, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=5)

    return write


def with_parquet(of=pa.array, **options):
    def write(path, array):
        pq.write_table(pa.table({"x": of(array.tolist())}), path, row_group_size=5, **options)

    return write


def fixed(rows):
    return pa.array(rows, pa.list_(pa.float32(), 5))


def keys(rows):
    return pa.array(KEYS[: len(rows)])


def dictionary(rows):
    return keys(rows).dictionary_encode()


# The ending of each, and what writes an array to a path
FORMATS = {
    "npy": ("npy", with_numpy(np.save)),
    "npz": ("npz", with_numpy(np.savez)),
    "packed npz": ("npz", with_numpy(np.savez_compressed)),
    "safetensors": ("safetensors", lambda path, array: save_file({"x": array}, path, {"by": "test"})),
    "arrow": ("arrow", with_arrow(pa.ipc.new_file, fixed)),
    "arrow of lists": ("arrow", with_arrow(pa.ipc.new_file)),
    "arrow of dictionaries": ("arrow", with_arrow(pa.ipc.new_file, dictionary)),
    "packed arrow": ("arrow", with_arrow(pa.ipc.new_file, fixed, "lz4")),
    "stream": ("arrow", with_arrow(pa.ipc.new_stream)),
    "packed stream": ("arrow", with_arrow(pa.ipc.new_stream, keys, "zstd")),
    "parquet": ("parquet", with_parquet(fixed)),
    "parquet of dictionaries": ("parquet", with_parquet(dictionary)),
    "plain parquet": ("parquet", with_parquet(compression="none", use_dictionary=False)),
}


def damaged(sound, number):
    """Return a file's bytes, damaged in a way of that number."""
    rng = np.random.default_rng(number)
    content = bytearray(sound)
    for place in rng.integers(0, len(content), rng.integers(1, 4)):
        if rng.random() < 0.8:
            content[place] = rng.integers(256)
        else:  # a length or a place that is far off
            content[place : place + 4] = rng.choice([0, 1, -1, 2**31 - 1]).astype("<i4").tobytes()
    if rng.random() < 0.3:
        del content[rng.integers(len(content)) :]
    return content


def outcome(path, logits, target):
    """Read all of a file, evaluate it, and return the line about what is wrong, empty if nothing is.

    Numbers are taken for logits, strings for the keys of groups.
    """
    try:
        stored = open_array(path)
        whole = stored[()]
        assert (whole.shape, whole.dtype) == (stored.shape, stored.dtype)
        stored.samples(64)
        keys = {"groups_path": path} if stored.dtype.kind == "U" else {}
        evaluate_files(logits if keys else path, target, chunk_rows=7, backend="reference", **keys)
    except EvaluationError as error:
        return str(error)
    return ""


def run(form, folder, first=0, n_cases=CASES):
    """Try cases from a number on, and print how many ended in a line."""
    warnings.simplefilter("error")
    suffix, write = FORMATS[form]
    path, *sound_files = f"{folder}/x.{suffix}", f"{folder}/logits.npy", f"{folder}/labels.npy"
    np.save(sound_files[0], ARRAY)
    np.save(sound_files[1], np.arange(12) % 5)
    write(path, ARRAY)
    with open(path, "rb") as file:
        sound = file.read()
    assert outcome(path, *sound_files) == ""
    refused = 0
    for number in range(first, first + n_cases):
        with open(path, "wb") as file:
            file.write(damaged(sound, number))
        line = outcome(path, *sound_files)
        assert "\n" not in line
        refused += line != ""
    print(refused)


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_end_in_one_line(tmp_path, form):
    try:
        printed = run_child(
            "import test_damaged_files as t\nt.run(*sys.argv[1:])", form, str(tmp_path), timeout=300
        )
    except BaseException as error:
        error.add_note(f"the file was {(tmp_path / f'x.{FORMATS[form][0]}').read_bytes().hex()}")
        raise
    assert CASES / 4 < int(printed) < CASES
