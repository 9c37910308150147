"""Export of a checkpoint: `python -m trainer.runtime.start trainer.export.run RUN_DIR CHECKPOINT FORMAT LORA FOLDER`.

One process without a GPU. RUN_DIR is `-` if the checkpoint is not in a run directory. LORA is `merge` or `keep`. FOLDER
exists and is empty. `export.json`, the record `Exported`, is written next to the exported files.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from trainer import __version__
from trainer.checkpoint.lora import Merged, layers
from trainer.checkpoint.named import plain_names
from trainer.checkpoint.store import Checkpoint
from trainer.checkpoint.stored import MODEL, StoredCheckpoint, Weights
from trainer.config.instantiate import DIRECTIVES
from trainer.config.schema import Config
from trainer.core import records
from trainer.core.errors import UserError
from trainer.export import hf_folder
from trainer.export.huggingface import layout
from trainer.export.weights import export_safetensors, model_outputs
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Exported
from trainer.runtime import hydra_state, rng
from trainer.runtime.process import Rank
from trainer.runtime.torch_setup import silence_known_warnings
from trainer.tasks.base import Task
from trainer.train import build, deferred_modules
from trainer.train.data import Data

RECORD = "export.json"
_LIGHTNING_KEYS = ("pytorch-lightning_version", "hyper_parameters", "hparams_name", "datamodule_hyper_parameters")
_DEFAULTS: dict[str, Any] = {"pytorch-lightning_version": lightning.__version__, "loops": {}, "callbacks": {}}
SAMPLES = 2
"""Batch size for the comparison of outputs. The exporter would treat a batch size of 1 as a constant."""


def main() -> int:
    """Export according to the command line, write `export.json`, and return the exit code."""
    run = None if sys.argv[1] == "-" else RunDirectory(Path(sys.argv[1]))
    checkpoint, kind, lora, target = Checkpoint.read(Path(sys.argv[2])), sys.argv[3], sys.argv[4], Path(sys.argv[5])
    silence_known_warnings()
    record = export(run, checkpoint, kind, target, keep_lora=lora == "keep")
    (target / RECORD).write_text(records.dumps(record, indent=1))
    return 0


def export(
    run: RunDirectory | None, checkpoint: Checkpoint, kind: Any, target: Path, keep_lora: bool = False
) -> Exported:
    """Write the files, and return the record of them.

    Args:
        run: The run of the checkpoint, or None.
        checkpoint: The checkpoint.
        kind: `safetensors`, `onnx`, `hf` or `ckpt`.
        target: The folder to write.
        keep_lora: Keep LoRA adapters as separate tensors instead of merging them.

    Raises:
        UserError: If the checkpoint cannot be written in this format.
        EnvironmentFault: If a package that the format needs is not installed.
        TrainerError: If the outputs of the ONNX model differ from torch's.
    """
    metadata = metadata_of(run, checkpoint)
    more: dict[str, Any] = {}
    if kind == "ckpt":
        files = [_lightning_file(_weights(run, checkpoint, keep_lora), checkpoint, target, more)]
    elif kind == "onnx":
        from trainer.export.onnx import export_onnx

        module, inputs = _module_and_inputs(_required(run, kind), checkpoint)
        files, more["largest_difference"] = export_onnx(module, inputs, target, metadata)
    else:
        weights = _weights(run, checkpoint, keep_lora)
        if isinstance(weights, Merged):
            more["lora_merged"] = len(weights.layers)
            metadata["lora_merged"] = str(len(weights.layers))
        if kind == "hf":
            files = _hugging_face(_required(run, kind), weights, target, metadata)
        else:
            files = export_safetensors(weights, target, metadata)
    sizes = {path.name: path.stat().st_size for path in files}
    return Exported(format=kind, files=sizes, metadata=metadata, **more)


def _lightning_file(weights: Weights, checkpoint: Checkpoint, target: Path, more: dict[str, Any]) -> Path:
    """Write `model.ckpt`, which Lightning's `load_from_checkpoint` and `trainer.test(ckpt_path=...)` read."""
    if isinstance(weights, Merged):
        more["lora_merged"] = len(weights.layers)
    outputs = model_outputs(weights)
    names = [source for output in outputs for source in output.sources]
    tensors = {
        name: torch.empty(*weights.shapes[MODEL + name][:1], dtype=weights.shapes[MODEL + name][1]) for name in names
    }
    weights.read({MODEL + name: tensor for name, tensor in tensors.items()})
    state = StoredCheckpoint(checkpoint.path, mapped=True).state
    kept = {key: state[key] for key in _LIGHTNING_KEYS if key in state}
    kept["state_dict"] = {output.name: tensors[output.sources[0]] for output in outputs}
    path = target / "model.ckpt"
    torch.save({**_DEFAULTS, "epoch": checkpoint.epoch, "global_step": checkpoint.step, **kept}, path)
    return path


