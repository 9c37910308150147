"""Trains modules on `pytorch_lightning` with its own Trainer, then mixtures of both packages with ours, in one process.

Prints one JSON object. Started by `test_namespaces.py` in a process of its own: it must see `pytorch_lightning` as it
is installed first.
"""

from __future__ import annotations

import functools
import importlib
import json
import pickle
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROJECT = '''
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
{imports}

class Model({module}):
    def __init__(self, lr: float = 0.5, note=None):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss_of_mine", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

class Data({data}):
    def train_dataloader(self):
        torch.manual_seed(2)
        return DataLoader(TensorDataset(torch.randn(40, 64), torch.arange(40) % 10), batch_size=8)

    def val_dataloader(self):
        return self.train_dataloader()

class Shrinks({callback}):
    """Changes the weights, so that they tell whether it was called."""
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net[1].weight.mul_(0.9)
'''
PL = "pytorch_lightning"
MIXTURES = {
    "all_pl": ("import pytorch_lightning as pl", "pl.LightningModule", "pl.LightningDataModule", "pl.Callback"),
    "pl_module": (
        "import pytorch_lightning as pl, lightning.pytorch as L",
        "pl.LightningModule",
        "L.LightningDataModule",
        "L.Callback",
    ),
    "pl_data": (
        "import pytorch_lightning, lightning",
        "lightning.LightningModule",
        "pytorch_lightning.core.LightningDataModule",
        "pytorch_lightning.callbacks.Callback",
    ),
    "by_submodule": (
        "from pytorch_lightning.core.module import LightningModule\n"
        "from pytorch_lightning.utilities.types import STEP_OUTPUT\n"
        "from pytorch_lightning.callbacks import Callback, EarlyStopping\n"
        "from lightning_fabric.utilities.seed import seed_everything\n"
        "import importlib\n"
        "data = importlib.import_module('lightning.pytorch.core.datamodule')",
        "LightningModule",
        "data.LightningDataModule",
        "Callback",
    ),
}


def write_projects(folder: Path) -> None:
    for name, (imports, module, data, callback) in MIXTURES.items():
        text = PROJECT.format(imports=imports, module=module, data=data, callback=callback)
        (folder / f"{name}.py").write_text(text)
        for group, target in (("model", "Model"), ("data", "Data")):
            (folder / "conf" / group).mkdir(parents=True, exist_ok=True)
            (folder / "conf" / group / f"{name}.yaml").write_text(f"_target_: {name}.{target}\n")


def stock(folder: Path) -> dict[str, Any]:
    """The weights that `pytorch_lightning` alone gives, and its checkpoint."""
    pl = importlib.import_module(PL)
    assert pl.LightningModule is not importlib.import_module("lightning.pytorch").LightningModule
    sys.path.insert(0, str(folder))
    project = importlib.import_module("all_pl")
    module = project.Model(note=functools.partial(print, folder))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[project.Shrinks()],
    )
    trainer.fit(module, datamodule=project.Data())
    trainer.save_checkpoint(folder / "stock.ckpt")
    sys.path.remove(str(folder))
    del sys.modules["all_pl"]
    return {name: value.clone() for name, value in module.state_dict().items()}


def names_are_one() -> list[str]:
    """What is not the same under both names; empty when all is."""
    import lightning.fabric
    import lightning.pytorch

    pl, fabric = importlib.import_module(PL), importlib.import_module("lightning_fabric")
    checks = {
        "package": pl is lightning.pytorch and fabric is lightning.fabric,
        "name": lightning.pytorch.__name__ == "lightning.pytorch" and lightning.pytorch.__spec__.name == pl.__name__,
        "version": isinstance(pl.__version__, str)
        and pl.__version__ == importlib.import_module(f"{PL}.__version__").version
        and isinstance(pl.__version__, str),
        "author": bool(importlib.import_module(f"{PL}.__about__").__author__),
        "cli": importlib.import_module(f"{PL}.cli").LightningCLI
        is importlib.import_module("lightning.pytorch.cli").LightningCLI,
        "missing module": find_spec(f"{PL}.no_such_thing") is None,
        "old pickle": pickle.loads(b"cpytorch_lightning.callbacks.timer\nTimer\n.")
        is lightning.pytorch.callbacks.Timer,
    }
    return [name for name, is_so in checks.items() if not is_so]


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore")
    write_projects(folder)
    expected = stock(folder)

    from trainer.runtime.imports import quick_imports

    with quick_imports():
        import torch

        from tests.train.in_process import fit, weights

    def same(run: Any) -> bool:
        found = weights(run)
        return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)

    found: dict[str, Any] = {"names": names_are_one()}
    for name in MIXTURES:
        ours = [f"model={name}", f"data={name}", "trainer.max_epochs=2"]
        run, _ = fit(folder, *ours, f"+callbacks.mine._target_={name}.Shrinks")
        found[name] = same(run)
    stops = ["+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping", "+callbacks.stop.monitor=val_loss"]
    stops += ["+callbacks.stop.patience=1", "+callbacks.stop.min_delta=100.0", "trainer.max_epochs=9"]
    run, _ = fit(folder, "model=all_pl", "data=all_pl", *stops)
    found["early_stopping"] = run.attempts()[-1].step
    run, _ = fit(folder, "model=all_pl", "data=digits", "trainer.max_steps=3", "trainer.log_every_n_steps=1")
    found["own_step"] = "loss_of_mine" in run.metrics_path.read_text()
    tuned = ["finetune.init_from=stock.ckpt", "+model.lr=0.0", "trainer.max_steps=1"]
    run, _ = fit(folder, "model=pl_module", "data=all_pl", *tuned)
    found["init_from"] = same(run)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
