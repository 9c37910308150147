"""Compare runs: what differs in configuration, code, packages, hardware, data and results. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.runs.code_comparison import code_files, diff_of
from trainer.runs.curves import first_difference, is_measured_time
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Started
from trainer.runs.facts import Facts, flat, flat_config, mapping
from trainer.runs.packages import normalized
from trainer.runs.summary import summary

_MOST_DIFFS, _DIFFS_S = 200, 10.0
"""Number of diffs, and the CPU time after which no further one is made: files can be written so that it takes 8 s."""


@dataclass(frozen=True)
class Section:
    """What differs in one respect."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Key to the value of each run that has the key, by its label."""
    not_recorded: list[str] = field(default_factory=list)
    """Labels of the runs that did not record this. They were made by an older version."""


@dataclass(frozen=True)
class Comparison:
    """What differs between runs."""

    labels: list[str]
    sections: dict[str, Section]
    """config, code, packages, hardware, data, results."""
    curves: dict[str, dict[str, Any]]
    """Label of each run but the first to its `curves.first_difference` from the first."""
    diffs: dict[str, str]
    """Of two runs: the unified diff of each file of the code that differs, of the first 200."""


def compare(
    runs: Sequence[RunDirectory], slurm_states: Mapping[str, str] | None = None, *, diffs: bool = True
) -> Comparison:
    """Compare two or more runs.

    Args:
        runs: The runs.
        slurm_states: As in `runs.state.state_of`.
        diffs: Of two runs: diff the files of the code that differ.

    Raises:
        UserError: A run is damaged.
    """
    labels = _labels(runs)
    manifests = [mapping(run.manifest()) for run in runs]
    code = [code_files(run) for run in runs]
    sections = {
        "config": _section(
            labels, [flat_config(run, run.config(), one) for run, one in zip(runs, manifests, strict=True)]
        ),
        "code": _section(labels, [{**_commit(one), **files} for one, files in zip(manifests, code, strict=True)]),
        "packages": _packages(labels, manifests),
        "hardware": _section(labels, [_hardware(run, one) for run, one in zip(runs, manifests, strict=True)]),
        "data": _data(labels, manifests),
        "results": _section(labels, _results(runs, slurm_states)),
    }
    differing = [name for name in sections["code"].rows if any(name in files for files in code)]
    shown = differing[:_MOST_DIFFS] if diffs and len(runs) == 2 else []
    texts = _diffs(shown, runs)
    curves = {
        label: first_difference(runs[0].metrics_path, run.metrics_path)
        for label, run in zip(labels[1:], runs[1:], strict=True)
    }
    return Comparison(labels, sections, curves, texts)


def _diffs(names: Sequence[str], runs: Sequence[RunDirectory]) -> dict[str, str]:
    deadline = time.process_time() + _DIFFS_S
    late = "no diff: those before it have taken too long"
    return {name: diff_of(name, runs[0], runs[1]) if time.process_time() < deadline else late for name in names}


def _labels(runs: Sequence[RunDirectory]) -> list[str]:
    """Return the names of the directories, or their paths if two have the same name."""
    names = [run.path.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.path) for run in runs]


def _section(labels: list[str], facts: Sequence[Facts | None]) -> Section:
    """Keep the keys whose values are not equal in all runs; a run with None did not record them."""
    recorded = [(label, one) for label, one in zip(labels, facts, strict=True) if one is not None]
    rows = {}
    for key in dict.fromkeys(key for _, one in recorded for key in one):
        values = {label: one[key] for label, one in recorded if key in one}
        if len(values) < len(recorded) or not _all_equal(list(values.values())):
            rows[key] = values
    return Section(rows, [label for label, one in zip(labels, facts, strict=True) if one is None])


def _all_equal(values: list[Any]) -> bool:
    return all(value == values[0] or repr(value) == repr(values[0]) for value in values[1:])  # nan != nan


def _commit(manifest: Facts) -> Facts:
    code = mapping(manifest.get("code"))
    return {
        "git commit": code.get("commit"),
        "uncommitted changes": code.get("dirty"),
        "linked, not copied": code.get("left_out") or [],
    }


def _packages(labels: list[str], manifests: Sequence[Facts]) -> Section:
    """Compare all packages, or those few that older runs recorded too, if one of the runs is of that kind."""
    installed = [mapping(manifest.get("installed")) for manifest in manifests]
    not_recorded = [label for label, one in zip(labels, installed, strict=True) if not one]
    facts: list[Facts | None] = []
    for manifest, packages in zip(manifests, installed, strict=True):
        few = mapping(manifest.get("packages"))
        if not packages and not few:
            facts.append(None)
            continue
        versions = {normalized(name): version for name, version in few.items() if version is not None}
        if not not_recorded:
            origins = mapping(packages.get("origins"))
            versions = {
                name: f"{version} from {origins[name]}" if name in origins else version
                for name, version in mapping(packages.get("versions")).items()
            }
        facts.append({"python": manifest.get("python"), **versions})
    return Section(_section(labels, facts).rows, not_recorded)


def _hardware(run: RunDirectory, manifest: Facts) -> Facts | None:
    beats = run.heartbeats()
    machine = mapping(manifest.get("machine"))
    shape = run.launch().shape
    worlds = [event.world_size for event in run.events_of(Started) if event.world_size]
    facts = {
        "launched on": manifest.get("host"),
        "platform": manifest.get("platform"),
        "shape": str(shape) if shape else None,
        "ranks": worlds[-1] if worlds else shape.world_size if shape else None,
        "hosts of the ranks": sorted({beat.host for beat in beats.values() if beat.host}),
        "devices of the ranks": devices_of(run),
    }
    if machine:
        facts |= {"processor": machine.get("cpu"), "GPUs of the machine": machine.get("gpus")}
    return {key: value for key, value in facts.items() if value is not None and value != []} or None


def devices_of(run: RunDirectory) -> list[str]:
    """Return the kinds of device that the ranks of the newest attempt used, such as `cpu` or `NVIDIA H200`."""
    named = (beat.device for beat in run.heartbeats().values() if beat.device)
    return sorted({device.partition(", ")[2] or device for device in named})


def _data(labels: list[str], manifests: Sequence[Facts]) -> Section:
    facts = [flat(one["data"]) if isinstance(one.get("data"), dict) else None for one in manifests]
    return _section(labels, [None if one is None else {key: one[key] for key in one if key} for one in facts])


def _results(runs: Sequence[RunDirectory], states: Mapping[str, str] | None) -> list[Facts | None]:
    facts: list[Facts | None] = []
    for run in runs:
        known = summary(run, states)
        row: Facts = {name: known[name] for name in ("state", "step", "epoch", "attempts")}
        row |= {f"best {name}": known["best"][name] for name in ("metric", "value", "step")} if known["best"] else {}
        row |= {name: known["metrics"][name] for name in sorted(known["metrics"], key=is_measured_time)}
        for one in known["evaluations"]:
            row |= {f"{name} (evaluated on {one['split']})": value for name, value in one["metrics"].items()}
        facts.append({**row, "wall seconds": mapping(known["ledger"]).get("wall_s")})
    return facts
