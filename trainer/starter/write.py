"""Writing the plan for a folder as an experiment file, or as overrides."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any, TextIO

import yaml

from trainer.core.errors import UserError
from trainer.core.files import write_atomic
from trainer.core.hardware import count_gpus, usable_cores
from trainer.data.untrusted import shown
from trainer.starter.choose import Machine, Plan, choose
from trainer.starter.scan import scan

LINE = 108
"""Width of the comments in the file, in columns."""
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_QUOTE = re.compile(r'(\\*)("|$)')


def experiment_for(root: Path, others: list[str], keep: bool, stream: TextIO) -> list[str]:
    """Return `others` behind the overrides that select the experiment of a folder; see `expand` in `folder.py`."""
    named = {override.lstrip("+~").partition("=")[0] for override in others}
    if "experiment" in named:
        raise UserError(
            f"data={root} chooses a whole experiment for the folder, but experiment= selects another one",
            "leave experiment= out, or keep it and name the kind of data: data=image_folder data.root=...",
        )
    target = _file_of(root)
    if keep and target.exists():
        print(f"using conf/experiment/{target.name}; delete it to choose again for {shown(root)}", file=stream)
        return [f"experiment={target.stem}", *others]
    machine = _machine(others)
    plan = choose(scan(root), machine)
    plan.without(named)
    print(_report(plan, machine), file=stream)
    name = [] if "name" in named else [f"name={target.stem}"]
    if not keep:
        return [*_as_overrides(plan), *name, *others]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, as_yaml(plan, target.stem))
    print(
        f"wrote {target.relative_to(Path.cwd())}; edit it, and train again with: trainer fit experiment={target.stem}"
    )
    return [f"experiment={target.stem}", *others]


def as_yaml(plan: Plan, name: str) -> str:
    """Return the text of the experiment file."""
    lines = ["# @package _global_", f"# {shown(plan.contents.root)}:", *_comment(f"{plan.contents}.")]
    lines += ["# Chosen by `trainer fit data=FOLDER`; edit it as you like."]
    lines += _dumped({"defaults": [{f"override /{group}": option} for group, option in plan.groups.items()]})
    lines += _dumped({"name": _literal(name)})
    for section, values in plan.values.items():
        lines += ["", *_comment(f"{plan.groups.get(section, section)}: {plan.reasons[section]}.")]
        lines += _dumped({section: {key: _literal(value) for key, value in values.items()}}) if values else []
    return "\n".join(lines) + "\n"


def _dumped(content: dict[str, Any]) -> list[str]:
    """Return the lines of a mapping as YAML. No value can end its own line: the dumper escapes what would."""
    text: str = yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=2**20)
    return text.splitlines()


class _Quoted(str):
    """A text that is data: in YAML always in double quotes."""


class _List(list[Any]):
    """A list of values on one line."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    pass


_Dumper.add_representer(_Quoted, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, '"'))
_Dumper.add_representer(
    _List, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _literal(value: Any) -> Any:
    """Return a value as data: what OmegaConf would read as an interpolation is escaped."""
    if isinstance(value, list):
        return _List(map(_literal, value))
    return _Quoted(_INTERPOLATION.sub(r"\1\1\\${", value)) if isinstance(value, str) else value


def _file_of(root: Path) -> Path:
    """Return the path of the experiment of this folder, with a number if that of another folder has that name."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", root.stem if root.is_file() else root.name).strip("-") or "data"
    number, folder = 1, Path.cwd() / "conf" / "experiment"
    while True:
        path = folder / (f"{name}.yaml" if number == 1 else f"{name}-{number}.yaml")
        if not path.exists() or _is_of(path, root):
            return path
        number += 1


def _is_of(path: Path, root: Path) -> bool:
    """Return whether an experiment was written for this folder."""
    lines = path.read_text().splitlines()
    return any(
        f"  {line}" in lines for line in (f"root: {json.dumps(str(root))}", *_dumped({"root": _literal(str(root))}))
    )


def _as_overrides(plan: Plan) -> list[str]:
    groups = [f"{group}={option}" for group, option in plan.groups.items()]
    return groups + [
        f"{section}.{key}={_quoted(value)}" for section, values in plan.values.items() for key, value in values.items()
    ]


def _quoted(value: Any) -> str:
    """Quote a value for Hydra's override grammar."""
    if isinstance(value, list):
        return f"[{','.join(map(_quoted, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    text = _QUOTE.sub(lambda match: match[1] * 2 + (r"\"" if match[2] else ""), _literal(value))
    return f'"{text}"'


def _machine(overrides: list[str]) -> Machine:
    """Return the hardware of this machine that the overrides let the job use."""
    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    gpus, processes = (given.get(f"resources.{key}", "") for key in ("gpus", "cpu_processes"))
    cores = usable_cores()
    return Machine(
        int(gpus) if gpus.isdigit() else count_gpus(), min(cores, int(processes)) if processes.isdigit() else cores
    )


def _report(plan: Plan, machine: Machine) -> str:
    lines = [f"{shown(plan.contents.root)}: {shown(plan.contents)}", f"this machine: {machine}"]
    for section in plan.values:
        chosen = [plan.groups[section]] if section in plan.groups else []
        values = {key: value for key, value in plan.values[section].items() if key != "root" and value is not None}
        chosen += [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
        lines.append(f"  {section:<11}{' '.join(chosen)}\n             {plan.reasons[section]}")
    return "\n".join(lines)


def _comment(text: str) -> list[str]:
    return textwrap.wrap(shown(text), LINE, initial_indent="# ", subsequent_indent="# ")
