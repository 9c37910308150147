"""Composing a job with Hydra: search path, overrides, resolving. Nothing of Hydra's global state stays behind.

Hydra answers a misspelt key with the advice to add `+`, which then accepts it silently. So only the group choices
are given to Hydra; values are set here, after each key was found in the composed tree, in the schema, or
in the signature of the section's `_target_`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import explain, typed
from trainer.config.hydra_node import is_multirun, problems_of_hydra, replaced, sweep_params
from trainer.config.primary import load_whole
from trainer.config.problems import raise_all
from trainer.config.resolvers import own_resolvers
from trainer.config.schema import Config
from trainer.core.errors import TrainerError, UserError
from trainer.core.garbage import no_collection
from trainer.core.paths import conf_dir

if TYPE_CHECKING:
    from trainer.config.hydra_files import HydraFiles


@dataclass(frozen=True, eq=False, repr=False)
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
    place: Place
    """Where from."""
    output_dir: str
    """Stands for the run directory in `config`: it has its name once it is made."""
    notes: tuple[str, ...] = ()
    """Lines for the user."""


@dataclass(frozen=True, eq=False, repr=False)
class Place:
    """Where a job is composed."""

    config_dirs: tuple[Path, ...]
    cwd: Path
    number: int | None = None
    """Of the job in a sweep, from 0; null: no sweep."""

    def resolvers(self) -> AbstractContextManager[None]:
        return own_resolvers([*(self.cwd / folder for folder in self.config_dirs), self.cwd / "conf"], self.cwd)


TEMPLATES = frozenset(("ckpt_path", "train", "test", "task_name"))
"""Top-level keys of the lightning-hydra-template that mean something to `fit`."""

_RUN = "THE-RUN-DIRECTORY"
"""`hydra:runtime.output_dir` until name and folder of the run are resolved."""


def compose(
    overrides: list[str],
    *,
    config_dirs: list[Path],
    config_name: str = "config",
    cwd: Path | None = None,
    number: int | None = None,
    after: Composed | None = None,
) -> Composed:
    """Compose a job from `config_dirs`, then `./conf` of the working directory, then the shipped groups.

    The first that has a file wins, so a user's own `conf/model/mlp.yaml` stands in for ours. `number`: of a job of a
    sweep; `after`: its first job, whose `${now:...}` holds for all.
    Raises UserError for everything that is wrong with files or overrides, with the key and the nearest one.
    """
    from omegaconf import OmegaConf

    place = Place(tuple(config_dirs), cwd or Path.cwd(), number)
    notes: list[str] = []
    with no_collection(), place.resolvers():
        tree = _compose(overrides, place, config_name, notes)
        if after is not None:
            OmegaConf.copy_cache(after.tree, tree)
        job = OmegaConf.masked_copy(tree, [key for key in tree if key != "hydra"])
        job._metadata.resolver_cache = tree._metadata.resolver_cache  # one `${now:...}` in both
        plain = _resolve(tree, job)
        if plain.get("test") is True:
            from trainer.config.lightning_names import left_for_later

            notes.append(left_for_later(plain))
        config = _typed(plain)
    output_dir = str(place.cwd / Path(config["runs_dir"]).expanduser() / f"{config['name']}-ID")
    tree.hydra.runtime.output_dir = output_dir
    config = replaced(config, _RUN, output_dir)
    choices = {group: option for group, option in tree.hydra.runtime.choices.items() if "hydra/" not in group}
    return Composed(config, choices, list(overrides), tree, job, place, output_dir, tuple(notes))


def frozen_hydra(composed: Composed) -> HydraFiles:
    """What a run of this job keeps of Hydra's own node. Raises UserError where `hydra.run.dir` cannot be one."""
    from trainer.config.hydra_files import hydra_files, require_free

    with composed.place.resolvers(), _hydra_node(composed.tree):
        multirun = composed.place.number is not None
        files = hydra_files(composed.tree, composed.job, composed.overrides, composed.output_dir, multirun)
    if files.link is not None:
        require_free(files.link, composed.place.cwd)
    return files


def _compose(overrides: list[str], place: Place, config_name: str, notes: list[str]) -> Any:
    where = place.cwd
    loader = _loader(_search_path(list(place.config_dirs), where))
    with explain.hydra_errors(loader, overrides):
        groups, values, unset = _split(loader, overrides)
        tree = load_whole(loader, config_name, groups, _load)
        explain.require_unset(tree.hydra.runtime.choices, unset, loader)
    raise_all(list(problems_of_hydra(tree)))
    tree.hydra.runtime.output_dir = _RUN
    if place.number is not None:
        tree.hydra.job.num, tree.hydra.job.id = place.number, str(place.number)
    if values:
        from trainer.config.keys import set_value  # with what reads signatures: not for a choice of groups

        # Targets first: what keys their section takes depends on them.
        for override in sorted(values, key=_targets_first):
            note = set_value(tree, override, loader, where)
            notes += [note] if note else []
    model = tree.get("model")
    if model and hasattr(model, "keys") and not str(model.get("_target_")).startswith("trainer."):
        from trainer.config.own_loaders import use_own_loaders  # reads source text: only of a user's own model

        chosen = [one.partition("=")[0] for one in groups]
        note = use_own_loaders(tree, chosen, [one.key_or_group for one in values], where)
        notes += [note] if note else []
    _record(tree, groups, values)
    return tree


