"""Setting one value of the composed tree, if its key exists or something that reads it would take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config.instantiate import DIRECTIVES
from trainer.config.own_keys import slip_of
from trainer.config.retarget import drop_leftovers
from trainer.config.schema import Config
from trainer.config.signature import TRAINERS_OWN, argument_names
from trainer.config.typed import NAMED, OPEN, as_written, closed_class, key_names
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed, nearest


def set_value(tree: Any, override: Any, loader: Any, cwd: Path) -> str | None:
    """Apply one parsed override that is not a group choice: `k=v`, `+k=v`, `++k=v` or `~k`.

    Returns a line for the user where more than that is changed (`retarget.py`).
    Raises UserError for a key that is not in the tree and that no schema or signature knows, for `+` on a key
    that is there, and for a plain value in place of a section.
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
        raise UserError(f"{line}: the job already has {key}", f"leave the + away: {line.lstrip('+')}")
    if exists:
        _keep_sections(tree, key, value, line, loader)
    else:
        _require_known(tree, parts, depth, value, override, loader, cwd)
    note = _retarget(tree, parts, value, cwd)
    try:
        OmegaConf.update(tree, key, value, merge=True, force_add=True)
    except OmegaConfBaseException as error:
        text = str(error).splitlines()[0]
        raise UserError(f"{line}: {text}", f"see what {key} holds with `trainer fit --cfg job`") from None
    return note


def _retarget(tree: Any, parts: list[str], value: Any, cwd: Path) -> str | None:
    where = parts[:-1] if parts[-1] == "_target_" else parts if isinstance(value, dict) and "_target_" in value else []
    if not where or _depth(tree, where) < len(where) or not _is_dict(_node(tree, where)):
        return None
    return drop_leftovers(_node(tree, where), where, value["_target_"] if isinstance(value, dict) else value, cwd)


def _depth(tree: Any, parts: list[str]) -> int:
    """How many of the parts are there, from the root."""
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
        raise UserError(f"{line}: there is no {'.'.join(parts)} to take away", "see `trainer fit --cfg job`")
    del _node(tree, parts[:-1])[parts[-1]]


def _keep_sections(tree: Any, key: str, value: Any, line: str, loader: Any) -> None:
    """A section with keys does not become a text: `trainer=fast` is a slip, `data.transforms=null` is not."""
    from omegaconf import DictConfig

    node = _node(tree, key.split(".")) if "[" not in key else None
    if not isinstance(node, DictConfig) or isinstance(value, dict) or value is None:
        return
    if ("." in key and key.split(".")[0] in OPEN) or key.split(".")[0] not in key_names(Config):
        return
    inside = listed([f"{key}.{name!s}" for name in node], 30)
    raise UserError(f"{line}: {key} is a section, not one value", f"set one of its keys: {inside}")


def _require_known(tree: Any, parts: list[str], depth: int, value: Any, override: Any, loader: Any, cwd: Path) -> None:
    """Raise UserError unless the first missing part is one that its reader would take."""
    line, plus = override.input_line, override.is_add() or override.is_force_add()
    part, parent, prefix = parts[depth], _node(tree, parts[:depth]), "".join(f"{p}." for p in parts[:depth])
    if depth == 0:
        if part not in key_names(Config) and not (plus and _is_new(tree, parts, loader)):
            raise _unknown_at_top(tree, parts, line, loader)
        return
    if parts[0] not in key_names(Config):
        if not plus:
            hint = did_you_mean(part, map(str, parent.keys()) if _is_dict(parent) else [], prefix=prefix)
            raise UserError(f"{line}: there is no key {prefix}{part}", f"{hint}to add it: +{line}")
        return
    if not _is_dict(parent) or parent._is_none():
        here = prefix[:-1]
        fix = f"set {here} as a whole" if parts[0] not in NAMED else f"choose it first, as in {parts[0]}={parts[1]}"
        raise UserError(f"{line}: {here} is {as_written(None if parent._is_none() else parent)}", fix)
    known = list(map(str, parent.keys()))
    if parts[0] not in OPEN:
        cls = closed_class(parts[0], {"name": parent.get("name")})
        known = known if cls is None else key_names(cls)
        if depth == 1 and (part in known or cls is None):
            return
        if parts[0] == "trainer":
            from trainer.config.lightning_names import TAKEN, WRITE, refusal

            if depth == 1 and part in WRITE:
                raise refusal(part, value)
            if part in ("_target_", *TAKEN) or parts[1] in TAKEN:
                return
            known = [*known, *TAKEN]
    else:
        if _open_takes(parent, parts, depth, value, plus, cwd):
            return
        known += _arguments(parent, parts[:depth], cwd) or []
        known += TRAINERS_OWN.get(parts[0], ()) if depth == 1 else ()
    raise _unknown(line, prefix, parts[depth:], known)


