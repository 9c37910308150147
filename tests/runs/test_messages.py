"""What processes tell each other through pipes, arguments and variables, and what becomes of a wrong message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint import node_disk
from trainer.checkpoint.commit import StoredFile
from trainer.cli import child, sweep_slot
from trainer.cli.sweep_slot import HeldGpus
from trainer.core import processes, records
from trainer.core.errors import USER_MUST_CHANGE, Refusal, TrainerError
from trainer.core.records import BadRecord
from trainer.data import tokenize
from trainer.doctor import measuring
from trainer.doctor.devices import TimedJob
from trainer.doctor.facts import DeviceFacts, Facts, StorageFacts
from trainer.faultbench.messages import Comparison, Difference
from trainer.plan.job import Variant
from trainer.plan.messages import Simulated, SimulationAnswer, SimulationRequest
from trainer.plan.work import Counts, Work
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Exported, PredictedOutput, Predictions
from trainer.runtime.reduce_answer import ReduceSpeed, told
from trainer.supervise import fork_server, node
from trainer.supervise.agent import TorchrunJob
from trainer.supervise.ahead import NodeJob, StartImporting
from trainer.supervise.fork_server import RankEnded, RankNotStarted, RankStarted, StartRank
from trainer.sweeps import slots
from trainer.tracking import upload
from trainer.tracking.upload import Accepted
from trainer.train.model_facts import BuildRequest, ModelFacts

VARIANT = Variant({"name": "fsdp", "prefetch": 1}, 4, 2, 8, 4, "bf16-mixed", "cuda", is_configured=True)
REFUSAL = Refusal(message="no", fix="add data=...")
SIMULATED = Simulated(9, {"parameters": 4}, states={"parameters": 4}, work=Work(Counts(1e20, operators=3), tokens=2))
JOB = TorchrunJob(arguments=["python", "agent.py"], environment={"A": "1"}, time=1e9)
MESSAGES: list[Any] = [
    SimulationRequest(config={"model": {"_target_": "a.B", "depth": None}}, with_data=True, variants=[VARIANT]),
    SimulationAnswer(simulated=SIMULATED, micro_batch=4, samples_per_epoch=100),
    SimulationAnswer(error=REFUSAL),
    BuildRequest(config={"seed": 1}, with_data=False),
    ModelFacts(parameters=3, trainable=2, at={"num_classes": 10}),
    ModelFacts(error=REFUSAL),
    StartImporting(environment={"A": "1"}),
    NodeJob(run="runs/a", environment={"A": "1"}),
    HeldGpus(locks=[7], before={"CUDA_VISIBLE_DEVICES": None, "A": "1"}),
    Accepted(rows=3, served=2, url="https://example.org/x"),
    ReduceSpeed(joined=True, bytes_per_s=4e9, kind="fp32", flops_s=1e11),
    TimedJob(step_s=0.1, fastest_s=0.09, samples_s=None, is_busy=False),
    Comparison(ours="a", theirs="b", step=12),
    Difference(difference=None),
    Facts(cpu=DeviceFacts(name="CPU", index=-1, matrix_flops={"fp32": 1e9}), no_peer=[[0, 1]]),
    StorageFacts(unlocked=["flock"], skew_s=-0.5),
    Predictions(
        run="a-1",
        step=3,
        split="test",
        outputs={"logits": PredictedOutput(file="logits.npy", rows=2, dtype="<f4", shape=[2, 10])},
    ),
    Exported(format="onnx", files={"model.onnx": 12}, metadata={"step": "3"}, largest_difference=1e-6),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_written_and_refused_by_name_if_it_is_wrong(message: Any) -> None:
    kind, content = type(message), records.to_json(message)
    assert records.loads(kind, records.dumps(message), "x") == message
    assert records.loads(kind, json.dumps({**content, "version": 1, "colour": "blue"}), "x") == message
    with pytest.raises(BadRecord, match=r"^x has version 2; this trainer reads up to 1"):
        records.loads(kind, json.dumps({**content, "version": 2}), "x")
    for name in content:
        with pytest.raises(BadRecord, match=f"^x cannot be used: {name}") as raised:
            records.loads(kind, json.dumps({**content, name: [{"no": "such"}]}), "x")
        assert raised.value.place.startswith(name)
    for text in ("", "{", "3", "[]", b"\xff\xfe"):
        with pytest.raises(BadRecord, match=r"^x cannot be used: "):
            records.loads(kind, text, "x")


def test_a_list_of_messages_and_plain_values_are_read_by_their_types() -> None:
    both = [ModelFacts(parameters=1), ModelFacts(error=REFUSAL)]
    assert records.loads(list[ModelFacts], records.dumps(both), "x") == both
    assert records.loads(dict[str, Any], '{"root": "data", "limits": [1, null]}', "x") == {
        "root": "data",
        "limits": [1, None],
    }
    for kind, text, said in (
        (list[int], "[1, true]", r"\[1\] is true, not an integer"),
        (list[int], '{"a": 1}', r'it is {"a": 1}, not a list'),
        (list[Comparison], '[{"ours": "a", "theirs": "b"}]', r"\[0\].step is missing"),
        (dict[str, Any], "[]", r"it is \[\], not an object"),
    ):
        with pytest.raises(BadRecord, match=f"^x cannot be used: {said}"):
            records.loads(kind, text, "x")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("", "the answer of --deep cannot be used: "),
        ("[{}", "the answer of --deep cannot be used: "),
        ('[{"parameters": "3"}]', r'the answer of --deep cannot be used: \[0\].parameters is "3", not an integer'),
        ("[]", "--deep gave 0 answers to 1 questions"),
        ("[{}, {}]", "--deep gave 2 answers to 1 questions"),
    ],
)
def test_an_answer_that_is_none_is_no_traceback(monkeypatch: pytest.MonkeyPatch, answer: str, said: str) -> None:
    seen = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append(records.loads(list[BuildRequest], options["input"], "x"))
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    monkeypatch.setattr(child.subprocess, "run", run)
    request = [BuildRequest(config={}, with_data=True)]
    with pytest.raises(TrainerError, match=f"^{said}") as raised:
        child.ask("trainer.train.deep", request, ModelFacts, count=1, timeout_s=1.0, what="--deep", shorten="")
    assert raised.value.fix == "see its output above"
    assert seen == [request]


def test_what_torchrun_is_sent_can_be_read_without_the_package() -> None:
    assert TorchrunJob.of(records.dumps(JOB).encode()) == JOB
    content = records.to_json(JOB)
    for wrong in ({**content, "time": "now"}, {**content, "arguments": {}}, {"arguments": []}, {**content, "x": 1}, []):
        with pytest.raises(ValueError, match=r"^the message with the job cannot be used: "):
            TorchrunJob.of(json.dumps(wrong).encode())
    with pytest.raises(ValueError, match=r"^the message with the job cannot be used: "):
        TorchrunJob.of(b"{")


def test_the_fork_server_and_torchrun_understand_each_other() -> None:
    """What a rank's end and start are told in any order."""
    torchruns, servers = Pipe()
    with torchruns, servers:
        ranks = fork_server._Ranks(torchruns)
        for message in (RankStarted(7), RankEnded(7, -9), RankStarted(8), RankNotStarted(11, "no process left")):
            servers.send(message)
        assert ranks.start(["python"], {"RANK": "0"}) == 7
        assert servers.recv() == StartRank(["python"], {"RANK": "0"})
        assert ranks.start(["python"], {}) == 8
        assert (ranks.code(7, 0.0), ranks.code(8, 1.0) if servers.send(RankEnded(8, 3)) else None) == (-9, None)
        with pytest.raises(OSError, match="no process left") as raised:
            ranks.start(["python"], {})
        assert raised.value.errno == 11
        assert ranks.code(8, 5.0) == 3


