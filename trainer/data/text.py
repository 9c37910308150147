"""Text files, as next-token windows. Without a path: the running Python's own standard library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from trainer.data.arrays import ArrayDataModule
from trainer.data.cache import cache_root, prepared
from trainer.data.files import SPLITS, content_key, read_folder, split_files, standard_library
from trainer.data.tokenizers import BytePairs, Bytes, Tokenizer, token_type, write_tokens
from trainer.data.tokens import TokenWindows, evaluation_windows
from trainer.errors import UserError

FORMAT = 1
"""Of the prepared folder; part of its name."""


class Text(ArrayDataModule):
    """Batches of two (n, sequence_length) int64 tensors: tokens, and the tokens that follow them.

    Split by whole files. Tokens are prepared once, in a folder of the cache that is named by content and
    settings: `{train,val,test}.bin`, `meta.json`, and `tokenizer.json` for byte pairs.
    """

    default_task = "trainer.tasks.language_modelling.LanguageModelling"

    def __init__(
        self,
        batch_size: int = 32,
        sequence_length: int = 256,
        root: str | None = None,
        patterns: Sequence[str] | None = None,
        tokenizer: str = "bytes",
        vocab_size: int = 4096,
        held_out: float = 0.05,
        cache: str | None = None,
    ) -> None:
        """`root`: a folder or a file; null: the standard library. `patterns`: null: `*.py` there, `*` elsewhere.

        `tokenizer`: bytes, bpe with `vocab_size` ids trained on the training files, or the path of a
        tokenizer.json. `held_out`: fraction of the files for each of val and test. `cache`: folder; null:
        `~/.cache/trainer`.
        """
        super().__init__(batch_size)
        self.given_tokenizer = None if tokenizer in ("bytes", "bpe") else Path(tokenizer).expanduser()
        if self.given_tokenizer is not None and not self.given_tokenizer.is_file():
            raise UserError(
                f"data.tokenizer={tokenizer} is not known", "use bytes, bpe or the path of a tokenizer.json"
            )
        self.sequence_length = sequence_length
        self.evaluation_batch = evaluation_windows(sequence_length)
        self.root = Path(root).expanduser() if root else standard_library()
        self.patterns = list(patterns) if patterns else (["*"] if root else ["*.py"])
        self.tokenizer_name, self.vocab_size, self.held_out = tokenizer, vocab_size, held_out
        self.cache = Path(cache).expanduser() if cache else cache_root()
        self.folder: Path | None = None
        self.meta: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """On one rank of each machine; the others wait for it."""
        self.folder = self._prepared()

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        self.folder = self._prepared()
        self.meta = json.loads((self.folder / "meta.json").read_text())
        kind = token_type(self.meta["vocab_size"])
        self.train, self.val, self.test = (
            TokenWindows([self.folder / f"{split}.bin"], self.sequence_length, kind) for split in SPLITS
        )

    def facts(self) -> dict[str, Any]:
        val = self.meta["splits"]["val"]
        return {
            "vocab_size": self.meta["vocab_size"],
            "sequence_length": self.sequence_length,
            "bytes_per_token": val["bytes"] / val["tokens"],
        }

    def baselines(self, split: str) -> dict[str, float]:
        """Bits a byte on `split` of models that count; empty where the tokens are not bytes."""
        from trainer.data.ngram import bits_per_byte

        if self.tokenizer_name != "bytes" or self.folder is None:
            return {}
        kind = token_type(self.meta["vocab_size"])
        train, held_out = (
            numpy.fromfile(self.folder / f"{part}.bin", kind).astype(numpy.uint8) for part in ("train", split)
        )
        return {f"bpb_{name}": bits_per_byte(train, held_out, order) for order, name in ((1, "unigram"), (3, "3gram"))}

    def tokenizer(self) -> Tokenizer:
        """The one that the tokens were made with, after `setup`."""
        assert self.folder is not None, "setup() comes first"
        return Bytes() if self.tokenizer_name == "bytes" else BytePairs(self.folder / "tokenizer.json")

    def _prepared(self) -> Path:
        """Reads all the files again where another process prepared them: their content names the folder."""
        if self.folder is not None:
            return self.folder
        files = read_folder(self.root, self.patterns)
        vocab_size = Bytes.vocab_size if self.tokenizer_name == "bytes" else self.vocab_size
        name = self.given_tokenizer.read_bytes() if self.given_tokenizer else self.tokenizer_name
        key = content_key(files, FORMAT, name, vocab_size, self.held_out)

        def prepare(folder: Path) -> None:
            parts = split_files(files, self.held_out)
            tokenizer: Tokenizer = Bytes()
            if self.tokenizer_name == "bpe":
                texts = (file.text for file in parts["train"])
                tokenizer = BytePairs.train(texts, vocab_size, folder / "tokenizer.json")
            elif self.given_tokenizer is not None:
                shutil.copyfile(self.given_tokenizer, folder / "tokenizer.json")
                tokenizer = BytePairs(self.given_tokenizer)
            splits = {}
            for split, part in parts.items():
                tokens, length = write_tokens(folder / f"{split}.bin", (file.text for file in part), tokenizer)
                splits[split] = {"tokens": tokens, "bytes": length, "files": [file.name for file in part]}
            meta = {"vocab_size": tokenizer.vocab_size, "splits": splits}
            (folder / "meta.json").write_text(json.dumps(meta, indent=1))

        return prepared(self.cache / f"text-{key}", prepare)
