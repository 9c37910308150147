import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Shapes(Dataset):
    """As in torchvision: an image, and a dict of as many boxes and labels as there are objects; sometimes none."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(1000 * self.seed + index)
        objects = int(torch.randint(0, 4, (1,), generator=draw))
        corner = torch.rand(objects, 2, generator=draw) * 8
        boxes = torch.cat([corner, corner + 4], 1)
        image = torch.rand(3, 12 + index % 3, 12, generator=draw)
        labels = torch.randint(1, 3, (objects,), generator=draw)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor([index])}


def collate(batch):
    return tuple(zip(*batch, strict=True))


class Detector(nn.Module):
    """Losses in training, detections in evaluation: as torchvision's models."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.box = nn.Linear(32, 12)
        self.label = nn.Linear(32, 9)

    def forward(self, images, targets=None):
        features = torch.cat([self.backbone(image[None]) for image in images])
        boxes, logits = self.box(features).view(-1, 3, 4), self.label(features).view(-1, 3, 3)
        if not self.training:
            scores, labels = logits.softmax(-1).max(-1)
            return [
                {"boxes": box[sure], "scores": score[sure], "labels": label[sure]}
                for box, score, label, sure in zip(boxes, scores, labels, scores > 0.4, strict=True)
            ]
        wanted = torch.zeros_like(boxes)
        kinds = torch.zeros(len(images), 3, dtype=torch.long, device=boxes.device)
        for row, target in enumerate(targets):
            count = len(target["boxes"])
            wanted[row, :count], kinds[row, :count] = target["boxes"], target["labels"]
        return {
            "loss_box": nn.functional.l1_loss(boxes, wanted),
            "loss_classifier": nn.functional.cross_entropy(logits.flatten(0, 1), kinds.flatten()),
        }


class DetectionSystem(LightningModule):
    def __init__(self, learning_rate: float = 0.005):
        super().__init__()
        self.save_hyperparameters()
        self.model = Detector()

    def forward(self, images):
        self.model.eval()
        return self.model(images)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss_dict = self.model(images, [dict(target) for target in targets])
        loss = sum(loss_dict.values())
        return {"loss": loss, "log": {name: value.detach() for name, value in loss_dict.items()}}

    def validation_step(self, batch, batch_idx):
        images, targets = batch
        found = self.model(images)
        missed = [abs(len(one["boxes"]) - len(target["boxes"])) for one, target in zip(found, targets, strict=True)]
        self.log("val_missed", sum(missed) / len(missed), batch_size=len(images), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_found", float(sum(len(one["boxes"]) for one in self.model(batch[0]))), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.model(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.learning_rate, momentum=0.9, weight_decay=5e-4)
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], 0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class ShapesData(LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return DataLoader(Shapes(40, 1), self.batch_size, shuffle=True, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(Shapes(9, 2), self.batch_size, collate_fn=collate)

    def test_dataloader(self):
        return DataLoader(Shapes(9, 3), self.batch_size, collate_fn=collate)
