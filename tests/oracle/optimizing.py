"""Small modules with the optimizers and schedulers that people use, for the oracle."""

from __future__ import annotations

from typing import Any

import torch

from tests.oracle.modules import Plain


class KnowsItsLength(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Plateau(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


class PlateauOfSteps(Plain):
    """A plateau that is looked at after every third step, by a metric of the training."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
        how = {"scheduler": schedule, "monitor": "train_loss", "interval": "step", "frequency": 3}
        return {"optimizer": optimizer, "lr_scheduler": how}


class StepsByEpoch(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.3)]


class StepsBySecondStep(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": 2}}


class OwnSchedulerStep(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.trainer.global_step % 2 == 0:
            scheduler.step()


class SequentialSchedules(Plain):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        cool = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cool], milestones=[3])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Groups(Plain):
    """No weight decay on biases, as nanoGPT has it."""

    def configure_optimizers(self) -> Any:
        parameters = list(self.named_parameters())
        groups = [
            {"params": [p for _, p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for _, p in parameters if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.01},
        ]
        return torch.optim.AdamW(groups, lr=0.02)


class Newton(Plain):
    """LBFGS evaluates its closure several times a step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class PartlyFrozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(filter(lambda parameter: parameter.requires_grad, self.parameters()), lr=0.01)
