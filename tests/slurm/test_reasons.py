"""What is read from SLURM's answers, without SLURM: why a job waits, what ended an attempt, which nodes there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from trainer.runs.directory import RunDirectory
from trainer.slurm import ending, facts, lost_nodes, options, pending, query
from trainer.slurm.commands import SlurmRefused, _error_message, number
from trainer.slurm.facts import NodeKind, gpus_in
from trainer.slurm.resources import as_time

JOB = {
    "JobId": "17",
    "Partition": "gpu",
    "Priority": "100",
    "NumNodes": "2-2",
    "TRES": "cpu=8,node=2,gres/gpu=16",
    "QOS": "short",
    "Account": "physics",
    "Licenses": "matlab:2",
    "TimeLimit": "2-00:00:00",
    "Dependency": "afterok:11(failed)",
    "Features": "a100&ib",
    "StartTime": "N/A",
}
NODES = "waiting for 2 nodes with 16 GPUs in total of the partition gpu, whose nodes are: 2 allocated, 1 idle"
ANSWERS = {
    # Two jobs of more priority, two tasks of an earlier array, itself, a later one, two lines that are broken.
    "squeue": "20 500\n21 101\n16 100\n16 100\n17 100\n18 100\n19 N/A\nnone 700\n",
    "sinfo": "allocated\nidle\nallocated\n",
    "scontrol": "QOS=short(5) GrpTRES=cpu=64(64),gres/gpu=N(3) MaxJobsPU=4(1) MaxTRESPU=node=1(1) GrpJobs=N(0)",
}
Slurm = Callable[..., list[tuple[str, ...]]]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """Set what SLURM's commands print by their name, and return the list of their calls; an exception is raised."""

    def answer(answers: Mapping[str, str | Exception]) -> list[tuple[str, ...]]:
        calls: list[tuple[str, ...]] = []

        def run(*command: str, **_: object) -> str:
            calls.append(command)
            printed = answers[command[0]]
            if isinstance(printed, Exception):
                raise printed
            return printed

        for module, name in ((pending, "run"), (query, "run"), (facts, "run"), (lost_nodes, "call")):
            monkeypatch.setattr(module, name, run)
        return calls

    return answer


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        ("JobHeldUser", "held by its owner; `scontrol release 17` releases it"),
        ("JobHoldMaxRequeue", "held by SLURM because it was requeued too often; `scontrol release 17` releases it"),
        ("Licenses", "waiting for licenses (matlab:2)"),
        ("PartitionNodeLimit", "it requests more nodes (2-2) than the partition gpu allows or has up"),
        ("PartitionTimeLimit", "it requests more time (2-00:00:00) than the partition gpu allows"),
        ("DependencyNeverSatisfied", "a job that it depends on has failed (afterok:11(failed)): it will never start"),
        ("Dependency", "waiting for other jobs: afterok:11(failed)"),
        ("BadConstraints", "no node has the features that it requests (a100&ib)"),
        ("None", "SLURM has not considered it yet"),
        ("Priority", "4 jobs are ahead of it in the partition gpu (its priority is 100)"),
        ("Resources", NODES),
        ("ReqNodeNotAvail,_UnavailableNodes:node[1-2]", f"{NODES}; not available: node[1-2]"),
        ("Nodes_required_for_job_are_DOWN,_DRAINED", NODES),
        (
            "QOSMaxNodePerUserLimit",
            "a limit of the QOS short is reached (QOSMaxNodePerUserLimit): GrpTRES cpu is 64, used 64; MaxJobsPU is 4, "
            "used 1; MaxTRESPU node is 1, used 1; the job requests 2 nodes with 16 GPUs in total",
        ),
        ("Cleaning", "SLURM's reason is Cleaning"),
    ],
)
def test_each_reason_of_slurm_is_a_sentence(slurm: Slurm, reason: str, sentence: str) -> None:
    slurm(ANSWERS)
    assert pending._sentence(reason, pending._Fields(JOB)) == sentence


def test_the_tasks_of_an_array_are_jobs_ahead(slurm: Slurm) -> None:
    calls = slurm({"squeue": "20 500\n"})
    assert pending._sentence("Priority", pending._Fields(JOB)).startswith("1 job is ahead of it")
    assert "--array" in calls[0]  # else all tasks of an array are one line, without a number


