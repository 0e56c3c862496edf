"""Columns that cannot be read: one line about each, with its row; files that are cut, or of another kind."""

import os
import re
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cases import rng_for
from children import run_child
from tables import (
    WRITERS,
    write_arrow,
    write_parquet,
    write_stream,
    write_table,
)

from logitloss.evaluate import FileError, evaluate
from logitloss.evaluate.stores import open_array


@pytest.fixture(params=WRITERS)
def write(request, tmp_path):
    """Return what writes columns to a file, and returns its path."""
    return partial(write_table, request.param, tmp_path)


def refused(path, *messages):
    with pytest.raises(FileError) as caught:
        open_array(path)[()]
    line = str(caught.value)
    assert line.startswith(path)
    assert "\n" not in line
    assert any(message in line for message in messages), line


def test_texts_that_end_in_a_nul_are_refused(write):
    """NumPy's texts leave it out: two keys would be one."""
    path = write(key=pa.array(["a", "a\0"] * 20))
    with pytest.raises(FileError, match=r"column 'key' holds 'a\\x00', which ends in a NUL"):
        open_array(path)[()]


def test_nulls_are_named_by_their_row(write):
    rng = rng_for("nulls")
    array = rng.standard_normal((40, 3, 2), np.float32)
    gap = np.zeros(40, bool)
    gap[29] = True
    deep = pa.array(array.ravel(), mask=np.repeat(gap, 6) & (np.arange(240) % 6 == 4))
    rows = [None if null else row for null, row in zip(gap, array.tolist(), strict=True)]
    path = write(
        number=pa.array(array[:, 0, 0], mask=gap),
        string=pa.array(["a"] * 40, mask=gap),
        key=pa.array(["a"] * 40, mask=gap).dictionary_encode(),
        lists=pa.array(rows, pa.list_(pa.list_(pa.float32()))),
        fixed=pa.array(rows, pa.list_(pa.list_(pa.float32(), 2), 3)),
        deep=pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(deep, 2), 3),
        nothing=pa.nulls(40, pa.list_(pa.float32())),
    )
    for name in ("number", "string", "key", "lists", "fixed", "deep"):
        refused(f"{path}::{name}", f"{path}::{name}: row 29: column {name!r} holds a null")
    refused(f"{path}::nothing", "row 0: column 'nothing' holds a null")


def test_nulls_in_a_dictionary(tmp_path):
    path = str(tmp_path / "x.arrow")
    column = pa.DictionaryArray.from_arrays(pa.array([0, 0, 1]), pa.array(["a", None]))
    write_arrow(path, pa.table({"x": column}))
    refused(path, "column 'x' holds a null in its dictionary")


def test_ragged_lists_are_named_by_their_row(write):
    rows = [[[1.0, 2.0], [3.0, 4.0]] for _ in range(40)]
    short, deep = list(rows), list(rows)
    short[17], deep[31] = rows[0][:1], [[1.0, 2.0], [3.0]]
    path = write(short=pa.array(short), deep=pa.array(deep))
    refused(f"{path}::short", "row 17: column 'short' holds a list of 1, others are of 2")
    refused(f"{path}::deep", "row 31: column 'deep' holds a list of 1, others are of 2")


def test_a_null_after_some_blocks_ends_the_evaluation_there(write):
    logits = [[0.0, 1.0]] * 50
    logits[44] = None
    path = write(x=pa.array(logits, pa.list_(pa.float32(), 2)), y=[0] * 50)
    seen = []
    with pytest.raises(FileError, match="row 44: column 'x' holds a null"):
        evaluate(f"{path}::x", f"{path}::y", chunk_rows=10, progress=lambda done, *_: seen.append(done))
    assert seen[-1] == 40


def test_types_that_are_no_numbers(write):
    path = write(
        time=pa.array([0, 1], pa.timestamp("us")),
        struct=[{"a": 1}, {"a": 2}],
        binary=[b"ab", b"c"],
        wide=pa.array([b"abc", b"def"], pa.binary(3)),
        decimal=pa.array([1, 2]).cast(pa.decimal128(25, 2)),
        null=pa.nulls(2),
    )
    for name in ("time", "struct", "binary", "wide", "decimal", "null"):
        refused(f"{path}::{name}", f"{path}::{name}: column {name!r} holds ")
    refused(path, "holds several arrays (time, struct, binary, wide, decimal, null): name one, as in")
    refused(f"{path}::x", "no array named 'x'; there are: time, struct")


