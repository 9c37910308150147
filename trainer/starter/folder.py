"""`trainer fit data=path/to/folder`: find a folder that is named in place of an option of `data`."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from trainer.config.compose import group_options
from trainer.core.errors import UserError


def expand(overrides: list[str], config_dirs: list[Path], keep: bool, stream: TextIO) -> list[str]:
    """Replace `data=FOLDER` among the overrides by an experiment for that folder. All other overrides take precedence.

    Args:
        overrides: The overrides of the command line.
        config_dirs: Config directories of the command line, whose options of `data` are no folders.
        keep: Write the experiment to `conf/experiment/` of the working directory and select it. A file that was
            written for the same folder before is used as it is. If false, nothing is written.
        stream: Where the choices and their reasons are printed.

    Raises:
        UserError: If the folder holds nothing to train on.
    """
    index, root = _folder(overrides, config_dirs)
    if root is None:
        return overrides
    from trainer.starter.write import experiment_for  # imported late: most commands name an option of data

    return experiment_for(root, overrides[:index] + overrides[index + 1 :], keep, stream)


def _folder(overrides: list[str], config_dirs: list[Path]) -> tuple[int, Path | None]:
    """Return the index of `data=PATH` among the overrides and the path, or None if `data` is an option of the group."""
    for index, override in enumerate(overrides):
        key, equals, value = override.partition("=")
        value = value.strip("'\"")
        if (
            key != "data"
            or not equals
            or not value
            or ("/" not in value and value in group_options(config_dirs, "data"))
        ):
            continue
        path = Path(value).expanduser()
        if path.exists():
            return index, path.resolve()
        if value.startswith(("/", "./", "../", "~")):
            raise UserError(f"data={value}: no such file or folder", "name one that exists, or an option of data")
    return 0, None
