"""Files evaluated by a Dask cluster: pieces of shards, which tasks open themselves, become states that merge.

All workers see the files under the same paths. Here shards are looked at, so that what does not go together
is told as it would be without a cluster, and cut into runs of the blocks that one process would take. A task
that dies with its worker runs again elsewhere: it has changed nothing.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any, Literal, NamedTuple

from logitloss._threads import get_num_threads
from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.dask import merged_states, one_thread, tree
from logitloss.evaluate.errors import ClusterError, EvaluationError, OutputError
from logitloss.evaluate.fingerprint import sample_of
from logitloss.evaluate.provenance import inputs_of
from logitloss.evaluate.shard import Kind, Options
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stream import Evaluation, Progress, Source, evaluate_blocks, left_out

OnError = Literal["fail", "skip"]

# Of a task's logits; more where there would be so many tasks that the scheduler, which takes a fifth of a
# millisecond for each, had more to do than the workers.
PIECE_BYTES, MOST_PIECES = 256 << 20, 1 << 16


class _Plan(NamedTuple):
    """A shard to be evaluated.

    `seen` has the rows up to the end of each block; a row has bytes of logits, and bytes that are read. What
    tells it from others is there if asked for.
    """

    source: Source
    kind: Kind
    seen: list[int]
    logit_bytes: int
    row_bytes: int
    inputs: list[dict[str, Any]]

    @property
    def n_bytes(self) -> int:
        """Those of its logits."""
        return self.seen[-1] * self.logit_bytes if self.seen else 0

    def pieces(self, n_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Cut into runs of blocks of about so many bytes: the first, the one after the last, and the rows."""
        blocks = max(1, n_bytes // max(1, self.seen[0] * self.logit_bytes)) if self.seen else 1
        if not self.seen:  # its positions that have no logits are to be counted
            yield 0, 0, 0
        for first in range(0, len(self.seen), blocks):
            end = min(first + blocks, len(self.seen))
            yield first, end, self.seen[end - 1] - (self.seen[first - 1] if first else 0)


def evaluate_sources(
    at: Any,
    sources: Sequence[Source],
    options: Options,
    *,
    on_error: OnError = "fail",
    on_skip: Callable[[Skipped], None] | None = None,
    describe: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate shards on a cluster, in pieces; see `files.evaluate_files`."""
    options = one_thread(options)
    plans = list(_plans(sources, options, on_error, describe))
    piece_bytes = sum(plan.n_bytes for plan in plans if isinstance(plan, _Plan)) // MOST_PIECES
    piece_bytes = max(PIECE_BYTES, piece_bytes)
    found: list[Evaluation] = [_nothing(options)]
    rest: Sequence[_Plan | Evaluation] = plans
    kind: Kind | None = None
    with _connected(at, options) as client:
        while rest:
            some, rest, kind_then = _alike(rest, kind, options, on_error)
            tasks = _submitted(client, some, piece_bytes, options, on_error)
            found.append(_gathered(client, *tasks, progress))
            if len(found[-1].skipped) < len(some):
                kind = kind_then  # which those left out do not decide
    evaluation = _merged(found)
    if on_skip is not None:
        for skipped in evaluation.skipped:
            on_skip(skipped)
    inputs = {(one["role"], one["file"]): one for one in evaluation.inputs}  # a layer's come with each shard
    return evaluation._replace(inputs=list(inputs.values()))


def _plans(
    sources: Sequence[Source], options: Options, on_error: OnError, describe: bool
) -> Iterator[_Plan | Evaluation]:
    """Look at each shard, of which no more is read than says what it is; of a bad one, there is a result."""
    kind: Kind | None = None
    for source in sources:
        try:
            shard = source.open(options, sample_of(len(sources)) if describe else 0)
            if on_error == "fail":
                kind = shard.kind.after(kind)
            seen = [rows for _, rows in shard.blocks(0)]
            logit_bytes = shard.dtype.itemsize * (shard.n_classes or 1)
            inputs = inputs_of([(source.files, shard.described(shard.size))]) if describe else []
            yield _Plan(source, shard.kind, seen, logit_bytes, shard.row_bytes, inputs)
        except EvaluationError as error:
            yield _failed(source, error, options, on_error)
        finally:
            source.close()


def _alike(
    plans: Sequence[_Plan | Evaluation], kind: Kind | None, options: Options, on_error: OnError
) -> tuple[list[_Plan | Evaluation], Sequence[_Plan | Evaluation], Kind | None]:
    """Return the shards to be evaluated together, those after them, and the kind of the former.

    Those of a known kind are all that are left; before one is known, those up to the first of another.
    """
    some: list[_Plan | Evaluation] = []
    is_known = kind is not None
    for number, plan in enumerate(plans):
        if isinstance(plan, _Plan):
            try:
                kind = plan.kind.after(kind)
            except EvaluationError as error:
                if not is_known:
                    return some, plans[number:], kind
                plan = _failed(plan.source, error, options, on_error)
        some.append(plan)
    return some, [], kind


def _failed(source: Source, error: EvaluationError, options: Options, on_error: OnError) -> Evaluation:
    """Return that a shard is left out, or raise what is wrong, with it or with what cannot be written."""
    error.argument = source.files.get(error.argument, error.argument)
    if on_error == "fail" or isinstance(error, OutputError):
        raise error
    return _nothing(options)._replace(skipped=[left_out(source, error)])


def _nothing(options: Options) -> Evaluation:
    return Evaluation(EvaluationState(options.loss, options.per_class), 0, 0, [], [])


def _submitted(
    client: Any, plans: Sequence[_Plan | Evaluation], piece_bytes: int, options: Options, on_error: OnError
) -> tuple[Any, dict[Any, tuple[int, int]]]:
    """Start all tasks, and return the future of the last, and those of pieces with their rows and bytes.

    No other future is left when this returns, so what has been merged is forgotten.
    """
    merge = partial(client.submit, _merged, pure=False, priority=1)  # before more pieces
    shards: list[Any] = [_nothing(options)]
    pending = {}
    for plan in plans:
        if isinstance(plan, Evaluation):
            shards.append(plan)
            continue
        pieces = []
        for first, end, n_rows in plan.pieces(piece_bytes):
            inputs = [] if first else plan.inputs
            piece = client.submit(_piece, plan.source, options, first, end, on_error, inputs, pure=False)
            pending[piece] = n_rows, n_rows * plan.row_bytes
            pieces.append(piece)
        if pieces:
            shards.append(tree(pieces, partial(merge, one_shard=True)))
    return merge([tree(shards, merge)]), pending


def _piece(
    source: Source, options: Options, first: int, end: int, on_error: OnError, inputs: list[dict[str, Any]]
) -> Evaluation:
    """Evaluate some blocks of a shard, whose arrays are told with the first."""
    source = copy(source)  # tasks of one process may be given the same
    try:
        found = evaluate_blocks(source, source.open(options, 0), options, first, end)
        return found._replace(inputs=inputs)
    except EvaluationError as error:
        return _failed(source, error, options, on_error)
    finally:
        source.close()


def _merged(parts: Sequence[Evaluation], one_shard: bool = False) -> Evaluation:
    """Add up; a shard of which a piece is left out is left out whole."""
    skipped = [one for part in parts for one in part.skipped]
    states, inputs = [part.state for part in parts], [one for part in parts for one in part.inputs]
    if one_shard and skipped:
        states, inputs, skipped = [states[0].empty()], [], skipped[:1]
    n_rows, n_bytes = sum(part.n_rows for part in parts), sum(part.n_bytes for part in parts)
    return Evaluation(merged_states(states), n_rows, n_bytes, skipped, inputs)


def _gathered(
    client: Any, last: Any, pending: dict[Any, tuple[int, int]], progress: Progress | None
) -> Evaluation:
    """Wait for the last task, and tell of the pieces that are through; if one fails, let go of the others."""
    from distributed import KilledWorker, as_completed

    total, done, read = sum(n_rows for n_rows, _ in pending.values()), 0, 0
    try:
        for piece in as_completed(list(pending), loop=client.loop):
            if piece.status == "error":
                piece.result()
            n_rows, n_bytes = pending.pop(piece)  # so that Dask may forget it
            done, read = done + n_rows, read + n_bytes
            if progress is not None:
                progress(done, total, read)
        evaluation: Evaluation = last.result()
    except (CancelledError, KilledWorker) as error:
        what = str(error).strip().partition("\n")[0]
        raise ClusterError("dask", f"the cluster gave up: {what or type(error).__name__}") from None
    finally:
        for future in (last, *pending):  # what nobody waits for is cancelled
            future.release()
    return evaluation


@contextmanager
def _connected(at: Any, options: Options) -> Iterator[Any]:
    """Give a client of a cluster: theirs, one of a scheduler's address, or one of processes made here."""
    try:
        import distributed
        from distributed.comm import get_address_host_port
    except ImportError:
        raise ImportError("distributed is not installed: pip install 'logitloss[dask]'") from None
    if isinstance(at, distributed.Client):
        yield at
        return
    with ExitStack() as stack:
        place = at
        local = re.fullmatch(r"local(?::([1-9]\d*))?", at)
        if at.startswith("local:") and not local:
            raise ClusterError("dask", f"is {at!r}, expected local:N, N from 1 on")
        if local:
            n_workers = int(local[1] or max(1, get_num_threads() // (options.num_threads or 1)))
            place = distributed.LocalCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(place)
        try:
            if not local:
                get_address_host_port(at)  # an address that is none would keep a client busy for long
            client = stack.enter_context(distributed.Client(place, set_as_default=False))
        except (OSError, ValueError) as error:
            raise ClusterError("dask", f"no scheduler at {at!r} ({error})") from None
        yield client
