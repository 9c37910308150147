import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset


class TwoViews(Dataset):
    """Each sample is two random views of one image; the augmentation draws from the global generator."""

    def __init__(self, count, seed):
        self.images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.images)

    def view(self, image):
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image + 0.1 * torch.randn_like(image)

    def __getitem__(self, index):
        image = self.images[index]
        return (self.view(image), self.view(image)), index % 3


class TwoViewsData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8, num_workers: int = 0):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return DataLoader(
            TwoViews(64, 1),
            batch_size=self.hparams.batch_size,
            num_workers=self.hparams.num_workers,
            shuffle=True,
            drop_last=True,
        )

    def val_dataloader(self):
        return DataLoader(TwoViews(16, 2), batch_size=self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(TwoViews(16, 3), batch_size=self.hparams.batch_size)
