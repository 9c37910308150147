"""`trainer dashboard [ROOT ...]`: show runs, curves and logs in a browser."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

from trainer.cli.options import make_parser
from trainer.core.errors import DONE, UserError
from trainer.core.text import one_line
from trainer.runs.registry import runs_dir_from

_DESCRIPTION = (
    "Show the runs of one or more folders in a browser: a table, curves, configurations, timelines, logs. Reads the "
    "run directories as they are; uploads nothing, and loads nothing from other servers. The server listens on the "
    "loopback interface only, and refuses requests without the token in the URL that is printed."
)


def main(argv: list[str]) -> int:
    """Run `trainer dashboard` until Ctrl-C and return the exit code."""
    parser = make_parser("dashboard", _DESCRIPTION, "trainer dashboard", "trainer dashboard runs /shared/team/runs")
    parser.add_argument(
        "roots",
        nargs="*",
        metavar="ROOT",
        help="folder of runs, or a run directory (default: $TRAINER_RUNS_DIR, else ./runs)",
    )
    parser.add_argument("--port", type=int, metavar="N", help="port to listen on (default: 8787, or any that is free)")
    parser.add_argument("--read-only", action="store_true", help="show no buttons that stop and resume runs")
    options = parser.parse_args(argv)
    if options.port is not None and not 0 <= options.port < 65536:
        raise UserError(
            f"--port {options.port} is not a port", "use a number from 1024 to 65535, or 0 for any free port"
        )
    roots = [Path(root).expanduser() for root in options.roots] or [runs_dir_from(None)]
    missing = [root for root in roots if not root.is_dir()]
    if missing:
        raise UserError(
            f"{one_line(str(missing[0]))} is not a folder",
            "name a folder of runs: trainer dashboard ROOT; trainer fit makes ./runs",
        )
    from trainer.dashboard.serve import serve  # aiohttp and NumPy

    shown = ", ".join(one_line(str(root)) for root in roots)

    def report(url: str, port: int) -> None:
        tunnel = f"ssh -N -L {port}:127.0.0.1:{port} {_user()}@{socket.gethostname()}"
        print(
            f"dashboard of {shown}\n  open       {url}\n  from your own computer, first: {tunnel}\n  Ctrl-C ends it",
            flush=True,
        )

    serve(roots, options.port, report, read_only=options.read_only)
    return DONE


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container without an entry in /etc/passwd
        return "USER"
