"""Running the checks: bounded in time, never a traceback; the report; the use of a real file system."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doctor.faults import nvml
from tests.doctor.machine import disk, healthy
from tests.documentation import documented
from trainer.cli.doctor import of_machine
from trainer.doctor import probe as probes
from trainer.doctor import storage_use
from trainer.doctor.finding import Finding, error, ok, warning
from trainer.doctor.measuring import storage_facts
from trainer.doctor.probe import Probe, can_listen, fetch, is_clock_synchronized, run
from trainer.doctor.run import CHECKS, run_all, worst


def test_a_check_that_crashes_is_a_line(tmp_path: Path) -> None:
    def crashes(probe: Probe) -> Iterator[Finding]:
        yield ok("before")
        raise RuntimeError("broken\nwith more")

    (found,) = run_all(Probe(root=tmp_path), checks={"crashing": crashes})
    assert (found.check, found.status) == ("crashing", "error")
    assert found.text == "the check failed: RuntimeError: broken"


def test_a_check_that_hangs_is_a_line(tmp_path: Path) -> None:
    released = threading.Event()

    def hangs(probe: Probe) -> Iterator[Finding]:
        released.wait(60)
        yield ok("late")

    found = run_all(Probe(root=tmp_path), 0.05, {"hanging": hangs, "after": lambda probe: iter([ok("done")])})
    released.set()
    assert [(one.check, one.status) for one in found] == [("hanging", "error"), ("after", "ok")]
    assert "no answer within" in found[0].text


def test_a_command_has_a_limit_and_need_not_exist() -> None:
    assert run([sys.executable, "-c", "print(1)"]).out == "1\n"
    assert run(["no-such-program-here"]).code == 127
    assert run(["sleep", "60"], 0.05).code == 124


def test_what_is_asked_of_a_real_machine() -> None:
    assert is_clock_synchronized() in (True, False, None)
    assert can_listen("127.0.0.1") == ""
    assert can_listen("192.0.2.77") != ""
    assert probes.resolve("localhost")
    assert probes.resolve("no-such-host.invalid") == []
    assert fetch("http://127.0.0.1:9", 1.0) != ""


def test_the_use_of_a_real_file_system(tmp_path: Path) -> None:
    use = storage_facts(tmp_path / "not" / "yet", megabytes=1)
    assert use.problem == ""
    assert (use.torn, use.unlocked, use.has_links) == ("", [], True)
    assert use.write_bytes_s > 0
    assert use.read_bytes_s > 0
    assert use.renames_s > 0
    assert abs(use.skew_s) < 1
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "Not a directory" in storage_use_problem(tmp_path / "file")


def storage_use_problem(folder: Path) -> str:
    with pytest.raises(OSError) as caught:
        storage_use.use(folder, 1 << 20)
    return str(caught.value)


def test_a_torn_file_and_an_open_lock_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "record").write_text("0" * 100 + "1" * 100)
    assert "incomplete" in storage_use._watch(tmp_path)
    (tmp_path / "record").unlink()
    assert "missing" in storage_use._watch(tmp_path)
    monkeypatch.setitem(storage_use._LOCKS, "flock", lambda file: None)  # like a mount with nolock, in this process
    assert storage_use._unlocked(tmp_path / "lock") == ["flock"]


def test_the_report_fits_80_columns_and_hides_terminal_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    findings = [
        Finding(check="shared memory", status="warning", text="a \x1b[2J" + "word " * 40, fix="sudo " + "x " * 60),
        Finding(check="driver", status="ok", text="fine"),
    ]
    text = of_machine(findings)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "-> sudo" in text
    assert text.endswith("0 errors, 1 warning, 1 ok, 0 not checked")


def test_the_lines_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    broken = healthy(tmp_path, **nvml(errors=3), space=lambda path: disk(67 * 10**6, 67 * 10**6))
    findings = run_all(broken, checks={name: CHECKS[name] for name in ("GPU memory", "shared memory")})
    assert of_machine(findings).partition("\n\n")[0] == documented("doctor.md", "GPU memory     error").text.strip()


def test_the_worst_status_counts() -> None:
    assert worst([]) == "ok"
    assert worst([ok("a"), warning("b", "c"), ok("d")]) == "warning"
    assert worst([error("a", "b"), warning("b", "c")]) == "error"
