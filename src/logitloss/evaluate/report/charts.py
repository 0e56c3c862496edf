"""Charts as inline SVG: a panel has two scales with axes, and marks that carry their numbers.

Every mark has its numbers as `data-` attributes and as a tip, and a table in every figure says them again. It
is drawn 360 units wide, so that text keeps its size on a phone. There may be two series, told apart by colour
and by shape. What is drawn is left to `pictures`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from logitloss.evaluate.report.markup import Element, element, table

WIDTH = 360
LEFT, RIGHT = 46, 350
TICK = 14  # what a line of text takes
# Of the two series, as in the style sheet
CLASSES = ("a", "b")


class Scale(NamedTuple):
    """Where numbers between `low` and `high` lie, from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a number."""
        low, high, here = (math.log(x) if self.is_log else x for x in (self.low, self.high, value))
        share = (here - low) / (high - low)
        return self.start + min(1, max(0, share)) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return round numbers along it, about one for each 50 units; for logarithms powers of ten."""
        if self.is_log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            step = max(1, math.ceil((last - first) / 6))
            factors = (1, 2, 5) if last - first < 3 else (1,)
            tens = (10.0**power for power in range(first, last + 1) if power % step == 0)
            return [
                ten * factor for ten in tens for factor in factors if self.low <= ten * factor <= self.high
            ]
        rough = (self.high - self.low) / max(2, abs(self.end - self.start) / 50)
        unit = 10.0 ** math.floor(math.log10(rough))
        size = unit * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * unit / rough)))
        first, last = math.ceil(self.low / size - 1e-9), math.floor(self.high / size + 1e-9)
        return [number * size for number in range(first, last + 1)]


class Panel:
    """Two scales, their axes, and the marks drawn on them.

    Parameters
    ----------
    x, y : Scale
        Places to the right and down.
    x_title, y_title : str
        What they are, with the unit.
    x_text, y_text : callable
        Make a tick's number text.
    """

    def __init__(
        self,
        x: Scale,
        y: Scale,
        x_title: str,
        y_title: str,
        *,
        x_text: Callable[[float], str] = "{:g}".format,
        y_text: Callable[[float], str] = "{:g}".format,
    ) -> None:
        self.x, self.y = x, y
        self.drawn = element("g", class_="panel")
        for value in y.ticks():
            self._line([(x.start, y.at(value)), (x.end, y.at(value))], "grid")
            self.text(x.start - 6, y.at(value) + 4, y_text(value), "end")
        for value in x.ticks():
            self._line([(x.at(value), y.start), (x.at(value), y.start + 4)], "axis")
            self.text(x.at(value), y.start + 4 + TICK, x_text(value), "middle")
        self._line([(x.start, y.start), (x.end, y.start)], "axis")
        self.text((x.start + x.end) / 2, y.start + 8 + 2 * TICK, x_title, "middle")
        self.text(4, y.end - 9, y_title, "start")

    def text(self, x: float, y: float, words: str, anchor: str) -> None:
        """Write at a place."""
        self.drawn.append(element("text", words, x=_px(x), y=_px(y), text_anchor=anchor))

    def _line(self, places: Sequence[tuple[float, float]], class_: str) -> None:
        points = " ".join(f"{_px(x)},{_px(y)}" for x, y in places)
        self.drawn.append(element("polyline", points=points, class_=class_))

    def line(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        """Join points by a line."""
        self._line([(self.x.at(x), self.y.at(y)) for x, y in points], class_)

    def bar(self, low: float, high: float, value: float, class_: str, tip: str, **data: Any) -> None:
        """Draw a bar between two numbers, as high as a third."""
        left, right, top = self.x.at(low), self.x.at(high), self.y.at(value)
        place = {"x": _px(left), "y": _px(top), "width": _px(right - left), "height": _px(self.y.start - top)}
        self.drawn.append(element("rect", element("title", tip), class_=f"bar {class_}", **place, **data))

    def point(self, x: float, y: float, class_: str, tip: str, size: float = 3.5, **data: Any) -> None:
        """Draw a point."""
        self.drawn.append(shape(self.x.at(x), self.y.at(y), class_, size, element("title", tip), **data))


def shape(x: float, y: float, class_: str, size: float, *tip: Element, **data: Any) -> Element:
    """Return a point: a disc of the first series, a square of the second."""
    if class_ == CLASSES[0]:
        return element("circle", *tip, class_=f"point {class_}", cx=_px(x), cy=_px(y), r=size, **data)
    place = {"x": _px(x - size), "y": _px(y - size), "width": 2 * size, "height": 2 * size}
    return element("rect", *tip, class_=f"point {class_}", **place, **data)


def figure(
    key: str,
    title: str,
    summary: str,
    drawn: Sequence[Element],
    height: float,
    head: list[str],
    rows: list[list[Any]],
) -> Element:
    """Return what is drawn with a title, a sentence about what there is to see, and a table of numbers."""
    drawing = element(
        "svg",
        *drawn,
        viewBox=f"0 0 {WIDTH} {_px(height)}",
        role="img",
        aria_label=f"{title}. {summary}",
    )
    return element(
        "figure",
        element("figcaption", element("h3", title, id=f"{key}-title"), element("p", summary)),
        drawing,
        element("details", element("summary", "The numbers"), table(head, rows)),
        id=key,
        tabindex="0",
        aria_labelledby=f"{key}-title",
    )


def ranked(
    key: str,
    title: str,
    summary: str,
    bars: list[tuple[str, float, str]],
    head: list[str],
    rows: list[list[Any]],
) -> Element:
    """Return bars to the right, each with a name, a length and the text that says it."""
    most = max((length for _, length, _ in bars), default=0)
    x, line = Scale(0, most or 1, 108, RIGHT - 52), 22
    drawn = element("g", class_="panel")
    for number, (name, length, text) in enumerate(bars):
        top = 4 + line * number
        drawn.append(element("text", name, x="100", y=_px(top + 13), text_anchor="end"))
        bar = element(
            "rect",
            element("title", f"{name}: {text}"),
            class_="bar a",
            x=_px(x.start),
            y=_px(top),
            width=_px(x.at(length) - x.start),
            height=_px(line - 6),
            data_name=name,
            data_value=length,
        )
        drawn.append(bar)
        drawn.append(element("text", text, x=_px(x.at(length) + 5), y=_px(top + 13), text_anchor="start"))
    return figure(key, title, summary, [drawn], 8 + line * len(bars), head, rows)


def _px(place: float) -> str:
    return f"{place:.2f}".rstrip("0").rstrip(".")
