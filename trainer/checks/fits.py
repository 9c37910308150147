"""Whether the chosen model and the chosen data go together, from what their classes say of themselves in source text.

A data module says `provides`: the names of its `facts()`, as a dict to their values where the class knows them (below),
and `default_task`. A network says `for_tasks`: the tasks whose batches it takes. What a class does not say is not
complained about: a user's own data and models are taken as they are, but for arguments that nothing can fill.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.instantiate import read_plain
from trainer.config.signature import Signature, of
from trainer.config.sources import Definition, class_literal, find
from trainer.core.errors import TrainerError, UserError
from trainer.core.near import listed
from trainer.core.paths import conf_dir
from trainer.data.tables import IDS, IMAGES, TEXTS, find_tables

FACTS = ("input_shape", "output_shape", "num_classes", "vocab_size", "sequence_length", "pad_id")
"""Arguments of a model that the data may fill."""
CLASSIFICATION = "trainer.tasks.classification.Classification"
LANGUAGE_MODELLING = "trainer.tasks.language_modelling.LanguageModelling"
_TEXT_FACTS = {"vocab_size": None, "sequence_length": "sequence_length"}
_IMAGE_FACTS = {"input_shape": [("grey", 1, 3), "size", "size"], "num_classes": None}
_MIXTURE = "trainer.data.mixture.Mixture"
_TABLES = "trainer.data.hf_dataset.hf_dataset"
_HUGGING_FACE = "trainer.models.hf.HuggingFace"
_TIMM = "trainer.models.timm.create"
_HUGGING_FACE_KINDS = {
    "ForCausalLM": (LANGUAGE_MODELLING, ("vocab_size", "sequence_length")),
    "ForSequenceClassification": (CLASSIFICATION, ("vocab_size", "num_classes")),
    "ForImageClassification": (CLASSIFICATION, ("input_shape", "num_classes")),
}
"""End of `model.class_name` to the task and what its inputs are known by."""


@dataclass(frozen=True)
class Offer:
    """What the data gives to models."""

    name: str
    task: str | None
    facts: dict[str, Any]
    """To the value, or null where only the files tell."""


@dataclass(frozen=True)
class Wants:
    """What a model asks of the data."""

    name: str
    tasks: tuple[str, ...] | None
    """Null: it does not say."""
    kinds: tuple[str, ...]
    """The facts that its class is made from."""
    unset: tuple[str, ...]
    """Those of them that must come from the data, because the configuration leaves them null."""
    node: Mapping[str, Any] = field(repr=False)


def problems_of_fit(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """A model and data that cannot train together, with those that could."""
    offer = offer_of(config["data"], cwd)
    wants = wants_of(config["model"], cwd)
    if offer is None or wants is None:
        return
    problem = misfit(wants, offer, config["task"].get("_target_"))
    if problem is None:
        return
    models = [name for name, one in _shipped("model") if _goes(wants_of(one, cwd), offer)]
    data = [name for name, one in _shipped("data") if _goes(wants, offer_of(one, cwd))]
    fixes = [f"models for this data: {listed(models, 12)}"] if models else []
    fixes += [f"data for this model: {listed(data, 12)}"] if data else []
    yield UserError(problem, "; ".join(fixes) or "choose another model or other data")


def misfit(wants: Wants, offer: Offer, task: str | None = None) -> str | None:
    """Why the model cannot be trained on the data by `task` (null: the data's own), as far as the classes say."""
    given = f"{offer.name} gives {', '.join(offer.facts) or 'no facts'}"
    missing = [name for name in wants.unset if name not in offer.facts]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        return f"{_keys(missing)} {are} null: {wants.name} needs {'it' if are == 'is' else 'them'}, and {given}"
    if wants.tasks is None or (task is not None and task != offer.task):
        return None
    missing = [name for name in wants.kinds if name not in offer.facts]
    if missing:
        return f"{wants.name} takes inputs of another kind: it is made from {', '.join(wants.kinds)}, and {given}"
    if offer.task is not None and offer.task not in wants.tasks:
        own, other = (one.rpartition(".")[2] for one in (wants.tasks[0], offer.task))
        return f"{wants.name} is for the task {own}, and {offer.name} is data for {other}"
    return _misfit_of_values(wants, offer)


def _misfit_of_values(wants: Wants, offer: Offer) -> str | None:
    """What the constructor of a model of ours would refuse, or its first step: sizes that the data's class knows."""
    node, shape = wants.node, offer.facts.get("input_shape")
    if "input_shape" in wants.kinds and node.get("input_shape") is None and isinstance(shape, list):
        patch, sides = node.get("patch"), shape[1:]
        size = " x ".join(str(side) for side in sides)
        if isinstance(patch, int) and any(side is not None and side % patch for side in sides):
            return f"model.patch={patch} does not divide the images of {offer.name}, {size}"
        stages = _stages(wants)
        if stages is not None and any(side is not None and side < 2**stages for side in sides):
            return f"the {stages} stages of {wants.name} halve the images of {offer.name}, {size}, to nothing"
        if wants.name == "RecurrentClassifier" and shape[0] not in (1, None):
            return f"{wants.name} reads images of one channel, and those of {offer.name} have {shape[0]}"
    for name, word in (("sequence_length", "positions"), ("vocab_size", "token ids")):
        own, needed = node.get(name), offer.facts.get(name)
        if name in wants.kinds and isinstance(own, int) and isinstance(needed, int) and own < needed:
            return f"model.{name}={own}: {offer.name} has {needed} {word}"
    return None


def _stages(wants: Wants) -> int | None:
    """How often a VGG halves its images."""
    if wants.name != "VGG":
        return None
    convolutions = wants.node.get("convolutions")
    return 5 if wants.node.get("depth") is not None else len(convolutions or []) or None


def offer_of(node: Mapping[str, Any], cwd: Path) -> Offer | None:
    """What the data of this section gives; null where its class does not say."""
    target = node.get("_target_")
    if target == _MIXTURE:
        sources = node.get("sources")
        first = next(iter(sources.values()), None) if isinstance(sources, dict) else None
        return offer_of(first, cwd) if isinstance(first, dict) else None
    if target == _TABLES:
        return _offer_of_tables(node, cwd)
    found = find(target, cwd) if isinstance(target, str) else None
    if not isinstance(found, Definition):
        return None
    provides, task, by_direction = (_said(found, name) for name in ("provides", "default_task", "default_tasks"))
    if isinstance(by_direction, dict):
        task = by_direction.get(node.get("direction"))
    if not isinstance(provides, (dict, tuple, list)):
        return None
    facts = dict(provides) if isinstance(provides, dict) else dict.fromkeys(provides)
    rate, seconds = node.get("rate"), node.get("seconds")
    if isinstance(rate, int) and rate >= 100 and isinstance(seconds, (int, float)):  # of trainer.data.audio_folder
        node = {**node, "frames": 1 + round(rate * seconds) // (rate // 100)}
    return Offer(found.node.name, task, {name: _value(value, node) for name, value in facts.items()})


def _said(found: Definition, name: str) -> Any:
    """What a class says of itself. A user's subclass of one of ours may be another thing: what it inherits is not
    taken for its own."""
    return class_literal(found, name, inherited=found.module.name.partition(".")[0] == "trainer")


def _offer_of_tables(node: Mapping[str, Any], cwd: Path) -> Offer | None:
    """Of a Hugging Face dataset: by its columns, named here or in the files."""
    kind = next((kind for kind in ("ids", "image", "text") if node.get(f"{kind}_column")), None)
    kind = kind or _usual_kind(node.get("root"), cwd)
    if kind is None:
        return None
    if kind == "image":
        return Offer("hf_dataset", CLASSIFICATION, {key: _value(said, node) for key, said in _IMAGE_FACTS.items()})
    facts = {key: _value(said, node) for key, said in _TEXT_FACTS.items()}
    if kind == "text" and node.get("label_column"):
        return Offer("hf_dataset", CLASSIFICATION, {**facts, "num_classes": None, "pad_id": None})
    return Offer("hf_dataset", LANGUAGE_MODELLING, facts)


def _usual_kind(root: Any, cwd: Path) -> str | None:
    """By the names of the columns, as `hf_dataset` chooses; null where the files are not here or cannot be read."""
    if not isinstance(root, str) or not (cwd / Path(root).expanduser()).is_dir() or find_spec("pyarrow") is None:
        return None
    try:
        there = find_tables(cwd / Path(root).expanduser()).columns()
    except (TrainerError, OSError, RuntimeError):
        return None
    usual = {"ids": IDS, "image": IMAGES, "text": TEXTS}
    return next((kind for kind, names in usual.items() if any(name in there for name in names)), None)


def _value(said: Any, node: Mapping[str, Any]) -> Any:
    """A value as a class writes it: a number; the name of an argument; (argument, value if true, value if not); a list
    of these. Null where it is not known."""
    if isinstance(said, str):
        return node.get(said)
    if isinstance(said, tuple):
        argument, if_true, if_false = said
        given = node.get(argument)
        return (if_true if given else if_false) if isinstance(given, bool) else None
    if isinstance(said, list):
        return [_value(one, node) for one in said]
    return said


def wants_of(node: Mapping[str, Any], cwd: Path) -> Wants | None:
    """What the model of this section needs; null where its class cannot be read."""
    target = node.get("_target_")
    found = find(target, cwd) if isinstance(target, str) else None
    signature = of(found) if found is not None else None
    if not isinstance(found, Definition) or not isinstance(signature, Signature):
        return None
    kinds = tuple(one.name for one in signature.arguments if one.required and one.name in FACTS)
    unset = tuple(name for name in kinds if name in node and node[name] is None)
    tasks = _said(found, "for_tasks") if isinstance(found.node, ast.ClassDef) else None
    if target == _TIMM:
        tasks = (CLASSIFICATION,)
    if target == _HUGGING_FACE:
        said = str(node.get("class_name"))
        kind = next((kind for end, kind in _HUGGING_FACE_KINDS.items() if said.endswith(end)), None)
        tasks, kinds = ((kind[0],), kind[1]) if kind else (None, ())
    return Wants(found.node.name, tuple(tasks) if tasks else None, kinds, unset, node)


def _goes(wants: Wants | None, offer: Offer | None) -> bool:
    return wants is not None and offer is not None and misfit(wants, offer) is None


def _keys(names: list[str]) -> str:
    return " and ".join(f"model.{name}" for name in names)


def _shipped(group: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of the configurations that come with this package."""
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        yield path.stem, read_plain(path)
