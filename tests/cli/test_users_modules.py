"""evaluate, predict and export of what users write, beside plain Lightning with the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from tests.conftest import TrainerCli
from trainer.core.errors import UserError
from trainer.export import run
from trainer.train.evaluate import _require_split

CODE = '''
import os
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def rows(count, seed):
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(rows(32, 1), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(rows(33, 2), batch_size=8)

    def test_dataloader(self):
        return [DataLoader(rows(33, 3), batch_size=8), DataLoader(rows(21, 4), batch_size=8)]


class Model(LightningModule):
    """Compiled in part, of that a part for training only; made in part in configure_model; logs as users do."""

    def __init__(self, compiled: bool = True, odd: object = None):
        super().__init__()
        self.save_hyperparameters()
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.body = torch.compile(body, backend="eager") if compiled else body
        self.tail = nn.Linear(2, 2)
        self.head = None

    def setup(self, stage):
        if stage == "fit":
            self.tail = torch.compile(self.tail, backend="eager")

    def configure_model(self):
        if self.head is None:
            self.head = nn.Linear(8, 2)

    def forward(self, inputs):
        return self.tail(self.head(self.body(inputs)))

    def loss(self, batch):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        if os.environ.get("BREAK"):
            raise ValueError("a mistake of the user")
        self.log("loss", self.loss(batch))
        self.log("seen", float(len(batch[0])), reduce_fx="sum")
        self.log("largest", batch[0].max(), reduce_fx="max", sync_dist=True)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        logits = self(batch[0])
        ragged = [{"kept": row[row > 0], "name": "a"} for row in logits]
        return {"logits": logits, "objects": ragged, "mean": logits.mean()}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
'''
JOB = ("model=m", "data=d", "tracking=none", "resources.gpus=0", "resources.cpu_processes=2", "trainer.max_epochs=1")


@pytest.fixture
def users(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The user's own module, imported here as plain Lightning would."""
    (workdir / "users_case.py").write_text(CODE)
    for section, name, target in (("model", "m", "users_case.Model"), ("data", "d", "users_case.Data")):
        (folder := workdir / "conf" / section).mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(f"_target_: {target}\n")
    monkeypatch.syspath_prepend(str(workdir))
    sys.modules.pop("users_case", None)
    import users_case  # type: ignore[import-not-found]

    return users_case


@pytest.mark.filterwarnings("ignore")  # plain Lightning's advice
def test_a_users_module_on_two_ranks_is_evaluated_predicted_and_exported_as_by_lightning(
    trainer_cli: TrainerCli, users: Any, workdir: Path
) -> None:
    done = trainer_cli("fit", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr

    assert ran(trainer_cli, "export", "--format", "ckpt", "--out", "whole")["format"] == "ckpt"
    plain = users.Model.load_from_checkpoint(workdir / "whole" / "model.ckpt", compiled=False, strict=False)
    plain.configure_model()
    plain.load_state_dict(torch.load(workdir / "whole" / "model.ckpt", weights_only=True)["state_dict"], strict=True)
    ran(trainer_cli, "export", "--out", "weights")
    weights = load_file(workdir / "weights" / "model.safetensors")
    assert set(weights) == set(plain.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())

    oracle = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    expected = {name: value for one in oracle.test(plain, users.Data(), verbose=False) for name, value in one.items()}
    assert expected["seen/dataloader_idx_0"] == 33
    found = ran(trainer_cli, "evaluate")["metrics"]
    assert found == pytest.approx(expected, rel=1e-5)
    (expected,) = oracle.validate(plain, users.Data(), verbose=False)
    assert ran(trainer_cli, "evaluate", "--split", "val")["metrics"] == pytest.approx(expected, rel=1e-5)

    record = ran(trainer_cli, "predict")
    folder = Path(record["path"])
    for number, loader in enumerate(users.Data().test_dataloader()):
        with torch.no_grad():
            logits = torch.cat([plain.eval()(batch[0]) for batch in loader])
        written = numpy.load(folder / f"dataloader_idx_{number}.logits.npy")
        numpy.testing.assert_allclose(written, logits.numpy(), rtol=1e-5, atol=1e-6)
        lines = (folder / f"dataloader_idx_{number}.objects.jsonl").read_text().splitlines()
        assert [len(json.loads(line)["kept"]) for line in lines] == [int((row > 0).sum()) for row in logits]
        assert record["outputs"][f"dataloader_idx_{number}.mean"]["row"] == "batch"

    refused = trainer_cli("predict", "--split", "predict")
    assert refused.returncode == 2
    assert "Data has no predict_dataloader\n  use --split=test or --split=val" in refused.stderr
    broken = trainer_cli("evaluate", env={"BREAK": "1"})
    assert broken.returncode == 1
    assert broken.stderr.count("a mistake of the user") == 2  # the message, and the line that raised it
    assert "in users_case.py:" in broken.stderr
    assert "Traceback" not in broken.stdout + broken.stderr
    log = next(Path("runs").glob("*/logs/evaluate.log")).read_text()
    assert "Traceback (most recent call last)" in log


def ran(cli: TrainerCli, *arguments: str) -> dict[str, Any]:
    done = cli(*arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout))


