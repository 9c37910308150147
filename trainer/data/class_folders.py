"""Datasets with one folder per class, read file by file: images, audio recordings."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.core.errors import UserError
from trainer.data import locations
from trainer.data.arrays import EVALUATION_BATCH, ArrayDataModule
from trainer.data.files import SPLITS, split_by_name
from trainer.data.untrusted import shown
from trainer.tasks.classification import IGNORED

_log = logging.getLogger(__name__)

Reader = Callable[[Any], torch.Tensor]
"""Maps a path (or another reference to a sample) to the sample; raises OSError or ValueError when it is bad."""


class LabelledFiles(Dataset[tuple[torch.Tensor, int]]):
    """Files, or rows of files, and their classes.

    A sample that cannot be read is named in the log and replaced by zeros with the label `IGNORED`, so that the order
    of all other samples is unchanged.

    Args:
        files: References to the samples, and their classes.
        read: Reads a sample of shape `shape`.
        shape: Shape of a sample.
        max_bad: Bad samples per process; one more raises UserError.
        random: Whether `read` draws random numbers.
    """

    def __init__(
        self, files: Sequence[tuple[Any, int]], read: Reader, shape: Sequence[int], max_bad: int, random: bool
    ) -> None:
        self.files, self.read, self.shape, self.max_bad, self.random = files, read, tuple(shape), max_bad, random
        self.bad: set[Any] = set()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self.files[index]
        try:
            return self.read(path), label
        except (OSError, ValueError) as error:
            self._skip(path, error)
            return torch.zeros(self.shape), IGNORED

    def _skip(self, path: Any, error: Exception) -> None:
        if path in self.bad:
            return
        self.bad.add(path)
        _log.warning("skipped %s (%d so far): %s", shown(path), len(self.bad), shown(error))
        if len(self.bad) > self.max_bad:
            raise UserError(
                f"more than data.max_bad={self.max_bad} samples cannot be read; the latest is {shown(path)}",
                "repair or remove the files named in the log, or increase data.max_bad",
            )


class ClassFolders(ArrayDataModule, ABC):
    """Base class of data modules over `root/CLASS/FILE`, or over `root/{train,val,test}/CLASS/FILE`.

    The second layout is used when `root` has a folder `train` and one of the others. For each of validation and test
    that has no folder, `held_out` of each class is taken, by the hash of the file names.

    Args:
        root: The folder.
        batch_size: Global batch size.
        num_workers: Worker processes per rank.
        held_out: Fraction of the files of each class for each of validation and test, if no folder gives them.
        max_bad: Unreadable files per process that are tolerated.
    """

    default_task = "trainer.tasks.classification.Classification"
    suffixes: tuple[str, ...]

    def __init__(self, root: str, batch_size: int, *, num_workers: int, held_out: float, max_bad: int) -> None:
        super().__init__(batch_size)
        self.root = Path(root).expanduser()
        self.num_workers, self.held_out, self.max_bad = num_workers, held_out, max_bad
        self.classes: list[str] = []

    @abstractmethod
    def shape(self) -> list[int]:
        """Return the shape of a sample."""

    @abstractmethod
    def reader(self, training: bool) -> tuple[Reader, bool]:
        """Return the function that reads a sample, and whether it is random."""

    def setup(self, stage: str | None = None) -> None:
        """Find the files and build the dataset of each split, once."""
        if self.train is not None:
            return
        parts = self._parts()
        for split in SPLITS:
            read, random = self.reader(training=split == "train")
            setattr(self, split, LabelledFiles(parts[split], read, self.shape(), self.max_bad, random))

    def facts(self) -> dict[str, Any]:
        """Return `input_shape` and `num_classes`."""
        return {"input_shape": self.shape(), "num_classes": len(self.classes)}

    def _loader(self, dataset: Dataset[Any] | None, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        assert dataset is not None, "call setup() first"
        return DataLoader(
            dataset,
            batch_size=batch_size if shuffle else min(batch_size, EVALUATION_BATCH),
            shuffle=shuffle,
            drop_last=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def _parts(self) -> Mapping[str, Sequence[tuple[Any, int]]]:
        """Return the samples of each split with their classes, and set `classes`."""
        given = [split for split in SPLITS if (self.root / split).is_dir()]
        if "train" not in given or len(given) < 2:
            given = []
        first = self.root / "train" if given else self.root
        self.classes = sorted(folder.name for folder in _folders(first) if self._files(folder))
        if len(self.classes) < 2:
            raise UserError(
                f"data.root={self.root}: {len(self.classes)} folders with {', '.join(self.suffixes)} files (2 needed)",
                "put the files of each class into a folder named after the class",
            )
        parts: dict[str, list[tuple[Path, int]]] = {split: [] for split in SPLITS}
        for label, name in enumerate(self.classes):
            for split, paths in self._split(name, given).items():
                parts[split] += [(path, label) for path in paths]
        return parts

    def _split(self, name: str, given: list[str]) -> dict[str, list[Path]]:
        """Return the files of a class by split; `given` lists the splits that have a folder."""
        parts = {split: self._files(self.root / split / name) for split in given}
        missing = [split for split in SPLITS if split not in given]
        if not missing:
            return parts
        paths = parts.get("train", []) if given else self._files(self.root / name)
        if len(paths) < len(SPLITS):
            raise UserError(
                f"data.root={self.root}: class {shown(name)} has {len(paths)} files, too few for a held-out split",
                f"add files, or make the folders {', '.join(SPLITS)} yourself",
            )
        divided = split_by_name(paths, lambda path: path.relative_to(self.root).as_posix(), self.held_out)
        held_out = {path for split in missing if split != "train" for path in divided[split]}
        rest = [path for path in paths if path not in held_out]
        return {**parts, "train": rest, **{split: divided[split] for split in missing if split != "train"}}

    def _files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes)


def _folders(root: Path) -> list[Path]:
    return [
        path for path in locations.class_folders(str(root)).iterdir() if path.is_dir() and not path.name.startswith(".")
    ]
