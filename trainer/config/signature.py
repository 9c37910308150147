"""The signature of a `_target_`, read from its source text."""

from __future__ import annotations

import ast
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from trainer.config.annotation import Plain, plain_type
from trainer.config.namespaces import canonical
from trainer.config.schedule import READ_BY_TRAINER
from trainer.config.sources import Definition, LookupResult, Module, NotFound, Unknown, find, lookup

TRAINERS_OWN = {
    "data": ("batch_size", "micro_batch", "num_workers"),
    "optimizer": ("no_decay_norm_bias", "decay"),
    "scheduler": READ_BY_TRAINER,
}
"""Keys of an open section that the trainer itself reads; passed to the target only if its signature names them."""

_TAKE_NOTHING = {"torch.nn.Module", "torch.nn.modules.module.Module"} | {
    f"{package}.{name}"
    for package in ("lightning", "lightning.pytorch")
    for name in ("LightningModule", "LightningDataModule", "Callback")
}
"""Bases whose `__init__` takes no arguments from a config, so that their files of thousands of lines are not parsed."""

_HARMLESS_DECORATORS = {"staticmethod", "classmethod", "property", "final", "cache", "lru_cache", "wraps"}
_HARMLESS_DECORATORS |= {"no_grad", "enable_grad", "inference_mode", "without_default_init"}  # context managers


@dataclass(frozen=True)
class Argument:
    """An argument of a target."""

    name: str
    required: bool
    type: Plain | None
    """Annotated type; None without an annotation, or with one that is not plain."""


@dataclass(frozen=True)
class Signature:
    """The arguments of a target."""

    arguments: tuple[Argument, ...]
    """In order, without self or cls."""
    takes_more: bool
    """Whether there is a `**kwargs`."""

    def names(self) -> list[str]:
        """Return the names of all arguments."""
        return [argument.name for argument in self.arguments]


def read(path: str, cwd: Path) -> Signature | NotFound | None:
    """Return the signature of the class or function at the dotted `path`; None if the source text does not show it."""
    result = find(path, cwd)
    if isinstance(result, NotFound):
        return result
    return signature_of(result)


def argument_names(path: str, cwd: Path) -> list[str] | None:
    """Return the argument names of the target; None if they are unknown, or if it takes any name."""
    signature = read(path, cwd)
    if not isinstance(signature, Signature) or signature.takes_more:
        return None
    return signature.names()


def signature_of(result: LookupResult) -> Signature | None:
    """Return the signature of a definition; None if the source text does not show it."""
    if not isinstance(result, Definition):
        return None
    if isinstance(result.node, ast.ClassDef):
        return _of_class(result)
    if not _plainly_decorated(result.node):
        return None
    static = any(_dotted(d).endswith("staticmethod") for d in result.node.decorator_list)
    return _of_function(result.node, skip_first=result.owner is not None and not static)


@cache
def _of_class(definition: Definition) -> Signature | None:
    """Return the signature of `__init__`, own or inherited, or of the dataclass fields; None if it is unclear."""
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    metaclasses = [_dotted(keyword.value).split(".")[-1] for keyword in node.keywords if keyword.arg == "metaclass"]
    has_own_new = any(isinstance(n, ast.FunctionDef) and n.name == "__new__" for n in node.body)
    if has_own_new or len(metaclasses) < len(node.keywords) or set(metaclasses) - {"ABCMeta"}:
        return None
    if any(_dotted(d).split(".")[-1] == "dataclass" for d in node.decorator_list):
        return _of_dataclass(definition)
    inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    if inits:
        if not _plainly_decorated(inits[-1]):
            return None
        signature = _of_function(inits[-1], skip_first=True)
        return _widened(definition, signature) if signature.takes_more else signature
    return _of_bases(definition)


def _of_bases(definition: Definition) -> Signature | None:
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    for base in node.bases:
        name = _dotted(base.value if isinstance(base, ast.Subscript) else base)
        if name.split(".")[-1] in ("object", "Generic", "Protocol", "ABC"):
            continue
        if _takes_nothing(definition.module, name):
            return Signature((), takes_more=False)
        base_definition = lookup(definition.module, name) if name else Unknown()
        if base_definition == definition:  # `class Data(Data)`: its base was imported by `*`
            return None
        if isinstance(base_definition, Definition) and isinstance(base_definition.node, ast.ClassDef):
            return _of_class(base_definition)
        return None
    return Signature((), takes_more=False)


def _widened(definition: Definition, signature: Signature) -> Signature:
    """Add the arguments of the base class, to which `**kwargs` are most likely passed, if they are known."""
    base = _of_bases(definition)
    if base is None or base.takes_more or not base.arguments:
        return signature
    optional = [replace(a, required=False) for a in base.arguments if a.name not in signature.names()]
    return Signature((*signature.arguments, *optional), takes_more=True)


def _of_dataclass(definition: Definition) -> Signature | None:
    node = definition.node
    assert isinstance(node, ast.ClassDef)
    inherited: tuple[Argument, ...] = ()
    if node.bases:
        base = _of_bases(definition)
        if base is None:
            return None
        inherited = base.arguments
    own = [
        Argument(item.target.id, item.value is None, plain_type(item.annotation))
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not _is_class_variable(item)
    ]
    names = {argument.name for argument in own}
    return Signature((*(a for a in inherited if a.name not in names), *own), takes_more=False)


def _is_class_variable(item: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.dump(item.annotation)


def _of_function(node: ast.AST, skip_first: bool) -> Signature:
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    positional = [*node.args.posonlyargs, *node.args.args]
    without_default = len(positional) - len(node.args.defaults)
    arguments = [Argument(a.arg, i < without_default, plain_type(a.annotation)) for i, a in enumerate(positional)]
    arguments = arguments[1:] if skip_first else arguments
    for argument, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True):
        arguments.append(Argument(argument.arg, default is None, plain_type(argument.annotation)))
    return Signature(tuple(arguments), node.args.kwarg is not None)


def _plainly_decorated(node: ast.AST) -> bool:
    """Return whether no decorator may change the arguments of the function."""
    decorators = [_dotted(d).split(".")[-1] for d in getattr(node, "decorator_list", [])]
    return all(name in _HARMLESS_DECORATORS for name in decorators)


def _takes_nothing(module: Module, name: str) -> bool:
    """Return whether the base class `name`, as written in `module`, is one of `_TAKE_NOTHING`."""
    first, _, rest = name.partition(".")
    origin = _imported_as(module, first)
    return canonical(f"{origin}.{rest}" if rest else origin) in _TAKE_NOTHING


def _imported_as(module: Module, name: str) -> str:
    from trainer.config.sources import parsed

    tree = parsed(module.file) if module.file else None
    for node in tree.body if tree else []:
        if isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name.partition(".")[0]) == name:
                    return alias.name if alias.asname else name
    return name


def _dotted(node: Any) -> str:
    """Return the dotted name of a name, an attribute or a call, such as `a.b.c`; empty for other nodes."""
    if isinstance(node, ast.Call):
        return _dotted(node.func)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
