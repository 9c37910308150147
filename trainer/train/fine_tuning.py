"""Weights to start from, layers that stay as they are, low-rank additions: the section `finetune`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from types import MethodType

import torch
from lightning.pytorch import LightningModule
from torch import nn

from trainer.checkpoint.foreign import read_pickled
from trainer.checkpoint.lora import ADAPTER, BASE
from trainer.checkpoint.stored import MODEL, Stored
from trainer.config.schema import FineTuneOptions
from trainer.core.errors import UserError
from trainer.core.near import did_you_mean, listed
from trainer.strategies.blocks import blocks_of
from trainer.tasks.base import Task


def prepare(module: LightningModule, options: FineTuneOptions) -> None:
    """Add what `lora_rank` asks for, and say which parameters are trained. Raises UserError for a pattern that
    fits nothing. Without an option of these nothing is changed: a module of a user's is trained as it is."""
    if options.lora_rank is None and not options.freeze and not options.train:
        return
    network = network_of(module)
    if options.lora_rank is not None:
        _add_lora(network, options)
    for key, patterns, trained in (("freeze", options.freeze, False), ("train", options.train, True)):
        for _, parameter in _fitting(network, key, patterns):
            parameter.requires_grad_(trained)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("finetune.freeze leaves nothing to train", "name what is trained: finetune.train=[head]")
    _keep_frozen_statistics(network)


def take_weights(module: LightningModule, options: FineTuneOptions, say: bool) -> None:
    """Fill the module from `init_from`, on every rank alike. Raises UserError where the two do not fit.

    `say`: print what was taken.
    """
    if options.init_from is None:
        return
    source = _read(Path(options.init_from))
    network = network_of(module)
    prefix = "model." if network is not module else ""
    new = {prefix + name for name, _ in _fitting(network, "new", options.new)}
    state = module.state_dict()
    found = {name: source[there] for name in state if name not in new and (there := _name_in(source, name, prefix))}
    _require_all(state, found, new)
    with torch.no_grad():
        for name, tensor in found.items():
            state[name].copy_(tensor)
    if say:
        fresh = f", new: {listed(sorted(new))}" if new else ""
        print(f"weights from {options.init_from}: {len(found)} of {len(state)} tensors{fresh}", flush=True)


def network_of(module: LightningModule) -> nn.Module:
    """What patterns name the parts of: the network inside a task, or the user's own LightningModule."""
    return module.model if isinstance(module, Task) else module


def _fitting(network: nn.Module, key: str, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that a pattern, or the layer that it names, holds."""
    parameters = list(network.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        fitting = [(name, one) for name, one in parameters if _fits(name.replace(BASE, "."), pattern)]
        if not fitting:
            parts = {name.rpartition(".")[0] for name, _ in parameters} | {name for name, _ in network.named_children()}
            fix = f"{did_you_mean(pattern, parts)}it has {listed(sorted(parts))}"
            raise UserError(f"finetune.{key}: no parameter of the model fits {pattern}", fix)
        yield from fitting


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _add_lora(network: nn.Module, options: FineTuneOptions) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        fix = "pip install 'trainer[peft]', or use finetune.freeze without it"
        raise UserError("finetune.lora_rank needs the package peft, which is not installed", fix) from None
    layers = _lora_layers(network, options.lora_layers)
    settings = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=layers,
        fan_in_fan_out=any(type(network.get_submodule(name)).__name__ == "Conv1D" for name in layers),
    )
    # In place: the network keeps its class, and what it says of itself (blocks, tie).
    inject_adapter_in_model(settings, network)


def _lora_layers(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    linear = [name for name, layer in network.named_modules() if _is_linear(layer)]
    if not patterns:
        inside = {id(layer) for block in blocks_of(network) for layer in block.modules()}
        chosen = [name for name, layer in network.named_modules() if name in set(linear) and id(layer) in inside]
        if not chosen:
            fix = f"name them: finetune.lora_layers=[...]; it has {listed(linear)}"
            raise UserError("finetune.lora_rank: the model has no linear layers in repeated blocks", fix)
        return chosen
    for pattern in patterns:
        if not any(_fits_layer(name, pattern) for name in linear):
            fix = f"{did_you_mean(pattern, linear)}it has {listed(linear)}"
            raise UserError(f"finetune.lora_layers: no linear layer of the model fits {pattern}", fix)
    return [name for name in linear if any(_fits_layer(name, pattern) for pattern in patterns)]


def _fits_layer(name: str, pattern: str) -> bool:
    """`query` means every layer of that name, as everywhere with LoRA."""
    return _fits(name, pattern) or name.endswith(f".{pattern}")


def _is_linear(layer: nn.Module) -> bool:
    # Conv1D is GPT-2's transposed linear layer in transformers, which need not be there to ask.
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _keep_frozen_statistics(network: nn.Module) -> None:
    """A frozen batch normalisation also keeps its running statistics, in training, too."""
    for layer in network.modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or not layer.affine:
            continue
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.eval()
            layer.train = MethodType(_stays, layer)  # type: ignore[method-assign]


def _stays(layer: nn.Module, mode: bool = True) -> nn.Module:
    return layer


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Name to tensor, of everything that `finetune.init_from` may be."""
    from safetensors.torch import load_file

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if files and files[0].suffix == ".safetensors":
        return {name: tensor for file in files for name, tensor in load_file(file).items()}
    if path.is_dir():
        return {name.removeprefix(MODEL): tensor for name, tensor in Stored(path, mapped=True).whole(MODEL).items()}
    try:
        state = read_pickled(path)
    except (OSError, UnpicklingError) as error:
        fix = "name a file of weights: a .ckpt, a .pt with a state dict, or .safetensors"
        raise UserError(f"finetune.init_from={path}: {str(error).splitlines()[0]}", fix) from None
    return state.get("state_dict", state)


def _name_in(source: dict[str, torch.Tensor], name: str, prefix: str) -> str:
    """What `name` of the module is called there: also without the task around the network, and before LoRA."""
    for candidate in (name, name.removeprefix(prefix)):
        for there in (candidate, candidate.replace(BASE, ".")):
            if there in source:
                return there
    return ""


def _require_all(state: dict[str, torch.Tensor], found: dict[str, torch.Tensor], new: set[str]) -> None:
    # Exporters leave out the second name of a tied parameter.
    filled = {state[name].data_ptr() for name in found}
    problems = [
        f"{name} is not in it"
        for name, tensor in state.items()
        if name not in found and name not in new and ADAPTER not in name and tensor.data_ptr() not in filled
    ]
    problems += [
        f"{name} is {tuple(tensor.shape)} there and {tuple(state[name].shape)} here"
        for name, tensor in found.items()
        if tensor.shape != state[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        fix = "use the model of the weights, or name what shall start new: finetune.new=[head]"
        raise UserError(f"finetune.init_from does not fit the model: {shown}", fix)
