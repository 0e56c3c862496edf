"""An evaluation shown: a table for people, JSON for programs, and the document that `page` draws.

JSON has no infinity and no NaN, so a figure that is one of these is the string "Infinity" or "NaN" there.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from logitloss.evaluate.checkpoint import Skipped
from logitloss.evaluate.metrics import ClassLine, Metrics
from logitloss.evaluate.moments import json_number
from logitloss.evaluate.report.figures import counts, figures
from logitloss.evaluate.report.markup import plain
from logitloss.evaluate.state import Group

SCHEMA_VERSION = 3
# Lines of the table of classes; where there are more, those that add most to the loss
MOST_CLASSES = 40
# Characters of a table's names, beyond which they go on in the next line
NAME_WIDTH = 60
WIDEST = 1 << 20  # columns, of any table


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
    run : dict
        Where the figures come from, as `provenance` has it.
    per_row : str, optional
        The file of what becomes of each row.
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
    run: dict[str, Any] = field(default_factory=dict)
    per_row: str | None = None
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

        - schema_version: 3.
        - logits, target: the names of the inputs; of what `logitloss merge` adds up, states: a list of them.
        - loss: "ce" or "bce".
        - count: labels that counted; infinite: those of them that cost infinity.
        - ignored, masked, shifted: labels that did not, each for one reason: equal to ignore_index, left out
          by a mask, or the first of a sequence, which no logits predict (not told of groups).
        - nll_nats, nll_bits, perplexity: mean loss in either unit, and e to the power of the first.
        - nll_histogram: bins of the loss that hold something, a list of {low, high, count}, bounds in nats.
        - accuracy: share of hits.
        - top_k (ce): a list of {k, accuracy, accuracy_standard_error}, the label among the k largest logits.
        - accuracy_by_rank (ce): that for k = 1, 2, ... up to the number of classes or 100, a list.
        - mean_reciprocal_rank (ce): mean of 1 / rank of the label.
        - brier: mean of the squared error, over classes summed.
        - entropy_nats, confidence (ce): means of the entropy and of the largest probability.
        - expected_calibration_error, maximum_calibration_error: the mean gap of the bins, and the largest.
        - calibration: the bins that hold something, a list of {low, high, count, probability, outcome}.
        - roc_auc, average_precision (bce), and each with _error_bound: how far it may be off at most.
        - bytes, bits_per_byte, perplexity_per_byte; words, perplexity_per_word: where the numbers are given.
        - per_class (where asked for): a list of {class, count, predicted, nll_nats, accuracy}.
        - confusions (beside per_class, of up to 1024 classes): a list of {label, predicted, count}, the 100
          pairs of a label and another class that was predicted which came up most.
        - seconds, rows_per_second, gigabytes_per_second (but for states): what it took, and what was read.
        - warnings: a list of lines, of what makes the figures doubtful.
        - skipped (with --on-error skip): a list of {file, reason}, shards of which no row counts.
        - groups (where there are): a list of {group, ...} with the figures above of each.
        - per_row (where asked for): the name of the file, or directory, of what becomes of each row.
        - run (but for states): where the figures come from, an object of

          - date: when the evaluation began, in UTC.
          - options: what was asked for or is the default, by name: loss, ignore_index, shift, axis, dtype,
            chunk_rows, softcap, logit_scale, per_class, on_error, state_file, save_every, dask.
          - inputs: a list of {role, file, shape, dtype, fingerprint}, with a fingerprint of a few elements.
          - backend, instruction_set (null but for C), threads: what the kernels ran on.
          - system; versions: those of python, logitloss, numpy, ml_dtypes, numba.

        Means have their standard errors beside them, with _standard_error after their names. A figure that is
        no number or infinite is the string "NaN", "Infinity" or "-Infinity".
        """
        return json.dumps(_as_json(self.document()), indent=2, allow_nan=False)

    def document(self) -> dict[str, Any]:
        """Return what `to_json` writes."""
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
        document["warnings"] = list(self.metrics.warnings)
        if self.groups:
            document["groups"] = [{"group": key} | metrics.to_dict() for key, metrics in self.groups.items()]
            for group in document["groups"]:
                del group["shifted"]
        if self.skipped is not None:
            document["skipped"] = [one._asdict() for one in self.skipped]
        if self.per_row is not None:
            document["per_row"] = self.per_row
        if self.run:
            document["run"] = self.run
        return document

    def print_table(self) -> None:
        """Print the figures on stdout."""
        document = self.document()
        table = plain_table("", "value", "standard error")
        for figure in figures(document):
            table.add_row(figure.kind.label, *figure.texts)
        for label, count in counts(document):
            table.add_row(label, f"{count:,}")
        if self.skipped is not None:
            table.add_row("shards skipped", f"{len(self.skipped):,}")
        if self.seconds is not None:
            table.add_row("seconds", f"{self.seconds:.3g}")
            table.add_row("rows/s", f"{self.rows_per_second:,.0f}")
            table.add_row("GB/s", f"{self.gigabytes_per_second:.3g}")
        tables = [table]
        if self.metrics.per_class is not None:
            tables.append(_table_of_classes(self.metrics.per_class))
        if self.groups:
            tables.append(self._table_of_groups())
        console = plain_console(*tables)
        console.print(*tables, sep="\n")
        if self.skipped:
            console.print()
            for file, reason in self.skipped:
                # whole, as it is to be read by programs, too
                console.print(plain(f"skipped {file}: {reason}"), soft_wrap=True)

    def _table_of_groups(self) -> Table:
        table = plain_table(
            "group", "labels", "nats", "error", "perplexity", "accuracy", "Brier", "calibration"
        )
        for key, metrics in self.groups.items():
            probabilities = metrics.classes or metrics.binary
            table.add_row(
                plain(key),
                f"{metrics.count:,}",
                f"{metrics.nll_nats:.6g}",
                f"{metrics.nll_nats_standard_error:.2g}",
                f"{metrics.perplexity:.6g}",
                f"{metrics.accuracy:.4%}",
                f"{probabilities.brier:.4g}" if probabilities else "",
                f"{probabilities.expected_calibration_error:.4g}" if probabilities else "",
            )
        return table


def plain_console(*tables: Table) -> Console:
    """Return stdout, on which names are written as they are, and tables whole where they are wide."""
    console = Console(markup=False, highlight=False, emoji=False)
    any_width = console.options.update(max_width=WIDEST)
    widths = [console.measure(table, options=any_width).maximum for table in tables]
    console.width = max([console.width, *widths])
    return console


def plain_table(*columns: str) -> Table:
    """Return a table of names, whole where they are long, and numbers to the right."""
    table = Table(*columns, box=None, pad_edge=False)
    table.columns[0].overflow, table.columns[0].max_width = "fold", NAME_WIDTH
    for column in table.columns[1:]:
        column.justify = "right"
        column.no_wrap = True
    return table


def _table_of_classes(lines: list[ClassLine]) -> Table:
    table = plain_table("class", "labels", "predicted", "nats", "accuracy")
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
