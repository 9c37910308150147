"""`self.logger` if nothing is tracked: what a module logs beside scalars becomes files in the run directory.

The methods are those of Lightning's WandbLogger, with the same conversions: the same module runs with W&B and without.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only

from trainer.runs.directory import RunDirectory

_UNFIT = re.compile(r"[^\w.+-]+")


class MediaFiles:
    """Writes media and tables to `media/KEY/step-00000010-0.png` in the run directory. It never raises.

    Args:
        folder: The run directory.
        completed_steps: Returns the completed optimizer steps.
    """

    def __init__(self, folder: Path, completed_steps: Callable[[], int]) -> None:
        self._folder = folder / "media"
        self._completed_steps = completed_steps
        self._has_warned = False

    def write(self, key: str, make: Callable[[], Any], step: int | None = None) -> None:
        """Write what `make` returns: an object of `wandb.Image`, `Table`, ..., or a list of them.

        Args:
            key: The name under which it is logged; `/` makes folders.
            make: Builds the object. What it raises is reported once.
            step: The step; None: the completed optimizer steps.
        """
        try:
            made = make()
            parts = [_UNFIT.sub("_", part).lstrip(".") or "_" for part in key.split("/")]
            stem = self._folder.joinpath(*parts) / f"step-{self._completed_steps() if step is None else step:08d}"
            stem.parent.mkdir(parents=True, exist_ok=True)
            for number, item in enumerate(made if isinstance(made, (list, tuple)) else [made]):
                self._write_one(stem, number, item)
        except Exception as error:  # of any package that converts media
            if not self._has_warned:
                self._has_warned = True
                print(f"media: {key} cannot be written: {type(error).__name__}: {error}", flush=True)

    def _write_one(self, stem: Path, number: int, item: Any) -> None:
        if hasattr(item, "columns") and hasattr(item, "data"):
            with stem.with_suffix(".csv").open("w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(item.columns)
                writer.writerows(item.data)
            return
        source = Path(item._path)
        shutil.copyfile(source, stem.with_name(f"{stem.name}-{number}{source.suffix}"))
        caption = getattr(item, "_caption", None)
        if caption is not None:
            stem.with_name(f"{stem.name}-{number}.json").write_text(json.dumps({"caption": caption}))


class Nothing:
    """Accepts any call, attribute, item and assignment, at any depth (`experiment.config.update(...)`)."""

    def __call__(self, *arguments: Any, **named: Any) -> Nothing:
        """Accept a call."""
        return self

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):  # protocols that it does not have: copying, pickling, arrays
            raise AttributeError(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> Nothing:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0


class FileExperiment(Nothing):
    """`self.logger.experiment` if nothing is tracked: writes media that are logged, and accepts any other call."""

    def __init__(self, files: MediaFiles) -> None:
        object.__setattr__(self, "_files", files)

    def log(self, data: Any, step: int | None = None, *arguments: Any, **named: Any) -> None:
        """Write the media and tables in `data`; scalars belong into `self.log`."""
        for key, value in data.items() if isinstance(data, Mapping) else []:
            first = value[0] if isinstance(value, (list, tuple)) and value else value
            if type(first).__module__.startswith("wandb."):
                self._files.write(str(key), lambda value=value: value, step)


class NoLogger(DummyLogger):
    """`self.logger` if nothing is tracked: writes media to files, and accepts every other call, on every rank.

    Its name and version are those of Lightning's default logger, because ModelCheckpoint derives its folder from them.

    Args:
        run: The run directory.
        completed_steps: Returns the completed optimizer steps.
    """

    def __init__(self, run: RunDirectory, completed_steps: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self._run = run
        self._files = MediaFiles(run.path, completed_steps)
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        self._experiment: Any = FileExperiment(self._files) if is_first else Nothing()

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "lightning_logs"

    @property
    def version(self) -> int:  # type: ignore[override]
        """Version of the logger."""
        return 0

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self._run.path)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **named: list[Any]) -> None:
        """Write images: tensors, arrays, PIL images, figures or paths; `caption=[...]` has one for each."""
        self._write("Image", key, images, step, named)

    @rank_zero_only
    def log_audio(self, key: str, audios: list[Any], step: int | None = None, **named: list[Any]) -> None:
        """Write audio: arrays with `sample_rate=[...]`, or paths."""
        self._write("Audio", key, audios, step, named)

    @rank_zero_only
    def log_video(self, key: str, videos: list[Any], step: int | None = None, **named: list[Any]) -> None:
        """Write videos: arrays, or paths."""
        self._write("Video", key, videos, step, named)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: list[str] | None = None,
        data: list[list[Any]] | None = None,
        dataframe: Any = None,
        step: int | None = None,
    ) -> None:
        """Write a table as CSV."""

        def make() -> Any:
            import wandb

            return wandb.Table(columns=list(columns or []) or None, data=data, dataframe=dataframe)

        self._files.write(key, make, step)

    log_text = log_table

    def _write(self, kind: str, key: str, items: list[Any], step: int | None, named: Mapping[str, list[Any]]) -> None:
        def make() -> list[Any]:
            import wandb

            arguments = [{name: values[number] for name, values in named.items()} for number in range(len(items))]
            return [getattr(wandb, kind)(item, **given) for item, given in zip(items, arguments, strict=True)]

        self._files.write(key, make, step)
