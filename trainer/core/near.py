"""Suggestions for misspelt names ("did you mean ...?")."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is closest to the misspelt `name`, or None if none is close.

    difflib's ratio alone misses `batchsize` for `batch_size` among many names and prefers long names, so separators
    and case are removed first.
    """
    from difflib import get_close_matches

    plain = {_plain(candidate): candidate for candidate in sorted(known, reverse=True)}
    exact = plain.get(_plain(name))
    if exact is not None:
        return exact
    close = get_close_matches(_plain(name), list(plain), n=1, cutoff=0.6)
    return plain[close[0]] if close else None


def did_you_mean(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return `did you mean PREFIX+NAME? `, or an empty string if no known name is close."""
    near = nearest(name, known)
    return f"did you mean {prefix}{near}? " if near else ""


def listed(names: Iterable[str], limit: int = 20) -> str:
    """Join names into one line, sorted, and abbreviate after `limit` of them."""
    ordered = sorted(set(names))
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return (", ".join(ordered[:limit]) or "none") + more


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").replace("/", "").lower()
