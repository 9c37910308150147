from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset, random_split


class BlobsDataModule(LightningDataModule):
    """Writes its data under `data_dir` once, splits it in `setup`, and divides the batch size by the ranks itself."""

    def __init__(
        self,
        data_dir: str,
        train_val_test_split: tuple[int, int, int],
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.data_train: Any = None
        self.batch_size_per_device = batch_size

    @property
    def num_classes(self) -> int:
        return 4

    def prepare_data(self) -> None:
        folder = Path(self.hparams.data_dir)
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(3)
        labels = torch.arange(128) % 4
        torch.save({"x": torch.randn(128, 64, generator=generator) + labels[:, None], "y": labels}, folder / "blobs.pt")

    def setup(self, stage: str | None = None) -> None:
        if self.trainer is not None:
            if self.hparams.batch_size % self.trainer.world_size != 0:
                raise RuntimeError("the batch size is not divisible by the number of devices")
            self.batch_size_per_device = self.hparams.batch_size // self.trainer.world_size
        if not self.data_train:
            found = torch.load(Path(self.hparams.data_dir) / "blobs.pt")
            self.data_train, self.data_val, self.data_test = random_split(
                TensorDataset(found["x"], found["y"]),
                self.hparams.train_val_test_split,
                generator=torch.Generator().manual_seed(42),
            )

    def _loader(self, rows, shuffle: bool = False):
        return DataLoader(
            rows,
            batch_size=self.batch_size_per_device,
            num_workers=self.hparams.num_workers,
            pin_memory=self.hparams.pin_memory,
            shuffle=shuffle,
        )

    def train_dataloader(self):
        return self._loader(self.data_train, shuffle=True)

    def val_dataloader(self):
        return self._loader(self.data_val)

    def test_dataloader(self):
        return self._loader(self.data_test)
