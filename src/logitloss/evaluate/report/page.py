"""The page of `--report`: one HTML file of pictures and tables that needs no network and no script.

It is drawn from documents as `Report.document` returns them and `--json` prints them: of one run, or of two
beside each other with what `compare` found between them. The charts are in `pictures`, the looks in
`data/page.css`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from logitloss.evaluate.atomic import replacing
from logitloss.evaluate.report.charts import CLASSES, shape
from logitloss.evaluate.report.compare import Comparison, as_report
from logitloss.evaluate.report.figures import Figure, counts, figures
from logitloss.evaluate.report.markup import Element, element, table, written
from logitloss.evaluate.report.pictures import (
    accuracy_by_rank,
    confusions,
    costly_classes,
    loss_histogram,
    reliability,
)

Document = Mapping[str, Any]
# Those at the top of the page
HEADLINES = ("nll_nats", "perplexity", "accuracy", "brier", "expected_calibration_error", "roc_auc")
# Lines of groups, and of inputs
MOST_LINES = 200


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Write a page to a file, whole or not at all."""
    with replacing(path) as file:
        file.write(page)


def report_page(document: Document) -> str:
    """Return the page of one evaluation."""
    found = figures(document)
    title = f"{document['logits']} against {document['target']}"
    lines = [[figure.kind.label, *spelled(figure)] for figure in found]
    parts = [
        _section(
            "figures",
            "Figures",
            *_warnings(document),
            _headlines(found),
            table(["", "value", "standard error"], lines, class_="numbers"),
            element("p", "Standard errors take the labels as independent.", class_="note"),
        ),
        _section("pictures", "Pictures", _pictures([document])),
        *_classes(document),
        *_groups(document),
        _section("counts", "What counted", *_counts([document])),
        _section("provenance", "Where this comes from", _provenance(document)),
    ]
    return _page("Evaluation", title, document["run"].get("date", ""), parts)


def comparison_page(comparison: Comparison) -> str:
    """Return the page of two evaluations, side by side.

    Raises
    ------
    FileError
        A document is none that a report has.
    """
    names = comparison.a, comparison.b
    for name, document in zip(names, comparison.documents, strict=True):
        with as_report(name):
            report_page(document)  # what cannot be drawn by itself is told by its name
    with as_report(", ".join(names)):
        return _side_by_side(comparison)


def _side_by_side(comparison: Comparison) -> str:
    documents = comparison.documents
    lines = [[one.kind.label, *one.texts, one.verdict] for one in comparison.differences]
    verdicts = [
        element("li", element("strong", f"{one.kind.label}: "), one.verdict)
        for one in comparison.differences
        if one.kind.key in HEADLINES
    ]
    names = zip(CLASSES, (comparison.a, comparison.b), strict=True)
    parts = [
        _section(
            "figures",
            "Differences",
            _legend(dict(names)),
            element("ul", *verdicts, class_="verdicts"),
            table(["", *CLASSES, "b - a", "95 % interval", "verdict"], lines, class_="numbers compared"),
            element("p", comparison.method, class_="note"),
        ),
        _section("pictures", "Pictures", _pictures(documents)),
        _section("counts", "What counted", *_counts(documents)),
        *(
            _section(f"provenance-{class_}", f"Where {class_} comes from", _provenance(document))
            for class_, document in zip(CLASSES, documents, strict=True)
        ),
    ]
    return _page("Comparison", f"{comparison.b} compared with {comparison.a}", "", parts)


def _legend(names: Mapping[str, str]) -> Element:
    """Return which colour and shape is which run."""
    lines = []
    for class_, name in names.items():
        mark = element("svg", shape(7, 7, class_, 5), viewBox="0 0 14 14", aria_hidden="true")
        lines.append(element("li", mark, f"{class_}: {name}"))
    return element("ul", *lines, class_="legend")


def spelled(figure: Figure) -> tuple[str, str]:
    """Return a figure and how sure it is, with the digits that mean something beside its standard error."""
    value, sure = figure.texts
    if figure.error is None or not math.isfinite(figure.error) or figure.error <= 0:
        if figure.bound is not None or not math.isfinite(figure.value):
            return value, sure
        return (f"{figure.value:.2%}" if figure.kind.is_share else f"{figure.value:.4g}"), sure
    return figure.kind.text(figure.value, figure.error), figure.kind.text(figure.error, figure.error)


def _page(kind: str, title: str, date: str, sections: Sequence[Element]) -> str:
    style = resources.files("logitloss").joinpath("data", "page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", f"{kind}: {title}"),
        element("style", style),
    )
    links = [
        element("li", element("a", section.findtext("h2"), href=f"#{section.get('id')}"))
        for section in sections
    ]
    body = element(
        "body",
        element(
            "header",
            element("p", f"logitloss · {kind.lower()}", class_="kind"),
            element("h1", title),
            element("p", date, class_="note"),
            element("nav", element("ul", *links), aria_label="Sections"),
        ),
        element("main", *sections),
    )
    return written(element("html", head, body, lang="en"))


