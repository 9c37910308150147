"""Promise 1: a run that was killed ends with the same weights, the same samples and the same curve."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TrainerCli
from trainer.checkpoint.store import CheckpointStore

KILLER = '''
import os
import signal

from lightning.pytorch import Callback


class KillAt(Callback):
    """SIGKILL to these ranks after `step` steps of the first attempt."""

    def __init__(self, step, ranks):
        self.step, self.ranks = step, ranks

    def on_train_batch_end(self, trainer, *arguments):
        first = os.environ["TRAINER_ATTEMPT"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trainer.global_step >= self.step and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), signal.SIGKILL)
'''

JOB = [
    "experiment=quickstart",
    "callbacks=sample_log",
    "tracking=none",
    "trainer.max_steps=40",
    "trainer.log_every_n_steps=5",
    "checkpoint.every_n_steps=9",
    "checkpoint.keep_last=10",
    "model.dropout=0.1",
    "trainer.gradient_clip_norm=1.0",
]
VARIANTS = {
    "plain": [],
    "accumulation": ["data.batch_size=32", "data.micro_batch=4", "trainer.val_check_interval=6"],
    "workers": ["data.num_workers=1", "trainer.lean_loop=false", "checkpoint.asynchronous=false"],
}


def fit(cli: TrainerCli, cwd: Path, *overrides: str, ok: bool = True) -> Path:
    """Run the job in `cwd`; returns its directory."""
    cwd.mkdir(exist_ok=True)
    (cwd / "killer.py").write_text(KILLER)
    done = cli("fit", *JOB, *overrides, cwd=cwd, timeout=180)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    (run,) = (cwd / "runs").iterdir()
    return run


def kill_at(step: int, ranks: list[int]) -> list[str]:
    return [
        "+callbacks.killer._target_=killer.KillAt",
        f"+callbacks.killer.step={step}",
        f"+callbacks.killer.ranks={ranks}",
    ]


def final_state(run: Path) -> dict[str, Any]:
    state = torch.load(run / "checkpoints" / "step-00000040" / "state.pt", weights_only=True)
    return {"weights": state["state_dict"], "optimizer": state["optimizer_states"], "schedule": state["lr_schedulers"]}


def samples(run: Path) -> dict[tuple[int, int, int], list[int]]:
    """(rank, epoch, step) to the ids read, as the last attempt that read them did."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for path in sorted((run / "samples").iterdir()):
        rank = int(path.stem.rpartition("-")[2])
        here: dict[tuple[int, int, int], list[int]] = {}
        for line in path.read_text().splitlines():
            record = json.loads(line)
            here.setdefault((rank, record["epoch"], record["step"]), []).extend(record["ids"])
        found.update(here)
    return found


def curve(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time" and "_per_s" not in name} for line in lines]


def assert_equal_runs(run: Path, reference: Path) -> None:
    ours, theirs = final_state(run), final_state(reference)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert samples(run) == samples(reference)
    assert curve(run) == curve(reference)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Variant to the directory of the run that nothing happened to; made by the first test that asks."""
    return {}


def reference(references: dict[str, Path], variant: str, cli: TrainerCli, factory: pytest.TempPathFactory) -> Path:
    if variant not in references:
        references[variant] = fit(cli, factory.mktemp("reference"), *VARIANTS[variant])
    return references[variant]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [1])
def test_a_killed_rank_is_restarted_and_nothing_differs(
    variant: str,
    seed: int,
    trainer_cli: TrainerCli,
    workdir: Path,
    references: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    expected = reference(references, variant, trainer_cli, tmp_path_factory)
    choose = random.Random(f"{seed} {variant}")
    ranks = choose.choice([[0], [1], [0, 1]])
    run = fit(trainer_cli, workdir, *VARIANTS[variant], *kill_at(choose.randrange(10, 40), ranks))
    assert len(list((run / "logs").glob("attempt-*"))) == 2
    assert_equal_runs(run, expected)


@pytest.mark.parametrize("step", [3, 39])
def test_a_job_killed_as_a_whole_is_resumed_and_nothing_differs(
    step: int,
    trainer_cli: TrainerCli,
    workdir: Path,
    references: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    expected = reference(references, "plain", trainer_cli, tmp_path_factory)
    run = fit(trainer_cli, workdir, *kill_at(step, [0, 1]), "resilience.max_restarts=0", ok=False)
    resumed = trainer_cli("resume", cwd=workdir, timeout=180)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert_equal_runs(run, expected)


def test_the_damaged_newest_checkpoint_is_left_aside(
    trainer_cli: TrainerCli, workdir: Path, references: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = reference(references, "plain", trainer_cli, tmp_path_factory)
    run = fit(trainer_cli, workdir, *kill_at(30, [0, 1]), "resilience.max_restarts=0", ok=False)
    # The last one may have been on its way still when the ranks were killed.
    *_, before, newest = CheckpointStore(run / "checkpoints").committed()
    state = newest.path / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert trainer_cli("resume", cwd=workdir, timeout=180).returncode == 0
    assert_equal_runs(run, expected)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "started"][-1] == before.step
    assert any(
        newest.path.name in event.get("reason", "") for event in events if event["event"] == "checkpoint_skipped"
    )
