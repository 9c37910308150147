"""URLs of object stores (`checkpoint.dir`): what can be wrong with one before its server is asked."""

from __future__ import annotations

from urllib.parse import urlsplit

from trainer.core.errors import UserError

SCHEMES = {"s3": "s3fs"}
"""Schemes of a URL and the package that fsspec needs for each; also the name of the extra."""


def problem_of(url: str) -> UserError | None:
    """Return what is wrong with a URL, without asking its server; None if it can be used."""
    example = "write checkpoint.dir=s3://BUCKET/PREFIX"
    try:
        split = urlsplit(url)
        bucket = split.hostname
    except ValueError:
        return UserError(f"checkpoint.dir={url!r} is not a URL", example)
    if split.scheme not in SCHEMES:
        return UserError(
            f"checkpoint.dir={url!r}: checkpoints are kept in the run directory and in object stores with a URL of "
            f"{', '.join(f'{scheme}://' for scheme in SCHEMES)}",
            f"{example}; for another folder set runs_dir",
        )
    if split.username or split.password or split.query or split.fragment:
        return UserError(
            "checkpoint.dir: a URL with a user, a password or parameters would be stored with the run",
            f"{example}, and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL in the environment",
        )
    if not bucket or ".." in split.path.split("/"):
        return UserError(f"checkpoint.dir={url!r} names no bucket and folder", example)
    return None


def missing_package(url: str) -> UserError | None:
    """Return an error with the line that installs what the URL needs; None if it is installed."""
    from importlib.util import find_spec

    from trainer.core.install import pip_install

    scheme = urlsplit(url).scheme
    if find_spec(SCHEMES[scheme]) is not None:
        return None
    return UserError(f"checkpoint.dir={url}: {SCHEMES[scheme]} is not installed", pip_install(scheme))
