"""The CUDA backend: the contract's operations on arrays of the device, and on NumPy arrays by way of it.

A method takes either `DeviceArray`s, which are used where they lie, on the stream given, or NumPy arrays,
which `cuda_host` sends through the device in chunks. With device arrays nothing is waited for: what the
contract returns as numbers (total, counted, first_bad) are then DeviceArrays of no axes, float64 and int64,
valid once the stream has come that far; `item` waits for one. Coefficients by class may lie on either side.
`num_threads` is ignored.

Kernels are compiled at their first call, one for each combination of types that is met. Importing this
module needs neither numba nor a device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitloss._kernels.cuda_arrays import DeviceArray

name = "cuda"


def label_weight(
    target: Any, weight: Any, ignore_index: int, n_classes: int, num_threads: int, *, stream: int = 0
) -> tuple[Any, Any]:
    raise NotImplementedError


def cross_entropy(
    logits: Any,
    target: Any,
    ignore_index: int,
    beta: Any,
    gamma: Any,
    z_loss: float,
    scale: Any,
    lse_in: Any,
    loss: Any,
    lse: Any,
    hit: Any,
    grad: Any,
    num_threads: int,
    *,
    stream: int = 0,
) -> tuple[Any, Any, Any]:
    raise NotImplementedError


def soft_cross_entropy(
    logits: Any,
    target: Any,
    weight: Any,
    target_scale: float,
    target_offset: float,
    z_loss: float,
    scale: Any,
    lse_in: Any,
    loss: Any,
    lse: Any,
    grad: Any,
    num_threads: int,
    *,
    stream: int = 0,
) -> Any:
    raise NotImplementedError


def logsumexp(logits: Any, lse: Any, num_threads: int, *, stream: int = 0) -> None:
    raise NotImplementedError


def softmax(logits: Any, out: Any, log: bool, num_threads: int, *, stream: int = 0) -> None:
    raise NotImplementedError


def entropy(logits: Any, out: Any, num_threads: int, *, stream: int = 0) -> None:
    raise NotImplementedError


def nll(
    log_probabilities: Any,
    target: Any,
    ignore_index: int,
    weight: Any,
    loss: Any,
    num_threads: int,
    *,
    stream: int = 0,
) -> tuple[Any, Any, Any]:
    raise NotImplementedError


def binary_cross_entropy_with_logits(
    logits: Any,
    target: Any,
    weight: Any,
    pos_weight: Any,
    label_smoothing: float,
    signed: bool,
    scale: Any,
    loss: Any,
    grad: Any,
    num_threads: int,
    *,
    stream: int = 0,
) -> tuple[Any, Any]:
    raise NotImplementedError


def binary_cross_entropy(
    probabilities: Any, target: Any, weight: Any, loss: Any, num_threads: int, *, stream: int = 0
) -> tuple[Any, Any]:
    raise NotImplementedError


def kl_div(
    log_probabilities: Any, target: Any, log_target: bool, loss: Any, num_threads: int, *, stream: int = 0
) -> Any:
    raise NotImplementedError


def sigmoid(logits: Any, out: Any, log: bool, num_threads: int, *, stream: int = 0) -> None:
    raise NotImplementedError


def divide(numerator: Any, divisor: Any, *, stream: int = 0) -> DeviceArray:
    """Divide numbers or DeviceArrays of one item on the device, as IEEE does: a float64 of no axes.

    So a mean, or the scale that its gradient needs, never waits: `scale` may be such an array, broadcast to
    the rows.
    """
    raise NotImplementedError
