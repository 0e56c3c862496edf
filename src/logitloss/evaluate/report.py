"""An evaluation shown: a table for people, JSON for programs.

JSON has no infinity and no NaN, so a figure that is one of these is the string "Infinity" or "NaN" there.
"""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.metrics import Metrics
from logitloss.evaluate.moments import json_number
from logitloss.evaluate.state import Group

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Report:
    """The figures, what they are about, and what it took.

    Parameters
    ----------
    logits, target : str
        Names of the inputs.
    metrics : Metrics
        The figures.
    groups : dict of Metrics
        Those of each group of rows, by its key.
    seconds : float
        Time it took, reading included.
    n_rows, n_bytes : int
        Rows, and bytes of logits, that were read in this time; ignored rows too.
    skipped : list of Skipped, optional
        Shards of which no row counts; None if none may be left out.
    """

    logits: str
    target: str
    metrics: Metrics
    groups: dict[Group, Metrics]
    seconds: float
    n_rows: int
    n_bytes: int
    skipped: list[Skipped] | None = None

    @property
    def rows_per_second(self) -> float:
        """Rows read by the time taken."""
        return self.n_rows / self.seconds

    @property
    def gigabytes_per_second(self) -> float:
        """10**9 bytes of logits read by the time taken."""
        return self.n_bytes / self.seconds / 1e9

    def to_json(self) -> str:
        """One JSON object: names, figures and throughput."""
        document: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "logits": self.logits,
            "target": self.target,
            **self.metrics.to_dict(),
            "seconds": self.seconds,
            "rows_per_second": self.rows_per_second,
            "gigabytes_per_second": self.gigabytes_per_second,
        }
        if self.groups:
            document["groups"] = [
                {"group": key} | {name: json_number(value) for name, value in metrics.to_dict().items()}
                for key, metrics in self.groups.items()
            ]
        if self.skipped is not None:
            document["skipped"] = [one._asdict() for one in self.skipped]
        return json.dumps(
            {key: json_number(value) for key, value in document.items()}, indent=2, allow_nan=False
        )

    def print_table(self) -> None:
        """Print the figures on stdout."""
        metrics = self.metrics
        table = Table("", "value", "standard error", box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
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
        if metrics.binary is not None:
            table.add_row("Brier score", f"{metrics.binary.brier:.10g}")
            table.add_row("expected calibration error", f"{metrics.binary.expected_calibration_error:.10g}")
            table.add_row("largest calibration error", f"{metrics.binary.maximum_calibration_error:.10g}")
            auc, bound = metrics.binary.roc_auc, metrics.binary.roc_auc_error_bound
            table.add_row("ROC AUC", f"{auc:.10g}", f"at most {bound:.1g} off")
            ap, bound = metrics.binary.average_precision, metrics.binary.average_precision_error_bound
            table.add_row("average precision", f"{ap:.10g}", f"at most {bound:.1g} off")
        table.add_row("labels counted", f"{metrics.count:,}")
        table.add_row("labels ignored", f"{metrics.ignored:,}")
        if metrics.infinite:
            table.add_row("labels of infinite loss", f"{metrics.infinite:,}")
        if self.skipped is not None:
            table.add_row("shards skipped", f"{len(self.skipped):,}")
        table.add_row("seconds", f"{self.seconds:.3g}")
        table.add_row("rows/s", f"{self.rows_per_second:,.0f}")
        table.add_row("GB/s", f"{self.gigabytes_per_second:.3g}")
        console = Console(markup=False, highlight=False)
        console.print(table)
        if self.groups:
            console.print()
            console.print(self._table_of_groups())
        if self.skipped:
            console.print()
            for file, reason in self.skipped:
                # whole, as it is to be read by programs, too
                console.print(f"skipped {file}: {reason}", soft_wrap=True)

    def _table_of_groups(self) -> Table:
        table = Table(
            "group", "labels", "nats", "standard error", "perplexity", "accuracy", box=None, pad_edge=False
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for key, metrics in self.groups.items():
            table.add_row(
                str(key),
                f"{metrics.count:,}",
                f"{metrics.nll_nats:.6g}",
                f"{metrics.nll_nats_standard_error:.2g}",
                f"{metrics.perplexity:.6g}",
                f"{metrics.accuracy:.4%}",
            )
        return table
