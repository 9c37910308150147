"""Check that the chosen model can be trained on the chosen data, from what their classes declare in source text.

A data module declares `default_task` and `provides`: the names of its `facts()`, or a dict of them to values, as far as
the class knows the values (see `_value`). A network declares `for_tasks`: the tasks whose batches it accepts. Classes
that declare nothing, such as user-defined data and models, are accepted, except for arguments that nothing can fill in.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainer.config.instantiate import read_plain
from trainer.config.signature import Signature, signature_of
from trainer.config.sources import Definition, class_literal, find
from trainer.config.targets import problems_of_section
from trainer.core.errors import TrainerError, UserError
from trainer.core.near import listed
from trainer.core.paths import conf_dir
from trainer.data.tables import IDS, IMAGES, TEXTS, find_tables

FACTS = ("input_shape", "output_shape", "num_classes", "vocab_size", "sequence_length", "pad_id")
"""Arguments of a model that the data may fill."""
_DOCUMENT_END = "document_end"
"""Argument of a model that masks documents."""
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
"""Task and defining facts of a Hugging Face model, by the end of `model.class_name`."""


@dataclass(frozen=True)
class DataFacts:
    """The facts about the data that models are built from."""

    name: str
    task: str | None
    """Default task; None: not declared."""
    facts: dict[str, Any]
    """Value by name; None if it is known only from the files."""


@dataclass(frozen=True)
class ModelNeeds:
    """The facts about the data that a model is built from."""

    name: str
    tasks: tuple[str, ...] | None
    """Tasks that the model can be trained on; None: not declared."""
    kinds: tuple[str, ...]
    """Names of the facts that its class requires."""
    unset: tuple[str, ...]
    """Required facts that must come from the data, because they are null in the configuration."""
    node: Mapping[str, Any] = field(repr=False)
    """Section `model` of the configuration."""


def problems_of_fit(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield errors for a model that cannot be trained on the data, and for arguments of the data's default task."""
    yield from _problems_of_masks(config, cwd)
    data = data_facts(config["data"], cwd)
    task = config["task"]
    if data is not None and data.task is not None and not task.get("_target_") and len(task) > 1:
        yield from problems_of_section("task", {**task, "_target_": data.task}, config, cwd)
    needs = model_needs(config["model"], cwd)
    if data is None or needs is None:
        return
    problem = mismatch(needs, data, config["task"].get("_target_"))
    if problem is None:
        return
    models = [name for name, one in _shipped("model") if _match(model_needs(one, cwd), data)]
    datasets = [name for name, one in _shipped("data") if _match(needs, data_facts(one, cwd))]
    fixes = [f"models for this data: {listed(models, 12)}"] if models else []
    fixes += [f"data for this model: {listed(datasets, 12)}"] if datasets else []
    yield UserError(problem, "; ".join(fixes) or "choose another model or other data")


def _problems_of_masks(config: dict[str, Any], cwd: Path) -> Iterator[UserError]:
    """Yield an error for a document mask that the model would not apply."""
    sources = config["data"].get("sources")
    nodes = [config["data"], *(sources.values() if isinstance(sources, dict) else ())]
    if not any(isinstance(node, Mapping) and node.get("document_mask") is True for node in nodes):
        return
    if _DOCUMENT_END in config["model"]:
        return
    target = config["model"].get("_target_")
    definition = find(target, cwd) if isinstance(target, str) else None
    signature = signature_of(definition) if definition is not None else None
    if isinstance(signature, Signature) and _DOCUMENT_END not in signature.names():
        problem = f"data.document_mask=true: {target} has no argument {_DOCUMENT_END}, so it does not mask documents"
        yield UserError(problem, "use model=transformer, gpt2_124m or llama3_8b, or remove data.document_mask")
    else:
        problem = f"data.document_mask=true, but model.{_DOCUMENT_END} is not in the configuration for the data to fill"
        yield UserError(problem, f"add +model.{_DOCUMENT_END}=null")


