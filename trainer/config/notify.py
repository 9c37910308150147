"""The section `notify`: which events of a run are notified, through which channels.

A channel is a program that is run, or an address that gets mail with a password. A config file that is passed around
must choose neither, so these options are taken only from the command line, the group `notify` and the primary config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.config.limits import PositiveFloat, PositiveInt
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean

_VARIABLES = ("slack_env", "discord_env", "webhook_env", "webhook_token_env", "smtp_password_env")

NOTABLE = ("finished", "failed", "requeued", "pending", "hang", "straggler", "nan")
"""Kinds of notifications."""


@dataclass(eq=False, repr=False)
class NotifyOptions:
    """Notifications. Addresses and passwords are in environment variables, of which these options give the names.

    Only the command line, files of the group `notify` and the primary config of the project set the channels: a config
    file that is passed around must not choose who is told, or what is run.
    """

    events: list[str] = field(default_factory=lambda: list(NOTABLE))
    """What to send: finished; failed (also hung for good, or killed); requeued (see `after_requeues`); pending (see
    `pending_after_minutes`); hang; straggler; nan (a loss or gradient that is not finite, or a loss spike)."""
    after_requeues: PositiveInt = 3
    """Send a message at each multiple of this number of requeues since the run was submitted or resumed."""
    pending_after_minutes: PositiveFloat = 60.0
    """Minutes in the queue after which the run counts as stuck; `trainer fit --follow` and `trainer notify` see it."""
    timeout_s: PositiveFloat = 10.0
    """Seconds that a channel may take; the end of a run may wait for the last message as long, and 10 s more."""
    slack_env: str | None = None
    """Environment variable with the address of a Slack webhook; null: off."""
    discord_env: str | None = None
    """Environment variable with the address of a Discord webhook; null: off."""
    webhook_env: str | None = None
    """Environment variable with an address that takes the message as JSON by POST; null: off."""
    webhook_token_env: str | None = None
    """Environment variable with a token for `webhook_env`, sent as `Authorization: Bearer`; null: none."""
    mail_to: list[str] = field(default_factory=list)
    """Addresses that get mail; empty: off."""
    mail_from: str | None = None
    """Sender of the mail; null: the first of `mail_to`."""
    smtp_server: str = "localhost"
    """HOST or HOST:PORT of the mail server; the default port is that of `smtp_tls`: 587, 465 or 25."""
    smtp_tls: Literal["starttls", "tls", "none"] = "starttls"
    """Encryption of the connection to the mail server."""
    smtp_user: str | None = None
    """User at the mail server; null: no login."""
    smtp_password_env: str | None = None
    """Environment variable with the password of `smtp_user`."""
    command: list[str] | None = None
    """Program and arguments to run, with the message as JSON on its standard input; null: off."""

    def problems(self) -> Iterator[UserError]:
        """Yield what cannot work: unknown kinds, names that are no variables, addresses, logins without TLS."""
        for kind in self.events:
            if kind not in NOTABLE:
                fix = f"{did_you_mean(kind, NOTABLE)}use some of: {', '.join(NOTABLE)}"
                yield UserError(f"notify.events: unknown kind {kind}", fix)
        for key in _VARIABLES:
            name = getattr(self, key)
            if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                yield UserError(
                    f"notify.{key}: not the name of an environment variable",  # it may be the secret itself
                    f"put the value into a variable and its name here: notify.{key}=MY_VARIABLE",
                )
        for address in [*self.mail_to, *([self.mail_from] if self.mail_from else [])]:
            if not re.fullmatch(r"[^@\s<>,;]+@[^@\s<>,;]+", address):
                yield UserError(f"notify.mail_to: {address!r} is no address", "write notify.mail_to=[me@example.org]")
        if self.smtp_user and not self.smtp_password_env:
            yield UserError("notify.smtp_user without notify.smtp_password_env", "name the variable of the password")
        host = self.smtp_server.partition(":")[0]
        if self.smtp_user and self.smtp_tls == "none" and host not in ("localhost", "127.0.0.1"):
            yield UserError(
                f"notify.smtp_tls=none would send the password to {host} in clear", "use notify.smtp_tls=starttls"
            )
        if self.command is not None and not self.command:
            yield UserError("notify.command is empty", "use notify.command=[PROGRAM,ARGUMENT], or null")


def channel_names(options: Mapping[str, Any]) -> list[str]:
    """Return the channels that a section `notify` configures, in the order of their names."""
    keys = {
        "command": "command",
        "discord": "discord_env",
        "mail": "mail_to",
        "slack": "slack_env",
        "webhook": "webhook_env",
    }
    return [name for name, key in keys.items() if options.get(key)]


def secrets_of(options: Mapping[str, Any], environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values of the environment variables that the section names: no message or log holds one."""
    names = [value for key, value in options.items() if key.endswith("_env") and value]
    return tuple(environ[name].strip() for name in names if environ.get(name, "").strip())


def problems_of_notify(options: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[UserError]:
    """Yield the variables that the section names and that are not set, or hold no address."""
    for key in _VARIABLES:
        name = options.get(key)
        if not name or (key == "smtp_password_env" and not options.get("smtp_user")):
            continue
        value = environ.get(name, "").strip()
        if not value:
            yield UserError(
                f"notify.{key}={name}: this variable is not set", f"export {name}=..., or set notify.{key}=null"
            )
        elif key in ("slack_env", "discord_env", "webhook_env") and not re.match(r"https?://[^/\s]", value):
            yield UserError(
                f"notify.{key}={name}: this variable does not hold an address", f"export {name}=https://..."
            )
