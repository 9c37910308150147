"""Turn `cluster.*` into sbatch options, after checking each value against what SLURM accepts.

No value can end a line or a quotation of the job script: what is not a name, a number or a list is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trainer.config.cluster import Slurm
from trainer.config.elastic import least_nodes
from trainer.config.limits import limits_of
from trainer.config.shape import LaunchShape
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*"
_FORMS = {
    "partition": (rf"{_NAME}(,{_NAME})*", "a name, or names separated by commas: gpu"),
    "account": (_NAME, "a name: my_project"),
    "qos": (_NAME, "a name: normal"),
    "reservation": (rf"{_NAME}(,{_NAME})*", "a name: maintenance"),
    "gpu_type": (_NAME, "a type as shown by sinfo -o %G: a100"),
    "time": (
        r"(\d+-\d+(:\d+){0,2}|\d+:\d+:\d+)",
        "D-HH:MM:SS or HH:MM:SS (quoted in a YAML file): 1-12:00:00 is a day and a half",
    ),
    "memory_per_process": (r"[1-9]\d*[KMGT]", "a number and K, M, G or T: 60G"),
    "exclude": (r"[A-Za-z0-9_.,\[\]-]+", "a SLURM node list: node3,node[7-9]"),
    "constraint": (r"[A-Za-z0-9_.,&|()\[\]*:=-]+", "features: a100&nvlink"),
    "dependency": (
        r"(singleton|[a-z]+(:\d+([_+]\d+)?)+)([,?](singleton|[a-z]+(:\d+([_+]\d+)?)+))*",
        "a type and job ids: afterok:1234",
    ),
    "mail_user": (r"[A-Za-z0-9_.+-]+(@[A-Za-z0-9_.-]+)?", "an address: me@example.org"),
    "mail_type": (r"[A-Z0-9_]+(,[A-Z0-9_]+)*", "kinds: END,FAIL"),
    "network_interface": (r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}", "the name of one interface, as ip link shows it: ib0"),
    "container": (r"[A-Za-z0-9_./:@#+-]+", "the path or URL of an image, without spaces: /images/torch.sif"),
}
"""Option to the pattern of its value, and its description with an example."""
_LISTED_FORMS = {
    "modules": (r"[A-Za-z0-9_][A-Za-z0-9_./+-]*", "a module's name: cuda/12.8"),
    "container_mounts": (r"/[A-Za-z0-9_./+-]*:/[A-Za-z0-9_./+-]*(:ro|:rw)?", "HOST:INSIDE: /data:/data"),
    "setup": (r"[^\x00-\x1f\x7f\x80-\x9f\u2028\u2029]+", "one line of bash, without line breaks"),
    "extra": (
        r"[a-z][a-z-]*(=[A-Za-z0-9_.,:@+=/\[\]*&|()!<>-]+)?",
        "an sbatch option without dashes, and its value: switches=1",
    ),
}

OURS = {
    **{"job-name": "name", "output": "runs_dir", "error": "runs_dir", "nodes": "resources.nodes"},
    **{"gpus": "resources.gpus", "gpus-per-node": "resources.gpus_per_node", "gres": "resources.gpus"},
    **{"gpus-per-task": "resources.gpus", "cpus-per-gpu": "cluster.cpus_per_process"},
    **{"cpus-per-task": "cluster.cpus_per_process", "mem": "cluster.memory_per_process"},
    **{"mem-per-gpu": "cluster.memory_per_process", "mem-per-cpu": "cluster.memory_per_process"},
    **{key: f"cluster.{key}" for key in ("partition", "account", "qos", "time", "exclude", "constraint")},
    **{key: f"cluster.{key}" for key in ("reservation", "dependency", "nice")},
    **{"mail-user": "cluster.mail_user", "mail-type": "cluster.mail_type", "container": "cluster.container"},
    "signal": "cluster.save_before_end_s",
}
"""Option of sbatch to the key of the configuration that sets it."""
NOT_FOR_A_JOB = (
    *("array", "wrap", "wait", "parsable", "test-only", "help", "usage", "version", "quiet", "verbose", "chdir"),
    *("ntasks", "ntasks-per-node", "requeue", "no-requeue", "open-mode", "no-kill", "input", "export", "export-file"),
    *("uid", "gid", "clusters", "ignore-pbs"),
)
"""Options of sbatch that would break what the trainer relies on."""


def check_values(cluster: dict[str, Any]) -> Iterator[UserError]:
    """Yield the problems of the values of `cluster.*`, without a call of SLURM."""
    for key, (form, example) in _FORMS.items():
        value = cluster.get(key)
        if value is not None and not re.fullmatch(form, str(value)):
            yield UserError(f"cluster.{key}={value!r}: not a value that SLURM accepts", f"write {example}")
    for key, (form, example) in _LISTED_FORMS.items():
        for value in cluster.get(key) or []:
            if not re.fullmatch(form, str(value)):
                yield UserError(f"cluster.{key}: {value!r} is not accepted", f"write {example}")
    for key, limit in limits_of(Slurm).items():
        value = cluster.get(key)
        problem = limit.problem(f"cluster.{key}", value) if value is not None else None
        if problem is not None:
            yield problem
    nice = cluster.get("nice")
    if nice is not None and abs(nice) > 2147483645:
        yield UserError(f"cluster.nice={nice} is out of range", "use a number up to 2147483645")

    python = cluster.get("python")
    if python is not None and not re.fullmatch(_LISTED_FORMS["setup"][0], python):
        yield UserError(f"cluster.python={python!r}: not a path", "write the path of a Python interpreter on the nodes")
    yield from _check_time(cluster)


def _check_time(cluster: dict[str, Any]) -> Iterator[UserError]:
    limit_s = seconds(cluster["time"]) if cluster.get("time") is not None else None
    margin_s = cluster["save_before_end_s"]
    # SLURM checks every 30 s, and may send the signal that much earlier.
    if limit_s is not None and limit_s < margin_s + 60:
        yield UserError(
            f"cluster.time={cluster['time']} leaves no time to train: the checkpoint is saved "
            f"{margin_s} s before the time limit",
            f"set a longer cluster.time, or a smaller cluster.save_before_end_s (now {margin_s})",
        )


def seconds(time: str) -> int | None:
    """Return a SLURM time limit in seconds; None for UNLIMITED and the like.

    Formats are MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM and D-HH:MM:SS (man sbatch, --time).
    """
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", str(time))
    if not match:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1, 0)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def check_extra(cluster: dict[str, Any], known: set[str]) -> Iterator[UserError]:
    """Yield the problems of `cluster.extra`.

    Args:
        cluster: The section `cluster` of the configuration.
        known: Long options of the installed sbatch, without dashes; empty when sbatch is not installed.
    """
    for entry in cluster.get("extra") or []:
        name = str(entry).partition("=")[0]
        if name in OURS:
            yield UserError(f"cluster.extra: --{name} is set by {OURS[name]}", f"set {OURS[name]} instead")
        elif name in NOT_FOR_A_JOB:
            yield UserError(f"cluster.extra: --{name} would break requeueing of the job", "leave it out")
        elif known and name not in known:
            near = did_you_mean(name, known)
            yield UserError(f"cluster.extra: this sbatch has no option --{name}", f"{near}sbatch --help lists them")


def sbatch_options(config: dict[str, Any], shape: LaunchShape, cpus_per_process: int | None) -> list[tuple[str, str]]:
    """Return the sbatch options without dashes, and their values; "" for a flag. `config` has passed `check_values`."""
    cluster = config["cluster"]
    processes = shape.processes_per_node
    nodes = shape.nodes + config["resources"]["spare_nodes"]
    least = least_nodes(config, shape) if config["resources"]["min_nodes"] else nodes
    # With ntasks-per-node, sbatch counts tasks for the least number of nodes, and SLURM (22.05) allocates no more.
    options = [("nodes", str(nodes)), ("ntasks-per-node", "1")] if least == nodes else [("nodes", f"{least}-{nodes}")]
    if shape.device == "cuda":
        kind = f"{cluster['gpu_type']}:" if cluster["gpu_type"] else ""
        options.append(("gpus-per-node", f"{kind}{processes}"))
    if cpus_per_process is not None:
        options.append(("cpus-per-task", str(cpus_per_process * processes)))
    if cluster["memory_per_process"] is not None:
        amount, unit = cluster["memory_per_process"][:-1], cluster["memory_per_process"][-1]
        options.append(("mem", f"{int(amount) * processes}{unit}"))
    for key in ("partition", "account", "qos", "time", "exclude", "constraint", "reservation", "nice"):
        if cluster[key] is not None:
            options.append((key, str(cluster[key])))
    if cluster["dependency"] is not None:
        # Without kill-on-invalid-dep a job waits for ever for a failed dependency.
        options += [("dependency", cluster["dependency"]), ("kill-on-invalid-dep", "yes")]
    for key in ("mail_user", "mail_type"):
        if cluster[key] is not None:
            options.append((key.replace("_", "-"), cluster[key]))
    options += [("requeue", ""), ("open-mode", "append"), ("signal", f"USR1@{cluster['save_before_end_s']}")]
    return options + [(name, value) for name, _, value in (entry.partition("=") for entry in cluster["extra"])]
