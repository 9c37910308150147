"""The node process around the real torchrun and a stand-in worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import clean_environment
from trainer.config.shape import LaunchShape
from trainer.core import claims, processes
from trainer.core.errors import EnvironmentFault
from trainer.core.gpu import Gpu
from trainer.core.gpus import Inventory
from trainer.launch.local import LocalLauncher, reap
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Launch
from trainer.supervise.torchrun import AGENT

HERE = Path(__file__).parent


def make_run(folder: Path, **resilience: Any) -> RunDirectory:
    run = RunDirectory(folder / "runs" / "stand-in-abcdefgh")
    for inside in (run.live_dir, run.logs_dir, run.attempts_dir, run.checkpoints_dir, run.stop_request.parent):
        inside.mkdir(parents=True)
    config = {
        "resources": {"cpu_processes": 2, "gpus": 0, "spare_nodes": 0},
        "cluster": {"name": "local"},
        "strategy": {"name": "ddp"},
        "trainer": {},
        "resilience": {"max_restarts": 0, "stop_deadline_s": 60.0, **resilience},
        "tracking": {"name": "none", "finish_timeout_s": 0},
    }
    run.config_path.write_text(yaml.safe_dump(config))
    return run


def environment(scenario: str) -> dict[str, str]:
    here = {"TRAINER_WORKER_MODULE": "stand_in_worker", "STAND_IN": scenario, "PYTHONPATH": str(HERE)}
    return {**clean_environment(), **here}


def start_node(
    run: RunDirectory, scenario: str, preload: str | None = None, **limits_s: float
) -> subprocess.Popen[bytes]:
    """`preload`: ranks are forked, with this module. `limits_s`: constants of the supervisor that would make a test
    wait."""
    changes = "".join(f"supervisor.{name} = {value}; " for name, value in limits_s.items())
    program = f"import sys; from trainer.supervise import node, supervisor; {changes}sys.exit(node.main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", program, str(run.path)]
    variables = environment(scenario) | ({"TRAINER_PRELOAD": preload} if preload else {})
    return subprocess.Popen(arguments, env=variables, start_new_session=True)


def wait_until(condition: Callable[[], Any], timeout_s: float = 300) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
    return value


def agents(node: subprocess.Popen[bytes]) -> list[int]:
    """The processes of agent.py below the node, the uppermost first: what it forks has its command line."""
    return [pid for pid in processes.descendants(node.pid) if str(AGENT) in processes.command_line(pid)]


def has_step(run: RunDirectory) -> bool:
    return run.live.path(0).exists()


def end_of(run: RunDirectory, attempt: int = 0) -> AttemptOutcome:
    outcome = run.outcome(attempt)
    assert outcome is not None
    return outcome


pytestmark = pytest.mark.usefixtures("no_orphans")


@pytest.mark.executed
def test_success_with_threads_shared_out_and_the_frozen_code_first(workdir: Path) -> None:
    run = make_run(workdir)
    assert start_node(run, "finish").wait(180) == 0
    said = run.rank_log(0, 1).read_text().splitlines()
    seen = json.loads(next(line for line in said if line.startswith("{")))
    assert seen["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert seen["WORLD_SIZE"] == "2"
    assert seen["cwd"] == str(workdir)
    assert seen["path"][:2] == [str(run.code_dir), str(workdir)]
    launch = run.launch()
    assert launch.shape == LaunchShape(nodes=1, processes_per_node=2, device="cpu")
    assert launch.boot_id == processes.boot_id()
    assert "node 0 ends with code 0" in run.node_log(0, 0).read_text()


def test_a_failure_names_the_rank_that_caused_it(workdir: Path) -> None:
    run = make_run(workdir)
    assert start_node(run, "raise_on_rank_1").wait(180) == 1
    end = end_of(run)
    assert end.outcome == "failed"
    assert end.reason == "ValueError: the loss is not a number"
    assert end.log == "logs/attempt-00/rank-1.log"
    assert end.lines[0] == "Traceback (most recent call last):"
    assert [event.event for event in run.events()] == ["failed"]


def test_a_rank_killed_by_a_signal_gives_128_and_its_number(workdir: Path) -> None:
    run = make_run(workdir)
    assert start_node(run, "die_of_a_signal", SURVIVOR_GRACE_S=1.0).wait(180) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in end_of(run).reason


def test_a_restart_is_another_attempt_and_the_cause_of_the_first_is_kept(workdir: Path) -> None:
    run = make_run(workdir, max_restarts=2)
    assert start_node(run, "fail_once").wait(180) == 0
    assert end_of(run, 0).reason == "ValueError: only the first time"
    assert end_of(run, 1).outcome == "finished"
    assert "torchrun restarts the workers" in run.node_log(0, 0).read_text()


def test_restarts_are_counted_afresh_after_a_checkpoint(workdir: Path) -> None:
    """One restart: attempts 0 to 2 write a checkpoint each, attempt 3 none, so attempt 3 is the last."""
    run = make_run(workdir, max_restarts=1)
    assert start_node(run, "checkpoint_then_fail", SURVIVOR_GRACE_S=1.0).wait(180) == 1
    assert run.logged_attempts() == [0, 1, 2, 3]
    assert end_of(run, 3).reason == "ValueError: attempt 3"
    assert [event.event for event in run.events()].count("failed") == 1


def test_a_killed_torchrun_is_said_to_be_just_that(workdir: Path) -> None:
    """No checkpoint was written, and the log claims none."""
    run = make_run(workdir, max_restarts=1)
    node = start_node(run, "train", preload="json")
    wait_until(lambda: has_step(run))
    os.kill(agents(node)[0], signal.SIGKILL)
    log = run.node_log(0, 0)
    said = wait_until(lambda: log.exists() and "again, 1 more try" in (text := log.read_text()) and text)
    assert "was killed by SIGKILL; starting torchrun again, 1 more try" in said
    assert "a checkpoint was written" not in said
    wait_until(lambda: run.rank_log(1, 0).exists())
    os.kill(node.pid, signal.SIGTERM)
    assert node.wait(180) == 75


def test_a_rank_that_hangs_after_a_final_failure_is_killed(workdir: Path) -> None:
    run = make_run(workdir, max_restarts=3)
    assert start_node(run, "never_restart", FAILED_GRACE_S=0.5).wait(180) == 93
    assert end_of(run).reason == "ImportError: no such module"


def test_workers_that_say_nothing_have_failed(workdir: Path) -> None:
    run = make_run(workdir)
    assert start_node(run, "no_outcome").wait(180) == 1
    assert end_of(run).outcome == "failed"


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.executed), signal.SIGUSR1])
def test_a_signal_to_the_node_alone_reaches_the_workers(workdir: Path, signum: int) -> None:
    """Sent before any worker has a handler: it must neither kill nor be lost."""
    run = make_run(workdir)
    node = start_node(run, "train", preload="json")
    torchrun = wait_until(lambda: agents(node))[0]
    os.kill(node.pid, signum)
    assert node.wait(180) == 75
    assert not processes.is_alive(torchrun)


def test_a_signal_to_every_process_at_once_kills_none(workdir: Path) -> None:
    run = make_run(workdir)
    node = start_node(run, "train")
    wait_until(lambda: has_step(run))
    for pid in [node.pid, *processes.descendants(node.pid)]:
        processes.send(pid, signal.SIGUSR1)
    assert node.wait(180) == 75


def test_a_rank_that_dies_before_it_has_a_log_has_said_why_in_the_nodes(workdir: Path) -> None:
    (workdir / "broken_worker.py").write_text("raise RuntimeError('the code of this run is broken')\n")
    run = make_run(workdir)
    variables = environment("none") | {"TRAINER_WORKER_MODULE": "broken_worker", "PYTHONPATH": str(workdir)}
    arguments = [sys.executable, "-m", "trainer.supervise.node", str(run.path)]
    assert subprocess.run(arguments, env=variables, check=False, timeout=180).returncode == 1
    assert end_of(run).reason == "RuntimeError: the code of this run is broken"


def test_what_does_not_stop_is_killed_within_its_deadline(workdir: Path) -> None:
    run = make_run(workdir, stop_deadline_s=0.5)
    node = start_node(run, "hear_nothing", ENDED_GRACE_S=0.5)
    wait_until(lambda: has_step(run))
    os.kill(node.pid, signal.SIGTERM)
    assert node.wait(180) == 124
    assert end_of(run).outcome == "hung"


@pytest.mark.parametrize("victim", ["node", "torchrun"])
def test_kill_9_leaves_no_process(workdir: Path, victim: str) -> None:
    run = make_run(workdir)
    node = start_node(run, "train", preload="json")
    wait_until(lambda: has_step(run))
    wait_until(lambda: len(agents(node)) == 4)  # the fork server, torchrun, two ranks
    everyone = [node.pid, *agents(node)]
    os.kill(everyone[0 if victim == "node" else 1], signal.SIGKILL)
    code = node.wait(180)
    wait_until(lambda: not any(processes.is_alive(pid) for pid in everyone))
    assert code == (-signal.SIGKILL if victim == "node" else 1)


def test_an_import_that_does_not_end_is_a_hang_with_its_stack_in_the_nodes_log(workdir: Path) -> None:
    """No rank is there yet: it is torchrun's process that imports for them."""
    (workdir / "endless_import.py").write_text("import time\n\nwhile True:\n    time.sleep(0.1)\n")
    run = make_run(workdir, hang_factor=20, hang_after_s=1, hang_slow_s=30)
    node = start_node(run, "train", preload="endless_import")
    assert node.wait(180) == 124
    end = end_of(run)
    assert end.outcome == "hung"
    assert "no rank has written a heartbeat" in end.reason
    assert "endless_import.py" in (run.path / end.log).read_text()


