"""Read config files for Hydra within limits, and only from folders: the search path of a job."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.core_plugins import file_config_source
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult, ConfigSource

from trainer.config import yaml_limits
from trainer.core.errors import UserError


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's folder of config files; files with a byte order mark keep their `# @package` header.

    Hydra's registry of sources compares classes by name, so the name is Hydra's.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one config file.

        Raises:
            UserError: The file exceeds a limit, is not UTF-8, or has an interpolation that cannot be parsed.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import GrammarParseError

        path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        if not os.path.isfile(path):
            return super().load_config(config_path)  # Hydra's error
        text = yaml_limits.read(Path(path))
        stream = io.StringIO(text)
        stream.name = path
        try:
            content = OmegaConf.load(stream)
        except GrammarParseError as error:
            fix = "correct the expression in ${...}, or put a backslash before the dollar sign"
            raise UserError(f"{path}: {str(error).splitlines()[0]}", fix) from None
        _keep_own_content(content)
        return ConfigResult(
            config=content,
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=ConfigSource._get_header_dict(text[:512]),
        )


def _keep_own_content(content: Any) -> None:
    """Write the `_self_` that Hydra means where a defaults list has overrides only.

    Hydra 1.3 forgets it, and so the whole content of the file, once a group is added (`+model=mlp`).
    """
    from omegaconf import DictConfig, ListConfig

    written = content.get("defaults") if isinstance(content, DictConfig) else None
    if isinstance(written, ListConfig) and len(written) and all(_is_override(one) for one in written):
        written.insert(0, "_self_")


def _is_override(entry: Any) -> bool:
    return hasattr(entry, "keys") and all(str(key).startswith("override ") for key in entry)


class ConfigLoader(config_loader_impl.ConfigLoaderImpl):
    """Hydra's loader, whose `hydra.searchpath` must name folders: `pkg://` would import a package."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        from hydra._internal.sources_registry import SourcesRegistry

        SourcesRegistry.instance().types["file"] = FileConfigSource
        super().__init__(config_search_path)

    def _process_config_searchpath(self, config_name: str | None, parsed_overrides: list[Any], repo: Any) -> None:
        before = type(repo).initialize_sources

        def checked(search_path: ConfigSearchPath) -> None:
            for element in search_path.get_path():
                if element.provider.startswith("hydra.searchpath"):
                    _require_folder(str(element.path))
            before(repo, search_path)

        repo.initialize_sources = checked
        try:
            super()._process_config_searchpath(config_name, parsed_overrides, repo)
        finally:
            del repo.initialize_sources


def _require_folder(path: str) -> None:
    scheme, separator, _ = path.partition("://")
    if separator and scheme != "file":
        problem = f"hydra.searchpath={path}: refused, because {scheme}:// imports a package"
        raise UserError(problem, "name its folder: --config-dir FOLDER, or hydra.searchpath=[file:///FOLDER]")
