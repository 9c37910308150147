"""What is exported in Hugging Face's layout loads in `transformers` and gives the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.core.errors import UserError
from trainer.export.huggingface import TARGET, layout
from trainer.export.weights import export_safetensors
from trainer.models.transformer import Transformer

APART = Path(sys.prefix) / "transformers"
"""Not in site-packages: torchmetrics imports it wherever it finds it, 0.9 s more at the start of every rank."""
SIZES = {"vocab_size": 61, "sequence_length": 16, "dim": 32, "layers": 2, "heads": 4}
GPT2 = {"norm": "layer", "activation": "gelu", "positions": "learned"}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {"tied": False, "kv_heads": 2, "rope_theta": 500_000.0},
    "llama_tied_bias": {"bias": True, "ffn_dim": 48},
    "gpt2": {**GPT2, "bias": True},
    "gpt2_untied": {**GPT2, "tied": False, "norm_eps": 1e-3},
}
COMPARE = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, loading = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    wrong = {key: list(value) for key, value in loading.items() if value}
    assert not wrong, wrong
    given = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = model.eval()(given["tokens"]).logits
    print(folder.name, type(model).__name__, (logits - given["logits"]).abs().max().item())
"""


def saved(folder: Path, options: dict[str, Any]) -> tuple[torch.nn.Module, StoredCheckpoint]:
    torch.manual_seed(5)
    network = Transformer(**SIZES, **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases and norms, too, so that one left out would be seen
    store = CheckpointStore(folder)
    writer = CheckpointWriter(store, asynchronous=False)
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    writer.save({"state_dict": state, "optimizer_states": []}, store.path(1), CommitInfo(step=1))
    return network, StoredCheckpoint(store.path(1), mapped=True)


@pytest.mark.skipif(not APART.is_dir(), reason=f"./launch/test puts transformers into {APART}")
def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    for name, options in NETWORKS.items():
        network, stored = saved(tmp_path / "checkpoints" / name, options)
        folder = tmp_path / "exported" / name
        config, outputs = layout({"_target_": TARGET, **SIZES, **options}, stored, None)
        export_safetensors(stored, folder / "out", outputs=outputs, max_file_bytes=20_000)
        (folder / "out" / "config.json").write_text(json.dumps(config))
        tokens = torch.randint(SIZES["vocab_size"], (3, 16))
        with torch.no_grad():
            logits = network.eval()(tokens)
        save_file({"tokens": tokens, "logits": logits}, folder / "expected.safetensors")
    ran = subprocess.run(
        [sys.executable, "-c", COMPARE, str(tmp_path / "exported")],
        env={**os.environ, "PYTHONPATH": str(APART), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [line.split() for line in ran.stdout.splitlines()]
    assert {name: kind for name, kind, _ in found} == {
        name: "LlamaForCausalLM" if name.startswith("llama") else "GPT2LMHeadModel" for name in NETWORKS
    }
    for name, _, difference in found:
        assert float(difference) < 1e-4, name


def test_every_weight_is_used_once(tmp_path: Path) -> None:
    """Also the bytes of what is exported are those of the network, but for GPT-2's biases that ours has not."""
    for name, options in NETWORKS.items():
        network, stored = saved(tmp_path / name, options)
        config, outputs = layout({"_target_": TARGET, **SIZES, **options}, stored, None)
        used = [source for output in outputs for source in output.sources]
        assert len(used) == len(set(used))
        assert set(used) == {f"model.{name}" for name, _ in network.named_parameters()}
        assert config["vocab_size"] == SIZES["vocab_size"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"_target_": "torch.nn.Linear"}, "does not support torch.nn.Linear"),
        ({"_target_": TARGET, **SIZES, "norm": "layer"}, "no Hugging Face class for norm=layer"),
        ({"_target_": TARGET, **SIZES, **GPT2, "kv_heads": 2}, "kv_heads=2 of 4 heads"),
    ],
)
def test_a_network_without_a_layout_is_refused(tmp_path: Path, model: dict[str, Any], message: str) -> None:
    _, stored = saved(tmp_path, {})
    with pytest.raises(UserError, match=message):
        layout(model, stored, None)
