"""A job whose node is still there goes on from the checkpoint on the node's own disk."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import TrainerCli
from trainer.checkpoint.faults import VARIABLE


def test_a_killed_job_goes_on_from_the_local_checkpoint(trainer_cli: TrainerCli, workdir: Path) -> None:
    local = workdir / "nvme"
    options = [
        *("experiment=quickstart", "tracking=none", "name=tiers", "resources.cpu_processes=1", "strategy=single"),
        *(
            "trainer.max_epochs=null",
            "trainer.max_steps=40",
            "checkpoint.every_n_steps=30",
            "checkpoint.save_best=false",
        ),
        *(f"checkpoint.local_dir={local}", "checkpoint.local_every_n_steps=8", "resilience.max_restarts=0"),
    ]
    # the third save is that of step 24: it dies with its folder not yet in place, after those of 8 and 16
    killed = trainer_cli("fit", *options, env={VARIABLE: "commit.renamed:3"})
    assert killed.returncode == 1, killed.stdout + killed.stderr
    (run,) = (workdir / "runs").glob("tiers-*")
    shown = json.loads(trainer_cli("show", "--json").stdout)["checkpoints"]
    assert [(one["step"], one["local"], one["committed"]) for one in shown] == [(16, True, True)]
    resumed = trainer_cli("resume", "tiers")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "started"] == [0, 16]
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert steps == ["step-00000030", "step-00000040"]
    assert not (local / run.name).exists()
