"""What the page draws: calibration, the spread of losses, accuracy by rank, costly classes, confused pairs.

Each takes documents, of one run or of two to be compared, and returns a figure, or None if there is nothing
to draw.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from logitloss.evaluate.histogram import bars
from logitloss.evaluate.report.charts import CLASSES, LEFT, RIGHT, Panel, Scale, figure, ranked
from logitloss.evaluate.report.markup import Element

Document = Mapping[str, Any]
# Bars of classes and of pairs
MOST_BARS = 10
# Labels below which the four bins of a power of two are drawn as one, since a few labels a bin say little
FEW = 10_000
# Ranks above which they are drawn by their logarithm
MOST_LINEAR = 12


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def reliability(documents: Sequence[Document]) -> Element | None:
    """Draw outcomes over probabilities, and how many labels each bin has."""
    if not any(document.get("calibration") for document in documents):
        return None
    is_binary = documents[0]["loss"] == "bce"
    across = Scale(0, 1, LEFT, RIGHT)
    x_title = "predicted probability" if is_binary else "confidence: the largest probability"
    y_title = "mean label" if is_binary else "accuracy"
    curve = Panel(across, Scale(0, 1, 232, 24), "", y_title)
    curve.line([(0, 0), (1, 1)], "ideal")
    total = [document["count"] for document in documents]
    most = max(
        line["count"] / n
        for document, n in zip(documents, total, strict=True)
        for line in document["calibration"]
    )
    below = Panel(across, Scale(0, most, 344, 282), x_title, "share of labels", y_text=_percent)
    rows = []
    for number, (document, class_) in enumerate(zip(documents, CLASSES, strict=False)):
        lines = document["calibration"]
        curve.line([(line["probability"], line["outcome"]) for line in lines], f"curve {class_}")
        for line in lines:
            low, high, count, p, outcome = (
                line[key] for key in ("low", "high", "count", "probability", "outcome")
            )
            said = f"{low:.3f} to {high:.3f}: said {p:.4f}, came to {outcome:.4f}, of {count:,}"
            data = {"data_count": count, "data_x": p, "data_y": outcome}
            curve.point(p, outcome, class_, said, **data)
            width = (high - low) / len(documents)
            start = low + number * width
            below.bar(start, start + width, count / document["count"], class_, said, data_count=count)
            rows.append(
                [
                    *_name(documents, class_),
                    f"{low:.3f} to {high:.3f}",
                    f"{count:,}",
                    f"{p:.5f}",
                    f"{outcome:.5f}",
                ]
            )
    summary = (
        "Points on the diagonal are probabilities that come true as often as they say; below it, less often."
    )
    head = [*_run(documents), "bin", "labels", x_title.split(":")[0], y_title]
    return figure("reliability", "Reliability", summary, [curve.drawn, below.drawn], 388, head, rows)


def loss_histogram(documents: Sequence[Document]) -> Element | None:
    """Draw the share of labels by their loss, for each doubling of it: what counts is a bar's area."""
    is_fine = min(document["count"] for document in documents) >= FEW
    drawn = [bars(document["nll_histogram"], document["count"], is_fine=is_fine) for document in documents]
    every = [bar for of_one in drawn for bar in of_one]
    if not every:
        return None
    low, high = min(bar.start for bar in every), max(bar.end for bar in every)
    across = Scale(low, max(high, 8 * low), LEFT, RIGHT, is_log=True)
    most = max(bar.height for bar in every)
    panel = Panel(
        across,
        Scale(0, most, 232, 24),
        "loss of a label, nats",
        "share of labels, each doubling",
        x_text=_power,
        y_text=_percent,
    )
    rows = []
    for document, class_, of_one in zip(documents, CLASSES, drawn, strict=False):
        for start, end, height, line in of_one:
            bounds = f"{line['low']:.4g} to {line['high']:.4g}"
            share = _percent(line["count"] / document["count"])
            tip = f"{bounds} nats: {line['count']:,} labels, {share}"
            data = {f"data_{key}": value for key, value in line.items()}
            panel.bar(start, end, height, class_, tip, **data)
            rows.append([*_name(documents, class_), bounds, f"{line['count']:,}", share])
        mean = float(document["nll_nats"])
        if low < mean < high:
            panel.line([(mean, 0), (mean, most)], f"mean {class_}")
    summary = "How the loss is spread over the labels; the dashed line is at the mean."
    head = [*_run(documents), "nats", "labels", "share"]
    return figure("nll-histogram", "Negative log-likelihood", summary, [panel.drawn], 276, head, rows)


