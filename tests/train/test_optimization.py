"""Optimizers and schedules of the configuration: every one that ships, and torch's own as Lightning steps them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import lr_scheduler

from tests.train import recorded
from tests.train.in_process import attempt, fit, new_run, weights
from trainer import schedules
from trainer.checks.config import check
from trainer.config.compose import compose, group_options
from trainer.config.schema import TrainerOptions
from trainer.config.strategy import STRATEGIES
from trainer.config.strategy_limits import has_fused
from trainer.core.errors import UserError
from trainer.train.optimization import make_optimizer
from trainer.train.parameter_groups import decay_groups

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance\\(treespec, LeafSpec\\)",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:The `srun` command",
)
STEPS_PER_EPOCH = recorded.SAMPLES // recorded.BATCH
SGD = [
    "optimizer=sgd",
    "optimizer.lr=0.1",
    "optimizer.momentum=0",
    "optimizer.nesterov=false",
    "optimizer.weight_decay=0",
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    files = {
        "model/plain": "_target_: tests.train.recorded.Plain",
        "model/stubborn": "_target_: tests.train.recorded.Plain\nlearns: false",
        "data/rows": "_target_: tests.train.recorded.Rows",
        "scheduler/empty": "# nothing\n{}",
    }
    for name, text in files.items():
        (folder / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "conf" / f"{name}.yaml").write_text(text + "\n")
    return folder


def trained(
    project: Path, *overrides: str, model: str = "plain", epochs: int = 3
) -> tuple[list[float], dict[str, Any]]:
    """The learning rate after each step, and the weights."""
    recorded.EVENTS.clear()
    run, _ = fit(project, f"model={model}", "data=rows", f"trainer.max_epochs={epochs}", *overrides)
    return rates(), weights(run)


def rates() -> list[float]:
    return [event[2] for event in recorded.EVENTS if event[0] == "lr"]


class Theirs(recorded.Plain):
    """With a `configure_optimizers` of its own, for Lightning's Trainer."""

    def __init__(self, make: Any, learns: bool = True) -> None:
        super().__init__(learns=learns)
        self.make = make

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": self.make(optimizer)}


def lightnings(make: Any, learns: bool = True, epochs: int = 3) -> tuple[list[float], dict[str, Any]]:
    recorded.EVENTS.clear()
    module = Theirs(make, learns)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=epochs, **options)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=recorded.Rows())
    return rates(), module.state_dict()


