from __future__ import annotations

import random

import lightning as L
import torch
from torch.utils.data import DataLoader

WORDS = sorted({"a", "good", "great", "bad", "poor", "film", "plot", "story", "not", "very", "and", "the", "was", "is"})


class Sentences(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        draw = random.Random(seed)
        self.rows = []
        for _ in range(count):
            words = [draw.choice(WORDS) for _ in range(draw.randint(3, 9))]
            self.rows.append({"sentence": " ".join(words), "label": int("good" in words or "great" in words)})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class Collate:
    """As `DataCollatorWithPadding`: pads to the longest of the batch."""

    def __init__(self):
        # a vocabulary out of a set, as many projects have it
        self.vocab = {word: number + 1 for number, word in enumerate({*WORDS, "[CLS]"})}

    def __call__(self, rows):
        ids = [[self.vocab["[CLS]"], *(self.vocab[word] for word in row["sentence"].split())] for row in rows]
        longest = max(map(len, ids))
        padded = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
        return {
            "input_ids": padded,
            "attention_mask": (padded != 0).long(),
            "labels": torch.tensor([row["label"] for row in rows]),
        }


class GLUEDataModule(L.LightningDataModule):
    def __init__(self, train_batch_size: int = 8, eval_batch_size: int = 8):
        super().__init__()
        self.train_batch_size, self.eval_batch_size = train_batch_size, eval_batch_size

    def setup(self, stage):
        self.dataset = {split: Sentences(size, size) for split, size in (("train", 96), ("val", 32), ("test", 33))}
        self.collate = Collate()

    def train_dataloader(self):
        return DataLoader(self.dataset["train"], self.train_batch_size, shuffle=True, collate_fn=self.collate)

    def val_dataloader(self):
        return DataLoader(self.dataset["val"], self.eval_batch_size, collate_fn=self.collate)

    def test_dataloader(self):
        return DataLoader(self.dataset["test"], self.eval_batch_size, collate_fn=self.collate)
