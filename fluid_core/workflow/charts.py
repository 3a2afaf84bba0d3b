"""Line charts as inline SVG that follows the page's light or dark colours."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

_INK = "#010203"  # written by matplotlib, replaced by the page's own text colour
_SERIES = ("#3e63dd", "#e5484d", "#30a46c", "#ad7f00")


def line_chart(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, log: bool = False) -> str:
    """An `<svg>` element with one line for each series name -> (x values, y values); short series are drawn with dots."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor"), _INK
    )
    # A fixed salt makes the ids in the file, and so the file, the same every time.
    settings |= {"svg.fonttype": "none", "svg.hashsalt": "fluid", "font.family": "sans-serif", "font.size": 11}
    with rc_context(settings):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, (xs, ys)), colour in zip(series.items(), _SERIES, strict=False):
            axes.plot(xs, ys, label=name, color=colour, linewidth=1.4, marker="o" if len(xs) < 40 else None, markersize=3)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if log:
            axes.set_yscale("log")
        axes.grid(True, color=_INK, alpha=0.12, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # The size is the page's to choose: the viewBox keeps the shape.
    head, body = svg.split(">", 1)
    svg = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each point."""
    out, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        out.append(total / min(index + 1, window))
    return out
