"""Plain annotations (`int`, `float | None`, `list[str]`), and the values of a config that fit them."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

_SCALARS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "a string"}
_NEVER_WRITTEN = {"Tensor", "Module", "Optimizer", "Callable", "dtype", "device"}
"""Types that no plain value of a config has: `float | Tensor` counts as `float`."""
_LISTS = {"list", "List", "tuple", "Tuple", "Sequence", "Iterable"}


@dataclass(frozen=True)
class Plain:
    """A type that is known from the source text alone."""

    names: frozenset[str]
    """Alternatives among int, float, bool, str, list and None."""
    element: Plain | None = None
    """Type of the elements of a list, if it is plain."""

    def accepts(self, value: Any) -> bool:
        """Return whether a plain value fits: an integer fits float, a bool does not fit int."""
        if isinstance(value, list):
            return "list" in self.names and (self.element is None or all(self.element.accepts(v) for v in value))
        kind = "None" if value is None else type(value).__name__
        return kind in self.names or (kind == "int" and "float" in self.names)

    def words(self) -> str:
        """Describe the type in words, such as `an integer or null`."""
        words = [text for name, text in _SCALARS.items() if name in self.names]
        words += ["a list"] if "list" in self.names else []
        words += ["null"] if "None" in self.names else []
        return " or ".join(words)


def plain_type(node: ast.AST | None) -> Plain | None:
    """Return the plain type of an annotation; None without an annotation, or if any part of it is not plain."""
    plain = _read(node)
    return plain if plain and plain.names else None


def _read(node: ast.AST | None) -> Plain | None:
    if node is None:
        return None
    if isinstance(node, ast.Constant):
        if node.value is None:
            return Plain(frozenset({"None"}))
        return _of_text(node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_read(node.left), _read(node.right)])
    if isinstance(node, ast.Subscript):
        if _last_name(node.value) in _NEVER_WRITTEN:
            return Plain(frozenset())
        return _subscript(_last_name(node.value), node.slice)
    name = _last_name(node)
    if name in _SCALARS:
        return Plain(frozenset({name}))
    if name in _NEVER_WRITTEN:
        return Plain(frozenset())
    return Plain(frozenset({"list"})) if name in _LISTS else None


def _of_text(text: str) -> Plain | None:
    try:
        return _read(ast.parse(text, mode="eval").body)
    except SyntaxError:
        return None


def _subscript(name: str, inner: ast.AST) -> Plain | None:
    items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Optional":
        return _union([_read(inner), Plain(frozenset({"None"}))])
    if name == "Union":
        return _union([_read(item) for item in items])
    if name == "Literal":  # only types are checked here: the target itself rejects invalid values
        values = [item.value for item in items if isinstance(item, ast.Constant)]
        if len(values) < len(items):  # members of an enum
            return None
        return Plain(frozenset("None" if value is None else type(value).__name__ for value in values))
    if name in _LISTS:
        same = len(items) == 1 or name in ("tuple", "Tuple")
        kinds = [_read(i) for i in items if not (isinstance(i, ast.Constant) and i.value is ...)]
        element = _union(kinds) if same and kinds else None
        return Plain(frozenset({"list"}), element)
    return None


def _union(parts: list[Plain | None]) -> Plain | None:
    names: set[str] = set()
    elements = []
    for part in parts:
        if part is None:
            return None
        names |= part.names
        if "list" in part.names:
            elements.append(part.element)
    return Plain(frozenset(names), elements[0] if len(elements) == 1 else None)


def _last_name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
