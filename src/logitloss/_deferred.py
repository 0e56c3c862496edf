"""Bad labels that nobody has waited for: what check="deferred" leaves on the device until it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from logitloss._check import Shape

# So many flags wait at most: the next call waits for them all.
MOST = 1024

# The flag, its stream, and what makes an error of it and of an array of that shape.
_flags: list[tuple[Any, int, Callable[[Any, int], Exception], Shape]] = []


class _Gone:
    """A target that nobody keeps: it has a shape, and no values to name."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __getitem__(self, index: object) -> str:
        return "not allowed"


def defer(flag: Any, stream: int, error: Callable[[Any, int], Exception], shape: Shape) -> None:
    """Keep the flag of a call, which holds the number of its first bad row or -1."""
    if len(_flags) >= MOST:
        raise_deferred()
    _flags.append((flag, stream, error, shape))


def raise_deferred() -> None:
    """Raise the error of the first call with ``check="deferred"`` that was given a bad label, if any.

    Such calls on arrays of a CUDA device do not wait to see whether labels are good: they leave the number
    of the first bad row on the device, and their results are unspecified if there is one. This function waits
    for the calls made so far and forgets them. After 1024 calls the next one does so too.

    Raises
    ------
    IndexError, ValueError
        As the call itself would have raised, except that the label is not named.

    Examples
    --------
    >>> import logitloss
    >>> logitloss.raise_deferred()
    """
    numbers = [int(flag.item(stream)) for flag, stream, _, _ in _flags]
    flags, _flags[:] = _flags[: len(numbers)], _flags[len(numbers) :]
    for bad, (_, _, error, shape) in zip(numbers, flags, strict=True):
        if bad >= 0:
            raise error(_Gone(shape), bad)
