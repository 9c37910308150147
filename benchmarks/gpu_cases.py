"""The trainings of `benchmarks/gpu`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

TRACED = 2
"""Steps that the trainer's profiler records."""
LOG_EVERY = 10
"""Steps between two logged ones."""
COMMON = (
    "strategy=single",
    "tracking=none",
    "trainer.max_epochs=null",
    "trainer.limit_val_batches=0",
    "trainer.precision=bf16-mixed",
    "trainer.gradient_clip_norm=1.0",
    f"trainer.log_every_n_steps={LOG_EVERY}",
    "checkpoint.every_minutes=null",
    "checkpoint.keep_best=0",
    "checkpoint.keep_last=1",
    "resilience.max_restarts=0",
    "data=token_shards",
    "optimizer.lr=0.0003",
    "optimizer.betas=[0.9,0.95]",
    "optimizer.weight_decay=0.1",
)
TOY = ("model.dim=32", "model.layers=2", "model.heads=2")
SMALLER = (*TOY, "model.kv_heads=1", "model.ffn_dim=64")
DRAWN = {"llama3_8b": "llama3_8b_drawn", "transformer": "transformer_drawn"}
"""Models of `conf/model` and the names under which their weights are drawn on the GPU."""
ONE_BILLION = ("model=transformer_drawn", "model.dim=2048", "model.layers=16", "model.heads=32", "model.kv_heads=8")
ONE_BILLION += ("model.ffn_dim=8192",)
EIGHT_BILLION = ("model=llama3_8b_drawn", "strategy.activation_checkpointing=full")


def write_project(folder: Path) -> None:
    """Write the project that the cases train: the callback, and models whose weights are drawn on the GPU."""
    benchmarks = Path(__file__).resolve().parent
    shutil.copy(benchmarks / "gpu_probe.py", folder)
    models = folder / "conf" / "model"
    models.mkdir(parents=True)
    for name, drawn in DRAWN.items():
        text = (benchmarks.parent / "conf" / "model" / f"{name}.yaml").read_text()
        original, ours = "trainer.models.transformer.Transformer", "gpu_probe.Drawn"
        assert original in text
        (models / f"{drawn}.yaml").write_text(text.replace(original, ours))


@dataclass(frozen=True)
class Case:
    """A training."""

    title: str
    overrides: tuple[str, ...]
    vocabulary: int
    length: int
    """Tokens of a sequence."""
    batch: int
    """Sequences of an optimizer step."""
    windows: tuple[int, int, int, int]
    """Steps: warm-up, timed, watched, timed one by one."""
    limit_s: int
    goal: float | None = None
    """Least MFU."""
    saves: bool = True
    """Whether the stall of a save is measured; a save takes 12 bytes a parameter of host memory and disk."""
    leaves: bool = False
    """Whether the process ends after the measurement, without the last checkpoint."""
    toy: tuple[str, ...] = field(default=TOY)
    """Overrides of `--toy`."""


CASES = {
    "124m": Case("GPT-2 124M", ("model=gpt2_124m",), 50_257, 1024, 64, (10, 30, 12, 8), 80),
    "124m-compiled": Case(
        "GPT-2 124M, compiled",
        ("model=gpt2_124m", "strategy.compile=true"),
        50_257,
        1024,
        64,
        (10, 30, 12, 8),
        120,
        goal=0.5,
    ),
    "124m-fsdp": Case(
        "GPT-2 124M, fsdp on one GPU", ("model=gpt2_124m", "strategy=fsdp"), 50_257, 1024, 64, (10, 20, 12, 8), 80
    ),
    "1b": Case(
        "1.2B",
        ONE_BILLION,
        128_256,
        4096,
        4,
        (4, 10, 10, 6),
        100,
        leaves=True,
        toy=SMALLER,
    ),
    "8b": Case(
        "8B (Llama 3), recomputing activations",
        EIGHT_BILLION,
        128_256,
        4096,
        2,
        (2, 5, 2, 0),
        150,
        goal=0.58,
        saves=False,
        leaves=True,
        toy=SMALLER,
    ),
    "8b-20-layers": Case(
        "8B with 20 of 32 layers, if 8B failed",
        (*EIGHT_BILLION, "model.layers=20"),
        128_256,
        4096,
        2,
        (2, 5, 2, 0),
        100,
        saves=False,
        leaves=True,
        toy=SMALLER,
    ),
}
INSTEAD = {"8b-20-layers": "8b"}
"""A case that runs only where another has failed."""
