"""Render the job script of a run from the template `slurm/job.sbatch`, at the top of the repository."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

from trainer.config.shape import LaunchShape
from trainer.core.errors import UserError
from trainer.core.paths import slurm_dir
from trainer.slurm.options import sbatch_options

_PLAIN = re.compile(r"[A-Za-z0-9_./:,=@%+-]*")
_CPUS = '${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}'
"""Passed on because srun does not inherit it from sbatch (since 22.05)."""
SRUN_GRACE_S = 30
"""Seconds in addition to `cluster.preflight_timeout_s` that srun gets for its own start and end."""
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\x80-\x9f\u2028\u2029]")
_NOT_IN_A_LINE = re.compile(r'[\x00-\x1f\x7f\x80-\x9f\u2028\u2029"\\]')
_NOT_IN_A_PATH = re.compile(r'[\x00-\x1f\x7f\x80-\x9f\u2028\u2029"\\%]')
"""SLURM expands %x in the path of a log, and cannot quote the other characters."""


def script(config: dict[str, Any], shape: LaunchShape, run_path: Path, cwd: Path, cpus_per_process: int | None) -> str:
    """Return the text of `job.sbatch`.

    Args:
        config: Configuration of the run, after its checks.
        shape: Launch shape.
        run_path: Run directory.
        cwd: Working directory of the job.
        cpus_per_process: Cores per process; None leaves it to the cluster.

    Raises:
        UserError: SLURM does not accept a path.
    """
    refused = _NOT_IN_A_PATH.search(str(run_path))
    if refused:
        raise UserError(
            f"runs_dir: {str(run_path.parent)!r} contains {refused[0]!r}, which cannot be written in a job script",
            "set runs_dir to a folder with an ordinary name",
        )
    cluster = config["cluster"]
    options = [
        ("job-name", run_path.name),
        ("output", f"{run_path}/logs/slurm-%j.log"),
        *sbatch_options(config, shape, cpus_per_process),
    ]
    values = {
        "RUN": run_path.name,
        # Used in a comment, where quoting does not matter; line breaks were refused above.
        "SCRIPT": shlex.quote(str(run_path / "job.sbatch")),
        "OPTIONS": "\n".join(_line(name, value) for name, value in options),
        "RUN_DIR": shlex.quote(str(run_path)),
        "PYTHON": shlex.quote(sys.executable),
        "SETUP": "\n".join(_setup(cluster)),
        "PREFLIGHT": "\n".join(_preflight(cluster, [run_path.parent, cwd])),
        "SRUN": " ".join(_srun(cluster, [run_path.parent, cwd])),
        "NODE_PYTHON": " ".join(_node_python(cluster, [run_path.parent, cwd])),
    }
    template = (slurm_dir() / "job.sbatch").read_text()
    return re.sub(r"@([A-Z_]+)@", lambda match: values[match[1]], template)


def once_per_node(config: dict[str, Any], shape: LaunchShape, folder: Path, module: str, cpus: int | None) -> str:
    """Return a job script that runs `python -m MODULE FOLDER NODE...` once on each node, and is not requeued.

    Args:
        config: Configuration, after the checks of `cluster.*`.
        shape: Launch shape.
        folder: Folder that all nodes share.
        module: The module.
        cpus: Cores per process; None leaves it to the cluster.

    Raises:
        UserError: SLURM does not accept a path.
    """
    cluster, folders = config["cluster"], [folder.parent, Path.cwd()]
    if refused := _NOT_IN_A_PATH.search(str(folder)):
        raise UserError(f"{str(folder)!r} contains {refused[0]!r}", "set runs_dir to a folder with an ordinary name")
    wanted = [option for option in sbatch_options(config, shape, cpus) if option[0] not in ("requeue", "signal")]
    options = [("job-name", folder.name), ("output", f"{folder}/slurm-%j.log"), ("no-requeue", ""), *wanted]
    python = " ".join(_node_python(cluster, folders))
    return "\n".join(
        [
            "#!/bin/bash",
            *(_line(name, value) for name, value in options),
            f"python={shlex.quote(sys.executable)}",
            "export PYTHONSAFEPATH=1",
            "export SLURM_EXPORT_ENV=ALL",
            *_setup(cluster),
            f"srun {_CPUS} --ntasks-per-node=1 --mpi=none {' '.join(_pyxis(cluster, folders))} \\",
            f"    {python} -m {module} {shlex.quote(str(folder))} $(scontrol show hostnames)",
            "",
        ]
    )


def _line(name: str, value: str) -> str:
    """Return an `#SBATCH` line. SLURM reads quotation marks as a shell does, and their content literally (22.05).

    Raises:
        UserError: The value would end the line or the quotation, and what follows would be read as a command.
    """
    if _NOT_IN_A_LINE.search(value) or _NOT_IN_A_LINE.search(name):
        fix = "remove line breaks and quotes from it"
        raise UserError(f"--{name}={value!r} cannot be written in a job script", fix)
    if not value:
        return f"#SBATCH --{name}"
    return f"#SBATCH --{name}={value}" if _PLAIN.fullmatch(value) else f'#SBATCH --{name}="{value}"'


def _setup(cluster: dict[str, Any]) -> list[str]:
    lines = [f"module load {shlex.quote(name)}" for name in cluster["modules"]]
    lines += [str(line) for line in cluster["setup"]]
    for line in lines:
        if _CONTROL.search(line):
            raise UserError(f"cluster.setup: {line!r} is more than one line", "write a list of lines")
    return ["", "# cluster.modules and cluster.setup", *lines] if lines else []


def _preflight(cluster: dict[str, Any], folders: list[Path]) -> list[str]:
    if not cluster["preflight"]:
        return []
    options = [_CPUS, "--ntasks-per-node=1", "--mpi=none", *_pyxis(cluster, folders)]
    node = """bash -c 'trap "" USR1; exec "$@"' node"""
    python = " ".join(_node_python(cluster, folders))
    return [
        "# Step 0 (cluster.preflight): each node checks itself, all ranks all-reduce; begin reads the results.",
        f"timeout {int(cluster.get('preflight_timeout_s', 300)) + SRUN_GRACE_S} srun {' '.join(options)} {node} \\",
        f'    {python} -m trainer.slurm.preflight "$run_dir" $(scontrol show hostnames)',
    ]


def _pyxis(cluster: dict[str, Any], folders: list[Path]) -> list[str]:
    if not cluster["container"] or cluster["container_runtime"] != "pyxis":
        return []
    mounts = ",".join(_mounts(cluster, folders))
    return [f"--container-image={shlex.quote(cluster['container'])}", f"--container-mounts={shlex.quote(mounts)}"]


def _srun(cluster: dict[str, Any], folders: list[Path]) -> list[str]:
    return [
        '--nodes="$TRAINER_NODES"',
        '--ntasks="$TRAINER_NODES"',
        "--ntasks-per-node=1",
        _CPUS,
        '${TRAINER_LEFT_OUT:+"--exclude=$TRAINER_LEFT_OUT"}',
        "--kill-on-bad-exit=1",
        "--wait=120",
        "--mpi=none",
        *_pyxis(cluster, folders),
    ]


def _node_python(cluster: dict[str, Any], folders: list[Path]) -> list[str]:
    python = shlex.quote(cluster["python"]) if cluster["python"] else '"$python"'
    if not cluster["container"] or cluster["container_runtime"] != "apptainer":
        return [python]
    return [
        "apptainer exec --nv",
        *(f"--bind {shlex.quote(bind)}" for bind in _mounts(cluster, folders)),
        shlex.quote(cluster["container"]),
        python,
    ]


def _mounts(cluster: dict[str, Any], folders: list[Path]) -> list[str]:
    """Return HOST:INSIDE of the folders that every job needs, then of `cluster.container_mounts`."""
    for folder in folders:
        if re.search(r"[:,\s]", str(folder)):
            raise UserError(
                f"{str(folder)!r} cannot be mounted in a container: it contains a colon, a comma or a space",
                "use a folder with an ordinary name, or leave cluster.container out",
            )
    return [*(f"{folder}:{folder}" for folder in folders), *cluster["container_mounts"]]
