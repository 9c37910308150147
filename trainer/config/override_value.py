"""Read the value of an override of a frozen configuration, as `trainer fit` reads that of a new one."""

from __future__ import annotations

from typing import Any

from trainer.config.hydra_errors import unreadable


def value_of(override: str) -> Any:
    """Return the value in `key=value` by Hydra's grammar, in which `12:00:00` is a text and `1e-3` a number.

    YAML 1.1 reads them as 43200 and a text. Values separated by commas, a sweep for Hydra, are one text: there is
    nothing to sweep.

    Raises:
        UserError: It does not follow the grammar.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException, OverrideParseException

    try:
        parsed = OverridesParser.create().parse_override(override)
        return override.partition("=")[2] if parsed.is_sweep_override() else parsed.value()
    except OverrideParseException as error:
        raise unreadable(error) from None
    except HydraException as error:
        raise unreadable(OverrideParseException(override, str(error))) from None
