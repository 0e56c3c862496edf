"""The losses inside functions that Numba compiles: found by its `numba_extensions` entry point.

Each overload describes its arrays as the Numba backend does, in compiled code, and runs that backend's
kernels block after block on the thread that called it: so a user's own `prange` is the only team. Parameters
are those of the public function; axis and reduction must be known when the function is compiled.
"""

from logitloss._njit import activations, binary, cross_entropy, kernels


def register() -> None:
    """Make the kernels known to compiled code; to import this makes the functions known to Numba."""
    kernels.register()


register()

__all__ = ["activations", "binary", "cross_entropy", "register"]