def metadata_of(run: RunDirectory | None, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the origin of the weights as strings, because safetensors and ONNX metadata hold only strings."""
    metadata = {
        "trainer_version": __version__,
        "torch_version": torch.__version__,
        "step": str(checkpoint.step),
        "epoch": str(checkpoint.epoch),
        "strategy": checkpoint.strategy,
        "metrics": json.dumps(checkpoint.metrics),
    }
    if checkpoint.monitor_value is not None:
        metadata["monitor"] = f"{checkpoint.monitor}={checkpoint.monitor_value}"
    if run is not None:
        manifest = run.manifest()
        packages = {name: version for name, version in manifest.get("packages", {}).items() if version}
        metadata["run"] = run.path.name
        metadata["run_id"] = run.id
        metadata["config_sha256"] = hashlib.sha256(run.config_path.read_bytes()).hexdigest()
        metadata["packages"] = json.dumps(packages)
        if manifest.get("code", {}).get("commit"):
            metadata["commit"] = manifest["code"]["commit"]
    return metadata


def _required(run: RunDirectory | None, kind: str) -> RunDirectory:
    if run is None:
        raise UserError(
            f"--format={kind} needs the run directory of the checkpoint, whose configuration defines the model.",
            "Name a checkpoint inside a run directory, or use --format=safetensors.",
        )
    return run


def _weights(run: RunDirectory | None, checkpoint: Checkpoint, keep_lora: bool) -> Weights:
    """Return the weights of the checkpoint, with LoRA adapters merged into them unless they are kept."""
    stored = StoredCheckpoint(checkpoint.path, mapped=True)
    if keep_lora or not layers(stored):
        return stored
    if run is None:
        raise UserError(
            "The checkpoint has LoRA adapters, and only the configuration of its run holds their scale.",
            "Name a checkpoint inside a run directory, or use --keep-lora.",
        )
    config = hydra_state.load(run)
    transposed: list[str] = []
    if config.model.get("_target_") == hf_folder.TARGET:
        network = hf_folder.without_values(_arguments(run, config))
        prefix = next(name for name in layers(stored)).partition("network.")[0]
        transposed = [prefix + name for name in hf_folder.transposed_layers(network)]
    return Merged(stored, config.finetune.lora_alpha, transposed)


def _hugging_face(run: RunDirectory, weights: Weights, target: Path, metadata: dict[str, str]) -> list[Path]:
    config = hydra_state.load(run)
    if config.model.get("_target_") == hf_folder.TARGET:
        arguments = _arguments(run, config)
        folder = arguments["folder"]
        network = hf_folder.without_values(arguments)
        return hf_folder.write_folder(network, weights, Path(folder) if folder else None, target)
    content, outputs = layout(config.model, weights, config.data.get("sequence_length"))
    used = {source for output in outputs for source in output.sources}
    for layer in weights.layers if isinstance(weights, Merged) else ():
        if f"{layer}.weight" not in used:
            raise UserError(
                f"{layer} shares its weight with another layer, which has no LoRA adapter.",
                "Use --format=safetensors.",
            )
    path = target / "config.json"
    path.write_text(json.dumps(content, indent=2))
    return [path, *export_safetensors(weights, target, metadata, outputs=outputs)]


def _arguments(run: RunDirectory, config: Config) -> dict[str, Any]:
    """Return the arguments of a Hugging Face network. Sizes that the configuration lacks come from the run's data."""
    arguments = {name: value for name, value in config.model.items() if name not in DIRECTIVES}
    if arguments.get("folder"):
        arguments["folder"] = str(Path(run.launch().cwd or ".") / Path(arguments["folder"]).expanduser())
    sizes = {"num_classes"} if "Classification" in arguments.get("class_name", "") else set()
    sizes |= set() if arguments.get("folder") else {"vocab_size"}
    missing = {name for name in sizes if arguments.get(name) is None}
    if missing:
        facts = build.build_data(config, Rank(0, 0, 1, 1, 0), build.plain_trainer()).facts
        arguments.update({name: facts[name] for name in missing if name in facts})
    return arguments


def _module_and_inputs(run: RunDirectory, checkpoint: Checkpoint) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """Return the network with the checkpoint's weights, and a batch of `SAMPLES` samples of the run's data."""
    config = hydra_state.load(run)
    config.resources.gpus = 0
    rng.seed_all(config.seed)
    data = build.build_data(config, Rank(0, 0, 1, 1, 0), build.plain_trainer())
    module = build.build_module(config, data, lambda: None)
    data.set_up(module)
    try:
        deferred_modules.run_build_hooks(module, data.trainer)
    except UserError as error:
        fix = "use --format=safetensors, or skip code that needs several processes if world_size is 1"
        raise UserError(f"--format=onnx: {error.message}", fix) from error
    stored = StoredCheckpoint(checkpoint.path, mapped=True)
    stored.read({MODEL + name: value for name, value in plain_names(module.state_dict()).items()})
    network = uncompiled(module.model if isinstance(module, Task) else module)
    return network, _inputs(module, data)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module without torch.compile, including its submodules: the exporter traces them itself."""
    if isinstance(module, torch._dynamo.OptimizedModule):
        return uncompiled(module._orig_mod)
    module._compiled_call_impl = None
    for name, child in list(module.named_children()):
        setattr(module, name, uncompiled(child))
    return module


def _inputs(module: LightningModule, data: Data) -> tuple[torch.Tensor, ...]:
    """Return `example_input_array` of the module, else the first tensor of a training batch.

    Raises:
        UserError: If forward does not accept them: inputs of an ONNX model are tensors by position.
    """
    network = module.model if isinstance(module, Task) else module
    if type(network).forward in (nn.Module.forward, LightningModule.forward):
        raise _no_onnx(f"{type(network).__name__} has no forward", "Give it one, and set self.example_input_array.")
    example = module.example_input_array
    if isinstance(example, dict):
        raise _no_onnx("example_input_array is a dict", "Use a tensor, or a tuple of them in the order of forward.")
    if example is None:
        loader = data.training_loader()
        batch = next(iter(loader))
        if isinstance(loader, CombinedLoader):  # also yields the indices of the batch and of the loader
            batch = batch[0]
        example = batch[0] if isinstance(batch, (list, tuple)) else batch
    inputs = tuple(example) if isinstance(example, (list, tuple)) else (example,)
    if not all(isinstance(one, torch.Tensor) for one in inputs):
        problem = "the inputs of the network cannot be derived from a training batch"
        raise _no_onnx(problem, "Set self.example_input_array in the LightningModule: a tensor, or a tuple of them.")
    inputs = tuple(_samples(one) for one in inputs)
    try:
        with torch.no_grad():
            output = network.eval()(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(one.shape)) for one in inputs)
        problem = f"forward does not accept inputs of {shapes} ({type(error).__name__}: {error})"
        fix = "Set self.example_input_array to inputs that it accepts: a tensor, or a tuple of them."
        raise _no_onnx(problem, fix) from error
    if not isinstance(output, torch.Tensor):
        problem = f"forward returns a {type(output).__name__}, but only a single tensor is supported"
        raise _no_onnx(problem, "Wrap the network in a module that returns one tensor.")
    return inputs


def _no_onnx(problem: str, fix: str) -> UserError:
    return UserError(f"--format=onnx: {problem}.", f"{fix} Or use --format=safetensors.")


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    repeated = torch.cat([tensor] * SAMPLES) if len(tensor) < SAMPLES else tensor
    return repeated[:SAMPLES].detach().cpu()
