#!/usr/bin/env python3
"""The dashboard over 1,000 runs, and a curve of ten million points, in headless Chromium (Debian's package).

    .venv/bin/python benchmarks/dashboard.py             about three minutes, and 2 GB in the temporary directory
    .venv/bin/python benchmarks/dashboard.py --keep      also writes benchmarks/results/dashboard.md

Times are from the navigation, or from the key, to the frame in which it is on the screen: the median of seven; CPU time
is that of the server in one of them. The conversion of metrics.jsonl into columns happens once and is measured apart.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from kept import keep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.dashboard.chromium import Page, chromium
from tests.dashboard.conftest import Dashboard, running
from tests.dashboard.fake_runs import make_run
from trainer.runs.index import Index

TIMES = 7
ROWS = "document.querySelectorAll('table.runs tbody tr[data-key] .state').length > 0"
DRAWN = (
    "document.querySelectorAll('.panel').length > 0 && [...document.querySelectorAll('.panel')]"
    ".every((one) => one.dataset.points > 0 && one.getAttribute('aria-busy') === 'false')"
)
WATCH = f"""
(() => {{
  const seen = {{}};
  window.seen = seen;
  const look = () => {{
    if (!seen.rows && {ROWS}) seen.rows = performance.now();
    if (!seen.drawn && {DRAWN}) seen.drawn = performance.now();
    if (!seen.drawn) requestAnimationFrame(look);
  }};
  requestAnimationFrame(look);
}})();
"""
KEY = """
new Promise((resolve) => {{
  const panel = document.querySelector('.panel');
  const before = panel.dataset.points;
  const begun = performance.now();
  panel.querySelector('.canvas').dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}}));
  const look = () => panel.dataset.points !== before && panel.getAttribute('aria-busy') === 'false'
    ? resolve(performance.now() - begun) : requestAnimationFrame(look);
  requestAnimationFrame(look);
}})
"""
FILTER = """
new Promise((resolve) => {
  const field = document.querySelector('#filter');
  const begun = performance.now();
  field.value = 'lr>0.005 run';
  field.dispatchEvent(new Event('input'));
  requestAnimationFrame(() => requestAnimationFrame(() => resolve(performance.now() - begun)));
})
"""


def write_points(path: Path, count: int) -> None:
    """Write a metrics.jsonl with a loss at each of `count` steps."""
    with path.open("w") as file:
        for start in range(1, count + 1, 100_000):
            lines = (
                f'{{"step": {step}, "epoch": {step // 100_000}, "time": {1.7e9 + step / 20:.3f}, '
                f'"train/loss": {2 / (1 + step / 1e6) + 0.1 * (step * 2654435761 % 1000) / 1000:.6f}}}\n'
                for step in range(start, min(start + 100_000, count + 1))
            )
            file.write("".join(lines))


def cpu_ms(server: Dashboard) -> float:
    """CPU time of the server and of the conversions that have ended."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") * 1000


def seal(runs: Path) -> None:
    """Seal the runs that ended, as their jobs do at their end."""
    hour_ago = time.time() - 3600
    for path in [*runs.rglob("*"), *runs.iterdir()]:
        if path.name != "config.yaml":  # its time is that of the launch
            os.utime(path, (hour_ago, hour_ago))
    index = Index(runs, use_cache=False)
    for _ in range(100):
        index.refresh()
        if all((path / "summary.json").exists() for path in runs.iterdir()):
            return
    raise AssertionError("the runs were not sealed")


def opened(page: Page, server: Dashboard, address: str) -> tuple[float, float, float]:
    """Milliseconds until rows, until all curves are on the screen, and of the server's CPU: two medians and a mean."""
    found, before = [], cpu_ms(server)
    for _ in range(TIMES):
        page.open("about:blank")
        page.open(address)
        page.wait("window.seen.drawn", 120)
        found.append(page.js("[window.seen.rows, window.seen.drawn]"))
    medians = (statistics.median(one[place] for one in found) for place in (0, 1))
    return (*medians, (cpu_ms(server) - before) / TIMES)  # type: ignore[return-value]


def zoomed(page: Page, server: Dashboard) -> str:
    """Times of all steps into the curve and out of it."""
    before = cpu_ms(server)
    took = [page.js(KEY.format(key=key)) for key in "++++++------++++++0"]
    cpu = (cpu_ms(server) - before) / len(took)
    return f"{statistics.median(took):.0f} ms, {max(took):.0f} ms; {cpu:.0f} ms"


