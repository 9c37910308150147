import itertools

import lightning as L
import torch
from omegaconf import DictConfig
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC


class Classifier(L.LightningModule):
    """Takes its part of the configuration as it is, and reads it by attributes."""

    def __init__(self, cfg: DictConfig):
        super().__init__()
        self.save_hyperparameters()
        self.cfg = cfg
        widths = [30, *cfg.hidden]
        layers = []
        for one, two in itertools.pairwise(widths):
            layers += [torch.nn.Linear(one, two), torch.nn.ReLU(), torch.nn.Dropout(cfg.dropout)]
        self.net = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], 1))
        metrics = MetricCollection({"acc": BinaryAccuracy(), "auroc": BinaryAUROC()})
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = torch.nn.ModuleList(metrics.clone(prefix="test/") for _ in range(2))

    def forward(self, x):
        return self.net(x).squeeze(1)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.binary_cross_entropy_with_logits(self(batch[0]), batch[1].float())

    def validation_step(self, batch, batch_idx):
        self.val_metrics.update(self(batch[0]), batch[1])
        self.log_dict(self.val_metrics, on_epoch=True)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        metrics = self.test_metrics[dataloader_idx]
        metrics.update(self(batch[0]), batch[1])
        self.log_dict(metrics, on_epoch=True)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return torch.sigmoid(self(batch[0]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.cfg.optim.lr, weight_decay=self.cfg.optim.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.cfg.optim.lr, total_steps=self.trainer.estimated_stepping_batches
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]
