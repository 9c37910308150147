"""Any network of Hugging Face's `transformers`, from a local folder or a config. Nothing is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from trainer.core.errors import UserError
from trainer.core.install import pip_install
from trainer.core.near import did_you_mean
from trainer.models.hf_loss import OutputLayer, adjustment_of, losses_inside
from trainer.models.linear_cross_entropy import Losses, losses_of

_log = logging.getLogger(__name__)

PLAIN_DECODERS = ("gpt2", "gpt_neox", "llama", "olmo2", "qwen2", "qwen3")
"""`model_type` of decoders that use all parameters for each token and attend to all positions."""
_RUNS_CODE = {"trust_remote_code", "auto_map", "code_revision", "use_kernels", "kernel_config"}
"""Arguments of transformers by which a model's folder brings its own code."""


class HuggingFace(nn.Module):
    """A model of `transformers`: the class's first input (token ids, pixels, ...) to its logits.

    For token ids `(batch, length)`, the logits are `(batch, length, vocab_size)` of a language model and `(batch,
    num_classes)` of a classifier.

    `vocab_size`, `num_classes`, `sequence_length` and `pad_id` are filled from the data. Without a folder they size the
    network. With a folder they are compared with the network, except the classes: a different number of classes gets a
    new output layer.

    Args:
        class_name: A class of `transformers` whose own loss can be left out, such as
            AutoModelForSequenceClassification.
        folder: Holds `config.json` and, if `pretrained`, safetensors; None: `config` has all settings, `model_type`
            included, and the weights are new.
        config: Settings that take precedence over the folder's.
        pretrained: Whether to load the folder's weights.
        vocab_size: Number of token ids in the data.
        num_classes: Number of classes in the data.
        sequence_length: Longest sequence in the data.
        pad_id: Token id that texts are padded with; used if the model's config has none.

    Raises:
        UserError: The class, the folder or the architecture does not exist, or the model does not fit the data.
    """

    def __init__(
        self,
        class_name: str = "AutoModelForCausalLM",
        *,
        folder: str | None = None,
        config: Mapping[str, Any] | None = None,
        pretrained: bool = True,
        vocab_size: int | None = None,
        num_classes: int | None = None,
        sequence_length: int | None = None,
        pad_id: int | None = None,
    ) -> None:
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
        self.network.train()  # from_pretrained leaves it in evaluation mode
        self.input_name: str = self.network.main_input_name
        self.masks = is_classifier and self.input_name == "input_ids" and settings.pad_token_id is not None
        """Whether inputs may be padded with the config's `pad_token_id`, which no position then attends to."""

    @cached_property
    def computes_loss(self) -> bool:
        """Whether `forward` takes targets and computes their losses without the logits of all positions in memory."""
        if self.input_name != "input_ids" or self.network.get_output_embeddings() is None:
            return False
        adjustment = adjustment_of(self.network, self.input_name)
        if isinstance(adjustment, str):
            _log.info("the loss of %s needs the logits of all positions: %s", type(self.network).__name__, adjustment)
            return False
        OutputLayer.take_the_place_of(self.network.get_output_embeddings(), adjustment)
        return True

    def tie(self) -> None:
        """Tie the weights that the architecture shares."""
        self.network.tie_weights()

    def blocks(self) -> list[nn.Module]:
        """Return the layers that must stay on one device according to the library."""
        names = set(self.network._no_split_modules or ())
        return [module for module in self.network.modules() if type(module).__name__ in names]

    def flops_per_token(self, sequence_length: int) -> int | None:
        """Return the FLOPs of training on one token, `6 N + 12 L d T` (see `Transformer`); None if it is not known.

        Args:
            sequence_length: Tokens of a sample.
        """
        return flops_per_token(self.network, sequence_length)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Tensor | Losses:
        """Map inputs of shape `(batch, ...)` to the logits, or with targets to the sums of their losses.

        Args:
            inputs: Token ids, pixels, ...
            targets: Token ids of shape `(batch, length)`, for a network that `computes_loss`.
        """
        named = {self.input_name: inputs}
        if self.masks:
            named["attention_mask"] = (inputs != self.network.config.pad_token_id).long()
        if targets is None:
            logits: Tensor = self.network(**named).logits
            return logits
        head = self.network.get_output_embeddings()
        if isinstance(head, OutputLayer):
            return losses_inside(self.network, named, head, targets)
        return losses_of(self.network(**named).logits, targets)  # LoRA adapters have taken its place


