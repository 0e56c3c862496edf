"""Rows of logits that are hard for some step of an online log-sum-exp, by name.

Each kind makes one row; `zoo` stacks all kinds a dtype can hold, several labels each, into one batch, so
that one call of a function meets them side by side (short rows are taken sixteen at a time). The batches
are cached and read-only: the matrix runs the same ones on every backend.
"""

import functools

import ml_dtypes
import numpy as np

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
INTEGERS = tuple(np.dtype(name) for name in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))

# Around the 8, 16, 32 and 64 lanes of a vector loop, the block of 128, and vocabularies: bytes,
# ImageNet, GPT-2, Llama 3 rounded up, Gemma. 131072 and 262144 cross a thread's blocks.
CLASSES = (1, 2, 3, 7, 10, 15, 16, 17, 31, 33, 64, 100, 127, 128, 129, 257, 1000, 4097)
VOCABULARIES = (50257, 131072, 262144)
# Below, at and above a batch of 16 rows a time, and two batches.
ROWS = (0, 1, 2, 15, 16, 17, 33)


def rng_for(*key) -> np.random.Generator:
    """Return a generator seeded by the case's own name."""
    return np.random.default_rng(list(repr(key).encode()))


def inf_blocks(rng, n):
    """Every other block of 16 is -inf, the first one too; the last class is finite."""
    row = 3 * rng.standard_normal(n)
    row[np.arange(n) // 16 % 2 == 0] = -np.inf
    row[-1] = 1.0
    return row


def inf_head(rng, n):
    """The running maximum stays -inf for a while, but for one class in the end."""
    row = 3 * rng.standard_normal(n)
    row[: max(1, 2 * n // 3)] = -np.inf
    row[-1] = -2.5
    return row


def inf_tail(rng, n):
    row = 3 * rng.standard_normal(n)
    row[n // 3 + 1 :] = -np.inf
    return row


def one_finite(rng, n):
    row = np.full(n, -np.inf)
    row[rng.integers(n)] = 3.25
    return row


def jump(rng, n):
    """A jump of 150 nats in the middle: what was summed before it vanishes."""
    row = 3 * rng.standard_normal(n)
    row[: n // 2] -= 150
    return row


def spike(at):
    def row(rng, n):
        row = rng.standard_normal(n)
        row[int(at * (n - 1))] = 21.5
        return row

    return row


def background(rng, n):
    """One class over a background of equals: each addition rounds the same way, and the errors add up."""
    row = np.zeros(n)
    row[rng.integers(n)] = 1.7
    return row


KINDS = {
    "normal": lambda rng, n: 3 * rng.standard_normal(n),
    "equal": lambda rng, n: np.full(n, 0.75),
    "background": background,
    "rising": lambda rng, n: np.linspace(-60, 60, n),
    "falling": lambda rng, n: np.linspace(60, -60, n),
    "staircase": lambda rng, n: 25.0 * (np.arange(n) * 12 // n) + rng.standard_normal(n),
    "jump": jump,
    "spike_first": spike(0),
    "spike_middle": spike(0.5),
    "spike_last": spike(1),
    "wide": lambda rng, n: rng.uniform(-1000, 1000, n),
    "offset_1e4": lambda rng, n: 1e4 + 3 * rng.standard_normal(n),
    "offset_-1e4": lambda rng, n: -1e4 + 3 * rng.standard_normal(n),
    "offset_1e20": lambda rng, n: 1e20 * (1 + rng.standard_normal(n) / 8),
    "subnormal": lambda rng, n: rng.integers(-9, 9, n).astype(float),  # times the smallest number
    "inf_head": inf_head,
    "inf_tail": inf_tail,
    "inf_blocks": inf_blocks,
    "one_finite": one_finite,
}
# For long rows, where a case costs: the kinds that depend on the length.
LONG_KINDS = ("normal", "equal", "background", "rising", "staircase", "offset_1e4", "inf_head")


def make_row(kind: str, n_classes: int, dtype) -> np.ndarray:
    row = KINDS[kind](rng_for(kind, n_classes), n_classes)
    if kind == "subnormal":
        row = row * float(ml_dtypes.finfo(dtype).smallest_subnormal)
    return row.astype(dtype)


def frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@functools.cache
def zoo(n_classes: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Return `(logits, target)`: every kind, with the first, last, largest and some other class as label."""
    kinds = KINDS if n_classes <= 5000 else LONG_KINDS
    kinds = [kind for kind in kinds if not (kind == "offset_1e20" and dtype == np.float16)]
    logits, target = [], []
    for number, kind in enumerate(kinds):
        row = make_row(kind, n_classes, dtype)
        other = rng_for("label", kind, n_classes).integers(n_classes)
        labels = [0, n_classes - 1, int(np.argmax(row)), int(other)]
        if n_classes > 300:
            labels = [labels[number % 4]]
        for label in labels:
            logits.append(row)
            target.append(label)
    return frozen(np.stack(logits)), frozen(np.array(target))


@functools.cache
def batch(shape: tuple[int, ...], dtype: np.dtype, spread: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Return ordinary logits with the classes last, and labels of the rows' shape."""
    rng = rng_for("batch", shape)
    logits = (spread * rng.standard_normal(shape)).astype(dtype)
    return frozen(logits), frozen(rng.integers(0, shape[-1], shape[:-1]))


@functools.cache
def probabilities(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return class probabilities that sum to about one, some of them zero."""
    rng = rng_for("probabilities", shape)
    p = rng.dirichlet(np.full(shape[-1], 0.7), shape[:-1])
    p[p < 0.01 / shape[-1]] = 0
    return frozen(p.astype(dtype))


def unfilled(shape, dtype) -> np.ndarray:
    """Return an output array that shows any entry left unwritten."""
    return np.full(shape, np.nan, dtype)
