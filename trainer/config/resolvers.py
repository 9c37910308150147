"""The user's OmegaConf resolvers: `${name:...}`, registered in `conf/resolvers.py`.

Many projects register resolvers when their package is imported. The command line does not import packages of the user
(that would import torch), so calls of `OmegaConf.register_new_resolver` belong in this file. It runs before a job is
composed, with the working directory importable, and its resolvers are removed afterwards. The ranks do not need them,
because the configuration is frozen.
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
_MAX_FILES = 2000
"""Maximum number of modules of a project that are searched for a resolver."""


@contextmanager
def own_resolvers(folders: list[Path], cwd: Path) -> Iterator[None]:
    """Register the resolvers of the `resolvers.py` in these config directories, and remove them at the end.

    Raises:
        UserError: A file raises an exception, or is outside of `cwd`.
    """
    with _project_root(cwd):
        files = [folder / FILE for folder in folders if (folder / FILE).is_file()]
        for file in files:
            if not file.resolve().is_relative_to(cwd.resolve()):
                problem = f"{file} is not run: it is outside of the project"
                raise UserError(problem, f"if you trust it, copy it to conf/{FILE} of your project")
        if files:
            with _registered(files, cwd):
                yield
        else:
            yield


@contextmanager
def _project_root(cwd: Path) -> Iterator[None]:
    """Set PROJECT_ROOT for `${oc.env:...}` in a project with a file `.project-root`, as rootutils does."""
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
    registered: set[str] = set()
    try:
        for file in files:
            try:
                runpy.run_path(str(file), run_name="resolvers")
            except Exception as error:  # user code may raise anything
                message = f"{file}: {type(error).__name__}: {error}"
                fix = "correct it; it runs before a job is composed, without torch"
                raise UserError(message, fix) from None
            finally:  # without those that Hydra registers while the job is composed
                registered = set(BaseContainer._resolvers) - before
        yield
    finally:
        sys.path[:] = path
        for name in registered & set(BaseContainer._resolvers):
            del BaseContainer._resolvers[name]


def no_resolver(key: str, name: str, cwd: Path) -> UserError:
    """Return the error for an unknown resolver `${name:...}`, with the line that registers it."""
    import builtins  # only needed for this mistake

    registered = _registration(name, cwd)
    function = name if name in dir(builtins) else "lambda x: x"
    line, origin = f'OmegaConf.register_new_resolver("{name}", {function})', ""
    if registered is not None:
        line, file = registered
        origin = f" (as in {file}, which trainer does not import)"
    fix = f"add to conf/{FILE}{origin}: from omegaconf import OmegaConf; {line}"
    return UserError(f"{key}: unknown resolver {name} in ${{{name}:...}}", fix)


def _registration(name: str, cwd: Path) -> tuple[str, str] | None:
    """Return the call that registers `name` in a module of the project, and its file and line."""
    import ast

    for file in islice(_modules(cwd), _MAX_FILES):
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
