"""`cluster.*` of a job on SLURM as options of sbatch, each value held against what SLURM takes there.

Nothing that could end a line or a quotation gets through: a value that is no name, number or list is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trainer.config.elastic import least_nodes
from trainer.config.shape import LaunchShape
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*"
_FORMS = {
    "partition": (rf"{_NAME}(,{_NAME})*", "a name, or names separated by commas: gpu"),
    "account": (_NAME, "a name: my_project"),
    "qos": (_NAME, "a name: normal"),
    "reservation": (rf"{_NAME}(,{_NAME})*", "a name: maintenance"),
    "gpu_type": (_NAME, "a type as sinfo -o %G shows it: a100"),
    "time": (
        r"(\d+-\d+(:\d+){0,2}|\d+:\d+:\d+)",
        "D-HH:MM:SS or HH:MM:SS (in a YAML file in quotes): 1-12:00:00 is a day and a half",
    ),
    "memory_per_process": (r"[1-9]\d*[KMGT]", "a number and K, M, G or T: 60G"),
    "exclude": (r"[A-Za-z0-9_.,\[\]-]+", "nodes as SLURM lists them: node3,node[7-9]"),
    "constraint": (r"[A-Za-z0-9_.,&|()\[\]*:=-]+", "features: a100&nvlink"),
    "dependency": (
        r"(singleton|[a-z]+(:\d+([_+]\d+)?)+)([,?](singleton|[a-z]+(:\d+([_+]\d+)?)+))*",
        "a kind and job ids: afterok:1234",
    ),
    "mail_user": (r"[A-Za-z0-9_.+-]+(@[A-Za-z0-9_.-]+)?", "an address: me@example.org"),
    "mail_type": (r"[A-Z0-9_]+(,[A-Z0-9_]+)*", "kinds: END,FAIL"),
    "container": (r"[A-Za-z0-9_./:@#+-]+", "a path or an address of an image, without spaces: /images/torch.sif"),
}
"""Option to the form that it must have, and to that form in words with an example."""
_LISTED_FORMS = {
    "modules": (r"[A-Za-z0-9_][A-Za-z0-9_./+-]*", "a module's name: cuda/12.8"),
    "container_mounts": (r"/[A-Za-z0-9_./+-]*:/[A-Za-z0-9_./+-]*(:ro|:rw)?", "HOST:INSIDE: /data:/data"),
    "setup": (r"[^\x00-\x1f\x7f\x80-\x9f\u2028\u2029]+", "one line of bash, without line breaks"),
    "extra": (
        r"[a-z][a-z-]*(=[A-Za-z0-9_.,:@+=/\[\]*&|()!<>-]+)?",
        "an option of sbatch without the dashes, and its value: switches=1",
    ),
}
_SMALLEST = {"cpus_per_process": 1, "save_before_end_s": 30, "attempts_without_progress": 1, "sweep_at_once": 1}
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
"""Option of sbatch to the key that sets it."""
NOT_FOR_A_JOB = (
    *("array", "wrap", "wait", "parsable", "test-only", "help", "usage", "version", "quiet", "verbose", "chdir"),
    *("ntasks", "ntasks-per-node", "requeue", "no-requeue", "open-mode", "no-kill", "input", "export", "export-file"),
    *("uid", "gid", "clusters", "ignore-pbs"),
)
"""Options of sbatch that would change what the trainer relies on."""


def check_values(cluster: dict[str, Any]) -> Iterator[UserError]:
    """What is wrong with the values of `cluster.*`, without asking SLURM."""
    for key, (form, example) in _FORMS.items():
        value = cluster.get(key)
        if value is not None and not re.fullmatch(form, str(value)):
            yield UserError(f"cluster.{key}={value!r}: SLURM does not take this", f"write {example}")
    for key, (form, example) in _LISTED_FORMS.items():
        for value in cluster.get(key) or []:
            if not re.fullmatch(form, str(value)):
                yield UserError(f"cluster.{key}: {value!r} cannot be used", f"write {example}")
    for key, smallest in _SMALLEST.items():
        value = cluster.get(key)
        if value is not None and value < smallest:
            yield UserError(f"cluster.{key}={value} must be at least {smallest}", f"use cluster.{key}={smallest}")
    nice = cluster.get("nice")
    if nice is not None and abs(nice) > 2147483645:
        yield UserError(f"cluster.nice={nice} is out of range", "use a number up to 2147483645")
    if cluster["container_runtime"] not in ("apptainer", "pyxis"):
        runtime = cluster["container_runtime"]
        yield UserError(f"cluster.container_runtime={runtime!r} is not known", "use apptainer or pyxis")
    python = cluster.get("python")
    if python is not None and not re.fullmatch(_LISTED_FORMS["setup"][0], python):
        yield UserError(f"cluster.python={python!r}: not a path", "write the path of an interpreter on the nodes")
    yield from _check_time(cluster)


def _check_time(cluster: dict[str, Any]) -> Iterator[UserError]:
    limit_s = seconds(cluster["time"]) if cluster.get("time") is not None else None
    margin_s = cluster["save_before_end_s"]
    # SLURM looks every 30 s, and may signal that much early.
    if limit_s is not None and limit_s < margin_s + 60:
        yield UserError(
            f"cluster.time={cluster['time']} leaves no time to train: the ranks are asked to save "
            f"{margin_s} s before it ends",
            f"give it more time, or use a smaller cluster.save_before_end_s (now {margin_s})",
        )


def seconds(time: str) -> int | None:
    """A SLURM time limit (MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS) in seconds; null for UNLIMITED and the like.

    Source: man sbatch, --time.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if not match:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1, 0)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def check_extra(cluster: dict[str, Any], known: set[str]) -> Iterator[UserError]:
    """What is wrong with `cluster.extra`; `known` are the long options that this machine's sbatch has, without dashes;
    empty: not known here."""
    for entry in cluster.get("extra") or []:
        name = str(entry).partition("=")[0]
        if name in OURS:
            yield UserError(f"cluster.extra: --{name} is set by {OURS[name]}", f"set {OURS[name]} instead")
        elif name in NOT_FOR_A_JOB:
            yield UserError(f"cluster.extra: --{name} would break the requeueing of the job", "leave it out")
        elif known and name not in known:
            near = did_you_mean(name, known)
            yield UserError(f"cluster.extra: this sbatch has no option --{name}", f"{near}sbatch --help lists them")


