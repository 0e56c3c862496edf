"""Files that are whole at any moment: written beside, brought to the disk, and put in place in one step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from logitloss.evaluate.errors import OutputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """Open a file for text that takes the place of the one at `path` at the end, if there is no error.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
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
