"""Reproduce a run from its frozen code and configuration, and list what could not be restored."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.hydra_node import SUBDIR, replaced
from trainer.config.hydra_record import hydra_node
from trainer.config.instantiate import freeze
from trainer.core.errors import EnvironmentFault, UserError
from trainer.core.files import read_text, write_atomic
from trainer.runs import events
from trainer.runs.code_snapshot import Snapshot, import_paths
from trainer.runs.comparison import devices_of
from trainer.runs.credentials import is_of_a_tool
from trainer.runs.data_files import data_files, facts_of
from trainer.runs.directory import RunDirectory
from trainer.runs.facts import mapping
from trainer.runs.manifest import manifest_of
from trainer.runs.packages import normalized

_FIRST = ("python", "torch", "lightning", "deepspeed", "numpy", "trainer")
"""Packages that change results most often: listed first."""


@dataclass(frozen=True)
class Loss:
    """Something that the new run does not have as the first one had it."""

    topic: str
    """A package, a key of the configuration, or a word such as `GPU`."""
    text: str


def working_directory(run: RunDirectory) -> Path:
    """Return the folder that relative paths refer to: that of the first launch, or the current one elsewhere."""
    before = run.launch().cwd
    return Path(before) if before and os.path.isdir(before) else Path.cwd()


def first_of(run: RunDirectory) -> str | None:
    """Return the path of the run that `trainer repro` made this one from; None for any other run."""
    try:
        path = mapping(mapping(run.manifest()).get("reproduces")).get("path")
    except UserError:  # damaged
        return None
    return path if isinstance(path, str) else None


def losses(run: RunDirectory, config: Mapping[str, Any], here: Mapping[str, Any], cwd: Path) -> list[Loss]:
    """Return what of `run` is not restored on this machine, as far as the run recorded it.

    Args:
        run: The run to reproduce.
        config: The configuration of the new run.
        here: `manifest.environment()` of this machine.
        cwd: Folder that relative paths of the new run refer to.
    """
    manifest = mapping(run.manifest())
    return [
        *_packages(run, manifest, here),
        *_machine(run, manifest, here, config),
        *_code(run, manifest),
        *_data(run, manifest, config, cwd),
    ]


def create(
    run: RunDirectory, config: dict[str, Any], *, runs_dir: Path, overrides: list[str], cwd: Path
) -> RunDirectory:
    """Create the new run: code, imports and Hydra's files as in `run`, the configuration given here.

    Raises:
        UserError: The run has no code snapshot, or holds what cannot be copied.
        EnvironmentFault: The folder cannot be written.
    """
    if not run.code_dir.is_dir():
        raise UserError(f"{run.path.name} has no code snapshot: {run.code_dir} is gone", "restore it from a backup")
    new = RunDirectory.new(runs_dir.expanduser().absolute(), config["name"])
    paths = _paths_of(run)
    for path in paths:
        config = replaced(config, path, str(new.path))
    if new.path.parent != run.path.parent:
        config["runs_dir"] = str(new.path.parent)
    _copy(run, new, paths)
    write_atomic(new.config_path, freeze(config))
    typed = _text(run.overrides_path).strip()
    write_atomic(new.overrides_path, " ".join(filter(None, [typed, *overrides])) + "\n")
    before = mapping(run.manifest())
    code = before.get("code")
    manifest = manifest_of(mapping(before.get("choices")), Snapshot(), config.get("data"), cwd)
    manifest |= {"code": code} if isinstance(code, dict) else {}
    manifest |= {"id": new.id, "python_hash_seed": run.hash_seed()}
    manifest |= {"reproduces": {"id": run.identity(), "name": run.path.name, "path": str(run.path)}}
    write_atomic(new.manifest_path, json.dumps(manifest, indent=1))
    new.add_event(events.Created(overrides=overrides))
    return new


def _paths_of(run: RunDirectory) -> list[str]:
    """Return where the run is, and where it was when it was made: the paths by which its files name it."""
    runtime = hydra_node(run.path).get("runtime")
    made_at = runtime.get("output_dir") if isinstance(runtime, dict) else None
    return list(dict.fromkeys(filter(None, [str(made_at or ""), str(run.path)])))


def _copy(run: RunDirectory, new: RunDirectory, paths: list[str]) -> None:
    skip = shutil.ignore_patterns("__pycache__")
    try:
        for name in ("code", "imports"):
            if (run.path / name).is_dir():
                shutil.copytree(run.path / name, new.path / name, symlinks=True, ignore=skip)
            if (new.path / name).is_dir():
                (new.path / name).chmod(0o700)  # the first run may have been one of a group
        if (run.path / "code.diff").is_file():
            shutil.copyfile(run.path / "code.diff", new.path / "code.diff")
    except shutil.Error as error:
        failed = "; ".join(str(reason) for _, _, reason in error.args[0][:3])
        raise UserError(f"{run.path.name}: its code cannot be copied: {failed}", "remove what is not a file") from None
    except OSError as error:
        raise EnvironmentFault(
            f"cannot copy {error.filename}: {error.strerror}", "free space, or see its mode"
        ) from None
    for file in sorted((run.path / SUBDIR).glob("*.yaml")):
        text = _text(file)
        for path in paths:
            text = text.replace(path, str(new.path))
        (new.path / SUBDIR).mkdir(exist_ok=True)
        write_atomic(new.path / SUBDIR / file.name, text)


def _text(path: Path) -> str:
    try:
        return read_text(path, errors="replace")
    except OSError:
        return ""


def _packages(run: RunDirectory, manifest: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Loss]:
    """Yield the packages of the run that have another version or source here, or are missing."""
    now, sources = here["installed"]["versions"], here["installed"]["origins"]
    recorded = manifest.get("installed")
    few = {normalized(name): version for name, version in mapping(manifest.get("packages")).items() if version}
    before = mapping(recorded.get("versions")) if isinstance(recorded, dict) else few
    origins = mapping(mapping(recorded).get("origins"))
    before = {"python": manifest.get("python"), **before}
    is_frozen = any(Path(folder, "trainer/__init__.py").is_file() for folder in import_paths(run.code_dir))
    for name in sorted(before, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name)):
        version, found = before[name], here["python"] if name == "python" else now.get(name)
        if not version or (name == "trainer" and is_frozen):
            continue
        if found != version:
            yield Loss(name, f"was {version}, here {found or 'not installed'}")
        elif recorded and origins.get(name) != sources.get(name):
            yield Loss(name, f"was from {origins.get(name) or 'an index'}, here {sources.get(name) or 'an index'}")
    if not isinstance(recorded, dict):
        known = f"only those of {', '.join(few)}" if few else "none"
        yield Loss("packages", f"versions were not recorded: {known}")


def _machine(
    run: RunDirectory, manifest: Mapping[str, Any], here: Mapping[str, Any], config: Mapping[str, Any]
) -> Iterator[Loss]:
    before = mapping(manifest.get("machine"))
    submits = config["cluster"]["name"] != "local"  # this machine is not the one that trains
    devices = [device for device in devices_of(run) if device != "cpu"]
    own = sorted(set(here["machine"]["gpus"]))
    if devices and not submits and not set(devices) <= set(own):
        yield Loss("GPU", f"was {', '.join(devices)}, here {', '.join(own) or 'none'}")
    elif devices and submits:
        yield Loss("GPU", f"was {', '.join(devices)}; the cluster chooses")
    if devices and config["trainer"].get("deterministic") is not True:
        yield Loss("GPU", "kernels may be nondeterministic: trainer.deterministic is not true")
    if not before:
        yield Loss("processor", "was not recorded")
    elif before.get("cpu") != here["machine"]["cpu"]:
        yield Loss("processor", f"was {before.get('cpu')}, here {here['machine']['cpu']}")
    if manifest.get("platform") != here["platform"]:
        yield Loss("system", f"was {manifest.get('platform')}, here {here['platform']}")


def _code(run: RunDirectory, manifest: Mapping[str, Any]) -> Iterator[Loss]:
    """Yield what the snapshot does not hold: files that it left out, and the targets of links."""
    code = mapping(manifest.get("code"))
    for key, why in (("withheld", "it may hold credentials"), ("hidden", "it is a dotfile")):
        names = code.get(key)
        for name in names if isinstance(names, list) else ():
            if key != "hidden" or not is_of_a_tool(str(name)):
                yield Loss(str(name), f"is not in the code snapshot: {why}")
    for folder in (run.code_dir, run.path / "imports"):
        for where, folders, files in os.walk(folder):
            for path in sorted(Path(where, name) for name in (*folders, *files)):
                if path.is_symlink() and os.path.isabs(target := os.readlink(path)):
                    name = path.relative_to(run.path).as_posix()
                    lost = "may have changed: it was linked, not copied" if path.exists() else "is gone"
                    yield Loss(name, f"{target} {lost}")


def _data(run: RunDirectory, manifest: Mapping[str, Any], config: Mapping[str, Any], cwd: Path) -> Iterator[Loss]:
    now = data_files(config["data"], cwd)
    recorded = manifest.get("data")
    if not isinstance(recorded, dict):
        yield Loss("data", "size and time of its files were not recorded")
        recorded = {}
        for key, value in config["data"].items():
            if isinstance(value, str) and value.startswith("/") and facts_of(Path(value)) is None:
                yield Loss(f"data.{key}", f"{value} is missing here")
    for key, before in ((key, mapping(facts)) for key, facts in recorded.items()):
        if key not in now:
            yield Loss(key, f"{before.get('path')} is missing here")
            continue
        differing = [
            name for name in ("path", "bytes", "entries", "modified") if before.get(name) != now[key].get(name)
        ]
        if differing == ["modified"]:
            yield Loss(key, f"{now[key]['path']} was modified since the launch")
        elif differing:
            names = [name for name in differing if name != "modified"]
            yield Loss(key, "; ".join(f"{name} was {before.get(name)}, here {now[key].get(name)}" for name in names))
    start = config["finetune"].get("init_from") if isinstance(config.get("finetune"), dict) else None
    if isinstance(start, str) and not os.path.exists(start):
        yield Loss("finetune.init_from", f"{start} is missing here")