def flops_per_token(network: Any, sequence_length: int) -> int | None:
    """Return the FLOPs of training a language model on one token: `6 N + 12 L d T`.

    Args:
        network: A model of `transformers`.
        sequence_length: Tokens of a sample.

    Returns:
        None if a token does not use all parameters in the same way: experts, sliding windows, encoders, classifiers,
        architectures that are not in `PLAIN_DECODERS`.
    """
    settings = network.config
    is_plain = settings.model_type in PLAIN_DECODERS and not getattr(settings, "use_sliding_window", False)
    if not is_plain or network.get_output_embeddings() is None:
        return None
    output, embedding = network.get_output_embeddings().weight, network.get_input_embeddings().weight
    positions = getattr(getattr(network, "transformer", None), "wpe", None)
    skipped = {id(positions.weight)} if positions is not None else set()
    if embedding is not output:
        skipped.add(id(embedding))
    # `ds_numel`: under DeepSpeed ZeRO-3 this rank may hold no more than a shard.
    count = sum(getattr(one, "ds_numel", one.numel()) for one in network.parameters() if id(one) not in skipped)
    heads = settings.num_attention_heads
    width = heads * (getattr(settings, "head_dim", None) or settings.hidden_size // heads)
    return int(6 * count + 12 * settings.num_hidden_layers * width * sequence_length)


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        fix = f"{pip_install('hf')}, or choose another model"
        raise UserError("model=hf needs the package transformers, which is not installed", fix) from None
    library: ModuleType = transformers
    return library


def _class(library: ModuleType, name: str) -> Any:
    model_class = getattr(library, name, None)
    if not hasattr(model_class, "from_pretrained"):
        known = [one for one in dir(library) if one.startswith("AutoModelFor")]
        fix = (
            f"{did_you_mean(name, known, prefix='model.class_name=')}use AutoModelForCausalLM or another of its classes"
        )
        raise UserError(f"model.class_name={name}: transformers has no model class with this name", fix)
    return model_class


def _config(library: ModuleType, folder: str | None, given: dict[str, Any]) -> Any:
    """Return the settings of the model. Code in its folder, or named by it, is never run."""
    for key in _RUNS_CODE & given.keys():
        raise UserError(f"model.config.{key}: refused, because it would run code from the model's folder", "remove it")
    if folder is not None:
        if not (Path(folder).expanduser() / "config.json").is_file():
            fix = "use a local folder that save_pretrained() wrote; nothing is downloaded"
            raise UserError(f"model.folder={folder} holds no config.json", fix)
        settings = library.AutoConfig.from_pretrained(
            Path(folder).expanduser(), local_files_only=True, trust_remote_code=False, **given
        )
    else:
        kind = given.pop("model_type", None)
        if kind not in library.CONFIG_MAPPING:
            fix = "set model.folder=FOLDER, or model.config={model_type: gpt2, n_layer: 2}"
            raise UserError(f"model.config.model_type={kind}: transformers has no such architecture", fix)
        settings = library.AutoConfig.for_model(kind, **given)
    settings.use_cache = False
    if "/" in str(getattr(settings, "_attn_implementation", None)):
        fix = "set model.config={attn_implementation: sdpa}"
        raise UserError(f"the model's attn_implementation {settings._attn_implementation} would download code", fix)
    if getattr(settings, "auto_map", None):
        del settings.auto_map
    return settings


def _check(settings: Any, vocab_size: int | None, sequence_length: int | None, pad_id: int | None) -> None:
    known = getattr(settings, "vocab_size", None)
    if vocab_size is not None and known is not None and vocab_size > known:
        fix = "use the tokenizer of the model: data.tokenizer=FOLDER/tokenizer.json"
        raise UserError(f"the data has {vocab_size} token ids, but the model only {known}", fix)
    longest = getattr(settings, "max_position_embeddings", None)
    if sequence_length is not None and longest is not None and sequence_length > longest:
        fix = f"use data.sequence_length={longest} or less, or another model.config"
        raise UserError(f"the data has sequences of {sequence_length} tokens, but the model {longest} positions", fix)

    if pad_id is not None and getattr(settings, "pad_token_id", None) is None:
        settings.pad_token_id = pad_id
    elif pad_id is not None and settings.pad_token_id != pad_id:
        fix = f"use the tokenizer of the model, or model.config={{pad_token_id: {pad_id}}}"
        raise UserError(f"the data is padded with id {pad_id}, but the model uses {settings.pad_token_id}", fix)


def _network(kind: Any, settings: Any, folder: str | None, is_classifier: bool) -> Any:
    """Build the network in float32, whatever the files hold.

    `trainer.precision` selects the precision of the computation.
    """
    if folder is None or torch.get_default_device().type == "meta":
        make = getattr(kind, "from_config", None) or kind._from_config
        return make(settings, dtype=torch.float32)
    return kind.from_pretrained(
        Path(folder).expanduser(),
        config=settings,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=is_classifier,
    )
