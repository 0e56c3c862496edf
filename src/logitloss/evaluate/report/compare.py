"""Two evaluations compared: differences of their figures, and how sure those are.

A difference has a 95 % confidence interval by the normal approximation. Where there are records of each row
of both (`--per-row`), it is that of the mean of row-wise differences: the runs share the rows, and what is
hard for both takes no part in it. Else the runs are taken as independent samples. Figures that have no
standard error (perplexity, calibration errors, ROC AUC) have no interval; of those that may be off (ROC AUC,
average precision), a difference that is no larger than both bounds together says nothing.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from logitloss.evaluate.errors import DtypeError, FileError, ShapeError
from logitloss.evaluate.files import shard_files
from logitloss.evaluate.moments import PLAIN, Moments, json_number
from logitloss.evaluate.report import SCHEMA_VERSION, plain_console, plain_table
from logitloss.evaluate.report.figures import Figure, Kind, counts, figures
from logitloss.evaluate.report.markup import plain
from logitloss.evaluate.rows import row_dtype
from logitloss.evaluate.stores import split
from logitloss.evaluate.stores.mapped import MappedArray

Array = npt.NDArray[Any]
Document = Mapping[str, Any]
# Standard errors to either side of an interval: of the normal distribution 95 % are in between
Z = 1.959963984540054
# What any report has
SPEED = {"seconds", "rows_per_second", "gigabytes_per_second"}
ALWAYS = {"schema_version", "logits", "target", "loss", "nll_nats", "nll_histogram", "run", *SPEED}


# Of the figures that both have, those whose means must be the run's
CHECKED = ("nll_nats", "accuracy", "brier")


class Difference(NamedTuple):
    """A figure of both runs, what the second has more, and its standard error, None if there is none."""

    a: Figure
    b: Figure
    difference: float
    error: float | None
    method: Literal["paired", "independent"] | None

    @property
    def kind(self) -> Kind:
        """What the figure is."""
        return self.a.kind

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval; NaN where the standard error is."""
        if self.error is None:
            return None
        return self.difference - Z * self.error, self.difference + Z * self.error

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Both figures, the difference, and its interval, in digits that mean something."""
        error, text = self.error or abs(self.difference), self.kind.text
        ends = [text(end, error, "+") for end in self.interval or ()]
        difference = text(self.difference, error, "+")
        return text(self.a.value, error), text(self.b.value, error), difference, " to ".join(ends)

    @property
    def verdict(self) -> str:
        """In words: which run is better, and whether that is sure."""
        bound = (self.a.bound or 0.0) + (self.b.bound or 0.0)
        if math.isnan(self.difference) or (bound > 0 and abs(self.difference) <= bound):
            return "cannot be told"
        if self.difference == 0:
            return "the same"
        is_sure, told = False, ", no interval"
        if self.interval is not None and not math.isnan(self.interval[0]):
            is_sure = not self.interval[0] <= 0 <= self.interval[1]
            told = f", the interval {'excludes' if is_sure else 'includes'} 0"
        if self.kind.better == 0:
            return f"{'higher' if self.difference > 0 else 'lower'} in b{told}"
        leader = "b" if self.difference * self.kind.better > 0 else "a"
        return f"{leader} is {'better' if is_sure else 'ahead'}{told}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between two runs.

    Parameters
    ----------
    a, b : str
        Names of the runs.
    documents : tuple of dict
        What `--json` printed of them.
    rows : tuple of str, optional
        The records of each row that were compared pair by pair.
    differences : list of Difference
        Of all figures that both have.
    """

    a: str
    b: str
    documents: tuple[Document, Document]
    rows: tuple[str, str] | None
    differences: list[Difference]

    def to_json(self) -> str:
        """One JSON object.

        - schema_version: 3, that of the reports.
        - a, b: the names of the runs; rows: those of the records of each row, or null.
        - differences: a list of {figure, a, b, difference, standard_error, low, high, method, verdict}: b - a
          and its 95 % confidence interval, of "paired" or "independent" samples; null without standard error.
        - counts: a list of {labels, a, b}: how many labels counted, and how many did not, and why.

        A number that is none or infinite is the string "NaN", "Infinity" or "-Infinity".
        """
        lines = []
        for one in self.differences:
            low, high = one.interval or (None, None)
            line = {
                "figure": one.kind.key,
                "a": one.a.value,
                "b": one.b.value,
                "difference": one.difference,
                "standard_error": one.error,
                "low": low,
                "high": high,
                "method": one.method,
                "verdict": one.verdict,
            }
            lines.append({name: json_number(value) for name, value in line.items()})
        document = {"schema_version": SCHEMA_VERSION, "a": self.a, "b": self.b, "rows": self.rows}
        of_both = [{"labels": label, "a": a, "b": b} for label, a, b in self.n_labels]
        return json.dumps(document | {"differences": lines, "counts": of_both}, indent=2, allow_nan=False)

    @property
    def n_labels(self) -> list[tuple[str, int, int]]:
        """How many labels of either run counted, and how many did not, and why."""
        a, b = (dict(counts(document)) for document in self.documents)
        return [(label, a.get(label, 0), b.get(label, 0)) for label in a | b]

    def print_table(self) -> None:
        """Print the differences on stdout."""
        lines = plain_table("", "a", "b", "b - a", "95 % interval", "")
        for one in self.differences:
            lines.add_row(one.kind.label, *one.texts, one.verdict.partition(",")[0])
        for label, a, b in self.n_labels:
            lines.add_row(label, f"{a:,}", f"{b:,}")
        lines.columns[-1].justify = "left"
        console = plain_console(lines)
        console.print(plain(f"a: {self.a}\nb: {self.b}\n"), soft_wrap=True)
        console.print(lines)
        console.print("\nbetter: the interval excludes 0; ahead: it includes 0, or there is none")
        console.print(plain(self.method), soft_wrap=True)

    @property
    def method(self) -> str:
        """How the intervals come about, in a sentence."""
        if self.rows is None:
            how = "of the two runs as independent samples"
        else:
            how = f"of row-wise differences ({self.rows[0]}, {self.rows[1]}), where the figure has rows"
        return f"95 % intervals by the normal approximation, {how}."