def test_a_limit_whose_numbers_are_hidden(slurm: Slurm) -> None:
    calls = slurm({"scontrol": SlurmRefused("Access denied")})
    job = pending._Fields({**JOB, "NumNodes": "1", "TRES": "", "ReqTRES": "cpu=1,gres/gpu=1"})
    assert pending._sentence("AssocGrpGRES", job) == (
        "a limit of the account physics is reached (AssocGrpGRES): you are not allowed to see its numbers; "
        "the job requests 1 node with 1 GPU in total"
    )
    assert calls[0][-2:] == ("flags=assoc", "accounts=physics")


def test_what_slurm_does_not_print_is_a_question_mark(slurm: Slurm) -> None:
    slurm({"squeue": "", "sinfo": ""})
    assert pending._sentence("Licenses", pending._Fields()) == "waiting for licenses (?)"
    assert pending._sentence("Priority", pending._Fields()) == (
        "0 jobs are ahead of it in the partition ? (its priority is 0)"
    )


@pytest.mark.parametrize(
    ("after_s", "reason", "sentences"),
    [
        (7325, "Resources", ["in 2 h 2 min,"]),
        (605, "Priority", ["in 10 min,"]),
        (30, "Priority", ["in less than a minute,"]),
        (-5, "Priority", []),
        (11 * 365 * 86400, "Priority", []),  # SLURM's "in a year" of jobs that never start, and worse
        (600, "BeginTime", []),  # its sentence has the time
    ],
)
def test_when_slurm_expects_it_to_start(
    monkeypatch: pytest.MonkeyPatch, after_s: int, reason: str, sentences: list[str]
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    said = pending._expected_start(reason, {"StartTime": str(1_000_000 + after_s)})
    assert [one.partition(", ")[2].partition(" if")[0] for one in said] == sentences


def test_a_requeued_job_waits_for_slurms_delay(monkeypatch: pytest.MonkeyPatch, slurm: Slurm) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    slurm({"scontrol": "JobId=17 Reason=BeginTime StartTime=1115 Restarts=1 Partition=gpu\n"})
    assert pending.explain("17") == [
        "it cannot start for another 115 s (SLURM delays a requeued job, by 2 minutes by default)"
    ]
    slurm({"scontrol": SlurmRefused("Invalid job id specified")})
    assert pending.explain("17") == []


STEP = "slurmstepd: error: *** STEP 17.0 ON node1 CANCELLED AT 2026-11-30T10:00:00"
WHOLE = "slurmstepd-node1: error: *** JOB 17 ON node1 CANCELLED AT 2026-11-30T10:00:00"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([f"{WHOLE} DUE TO PREEMPTION ***"], "preempted by another job"),
        ([f"{STEP} DUE TO TIME LIMIT ***"], ending.TIME_LIMIT),
        ([f"{WHOLE} DUE TO JOB REQUEUE ***"], "requeued by scontrol"),
        ([f"{STEP} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***"], "a node failed"),
        ([f"{WHOLE} DUE TO SOMETHING NEW ***"], "something new"),
        ([f"{WHOLE} ***"], "cancelled by scancel"),
        ([f"{STEP} ***"], None),  # srun ended it, because it lost a node
        ([f"{STEP} ***", f"{WHOLE} DUE TO PREEMPTION ***"], "preempted by another job"),
        (["Killed"], None),
    ],
)
def test_what_ended_an_attempt_is_in_the_log_of_its_job(tmp_path: Path, lines: list[str], reason: str | None) -> None:
    run = RunDirectory(tmp_path / "job-abcdefgh")
    run.logs_dir.mkdir(parents=True)
    log = run.logs_dir / "slurm-17.log"
    before = [ending.beginning(2, ["node1"]), f"{WHOLE} DUE TO JOB REQUEUE ***"]
    log.write_text("\n".join([*before, ending.beginning(3, ["node1", "node2"]), *lines]))
    assert ending.by_slurm(run, "17", 3) == reason
    assert ending.by_slurm(run, "17", 4) is None
    assert ending.by_slurm(run, "18", 3) is None


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:a100:4(S:0-1)", {"a100": 4}),
        ("gpu:2", {"": 2}),
        ("gpu:a100:2(S:0,2),gpu:a100:2,gpu:v100:1,nvme:1", {"a100": 4, "v100": 1}),
        ("gpu:1g.5gb:7", {"1g.5gb": 7}),
        ("(null)", {}),
        ("gpu:a100:many,gpu", {}),
    ],
)
def test_the_gpus_of_a_node(gres: str, gpus: dict[str, int]) -> None:
    assert gpus_in(gres) == gpus


