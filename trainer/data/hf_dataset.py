"""Hugging Face datasets on disk: text, token ids, labelled texts or labelled images, by the names of their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.core.errors import UserError
from trainer.core.near import listed
from trainer.data.arrays import ArrayDataModule
from trainer.data.image_table import ImageTable
from trainer.data.images import MAX_PIXELS
from trainer.data.labelled_text import LabelledText
from trainer.data.tables import IDS, IMAGES, LABELS, TEXTS, Tables, find_tables, require_column, require_one_kind
from trainer.data.text_table import TextTable, TokenTable


@dataclass(frozen=True)
class Columns:
    """Columns of token ids, of images and labels, or of texts and perhaps labels."""

    text: str | None = None
    ids: str | None = None
    image: str | None = None
    label: str | None = None


def hf_dataset(
    root: str,
    *,
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
    document_mask: bool = False,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int | None = None,
) -> ArrayDataModule:
    """Return the data module for a folder: what `save_to_disk` wrote, or Parquet or Arrow files.

    One of `text_column`, `ids_column` and `image_column` (with `label_column`) selects what is read. If all are None,
    the first of `IDS`, `IMAGES` with `LABELS`, and `TEXTS` that exists is taken. Text with a `label_column` is
    classified.

    Args:
        root: The folder.
        text_column: Column of texts.
        ids_column: Column of token id lists.
        image_column: Column of images.
        label_column: Column of classes.
        batch_size: Global batch size.
        num_workers: Worker processes per rank that decode images.
        sequence_length: Tokens per sample.
        tokenizer: As in `trainer.data.text.Text`.
        vocab_size: As in `trainer.data.text.Text`.
        size: Height and width of an image, as in `trainer.data.image_folder.ImageFolder`.
        augment: As in `trainer.data.image_folder.ImageFolder`.
        grey: As in `trainer.data.image_folder.ImageFolder`.
        mirror: As in `trainer.data.image_folder.ImageFolder`.
        held_out: Fraction of the rows for each of val and test that no file gives.
        max_bad: Unreadable images, or rows without a usable label, that are tolerated.
        cache: Folder for prepared data; None: `~/.cache/trainer`.
        document_mask: For language modelling: whether positions attend only within their row's text, or within the
            documents that token ids end with the tokenizer's end-of-text token.
        max_pixels: As in `trainer.data.image_folder.ImageFolder`.
        max_bytes: Maximum bytes that a column of a row group unpacks to; None: half of the memory that is available.

    Returns:
        A `TokenTable`, `ImageTable`, `LabelledText` or `TextTable`.

    Raises:
        UserError: The folder or a column does not exist, or the columns do not say what to read.
    """
    tables = find_tables(Path(root).expanduser(), max_bytes)
    columns = _choose(tables, Columns(text_column, ids_column, image_column, label_column))
    common: dict[str, Any] = {"batch_size": batch_size, "held_out": held_out, "cache": cache}
    if document_mask and (columns.image is not None or columns.label is not None):
        problem = "data.document_mask=true: these columns hold samples, and no sequences of several documents"
        raise UserError(problem, "remove it")
    if columns.ids is not None:
        common["document_mask"] = document_mask
        path = None if tokenizer in ("bytes", "bpe") else tokenizer
        return TokenTable(tables, columns.ids, sequence_length=sequence_length, tokenizer=path, **common)
    if columns.image is not None and columns.label is not None:
        common |= {"num_workers": num_workers, "max_bad": max_bad}
        common |= {"size": size, "augment": augment, "grey": grey, "mirror": mirror, "max_pixels": max_pixels}
        return ImageTable(tables, columns.image, columns.label, **common)
    assert columns.text is not None
    common |= {"sequence_length": sequence_length, "tokenizer": tokenizer, "vocab_size": vocab_size}
    if columns.label is not None:
        return LabelledText(tables, columns.text, columns.label, max_bad=max_bad, **common)
    return TextTable(tables, columns.text, document_mask=document_mask, **common)


def _choose(tables: Tables, given: Columns) -> Columns:
    """Return the columns to read, for those that the options name. Raises UserError."""
    existing = tables.columns()
    require_one_kind({"text_column": given.text, "ids_column": given.ids, "image_column": given.image})
    named = given.text or given.ids or given.image
    ids = _column("ids_column", given.ids, IDS if not named else (), existing)
    if ids and given.label is not None:
        problem = f"data.label_column={given.label}: token ids ({ids}) cannot be classified"
        raise UserError(problem, "set data.text_column=NAME")
    if ids:
        return Columns(ids=ids)
    image = _column("image_column", given.image, IMAGES if not named else (), existing)
    if image:
        label = _column("label_column", given.label, LABELS, existing)
        if label is None:
            raise UserError(f"data.root={tables.root}: images ({image}) but no labels", _fix("label_column", existing))
        return Columns(image=image, label=label)
    text = _column("text_column", given.text, TEXTS, existing)
    if text is None:
        raise UserError(f"data.root={tables.root}: no column has a known name", _fix("text_column", existing))
    return Columns(text=text, label=_column("label_column", given.label, (), existing))


def _column(key: str, given: str | None, usual: Sequence[str], columns: Sequence[str]) -> str | None:
    if given is None:
        return next((name for name in usual if name in columns), None)
    return require_column(key, given, columns)


def _fix(key: str, columns: Sequence[str]) -> str:
    return f"set data.{key}=NAME; the columns are {listed(columns)}"
