import lightning as L
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import StratifiedKFold
from torch import tensor
from torch.utils.data import DataLoader, Subset, TensorDataset


class FoldedData(L.LightningDataModule):
    """One of k folds is held out; a sweep over `data.fold` is the cross validation."""

    def __init__(self, fold: int = 0, num_folds: int = 5, split_seed: int = 12345, batch_size: int = 32):
        super().__init__()
        self.save_hyperparameters()
        assert 0 <= fold < num_folds, "incorrect fold number"

    def setup(self, stage=None):
        found = load_breast_cancer()
        x = (found.data - found.data.mean(0)) / found.data.std(0)
        rows = TensorDataset(tensor(x.astype(np.float32)), tensor(found.target))
        folds = StratifiedKFold(self.hparams.num_folds, shuffle=True, random_state=self.hparams.split_seed)
        train, held_out = list(folds.split(x, found.target))[self.hparams.fold]
        self.train, self.val = Subset(rows, train.tolist()), Subset(rows, held_out.tolist())

    def train_dataloader(self):
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self):
        return [DataLoader(self.val, self.hparams.batch_size), DataLoader(self.train, self.hparams.batch_size)]
