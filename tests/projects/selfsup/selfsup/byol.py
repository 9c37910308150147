import copy
import math

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F


class BYOLMAWeightUpdate(pl.Callback):
    """Moves the target network after each batch; the rate depends on how far the training is."""

    def __init__(self, initial_tau: float = 0.9):
        self.initial_tau = self.current_tau = initial_tau

    def state_dict(self):
        return {"current_tau": self.current_tau}

    def load_state_dict(self, state_dict):
        self.current_tau = state_dict["current_tau"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            for online, target in zip(pl_module.online.parameters(), pl_module.target.parameters(), strict=True):
                target.data = self.current_tau * target.data + (1 - self.current_tau) * online.data
        total = len(trainer.train_dataloader) * trainer.max_epochs
        self.current_tau = 1 - (1 - self.initial_tau) * (math.cos(math.pi * pl_module.global_step / total) + 1) / 2


class BYOL(pl.LightningModule):
    def __init__(self, lr: float = 0.02):
        super().__init__()
        self.save_hyperparameters()
        self.online = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
        self.target = copy.deepcopy(self.online)
        self.predictor = nn.Linear(8, 8)
        for parameter in self.target.parameters():
            parameter.requires_grad = False

    def configure_callbacks(self):
        return BYOLMAWeightUpdate()

    def forward(self, x):
        return self.online(x)

    def shared_step(self, batch):
        (one, two), _ = batch
        loss = 0
        for a, b in ((one, two), (two, one)):
            with torch.no_grad():
                wanted = F.normalize(self.target(b), dim=1)
            loss = loss + (2 - 2 * (F.normalize(self.predictor(self.online(a)), dim=1) * wanted).sum(1)).mean()
        return loss

    def training_step(self, batch, batch_idx):
        loss = self.shared_step(batch)
        self.log_dict({"train/1_2_loss": loss, "train/total_loss": loss})
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/total_loss", self.shared_step(batch), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/total_loss", self.shared_step(batch), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(batch[0][0])

    def configure_optimizers(self):
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=self.hparams.lr)
