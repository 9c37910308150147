"""Read config files for Hydra within limits, and only from folders: the search path of a job."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins import file_config_source
from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.config_source import ConfigResult, ConfigSource

from trainer.config import yaml_limits
from trainer.config.primary import copier
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
        path = os.path.realpath(os.path.join(self.path, self._normalize_file_name(config_path)))
        if not os.path.isfile(path):
            return super().load_config(config_path)  # Hydra's error
        text = yaml_limits.read(Path(path))
        return ConfigResult(
            config=_content(path, text)(),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=ConfigSource._get_header_dict(text[:512]),
        )


@lru_cache(maxsize=512)
def _content(path: str, text: str) -> Callable[[], Any]:
    """Return what makes copies of the content of a file: most jobs of a sweep read the same ones."""
    from omegaconf import OmegaConf
    from omegaconf.errors import GrammarParseError

    stream = io.StringIO(text)
    stream.name = path
    try:
        content = OmegaConf.load(stream)
    except GrammarParseError as error:
        fix = "correct the expression in ${...}, or put a backslash before the dollar sign"
        raise UserError(f"{path}: {str(error).splitlines()[0]}", fix) from None
    _keep_own_content(content)
    return copier(content)


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


class _Repository(ConfigRepository):
    """Hydra's list of sources. A copy gets a list of its own, but not a deep copy of all that is in Hydra's store."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Repository:
        copied = copy.copy(self)
        copied.sources = list(self.sources)
        return copied


@contextmanager
def _interpolation_map_where_used() -> Iterator[None]:
    """Let Hydra map the choices for interpolations of a defaults list only where the list has one.

    It does so for each config file, which is a fifth of its time.
    """
    module: Any = defaults_list
    whole = module._create_interpolation_map

    def create(overrides: Any, defaults: list[Any], self_added: bool) -> Any:
        if any(not one.is_self() and one.is_interpolation() for one in defaults):
            return whole(overrides, defaults, self_added)
        return None

    module._create_interpolation_map = create
    try:
        yield
    finally:
        module._create_interpolation_map = whole


class ConfigLoader(config_loader_impl.ConfigLoaderImpl):
    """Hydra's loader, in two thirds of its time.

    `hydra.searchpath` must name folders: `pkg://` would import a package.
    """

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        from hydra._internal.sources_registry import SourcesRegistry

        SourcesRegistry.instance().types["file"] = FileConfigSource
        super().__init__(config_search_path)
        self.repository = _Repository(config_search_path)

    def load_configuration(self, *arguments: Any, **named: Any) -> Any:
        """Compose the config as Hydra does."""
        with _interpolation_map_where_used():
            return super().load_configuration(*arguments, **named)

    @staticmethod
    def _embed_result_config(ret: ConfigResult, package_override: str | None) -> ConfigResult:
        """Put a copy of a config under its package, as Hydra does, but not a deep copy: see `copier`."""
        from omegaconf import OmegaConf, flag_override

        package = ret.header["package"] if package_override is None else package_override
        if not package:
            return ret
        config = OmegaConf.create()
        with flag_override(config, "no_deepcopy_set_nodes", True):
            OmegaConf.update(config, package, copier(ret.config)(), merge=False)
        embedded = copy.copy(ret)
        embedded.config = config
        return embedded

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