class OnlyTests(LightningModule):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Validated(LightningModule):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Both(OnlyTests, Validated):
    pass


class ValData(LightningDataModule):
    def val_dataloader(self) -> Any:
        return []


class DataOfTests(LightningDataModule):
    def test_dataloader(self) -> Any:
        return []


class Held:
    """What `_require_split` looks at."""

    def __init__(self, owner: LightningDataModule) -> None:
        self.owner = owner


@pytest.mark.parametrize(
    ("split", "module", "data", "message"),
    [
        ("test", Both, ValData, "ValData has no test_dataloader\n  use --split=val, or give it a test_dataloader"),
        ("test", Validated, ValData, "Validated has no test_step\n  use --split=val"),
        ("test", Validated, DataOfTests, "Validated has no test_step\n  give it a test_step"),
        ("val", OnlyTests, DataOfTests, "OnlyTests has no validation_step\n  use --split=test"),
        ("val", Both, DataOfTests, "DataOfTests has no val_dataloader\n  use --split=test"),
        ("test", OnlyTests, DataOfTests, None),
        ("val", Both, ValData, None),
    ],
)
def test_nothing_to_evaluate_says_what_there_is(split: str, module: Any, data: Any, message: str | None) -> None:
    if message is None:
        _require_split(split, module(), Held(data()))  # type: ignore[arg-type]
        return
    with pytest.raises(UserError) as caught:
        _require_split(split, module(), Held(data()))  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"--split={split}: {message}")


class NoForward(LightningModule):
    pass


class OfDicts(LightningModule):
    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs["x"]


class OfTwo(LightningModule):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.example_input_array = example

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first + second


class ToDict(LightningModule):
    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": inputs}


class Loaders:
    """What `_inputs` asks for a batch."""

    def __init__(self, batch: Any) -> None:
        self.training_loader = lambda: [batch]


BATCH = [torch.zeros(4, 3), torch.zeros(4)]


@pytest.mark.parametrize(
    ("module", "batch", "message"),
    [
        (NoForward(), BATCH, "NoForward has no forward"),
        (OfDicts(), {"x": torch.zeros(4, 3)}, "cannot be derived from a training batch"),
        (OfDicts(), BATCH, r"forward does not accept inputs of \(2, 3\)"),
        (OfTwo(), BATCH, r"forward does not accept inputs of \(2, 3\) \(TypeError: .*second"),
        (OfTwo({"first": torch.zeros(1)}), BATCH, "example_input_array is a dict"),
        (ToDict(), BATCH, "forward returns a dict"),
    ],
)
def test_onnx_of_another_forward_is_refused_with_the_reason(module: LightningModule, batch: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"--format=onnx: .*{message}") as caught:
        run._inputs(module, Loaders(batch))  # type: ignore[arg-type]
    assert "--format=safetensors" in caught.value.fix


def test_onnx_of_two_inputs_takes_the_example() -> None:
    module = OfTwo((torch.ones(2, 3), torch.ones(2, 3)))
    assert len(run._inputs(module, Loaders(BATCH))) == 2  # type: ignore[arg-type]


def test_a_module_as_it_was_before_torch_compile() -> None:
    inner = nn.Linear(2, 2)
    module = nn.Sequential(torch.compile(inner, backend="eager"), nn.Sequential(torch.compile(inner, backend="eager")))
    assert any("_orig_mod" in name for name in module.state_dict())
    plain = run.uncompiled(module)
    assert not any("_orig_mod" in name for name in plain.state_dict())
    assert torch.equal(plain(torch.ones(1, 2)), inner(inner(torch.ones(1, 2))))


def test_loaders_here_are_torchs() -> None:
    """The stand-in above is a list; a real loader gives lists, too."""
    loader = DataLoader(torch.utils.data.TensorDataset(*BATCH), batch_size=4)
    assert isinstance(next(iter(loader)), list)