def mismatch(needs: ModelNeeds, data: DataFacts, task: str | None = None) -> str | None:
    """Return why the model cannot be trained on the data by `task`, as far as the classes declare it; else None.

    `task` None is the default task of the data.
    """
    given = f"{data.name} provides {', '.join(data.facts) or 'no facts'}"
    missing = [name for name in needs.unset if name not in data.facts]
    if missing:
        keys, one = " and ".join(f"model.{name}" for name in missing), len(missing) == 1
        return f"{keys} {'is' if one else 'are'} null: {needs.name} needs {'it' if one else 'them'}, but {given}"
    if needs.tasks is None or (task is not None and task != data.task):
        return None
    missing = [name for name in needs.kinds if name not in data.facts]
    if missing:
        return f"{needs.name} takes other inputs: it needs {', '.join(needs.kinds)}, but {given}"
    if data.task is not None and data.task not in needs.tasks:
        own, other = (one.rpartition(".")[2] for one in (needs.tasks[0], data.task))
        return f"{needs.name} is for the task {own}, but {data.name} is data for {other}"
    return _mismatch_of_values(needs, data)


def _mismatch_of_values(needs: ModelNeeds, data: DataFacts) -> str | None:
    """Return why the constructor or the first step of a model of this project would fail; None if not."""
    node, shape = needs.node, data.facts.get("input_shape")
    if "input_shape" in needs.kinds and node.get("input_shape") is None and isinstance(shape, list):
        patch, sides = node.get("patch"), shape[1:]
        size = " x ".join(str(side) for side in sides)
        if isinstance(patch, int) and any(side is not None and side % patch for side in sides):
            return f"model.patch={patch} does not divide the images of {data.name} ({size})"
        stages = _stages(needs)
        if stages is not None and any(side is not None and side < 2**stages for side in sides):
            return f"the images of {data.name} ({size}) are too small to be halved by {stages} stages of {needs.name}"
        if needs.name == "RecurrentClassifier" and shape[0] not in (1, None):
            return f"{needs.name} takes images with one channel, but those of {data.name} have {shape[0]}"
    for name, word in (("sequence_length", "positions"), ("vocab_size", "token ids")):
        own, needed = node.get(name), data.facts.get(name)
        if name in needs.kinds and isinstance(own, int) and isinstance(needed, int) and own < needed:
            return f"model.{name}={own}: {data.name} has {needed} {word}"
    return None


def _stages(needs: ModelNeeds) -> int | None:
    """Return how many times a VGG halves its images; None for other models."""
    if needs.name != "VGG":
        return None
    convolutions = needs.node.get("convolutions")
    return 5 if needs.node.get("depth") is not None else len(convolutions or []) or None


