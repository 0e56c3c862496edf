"""An evaluation of files: logits, or hidden states and the last layer's weight, against labels.

A path may stand for shards: a directory's files of the formats in `stores`, or those that match a pattern.
They are paired by their natural order, and opened one pair after the other. What is wrong has its file's
name.
"""

import errno
import glob
import importlib
import os
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.ahead import ahead
from logitloss.evaluate.atomic import refuse_to_overwrite
from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.errors import DtypeError, FileError, OutputError, ShapeError
from logitloss.evaluate.shard import Block, Options, Shard, floats, linear, native, takes_dtype
from logitloss.evaluate.stores import SUFFIXES, StoredArray, is_store, open_array, shape_of, split
from logitloss.evaluate.stores.mapped import MappedArray
from logitloss.evaluate.stores.stored import AnyArray, Box
from logitloss.evaluate.stream import SAVE_EVERY, Evaluation, Progress, Source, evaluate_shards
from logitloss.layer import LinearLogits

Array = npt.NDArray[Any]


def evaluate_files(
    logits_path: str,
    target_path: str,
    *,
    unembedding_path: str | None = None,
    bias_path: str | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    groups_path: str | None = None,
    mask_path: str | None = None,
    per_row_path: str | None = None,
    on_error: Literal["fail", "skip"] = "fail",
    on_skip: Callable[[Skipped], None] | None = None,
    state_file: str | os.PathLike[str] | None = None,
    save_every: float = SAVE_EVERY,
    describe: bool = False,
    progress: Progress | None = None,
    dask: Any = None,
    **options: Any,
) -> Evaluation:
    """Evaluate logits in files against labels in others, of any format in `stores`.

    Parameters
    ----------
    logits_path, target_path : str
        A file each; or shards: a directory of files, or a pattern (`"logits-*.npy"`), in natural order (2
        before 10). `PATH::name` for one array, tensor or column of several in a file.
    unembedding_path, bias_path : str, optional
        The files of a last layer's weight and bias; then `logits_path` is that of its hidden states.
    softcap, logit_scale
        As in `logitloss.linear_cross_entropy`.
    groups_path : str, optional
        That of the rows' keys; where there are shards, of as many.
    mask_path : str, optional
        That of the rows' mask; the same.
    per_row_path : str, optional
        A `.npy` file to be written: a record for each row (`logitloss.evaluate.rows.row_dtype`). Where
        `logits_path` stands for shards, a directory, for a file of each shard of the same name.
    on_error : {"fail", "skip"}
        Whether a shard that cannot be evaluated ends the evaluation, or is left out whole.
    on_skip : callable, optional
        Called with each shard that is left out, a `Skipped` of `file` and `reason`; on going on with those
        left out before, too.
    state_file, save_every
        As in `evaluate`; if there is a state, the rows that it has seen are in the file of `per_row_path`,
        which its run wrote.
        What failed goes on after its rows not yet done were repaired, or with `on_error="skip"`.
    describe : bool
        Whether to tell the `inputs`, of each array a few elements read once more; told with a state, too.
    dask : distributed.Client or str, optional
        Dask's cluster that evaluates pieces of the files, which are on a file system that all its workers
        share: a client, a scheduler's address, "local" for a process for each of this machine's cores, or
        "local:N" for so many. Not with a state file or a file of rows; a piece has one thread unless
        `num_threads` says otherwise.
    progress, **options
        As in `evaluate`; `dtype` is for hidden states, weight and bias, too, whose type says nothing.

    Returns
    -------
    Evaluation
        A tuple of the `state`, the `n_rows` and `n_bytes` that were read, what is `skipped`, and the
        `inputs`. Where `evaluate` would warn, the figures of the state have `warnings`.

    Raises
    ------
    EvaluationError
        Named for the file it is about; also if every shard is left out.

    Warns
    -----
    FileWarning
        Chunks of integers are not in a Zarr or HDF5 store, and count as its fill value.
    """
    if dask is not None and not (state_file is None and per_row_path is None):
        raise ShapeError("dask", "keeps neither a state file nor a record of rows: --state, --per-row")
    if on_error not in ("fail", "skip"):
        raise ShapeError("on_error", f"is {on_error!r}, expected 'fail' or 'skip'")
    if unembedding_path is None and not (bias_path is None and softcap is None and logit_scale == 1):
        raise ShapeError("unembedding", "is missing: bias, softcap and logit_scale are those of its layer")
    paths = {"logits": logits_path, "target": target_path}
    paths |= {} if groups_path is None else {"groups": groups_path}
    paths |= {} if mask_path is None else {"mask": mask_path}
    files = {name: shard_files(path) for name, path in paths.items()}
    n_shards = len(files["logits"])
    for name, found in files.items():
        if len(found) != n_shards:
            for path in paths.values():
                if not is_sharded(path) and not os.path.exists(split(path).file):
                    raise FileError(path, os.strerror(errno.ENOENT))
            what = f"stands for {_count(found)}, but {logits_path} for {_count(files['logits'])}"
            raise FileError(paths[name], what)
    layer = None
    if unembedding_path is not None:
        layer = _Layer(unembedding_path, bias_path, softcap, logit_scale, options.get("dtype"))
    layer_files = () if layer is None else layer.files.values()
    per_row = _record_files(per_row_path, paths, files, (*layer_files, state_file))
    sources = [
        FileSource(dict(zip(files, of_shard, strict=True)), layer, records)
        for *of_shard, records in zip(*files.values(), per_row, strict=True)
    ]
    told: dict[str, Any] = {"on_error": on_error, "on_skip": on_skip, "describe": describe}
    told["progress"] = progress
    if dask is None:
        told |= {"state_file": state_file, "save_every": save_every}
        evaluation = evaluate_shards(sources, Options(**options), **told)
    else:
        cluster = importlib.import_module("logitloss.evaluate.cluster")
        evaluation = cast(Evaluation, cluster.evaluate_sources(dask, sources, Options(**options), **told))
    if len(evaluation.skipped) == n_shards:
        raise FileError(logits_path, f"nothing is left to evaluate: {_count(files['logits'])}, skipped")
    return evaluation


