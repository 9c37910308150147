"""Writes a checkpoint in another format: `worker/start.py export RUN_DIR CHECKPOINT FORMAT LORA FOLDER`.

One process without a GPU. RUN_DIR may be `-`: the checkpoint lies in no run. LORA is `merge` or `keep`. FOLDER is
there, and empty; beside the files it gets `export.json`: {"format", "files": {name: bytes}, "metadata",
"largest_difference" (ONNX only), "lora_merged" (number of layers, where there are additions)}.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from trainer import __version__
from trainer.checkpoint import hf_folder
from trainer.checkpoint.export import export_safetensors
from trainer.checkpoint.huggingface import layout
from trainer.checkpoint.lora import Merged, layers
from trainer.checkpoint.store import Checkpoint
from trainer.checkpoint.stored import MODEL, Stored, Weights
from trainer.config.build import DIRECTIVES
from trainer.config.schema import Config
from trainer.errors import TrainerError, UserError
from trainer.runs.directory import RunDirectory
from trainer.tasks.base import Task
from trainer.worker import build, hydra_state, late, rng
from trainer.worker.data import Data
from trainer.worker.process import Rank
from trainer.worker.torch_setup import silence_known_warnings

RECORD = "export.json"
SAMPLES = 2
"""In the batch that the outputs are compared on; one would be taken for a fixed size."""


def main() -> int:
    run = None if sys.argv[1] == "-" else RunDirectory(Path(sys.argv[1]))
    checkpoint, kind, lora, target = Checkpoint.read(Path(sys.argv[2])), sys.argv[3], sys.argv[4], Path(sys.argv[5])
    silence_known_warnings()
    try:
        record = export(run, checkpoint, kind, target, keep_lora=lora == "keep")
    except TrainerError as error:
        print(f"trainer: {error}", file=sys.stderr)
        return error.code
    (target / RECORD).write_text(json.dumps(record, indent=1))
    return 0


def export(
    run: RunDirectory | None, checkpoint: Checkpoint, kind: str, target: Path, keep_lora: bool = False
) -> dict[str, Any]:
    """Write the files; returns what goes into `export.json`."""
    metadata = metadata_of(run, checkpoint)
    more: dict[str, Any] = {}
    if kind == "onnx":
        from trainer.checkpoint.to_onnx import export_onnx

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
    return {"format": kind, "files": sizes, "metadata": metadata, **more}


def metadata_of(run: RunDirectory | None, checkpoint: Checkpoint) -> dict[str, str]:
    """Where the weights come from, as text: safetensors and ONNX keep nothing else."""
    found = {
        "trainer_version": __version__,
        "torch_version": torch.__version__,
        "step": str(checkpoint.step),
        "epoch": str(checkpoint.epoch),
        "strategy": checkpoint.strategy,
        "metrics": json.dumps(checkpoint.metrics),
    }
    if checkpoint.monitor_value is not None:
        found["monitor"] = f"{checkpoint.monitor}={checkpoint.monitor_value}"
    if run is not None:
        manifest = run.manifest()
        packages = {name: version for name, version in manifest.get("packages", {}).items() if version}
        found["run"] = run.path.name
        found["run_id"] = run.id
        found["config_sha256"] = hashlib.sha256(run.config_path.read_bytes()).hexdigest()
        found["packages"] = json.dumps(packages)
        if manifest.get("code", {}).get("commit"):
            found["commit"] = manifest["code"]["commit"]
    return found


def _required(run: RunDirectory | None, kind: str) -> RunDirectory:
    if run is None:
        raise UserError(
            f"--format={kind} needs the run of the checkpoint: its configuration says what the model is.",
            "Name a checkpoint inside a run directory, or use --format=safetensors.",
        )
    return run


def _weights(run: RunDirectory | None, checkpoint: Checkpoint, keep_lora: bool) -> Weights:
    """The checkpoint's, low-rank additions merged into them unless they are kept."""
    stored = Stored(checkpoint.path, mapped=True)
    if keep_lora or not layers(stored):
        return stored
    if run is None:
        raise UserError(
            "The checkpoint has low-rank additions, and only its run says how they are scaled.",
            "Name a checkpoint inside a run directory, or use --keep-lora.",
        )
    config = hydra_state.load(run)
    turned: list[str] = []
    if config.model.get("_target_") == hf_folder.TARGET:
        network = hf_folder.without_values(_arguments(run, config))
        prefix = next(name for name in layers(stored)).partition("network.")[0]
        turned = [prefix + name for name in hf_folder.transposed_layers(network)]
    return Merged(stored, config.finetune.lora_alpha, turned)


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
                f"{layer} shares its weight with another layer, and has additions that the other has not.",
                "Use --format=safetensors.",
            )
    path = target / "config.json"
    path.write_text(json.dumps(content, indent=2))
    return [path, *export_safetensors(weights, target, metadata, outputs=outputs)]


def _arguments(run: RunDirectory, config: Config) -> dict[str, Any]:
    """Of a Hugging Face network, filled from the run's data where only they tell its size."""
    found = {name: value for name, value in config.model.items() if name not in DIRECTIVES}
    if found.get("folder"):
        found["folder"] = str(Path(run.launch().get("cwd") or ".") / Path(found["folder"]).expanduser())
    sized = {"num_classes"} if "Classification" in found.get("class_name", "") else set()
    sized |= set() if found.get("folder") else {"vocab_size"}
    missing = {name for name in sized if found.get(name) is None}
    if missing:
        facts = build.build_data(config, Rank(0, 0, 1, 1, 0), build.plain_trainer()).facts
        found.update({name: facts[name] for name in missing if name in facts})
    return found


def _module_and_inputs(run: RunDirectory, checkpoint: Checkpoint) -> tuple[Any, tuple[torch.Tensor, ...]]:
    """The network with the checkpoint's weights, and a batch of `SAMPLES` from the run's own data."""
    config = hydra_state.load(run)
    config.resources.gpus = 0
    rng.seed_all(config.seed)
    data = build.build_data(config, Rank(0, 0, 1, 1, 0), build.plain_trainer())
    module = build.build_module(config, data, lambda: None)
    data.set_up(module)
    try:
        late.build_now(module, data.trainer)
    except UserError as error:
        fix = "use --format=safetensors, or leave out what needs more than one process where there is one"
        raise UserError(f"--format=onnx: {error.message}", fix) from error
    stored = Stored(checkpoint.path, mapped=True)
    stored.read({MODEL + name: value for name, value in module.state_dict().items()})
    return (module.model if isinstance(module, Task) else module), _inputs(module, data)


def _inputs(module: LightningModule, data: Data) -> tuple[torch.Tensor, ...]:
    """The module's own `example_input_array`, else the first tensor of a training batch."""
    example = module.example_input_array
    if example is None:
        batch = next(iter(data.training_loader()))
        example = batch[0] if isinstance(batch, (list, tuple)) else batch
    inputs = tuple(example) if isinstance(example, (list, tuple)) else (example,)
    if not all(isinstance(one, torch.Tensor) for one in inputs):
        raise UserError(
            "--format=onnx: what the network takes cannot be told from a training batch.",
            "Set self.example_input_array in the LightningModule: a tensor, or a tuple of them.",
        )
    return tuple(_samples(one) for one in inputs)


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    repeated = torch.cat([tensor] * SAMPLES) if len(tensor) < SAMPLES else tensor
    return repeated[:SAMPLES].detach().cpu()