def _targets_first(override: Any) -> tuple[bool, int]:
    """The outer one before those inside it."""
    key, value = override.key_or_group, None if override.is_delete() else override.value()
    is_target = key.endswith("._target_") or (isinstance(value, dict) and "_target_" in value)
    return not is_target, key.count(".") if is_target else 0


def printed(composed: Composed, part: str, package: str | None = None, resolve: bool = False) -> str:
    """What Hydra's `--cfg` prints: YAML of the `job`, `hydra` or `all`, or of one package of it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = composed.job if part == "job" else composed.tree
    if part == "hydra":
        tree = tree if package else OmegaConf.masked_copy(tree, ["hydra"])
    header = f"# @package {package}\n" if package else ""
    with composed.place.resolvers(), _hydra_node(composed.tree):
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


def points(
    overrides: list[str],
    *,
    config_dirs: list[Path],
    cwd: Path | None = None,
    config_name: str = "config",
    multirun: bool = True,
) -> list[list[str]] | None:
    """The overrides of each job of a sweep, in the order of Hydra's basic sweeper: the last varies fastest.

    `hydra.sweeper.params` of the config files come first; the command line wins over them. Null where it is no sweep:
    neither `multirun` (`-m`) nor `hydra.mode=MULTIRUN`.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = _loader(_search_path(config_dirs, cwd or Path.cwd()))
    with explain.hydra_errors(loader, overrides):
        parser = OverridesParser.create(config_loader=loader)
        parsed = parser.parse_overrides(overrides)
        fixed = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
        tree = load_whole(loader, config_name, _split(loader, fixed)[0], partial(_load, sweep=True))
        if not multirun and not is_multirun(tree):
            return None
        given = {one.key_or_group for one in parsed}
        from_files = [f"{key}={value}" for key, value in sweep_params(tree).items() if key.lstrip("+") not in given]
        (found,) = BasicSweeper.split_arguments([*parser.parse_overrides(from_files), *parsed], max_batch_size=None)
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


def _load(loader: Any, config_name: str, groups: list[str], sweep: bool = False) -> Any:
    """`sweep`: what the jobs of a sweep have in common, in which some groups may not be chosen yet."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    with _parts_of_hydra(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree = loader.load_configuration(config_name, groups, RunMode.MULTIRUN if sweep else RunMode.RUN)
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


@dataclass(eq=False, repr=False)
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
            plain = OmegaConf.to_container(job, resolve=True, throw_on_missing=True, enum_to_str=True)
        except OmegaConfBaseException as error:
            raise explain.interpolation(error) from None
    return plain  # type: ignore[return-value]


DEFAULT_EPOCHS = 10


def _limit(options: dict[str, Any]) -> None:
    """The default number of epochs where nothing limits the training; beside another limit, as in Lightning, none."""
    others = (options.get("max_steps") in (None, -1), options.get("max_time") is None, not options.get("fast_dev_run"))
    if all(others) and options.get("max_epochs") is None:
        options["max_epochs"] = DEFAULT_EPOCHS


def _settle_interval(config: dict[str, Any]) -> None:
    node = config.get("scheduler")
    if not isinstance(node, dict) or node.get("interval") is not None:
        return
    if str(node.get("_target_")).startswith("trainer.schedules."):
        node["interval"] = "step"  # what `settle_interval` finds; most jobs have one of these, and need not import it
    else:
        from trainer.config.schedule import settle_interval

        settle_interval(config)


def _typed(config: dict[str, Any]) -> dict[str, Any]:
    """The closed part against the schema. Raises UserError with every problem."""
    problems: list[TrainerError] = []
    if isinstance(config.get("trainer"), dict):
        _limit(config["trainer"])
    if isinstance(config.get("trainer"), dict) and typed.is_lightnings(config["trainer"]):
        from trainer.config.lightning_keys import translate  # not for a job that has none of them

        problems += translate(config)
    if not TEMPLATES.isdisjoint(config):
        from trainer.config.lightning_names import problems_at_top

        problems += problems_at_top(config)
    if not config.keys() <= set(typed.key_names(Config)):
        from trainer.config.own_keys import slips_in_files  # not for a job without keys of its own

        problems += slips_in_files(config)
    problems += typed.top_level_problems(config)
    for section in typed.key_names(Config):
        if section in config and typed.is_closed(section):
            problems += typed.problems_of(section, config[section])
    raise_all(problems)
    unset = [name for name in typed.REQUIRED if config.get(name) is None]
    if unset:
        raise explain.missing(unset)
    _settle_interval(config)
    return typed.complete(config)
