"""Draw loss_curve.svg, README's picture of the loss against the logit: `python .readme/loss_curve.py`.

The curves are what the package computes. The picture has no background and middle tones only, so that it
reads on a light page and on a dark one.
"""

from pathlib import Path

import numpy as np

from logitloss import binary_cross_entropy_with_logits

PICTURE = Path(__file__).with_name("loss_curve.svg")
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 60, 20, 20, 50
LOGITS, LOSSES = (-6.0, 6.0), (0.0, 6.0)
GREY, BLUE, ORANGE = "#767b81", "#2f81f7", "#d4660a"


def x_at(logit: float) -> float:
    """Return where a logit stands, in pixels."""
    return LEFT + (logit - LOGITS[0]) / (LOGITS[1] - LOGITS[0]) * (WIDTH - LEFT - RIGHT)


def y_at(loss: float) -> float:
    """Return where a loss stands, in pixels."""
    return HEIGHT - BOTTOM - (loss - LOSSES[0]) / (LOSSES[1] - LOSSES[0]) * (HEIGHT - TOP - BOTTOM)


def line(x1: float, y1: float, x2: float, y2: float, style: str = "") -> str:
    """Return a grey line."""
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{GREY}" {style}/>'


def text(x: float, y: float, words: str, anchor: str = "middle", color: str = GREY, more: str = "") -> str:
    """Return words at a point."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{more}>{words}</text>'


def curve(label: float, color: str) -> str:
    """Return the loss of one label over the range of logits."""
    logits = np.linspace(*LOGITS, 121)
    losses = binary_cross_entropy_with_logits(logits, np.full_like(logits, label), reduction="none")
    points = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(logits, losses, strict=True))
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="3"/>'


def draw() -> str:
    """Return the whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="14" role="img">',
        "<title>Binary cross-entropy against the logit</title>",
        "<desc>With label 1 the loss falls from 6 at a logit of -6, first in a straight line, through log 2 "
        "at 0, to nearly 0 at 6. With label 0 it is the mirror image.</desc>",
        line(x_at(LOGITS[0]), y_at(0), x_at(LOGITS[1]), y_at(0)),
        line(x_at(LOGITS[0]), y_at(0), x_at(LOGITS[0]), y_at(LOSSES[1])),
        line(x_at(0), y_at(0), x_at(0), y_at(1.5), 'stroke-dasharray="3 4" opacity="0.6"'),
    ]
    parts += [
        text(x_at(x), y_at(0) + 20, f"{x:+d}".replace("-", "\u2212") if x else "0") for x in range(-6, 7, 2)
    ]
    parts += [text(x_at(LOGITS[0]) - 10, y_at(loss) + 5, str(loss), "end") for loss in range(0, 7, 2)]
    middle = (y_at(LOSSES[0]) + y_at(LOSSES[1])) / 2
    parts += [
        text((x_at(LOGITS[0]) + x_at(LOGITS[1])) / 2, HEIGHT - 8, "logit x"),
        text(18, middle, "loss, nats", more=f' transform="rotate(-90 18 {middle:.1f})"'),
        curve(1.0, BLUE),
        curve(0.0, ORANGE),
        text(x_at(-3.6), y_at(4.6), "label 1: log(1 + e\u207b\u02e3)", "start", BLUE),
        text(x_at(3.6), y_at(4.6), "label 0: log(1 + e\u02e3)", "end", ORANGE),
        f'<circle cx="{x_at(0):.1f}" cy="{y_at(np.log(2)):.1f}" r="4.5" fill="{GREY}"/>',
        text(x_at(0), y_at(1.7), "log 2: no idea"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
