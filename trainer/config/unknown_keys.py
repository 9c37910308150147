"""Refuse overrides of unknown keys, with the key that was meant; set the value of the others in the composed tree."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.instantiate import DIRECTIVES
from trainer.config.lightning_arguments import TAKEN
from trainer.config.own_keys import similar_key
from trainer.config.problems import as_written
from trainer.config.retarget import drop_leftovers
from trainer.config.schema import Config
from trainer.config.signature import TRAINERS_OWN, argument_names
from trainer.config.typed import NAMED, OPEN, closed_class, key_names
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed, nearest


@dataclass(frozen=True)
class _Assignment:
    """An override of a key that the tree does not have yet."""

    line: str
    """The override as written."""
    parts: list[str]
    """The key, split at its dots."""
    depth: int
    """Number of leading parts that exist in the tree."""
    value: Any
    plus: bool
    """Whether it was written with `+`."""
    cwd: Path

    @property
    def part(self) -> str:
        """The first part that does not exist."""
        return self.parts[self.depth]

    @property
    def prefix(self) -> str:
        """The existing parts, each followed by a dot."""
        return "".join(f"{part}." for part in self.parts[: self.depth])


def set_value(tree: Any, override: Any, loader: Any, cwd: Path) -> str | None:
    """Apply one parsed override that is not a group choice: `k=v`, `+k=v`, `++k=v` or `~k`.

    Returns:
        A line for the user if more than this value changes (`retarget.py`), else None.

    Raises:
        UserError: The key is neither in the tree nor known to a schema or signature; `+` was written for a key that
            exists; or a plain value would replace a section.
    """
    from omegaconf import OmegaConf
    from omegaconf._utils import split_key
    from omegaconf.errors import OmegaConfBaseException

    key, line = override.key_or_group, override.input_line
    if override.package is not None:
        raise _no_group(override, loader)
    parts = split_key(key)
    depth = _depth(tree, parts)
    exists = depth == len(parts)
    if override.is_delete():
        _delete(tree, parts, exists, line)
        return None
    value = override.value()
    if exists and override.is_add() and not override.is_force_add():
        raise UserError(f"{line}: the job already has {key}", f"remove the +: {line.lstrip('+')}")
    if exists:
        _keep_sections(tree, key, value, line)
    else:
        plus = override.is_add() or override.is_force_add()
        _require_known(tree, _Assignment(line, parts, depth, value, plus, cwd), loader)
    note = _retarget(tree, parts, value, cwd)
    try:
        OmegaConf.update(tree, key, value, merge=True, force_add=True)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise UserError(f"{line}: {text}", f"`trainer fit --cfg job` prints what {key} holds") from None
    return note


def _retarget(tree: Any, parts: list[str], value: Any, cwd: Path) -> str | None:
    """Drop the arguments of the previous target if the override changes a `_target_`."""
    owner = parts[:-1] if parts[-1] == "_target_" else parts if isinstance(value, dict) and "_target_" in value else []
    if not owner or _depth(tree, owner) < len(owner) or not _is_dict(_node(tree, owner)):
        return None
    return drop_leftovers(_node(tree, owner), owner, value["_target_"] if isinstance(value, dict) else value, cwd)


def _depth(tree: Any, parts: list[str]) -> int:
    """Return how many of the parts exist, counted from the root."""
    node = tree
    for i, part in enumerate(parts):
        if _is_list(node):
            if not part.isdigit() or int(part) >= len(node):
                return i
            node = node._get_node(int(part))
        elif _is_dict(node) and not node._is_none() and not node._is_interpolation() and part in node.keys():  # noqa: SIM118
            node = node._get_node(part)
        else:
            return i
    return len(parts)


def _node(tree: Any, parts: list[str]) -> Any:
    node = tree
    for part in parts:
        node = node._get_node(int(part) if _is_list(node) else part)
    return node


def _is_dict(node: Any) -> bool:
    from omegaconf import DictConfig

    return isinstance(node, DictConfig)


def _is_list(node: Any) -> bool:
    from omegaconf import ListConfig

    return isinstance(node, ListConfig)


def _delete(tree: Any, parts: list[str], exists: bool, line: str) -> None:
    if not exists:
        fix = "`trainer fit --cfg job` prints all keys"
        raise UserError(f"{line}: there is no {'.'.join(parts)} to delete", fix)
    del _node(tree, parts[:-1])[parts[-1]]


def _keep_sections(tree: Any, key: str, value: Any, line: str) -> None:
    """Refuse to replace a section by a string: `trainer=fast` is a mistake, `data.transforms=null` is not."""
    from omegaconf import DictConfig

    node = _node(tree, key.split(".")) if "[" not in key else None
    if not isinstance(node, DictConfig) or isinstance(value, dict) or value is None:
        return
    if ("." in key and key.split(".")[0] in OPEN) or key.split(".")[0] not in key_names(Config):
        return
    keys = listed([f"{key}.{name!s}" for name in node], 30)
    raise UserError(f"{line}: {key} is a section, not one value", f"set one of its keys: {keys}")


def _require_known(tree: Any, new: _Assignment, loader: Any) -> None:
    """Raise UserError unless the reader of the section accepts the first missing part."""
    line, parts, depth, part, prefix = new.line, new.parts, new.depth, new.part, new.prefix
    parent = _node(tree, parts[:depth])
    if depth == 0:
        if part not in key_names(Config) and not (new.plus and _is_new(tree, parts, loader)):
            raise _unknown_at_top(tree, parts, line, loader)
        return
    if parts[0] not in key_names(Config):
        if not new.plus:
            hint = did_you_mean(part, map(str, parent.keys()) if _is_dict(parent) else [], prefix=prefix)
            raise UserError(f"{line}: unknown key {prefix}{part}", f"{hint}to add it: +{line}")
        return
    if not _is_dict(parent) or parent._is_none():
        key = prefix[:-1]
        fix = f"set {key} as a whole" if parts[0] not in NAMED else f"choose it first, as in {parts[0]}={parts[1]}"
        raise UserError(f"{line}: {key} is {as_written(None if parent._is_none() else parent)}", fix)
    known = list(map(str, parent.keys()))
    if parts[0] not in OPEN:
        cls = closed_class(parts[0], {"name": parent.get("name")})
        known = known if cls is None else key_names(cls)
        if depth == 1 and (part in known or cls is None):
            return
        if parts[0] == "trainer":
            from trainer.config.lightning_names import WRITE, refusal

            if depth == 1 and part in WRITE:
                raise refusal(part, new.value)
            if part in ("_target_", *TAKEN) or parts[1] in TAKEN:
                return
            known = [*known, *TAKEN]
    else:
        if _is_accepted(parent, new):
            return
        known += _arguments(parent, new.cwd) or []
        known += TRAINERS_OWN.get(parts[0], ()) if depth == 1 else ()
    raise _unknown(line, prefix, parts[depth:], known)


def _is_accepted(parent: Any, new: _Assignment) -> bool:
    """Return whether an open section accepts the new key."""
    section, depth, part = new.parts[0], new.depth, new.part
    if section in NAMED and depth == 1:
        return new.value is None or isinstance(new.value, dict) or new.parts[depth + 1 :] == ["_target_"]
    if part in DIRECTIVES or (depth == 1 and part in TRAINERS_OWN.get(section, ())):
        return True
    names = _arguments(parent, new.cwd)
    if names is not None:
        return part in names
    # An unreadable signature, `**kwargs` or a plain mapping may accept any key. A key similar to an existing one is
    # most likely a typing mistake, unless it was written with `+`.
    return new.plus or nearest(part, map(str, parent.keys())) is None


def _arguments(node: Any, cwd: Path) -> list[str] | None:
    """Return the argument names of the node's target; None if they are not known."""
    target = node.get("_target_") if not node._is_missing() else None
    return argument_names(str(target), cwd) if target else None