def _open_takes(parent: Any, parts: list[str], depth: int, value: Any, plus: bool, cwd: Path) -> bool:
    part = parts[depth]
    if parts[0] in NAMED and depth == 1:
        return value is None or isinstance(value, dict) or parts[depth + 1 :] == ["_target_"]
    if part in DIRECTIVES or (depth == 1 and part in TRAINERS_OWN.get(parts[0], ())):
        return True
    names = _arguments(parent, parts[:depth], cwd)
    if names is not None:
        return part in names
    # Nothing can say whether an unreadable signature, `**kwargs` or a plain mapping takes the key. Close to one
    # that is there it is most likely a slip, unless `+` says that it is meant.
    return plus or nearest(part, map(str, parent.keys())) is None


def _arguments(node: Any, parts: list[str], cwd: Path) -> list[str] | None:
    """Names that the node's target takes; null where that is not known."""
    target = node.get("_target_") if not node._is_missing() else None
    return argument_names(str(target), cwd) if target else None


def _unknown(line: str, prefix: str, rest: list[str], known: list[str]) -> UserError:
    near = nearest(rest[0], known)
    tail = "".join(f".{part}" for part in rest[1:])
    hint = f"did you mean {prefix}{near}{tail}? " if near else ""
    if rest[0] in ("class_path", "init_args"):  # LightningCLI's
        written = line.replace(f"{prefix}class_path=", f"{prefix}_target_=").replace(f"{prefix}init_args.", prefix)
        return UserError(f"{line}: there is no key {prefix}{rest[0]}", f"write {written}")
    visible = [name for name in known if not name.startswith("_")]
    return UserError(
        f"{line}: there is no key {prefix}{rest[0]}", f"{hint}keys of {prefix[:-1]}: {listed(visible, 30)}"
    )


def _is_new(tree: Any, parts: list[str], loader: Any) -> bool:
    """Whether a key of the user's own can have this name: not one that is most likely a slip, or that a section has."""
    taken = slip_of(parts[0], [*key_names(Config), *_groups(loader)])
    return taken is None and not (len(parts) == 1 and _homes(tree, parts[0]))


def _groups(loader: Any) -> list[str]:
    return [name for name in loader.list_groups("") if name != "hydra"]


def _homes(tree: Any, name: str) -> list[str]:
    sections = [section for section in tree if section in key_names(Config)]
    return [f"{section}.{name}" for section in sections if _depth(tree, [section, name]) == 2]


def _unknown_at_top(tree: Any, parts: list[str], line: str, loader: Any) -> UserError:
    """Also finds `lr` under `optimizer`, which is how people type first."""
    from trainer.config.lightning_names import TOP, refusal_at_top

    homes = _homes(tree, parts[0]) if len(parts) == 1 else []
    if not homes or parts[0] in TOP:
        refused = refusal_at_top(line, parts[0], line.partition("=")[2])
        if refused is not None:
            return refused
    groups = _groups(loader)
    known = sorted({*key_names(Config), *groups})
    near, tail = nearest(parts[0], known), "".join(f".{part}" for part in parts[1:])
    value = f"={line.partition('=')[2]}" if near in groups and not tail else ""
    hint = f"did you mean {near}{tail}{value}? " if near else ""
    if len(parts) == 1:
        hint = f"did you mean {' or '.join(homes)}? " if homes else hint
    own = "" if hint or line.startswith("+") else f"; to add a key of your own: +{line}"
    return UserError(f"{line}: there is no key or group {parts[0]}", f"{hint}there are: {listed(known, 40)}{own}")


def _no_group(override: Any, loader: Any) -> UserError:
    groups = _groups(loader)
    hint = did_you_mean(override.key_or_group, groups)
    return UserError(
        f"{override.input_line}: there is no config group {override.key_or_group}", f"{hint}groups: {listed(groups)}"
    )
