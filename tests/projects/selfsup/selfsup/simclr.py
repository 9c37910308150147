import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F


class SimCLR(pl.LightningModule):
    def __init__(self, lr: float = 0.05, temperature: float = 0.2, max_epochs: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.projection = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x):
        return self.backbone(x)

    def info_nce_loss(self, batch, mode):
        (one, two), _ = batch
        feats = F.normalize(self.projection(self(torch.cat([one, two]))), dim=1)
        if mode == "train":  # negatives of all ranks
            feats = self.all_gather(feats, sync_grads=True).flatten(0, -2)
        similar = feats @ feats.T / self.hparams.temperature
        similar.fill_diagonal_(-9e9)
        half = len(one)
        number = torch.arange(len(similar), device=similar.device)
        partner = torch.where(number % (2 * half) < half, number + half, number - half)
        loss = F.cross_entropy(similar, partner)
        self.log(f"{mode}_loss", loss, sync_dist=True)
        self.log(f"{mode}_acc_top1", (similar.argmax(1) == partner).float().mean(), sync_dist=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.info_nce_loss(batch, mode="train")

    def validation_step(self, batch, batch_idx):
        self.info_nce_loss(batch, mode="val")

    def test_step(self, batch, batch_idx):
        self.info_nce_loss(batch, mode="test")

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"features": self(batch[0][0]), "labels": batch[1]}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.hparams.max_epochs)
        return [optimizer], [scheduler]
