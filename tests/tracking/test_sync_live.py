"""`trainer sync --live` uploads what a run logs offline while it logs it, through a kill, artifacts included."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.conftest import TrainerCli, clean_environment
from tests.test_resume import KILLER
from tests.tracking.test_one_curve import JOB, check_served, only_run
from tests.tracking.wandb_server import WandbServer

PACE = """
import time

from lightning.pytorch import Callback


class Pace(Callback):
    def on_train_batch_end(self, *arguments):
        time.sleep(0.8)
"""


def test_live(trainer_cli: TrainerCli, workdir: Path) -> None:
    (workdir / "killer.py").write_text(KILLER)
    (workdir / "pace.py").write_text(PACE)
    job = [*JOB, "tracking.artifacts=best", "+callbacks.pace._target_=pace.Pace", "--detach"]
    with WandbServer() as server:
        environment = {**clean_environment(), **server.environment(), "HOME": str(workdir)}
        launched = trainer_cli("fit", *job, env={**server.environment(), "WANDB_MODE": "offline"}, timeout=180)
        assert launched.returncode == 0, launched.stdout + launched.stderr
        run = only_run(workdir)
        before_the_end: list[int] = []

        def watch(process: subprocess.Popen[str]) -> None:
            while process.poll() is None and not before_the_end:
                rows = [len(one.history) for one in list(server.runs.values())]
                if any(rows) and "finished" not in (run / "events.jsonl").read_text():
                    before_the_end.extend(rows)
                time.sleep(0.05)

        command = [sys.executable, "-m", "trainer", "sync", "--live", "--json", run.name]
        with subprocess.Popen(
            command, cwd=workdir, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            watcher = threading.Thread(target=watch, args=(process,))
            watcher.start()
            said, problems = process.communicate(timeout=400)
            watcher.join()
        assert process.returncode == 0, problems
        assert before_the_end, "no row arrived while the run was active"
        check_served(server, run)
        (row,) = json.loads(said)
        (served,) = server.runs.values()
        assert row["failed"] == []
        assert row["rows"] in (None, len(served.history))
        best = [one for one in server.named("model") if "best" in one.aliases]
        assert best
        assert all(one.files for one in best)
        assert server.unknown == []
