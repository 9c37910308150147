"""Print a report as PDF with the Chromium of this machine, which asks nobody for anything."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from trainer.core.errors import EnvironmentFault
from trainer.core.files import write_atomic

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
TIMEOUT_S = 120.0
_OPTIONS = (
    "--headless",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-pdf-header-footer",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


def find_browser() -> str:
    """Return the path of Chromium or Chrome.

    Raises:
        EnvironmentFault: There is none.
    """
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise EnvironmentFault(
            "--pdf prints the report with Chromium, which is not installed",
            "apt-get install chromium; or open the report in any browser and print it to a file",
        )
    return found


def print_pdf(page: str, pdf: Path, browser: str, timeout_s: float = TIMEOUT_S) -> None:
    """Print a page of ours to `pdf`.

    It is printed from a private folder: what is beside the report may be of somebody else, who could exchange the page,
    or put a link in the place of the PDF.

    Args:
        page: The HTML.
        pdf: The file that is written, or replaced.
        browser: The program.
        timeout_s: Time until it is ended.

    Raises:
        EnvironmentFault: The browser fails or takes too long.
        OSError: The file cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="trainer-pdf-") as folder:
        printed, source = Path(folder, "report.pdf"), Path(folder, "report.html")
        source.write_text(page, encoding="utf-8")
        # Chromium's sandbox refuses to run as root; the page has no script, and its policy forbids any.
        options = [*_OPTIONS, *(["--no-sandbox"] if os.geteuid() == 0 else []), f"--user-data-dir={folder}/profile"]
        log = Path(folder, "log")
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [browser, *options, f"--print-to-pdf={printed}", source.as_uri()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "HOME": folder},
            )
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            log.write_text(f"no end after {timeout_s:g} s")
        finally:
            _kill_group(process)
        if not printed.is_file() or printed.stat().st_size == 0:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise EnvironmentFault(
                f"{browser} printed nothing: {last[0][:300]}",
                f"open {pdf.with_suffix('.html')} in a browser and print it to a file",
            )
        write_atomic(pdf, printed.read_bytes())


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """End the processes that Chromium may have left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
