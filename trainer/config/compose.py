"""Compose a job with Hydra: search path, overrides, interpolations. Hydra's global state is restored afterwards.

Hydra answers a misspelt key with the advice to add `+`, which then accepts it silently. Therefore only group choices
are passed to Hydra. Values are set here, after each key was found in the composed tree, in the schema, or in the
signature of the section's `_target_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import environment, hydra_errors
from trainer.config.bounded import bounded
from trainer.config.complete import complete
from trainer.config.hydra_loader import load_tree, loader_of
from trainer.config.hydra_node import (
    DEFAULT_SWEEP_DIR,
    is_multirun,
    problems_of_hydra,
    replaced,
    sweep_params,
)
from trainer.config.primary import copier, load_whole
from trainer.config.problems import raise_all
from trainer.config.resolvers import own_resolvers
from trainer.config.schema import Config
from trainer.config.trackers import move_to_logger, note_on_wandb
from trainer.core.errors import UserError

if TYPE_CHECKING:
    from trainer.config.hydra_files import HydraFiles


@dataclass(frozen=True, eq=False, repr=False)
class Composed:
    """A composed job."""

    config: dict[str, Any]
    """Plain values with interpolations resolved; closed sections are typed and complete, open ones are as composed."""
    choices: dict[str, str | None]
    """Chosen option by config group."""
    overrides: list[str]
    """Overrides of the command line, unchanged."""
    tree: Any
    """OmegaConf tree with interpolations, including the `hydra` node: the output of `--cfg all`."""
    job: Any
    """The same tree without the `hydra` node: the output of `--cfg job`."""
    place: Place
    """The directories from which the job was composed."""
    output_dir: str
    """Placeholder for the run directory in `config`, whose name is only known once it is created."""
    notes: tuple[str, ...] = ()
    """Lines to show to the user."""


@dataclass(frozen=True, eq=False, repr=False)
class Place:
    """The directories from which a job is composed, and its position in a sweep."""

    config_dirs: tuple[Path, ...]
    cwd: Path
    number: int | None = None
    """Number of the job in a sweep, from 0; None: no sweep."""

    @contextmanager
    def resolvers(self) -> Iterator[None]:
        """Return a context in which the user's OmegaConf resolvers are registered, and interpolations are bounded."""
        with own_resolvers(self.folders(), self.cwd), bounded():
            yield

    def folders(self) -> list[Path]:
        """Return the directories of the user that are searched for configs, in order."""
        return [*(self.cwd / folder for folder in self.config_dirs), self.cwd / "conf"]


_RUN = "THE-RUN-DIRECTORY"
"""Value of `hydra:runtime.output_dir` until the name and directory of the run are resolved."""


def compose(
    overrides: list[str],
    *,
    config_dirs: list[Path],
    config_name: str = "config",
    cwd: Path | None = None,
    number: int | None = None,
    after: Composed | None = None,
    loaded: Loaded | None = None,
) -> Composed:
    """Compose a job from `config_dirs`, then `./conf` of the working directory, then the shipped groups.

    The first directory that has a file wins, so the `conf/model/mlp.yaml` of a project replaces the shipped file.

    Args:
        overrides: Hydra overrides of the command line.
        config_dirs: Directories to search first.
        config_name: Name of the primary config.
        cwd: Working directory; None: the current one.
        number: Number of the job in a sweep, from 0; None: no sweep.
        after: The first job of the sweep, whose `${now:...}` all jobs share.
        loaded: What the jobs of a sweep share; None: nothing.

    Raises:
        UserError: A file or an override is invalid; names the key and the nearest valid key.
    """
    from omegaconf import OmegaConf

    place = Place(tuple(config_dirs), cwd or Path.cwd(), number)
    notes: list[str] = []
    with place.resolvers():
        tree = _compose(overrides, place, config_name, notes, loaded)
        if after is not None:
            OmegaConf.copy_cache(after.tree, tree)
        job = OmegaConf.masked_copy(tree, [key for key in tree if key != "hydra"])
        job._metadata.resolver_cache = tree._metadata.resolver_cache  # one `${now:...}` in both
        plain = _resolve(tree, job)
        if plain.get("test") is True:
            from trainer.config.lightning_names import left_for_later

            notes.append(left_for_later(plain))
        if "seed" in plain and plain["seed"] is None:  # as in the template, where it means: do not seed
            plain["seed"] = Config.seed
            notes.append(f"seed: null: every run has a seed, this one {Config.seed}; set seed=NUMBER for another")
        config = complete(plain)
        if config["logger"]:
            from trainer.config.loggers import switched_off

            note = switched_off(config)
            notes += [note] if note else []
    output_dir = str(place.cwd / Path(config["runs_dir"]).expanduser() / f"{config['name']}-ID")
    tree.hydra.runtime.output_dir = output_dir
    config = replaced(config, _RUN, output_dir)
    choices = {group: option for group, option in tree.hydra.runtime.choices.items() if "hydra/" not in group}
    return Composed(config, choices, list(overrides), tree, job, place, output_dir, tuple(notes))