def sbatch_options(config: dict[str, Any], shape: LaunchShape, cpus_per_process: int | None) -> list[tuple[str, str]]:
    """Options of sbatch, without dashes, and their values (empty: none). `config` has passed `check_values`."""
    cluster = config["cluster"]
    processes = shape.processes_per_node
    nodes = shape.nodes + config["resources"]["spare_nodes"]
    least = least_nodes(config, shape) if config["resources"]["min_nodes"] else nodes
    # With tasks a node sbatch makes tasks of the least number of nodes, and SLURM (22.05) gives it no more than that.
    found = [("nodes", str(nodes)), ("ntasks-per-node", "1")] if least == nodes else [("nodes", f"{least}-{nodes}")]
    if shape.device == "cuda":
        kind = f"{cluster['gpu_type']}:" if cluster["gpu_type"] else ""
        found.append(("gpus-per-node", f"{kind}{processes}"))
    if cpus_per_process is not None:
        found.append(("cpus-per-task", str(cpus_per_process * processes)))
    if cluster["memory_per_process"] is not None:
        amount, unit = cluster["memory_per_process"][:-1], cluster["memory_per_process"][-1]
        found.append(("mem", f"{int(amount) * processes}{unit}"))
    for key in ("partition", "account", "qos", "time", "exclude", "constraint", "reservation", "nice"):
        if cluster[key] is not None:
            found.append((key, str(cluster[key])))
    if cluster["dependency"] is not None:
        # Without the second a job that waits for one that failed waits for ever.
        found += [("dependency", cluster["dependency"]), ("kill-on-invalid-dep", "yes")]
    for key in ("mail_user", "mail_type"):
        if cluster[key] is not None:
            found.append((key.replace("_", "-"), cluster[key]))
    found += [("requeue", ""), ("open-mode", "append"), ("signal", f"USR1@{cluster['save_before_end_s']}")]
    return found + [(name, value) for name, _, value in (entry.partition("=") for entry in cluster["extra"])]
