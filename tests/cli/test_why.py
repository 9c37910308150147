"""What `trainer why` says of runs on this machine; of those in a queue tests/slurm/test_knowing.py has more."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from pathlib import Path

import pytest

from tests.runs.test_directory import make
from tests.runs.test_state import ended, launched
from trainer.cli import main
from trainer.cli.advice import advice, stalled
from trainer.cli.resume import changed_config
from trainer.config.compose import compose
from trainer.core.errors import DONE, UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Started, Straggler
from trainer.runs.records import HeartbeatRecord, Phase
from trainer.runs.registry import find

GONE = 2**30
"""A process id that Linux does not give."""


def test_a_running_one_names_the_rank_that_the_others_wait_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make(tmp_path)
    launched(run, os.getpid())
    run.add_event(Started(attempt=0, step=0))
    reason = "rank 1 on node7 (cpu) takes 0.12 s for its data and forward pass, the others 0.04 s"
    run.add_event(Straggler(attempt=0, rank=1, host="node7", reason=reason))
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


COMMAND = re.compile(r"trainer (resume|fit) (\S[^\n;,]*)")
REASONS = {
    "out of memory": "rank 0 on here ran out of memory with a micro-batch of 8: parameters 3 GB",
    "full": "[Errno 28] No space left on device",
    "allocations": "3 attempts in a row left no newer checkpoint; the last one: x",
    "nan": "the loss is NaN at step 7",
    "spike": "loss spike at step 7: 3.1 after 0.2",
    "hang": "rank 1 on here (step 3, train) did not move for 181 s, 180 s are allowed: in all_reduce",
}


@pytest.mark.parametrize("name", REASONS)
def test_each_command_that_is_advised_is_one_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path))
    run = real_run(tmp_path)
    told = "\n".join(advice(run, REASONS[name], None))
    commands = COMMAND.findall(told)
    assert commands, told
    for verb, rest in commands:
        reference, *overrides = shlex.split(rest)
        assert (verb, find(reference, tmp_path).path) == ("resume", run.path)
        changed = changed_config(run, overrides)
        for override in overrides:
            key, _, value = override.partition("=")
            section, option = key.split(".")
            found = changed[section][option]
            assert found == type(found)(value)


def test_a_mistake_is_mended_before_it_is_fitted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = real_run(tmp_path)
    ended(run, 0, "failed", reason="KeyError: 'image'", exit_code=93, step=0, mend=True, where="mine.py:3", time=1e9)
    launched(run, GONE)
    assert main(["why", str(run.path)]) == DONE
    said = capsys.readouterr().out
    assert "resuming would fail the same way; fix the cause, then run: trainer fit model=mlp data=digits" in said
    assert "    in mine.py:3" in said
    assert "trainer resume" not in said


def test_ranks_that_stand_at_different_places_are_said_to(tmp_path: Path) -> None:
    run = real_run(tmp_path)
    places: list[tuple[int, Phase]] = [(6, "train"), (5, "validate")]
    for rank, (step, phase) in enumerate(places):
        run.write_heartbeat(rank, HeartbeatRecord(step=step, phase=phase))
    told = advice(run, REASONS["hang"], None)
    assert "rank 0 at step 6 (train), rank 1 at step 5 (validate)" in told[0]
    assert "trainer.limit_train_batches" in told[0]
    assert stalled(run) == told[0]  # as long as it lives, too: nothing has moved since 1970
    run.write_heartbeat(0, HeartbeatRecord(step=6, phase="train", moved=time.time()))
    assert stalled(run) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [("trainer.max_steps=banana", "expected an integer"), ("resilience.on_oom=maybe", "invalid choice")],
)
def test_a_resume_with_a_wrong_value_is_one_message(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        changed_config(real_run(tmp_path), [override])


def real_run(folder: Path) -> RunDirectory:
    """One with a whole configuration, which was never launched."""
    typed = ["model=mlp", "data=digits", "resources.gpus=0", f"runs_dir={folder}"]
    config = compose(typed, config_dirs=[]).config
    return RunDirectory.create(config, overrides=typed, choices={}, code_root=folder / "nowhere")
