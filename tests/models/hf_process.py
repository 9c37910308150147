"""Writes what `test_hf.py` looks at: `python hf_process.py FOLDER`, with transformers and peft on PYTHONPATH."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from trainer.checkpoint.commit import CommitInfo
from trainer.checkpoint.io import CheckpointWriter
from trainer.checkpoint.lora import Merged
from trainer.checkpoint.store import CheckpointStore
from trainer.checkpoint.stored import StoredCheckpoint
from trainer.config.schema import FineTuneOptions
from trainer.core.errors import UserError
from trainer.export.hf_folder import transposed_layers, without_values, write_folder
from trainer.export.weights import export_safetensors
from trainer.models.hf import HuggingFace
from trainer.models.transformer import Transformer
from trainer.strategies.deferred import construct, make_whole
from trainer.tasks.language_modelling import LanguageModelling
from trainer.train.fine_tuning import load_initial_weights, prepare

VOCABULARY, LENGTH = 61, 16
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VIT = {
    "model_type": "vit",
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}


def networks(folder: Path, tokens: torch.Tensor) -> dict[str, Any]:
    settings = GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=LENGTH, bos_token_id=0, eos_token_id=0
    )
    original = GPT2LMHeadModel(settings).eval()
    original.save_pretrained(folder / "gpt2")
    ours = HuggingFace(folder=str(folder / "gpt2"), vocab_size=VOCABULARY, sequence_length=LENGTH)
    assert ours.training
    fresh = HuggingFace(folder=str(folder / "gpt2"), pretrained=False)
    pairs = list(zip(fresh.state_dict().values(), ours.state_dict().values(), strict=True))
    llama = HuggingFace(config=LLAMA, vocab_size=VOCABULARY, sequence_length=LENGTH)
    vit = HuggingFace("AutoModelForImageClassification", config=VIT, num_classes=10)
    with torch.no_grad():
        return {
            "folder": {
                "class": type(ours.network).__name__,
                "difference": (ours.eval()(tokens) - original(tokens).logits).abs().max().item(),
                "blocks": [type(block).__name__ for block in ours.blocks()],
            },
            "not pretrained": {
                "same shapes": all(one.shape == other.shape for one, other in pairs),
                "same weights": all(torch.equal(one, other) for one, other in pairs),
            },
            "config": list(llama(tokens).shape),
            "images": list(vit(torch.randn(2, 1, 8, 8)).shape),
            "classifier": classifier(folder, tokens),
        }


def classifier(folder: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """A folder with another number of classes than the data."""
    settings = BertConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=VOCABULARY,
        num_labels=2,
        pad_token_id=0,
    )
    BertForSequenceClassification(settings).save_pretrained(folder / "bert")
    network = HuggingFace("AutoModelForSequenceClassification", folder=str(folder / "bert"), num_classes=5).eval()
    padded = torch.nn.functional.pad(tokens, (0, 7), value=0)
    change = (network(tokens) - network(padded)).abs().max().item()
    return {"shape": list(network(tokens).shape), "change by padding": change}


def mistakes(folder: Path) -> dict[str, str]:
    gpt2 = str(folder / "gpt2")
    wrong: dict[str, Callable[[], Any]] = {
        "class": lambda: HuggingFace("AutoModelForCausaLM", folder=gpt2),
        "folder": lambda: HuggingFace(folder=str(folder)),
        "architecture": lambda: HuggingFace(config={"model_type": "gpt9"}),
        "vocabulary": lambda: HuggingFace(folder=gpt2, vocab_size=99),
        "length": lambda: HuggingFace(folder=gpt2, sequence_length=99),
        "lora": lambda: prepare(decoder(), FineTuneOptions(lora_rank=2, lora_layers=["querry"])),
    }
    said = {}
    for name, make in wrong.items():
        try:
            make()
        except UserError as error:
            said[name] = str(error)
    return said


def deferred(tokens: torch.Tensor) -> dict[str, bool]:
    def make() -> HuggingFace:
        torch.manual_seed(3)
        return HuggingFace(config=LLAMA, vocab_size=VOCABULARY)

    whole, later = make(), construct(make)
    on_meta = all(parameter.is_meta for parameter in later.parameters())
    make_whole(later)
    return {"on meta": on_meta, "equal": torch.equal(whole(tokens), later(tokens))}


def decoder() -> LanguageModelling:
    torch.manual_seed(1)
    return LanguageModelling(Transformer(VOCABULARY, LENGTH, dim=16, layers=2, heads=2))


def lora(module: LanguageModelling, options: FineTuneOptions, tokens: torch.Tensor) -> dict[str, Any]:
    """A few steps of what is left to train."""
    before = module(tokens)
    prepare(module, options)
    start = module(tokens)
    names = [name for name, _ in module.named_parameters()]
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer = torch.optim.SGD([one for one in module.parameters() if one.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        module.training_step((tokens, tokens), 0).backward()
        optimizer.step()
    changed = [name for name, value in module.state_dict().items() if not torch.equal(value, kept[name])]
    return {
        "difference at the start": (start - before).abs().max().item(),
        "changed": changed,
        "added": sum(".lora_" in name for name in names),
    }


def exported(module: LanguageModelling, folder: Path, network: HuggingFace | None = None) -> Merged:
    """What `trainer export` reads of a checkpoint of the module; `network`: it without additions."""
    store = CheckpointStore(folder)
    state = {"state_dict": module.state_dict(), "optimizer_states": []}
    CheckpointWriter(store, asynchronous=False).save(state, store.path(1), CommitInfo(step=1))
    turned = [f"model.{name}" for name in transposed_layers(network)] if network is not None else []
    return Merged(StoredCheckpoint(store.path(1), mapped=True), FineTuneOptions.lora_alpha, turned)


def merged(ours: LanguageModelling, theirs: LanguageModelling, folder: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """Networks with trained additions, and what is read of them without peft."""
    plain = decoder()
    (file,) = export_safetensors(exported(ours, folder / "ours"), folder / "ours" / "out")
    load_initial_weights(plain, FineTuneOptions(init_from=str(file)), log=False)
    network = without_values({"folder": str(folder / "gpt2"), "pretrained": True})
    weights = exported(theirs, folder / "theirs", network)
    (folder / "gpt2" / "tokenizer.json").write_text("{}")
    files = write_folder(network, weights, folder / "gpt2", folder / "theirs" / "out")
    read, said = GPT2LMHeadModel.from_pretrained(folder / "theirs" / "out", output_loading_info=True)
    return {
        "ours": difference(plain, ours, tokens),
        "theirs": (read.eval()(tokens).logits - theirs.eval()(tokens)).abs().max().item(),
        "wrong": {key: sorted(value) for key, value in said.items() if value},
        "layers": len(weights.layers),
        "square": [name for name in weights.transposed if name.endswith("attn.c_proj")],
        "files": [path.name for path in files],
    }


def difference(one: nn.Module, other: nn.Module, tokens: torch.Tensor) -> float:
    return (one.eval()(tokens) - other.eval()(tokens)).abs().max().item()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, VOCABULARY, (3, LENGTH))
    found: dict[str, Any] = {**networks(folder, tokens), "mistakes": mistakes(folder), "deferred": deferred(tokens)}

    options = FineTuneOptions(lora_rank=2, train=["norm"])
    base, adapted = decoder(), decoder()
    save_file({name: value.clone() for name, value in base.state_dict().items()}, folder / "base.safetensors")
    found["lora ours"] = lora(adapted, options, tokens)
    theirs = HuggingFace(folder=str(folder / "gpt2"), config={"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0})
    theirs_adapted = LanguageModelling(theirs)
    found["lora theirs"] = lora(theirs_adapted, FineTuneOptions(lora_rank=2), tokens)
    found["merged"] = merged(adapted, theirs_adapted, folder, tokens)

    save_file({name: value.clone() for name, value in adapted.state_dict().items()}, folder / "lora.safetensors")
    for name, expected in (("base", base), ("lora", adapted)):
        again = decoder()
        for parameter in again.parameters():
            nn.init.normal_(parameter)
        prepare(again, options)
        load_initial_weights(again, FineTuneOptions(init_from=str(folder / f"{name}.safetensors")), log=False)
        found[f"lora from {name}"] = difference(again, expected, tokens)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
