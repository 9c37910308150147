"""Any network of Hugging Face's `transformers`, from a local folder or a config. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.core.near import did_you_mean


class HuggingFace(nn.Module):
    """Inputs, as its class takes them first (token ids, pixels, ...), to the logits of a class of `transformers`."""

    def __init__(
        self,
        class_name: str = "AutoModelForCausalLM",
        folder: str | None = None,
        config: Mapping[str, Any] | None = None,
        pretrained: bool = True,
        vocab_size: int | None = None,
        num_classes: int | None = None,
        sequence_length: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        """`class_name`: a class of `transformers` that has a loss of its own to leave out, such as
        AutoModelForSequenceClassification. `folder`: holds `config.json` and, for `pretrained`, safetensors; null:
        `config` says all, `model_type` included, and the weights are new. `config`: wins over the folder's.

        The last four are filled from the data. They size a network without a folder, and are compared with one
        from a folder, but for the classes: with another number of them it gets a new output layer. `pad_id`: what
        texts are filled up with; a network that says nothing of that takes it.
        """
        super().__init__()
        library = _transformers()
        kind = _class(library, class_name)
        is_classifier = "Classification" in class_name
        given = dict(config or {})
        if is_classifier and num_classes is not None:
            given.setdefault("num_labels", num_classes)
        if folder is None and vocab_size is not None:
            given.setdefault("vocab_size", vocab_size)
        settings = _config(library, folder, given)
        _check(settings, vocab_size, sequence_length, pad_id)
        self.network = _network(kind, settings, folder if pretrained else None, is_classifier)
        self.network.train()  # from_pretrained leaves it in evaluation
        self.input_name: str = self.network.main_input_name
        self.masks = is_classifier and self.input_name == "input_ids" and settings.pad_token_id is not None
        """Whether inputs may be filled up with the config's `pad_token_id`, which no position then sees."""

    def tie(self) -> None:
        self.network.tie_weights()

    def blocks(self) -> list[nn.Module]:
        """The layers of which the library says that they must stay on one device."""
        names = set(self.network._no_split_modules or ())
        return [module for module in self.network.modules() if type(module).__name__ in names]

    def forward(self, inputs: Tensor) -> Tensor:
        named = {self.input_name: inputs}
        if self.masks:
            named["attention_mask"] = (inputs != self.network.config.pad_token_id).long()
        return self.network(**named).logits


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        fix = "pip install 'trainer[hf]', or choose another model"
        raise UserError("model=hf needs the package transformers, which is not installed", fix) from None
    return transformers


def _class(library: ModuleType, name: str) -> Any:
    found = getattr(library, name, None)
    if not hasattr(found, "from_pretrained"):
        known = [one for one in dir(library) if one.startswith("AutoModelFor")]
        fix = (
            f"{did_you_mean(name, known, prefix='model.class_name=')}use AutoModelForCausalLM or another of its classes"
        )
        raise UserError(f"model.class_name={name}: transformers has no model class of this name", fix)
    return found


def _config(library: ModuleType, folder: str | None, given: dict[str, Any]) -> Any:
    if folder is not None:
        if not (Path(folder).expanduser() / "config.json").is_file():
            fix = "name a local folder that save_pretrained() wrote; nothing is downloaded"
            raise UserError(f"model.folder={folder} holds no config.json", fix)
        settings = library.AutoConfig.from_pretrained(Path(folder).expanduser(), local_files_only=True, **given)
    else:
        kind = given.pop("model_type", None)
        if kind not in library.CONFIG_MAPPING:
            fix = "set model.folder=FOLDER, or model.config={model_type: gpt2, n_layer: 2}"
            raise UserError(f"model.config.model_type={kind}: transformers has no such architecture", fix)
        settings = library.AutoConfig.for_model(kind, **given)
    settings.use_cache = False
    return settings


def _check(settings: Any, vocab_size: int | None, sequence_length: int | None, pad_id: int | None) -> None:
    known = getattr(settings, "vocab_size", None)
    if vocab_size is not None and known is not None and vocab_size > known:
        fix = "use the tokenizer of the model: data.tokenizer=FOLDER/tokenizer.json"
        raise UserError(f"the data has {vocab_size} token ids and the model only {known}", fix)
    longest = getattr(settings, "max_position_embeddings", None)
    if sequence_length is not None and longest is not None and sequence_length > longest:
        fix = f"use data.sequence_length={longest} or less, or another model.config"
        raise UserError(f"the data has sequences of {sequence_length}, the model has {longest} positions", fix)

    if pad_id is not None and getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = pad_id
    elif pad_id is not None and settings.pad_token_id != pad_id:
        fix = f"use the tokenizer of the model, or model.config={{pad_token_id: {pad_id}}}"
        raise UserError(f"the data fills up with id {pad_id} and the model with {settings.pad_token_id}", fix)


def _network(kind: Any, settings: Any, folder: str | None, is_classifier: bool) -> Any:
    """In 32 bit, whatever the files are in: `trainer.precision` says what is computed in."""
    if folder is None or torch.get_default_device().type == "meta":
        make = getattr(kind, "from_config", None) or kind._from_config
        return make(settings, dtype=torch.float32)
    return kind.from_pretrained(
        Path(folder).expanduser(),
        config=settings,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        ignore_mismatched_sizes=is_classifier,
    )
