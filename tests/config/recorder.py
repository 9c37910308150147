"""Targets that record their arguments, for the tests of `_target_` nodes."""

from __future__ import annotations

from typing import Any

import hydra.utils


class Kept:
    """Records its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs


class Delegates:
    """Instantiates its parts itself."""

    def __init__(self, part: Any, **more: Any) -> None:
        self.args = (part,)
        self.kwargs = {"built": hydra.utils.instantiate(part, extra=1), **more}


def two(a: Any, b: Any = None) -> Kept:
    return Kept(a, b)


def fails() -> None:
    raise KeyError("what it raises")


class Holder:
    class Inner(Kept):
        pass

    @staticmethod
    def make(**kwargs: Any) -> Kept:
        return Kept(**kwargs)

    @classmethod
    def of(cls, **kwargs: Any) -> Kept:
        return Kept(cls, **kwargs)
