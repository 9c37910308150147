"""The report of a sweep: the best trials, which parameters matter, and all trials over their parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.report import words
from trainer.report.chart import number_of
from trainer.report.markup import Markup, element, join, note, section, table, void
from trainer.report.page import page
from trainer.report.scale import Scale, covering, short

MOST_LINES, MOST_ROWS = 500, 1000
"""Trials in the chart, the best ones, and in the table: the report stays below 1 MB."""
_WIDTH, _HEIGHT = 920, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 70, 30, 14
_MOST_CHOICES = 12


@dataclass(frozen=True)
class Axis:
    """A parameter of the sweep."""

    key: str
    is_numeric: bool
    is_log: bool = False


@dataclass(frozen=True)
class Trial:
    """A trial of the sweep."""

    number: int
    state: str
    parameters: Mapping[str, str]
    value: float | None
    """Of the first metric; None: none yet."""
    step: int | None
    run: str
    """Name of its run; empty without one."""
    reason: str = ""


@dataclass(frozen=True)
class Sweep:
    """What the report shows of a sweep."""

    title: str
    source: str
    """Its folder."""
    method: str
    planned: int | None
    metric: str
    is_lower_better: bool
    axes: Sequence[Axis]
    trials: Sequence[Trial]
    importance: Mapping[str, float]
    """Parameter to the share of the variance that it explains."""

    def ranked(self) -> list[Trial]:
        """Return the finished trials with a value, the best first."""
        done = [one for one in self.trials if one.state == "finished" and one.value is not None]
        return sorted(done, key=lambda one: (self.worth(one), -one.number), reverse=True)

    def worth(self, one: Trial) -> float:
        """Return the value of a trial with the sign by which more is better."""
        assert one.value is not None
        return -one.value if self.is_lower_better else one.value


def report_of_sweep(sweep: Sweep) -> str:
    """Return the report of a sweep as HTML."""
    return page(sweep.title, [_headline(sweep), _importance(sweep), _coordinates(sweep), _trials(sweep)], sweep.source)


def _headline(sweep: Sweep) -> Markup:
    states: dict[str, int] = {}
    for one in sweep.trials:
        states[one.state] = states.get(one.state, 0) + 1
    counted = ", ".join(f"{count} {state}" for state, count in states.items())
    planned = f" of {sweep.planned}" if sweep.planned else ""
    sentence = f"{words.plural(len(sweep.trials), 'trial')}{planned} by {sweep.method}: {counted}."
    ranked = sweep.ranked()
    best = [f" Best {sweep.metric} {words.number(ranked[0].value)} in trial {ranked[0].number}." if ranked else ""]
    return element("header", element("div", element("h1", sweep.title), class_="title"), element("p", sentence, *best))


def _importance(sweep: Sweep) -> Markup:
    rows = [
        (element("code", key), f"{share:.0%}", _meter(share))
        for key, share in sorted(sweep.importance.items(), key=lambda item: -item[1])
    ]
    remark = (
        f"The share of the variance of {sweep.metric} over the finished trials that each parameter explains alone "
        "(first-order effect, corrected for chance)."
    )
    return (
        section("Importance", table(("parameter", "explains", ""), rows, numbers=(1,)), note(remark))
        if rows
        else Markup("")
    )


def _meter(share: float) -> Markup:
    bar = void("rect", x=0, y=3, width=number_of(max(share, 0) * 200), height=8, rx=2, class_="dot s0")
    return element("svg", bar, viewBox="0 0 200 14", width=200, height=14, aria_hidden="true")


def _coordinates(sweep: Sweep) -> Markup:
    """Return the chart of parallel coordinates: a line per finished trial, the best ones darkest and on top."""
    ranked = sweep.ranked()[:MOST_LINES]
    values = {
        axis.key: {one.parameters[axis.key] for one in ranked if axis.key in one.parameters} for axis in sweep.axes
    }
    axes = [_Vertical.of(axis, sorted(values[axis.key])) for axis in sweep.axes if len(values[axis.key]) > 1]
    if len(ranked) < 2 or not axes:
        return Markup("")
    result = covering([one.value for one in ranked if one.value is not None], _HEIGHT - _BOTTOM, _TOP)
    across = [_LEFT + (_WIDTH - _LEFT - _RIGHT) * place / len(axes) for place in range(len(axes) + 1)]
    worths = [sweep.worth(one) for one in ranked]
    low, high = min(worths), max(worths)
    lines = []
    for one in reversed(ranked):
        heights = [axis.at(one.parameters.get(axis.key)) for axis in axes]
        points = [(x, y) for x, y in zip(across, heights, strict=False) if y is not None]
        points.append((across[-1], result(one.value or 0.0)))
        good = (sweep.worth(one) - low) / (high - low) if high > low else 1.0
        path = Markup("M" + "L".join(f"{number_of(x)} {number_of(y)}" for x, y in points))
        title = element("title", f"trial {one.number}: {sweep.metric} {words.number(one.value)}")
        lines.append(element("path", title, d=path, class_="line s0", stroke_opacity=f"{0.12 + 0.78 * good**2:.2f}"))
    drawn = [axis.drawn(x) for axis, x in zip(axes, across, strict=False)]
    ticks = [(short(value), result(value)) for value in result.ticks(5)]
    drawn.append(_axis(sweep.metric, across[-1], ticks))
    label = (
        f"Parallel coordinates of {len(ranked)} trials over {', '.join(axis.key for axis in axes)} and {sweep.metric}."
    )
    chart = element("svg", *lines, *drawn, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)
    head = element("figcaption", element("b", f"{sweep.metric} by parameters"))
    return section(
        "Parallel coordinates",
        element("figure", head, element("div", chart, class_="scroll wide")),
        note("The stronger a line, the better the result."),
    )


@dataclass(frozen=True)
class _Vertical:
    """A vertical axis: of numbers, or of choices."""

    key: str
    scale: Scale
    choices: Sequence[str] | None
    whole: Sequence[float] = ()
    """The values, if they are a few whole numbers: nothing is between them."""

    @classmethod
    def of(cls, axis: Axis, values: Sequence[str]) -> _Vertical:
        """Return the axis of a parameter that has these values."""
        numbers = [_number(value) for value in values]
        bounds = (_HEIGHT - _BOTTOM, _TOP)
        if axis.is_numeric and all(math.isfinite(one) for one in numbers):
            scale = covering(numbers, *bounds, log=axis.is_log and min(numbers) > 0)
            is_whole = len(values) <= _MOST_CHOICES and all(one.is_integer() for one in numbers)
            return cls(axis.key, scale, None, numbers if is_whole else ())
        return cls(axis.key, Scale(-0.5, len(values) - 0.5, *bounds), values)

    def at(self, value: str | None) -> float | None:
        """Return the height of a value; None: the trial has none."""
        if value is None:
            return None
        return self.scale(_number(value) if self.choices is None else self.choices.index(value))

    def drawn(self, x: float) -> Markup:
        """Return the axis at `x`."""
        if self.choices is None:
            ticks = self.whole or self.scale.ticks(5)
            return _axis(self.key, x, [(short(value), self.scale(value)) for value in ticks])
        every = -(-len(self.choices) // _MOST_CHOICES)
        return _axis(self.key, x, [(name, self.scale(place)) for place, name in enumerate(self.choices)][::every])


def _axis(title: str, x: float, ticks: Sequence[tuple[str, float]]) -> Markup:
    name = title.rpartition(".")[2]
    return join(
        [
            void("line", class_="frame", x1=number_of(x), x2=number_of(x), y1=_TOP, y2=_HEIGHT - _BOTTOM),
            element("text", element("title", title), name[:24], x=number_of(x), y=16, class_="axis strong middle"),
            *(
                element("text", text[:14], x=number_of(x + 5), y=number_of(at + 4), class_="axis over")
                for text, at in ticks
            ),
        ]
    )


def _trials(sweep: Sweep) -> Markup:
    ranked = sweep.ranked()
    shown = {one.number for one in ranked}
    rest = [one for one in sweep.trials if one.number not in shown]
    header = ("trial", "state", sweep.metric, "step", *(axis.key for axis in sweep.axes), "run")
    rows = [
        (
            one.number,
            element("span", one.state, class_="whole"),
            words.number(one.value) if one.value is not None else "-",
            f"{one.step:,}" if one.step is not None else "-",
            *(_brief(one.parameters.get(axis.key, "-")) for axis in sweep.axes),
            element("span", one.run, class_="whole") if one.run else one.reason or "-",
        )
        for one in [*ranked, *rest]
    ]
    left = len(rows) - MOST_ROWS
    more = note(f"{left:,} more trials are left out.") if left > 0 else ""
    return section("Trials", table(header, rows[:MOST_ROWS], numbers=range(2, 4)), more)


def _brief(text: str) -> str:
    """Return a number with six digits, any other text as it is."""
    number = _number(text)
    return f"{number:.6g}" if math.isfinite(number) and len(text) > 8 else text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
