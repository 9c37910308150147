"""`pytorch_lightning` and `lightning.pytorch` are one package to us: what is written on either trains as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.config.signature import argument_names
from trainer.config.sources import Definition, find
from trainer.config.targets import problems_of_targets

pytestmark = pytest.mark.executed

SCRIPT = Path(__file__).with_name("namespaces_process.py")
ROOT = Path(__file__).parents[2]


def test_mixtures_train_as_each_alone(tmp_path: Path) -> None:
    """Weights equal those of a `pytorch_lightning.Trainer`, bit for bit, whichever package each part is written on."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "names": [],
        "all_pl": True,
        "pl_module": True,
        "pl_data": True,
        "by_submodule": True,
        "early_stopping": 10,  # two epochs of five steps: the first value is the best
        "own_step": True,
        "init_from": True,
    }


def test_who_asks_whether_it_is_there_does_not_import_it() -> None:
    probe = (
        "import sys; from importlib.util import find_spec; from trainer.runtime.namespaces import install; install();"
        "print(find_spec('pytorch_lightning').origin, find_spec('lightning_fabric').origin, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300, check=True)
    pytorch, fabric, imported = done.stdout.split()
    assert pytorch.endswith("lightning/pytorch/__init__.py")
    assert fabric.endswith("lightning/fabric/__init__.py")
    assert imported == "False"


def test_spawned_loader_workers_have_it_too(tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text(
        "from importlib.util import find_spec\n"
        "is_ours = 'trainer.' in type(find_spec('pytorch_lightning').loader).__module__\n"
        "class Rows:\n"
        "    def __len__(self): return 2\n"
        "    def __getitem__(self, index): return int(is_ours)\n"
    )
    probe = (
        "from rows import Rows, is_ours\nfrom torch.utils.data import DataLoader\n"
        "from trainer.config.batch import BatchPlan\nfrom trainer.data.loader import resumable\n"
        "loader = DataLoader(Rows(), num_workers=1, multiprocessing_context='spawn')\n"
        "print([is_ours, *(batch.item() for batch in resumable(loader, BatchPlan.of(1, 1, 1), 0, 0))])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", probe]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[False, 1, 1]\n"


def test_both_names_are_one_to_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import pytorch_lightning as pl\n"
        "from pytorch_lightning.callbacks import EarlyStopping\n"
        "class Model(pl.LightningModule): pass\n"
        "class Stops(EarlyStopping): pass\n"
    )
    for name in ("pytorch_lightning.callbacks.EarlyStopping", "mine.EarlyStopping"):
        found = find(name, tmp_path)
        assert isinstance(found, Definition)
        assert found.module.name == "lightning.pytorch.callbacks.early_stopping"
    assert argument_names("mine.Model", tmp_path) == []
    assert "patience" in (argument_names("mine.Stops", tmp_path) or [])
    given = [
        "+callbacks.a._target_=pytorch_lightning.callbacks.EarlyStoping",
        "+callbacks.b._target_=pytorch_lightning.callbacks.EarlyStopping",
        "+callbacks.b.monitor=val_loss",
    ]
    composed = compose(given, config_dirs=[], cwd=tmp_path)
    composed.config["callbacks"]["b"]["patient"] = 2
    problems = problems_of_targets(composed.config, tmp_path)
    assert [problem.message.partition(":")[0] for problem in problems] == [
        "callbacks.a._target_=pytorch_lightning.callbacks.EarlyStoping",
        "callbacks.b.patient",
    ]
    assert "EarlyStopping" in problems[0].fix
