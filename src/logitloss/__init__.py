"""Losses computed straight from logits, at the speed of memory, on NumPy arrays."""

from logitloss._backends import backends
from logitloss._threads import get_num_threads, set_num_threads
from logitloss.categorical import (
    cross_entropy,
    cross_entropy_and_lse,
    cross_entropy_grad,
    cross_entropy_value_and_grad,
)

__all__ = [
    "backends",
    "cross_entropy",
    "cross_entropy_and_lse",
    "cross_entropy_grad",
    "cross_entropy_value_and_grad",
    "get_num_threads",
    "set_num_threads",
]
