"""A notification: one message about a run, as text and as the bodies that services take."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.core.secrets import MASK, mask
from trainer.core.text import one_line

_LONGEST_REASON = 600
_DISCORD_LIMIT = 2000
"""Characters of `content`, https://discord.com/developers/docs/resources/webhook."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """What happened to a run. Every text is one line without control characters, with secrets masked."""

    event: str
    """A kind of `trainer.config.schema.NOTABLE`, or `test`."""
    title: str
    """The message in one line: `digits-k3v9abcd failed at step 120`."""
    run: str
    id: str
    state: str
    step: int | None
    reason: str
    next: str
    """What to do: a command that works from any directory of the machine."""
    path: str
    host: str
    wandb: str | None
    time: float

    def text(self) -> str:
        """Return the message as lines."""
        lines = [self.title, self.reason, f"next: {self.next}" if self.next else ""]
        lines += [f"W&B: {self.wandb}" if self.wandb else "", f"run: {self.host}:{self.path}" if self.path else ""]
        return "\n".join(line for line in lines if line)

    def json(self) -> dict[str, Any]:
        """Return the body of a generic webhook, and the input of a command."""
        return {**asdict(self), "text": self.text()}

    def slack(self) -> dict[str, Any]:
        """Return the body for Slack: its three control characters are escaped, so that no name mentions anybody."""
        text = self.text().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return {"text": text, "unfurl_links": False}

    def discord(self) -> dict[str, Any]:
        """Return the body for Discord, in which nothing mentions anybody."""
        text = self.text()
        short = text if len(text) <= _DISCORD_LIMIT else text[: _DISCORD_LIMIT - 1] + "…"
        return {"content": short, "allowed_mentions": {"parse": []}}


def clean(message: Message, secrets: tuple[str, ...] = ()) -> Message:
    """Return the message with one line in each text, and without the secrets of the environment and `secrets`."""
    values = {name: _clean(value, secrets) for name, value in asdict(message).items() if isinstance(value, str)}
    return replace(message, **values)  # type: ignore[arg-type]


def _clean(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    line = one_line(mask(text))
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"
