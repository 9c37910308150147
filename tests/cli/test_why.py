"""What `trainer why` says of runs on this machine; of those in a queue tests/slurm/test_knowing.py has more."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.runs.test_directory import make
from tests.runs.test_state import ended, launched
from trainer.cli import main
from trainer.errors import DONE

GONE = 2**30
"""A process id that Linux does not give."""


def test_a_running_one_names_the_rank_that_the_others_wait_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    launched(run, os.getpid())
    run.event("started", attempt=0, step=0)
    reason = "rank 1 on node7 (cpu) takes 0.12 s for its data and forward pass, the others 0.04 s"
    run.event("straggler", attempt=0, rank=1, host="node7", reason=reason)
    assert main(["why", str(run.path)]) == DONE
    assert capsys.readouterr().out == f"{run.path.name} is running: {reason}\n"


def test_one_that_died_has_its_reason_the_last_line_and_what_helps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    launched(run, GONE)
    reason = "[Errno 28] No space left on device"
    ended(run, 0, "failed", reason=reason, exit_code=1, step=7, time=1e9, rank=0, host="here", lines=["OSError: full"])
    assert main(["why", str(run.path), "--json"]) == DONE
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "failed"
    assert found["why"][0] == reason
    assert "checkpoint.keep_last" in found["why"][1]
    (attempt,) = found["attempts"]
    assert (attempt["step"], attempt["line"]) == (7, "OSError: full")
    assert main(["why", str(run.path)]) == DONE
    assert "  attempt 0, step 7, 2001-09-09" in capsys.readouterr().out
