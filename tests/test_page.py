"""The pages of `--report` as a browser shows them: what is drawn against the JSON of the same run.

Geometry is measured in the page. What needs no browser is in `test_page_text.py`.
"""

import json
import os
import re

import browser
import numpy as np
import pytest
from command import printed

import logitloss

EVIL = '<b onmouseover="x">&amp;'
SCHEMES = ("light", "dark")
PAGES = ("classes", "binary", "comparison")
# Of each mark its numbers, and its box in the units of the drawing
MARKS = """[...document.querySelectorAll("SELECTOR")].map(mark => {
  const {x, y, width, height} = mark.getBBox();
  return {...mark.dataset, x, y, width, height};
})"""
DATA = """[...document.querySelectorAll("SELECTOR")].map(mark => ({...mark.dataset}))"""
# Contrast as WCAG 2 has it: of text with the ground it is on, and of marks with that
CONTRAST = """(() => {
  const channels = colour => colour.match(/[\\d.]+/g).map(Number);
  const luminance = colour => channels(colour).slice(0, 3)
    .map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const ratio = (colour, element) => {
    const [low, high] = [luminance(colour), luminance(ground(element))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  document.querySelectorAll("details").forEach(details => details.open = true);
  const found = {text: [], mark: []};
  for (const element of document.body.querySelectorAll("*")) {
    const style = getComputedStyle(element);
    const owns = [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    if (owns && element.tagName != "title")
      found.text.push(ratio(element.tagName == "text" ? style.fill : style.color, element));
    if (element.matches(".bar, .point, .curve, .ideal, .mean, .axis"))
      found.mark.push(ratio(style.fill == "none" ? style.stroke : style.fill, element));
  }
  return found;
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write pages, and return their paths and the JSON of the same runs."""
    folder = tmp_path_factory.mktemp("pages") / EVIL
    (folder / "x").mkdir(parents=True)
    (folder / "y").mkdir()
    (folder / "keys").mkdir()
    rng = np.random.default_rng(3)
    for number in range(3):
        labels = rng.integers(0, 12, 400)
        logits = 2 * rng.standard_normal((400, 12)).astype(np.float32)
        logits[np.arange(400), labels] += 3 * rng.standard_normal(400) + 3
        labels[::50] = -100
        np.save(folder / "x" / f"{number}.npy", logits)
        np.save(folder / "y" / f"{number}.npy", labels)
        np.save(folder / "keys" / f"{number}.npy", np.array([EVIL, "plain"])[rng.integers(0, 2, 400)])
        np.save(folder / f"other{number}.npy", logits + rng.standard_normal(logits.shape))
    with open(folder / "x" / "2.npy", "r+b") as file:
        file.truncate(300)
    documents = {}
    options = ["--on-error", "skip", "--backend", "reference", "--json"]
    shards = [folder / "x", folder / "y", "--group-by", folder / "keys", "--per-class"]
    documents["classes"] = json.loads(printed("eval", *shards, *options, "--report", folder / "classes.html"))
    np.save(folder / "odd.npy", 4 * rng.standard_normal(20_000))
    odds = np.load(folder / "odd.npy") + 3 * rng.logistic(size=20_000) > 0
    np.save(folder / "is_odd.npy", odds)
    paths = [folder / "odd.npy", folder / "is_odd.npy", "--loss", "bce"]
    documents["binary"] = json.loads(printed("eval", *paths, *options, "--report", folder / "binary.html"))
    for name, logits in (("a", folder / "x" / "0.npy"), ("b", folder / "other0.npy")):
        rows = ["--per-row", folder / f"{name}-rows.npy"]
        (folder / f"{name}.json").write_text(printed("eval", logits, folder / "y" / "0.npy", *options, *rows))
    files = [folder / "a.json", folder / "b.json"]
    compared = printed("compare", *files, "--json", "--report", folder / "comparison.html")
    documents["comparison"] = json.loads(compared) | {"documents": [json.loads(p.read_text()) for p in files]}
    return {name: (folder / f"{name}.html", documents[name]) for name in PAGES}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """Start a browser."""
    if browser.CHROMIUM is None:
        reason = "the page cannot be shown without Chromium"
        (pytest.fail if "LOGITLOSS_REQUIRE_DASHBOARD" in os.environ else pytest.skip)(reason)
    started = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


