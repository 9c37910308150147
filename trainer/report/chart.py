"""Draw curves as inline SVG: axes with labels, legible in print, in light and in dark.

Where a bin holds several points the line is their mean, and the band reaches from the smallest to the largest, so that
every extreme is on the page at its value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.report.markup import Markup, element, join, void
from trainer.report.scale import Scale, covering, short
from trainer.runs.curves import Bin, Curve

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
NUM_COLORS = 8
"""Of the style sheet: `.s0` and so on. Further lines repeat them with another dash."""
_MOST_DASHED = 60
_LOG_RATIO = 30.0
"""A loss that changes by more than this factor is drawn on a logarithmic axis."""
_WIDE_NAMES = ("loss", "perplexity", "grad_norm")


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    label: str
    curve: Curve
    number: int
    """Chooses its color and dash."""


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    resumed_at: Iterable[int] = (),
    best: tuple[str, int, float] | None = None,
    bands: bool = True,
) -> Markup:
    """Return a figure with a caption.

    Args:
        title: What the y axis shows.
        lines: The curves; each has at least one point.
        resumed_at: Steps at which an attempt continued, marked on the x axis.
        best: Label of a line, and the step and value of a point on it that is marked.
        bands: Show the range of the values in each bin.
    """
    values = [value for line in lines for value in (line.curve.low[1], line.curve.high[1])]
    low, high = min(values), max(values)
    log = title.endswith(_WIDE_NAMES) and low > 1e-100 and high < 1e100 and high / low > _LOG_RATIO
    last = max(line.curve.last[0] for line in lines)
    first = min(line.curve.bins[0].first[0] for line in lines)
    x = Scale(0 if first < last / 5 else first, max(last, first + 1), _LEFT, WIDTH - _RIGHT)
    y = covering(values, HEIGHT - _BOTTOM, _TOP, log=log)
    marks = [at for at in sorted(set(resumed_at)) if x.low < at < x.high]
    drawn = [
        *_grid(x, y),
        *(
            void("line", class_="resume", x1=number_of(x(at)), x2=number_of(x(at)), y1=_TOP, y2=HEIGHT - _BOTTOM)
            for at in marks
        ),
        *(_band(line, x, y) for line in lines if bands),
        *(_line(line, x, y) for line in lines),
        *([_mark(best, lines, x, y)] if best else []),
        element(
            "text", "optimizer step", x=number_of((_LEFT + WIDTH - _RIGHT) / 2), y=HEIGHT - 6, class_="axis middle"
        ),
    ]
    names = ", ".join(line.label for line in lines)
    ends = "; ".join(f"{line.label} ends at {_value(line.curve.last[1])}" for line in lines)
    label = f"Chart of {names} over the optimizer steps {first} to {last}. {ends}."
    svg = element(
        "svg", *drawn, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label, preserveAspectRatio="xMidYMid"
    )
    head = element("figcaption", element("b", title or "-"), element("span", "log scale", class_="dim") if log else "")
    return element("figure", head, svg, _legend(lines))


def swatch(number: int, dash: str = "") -> Markup:
    """Return a short piece of a line, as a legend shows it."""
    class_ = f"line s{number % NUM_COLORS} {dash}".rstrip()
    piece = void("path", d="M0 5H22", class_=class_)
    return element("svg", piece, viewBox="0 0 22 10", class_="swatch", aria_hidden="true")


def _legend(lines: Sequence[Line]) -> Markup:
    items = []
    for line in lines:
        last = _value(line.curve.last[1])
        label = element("span", line.label)
        items.append(element("li", swatch(line.number, _dash(line)), label, element("span", last, class_="value")))
        if line.curve.not_finite:
            first = line.curve.first_not_finite
            words = f"{line.curve.not_finite:,} not finite, the first at step {first}"
            items.append(element("li", words, class_="bad"))
    return element("ul", *items, class_="legend")


def _grid(x: Scale, y: Scale) -> Iterable[Markup]:
    bottom = HEIGHT - _BOTTOM
    for value in y.ticks(5):
        at = number_of(y(value))
        yield void("line", class_="grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at)
        yield element("text", short(value), x=_LEFT - 6, y=number_of(y(value) + 4), class_="axis end")
    yield void("line", class_="frame", x1=_LEFT, x2=WIDTH - _RIGHT, y1=bottom, y2=bottom)
    for value in x.ticks(5):
        if value != int(value):
            continue
        yield void("line", class_="frame", x1=number_of(x(value)), x2=number_of(x(value)), y1=bottom, y2=bottom + 4)
        yield element("text", short(value), x=number_of(x(value)), y=bottom + 17, class_="axis middle")


def _band(line: Line, x: Scale, y: Scale) -> Markup:
    bins = line.curve.bins
    if len(bins) < 2 or line.curve.width < 2:
        return Markup("")
    upper = [(x(_middle(one)), y(one.high[1])) for one in bins]
    lower = [(x(_middle(one)), y(one.low[1])) for one in reversed(bins)]
    return void("path", class_=f"band s{line.number % NUM_COLORS}", d=Markup(f"{_path([*upper, *lower])}Z"))


def _line(line: Line, x: Scale, y: Scale) -> Markup:
    class_ = f"line s{line.number % NUM_COLORS} {_dash(line)}".rstrip()
    points = [(x(_middle(one)), y(one.mean)) for one in line.curve.bins]
    if len(points) == 1:
        return void(
            "circle",
            class_=f"dot s{line.number % NUM_COLORS}",
            cx=number_of(points[0][0]),
            cy=number_of(points[0][1]),
            r=3,
        )
    return void("path", class_=class_, d=_path(points))


def _mark(best: tuple[str, int, float], lines: Sequence[Line], x: Scale, y: Scale) -> Markup:
    label, step, value = best
    line = next((line for line in lines if line.label == label), None)
    if line is None or not (x.low <= step <= x.high and y.low <= value <= y.high):
        return Markup("")
    at_right = x(step) > WIDTH - 110
    words = f"best {_value(value)}"
    # Above the point, or below where there is no room.
    up = y(value) - 9 if y(value) > _TOP + 22 else y(value) + 18
    return join(
        [
            void(
                "circle", class_=f"best s{line.number % NUM_COLORS}", cx=number_of(x(step)), cy=number_of(y(value)), r=4
            ),
            element(
                "text",
                words,
                x=number_of(x(step)),
                y=number_of(up),
                class_=f"axis strong {'end' if at_right else 'middle'}",
            ),
        ]
    )


def _middle(one: Bin) -> float:
    return (one.first[0] + one.last[0]) / 2


def _dash(line: Line) -> str:
    """Return the dashes by which a line is told apart without color; a jagged one cannot be followed with any."""
    number = (line.number + line.number // NUM_COLORS) % 4
    return f"d{number}" if number and len(line.curve.bins) <= _MOST_DASHED else ""


def _path(points: Sequence[tuple[float, float]]) -> Markup:
    return Markup("M" + "L".join(f"{number_of(x)} {number_of(y)}" for x, y in points))


def number_of(value: float) -> str:
    """Return a coordinate with a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0") if math.isfinite(value) else "0"


def _value(value: float) -> str:
    return f"{value:.4g}"
