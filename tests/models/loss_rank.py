"""One gloo rank that trains a decoder with and without the chunked loss: `python loss_rank.py FOLDER [TRANSFORMERS]`.

TRANSFORMERS: the folder of that package, whose networks are trained, too.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch.utils.data import DataLoader, TensorDataset

from trainer import strategies
from trainer.config.strategy import STRATEGIES
from trainer.models import linear_cross_entropy
from trainer.models.transformer import Transformer
from trainer.tasks.language_modelling import IGNORED, LanguageModelling

VOCABULARY, LENGTH, STEPS = 50, 11, 4
CASES = [
    (strategy, precision, tied)
    for strategy, tied in (("ddp", True), ("fsdp", True), ("fsdp", False))
    for precision in ("32-true", "bf16-mixed", "bf16-true")
] + [("deepspeed_zero3", "bf16-mixed", True)]
HUGGING_FACE = [
    ("ddp", "32-true", "llama"),
    ("ddp", "bf16-mixed", "gemma2"),
    *(("fsdp", precision, family) for precision in ("32-true", "bf16-mixed") for family in ("gpt2", "gemma2")),
    ("deepspeed_zero3", "32-true", "gpt2"),
]
SLOW = {
    *(("ddp", "bf16-mixed", True), ("fsdp", "bf16-true", True), ("fsdp", "bf16-mixed", False)),
    *(("fsdp", "32-true", "gemma2"), ("fsdp", "bf16-mixed", "gpt2")),
}
"""Left to --slow: each pair of a strategy and a precision, and each kind of output, is in another case as well."""


class Trained(LanguageModelling):
    """Keeps the losses; plain SGD, so that wrong gradients change the next loss in proportion."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), (float(loss.detach()), str(loss.dtype))]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def network_of(kind: bool | str) -> torch.nn.Module:
    """Return our decoder, tied or not, or one of Hugging Face with its own kind of output."""
    if isinstance(kind, bool):
        return Transformer(VOCABULARY, LENGTH, dim=16, layers=2, heads=2, tied=kind)
    from trainer.models.hf import HuggingFace

    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    others = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, "max_position_embeddings": 16}
    no_dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if kind == "gpt2" else {"num_key_value_heads": 2}
    cap = {"final_logit_softcapping": 0.5, "head_dim": 8} if kind == "gemma2" else {}
    return HuggingFace(config={"model_type": kind, **sizes, **others, **no_dropout, **cap}, vocab_size=VOCABULARY)


def train(strategy: str, precision: str, kind: bool | str, chunked: bool) -> list[tuple[float, str]]:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    network = network_of(kind)
    tokens = torch.randint(0, VOCABULARY, (STEPS * 2, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
    targets = tokens[:, 1:].clone()
    targets[:, :3] = IGNORED
    module = Trained(network, chunked_loss=chunked)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        max_steps=STEPS,
        strategy=strategies.build(STRATEGIES[strategy](), 2, torch.device("cpu"), 60.0),
        plugins=[TorchElasticEnvironment()],
        precision=precision,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(tokens[:, :-1], targets), batch_size=2))
    return module.seen


def main() -> None:
    linear_cross_entropy.CHUNK_BYTES["cpu"] = 4 * VOCABULARY * 9  # 22 positions: chunks of 8, 8 and 6
    found: dict[str, Any] = {}
    cases: list[Any] = [*CASES]
    if len(sys.argv) > 3:
        sys.path.append(sys.argv[3])
        cases += HUGGING_FACE
    for strategy, precision, kind in cases:
        if ((strategy, precision, kind) in SLOW) != (sys.argv[2] == "slow"):
            continue
        runs = [train(strategy, precision, kind, chunked) for chunked in (False, True)]
        found[f"{strategy} {precision} {kind}"] = runs
    (Path(sys.argv[1]) / f"losses-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
