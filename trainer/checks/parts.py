"""What is wrong with the arguments of the project's own models and data, and with `finetune`, as far as names and
files tell. A user's own classes are judged by their signatures alone (`targets.py`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.core.errors import EnvironmentFault, TrainerError, UserError
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
"""Data module to its argument that names files, and what finds them."""
_KNOWN_PLACES = (locations.fashion_mnist, locations.emoji)
"""Those that know where to look when the argument is null."""


def problems_of_own(config: dict[str, Any], cwd: Path) -> Iterator[TrainerError]:
    """In the sections `data`, `model` and `finetune` of a composed configuration; `cwd` is where paths begin."""
    here = config["cluster"]["name"] == "local"
    yield from _data(config["data"])
    sources = {f"data.sources.{name}": node for name, node in _sources(config["data"]).items()}
    for where, node in {"data": config["data"], **sources}.items():
        if isinstance(node, dict):
            yield from _tables(where, node, cwd, here)
            if here:
                yield from _place(where, node, cwd)
    yield from _model(config["model"], cwd, here)
    yield from _fine_tuning(config["finetune"])


def _sources(node: dict[str, Any]) -> dict[str, Any]:
    sources = node.get("sources")
    return sources if isinstance(sources, dict) else {}


def _data(node: dict[str, Any]) -> Iterator[UserError]:
    sources = _sources(node)
    if node.get("_target_") != MIXTURE or not isinstance(node.get("sources"), dict):
        return
    if not sources:
        fix = "name some: data.sources={code: {_target_: trainer.data.text.Text, root: src/}}"
        yield UserError("data.sources is empty", fix)
    for name, source in sources.items():
        if not isinstance(source, dict) or not source.get("_target_"):
            fix = f"write data.sources.{name}._target_=trainer.data.text.Text, and its arguments"
            yield UserError(f"data.sources.{name}: a source needs a _target_", fix)
    if isinstance(node.get("weights"), dict):
        yield from problems_of_weights(node["weights"], sources)
    samples = node.get("samples")
    if isinstance(samples, int) and samples < 1:
        yield UserError(f"data.samples={samples}: must be at least 1", "use data.samples=null for all of them")


def _tables(where: str, node: dict[str, Any], cwd: Path, here: bool) -> Iterator[TrainerError]:
    """`here`: the job runs on this machine, so that what is not there will not be there."""
    from trainer.data.tables import COLUMN_OPTIONS, find_tables, require_column, require_one_kind

    root = node.get("root")
    if node.get("_target_") != HF_DATASET or not isinstance(root, str):
        return
    path = cwd / Path(root).expanduser()
    try:
        require_one_kind({key: node.get(key) for key in ("text_column", "ids_column", "image_column")})
        named = [(option, node[option]) for option in COLUMN_OPTIONS if isinstance(node.get(option), str)]
        if here or path.is_dir():
            tables = find_tables(path)
            there = tables.columns() if named and find_spec("pyarrow") is not None else []
            for option, column in named if there else []:
                require_column(option, column, there)
    except UserError as error:
        message = error.message.replace(f"data.root={path}", f"{where}.root={root}")
        options = re.compile(rf"\bdata\.({'|'.join(COLUMN_OPTIONS)})\b")
        yield UserError(*(options.sub(rf"{where}.\1", text) for text in (message, error.fix)))
    if find_spec("pyarrow") is None:
        yield EnvironmentFault("data=hf_dataset needs pyarrow", "pip install 'trainer[datasets]'")


def _place(where: str, node: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Files that are not on this machine, where the job is to run. Nothing is said of a value that is no path."""
    argument, find = _PLACES.get(str(node.get("_target_")), ("", None))
    given = node.get(argument)
    if find is None or not (isinstance(given, str) or (given is None and find in _KNOWN_PLACES)):
        return
    try:
        find(given, cwd)
    except UserError as error:
        yield UserError(
            *(re.sub(rf"\bdata\.{argument}\b", f"{where}.{argument}", text) for text in (error.message, error.fix))
        )
    except (OSError, RuntimeError) as error:  # no such user, a name too long, a folder that may not be looked into
        yield UserError(f"{where}.{argument}={given}: {error}", "name a file or folder that can be read")


def _model(node: dict[str, Any], cwd: Path, here: bool) -> Iterator[UserError]:
    """`here` as above."""
    folder = node.get("folder")
    if node.get("_target_") != HUGGING_FACE or not isinstance(folder, str):
        return
    path = cwd / Path(folder).expanduser()
    fix = "name a local folder that save_pretrained() wrote; nothing is downloaded"
    if not path.is_dir():
        if here:
            yield UserError(f"model.folder={folder}: there is no such folder", fix)
    elif not (path / "config.json").is_file():
        yield UserError(f"model.folder={folder} holds no config.json", fix)
    elif node.get("pretrained", True) and not any(path.glob("*.safetensors")):
        fix = "use a folder with weights as safetensors, or model.pretrained=false for new ones"
        yield UserError(f"model.folder={folder} holds no *.safetensors", fix)


def _fine_tuning(options: dict[str, Any]) -> Iterator[UserError]:
    rank, new, freeze, train = (options[key] for key in ("lora_rank", "new", "freeze", "train"))
    if rank is None:
        for key, unset in (("lora_layers", []), ("lora_dropout", 0.0), ("lora_alpha", 16.0)):
            if options[key] != unset:
                fix = "set finetune.lora_rank=8, too, or leave it out"
                yield UserError(f"finetune.{key} without finetune.lora_rank does nothing", fix)
        if not train and "*" in freeze:
            fix = "name what is trained: finetune.train=[head]"
            yield UserError('finetune.freeze=["*"] leaves nothing to train', fix)
    if not 0 <= options["lora_dropout"] < 1:
        problem = f"finetune.lora_dropout={options['lora_dropout']}: must be at least 0 and less than 1"
        yield UserError(problem, "use finetune.lora_dropout=0.1")
    if new and options["init_from"] is None:
        fix = "set finetune.init_from=RUN, or leave finetune.new out"
        yield UserError("finetune.new without finetune.init_from: everything starts new", fix)
    for pattern in freeze:
        if pattern in train:
            yield UserError(f"{pattern} is in finetune.freeze and in finetune.train", "leave it out of one of them")
    for pattern in new:
        frozen = rank is not None or any(_covers(one, pattern) for one in freeze)
        if frozen and not any(_may_meet(one, pattern) for one in train):
            fix = f"train it, too: finetune.train=[{pattern}]"
            yield UserError(f"finetune.new=[{pattern}] would start at random and never be trained", fix)


def _covers(pattern: str, other: str) -> bool:
    """Whether all that `other` names is named by `pattern`, too."""
    return fnmatchcase(other, pattern) or other.startswith(f"{pattern}.")


def _may_meet(pattern: str, other: str) -> bool:
    """Whether one parameter may have both names; with a `*` in one of them only the model could tell."""
    return "*" in pattern + other or _covers(pattern, other) or _covers(other, pattern)
