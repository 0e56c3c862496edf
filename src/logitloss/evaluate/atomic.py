"""Files written: whole at any moment, as beside and put in place in one step; and never over what is read."""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from logitloss.evaluate.errors import FileError, OutputError


def refuse_to_overwrite(outputs: Iterable[str], taken: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse an output that is one of the files taken, to be read or written, by whatever name.

    Raises
    ------
    FileError
        It is.
    """
    in_use = {identity(path) for path in taken}
    for output in outputs:
        if identity(output) in in_use:
            raise FileError(output, "is another file of this command, and cannot be written")


def identity(path: str | os.PathLike[str]) -> object:
    """Return what tells a file from others; of one that is not there, its place."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a place where `replacing` could not write, before there is something to write.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise OutputError(str(path), "is a directory")
    beside = _beside(path)
    try:
        with open(beside, "w", encoding="utf-8"):
            pass
        beside.unlink()
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error)) from None


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def writing(path: str | os.PathLike[str]) -> AbstractContextManager[IO[str]]:
    """Open a file for text as `replacing` does; a device or a pipe as it is."""
    if os.path.isfile(path) or not os.path.exists(path):
        return replacing(path)
    return open(path, "w", encoding="utf-8")


@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of the one at `path` at the end, if there is no error; for text.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    path = Path(os.path.realpath(path))  # of a link what it stands for
    beside = _beside(path)
    try:
        with open(beside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(str(path), error.strerror or str(error)) from None
    finally:
        with suppress(OSError):  # gone, if all went well
            beside.unlink()
    with suppress(OSError):  # not every file system has folders that can be synchronised
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
