"""`trainer init`: a small project of one's own that trains at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from trainer.cli.overrides import Parser
from trainer.core.errors import DONE, EnvironmentFault, UserError

_DESCRIPTION = "Write a small project: a model, data and an experiment of your own, to be changed."
_TEMPLATES = Path(__file__).with_name("templates")
_SUFFIX = ".template"


def main(argv: list[str]) -> int:
    """Returns 0 after writing the project; never writes into a folder that has something in it."""
    made = Parser(prog="trainer init", description=_DESCRIPTION, allow_abbrev=False)
    made.add_argument("name", metavar="NAME", help="folder to make; its last part names the project")
    folder = Path(made.parse_args(argv).name)
    write_project(folder, _package(folder.name))
    print(f"wrote {folder}\nnext:\n  cd {folder}\n  trainer fit experiment=mine")
    return DONE


def write_project(folder: Path, package: str) -> None:
    """Fill the templates in. Raises UserError where the folder has something in it."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} exists already", "choose another name, or an empty folder")
    try:
        for template in sorted(_TEMPLATES.rglob(f"*{_SUFFIX}")):
            target = folder / _target(template.relative_to(_TEMPLATES), package)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = template.read_text(encoding="utf-8")
            target.write_text(text.replace("{{name}}", folder.name).replace("{{package}}", package), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"cannot write {folder}: {error.strerror}", "choose a folder you can write") from None


def _target(template: Path, package: str) -> Path:
    name = template.name.removesuffix(_SUFFIX)
    parts = [package if part == "package" else part for part in template.parts[:-1]]
    return Path(*parts, ".gitignore" if name == "gitignore" else name)


def _package(name: str) -> str:
    """The import name: `my-net` is the package `my_net`."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,60}", name):
        raise UserError(f"{name!r} cannot name a project", "use letters, digits, '_' and '-', a letter first")
    package = name.replace("-", "_").lower()
    if package in sys.stdlib_module_names or _is_installed(package):
        raise UserError(
            f"{name}: there is a Python module {package} already", f"choose another name, such as my-{name}"
        )
    return package


def _is_installed(package: str) -> bool:
    from importlib.machinery import PathFinder

    elsewhere = [folder for folder in sys.path if folder and Path(folder) != Path.cwd()]
    spec = PathFinder.find_spec(package, elsewhere)
    return spec is not None and spec.origin is not None
