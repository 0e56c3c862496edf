"""Damaged stores: bytes flipped, cut and lost in any of their files end in figures or in one line.

Each format's cases run in a process of its own with a time limit, so that a crash of a library, or a hang,
is a failing test.
"""

import re
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from cases import rng_for
from children import run_child
from chunks import write_hdf5, write_zarr

from logitloss.evaluate import EvaluationError, FileWarning, evaluate_files

N_CASES = 200
LOGITS = rng_for("damaged stores").standard_normal((12, 5)).astype(np.float32)


def write_zip(path, array):
    write_zarr(path.with_suffix(".zarr"), array, (5, 5))
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(path.with_suffix(".zarr").rglob("*")):
            archive.write(file, file.relative_to(path.with_suffix(".zarr")))
    shutil.rmtree(path.with_suffix(".zarr"))


def write_latest(path, array):
    with h5py.File(path, "w", libver="latest") as file:
        options = {"chunks": (5, 2), "compression": "gzip", "shuffle": True, "fletcher32": True}
        file.create_dataset("in/a/group", data=array, **options)


def write_extendible(path, array):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=array, chunks=(4, 3), maxshape=(None, 5))
        file["x"].attrs["names"] = ["some", "texts"]


FORMATS = {
    "zarr2": ("x.zarr", lambda path, array: write_zarr(path, array, (5, 3), zarr_format=2)),
    "zarr3": ("x.zarr", lambda path, array: write_zarr(path, array, (5, 3))),
    "zarr3 sharded": ("x.zarr", lambda path, array: write_zarr(path, array, (2, 5), shards=(6, 5))),
    "zarr3 zipped": ("x.zarr.zip", write_zip),
    "hdf5 contiguous": ("x.h5", write_hdf5),
    "hdf5 chunked": ("x.h5", lambda path, array: write_hdf5(path, array, (5, 3), compression="gzip")),
    "hdf5 latest": ("x.h5", write_latest),
    "hdf5 extendible": ("x.h5", write_extendible),
}


def files_of(store: Path) -> dict[Path, bytes]:
    files = [store] if store.is_file() else sorted(file for file in store.rglob("*") if file.is_file())
    return {file: file.read_bytes() for file in files}


def damage(sound: dict[Path, bytes], rng) -> None:
    """Write a store with one of its files damaged, or without it."""
    for file, content in sound.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    file = list(sound)[rng.integers(len(sound))]
    damaged, way = bytearray(sound[file]), rng.random()
    if way < 0.1 and len(sound) > 1:
        file.unlink()
        return
    if way < 0.3:
        del damaged[rng.integers(len(damaged)) :]
    else:
        for place in rng.integers(0, len(damaged), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
    file.write_bytes(damaged)


def outcome(logits: str, target: str) -> str:
    """Evaluate, and return the line about what is wrong, empty if nothing is."""
    try:
        with warnings.catch_warnings(action="ignore", category=FileWarning):
            evaluate_files(logits, target, backend="reference", dtype="f32")
    except EvaluationError as error:
        return str(error)
    return ""


def evaluate_damaged(name: str, folder: str, first: int, last: int) -> None:
    """Evaluate damaged stores, and print how many end in a line; anything else is an error."""
    store, target = Path(folder, FORMATS[name][0]), str(Path(folder, "y.npy"))
    np.save(target, np.arange(12) % 5)
    FORMATS[name][1](store, LOGITS)
    sound, refused = files_of(store), 0
    for seed in range(first, last):
        damage(sound, np.random.default_rng(seed))
        print(f"{name} {seed}", file=sys.stderr, flush=True)
        line = outcome(str(store), target)
        assert "\n" not in line
        assert line.startswith((str(store), target)) or not line
        refused += line != ""
    print(refused)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_stores_end_in_one_line(tmp_path, name):
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        "import test_damaged_stores as t\n"
        f"t.evaluate_damaged({name!r}, sys.argv[1], 0, {N_CASES})\n"
    )
    printed = run_child(program, str(tmp_path))
    # beside it zarr's event loop may have said that a task was left
    assert int(re.findall(r"^\d+$", printed, re.MULTILINE)[-1]) > N_CASES / 10
