"""Bounds for what a composition reads and computes: environment variables, the number and size of interpolations.

OmegaConf resolves a reference again wherever it occurs: sixteen keys of two references each take minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.config.environment import named_in, read
from trainer.core.errors import UserError

MOST, DEEPEST = 1000, 30
"""Interpolations of a job, and interpolations inside of each other."""
MOST_CHARACTERS = 1 << 20
"""Characters of all interpolated values."""
_UNSET = "_UNSET_"


class _Exceeded(BaseException):
    """Passes through OmegaConf, which wraps exceptions and continues."""


class _Budget:
    def __init__(self) -> None:
        self.count = self.depth = self.characters = 0

    def enter(self, key: Any) -> None:
        self.count += 1
        self.depth += 1
        if self.count > MOST:
            raise _Exceeded(f"{key}: more than {MOST} interpolations in this job")
        if self.depth > DEEPEST:
            raise _Exceeded(f"{key}: interpolations are nested deeper than {DEEPEST}")

    def leave(self, key: Any, value: Any) -> None:
        text = value._value() if value is not None and not hasattr(value, "_content") else value
        self.characters += len(text) if isinstance(text, str) else 0
        if self.characters > MOST_CHARACTERS:
            raise _Exceeded(f"{key}: more than {MOST_CHARACTERS} characters from interpolations in this job")


@contextmanager
def bounded() -> Iterator[None]:
    """Limit interpolations, and the variables that they read, inside of the context.

    Raises:
        UserError: The configuration exceeds a limit.
    """
    from omegaconf import Container
    from omegaconf.basecontainer import BaseContainer

    budget, resolvers = _Budget(), BaseContainer._resolvers
    original, env = Container._resolve_interpolation_from_parse_tree, resolvers["oc.env"]

    def counted(self: Any, parent: Any, value: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        budget.enter(key)
        try:
            result = original(self, parent, value, key, *args, **kwargs)
        finally:
            budget.depth -= 1
        budget.leave(key, result)
        return result

    Container._resolve_interpolation_from_parse_tree = counted  # type: ignore[method-assign]
    resolvers["oc.env"] = _env
    try:
        yield
    except _Exceeded as error:
        raise UserError(str(error), "write the values out, or refer to each other value once") from None
    finally:
        Container._resolve_interpolation_from_parse_tree = original  # type: ignore[method-assign]
        resolvers["oc.env"] = env


def _env(config: Any, parent: Any, node: Any, args: tuple[Any, ...], args_str: tuple[str, ...]) -> Any:
    """Return the value of `${oc.env:NAME,DEFAULT}` as OmegaConf does, for variables that a config may read."""
    name = str(args[0])
    value = read(name, named_in(config))
    if value is not None:
        return value
    if len(args) > 1:
        return str(args[1]) if args[1] is not None else None
    raise KeyError(f"Environment variable '{name}' not found")
