"""The result of a check: a line of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["ok", "skipped", "warning", "error"]
ORDER: tuple[Status, ...] = ("ok", "skipped", "warning", "error")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check found. `skipped`: it does not apply here, or could not be done; the text says which."""

    check: str = ""
    """Name of the check; set by the runner."""
    status: Status
    text: str
    fix: str = ""
    """The command or setting that fixes it."""
    values: dict[str, float] = field(default_factory=dict)
    """Measured figures by name, in SI units."""


def ok(text: str, **values: float) -> Finding:
    """Return a finding that all is well."""
    return Finding(status="ok", text=text, values=values)


def skipped(text: str, fix: str = "") -> Finding:
    """Return a finding that the check was not done."""
    return Finding(status="skipped", text=text, fix=fix)


def warning(text: str, fix: str) -> Finding:
    """Return a finding that a job would run, but slower or less safely."""
    return Finding(status="warning", text=text, fix=fix)


def error(text: str, fix: str) -> Finding:
    """Return a finding that a job would fail, or that data would be at risk."""
    return Finding(status="error", text=text, fix=fix)
