"""An evaluation shown: a table for people, JSON for programs.

JSON has no infinity and no NaN, so a figure that is one of these is the string "Infinity" or "NaN" there.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.metrics import ClassLine, Metrics
from logitloss.evaluate.moments import json_number
from logitloss.evaluate.state import Group

SCHEMA_VERSION = 2
# Lines of the table of classes; where there are more, those that add most to the loss
MOST_CLASSES = 40


@dataclass(frozen=True, slots=True)
class Report:
    """The figures, what they are about, and what it took.

    Parameters
    ----------
    logits, target : str, optional
        Names of the inputs; None of what is merged of states.
    metrics : Metrics
        The figures.
    groups : dict of Metrics
        Those of each group of rows, by its key.
    seconds : float, optional
        Time it took, reading included; None of states.
    n_rows, n_bytes : int
        Rows, and bytes of logits, that were read in this time; ignored rows too.
    skipped : list of Skipped, optional
        Shards of which no row counts; None if none may be left out.
    states : list of str, optional
        Names of the states that were merged.
    """

    logits: str | None
    target: str | None
    metrics: Metrics
    groups: dict[Group, Metrics]
    seconds: float | None = None
    n_rows: int = 0
    n_bytes: int = 0
    skipped: list[Skipped] | None = None
    states: list[str] | None = None

    @property
    def rows_per_second(self) -> float:
        """Rows read by the time taken."""
        return self.n_rows / (self.seconds or math.nan)

    @property
    def gigabytes_per_second(self) -> float:
        """10**9 bytes of logits read by the time taken."""
        return self.n_bytes / (self.seconds or math.nan) / 1e9

    def to_json(self) -> str:
        """One JSON object of names, figures and throughput, of this schema.

        - schema_version: 2.
        - logits, target: the names of the inputs; of what `logitloss merge` adds up, states: a list of them.
        - loss: "ce" or "bce".
        - count, ignored, infinite: labels that counted, that did not, that counted and cost infinity.
        - nll_nats, nll_bits, perplexity: mean loss in either unit, and e to the power of the first.
        - accuracy: share of hits.
        - top_k (ce): a list of {k, accuracy, accuracy_standard_error}, the label among the k largest logits.
        - mean_reciprocal_rank (ce): mean of 1 / rank of the label.
        - brier: mean of the squared error, over classes summed.
        - entropy_nats, confidence (ce): means of the entropy and of the largest probability.
        - expected_calibration_error, maximum_calibration_error: the mean gap of the bins, and the largest.
        - calibration: the bins that hold something, a list of {low, high, count, probability, outcome}.
        - roc_auc, average_precision (bce), and each with _error_bound: how far it may be off at most.
        - bytes, bits_per_byte, perplexity_per_byte; words, perplexity_per_word: where the numbers are given.
        - per_class (where asked for): a list of {class, count, predicted, nll_nats, accuracy}.
        - seconds, rows_per_second, gigabytes_per_second (but for states): what it took, and what was read.
        - skipped (with --on-error skip): a list of {file, reason}, shards of which no row counts.
        - groups (where there are): a list of {group, ...} with the figures above of each.

        Means have their standard errors beside them, with _standard_error after their names.
        """
        inputs = {"logits": self.logits, "target": self.target}
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            **(inputs if self.states is None else {"states": self.states}),
            **self.metrics.to_dict(),
        }
        if self.seconds is not None:
            document["seconds"] = self.seconds
            document["rows_per_second"] = self.rows_per_second
            document["gigabytes_per_second"] = self.gigabytes_per_second
        if self.groups:
            document["groups"] = [{"group": key} | metrics.to_dict() for key, metrics in self.groups.items()]
        if self.skipped is not None:
            document["skipped"] = [one._asdict() for one in self.skipped]
        return json.dumps(_as_json(document), indent=2, allow_nan=False)

    def print_table(self) -> None:
        """Print the figures on stdout."""
        metrics = self.metrics
        table = _table("", "value", "standard error")
        # Digits beyond the tenth are noise of the data many times over, and are in the JSON.
        nll, nll_error = metrics.nll_nats, metrics.nll_nats_standard_error
        bits, bits_error = metrics.nll_bits, metrics.nll_bits_standard_error
        table.add_row("negative log-likelihood, nats", f"{nll:.10g}", f"{nll_error:.2g}")
        table.add_row("negative log-likelihood, bits", f"{bits:.10g}", f"{bits_error:.2g}")
        table.add_row("perplexity", f"{metrics.perplexity:.10g}")
        if metrics.n_bytes is not None:
            table.add_row("bits per byte", f"{metrics.bits_per_byte:.10g}")
            table.add_row("perplexity per byte", f"{metrics.perplexity_per_byte:.10g}")
        if metrics.n_words is not None:
            table.add_row("perplexity per word", f"{metrics.perplexity_per_word:.10g}")
        table.add_row("accuracy", f"{metrics.accuracy:.4%}", f"{metrics.accuracy_standard_error:.2%}")
        classes, binary = metrics.classes, metrics.binary
        if classes is not None:
            for line in classes.top_k:
                if line["k"] > 1:
                    share, error = line["accuracy"], line["accuracy_standard_error"]
                    table.add_row(f"top-{line['k']} accuracy", f"{share:.4%}", f"{error:.2%}")
            means = {
                "mean reciprocal rank": (
                    classes.mean_reciprocal_rank,
                    classes.mean_reciprocal_rank_standard_error,
                ),
                "entropy, nats": (classes.entropy_nats, classes.entropy_nats_standard_error),
                "confidence": (classes.confidence, classes.confidence_standard_error),
            }
            for name, (mean, error) in means.items():
                table.add_row(name, f"{mean:.10g}", f"{error:.2g}")
        probabilities = classes or binary
        if probabilities is not None:
            table.add_row(
                "Brier score", f"{probabilities.brier:.10g}", f"{probabilities.brier_standard_error:.2g}"
            )
            table.add_row("expected calibration error", f"{probabilities.expected_calibration_error:.10g}")
            table.add_row("largest calibration error", f"{probabilities.maximum_calibration_error:.10g}")
        if binary is not None:
            auc, bound = binary.roc_auc, binary.roc_auc_error_bound
            table.add_row("ROC AUC", f"{auc:.10g}", f"at most {bound:.1g} off")
            ap, bound = binary.average_precision, binary.average_precision_error_bound
            table.add_row("average precision", f"{ap:.10g}", f"at most {bound:.1g} off")
        table.add_row("labels counted", f"{metrics.count:,}")
        table.add_row("labels ignored", f"{metrics.ignored:,}")
        if metrics.infinite:
            table.add_row("labels of infinite loss", f"{metrics.infinite:,}")
        if self.skipped is not None:
            table.add_row("shards skipped", f"{len(self.skipped):,}")
        if self.seconds is not None:
            table.add_row("seconds", f"{self.seconds:.3g}")
            table.add_row("rows/s", f"{self.rows_per_second:,.0f}")
            table.add_row("GB/s", f"{self.gigabytes_per_second:.3g}")
        console = Console(markup=False, highlight=False)
        console.print(table)
        if metrics.per_class is not None:
            console.print()
            console.print(_table_of_classes(metrics.per_class))
        if self.groups:
            console.print()
            console.print(self._table_of_groups())
        if self.skipped:
            console.print()
            for file, reason in self.skipped:
                # whole, as it is to be read by programs, too
                console.print(f"skipped {file}: {reason}", soft_wrap=True)

    def _table_of_groups(self) -> Table:
        table = _table("group", "labels", "nats", "error", "perplexity", "accuracy", "Brier", "calibration")
        for key, metrics in self.groups.items():
            probabilities = metrics.classes or metrics.binary
            table.add_row(
                str(key),
                f"{metrics.count:,}",
                f"{metrics.nll_nats:.6g}",
                f"{metrics.nll_nats_standard_error:.2g}",
                f"{metrics.perplexity:.6g}",
                f"{metrics.accuracy:.4%}",
                f"{probabilities.brier:.4g}" if probabilities else "",
                f"{probabilities.expected_calibration_error:.4g}" if probabilities else "",
            )
        return table


def _table(*columns: str) -> Table:
    """Return a table of names, and numbers to the right."""
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _table_of_classes(lines: list[ClassLine]) -> Table:
    table = _table("class", "labels", "predicted", "nats", "accuracy")
    lines = [line for line in lines if line["count"] or line["predicted"]]
    shown = lines
    if len(lines) > MOST_CLASSES:
        total = [line["nll_nats"] * line["count"] if line["count"] else 0.0 for line in lines]
        shown = [lines[i] for i in sorted(range(len(lines)), key=lambda i: -total[i])[:MOST_CLASSES]]
        table.caption = f"those that add most to the loss; JSON has all {len(lines)}"
    for line in shown:
        table.add_row(
            str(line["class"]),
            f"{line['count']:,}",
            f"{line['predicted']:,}",
            f"{line['nll_nats']:.6g}",
            f"{line['accuracy']:.4%}",
        )
    return table


def _as_json(value: Any) -> Any:
    """Return the same with numbers as JSON has them, at any depth."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    return [_as_json(part) for part in value] if isinstance(value, list) else json_number(value)