def marks(tab, selector):
    found = tab.value(MARKS.replace("SELECTOR", selector))
    return [{name: float(x) if name != "name" else x for name, x in mark.items()} for mark in found]


def column(lines, name):
    return np.array([float(line[name]) for line in lines])


def centres(found):
    return column(found, "x") + column(found, "width") / 2, column(found, "y") + column(found, "height") / 2


PLACE = {"atol": 0.02}  # two digits are written


# ---- what is drawn ----


@pytest.mark.parametrize("name", ["classes", "binary"])
def test_reliability(pages, tab, name):
    path, document = pages[name]
    tab.show(path)
    bins, points = document["calibration"], marks(tab, "#reliability .point")
    np.testing.assert_array_equal(column(points, "count"), column(bins, "count"))
    (ideal,) = marks(tab, "#reliability .ideal")
    across, down = centres(points)
    np.testing.assert_allclose(across, ideal["x"] + ideal["width"] * column(bins, "probability"), **PLACE)
    np.testing.assert_allclose(down, ideal["y"] + ideal["height"] * (1 - column(bins, "outcome")), **PLACE)
    bars = marks(tab, "#reliability .bar")
    heights = column(bars, "height") / max(column(bars, "height"))
    np.testing.assert_allclose(heights, column(bins, "count") / max(column(bins, "count")), atol=3e-4)
    np.testing.assert_allclose(column(bars, "x"), ideal["x"] + ideal["width"] * column(bins, "low"), **PLACE)


@pytest.mark.parametrize("name", ["classes", "binary"])
def test_histogram(pages, tab, name):
    """Few labels have a bar for each power of two, many for each bin."""
    path, document = pages[name]
    tab.show(path)
    bins, bars = document["nll_histogram"], marks(tab, "#nll-histogram .bar")
    if document["count"] >= 10_000:
        assert len(bars) == len(bins) > 20
    else:
        assert len(bars) < len(bins)
    low, high = column(bars, "low"), column(bars, "high")
    counts = [
        sum(one["count"] for one in bins if first <= one["low"] < last)
        for first, last in zip(low, high, strict=True)
    ]
    assert column(bars, "count").tolist() == counts
    assert sum(counts) == document["count"]
    low[low == 0] = high[low == 0] / 2
    doublings = np.log2(high / low)
    width = column(bars, "width")
    unit = (bars[-1]["x"] + width[-1] - bars[0]["x"]) / np.log2(high[-1] / low[0])
    np.testing.assert_allclose(width, unit * doublings, **PLACE)
    np.testing.assert_allclose(column(bars, "x") - bars[0]["x"], unit * np.log2(low / low[0]), **PLACE)
    area = column(bars, "height") * doublings
    np.testing.assert_allclose(area / area.sum(), np.array(counts) / sum(counts), atol=1e-4)
    (mean,) = marks(tab, "#nll-histogram .mean")
    place = bars[0]["x"] + unit * np.log2(document["nll_nats"] / low[0])
    assert mean["x"] == pytest.approx(place, abs=0.1)


def test_accuracy_by_rank(pages, tab):
    path, document = pages["classes"]
    tab.show(path)
    points, shares = marks(tab, "#accuracy-by-rank .point"), document["accuracy_by_rank"]
    assert len(points) == 12
    assert [
        float(point["y"]) for point in tab.value(DATA.replace("SELECTOR", "#accuracy-by-rank .point"))
    ] == shares
    across, down = centres(points)
    np.testing.assert_allclose(np.diff(across), np.diff(across)[0], **PLACE)
    fit = np.polyfit(shares, down, 1)
    np.testing.assert_allclose(np.polyval(fit, shares), down, **PLACE)
    assert fit[0] < 0


