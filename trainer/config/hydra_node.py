"""What the keys of Hydra's own node, `hydra.*`, mean here.

Taken: `hydra.run.dir` and `hydra.sweep.dir` (a link to the run, which itself is in `runs_dir`), `hydra.sweeper.params`,
`hydra.mode`, `hydra.searchpath`, `hydra.verbose`, `hydra.job_logging`, and of `hydra.job`: `chdir`, `env_set`, `name`.
What does nothing here is refused, with what to write; nothing is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.core.errors import UserError

SUBDIR = ".hydra"
_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
NOT_USED = "trainer does not use this part of Hydra"
INSTEAD = {
    "launcher": "cluster=slurm or cluster=local says where a job runs, with -m and cluster.sweep_at_once also those "
    "of a sweep",
    "sweeper": "-m runs one job for each combination, of hydra.sweeper.params, too; for a search, call trainer fit "
    "from its program",
    "callbacks": "a Lightning callback in the section callbacks is called in the ranks",
    "output_subdir": f"a run keeps Hydra's files in {SUBDIR}, where its ranks read them; leave it out",
}
"""What to do without them."""


def problems_of_hydra(tree: Any) -> Iterator[UserError]:
    """Keys of a composed tree's node `hydra` that do nothing here."""
    node, choices = tree.hydra, tree.hydra.runtime.choices
    for part, own in (("launcher", _LAUNCHER), ("sweeper", _SWEEPER)):
        chosen = choices.get(f"hydra/{part}")
        written = part_of(node, part)
        if chosen not in (None, "basic") or written.get("_target_", own) != own:
            shown = f"hydra/{part}={chosen}" if chosen else f"hydra.{part}._target_={written['_target_']}"
            yield UserError(f"{shown}: {NOT_USED}", f"leave it out; {INSTEAD[part]}")
            continue
        taken = ("_target_", "params") if part == "sweeper" else ("_target_",)
        for key, value in written.items():
            if key not in taken and value is not None:
                yield UserError(f"hydra.{part}.{key}: {NOT_USED}", f"leave it out; {INSTEAD[part]}")
    for name in node.get("callbacks") or {}:
        yield UserError(f"hydra.callbacks.{name}: {NOT_USED}", f"leave it out; {INSTEAD['callbacks']}")
    if node.output_subdir != SUBDIR:
        shown = "null" if node.output_subdir is None else node.output_subdir
        yield UserError(f"hydra.output_subdir={shown}: {NOT_USED}", INSTEAD["output_subdir"])


def sweep_params(tree: Any) -> dict[str, str]:
    """`hydra.sweeper.params`: override keys to their values, as text."""
    params = part_of(tree.hydra, "sweeper").get("params")
    return {str(key): str(value) for key, value in (params or {}).items()}


def is_multirun(tree: Any) -> bool:
    """`hydra.mode=MULTIRUN`."""
    mode = tree.hydra.mode
    return mode is not None and getattr(mode, "name", mode) == "MULTIRUN"


def part_of(node: Any, part: str) -> dict[Any, Any]:
    """`hydra.PART` as it is written; empty where it is null or missing."""
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(node, part) or node._get_node(part)._is_none():
        return {}
    found = OmegaConf.to_container(node._get_node(part), resolve=False)
    return found if isinstance(found, dict) else {}


def replaced(value: Any, old: str, new: str) -> Any:
    """`value` with `new` for `old` in every text in it."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {key: replaced(item, old, new) for key, item in value.items()}
    return [replaced(item, old, new) for item in value] if isinstance(value, list) else value
