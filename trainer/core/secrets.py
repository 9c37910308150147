"""Secrets of the environment: which variables hold one, and their values masked in what is written.

A variable counts as secret by its name. Its value is replaced wherever this package writes a record, a log line or the
configuration that a tracking service gets.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

MASK = "***"
SHORTEST = 8
"""Shorter values are not masked: they occur in other words."""
_WORDS = {
    *("KEY", "KEYS", "TOKEN", "TOKENS", "SECRET", "SECRETS", "PASSWORD", "PASSWORDS", "PASSWD", "PASSPHRASE", "PASS"),
    *("CREDENTIAL", "CREDENTIALS", "CRED", "CREDS", "AUTH", "COOKIE", "COOKIES", "PRIVATE", "PAT", "DSN", "JWT"),
    *("BEARER", "SIGNATURE", "CERT", "NETRC"),
}
_ENDINGS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIALS")
_IN_URL = re.compile(r"://[^/\s:@]*:([^/\s@]+)@")


def looks_secret(name: str) -> bool:
    """Return whether a variable of this name probably holds a secret: KEY, TOKEN, PASSWORD and the like in it."""
    words = [word for word in re.split(r"[^A-Z]+", name.upper()) if word]
    return any(word in _WORDS or word.endswith(_ENDINGS) for word in words)


def password_in(value: str) -> str | None:
    """Return the password of an URL such as `postgres://me:PASSWORD@host`, if there is one."""
    match = _IN_URL.search(value)
    return match[1] if match else None


def known(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the values to mask, and the variable of each, longest first."""
    environ = os.environ if environ is None else environ
    values: dict[str, str] = {}
    for name, value in environ.items():
        password = password_in(value)
        if password is not None and _is_distinct(password):
            values.setdefault(password, name)
        if looks_secret(name) and _is_distinct(value.strip()):
            values.setdefault(value.strip(), name)
    return dict(sorted(values.items(), key=lambda item: -len(item[0])))


def _is_distinct(value: str) -> bool:
    """Return whether a value cannot be an ordinary word, number or path, which masking would destroy."""
    if len(value) < SHORTEST or value.startswith(("/", "~", "./")):
        return False
    has_digit, has_letter = any(map(str.isdigit, value)), any(map(str.isalpha, value))
    mixed = value.lower() != value and value.upper() != value
    return len(value) >= 2 * SHORTEST or (has_letter and (has_digit or mixed)) or not value.replace("_", "").isalnum()


def mask(text: str, environ: Mapping[str, str] | None = None) -> str:
    """Return `text` with the value of every known secret variable replaced."""
    for value in known(environ):
        if value in text:
            text = text.replace(value, MASK)
    return text


def mask_inside(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """Return plain data with `mask` applied to every string in it."""
    if isinstance(value, str):
        return mask(value, environ)
    if isinstance(value, Mapping):
        return {key: mask_inside(item, environ) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(mask_inside(item, environ) for item in value)
    return value


class MaskedStream:
    """A text stream that masks secrets in what is written to it; all else is that of the stream.

    A library that replaces `write` to see what is written (wandb, for its console log) sees masked text.

    Args:
        stream: The stream that is written to.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._secrets = tuple(known())
        self._replaced: Callable[[str], int] | None = None
        self._inside = threading.local()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a replacement of `write` is called by `write`, with the masked text."""
        object.__setattr__(self, "_replaced" if name == "write" else name, value)

    def write(self, text: str) -> int:
        """Write `text`, masked."""
        for value in self._secrets:
            if value in text:
                text = text.replace(value, MASK)
        if self._replaced is None or getattr(self._inside, "write", False):  # the replacement calls this method
            written: int = self._stream.write(text)
            return written
        self._inside.write = True
        try:
            return self._replaced(text)
        finally:
            self._inside.write = False

    def writelines(self, lines: Any) -> None:
        """Write each line, masked."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
