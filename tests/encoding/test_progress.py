"""What a running encoding shows, on a terminal and in the log of a job."""

import io
import re

from rich.console import Console

from fluid_core.encoding import progress as module
from fluid_core.encoding.progress import EncodingProgress


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    with EncodingProgress(["train"] * 3 + ["validation"], console) as progress:
        progress.started -= 100  # seconds ago
        progress.count("train", 1500, 15, last=False)
        progress.count("train", 500, 5, last=True)
        progress.count("validation", 2000, 0, last=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_table_on_a_terminal():
    printed = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown(terminal=True))
    lines = [line.split() for line in printed.splitlines()]
    assert "output shards images images/s bad time left".split() in lines  # noqa: SIM905
    assert "train 1 of 3 2,000 20 1.00%".split() in lines  # noqa: SIM905
    assert "validation 1 of 1 2,000 20 0.00%".split() in lines  # noqa: SIM905
    assert "all 2 of 4 4,000 40 0.50% 0:01:40".split() in lines  # noqa: SIM905


def test_lines_in_the_log_of_a_job(monkeypatch):
    last = "encoding: 2 of 4 shards, 4,000 images, 40 images/s, 0.50% bad, time left 0:01:40\n"
    assert shown(terminal=False) == last  # nothing but the end within half a minute
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    assert shown(terminal=False).count("encoding: ") == 4
