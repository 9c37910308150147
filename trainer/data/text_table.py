"""A column of text, or of token ids, in tables on disk, as next-token windows."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from trainer.core.errors import UserError
from trainer.data.cache import prepared
from trainer.data.files import SPLITS, not_text
from trainer.data.prepared_tokens import META, PreparedText, PreparedTokens
from trainer.data.row_splits import rows_of_splits
from trainer.data.tables import Tables, column_of, num_rows, pyarrow
from trainer.data.tokenizers import MAX_VOCABULARY, BytePairs, token_type
from trainer.data.untrusted import require_within, shown

_log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the prepared folder's format, part of its name."""
NAMED = 100
"""Bad rows that are kept by name; all are counted."""
_ROW_BYTES = 32
"""Memory that a row takes in the choice of splits. A header may promise any number of rows."""


class Rows:
    """The rows of a split, read one by one, and which of them were bad.

    Args:
        tables: The files.
        column: Name of the column.
        source: The split whose files hold the rows.
        numbers: Sorted row numbers in these files.
    """

    def __init__(self, tables: Tables, column: str, source: str, numbers: numpy.ndarray) -> None:
        self.files, self.column, self.numbers = tables.files[source], column, numbers
        self.max_bytes = tables.max_bytes
        self.bad = 0
        self.bad_names: list[str] = []

    def chunks(self) -> Iterator[tuple[Any, list[str]]]:
        """Yield pyarrow arrays of the next rows with their names, `file:row`."""
        self.bad, self.bad_names = 0, []
        done = 0
        for path, first, chunk in column_of(self.files, self.column, self.max_bytes):
            begin, end = numpy.searchsorted(self.numbers, [done, done + len(chunk)])
            mine = self.numbers[begin:end] - done
            done += len(chunk)
            if len(mine):
                yield chunk.take(pyarrow().array(mine)), [f"{path}:{first + row}" for row in mine.tolist()]

    def skip(self, name: str, reason: str) -> None:
        """Count a bad row."""
        self.bad += 1
        if len(self.bad_names) < NAMED:
            self.bad_names.append(f"{shown(name)} ({reason})")

    def texts(self) -> Iterator[bytes]:
        """Yield texts as UTF-8. Rows that are null, empty, binary or not UTF-8 are skipped and counted."""
        return (text for _, _, text in self.named_texts())

    def named_texts(self) -> Iterator[tuple[int, str, bytes]]:
        """Yield (index in `numbers`, name, text) of the same rows as `texts`."""
        index = -1
        for chunk, names in self.chunks():
            for name, value in zip(names, chunk.to_pylist(), strict=True):
                index += 1
                if value is not None and not isinstance(value, (str, bytes)):
                    fix = "use another column: data.text_column=NAME"
                    raise UserError(f"{name}: column {self.column} holds {chunk.type}, not text", fix)
                text = value.encode() if isinstance(value, str) else value or b""
                reason = "null" if value is None else not_text(text.strip())
                if reason:
                    self.skip(name, reason)
                else:
                    yield index, name, text

    def ids(self) -> Iterator[numpy.ndarray]:
        """Yield the token ids of many rows at a time, int64 of shape `(tokens,)`.

        Rows that are null or empty are skipped and counted.
        """
        for chunk, names in self.chunks():
            if not hasattr(chunk.type, "value_type"):
                fix = "use another column: data.ids_column=NAME"
                raise UserError(f"{names[0]}: column {self.column} holds {chunk.type}, not lists of token ids", fix)
            lengths = pyarrow().compute.list_value_length(chunk)
            for name, length in zip(names, lengths.to_pylist(), strict=True):
                if not length:
                    self.skip(name, "null" if length is None else "empty")
            values = chunk.flatten()
            ids = values.to_numpy(zero_copy_only=False)
            if values.null_count or ids.dtype.kind not in "iu" or (len(ids) and ids.min() < 0):
                fix = "use another column: data.ids_column=NAME, or tokenize the texts again"
                raise UserError(f"{names[0]} or a row after it holds values that are no token ids", fix)
            yield ids.astype(numpy.int64)

    def report(self, split: str) -> dict[str, Any]:
        """Log the bad rows, after the rows were read, and return the entries for `meta.json`."""
        if self.bad:
            _log.warning(
                "%s: skipped %d of %d rows: %s", split, self.bad, len(self.numbers), ", ".join(self.bad_names[:20])
            )
        return {"rows": len(self.numbers), "bad": self.bad, "bad_names": self.bad_names}


