"""Make text of unknown origin safe to print: names, metrics, reasons and logs may hold terminal commands."""

from __future__ import annotations

import re

_COLOR = re.compile(r"\x1b\[[0-9;:]*m")
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""C0 and C1 control characters except tab and newline, DEL, line separators, directional and invisible formatting
characters, surrogates. The joiners U+200C and U+200D stay: scripts and emoji need them."""


def printable(text: str) -> str:
    r"""Return text that cannot change the terminal: colors are left out, other control characters are escaped.

    Tabs and newlines stay, and a carriage return at the end of a line is left out. Everything else that does not print
    as itself is written as in a Python literal, such as `\x1b` or `\u202e`.
    """
    return _UNSAFE.sub(_escaped, _COLOR.sub("", text).replace("\r\n", "\n"))


def one_line(text: str) -> str:
    r"""Return text as `printable` does, with its newlines and tabs escaped too."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def indented(line: str) -> str:
    """Return text as `printable` does; further lines are marked, so that they cannot pose as lines of the report."""
    return "\n    | ".join(printable(line).split("\n"))


def log_text(text: str) -> str:
    """Return the text of a log as `printable` does. A progress bar's carriage returns become newlines."""
    return printable(text.replace("\r\n", "\n").replace("\r", "\n"))


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
