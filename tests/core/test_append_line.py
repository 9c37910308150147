"""Lines that several processes append to one file, which a crash may have left without an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.core.files import append_line
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Ended, Started


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "a\n"), ("", "a\n"), ("x\n", "x\na\n"), ("x", "x\na\n"), ("\n", "\na\n"), ("x\ny", "x\ny\na\n")],
)
def test_a_line_begins_on_its_own(tmp_path: Path, before: str | None, after: str) -> None:
    path = tmp_path / "lines"
    if before is not None:
        path.write_text(before)
    append_line(path, "a")
    assert path.read_text() == after


def test_an_event_behind_one_that_was_cut_short_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path / "job-abcdefgh")
    run.path.mkdir()
    started, ended = Started(time=1.0, attempt=0), Ended(time=2.0, event="finished", attempt=0)
    run.add_event(started)
    with run.events_path.open("a") as file:
        file.write('{"time": 1.5, "eve')  # the disk was full
    run.add_event(ended)
    assert run.events() == [started, ended]
    assert f"{run.events_path}, line 2, is damaged: " in capsys.readouterr().err
