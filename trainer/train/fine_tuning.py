"""Fine-tuning (section `finetune`): initial weights, frozen layers, LoRA adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from types import MethodType

import torch
from lightning.pytorch import LightningModule
from torch import nn

from trainer.checkpoint import data_file
from trainer.checkpoint.foreign import read_pickled
from trainer.checkpoint.lora import ADAPTER, BASE
from trainer.checkpoint.named import plain_name, plain_names
from trainer.checkpoint.shard_index import SHARDS
from trainer.checkpoint.stored import MODEL, StoredCheckpoint
from trainer.checkpoint.wellformed import BadCheckpoint
from trainer.config.schema import FineTuneOptions
from trainer.core.errors import UserError
from trainer.core.install import pip_install
from trainer.core.near import did_you_mean, listed
from trainer.strategies.blocks import blocks_of
from trainer.strategies.initialization import recipes
from trainer.tasks.base import Task


def prepare(module: LightningModule, options: FineTuneOptions) -> None:
    """Add LoRA adapters (`lora_rank`) and set which parameters are trained (`freeze`, `train`).

    Without any of these options nothing is changed: a user's module is trained as it is.

    Raises:
        UserError: If a pattern matches nothing, or nothing is left to train.
    """
    if options.lora_rank is None and not options.freeze and not options.train:
        return
    network = network_of(module)
    if options.lora_rank is not None:
        _add_lora(network, options)
    for key, patterns, trained in (("freeze", options.freeze, False), ("train", options.train, True)):
        for _, parameter in _matching_parameters(network, key, patterns):
            parameter.requires_grad_(trained)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("finetune.freeze leaves nothing to train", "name layers to train: finetune.train=[head]")
    _freeze_batch_norm_statistics(network)


def load_initial_weights(module: LightningModule, options: FineTuneOptions, log: bool) -> None:
    """Load the weights of `init_from` into the module, on every rank.

    Deferred parameters read their values when they are sharded, one at a time.

    Args:
        module: The module, with all of its parameters.
        options: The section `finetune`.
        log: Whether to print a summary of what was loaded.

    Raises:
        UserError: If the weights do not fit the module.
    """
    if options.init_from is None:
        return
    source = plain_names(_read(Path(options.init_from)))
    network = network_of(module)
    prefix = "model." if network is not module else ""
    new = {prefix + name for name, _ in _matching_parameters(network, "new", options.new)}
    state = module.state_dict()
    loaded = {name: source[key] for name in state if name not in new and (key := _key_in(source, name, prefix))}
    _require_match(state, loaded, new)
    deferred = recipes(module)
    with torch.no_grad():
        for name, entry in loaded.items():
            if name in deferred:
                deferred[name].source = entry.read
            else:
                state[name].copy_(entry.read())
    if log:
        fresh = f", new: {listed(sorted(new))}" if new else ""
        print(f"weights from {options.init_from}: {len(loaded)} of {len(state)} tensors{fresh}", flush=True)


def network_of(module: LightningModule) -> nn.Module:
    """Return the module that patterns refer to: the network inside a task, or the user's LightningModule."""
    return module.model if isinstance(module, Task) else module


def _matching_parameters(network: nn.Module, key: str, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters whose name, or a layer above them, matches a pattern."""
    parameters = list(network.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        matching = [(name, parameter) for name, parameter in parameters if _matches(name.replace(BASE, "."), pattern)]
        if not matching:
            layers = {name.rpartition(".")[0] for name, _ in parameters} | {
                name for name, _ in network.named_children()
            }
            fix = f"{did_you_mean(pattern, layers)}it has {listed(sorted(layers))}"
            raise UserError(f"finetune.{key}: no parameter of the model matches {pattern}", fix)
        yield from matching


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _add_lora(network: nn.Module, options: FineTuneOptions) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        fix = f"{pip_install('peft')}, or use finetune.freeze without it"
        raise UserError("finetune.lora_rank needs the package peft, which is not installed", fix) from None
    layers = _lora_layers(network, options.lora_layers)
    settings = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=layers,
        fan_in_fan_out=any(type(network.get_submodule(name)).__name__ == "Conv1D" for name in layers),
    )
    # In place: the network keeps its class and its attributes (blocks, tie).
    inject_adapter_in_model(settings, network)


def _lora_layers(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Return the names of the layers to adapt: by pattern, or by default all linear layers in repeated blocks."""
    linear = [name for name, layer in network.named_modules() if _is_linear(layer)]
    if not patterns:
        in_blocks = {id(layer) for block in blocks_of(network) for layer in block.modules()}
        chosen = [name for name, layer in network.named_modules() if name in set(linear) and id(layer) in in_blocks]
        if not chosen:
            fix = f"name them: finetune.lora_layers=[...]; it has {listed(linear)}"
            raise UserError("finetune.lora_rank: the model has no linear layers in repeated blocks", fix)
        return chosen
    for pattern in patterns:
        if not any(_matches_layer(name, pattern) for name in linear):
            fix = f"{did_you_mean(pattern, linear)}it has {listed(linear)}"
            raise UserError(f"finetune.lora_layers: no linear layer of the model matches {pattern}", fix)
    return [name for name in linear if any(_matches_layer(name, pattern) for pattern in patterns)]


def _matches_layer(name: str, pattern: str) -> bool:
    """Return whether a layer matches; `query` means every layer of that name, as usual with LoRA."""
    return _matches(name, pattern) or name.endswith(f".{pattern}")


def _is_linear(layer: nn.Module) -> bool:
    # Conv1D is GPT-2's transposed linear layer; by name, because transformers may not be installed.
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


def _freeze_batch_norm_statistics(network: nn.Module) -> None:
    """Keep the running statistics of frozen batch normalization layers during training, too."""
    for layer in network.modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm) or not layer.affine:
            continue
        if not any(parameter.requires_grad for parameter in layer.parameters()):
            layer.eval()
            layer.train = MethodType(_ignore_train, layer)  # type: ignore[method-assign]


