"""Parameters that a function of the user's project adds to each trial: `custom_search_space` of Hydra's Optuna sweeper.

The function is called with the configuration and the trial, and calls `trial.suggest_float` and the like: limits that
depend on other parameters, and parameters that exist on some conditions only. What it has suggested is written into the
decision on the trial, so it is asked once for each trial, whoever else is killed.
"""

from __future__ import annotations

import importlib
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hydra.errors import HydraException

from trainer.config.compose import compose
from trainer.config.sources import Definition, find
from trainer.core.errors import TrainerError, UserError
from trainer.sweeps.points import scaled
from trainer.sweeps.records import Parameter

KEY = "custom_search_space"
Draw = Callable[[Parameter], str]
"""Returns the value of a parameter that was added, as an override has it."""


def drawn(seed: int, number: int) -> Draw:
    """Return a function that draws values from the seed of the sweep, the trial and the name."""
    return lambda one: scaled(one, random.Random(f"{seed}/{number}/{one.key}").random())


class CustomTrial:
    """The trial that the function gets: the part of `optuna.trial.Trial` by which parameters are suggested.

    Args:
        number: Number of the trial.
        values: The point so far, as overrides have it.
        fixed: Overrides that every trial has.
        draw: Chooses the values.
    """

    def __init__(self, number: int, values: Mapping[str, str], fixed: Sequence[str], draw: Draw) -> None:
        self.number = number
        self._draw = draw
        self._params = {key: _parsed(text) for key, text in values.items()}
        self._fixed = dict(_pair(one) for one in fixed)
        self.added: dict[str, str] = {}
        """The values that were suggested, as overrides have them."""
        self.parameters: list[Parameter] = []
        """What they were chosen from."""

    @property
    def params(self) -> dict[str, Any]:
        """The values of all parameters so far."""
        return dict(self._params)

    @property
    def user_attrs(self) -> Mapping[str, Any]:
        """The values that the command line has fixed."""
        return MappingProxyType(self._fixed)

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        """Add a number between two limits, both included."""
        parameter = Parameter(key=name, kind="float", low=float(low), high=float(high), log=log, step=step)
        return float(self._suggest(parameter))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Add a whole number between two limits, both included."""
        unit = None if step == 1 else float(step)
        parameter = Parameter(key=name, kind="int", low=float(low), high=float(high), log=log, step=unit)
        return int(self._suggest(parameter))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Add one of several values."""
        texts = [_written(one) for one in choices]
        return self._suggest(Parameter(key=name, kind="choice", choices=texts))

    def _suggest(self, parameter: Parameter) -> Any:
        key = parameter.key
        if key in self._params:  # as in Optuna, the first call decides
            return self._params[key]
        if key.lstrip("+") in self._fixed:
            raise ValueError(f"{key} has a fixed value: {key.lstrip('+')}={self._fixed[key.lstrip('+')]}")
        if parameter.kind == "choice" and not parameter.choices:
            raise ValueError(f"{key}: no choices")
        if parameter.low > parameter.high or (parameter.log and (parameter.low <= 0 or parameter.step)):
            raise ValueError(f"{key}: not an interval: {parameter.low:g} to {parameter.high:g}")
        self.added[key] = self._draw(parameter)
        self.parameters.append(parameter)
        self._params[key] = _parsed(self.added[key])
        return self._params[key]


class CustomSpace:
    """The user's function, and the configuration that it is called with.

    Args:
        path: The dotted path of the function. A leading dot, as in Hydra's documentation, means the same.
        fixed: Overrides that every trial has.
        cwd: The project, or its frozen copy.
        where: Further arguments of `compose`.

    Raises:
        UserError: There is no such function in the project, or it cannot be imported.
    """

    def __init__(self, path: str, fixed: Sequence[str], cwd: Path, **where: Any) -> None:
        from omegaconf import OmegaConf

        self._fixed = list(fixed)
        with _importable(cwd):
            self._function = _function(path.removeprefix("."), cwd)
        self._config = OmegaConf.create(compose(self._fixed, cwd=cwd, **where).config)
        OmegaConf.set_struct(self._config, True)
        OmegaConf.set_readonly(self._config, True)
        self._path, self._cwd = path, cwd

    def extended(self, number: int, values: Mapping[str, str], draw: Draw) -> CustomTrial:
        """Call the function for a trial, and return what it has added.

        Raises:
            UserError: It raises an exception.
        """
        trial = CustomTrial(number, values, self._fixed, draw)
        with _importable(self._cwd):  # it may import when it is called
            try:
                self._function(self._config, trial)
            except TrainerError:
                raise
            except Exception as error:  # user code may raise anything
                message = f"{KEY}={self._path}: trial {number}: {type(error).__name__}: {error}{_line(error)}"
                raise UserError(message, "correct the function; it is called as Hydra's Optuna sweeper does") from None
        return trial


def _function(path: str, cwd: Path) -> Callable[[Any, Any], None]:
    """Import a function of the project. A config file may name it, so nothing else is imported."""
    module, _, name = path.rpartition(".")
    found = find(path, cwd) if module and all(path.split(".")) else None
    file = found.module.file if isinstance(found, Definition) and found.owner is None else None
    if file is None or not file.resolve().is_relative_to(cwd.resolve()):
        fix = "name a function in a Python file of this folder, such as mine.configure of mine.py"
        raise UserError(f"{KEY}={path}: not a function of this project", fix)
    try:
        imported = importlib.import_module(module)
        function = getattr(imported, name)
    except Exception as error:  # user code may raise anything
        message = f"{KEY}={path}: {type(error).__name__}: {error}{_line(error)}"
        raise UserError(message, f"python -c 'import {module}' shows more") from None
    code = getattr(function, "__code__", None)
    if code is None or not Path(code.co_filename).resolve().is_relative_to(cwd.resolve()):
        raise UserError(f"{KEY}={path}: not a function of this project", f"rename {file.name}, or define it there")
    return function  # type: ignore[no-any-return]


@contextmanager
def _importable(cwd: Path) -> Iterator[None]:
    """Import the modules of the project first."""
    path = list(sys.path)
    sys.path[:0] = [str(cwd), str(cwd / "src")]
    try:
        yield
    finally:
        sys.path[:] = path


def _line(error: Exception) -> str:
    """Return where the user's code raised an exception, as ` (file:line)`."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f" ({Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno})"


def _parsed(text: str) -> Any:
    """Return the value that an override gives a key."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(f"key={text}").value()


def _written(value: Any) -> str:
    """Return a value as an override has it; a text is quoted where it would be read as something else."""
    from hydra.core.override_parser.types import Override

    texts = []
    with suppress(AssertionError):  # of another type
        texts.append(str(Override._get_value_element_as_str(value)))
    if isinstance(value, str):
        texts.append("'" + re.sub(r"(\\*)'", r"\1\1\'", value) + "'")
    for text in texts:
        try:
            if _parsed(text) == value and type(_parsed(text)) is type(value):
                return text
        except HydraException:
            continue
    raise ValueError(f"{value!r} cannot be written as an override")


def _pair(override: str) -> tuple[str, Any]:
    key, _, text = override.partition("=")
    return key.lstrip("+"), _parsed(text)
