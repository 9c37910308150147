"""A model that the data says too little for is refused: at the prompt, or once where only a rank can know it."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import TrainerCli
from trainer.core.errors import JOB_FAILED, USER_MUST_CHANGE

ONE = ["resources.gpus=0", "resources.cpu_processes=1", "tracking=none"]
OWN = """
from trainer.data.text import Text

class OwnText(Text):
    '''Says nothing of itself in source text: only its `facts`, in a rank, show what it has.'''
"""


def test_what_the_data_does_not_say_is_named(trainer_cli: TrainerCli, workdir: Path) -> None:
    (workdir / "texts").mkdir()
    for number in range(3):
        (workdir / "texts" / f"{number}.txt").write_text(f"{number} is a number. " * 100)
    (workdir / "own_text.py").write_text(OWN)
    data = ["model=rnn_text", "data=text", "data.root=texts", f"data.cache={workdir / 'cache'}"]

    refused = trainer_cli("fit", *data, *ONE)
    assert refused.returncode == USER_MUST_CHANGE, refused.stdout + refused.stderr
    assert "model.num_classes is null" in refused.stderr
    assert not (workdir / "runs").exists()

    done = trainer_cli("fit", *data, "data._target_=own_text.OwnText", *ONE)
    assert done.returncode == JOB_FAILED, done.stdout + done.stderr
    assert "model.num_classes: null, and this data does not provide it" in done.stdout
    assert "choose a model for this kind of data, or set the value" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    (run,) = (workdir / "runs").iterdir()
    assert [path.name for path in (run / "logs").glob("attempt-*")] == ["attempt-00"]
