"""An evaluation's progress in a file, from which it goes on after it was stopped or killed.

The file says what is evaluated (shapes, dtypes, fingerprints, options), how many rows are done, and the state
then. It is written beside, brought to the disk and put in place in one step, so that at any moment the file
is whole. Going on takes the same blocks in the same order, hence the same figures to the last bit.
"""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import EvaluationError, FileError, StateError
from logitloss.evaluate.state import EvaluationState
from logitloss.linear import LinearLogits

VERSION = 1
# Elements of an array that its fingerprint is taken of, as far apart as can be
SAMPLE = 2048


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
    before : callable, optional
        Called before each, to bring to the disk what belongs to the rows done.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inputs: dict[str, Any],
        every: float,
        before: Callable[[], object] | None = None,
    ) -> None:
        self.path, self.inputs, self.every, self.before = Path(path), inputs, every, before
        self.written = monotonic()
        self.is_stopped = False
        self.latest: tuple[EvaluationState, int] | None = None

    def load(self) -> tuple[EvaluationState, int] | None:
        """Return the state in the file and the rows it has seen; None if there is no file yet.

        Raises
        ------
        FileError
            It cannot be read, or holds no state.
        StateError
            It is of other inputs.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(str(self.path), getattr(error, "strerror", None) or "holds no state") from None
        try:
            document = json.loads(text)
            if document["version"] != VERSION:
                raise StateError(str(self.path), f"of version {document['version']}, expected {VERSION}")
            state, done, inputs = (
                EvaluationState.from_dict(document["state"]),
                document["done"],
                document["inputs"],
            )
            if type(done) is not int or done != state.count + state.ignored:
                raise ValueError(f"{done} rows done, {state.count + state.ignored} counted")
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, StateError):
                raise
            raise FileError(str(self.path), f"holds no state of an evaluation ({error})") from None
        self.check(inputs)
        return state, done

    def check(self, inputs: dict[str, Any]) -> None:
        """Refuse a state of other inputs, and say in what they differ."""
        for name in {**self.inputs, **inputs}:
            then, now = inputs.get(name), self.inputs.get(name)
            if then != now:
                what = f"is the state of an evaluation with {name} {then}, this one has {now}"
                raise StateError(str(self.path), f"{what}; another --state, or none, starts anew")

    def save(self, state: EvaluationState, done: int) -> None:
        """Write the file."""
        if self.before is not None:
            self.before()
        document = {"version": VERSION, "inputs": self.inputs, "done": done, "state": state.to_dict()}
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with open(beside, "w", encoding="utf-8") as file:
                json.dump(document, file, indent=1, allow_nan=False)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            raise FileError(str(self.path), error.strerror or str(error)) from None
        with suppress(OSError):  # not every file system has folders that can be synchronised
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self.written = monotonic()

    def after_block(self, state: EvaluationState, done: int, n_rows: int) -> None:
        """Write the file if it is time, if all is done, or if the evaluation was told to stop.

        Raises
        ------
        Interrupted
            It was told to stop.
        """
        self.latest = state, done
        if self.is_stopped or done == n_rows or monotonic() - self.written >= self.every:
            self.save(state, done)
        if self.is_stopped and done < n_rows:
            raise Interrupted(str(self.path), done, n_rows)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let Ctrl-C and SIGTERM wait for a block to end, but not twice; a bad block loses none before it."""
        kept = {}
        if threading.current_thread() is threading.main_thread():  # which alone hears signals
            kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
            if self.latest:
                self.save(*self.latest)
            raise
        finally:
            restore()


def described(array: npt.NDArray[Any] | LinearLogits) -> dict[str, Any]:
    """Return what tells an array from others: shape, dtype, and a fingerprint of elements far apart."""
    if isinstance(array, LinearLogits):
        return {
            "hidden": described(array.hidden),
            "weight": described(array.weight),
            "bias": None if array.bias is None else described(array.bias),
            "softcap": array.softcap,
            "scale": array.scale,
        }
    places = np.unique(np.linspace(0, max(0, array.size - 1), min(array.size, SAMPLE)).astype(np.int64))
    sample = array[np.unravel_index(places, array.shape)] if array.size else array
    digest = hashlib.blake2b(np.ascontiguousarray(sample).tobytes(), digest_size=16).hexdigest()
    return {"shape": list(array.shape), "dtype": array.dtype.str, "fingerprint": digest}