def test_classes_and_confusions(pages, tab):
    path, document = pages["classes"]
    tab.show(path)
    costs = {f"class {line['class']}": line["count"] * line["nll_nats"] for line in document["per_class"]}
    total = sum(costs.values())
    bars = marks(tab, "#costly-classes .bar")
    assert [bar["name"] for bar in bars] == sorted(costs, key=lambda name: -costs[name])[:10]
    np.testing.assert_allclose(
        column(bars, "value"), [costs[bar["name"]] / total for bar in bars], rtol=1e-12
    )
    pairs, confused = document["confusions"][:10], marks(tab, "#confusions .bar")
    assert column(confused, "value").tolist() == [pair["count"] for pair in pairs]
    assert [bar["name"] for bar in confused] == [f"{pair['label']} as {pair['predicted']}" for pair in pairs]
    for found in (bars, confused):
        width, value = column(found, "width"), column(found, "value")
        np.testing.assert_allclose(width / width[0], value / value[0], atol=3e-4)


def test_figures_counts_groups_and_provenance(pages, tab):
    path, document = pages["classes"]
    tab.show(path)
    headlines = tab.value(DATA.replace("SELECTOR", ".headlines dd"))
    assert [one["key"] for one in headlines] == [
        "nll_nats", "perplexity", "accuracy", "brier", "expected_calibration_error",
    ]  # fmt: skip
    for one in headlines:
        assert float(one["value"]) == document[one["key"]]
    lines = rows_of(tab, "#figures")
    value, error = (float(cell) for cell in lines["negative log-likelihood, nats"])
    assert error == pytest.approx(document["nll_nats_standard_error"], rel=0.05)
    assert value == pytest.approx(document["nll_nats"], abs=error / 20)
    assert float(lines["accuracy"][0].rstrip("%")) == pytest.approx(100 * document["accuracy"], abs=0.06)
    counts = rows_of(tab, "#counts")
    assert (document["count"], document["ignored"]) == (784, 16)
    assert counts["labels counted"] == ["784"]
    assert counts["labels ignored"] == ["16"]
    (skipped,) = document["skipped"]
    assert rows_of(tab, "#counts")[skipped["file"]] == [skipped["reason"]]
    groups = rows_of(tab, "#groups")
    assert set(groups) == {EVIL, "plain"}
    for group in document["groups"]:
        assert groups[group["group"]][0] == str(group["count"])
    text = tab.value("document.querySelector('#provenance').innerText")
    run_of = document["run"]
    assert run_of["backend"] == "reference"
    wanted = [run_of["date"], run_of["system"], f"logitloss {logitloss.__version__}", "on_error skip"]
    wanted += [one["fingerprint"] for one in run_of["inputs"]]
    assert len(run_of["inputs"]) == 6
    for words in wanted:
        assert words in text


def rows_of(tab, selector):
    """Return the lines of the tables in a part of the page, by their first cells."""
    script = f"""[...document.querySelectorAll("{selector} tbody tr")].map(
      line => [...line.children].map(cell => cell.textContent))"""
    return {name: cells for name, *cells in tab.value(script)}


def test_a_comparison_draws_both(pages, tab):
    path, document = pages["comparison"]
    tab.show(path)
    for class_, of_run in zip("ab", document["documents"], strict=True):
        (ideal,) = marks(tab, "#reliability .ideal")
        points = marks(tab, f"#reliability .point.{class_}")
        across, down = centres(points)
        bins = of_run["calibration"]
        np.testing.assert_allclose(across, ideal["x"] + ideal["width"] * column(bins, "probability"), **PLACE)
        np.testing.assert_allclose(
            down, ideal["y"] + ideal["height"] * (1 - column(bins, "outcome")), **PLACE
        )
        drawn = column(marks(tab, f"#nll-histogram .bar.{class_}"), "count")
        assert drawn.sum() == of_run["count"]
        ranks = tab.value(DATA.replace("SELECTOR", f"#accuracy-by-rank .point.{class_}"))
        assert [float(point["y"]) for point in ranks] == of_run["accuracy_by_rank"]
    assert tab.value("document.querySelector('#reliability .point.a').tagName") == "circle"
    assert tab.value("document.querySelector('#reliability .point.b').tagName") == "rect"
    lines = rows_of(tab, "#figures")
    (nll,) = (one for one in document["differences"] if one["figure"] == "nll_nats")
    assert nll["method"] == "paired"
    *numbers, interval, verdict = lines["negative log-likelihood, nats"]
    assert verdict == nll["verdict"]
    within = pytest.approx(
        [nll[name] for name in ("a", "b", "difference", "low", "high")], abs=nll["standard_error"]
    )
    assert [float(number) for number in [*numbers, *interval.split(" to ")]] == within


