"""A model that the data says too little for is a mistake in words, which no restart repeats."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import TrainerCli
from trainer.errors import JOB_FAILED


def test_what_the_data_does_not_say_is_named(trainer_cli: TrainerCli, workdir: Path) -> None:
    (workdir / "texts").mkdir()
    for number in range(3):
        (workdir / "texts" / f"{number}.txt").write_text(f"{number} is a number. " * 100)
    data = ["data=text", "data.root=texts", f"data.cache={workdir / 'cache'}"]
    one = ["resources.gpus=0", "resources.cpu_processes=1", "tracking=none"]
    done = trainer_cli("fit", "model=rnn_text", *data, *one)
    assert done.returncode == JOB_FAILED, done.stdout + done.stderr
    assert "model.num_classes: null, and this data does not say it" in done.stdout
    assert "choose a model for this kind of data, or set it" in done.stdout
    (run,) = (workdir / "runs").iterdir()
    assert [path.name for path in (run / "logs").glob("attempt-*")] == ["attempt-00"]
