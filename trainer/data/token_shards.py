"""Token shards written by `trainer data tokenize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from trainer.data import locations
from trainer.data.arrays import ArrayDataModule
from trainer.data.files import SPLITS
from trainer.data.tokenizers import MAX_VOCABULARY, TOKENIZER, BytePairs, Bytes, token_type
from trainer.data.tokens import TokenWindows, evaluation_windows
from trainer.data.untrusted import natural, read_object


class TokenShards(ArrayDataModule):
    """Next-token windows of token shards.

    Batches: two `(batch, sequence_length)` int64 tensors, the tokens and the tokens one position later.

    Args:
        root: The folder that `trainer data tokenize` wrote.
        batch_size: Global batch size.
        sequence_length: Tokens per window.
        document_mask: Whether positions attend only within their document; see `Transformer.document_end`.
    """

    default_task = "trainer.tasks.language_modelling.LanguageModelling"
    provides: ClassVar[dict[str, Any]] = {"vocab_size": None, "sequence_length": "sequence_length"}

    def __init__(
        self, root: str, batch_size: int = 32, sequence_length: int = 1024, document_mask: bool = False
    ) -> None:
        super().__init__(batch_size)
        self.root, self.sequence_length = Path(root).expanduser(), sequence_length
        self.document_mask = document_mask
        self.evaluation_batch = evaluation_windows(sequence_length)
        self.meta: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Map the shards and build the dataset of each split, once."""
        if self.train is not None:
            return
        path = locations.token_shards(str(self.root)) / locations.SHARDS
        self.meta = read_object(path, "write the shards again: trainer data tokenize")
        vocab_size = natural(self.meta, path, "vocab_size", largest=MAX_VOCABULARY)
        for key in ("bytes", "tokens"):
            natural(self.meta, path, key, "val")
        kind = token_type(vocab_size)
        end = self._document_end()
        self.train, self.val, self.test = (
            TokenWindows(sorted(self.root.glob(f"{split}-*.bin")), self.sequence_length, kind, end, vocab_size)
            for split in SPLITS
        )

    def _document_end(self) -> int | None:
        """Return the token that ends a document if documents are masked."""
        if not self.document_mask:
            return None
        path = self.root / TOKENIZER
        return BytePairs(path).end_of_text if path.is_file() else Bytes.end_of_text

    def facts(self) -> dict[str, Any]:
        """Return `vocab_size`, `sequence_length`, `bytes_per_token`, and with a document mask `document_end`."""
        end = self._document_end()
        return {
            **({} if end is None else {"document_end": end}),
            "vocab_size": self.meta["vocab_size"],
            "sequence_length": self.sequence_length,
            "bytes_per_token": self.meta["bytes"]["val"] / max(1, self.meta["tokens"]["val"]),
        }
