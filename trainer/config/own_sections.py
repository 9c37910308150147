"""What a config file must not set for itself: `security`, the channels of `notify`, `checkpoint.dir`.

A config file is passed around. What may run, who is told, and where weights are sent is for the command line and the
project's own files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import yaml_limits
from trainer.core.errors import UserError
from trainer.core.paths import conf_dir

FREE_OF_NOTIFY = ("events", "after_requeues", "pending_after_minutes", "timeout_s")
"""Options of `notify` that any config file may set."""
_VARIABLE = re.compile(r"\$\{oc\.env:[A-Za-z0-9_]+\}")


@dataclass(frozen=True)
class Project:
    """Where the project of a job is."""

    folders: list[Path]
    """The directories that are searched for configs, in order."""
    config_name: str
    """Name of the primary config."""
    cwd: Path
    """Folder of the project."""

    @property
    def own_folders(self) -> list[Path]:
        """The directories within the project."""
        return [folder for folder in self.folders if folder.resolve().is_relative_to(self.cwd.resolve())]

    def in_primary(self, section: str) -> Any:
        """Return a section of the primary config; None if it is not the project's own, or does not have it."""
        paths = (folder / f"{self.config_name}.yaml" for folder in self.folders)
        primary = next((path for path in paths if path.is_file()), None)
        if primary is None or not primary.resolve().is_relative_to(self.cwd.resolve()):
            return None
        content = _plain(primary)
        return content.get(section) if isinstance(content, dict) else None


def require_own_sections(tree: Any, project: Project) -> None:
    """Refuse permissions and channels that come from elsewhere than the project's own files.

    Args:
        tree: The composed tree, before the values of the command line are set.
        project: Where its own files are.

    Raises:
        UserError: Another config file sets the section `security`, a channel of `notify`, or `checkpoint.dir`.
    """
    security = _composed(tree, "security")
    if security and (security != project.in_primary("security") or "${" in str(security)):
        raise UserError(
            "security: a config file must not give permissions to itself",
            f"set it on the command line, such as {_as_override(security)}, or in {project.config_name}.yaml of your "
            "project",
        )
    _require_own(
        tree,
        project,
        "notify",
        lambda key: key not in FREE_OF_NOTIFY,
        "choose who is told of a run, or what is executed",
    )
    _require_own(tree, project, "checkpoint", lambda key: key == "dir", "choose where the weights are sent")


def _require_own(tree: Any, project: Project, section: str, is_own: Callable[[str], bool], what: str) -> None:
    """Refuse the keys of a section for which `is_own` holds, unless the project's own files have these values."""
    node = _composed(tree, section)
    if not isinstance(node, dict):
        return
    chosen = {key: value for key, value in node.items() if is_own(key) and value not in (None, [])}
    known = list(_own_values(project, section)) if chosen else []
    for key, value in chosen.items():
        is_fixed = "${" not in _VARIABLE.sub("", str(value))  # else another file could complete it
        if not is_fixed or not any(key in own and own[key] == value for own in known):
            raise UserError(
                f"{section}.{key}: a config file must not {what}",
                f"set it on the command line, in conf/{section}/ or in {project.config_name}.yaml of your project",
            )


def _composed(tree: Any, section: str) -> Any:
    """Return a section, or the one that it refers to, with its values as they are written; None: there is none."""
    from omegaconf import OmegaConf

    node = tree.get(section) if section in set(tree.keys()) else None  # `in tree` would resolve each value
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _own_values(project: Project, section: str) -> Iterator[Mapping[str, Any]]:
    """Yield a section as the shipped files, the project's own files of the group and its primary config have it."""
    places = [*project.own_folders, conf_dir()]
    for path in (path for place in places for path in sorted((place / section).glob("*.yaml"))):
        is_inside = any(path.resolve().is_relative_to(place.resolve()) for place in places)  # not a link to elsewhere
        content = _plain(path) if is_inside and path.is_file() else None
        if isinstance(content, dict):
            yield content
    content = project.in_primary(section)
    if isinstance(content, dict):
        yield content


def _plain(path: Path) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(yaml_limits.read(path)), resolve=False)


def _as_override(section: Any) -> str:
    for key in ("allow", "env"):
        names = section.get(key) if isinstance(section, dict) else None
        if isinstance(names, list) and names:
            return f"security.{key}=[{','.join(map(str, names))}]"
    return "security.allow=[MODULE]"