def _section(key: str, title: str, *parts: Element) -> Element:
    return element(
        "section", element("h2", title, id=f"{key}-heading"), *parts, id=key, aria_labelledby=f"{key}-heading"
    )


def _headlines(found: list[Figure]) -> Element:
    cards = []
    for figure in found:
        if figure.kind.key in HEADLINES:
            value, sure = spelled(figure)
            about = f"± {sure}" if figure.error is not None else sure or " "
            number = element(
                "dd", value, element("small", about), data_key=figure.kind.key, data_value=figure.value
            )
            cards.append(element("div", element("dt", figure.kind.label), number))
    return element("dl", *cards, class_="headlines")


def _pictures(documents: Sequence[Document]) -> Element:
    drawn = [picture(documents) for picture in (reliability, loss_histogram, accuracy_by_rank)]
    return element("div", *(one for one in drawn if one is not None), class_="pictures")


def _classes(document: Document) -> list[Element]:
    if document["loss"] != "ce":
        return []
    if "per_class" not in document:
        note = "With --per-class this page shows the classes that cost most, and which are taken for which."
        return [_section("classes", "Classes", element("p", note, class_="note"))]
    parts = [costly_classes(document["per_class"])]
    if "confusions" not in document:
        parts.append(
            element("p", "Pairs are counted of up to 1024 classes, and here are more.", class_="note")
        )
    elif not document["confusions"]:
        parts.append(element("p", "No label was taken for another.", class_="note"))
    else:
        parts.append(confusions(document["confusions"]))
    return [_section("classes", "Classes", element("div", *parts, class_="pictures"))]


def _groups(document: Document) -> list[Element]:
    groups = document.get("groups")
    if not groups:
        return []
    wanted = ("nll_nats", "perplexity", "accuracy", "brier", "expected_calibration_error")
    lines = []
    for group in groups[:MOST_LINES]:
        found = {figure.kind.key: spelled(figure) for figure in figures(group)}
        cells = [" ± ".join(filter(None, found[key])) if key in found else "" for key in wanted]
        lines.append([str(group["group"]), f"{group['count']:,}", *cells])
    head = ["group", "labels", "nats", "perplexity", "accuracy", "Brier", "calibration error"]
    parts = [table(head, lines, class_="numbers")]
    if len(groups) > MOST_LINES:
        note = f"The first {MOST_LINES} of {len(groups):,} groups; the JSON of --json has all."
        parts.append(element("p", note, class_="note"))
    return [_section("groups", "Groups", *parts)]


def _counts(documents: Sequence[Document]) -> list[Element]:
    names = {label: None for document in documents for label, _ in counts(document)}
    columns = [dict(counts(document)) for document in documents]
    lines = [[name, *(f"{column.get(name, 0):,}" for column in columns)] for name in names]
    parts = [table(["", *_heads(documents, "number")], lines, class_="numbers")]
    for document in documents:
        parts += _warnings(document) if len(documents) > 1 else []
        skipped = document.get("skipped")
        if skipped:
            lines = [[one["file"], one["reason"]] for one in skipped]
            title = element("h3", f"Shards skipped, of which no row counts: {len(skipped):,}")
            parts += [title, table(["file", "reason"], lines)]
        elif skipped is not None:
            parts.append(element("p", "No shard was skipped.", class_="note"))
    return parts


def _warnings(document: Document) -> list[Element]:
    """Return what makes the figures doubtful."""
    return [element("p", f"Warning: {line}", class_="warning") for line in document.get("warnings", ())]


def _heads(documents: Sequence[Document], alone: str) -> list[str]:
    return [alone] if len(documents) == 1 else list(CLASSES)


def _provenance(document: Document) -> Element:
    run = document["run"]
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    options = ", ".join(f"{name} {value}" for name, value in run.get("options", {}).items())
    facts = {
        "date": run.get("date"),
        "options": options,
        "backend": run.get("backend"),
        "instruction set": run.get("instruction_set") or "that of the backend",
        "threads": run.get("threads"),
        "seconds": f"{document['seconds']:.3g}",
        "rows/s": f"{document['rows_per_second']:,.0f}",
        "GB/s": f"{document['gigabytes_per_second']:.3g}",
        "versions": versions,
        "system": run.get("system"),
    }
    inputs = run.get("inputs", [])
    lines = [
        [one["file"], one["role"], ", ".join(map(str, one["shape"])), one["dtype"], one["fingerprint"]]
        for one in inputs[:MOST_LINES]
    ]
    pairs = [part for name, fact in facts.items() for part in (element("dt", name), element("dd", str(fact)))]
    more = None
    if len(inputs) > MOST_LINES:
        more = element(
            "p", f"The first {MOST_LINES} of {len(inputs):,}; the JSON of --json has all.", class_="note"
        )
    head = ["input", "role", "shape", "type", "fingerprint"]
    return element("div", element("dl", *pairs, class_="facts"), table(head, lines), more)