def frozen_hydra(composed: Composed) -> HydraFiles:
    """Return the files of Hydra that a run of this job keeps.

    Raises:
        UserError: `hydra.run.dir` cannot become a link to the run.
    """
    from trainer.config.hydra_files import hydra_files, require_free

    with composed.place.resolvers(), _hydra_node(composed.tree):
        multirun = composed.place.number is not None
        files = hydra_files(composed.tree, composed.job, composed.overrides, composed.output_dir, multirun)
    if files.link is not None:
        require_free(files.link, composed.place.cwd)
    return files


class Loaded:
    """The trees that Hydra has loaded for the jobs of one sweep: most of its jobs choose the same groups.

    Reading and merging the files of a job takes nine tenths of its composition.
    """

    def __init__(self) -> None:
        self._loader: Any = None
        self._trees: dict[tuple[str, ...], tuple[list[str], Callable[[], Any]]] = {}

    def loader(self, place: Place) -> Any:
        """Return Hydra's loader of the search path of `place`."""
        if self._loader is None:
            self._loader = loader_of(place.config_dirs, place.cwd)
        return self._loader

    def tree(self, loader: Any, config_name: str, groups: list[str]) -> Any:
        """Return the tree with these groups, for the caller to change; completes `groups` as `load_whole` does."""
        key = tuple(groups)
        if key not in self._trees:
            tree = load_whole(loader, config_name, groups, load_tree)
            self._trees[key] = list(groups), copier(tree)
        groups[:], copy = self._trees[key]
        return copy()


def require_free_link(composed: Composed) -> None:
    """Refuse what `frozen_hydra` refuses, at a fiftieth of its time unless `hydra.sweep.dir` is set.

    Raises:
        UserError: `hydra.sweep.dir` cannot become a link to the run.
    """
    if not str(composed.tree.hydra.sweep._get_node("dir")._value()).startswith(DEFAULT_SWEEP_DIR):
        frozen_hydra(composed)


def _compose(overrides: list[str], place: Place, config_name: str, notes: list[str], loaded: Loaded | None) -> Any:
    from trainer.config.own_sections import Project, require_own_sections

    cwd = place.cwd
    loader = loaded.loader(place) if loaded else loader_of(place.config_dirs, cwd)
    with hydra_errors.translated(loader, overrides):
        groups, values, unset = _split(loader, overrides)
        tree = (loaded.tree if loaded else partial(load_whole, load=load_tree))(loader, config_name, groups)
        hydra_errors.require_unset(tree.hydra.runtime.choices, unset, loader)
    require_own_sections(tree, Project(place.folders(), config_name, cwd))
    raise_all(list(problems_of_hydra(tree)))
    move_to_logger(tree)
    tree.hydra.runtime.output_dir = _RUN
    if place.number is not None:
        tree.hydra.job.num, tree.hydra.job.id = place.number, str(place.number)
    if values:
        from trainer.config.unknown_keys import set_value  # reads signatures: not needed for a choice of groups

        # Targets first: they decide which keys their section takes.
        for override in sorted(values, key=_targets_first):
            note = set_value(tree, override, loader, cwd)
            notes += [note] if note else []
        note = note_on_wandb(tree, [override.key_or_group for override in values])
        notes += [note] if note else []
    model = tree.get("model")
    if model and hasattr(model, "keys") and not str(model.get("_target_")).startswith("trainer."):
        from trainer.config.own_loaders import use_own_loaders  # reads source text: only for a user-defined model

        chosen = [one.partition("=")[0] for one in groups]
        note = use_own_loaders(tree, chosen, [one.key_or_group for one in values], cwd)
        notes += [note] if note else []
    raise_all(list(environment.problems_of_job(tree)))
    _record(tree, groups, values)
    return tree


def _targets_first(override: Any) -> tuple[bool, int]:
    """Return a sort key that puts targets first, outer targets before nested ones."""
    key, value = override.key_or_group, None if override.is_delete() else override.value()
    is_target = key.endswith("._target_") or (isinstance(value, dict) and "_target_" in value)
    return not is_target, key.count(".") if is_target else 0


def printed(composed: Composed, part: str, package: str | None = None, resolve: bool = False) -> str:
    """Return the output of Hydra's `--cfg`: YAML of the `job`, `hydra` or `all`, or of one package of it."""
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
                raise UserError(f"--package {package}: unknown key", "`--cfg job` prints all keys")
            if not OmegaConf.is_config(tree):
                return f"{header}{tree}\n"
            return header + OmegaConf.to_yaml(tree, resolve=resolve)
        except OmegaConfBaseException as error:
            raise hydra_errors.interpolation(error) from None


