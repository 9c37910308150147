"""Token shards written by `trainer data tokenize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from trainer.data import locations
from trainer.data.arrays import ArrayDataModule
from trainer.data.files import SPLITS
from trainer.data.tokenizers import token_type
from trainer.data.tokens import TokenWindows, evaluation_windows


class TokenShards(ArrayDataModule):
    """Batches of two (n, sequence_length) int64 tensors: tokens, and the tokens that follow them."""

    default_task = "trainer.tasks.language_modelling.LanguageModelling"
    provides: ClassVar[dict[str, Any]] = {"vocab_size": None, "sequence_length": "sequence_length"}

    def __init__(self, root: str, batch_size: int = 32, sequence_length: int = 1024) -> None:
        """`root`: the folder that `trainer data tokenize` wrote."""
        super().__init__(batch_size)
        self.root, self.sequence_length = Path(root).expanduser(), sequence_length
        self.evaluation_batch = evaluation_windows(sequence_length)
        self.meta: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        self.meta = json.loads((locations.token_shards(str(self.root)) / locations.SHARDS).read_text())
        kind = token_type(self.meta["vocab_size"])
        self.train, self.val, self.test = (
            TokenWindows(sorted(self.root.glob(f"{split}-*.bin")), self.sequence_length, kind) for split in SPLITS
        )

    def facts(self) -> dict[str, Any]:
        return {
            "vocab_size": self.meta["vocab_size"],
            "sequence_length": self.sequence_length,
            "bytes_per_token": self.meta["bytes"]["val"] / self.meta["tokens"]["val"],
        }
