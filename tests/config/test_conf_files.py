"""Every file that ships in conf/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.core.errors import UserError
from trainer.core.paths import conf_dir
from trainer.data import locations

FILES = sorted(path for path in conf_dir().rglob("*.yaml") if path.name != "config.yaml")


def names(path: Path) -> str:
    return str(path.relative_to(conf_dir()))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_composes_and_passes_check(path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group, option = path.parent.relative_to(conf_dir()), path.stem
    # A key without a default is a path of the user.
    named = re.findall(r"^  root: ([^$\s]+)$", path.read_text(), re.MULTILINE)
    elsewhere = [f"data.root={workdir / 'somewhere'}" for name in named if name.startswith("/")]
    for folder in (workdir / "somewhere", *(workdir / name for name in named if not name.startswith("/"))):
        folder.mkdir(parents=True)
        for name in ("0.parquet", "meta.json", "train-images-idx3-ubyte", "font.ttf"):  # check looks for these files
            (folder / name).touch()
    monkeypatch.setattr(locations, "FASHION_MNIST", ("somewhere",))
    for module in ("loggers", "combinations"):  # optional packages
        monkeypatch.setattr(f"trainer.config.{module}.find_spec", lambda name: True)
    monkeypatch.setattr(locations, "EMOJI", ("somewhere/font.ttf",))
    paths = re.findall(r"^(\w+): \?\?\?", path.read_text(), re.MULTILINE)
    filled = [f"{group}.{key}={'[me@example.org]' if str(group) == 'notify' else 'somewhere'}" for key in paths]
    for variable in re.findall(r"^\w+_env: (\w+)$", path.read_text(), re.MULTILINE):
        monkeypatch.setenv(variable, "https://example.org")
    # The default model cannot be split, and the default is a rank per core.
    beside = {"strategy/tp.yaml": ["model=transformer"], "optimizer/lbfgs.yaml": ["resources.cpu_processes=1"]}
    job = compose([f"{group}={option}", *beside.get(names(path), []), *filled, *elsewhere], config_dirs=[])
    if names(path) == "data/none.yaml":  # needs a model with its own loaders, which no shipped model has
        with pytest.raises(UserError, match="has no train_dataloader of its own"):
            check(job.config, fits=False)
        return
    if str(group) != "cluster" or option == "local":  # others need a scheduler
        # The other part is the default; test_fits.py tests the combinations.
        check({**job.config, "resources": {**job.config["resources"], "gpus": 0}}, fits=False)


@pytest.mark.parametrize("path", [*FILES, conf_dir() / "config.yaml"], ids=names)
def test_the_first_line_describes_the_file(path: Path) -> None:
    lines = path.read_text().splitlines()
    first = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert first.startswith("# ")
    assert first.endswith((".", "?"))
    assert len(lines) <= 60, "a config fits on a screen"