ALL = 3 * STEPS_PER_EPOCH
TORCHS = "torch.optim.lr_scheduler"
SAME: dict[str, tuple[str, Any]] = {
    "step": (
        f"{{_target_: {TORCHS}.StepLR, step_size: 1, gamma: 0.5}}",
        lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    ),
    "step-by-step": (
        f"{{_target_: {TORCHS}.StepLR, step_size: 3, gamma: 0.5, interval: step, frequency: 2, name: slow}}",
        lambda o: {"scheduler": lr_scheduler.StepLR(o, 3, 0.5), "interval": "step", "frequency": 2},
    ),
    "every-second-epoch": (
        f"{{_target_: {TORCHS}.ExponentialLR, gamma: 0.5, frequency: 2}}",
        lambda o: {"scheduler": lr_scheduler.ExponentialLR(o, 0.5), "frequency": 2},
    ),
    "cosine-of-epochs": (
        f"{{_target_: {TORCHS}.CosineAnnealingLR}}",
        lambda o: lr_scheduler.CosineAnnealingLR(o, 3),
    ),
    "cosine-of-steps": (
        f"{{_target_: {TORCHS}.CosineAnnealingLR, T_max: null, interval: step}}",
        lambda o: {"scheduler": lr_scheduler.CosineAnnealingLR(o, ALL), "interval": "step"},
    ),
    "one-cycle": (
        f"{{_target_: {TORCHS}.OneCycleLR, max_lr: 0.02}}",
        lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.02, ALL), "interval": "step"},
    ),
    "one-cycle-of-epochs": (
        f"{{_target_: {TORCHS}.OneCycleLR, max_lr: 0.02, epochs: 3, steps_per_epoch: {STEPS_PER_EPOCH}}}",
        lambda o: {"scheduler": lr_scheduler.OneCycleLR(o, 0.02, epochs=3, steps_per_epoch=12), "interval": "step"},
    ),
    "polynomial": (
        f"{{_target_: {TORCHS}.PolynomialLR, total_iters: null, interval: step}}",
        lambda o: {"scheduler": lr_scheduler.PolynomialLR(o, ALL), "interval": "step"},
    ),
    "linear-with-torchs-default": (
        f"{{_target_: {TORCHS}.LinearLR, interval: step}}",
        lambda o: {"scheduler": lr_scheduler.LinearLR(o), "interval": "step"},
    ),
    "multistep": (
        f"{{_target_: {TORCHS}.MultiStepLR, milestones: [1, 2]}}",
        lambda o: lr_scheduler.MultiStepLR(o, [1, 2]),
    ),
    "plateau": (
        f"{{_target_: {TORCHS}.ReduceLROnPlateau, patience: 0, monitor: val_loss}}",
        lambda o: {"scheduler": lr_scheduler.ReduceLROnPlateau(o, patience=0), "monitor": "val_loss"},
    ),
    "warm-restarts": (
        f"{{_target_: {TORCHS}.CosineAnnealingWarmRestarts, T_0: 2}}",
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    ),
    "sequential": (
        f"{{_target_: {TORCHS}.SequentialLR, interval: step, milestones: [5], schedulers: ["
        f"{{_target_: {TORCHS}.LinearLR, start_factor: 0.1, total_iters: null}},"
        f"{{_target_: {TORCHS}.CosineAnnealingLR}}]}}",
        lambda o: {
            "scheduler": lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, ALL - 5)], [5]
            ),
            "interval": "step",
        },
    ),
    "chained": (
        f"{{_target_: {TORCHS}.ChainedScheduler, schedulers: ["
        f"{{_target_: {TORCHS}.ConstantLR, total_iters: 1}}, {{_target_: {TORCHS}.ExponentialLR, gamma: 0.5}}]}}",
        lambda o: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(o, total_iters=1), lr_scheduler.ExponentialLR(o, 0.5)]
        ),
    ),
    "lambda": (
        f"{{_target_: {TORCHS}.LambdaLR, "
        "lr_lambda: {_target_: trainer.schedules.WarmupInverseSqrt, warmup_steps: 2}}",
        lambda o: lr_scheduler.LambdaLR(o, schedules.WarmupInverseSqrt(2)),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("name", SAME)
def test_a_schedule_of_torch_steps_as_in_lightning(name: str, project: Path) -> None:
    written, make = SAME[name]
    model = "stubborn" if name == "plateau" else "plain"
    expected, weighed = lightnings(make, learns=model == "plain")
    found, same = trained(project, *SGD, "scheduler=empty", f"scheduler={written}", model=model)
    assert found == expected
    assert len(set(expected)) > 1
    assert {key: value.tolist() for key, value in same.items()} == {k: v.tolist() for k, v in weighed.items()}


@pytest.mark.parametrize("option", group_options([], "optimizer"))
def test_every_optimizer_that_ships_trains_and_resumes(option: str, project: Path) -> None:
    if option == "adamw_8bit":
        pytest.importorskip("torchao")
    given = ["model=plain", "data=rows", f"optimizer={option}", "scheduler=cosine", "trainer.max_epochs=null"]
    _resumes_exactly([*given, "optimizer.lr=0.01", "scheduler.warmup_steps=2"], project)


@pytest.mark.parametrize("option", group_options([], "scheduler"))
def test_every_schedule_that_ships_changes_the_rate_and_resumes(option: str, project: Path) -> None:
    sooner = {"step": "step_size=1", "multistep": "milestones=[1,2]", "plateau": "patience=0"}
    more = [f"scheduler.{sooner[option]}"] if option in sooner else []
    if option == "constant":
        more = ["scheduler.warmup_steps=5"]
    if option == "plateau":
        more += ["scheduler.monitor=val_loss", "model=stubborn"]
    given = ["model=plain", "data=rows", *SGD, f"scheduler={option}", "trainer.max_epochs=null", *more]
    seen = _resumes_exactly(given, project)
    assert len({round(rate, 9) for rate in seen}) > 1


def test_a_run_from_before_there_was_an_interval_steps_with_the_optimizer(project: Path) -> None:
    written = f"scheduler={{_target_: {TORCHS}.StepLR, step_size: 4, gamma: 0.5}}"
    run = new_run(project, ["model=plain", "data=rows", *SGD, "scheduler=empty", written, "trainer.max_epochs=1"])
    text = run.config_path.read_text()
    assert "  interval: epoch\n" in text
    run.config_path.write_text(text.replace("  interval: epoch\n", ""))
    recorded.EVENTS.clear()
    attempt(run, project)
    assert [round(rate, 6) for rate in rates()] == [0.1] * 3 + [0.05] * 4 + [0.025] * 4 + [0.0125]


class Scored(recorded.Plain):
    """Says itself which metric counts, and that more of it is better."""

    primary_metric = ("score", "max")

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("score", 1.0 + self.current_epoch)
        self.log("val_loss", 1.0)


@pytest.mark.parametrize(
    ("more", "falls"),
    [
        ([], False),
        (["scheduler.mode=min"], True),
        (["scheduler.monitor=val_loss"], True),
        (["scheduler.monitor=val_loss", "scheduler.interval=epoch", "scheduler.frequency=5"], False),
        (["checkpoint.monitor=val_loss"], True),
    ],
    ids=str,
)
def test_a_plateau_follows_the_runs_metric_in_its_direction(more: list[str], falls: bool, project: Path) -> None:
    (project / "conf/model/scored.yaml").write_text("_target_: tests.train.test_optimization.Scored\n")
    found, _ = trained(project, *SGD, "scheduler=plateau", "scheduler.patience=0", *more, model="scored", epochs=4)
    assert (found[-1] < found[0]) is falls


def test_a_plateau_without_a_metric_says_what_to_write(project: Path) -> None:
    run = new_run(project, ["model=plain", "data=rows", "scheduler=plateau"])
    said = attempt(run, project, outcome="failed")
    assert "write scheduler.monitor=val_loss" in said


class Layers(nn.Module):
    """Every kind of parameter that the switch looks at, a tied and a frozen one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.RMSNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)])
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_norms_and_biases_are_a_group_without_decay() -> None:
    model = Layers()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = decay_groups(model)
    assert {names[id(one)] for one in decayed["params"]} == {
        "embedding.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "layer.weight",
    }
    assert rest["weight_decay"] == 0.0
    trained_ones = [one for one in model.parameters() if one.requires_grad]
    assert len(decayed["params"]) + len(rest["params"]) == len(trained_ones)
    assert {names[id(one)] for one in rest["params"]} >= {"norms.0.weight", "norms.1.weight", "attention.in_proj_bias"}


def test_the_switch_spares_norms_and_biases_and_resumes(project: Path) -> None:
    given = ["optimizer=adamw", "optimizer.lr=0.01", "optimizer.weight_decay=0.5", "scheduler=constant"]
    assert _resumes_exactly(["model=plain", "data=rows", *given, "optimizer.no_decay_norm_bias=true"], project)

    class Spared(recorded.Net):
        def configure_optimizers(self) -> Any:
            weights = [self.net[0].weight, self.net[2].weight]
            rest = [one for one in self.parameters() if all(one is not weight for weight in weights)]
            groups = [{"params": weights}, {"params": rest, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5)

    module = Spared()
    options = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=2, **options)  # type: ignore[arg-type]
    trainer.fit(module, datamodule=recorded.Rows())
    _, same = trained(project, *given, "optimizer.no_decay_norm_bias=true", epochs=2)
    _, other = trained(project, *given, epochs=2)
    expected = {key: value.tolist() for key, value in module.state_dict().items()}
    assert {key: value.tolist() for key, value in same.items()} == expected
    assert {key: value.tolist() for key, value in other.items()} != expected


def test_a_schedule_of_ours_is_its_formula() -> None:
    def factors(make: Any, steps: int, **options: Any) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make(optimizer, **options)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    up = [0.25, 0.5, 0.75, 1.0]
    assert factors(schedules.linear, 12, total_steps=12, warmup_steps=4) == pytest.approx(
        up + [1 - step / 8 for step in range(8)]
    )
    assert factors(schedules.polynomial, 12, total_steps=12, warmup_steps=4, power=2, min_ratio=0.5) == pytest.approx(
        up + [0.5 + 0.5 * (1 - step / 8) ** 2 for step in range(8)]
    )
    assert factors(schedules.cosine, 12, total_steps=12, warmup_steps=4, min_ratio=0.1) == pytest.approx(
        up + [0.1 + 0.45 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    )
    stable = factors(schedules.warmup_stable_decay, 20, total_steps=20, warmup_steps=4, decay_ratio=0.25)
    assert stable == pytest.approx(up + [1.0] * 12 + [0.8, 0.6, 0.4, 0.2])
    assert factors(schedules.inverse_sqrt, 16, warmup_steps=4) == pytest.approx(
        up + [math.sqrt(4 / step) for step in range(5, 17)]
    )


def _resumes_exactly(given: list[str], project: Path) -> list[float]:
    """Two epochs and a half at once, and in two attempts; the rates."""
    given = [*given, "trainer.max_steps=30", "resilience.agree_every_s=0.0001"]
    whole, halves = (new_run(project, given) for _ in range(2))
    recorded.EVENTS.clear()
    attempt(whole, project)
    expected = rates()
    recorded.EVENTS.clear()
    recorded.STOP.append((15, halves.stop_request))
    attempt(halves, project, outcome="stopped")
    halves.stop_request.unlink()
    stopped = len(rates())
    assert 15 <= stopped < 30
    attempt(halves, project)
    assert rates() == expected
    ends = [{name: value.tolist() for name, value in weights(run).items()} for run in (whole, halves)]
    assert ends[0] == ends[1]
    assert ends[0] != {name: value.tolist() for name, value in recorded.Net().state_dict().items()}
    return expected


def kernel(
    capsys: pytest.CaptureFixture[str], device: str = "cuda", strategy: Any = None, **sections: Any
) -> tuple[bool | None, str]:
    """`fused` of the optimizer that a rank on `device` makes, and what it prints."""
    module = recorded.Plain()
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), is_global_zero=True)
    object.__setattr__(module, "_trainer", trainer)
    object.__setattr__(module, "_fabric", None)
    config: Any = SimpleNamespace(
        optimizer={"_target_": "torch.optim.AdamW", "lr": 0.1, "fused": "auto", **sections.get("optimizer", {})},
        strategy=strategy or STRATEGIES["fsdp"](),
        trainer=TrainerOptions(**sections.get("trainer", {})),
    )
    made = make_optimizer(module, config)
    return made.param_groups[0]["fused"], capsys.readouterr().out


def test_a_gpu_gets_the_fused_kernel_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel(capsys) == (True, "optimizer: AdamW, fused kernel\n")
    assert kernel(capsys, strategy=STRATEGIES["ddp"](), optimizer={"_target_": "torch.optim.SGD"})[0] is True
    fused, said = kernel(capsys, optimizer={"_target_": "torch.optim.SGD"})
    assert not fused
    assert "torch has no fused SGD of sharded parameters" in said
    fused, said = kernel(capsys, "cpu")
    assert not fused
    assert "optimizer.fused=true is faster" in said
    clipped = {"precision": "16-mixed", "gradient_clip_norm": 1.0}
    assert not kernel(capsys, trainer=clipped)[0]
    assert kernel(capsys, trainer={**clipped, "precision": "bf16-mixed"})[0] is True
    assert not kernel(capsys, strategy=STRATEGIES["fsdp"](cpu_offload=True))[0]
    assert not kernel(capsys, strategy=STRATEGIES["deepspeed_zero2"](offload_optimizer="cpu"))[0]


def test_a_choice_of_the_kernel_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    for value in (True, False, None):
        assert kernel(capsys, optimizer={"fused": value}) == (value, "")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fused_kernels_of_sharded_parameters_are_those_that_torch_has(mesh: DeviceMesh) -> None:
    for name in ("SGD", "Adam", "AdamW"):
        parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
        parameter.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
        optimizer = getattr(torch.optim, name)([parameter], lr=0.1, fused=True)
        if has_fused(f"torch.optim.{name}", "fsdp"):
            optimizer.step()
            continue
        with pytest.raises(NotImplementedError, match="sharding strategy"):
            optimizer.step()


def test_a_rank_decides_by_the_strategy_that_auto_stands_for(project: Path) -> None:
    _, said = fit(project, "model=plain", "data=rows", *SGD, "strategy=auto")
    assert " parameters, single on 1 rank, " in said


def test_a_fused_kernel_that_torch_lacks_is_refused_at_the_prompt() -> None:
    job = ["experiment=quickstart", "optimizer=sgd", "+optimizer.fused=true"]
    check(compose([*job, "strategy=ddp"], config_dirs=[]).config, fits=False)
    on_gpus = ["strategy=auto", "cluster=slurm", "resources.gpus=8"]  # fsdp, if the plan cannot choose
    for strategy in (["strategy=fsdp"], on_gpus):
        with pytest.raises(UserError, match=r"torch has no fused SGD of what strategy=fsdp shards"):
            check(compose([*job, *strategy], config_dirs=[]).config, fits=False)


def test_which_configs_leave_the_kernel_open() -> None:
    def fused(*overrides: str) -> Any:
        config = compose(["experiment=quickstart", *overrides], config_dirs=[]).config
        check(config, fits=False)
        return config["optimizer"].get("fused", "not set")

    assert fused("optimizer=adamw") == fused("optimizer=sgd") == "auto"
    assert fused("optimizer=adamw", "+optimizer.fused=false") is False
    assert fused("optimizer=adamw", "+optimizer.foreach=true") == "not set"
    assert fused("optimizer=rmsprop") == fused("optimizer=muon") == "not set"


def test_a_run_from_before_the_key_keeps_torchs_kernel(project: Path) -> None:
    """Its frozen configuration has no `fused`: the bits of its resume do not change."""
    run = new_run(project, ["model=plain", "data=rows", "optimizer=adamw", "trainer.max_epochs=1"])
    text = run.config_path.read_text()
    assert "  fused: auto\n" in text
    run.config_path.write_text(text.replace("  fused: auto\n", ""))
    assert "optimizer: AdamW" not in attempt(run, project)


def test_the_fused_kernel_of_the_cpu_depends_on_the_place_of_an_element() -> None:
    """Why it is not the default there: a shard would be rounded otherwise than the whole. Where this fails, it can."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(10007, generator=generator)
    gradients = [torch.randn(10007, generator=generator) for _ in range(20)]
    ends = []
    for size in (10007, 3333):
        parts = [nn.Parameter(part.clone()) for part in whole.split(size)]
        optimizer = torch.optim.AdamW(parts, lr=1e-2, weight_decay=0.1, fused=True)
        for gradient in gradients:
            for part, values in zip(parts, gradient.split(size), strict=True):
                part.grad = values.clone()
            optimizer.step()
        ends.append(torch.cat([part.detach() for part in parts]))
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends)