def test_the_kinds_of_nodes_of_each_partition() -> None:
    lines = ["gpu|n1|64|500000|gpu:a100:4", "gpu|n2|64|500000|gpu:a100:4", "gpu|n3|32+|1000|(null)", "cpu|n3|32|1000|"]
    assert facts._kinds("\n".join([*lines, "gpu|n4|x|1|", "a warning", ""])) == {
        "gpu": [NodeKind(64, 500000, {"a100": 4}, 2), NodeKind(32, 1000, {}, 1)],
        "cpu": [NodeKind(32, 1000, {}, 1)],
    }
    mixed = NodeKind(64, 1, {"a100": 4, "v100": 2}, 1)
    assert (mixed.num_gpus, mixed.gpus_of(None), mixed.gpus_of("v100"), mixed.gpus_of("h100")) == (6, 4, 2, 0)


def test_what_a_partition_allows(slurm: Slurm) -> None:
    described = (
        "PartitionName=gpu AllowAccounts=physics,bio AllowQos=ALL Default=YES MaxNodes=4 MaxTime=1-00:00:00 "
        "DefaultTime=NONE State=DRAIN\nsomething else\n"
    )
    slurm({"scontrol": described, "sinfo": "gpu|n1|64|500000|gpu:a100:4"})
    (gpu,) = facts._partitions().values()
    assert (gpu.is_default, gpu.is_up, gpu.max_nodes, gpu.num_nodes) == (True, False, 4, 1)
    assert (gpu.max_time_s, gpu.default_time_s, gpu.gpu_types) == (86400, None, ["a100"])
    assert (gpu.allowed_accounts, gpu.allowed_qos) == (("physics", "bio"), None)


def test_the_nodes_that_are_lost_with_slurms_reason(slurm: Slurm) -> None:
    shown = (
        "NodeName=n1 State=IDLE \nNodeName=n2 State=DOWN+DRAIN Reason=bad disk [root@2026-11-30]\n"
        "NodeName=n3 State=ALLOCATED* \n"
    )
    slurm({"scontrol": shown})
    lost = lost_nodes.find(["n1", "n2", "n3"])
    assert lost == {"n2": "down+drain, bad disk", "n3": "allocated*"}
    assert lost_nodes.sentence(lost) == "n2 was lost (down+drain, bad disk); n3 was lost (allocated*)"
    slurm({"scontrol": SlurmRefused("Invalid node name")})
    assert lost_nodes.find(["n9"]) == {}


def test_the_states_of_jobs_and_of_tasks_of_arrays(slurm: Slurm) -> None:
    calls = slurm({"squeue": "17|17|PENDING\n19|18_3|RUNNING\n"})
    assert query.states(["18_3", "17", "17"]) == {"17": "PENDING", "19": "RUNNING", "18_3": "RUNNING"}
    assert "--jobs=17,18_3" in calls[0]
    assert query.states([]) == {}
    slurm({"squeue": SlurmRefused("Invalid job id specified")})
    assert query.states(["1"]) == {}


@pytest.mark.parametrize(
    ("text", "time_s"),
    [
        ("90", 5400),
        ("5:30", 330),
        ("1:00:05", 3605),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("2-3:04", 2 * 86400 + 3 * 3600 + 240),
        ("2-03:04:05", 2 * 86400 + 3 * 3600 + 245),
        ("UNLIMITED", None),
        ("1:2:3:4", None),
    ],
)
def test_a_time_limit_of_slurm_in_seconds(text: str, time_s: int | None) -> None:
    assert options.seconds(text) == time_s
    if time_s is not None:
        assert options.seconds(as_time(time_s)) == time_s


def test_fields_and_messages_of_slurm() -> None:
    assert [number(text) for text in ("12", "", "N/A", "-1", "9" * 19)] == [12, None, None, None, None]
    text = "sbatch: error: Invalid account\nsbatch: error: Invalid account\nsbatch: fatal: no job\n\n"
    assert _error_message("sbatch", text) == "Invalid account; no job"
    assert _error_message("scancel", " \n") == "scancel failed without an error message"


def test_the_options_of_sbatch_that_are_ours_are_named() -> None:
    problems = options.check_extra({"extra": ["mem=4G", "array=1-3", "lisenses=x", "licenses=x"]}, {"licenses"})
    assert [str(one) for one in problems] == [
        "cluster.extra: --mem is set by cluster.memory_per_process\n  set cluster.memory_per_process instead",
        "cluster.extra: --array would break requeueing of the job\n  leave it out",
        "cluster.extra: this sbatch has no option --lisenses\n  did you mean licenses? sbatch --help lists them",
    ]
