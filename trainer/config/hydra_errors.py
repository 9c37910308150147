"""Translate errors of Hydra and OmegaConf into one message each that names the mistake and the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config.hydra_node import INSTEAD, NOT_USED
from trainer.config.typed import NAMED
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed

UNUSED_PARTS = ("launcher", "sweeper", "help", "hydra_help", "hydra_logging", "job_logging")
"""Groups of Hydra's own node that have no effect here."""


@contextmanager
def translated(loader: Any, overrides: list[str]) -> Iterator[None]:
    """Turn Hydra's exception for a user's mistake into a UserError."""
    import yaml
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from hydra.plugins.config_source import ConfigLoadError
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except OverrideParseException as error:
        raise unreadable(error) from None
    except MissingConfigException as error:
        raise _missing_config(error, loader, overrides) from None
    except yaml.YAMLError as error:
        raise _bad_yaml(error) from None
    except OmegaConfBaseException as error:
        raise interpolation(error) from None
    except (HydraException, ConfigLoadError) as error:
        raise _composition(error, loader, overrides) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{_file_with(error, loader)} is not UTF-8 ({error.reason})", "save it as UTF-8") from None
    except OSError as error:
        fix = "make it readable, or remove it from the search path"
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})", fix) from None
    except ValueError as error:  # Hydra's own checks of an override, or of the header of a file
        fix = "correct the override, the defaults list, or the line `# @package` of a config file"
        raise UserError(f"the configuration cannot be composed: {error}", fix) from None


def _file_with(error: Exception, loader: Any) -> str:
    """Return the first file of the search path that fails to load with the same error, which does not name it."""
    from omegaconf import OmegaConf

    folders = [source.path for source in loader.get_sources() if source.scheme() == "file"]
    for path in (path for folder in folders for path in sorted(Path(folder).rglob("*.yaml"))):
        try:
            OmegaConf.load(path)
        except type(error) as same_type:
            if str(same_type) == str(error):
                return str(path)
        except Exception:  # broken in another way, so this is not the file that was loaded
            continue
    return "a config file"


def interpolation(error: Exception) -> UserError:
    """Return the error for a value that refers to something that does not exist, or that cannot be merged."""
    key = getattr(error, "full_key", None) or ""
    unknown = re.search(r"Unsupported interpolation type (\S+)", str(error))
    if unknown:
        from trainer.config.resolvers import no_resolver  # only needed for this mistake

        return no_resolver(key, unknown[1], Path.cwd())
    denied = re.search(r"(a config may not read the variable (\S+)):", str(error))
    if denied:
        return UserError(f"{key}: {denied[1]}", f"if it is no secret: security.env=[{denied[2]}]")
    text = str(error).splitlines()[0].replace("Interpolation key", "the key") if str(error) else "cannot be merged"
    where = f"{key}: " if key else ""
    return UserError(f"{where}{text}", "correct the ${...} or the value; `trainer fit --cfg job` prints all keys")


def missing(keys: list[str]) -> UserError:
    """Return the error for keys that hold `???`."""
    problem = "has no value and needs one" if len(keys) == 1 else "have no values and need them"
    return UserError(f"{', '.join(keys)} {problem}", "set " + " ".join(f"{key}=VALUE" for key in keys))


def refuse_sweep(override: Any) -> None:
    """Raise UserError for `key=a,b`, which is only valid with `--multirun`."""
    if override.is_sweep_override():
        line = override.input_line
        key, _, value = line.partition("=")
        raise UserError(
            f"{line}: several values for one job",
            f"add -m to run one job for each, or write a list: {key}=[{value}], or a string: {key}=\\'{value}\\'",
        )


def require_options(override: Any, loader: Any) -> None:
    """Raise UserError if a group is set to anything but names of its options, which Hydra asks for as a path.

    A single mapping is no choice: it replaces the section.
    """
    if override.is_delete() or override.is_hydra_override():
        return
    group, value = override.key_or_group, override.value()
    chosen = value if isinstance(value, list) else [value]
    wrong = next((one for one in chosen if not isinstance(one, str)), None)
    if wrong is None:
        return
    fix = f"choose from: {listed(loader.get_group_options(group))}"
    if isinstance(wrong, dict) and group in ("callbacks", "logger"):
        fix = f"to add one that has no file: +{group}.NAME={{_target_: my_package.MyClass}}"
    elif isinstance(wrong, dict):
        fix = f"a mapping takes no brackets: {group}={{...}}"
    raise UserError(f"{override.input_line}: {group} takes the names of its config files", fix)


def require_unset(choices: Any, unset: list[Any], loader: Any) -> None:
    """Raise UserError for a `group=null` with an option chosen elsewhere, for which Hydra has a ValueError."""
    for override in unset:
        group = override.key_or_group
        if choices.get(group) is not None:
            fix = f"choose one of: {listed(loader.get_group_options(group))}"
            raise UserError(f"{override.input_line}: the job needs a {group}", fix)


def unreadable(error: Any) -> UserError:
    """Return the error for Hydra's `OverrideParseException`."""
    override = error.override
    if "=" not in override and not override.startswith("~"):
        return UserError(f"{override}: expected KEY=VALUE", "write overrides as key=value, options as --option")
    detail = error.message.splitlines()[0].removeprefix("LexerNoViableAltException: ")
    fix = f"quote the characters that are special in Hydra's grammar: '{override.partition('=')[0]}=\"...\"'"
    return UserError(f"{override}: cannot be read ({detail})", fix)


