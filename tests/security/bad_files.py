"""Files of any kind and content, to put in place of those of a run or a sweep."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

DEEP = 200_000
TEXTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]\n[[1], 2]\n",
    "a number": b"7\n",
    "null": b"null\n",
    "not UTF-8": b"\xff\xfe\x00\x80\n" * 3,
    "null characters": b"\0" * 4096 + b"\n",
    "deep lists": b"[" * DEEP + b"]" * DEEP + b"\n",
    "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"\n",
    "deep flow and block": b"trainer: " + b"{a: " * DEEP + b"1" + b"}" * DEEP + b"\n",
    "valid, and deep inside": b'{"time": 1, "event": "created", "phase": "train", "a": '
    + b"[" * 900
    + b"]" * 900
    + b"}\n",
    "odd numbers": b'{"time": 1e999, "event": "failed", "outcome": "failed", "phase": "train", "step": -5, '
    b'"exit_code": -1, "max_steps": 0, "began": NaN, "spent": {"train": 1e999, "x": -1e308}, "eta_s": 1e999, '
    b'"rate": NaN, "metrics": {"train/loss": NaN, "train/mfu": 1e308}, "moved": -1e308, "pid": -1, "still_s": 1e999}\n',
    "integers of 400 digits": b'{"time": 1, "event": "started", "outcome": "failed", "phase": "train", "step": '
    + b"9" * 400
    + b', "metrics": {"a": '
    + b"9" * 400
    + b'}, "attempt": '
    + b"9" * 400
    + b', "a": '
    + b"8" * 400
    + b"}\n",
    "integers of 5000 digits": b'{"time": 1, "step": ' + b"9" * 5000 + b"}\n",
    "sections of other types": b"trainer: [1]\nstrategy: 3\ncluster: x\ncheckpoint: {local_dir: [1]}\n",
    "dates and sets": b"trainer: {max_steps: 2020-01-01}\nstrategy: {name: !!set {a}}\ncluster: {name: !!binary aa}\n",
    "a folder of nobody": b"trainer: {}\ncheckpoint: {local_dir: ~nobody-at-all/x}\n",
    "a folder with a null": b'{"outcome": "failed", "log": "logs/\\u0000", "checkpoint": {"local_dir": "a\\u0000b"}}\n',
    "surrogates": b'{"outcome": "failed", "reason": "\\ud800", "host": "\\udfff", "event": "stopped", "time": 1, '
    b'"phase": "train"}\n',
    "anchors": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b", ".join([b"*%c" % (97 + i)] * 9)) for i in range(9)),
    "an anchor in itself": b"&a [*a]\n",
    "a mapping in itself": b"trainer: &a {max_steps: 3, b: *a}\n",
    "many bad lines": b"{\n" * 30_000,
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has 108 characters at most
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 * 1024**3)


KINDS: dict[str, Callable[[Path], None]] = {
    "a FIFO": fifo,
    "a socket": a_socket,
    "64 GB without content": sparse,
    "a folder": Path.mkdir,
    "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("missing/file"),
    **{name: (lambda path, text=text: path.write_bytes(text)) for name, text in TEXTS.items()},  # type: ignore[misc]
}
