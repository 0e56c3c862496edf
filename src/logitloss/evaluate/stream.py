"""An evaluation of one shard after another, a block of rows at a time.

Every shard has a state of its own, which is merged when it is through. So one that turns out bad can be left
out whole, the figures do not depend on that another was, and what was counted before is never lost.
"""

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import accumulate, islice
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from logitloss import _backends
from logitloss.evaluate.atomic import check_writable
from logitloss.evaluate.checkpoint import Checkpoint, Skipped, Standing
from logitloss.evaluate.errors import EvaluationError, OutputError, StateError
from logitloss.evaluate.fingerprint import sample_of
from logitloss.evaluate.positions import predicted
from logitloss.evaluate.provenance import inputs_of
from logitloss.evaluate.rows import Rows, rows_of
from logitloss.evaluate.shard import Block, Kind, Options, Shard
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stores.stored import Box
from logitloss.layer import THREADS, LinearLogits

Array = npt.NDArray[Any]
NOTHING: Array = np.empty(0)
Progress = Callable[[int, int, int], None]

SAVE_EVERY = 30.0


class Evaluation(NamedTuple):
    """What an evaluation came to.

    Attributes
    ----------
    state : EvaluationState
        Its `compute()` gives the figures.
    n_rows, n_bytes : int
        Rows, and bytes of logits (or hidden states), read: without those that a state file has seen before.
    skipped : list of Skipped
        Shards of which no row counts, with `file` and `reason`.
    inputs : list of dict
        Arrays of files, with `role`, `file`, `shape`, `dtype` and `fingerprint`, where they are described.
    """

    state: EvaluationState
    n_rows: int
    n_bytes: int
    skipped: list[Skipped]
    inputs: list[dict[str, Any]]


class Source:
    """Where a shard comes from: here, arrays; in `files`, files that are opened when it is its turn.

    Parameters
    ----------
    logits, target, groups, per_row, mask
        As in `evaluate`.

    Attributes
    ----------
    target_shape : tuple of int
        Of which follows how many rows there are, before the shard is opened.
    """

    files: Mapping[str, str] = {}

    def __init__(
        self,
        logits: Array | LinearLogits,
        target: Array,
        groups: Array | None,
        per_row: Array | None,
        mask: Array | None = None,
    ) -> None:
        self.arrays, self.mask, self.per_row = (logits, target, groups), mask, per_row
        self.target_shape: tuple[int, ...] = target.shape

    def open(self, options: Options, sample: int) -> Shard:
        """Return the shard."""
        return Shard(*self.arrays, options, sample, self.mask)

    @property
    def keeps_rows(self) -> bool:
        """Whether what becomes of each row is kept."""
        return self.per_row is not None

    def keep_rows(self, shard: Shard, goes_on: bool) -> None:
        """Have what becomes of each row kept, if that is wanted; or go on with what was kept before."""
        if self.per_row is not None:
            shard.store_rows(self.per_row)
            if shard.is_shifted:
                self.per_row[..., :1] = np.zeros((), shard.row_dtype)

    def read(self, reads: Iterable[Callable[[], Block]]) -> Generator[Block, None, None]:
        """Read blocks, one after the other."""
        yield from (read() for read in reads)

    def release(self, shard: Shard, box: Box) -> None:
        """Let go of the memory that was used to read what belongs to a block's rows."""

    def flush(self) -> None:
        """Bring to the disk what was kept of the rows done."""

    def close(self) -> None:
        """Let go of the shard."""

    def discard(self) -> None:
        """Delete what was kept."""


