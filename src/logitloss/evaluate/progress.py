"""A bar on stderr while an evaluation runs: rows done, speed and time left."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from logitloss.evaluate.stream import Progress


class _SpeedColumn(ProgressColumn):
    """Rows and 10**9 bytes a second over the last half minute."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("- rows/s")
        gigabytes = task.speed * task.fields["row_bytes"] / 1e9
        return Text(f"{task.speed:,.0f} rows/s, {gigabytes:.2f} GB/s")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show a bar on stderr, gone when done; nothing at all where stderr is no terminal."""
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("rows"),
        _SpeedColumn(),
        TimeRemainingColumn(),
    )
    hidden = sys.stderr is None or not sys.stderr.isatty()
    with Bar(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("rows", total=None, row_bytes=0.0)
        start: int | None = None

        def show(done: int, n_rows: int, n_bytes: int) -> None:
            nonlocal start
            start = done if start is None else start
            row_bytes = n_bytes / max(1, done - start)
            bar.update(task, completed=done, total=n_rows, row_bytes=row_bytes)

        yield show
