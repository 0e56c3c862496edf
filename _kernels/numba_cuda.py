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

from typing import Any

import numpy as np
from logitloss._kernels.cuda_arrays import DeviceArray


def cuda_launch() -> Any:
    """Return the module that launches kernels, and that needs Numba."""
    from logitloss._kernels import cuda_launch

    return cuda_launch


def cuda_host() -> Any:
    """Return the module that sends NumPy arrays through the device."""
    from logitloss._kernels import cuda_host

    return cuda_host


name = "cuda"


def _on_device(array: Any) -> bool:
    return isinstance(array, DeviceArray)


def _number_and_array(scale: Any) -> tuple[Any, Any]:
    """Return a scale as a number and as an array, one of them None."""
    return (None, scale) if isinstance(scale, np.ndarray) else (scale, None)


def label_weight(
    target: Any, weight: Any, ignore_index: int, n_classes: int, num_threads: int, *, stream: int = 0
) -> tuple[Any, Any]:
    if _on_device(target):
        total, _, bad = cuda_launch().labels(None, target, ignore_index, n_classes, weight, None, stream)
        return total, bad
    there = cuda_launch().coefficients(weight, np.float64)

    def call(given: Any, stream: int) -> Any:
        return cuda_launch().labels(None, given["target"], ignore_index, n_classes, there, None, stream)

    total, _, bad = cuda_host().run(target.shape, {"target": target}, {}, call)
    return total, bad


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
    figures: Any,
    grad: Any,
    num_threads: int,
    *,
    stream: int = 0,
) -> tuple[Any, Any, Any]:
    options = {
        "second": "grad" if grad is not None else "figures" if figures is not None else "none",
        "gamma": gamma,
        "ignore_index": ignore_index,
        "z_loss": z_loss,
    }
    outputs = {"loss": loss, "lse": lse, "out": figures if grad is None else grad}
    inputs = {"logits": logits, "target": target}
    return _rows(inputs, outputs, options, {"beta": beta}, scale, lse_in, stream)


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
    options = {
        "second": "none" if grad is None else "grad",
        "gamma": weight,
        "target_scale": target_scale,
        "target_offset": target_offset,
        "z_loss": z_loss,
    }
    outputs = {"loss": loss, "lse": lse, "out": grad}
    return _rows({"logits": logits, "target": target}, outputs, options, {}, scale, lse_in, stream)[0]


def logsumexp(logits: Any, lse: Any, num_threads: int, *, stream: int = 0) -> None:
    _rows({"logits": logits}, {"lse": lse}, {}, {}, 1.0, None, stream)


def softmax(logits: Any, out: Any, log: bool, num_threads: int, *, stream: int = 0) -> None:
    options = {"second": "log_softmax" if log else "softmax"}
    _rows({"logits": logits}, {"out": out}, options, {}, 1.0, None, stream)


def entropy(logits: Any, out: Any, num_threads: int, *, stream: int = 0) -> None:
    _rows({"logits": logits}, {"out": out}, {"second": "entropy"}, {}, 1.0, None, stream)


def _rows(
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    options: dict[str, Any],
    by_class: dict[str, Any],
    scale: Any,
    lse_in: Any,
    stream: int,
) -> tuple[Any, Any, Any]:
    """Run the kernels over rows, of device arrays where they lie, of NumPy arrays in chunks."""
    run = cuda_launch().rows
    logits = inputs["logits"]
    if _on_device(logits):
        return run(**inputs, **outputs, **options, **by_class, scale=scale, lse_in=lse_in, stream=stream)
    number, array = _number_and_array(scale)
    there = {key: cuda_launch().coefficients(given, np.float64) for key, given in by_class.items()}
    if options.get("gamma") is not None:
        gamma = options["gamma"]
        there["gamma"] = cuda_launch().coefficients(gamma, cuda_launch().real_of(logits.dtype))
    if any(outputs.get(key) is not None for key in ("loss", "lse")):
        lse_in = None

    def call(given: dict[str, DeviceArray], stream: int) -> Any:
        chunk_scale = given.pop("scale", number)
        return run(**given, **{**options, **there}, scale=chunk_scale, stream=stream)

    return cuda_host().run(logits.shape[:-1], {**inputs, "scale": array, "lse_in": lse_in}, outputs, call)


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
    n_classes = log_probabilities.shape[-1]
    run = cuda_launch().labels
    if _on_device(log_probabilities):
        return run(log_probabilities, target, ignore_index, n_classes, weight, loss, stream)
    there = cuda_launch().coefficients(weight, np.float64)

    def call(given: dict[str, DeviceArray], stream: int) -> Any:
        return run(given["x"], given["target"], ignore_index, n_classes, there, given.get("loss"), stream)

    inputs = {"x": log_probabilities, "target": target}
    return cuda_host().run(target.shape, inputs, {"loss": loss}, call)


def _elements(
    operation: str,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    settings: tuple[float, float, float],
    scale: Any,
    stream: int,
) -> tuple[Any, Any, Any]:
    """Run the kernel over elements, of device arrays where they lie, of NumPy arrays in chunks."""
    run = cuda_launch().elements
    x = inputs["x"]
    if _on_device(x):
        return run(operation, **inputs, **outputs, settings=settings, scale=scale, stream=stream)
    number, array = _number_and_array(scale)

    def call(given: dict[str, DeviceArray], stream: int) -> Any:
        chunk_scale = given.pop("scale", number)
        return run(operation, **given, settings=settings, scale=chunk_scale, stream=stream)

    return cuda_host().run(x.shape, {**inputs, "scale": array}, outputs, call)


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
    settings = (1.0 - label_smoothing, 0.5 * label_smoothing, float(signed))
    inputs = {"x": logits, "target": target, "weight": weight, "pos_weight": pos_weight}
    outputs = {"loss": loss, "out": grad}
    total, _, bad = _elements("bce_with_logits", inputs, outputs, settings, scale, stream)
    return total, bad


def binary_cross_entropy(
    probabilities: Any, target: Any, weight: Any, loss: Any, num_threads: int, *, stream: int = 0
) -> tuple[Any, Any]:
    inputs = {"x": probabilities, "target": target, "weight": weight}
    total, _, bad = _elements("bce", inputs, {"loss": loss}, (0.0, 0.0, 0.0), 1.0, stream)
    return total, bad


def kl_div(
    log_probabilities: Any, target: Any, log_target: bool, loss: Any, num_threads: int, *, stream: int = 0
) -> Any:
    inputs = {"x": log_probabilities, "target": target}
    return _elements("kl_div", inputs, {"loss": loss}, (float(log_target), 0.0, 0.0), 1.0, stream)[0]


def sigmoid(logits: Any, out: Any, log: bool, num_threads: int, *, stream: int = 0) -> None:
    operation = "log_sigmoid" if log else "sigmoid"
    _elements(operation, {"x": logits}, {"out": out}, (0.0, 0.0, 0.0), 1.0, stream)


def divide(numerator: Any, divisor: Any, *, stream: int = 0) -> DeviceArray:
    """Divide numbers or DeviceArrays of one item on the device, as IEEE does: a float64 of no axes.

    So a mean, or the scale that its gradient needs, never waits: `scale` may be such an array, broadcast to
    the rows.
    """
    return cuda_launch().divide(numerator, divisor, stream)