def test_names_that_are_there_twice_or_have_dots(tmp_path, write):
    path = write(**{"a": [1, 2], "a.b": [3, 4]})
    assert open_array(f"{path}::a")[()].tolist() == [1, 2]
    assert open_array(f"{path}::a.b")[()].tolist() == [3, 4]
    path = str(tmp_path / "x.arrow")
    write_arrow(path, pa.table([[1], [2]], names=["a", "a"]))
    refused(f"{path}::a", "holds several columns named 'a'")


def test_files_that_end_early(tmp_path):
    """Also between two record batches, where nothing else tells."""
    table = pa.table({"x": np.arange(40)})
    file, stream, parquet_file = (str(tmp_path / name) for name in ("f.arrow", "s.arrow", "p.parquet"))
    write_arrow(file, table)
    write_stream(stream, table)
    write_parquet(parquet_file, table)
    for path in (file, stream, parquet_file):
        with open(path, "rb") as opened:
            whole = opened.read()
        for end in (0, 1, 8, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
            with open(path, "wb") as opened:
                opened.write(whole[:end])
            refused(path, "the file is empty" if end == 0 else "truncated", "damaged or unsupported")
    write_stream(stream, table)
    with open(stream, "r+b") as opened:
        opened.truncate(os.path.getsize(stream) - 8)
    refused(stream, "truncated: there is no end of the stream")


def test_a_footer_that_does_not_know_all_batches(tmp_path):
    table = pa.table({"x": np.arange(40)})
    files = []
    for rows in (40, 26):
        write_arrow(str(tmp_path / "x.arrow"), table[:rows])
        files.append((tmp_path / "x.arrow").read_bytes())
    long, short = files
    footer = short[short.rindex(b"\xff\xff\xff\xff\0\0\0\0") + 8 :]
    body = long[: long.rindex(b"\xff\xff\xff\xff\0\0\0\0") + 8]
    (tmp_path / "x.arrow").write_bytes(body + footer)
    refused(str(tmp_path / "x.arrow"), "damaged: 4 record batches, 2 by the footer")


def test_files_of_other_kinds(tmp_path):
    for suffix in ("arrow", "parquet"):
        path = tmp_path / f"x.{suffix}"
        for content in (b"1.0 2.0\n" * 50, b"PAR1", b"ARROW1\0\0", b"\0" * 100, b"\xff" * 100):
            path.write_bytes(content)
            refused(str(path), "damaged or unsupported", "truncated")
    (tmp_path / "x.arrow").write_bytes(b"FEA1" + bytes(100))
    refused(str(tmp_path / "x.arrow"), "a Feather file of version 1, expected version 2")


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    numbers = rng_for("cut").integers(0, 2**60, 1_000_000)
    table = pa.table({"x": numbers})
    arrow, parquet_file = str(tmp_path / "x.arrow"), str(tmp_path / "x.parquet")
    with pa.ipc.new_file(arrow, table.schema) as writer:
        writer.write_table(table, max_chunksize=100_000)
    pq.write_table(table, parquet_file)
    for path, message in ((arrow, "truncated while it was read: 1000 of 8"), (parquet_file, "damaged or")):
        stored = open_array(path)
        assert np.array_equal(stored[slice(0, 5),], numbers[:5])
        os.truncate(path, 1000)
        with pytest.raises(FileError, match=re.escape(f"{path}: {message}")):
            stored[slice(990_000, 999_999),]


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
def test_a_missing_library_is_named_with_what_installs_it(tmp_path, suffix):
    (tmp_path / f"x.{suffix}").write_bytes(b"x")
    printed = run_child(
        "sys.modules['pyarrow'] = None\n"
        "from logitloss.evaluate.stores import open_array\n"
        "try:\n"
        "    open_array(sys.argv[1])\n"
        "except ImportError as error:\n"
        "    print(error)",
        str(tmp_path / f"x.{suffix}"),
    )
    assert printed.startswith("pyarrow reads such files and cannot be imported (")
    assert printed.endswith("): pip install 'logitloss[arrow]'\n")


def test_no_library_is_imported_that_is_not_needed(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.zeros((2, 2)), y=np.zeros(2, int))
    printed = run_child(
        "from logitloss.evaluate import evaluate\n"
        "evaluate(sys.argv[1] + '::x', sys.argv[1] + '::y', backend='reference')\n"
        "print({'pyarrow', 'safetensors', 'h5py', 'zarr', 'dask'} & set(sys.modules))",
        str(tmp_path / "x.npz"),
    )
    assert printed == "set()\n"
