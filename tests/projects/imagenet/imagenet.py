from argparse import Namespace

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class ImageNetLightningModel(pl.LightningModule):
    """As Lightning's imagenet.py: the loaders, the schedule and the top-k accuracies live in the module."""

    def __init__(self, arch="small", lr: float = 0.1, momentum: float = 0.9, batch_size: int = 8, workers: int = 0):
        super().__init__()
        self.save_hyperparameters()
        self.hparams_of_old = Namespace(arch=arch)
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    def setup(self, stage):
        self.made = {"fit": 96, "validate": 32, "test": 32, "predict": 32}[stage]

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        images, target = batch
        output = self(images)
        loss = F.cross_entropy(output, target)
        acc1, acc3 = self.accuracy(output, target, topk=(1, 3))
        self.log("train_loss", loss, on_step=True, on_epoch=True, logger=True)
        self.log("train_acc1", acc1, on_step=True, prog_bar=True, on_epoch=True, logger=True)
        self.log("train_acc3", acc3, on_step=True, on_epoch=True, logger=True)
        return loss

    def eval_step(self, batch, batch_idx, prefix):
        images, target = batch
        output = self(images)
        self.log(f"{prefix}_loss", F.cross_entropy(output, target), sync_dist=True)
        (acc1,) = self.accuracy(output, target, topk=(1,))
        self.log(f"{prefix}_acc1", acc1, prog_bar=True, sync_dist=True)

    def validation_step(self, batch, batch_idx):
        return self.eval_step(batch, batch_idx, "val")

    def test_step(self, batch, batch_idx):
        return self.eval_step(batch, batch_idx, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)

    @staticmethod
    def accuracy(output, target, topk=(1,)):
        with torch.no_grad():
            _, pred = output.topk(max(topk), 1, True, True)
            correct = pred.t().eq(target[None])
            return [correct[:k].flatten().float().sum() * (100.0 / len(target)) for k in topk]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=self.hparams.momentum)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.1 ** (epoch // 2))
        return [optimizer], [scheduler]

    def _loader(self, count, seed, shuffle=False):
        draw = torch.Generator().manual_seed(seed)
        images, labels = torch.rand(count, 3, 8, 8, generator=draw), torch.randint(5, (count,), generator=draw)
        rows = TensorDataset(images, labels)
        return DataLoader(rows, self.hparams.batch_size, shuffle=shuffle, num_workers=self.hparams.workers)

    def train_dataloader(self):
        return self._loader(96, 1, shuffle=True)

    def val_dataloader(self):
        return self._loader(32, 2)

    def test_dataloader(self):
        return self.val_dataloader()

    def predict_dataloader(self):
        return self.val_dataloader()
