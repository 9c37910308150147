"""Build HTML in which text cannot become markup: everything that is not `Markup` is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from trainer.core.text import printable

LONGEST = 4000
"""Longer texts are cut, so that one value cannot fill the report."""


class Markup(str):
    """A text that is HTML already."""

    __slots__ = ()


def text(value: object) -> Markup:
    """Return a value as text of a page: escaped, without control characters, and cut if it is very long."""
    if isinstance(value, Markup):
        return value
    plain = str(value)
    if len(plain) > LONGEST:
        plain = f"{plain[:LONGEST]} ... ({len(plain):,} characters)"
    return Markup(html.escape(printable(plain), quote=True))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    """Return the parts one after the other."""
    return Markup(separator.join(text(part) for part in parts))


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """Return an element. `class_` and `aria_label` become `class` and `aria-label`; None leaves an attribute out."""
    given = {
        name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value not in (None, False)
    }
    written = "".join(f' {name}="{text("" if value is True else value)}"' for name, value in given.items())
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def void(tag: str, **attributes: object) -> Markup:
    """Return an SVG element without content."""
    return Markup(element(tag, **attributes).replace(f"></{tag}>", "/>"))


def section(title: str, *children: object) -> Markup:
    """Return a section of the page; nothing without content."""
    shown = [child for child in children if child]
    if not shown:
        return Markup("")
    return element("section", element("h2", title), *shown)


def table(header: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> Markup:
    """Return a table, nothing without rows.

    Args:
        header: The titles of the columns.
        rows: The cells.
        numbers: Columns that are aligned at the right.
    """

    def cells(tag: str, row: Sequence[object]) -> Markup:
        kinds = ["number" if column in numbers else None for column in range(len(row))]
        scope = "col" if tag == "th" else None
        return element(
            "tr", *(element(tag, cell, class_=kind, scope=scope) for cell, kind in zip(row, kinds, strict=True))
        )

    body = [cells("td", row) for row in rows]
    if not body:
        return Markup("")
    whole = element("table", element("thead", cells("th", header)), element("tbody", *body))
    label = f"Table of {', '.join(html.unescape(text(title)) for title in header if title)}"
    return element("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def pairs(rows: Iterable[tuple[object, object]]) -> Markup:
    """Return a list of names and values, without those that are None or empty."""
    shown = [(name, value) for name, value in rows if value is not None and value != ""]
    if not shown:
        return Markup("")
    return element("dl", *(join([element("dt", name), element("dd", value)]) for name, value in shown))


def note(*children: object) -> Markup:
    """Return a remark."""
    return element("p", *children, class_="note")
