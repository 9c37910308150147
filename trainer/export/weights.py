"""Export of the weights of a checkpoint as safetensors, read and written one file at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainer.checkpoint.stored import MODEL, StoredCheckpoint, Weights

COMPILED = "_orig_mod."
MAX_FILE_BYTES = 5_000_000_000
"""Maximum size of a file, the same as in Hugging Face."""


def _only(parts: list[torch.Tensor]) -> torch.Tensor:
    (tensor,) = parts
    return tensor


@dataclass(frozen=True)
class Output:
    """One tensor of an exported file, and the stored tensors that it is made from."""

    name: str
    sources: tuple[str, ...]
    """Names in the model's state dict."""
    make: Callable[[list[torch.Tensor]], torch.Tensor] = _only
    """Makes the tensor from the sources, in their order. It must not have more elements than they have together."""


def export_safetensors(
    checkpoint: Path | Weights,
    target: Path,
    metadata: dict[str, str] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    outputs: list[Output] | None = None,
) -> list[Path]:
    """Write `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with an index.

    At most one file is in memory: the rest of the checkpoint is not read yet, or memory-mapped.

    Args:
        checkpoint: The folder of a checkpoint, or its weights.
        target: The folder to write.
        metadata: Metadata of each file.
        max_file_bytes: Maximum size of a file.
        outputs: The tensors to write. By default those of the LightningModule's state dict, without the prefix that
            torch.compile adds to their names, and tied parameters under each of their names.

    Returns:
        The files.

    Raises:
        UserError: If the checkpoint is not complete.
    """
    stored: Weights = StoredCheckpoint(checkpoint, mapped=True) if isinstance(checkpoint, Path) else checkpoint
    parts = _split(stored, model_outputs(stored) if outputs is None else outputs, max_file_bytes)
    target.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    index: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, start=1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {output.name: _made(stored, output) for output in part}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, target / file, {"format": "pt", **(metadata or {})})
        index.update(dict.fromkeys(tensors, file))
        files.append(target / file)
        del tensors
    if len(parts) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": index}
        files.append(target / "model.safetensors.index.json")
        files[-1].write_text(json.dumps(content, indent=1))
    return files


def model_outputs(stored: Weights) -> list[Output]:
    """Return every tensor of the model under its own name."""
    names = [name.removeprefix(MODEL) for name in sorted(stored.shapes) if name.startswith(MODEL)]
    plain = {plain_name(name) for name in names}
    if len(plain) < len(names):  # a layer is stored both compiled and not compiled
        return [Output(name, (name,)) for name in names]
    return [Output(plain_name(name), (name,)) for name in names]


def plain_name(name: str) -> str:
    """Return the name of a parameter without `_orig_mod.`, which torch.compile adds for a module that it wraps."""
    return name.replace(COMPILED, "")


def _made(stored: Weights, output: Output) -> torch.Tensor:
    shapes = [stored.shapes[MODEL + name] for name in output.sources]
    sources = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    stored.read({MODEL + name: tensor for name, tensor in zip(output.sources, sources, strict=True)})
    return output.make(sources).contiguous()


def _split(stored: Weights, outputs: list[Output], max_file_bytes: int) -> list[list[Output]]:
    """Distribute the outputs over files of at most this size. A larger tensor gets its own file."""
    parts: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        needed = sum(_nbytes(stored, name) for name in output.sources)
        if parts[-1] and size + needed > max_file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(output)
        size += needed
    return parts


def _nbytes(stored: Weights, name: str) -> int:
    shape, dtype = stored.shapes[MODEL + name]
    return shape.numel() * dtype.itemsize
