"""Read and write JSON records: frozen dataclasses that processes exchange through files, pipes and variables.

The fields of a record class and their types are the keys of its JSON object and the types of their values. A record is
validated when it is read, so that its values have the types that its class declares:

- A key that is missing takes the default of its field. Without a default, and for a value of a wrong type, `BadRecord`
  names the file and the field.
- A record of a newer version is refused. Its version is the key "version"; without that key it is 1, as in every
  release so far.
- A key that the class does not know is left out: within a version, keys may only be added.
"""

from __future__ import annotations

import functools
import json
import sys
import types
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from trainer.core.errors import UserError
from trainer.core.files import parse_json, read_text
from trainer.core.text import printable

VERSION = 1
"""The newest version that this reader knows."""
_ABSENT, _NOT_STORED = "absent while None", "not stored"
_SIMPLE: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "a text"),
    int: ((int,), "an integer"),
    float: ((float, int), "a number"),
    bool: ((bool,), "true or false"),
    type(None): ((type(None),), "null"),
}
_OF_MESSAGES = "the process that wrote it has failed, or is of another version of trainer; see its output"
_LONGEST = 60
"""Maximum number of characters of a wrong value in a message."""
_INTEGERS = 2**63
"""Integers of records have 64 bits: a larger one could not become a number with a fraction."""
_skipped: set[tuple[str, str]] = set()
"""(file, field) of the records that this process has reported as skipped."""
skips = 0
"""How many records this process has skipped, those included that it had reported before."""

T = TypeVar("T")
_Check = Callable[[Any, str], Any]
"""Validates a value and returns it; the text is its location in the record."""


class BadRecord(UserError):
    """A record that cannot be used: damaged, incomplete, of a wrong type, or of a newer version."""

    def __init__(self, message: str, fix: str, *, source: str, place: str = "") -> None:
        super().__init__(message, fix)
        self.source = source
        self.place = place
        """The invalid field; empty if the record as a whole is invalid."""


