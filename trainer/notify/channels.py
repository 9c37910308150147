"""Send a message: to a webhook, by mail, to a command. Each is bounded in time, and its failure is one line.

Addresses and passwords are read from the environment variables that the section `notify` names, and are in no message.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import smtplib
import ssl
import subprocess
import threading
from collections.abc import Callable, Mapping
from email.message import EmailMessage
from email.utils import formatdate
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from trainer.config.notify import channel_names, secrets_of
from trainer.core.secrets import MASK, mask
from trainer.core.text import one_line
from trainer.notify.message import Message

_PORTS = {"starttls": 587, "tls": 465, "none": 25}
_WEBHOOKS: dict[str, Callable[[Message], dict[str, Any]]] = {
    "slack": Message.slack,
    "discord": Message.discord,
    "webhook": Message.json,
}
_LONGEST_FAILURE = 200
Send = Callable[[Message], None]


class _Failed(Exception):
    """A channel that did not take a message; the text says why."""


def channels(options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Send]:
    """Return the channels that are configured: name to a function that sends, or raises."""
    timeout_s = float(options["timeout_s"])
    every: dict[str, Send] = {
        **{name: _webhook(options, name, body, environ, timeout_s) for name, body in _WEBHOOKS.items()},
        "mail": lambda message: _mail(message, options, environ, timeout_s),
        "command": lambda message: _command(message, options["command"], environ, timeout_s),
    }
    return {name: every[name] for name in channel_names(options)}


def send(message: Message, options: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Send the message to every channel at once, and return why it failed where it did, after `timeout_s` at most."""
    failures: dict[str, str] = {}
    secrets = secrets_of(options, environ)

    def attempt(name: str, to_channel: Send) -> None:
        try:
            to_channel(message)
            failures.pop(name, None)
        except Exception as error:
            if not isinstance(getattr(error, "reason", error), TimeoutError):
                failures[name] = _why(error, secrets)

    threads = []
    for name, to_channel in channels(options, environ).items():
        # Until it has ended. A thread, because the name server may take any time, which no timeout of a socket bounds.
        failures[name] = f"no answer within {float(options['timeout_s']):g} s"
        threads.append(threading.Thread(target=attempt, args=(name, to_channel), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(float(options["timeout_s"]) + 0.5)
    return dict(failures)


def _why(error: Exception, secrets: tuple[str, ...]) -> str:
    text = str(error) if isinstance(error, _Failed) else f"{type(error).__name__}: {error}"
    for secret in secrets:
        text = text.replace(secret, MASK)
    return one_line(mask(text))[:_LONGEST_FAILURE]


class _NoRedirects(HTTPRedirectHandler):
    """A redirect of a POST would be a GET of another address, without the message."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _webhook(
    options: Mapping[str, Any],
    name: str,
    body: Callable[[Message], dict[str, Any]],
    environ: Mapping[str, str],
    timeout_s: float,
) -> Send:
    variable = str(options.get(f"{name}_env"))

    def post(message: Message) -> None:
        address = environ.get(variable, "").strip()
        if urlsplit(address).scheme not in ("http", "https"):
            raise _Failed(f"{variable} is not set to an address" if address else f"{variable} is not set")
        headers = {"Content-Type": "application/json", "User-Agent": "trainer"}
        token_variable = options.get("webhook_token_env")
        if name == "webhook" and token_variable:
            headers["Authorization"] = f"Bearer {environ.get(token_variable, '').strip()}"
        request = Request(address, json.dumps(body(message)).encode(), headers, method="POST")
        try:
            with build_opener(_NoRedirects).open(request, timeout=timeout_s) as answer:
                answer.read(1024)
        except HTTPError as error:
            text = error.read(200).decode(errors="replace").strip()
            raise _Failed(f"HTTP {error.code}" + (f": {text}" if text else "")) from None

    return post


def _mail(message: Message, options: Mapping[str, Any], environ: Mapping[str, str], timeout_s: float) -> None:
    mail = EmailMessage()
    mail["Subject"] = message.title
    mail["From"] = options["mail_from"] or options["mail_to"][0]
    mail["To"] = ", ".join(options["mail_to"])
    mail["Date"] = formatdate(message.time)
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.text())
    security = options["smtp_tls"]
    host, _, port = str(options["smtp_server"]).partition(":")
    number = int(port or _PORTS[security])
    context = ssl.create_default_context()
    server = (
        smtplib.SMTP_SSL(host, number, timeout=timeout_s, context=context)
        if security == "tls"
        else smtplib.SMTP(host, number, timeout=timeout_s)
    )
    with server:
        if security == "starttls":
            server.starttls(context=context)
        if options["smtp_user"]:
            variable = options["smtp_password_env"] or ""
            if not environ.get(variable):
                raise _Failed(f"{variable} is not set")
            server.login(options["smtp_user"], environ[variable])
        server.send_message(mail)


def _command(message: Message, command: list[str], environ: Mapping[str, str], timeout_s: float) -> None:
    """Run a command with the message as JSON on its standard input; its output is left out."""
    variables = {**environ, "PYTHONSAFEPATH": "1", "TRAINER_EVENT": message.event, "TRAINER_RUN_DIR": message.path}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=variables,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(json.dumps(message.json()).encode() + b"\n", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        raise _Failed(f"{shlex.quote(command[0])} took more than {timeout_s:g} s") from None
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().splitlines()[-1:]
        raise _Failed(
            f"{shlex.quote(command[0])} ended with exit code {process.returncode}"
            + "".join(f": {line}" for line in last)
        )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()
