"""Text files, as next-token windows. Without a path: the running Python's own standard library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.data.cache import prepared
from trainer.data.files import content_key, read_folder, split_files, standard_library
from trainer.data.prepared_tokens import PreparedText

FORMAT = 1
"""Of the prepared folder; part of its name."""


class Text(PreparedText):
    """Batches of two (n, sequence_length) int64 tensors: tokens, and the tokens that follow them.

    Split by whole files. Tokens are prepared once, in a folder of the cache that is named by content and settings.
    """

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
        super().__init__(batch_size, sequence_length, cache, tokenizer, vocab_size)
        self.root = Path(root).expanduser() if root else standard_library()
        self.patterns = list(patterns) if patterns else (["*"] if root else ["*.py"])
        self.held_out = held_out

    def prepared_folder(self) -> Path:
        """Reads all the files again where another process prepared them: their content names the folder."""
        files = read_folder(self.root, self.patterns)

        def prepare(folder: Path) -> None:
            parts = split_files(files, self.held_out)
            self.write(
                folder,
                lambda split: (file.text for file in parts[split]),
                lambda split: {"files": [file.name for file in parts[split]]},
            )

        key = content_key(files, FORMAT, *self.choice.key(), self.held_out)
        return prepared(self.cache / f"text-{key}", prepare)
