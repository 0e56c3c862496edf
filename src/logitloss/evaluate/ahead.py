"""Reading on another thread, the next thing while this one is worked on.

Threads are kept: the kernels' own spin for some milliseconds after their work, and a new thread may wait as
long for a core, where one that has slept gets it at once.
"""

import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

MOST_THREADS = 1024  # so many that no evaluation's reading waits for another's
_threads: ThreadPoolExecutor


def ahead(reads: Iterable[Callable[[], T]]) -> Generator[T, None, None]:
    """Read one thing after the other, ahead of its use by no more than one."""
    following = iter(reads)
    held = [read() for read in islice(following, 1)]  # there is nothing to work on meanwhile
    while held:
        coming = [_threads.submit(read) for read in islice(following, 1)]
        try:
            yield held.pop()  # which nothing here refers to any more: it may be large
            held = [one.result() for one in coming]
        finally:
            wait(coming)


def _start() -> None:
    """Have threads, none of which runs yet: a forked child has none of its parent's."""
    global _threads
    _threads = ThreadPoolExecutor(MOST_THREADS, "logitloss-ahead")


_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)
