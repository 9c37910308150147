"""One rank of `tests/config/test_strategy_limits.py`: builds and trains each configuration of a JSON list for one step.

`python pair_ranks.py CONFIGS.json VERDICTS.json`. A verdict is "" or the exception that ended the job. Any error must
come on all ranks, as that of a configuration does.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.callbacks import user_callbacks
from trainer.checkpoint.io import CheckpointWriter, RunCheckpointIO
from trainer.checkpoint.store import CheckpointStore
from trainer.config.typed import to_config
from trainer.runtime.process import Rank
from trainer.runtime.torch_setup import init_process_group
from trainer.train import build


def verdict(plain: dict[str, Any], place: Rank) -> str:
    """Why a rank would refuse the job; "" if it trains."""
    try:
        config = to_config(plain)
        folder = tempfile.mkdtemp()
        checkpoint_io = RunCheckpointIO(CheckpointWriter(CheckpointStore(Path(folder))))
        trainer = build.build_trainer(config, place, checkpoint_io, folder)
        data = build.build_data(config, place, trainer)
        module = build.build_module(config, data, lambda: 1, deferral=build.deferral_of(config, place))
        build.convert_to_float8(module, config, place)
        data.set_up(module)
        build.complete(trainer, user_callbacks.build(config.callbacks), [])
        trainer.fit(module, datamodule=data.module)
    except BaseException as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]} ({Path(frame.filename).name}:{frame.lineno})"
    return ""


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    place = Rank.from_environment()
    configs = json.loads(Path(sys.argv[1]).read_text())
    init_process_group(to_config(configs[0]), place, 60.0)
    verdicts = []
    for number, plain in enumerate(configs):
        print(f"{number}:", plain["strategy"]["name"], plain["trainer"]["precision"], plain["optimizer"], flush=True)
        verdicts.append(verdict(plain, place))
        dist.barrier()  # a job that leaves the ranks out of step is the last one printed
    if place.is_first:
        Path(sys.argv[2]).write_text(json.dumps(verdicts))
    os._exit(0)


if __name__ == "__main__":
    main()
