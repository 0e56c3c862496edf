"""Evaluation on Dask: chunks of arrays, or pieces of files, become states where they are, and these merge.

What travels is a state a task: some kilobytes. `evaluate` takes Dask arrays on whatever scheduler is theirs;
`evaluate_sources` takes files, which tasks open themselves. Nothing is put together along the classes: where
chunks end among them, rows merge by `VocabularyShards`. A tree of merges takes `FAN_IN` at a time. Dask gives
a task one thread, so does this.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from logitloss._threads import get_num_threads
from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.errors import ClusterError, DtypeError, EvaluationError, ShapeError
from logitloss.evaluate.shard import Kind, Options, Shard, floats, linear, native
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stream import (
    Evaluation,
    Progress,
    Source,
    evaluate_blocks,
    left_out,
)
from logitloss.evaluate.vocabulary import VocabularyShards, target_logits

try:
    import dask.array as da
    from dask import delayed
except ImportError:
    raise ImportError("dask is not installed: pip install 'logitloss[dask]'") from None

Array = npt.NDArray[Any]
T = TypeVar("T")

FAN_IN = 8
# Of a task's logits; more where there would be so many tasks that the scheduler, at a fifth of a millisecond
# each, had more to do than the workers.
PIECE_BYTES, MOST_PIECES = 256 << 20, 1 << 16


def evaluate(
    logits: Any,
    target: Any,
    *,
    weight: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    groups: Any = None,
    **options: Any,
) -> EvaluationState:
    """Evaluate Dask arrays, a task a chunk, on the scheduler that Dask would use, as a client's.

    The figures are those of one process, however the arrays are chunked: counts exactly, sums to float64's
    rounding. Only where chunks end among the classes, float32 (or narrower) logits have a loss that is
    rounded once less.

    Parameters
    ----------
    logits : dask.array of float8, float16, bfloat16, float32 or float64
        As in `logitloss.evaluate.evaluate`; or, with a weight, hidden states, shape (..., D).
    target : dask.array or ndarray
        Labels of the rows; chunked as the logits are if it is not.
    weight, bias : dask.array or ndarray, optional
        Of the last layer, (C, D) and (C,). Each worker is sent the whole of them.
    softcap, logit_scale
        As in `logitloss.linear_cross_entropy`.
    groups : dask.array or ndarray, optional
        As in `logitloss.evaluate.evaluate`.
    **options
        Its `loss`, `per_class`, `ignore_index`, `axis`, `dtype`, `num_threads` (1 by default), `backend` and
        `chunk_rows`.

    Returns
    -------
    EvaluationState

    Raises
    ------
    ShapeError, DtypeError, LabelError, LogitError
        As in `logitloss.evaluate.evaluate`.

    Examples
    --------
    >>> import dask.array as da
    >>> from logitloss.evaluate import evaluate
    >>> logits, target = da.zeros((1000, 12), chunks=(300, 4)), da.arange(1000) % 12
    >>> round(evaluate(logits, target).compute().perplexity, 9)
    12.0
    """
    chosen = _one_thread(Options(**options))
    arrays = {"logits": logits, "target": target, "weight": weight, "bias": bias, "groups": groups}
    arrays = {name: _checked(name, array) for name, array in arrays.items() if array is not None}
    x, layer = arrays["logits"], None
    if "weight" in arrays:
        x = x.rechunk({-1: -1})
        dtype, of_layer = floats("logits", x, None)[1], (arrays["weight"], arrays.get("bias"))
        logits = linear(x, dtype, *of_layer, softcap, logit_scale)
        layer = delayed((dtype, *of_layer, softcap, logit_scale))
    whole = Shard(logits, arrays["target"], arrays.get("groups"), chosen, sample=0)
    if layer is None:
        x = whole.logits
        chosen = replace(chosen, axis=None if chosen.loss == "bce" else -1)
    n_axes = len(whole.shape)
    of_rows: dict[str, Any] = dict(whole.rows)
    rows = {name: array.rechunk(x.chunks[:n_axes]).to_delayed() for name, array in of_rows.items()}
    starts = [[0, *itertools.accumulate(sizes)] for sizes in x.chunks]
    chunks, states = x.to_delayed(), []
    for index in np.ndindex(chunks.shape[:n_axes]):
        parts = chunks[index] if chosen.loss == "ce" else [chunks[index]]
        there = {name: array[index] for name, array in rows.items()}
        origin = tuple(starts[axis][number] for axis, number in enumerate(index))
        if len(parts) > 1:
            shards = zip(parts, starts[-1], x.chunks[-1], strict=False)
            filled = [(part, first) for part, first, size in shards if size]
            states.append(_across_classes(filled, **there, options=chosen, dtype=whole.dtype, origin=origin))
        else:
            states.append(delayed(_of_chunk)(parts[0], **there, layer=layer, options=chosen, origin=origin))
    state: EvaluationState = _tree(states, delayed(_merged_states)).compute()
    return state


def _checked(name: str, array: Any) -> Any:
    """Return a Dask array, of chunks whose sizes are known."""
    if not isinstance(array, da.Array):
        if name == "logits" or hasattr(array, "__dask_graph__"):
            raise DtypeError(name, f"a {type(array).__name__}, expected a dask.array")
        array = da.from_array(np.asarray(array), chunks=-1)
    if any(math.isnan(size) for size in array.shape):
        raise ShapeError(name, "has chunks of unknown sizes: call its compute_chunk_sizes()")
    if name == "target" and not array.shape:
        raise ShapeError(name, "of shape (), and one row needs no Dask")
    return array


def _one_thread(options: Options) -> Options:
    """Give a task one thread if nothing else is asked for: Dask runs as many tasks as there are cores."""
    return replace(options, num_threads=options.num_threads or 1)


def _of_chunk(
    logits: Array,
    target: Array,
    groups: Array | None = None,
    *,
    layer: tuple[Any, ...] | None,
    options: Options,
    origin: tuple[int, ...],
) -> EvaluationState:
    """Evaluate a chunk that has whole rows, a block at a time."""
    with _counted_from(origin):
        source = Source(linear(logits, *layer) if layer else logits, target, groups, None)
        return evaluate_blocks(source, source.open(options, 0), options).state


def _across_classes(
    parts: list[tuple[Any, int]],
    target: Any,
    groups: Any = None,
    *,
    options: Options,
    dtype: np.dtype[Any],
    origin: tuple[int, ...],
) -> Any:
    """Return the task that evaluates some rows of which each chunk has some of the classes."""
    found = [delayed(_target_logits)(part, target, first, dtype) for part, first in parts]
    found = _tree(found, delayed(partial(reduce, np.fmax)))
    shards = [delayed(_shard_of_classes)(part, target, found, first, dtype, options) for part, first in parts]
    return delayed(_of_shards)(_tree(shards, delayed(_merged_shards)), groups, options, origin)


def _target_logits(logits: Array, target: Array, first_class: int, dtype: np.dtype[Any]) -> Array:
    return target_logits(native(logits, dtype), target, first_class)


def _shard_of_classes(
    logits: Array, target: Array, found: Array, first_class: int, dtype: np.dtype[Any], options: Options
) -> VocabularyShards:
    shards = VocabularyShards(target, found, ignore_index=options.ignore_index)
    threads, backend = options.num_threads, options.backend
    shards.update(native(logits, dtype), first_class, num_threads=threads, backend=backend)
    return shards


def _merged_shards(parts: Sequence[VocabularyShards]) -> VocabularyShards:
    """Merge into a new one: the parts are Dask's, who may give them to a second task."""
    first = parts[0]
    merged = VocabularyShards(first.target, first.target_logit, ignore_index=first.ignore_index)
    for part in parts:
        merged.merge(part)
    return merged


