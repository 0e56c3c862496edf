"""Pictures of an evaluation for matplotlib: each draws `Metrics` on an `Axes`, and returns it.

matplotlib is imported when the first one is drawn (`pip install 'logitloss[plot]'`). A page of `--report`
is drawn in `pictures`.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING

from logitloss.evaluate.histogram import bars
from logitloss.evaluate.metrics import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reliability_diagram(metrics: Metrics, ax: Axes | None = None) -> Axes:
    """Draw how often probabilities come true over what they say: a point for each bin that holds something.

    Parameters
    ----------
    metrics : Metrics
        Of classes (the largest probability, and the accuracy) or of binary labels (probability, and label).
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default one of a new figure of pyplot.

    Returns
    -------
    matplotlib.axes.Axes
        With a curve of points, and the diagonal. A point's area grows with the share of labels in its bin.

    Raises
    ------
    ValueError
        The metrics have no calibration, as of `VocabularyShards`.
    ImportError
        matplotlib is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import evaluate
    >>> from logitloss.evaluate.plot import reliability_diagram
    >>> metrics = evaluate(np.log([[1.0, 3.0], [1.0, 3.0]]), np.array([0, 1])).compute()
    >>> ax = reliability_diagram(metrics)
    >>> ax.lines[1].get_xydata().round(6).tolist()
    [[0.75, 0.5]]
    """
    probabilities = metrics.classes or metrics.binary
    if probabilities is None:
        raise ValueError("metrics have no calibration: their rows came without figures")
    ax = _axes(ax)
    bins = probabilities.calibration
    x, y = ([line[key] for line in bins] for key in ("probability", "outcome"))
    ax.plot([0, 1], [0, 1], "--", color="0.5", linewidth=1, label="calibrated")
    (curve,) = ax.plot(x, y, linewidth=1)
    sizes = [15 + 300 * line["count"] / metrics.count for line in bins]
    ax.scatter(x, y, sizes, color=curve.get_color(), alpha=0.6, label="bins")
    is_binary = metrics.binary is not None
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="predicted probability" if is_binary else "confidence",
        ylabel="mean label" if is_binary else "accuracy",
        title="Reliability",
    )
    return ax


def nll_histogram(metrics: Metrics, ax: Axes | None = None) -> Axes:
    """Draw how the loss is spread over labels: bars whose area is the share of labels, on a log scale.

    Parameters
    ----------
    metrics : Metrics
        Of either loss.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default one of a new figure of pyplot.

    Returns
    -------
    matplotlib.axes.Axes
        With a bar for each bin that holds something, as high as its share of the labels by each doubling of
        the loss; what is below 2**-20 nats, or from 2**10 on, is drawn a doubling wide.

    Raises
    ------
    ImportError
        matplotlib is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import evaluate
    >>> from logitloss.evaluate.plot import nll_histogram
    >>> ax = nll_histogram(evaluate(np.zeros((8, 4)), np.arange(8) % 4).compute())
    >>> [(float(bar.get_x()), float(bar.get_width())) for bar in ax.patches]
    [(1.25, 0.25)]
    """
    ax = _axes(ax)
    drawn = bars(metrics.nll_histogram, metrics.count)
    starts, widths = [bar.start for bar in drawn], [bar.end - bar.start for bar in drawn]
    ax.bar(starts, [bar.height for bar in drawn], widths, align="edge")
    if drawn and math.isfinite(metrics.nll_nats):
        ax.axvline(metrics.nll_nats, linestyle="--", color="0.3", linewidth=1, label="mean")
    ax.set(xscale="log", xlabel="loss of a label, nats", ylabel="share of labels, each doubling")
    ax.set_title("Negative log-likelihood")
    return ax


def accuracy_by_rank(metrics: Metrics, ax: Axes | None = None) -> Axes:
    """Draw the share of labels that are among the k largest logits, over k.

    Parameters
    ----------
    metrics : Metrics
        Of classes.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default one of a new figure of pyplot.

    Returns
    -------
    matplotlib.axes.Axes
        With a curve from k = 1 up to the number of classes, or 100.

    Raises
    ------
    ValueError
        The metrics have no ranks: those of binary labels.
    ImportError
        matplotlib is missing.

    Examples
    --------
    >>> import numpy as np
    >>> from logitloss.evaluate import evaluate
    >>> from logitloss.evaluate.plot import accuracy_by_rank
    >>> ax = accuracy_by_rank(evaluate(np.zeros((4, 4)), np.arange(4)).compute())
    >>> [float(share) for share in ax.lines[0].get_ydata()]
    [0.25, 0.5, 0.75, 1.0]
    """
    if metrics.classes is None:
        raise ValueError("metrics have no ranks: they are not of classes, or their rows came without figures")
    ax = _axes(ax)
    shares = metrics.classes.accuracy_by_rank
    ax.plot(range(1, len(shares) + 1), shares, marker=".")
    ax.set(xlabel="k", ylabel="label among the k largest logits", title="Accuracy by rank")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        what = f"drawing needs matplotlib ({error}): pip install 'logitloss[plot]'"
        raise ImportError(what) from None
    made: Axes = pyplot.subplots(layout="constrained")[1]
    return made
