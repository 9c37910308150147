"""Check the arguments of this project's models and data, and `finetune`, as far as names and files allow.

User-defined classes are only checked against their signatures (`targets.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.schema import FineTuneOptions
from trainer.config.typed import options_of
from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.install import pip_install
from trainer.data import locations
from trainer.data.mixture_weights import problems_of_weights

HF_DATASET = "trainer.data.hf_dataset.hf_dataset"
MIXTURE = "trainer.data.mixture.Mixture"
HUGGING_FACE = "trainer.models.hf.HuggingFace"

_PLACES: dict[str, tuple[str, Callable[..., Path] | None]] = {
    "trainer.data.text.Text": ("root", locations.text),
    "trainer.data.image_folder.ImageFolder": ("root", locations.class_folders),
    "trainer.data.audio_folder.AudioFolder": ("root", locations.class_folders),
    "trainer.data.token_shards.TokenShards": ("root", locations.token_shards),
    "trainer.data.fashion_mnist.FashionMNIST": ("root", locations.fashion_mnist),
    "trainer.data.emoji.Emoji": ("font", locations.emoji),
}
"""Argument of a data module that names files, and the function that finds them."""
_WITH_DEFAULT = (locations.fashion_mnist, locations.emoji)
"""Functions with a default location for an argument that is null."""


def problems_of_parts(config: dict[str, Any], cwd: Path) -> Iterator[TrainerError]:
    """Yield the problems of the sections `data`, `model` and `finetune`; paths are relative to `cwd`."""
    is_local = config["cluster"]["name"] == "local"
    yield from _mixture(config["data"])
    sources = {f"data.sources.{name}": node for name, node in _sources(config["data"]).items()}
    for where, node in {"data": config["data"], **sources}.items():
        if isinstance(node, dict):
            yield from _tables(where, node, cwd, is_local)
            if is_local:
                yield from _place(where, node, cwd)
    yield from _model(config["model"], cwd, is_local)
    yield from options_of(FineTuneOptions, config["finetune"]).problems()


def _sources(node: dict[str, Any]) -> dict[str, Any]:
    sources = node.get("sources")
    return sources if isinstance(sources, dict) else {}


def _mixture(node: dict[str, Any]) -> Iterator[UserError]:
    sources = _sources(node)
    if node.get("_target_") != MIXTURE or not isinstance(node.get("sources"), dict):
        return
    if not sources:
        fix = "add one: data.sources={code: {_target_: trainer.data.text.Text, root: src/}}"
        yield UserError("data.sources is empty", fix)
    for name, source in sources.items():
        if not isinstance(source, dict) or not source.get("_target_"):
            fix = f"write data.sources.{name}._target_=trainer.data.text.Text, and its arguments"
            yield UserError(f"data.sources.{name}: a source needs a _target_", fix)
    if isinstance(node.get("weights"), dict):
        yield from problems_of_weights(node["weights"], sources)
    samples = node.get("samples")
    if isinstance(samples, int) and samples < 1:
        yield UserError(f"data.samples={samples}: must be at least 1", "use data.samples=null for all samples")


def _tables(where: str, node: dict[str, Any], cwd: Path, is_local: bool) -> Iterator[TrainerError]:
    """Yield problems of a Hugging Face dataset. A job on a cluster may find files that this machine does not have."""
    from trainer.data.tables import COLUMN_OPTIONS, find_tables, require_column, require_one_kind

    root = node.get("root")
    if node.get("_target_") != HF_DATASET or not isinstance(root, str):
        return
    path = cwd / Path(root).expanduser()
    try:
        require_one_kind({key: node.get(key) for key in ("text_column", "ids_column", "image_column")})
        named = [(option, node[option]) for option in COLUMN_OPTIONS if isinstance(node.get(option), str)]
        if is_local or path.is_dir():
            tables = find_tables(path)
            columns = tables.columns() if named and find_spec("pyarrow") is not None else []
            for option, column in named if columns else []:
                require_column(option, column, columns)
    except UserError as error:
        message = error.message.replace(f"data.root={path}", f"{where}.root={root}")
        options = re.compile(rf"\bdata\.({'|'.join(COLUMN_OPTIONS)})\b")
        yield UserError(*(options.sub(rf"{where}.\1", text) for text in (message, error.fix)))
    if find_spec("pyarrow") is None:
        yield EnvironmentFault("data=hf_dataset needs pyarrow", pip_install("datasets"))


def _place(where: str, node: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield an error for files that a job on this machine would not find."""
    argument, find = _PLACES.get(str(node.get("_target_")), ("", None))
    given = node.get(argument)
    if find is None or not (isinstance(given, str) or (given is None and find in _WITH_DEFAULT)):
        return
    try:
        find(given, cwd)
    except UserError as error:
        yield UserError(
            *(re.sub(rf"\bdata\.{argument}\b", f"{where}.{argument}", text) for text in (error.message, error.fix))
        )
    except (OSError, RuntimeError) as error:  # unknown user, name too long, no permission
        yield UserError(f"{where}.{argument}={given}: {error}", "name a file or folder that can be read")


def _model(node: dict[str, Any], cwd: Path, is_local: bool) -> Iterator[UserError]:
    """Yield problems of the folder of a Hugging Face model."""
    folder = node.get("folder")
    if node.get("_target_") != HUGGING_FACE or not isinstance(folder, str):
        return
    path = cwd / Path(folder).expanduser()
    fix = "name a local folder that save_pretrained() wrote; nothing is downloaded"
    if not path.is_dir():
        if is_local:
            yield UserError(f"model.folder={folder}: no such folder", fix)
    elif not (path / "config.json").is_file():
        yield UserError(f"model.folder={folder} contains no config.json", fix)
    elif node.get("pretrained", True) and not any(path.glob("*.safetensors")):
        fix = "use a folder with safetensors files, or model.pretrained=false for new weights"
        yield UserError(f"model.folder={folder} contains no *.safetensors", fix)
