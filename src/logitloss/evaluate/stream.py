"""An evaluation of one shard after another, a block of rows at a time.

Every shard has a state of its own, which is merged when it is through. So one that turns out bad can be left
out whole, the figures do not depend on that another was, and what was counted before is never lost.
"""

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from functools import partial
from itertools import accumulate, islice
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy.typing as npt

from logitloss import _backends
from logitloss.evaluate.checkpoint import Checkpoint, Skipped, Standing
from logitloss.evaluate.errors import EvaluationError, OutputError, StateError
from logitloss.evaluate.rows import Rows, rows_of
from logitloss.evaluate.shard import LEAST_SAMPLE, SAMPLE, Block, Kind, Options, Shard
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stores.stored import Box
from logitloss.linear import LinearLogits

Array = npt.NDArray[Any]
T = TypeVar("T")
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
    """

    state: EvaluationState
    n_rows: int
    n_bytes: int
    skipped: list[Skipped]


class Source:
    """Where a shard comes from: here, arrays; in `files`, files that are opened when it is its turn.

    Parameters
    ----------
    logits, target, groups, per_row
        As in `evaluate`.
    """

    files: Mapping[str, str] = {}

    def __init__(
        self, logits: Array | LinearLogits, target: Array, groups: Array | None, per_row: Array | None
    ) -> None:
        self.arrays, self.per_row, self.n_rows = (logits, target, groups), per_row, target.size

    def open(self, options: Options, sample: int) -> Shard:
        """Return the shard."""
        return Shard(*self.arrays, options, sample)

    def keep_rows(self, shard: Shard, goes_on: bool) -> None:
        """Have what becomes of each row kept, if that is wanted; or go on with what was kept before."""
        if self.per_row is not None:
            shard.store_rows(self.per_row)

    def read(self, reads: Iterable[Callable[[], Block]]) -> Generator[Block, None, None]:
        """Read blocks, one after the other."""
        yield from (read() for read in reads)

    def release(self, shard: Shard, box: Box) -> None:
        """Let go of the memory that was used to read a block."""

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
                "dtype": options.dtype,
            },
            "backend": _backends.get(options.backend).name,
            "shards": len(sources),
        }
        checkpoint = Checkpoint(state_file, inputs, save_every)
        standing = checkpoint.load() or standing
        if on_error == "fail" and standing.skipped:
            file, reason = standing.skipped[0]
            raise StateError(
                str(state_file), f"has skipped {file} ({reason}), and goes on with --on-error skip"
            )
    run = _Run(sources, options, standing, checkpoint, progress)
    with checkpoint.kept() if checkpoint else nullcontext():
        run.show(standing.n_through, standing.part.count + standing.part.ignored)
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
    return Evaluation(standing.through, run.n_rows, run.n_bytes, standing.skipped)


def evaluate_blocks(
    source: Source, shard: Shard, options: Options, first: int = 0, end: int | None = None
) -> Evaluation:
    """Evaluate a shard's blocks from one number to another by themselves."""
    state, n_rows = EvaluationState(options.loss, options.per_class), 0
    reads = (partial(shard.read, box, seen) for box, seen in islice(shard.blocks(0), first, end))
    with closing(source.read(reads)) as blocks:
        for block in blocks:
            state.add(rows_of_block(shard, block, options), block.groups)
            n_rows += block.target.size
            source.release(shard, block.box)
    return Evaluation(state, n_rows, n_rows * shard.row_bytes, [])


def left_out(source: Source, error: EvaluationError) -> Skipped:
    """Return why a shard is left out."""
    if error.argument in source.files.values():
        return Skipped(error.argument, error.reason)
    return Skipped(source.files["logits"], str(error))


def read_ahead(reads: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Read on another thread what comes next, while what came before is worked on; no more than that."""
    with ThreadPoolExecutor(1, "logitloss-read") as thread:
        following: Future[T] | None = None
        for read in reads:
            this, following = following, thread.submit(read)
            if this is not None:
                yield this.result()
        if following is not None:
            yield following.result()


def rows_of_block(shard: Shard, block: Block, options: Options) -> Rows:
    """Return what becomes of some rows of a shard."""
    try:
        return rows_of(
            shard.logits_of(block),
            block.target,
            options.loss,
            None if options.loss == "bce" else -1,
            ignore_index=options.ignore_index,
            num_threads=options.num_threads,
            backend=options.backend,
        )
    except EvaluationError as error:
        error.shift(tuple(part.start for part in block.box))
        raise


class _Run:
    """An evaluation that goes from shard to shard, and what it has read."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: Options,
        standing: Standing,
        checkpoint: Checkpoint | None,
        progress: Progress | None,
    ) -> None:
        self.sources, self.options = sources, options
        self.standing, self.checkpoint, self.progress = standing, checkpoint, progress
        self.n_rows = self.n_bytes = 0
        self.starts = [0, *accumulate(source.n_rows for source in sources)]
        self.sample = max(LEAST_SAMPLE, SAMPLE // max(1, len(sources)))
        self.kind: Kind | None = None

    def show(self, number: int, done: int = 0) -> None:
        """Tell the rows done, up to those of the shard of a number."""
        if self.progress is not None:
            self.progress(self.starts[number] + done, self.starts[-1], self.n_bytes)

    def shard(self, number: int) -> None:
        """Evaluate a shard, or what is left of it; one that is through is only looked at."""
        standing, source = self.standing, self.sources[number]
        shard = source.open(self.options, self.sample)
        self.kind = shard.checked_kind(self.kind)
        then = cast(dict[str, Any], standing.shards[number]) if number < len(standing.shards) else {}
        done = then.get("done", 0)
        if self.checkpoint is not None and (done or number < standing.n_through):
            self.checkpoint.check(then, shard.described(done), source.files.get("logits"))
        else:  # also one of which nothing counts, and which may have been replaced
            self.note(number, shard, done)
        source.keep_rows(shard, goes_on=done > 0)
        if number < standing.n_through:
            return
        reads = (partial(shard.read, box, seen) for box, seen in shard.blocks(done))
        with closing(source.read(reads)) as blocks:
            for block in blocks:
                self.block(shard, block)
                self.n_rows += block.seen - done
                self.n_bytes += (block.seen - done) * shard.row_bytes
                done = block.seen
                self.note(number, shard, done)
                if done == shard.size:
                    standing.finish_shard()
                if self.checkpoint is not None:
                    self.checkpoint.after_block(standing, self.starts[-1], source.flush)
                source.release(shard, block.box)
                self.show(number, done)
        if number == standing.n_through:  # no row was left
            standing.finish_shard()

    def note(self, number: int, shard: Shard, done: int) -> None:
        """Put down which shard is begun, and its rows done."""
        self.standing.shards[number:] = [shard.described(done) if self.checkpoint else {}]

    def block(self, shard: Shard, block: Block) -> None:
        """Evaluate some rows."""
        found = rows_of_block(shard, block, self.options)
        self.standing.part.add(found, block.groups)
        if shard.per_row is not None:
            found.store(shard.per_row[block.box])

    def skip(self, number: int, error: EvaluationError) -> None:
        """Leave a shard out whole."""
        self.standing.skip_shard(number, left_out(self.sources[number], error))
        if self.checkpoint is not None:
            self.checkpoint.save(self.standing)
        self.show(number + 1)