@pytest.mark.parametrize("then", ["{", '"python"', "[1]"])
def test_a_node_process_with_a_wrong_next_command_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], then: str
) -> None:
    monkeypatch.setenv(node.THEN_VARIABLE, then)
    monkeypatch.setattr(node, "main", lambda: pytest.fail("it has begun"))
    assert node.main_then() == USER_MUST_CHANGE
    assert capsys.readouterr().err.startswith("error: the variable TRAINER_NODE_THEN cannot be used: ")


def test_the_command_after_a_node_process_gets_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[Any] = []
    monkeypatch.setenv(node.THEN_VARIABLE, records.dumps(["/bin/python", "-m", "slot"]))
    monkeypatch.setattr(node, "main", lambda: os.environ.update(OF_THE_RUN="1") or 0)
    monkeypatch.setattr(os, "execve", lambda *arguments: replaced.append(arguments))
    assert node.main_then() == 0
    ((program, arguments, environment),) = replaced
    assert (program, arguments) == ("/bin/python", ["/bin/python", "-m", "slot"])
    assert not {node.THEN_VARIABLE, "OF_THE_RUN"} & set(environment)
    monkeypatch.delenv("OF_THE_RUN")


def test_a_slot_gives_back_the_gpus_that_it_is_told_to_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    held = HeldGpus(locks=[reading, writing], before={"CUDA_VISIBLE_DEVICES": None, "SHOWN": "before"})
    monkeypatch.setenv(sweep_slot._CLAIM_VARIABLE, records.dumps(held))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SHOWN", "now")
    sweep_slot._release_gpus()
    assert (os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["SHOWN"]) == (None, "before")
    assert sweep_slot._CLAIM_VARIABLE not in os.environ
    for descriptor in held.locks:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    monkeypatch.setenv(sweep_slot._CLAIM_VARIABLE, '{"locks": "all"}')
    with pytest.raises(
        BadRecord, match=r'^the variable TRAINER_SWEEP_CLAIM cannot be used: locks is "all", not a list'
    ):
        sweep_slot._release_gpus()


