"""Composing a job with Hydra: search path, overrides, resolving. Nothing of Hydra's global state stays behind.

Hydra answers a misspelt key with the advice to add `+`, which then accepts it silently. So only the group choices
are given to Hydra; values are set here, after each key was found in the composed tree, in the schema, or
in the signature of the section's `_target_`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import explain, typed
from trainer.config.problems import raise_all
from trainer.config.schema import Config
from trainer.errors import TrainerError, UserError
from trainer.garbage import no_collection
from trainer.paths import conf_dir


@dataclass(frozen=True)
class Composed:
    """One job, composed."""

    config: dict[str, Any]
    """Resolved and plain; closed sections typed and complete, open ones as files and overrides say."""
    choices: dict[str, str | None]
    """Group to the option that was chosen."""
    overrides: list[str]
    """As they were given."""
    tree: Any
    """OmegaConf's tree before resolving, the `hydra` node included: what `--cfg all` prints."""
    job: Any
    """The same without the node `hydra`: what `--cfg job` prints."""


def compose(
    overrides: list[str], *, config_dirs: list[Path], config_name: str = "config", cwd: Path | None = None
) -> Composed:
    """Compose a job from `config_dirs`, then `./conf` of the working directory, then the shipped groups.

    The first that has a file wins, so a user's own `conf/model/mlp.yaml` stands in for ours.
    Raises UserError for everything that is wrong with files or overrides, with the key and the nearest one.
    """
    from omegaconf import OmegaConf

    with no_collection():
        tree = _compose(overrides, config_dirs, config_name, cwd or Path.cwd())
        job = OmegaConf.masked_copy(tree, [key for key in tree if key != "hydra"])
        config = _typed(_resolve(tree, job))
    choices = dict(tree.hydra.runtime.choices)
    return Composed(config, {k: v for k, v in choices.items() if "hydra/" not in k}, list(overrides), tree, job)


def _compose(overrides: list[str], config_dirs: list[Path], config_name: str, where: Path) -> Any:
    loader = _loader(_search_path(config_dirs, where))
    with explain.hydra_errors(loader, overrides):
        groups, values, unset = _split(loader, overrides)
        tree = _load(loader, config_name, groups)
        explain.require_unset(tree.hydra.runtime.choices, unset, loader)
    if values:
        from trainer.config.keys import set_value  # with what reads signatures: not for a choice of groups

        # Targets first: what keys their section takes depends on them.
        for override in sorted(values, key=lambda o: not o.key_or_group.endswith("._target_")):
            set_value(tree, override, loader, where)
    _record(tree, groups, values)
    return tree


def printed(composed: Composed, part: str, package: str | None = None, resolve: bool = False) -> str:
    """What Hydra's `--cfg` prints: YAML of the `job`, `hydra` or `all`, or of one package of it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = composed.job if part == "job" else composed.tree
    if part == "hydra":
        tree = tree if package else OmegaConf.masked_copy(tree, ["hydra"])
    header = f"# @package {package}\n" if package else ""
    with _hydra_node(composed.tree):
        try:
            if package and package not in ("_global_",):
                tree = OmegaConf.select(tree, package, throw_on_missing=True)
            if tree is None:
                raise UserError(f"--package {package}: there is no such key", "see --cfg job for what there is")
            if not OmegaConf.is_config(tree):
                return f"{header}{tree}\n"
            return header + OmegaConf.to_yaml(tree, resolve=resolve)
        except OmegaConfBaseException as error:
            raise explain.interpolation(error) from None


def group_options(config_dirs: list[Path], group: str, cwd: Path | None = None) -> list[str]:
    """The options of a group over the whole search path."""
    return sorted(_loader(_search_path(config_dirs, cwd or Path.cwd())).get_group_options(group))


def _search_path(config_dirs: list[Path], cwd: Path) -> list[tuple[str, Path]]:
    path = []
    for directory in config_dirs:
        absolute = directory if directory.is_absolute() else cwd / directory
        if not absolute.is_dir():
            raise UserError(
                f"--config-dir {directory}: there is no such directory",
                f"make it, or give one that exists (looked for {absolute})",
            )
        path.append(("command-line", absolute))
    own = cwd / "conf"
    if own.is_dir() and own.resolve() != conf_dir().resolve():
        path.append(("working-directory", own))
    return path


def _loader(user_path: list[tuple[str, Path]]) -> Any:
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.core.utils import JobRuntime, setup_globals

    version.setbase("1.3")
    setup_globals()
    JobRuntime.instance().set("name", "trainer")
    search_path = create_config_search_path(str(conf_dir()))
    for provider, directory in reversed(user_path):
        search_path.prepend(provider, f"file://{directory}")
    return ConfigLoaderImpl(search_path)


def points(overrides: list[str], *, config_dirs: list[Path], cwd: Path | None = None) -> list[list[str]]:
    """The overrides of each job of a sweep (`-m`), in the order of Hydra's basic sweeper: the last varies fastest."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = _loader(_search_path(config_dirs, cwd or Path.cwd()))
    with explain.hydra_errors(loader, overrides):
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(overrides)
        (found,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(point) for point in found]