class _Mismatch(ValueError):
    """A value whose type is not that of its field."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(problem)
        self.place = place


def absent() -> Any:
    """Return a field that is None by default, and is omitted from the JSON object while it is None."""
    return field(default=None, metadata={_ABSENT: True})


def not_stored() -> Any:
    """Return a field that is not in the JSON object, such as a number in the name of the file."""
    return field(metadata={_NOT_STORED: True})


def to_json(record: Any) -> dict[str, Any]:
    """Return the JSON object of a record, nested records included."""
    return {
        one.name: _plain(value)
        for one in fields(record)
        if not one.metadata.get(_NOT_STORED)
        and not ((value := getattr(record, one.name)) is None and one.metadata.get(_ABSENT))
    }


def dumps(record: Any, indent: int | None = None) -> str:
    """Return the JSON text of a record, or of a list of them."""
    return json.dumps(_plain(record), indent=indent)


def loads(kind: type[T], text: str | bytes, source: str) -> T:
    """Return the message in a JSON text that another process has written.

    Args:
        kind: The class of a record, or `list[...]` or `dict[str, ...]` of records or plain values.
        text: What `dumps` returned.
        source: Where it came from, for the message of an error.

    Raises:
        BadRecord: It is no such message, or of a newer version.
    """
    try:
        content = parse_json(text if isinstance(text, str) else text.decode())
        if is_dataclass(kind):
            _refuse_newer(content, source)
        message: T = _check_of(cast(Any, kind))(content, "")
        return message
    except ValueError as error:
        place = error.place if isinstance(error, _Mismatch) else ""
        raise BadRecord(f"{source} cannot be used: {error}", _OF_MESSAGES, source=source, place=place) from None


def from_json(cls: type[T], content: Any, source: Path | str, **known: Any) -> T:
    """Return the record in a JSON object.

    Args:
        cls: The class of the record.
        content: The result of `json.loads`.
        source: The file, for the message.
        known: Fields that are `not_stored`.

    Raises:
        BadRecord: A field is missing or of a wrong type, or the record is of a newer version.
    """
    try:
        _refuse_newer(content, source)
        return _build(cls, content, "", known)
    except _Mismatch as mismatch:
        raise damaged(source, str(mismatch), mismatch.place) from None


def read(cls: type[T], path: Path, **known: Any) -> T | None:
    """Return the record in a file; None if the file does not exist. Raises BadRecord as `from_json` does."""
    try:
        content = parse_json(read_text(path))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged(path, error.strerror or str(error)) from None
    except ValueError as error:
        raise damaged(path, str(error)) from None
    return from_json(cls, content, path, **known)


def read_existing(cls: type[T], path: Path) -> T:
    """Return the record in a file that another process was to write. Raises BadRecord as `from_json` does."""
    record = read(cls, path)
    if record is None:
        raise BadRecord(f"{path} was not written", _OF_MESSAGES, source=str(path))
    return record


def read_or_skip(cls: type[T], path: Path, **known: Any) -> T | None:
    """Return the record in a file; None if it does not exist, or cannot be used, which `skip` reports."""
    try:
        return read(cls, path, **known)
    except BadRecord as error:
        skip(error)
        return None


def skip(error: BadRecord) -> None:
    """Report a skipped record on stderr, once per file and field in this process."""
    global skips
    skips += 1
    key = (error.source, error.place)
    if key not in _skipped:
        _skipped.add(key)
        print(f"trainer: {printable(error.message)}; this record is left out", file=sys.stderr, flush=True)


def damaged(source: Path | str, problem: str, place: str = "") -> BadRecord:
    """Return the error for a damaged record."""
    fix = "restore it from a backup, or remove it; the information it holds about the run is then lost"
    return BadRecord(f"{source} is damaged: {problem}", fix, source=str(source), place=place)


def newer(source: Path | str, key: str, version: int, known: int) -> BadRecord:
    """Return the error for a record that a newer release has written."""
    message = f"{source} has {key} {version}; this trainer reads up to {known}"
    return BadRecord(
        message, "Use the version of trainer that wrote it, or a newer one.", source=str(source), place=key
    )


def _refuse_newer(content: Any, source: Path | str) -> None:
    version = _check_of(int)(_object(content).get("version", VERSION), "version")
    if version > VERSION:
        raise newer(source, "version", version, VERSION)


def _plain(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if is_dataclass(value):
        return to_json(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _object(content: Any, place: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _Mismatch(place, f"{place or 'it'} is {_shown(content)}, not an object")
    return content


def _build(cls: type[T], content: Any, place: str, known: dict[str, Any]) -> T:
    content = _object(content, place)
    values = dict(known)
    for name, check, is_required in _fields_of(cast(Any, cls)):
        where = _inside(place, name)
        if name in content:
            values[name] = check(content[name], where)
        elif is_required:
            raise _Mismatch(where, f"{where} is missing")
    return cls(**values)


@functools.cache
def _fields_of(cls: Any) -> list[tuple[str, _Check, bool]]:
    """Return (name, check, whether it is required) of each stored field."""
    hints = get_type_hints(cls)
    stored = [one for one in fields(cls) if not one.metadata.get(_NOT_STORED)]
    return [(one.name, _check_of(hints[one.name]), _is_required(one)) for one in stored]


def _is_required(one: Field[Any]) -> bool:
    return one.default is MISSING and one.default_factory is MISSING


@functools.cache
def _check_of(kind: Any) -> _Check:
    """Return the check for a type: one of `_SIMPLE`, Any, Literal, list, dict, an optional one, or a record class."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda value, place: value
    if kind in _SIMPLE:
        accepted, name = _SIMPLE[kind]
        return functools.partial(_simple, accepted, name)
    if origin is Literal:
        return functools.partial(_one_of, arguments)
    if origin is list:
        return functools.partial(_list, _check_of(arguments[0]))
    if origin is dict and arguments[1] is Any:
        return _object
    if origin is dict:
        return functools.partial(_dict, _check_of(arguments[1]))
    if origin in (Union, types.UnionType):
        return _check_of_union([one for one in arguments if one is not type(None)])
    if is_dataclass(kind):
        return lambda value, place: _build(kind, value, place, {})  # type: ignore[arg-type]
    raise TypeError(f"a record cannot have a field of type {kind}")


def _check_of_union(kinds: list[Any]) -> _Check:
    """Return the check for one type, or one of several of `_SIMPLE`, or null."""
    if all(kind in _SIMPLE for kind in kinds):
        chosen = [_SIMPLE[kind] for kind in _SIMPLE if kind in kinds]
        accepted = tuple(kind for accepted, _ in chosen for kind in accepted)
        return functools.partial(_simple, (*accepted, type(None)), " or ".join(name for _, name in chosen))
    (kind,) = kinds
    check = _check_of(kind)
    return lambda value, place: None if value is None else check(value, place)


def _simple(accepted: tuple[type, ...], name: str, value: Any, place: str) -> Any:
    if type(value) not in accepted:
        raise _Mismatch(place, f"{place or 'it'} is {_shown(value)}, not {name}")
    if type(value) is int and not -_INTEGERS <= value < _INTEGERS:
        raise _Mismatch(place, f"{place} has {len(str(value))} digits")
    return value


def _one_of(choices: tuple[Any, ...], value: Any, place: str) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise _Mismatch(place, f"{place} is {_shown(value)}, not one of {', '.join(choices)}")
    return value


def _list(check: _Check, value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Mismatch(place, f"{place or 'it'} is {_shown(value)}, not a list")
    return [check(item, f"{place}[{number}]") for number, item in enumerate(value)]


def _dict(check: _Check, value: Any, place: str) -> dict[str, Any]:
    return {key: check(item, _inside(place, key)) for key, item in _object(value, place).items()}


def _inside(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
