"""Charts as SVG text for a page: lines over steps, points with intervals, bars. They take the page's text colour, so
they read in light and dark and on paper.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

# Told apart in light and dark, and by most who see colours differently (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Drawn in this colour and replaced by that of the page's text: no line of ours has it.
_TEXT_COLOUR = "#010203"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "svitt",  # the same page from the same run
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _TEXT_COLOUR,
    "axes.labelcolor": _TEXT_COLOUR,
    "axes.titlesize": 10,
    "text.color": _TEXT_COLOUR,
    "xtick.color": _TEXT_COLOUR,
    "ytick.color": _TEXT_COLOUR,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Line:
    """One curve: (x, y) in order."""

    label: str
    points: Sequence[tuple[float, float]]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    borders: Mapping[str, float] | None = None,
    from_zero: bool = False,
) -> str:
    """Curves over one axis; `borders` are named verticals, such as the begin of each stage."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 2.8), layout="constrained")
        for line, colour in zip(lines, _cycle(len(lines)), strict=True):
            if line.points:
                xs, ys = zip(*line.points, strict=True)
                axes.plot(xs, ys, color=colour, label=line.label, linewidth=1.4, marker="o" * (len(xs) == 1))
        for name, place in (borders or {}).items():
            axes.axvline(place, color=_TEXT_COLOUR, linewidth=0.6, linestyle=":")
            axes.annotate(
                name, (place, 1.0), xycoords=("data", "axes fraction"), fontsize=8, rotation=0, va="bottom"
            )
        if from_zero:
            axes.set_ylim(bottom=0.0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) > 1:
            axes.legend(fontsize=8, ncols=min(4, len(lines)))
        return _svg(figure, title)


def interval_chart(
    title: str,
    groups: Sequence[str],
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    y_label: str,
    chance: float | None = None,
) -> str:
    """Values with their intervals (value, low, high) of each series, one place for each group."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 2.8), layout="constrained")
        for number, (name, values) in enumerate(series.items()):
            offset = (number - (len(series) - 1) / 2) * 0.12
            xs = [place + offset for place in range(len(values))]
            middles = [value for value, _, _ in values]
            spans = [[v - low for v, low, _ in values], [high - v for v, _, high in values]]
            axes.errorbar(xs, middles, yerr=spans, fmt="o", capsize=3, color=COLOURS[number], label=name)
        if chance is not None:
            axes.axhline(chance, color=_TEXT_COLOUR, linewidth=0.6, linestyle="--")
            axes.annotate("chance", (1.0, chance), xycoords=("axes fraction", "data"), fontsize=8, ha="right")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_ylabel(y_label)
        if len(series) > 1:
            axes.legend(fontsize=8)
        return _svg(figure, title)


def share_bar(title: str, parts: Mapping[str, float], unit: str) -> str:
    """One bar cut into parts, with their values in the legend."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 1.4), layout="constrained")
        left = 0.0
        colours = [*COLOURS, "#999999", "#666666", "#cccccc", "#444444"]
        for (name, value), colour in zip(parts.items(), colours, strict=False):
            axes.barh(0, value, left=left, color=colour, label=f"{name} {value:.0f} {unit}", height=0.6)
            left += value
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, left or 1.0)
        axes.set_xlabel(unit)
        axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return _svg(figure, title)


def _cycle(number: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(number)]


def _svg(figure: pyplot.Figure, title: str) -> str:  # type: ignore[name-defined]
    """The <svg> element alone, named for those who do not see it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_TEXT_COLOUR, "currentColor")
    head, _, rest = svg.partition(">")
    # Its size is the page's to choose; ids of several charts must not meet in one page.
    kept = " ".join(part for part in head.split(" ") if not part.startswith(("width=", "height=")))
    return f'{kept} role="img" aria-label="{title}">{_own_ids(rest, title)}'


def _own_ids(svg: str, title: str) -> str:
    prefix = "".join(letter if letter.isalnum() else "-" for letter in title.lower())
    return (
        svg.replace(' id="', f' id="{prefix}-')
        .replace("url(#", f"url(#{prefix}-")
        .replace('href="#', f'href="#{prefix}-')
    )
