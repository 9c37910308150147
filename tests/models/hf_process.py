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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
from trainer.models import linear_cross_entropy
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


FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 8},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 4.0},
    "recurrent_gemma": {"logits_soft_cap": 0.5, "lru_width": 32},
    "mixtral": {"num_local_experts": 2, "num_key_value_heads": 4},
}
"""Language models with a tied output layer, an untied one, a capped one, two that scale, and one with experts."""


def network_of(family: str, lora_on_head: bool = False) -> HuggingFace:
    torch.manual_seed(0)
    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    network = HuggingFace(
        config={"model_type": family, **sizes, **FAMILIES.get(family, {})},
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
    )
    if lora_on_head:
        prepare(LanguageModelling(network), FineTuneOptions(lora_rank=2, lora_layers=["lm_head"]))
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    return network


class MostLogits(TorchDispatchMode):
    """Records the most rows of a tensor of logits that an operator returns."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, one.numel() // VOCABULARY)
        return result


def losses(tokens: torch.Tensor) -> dict[str, Any]:
    """Loss and gradients of our chunks, and of the library's own loss."""
    linear_cross_entropy.CHUNK_BYTES["cpu"] = 4 * VOCABULARY * 9
    found: dict[str, Any] = {}
    for name in (*FAMILIES, "lora on the head"):
        family = "llama" if name == "lora on the head" else name
        network, theirs = (network_of(family, name != family) for _ in range(2))
        task = LanguageModelling(network)
        with MostLogits() as mode:
            loss = task.training_step((tokens[:, :-1], tokens[:, 1:]), 0)
            loss.backward()
        # the library shifts the labels itself, so that the last position has none
        expected = theirs.network(input_ids=tokens, labels=tokens).loss
        expected.backward()
        pairs = zip(network.named_parameters(), theirs.parameters(), strict=True)
        gradients = [
            (one.grad - other.grad).norm() / other.grad.norm() for (_, one), other in pairs if one.requires_grad
        ]
        task.eval()
        with torch.no_grad():
            evaluated = task._evaluate((tokens[:, :-1], tokens[:, 1:]))
            plain = LanguageModelling(theirs.eval(), chunked_loss=False)._evaluate((tokens[:, :-1], tokens[:, 1:]))
        found[name] = {
            "computes": task.computes_loss,
            "rows": mode.rows,
            "loss": abs(float((loss / expected).detach()) - 1),
            "gradients": float(max(gradients)),
            "evaluation": float((evaluated - plain).abs().max() / plain.max()),
            "logits": float((network(tokens) - theirs(tokens)).abs().max()),
        }
    return found


def unknown(tokens: torch.Tensor) -> dict[str, Any]:
    """Networks whose logits change in ways that the chunks do not know: their loss is computed from all logits."""

    def twisted(change: Callable[[torch.Tensor], torch.Tensor]) -> HuggingFace:
        network = network_of("llama")
        forward = network.network.forward

        def changed(*inputs: Any, **named: Any) -> Any:
            output = forward(*inputs, **named)
            output.logits = change(output.logits)
            return output

        network.network.forward = changed
        return network

    def masked(logits: torch.Tensor) -> torch.Tensor:
        logits[..., -3:] = -1e4
        return logits

    found = {}
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "sigmoid": torch.sigmoid,
        "fewer ids": lambda logits: logits[..., :-3],
        "temperature by position": lambda logits: logits * torch.arange(1.0, logits.shape[1] + 1).view(1, -1, 1),
        "shifted": lambda logits: logits + 1.0,
        "masked in place": masked,
        "capped in place": lambda logits: (logits.view_as(logits).tanh_(), logits)[1],
        "rounded": lambda logits: torch.div(logits, 0.1, rounding_mode="floor"),
        "viewed": lambda logits: logits.view(*logits.shape),
        "rolled": lambda logits: logits.roll(1, -1),
        "twice": lambda logits: torch.tanh(torch.tanh(logits)),
        "doubled": lambda logits: logits * 2.0,
    }
    for name, change in changes.items():
        network = twisted(change)
        targets = tokens.clamp(max=VOCABULARY - 4)
        loss = LanguageModelling(network).training_step((tokens, targets), 0)
        expected = nn.functional.cross_entropy(network(tokens).flatten(0, 1), targets.flatten())
        found[name] = {"computes": network.computes_loss, "loss": abs(float((loss / expected).detach()) - 1)}
    return found


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
    found |= {"losses": losses(tokens), "unknown": unknown(tokens)}

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
