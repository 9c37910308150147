"""A column of texts and one of labels, in tables on disk: one class for each text."""

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
from trainer.data.tables import Tables
from trainer.data.text_table import NAMED, Rows
from trainer.data.tokenizers import Tokenizer, TokenizerChoice, token_type
from trainer.tasks.classification import IGNORED

_log = logging.getLogger(__name__)

FORMAT = 1
"""Of the prepared folder; part of its name."""


class LabelledText(ArrayDataModule):
    """Batches of (n, sequence_length) int64 token ids, shorter texts filled up with `pad_id`, and (n,) int64 classes.

    The prepared folder holds `{train,val,test}.bin`, `{train,val,test}-labels.npy` and `meta.json`: {"vocab_size",
    "pad_id", "classes", "splits": {split: {"rows", "cut", "of", "bad", "bad_names"}}}.
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
        batch_size: int,
        sequence_length: int,
        tokenizer: str,
        vocab_size: int,
        held_out: float,
        max_bad: int,
        cache: str | None,
    ) -> None:
        """`text`, `label`: the columns. Longer texts are cut to `sequence_length`. `max_bad`: rows of a split whose
        label is none of the classes; they are left out, as are texts that cannot be read."""
        super().__init__(batch_size)
        self.tables, self.text, self.label = tables, text, label
        self.sequence_length, self.choice = sequence_length, TokenizerChoice(tokenizer, vocab_size)
        self.held_out, self.max_bad = held_out, max_bad
        self.cache = Path(cache).expanduser() if cache else cache_root()
        self.folder: Path | None = None
        self.meta: dict[str, Any] = {}
        self.classes: list[str] = []

    def prepare_data(self) -> None:
        """On one rank of each machine; the others wait for it."""
        columns = (self.text, self.label, self.sequence_length, self.held_out, self.max_bad)
        key = self.tables.key(FORMAT, "classes", *columns, *self.choice.key())
        self.folder = self.folder or prepared(self.cache / f"table-{key}", self._prepare)

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        self.prepare_data()
        assert self.folder is not None
        self.meta = json.loads((self.folder / META).read_text())
        self.classes = self.meta["classes"]
        kind = token_type(self.meta["vocab_size"])
        for split in SPLITS:
            # Mapped: the ranks share one copy. Copy on write, because torch warns of what it may not write to.
            ids = numpy.memmap(self.folder / f"{split}.bin", kind, mode="c").reshape(-1, self.sequence_length)
            labels = numpy.load(self.folder / f"{split}-labels.npy")
            setattr(self, split, Arrays(torch.from_numpy(ids), torch.from_numpy(labels), _widened))

    def facts(self) -> dict[str, Any]:
        return {
            "num_classes": len(self.classes),
            "vocab_size": self.meta["vocab_size"],
            "sequence_length": self.sequence_length,
            "pad_id": self.meta["pad_id"],
        }

    def tokenizer(self) -> Tokenizer:
        """The one that the tokens were made with, after `setup`."""
        assert self.folder is not None, "setup() comes first"
        return self.choice.load(self.folder)

    def _prepare(self, folder: Path) -> None:
        labels = read_labels(self.tables, self.label)
        parts = rows_of_splits({split: len(one) for split, one in labels.numbers.items()}, self.held_out)
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
        """`labels`: of `rows`, in their order."""
        kept: list[int] = []
        unlabelled: list[str] = []
        without, cut = 0, 0
        with (folder / f"{split}.bin").open("wb") as file:
            for place, name, text in rows.named_texts():
                if labels[place] == IGNORED:
                    without += 1
                    if len(unlabelled) < NAMED:
                        unlabelled.append(name)
                    continue
                row = numpy.full(self.sequence_length, tokenizer.padding, token_type(tokenizer.vocab_size))
                ids, was_cut = tokenizer.whole(text, self.sequence_length)
                row[: len(ids)] = ids
                file.write(row.tobytes())
                kept.append(labels[place])
                cut += was_cut
        report = rows.report(split)
        refuse_too_many(split, without, unlabelled, self.max_bad)
        if not kept:
            fix = "give it rows with a text and a label, or leave its file out: data.held_out takes some of the others"
            raise UserError(f"data.root={self.tables.root}: {split} has no row that can be used", fix)
        if cut:
            _log.warning("%s: %d of %d texts are cut to %d tokens", split, cut, len(kept), self.sequence_length)
        numpy.save(folder / f"{split}-labels.npy", numpy.array(kept, numpy.int64))
        return {"rows": len(kept), "cut": cut, "of": report["rows"], "bad": report["bad"] + without} | {
            "bad_names": report["bad_names"] + unlabelled
        }


def _widened(ids: torch.Tensor, indices: torch.Tensor, epoch: int) -> torch.Tensor:
    return ids.long()
