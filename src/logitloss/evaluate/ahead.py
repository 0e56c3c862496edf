"""Reading on another thread, the next thing while this one is worked on.

Threads are kept: the kernels' own spin for some milliseconds after their work, and a new thread may wait as
long for a core, where one that has slept gets it at once.
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from itertools import islice, takewhile
from typing import Any, TypeVar

T = TypeVar("T")

MOST_THREADS = 1024  # so many that no reading waits for one that waits for it
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


def each_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Ask for items ahead of their use; a generator is closed at the end."""
    end: Any = object()
    following = partial(next, iter(items), end)
    is_over = False

    def read() -> T:
        nonlocal is_over
        item: T = following()
        is_over = item is end
        return item

    def reads() -> Iterator[Callable[[], T]]:
        while not is_over:
            yield read

    try:
        with closing(ahead(reads())) as coming:
            yield from takewhile(lambda item: item is not end, coming)
    finally:
        if isinstance(items, Generator):
            items.close()


def _start() -> None:
    """Have threads, none of which runs yet: a forked child has none of its parent's."""
    global _threads
    _threads = ThreadPoolExecutor(MOST_THREADS, "logitloss-ahead")


_start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start)