def memory_mb(server: Dashboard, name: str) -> float:
    """VmRSS or VmHWM of the server."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+)", status)[0]) / 1000


def measure(folder: Path, num_runs: int, num_points: int) -> list[tuple[str, str]]:
    """What was measured, in the order of the table."""
    runs = folder / "runs"
    runs.mkdir()
    for number in range(num_runs - 1):
        make_run(runs, f"run{number % 7}", seed=number, optimizer__lr=0.001 * (1 + number % 9), ago_s=9000.0 - number)
    seal(runs)
    big = make_run(runs, "big", ago_s=10)
    write_points(big.metrics_path, num_points)
    rows: list[tuple[str, str]] = [("size of its metrics.jsonl", f"{big.metrics_path.stat().st_size / 1e6:,.0f} MB")]
    with running(str(runs), cache=folder / "cache") as server, chromium() as page:
        begun = time.monotonic()
        first = server.get("/api/rows")
        while not first["rows"]:
            first = server.get("/api/rows")
        named = time.monotonic() - begun
        entries = server.rows()["rows"]
        read = f"{named:.2f} s, {time.monotonic() - begun:.2f} s; {cpu_ms(server) / 1000:.1f} s"
        rows.append(("first start: all runs named, all rows read; CPU", read))
        (key,) = [one["key"] for one in entries if one["name"] == "big"]
        begun, before = time.monotonic(), cpu_ms(server)
        while True:
            (curve,) = server.curves(metric="train/loss", runs=[key], pixels=700)["curves"] or [{"progress": 0}]
            if curve["progress"] == 1 and curve["count"] == num_points:
                break
            time.sleep(0.2)
        converted = f"{time.monotonic() - begun:.1f} s; {(cpu_ms(server) - before) / 1000:.1f} s"
        rows.append(("conversion, once; CPU", converted))
        home = f"http://127.0.0.1:{server.port}/"
        page.open(server.url)
        page.wait(ROWS)
        page.command("Page.addScriptToEvaluateOnNewDocument", source=WATCH)
        table, curves, cpu = opened(page, server, f"{home}#/runs?sel={key}&m=train/loss")
        rows.append(("page: rows, curve of all points; CPU", f"{table:.0f} ms, {curves:.0f} ms; {cpu:.0f} ms"))
        rows.append(("zoom: median, largest; CPU", zoomed(page, server)))
        _, curves, cpu = opened(page, server, f"{home}#/runs?sel={key}&m=train/loss&sm=0.99")
        rows.append(("page: the curve smoothed over all points; CPU", f"{curves:.0f} ms; {cpu:.0f} ms"))
        rows.append(("zoom, smoothed: median, largest; CPU", zoomed(page, server)))
        chosen = "&".join(f"sel={one['key']}" for one in entries[1:51])
        _, curves, cpu = opened(page, server, f"{home}#/runs?{chosen}")
        rows.append(("page: 50 runs in two panels; CPU", f"{curves:.0f} ms; {cpu:.0f} ms"))
        took = statistics.median(page.js(FILTER) for _ in range(TIMES))
        rows.append((f"filter over {num_runs:,} runs, to the second frame", f"{took:.0f} ms"))
        resident, peak = memory_mb(server, "VmRSS"), memory_mb(server, "VmHWM")
        rows.append(("memory of the server: now, peak", f"{resident:.0f} MB, {peak:.0f} MB"))
        hosts = {urlsplit(url).netloc for url in page.requests if not url.startswith(("data:", "about:"))}
        rows.append(("requests to other hosts", str(len(hosts - {f"127.0.0.1:{server.port}"}))))
        assert page.messages == [], page.messages
    return rows


def main() -> None:
    """Print the table, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="write results/dashboard.md")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--points", type=int, default=10_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trainer-dashboard-") as folder:
        rows = measure(Path(folder), options.runs, options.points)
    rows.append(("load average of the machine", f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"))
    lines = [f"| {options.runs:,} runs, one of {options.points:,} points | |", "|---|---|"]
    text = "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)])
    print(text)
    if options.keep:
        keep("dashboard", "Dashboard: time and memory", text)


if __name__ == "__main__":
    main()