def compare(a: str, b: str, *, rows: tuple[str, str] | None = None, is_paired: bool = True) -> Comparison:
    """Compare two runs by what `logitloss eval --json` printed of them.

    Parameters
    ----------
    a, b : str
        The files of the JSON.
    rows : tuple of str, optional
        Those of `--per-row` of both, or directories of such; by default those that the JSON of both names.
    is_paired : bool
        Whether to look at rows at all.

    Raises
    ------
    FileError
        A file cannot be read, or is no report.
    ShapeError
        The runs do not go together: another loss, other rows, other labels.
    """
    documents = read_report(a), read_report(b)
    if documents[0]["loss"] != documents[1]["loss"]:
        raise ShapeError(b, f"is of loss {documents[1]['loss']!r}, but {a} of {documents[0]['loss']!r}")
    of_rows: dict[str, Moments] = {}
    if rows is None and is_paired and all("per_row" in document for document in documents):
        rows = cast(tuple[str, str], tuple(document["per_row"] for document in documents))
    if rows is not None:
        _check_labels((a, b), documents)
        of_rows = _rows_compared(rows, (a, b), documents)
    theirs = {figure.kind.key: figure for figure in figures(documents[1])}
    differences = [
        _difference(figure, theirs[figure.kind.key], of_rows.get(figure.kind.key))
        for figure in figures(documents[0])
        if figure.kind.key in theirs and _is_of_one_text(figure.kind.key, documents)
    ]
    return Comparison(a, b, documents, rows, differences)


def read_report(path: str) -> Document:
    """Return what `--json` printed into a file."""
    try:
        with open(path, encoding="utf-8") as file:
            document = json.load(file)
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise FileError(path, "is no JSON; expected what logitloss eval --json printed") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise FileError(path, f"of schema_version {version}, expected {SCHEMA_VERSION}: evaluate anew")
    with as_report(path):
        figures(document)
        if not (document.keys() >= ALWAYS and _has_parts(document)):
            raise ValueError("not all is there")
    return cast(Document, document)


@contextmanager
def as_report(path: str) -> Iterator[None]:
    """Tell that a document is no report where it is taken for one, and is not made up as that is."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise FileError(path, "is no report; expected what logitloss eval --json printed") from None


def _has_parts(document: Document) -> bool:
    """Whether what a comparison looks at in a document is of the types that it has there."""
    lists = ("nll_histogram", "calibration", "top_k", "groups", "per_class", "confusions", "skipped")
    tables = [document[name] for name in lists if document.get(name) is not None]
    tables.append(document["run"].get("inputs", []))
    return (
        all(type(table) is list and all(type(line) is dict for line in table) for table in tables)
        and all(type(number) is int for _, number in counts(document))
        and all(type(document[name]) in (int, float) for name in SPEED)
        and all(type(share) in (int, float) for share in document.get("accuracy_by_rank", ()))
        and type(document.get("per_row", "")) is str
        and all({"role", "file", "shape", "dtype", "fingerprint"} <= line.keys() for line in tables[-1])
    )


def _is_of_one_text(key: str, documents: tuple[Document, Document]) -> bool:
    """Whether a figure per byte or word is of as many of them in both; others are of none."""
    units = [unit for unit in ("bytes", "words") if key.endswith(f"per_{unit[:-1]}")]
    return all(documents[0].get(unit) == documents[1].get(unit) for unit in units)


def _difference(a: Figure, b: Figure, paired: Moments | None) -> Difference:
    difference = b.value - a.value
    if paired is not None:
        return Difference(a, b, difference, paired.standard_error, "paired")
    if a.error is None or b.error is None:
        return Difference(a, b, difference, None, None)
    return Difference(a, b, difference, math.hypot(a.error, b.error), "independent")


def _check_labels(names: tuple[str, str], documents: tuple[Document, Document]) -> None:
    """Refuse rows of other labels, where both runs tell which they had.

    Fingerprints are of bytes, and of as many elements as the store gives: those of another type or store say
    nothing.
    """
    labels = [
        [one for one in document["run"].get("inputs", ()) if one["role"] == "target"]
        for document in documents
    ]
    about = [[(one["shape"], one["dtype"], _store(one["file"])) for one in files] for files in labels]
    prints = [[one["fingerprint"] for one in files] for files in labels]
    if about[0] == about[1] and prints[0] != prints[1]:
        raise ShapeError(
            names[1], f"of other labels than {names[0]}: rows do not pair; --unpaired does without"
        )


def _store(path: str) -> str:
    return os.path.splitext(split(path).file)[1].lower()


def _check_run(file: str, name: str, document: Document, found: dict[str, Moments]) -> None:
    """Refuse records of another run than the document's; a mean loss may be infinite, and so that of any."""
    for key, moments in found.items():
        wanted, n_wanted = float(document[key]), document["count"]
        is_same = moments.count == n_wanted and math.isclose(moments.mean, wanted, rel_tol=1e-6)
        if not (is_same or moments.count == n_wanted == 0):
            what = f"holds {moments.count} rows that count, {key} {moments.mean:.10g}"
            raise ShapeError(file, f"{what}, but {name} tells of {n_wanted}, {key} {wanted:.10g}")


