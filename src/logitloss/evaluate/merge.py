"""States in files, added up: the last step of an evaluation that was shared out by hand, or by Ray or Spark.

A file holds a state (`EvaluationState.to_dict` as JSON), lines of states, or what an evaluation with a state
file has left there at its end. States add up that are of one kind. What is wrong has its file's name, and of
lines the number.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from logitloss.evaluate.atomic import identity, refuse_to_overwrite, writing
from logitloss.evaluate.checkpoint import Skipped, read_standing
from logitloss.evaluate.errors import FileError, OutputError, StateError
from logitloss.evaluate.state import EvaluationState


def merge_files(paths: Sequence[str], output: str | None = None) -> tuple[EvaluationState, list[Skipped]]:
    """Return the sum of all states, and the shards that are in none since they could not be evaluated.

    Parameters
    ----------
    paths : sequence of str
        Files of states, at least one, each once.
    output : str, optional
        Where the sum's state goes, none of them.

    Raises
    ------
    FileError, StateError
        A file cannot be read or written, or holds no state; a state is of another kind than those before, or
        of an evaluation that is not through.
    """
    files = [identity(path) for path in paths]
    for number, path in enumerate(paths):
        if files[number] in files[:number]:
            raise FileError(path, "is given twice, and its rows would count twice")
    if output is not None:
        refuse_to_overwrite([output], paths)
    merged: EvaluationState | None = None
    skipped: list[Skipped] = []
    for path in paths:
        for where, document in _documents(path):
            state, left_out = _state(where, document)
            merged = state.empty() if merged is None else merged
            _check_kind(where, state, merged)
            merged.merge(state)
            skipped += left_out
    assert merged is not None
    if output is not None:
        try:
            with writing(output) as file:
                json.dump(merged.to_dict(), file, allow_nan=False)
        except OSError as error:
            raise OutputError(output, error.strerror or str(error)) from None
    return merged, skipped


def _documents(path: str) -> Iterator[tuple[str, Any]]:
    """Read what a file holds, line by line if its first line is a document of its own."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.readline()
            if not text.strip():
                raise FileError(path, "holds no state: it is empty, or begins so")
            try:
                first = json.loads(text)
            except (ValueError, RecursionError):  # it may go on
                yield path, _parsed(path, text + file.read())
                return
            yield path, first
            for number, line in enumerate(file, 2):
                if line.strip():
                    yield f"{path}, line {number}", _parsed(f"{path}, line {number}", line)
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(path, getattr(error, "strerror", None) or "holds no state: it is no text") from None


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(where, f"holds no state: no JSON ({error})") from None


def _state(where: str, document: Any) -> tuple[EvaluationState, list[Skipped]]:
    """Return a state, and the shards that its evaluation has skipped."""
    if isinstance(document, dict) and "inputs" in document:
        standing, inputs = read_standing(where, document)
        n_shards = inputs.get("shards", 0)
        if standing.n_through != n_shards:
            what = f"{standing.n_through} of {n_shards} shards and {standing.done} rows are done"
            raise StateError(where, f"is the state of an evaluation that is not through: {what}")
        return standing.through, standing.skipped
    try:
        return EvaluationState.from_dict(document), []
    except (ValueError, AttributeError, OverflowError) as error:
        raise FileError(where, f"holds no state of an evaluation ({error})") from None


def _check_kind(where: str, state: EvaluationState, merged: EvaluationState) -> None:
    """Refuse a state of other classes, figures or keys: the sum would mean nothing."""
    kind, before = _kind(state), _kind(merged)
    for name, what in kind.items():
        if what and before[name] and what != before[name]:
            raise StateError(where, f"is of {name} {what}, but what comes before is of {before[name]}")


def _kind(state: EvaluationState) -> dict[str, Any]:
    """Return what states that add up have in common; what a state does not know is nothing."""
    return {
        "loss": state.loss,
        "figures": "each class" if state.per_class else "the whole",
        "classes": state.classes.n_classes,
        "keys": next((type(key).__name__ for key in state.groups), ""),
    }
