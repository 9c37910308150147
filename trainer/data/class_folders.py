"""Files in a folder a class, read one by one: pictures, recordings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from trainer.core.errors import UserError
from trainer.data import locations
from trainer.data.arrays import EVALUATION_BATCH, ArrayDataModule
from trainer.data.files import SPLITS, split_by_name
from trainer.tasks.classification import IGNORED

_log = logging.getLogger(__name__)

Read = Callable[[Any], torch.Tensor]
"""Path (or what else names the sample) to the sample; raises OSError or ValueError where it is bad."""


class LabelledFiles(Dataset[tuple[torch.Tensor, int]]):
    """Files, or rows of them, and their classes. One that cannot be read is named in the log and becomes zeros with
    the label `IGNORED`, so that the order of all others stays; more than `max_bad` in a process is an error."""

    def __init__(
        self, files: Sequence[tuple[Any, int]], read: Read, shape: Sequence[int], max_bad: int, random: bool
    ) -> None:
        """`random`: whether `read` draws random numbers."""
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
        _log.warning("left out %s (%d so far): %s", path, len(self.bad), error)
        if len(self.bad) > self.max_bad:
            raise UserError(
                f"more than data.max_bad={self.max_bad} samples cannot be read, the last one {path}",
                "mend or remove those that the log names, or raise data.max_bad",
            )


class ClassFolders(ArrayDataModule):
    """Base of modules over `root/CLASS/FILE`, or over `root/{train,val,test}/CLASS/FILE` where it has `train` and
    one of the others.

    For each of val and test that has no folder, `held_out` of each class are taken, by the hash of the names.
    """

    default_task = "trainer.tasks.classification.Classification"
    suffixes: tuple[str, ...]

    def __init__(self, root: str, batch_size: int, num_workers: int, held_out: float, max_bad: int) -> None:
        super().__init__(batch_size)
        self.root = Path(root).expanduser()
        self.num_workers, self.held_out, self.max_bad = num_workers, held_out, max_bad
        self.classes: list[str] = []

    def shape(self) -> list[int]:
        """Of a sample."""
        raise NotImplementedError

    def reader(self, training: bool) -> tuple[Read, bool]:
        """How a file is read, and whether that is random."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.train is not None:
            return
        parts = self._parts()
        for split in SPLITS:
            read, random = self.reader(training=split == "train")
            setattr(self, split, LabelledFiles(parts[split], read, self.shape(), self.max_bad, random))

    def facts(self) -> dict[str, Any]:
        return {"input_shape": self.shape(), "num_classes": len(self.classes)}

    def _loader(self, dataset: Dataset[Any] | None, batch_size: int, shuffle: bool = False) -> DataLoader[Any]:
        assert dataset is not None, "setup() comes first"
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
        """The samples of each split and their classes; sets `classes`."""
        given = [split for split in SPLITS if (self.root / split).is_dir()]
        if "train" not in given or len(given) < 2:
            given = []
        first = self.root / "train" if given else self.root
        self.classes = sorted(folder.name for folder in _folders(first) if self._files(folder))
        if len(self.classes) < 2:
            raise UserError(
                f"data.root={self.root} has {len(self.classes)} folders with {', '.join(self.suffixes)} files",
                "put the files of each class into a folder named by the class",
            )
        parts: dict[str, list[tuple[Path, int]]] = {split: [] for split in SPLITS}
        for label, name in enumerate(self.classes):
            for split, paths in self._split(name, given).items():
                parts[split] += [(path, label) for path in paths]
        return parts

    def _split(self, name: str, given: list[str]) -> dict[str, list[Path]]:
        """The files of a class. `given`: the splits that are folders."""
        parts = {split: self._files(self.root / split / name) for split in given}
        missing = [split for split in SPLITS if split not in given]
        if not missing:
            return parts
        paths = parts.get("train", []) if given else self._files(self.root / name)
        if len(paths) < len(SPLITS):
            raise UserError(
                f"class {name} of data.root={self.root} has {len(paths)} files: too few to hold some out",
                f"add some, or make the folders {', '.join(SPLITS)} yourself",
            )
        divided = split_by_name(paths, lambda path: path.relative_to(self.root).as_posix(), self.held_out)
        taken = {path for split in missing if split != "train" for path in divided[split]}
        rest = [path for path in paths if path not in taken]
        return {**parts, "train": rest, **{split: divided[split] for split in missing if split != "train"}}

    def _files(self, folder: Path) -> list[Path]:
        return sorted(path for path in folder.rglob("*") if path.suffix.lower() in self.suffixes)


def _folders(root: Path) -> list[Path]:
    return [
        path for path in locations.class_folders(str(root)).iterdir() if path.is_dir() and not path.name.startswith(".")
    ]
