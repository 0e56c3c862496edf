"""Losses computed straight from logits, at the speed of memory, on NumPy arrays and arrays on a GPU.

Importing this imports nothing but NumPy: the kernels are loaded by the first call.
"""

from typing import TYPE_CHECKING

from logitloss._backends import backends
from logitloss._deferred import raise_deferred
from logitloss._threads import get_num_threads, set_num_threads
from logitloss.activations import log_sigmoid, log_softmax, logsumexp, sigmoid, softmax
from logitloss.binary import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    binary_cross_entropy_with_logits_grad,
    binary_cross_entropy_with_logits_value_and_grad,
    logistic_loss,
    logistic_loss_grad,
    logistic_loss_value_and_grad,
)
from logitloss.categorical import (
    cross_entropy,
    cross_entropy_and_lse,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
    entropy,
    kl_div,
    nll_loss,
)
from logitloss.layer import LinearLogits
from logitloss.linear import linear_cross_entropy, linear_cross_entropy_value_and_grad

__all__ = [
    "LinearLogits",
    "backends",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy_with_logits_grad",
    "binary_cross_entropy_with_logits_value_and_grad",
    "cross_entropy",
    "cross_entropy_and_lse",
    "cross_entropy_grad",
    "cross_entropy_value_and_grad",
    "entropy",
    "get_num_threads",
    "kl_div",
    "linear_cross_entropy",
    "linear_cross_entropy_value_and_grad",
    "log_sigmoid",
    "log_softmax",
    "logistic_loss",
    "logistic_loss_grad",
    "logistic_loss_value_and_grad",
    "logsumexp",
    "nll_loss",
    "raise_deferred",
    "set_num_threads",
    "show_versions",
    "sigmoid",
    "softmax",
]


def show_versions() -> None:
    """Print the versions of the libraries, how the kernels were built, and the state of each backend.

    Examples
    --------
    >>> import logitloss
    >>> logitloss.show_versions()  # doctest: +ELLIPSIS
    python: ...
    """
    # Here and not above: reading the versions of installed packages takes as long to import as all the rest.
    from logitloss import _versions

    _versions.show()


if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name == "__version__":
            from importlib.metadata import version

            return version("logitloss")
        raise AttributeError(f"module 'logitloss' has no attribute {name!r}")
