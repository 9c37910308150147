"""The weights of any checkpoint as safetensors, read and written one file at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from trainer.checkpoint.stored import MODEL, Stored

MAX_FILE_BYTES = 5_000_000_000
"""What Hugging Face splits at, too."""


def export_safetensors(
    checkpoint: Path, target: Path, metadata: dict[str, str] | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> list[Path]:
    """Write `model.safetensors`, or `model-00001-of-00003.safetensors` ... with an index, into the folder `target`.

    Names are those of the LightningModule's state dict; tied parameters are there once under each of their names.
    Of a sharded checkpoint no more than one file is in memory.
    Returns the files. Raises UserError if there is no complete checkpoint.
    """
    stored = Stored(checkpoint)
    parts = _split(stored, max_file_bytes)
    target.mkdir(parents=True, exist_ok=True)
    written, index = [], {}
    for number, names in enumerate(parts, start=1):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {name: torch.empty(stored.shapes[name][0], dtype=stored.shapes[name][1]) for name in names}
        stored.read(tensors)
        plain = {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}
        save_file(plain, target / file, {"format": "pt", **(metadata or {})})
        index.update(dict.fromkeys(plain, file))
        written.append(target / file)
    if len(parts) > 1:
        total = sum(_nbytes(stored, name) for names in parts for name in names)
        content = {"metadata": {"total_size": total}, "weight_map": index}
        written.append(target / "model.safetensors.index.json")
        written[-1].write_text(json.dumps(content, indent=1))
    return written


def _split(stored: Stored, max_file_bytes: int) -> list[list[str]]:
    """Names of the model's tensors, in files of at most this size (a larger tensor has one of its own)."""
    parts: list[list[str]] = [[]]
    size = 0
    for name in sorted(stored.shapes):
        if not name.startswith(MODEL):
            continue
        if parts[-1] and size + _nbytes(stored, name) > max_file_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += _nbytes(stored, name)
    return parts


def _nbytes(stored: Stored, name: str) -> int:
    shape, dtype = stored.shapes[name]
    return shape.numel() * dtype.itemsize
