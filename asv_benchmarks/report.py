"""What peers.py found, from the JSON it saves: the table, README's figures and README's chart.

A figure is the median over the runs; in a run, the median of the ratios within a round. Of each round there
are the times of a few turns. The limit is the fastest of its manners, or of those that pass over memory in
order.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

ROOT = Path(__file__).parent.parent
README, CHART = ROOT / "README.md", ROOT / ".readme" / "speed.svg"
MARKS = "<!-- figures -->", "<!-- end of figures -->"
OURS, LIMIT, LIMIT_OF_ONE = "logitloss", "limit", "limit of one thread"
TITLES = {
    "torch.compile": "torch.compile",
    "torch": "PyTorch eager",
    "optax": "JAX, optax",
    "numpy": "NumPy",
    "scipy": "SciPy",
    "scikit-learn": "scikit-learn",
    f"{OURS}, new array": "itself, new array",
}
STREAMS = "streams"
ONE_THREAD, ONE_THREAD_FLOOR = f"{OURS}, one thread", 0.6
AVX2, AVX2_FLOOR = f"{OURS}, AVX2", 0.7
# Of the default backend's speed, for a value and with its gradient (and for an activation, written like one)
NUMBA, NUMBA_FLOORS = f"{OURS}, Numba", (0.85, 0.7)
# Of the value's speed, with every figure of each row beside it
FIGURES, FIGURES_FLOOR = f"{OURS}, figures", 0.8


@dataclass
class Figures:
    """Of one work: milliseconds, and ratios of which more is better (None where there are none)."""

    name: str
    floor: float
    limit_ms: float
    ms: dict[str, float]
    share: dict[str, float]
    factor: dict[str, float]
    one_thread: float | None
    avx2: float | None
    numba: float | None
    with_figures: float | None
    missed: list[str]


def figures(work, in_order=False):
    """Return the figures of one work of the JSON."""
    runs = work["runs"]
    names = [name for name in runs[0] if not name.startswith(LIMIT)]

    def limit(run, of):
        manners = [
            times
            for name, times in run.items()
            if name.startswith(of + ", ") and not (in_order and STREAMS in name)
        ]
        return min(manners, key=typical)

    def over(above, below):
        return median(paired(above(run), below(run)) for run in runs)

    share = {name: over(lambda r: limit(r, LIMIT), lambda r, name=name: r[name]) for name in names}
    factor = {name: over(lambda r, name=name: r[name], lambda r: r[OURS]) for name in names if name != OURS}
    one = avx2 = numba = with_figures = None
    if ONE_THREAD in names:
        one = over(lambda r: limit(r, LIMIT_OF_ONE), lambda r: r[ONE_THREAD]) / share[OURS]
    if AVX2 in names:
        avx2 = 1 / factor[AVX2]
    if NUMBA in names:
        numba = 1 / factor[NUMBA]
    if FIGURES in names:
        with_figures = 1 / factor[FIGURES]
    reached = [("limit", share[OURS], work["floor"])]
    reached += [(TITLES[p], factor[p], need) for p, need in work["factors"].items() if p in factor]
    reached += [("one thread", one, ONE_THREAD_FLOOR)] if one else []
    reached += [("AVX2", avx2, AVX2_FLOOR)] if avx2 else []
    reached += [("Numba", numba, NUMBA_FLOORS[work["writes"]])] if numba else []
    reached += [("figures", with_figures, FIGURES_FLOOR)] if with_figures else []
    return Figures(
        name=work["name"],
        floor=work["floor"],
        limit_ms=1000 * median(typical(limit(run, LIMIT)) for run in runs),
        ms={name: 1000 * median(typical(run[name]) for run in runs) for name in names},
        share=share,
        factor=factor,
        one_thread=one,
        avx2=avx2,
        numba=numba,
        with_figures=with_figures,
        missed=[name for name, figure, need in reached if figure < need],
    )


def typical(rounds):
    """Return the median of the rounds' fastest turns."""
    return median(map(min, rounds))


def paired(above, below):
    """Return the median ratio within a round, of the fastest of as many turns.

    A slow one took part in the first rounds alone, and in few turns of these.
    """
    ratios = []
    for a, b in zip(above, below, strict=False):
        n = min(len(a), len(b))
        ratios.append(min(a[:n]) / min(b[:n]))
    return median(ratios)


def checked(check):
    """Return a check's figure, its bound if it has one, and whether it is kept."""
    figure = median(run[0] for run in check["runs"])
    bounds = [run[1] for run in check["runs"] if run[1] is not None]
    bound = median(bounds) if bounds else None
    return figure, bound, bound is None or figure <= bound


def tables(results, in_order=False):
    """Return the tables for a terminal."""
    found = [figures(work, in_order) for work in results["works"]]
    peers = [name for name in TITLES if any(name in f.factor for f in found)]
    works = Table(title="times of the limit and of logitloss; how much faster it is than others")
    works.add_column("work")
    ours = ("limit ms", "ms", "of limit", "floor", "1 thread", "AVX2", "Numba", "figures")
    for heading in (*ours, *map(TITLES.get, peers)):
        works.add_column(heading, justify="right")
    works.add_column("missed")
    for f in found:
        works.add_row(
            f.name,
            milliseconds(f.limit_ms),
            milliseconds(f.ms[OURS]),
            f"{f.share[OURS]:.2f}",
            f"{f.floor:.2f}",
            *(
                "" if ratio is None else f"{ratio:.2f}"
                for ratio in (f.one_thread, f.avx2, f.numba, f.with_figures)
            ),
            *(times(f.factor.get(peer)) for peer in peers),
            ", ".join(f.missed),
        )
    others = Table("check", "work", title="and")
    for heading in ("figure", "bound"):
        others.add_column(heading, justify="right")
    others.add_column("missed")
    for check in results["checks"]:
        figure, bound, kept = checked(check)
        shown = "" if bound is None else f"{bound:.2f}"
        others.add_row(check["group"], check["name"], f"{figure:.2f}", shown, "" if kept else "missed")
    return [table for table in (works, others) if table.row_count]


