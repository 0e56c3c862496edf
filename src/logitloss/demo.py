"""Softmax regression on handwritten digits: a training loop with this package, and files to try `eval` on.

The whole model is one matrix. Every step asks `cross_entropy_value_and_grad` for the gradient at the logits,
written over the logits themselves; the chain rule to the weights is one matrix product. The evaluation of the
held-out logits is left to `evaluate`, as for any other model.
"""

from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from logitloss.categorical import cross_entropy_value_and_grad
from logitloss.evaluate.atomic import replacing
from logitloss.evaluate.errors import OutputError

STEPS = 400
REPORTED_STEPS = (1, 10, 100, STEPS)
LEARNING_RATE = 0.5
MOMENTUM = 0.9
HELD_OUT = 4  # every fourth image


def load_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the images (1797, 64), pixels 0 to 16, and their labels (1797,); see data/digits.txt."""
    with (
        resources.files("logitloss").joinpath("data", "digits.npz").open("rb") as file,
        np.load(file) as arrays,
    ):
        return arrays["images"], arrays["labels"]


def train(
    inputs: npt.NDArray[np.float32],
    labels: npt.NDArray[np.integer[Any]],
    n_classes: int,
    *,
    backend: str | None = None,
    say: Callable[[str], None] = print,
) -> npt.NDArray[np.float32]:
    """Fit softmax regression by gradient descent with momentum, and return its weights (inputs, classes)."""
    weights = np.zeros((inputs.shape[1], n_classes), np.float32)
    velocity = np.zeros_like(weights)
    logits = np.empty((len(inputs), n_classes), np.float32)
    for step in range(1, STEPS + 1):
        np.matmul(inputs, weights, out=logits)
        loss, grad = cross_entropy_value_and_grad(logits, labels, out=logits, backend=backend)
        velocity = MOMENTUM * velocity - LEARNING_RATE * (inputs.T @ grad)
        weights += velocity
        if step in REPORTED_STEPS:
            say(f"step {step:4d}: training loss {loss:.4f} nats")
    return weights


def run(folder: Path, *, backend: str | None = None, say: Callable[[str], None] = print) -> tuple[Path, Path]:
    """Train, and write what the model says of the images it has not seen.

    Parameters
    ----------
    folder : Path
        Where the files go; made if missing.
    backend : str, optional
        As in `logitloss.cross_entropy`.
    say : callable
        Takes the lines of progress.

    Returns
    -------
    tuple of Path
        The held-out logits (float32) and labels (uint8), two `.npy` files. Beside them are the model's inputs
        and its weights, (classes, inputs), of which `eval --hidden` makes the same logits.

    Raises
    ------
    OutputError
        A file cannot be written, or one of its name is there and holds something else.
    """
    images, labels = load_digits()
    inputs = np.column_stack([images / np.float32(16), np.ones(len(images), np.float32)])
    held_out = np.arange(len(images)) % HELD_OUT == 0
    say(
        f"{len(images)} handwritten digits: {np.count_nonzero(~held_out)} to train on, "
        f"{np.count_nonzero(held_out)} held out"
    )
    weights = train(inputs[~held_out], labels[~held_out], n_classes=10, backend=backend, say=say)
    folder.mkdir(parents=True, exist_ok=True)
    logits_path, labels_path = folder / "logits.npy", folder / "labels.npy"
    arrays = {
        logits_path: inputs[held_out] @ weights,
        labels_path: labels[held_out],
        folder / "hidden.npy": inputs[held_out],
        folder / "unembedding.npy": weights.T,
    }
    for path, array in arrays.items():
        if path.is_file() and not _is_like(path, array):
            raise OutputError(str(path), "is there and holds something else; choose another directory")
    for path, array in arrays.items():
        with replacing(path, "wb") as file:
            np.save(file, array)
    return logits_path, labels_path


def _is_like(path: Path, array: npt.NDArray[Any]) -> bool:
    """Whether a file holds an array of the same shape and type, as one of a demo before does."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        return False
    return isinstance(found, np.ndarray) and (found.shape, found.dtype) == (array.shape, array.dtype)