def _missing_config(error: Any, loader: Any, overrides: list[str]) -> UserError:
    path = error.missing_cfg_file or ""
    group, _, option = path.rpartition("/")
    if not group:
        options = [name for name in loader.get_group_options("") if not name.startswith("_")]
        fix = f"{did_you_mean(path, options)}configs: {listed(options)}"
        return UserError(f"--config-name {path}: no such config", fix)
    pattern = rf"\+?{re.escape(group)}(@[^=]*)?={re.escape(option)}"
    written = next((override for override in overrides if re.fullmatch(pattern, override)), None)
    where = written or f"{group}={option}{_file_that_chooses(group, option, loader)}"
    if not loader.repository.group_exists(group):
        groups = loader.list_groups("")
        fix = f"{did_you_mean(group, groups)}groups: {listed(groups)}"
        return UserError(f"{where}: unknown config group {group}", fix)
    part = group.removeprefix("hydra/")
    if group != part and part in INSTEAD:
        return UserError(f"{where}: {NOT_USED}", f"remove it; {INSTEAD[part]}")
    options = loader.get_group_options(group)
    if part in ("job_logging", "hydra_logging") and group != part:
        name = "pip install hydra-colorlog" if option == "colorlog" else "a Hydra plugin"
        fix = f"install its package ({name}), or remove it"
        return UserError(f"{where}: there is no {group} {option}", f"{fix}; choose one of: {listed(options)}")
    hint = did_you_mean(option, options, prefix=f"{group}=")
    return UserError(f"{where}: there is no {group} {option}", f"{hint}choose one of: {listed(options)}")


def _file_that_chooses(group: str, option: str, loader: Any) -> str:
    """Return `, in FILE` of the defaults list with this choice; Hydra's error names only the root of the list."""
    pattern = re.compile(rf"^\s*-.*\b{re.escape(group)}\s*:\s*{re.escape(option)}\s*(#.*)?$", re.MULTILINE)
    for source in loader.get_sources():
        if source.scheme() != "file":
            continue
        for file in sorted(Path(source.path).rglob("*.yaml")):
            if pattern.search(file.read_text(encoding="utf-8", errors="replace")):
                return f", in {file}"
    return ""


def _bad_yaml(error: Any) -> UserError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    where = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a config file"
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return UserError(f"{where}: not valid YAML: {problem}", "correct the file; indent with spaces, not tabs")


def _composition(error: Exception, loader: Any, overrides: list[str]) -> UserError:
    from omegaconf.errors import GrammarParseError

    if isinstance(error.__cause__, GrammarParseError):
        cause = str(error.__cause__).splitlines()[0]
        fix = "correct the expression in ${...}, or put a backslash before the dollar sign"
        return UserError(f"{_file_with(error.__cause__, loader)}: {cause}", fix)
    text = str(error) or str(error.__cause__)
    twice = re.search(r"Multiple values for ([^.]+)\.|(\S+) appears more than once in the final defaults", text)
    if twice:
        group = twice[1] or twice[2]
        plain = next((o[1:] for o in overrides if o.startswith(f"+{group}=")), f"{group}=OPTION")
        option = plain.partition("=")[2]
        several = f", or several at once: {group}=[default,{option}]" if group in NAMED else ""
        return UserError(f"{group}: chosen twice", f"the job already has this group: write {plain}{several}")
    part = re.search(rf"hydra\.({'|'.join(UNUSED_PARTS)})\b[\w.]*\b", text)
    if part:
        if part[0].startswith("hydra.sweeper.params."):
            return _needs_plus(part[0], overrides)
        instead = INSTEAD.get(part[1], "-m runs the jobs of a sweep, cluster= chooses where a job runs")
        if part[1] == "job_logging":
            instead = "choose one first: hydra/job_logging=default"
        return UserError(f"{part[0]}: {NOT_USED}", f"remove it; {instead}")
    unused = re.search(r"Could not (?:override|delete) '([^']+)'", text)
    if unused:
        key = unused[1].partition("=")[0]
        if loader.repository.group_exists(key.partition("@")[0]):
            fix = f"write +{key}=OPTION to add it to this job, or name it in the defaults of an experiment file"
            return UserError(f"{key}: the job's defaults do not have this group", fix)
        if key.startswith(("hydra.job.env_set.", "hydra.job_logging.")):
            return _needs_plus(key, overrides)
        return UserError(f"{key}: unknown key", "`trainer fit --cfg all` prints all keys")
    lines = [line.strip() for line in text.splitlines() if line.strip() and "use +" not in line]
    reason = error.__cause__
    if reason is not None and str(reason) and str(reason) not in text:
        lines.append(str(reason).splitlines()[0])
    message = " ".join(lines[:3]) or type(error).__name__
    return UserError(message, "correct the config file or the override that it names")


def _needs_plus(key: str, overrides: list[str]) -> UserError:
    """Return the error for a new entry in one of Hydra's own mappings."""
    written = next((one for one in overrides if one.startswith(f"{key}=")), f"{key}=VALUE")
    return UserError(f"{key}: this key does not exist yet", f"write '+{written}'")