def evaluate_shards(
    sources: Sequence[Source],
    options: Options,
    *,
    on_error: Literal["fail", "skip"] = "fail",
    on_skip: Callable[[Skipped], None] | None = None,
    state_file: str | os.PathLike[str] | None = None,
    save_every: float = SAVE_EVERY,
    describe: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate shards in their order; see `inputs.evaluate` and `files.evaluate_files`."""
    standing, checkpoint = Standing(EvaluationState(options.loss, options.per_class)), None
    if state_file is not None:
        inputs = {
            "options": {
                "loss": options.loss,
                "per_class": options.per_class,
                "ignore_index": options.ignore_index,
                "shift": options.shift,
                "dtype": options.dtype,
            },
            "backend": _backends.get(options.backend).name,
            "shards": len(sources),
            "per_row": any(source.keeps_rows for source in sources),
        }
        checkpoint = Checkpoint(state_file, inputs, save_every)
        standing = checkpoint.load() or standing
        if standing.n_through < len(sources):
            check_writable(state_file)
        if on_error == "fail" and standing.skipped:
            file, reason = standing.skipped[0]
            raise StateError(
                str(state_file), f"has skipped {file} ({reason}), and goes on with --on-error skip"
            )
    run = _Run(sources, options, standing, checkpoint, describe, progress)
    with checkpoint.kept() if checkpoint else nullcontext():
        run.show(standing.n_through, standing.part.n_rows)
        for number, source in enumerate(sources):
            if not standing.is_skipped(number):
                try:
                    run.shard(number)
                except (OutputError, StateError):
                    raise
                except EvaluationError as error:
                    error.argument = source.files.get(error.argument, error.argument)
                    if on_error == "fail" or number < standing.n_through:
                        raise
                    run.skip(number, error)
                finally:
                    source.close()
            if standing.is_skipped(number):
                source.discard()
                if on_skip is not None:
                    on_skip(cast(Skipped, standing.shards[number]))
    described = (
        (source.files, shard)
        for source, shard in zip(sources, standing.shards, strict=True)
        if source.files and not isinstance(shard, Skipped)
    )
    return Evaluation(standing.through, run.n_rows, run.n_bytes, standing.skipped, inputs_of(described))


def evaluate_blocks(
    source: Source, shard: Shard, options: Options, first: int = 0, end: int | None = None
) -> Evaluation:
    """Evaluate a shard's blocks from one number to another by themselves."""
    state, n_rows = EvaluationState(options.loss, options.per_class), 0
    if first == 0:  # what has no logits belongs to no block
        state.shifted += shard.shifted
        state.add_classes(shard.n_classes or 0)
    with closing(found_in(source, shard, options, islice(shard.blocks(0), first, end))) as found:
        for block, rows in found:
            add_block(state, block, rows)
            n_rows += block.target.size
            source.release(shard, block.box)
    return Evaluation(state, n_rows, n_rows * shard.row_bytes, [], [])


def left_out(source: Source, error: EvaluationError) -> Skipped:
    """Return why a shard is left out."""
    if error.argument in source.files.values():
        return Skipped(error.argument, error.reason)
    return Skipped(source.files["logits"], str(error))


def rows_of_block(shard: Shard, block: Block, options: Options) -> Rows:
    """Return what becomes of some rows of a shard."""
    num_threads = options.num_threads
    if num_threads is None and isinstance(shard.logits, LinearLogits):
        num_threads = THREADS
    try:
        return rows_of(
            shard.logits_of(block),
            block.target,
            options.loss,
            None if options.loss == "bce" else -1,
            block.mask,
            ignore_index=options.ignore_index,
            num_threads=num_threads,
            backend=options.backend,
        )
    except EvaluationError as error:
        *outer, last = (part.start for part in block.box)
        # in the array that the error names: a label's row is the one before
        is_after = shard.is_shifted and error.argument != "logits"
        error.shift((*outer, last + is_after))
        raise


def found_in(
    source: Source, shard: Shard, options: Options, boxes: Iterable[tuple[Box, int]]
) -> Generator[tuple[Block, Rows], None, None]:
    """Evaluate blocks of a shard, and let go of their logits: where that is done, the next ones are read."""
    spent: deque[Box] = deque()

    def read(box: Box, seen: int) -> Block:
        while spent:
            shard.release_logits(spent.popleft())
        return shard.read(box, seen)

    with closing(source.read(partial(read, box, seen) for box, seen in boxes)) as blocks:
        for block in blocks:
            rows = rows_of_block(shard, block, options)
            spent.append(block.box)
            block = block._replace(logits=NOTHING)
            yield block, rows


def add_block(state: EvaluationState, block: Block, rows: Rows) -> None:
    """Take what became of a block's rows into a state."""
    state.add(rows, block.groups)
    if block.sequences is not None:
        state.end_runs.add(*block.sequences)


class _Run:
    """An evaluation that goes from shard to shard, and what it has read."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: Options,
        standing: Standing,
        checkpoint: Checkpoint | None,
        describe: bool,
        progress: Progress | None,
    ) -> None:
        self.sources, self.options = sources, options
        self.standing, self.checkpoint, self.progress = standing, checkpoint, progress
        self.describe = describe
        self.n_rows = self.n_bytes = 0
        self.starts = [0, *accumulate(self._rows_of(source) for source in sources)]
        self.sample = sample_of(len(sources))
        self.kind: Kind | None = None

    def _rows_of(self, source: Source) -> int:
        """Return how many rows a shard has."""
        # a target of no axes is told when it is the shard's turn
        return math.prod(predicted(source.target_shape or (1,), self.options.shift))

    def show(self, number: int, done: int = 0) -> None:
        """Tell the rows done, up to those of the shard of a number."""
        if self.progress is not None:
            self.progress(self.starts[number] + done, self.starts[-1], self.n_bytes)

    def shard(self, number: int) -> None:
        """Evaluate a shard, or what is left of it; one that is through is only looked at."""
        standing, source = self.standing, self.sources[number]
        shard = source.open(self.options, self.sample)
        kind = shard.kind.after(self.kind)
        then = cast(dict[str, Any], standing.shards[number]) if number < len(standing.shards) else {}
        done = then.get("done", 0)
        if self.checkpoint is not None and (done or number < standing.n_through):
            self.checkpoint.check(then, shard.described(done), source.files)
        else:  # also one of which nothing counts, and which may have been replaced
            self.note(number, shard, done)
        source.keep_rows(shard, goes_on=done > 0)
        if done and shard.per_row is not None:
            self._check_records(number, shard, shard.per_row, done)
        if number == standing.n_through:
            self._evaluate(number, source, shard, done)
        self.kind = kind  # which one that is left out does not decide

    def _check_records(self, number: int, shard: Shard, records: Array, done: int) -> None:
        """Refuse records that are not those of the rows done, where a state has counted these alone."""
        standing, checkpoint = self.standing, self.checkpoint
        is_through = number < standing.n_through
        if checkpoint is None or (is_through and len(self.sources) > 1):
            return
        state = standing.through if is_through else standing.part
        counted = hits = 0
        for box, seen in shard.blocks(0):
            if seen <= done:
                counted += int(np.count_nonzero(records[box]["counted"]))
                hits += int(np.count_nonzero(records[box]["hit"]))
                self.sources[number].release(shard, box)
        if (counted, hits) != (state.count, state.correct):
            what = (
                f"has {state.correct} hits among {state.count} rows that count, but the records of them "
                f"have {hits} among {counted}; another --state, or none, starts anew"
            )
            raise StateError(str(checkpoint.path), what)

    def _evaluate(self, number: int, source: Source, shard: Shard, done: int) -> None:
        """Evaluate a shard's rows after those done."""
        standing = self.standing
        with closing(found_in(source, shard, self.options, shard.blocks(done))) as found:
            for block, rows in found:
                add_block(standing.part, block, rows)
                if shard.per_row is not None:
                    rows.store(shard.per_row[block.box])
                self.n_rows += block.seen - done
                self.n_bytes += (block.seen - done) * shard.row_bytes
                done = block.seen
                self.note(number, shard, done)
                if done == shard.size:
                    standing.finish_shard(shard.shifted)
                if self.checkpoint is not None:
                    self.checkpoint.after_block(standing, self.starts[-1], source.flush)
                source.release(shard, block.box)
                self.show(number, done)
        if number == standing.n_through:  # no row was left
            standing.part.add_classes(shard.n_classes or 0)
            standing.finish_shard(shard.shifted)
            if self.checkpoint is not None:
                self.checkpoint.unsaved = standing

    def note(self, number: int, shard: Shard, done: int) -> None:
        """Put down which shard is begun, and its rows done."""
        is_described = self.checkpoint is not None or (self.describe and done == shard.size)
        self.standing.shards[number:] = [shard.described(done) if is_described else {}]

    def skip(self, number: int, error: EvaluationError) -> None:
        """Leave a shard out whole."""
        self.standing.skip_shard(number, left_out(self.sources[number], error))
        if self.checkpoint is not None:
            self.checkpoint.save(self.standing)
        self.show(number + 1)