# ---- who reads it, and where ----


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_asked_of_a_network_and_nothing_runs(pages, tab, name):
    path, _ = pages[name]
    events = tab.show(path)
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [path.as_uri()]
    assert not [e for e in events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert (
        tab.value("document.querySelectorAll('script, img, iframe, link, object, [onmouseover]').length") == 0
    )
    assert tab.value("document.querySelectorAll('b').length") == 0
    assert EVIL in tab.value("document.body.textContent")


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_scrolls_down_alone(pages, tab, name):
    path, _ = pages[name]
    tab.show(path, width=360)
    tab.value("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert tab.value("[innerWidth, document.documentElement.scrollWidth <= innerWidth]") == [360, True]
    beyond = """[...document.querySelectorAll("body *")].filter(
      one => !one.closest(".scrolls") && one.getBoundingClientRect().right > innerWidth).length"""
    assert tab.value(beyond) == 0
    size = "Math.min(...[...document.querySelectorAll('figure svg')].map(svg => 12 * svg.clientWidth / 360))"
    assert tab.value(size) > 10  # of text in pictures, in pixels


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PAGES)
def test_contrast(pages, tab, name, scheme):
    path, _ = pages[name]
    tab.show(path, scheme=scheme)
    ground = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 384) == (scheme == "light")
    found = tab.value(CONTRAST)
    assert len(found["text"]) > 100
    assert len(found["mark"]) > 30
    assert min(found["text"]) >= 4.5
    assert min(found["mark"]) >= 3


def test_paper_is_white(pages, tab):
    path, _ = pages["classes"]
    tab.show(path, scheme="dark", media="print")
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value("getComputedStyle(document.querySelector('nav')).display") == "none"


@pytest.mark.parametrize("name", PAGES)
def test_tab_comes_to_every_figure(pages, tab, name):
    path, _ = pages[name]
    tab.show(path)
    order = []
    while not order or order[-1] != "BODY":
        tab.press_tab()
        active = "document.activeElement"
        order.append(tab.value(f"{active}.tagName == 'FIGURE' ? {active}.id : {active}.tagName"))
        outline = tab.value(f"getComputedStyle({active}).outlineStyle")
        assert outline != "none" or order[-1] == "BODY"
        assert len(order) < 200
    figures = tab.value("[...document.querySelectorAll('figure')].map(figure => figure.id)")
    assert figures[:2] == ["reliability", "nll-histogram"]
    assert [stop for stop in order if stop in figures] == figures
    assert order.count("SUMMARY") == len(figures)
    assert order[0] == "A"


@pytest.mark.parametrize("name", PAGES)
def test_what_a_reader_of_no_pictures_is_told(pages, tab, name):
    path, _ = pages[name]
    tab.show(path)
    assert tab.value(
        "[document.documentElement.lang, document.querySelectorAll('main, header, nav').length]"
    ) == ["en", 3]
    assert tab.value("[...document.querySelectorAll('h1, h2, h3')][0].tagName") == "H1"
    names = """[...document.querySelectorAll("figure, section")].map(
      one => document.getElementById(one.getAttribute("aria-labelledby")).textContent)"""
    assert all(tab.value(names))
    assert all(
        tab.value("[...document.querySelectorAll('figure svg')].map(svg => svg.getAttribute('aria-label'))")
    )
    ids = tab.value("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    marked, told = tab.value("""[...document.querySelectorAll("#nll-histogram")].map(
      figure => [figure.querySelectorAll(".bar").length, figure.querySelectorAll("tbody tr").length])[0]""")
    assert marked == told > 5
