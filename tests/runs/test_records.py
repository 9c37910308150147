"""What processes tell each other through files: written and read back, and what becomes of a file that is not right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from trainer.checkpoint import commit
from trainer.checkpoint.commit import Commit, StoredFile
from trainer.config.shape import LaunchShape
from trainer.core import records
from trainer.core.records import BadRecord, absent, from_json, read, read_or_skip, to_json
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runs.records import (
    AttemptOutcome,
    BestCheckpoint,
    CommandFailure,
    Failure,
    HangFound,
    HeartbeatRecord,
    Launch,
    LockHolder,
    NodeCheck,
    NodeHeartbeats,
    PlannedRun,
    Reduction,
    WandbRun,
)

OUTCOME = AttemptOutcome(
    attempt=3,
    outcome="failed",
    exit_code=93,
    reason="KeyError: 'image'",
    step=12,
    rank=1,
    host="node7",
    log="logs/attempt-03/rank-1.log",
    lines=["KeyError: 'image'"],
    where="mine.py:3",
    mend=True,
    restarted=False,
    time=1e9,
)
LAUNCH = Launch(
    cluster="slurm",
    shape=LaunchShape(2, 4, "cuda"),
    host="node7",
    boot_id="a boot",
    pid=12,
    pid_started=345,
    attempt=3,
    cwd="/home/me",
    slurm_job_id="4711",
)
BEAT = HeartbeatRecord(
    time=1e9,
    moved=1e9 - 1,
    step=12,
    progress=2,
    pid=12,
    host="node7",
    device="cuda:0",
    attempt=3,
    epoch=1,
    phase="train",
    metrics={"train/loss": 0.5},
    validation={"val/acc": 1},
    rate=3.5,
    rate_unit="samples/s",
    eta_s=10,
    best=BestCheckpoint(metric="val/acc", mode="max", value=0.875, step=10),
    began=1e9 - 60,
    first_step=10,
    spent={"import": 2.0, "train": 50.0},
    batches=16,
    own_s=0.1,
    batch_s=0.3,
)
FAILURE = Failure(reason="KeyError: 'image'", where=None, step=12, rank=1, time=1e9, is_final=True, mend=True)
CHECK = NodeCheck(
    node="node7",
    problems=[],
    code="abc",
    data={"/data": True},
    reduced=Reduction(joined=4, bytes_per_s=1e9, complaint=None),
)
COMMIT = Commit(
    step=12,
    metrics={"val/acc": 0.5, "bad": None},
    monitor="val/acc",
    monitor_value=0.5,
    monitor_mode="max",
    format=1,
    time=1e9,
    files={"state.pt": StoredFile(7, "abc")},
)
RECORDS: dict[str, Any] = {
    "launch": LAUNCH,
    "launch, empty": Launch(),
    "heartbeat": BEAT,
    "heartbeat, first": HeartbeatRecord(phase="start"),
    "failure": FAILURE,
    "plan": PlannedRun(engine="formula", device="NVIDIA A40", peak_bytes=2**30, step_s=0.5, steps=100, cost=1.5),
    "command failure": CommandFailure(message="no such file", fix="", code=2),
    "preflight": CHECK,
    "heartbeats of a node": NodeHeartbeats(ranks={"8": BEAT, "9": HeartbeatRecord(phase="start")}),
    "hang": HangFound(still_s=181.0, allowed_s=180.0),
    "W&B run": WandbRun(id="abcdefgh", project="trainer", rewinds=False),
    "lock": LockHolder(host="node7", pid=12, attempt=3),
    "COMMIT": COMMIT,
}
EVENTS: list[events.Event] = [
    events.Created(overrides=["a=b"]),
    events.WandbEnvironment(mode="offline", source="WANDB_MODE"),
    events.LoggerPositions(step=3, positions={"csv": {"metrics.csv": 12}}),
    events.LoggerFailed(logger="MLFlowLogger", reason="Connection refused"),
    events.Queued(slurm_job_id="4711"),
    events.Resumed(overrides=[]),
    events.Preflight(bad={"node7": "no GPU"}, bytes_per_s=None),
    events.Allocated(event="allocated", attempt=0, slurm_job_id="4711", nodes=["node7"], checkpoint=12, since=5),
    events.Allocated(event="restarted", attempt=1),
    events.Started(attempt=1, step=12, world_size=8, host="node7"),
    events.FirstStep(attempt=1, step=13, began=5.5, seconds={"node": 0.3, "import": 2.5, "first_step": 0.1}),
    events.Tracking(mode="online", source="key", id="abc", project="trainer", url="https://x"),
    events.LoggerVersions(versions={"csv": 1, "mlflow": "abc", "own": None}),
    events.LoggerPositions(step=5, positions={"csv/version_0": {"metrics.csv": 3}}),
    events.LoggerFailed(logger="mlflow", reason="Connection refused"),
    events.CheckpointSaved(attempt=1, step=20, bytes=1000),
    events.CheckpointUploaded(attempt=0, step=3),
    events.CheckpointSkipped(reason="damaged"),
    events.CheckpointFailed(reason="full"),
    events.StopRequested(reason="Ctrl-C"),
    events.Hang(attempt=1, rank=None, still_s=181.5, reason="no progress"),
    events.BadStepEvent(event="loss_spike", attempt=1, step=21, reason="x", action="skipped"),
    events.Straggler(attempt=1, rank=0, host="node7", reason="slow"),
    events.OutOfMemory(attempt=1, rank=0, host="node7", step=3, reason="x", batch_size=8, micro_batch=None),
    events.MicroBatchFound(attempt=0, rank=1, batch_size=64, micro_batch=8, too_large=None),
    events.NodeLost(node="node7", reason="down"),
    events.Requeued(slurm_job_id="4711"),
    events.Notified(about="failed", key="failed:0", channels=["slack"], failed={"slack": "HTTP 500"}),
    *(events.Ended(event=name, attempt=1, step=3, reason="x") for name in ("finished", "preempted", "hung")),
]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "job-abcdefgh")
    for folder in (run.attempts_dir, run.live_dir, run.attempt_logs(0)):
        folder.mkdir(parents=True)
    return run


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_written_is_what_is_read(tmp_path: Path, name: str) -> None:
    record, path = RECORDS[name], tmp_path / "record.json"
    path.write_text(records.dumps(record, indent=1))
    assert read(type(record), path) == record


def test_each_file_of_a_run_is_read_back_by_the_run(run: RunDirectory) -> None:
    assert (run.launch(), run.outcome(3), run.attempts(), run.heartbeat(1), run.heartbeats(), run.failures(0)) == (
        Launch(),
        None,
        [],
        None,
        {},
        [],
    )
    assert not run.launch().was_made
    run.write_launch(LAUNCH)
    assert run.launch() == LAUNCH
    assert run.launch().was_made
    assert run.write_outcome(OUTCOME)
    assert run.outcome(3) == OUTCOME
    assert run.attempts() == [OUTCOME]
    assert not run.write_outcome(replace(OUTCOME, reason="came later"), replace=False)
    assert run.outcome(3) == OUTCOME
    run.write_heartbeat(11, BEAT)
    run.write_heartbeat(2, BEAT)
    assert list(run.heartbeats().items()) == [(2, BEAT), (11, BEAT)]
    run.live.path(2).rename(run.live.past_path(3, 2))
    assert (run.heartbeat(2), run.past_heartbeats(2)) == (None, [BEAT])
    run.write_failure(0, FAILURE)
    assert run.failures(0) == [FAILURE]


def test_every_event_is_read_back_and_has_a_class(run: RunDirectory) -> None:
    for event in EVENTS:
        run.add_event(event)
    assert run.events() == EVENTS
    assert run.events_of(events.Hang) == [event for event in EVENTS if event.event == "hang"]
    assert {type(event) for event in EVENTS} == set(events.Event.__subclasses__())
    assert set(events.classes()) >= {event.event for event in EVENTS}


def test_the_keys_on_disk_are_those_of_earlier_releases() -> None:
    assert list(to_json(events.Started(time=5, attempt=1, step=2))) == [
        *("time", "event", "attempt", "step", "world_size", "host", "slurm_job_id")
    ]
    assert list(to_json(events.WandbEnvironment(base_url="https://x"))) == ["time", "event", "base_url"]
    assert to_json(Launch(shape=LaunchShape(1, 2, "cpu")))["shape"] == {
        "nodes": 1,
        "processes_per_node": 2,
        "device": "cpu",
    }
    assert "attempt" not in to_json(OUTCOME)  # the name of the file has it
    assert "own_s" not in to_json(HeartbeatRecord(phase="start"))


@pytest.mark.parametrize(
    ("outcome", "code"), [("finished", 0), ("stopped", 0), ("requeue", 75), ("failed", 1), ("hung", 124)]
)
def test_an_outcome_has_a_code_of_its_own(outcome: Any, code: int) -> None:
    assert AttemptOutcome(attempt=0, outcome=outcome).code == code
    assert AttemptOutcome(attempt=0, outcome=outcome, exit_code=0).code == 0


# Of each record what may be wrong with it, and what is said.
WRONG: dict[str, tuple[type[Any], dict[str, Any], str]] = {
    "not a text": (AttemptOutcome, {"outcome": "failed", "reason": 3}, "reason is 3, not a text"),
    "no such outcome": (
        AttemptOutcome,
        {"outcome": "exploded"},
        'outcome is "exploded", not one of finished, stopped, requeue, failed, hung',
    ),
    "a choice of another type": (AttemptOutcome, {"outcome": ["failed"]}, 'outcome is ["failed"], not one of'),
    "no outcome": (AttemptOutcome, {"step": 3}, "outcome is missing"),
    "not an integer": (AttemptOutcome, {"outcome": "failed", "step": "3"}, 'step is "3", not an integer'),
    "a number that is no integer": (AttemptOutcome, {"outcome": "failed", "step": 3.5}, "step is 3.5, not an integer"),
    "true is no integer": (AttemptOutcome, {"outcome": "failed", "step": True}, "step is true, not an integer"),
    "not true or false": (AttemptOutcome, {"outcome": "failed", "mend": 1}, "mend is 1, not true or false"),
    "null where it may not be": (AttemptOutcome, {"outcome": "failed", "mend": None}, "mend is null, not true or"),
    "not a list": (AttemptOutcome, {"outcome": "failed", "lines": "x"}, 'lines is "x", not a list'),
    "wrong in a list": (AttemptOutcome, {"outcome": "failed", "lines": ["x", 3]}, "lines[1] is 3, not a text"),
    "not an object inside": (Launch, {"shape": [1, 2]}, "shape is [1, 2], not an object"),
    "wrong inside": (Launch, {"shape": {"nodes": "1"}}, 'shape.nodes is "1", not an integer'),
    "missing inside": (Launch, {"shape": {"nodes": 1}}, "shape.processes_per_node is missing"),
    "not a process id": (Launch, {"pid": "12"}, 'pid is "12", not an integer'),
    "no phase": (HeartbeatRecord, {"step": 1}, "phase is missing"),
    "no such phase": (HeartbeatRecord, {"phase": "lunch"}, 'phase is "lunch", not one of start, build'),
    "wrong in a dict": (HeartbeatRecord, {"phase": "train", "metrics": {"a": "b"}}, 'metrics.a is "b", not a number'),
    "not a dict": (HeartbeatRecord, {"phase": "train", "spent": 3}, "spent is 3, not an object"),
    "no such direction": (
        HeartbeatRecord,
        {"phase": "train", "best": {"metric": "a", "mode": "up", "value": 1, "step": 1}},
        'best.mode is "up", not one of min, max',
    ),
    "half a failure": (Failure, {"reason": "x", "where": None, "step": 1}, "rank is missing"),
    "a rank that is a text": (Failure, {**to_json(FAILURE), "rank": "1"}, 'rank is "1", not an integer'),
    "no message": (CommandFailure, {"fix": "x", "code": 1}, "message is missing"),
    "problems that are a text": (NodeCheck, {**to_json(CHECK), "problems": "x"}, 'problems is "x", not a list'),
    "half a reduction": (NodeCheck, {**to_json(CHECK), "reduced": {"joined": 1}}, "reduced.bytes_per_s is missing"),
    "no files": (Commit, {**to_json(COMMIT), "files": None}, "files is null, not an object"),
    "a size that is a text": (
        Commit,
        {**to_json(COMMIT), "files": {"state.pt": {"bytes": "7", "sha256": "abc"}}},
        'files.state.pt.bytes is "7", not an integer',
    ),
    "not an object": (Launch, [], "it is [], not an object"),  # type: ignore[dict-item]
    "a version that is a text": (Launch, {"version": "2"}, 'version is "2", not an integer'),
    "a long value is cut": (AttemptOutcome, {"outcome": "x" * 200}, f'outcome is "{"x" * 59} ..., not one of'),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    cls, content, said = WRONG[name]
    path = tmp_path / "record.json"
    path.write_text(json.dumps(content))
    known = {"attempt": 0} if cls is AttemptOutcome else {}
    with pytest.raises(BadRecord) as raised:
        read(cls, path, **known)
    assert raised.value.message.startswith(f"{path} is damaged: {said}")
    assert "restore it from a backup" in raised.value.fix


@pytest.mark.parametrize("cls", [AttemptOutcome, Launch, HeartbeatRecord, Failure, CommandFailure, NodeCheck, Commit])
def test_a_newer_version_and_half_a_file_are_refused_by_name(tmp_path: Path, cls: type[Any]) -> None:
    path = tmp_path / "record.json"
    path.write_text('{"version": 2}')  # whatever else a later release writes
    with pytest.raises(BadRecord) as raised:
        read(cls, path)
    assert raised.value.message == f"{path} has version 2; this trainer reads up to 1"
    assert "newer one" in raised.value.fix
    for text in ('{"version": 1', "", "\x00\x01", '"text"', "3"):
        path.write_text(text)
        with pytest.raises(BadRecord, match="is damaged: "):
            read(cls, path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(BadRecord, match=r"is damaged: .*utf-8"):
        read(cls, path)
    path.unlink()
    assert read(cls, path) is None
    path.mkdir()
    with pytest.raises(BadRecord, match="is damaged: Is a directory"):
        read(cls, path)


def test_what_a_later_release_adds_within_a_version_is_left_out() -> None:
    content = {**to_json(LAUNCH), "version": 1, "colour": "blue", "shape": {**to_json(LAUNCH.shape), "depth": 3}}
    assert from_json(Launch, content, "x") == LAUNCH


def test_a_record_that_cannot_be_used_is_reported_once(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_outcome(OUTCOME)
    path = run.attempt_record(2)
    path.write_text('{"outcome": "exploded"}')
    for _ in range(3):
        assert run.attempts() == [OUTCOME]
    said = capsys.readouterr().err
    assert said.startswith(f'trainer: {path} is damaged: outcome is "exploded", not one of finished')
    assert said.endswith("; this record is left out\n")
    assert said.count("\n") == 1
    path.write_text('{"step": "x", "outcome": "failed"}')  # another field, and so another report
    assert run.outcome(2) is None
    assert f"{path} is damaged: step is" in capsys.readouterr().err
    assert run.next_attempt() == 4  # its number is taken all the same


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"time": 1, "event": "cut', "is damaged: Unterminated string"),
        ("[]", "is damaged: it is [], not an object"),
        ('{"time": 1}', "is damaged: event is missing"),
        ('{"time": 1, "event": "danced"}', "is damaged: event is 'danced', which is not the name of an event"),
        ('{"time": 1, "event": ["hang"]}', 'is damaged: event is ["hang"], not a text'),
        ('{"event": "created"}', "is damaged: time is missing"),
        ('{"time": "now", "event": "created"}', 'is damaged: time is "now", not a number'),
        ('{"time": 1, "event": "hang", "attempt": 0}', "is damaged: still_s is missing"),
        ('{"time": 1, "event": "hang", "attempt": 0, "still_s": "x"}', 'is damaged: still_s is "x", not a number'),
        ('{"time": 1, "event": "danced", "version": 2}', "has version 2; this trainer reads up to 1"),
    ],
)
def test_an_event_that_cannot_be_used_is_left_out_by_its_line(
    run: RunDirectory, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.add_event(EVENTS[0])
    with run.events_path.open("a") as file:
        file.write(line + "\n")
    run.add_event(EVENTS[1])
    assert run.events() == EVENTS[:2]
    told = capsys.readouterr().err
    assert told.startswith(f"trainer: {run.events_path}, line 2, {said}")
    assert told.count("\n") == 1


def test_an_event_that_is_just_being_written_is_not_reported(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    run.add_event(EVENTS[0])
    with run.events_path.open("a") as file:
        file.write('{"time": 1, "event": "fin')
    assert run.events() == EVENTS[:1]
    assert capsys.readouterr().err == ""
    run.events_path.write_text(json.dumps(to_json(EVENTS[0])))  # whole, but for its end of line
    assert run.events() == EVENTS[:1]


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"phase": "lunch"}', 'phase is "lunch", not one of'), ('{"phase": "train", "version": 2}', "has version 2")],
)
def test_a_heartbeat_that_cannot_be_used_is_reported_and_one_that_is_cut_is_not(
    run: RunDirectory, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write_heartbeat(0, BEAT)
    run.live.path(1).write_text(content)
    assert run.heartbeats() == {0: BEAT}
    told = capsys.readouterr().err
    assert told.startswith(f"trainer: {run.live.path(1)} ")
    assert said in told
    run.live.path(1).write_text(content[:-3])  # met while it is written, or cut by a crash
    assert run.heartbeat(1) is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content.update(step="12"), 'step is "12", not an integer'),
        (lambda content: content.pop("files"), "files is missing"),
        (lambda content: content.update(layout="pile"), 'layout is "pile", not one of file, sharded'),
    ],
)
def test_a_commit_of_wrong_types_is_a_problem_of_the_checkpoint(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], said: str
) -> None:
    content = to_json(COMMIT)
    change(content)
    (tmp_path / commit.COMMIT).write_text(json.dumps({**content, "digest": commit._digest(content)}))
    (problem,) = commit.verify(tmp_path)
    assert problem == f"COMMIT: {tmp_path / commit.COMMIT} is damaged: {said}"


def test_a_field_of_a_type_that_json_has_not_is_a_mistake_of_the_class() -> None:
    @dataclass(frozen=True)
    class Odd:
        path: Path

    with pytest.raises(TypeError, match="cannot have a field of type"):
        records._check_of(Path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        records.dumps(Odd(Path("x")))


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Each kind of field."""

    anything: Any = None
    choice: Literal["a", "b"] | None = absent()
    number_or_text: int | str | None = None
    nested: dict[str, list[StoredFile]] = field(default_factory=dict)


def test_every_kind_of_field() -> None:
    content = {
        "anything": {"a": [1]},
        "choice": "b",
        "number_or_text": "x",
        "nested": {"a": [{"bytes": 1, "sha256": ""}]},
    }
    record = from_json(Everything, content, "x")
    assert record.nested == {"a": [StoredFile(1, "")]}
    assert to_json(record) == content
    assert to_json(Everything()) == {"anything": None, "number_or_text": None, "nested": {}}
    with pytest.raises(BadRecord, match=re.escape("number_or_text is 1.5, not a text or an integer")):
        from_json(Everything, {"number_or_text": 1.5}, "x")
    assert read_or_skip(Everything, Path("/nowhere")) is None
