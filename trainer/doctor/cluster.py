"""Examine the nodes of a short allocation on SLURM, and compare them."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config.problems import raise_all
from trainer.config.shape import LaunchShape, resolve
from trainer.core import records
from trainer.core.errors import EnvironmentFault
from trainer.core.files import write_atomic
from trainer.core.text import one_line
from trainer.doctor.examine import Report
from trainer.doctor.finding import Finding, error, ok, warning
from trainer.doctor.node import REQUEST, Request
from trainer.hardware.baseline import SLOWER
from trainer.slurm import facts, pending, query, render, resources
from trainer.slurm.commands import SlurmRefused
from trainer.slurm.commands import run as call
from trainer.slurm.options import check_values
from trainer.slurm.submit import submit

_TIME = "0:15:00"
_POLL_S, _EXPLAIN_S = 1.0, 15.0
_WAITING = ("PENDING", "CONFIGURING", "REQUEUED")
_RUNNING = (*_WAITING, "RUNNING", "COMPLETING", "SUSPENDED")
_LOG_LINES = 5
_SHARED, _MANY = ("cpu", "storage", "host"), 3
"""Measurements that others disturb: two nodes do not show which of them is slow."""


@dataclass(frozen=True)
class Examined:
    """The reports of an allocation."""

    job_id: str
    nodes: dict[str, Report]
    across: list[Finding]
    """What the comparison of the nodes shows."""


def examine_nodes(config: dict[str, Any], *, quick: bool, new_baseline: bool, wait_s: float) -> Examined:
    """Submit a job that examines each of its nodes, wait for it, and return the reports.

    Args:
        config: The composed configuration; `resources` and `cluster` describe the allocation.
        quick: Without measurements.
        new_baseline: Forget what the nodes reached before.
        wait_s: Seconds to wait in the queue.

    Raises:
        UserError: SLURM refuses the job.
        EnvironmentFault: SLURM does not respond, or the job did not start in time.
    """
    _settle(config)
    raise_all(list(check_values(config["cluster"])))
    shape = resolve(config)
    runs_dir = Path(config["runs_dir"]).expanduser().absolute()
    is_new = not runs_dir.exists()
    runs_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=runs_dir, prefix=".trainer-doctor-"))  # mode 0700, and seen by the nodes
    try:
        sections = {"runs_dir": str(runs_dir), "tracking": config["tracking"], "cluster": config["cluster"]}
        request = Request(config=sections, shape=shape, quick=quick, new_baseline=new_baseline)
        write_atomic(folder / REQUEST, records.dumps(request))
        cpus = resources.cpus_per_process(config, shape)
        write_atomic(folder / "job.sbatch", render.once_per_node(config, shape, folder, "trainer.doctor.node", cpus))
        job_id = submit(folder / "job.sbatch", Path.cwd())
        nodes = _wait(job_id, wait_s)
        return _collect(job_id, nodes, folder, shape)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if is_new:
            _remove_if_empty(runs_dir)


def _settle(config: dict[str, Any]) -> None:
    """Set options that a job requires and a check of nodes does not: all GPUs of a node, and a short time."""
    wanted, cluster = config["resources"], config["cluster"]
    resources.choose_nodes(config)
    wanted["nodes"] = wanted["nodes"] or 1
    if all(wanted[key] is None for key in ("gpus", "gpus_per_node", "cpu_processes")):
        names = cluster["partition"].split(",") if cluster["partition"] else []
        known = facts.partitions().values()
        kinds = [kind for one in known if (one.name in names if names else one.is_default) for kind in one.kinds]
        most = max((kind.gpus_of(cluster["gpu_type"]) for kind in kinds), default=0)
        wanted |= {"gpus_per_node": most} if most else {"gpus": 0, "cpu_processes": wanted["nodes"]}
    cluster["time"] = cluster["time"] or _TIME


def _wait(job_id: str, wait_s: float) -> list[str]:
    """Wait until the job has ended; return its nodes. Cancels it when the user or the queue takes too long."""
    began, explained, told = time.monotonic(), time.monotonic(), ""
    nodes: list[str] = []
    try:
        while True:
            job = query.job(job_id)
            state = job.get("JobState", "COMPLETED")
            nodelist = job.get("NodeList", "")
            if not nodes and nodelist not in ("", "(null)", "None"):
                nodes = query.hostnames(nodelist)
                print(f"job {job_id} runs on {', '.join(nodes)}", file=sys.stderr, flush=True)
            if state not in _RUNNING:
                return nodes
            if state in _WAITING and time.monotonic() - began > wait_s:
                why = "; ".join(pending.explain(job_id)) or "SLURM gives no reason"
                fix = "wait longer (--wait MINUTES), or request other nodes: cluster.partition, resources.nodes"
                raise EnvironmentFault(f"the job did not start within {wait_s / 60:g} min: {one_line(why)}", fix)
            if state in _WAITING and time.monotonic() - explained > _EXPLAIN_S:
                explained = time.monotonic()
                why = "; ".join(pending.explain(job_id))
                if why and why != told:
                    print(f"job {job_id} waits: {one_line(why)}", file=sys.stderr, flush=True)
                    told = why
            time.sleep(_POLL_S)
    except BaseException:
        try:
            call("scancel", job_id)
        except SlurmRefused:  # it has just ended
            pass
        raise


def _collect(job_id: str, nodes: list[str], folder: Path, shape: LaunchShape) -> Examined:
    reports = {}
    for node in nodes:
        report = records.read_or_skip(Report, folder / f"{node}.json")
        if report is None:
            tail = _tail(folder, job_id)
            fix = "its last lines are above; is runs_dir on a file system that the nodes share?"
            found = replace(error(f"no report from this node: {tail}", fix), check="node")
            report = Report(host=node, status="error", findings=[found])
        reports[node] = report
    if not nodes:
        raise EnvironmentFault(f"job {job_id} ended without a node: {_tail(folder, job_id)}", "see sacct and squeue")
    return Examined(job_id, reports, [replace(one, check="comparison") for one in compare(reports)])


def _tail(folder: Path, job_id: str) -> str:
    try:
        lines = (folder / f"slurm-{job_id}.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return "the job wrote no log"
    return one_line(" | ".join(lines[-_LOG_LINES:])) or "its log is empty"


def compare(reports: Mapping[str, Report]) -> Iterator[Finding]:
    """Yield what differs between nodes that should be equal."""
    if len(reports) < 2:
        return
    is_good = True
    for name in sorted({name for report in reports.values() for name in report.versions}):
        values = {node: report.versions.get(name, "none") for node, report in reports.items()}
        common = statistics.mode(values.values())
        others = [f"{node}: {value}" for node, value in values.items() if value != common]
        if others:
            is_good = False
            fix = "install the same on all nodes, or leave these out: cluster.exclude"
            yield warning(f"{name} differs from {common}: {', '.join(others)}", fix)
    for name in sorted({name for report in reports.values() for name in report.measured}):
        rates = {node: report.measured[name] for node, report in reports.items() if name in report.measured}
        if len(rates) < _MANY and name.startswith(_SHARED):
            continue
        usual = statistics.median_high(rates.values())
        for node, rate in rates.items():
            if rate < SLOWER[name.split()[0]] * usual:
                is_good = False
                fix = f"see the lines of {node}; cluster.exclude={node} leaves it out"
                yield warning(f"{node}: {name} has {rate / usual:.0%} of the median of the nodes", fix)
    if is_good:
        yield ok(f"{len(reports)} nodes have the same software and about the same speed")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # somebody else uses it now
        pass
