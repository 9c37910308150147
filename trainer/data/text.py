"""Text files as next-token windows; by default those of the running Python's standard library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.data.cache import prepared
from trainer.data.files import content_key, read_folder, split_files, standard_library
from trainer.data.prepared_tokens import PreparedText

FORMAT = 1
"""Version of the prepared folder's format, part of its name."""


class Text(PreparedText):
    """Next-token windows of text files, split by whole files.

    Batches: two `(batch, sequence_length)` int64 tensors, the tokens and the tokens one position later.

    Tokens are prepared once, in a cache folder named by content and settings.

    Args:
        batch_size: Global batch size.
        sequence_length: Tokens per window.
        root: A folder or a file; None: the standard library.
        patterns: Names of the files; None: `*.py` for the standard library, else `*`.
        tokenizer: `bytes`; `bpe`, trained on the training files; or the path of a `tokenizer.json`.
        vocab_size: Vocabulary size of `bpe`.
        held_out: Fraction of the files for each of val and test.
        cache: Folder for prepared data; None: `~/.cache/trainer`.
        document_mask: Whether positions attend only within their file; see `Transformer.document_end`.
        max_bytes: Maximum bytes of all texts; None: half of the memory that is available.
    """

    def __init__(
        self,
        batch_size: int = 32,
        sequence_length: int = 256,
        *,
        root: str | None = None,
        patterns: Sequence[str] | None = None,
        tokenizer: str = "bytes",
        vocab_size: int = 4096,
        held_out: float = 0.05,
        cache: str | None = None,
        document_mask: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        super().__init__(batch_size, sequence_length, cache, tokenizer, vocab_size, document_mask=document_mask)
        self.root = Path(root).expanduser() if root else standard_library()
        self.patterns = list(patterns) if patterns else (["*"] if root else ["*.py"])
        self.held_out, self.max_bytes = held_out, max_bytes

    def prepared_folder(self) -> Path:
        """Return the prepared folder. Always reads all files, because their content names the folder."""
        files = read_folder(self.root, self.patterns, self.max_bytes)

        def prepare(folder: Path) -> None:
            parts = split_files(files, self.held_out)
            self.write(
                folder,
                lambda split: (file.text for file in parts[split]),
                lambda split: {"files": [file.name for file in parts[split]]},
            )

        key = content_key(files, FORMAT, *self.choice.key(), self.held_out)
        return prepared(self.cache / f"text-{key}", prepare)