def data_facts(node: Mapping[str, Any], cwd: Path) -> DataFacts | None:
    """Return the facts about the data of this section; None if its class does not declare them."""
    target = node.get("_target_")
    if target == _MIXTURE:
        sources = node.get("sources")
        first = next(iter(sources.values()), None) if isinstance(sources, dict) else None
        return data_facts(first, cwd) if isinstance(first, dict) else None
    if target == _TABLES:
        return _table_facts(node, cwd)
    definition = find(target, cwd) if isinstance(target, str) else None
    if not isinstance(definition, Definition):
        return None
    provides, task, by_direction = (
        _declared(definition, name) for name in ("provides", "default_task", "default_tasks")
    )
    if isinstance(by_direction, dict):
        task = by_direction.get(node.get("direction"))
    if not isinstance(provides, (dict, tuple, list)):
        return None
    facts = dict(provides) if isinstance(provides, dict) else dict.fromkeys(provides)
    rate, seconds = node.get("rate"), node.get("seconds")
    if isinstance(rate, int) and rate >= 100 and isinstance(seconds, (int, float)):  # of trainer.data.audio_folder
        node = {**node, "frames": 1 + round(rate * seconds) // (rate // 100)}
    return DataFacts(definition.node.name, task, {name: _value(value, node) for name, value in facts.items()})


def _declared(definition: Definition, name: str) -> Any:
    """Return a class attribute that a class declares.

    Inherited attributes do not count for a user's subclass of a class of this project, because it may change their
    meaning.
    """
    return class_literal(definition, name, inherited=definition.module.name.partition(".")[0] == "trainer")


def _table_facts(node: Mapping[str, Any], cwd: Path) -> DataFacts | None:
    """Return the facts about a Hugging Face dataset, by its columns in the configuration or in the files."""
    kind = next((kind for kind in ("ids", "image", "text") if node.get(f"{kind}_column")), None)
    kind = kind or _kind_of_columns(node.get("root"), cwd)
    if kind is None:
        return None
    if kind == "image":
        facts = {key: _value(declared, node) for key, declared in _IMAGE_FACTS.items()}
        return DataFacts("hf_dataset", CLASSIFICATION, facts)
    facts = {key: _value(declared, node) for key, declared in _TEXT_FACTS.items()}
    if kind == "text" and node.get("label_column"):
        return DataFacts("hf_dataset", CLASSIFICATION, {**facts, "num_classes": None, "pad_id": None})
    return DataFacts("hf_dataset", LANGUAGE_MODELLING, facts)


def _kind_of_columns(root: Any, cwd: Path) -> str | None:
    """Return the kind of data by the names of the columns, as `hf_dataset` does; None if the files cannot be read."""
    if not isinstance(root, str) or not (cwd / Path(root).expanduser()).is_dir() or find_spec("pyarrow") is None:
        return None
    try:
        columns = find_tables(cwd / Path(root).expanduser()).columns()
    except (TrainerError, OSError, RuntimeError):
        return None
    usual = {"ids": IDS, "image": IMAGES, "text": TEXTS}
    return next((kind for kind, names in usual.items() if any(name in columns for name in names)), None)


def _value(declared: Any, node: Mapping[str, Any]) -> Any:
    """Return the value of a declared fact; None if it is unknown.

    A class declares a number, the name of an argument, (argument, value if true, value if false), or a list of these.
    """
    if isinstance(declared, str):
        return node.get(declared)
    if isinstance(declared, tuple):
        argument, if_true, if_false = declared
        given = node.get(argument)
        return (if_true if given else if_false) if isinstance(given, bool) else None
    if isinstance(declared, list):
        return [_value(one, node) for one in declared]
    return declared


def model_needs(node: Mapping[str, Any], cwd: Path) -> ModelNeeds | None:
    """Return the requirements of the model of this section; None if its source cannot be read."""
    target = node.get("_target_")
    definition = find(target, cwd) if isinstance(target, str) else None
    signature = signature_of(definition) if definition is not None else None
    if not isinstance(definition, Definition) or not isinstance(signature, Signature):
        return None
    kinds = tuple(one.name for one in signature.arguments if one.required and one.name in FACTS)
    unset = tuple(name for name in kinds if name in node and node[name] is None)
    tasks = _declared(definition, "for_tasks") if isinstance(definition.node, ast.ClassDef) else None
    if target == _TIMM:
        tasks = (CLASSIFICATION,)
    if target == _HUGGING_FACE:
        class_name = str(node.get("class_name"))
        kind = next((kind for end, kind in _HUGGING_FACE_KINDS.items() if class_name.endswith(end)), None)
        tasks, kinds = ((kind[0],), kind[1]) if kind else (None, ())
    return ModelNeeds(definition.node.name, tuple(tasks) if tasks else None, kinds, unset, node)


def _match(needs: ModelNeeds | None, data: DataFacts | None) -> bool:
    return needs is not None and data is not None and mismatch(needs, data) is None


def _shipped(group: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and content of each shipped configuration of a group."""
    for path in sorted((conf_dir() / group).glob("*.yaml")):
        yield path.stem, read_plain(path)
