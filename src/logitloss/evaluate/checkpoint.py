"""An evaluation's progress in a file, from which it goes on after it was stopped or killed.

The file says what is evaluated (options; of each shard begun shapes, dtypes and fingerprints of the rows
done), the state of the shards that are through, and that of the one that is not. It is whole at any moment
(`atomic`). Going on takes the same blocks in the same order, hence the same figures to the last bit.
"""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from logitloss.evaluate.atomic import replacing
from logitloss.evaluate.errors import EvaluationError, FileError, ShapeError, StateError
from logitloss.evaluate.moments import whole_number
from logitloss.evaluate.state import EvaluationState

VERSION = 2


class Skipped(NamedTuple):
    """A shard of which no row counts, since one of its files cannot be evaluated."""

    file: str
    reason: str


@dataclass(slots=True)
class Standing:
    """How far an evaluation is.

    Parameters
    ----------
    through : EvaluationState
        That of the shards that are through; of one that is not, there is `part` beside.
    shards : list
        Of each shard begun, in order, what `Shard.described` says of its rows done; or why it is skipped.
    n_through : int
        How many of them are through.
    """

    through: EvaluationState
    shards: list[dict[str, Any] | Skipped] = field(default_factory=list)
    n_through: int = 0
    part: EvaluationState = field(init=False)

    def __post_init__(self) -> None:
        """Start with nothing seen of the next shard."""
        self.part = self.through.empty()

    @property
    def done(self) -> int:
        """Rows that are in the states."""
        return self.through.n_rows + self.part.n_rows

    @property
    def skipped(self) -> list[Skipped]:
        """The shards that are left out."""
        return [one for one in self.shards if isinstance(one, Skipped)]

    def is_skipped(self, number: int) -> bool:
        """Whether the shard of a number is left out."""
        return number < len(self.shards) and isinstance(self.shards[number], Skipped)

    def finish_shard(self, shifted: int) -> None:
        """Count the shard begun last, as it is through, and its positions that no row is of."""
        self.n_through += 1
        self.part.shifted += shifted
        self.through.merge(self.part)
        self.part = self.through.empty()

    def skip_shard(self, number: int, skipped: Skipped) -> None:
        """Leave out the shard of a number, the last begun or the next."""
        self.shards[number:] = [skipped]
        self.n_through += 1
        self.part = self.through.empty()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON holds."""
        shards = [one._asdict() if isinstance(one, Skipped) else one for one in self.shards]
        states = {"state": self.through.to_dict(), "part": self.part.to_dict()}
        return {"done": self.done, "n_through": self.n_through, "shards": shards, **states}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "Standing":
        """Return what `to_dict` wrote.

        Raises
        ------
        ValueError, KeyError, TypeError
            It is none.
        """
        shards = [Skipped(**one) if "reason" in one else dict(one) for one in saved["shards"]]
        standing = cls(EvaluationState.from_dict(saved["state"]), shards, whole_number(saved["n_through"]))
        standing.part = EvaluationState.from_dict(saved["part"])
        done = sum(whole_number(one["done"]) for one in shards if isinstance(one, dict))
        if not saved["done"] == done == standing.done:
            raise ValueError(f"{saved['done']} rows done, {done} in shards, {standing.done} counted")
        if not 0 <= len(shards) - standing.n_through <= 1:
            raise ValueError(f"{standing.n_through} shards through, {len(shards)} begun")
        return standing


def read_standing(path: str, document: Any) -> tuple[Standing, dict[str, Any]]:
    """Return how far an evaluation was whose file holds a document, and what its inputs are."""
    try:
        if document["version"] != VERSION:
            raise StateError(path, f"of version {document['version']}, expected {VERSION}")
        return Standing.from_dict(document), dict(document["inputs"])
    except StateError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise FileError(path, f"holds no state of an evaluation ({error})") from None


class Interrupted(KeyboardInterrupt):
    """The evaluation was told to stop, and its state is in the file.

    Parameters
    ----------
    path : str
        The file.
    done, n_rows : int
        Rows counted, and rows there are.
    """

    def __init__(self, path: str, done: int, n_rows: int) -> None:
        super().__init__(path, done, n_rows)
        self.path, self.done, self.n_rows = path, done, n_rows

    def __str__(self) -> str:
        """How far it came, and where that is kept."""
        return f"interrupted after {self.done} of {self.n_rows} rows, which are in {self.path}"


class Checkpoint:
    """A file that keeps a state while an evaluation runs.

    Parameters
    ----------
    path : str or path-like
        The file; it need not be there yet.
    inputs : dict
        What is evaluated, as JSON: a state of anything else is refused.
    every : float
        Seconds between two writes.
    """

    def __init__(self, path: str | os.PathLike[str], inputs: dict[str, Any], every: float) -> None:
        if not every >= 0:
            raise ShapeError("save_every", f"is {every}, expected seconds from 0 on")
        self.path, self.inputs, self.every = Path(path), inputs, every
        self.written = monotonic()
        self.is_stopped = False
        self.unsaved: Standing | None = None

    def load(self) -> Standing | None:
        """Return how far the evaluation was when the file was written; None if there is no file yet.

        Raises
        ------
        FileError
            It cannot be read, or holds no state.
        StateError
            It is of other inputs.
        """
        if self.path.exists() and not (self.path.is_file() or self.path.is_dir()):
            # to read it may never end
            raise FileError(str(self.path), "not a regular file")
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(str(self.path), getattr(error, "strerror", None) or "holds no state") from None
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileError(str(self.path), f"holds no state of an evaluation ({error})") from None
        standing, inputs = read_standing(str(self.path), document)
        if not self.inputs["per_row"]:  # records that were kept are of no use here, and end here
            inputs["per_row"] = False
        self.check(inputs, self.inputs)
        return standing

    def check(
        self, then: dict[str, Any], now: dict[str, Any], files: Mapping[str, str] | None = None
    ) -> None:
        """Refuse a state of other inputs, or of other content of `files`, and say in what they differ."""
        for name in {**now, **then}:
            if then.get(name) != now.get(name):
                file = files.get(name, files.get("logits")) if files else None
                of = f" of {file}" if file else ""
                what = f"is the state of an evaluation with {name}{of} {then.get(name)}, this one has "
                how = f"{now.get(name)}; another --state, or none, starts anew"
                raise StateError(str(self.path), what + how)

    def save(self, standing: Standing) -> None:
        """Write the file."""
        document = {"version": VERSION, "inputs": self.inputs, **standing.to_dict()}
        with replacing(self.path) as file:
            json.dump(document, file, indent=1, allow_nan=False)
        self.written, self.unsaved = monotonic(), None

    def after_block(self, standing: Standing, n_rows: int, before: Callable[[], object]) -> None:
        """Write the file if it is time, or if the evaluation was told to stop and is not at its end.

        `before` is called before that, to bring to the disk what belongs to the rows done.

        Raises
        ------
        Interrupted
            It was told to stop.
        """
        self.unsaved = standing
        stops = self.is_stopped and standing.n_through < self.inputs["shards"]
        if stops or monotonic() - self.written >= self.every:
            before()
            self.save(standing)
        if stops:
            raise Interrupted(str(self.path), standing.done, n_rows)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM wait for a block to end, but not twice; a bad block loses none before it."""
        kept = {}
        if threading.current_thread() is threading.main_thread():  # which alone hears signals
            kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            # one that is not Python's own cannot be put back
            kept = {number: handler for number, handler in kept.items() if handler is not None}

        def restore() -> None:
            for number, handler in kept.items():
                signal.signal(number, handler)

        def stop(number: int, frame: object) -> None:
            self.is_stopped = True
            restore()

        for number in kept:
            signal.signal(number, stop)
        try:
            yield
        except EvaluationError:
            self._save_rest()
            raise
        else:
            self._save_rest()
        finally:
            restore()

    def _save_rest(self) -> None:
        if self.unsaved is not None:
            self.save(self.unsaved)