def test_the_launcher_records_the_process_and_resumes_with_the_next_attempt(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(workdir)
    for name, value in environment("finish").items():
        monkeypatch.setenv(name, value)
    for attempt in (0, 1):
        LocalLauncher(detached=True).launch(run)
        launch = run.launch()
        wait_until(lambda launch=launch: not processes.is_alive(launch.pid, launch.pid_started))
        reap()
        assert launch.attempt == attempt
        assert launch.cwd == str(workdir)
        assert end_of(run, attempt).outcome == "finished"


def test_gpus_are_chosen_for_the_run_and_locked_until_it_ends(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four imitated GPUs, of which somebody uses the first. The rank sees two others, a second launch what is left."""
    holders = ["python of anna (pid 7)", None, None, None]
    here = Inventory(tuple(Gpu(str(n), n, f"GPU-{n}", "H200", holder=holders[n]) for n in range(4)))
    monkeypatch.setattr(claims, "inventory", lambda *_: here)
    monkeypatch.setattr(claims, "_FOLDER", tmp_path)
    for name, value in environment("finish").items():
        monkeypatch.setenv(name, value)
    run = make_run(workdir)
    run.write_launch(Launch(shape=LaunchShape(nodes=1, processes_per_node=2, device="cuda")))
    LocalLauncher(detached=True).launch(run)
    (left,) = claims.claim(1, here=here, wait_s=0).gpus
    assert left.index == 3
    with pytest.raises(EnvironmentFault, match="2 GPUs requested, and 0 of 4 free") as raised:
        claims.claim(2, here=here, wait_s=0)
    assert "1: taken by another run" in raised.value.fix
    launch = run.launch()
    wait_until(lambda: not processes.is_alive(launch.pid, launch.pid_started))
    reap()
    said = "GPUs 1, 2 (H200); not 0: in use by python of anna (pid 7)"
    assert f"on {said}\n" in capsys.readouterr().out
    assert said in run.node_log(0, 0).read_text()
    line = next(line for line in run.rank_log(0, 1).read_text().splitlines() if line.startswith("{"))
    assert json.loads(line)["CUDA_VISIBLE_DEVICES"] == "1,2"
    assert [gpu.index for gpu in claims.claim(2, here=here, wait_s=0).gpus] == [1, 2]


def test_the_step_of_an_attempt_is_its_own_though_the_next_one_has_begun(workdir: Path) -> None:
    """Torchrun restarts the ranks at once; their first heartbeat replaces that of the attempt that died."""
    run = make_run(workdir)
    assert run.last_step(0) is None
    run.write_heartbeat(0, HeartbeatRecord(attempt=0, phase="train", step=150))
    assert run.last_step(0) == 150
    run.live.keep(1, rank=0)
    run.write_heartbeat(0, HeartbeatRecord(attempt=1, phase="start"))
    assert (run.last_step(0), run.last_step(1)) == (150, 0)
    assert run.last_step(2) == 0, "it died before its first heartbeat"
