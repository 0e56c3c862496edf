"""What peers.py measures: a table of works, the inputs of each, and the passes over memory that limit it."""

from dataclasses import dataclass, replace

import numpy as np
from benchmarks import common, limits

CROSS_ENTROPY, BINARY, ACTIVATIONS = "cross-entropy", "binary cross-entropy", ("softmax", "log_softmax")
FLOAT_LABELS = "float labels"
# How many times faster than these a value, and a value with its gradient, should be.
FACTORS = {"torch.compile": (2, 5), "torch": (8, 10)}
QUICK_SIZE = 100


@dataclass(frozen=True)
class Work:
    """One line of the table. `floor` is the share of the limit's speed to reach."""

    loss: str
    shape: tuple[int, ...]
    floor: float
    gradient: bool = False
    dtype: str = "float32"
    target: str = "labels"
    label_smoothing: float = 0.0
    weighted: bool = False
    pos_weight: float = 0.0
    chart: bool = False
    tolerance: float | None = None  # of what peers agree on, where their rounding is worse than usual

    @property
    def name(self):
        shape = "x".join(map(str, self.shape)) + (", axis 1" if len(self.shape) > 2 else "")
        return ", ".join(
            (self.loss + (" and gradient" if self.gradient else "") + " " + shape,)
            + ((self.dtype,) if self.dtype != "float32" else ())
            + ((self.target,) if self.target not in ("labels", FLOAT_LABELS) else ())
            + (("smoothing, class weights",) if self.weighted else ())
            + (("pos_weight",) if self.pos_weight else ())
        )

    @property
    def factors(self):
        """What is asked for beside each peer; nothing of the activations."""
        return {} if self.loss in ACTIVATIONS else {p: need[self.gradient] for p, need in FACTORS.items()}

    def quick(self):
        """Return the same work on a small shape."""
        return replace(self, shape=tuple(min(size, QUICK_SIZE) for size in self.shape))


LONG, MIDDLING, SHORT, IMAGE = (1024, 131072), (131072, 1000), (4_000_000, 10), (16, 21, 512, 512)
FEW, ELEMENTS, HALF = (4, 8_000_000), (2**26,), (512, 131072)
BFLOAT16 = {"dtype": "bfloat16"}
WORKS = (
    Work(CROSS_ENTROPY, LONG, 0.75, chart=True),
    Work(CROSS_ENTROPY, LONG, 0.60, gradient=True, chart=True),
    Work(CROSS_ENTROPY, MIDDLING, 0.75),
    Work(CROSS_ENTROPY, MIDDLING, 0.60, gradient=True, chart=True),
    Work(CROSS_ENTROPY, SHORT, 0.40),
    Work(CROSS_ENTROPY, SHORT, 0.35, gradient=True),
    Work(CROSS_ENTROPY, IMAGE, 0.70),
    Work(CROSS_ENTROPY, IMAGE, 0.55, gradient=True),
    # float32 sums: over 8,000,000 classes PyTorch is off by 1.1e-4, logitloss by 3e-9 (against float64).
    Work(CROSS_ENTROPY, FEW, 0.70, tolerance=3e-4),
    Work(CROSS_ENTROPY, LONG, 0.50, **BFLOAT16),
    Work(CROSS_ENTROPY, LONG, 0.50, dtype="float16"),
    Work(CROSS_ENTROPY, LONG, 0.40, gradient=True, **BFLOAT16),
    Work(CROSS_ENTROPY, HALF, 0.65, dtype="float64"),
    Work(CROSS_ENTROPY, LONG, 0.65, label_smoothing=0.1, weighted=True),
    Work(CROSS_ENTROPY, HALF, 0.65, target="probabilities"),
    Work("softmax", LONG, 0.60),
    Work("log_softmax", LONG, 0.60),
    Work(BINARY, ELEMENTS, 0.70, target=FLOAT_LABELS, chart=True),
    Work(BINARY, ELEMENTS, 0.60, gradient=True, target=FLOAT_LABELS),
    Work(BINARY, ELEMENTS, 0.60, target="uint8"),
    Work(BINARY, ELEMENTS, 0.60, target="bool"),
    Work(BINARY, ELEMENTS, 0.60, target=FLOAT_LABELS, pos_weight=2.5),
    Work(BINARY, ELEMENTS, 0.60, gradient=True, target="uint8"),
)


@dataclass(frozen=True)
class Task:
    """A work with its arrays; `out` is None where nothing but a number is computed."""

    work: Work
    logits: np.ndarray
    target: np.ndarray | None
    weight: np.ndarray | None
    out: np.ndarray | None
    threads: int


def prepare(work, threads):
    """Return the work's task; all arrays are written to, so that their pages are there."""
    shape = "x".join(map(str, work.shape))
    logits = common.logits(work.dtype, shape)
    rng = np.random.default_rng(1)
    rows = work.shape[:1] + work.shape[2:]
    if work.loss in ACTIVATIONS:
        target = None
    elif work.loss == BINARY:
        target = common.binary_labels(work.dtype if work.target == FLOAT_LABELS else work.target, shape)
    elif work.target == "probabilities":
        target = np.abs(logits)
        target /= target.sum(axis=1, keepdims=True)
    else:
        target = rng.integers(0, work.shape[1], rows)
    weight = rng.random(work.shape[1], np.float32) + 0.5 if work.weighted else None
    out = np.full_like(logits, 1) if work.gradient or target is None else None
    for array in (logits, target):
        if array is not None:
            # PyTorch warns of arrays it may not write.
            array.flags.writeable = True
    for cached in (common.logits, common.binary_labels):
        cached.cache_clear()
    return Task(work, logits, target, weight, out, threads)


def limits_of(task, threads):
    """Return passes over the memory that the work needs, by manner; class labels are too few to count."""
    target = task.target if task.target is not None and task.target.shape == task.logits.shape else None
    arrays = (task.logits,) if target is None else (task.logits, target)
    if task.out is None:
        manners = {**limits.IN_ORDER, **limits.STREAMS}
        return dict(zip(manners, limits.reads(*arrays, threads=threads, manners=manners), strict=True))
    passes = limits.copies if target is None else limits.triads
    return dict(zip(limits.IN_ORDER, passes(task.out, *arrays, threads=threads), strict=True))