def is_sharded(path: str) -> bool:
    """Whether a path stands for shards: a directory, or a pattern and no file of that name."""
    plain = split(path).file
    if os.path.exists(plain):
        return os.path.isdir(plain) and not is_store(plain)
    return glob.has_magic(plain)


def shard_files(path: str) -> list[str]:
    """Return the files that a path stands for, in natural order."""
    if not is_sharded(path):
        return [path]
    _, plain, name = split(path)
    member = f"::{name}" if name else ""
    if os.path.isdir(plain):
        with os.scandir(plain) as entries:
            names = [entry.name for entry in entries]
        found = [os.path.join(plain, name) for name in names if _is_shard(name)]
        if not found:
            raise FileError(path, f"a directory with no files of {', '.join(SUFFIXES)}")
    else:
        found = list(set(glob.glob(plain, recursive=True)))  # of several ** each as often as it is met
        if not found:
            raise FileError(path, "no file matches")
    return [name + member for name in sorted(found, key=_natural)]


def _is_one_of(path: str, file: str) -> bool:
    """Whether a file would be one of the shards that a path stands for."""
    plain = split(path).file
    if not is_sharded(path):
        return False
    if os.path.isdir(plain):
        return os.path.samefile(plain, os.path.dirname(file) or ".")
    name, pattern = os.path.realpath(file), os.path.realpath(plain)
    if "**" in pattern:
        return fnmatchcase(name, pattern.replace(f"{os.sep}**", "*"))
    parts = name.split(os.sep), pattern.split(os.sep)
    return len(parts[0]) == len(parts[1]) and all(map(fnmatchcase, *parts))


def files_of(*paths: str | None) -> list[str]:
    """Return all files that paths stand for, without the names of arrays in them."""
    return [split(file).file for path in paths if path is not None for file in shard_files(path)]


def _is_shard(name: str) -> bool:
    return name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES


def _natural(name: str) -> tuple[list[Any], str]:
    """Return what puts shard 2 before shard 10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _count(files: list[str]) -> str:
    return "1 file" if len(files) == 1 else f"{len(files)} files"


class _Layer:
    """The last layer, whose files are opened once."""

    def __init__(
        self, weight: str, bias: str | None, softcap: float | None, logit_scale: float, dtype: str | None
    ) -> None:
        self.softcap, self.logit_scale, self.dtype = softcap, logit_scale, dtype
        self.files = {"weight": weight} | ({} if bias is None else {"bias": bias})
        self.uses_dtype = False
        self.arrays = self._opened()

    def _opened(self) -> dict[str, Array]:
        arrays = {}
        for name, path in self.files.items():
            try:
                arrays[name] = self._whole(name, open_array(path))
            except DtypeError as error:
                error.argument = path
                raise
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        """Leave the arrays to be opened by who needs them."""
        return {**self.__dict__, "arrays": {}}

    def _floats(self, name: str, array: StoredArray) -> tuple[AnyArray, np.dtype[Any]]:
        """Return an array as floats: `dtype` is for what it says or widens, and others are what they are."""
        return floats(name, array, self.dtype if takes_dtype(array, self.dtype) else None)

    def _whole(self, name: str, stored: StoredArray) -> Array:
        """Return the weight or the bias, mapped or read."""
        self.uses_dtype |= takes_dtype(stored, self.dtype)
        array, dtype = self._floats(name, stored)
        return native(np.asarray(array[()]), dtype)

    def logits(self, hidden: StoredArray) -> LinearLogits:
        """Return the logits of hidden states, of which a block is read when it is its turn."""
        self.arrays = self.arrays or self._opened()
        if not self.uses_dtype:
            floats("logits", hidden, self.dtype)
        states, dtype = self._floats("logits", hidden)
        weight, bias = self.arrays["weight"], self.arrays.get("bias")
        return linear(states, dtype, weight, bias, self.softcap, self.logit_scale)


class FileSource(Source):
    """Files of a shard, open from `open` to `close`.

    Parameters
    ----------
    files : dict of str
        Those of "logits" (or hidden states), "target" and, where there are any, "groups" and "mask".
    layer : _Layer, optional
        That of hidden states.
    records : str, optional
        The file of what becomes of each row.
    """

    def __init__(self, files: dict[str, str], layer: _Layer | None, records: str | None) -> None:
        self.files = files if layer is None else {**files, **layer.files}
        self.names, self.layer, self.records_path = list(files), layer, records
        self.opened: dict[str, StoredArray] = {}
        self.records: MappedArray | None = None
        self.target_shape = (0,)
        with suppress(FileError):  # which is told when it is the shard's turn
            self.target_shape = shape_of(files["target"])

    def open(self, options: Options, sample: int) -> Shard:
        """Open the files."""
        self.opened = {}
        for name in self.names:
            self.opened[name] = open_array(self.files[name])
        names = ("logits", "target", "groups", "mask")
        logits, target, groups, mask = (self.opened.get(name) for name in names)
        assert logits is not None
        assert target is not None
        if self.layer is None:
            return Shard(logits, target, groups, options, sample, mask)
        return Shard(self.layer.logits(logits), target, groups, replace(options, dtype=None), sample, mask)

    @property
    def keeps_rows(self) -> bool:
        """Whether what becomes of each row is kept."""
        return self.records_path is not None

    def keep_rows(self, shard: Shard, goes_on: bool) -> None:
        """Map the file of records."""
        if self.records_path is not None:
            records = _open_records(self.records_path, shard.target_shape, shard.row_dtype, goes_on)
            self.records = MappedArray(self.records_path, cast(Any, records)._mmap, records)
            shard.store_rows(records)

    def read(self, reads: Iterable[Callable[[], Block]]) -> Generator[Block, None, None]:
        """Read blocks, ahead of where they are used."""
        return ahead(reads)

    def release(self, shard: Shard, box: Box) -> None:
        """Let go of the memory that was used to read what belongs to a block's rows, and to write records."""
        shard.release_rows(box)
        if self.records is not None:
            self.records.release()

    def flush(self) -> None:
        """Bring the records to the disk."""
        if self.records is not None:
            self.records.flush()

    def close(self) -> None:
        """Let go of the files."""
        self.flush()
        for stored in self.opened.values():
            stored.close()
        self.opened.clear()
        self.records = None

    def discard(self) -> None:
        """Delete the records."""
        if self.records_path is not None:
            with suppress(FileNotFoundError):
                os.unlink(self.records_path)


def _record_files(
    path: str | None,
    paths: dict[str, str],
    files: dict[str, list[str]],
    others: Iterable[str | os.PathLike[str] | None],
) -> list[str | None]:
    """Return the file of records of each shard, none of those in use, and make their directory."""
    logits = files["logits"]
    if path is None:
        return [None] * len(logits)
    names = [path]
    if is_sharded(paths["logits"]):
        stems = [os.path.splitext(os.path.basename(split(file).file))[0] for file in logits]
        if len(set(stems)) < len(stems):
            raise FileError(path, f"would have files of the same name for shards of {paths['logits']}")
        names = [os.path.join(path, f"{stem}.npy") for stem in stems]
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise OutputError(path, error.strerror or str(error)) from None
    taken = [split(file).file for found in files.values() for file in found]
    taken += [split(os.fspath(file)).file for file in others if file is not None]
    refuse_to_overwrite(names, taken)
    for inputs in paths.values():
        if any(_is_one_of(inputs, name) for name in names):
            raise OutputError(path, f"records there would be taken for shards of {inputs}")
    return list(names)


def _open_records(path: str, shape: tuple[int, ...], dtype: np.dtype[Any], goes_on: bool) -> Array:
    """Map a new file of records, or the one that an evaluation goes on with."""
    try:
        if not goes_on:
            created = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and ends the process later
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
            return created
        records = np.lib.format.open_memmap(path, "r+")
    except (OSError, ValueError) as error:
        raise OutputError(path, getattr(error, "strerror", None) or str(error)) from None
    if (records.shape, records.dtype) != (shape, dtype):
        what = (
            f"holds {records.dtype} of shape {records.shape}, but the state goes on with {dtype} of {shape}"
        )
        raise OutputError(path, what)
    return records
