"""Evaluation of Dask arrays: chunks become states where they are, and the states merge.

What travels is a state a chunk: some kilobytes. Nothing is put together along the classes: where chunks end
among them, rows merge by `VocabularyShards`. A tree of merges takes `FAN_IN` at a time. Dask runs a task a
core, so a task has one thread. Files on a cluster are left to `cluster`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial, reduce
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from logitloss import _check
from logitloss.evaluate.errors import DtypeError, EvaluationError, ShapeError
from logitloss.evaluate.padding import EndRuns
from logitloss.evaluate.positions import Mask, as_bool, counting, without_masked
from logitloss.evaluate.shard import Options, Shard, floats, linear, native
from logitloss.evaluate.state import EvaluationState
from logitloss.evaluate.stream import Source, evaluate_blocks
from logitloss.evaluate.vocabulary import VocabularyShards, target_logits

try:
    import dask.array as da
    from dask import compute, delayed
except ImportError:
    raise ImportError("dask is not installed: pip install 'logitloss[dask]'") from None

Array = npt.NDArray[Any]
T = TypeVar("T")

# What errors in a chunk are raised in
Counted = Callable[[], AbstractContextManager[None]]

FAN_IN = 8


def evaluate(
    logits: Any,
    target: Any,
    *,
    weight: Any = None,
    bias: Any = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    groups: Any = None,
    mask: Any = None,
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
        Of the last layer, (C, D) and (C,). Each worker has the whole of them: a large weight is better a Dask
        array, read where it is used, than sent with the graph.
    softcap, logit_scale
        As in `logitloss.linear_cross_entropy`.
    groups, mask : dask.array or ndarray, optional
        As in `logitloss.evaluate.evaluate`.
    **options
        Its `loss`, `per_class`, `ignore_index`, `shift`, `axis`, `dtype`, `num_threads`, `backend` and
        `chunk_rows`. A task's kernels have one thread by default, whatever OMP_NUM_THREADS is; the products
        that make logits of hidden states have as many as that says, which is one in Dask's workers.

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
    chosen = one_thread(Options(**options))
    EvaluationState(chosen.loss, chosen.per_class)  # which refuses what does not go together
    layer_arrays, row_arrays = {"weight": weight, "bias": bias}, {"groups": groups, "mask": mask}
    arrays = {"logits": logits, "target": target} | layer_arrays | row_arrays
    arrays = {name: _checked(name, array) for name, array in arrays.items() if array is not None}
    if "target" not in arrays:
        raise ShapeError("target", "is missing")
    x, layer = arrays["logits"], None
    if weight is None and not (bias is None and softcap is None and logit_scale == 1):
        raise ShapeError("weight", "is missing: bias, softcap and logit_scale are those of its layer")
    if weight is not None:
        x = x.rechunk({-1: -1})
        dtype, of_layer = floats("logits", x, None)[1], (arrays["weight"], arrays.get("bias"))
        logits = linear(x, dtype, *of_layer, softcap, logit_scale)
        layer = delayed((dtype, *of_layer, softcap, logit_scale))
    whole = Shard(logits, arrays["target"], arrays.get("groups"), chosen, 0, arrays.get("mask"))
    x = cast(Any, whole.stored)
    chosen = replace(chosen, shift=False)
    if layer is None:
        chosen = replace(chosen, axis=None if chosen.loss == "bce" else -1)
    n_axes = len(whole.shape)
    of_rows: dict[str, Any] = dict(whole.rows)
    rows = {name: array.rechunk(x.chunks[:n_axes]).to_delayed() for name, array in of_rows.items()}
    starts = [[0, *itertools.accumulate(sizes)] for sizes in x.chunks]
    chunks, states = x.to_delayed(), []
    for index in np.ndindex(chunks.shape[:n_axes]):
        there = {name: array[index] for name, array in rows.items()}
        origin = tuple(starts[axis][number] for axis, number in enumerate(index))
        counted = partial(_counted_from, origin, whole.is_shifted)
        parts = [(chunks[index], 0)]
        if chosen.loss == "ce":
            shards = list(zip(chunks[index], starts[-1], x.chunks[-1], strict=False))
            parts = [(part, first) for part, first, size in shards if size] or [shards[0][:2]]
        if len(parts) > 1:
            states.append(_across_classes(parts, **there, options=chosen, dtype=whole.dtype, counted=counted))
        else:
            chunk = delayed(_of_chunk)
            states.append(chunk(parts[0][0], **there, layer=layer, options=chosen, counted=counted))
    state: EvaluationState
    state, end_runs = compute(tree(states, delayed(merged_states)), _end_runs(whole, chosen.ignore_index))
    state.shifted, state.end_runs = whole.shifted, end_runs
    return state


def _end_runs(whole: Shard, ignore_index: int) -> Any:
    """Return the task that looks for padding, in whole sequences of labels."""
    if not whole.has_sequences:
        return EndRuns()
    of_rows: dict[str, Any] = {name: whole.rows[name] for name in ("target", "mask") if name in whole.rows}
    chunks = of_rows["target"].rechunk({-1: -1}).chunks
    chunked = (array.rechunk(chunks).to_delayed().ravel() for array in of_rows.values())
    found = delayed(partial(_end_runs_of, ignore_index=ignore_index))
    return tree([found(*parts) for parts in zip(*chunked, strict=True)], delayed(_merged_runs))


def _end_runs_of(target: Array, mask: Array | None = None, *, ignore_index: int) -> EndRuns:
    runs = EndRuns()
    runs.add(target, counting(target, mask, ignore_index))
    return runs


def _merged_runs(parts: Sequence[EndRuns]) -> EndRuns:
    merged = EndRuns()
    for part in parts:
        merged.merge(part)
    return merged


def _checked(name: str, array: Any) -> Any:
    """Return a Dask array, of chunks whose sizes are known."""
    if not isinstance(array, da.Array):
        if name == "logits" or hasattr(array, "__dask_graph__"):
            raise DtypeError(name, f"a {type(array).__name__}, expected a dask.array")
        _check.unmasked(name, array)
        array = da.from_array(np.asarray(array), chunks=-1)
    if any(math.isnan(size) for size in array.shape):
        raise ShapeError(name, "has chunks of unknown sizes: call its compute_chunk_sizes()")
    if name == "target" and not array.shape:
        raise ShapeError(name, "of shape (), and one row needs no Dask")
    return array


def one_thread(options: Options) -> Options:
    """Give a task one thread if nothing else is asked for: Dask runs as many tasks as there are cores."""
    return replace(options, num_threads=options.num_threads or 1)


def _of_chunk(
    logits: Array,
    target: Array,
    groups: Array | None = None,
    mask: Array | None = None,
    *,
    layer: tuple[Any, ...] | None,
    options: Options,
    counted: Counted,
) -> EvaluationState:
    """Evaluate a chunk that has whole rows, a block at a time."""
    with counted():
        source = Source(linear(logits, *layer) if layer else logits, target, groups, None, mask)
        state = evaluate_blocks(source, source.open(options, 0), options).state
    state.end_runs = EndRuns()  # of sequences that chunks may cut, these are found apart
    return state


def _across_classes(
    parts: list[tuple[Any, int]],
    target: Any,
    groups: Any = None,
    mask: Any = None,
    *,
    options: Options,
    dtype: np.dtype[Any],
    counted: Counted,
) -> Any:
    """Return the task that evaluates some rows of which each chunk has some of the classes."""
    if mask is not None:
        mask = delayed(_as_bool)(mask, counted)
        target = delayed(without_masked)(target, mask, options.ignore_index)
    found = [delayed(_target_logits)(part, target, first, dtype) for part, first in parts]
    found = tree(found, delayed(partial(reduce, np.fmax)))
    shards = [delayed(_shard_of_classes)(part, target, found, first, dtype, options) for part, first in parts]
    return delayed(_of_shards)(tree(shards, delayed(_merged_shards)), groups, mask, options, counted)


def _as_bool(mask: Array, counted: Counted) -> Mask:
    with counted():
        return as_bool(mask)


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
    shards: VocabularyShards,
    groups: Array | None,
    mask: Mask | None,
    options: Options,
    counted: Counted,
) -> EvaluationState:
    state = EvaluationState(options.loss, options.per_class)
    with counted():
        rows = shards.rows()
        state.add(rows if mask is None else rows._replace(kept=mask.ravel()), groups)
    return state


@contextmanager
def _counted_from(origin: tuple[int, ...], is_shifted: bool) -> Iterator[None]:
    """Let errors count rows over the whole array, as `stream.rows_of_block` does."""
    try:
        yield
    except EvaluationError as error:
        *outer, last = origin
        error.shift((*outer, last + (is_shifted and error.argument != "logits")))
        raise


def merged_states(states: Sequence[EvaluationState]) -> EvaluationState:
    """Merge into a new state."""
    merged = states[0].empty()
    for state in states:
        merged.merge(state)
    return merged


def tree(parts: list[T], merged: Callable[[list[T]], T]) -> T:
    """Return what merging some at a time, and what that gives, comes to; in their order."""
    while len(parts) > 1:
        parts = [merged(parts[first : first + FAN_IN]) for first in range(0, len(parts), FAN_IN)]
    return parts[0]
