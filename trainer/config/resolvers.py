"""Resolvers of the user's own: `${name:...}` that `conf/resolvers.py` registers with OmegaConf.

Many projects register them where their package is imported. The prompt imports no package of the user's (that would
import torch), so the calls of `OmegaConf.register_new_resolver` belong into this one file. It is run before a job is
composed, with the working directory importable; what it registers is forgotten afterwards. The ranks need it not:
values are frozen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.core.errors import UserError

if TYPE_CHECKING:
    import ast

FILE = "resolvers.py"
ROOT_VARIABLE = "PROJECT_ROOT"
_MOST_FILES = 2000
"""Modules of a project that are searched for a resolver."""


@contextmanager
def own_resolvers(folders: list[Path], cwd: Path) -> Iterator[None]:
    """Within it, what the `resolvers.py` of these config folders register is there. Raises UserError if one fails."""
    with _project_root(cwd):
        files = [folder / FILE for folder in folders if (folder / FILE).is_file()]
        if files:
            with _registered(files, cwd):
                yield
        else:
            yield


@contextmanager
def _project_root(cwd: Path) -> Iterator[None]:
    """PROJECT_ROOT, which rootutils sets where a project with a file `.project-root` starts, for `${oc.env:...}`."""
    is_missing = ROOT_VARIABLE not in os.environ and (cwd / ".project-root").exists()
    if is_missing:
        os.environ[ROOT_VARIABLE] = str(cwd)
    try:
        yield
    finally:
        if is_missing:
            del os.environ[ROOT_VARIABLE]


@contextmanager
def _registered(files: list[Path], cwd: Path) -> Iterator[None]:
    import runpy

    from omegaconf.basecontainer import BaseContainer

    before, path = set(BaseContainer._resolvers), list(sys.path)
    sys.path[:0] = [str(cwd), str(cwd / "src")]
    try:
        for file in files:
            try:
                runpy.run_path(str(file), run_name="resolvers")
            except Exception as error:  # the user's own code: whatever it raises
                message = f"{file}: {type(error).__name__}: {error}"
                fix = "correct it; it is run before a job is composed, where torch is not imported"
                raise UserError(message, fix) from None
        yield
    finally:
        sys.path[:] = path
        for name in set(BaseContainer._resolvers) - before:
            del BaseContainer._resolvers[name]


def no_resolver(key: str, name: str, cwd: Path) -> UserError:
    """The refusal of `${name:...}`, with the line that registers it."""
    import builtins  # not for a job without such a mistake

    registered = _registration(name, cwd)
    function = name if name in dir(builtins) else "lambda x: x"
    line, found = f'OmegaConf.register_new_resolver("{name}", {function})', ""
    if registered is not None:
        line, file = registered
        found = f" (as {file} does, which the prompt does not import)"
    fix = f"write into conf/{FILE}{found}: from omegaconf import OmegaConf; {line}"
    return UserError(f"{key}: there is no resolver {name} for ${{{name}:...}}", fix)


def _registration(name: str, cwd: Path) -> tuple[str, str] | None:
    """The call that registers `name` in a module of the project, and its file."""
    import ast

    for file in islice(_modules(cwd), _MOST_FILES):
        try:
            text = file.read_text(encoding="utf-8")
            if "register_" not in text or name not in text:
                continue
            tree = ast.parse(text)
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _registers(node, name):
                return ast.unparse(node), f"{file.relative_to(cwd)}:{node.lineno}"
    return None


def _modules(cwd: Path) -> Iterator[Path]:
    for path in sorted(cwd.iterdir()):
        if path.name.startswith(".") or path.name in ("runs", "wandb") or (path / "pyvenv.cfg").exists():
            continue
        if path.is_dir():
            yield from path.rglob("*.py")
        elif path.suffix == ".py":
            yield path


def _registers(call: ast.Call, name: str) -> bool:
    import ast

    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    first = call.args[0] if call.args else next((k.value for k in call.keywords if k.arg == "name"), None)
    return called.startswith("register_") and isinstance(first, ast.Constant) and first.value == name