def _of_shards(
    shards: VocabularyShards, groups: Array | None, options: Options, origin: tuple[int, ...]
) -> EvaluationState:
    state = EvaluationState(options.loss, options.per_class)
    with _counted_from(origin):
        state.add(shards.rows(), groups)
    return state


@contextmanager
def _counted_from(origin: tuple[int, ...]) -> Iterator[None]:
    """Let errors count rows over the whole array."""
    try:
        yield
    except EvaluationError as error:
        error.shift(origin)
        raise


def _merged_states(states: Sequence[EvaluationState]) -> EvaluationState:
    merged = states[0].empty()
    for state in states:
        merged.merge(state)
    return merged


def _tree(parts: list[T], merged: Callable[[list[T]], T]) -> T:
    """Merge some at a time, and what that gives, in their order."""
    while len(parts) > 1:
        parts = [merged(parts[first : first + FAN_IN]) for first in range(0, len(parts), FAN_IN)]
    return parts[0]


# ---- files ----


class _Plan(NamedTuple):
    """A shard to be evaluated: the rows up to the end of each block, and the bytes of a row's logits."""

    source: Source
    seen: list[int]
    logit_bytes: int

    def pieces(self, n_bytes: int) -> Iterator[tuple[int, int, int]]:
        """Cut into runs of blocks of about so many bytes: the first, the one after the last, and the rows."""
        blocks = max(1, n_bytes // max(1, self.seen[0] * self.logit_bytes)) if self.seen else 1
        for first in range(0, len(self.seen), blocks):
            end = min(first + blocks, len(self.seen))
            yield first, end, self.seen[end - 1] - (self.seen[first - 1] if first else 0)


def evaluate_sources(
    at: Any,
    sources: Sequence[Source],
    options: Options,
    *,
    on_error: Literal["fail", "skip"] = "fail",
    on_skip: Callable[[Skipped], None] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate shards on a cluster, in pieces; see `files.evaluate_files`."""
    options = _one_thread(options)
    plans = list(_plans(sources, options, on_error))
    n_bytes = sum(plan.seen[-1] * plan.logit_bytes for plan in plans if isinstance(plan, _Plan) and plan.seen)
    piece_bytes = max(PIECE_BYTES, n_bytes // MOST_PIECES)
    with _connected(at, options) as client:
        merge = partial(client.submit, _merged, pure=False, priority=1)  # before more pieces
        shards, n_rows = [_nothing(options)], {}
        for plan in plans:
            if isinstance(plan, Evaluation):
                shards.append(plan)
                continue
            pieces = []
            for first, end, rows in plan.pieces(piece_bytes):
                piece = client.submit(_piece, plan.source, options, first, end, on_error, pure=False)
                n_rows[piece] = rows
                pieces.append(piece)
            if pieces:
                shards.append(_tree(pieces, partial(merge, one_shard=True)))
        evaluation = _gathered(client, _tree(shards, merge), n_rows, progress)
    if on_skip is not None:
        for skipped in evaluation.skipped:
            on_skip(skipped)
    return evaluation


def _plans(
    sources: Sequence[Source], options: Options, on_error: Literal["fail", "skip"]
) -> Iterator[_Plan | Evaluation]:
    """Look at each shard, of which no more is read than says what it is; of a bad one, there is a result."""
    kind: Kind | None = None
    for source in sources:
        try:
            shard = source.open(options, 0)
            kind = shard.checked_kind(kind)
            seen = [rows for _, rows in shard.blocks(0)]
            yield _Plan(source, seen, shard.dtype.itemsize * (shard.n_classes or 1))
        except EvaluationError as error:
            yield _failed(source, error, options, on_error)
        finally:
            source.close()


def _failed(
    source: Source, error: EvaluationError, options: Options, on_error: Literal["fail", "skip"]
) -> Evaluation:
    """Return that a shard is left out, or raise what is wrong with it."""
    error.argument = source.files.get(error.argument, error.argument)
    if on_error == "fail":
        raise error
    return _nothing(options)._replace(skipped=[left_out(source, error)])


def _nothing(options: Options) -> Evaluation:
    return Evaluation(EvaluationState(options.loss, options.per_class), 0, 0, [])


def _piece(
    source: Source, options: Options, first: int, end: int, on_error: Literal["fail", "skip"]
) -> Evaluation:
    """Evaluate some blocks of a shard."""
    source = copy(source)  # tasks of one process may be given the same
    try:
        return evaluate_blocks(source, source.open(options, 0), options, first, end)
    except EvaluationError as error:
        return _failed(source, error, options, on_error)
    finally:
        source.close()


def _merged(parts: Sequence[Evaluation], one_shard: bool = False) -> Evaluation:
    """Add up; a shard of which a piece is left out is left out whole."""
    skipped = [one for part in parts for one in part.skipped]
    states = [part.state for part in parts]
    if one_shard and skipped:
        states, skipped = [states[0].empty()], skipped[:1]
    n_rows, n_bytes = sum(part.n_rows for part in parts), sum(part.n_bytes for part in parts)
    return Evaluation(_merged_states(states), n_rows, n_bytes, skipped)


def _gathered(client: Any, root: Any, n_rows: dict[Any, int], progress: Progress | None) -> Evaluation:
    """Wait for the last task, and tell of the pieces that are through; on an error cancel what is not."""
    from distributed import KilledWorker, as_completed

    done, total = 0, sum(n_rows.values())
    try:
        for piece in as_completed(list(n_rows)):
            if piece.status == "error":
                piece.result()
            done += n_rows.pop(piece)  # so that Dask may forget it
            if progress is not None:
                progress(done, total, 0)
        evaluation: Evaluation = root.result()
        return evaluation
    except KilledWorker as error:
        raise ClusterError("dask", str(error).partition("\n")[0]) from None
    finally:
        client.cancel([root, *n_rows])


@contextmanager
def _connected(at: Any, options: Options) -> Iterator[Any]:
    """Give a client of a cluster: theirs, one of a scheduler's address, or one of processes made here."""
    try:
        import distributed
    except ImportError:
        raise ImportError("distributed is not installed: pip install 'logitloss[dask]'") from None
    if isinstance(at, distributed.Client):
        yield at
        return
    with ExitStack() as stack:
        place = at
        if at == "local":
            place = distributed.LocalCluster(
                n_workers=max(1, get_num_threads() // (options.num_threads or 1)),
                threads_per_worker=1,
                dashboard_address=None,
                silence_logs=logging.CRITICAL,
            )
            stack.enter_context(place)
        try:
            client = stack.enter_context(distributed.Client(place, set_as_default=False))
        except (OSError, ValueError) as error:
            raise ClusterError("dask", f"no scheduler at {at!r} ({error})") from None
        yield client