def accuracy_by_rank(documents: Sequence[Document]) -> Element | None:
    """Draw the share of labels that are among the k largest logits."""
    shares = [document.get("accuracy_by_rank") or [] for document in documents]
    n_ranks = max(map(len, shares))
    if n_ranks < 2:
        return None
    low = min(share[0] for share in shares if share)
    floor = math.floor(10 * low) / 10 if low < 1 else 0.9
    is_log = n_ranks > MOST_LINEAR
    panel = Panel(
        Scale(1, n_ranks, LEFT, RIGHT - 6, is_log),
        Scale(floor, 1, 232, 24),
        "k, the largest logits looked at",
        "label among the k largest",
        y_text=_percent,
    )
    rows = []
    for class_, share in zip(CLASSES, shares, strict=False):
        points = list(enumerate(share, 1))
        panel.line(points, f"curve {class_}")
        for k, value in points:
            tip = f"k = {k}: {_percent(value)}"
            panel.point(k, value, class_, tip, 1.8 if is_log else 3.5, data_x=k, data_y=value)
            rows.append([*_name(documents, class_), str(k), f"{value:.4%}"])
    summary = "The share of labels that are among the k largest logits; at k = 1 it is the accuracy."
    return figure(
        "accuracy-by-rank",
        "Accuracy by rank",
        summary,
        [panel.drawn],
        276,
        [*_run(documents), "k", "share"],
        rows,
    )


def costly_classes(lines: Sequence[Mapping[str, Any]]) -> Element:
    """Draw the classes that add most to the loss."""
    costs = [(line["count"] * float(line["nll_nats"]) if line["count"] else 0.0, line) for line in lines]
    total = sum(cost for cost, _ in costs)  # which may overflow
    worst = sorted(costs, key=lambda pair: -pair[0])[:MOST_BARS]
    lengths, rows = [], []
    for cost, line in worst:
        share = cost / total if 0 < total < math.inf else float(cost == math.inf)
        lengths.append((f"class {line['class']}", share, _percent(share)))
        rows.append(
            [
                str(line["class"]),
                f"{line['count']:,}",
                f"{line['predicted']:,}",
                f"{float(line['nll_nats']):.6g}",
                f"{float(line['accuracy']):.2%}",
                _percent(share),
            ]
        )
    summary = f"The share of the whole loss that the labels of a class make up; of {len(lines):,} classes."
    head = ["class", "labels", "predicted", "nats", "accuracy", "share of loss"]
    return ranked("costly-classes", "Classes that cost most", summary, lengths, head, rows)


def confusions(pairs: Sequence[Mapping[str, Any]]) -> Element:
    """Draw the pairs of a label and another class predicted for it that came up most."""
    lengths = [
        (f"{pair['label']} as {pair['predicted']}", float(pair["count"]), f"{pair['count']:,}")
        for pair in pairs[:MOST_BARS]
    ]
    rows = [[str(pair["label"]), str(pair["predicted"]), f"{pair['count']:,}"] for pair in pairs]
    summary = "How many labels of one class were taken for another, most first."
    head = ["label", "predicted", "labels"]
    return ranked("confusions", "Most confused pairs", summary, lengths, head, rows)


def _run(documents: Sequence[Document]) -> list[str]:
    return ["run"] if len(documents) > 1 else []


def _name(documents: Sequence[Document], class_: str) -> list[str]:
    return [class_] if len(documents) > 1 else []


def _power(value: float) -> str:
    """Return a power of ten as it is read best."""
    if 1e-3 <= value <= 1e3:
        return f"{value:g}"
    digits = str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits}"