def _unknown(line: str, prefix: str, rest: list[str], known: list[str]) -> UserError:
    near = nearest(rest[0], known)
    tail = "".join(f".{part}" for part in rest[1:])
    hint = f"did you mean {prefix}{near}{tail}? " if near else ""
    if rest[0] in ("class_path", "init_args"):  # LightningCLI's
        written = line.replace(f"{prefix}class_path=", f"{prefix}_target_=").replace(f"{prefix}init_args.", prefix)
        return UserError(f"{line}: unknown key {prefix}{rest[0]}", f"write {written}")
    visible = [name for name in known if not name.startswith("_")]
    return UserError(f"{line}: unknown key {prefix}{rest[0]}", f"{hint}keys of {prefix[:-1]}: {listed(visible, 30)}")


def _is_new(tree: Any, parts: list[str], loader: Any) -> bool:
    """Return whether the name can be a user-defined key.

    It cannot if it looks like a misspelt key or if a section has it.
    """
    meant = similar_key(parts[0], [*key_names(Config), *_groups(loader)])
    return meant is None and not (len(parts) == 1 and _in_sections(tree, parts[0]))


def _is_section(tree: Any, name: str) -> bool:
    from omegaconf import OmegaConf

    return name in set(tree.keys()) and OmegaConf.is_config(tree._get_node(name))


def _groups(loader: Any) -> list[str]:
    return [name for name in loader.list_groups("") if name != "hydra"]


def _in_sections(tree: Any, name: str) -> list[str]:
    """Return the keys of this name in the sections, such as `optimizer.lr` for `lr`."""
    sections = [section for section in tree if section in key_names(Config)]
    return [f"{section}.{name}" for section in sections if _depth(tree, [section, name]) == 2]


def _unknown_at_top(tree: Any, parts: list[str], line: str, loader: Any) -> UserError:
    """Return the error for an unknown top-level key; suggests `optimizer.lr` for `lr`, which many people type first."""
    from trainer.config.lightning_names import TOP, refusal_at_top

    in_sections = _in_sections(tree, parts[0]) if len(parts) == 1 else []
    if not in_sections or parts[0] in TOP:
        refused = refusal_at_top(line, parts[0], line.partition("=")[2])
        if refused is not None:
            return refused
    groups = _groups(loader)
    if len(parts) == 1 and parts[0] in groups:
        options = listed(loader.get_group_options(parts[0]))
        return UserError(f"{line}: {parts[0]} takes the names of its config files", f"choose from: {options}")
    known = sorted({*key_names(Config), *groups})
    if parts[0] == "sweep":
        return UserError(f"{line}: an option of a sweep", "use trainer sweep, or trainer fit -m")
    tail = "".join(f".{part}" for part in parts[1:])
    near = nearest(parts[0], [one for one in known if not tail or one in groups or _is_section(tree, one)])
    value = f"={line.partition('=')[2]}" if near in groups and not tail else ""
    hint = f"did you mean {near}{tail}{value}? " if near else ""
    if len(parts) == 1:
        hint = f"did you mean {' or '.join(in_sections)}? " if in_sections else hint
    own = "" if hint or line.startswith("+") else f"; to add your own key: +{line}"
    return UserError(f"{line}: unknown key or group {parts[0]}", f"{hint}keys and groups: {listed(known, 40)}{own}")


def _no_group(override: Any, loader: Any) -> UserError:
    groups = _groups(loader)
    hint = did_you_mean(override.key_or_group, groups)
    message = f"{override.input_line}: unknown config group {override.key_or_group}"
    return UserError(message, f"{hint}groups: {listed(groups)}")