class TextTable(PreparedText):
    """Next-token windows of a column of texts; each row is a document.

    Batches: two `(batch, sequence_length)` int64 tensors, the tokens and the tokens one position later.

    Args:
        tables: The files.
        column: Column of texts.
        batch_size: Global batch size.
        sequence_length: Tokens per window.
        tokenizer: As in `trainer.data.text.Text`.
        vocab_size: As in `trainer.data.text.Text`.
        held_out: Fraction of the rows for each of val and test that no file gives.
        cache: Folder for prepared data; None: `~/.cache/trainer`.
        document_mask: Whether positions attend only within their row; see `Transformer.document_end`.
    """

    def __init__(
        self,
        tables: Tables,
        column: str,
        *,
        batch_size: int,
        sequence_length: int,
        tokenizer: str,
        vocab_size: int,
        held_out: float,
        cache: str | None,
        document_mask: bool = False,
    ) -> None:
        super().__init__(batch_size, sequence_length, cache, tokenizer, vocab_size, document_mask=document_mask)
        self.tables, self.column, self.held_out = tables, column, held_out

    def prepared_folder(self) -> Path:
        """Return the prepared folder, after filling it if it does not exist."""

        def prepare(folder: Path) -> None:
            rows = _rows(self.tables, self.column, self.held_out)
            self.write(folder, lambda split: rows[split].texts(), lambda split: rows[split].report(split))

        key = self.tables.key(FORMAT, "text", self.column, self.held_out, *self.choice.key())
        return prepared(self.cache / f"table-{key}", prepare)


class TokenTable(PreparedTokens):
    """Next-token windows of a column of token id lists, which are concatenated unchanged.

    Batches: two `(batch, sequence_length)` int64 tensors, the tokens and the tokens one position later.

    Args:
        tables: The files.
        column: Column of token id lists.
        batch_size: Global batch size.
        sequence_length: Tokens per window.
        tokenizer: The `tokenizer.json` of the ids; None: the vocabulary size is that of the largest id.
        held_out: Fraction of the rows for each of val and test that no file gives.
        cache: Folder for prepared data; None: `~/.cache/trainer`.
        document_mask: Whether positions attend only within their document, which the tokenizer's end-of-text token
            ends in the ids; see `Transformer.document_end`.
    """

    def __init__(
        self,
        tables: Tables,
        column: str,
        *,
        batch_size: int,
        sequence_length: int,
        tokenizer: str | None,
        held_out: float,
        cache: str | None,
        document_mask: bool = False,
    ) -> None:
        super().__init__(batch_size, sequence_length, cache, document_mask)
        self.tables, self.column, self.held_out, self.tokenizer_path = tables, column, held_out, tokenizer

    def prepared_folder(self) -> Path:
        """Return the prepared folder, after filling it if it does not exist."""
        path = self.tokenizer_path
        known = BytePairs(Path(path).expanduser()).vocab_size if path else None
        key = self.tables.key(FORMAT, "ids", self.column, self.held_out, known)
        return prepared(self.cache / f"table-{key}", lambda folder: self._write(folder, known))

    def end_of_text(self) -> int:
        """Return the end-of-text token of the tokenizer.

        Raises:
            UserError: There is no tokenizer.
        """
        if self.tokenizer_path is None:
            fix = "set data.tokenizer=FILE, the tokenizer.json that made the ids"
            raise UserError("data.document_mask=true: the ids do not say which of them ends a document", fix)
        return BytePairs(Path(self.tokenizer_path).expanduser()).end_of_text

    def _write(self, folder: Path, vocab_size: int | None) -> None:
        rows = _rows(self.tables, self.column, self.held_out)
        needed = 1 + max(int(ids.max(initial=0)) for split_rows in rows.values() for ids in split_rows.ids())
        if needed > MAX_VOCABULARY:
            fix = "use another column: data.ids_column=NAME"
            raise UserError(f"column {self.column} holds the id {needed - 1}; a model has a row for each", fix)
        if vocab_size is not None and needed > vocab_size:
            fix = "use the tokenizer that made them, or data.tokenizer=bytes to take the vocabulary size from the ids"
            raise UserError(f"data.tokenizer has {vocab_size} ids, but {self.column} holds id {needed - 1}", fix)
        kind = token_type(vocab_size or needed)
        splits = {}
        for split, split_rows in rows.items():
            tokens = 0
            with (folder / f"{split}.bin").open("wb") as file:
                for ids in split_rows.ids():
                    file.write(ids.astype(kind).tobytes())
                    tokens += len(ids)
            splits[split] = {"tokens": tokens, **split_rows.report(split)}
        (folder / META).write_text(json.dumps({"vocab_size": vocab_size or needed, "splits": splits}, indent=1))


def _rows(tables: Tables, column: str, held_out: float) -> dict[str, Rows]:
    counts = {split: sum(num_rows(path) for path in paths) for split, paths in tables.files.items()}
    require_within(f"the list of rows of {tables.root}", _ROW_BYTES * sum(counts.values()), tables.max_bytes)
    parts = rows_of_splits(counts, held_out)
    return {split: Rows(tables, column, *parts[split]) for split in SPLITS}
