"""The pages: the report of one run, and of several runs compared."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer import __version__
from trainer.report import comparison, sections, words
from trainer.report.account import account, plan
from trainer.report.facts import Facts, gather
from trainer.report.markup import Markup, element, join
from trainer.runs.directory import RunDirectory

MOST_BYTES = 1_000_000
"""A report is smaller than this: it is sent by mail and attached to papers."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
"""Whatever is in the page, a browser runs no script in it and asks nobody for anything."""


def report(run: RunDirectory, slurm_states: Mapping[str, str] | None = None, *, deadline: float | None = None) -> str:
    """Return the report of a run as HTML; never raises for what the files of the run hold.

    Args:
        run: The run.
        slurm_states: As in `runs.state.state_of`.
        deadline: When to stop reading metrics, by `time.monotonic`; None: never.
    """
    facts = gather(run, slurm_states, deadline=deadline)
    name = f"{facts.run.path.name}: {facts.state.name}"
    parts = [
        _guarded(facts, part)
        for part in (
            sections.headline,
            sections.results,
            sections.curves,
            account,
            plan,
            sections.faults,
            sections.asked,
            sections.place,
            sections.saved,
            sections.again,
        )
    ]
    return page(name, [*parts, sections.unread(facts)], str(run.path))


def report_of_several(runs: Sequence[RunDirectory], slurm_states: Mapping[str, str] | None = None) -> str:
    """Return the report that compares two or more runs as HTML."""
    facts = [gather(run, slurm_states) for run in runs]
    title = f"{len(runs)} runs: {', '.join(comparison.labels_of(facts))}"
    return page(title[:200], comparison.parts_of(facts), str(runs[0].path.parent))


def _guarded(facts: Facts, part: object) -> Markup:
    """Return a section; what damage makes impossible is listed at the end of the report."""
    try:
        return part(facts)  # type: ignore[operator,no-any-return]
    except Exception as error:  # the other sections are still of use
        facts.problems.append(f"{getattr(part, '__name__', 'a section')}: {type(error).__name__}: {error}")
        return Markup("")


def page(title: str, parts: list[Markup], source: str) -> str:
    """Return a whole page of at most `MOST_BYTES`: what does not fit is left out from the end, and named."""
    style = Path(__file__).with_name("style.css").read_text()
    made = f"Made by trainer {__version__} on {words.moment(time.time())} from {source}."
    head = join(
        [
            Markup('<meta charset="utf-8">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
            Markup('<meta name="referrer" content="no-referrer">'),
            element("title", title),
            Markup(f"<style>\n{style}</style>"),
        ],
        "\n",
    )
    footer = element("footer", made)
    kept, left = [], MOST_BYTES - len((head + footer).encode()) - 2000
    for part in parts:
        left -= len(part.encode())
        if left < 0:
            kept.append(element("p", "More is left out, because the report would be larger than 1 MB.", class_="note"))
            break
        kept.append(part)
    body = element("body", element("main", *kept), footer)
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n{body}\n</html>\n'
