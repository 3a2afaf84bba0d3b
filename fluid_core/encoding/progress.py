"""What a running encoding shows: a bar and a live table on a terminal, a line every half minute in the log of a job."""

import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

REDRAW_SECONDS = 0.5
LINE_SECONDS = 30.0
HEADINGS = ("output", "shards", "images", "images/s", "bad", "time left")


class _Row:
    """One output: train or validation."""

    def __init__(self) -> None:
        self.shards = self.all_shards = self.images = self.bad = 0


class EncodingProgress:
    """A context manager. `outputs`: for each shard that is to be encoded, the output that it belongs to."""

    def __init__(self, outputs: list[str], console: Console | None = None):
        self.rows: dict[str, _Row] = {}
        for output in outputs:
            self.rows.setdefault(output, _Row()).all_shards += 1
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, auto_refresh=False)
        self.started = self.drawn = time.monotonic()

    def __enter__(self) -> "EncodingProgress":
        if self.console.is_terminal:
            self.live.start()
            self.live.update(self.view(), refresh=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.live.update(self.view(), refresh=True)
            self.live.stop()
        else:
            self.console.print(self.line(), soft_wrap=True, highlight=False)

    def count(self, output: str, images: int, bad: int, last: bool) -> None:
        """Count a chunk: `bad` of its `images` are quarantined; `last`: its shard is done."""
        row = self.rows[output]
        row.images += images
        row.bad += bad
        row.shards += int(last)
        self._draw()

    def _draw(self) -> None:
        terminal, now = self.console.is_terminal, time.monotonic()
        if now - self.drawn < (REDRAW_SECONDS if terminal else LINE_SECONDS):
            return
        self.drawn = now
        if terminal:
            self.live.update(self.view(), refresh=True)
        else:
            self.console.print(self.line(), soft_wrap=True, highlight=False)

    def cells(self, name: str, rows: list[_Row]) -> tuple[str, ...]:
        """The table's texts of some rows together, in the order of HEADINGS."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        shards, total, images, bad = (
            sum(getattr(row, field) for row in rows) for field in ("shards", "all_shards", "images", "bad")
        )
        left = str(timedelta(seconds=round(seconds * (total - shards) / shards))) if shards else "-"
        return name, f"{shards:,} of {total:,}", f"{images:,}", f"{images / seconds:,.0f}", f"{bad / max(images, 1):.2%}", left

    def view(self) -> Group:
        """The bar over the table; outputs share the workers, so only the time of all together is told."""
        rows = list(self.rows.values())
        table = Table(*HEADINGS, box=None)
        for column in table.columns[1:]:
            column.justify = "right"
        if len(rows) > 1:
            for name, row in self.rows.items():
                table.add_row(*self.cells(name, [row])[:-1], "")
        table.add_row(*self.cells("all" if len(rows) > 1 else next(iter(self.rows)), rows))
        bar = ProgressBar(total=sum(row.all_shards for row in rows), completed=sum(row.shards for row in rows), width=60)
        return Group(bar, table)

    def line(self) -> str:
        """The same in one line."""
        _, shards, images, rate, bad, left = self.cells("", list(self.rows.values()))
        return f"encoding: {shards} shards, {images} images, {rate} images/s, {bad} bad, time left {left}"
