"""A column of texts and a column of labels, in tables on disk: one class per text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.core.errors import UserError
from trainer.data.arrays import ArrayDataModule, Arrays
from trainer.data.cache import cache_root, prepared
from trainer.data.files import SPLITS
from trainer.data.labels import read_labels, refuse_too_many
from trainer.data.prepared_tokens import META
from trainer.data.row_splits import rows_of_splits
from trainer.data.tables import Tables, class_names
from trainer.data.text_table import NAMED, Rows
from trainer.data.tokenizers import MAX_VOCABULARY, Tokenizer, TokenizerChoice, token_type
from trainer.data.untrusted import natural, read_object, shown
from trainer.tasks.classification import IGNORED

_log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the prepared folder's format, part of its name."""


class LabelledText(ArrayDataModule):
    """Labelled texts in tables on disk.

    Batches: `(batch, sequence_length)` int64 token ids, shorter texts padded with `pad_id`, and `(batch,)` int64
    classes.

    The prepared folder holds `{train,val,test}.bin`, `{train,val,test}-labels.npy` and `meta.json`: {"vocab_size",
    "pad_id", "classes", "splits": {split: {"rows", "cut", "of", "bad", "bad_names"}}}.

    Args:
        tables: The files.
        text: Column of texts.
        label: Column of classes.
        batch_size: Global batch size.
        sequence_length: Tokens per text; longer texts are truncated.
        tokenizer: As in `trainer.data.text.Text`.
        vocab_size: As in `trainer.data.text.Text`.
        held_out: Fraction of the rows for each of val and test that no file gives.
        max_bad: Rows per split without a usable label that are tolerated. They are skipped, as are texts that cannot be
            read.
        cache: Folder for prepared data; None: `~/.cache/trainer`.
    """

    default_task = "trainer.tasks.classification.Classification"
    provides: ClassVar[dict[str, Any]] = {
        "num_classes": None,
        "vocab_size": None,
        "sequence_length": "sequence_length",
        "pad_id": None,
    }

    def __init__(
        self,
        tables: Tables,
        text: str,
        label: str,
        *,
        batch_size: int,
        sequence_length: int,
        tokenizer: str,
        vocab_size: int,
        held_out: float,
        max_bad: int,
        cache: str | None,
    ) -> None:
        super().__init__(batch_size)
        self.tables, self.text, self.label = tables, text, label
        self.sequence_length, self.choice = sequence_length, TokenizerChoice(tokenizer, vocab_size)
        self.held_out, self.max_bad = held_out, max_bad
        self.cache = Path(cache).expanduser() if cache else cache_root()
        self.folder: Path | None = None
        self.meta: dict[str, Any] = {}
        self.classes: list[str] = []

    def prepare_data(self) -> None:
        """Tokenise the texts. Runs on one rank of each node; the others wait for it."""
        columns = (self.text, self.label, self.sequence_length, self.held_out, self.max_bad)
        key = self.tables.key(FORMAT, "classes", *columns, *self.choice.key())
        self.folder = self.folder or prepared(self.cache / f"table-{key}", self._prepare)

    def setup(self, stage: str | None = None) -> None:
        """Map the prepared tokens and build the dataset of each split, once."""
        if self.train is not None:
            return
        self.prepare_data()
        assert self.folder is not None
        path, again = self.folder / META, f"remove {shown(self.folder)}: the texts are then prepared again"
        self.meta = read_object(path, again)
        kind = token_type(natural(self.meta, path, "vocab_size", largest=MAX_VOCABULARY))
        natural(self.meta, path, "pad_id", largest=self.meta["vocab_size"] - 1)
        self.classes = class_names(self.meta.get("classes"), path)
        for split in SPLITS:
            # Memory-mapped: the ranks share one copy. Copy on write, because torch warns about read-only arrays.
            try:
                ids = numpy.memmap(self.folder / f"{split}.bin", kind, mode="c").reshape(-1, self.sequence_length)
                labels = numpy.asarray(numpy.load(self.folder / f"{split}-labels.npy", mmap_mode="c"), numpy.int64)
                if labels.shape != (len(ids),) or not ((labels >= 0) & (labels < len(self.classes))).all():
                    raise ValueError(f"{split}-labels.npy holds no class for each row")
            except (EOFError, OSError, ValueError) as error:
                raise UserError(f"{shown(self.folder)} is damaged: {shown(error)}", again) from None
            setattr(self, split, Arrays(torch.from_numpy(ids), torch.from_numpy(labels), _to_int64))

    def facts(self) -> dict[str, Any]:
        """Return `num_classes`, `vocab_size`, `sequence_length` and `pad_id`."""
        return {
            "num_classes": len(self.classes),
            "vocab_size": self.meta["vocab_size"],
            "sequence_length": self.sequence_length,
            "pad_id": self.meta["pad_id"],
        }

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that made the tokens, after `setup`."""
        assert self.folder is not None, "call setup() first"
        return self.choice.load(self.folder)

    def _prepare(self, folder: Path) -> None:
        labels = read_labels(self.tables, self.label)
        parts = rows_of_splits({split: len(numbers) for split, numbers in labels.numbers.items()}, self.held_out)
        rows = {split: Rows(self.tables, self.text, *parts[split]) for split in SPLITS}
        tokenizer = self.choice.make(folder, lambda: rows["train"].texts())
        splits = {
            split: self._write(folder, split, rows[split], labels.numbers[parts[split][0]][parts[split][1]], tokenizer)
            for split in SPLITS
        }
        meta = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.padding, "classes": labels.classes}
        (folder / META).write_text(json.dumps({**meta, "splits": splits}, indent=1))

    def _write(
        self, folder: Path, split: str, rows: Rows, labels: numpy.ndarray, tokenizer: Tokenizer
    ) -> dict[str, Any]:
        """Write the tokens and labels of a split; `labels` are those of `rows`, in their order."""
        kept_labels: list[int] = []
        unlabelled_names: list[str] = []
        num_unlabelled, num_cut = 0, 0
        with (folder / f"{split}.bin").open("wb") as file:
            for index, name, text in rows.named_texts():
                if labels[index] == IGNORED:
                    num_unlabelled += 1
                    if len(unlabelled_names) < NAMED:
                        unlabelled_names.append(name)
                    continue
                row = numpy.full(self.sequence_length, tokenizer.padding, token_type(tokenizer.vocab_size))
                ids, is_cut = tokenizer.whole(text, self.sequence_length)
                row[: len(ids)] = ids
                file.write(row.tobytes())
                kept_labels.append(labels[index])
                num_cut += is_cut
        report = rows.report(split)
        refuse_too_many(split, num_unlabelled, unlabelled_names, self.max_bad)
        if not kept_labels:
            fix = "add rows with a text and a label, or remove its file: data.held_out then takes rows of train"
            raise UserError(f"data.root={self.tables.root}: {split} has no usable row", fix)
        if num_cut:
            _log.warning(
                "%s: %d of %d texts truncated to %d tokens", split, num_cut, len(kept_labels), self.sequence_length
            )
        numpy.save(folder / f"{split}-labels.npy", numpy.array(kept_labels, numpy.int64))
        return {
            "rows": len(kept_labels),
            "cut": num_cut,
            "of": report["rows"],
            "bad": report["bad"] + num_unlabelled,
        } | {"bad_names": report["bad_names"] + unlabelled_names}


def _to_int64(ids: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    return ids.long()