def _ignore_train(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Replace `nn.Module.train`: the layer stays in evaluation mode."""
    return layer


@dataclass(frozen=True)
class _Entry:
    """A tensor of a file."""

    shape: torch.Size
    read: Callable[[], torch.Tensor]
    """Returns it in host memory. What is memory-mapped is read from the disk only where it is used."""


def _read(path: Path) -> dict[str, _Entry]:
    """Open a state dict in a checkpoint directory, .safetensors files, or a pickled .ckpt or .pt file."""
    from safetensors import SafetensorError, safe_open

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if files and files[0].suffix == ".safetensors":
        entries = {}
        for file in files:
            try:
                data_file.require_regular(file)
                opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _unreadable(path, error) from None
            for name in opened.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  # not a mapping
                shape = torch.Size(opened.get_slice(name).get_shape())  # type: ignore[no-untyped-call]
                entries[name] = _Entry(shape, partial(opened.get_tensor, name))
        return entries
    if path.is_dir():
        stored = StoredCheckpoint(path, mapped=True)
        if not (path / SHARDS).is_dir():
            return _entries({name.removeprefix(MODEL): tensor for name, tensor in stored.whole(MODEL).items()})
        names = [name for name in stored.shapes if name.startswith(MODEL)]
        return {
            name.removeprefix(MODEL): _Entry(stored.shapes[name][0], partial(_read_one, stored, name)) for name in names
        }
    try:
        state = read_pickled(path, mapped=True)
    except BadCheckpoint as error:
        raise BadCheckpoint(f"finetune.init_from={path}: {error.message}", error.fix) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    weights = state.get("state_dict", state)
    return _entries(weights if isinstance(weights, dict) else state)


def _unreadable(path: Path, error: Exception) -> UserError:
    fix = "name a file with weights: a .ckpt, a .pt with a state dict, or .safetensors"
    return UserError(f"finetune.init_from={path}: {(str(error).splitlines() or [''])[0]}", fix)


def _entries(tensors: dict[str, torch.Tensor]) -> dict[str, _Entry]:
    return {
        name: _Entry(one.shape, partial(_same, one)) for name, one in tensors.items() if isinstance(one, torch.Tensor)
    }


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _read_one(stored: StoredCheckpoint, name: str) -> torch.Tensor:
    shape, dtype = stored.shapes[name]
    tensor = torch.empty(shape, dtype=dtype)
    stored.read({name: tensor})
    return tensor


def _key_in(source: dict[str, _Entry], name: str, prefix: str) -> str:
    """Return the key in `source` for `name` of the module: with or without the task's prefix and LoRA's; "" if none."""
    for candidate in (name, plain_name(name), plain_name(name).removeprefix(prefix)):
        for key in (candidate, candidate.replace(BASE, ".")):
            if key in source:
                return key
    return ""


def _require_match(state: dict[str, torch.Tensor], loaded: dict[str, _Entry], new: set[str]) -> None:
    """Raise UserError for missing tensors and for different shapes."""
    # Exporters leave out the second name of a tied parameter.
    filled = {_address(state[name]) for name in loaded}
    problems = [
        f"{name} is not in it"
        for name, tensor in state.items()
        if name not in loaded and name not in new and ADAPTER not in name and _address(tensor) not in filled
    ]
    problems += [
        f"{name} is {tuple(entry.shape)} in the file and {tuple(state[name].shape)} in the model"
        for name, entry in loaded.items()
        if entry.shape != state[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        fix = "use the model that the weights are from, or name layers to initialize newly: finetune.new=[head]"
        raise UserError(f"finetune.init_from does not fit the model: {shown}", fix)


def _address(tensor: torch.Tensor) -> int:
    """Return a number that tensors share if they share memory; on the meta device they have none."""
    return int(tensor.untyped_storage()._cdata) if tensor.is_meta else tensor.data_ptr()