def group_options(config_dirs: list[Path], group: str, cwd: Path | None = None) -> list[str]:
    """Return the options of a config group over the whole search path."""
    return sorted(loader_of(config_dirs, cwd or Path.cwd()).get_group_options(group))


def points(
    overrides: list[str],
    *,
    config_dirs: list[Path],
    cwd: Path | None = None,
    config_name: str = "config",
    multirun: bool = True,
) -> list[list[str]] | None:
    """Return the overrides of each job of a sweep, in the order of Hydra's basic sweeper: the last varies fastest.

    `hydra.sweeper.params` of the config files come first; the command line overrides them. Returns None for a single
    job: neither `multirun` (`-m`) nor `hydra.mode=MULTIRUN`.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    found = swept(overrides, config_dirs=config_dirs, cwd=cwd, config_name=config_name, multirun=multirun)
    if found is None:
        return None
    (combinations,) = BasicSweeper.split_arguments(found[0], max_batch_size=None)
    return [list(combination) for combination in combinations]


def swept(
    overrides: list[str],
    *,
    config_dirs: list[Path],
    cwd: Path | None = None,
    config_name: str = "config",
    multirun: bool = True,
) -> tuple[list[Any], Any] | None:
    """Return the parsed overrides of a sweep, those of `hydra.sweeper.params` first, and the tree of its fixed ones.

    A key of the command line replaces that of a config file. None for a single job, as in `points`.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = loader_of(config_dirs, cwd or Path.cwd())
    with hydra_errors.translated(loader, overrides):
        parser = OverridesParser.create(config_loader=loader)
        parsed = parser.parse_overrides(overrides)
        fixed = [str(one.input_line) for one in parsed if not one.is_sweep_override()]
        tree = load_whole(loader, config_name, _split(loader, fixed)[0], partial(load_tree, sweep=True))
        if not multirun and not is_multirun(tree):
            return None
        given = {one.key_or_group for one in parsed}
        from_files = [f"{key}={value}" for key, value in sweep_params(tree).items() if key.lstrip("+") not in given]
        return [*parser.parse_overrides(from_files), *parsed], tree


def _split(loader: Any, overrides: list[str]) -> tuple[list[str], list[Any], list[Any]]:
    """Split into overrides for Hydra (groups, `hydra.*`) as text, values as parsed overrides, and `group=null` ones."""
    groups: list[str] = []
    values: list[Any] = []
    unset: list[Any] = []
    for override in map(_parsed, overrides):
        hydra_errors.refuse_sweep(override)
        is_group = loader.repository.group_exists(override.key_or_group)
        if is_group and override.value() is None and not override.is_delete():
            unset.append(override)
        elif override.is_hydra_override() or (is_group and not isinstance(override.value(), dict)):
            hydra_errors.require_options(override, loader)
            groups.append(str(override.input_line))
        else:
            values.append(override)
    return groups, values, unset


@lru_cache(maxsize=1024)
def _parsed(override: str) -> Any:
    """Return a parsed override, which nobody changes. Most overrides of a sweep are those of every point."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_overrides([override])[0]


def _record(tree: Any, groups: list[str], values: list[Any]) -> None:
    """Record value overrides where Hydra does, so that `hydra:job.override_dirname` and the like are complete."""
    from hydra._internal.config_loader_impl import get_overrides_dirname

    written = [override.input_line for override in values]
    tree.hydra.overrides.task.extend(written)
    style = tree.hydra.job.config.override_dirname
    lines = [_Line(line, line.partition("=")[0]) for line in groups + written if not line.startswith("hydra")]
    tree.hydra.job.override_dirname = get_overrides_dirname(
        lines,  # type: ignore[arg-type]  # reads only these two attributes
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
    """Put the tree into the singleton that `${hydra:...}` reads, while interpolations are resolved."""
    from hydra.core.hydra_config import HydraConfig

    holder = HydraConfig.instance()
    before = holder.cfg
    try:
        holder.cfg = tree  # like set_config, without the copy
        yield
    finally:
        holder.cfg = before


def _resolve(tree: Any, job: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with _hydra_node(tree):
        try:
            try:
                plain = OmegaConf.to_container(job, resolve=True, throw_on_missing=True, enum_to_str=True)
            except OmegaConfBaseException:
                missing = sorted(OmegaConf.missing_keys(job))
                if missing:
                    raise hydra_errors.missing(missing) from None
                raise
        except OmegaConfBaseException as error:
            raise hydra_errors.interpolation(error) from None
    return plain  # type: ignore[return-value]
