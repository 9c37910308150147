"""`trainer fit data=path/to/folder`: whether a command line names a folder in place of an option of `data`."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from trainer.config.compose import group_options
from trainer.core.errors import UserError


def expand(overrides: list[str], config_dirs: list[Path], keep: bool, say: TextIO) -> list[str]:
    """The overrides with `data=FOLDER` replaced by an experiment for that folder; all others stay, and win.

    `keep`: write the experiment to `conf/experiment/` of the working directory and choose it there (an earlier one
    of the same folder is used as it is now); otherwise nothing is written. What was chosen and why goes to `say`.
    Raises UserError for a folder that cannot be trained on.
    """
    place, root = _folder(overrides, config_dirs)
    if root is None:
        return overrides
    from trainer.starter.write import experiment_for  # not for most commands, which name their data

    return experiment_for(root, overrides[:place] + overrides[place + 1 :], keep, say)


def _folder(overrides: list[str], config_dirs: list[Path]) -> tuple[int, Path | None]:
    """The place of `data=PATH` among the overrides, and the path; None where `data` is an option of the group."""
    for place, override in enumerate(overrides):
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
            return place, path.resolve()
        if value.startswith(("/", "./", "../", "~")):
            raise UserError(
                f"data={value}: there is no such file or folder", "name one that exists, or an option of data"
            )
    return 0, None
