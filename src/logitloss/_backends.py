"""The backends: what each must offer (`Kernels`), the table of them, and the choice among them.

A backend is loaded when it is first asked for, never at `import logitloss`. There is no silent fallback: a
missing backend is an ImportError that says how to get it. The meaning of each kernel stands in
`logitloss._kernels`.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Float64 = NDArray[np.float64]

DEFAULT = "cython"
# Best first, as `cython_cpu.available_isas()` gives those this processor and this build have.
ISAS = ("avx512", "avx2", "baseline")
NAMES = (DEFAULT, *(f"cython-{isa}" for isa in ISAS), "numba", "cuda", "reference")

# Backends that are a module each
_MODULES = {"numba": "numba_cpu", "cuda": "numba_cuda", "reference": "reference"}

_BUILD = "build it with a C compiler by `python -m pip install .` in the source folder"


class Kernels(Protocol):
    """A backend; each method is described in `logitloss._kernels`."""

    @property
    def name(self) -> str:
        """The backend's full name, as `backend=` takes it."""

    def label_weight(
        self, target: Array, weight: Float64 | None, ignore_index: int, n_classes: int, num_threads: int
    ) -> tuple[float, int]:
        """Sum the weights of the labels that count."""

    def cross_entropy(
        self,
        logits: Array,
        target: Array,
        ignore_index: int,
        beta: Float64 | None,
        gamma: Float64 | None,
        z_loss: float,
        scale: Float64 | float,
        lse_in: Float64 | None,
        loss: Array | None,
        lse: Float64 | None,
        figures: Float64 | None,
        grad: Array | None,
        num_threads: int,
    ) -> tuple[float, int, int]:
        """Cross-entropy of labels."""

    def soft_cross_entropy(
        self,
        logits: Array,
        target: Array,
        weight: Float64 | None,
        target_scale: float,
        target_offset: float,
        z_loss: float,
        scale: Float64 | float,
        lse_in: Float64 | None,
        loss: Array | None,
        lse: Float64 | None,
        grad: Array | None,
        num_threads: int,
    ) -> float:
        """Cross-entropy of class probabilities."""

    def logsumexp(self, logits: Array, lse: Array, num_threads: int) -> None:
        """Log of the sum of exponentials, a number per row."""

    def softmax(self, logits: Array, out: Array, log: bool, num_threads: int) -> None:
        """Softmax or its logarithm."""

    def entropy(self, logits: Array, out: Array, num_threads: int) -> None:
        """Entropy of the softmax, a number per row."""

    def binary_cross_entropy_with_logits(
        self,
        logits: Array,
        target: Array,
        weight: Array | None,
        pos_weight: Array | None,
        label_smoothing: float,
        signed: bool,
        scale: Array | float,
        loss: Array | None,
        grad: Array | None,
        num_threads: int,
    ) -> tuple[float, int]:
        """Binary cross-entropy of logits, and the logistic loss."""

    def binary_cross_entropy(
        self, probabilities: Array, target: Array, weight: Array | None, loss: Array | None, num_threads: int
    ) -> tuple[float, int]:
        """Binary cross-entropy of probabilities."""

    def kl_div(
        self, log_probabilities: Array, target: Array, log_target: bool, loss: Array | None, num_threads: int
    ) -> float:
        """Pointwise Kullback-Leibler divergence."""

    def nll(
        self,
        log_probabilities: Array,
        target: Array,
        ignore_index: int,
        weight: Float64 | None,
        loss: Array | None,
        num_threads: int,
    ) -> tuple[float, int, int]:
        """Negative log-likelihood of labels."""

    def sigmoid(self, logits: Array, out: Array, log: bool, num_threads: int) -> None:
        """Sigmoid or its logarithm."""


class Counter(Protocol):
    """What counts rows for an evaluation: the C rows alone do."""

    def count_rows(
        self,
        loss: Array,
        counted: Array | None,
        figures: Float64 | None,
        logits: Array | None,
        target: Array | None,
        ignored: float | None,
        counts: Array,
        ranking: Array | None,
        num_threads: int,
    ) -> None:
        """Add to counts of the layout that `logitloss.evaluate.counts` says."""


_loaded: dict[str | None, Kernels] = {}


def get(backend: str | None) -> Kernels:
    """Return the backend of that name, None being the default one."""
    kernels = _loaded.get(backend) if isinstance(backend, str | None) else None
    return _load(backend) if kernels is None else kernels


def counter(backend: str | None) -> Counter:
    """Return the C rows of that name; of a backend that has none, the default ones."""
    is_cython = backend is not None and backend.startswith(DEFAULT)
    return cast("Counter", get(backend if is_cython else None))


def backends() -> dict[str, str | None]:
    """Say which backends can be used, and why the others cannot.

    Returns
    -------
    dict of str to str or None
        For each name that `backend=` takes: None if it is usable, else the reason why not.

    Notes
    -----
    "cython", the default, is the best of "cython-avx512", "cython-avx2" and "cython-baseline" that this
    processor has, or the one that the environment variable LOGITLOSS_ISA (avx512, avx2 or baseline) asks for.

    Examples
    --------
    >>> import logitloss
    >>> print(logitloss.backends()["reference"])
    None
    """
    return {name: _reason(name) for name in NAMES}


def _reason(name: str) -> str | None:
    try:
        if name == "numba" and importlib.util.find_spec("numba"):
            _check_jit()  # to import it takes a second
            return None
        get(name)
    except ImportError as error:
        return str(error)
    return None


def _check_jit() -> None:
    """Raise ImportError where Numba is told to compile nothing."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        raise ImportError(
            "backend 'numba' is missing: NUMBA_DISABLE_JIT is set, and it is all compiled; unset it"
        )


def _load(backend: str | None) -> Kernels:
    name = DEFAULT if backend is None else backend
    if name not in NAMES:
        raise ValueError(f"backend is {name!r}: expected one of {', '.join(NAMES)}")
    if name == "numba":
        _check_jit()
    if name == "cuda":
        importlib.import_module("logitloss._kernels.cuda_device").check()
    if name in _MODULES:
        kernels = cast("Kernels", importlib.import_module(f"logitloss._kernels.{_MODULES[name]}"))
    else:
        kernels = _load_cython(name)
    _loaded[backend] = kernels
    return kernels


def _load_cython(name: str) -> Kernels:
    try:
        module = importlib.import_module("logitloss._kernels.cython_cpu")
    except ImportError as error:
        raise ImportError(
            f"backend {name!r} is missing: its extension module cannot be imported ({error}); {_BUILD}"
        ) from error
    available: tuple[str, ...] = module.available_isas()
    if name == DEFAULT:
        isa = os.environ.get("LOGITLOSS_ISA") or available[0]
        asked = f"LOGITLOSS_ISA is {isa!r}"
    else:
        isa = name.removeprefix("cython-")
        asked = f"backend {name!r} is missing"
    if isa not in available:
        raise ImportError(
            f"{asked}: this processor with this build has {', '.join(available)}; for others {_BUILD}"
        )
    return cast("Kernels", module.kernels(isa))
