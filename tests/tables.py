"""Tables in files of every kind that is read, and arrays as their columns: lists in fixed sizes, or not."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

# rows of a batch or row group
BATCH = 13


def write_arrow(path, table, new=pa.ipc.new_file, compression=None):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(path, table.schema, options=options) as writer:
        for batch in table.to_batches(max_chunksize=BATCH):
            writer.write_batch(batch)


def write_stream(path, table, compression=None):
    write_arrow(path, table, pa.ipc.new_stream, compression)


def write_parquet(path, table, compression="snappy", **options):
    pq.write_table(table, path, row_group_size=BATCH, compression=compression, **options)


WRITERS = {
    "file": ("arrow", write_arrow, {}),
    "file-lz4": ("arrow", write_arrow, {"compression": "lz4"}),
    "stream": ("arrow", write_stream, {}),
    "stream-zstd": ("arrow", write_stream, {"compression": "zstd"}),
    "feather": ("feather", write_arrow, {"compression": "zstd"}),
    "parquet": ("parquet", write_parquet, {}),
    "parquet-plain": ("parquet", write_parquet, {"compression": "none", "use_dictionary": False}),
    "parquet-v2": ("parquet", write_parquet, {"data_page_version": "2.0", "data_page_size": 64}),
    "parquet-crc": ("parquet", write_parquet, {"write_page_checksum": True, "store_schema": False}),
}


def write_table(form, folder, name="t", **columns):
    """Write columns to a file of a form in `WRITERS`, and return its path."""
    suffix, writer, options = WRITERS[form]
    path = str(folder / f"{name}.{suffix}")
    writer(path, pa.table(columns), **options)
    return path


def fixed(array):
    """Return an array as fixed-size lists, one in the other."""
    column = pa.array(np.ascontiguousarray(array).ravel())
    for size in array.shape[:0:-1]:
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def lists(array, kind=pa.ListArray, offset=np.int32):
    """Return an array as lists, one in the other."""
    column = pa.array(np.ascontiguousarray(array).ravel())
    for axis in range(array.ndim - 1, 0, -1):
        n_lists = int(np.prod(array.shape[:axis]))
        column = kind.from_arrays(pa.array(np.arange(n_lists + 1, dtype=offset) * array.shape[axis]), column)
    return column


def large_lists(array):
    return lists(array, pa.LargeListArray, np.int64)
