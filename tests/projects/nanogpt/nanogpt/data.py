from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset):
    """Windows of a memory-mapped file of tokens."""

    def __init__(self, path, block_size):
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.block_size = block_size

    def __len__(self):
        return (len(self.tokens) - 1) // self.block_size

    def __getitem__(self, i):
        at = i * self.block_size
        x = torch.from_numpy(self.tokens[at : at + self.block_size].astype(np.int64))
        y = torch.from_numpy(self.tokens[at + 1 : at + 1 + self.block_size].astype(np.int64))
        return x, y


class CharData(L.LightningDataModule):
    def __init__(self, data_dir: str = "tokens", block_size: int = 16, batch_size: int = 4):
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self):
        folder = Path(self.hparams.data_dir)
        folder.mkdir(exist_ok=True)
        for name, count in (("train", 2049), ("val", 257)):
            numbers = np.arange(count, dtype=np.int64)
            (numbers * numbers // 7 % 64).astype(np.uint16).tofile(folder / f"{name}.bin")

    def _loader(self, name, shuffle=False):
        windows = Windows(Path(self.hparams.data_dir) / f"{name}.bin", self.hparams.block_size)
        return DataLoader(windows, batch_size=self.hparams.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader("train", True)

    def val_dataloader(self):
        return self._loader("val")

    def test_dataloader(self):
        return self._loader("val")
