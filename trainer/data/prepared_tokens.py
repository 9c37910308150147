"""Base classes of data modules whose tokens are prepared once, in a cache folder, and read as windows."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy

from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule
from trainer.data.baselines import bits_per_byte
from trainer.data.cache import cache_root
from trainer.data.files import SPLITS
from trainer.data.tokenizers import MAX_VOCABULARY, Tokenizer, TokenizerChoice, token_type, write_tokens
from trainer.data.tokens import TokenWindows, evaluation_windows
from trainer.data.untrusted import natural, read_object, shown

META = "meta.json"


class PreparedTokens(ArrayDataModule, ABC):
    """Next-token windows of tokens that are prepared once.

    Batches: two `(batch, sequence_length)` int64 tensors, the tokens and the tokens one position later.

    The prepared folder holds `{train,val,test}.bin` and `meta.json`: {"vocab_size", "splits": {split: {"tokens"}}}.

    Args:
        batch_size: Global batch size.
        sequence_length: Tokens per window.
        cache: Folder for prepared data; None: `~/.cache/trainer`.
        document_mask: Whether positions attend only within their document; see `Transformer.document_end`.
    """

    default_task = "trainer.tasks.language_modelling.LanguageModelling"
    provides: ClassVar[dict[str, Any]] = {"vocab_size": None, "sequence_length": "sequence_length"}

    def __init__(self, batch_size: int, sequence_length: int, cache: str | None, document_mask: bool = False) -> None:
        super().__init__(batch_size)
        self.document_mask = document_mask
        self.sequence_length = sequence_length
        self.evaluation_batch = evaluation_windows(sequence_length)
        self.cache = Path(cache).expanduser() if cache else cache_root()
        self.folder: Path | None = None
        self.meta: dict[str, Any] = {}

    @abstractmethod
    def prepared_folder(self) -> Path:
        """Return the prepared folder, after filling it if it does not exist."""

    def end_of_text(self) -> int:
        """Return the token that ends a document, after `setup`.

        Raises:
            UserError: The class does not know it.
        """
        problem = f"data.document_mask=true: {type(self).__name__} does not know which token ends a document"
        raise UserError(problem, "remove it")

    def prepare_data(self) -> None:
        """Prepare the tokens. Runs on one rank of each node; the others wait for it."""
        self.folder = self.folder or self.prepared_folder()

    def setup(self, stage: str | None = None) -> None:
        """Map the prepared tokens and build the dataset of each split, once."""
        if self.train is not None:
            return
        self.folder = self.folder or self.prepared_folder()
        self.meta = read_object(self.folder / META, f"remove {shown(self.folder)}: the tokens are then prepared again")
        kind = token_type(natural(self.meta, self.folder / META, "vocab_size", largest=MAX_VOCABULARY))
        end = self.end_of_text() if self.document_mask else None
        self.train, self.val, self.test = (
            TokenWindows([self.folder / f"{split}.bin"], self.sequence_length, kind, end) for split in SPLITS
        )

    def facts(self) -> dict[str, Any]:
        """Return `vocab_size`, `sequence_length`, and with a document mask `document_end`."""
        end = {"document_end": self.end_of_text()} if self.document_mask else {}
        return {"vocab_size": self.meta["vocab_size"], "sequence_length": self.sequence_length, **end}


class PreparedText(PreparedTokens):
    """Next-token windows of tokenised text; with byte pairs the prepared folder also holds `tokenizer.json`.

    Args:
        batch_size: Global batch size.
        sequence_length: Tokens per window.
        cache: Folder for prepared data; None: `~/.cache/trainer`.
        tokenizer: `bytes`; `bpe`, trained on the training texts; or the path of a `tokenizer.json`.
        vocab_size: Vocabulary size of `bpe`.
        document_mask: As in `PreparedTokens`.
    """

    def __init__(
        self,
        batch_size: int,
        sequence_length: int,
        cache: str | None,
        tokenizer: str,
        vocab_size: int,
        *,
        document_mask: bool = False,
    ) -> None:
        super().__init__(batch_size, sequence_length, cache, document_mask)
        self.choice = TokenizerChoice(tokenizer, vocab_size)

    def write(
        self, folder: Path, texts: Callable[[str], Iterable[bytes]], more: Callable[[str], Mapping[str, Any]]
    ) -> None:
        """Fill the prepared folder with the tokens of each split.

        Args:
            folder: The empty folder.
            texts: Split to its texts.
            more: Split to additional entries of `meta.json`, called after its texts were read.
        """
        tokenizer = self.choice.make(folder, lambda: texts("train"))
        splits = {}
        for split in SPLITS:
            tokens, length = write_tokens(folder / f"{split}.bin", texts(split), tokenizer)
            splits[split] = {"tokens": tokens, "bytes": length, **more(split)}
        (folder / META).write_text(json.dumps({"vocab_size": tokenizer.vocab_size, "splits": splits}, indent=1))

    def facts(self) -> dict[str, Any]:
        """Return `vocab_size`, `sequence_length` and `bytes_per_token`."""
        val = self.meta["splits"]["val"]
        return {**super().facts(), "bytes_per_token": val["bytes"] / val["tokens"]}

    def baselines(self, split: str) -> dict[str, float]:
        """Return the bits per byte of n-gram models on `split`; empty if the tokens are not bytes."""
        if self.choice.name != "bytes" or self.folder is None:
            return {}
        kind = token_type(self.meta["vocab_size"])
        train, held_out = (
            numpy.fromfile(self.folder / f"{part}.bin", kind).astype(numpy.uint8) for part in ("train", split)
        )
        return {f"bpb_{name}": bits_per_byte(train, held_out, order) for order, name in ((1, "unigram"), (3, "3gram"))}

    def end_of_text(self) -> int:
        """Return the token that ends a document, after `setup`."""
        return self.tokenizer().end_of_text

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens, after `setup`."""
        assert self.folder is not None, "call setup() first"
        return self.choice.load(self.folder)
