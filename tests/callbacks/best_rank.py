"""One of two ranks that log different values: which validations are saved as the best."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed

from trainer.callbacks.best import BestMetric
from trainer.checkpoint.store import CheckpointStore
from trainer.config.schema import CheckpointOptions
from trainer.core.errors import UserError


def main() -> None:
    rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    heartbeat: Any = SimpleNamespace(update=lambda **fields: None)
    group = torch.distributed.group.WORLD

    def made(monitor: str | None) -> BestMetric:
        options = CheckpointOptions(monitor=monitor)
        return BestMetric(options, ("val/acc", "max"), CheckpointStore(folder), heartbeat, group)

    def validated(best: BestMetric, step: int, value: float) -> Any:
        best._last_step, best._validated, best._last = step, ["val/acc"], {"val/acc": value}
        connector = SimpleNamespace(_callback_metrics={})
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(_results={}))
        module = SimpleNamespace(automatic_optimization=True)
        return SimpleNamespace(
            is_global_zero=rank == 0,
            global_step=step,
            _logger_connector=connector,
            fit_loop=loop,
            lightning_module=module,
        )

    best = made(None)
    saved = []
    # The first rank's get better, then worse; the other's the reverse.
    for step, values in enumerate([(0.5, 0.9), (0.6, 0.1), (0.4, 0.99)], start=1):
        trainer = validated(best, step, values[rank])
        if best.decide(trainer):
            best.saved(step)
            saved.append([step, best.measured_at(step)["monitor_value"]])
    refused = ""
    try:
        wrong = made("val/accuracy")
        wrong.decide(validated(wrong, 1, 0.5))
    except UserError as error:
        refused = error.message
    (folder / f"rank-{rank}.json").write_text(json.dumps([saved, refused]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
