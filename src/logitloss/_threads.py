"""How many threads a piece of work gets.

An explicit `num_threads` wins; else work under the break-even gets one thread and the rest what
`set_num_threads` said, at first one thread per processor this process may use. A forked child has one thread,
whatever is asked for: the OpenMP run-time of GCC hangs in a child whose parent had threads of it.
"""

from __future__ import annotations

import os
import sys

from logitloss import _check

# Logits below which starting a team of threads costs more than it saves. With two it costs 3 to 5 us, twice
# that when they have gone to sleep: half of what so many logits take at 0.6 ns each. To measure:
# `cross_entropy` of 10 and 128 classes with num_threads 1 and 2, in a row and with pauses of a millisecond.
BREAK_EVEN = 32_768
# More than any machine has; a slip of some zeros would end the process, as OpenMP cannot report a failure.
MOST = 1024

_count: int | None = None
_is_forked = False


def set_num_threads(n: int) -> None:
    """Set how many threads a call uses when it is not given `num_threads`.

    Parameters
    ----------
    n : int
        From 1 to 1024. Small calls use one thread whatever it is. Results do not depend on it.

    Raises
    ------
    TypeError, ValueError
        If `n` is no integer; if it is out of that range.

    Examples
    --------
    >>> import logitloss
    >>> before = logitloss.get_num_threads()
    >>> logitloss.set_num_threads(1)
    >>> logitloss.get_num_threads()
    1
    >>> logitloss.set_num_threads(before)
    """
    global _count
    _count = _check.integer("n", n, least=1, most=MOST)


def get_num_threads() -> int:
    """Return how many threads a large call uses when it is not given `num_threads`.

    Until `set_num_threads` is called: the first number in OMP_NUM_THREADS, else the processors this process
    may use; 1 in a forked child.

    Returns
    -------
    int
        At least 1.

    Examples
    --------
    >>> import logitloss
    >>> logitloss.get_num_threads() >= 1
    True
    """
    global _count
    if _count is None:
        _count = _default()
    return _count


def threads_for(work: int, num_threads: int | None) -> int:
    """Return the number of threads for `work` logits."""
    if num_threads is not None:
        num_threads = _check.integer("num_threads", num_threads, least=1, most=MOST)
    if _is_forked:
        return 1
    if num_threads is not None:
        return num_threads
    return 1 if work < BREAK_EVEN else get_num_threads()


def _default() -> int:
    wished = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wished.isdecimal() and int(wished) > 0:
        return min(int(wished), MOST)
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _one_thread() -> None:
    global _count, _is_forked
    _count = 1
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
