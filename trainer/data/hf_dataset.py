"""Hugging Face datasets on disk: text, token ids, texts or pictures with labels, by the names of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.core.errors import UserError
from trainer.core.near import listed
from trainer.data.arrays import ArrayDataModule
from trainer.data.image_table import ImageTable
from trainer.data.labelled_text import LabelledText
from trainer.data.tables import IDS, IMAGES, LABELS, TEXTS, find_tables, require_column, require_one_kind
from trainer.data.text_table import TextTable, TokenTable


def hf_dataset(
    root: str,
    text_column: str | None = None,
    ids_column: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    sequence_length: int = 256,
    tokenizer: str = "bytes",
    vocab_size: int = 4096,
    size: int = 64,
    augment: bool = True,
    grey: bool = False,
    mirror: bool = True,
    held_out: float = 0.05,
    max_bad: int = 100,
    cache: str | None = None,
) -> ArrayDataModule:
    """The data module for what is in the folder `root`: what `save_to_disk` wrote, or Parquet or Arrow files.

    One of `text_column`, `ids_column` and `image_column` (with `label_column`) says what is read; null: the first of
    `IDS`, `IMAGES` with `LABELS`, `TEXTS` that is there. Text takes `sequence_length`, `tokenizer` and `vocab_size` as
    `trainer.data.text` does, and is classified where `label_column` is given; pictures take `size` to `mirror` as
    `trainer.data.image_folder` does. `max_bad`: pictures, and rows without a usable label. `held_out`: fraction of the
    rows for each of val and test that no file gives. `cache`: folder; null: `~/.cache/trainer`. Raises UserError.
    """
    tables = find_tables(Path(root).expanduser())
    there = tables.columns()
    require_one_kind({"text_column": text_column, "ids_column": ids_column, "image_column": image_column})
    named = text_column or ids_column or image_column
    ids = _column("ids_column", ids_column, IDS if not named else (), there)
    if ids and label_column is not None:
        raise UserError(
            f"data.label_column={label_column}: token ids ({ids}) are not classified", "name the text column"
        )
    if ids:
        path = None if tokenizer in ("bytes", "bpe") else tokenizer
        return TokenTable(tables, ids, batch_size, sequence_length, path, held_out, cache)
    image = _column("image_column", image_column, IMAGES if not named else (), there)
    if image:
        label = _column("label_column", label_column, LABELS, there)
        if label is None:
            raise UserError(f"data.root={root} has pictures ({image}) and no labels", _fix("label_column", there))
        return ImageTable(
            tables, image, label, batch_size, num_workers, size, augment, grey, mirror, held_out, max_bad, cache
        )
    text = _column("text_column", text_column, TEXTS, there)
    if text and label_column is not None:
        label = _column("label_column", label_column, (), there)
        assert label is not None
        words = (sequence_length, tokenizer, vocab_size)
        return LabelledText(tables, text, label, batch_size, *words, held_out, max_bad, cache)
    if text:
        return TextTable(tables, text, batch_size, sequence_length, tokenizer, vocab_size, held_out, cache)
    raise UserError(f"data.root={root}: no column has a usual name", _fix("text_column", there))


def _column(key: str, given: str | None, usual: Sequence[str], there: Sequence[str]) -> str | None:
    if given is None:
        return next((name for name in usual if name in there), None)
    return require_column(key, given, there)


def _fix(key: str, there: Sequence[str]) -> str:
    return f"name it: data.{key}=NAME; there are {listed(there)}"