def markdown(results, in_order=False):
    """Return README's figures: the machine, the chart, a line for each work, the worst of each check."""
    found = [figures(work, in_order) for work in results["works"]]
    peers = [name for name in TITLES if not name.startswith(OURS) and any(name in f.factor for f in found)]
    repeats = results["repeats"]
    runs = "one run" if repeats == 1 else f"each of {repeats} runs"
    lines = [
        f"Medians of {results['rounds']} rounds in {runs} (what takes long has one turn or two in all); "
        + "; ".join(f"{name}: {value}" for name, value in results["machine"].items())
        + ".",
        "",
        f"![Speed of each library as a share of the memory limit's](.readme/{CHART.name})",
        "",
        "float32 but where named; the time of the memory limit and of logitloss, its share of the limit's "
        "speed; of its own speed, the Numba backend's share and the share where every figure of each row is "
        "told beside the value; and how many times faster it is than others:",
        "",
        row("work", "limit, ms", "logitloss, ms", "share", "Numba", "figures", *map(TITLES.get, peers)),
        row("---", *["---:"] * (5 + len(peers))),
    ]
    for f in found:
        beside = ("" if ratio is None else f"{ratio:.2f}" for ratio in (f.numba, f.with_figures))
        cells = (milliseconds(f.limit_ms), milliseconds(f.ms[OURS]), f"{f.share[OURS]:.2f}", *beside)
        lines.append(row(f.name, *cells, *(times(f.factor.get(peer)) for peer in peers)))
    worst = {}
    for name, ratios in (
        ("one thread's share of its limit over all threads'", [f.one_thread for f in found]),
        ("AVX2's speed over AVX-512's", [f.avx2 for f in found]),
    ):
        known = [ratio for ratio in ratios if ratio is not None]
        worst |= {name: f"{min(known):.2f}"} if known else {}
    for check in results["checks"]:
        figure, bound, _ = checked(check)
        if "PyTorch" in check["group"]:
            beside = "" if bound is None else f" ({bound:.1f})"
            worst[f"{check['name']}, {check['group']}"] = f"{figure:.1f}{beside}"
        else:
            worst[check["group"]] = f"{max(figure, float(worst.get(check['group'], 0))):.2f}"
    if worst:
        lines += ["", row("the worst over the works", "figure"), row("---", "---:")]
        lines += [row(name, value) for name, value in worst.items()]
    return "\n".join(lines)


def write_readme(results, in_order=False):
    """Put the figures into README, between the marks, and draw the chart it shows."""
    text = README.read_text(encoding="utf-8")
    between = re.compile(f"({MARKS[0]}\n).*(\n{MARKS[1]})", re.DOTALL)
    if not between.search(text):
        raise ValueError(f"README.md lacks {MARKS[0]} or {MARKS[1]}")
    figures_text = markdown(results, in_order)
    README.write_text(between.sub(lambda m: m[1] + figures_text + m[2], text), encoding="utf-8")
    CHART.write_text(chart(results, in_order), encoding="utf-8")


def row(*cells):
    return f"| {' | '.join(cells)} |"


def milliseconds(ms):
    return f"{ms:.1f}" if ms < 10 else f"{ms:.0f}"


def times(factor):
    return "" if factor is None else f"{factor:.1f}x" if factor < 10 else f"{factor:.0f}x"


# The chart: a bar is a share of the limit's speed, so that one line is the limit of all works. No background,
# and middle tones only, so that it reads on a light page and on a dark one.
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 640, 110, 70, 34, 12
BAR, PITCH, HEADING, GAP = 9, 14, 18, 10
GREY, BLUE, ORANGE = "#767b81", "#2f81f7", "#d4660a"
FULL = WIDTH - LEFT - RIGHT


def chart(results, in_order=False):
    """Return the SVG of the works that are marked for it."""
    found = [figures(work, in_order) for work in results["works"] if work["chart"]]
    parts, told, y = [], [], TOP
    for f in found:
        parts.append(text(8, y + 12, f"{f.name}: {milliseconds(f.limit_ms)} ms at the limit", "start"))
        y += HEADING
        shown = [name for name in (OURS, *TITLES) if name in f.share and not name.startswith(f"{OURS},")]
        for name in shown:
            color = BLUE if name == OURS else GREY
            length = FULL * min(f.share[name], 1)
            parts += [
                text(LEFT - 6, y + BAR, TITLES.get(name, name), "end", color),
                f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>',
                text(LEFT + length + 5, y + BAR, f"{milliseconds(f.ms[name])} ms", "start", color),
            ]
            y += PITCH
        told.append(f"{f.name}: " + ", ".join(f"{n} {f.share[n]:.2f}" for n in shown))
        y += GAP
    height = y - GAP + BOTTOM
    limit = LEFT + FULL
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" font-family="sans-serif" font-size="12" role="img">',
            "<title>Speed of each library as a share of the memory limit's</title>",
            f"<desc>{'. '.join(told)}.</desc>",
            *parts,
            f'<path d="M{limit} {TOP - 10}L{limit} {height - BOTTOM}" stroke="{ORANGE}" stroke-width="2"/>',
            text(limit, TOP - 16, "the memory limit", "middle", ORANGE),
            "</svg>\n",
        ]
    )


def text(x, y, words, anchor, color=GREY):
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="{color}">{words}</text>'
