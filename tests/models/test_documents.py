"""Documents packed in one sequence: the same losses as each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.config.strategy import Single
from trainer.core.errors import UserError
from trainer.data.text import Text
from trainer.data.token_shards import TokenShards
from trainer.data.tokenize import Settings, tokenize
from trainer.data.tokens import TokenWindows
from trainer.models.documents import attention, document_mask, documents_of, positions_of
from trainer.models.transformer import Transformer
from trainer.strategies.blocks import prepare
from trainer.tasks.language_modelling import LanguageModelling

END, VOCABULARY, LENGTH = 0, 20, 16
LENGTHS = (5, 1, 7, 3)
"""Tokens of each document with its end; together one sequence."""
GPT2: dict[str, Any] = {"norm": "layer", "activation": "gelu", "positions": "learned", "bias": True}
LLAMA: dict[str, Any] = {"kv_heads": 2, "tied": False}


def model(document_end: int | None, options: dict[str, Any]) -> Transformer:
    torch.manual_seed(0)
    network = Transformer(VOCABULARY, LENGTH, dim=16, layers=2, heads=4, document_end=document_end, **options)
    return network.double()


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([END])
    return [torch.cat([torch.randint(1, VOCABULARY, (n - 1,), generator=generator), ends]) for n in LENGTHS]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("options", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_packed_documents_have_the_losses_of_each_alone(
    options: dict[str, Any], checkpointing: Any, tmp_path: Path
) -> None:
    packed = torch.cat(documents())
    # a token more, which the last document's end does not predict
    numpy.append(packed.numpy(), 1).astype(numpy.uint16).tofile(tmp_path / "tokens.bin")
    inputs, targets = TokenWindows([tmp_path / "tokens.bin"], LENGTH, numpy.uint16, END)[0]
    alone = LanguageModelling(model(None, options))
    losses = [alone.model(one[None, :-1], one[None, 1:]).total for one in documents() if len(one) > 1]
    expected = torch.stack(losses).sum() / (sum(LENGTHS) - len(LENGTHS))
    expected.backward()

    network = model(END, options)
    prepare(network, Single(activation_checkpointing=checkpointing))
    loss = LanguageModelling(network).training_step((inputs[None], targets[None]), 0)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the loss is at least float32; rotary tables are
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(
            parameter.grad, dict(alone.model.named_parameters())[name].grad, rtol=1e-5, atol=1e-8
        )
    unmasked = LanguageModelling(model(None, options)).training_step((inputs[None], targets[None]), 0)
    assert abs(float((unmasked - expected).detach())) > 1e-4


def test_positions_count_from_the_beginning_of_each_document() -> None:
    rows = torch.stack([torch.cat(documents()), torch.full((LENGTH,), 3)])
    found = documents_of(rows, END)
    assert found[0].tolist() == [0] * 5 + [1] + [2] * 7 + [3] * 3
    assert positions_of(found)[0].tolist() == [*range(5), 0, *range(7), *range(3)]
    assert positions_of(found)[1].tolist() == [*range(LENGTH)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_mask_of_flex_attention_is_that_of_scaled_dot_product_attention() -> None:
    """Without gradients: flex attention has a backward pass on GPUs only (`test_gpu.py`)."""
    generator = torch.Generator().manual_seed(2)
    found = documents_of(torch.cat(documents()).expand(2, -1), END)
    query = torch.randn(2, 4, LENGTH, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, LENGTH, 16, generator=generator)
    flex = document_mask(found, flex=True)
    assert isinstance(flex, BlockMask)
    mixed = [
        attention(query, key, value, mask, causal=True, dropout=0.0)
        for mask in (flex, document_mask(found, flex=False))
    ]
    torch.testing.assert_close(*mixed)


def test_the_data_tells_the_model_what_ends_a_document(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} is a number.\n" * 3)
    data = Text(root=str(tmp_path / "texts"), sequence_length=64, cache=str(tmp_path / "cache"), document_mask=True)
    data.prepare_data()
    data.setup("fit")
    assert data.facts()["document_end"] == 0
    inputs, targets = data.train[0]
    assert (inputs == 0).any()
    assert (targets[inputs == 0] == -100).all()
    assert (targets[inputs != 0] >= 0).all()
    plain = Text(root=str(tmp_path / "texts"), sequence_length=64, cache=str(tmp_path / "cache"))
    plain.prepare_data()
    plain.setup("fit")
    assert "document_end" not in plain.facts()
    assert (plain.train[0][1] >= 0).all()


def test_shards_of_bytes_end_documents_with_zero(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(400)))
    tokenize([tmp_path / "texts.jsonl"], tmp_path / "shards", Settings(held_out=0.2), 1, lambda *_: None)
    data = TokenShards(str(tmp_path / "shards"), sequence_length=32, document_mask=True)
    data.setup("fit")
    inputs, targets = data.train[0]
    assert data.facts()["document_end"] == 0
    assert (inputs == 0).any()
    assert (targets[inputs == 0] == -100).all()


def test_a_model_that_would_not_mask_is_refused_at_the_prompt() -> None:
    def checked(*overrides: str) -> None:
        overrides = (*overrides, "data=text", "data.document_mask=true", "resources.gpus=0")
        check(compose([*overrides], config_dirs=[]).config)

    checked("model=transformer")
    with pytest.raises(UserError, match="RecurrentDecoder has no argument document_end"):
        checked("model=rnn_decoder")


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_attention_on_a_gpu_gives_the_losses_and_gradients_of_the_cpu(compiled: bool) -> None:
    tokens = torch.randint(0, 50, (2, 257), generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        network = Transformer(50, 256, dim=64, layers=2, heads=4, kv_heads=2, document_end=3).to(device)
        task = LanguageModelling(network)
        prepare(task, Single(compile=compiled and device == "cuda", activation_checkpointing="selective"))
        loss = task.training_step((tokens[:, :-1].to(device), tokens[:, 1:].to(device)), 0)
        loss.backward()
        results.append([loss.detach().cpu(), *(parameter.grad.cpu() for parameter in network.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