def _split(loader: Any, overrides: list[str]) -> tuple[list[str], list[Any], list[Any]]:
    """Overrides for Hydra (groups, its own keys) as text, values as parsed overrides, and `group=null` ones."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    groups: list[str] = []
    values: list[Any] = []
    unset: list[Any] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        explain.refuse_sweep(override)
        is_group = loader.repository.group_exists(override.key_or_group)
        if is_group and override.value() is None and not override.is_delete():
            unset.append(override)
        elif override.is_hydra_override() or (is_group and not isinstance(override.value(), dict)):
            groups.append(str(override.input_line))
        else:
            values.append(override)
    return groups, values, unset


def _load(loader: Any, config_name: str, groups: list[str]) -> Any:
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    with _parts_of_hydra(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree = loader.load_configuration(config_name, groups, RunMode.RUN)
    for warning in caught:
        absent = re.search(r"provider=(.*), path=(.*) is not available", str(warning.message))
        if absent:
            fix = "make it, or give one that exists"
            raise UserError(f"{absent[1]}: there is no directory {absent[2]}", fix)
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    OmegaConf.set_struct(tree, False)
    return tree


@contextmanager
def _parts_of_hydra() -> Iterator[None]:
    """Without the options that Hydra chooses for parts of it which do nothing here: 12% of the CPU time of `--cfg job`.

    They leave Hydra's own list of defaults, which is the weakest: what a config file or a command line chooses for
    one of them is composed, or refused, as before.
    """
    from hydra.core.config_store import ConfigStore

    hydras = ConfigStore.instance().repo["hydra"]["config.yaml"].node
    before = list(hydras.defaults)
    hydras.defaults = [
        {part: None if part in explain.UNUSED_PARTS else option for part, option in default.items()}
        for default in before
    ]
    try:
        yield
    finally:
        hydras.defaults = before


def _record(tree: Any, groups: list[str], values: list[Any]) -> None:
    """What Hydra notes of value overrides, so that `hydra:job.override_dirname` and the like are whole."""
    from hydra._internal.config_loader_impl import get_overrides_dirname

    written = [override.input_line for override in values]
    tree.hydra.overrides.task.extend(written)
    style = tree.hydra.job.config.override_dirname
    lines = [_Line(line, line.partition("=")[0]) for line in groups + written if not line.startswith("hydra")]
    tree.hydra.job.override_dirname = get_overrides_dirname(
        lines,  # type: ignore[arg-type]  # it reads these two attributes only
        exclude_keys=style.exclude_keys,
        item_sep=style.item_sep,
        kv_sep=style.kv_sep,
    )


@dataclass
class _Line:
    input_line: str
    key_or_group: str


@contextmanager
def _hydra_node(tree: Any) -> Iterator[None]:
    """`${hydra:...}` reads a singleton; it holds this tree for as long as something is resolved."""
    from hydra.core.hydra_config import HydraConfig

    holder = HydraConfig.instance()
    before = holder.cfg
    try:
        holder.cfg = tree  # as set_config does, without its copy
        yield
    finally:
        holder.cfg = before


def _resolve(tree: Any, job: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with _hydra_node(tree):
        try:
            missing = sorted(OmegaConf.missing_keys(job))
            if missing:
                raise explain.missing(missing)
            plain = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise explain.interpolation(error) from None
    return plain  # type: ignore[return-value]


def _typed(config: dict[str, Any]) -> dict[str, Any]:
    """The closed part against the schema. Raises UserError with every problem."""
    problems: list[TrainerError] = []
    if isinstance(config.get("trainer"), dict) and typed.is_lightnings(config["trainer"]):
        from trainer.config.lightning_keys import translate  # not for a job that has none of them

        problems += translate(config)
    problems += typed.top_level_problems(config)
    for section in typed.key_names(Config):
        if section in config and typed.is_closed(section):
            problems += typed.problems_of(section, config[section])
    raise_all(problems)
    unset = [name for name in typed.REQUIRED if config.get(name) is None]
    if unset:
        raise explain.missing(unset)
    return typed.complete(config)
