import inspect
import math
from dataclasses import dataclass

import lightning as L
import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    block_size: int = 16
    vocab_size: int = 64
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16
    dropout: float = 0.1
    bias: bool = False


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = nn.MultiheadAttention(config.n_embd, config.n_head, config.dropout, config.bias, batch_first=True)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = nn.Sequential(
            nn.Linear(config.n_embd, 4 * config.n_embd), nn.GELU(), nn.Linear(4 * config.n_embd, config.n_embd)
        )

    def forward(self, x, mask):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for name, parameter in self.named_parameters():
            if name.endswith("mlp.2.weight"):
                torch.nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx, targets=None):
        length = idx.shape[1]
        x = self.wte(idx) + self.wpe(torch.arange(length, device=idx.device))
        mask = torch.triu(torch.ones(length, length, dtype=torch.bool, device=idx.device), 1)
        for block in self.h:
            x = block(x, mask)
        logits = self.lm_head(x)
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


class LitGPT(L.LightningModule):
    """The configuration is a dataclass that Hydra builds; the rate is set by hand in each step."""

    def __init__(self, config: GPTConfig, learning_rate=6e-3, min_lr=6e-4, warmup_iters=3, weight_decay=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT(config)

    def forward(self, idx):
        return self.model(idx)[0]

    def get_lr(self, it):
        hparams, last = self.hparams, self.trainer.max_steps
        if it < hparams.warmup_iters:
            return hparams.learning_rate * (it + 1) / (hparams.warmup_iters + 1)
        ratio = min(1.0, (it - hparams.warmup_iters) / max(1, last - hparams.warmup_iters))
        return hparams.min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (hparams.learning_rate - hparams.min_lr)

    def on_train_batch_start(self, batch, batch_idx):
        for group in self.optimizers().param_groups:
            group["lr"] = self.get_lr(self.trainer.global_step)

    def training_step(self, batch, batch_idx):
        _, loss = self.model(*batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.model(*batch)[1], sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/loss", self.model(*batch)[1], sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self):
        params = {name: p for name, p in self.named_parameters() if p.requires_grad}
        groups = [
            {"params": [p for p in params.values() if p.dim() >= 2], "weight_decay": self.hparams.weight_decay},
            {"params": [p for p in params.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        fused = {"fused": False} if "fused" in inspect.signature(torch.optim.AdamW).parameters else {}
        return torch.optim.AdamW(groups, lr=self.hparams.learning_rate, betas=(0.9, 0.95), **fused)
