"""Whatever ends an attempt, the run goes on and ends with the weights and the curve of one that nothing happened to.

One run meets each of these faults, each once it has got over the last: a test for each, in this order, and one for the
end. The run of test_local_disk.py meets a killed rank and a lost second node, those of test_online.py and
test_knowing.py `scontrol requeue`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest

from tests.slurm.conftest import Testbed, wait_until
from tests.slurm.jobs import (
    command_line,
    curve,
    kill,
    newest_checkpoint,
    on_slurm,
    paced,
    story,
    submit,
    wait_for_event,
    weights,
)
from trainer.runs.directory import RunDirectory
from trainer.runs.events import Allocated, Started

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
EVERY = 5
"""Steps between two checkpoints."""
BETWEEN = 10
"""Steps from one fault to the next, at the least."""


@dataclass
class Scene:
    """The run on the cluster that things are done to."""

    testbed: Testbed
    run: RunDirectory
    met: list[str] = field(default_factory=list)
    """Names of the faults that the run has met."""

    @property
    def job(self) -> str:
        return str(self.run.launch().slurm_job_id)

    @property
    def nodes(self) -> list[str]:
        """Of the allocation, first the one with the first rank."""
        return self.run.events_of(Allocated)[-1].nodes


def kill_torchrun(scene: Scene) -> None:
    kill(scene.testbed, scene.nodes[1], "-f", "supervise/agent[.]py")


def kill_slurmd(scene: Scene) -> None:
    """Nobody notices; the daemon that comes back finds the job running."""
    kill(scene.testbed, scene.nodes[1], "-f", "--", "slurmd -b|slurmd -N")
    scene.testbed("exec", scene.nodes[1], "slurmd", "-N", scene.nodes[1])


def preempt(scene: Scene) -> None:
    command = ["sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    scene.testbed.slurm(*command)


def stop_the_controller(scene: Scene) -> None:
    scene.testbed("controller", "stop")
    scene.testbed("controller", "start")


def lose_the_first_node(scene: Scene) -> None:
    """The one where the job script runs: nobody is left to say so."""
    scene.testbed("fail", scene.nodes[0])


def cut_the_network(scene: Scene) -> None:
    scene.testbed("cut", scene.nodes[1])


FAULTS: dict[str, tuple[Callable[[Scene], None], str | None]] = {
    "the network is cut": (cut_the_network, "{node} was lost (down"),
    "the first node is lost": (lose_the_first_node, "{first} was lost (down"),
    "kill -9 of torchrun": (kill_torchrun, "torchrun on {node} was killed by SIGKILL"),
    "kill -9 of slurmd": (kill_slurmd, None),
    "controller restarts": (stop_the_controller, None),
    "preemption": (preempt, "preempted by another job"),
}
"""Name to what is done, and to what the run says of it; null: it goes on as if nothing had been."""


STEPS = EVERY + BETWEEN * (len(FAULTS) + 4)
"""Some to spare: the run does not wait for what is done to it."""
JOB = [f"trainer.max_steps={STEPS}", f"checkpoint.every_n_steps={EVERY}", "trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def scene(running_testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    options = [*JOB, *on_slurm(ranks=2), *paced(0.2), "resources.spare_nodes=0"]
    run = submit(partial(command_line, running_testbed), tmp_path_factory.mktemp("faults"), *options)
    made = Scene(running_testbed, run)
    running_testbed.kept.add(made.job)
    yield made
    running_testbed.slurm("scancel", made.job)
    running_testbed.kept.discard(made.job)
    wait_until(lambda: not running_testbed.jobs())


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("testbed")
def test_the_run_gets_over_it(name: str, scene: Scene, report: list[str]) -> None:
    run, (break_it, reason) = scene.run, FAULTS[name]
    target = EVERY + BETWEEN * list(FAULTS).index(name)
    if scene.job not in scene.testbed.slurm("squeue", "--noheader", "--format=%i").split():
        pytest.fail(f"the run ended before this fault, after: {', '.join(scene.met) or 'none'}\n{story(run)}")
    wait_until(lambda: newest_checkpoint(run) >= target, 150, lambda: story(run))
    scene.met.append(name)
    lost, down_s = meet(scene, break_it, reason)
    report += [] if report else ["", f"{'fault':<24}{'steps made twice':>18}{'seconds without a step':>24}"]
    report.append(f"{name:<24}{lost:>18}{down_s:>24.1f}")


@pytest.mark.usefixtures("testbed")
def test_the_run_ends_as_if_it_had_met_nothing(scene: Scene, tmp_path_factory: pytest.TempPathFactory) -> None:
    wait_for_event(scene.run, "finished", 150)
    folder = tmp_path_factory.mktemp("untouched")
    untouched = submit(partial(command_line, scene.testbed), folder, *JOB, "resources.cpu_processes=2")
    assert weights(scene.run, STEPS, folder / "a") == weights(untouched, STEPS, folder / "b")
    assert curve(scene.run) == curve(untouched)


def meet(scene: Scene, break_it: Callable[[Scene], None], reason: str | None) -> tuple[int, float]:
    """Break something and wait until the run has got over it: the steps made twice, the seconds without a step."""
    run, began = scene.run, time.monotonic()
    begun_before = started(run)
    first, node = scene.nodes
    break_it(scene)
    if reason is None:
        step = newest_checkpoint(run)
        wait_until(lambda: newest_checkpoint(run) > step, 30, lambda: story(run))
        assert started(run) == begun_before
        return 0, 0.0
    wait_until(lambda: started(run) > begun_before, 150, lambda: story(run))
    down_s = time.monotonic() - began
    event = run.events_of(Started)[-1]
    last = [end for end in run.attempts() if end.attempt < event.attempt][-1]
    assert reason.format(first=first, node=node) in last.reason, story(run)
    # A node that is lost may have saved after its last heartbeat, from which the step of its end is known.
    return max(0, (last.step or 0) - event.step), down_s


def started(run: RunDirectory) -> int:
    return len(run.events_of(Started))
