"""Examine this machine: measure, check, and keep what was measured for the next time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer.doctor.finding import Finding, Status
from trainer.doctor.measuring import measured
from trainer.doctor.probe import Probe, this_machine
from trainer.doctor.run import run_all, worst
from trainer.doctor.speed import measurements
from trainer.hardware import baseline


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found on a machine: the JSON of `trainer doctor --json`, and of each node of an allocation."""

    host: str
    status: Status
    findings: list[Finding]
    measured: dict[str, float] = field(default_factory=dict)
    """In SI units, by the names of the baseline."""
    usual: dict[str, float] = field(default_factory=dict)
    """What this machine reached before: medians."""
    versions: dict[str, str] = field(default_factory=dict)
    """What should be the same on all nodes."""


def probe_of(config: dict[str, Any]) -> Probe:
    """Return the probe of this machine for the runs of a configuration."""
    tracking = config["tracking"]
    return replace(
        this_machine(Path(config["runs_dir"]).expanduser()),
        tracking_mode=tracking["mode"] if tracking["name"] == "wandb" else "disabled",
        is_on_slurm=config["cluster"]["name"] == "slurm",
    )


def examine(probe: Probe, *, quick: bool, new_baseline: bool) -> Report:
    """Measure unless `quick`, run all checks, and keep the measurements as the baseline of this machine."""
    if not quick:
        probe = measured(probe)
        if new_baseline and probe.baseline is not None:
            probe = replace(probe, baseline=replace(probe.baseline, samples={}))
    findings = run_all(probe)
    usual = {}
    if probe.baseline is not None:
        usual = {name: value for name in probe.baseline.samples if (value := probe.baseline.usual(name))}
        try:
            baseline.write(probe.baseline.with_measured(measurements(probe)))
        except OSError as problem:
            text = f"what was measured cannot be kept for comparison: {problem.strerror}"
            fix = "set XDG_CACHE_HOME to a folder that you may write to"
            findings.append(Finding(check="baseline", status="warning", text=text, fix=fix))
    return Report(
        host=probe.hostname(),
        status=worst(findings),
        findings=findings,
        measured=measurements(probe),
        usual=usual,
        versions=_versions(probe, findings),
    )


def _versions(probe: Probe, findings: list[Finding]) -> dict[str, str]:
    driver = next((one.text for one in findings if one.check == "driver" and one.status == "ok"), "")
    versions = {"driver and GPUs": driver, "kernel": probe.read("/proc/sys/kernel/osrelease")}
    if probe.facts is not None:
        versions |= {"torch": probe.facts.torch, "NCCL": probe.facts.nccl}
    return {name: text for name, text in versions.items() if text}