def test_the_cores_of_slots_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(slots.CORES_VARIABLE, "[0, 3]")
    assert slots._cores() == [0, 3]
    monkeypatch.setenv(slots.CORES_VARIABLE, '["0-3"]')
    with pytest.raises(BadRecord, match=r"^the variable TRAINER_SWEEP_CORES cannot be used: \[0\] is "):
        slots._cores()


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("", None),
        ("NCCL version 2.27\n", None),
        ('{"joined": true}\nNCCL version 2.27\n{"joined": tr', ReduceSpeed(joined=True)),
        ('{"joined": true}\n{"joined": true, "bytes_per_s": 4e9}\n', ReduceSpeed(joined=True, bytes_per_s=4e9)),
    ],
)
def test_how_far_a_rank_came_is_read_among_other_output(output: str, found: ReduceSpeed | None) -> None:
    assert told(output) == found


def test_what_ranks_and_workers_leave_in_files_is_read_by_its_types(tmp_path: Path) -> None:
    files = {"model/0.bin": StoredFile(3, "abc")}
    node_disk.list_files(tmp_path, 0, files)
    assert node_disk.listed_files(tmp_path, [0]) == files
    (tmp_path / f"{node_disk._LISTED}1").write_text('{"model/0.bin": {"bytes": 3}}')
    with pytest.raises(BadRecord, match=r"cannot be used: model/0.bin.sha256 is missing"):
        node_disk.listed_files(tmp_path, [1])
    (tmp_path / "shard-00007.json").write_text('{"tokens": 3}')
    with pytest.raises(BadRecord, match=r"shard-00007.json is damaged: tokens is 3, not an object"):
        tokenize._make_shard(7, [], tmp_path, tokenize.Settings(), None)
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(BadRecord, match=r"job.json is damaged: digest is missing"):
        tokenize._refuse_other_job(tmp_path, [], tokenize.Settings())


@pytest.mark.executed
@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("", "the answer of trainer.doctor.measure cannot be used: "),
        ("torch is fine", "the answer of trainer.doctor.measure cannot be used: "),
        ('{"threads": "4"}', 'the answer of trainer.doctor.measure cannot be used: threads is "4", not an integer'),
        ('a warning\n{"threads": 4}\n', Facts(threads=4)),
    ],
)
def test_a_measurement_that_is_none_is_a_problem_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, printed: str, said: str | Facts
) -> None:
    command = [sys.executable, "-S", "-c", f"print({printed!r}, end='')"]
    monkeypatch.setattr(processes, "python_module", lambda *_: command)
    found = measuring._ask(Facts, "trainer.doctor.measure", [], 60.0)
    assert found == said if isinstance(said, Facts) else str(found).startswith(said)


@pytest.mark.parametrize(
    ("printed", "found"),
    [
        ('wandb: note\n{"rows": 3, "served": 3, "url": "u"}\n', Accepted(rows=3, served=3, url="u")),
        ('{"rows": 3, "served": null, "url": "u"}\n', None),
        ("", None),
    ],
)
def test_a_server_that_did_not_tell_what_it_has_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed: str, found: Accepted | None
) -> None:
    answer: Callable[..., Any] = lambda command, **_: subprocess.CompletedProcess(command, 1, stdout=printed)  # noqa: E731
    monkeypatch.setattr(upload.subprocess, "run", answer)
    assert upload.accepted(RunDirectory(tmp_path / "a-abcdefgh")) == found


def test_the_record_of_a_command_that_was_not_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match=r"export.json was not written"):
        records.read_existing(Exported, tmp_path / "export.json")
