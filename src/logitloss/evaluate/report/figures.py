"""The figures of a report, in order: what each is called, and whether more of it is better.

One list for all who show them: the table, the page and the comparison take what a document of
`Report.document` has, be it fresh or read from JSON.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

# From which on a figure is written by its first digits
LONG = 1e10


class Kind(NamedTuple):
    """What a figure is: its name in JSON, what it is called, and whether more is better (1) or less (-1)."""

    key: str
    label: str
    better: int
    is_share: bool = False

    def text(self, value: float, error: float, sign: str = "") -> str:
        """Return a value with the decimals that mean something beside an error: two digits of that."""
        percent, unit = (100, "%") if self.is_share else (1, "")
        if abs(value) >= LONG:
            return f"{value:{sign}.6g}"
        decimals, error = 4, error * percent
        if 0 < error < math.inf:
            decimals = min(12, max(0, 1 - math.floor(math.log10(error))))
        return f"{value * percent:{sign}.{decimals}f}{unit}"


KINDS = (
    Kind("nll_nats", "negative log-likelihood, nats", -1),
    Kind("nll_bits", "negative log-likelihood, bits", -1),
    Kind("perplexity", "perplexity", -1),
    Kind("bits_per_byte", "bits per byte", -1),
    Kind("perplexity_per_byte", "perplexity per byte", -1),
    Kind("perplexity_per_word", "perplexity per word", -1),
    Kind("accuracy", "accuracy", 1, is_share=True),
    Kind("top_k", "top-{k} accuracy", 1, is_share=True),
    Kind("mean_reciprocal_rank", "mean reciprocal rank", 1),
    Kind("entropy_nats", "entropy, nats", 0),
    Kind("confidence", "confidence", 0),
    Kind("brier", "Brier score", -1),
    Kind("expected_calibration_error", "expected calibration error", -1),
    Kind("maximum_calibration_error", "largest calibration error", -1),
    Kind("roc_auc", "ROC AUC", 1),
    Kind("average_precision", "average precision", 1),
)


class Figure(NamedTuple):
    """A figure, its standard error, and how far it may be off at most; None where there is no such thing."""

    kind: Kind
    value: float
    error: float | None
    bound: float | None

    @property
    def texts(self) -> tuple[str, str]:
        """The value, and how sure it is."""
        # Digits beyond the tenth are noise of the data many times over, and are in the JSON.
        value = f"{self.value:.4%}" if self.kind.is_share else f"{self.value:.10g}"
        if self.bound is not None:
            return value, f"at most {self.bound:.1g} off"
        if self.error is None:
            return value, ""
        return value, f"{self.error:.2%}" if self.kind.is_share else f"{self.error:.2g}"


def figures(document: Mapping[str, Any]) -> list[Figure]:
    """Return the figures that a document has; each k of `top_k` above 1 is one."""
    found = []
    for kind in KINDS:
        if kind.key == "top_k":
            for line in document.get("top_k", ()):
                of_k = kind._replace(key=f"top_{line['k']}", label=kind.label.format(**line))
                if line["k"] > 1:
                    found.append(_figure(of_k, line, "accuracy"))
        elif kind.key in document:
            found.append(_figure(kind, document, kind.key))
    return found


def _figure(kind: Kind, document: Mapping[str, Any], key: str) -> Figure:
    error, bound = (
        float(document[name]) if (name := f"{key}_{what}") in document else None
        for what in ("standard_error", "error_bound")
    )
    return Figure(kind, float(document[key]), error, bound)


def counts(document: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return how many labels counted, and how many did not, and why."""
    reasons = {
        "masked": "labels masked",
        "shifted": "labels not predicted",
        "infinite": "labels of infinite loss",
    }
    found = [("labels counted", document["count"]), ("labels ignored", document["ignored"])]
    return found + [(label, document[name]) for name, label in reasons.items() if document.get(name)]
