"""The server: who is answered, what is answered, and what damaged runs do to it."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.dashboard.conftest import Dashboard, running
from tests.dashboard.fake_runs import make_run

SCRIPT = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def dashboard(folder: Path) -> Iterator[Dashboard]:
    """Six runs: four seeds, one that failed, one that is damaged."""
    folder.mkdir()
    for seed in range(4):
        make_run(folder, seed=seed, optimizer__lr=0.001 if seed < 2 else 0.01, ago_s=1000 - seed)
    make_run(folder, "failed", outcome="failed", reason=f"ValueError: {SCRIPT}\x1b[31m", ago_s=500)
    make_run(folder, "damaged", ago_s=400).launch_path.write_text("{")
    (folder / "no-run").mkdir()
    with running(str(folder), cache=folder.parent / "cache") as one:
        yield one


@pytest.fixture(scope="module")
def rows(dashboard: Dashboard) -> list[dict[str, Any]]:
    return list(dashboard.rows()["rows"])


def by_name(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in rows if row["name"] == name)


def test_it_prints_where_it_is_and_the_tunnel_to_it(dashboard: Dashboard) -> None:
    assert f"ssh -N -L {dashboard.port}:127.0.0.1:{dashboard.port} " in dashboard.printed
    assert socket.gethostname() in dashboard.printed
    assert "Ctrl-C" in dashboard.printed
    assert len(dashboard.token) >= 32


def test_it_listens_on_the_loopback_interface_only(dashboard: Dashboard) -> None:
    """blocked by: the loopback interface only"""
    wanted = f"{dashboard.port:04X}"
    lines = [
        line.split() for path in ("tcp", "tcp6") for line in Path(f"/proc/net/{path}").read_text().splitlines()[1:]
    ]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{wanted}")]
    assert listening == [f"0100007F:{wanted}"]


@pytest.mark.parametrize("path", ["/", "/api/rows", "/static/js/main.js", "/nowhere"])
def test_nobody_is_answered_without_the_cookie(dashboard: Dashboard, path: str) -> None:
    """blocked by: a cookie that only the token gives"""
    for cookie in (None, "", f"trainer_dashboard_{dashboard.port}=wrong", f"trainer_dashboard_{dashboard.port}="):
        status, headers, body = dashboard.request("GET", path, Cookie=cookie)
        assert status == 401
        assert b"token" in body
        assert dashboard.token.encode() not in body
        assert "Set-Cookie" not in headers


def test_the_token_is_exchanged_for_a_cookie_once(dashboard: Dashboard) -> None:
    status, headers, body = dashboard.request("GET", f"/?token={dashboard.token}", Cookie=None)
    assert status == 200
    assert dashboard.token.encode() not in body
    assert dashboard.token not in headers["Set-Cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(headers["Set-Cookie"].split("; "))
    assert b'content="0; url=/"' in body
    for token in ("", "x", dashboard.token[:-1], dashboard.token + "x", "é"):
        assert dashboard.request("GET", f"/?token={token.encode().hex() if token == 'é' else token}")[0] == 401
    assert dashboard.request("GET", f"/api/rows?token={dashboard.token}", Cookie=None)[0] == 401


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1:{port}", "", "0.0.0.0:{port}"],
)
def test_other_hosts_are_refused(dashboard: Dashboard, host: str) -> None:
    """DNS rebinding: a page of evil.example whose name now points to 127.0.0.1.

    blocked by: names of the loopback interface in `Host` only
    """
    assert dashboard.request("GET", "/api/rows", Host=host.format(port=dashboard.port))[0] in (400, 403)


def test_a_tunnel_may_have_another_port_here(dashboard: Dashboard) -> None:
    for host in ("localhost:9999", "127.0.0.1:9999", "[::1]:9999", "LOCALHOST"):
        assert dashboard.request("GET", "/api/rows", Host=host)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": None},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Content_Type": "text/plain"},
        {"Content_Type": "application/x-www-form-urlencoded"},
    ],
    ids=str,
)
def test_requests_of_other_pages_change_nothing(
    dashboard: Dashboard, rows: list[dict[str, Any]], headers: dict[str, str | None]
) -> None:
    """blocked by: Origin, Sec-Fetch-Site and the type of the body"""
    sent = {name: value and value.format(port=dashboard.port) for name, value in headers.items()}
    for path in (f"/api/runs/{rows[0]['key']}/stop", "/api/metrics"):
        assert dashboard.request("POST", path, {"runs": []}, **sent)[0] == 403


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(dashboard: Dashboard, method: str) -> None:
    """blocked by: GET, HEAD and POST only"""
    assert dashboard.request(method, "/api/rows")[0] == 405


def test_every_answer_has_a_strict_policy(dashboard: Dashboard) -> None:
    own = dashboard.cookie
    for path, cookie in (("/", own), ("/nowhere", own), ("/", ""), ("/static/base.css", own)):
        _, headers, _ = dashboard.request("GET", path, Cookie=cookie)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize(
    "path",
    [
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2f..%2fcli/dashboard.py",
        "/static//etc/passwd",
        "/static/js",
        "/api/runs/..",
        "/api/runs/%2e%2e%2f/log?name=launch",
        "/api/runs/{key}/log?name=../../config.yaml",
        "/api/runs/{key}/log?name=attempt-00/../../manifest",
        "/api/runs/{key}/log?name=attempt-00/rank-0.log",
        "/api/runs/{key}/log?name=/etc/passwd",
        "/api/runs/{key}/log",
        "/api/runs/0123456789ab",
    ],
)
def test_no_request_names_a_path(dashboard: Dashboard, rows: list[dict[str, Any]], path: str) -> None:
    """blocked by: runs are named by a key, logs by a pattern"""
    status, _, body = dashboard.request("GET", path.format(key=rows[-1]["key"]))
    assert status in (403, 404), body
    assert b"root:" not in body
    assert b"Traceback" not in body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        {"runs": "x"},
        {"runs": [], "metric": 1},
        {"runs": [1, None], "metric": {}},
        {"runs": [], "metric": "a", "axis": "__class__"},
        {"runs": [], "metric": "a", "start": "1"},
        {"runs": [], "metric": "a", "pixels": "many"},
        {"runs": [], "metric": "a", "band": "all"},
        b'{"runs": [], "metric": "a", "start": NaN}',
    ],
    ids=str,
)
def test_a_request_that_makes_no_sense_is_refused(dashboard: Dashboard, body: Any) -> None:
    """blocked by: types and ranges of a request are checked"""
    status, _, answer = dashboard.request("POST", "/api/curves", body)
    assert status == 400
    assert b"Traceback" not in answer


def test_states_are_true_and_a_damaged_run_is_named(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 6
    assert by_name(rows, "digits")["state"] == "finished"
    assert by_name(rows, "failed")["state"] == "failed"
    assert by_name(rows, "failed")["reason"].startswith(f"ValueError: {SCRIPT}")
    damaged = by_name(rows, "damaged")
    assert damaged["state"] == "unreadable"
    assert "launch.json is damaged" in damaged["reason"]


def test_rows_have_what_differs_from_a_common_configuration(dashboard: Dashboard, rows: list[dict[str, Any]]) -> None:
    common = dashboard.rows()["common"]
    digits = [row for row in rows if row["name"] == "digits"]
    settings = [{**common, **row["config"]} for row in digits]
    assert sorted(one["seed"] for one in settings) == [0, 1, 2, 3]
    assert sorted(one["optimizer.lr"] for one in settings) == [0.001, 0.001, 0.01, 0.01]
    assert all("trainer.max_steps" not in row["config"] for row in digits)


def test_only_what_changed_since_a_cursor_is_sent(dashboard: Dashboard, folder: Path) -> None:
    before = dashboard.rows()
    since = f"/api/rows?since={before['cursor']}&session={before['session']}"
    answer = dashboard.get(since)
    assert (answer["rows"], answer["removed"], answer["reset"], answer["common"]) == ([], [], False, None)
    assert dashboard.get("/api/rows?since=999999&session=another")["reset"]
    assert dashboard.get(f"/api/rows?since=x&session={before['session']}")["reset"]


def test_curves_of_runs_and_of_groups(dashboard: Dashboard, rows: list[dict[str, Any]]) -> None:
    keys = [row["key"] for row in rows if row["name"] == "digits"]
    answer = dashboard.curves(metric="train/loss", runs=[*keys, "unknown", rows[0]["key"] + "x"], pixels=1000)
    assert [curve["key"] for curve in answer["curves"]] == keys
    assert answer["whole"] == [10, 1000]
    assert all(curve["x"] == list(range(10, 1001, 10)) for curve in answer["curves"])
    values = [curve["y"] for curve in answer["curves"]]
    answer = dashboard.curves(metric="train/loss", runs=keys, groups=[keys[:2], keys[2:]], band="range")
    first, second = answer["curves"]
    assert first["runs"] == second["runs"] == 2
    assert first["y"] == pytest.approx([(a + b) / 2 for a, b in zip(*values[:2], strict=True)])
    assert second["high"] == pytest.approx([max(pair) for pair in zip(*values[2:], strict=True)])
    zoomed = dashboard.curves(metric="train/loss", runs=keys[:1], start=500, end=600, axis="step")
    assert zoomed["curves"][0]["x"] == list(range(490, 611, 10))
    samples = dashboard.curves(metric="train/loss", runs=keys[:1], axis="samples")
    assert samples["whole"] == [640, 64_000]
    assert dashboard.curves(metric="none", runs=keys)["edges"] is None


def test_a_run_page_has_what_is_recorded(dashboard: Dashboard, rows: list[dict[str, Any]]) -> None:
    details = dashboard.get(f"/api/runs/{by_name(rows, 'failed')['key']}")
    assert details["config"]["optimizer.lr"] == 0.001
    assert details["facts"]["ledger"]["seconds"]["train"] == 20
    assert [one["outcome"] for one in details["attempts"]] == ["failed"]
    assert [one["event"] for one in details["events"]] == ["created", "started", "checkpoint"]
    assert details["logs"] == ["attempt-00/rank-0"]
    assert dashboard.request("GET", f"/api/runs/{by_name(rows, 'damaged')['key']}")[0] == 422


def test_a_log_is_followed_by_whole_lines(dashboard: Dashboard, rows: list[dict[str, Any]]) -> None:
    row = by_name(rows, "digits")
    path = f"/api/runs/{row['key']}/log?name=attempt-00/rank-0"
    first = dashboard.get(path)
    assert first["text"].startswith("step 1/1000")
    log = Path(row["path"]) / "logs/attempt-00/rank-0.log"
    with log.open("a") as file:
        file.write("\x1b[2Ja new line\nand half of")
    new = dashboard.get(f"{path}&offset={first['end']}")
    assert new["text"] == "\\x1b[2Ja new line\n"
    assert new["end"] == first["end"] + len("\x1b[2Ja new line\n")
    log.write_text("cut\n")
    assert dashboard.get(f"{path}&offset={new['end']}")["text"] == "cut\n"
    log.unlink()
    log.symlink_to("/nowhere")
    assert dashboard.request("GET", path)[0] == 422


def test_the_buttons_do_what_the_commands_do(dashboard: Dashboard, rows: list[dict[str, Any]]) -> None:
    key = by_name(rows, "digits")["key"]
    status, _, body = dashboard.request("POST", f"/api/runs/{key}/stop", {})
    assert status == 200
    answer = json.loads(body)
    assert answer["code"] == 2
    assert "is not running: finished" in answer["output"]
    assert dashboard.request("POST", f"/api/runs/{key}/rm", {})[0] == 404
    assert dashboard.request("GET", f"/api/runs/{key}/stop")[0] in (404, 405)


def test_the_cache_is_private(dashboard: Dashboard, folder: Path) -> None:
    cache = folder.parent / "cache"
    for path in cache.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert not [path for path in cache.rglob("*") if path.suffix in (".pkl", ".npy", ".pickle")]


def test_read_only_has_no_buttons(folder: Path, rows: list[dict[str, Any]]) -> None:
    with running(str(folder), "--read-only", cache=folder.parent / "cache2") as one:
        answer = one.rows()
        assert answer["read_only"]
        assert one.request("POST", f"/api/runs/{answer['rows'][0]['key']}/stop", {})[0] == 403


def test_mistakes_at_the_prompt(workdir: Path, trainer_cli: Any) -> None:
    done = trainer_cli("dashboard", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere is not a folder" in done.stderr
    os.mkdir("runs")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = trainer_cli("dashboard", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 3
    assert "cannot be used: Address already in use" in done.stderr
    assert trainer_cli("dashboard", "--port", "99999").returncode == 2
