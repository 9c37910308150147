"""`trainer init`: create a small project that trains without changes."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

from trainer.cli.options import make_parser
from trainer.core.errors import DONE, EnvironmentFault, UserError

_DESCRIPTION = (
    "Create a small project with a LightningModule, a LightningDataModule and their configs. It trains without "
    "changes; edit it from there."
)
_TEMPLATES = Path(__file__).with_name("templates")
_SUFFIX = ".template"


def main(argv: list[str]) -> int:
    """Run `trainer init` and return the exit code."""
    parser = make_parser("init", _DESCRIPTION, "trainer init my-project")
    parser.add_argument("name", metavar="NAME", help="folder to create; its last part names the project")
    folder = Path(parser.parse_args(argv).name)
    write_project(folder, _package(folder.name))
    print(f"wrote {folder}\nnext:\n  cd {folder}\n  trainer fit experiment=mine")
    return DONE


def write_project(folder: Path, package: str) -> None:
    """Write the project from the templates.

    Raises:
        UserError: If the folder is not empty.
        EnvironmentFault: If it cannot be written.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{folder} already exists", "choose another name, or an empty folder")
    try:
        for template in sorted(_TEMPLATES.rglob(f"*{_SUFFIX}")):
            target = folder / _target(template.relative_to(_TEMPLATES), package)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = template.read_text(encoding="utf-8")
            target.write_text(text.replace("{{name}}", folder.name).replace("{{package}}", package), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"cannot write {folder}: {error.strerror}", "choose a writable folder") from None


def _target(template: Path, package: str) -> Path:
    name = template.name.removesuffix(_SUFFIX)
    parts = [package if part == "package" else part for part in template.parts[:-1]]
    return Path(*parts, ".gitignore" if name == "gitignore" else name)


def _package(name: str) -> str:
    """Return the import name of a project: `my_net` for `my-net`."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,60}", name):
        raise UserError(
            f"{name!r} is not a valid project name", "use letters, digits, '_' and '-', beginning with a letter"
        )
    package = name.replace("-", "_").lower()
    if keyword.iskeyword(package):
        raise UserError(f"{name}: a word of the Python language", f"choose another name, such as my-{name}")
    if package in sys.stdlib_module_names or _is_installed(package):
        raise UserError(f"{name}: a Python module {package} already exists", f"choose another name, such as my-{name}")
    return package


def _is_installed(package: str) -> bool:
    from importlib.machinery import PathFinder

    elsewhere = [folder for folder in sys.path if folder and Path(folder) != Path.cwd()]
    spec = PathFinder.find_spec(package, elsewhere)
    return spec is not None and spec.origin is not None