def _rows_compared(
    rows: tuple[str, str], names: tuple[str, str], documents: tuple[Document, Document]
) -> dict[str, Moments]:
    """Return moments of b - a over the rows that count, by the figure's name."""
    ks = [line["k"] for line in documents[0].get("top_k", ())]
    found: dict[str, Moments] = {}
    of_runs: tuple[dict[str, Moments], dict[str, Moments]] = ({}, {})
    is_partial = any(document.get("skipped") for document in documents)
    for pair in _pairs(*rows, is_partial):
        columns = [_columns(records, ks) for records in pair]
        for of_run, column in zip(of_runs, columns, strict=True):
            for key in CHECKED:
                if key in column:
                    of_run.setdefault(key, Moments()).merge(Moments.of(column[key]))
        with np.errstate(invalid="ignore"):  # of infinite losses
            differences = np.array([columns[1][name] - columns[0][name] for name in columns[0]])
        for name, moments in zip(columns[0], Moments.of_each(differences), strict=True):
            found.setdefault(name, Moments()).merge(moments)
    for file, name, document, of_run in zip(rows, names, documents, of_runs, strict=True):
        _check_run(file, name, document, of_run)
    return found


def _pairs(a: str, b: str, is_partial: bool) -> Iterator[tuple[Array, Array]]:
    """Return records of the same rows of both, of those that count, a block at a time."""
    files = [shard_files(path) for path in (a, b)]
    if len(files[0]) != len(files[1]):
        raise FileError(b, f"stands for {len(files[1])} files, but {a} for {len(files[0])}")
    if is_partial:  # their order says which they are only where none is left out
        for file, other in zip(*files, strict=True):
            if os.path.basename(file) != os.path.basename(other):
                raise FileError(other, f"and {file} are of other shards, as some are skipped: no pair")
    for pair in zip(*files, strict=True):
        one, other = (_records(file) for file in pair)
        if one.shape != other.shape:
            raise ShapeError(
                pair[1], f"has {other.size} rows, but {pair[0]} has {one.size}: they do not pair"
            )
        if one.dtype.names != other.dtype.names:
            raise DtypeError(pair[1], f"of type {other.dtype}, but {pair[0]} has {one.dtype}")
        for first in range(0, one.size, PLAIN):
            box = (slice(first, first + PLAIN),)
            blocks = [records[box] for records in (one, other)]
            counted, others = (block["counted"] for block in blocks)
            if (counted != others).any():
                row = first + int(np.argmax(counted != others))
                where, missing = pair if counted[row - first] else pair[::-1]
                raise ShapeError(missing, f"does not count, but does in {where}", (row,))
            yield blocks[0][counted], blocks[1][counted]
            one.release(box)
            other.release(box)


def _records(file: str) -> MappedArray:
    """Map a file of records, all axes as one."""
    try:
        records = np.lib.format.open_memmap(file, "r")
    except (OSError, ValueError) as error:
        raise FileError(file, getattr(error, "strerror", None) or "is no .npy file of --per-row") from None
    names = set(records.dtype.names or ())
    if not any(names == set(row_dtype(np.float32, loss).names or ()) for loss in ("ce", "bce")):
        raise FileError(file, f"holds {records.dtype}, not what --per-row writes")
    return MappedArray(file, cast(Any, records)._mmap, records.reshape(-1))


def _columns(records: Array, ks: list[int]) -> dict[str, Array]:
    """Return the figures of each row, by the names that their means have."""
    real = {name: records[name].astype(np.float64) for name in records.dtype.names or ()}
    loss = real["loss"]
    columns = {"nll_nats": loss, "nll_bits": loss / math.log(2), "accuracy": real["hit"]}
    if "rank" in real:
        columns |= {f"top_{k}": (real["rank"] <= k).astype(np.float64) for k in ks}
        columns["mean_reciprocal_rank"] = 1 / real["rank"]
        columns["entropy_nats"] = real["entropy"]
        columns["confidence"] = real["top_probability"]
        columns["brier"] = real["brier"]
    return columns
