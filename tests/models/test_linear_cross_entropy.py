"""The chunked loss beside `cross_entropy` of all logits; and what is in float32 whatever the model is in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.distributed.ranks import run_ranks
from tests.models import loss_rank
from tests.models.test_hf import APART
from trainer.models import linear_cross_entropy
from trainer.models.linear_cross_entropy import IGNORED, LossHead, rows_of_chunk
from trainer.models.rnn import RecurrentDecoder
from trainer.models.rotary import Rotary, apply_rotary
from trainer.models.transformer import Transformer
from trainer.tasks.classification import Classification
from trainer.tasks.language_modelling import LanguageModelling
from trainer.tasks.sequence_to_image import SequenceToImage

VOCABULARY, DIM, ROWS = 50, 16, 33


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of at most 9 positions: 33 of them give 9, 9, 9 and 6."""
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 4 * VOCABULARY * 9)


def operands(dtype: torch.dtype, bias: bool) -> tuple[LossHead, Tensor, Tensor]:
    torch.manual_seed(0)
    head = LossHead(DIM, VOCABULARY, bias).to(dtype)
    features = torch.randn(3, ROWS // 3, DIM, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (3, ROWS // 3))
    targets[0, 3] = targets[2, 1:] = IGNORED
    return head, features, targets


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_equal_cross_entropy(dtype: torch.dtype, tolerance: float, bias: bool) -> None:
    head, features, targets = operands(dtype, bias)
    logits = functional.linear(features, head.weight, head.bias).flatten(0, 1)
    expected = functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
    inputs = [features, *head.parameters()]
    gradients = torch.autograd.grad(expected * 3, inputs)
    losses = head(features, targets)
    torch.testing.assert_close(losses.total / losses.tokens, expected, rtol=tolerance, atol=0)
    for found, one in zip(torch.autograd.grad(losses.total / losses.tokens * 3, inputs), gradients, strict=True):
        torch.testing.assert_close(found, one, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        evaluated = head(features, targets)
    torch.testing.assert_close(evaluated.total, losses.total, rtol=tolerance, atol=0)
    assert int(evaluated.correct) == int((logits.argmax(-1) == targets.flatten()).sum())


@pytest.mark.usefixtures("small_chunks")
def test_bf16_is_as_near_to_float64_as_cross_entropy_of_all_logits_is() -> None:
    head, features, targets = operands(torch.float32, False)
    exact = functional.cross_entropy((features.double() @ head.weight.double().T).flatten(0, 1), targets.flatten())
    [by_weight] = torch.autograd.grad(exact, [head.weight])
    errors = []
    for chunked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            losses = head(features, targets)
            logits = functional.linear(features, head.weight).flatten(0, 1)
            plain = functional.cross_entropy(logits.float(), targets.flatten())
            loss = losses.total / losses.tokens if chunked else plain
        assert loss.dtype == torch.float32
        [found] = torch.autograd.grad(loss, [head.weight])
        errors.append((abs(float((loss - exact).detach())), float((found - by_weight).norm() / by_weight.norm())))
    assert errors[1][0] < max(2 * errors[0][0], 1e-4)
    assert errors[1][1] < 1.5 * errors[0][1] < 0.02


class MostLogits(TorchDispatchMode):
    """Records the most rows of a tensor of logits that an operator returns."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and one.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, one.numel() // VOCABULARY)
        return result


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("network", ["transformer", "rnn"])
def test_no_tensor_has_the_size_of_all_logits(network: str) -> None:
    length, batch = 16, 4
    model = (
        Transformer(VOCABULARY, length, dim=DIM, layers=1, heads=2, ffn_dim=32)
        if network == "transformer"
        else RecurrentDecoder(VOCABULARY, dim=8, hidden=8)
    )
    tokens = torch.randint(0, VOCABULARY, (batch, length + 1))
    rows = []
    for chunked in (False, True):
        task = LanguageModelling(model, chunked_loss=chunked)
        with MostLogits() as mode:
            task.training_step((tokens[:, :-1], tokens[:, 1:]), 0).backward()
            with torch.no_grad():
                task._add((tokens[:, :-1], tokens[:, 1:]))
        rows.append(mode.rows)
    assert rows[0] == batch * length
    assert rows[1] <= DIM  # chunks of 8 positions; the transposed weight has DIM rows


class Capped(Transformer):
    """A user's network with a forward pass of its own, which knows no targets."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        logits: Any = super().forward(tokens)
        return 2 * torch.tanh(logits)


def test_a_subclass_with_its_own_logits_is_trained_on_them() -> None:
    torch.manual_seed(0)
    network = Capped(VOCABULARY, 8, dim=8, layers=1, heads=2)
    tokens = torch.randint(0, VOCABULARY, (2, 8))
    loss = LanguageModelling(network).training_step((tokens, tokens), 0)
    torch.testing.assert_close(loss, functional.cross_entropy(network(tokens).flatten(0, 1), tokens.flatten()))
    assert LanguageModelling(Transformer(VOCABULARY, 8, dim=8, layers=1, heads=2)).computes_loss


def test_chunks_are_of_equal_size_and_bounded() -> None:
    for rows in (1, 4096, 65536, 65537):
        found = rows_of_chunk("cuda", 50257, rows)
        assert found * 50257 * 4 <= linear_cross_entropy.CHUNK_BYTES_ELSEWHERE
        chunks = -(-rows // found)
        assert chunks * found - rows < chunks, "the last chunk lacks less than one position for each chunk"


@pytest.mark.usefixtures("small_chunks")
def test_a_second_backward_is_refused_not_wrong() -> None:
    head, features, targets = operands(torch.float32, False)
    loss = head(features, targets).total
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second time(?s:.*)chunked_loss=false"):
        loss.backward()


@pytest.mark.parametrize("part", ["quick", pytest.param("slow", marks=pytest.mark.slow)])
def test_ranks_have_the_same_losses_with_and_without_chunks(tmp_path: Path, part: str) -> None:
    """ddp and fsdp, tied and untied heads, every precision without loss scaling, ignored targets, an uneven chunk.

    Networks of Hugging Face as well, if they are installed: tied, untied and capped outputs.
    """
    apart = [str(APART)] if (APART / "transformers").is_dir() else []
    run_ranks(2, Path(loss_rank.__file__), [str(tmp_path), part, *apart], tmp_path, timeout_s=300)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"losses-{rank}.json").read_text())
        cases = [*loss_rank.CASES, *(loss_rank.HUGGING_FACE if apart else [])]
        assert len(found) == sum((case in loss_rank.SLOW) == (part == "slow") for case in cases)
        for case, (plain, chunked) in found.items():
            tolerance = 1e-5 if "32-true" in case else 0.01
            assert len(plain) == loss_rank.STEPS
            assert plain[0][0] != plain[-1][0]
            for (one, kind), (other, other_kind) in zip(plain, chunked, strict=True):
                assert other == pytest.approx(one, rel=tolerance), case
                assert kind == other_kind == "torch.float32", case


def test_rotary_tables_stay_in_float32_and_rotate_in_float32() -> None:
    exact = Rotary(8, 2048, 10_000.0)
    exact.reset_parameters()
    rotary = Rotary(8, 2048, 10_000.0)
    rotary.reset_parameters()
    nn.Sequential(rotary).to(torch.bfloat16)
    assert torch.equal(rotary.cos, exact.cos)
    assert torch.equal(rotary.sin, exact.sin)
    assert {name for name, _ in rotary.named_buffers()} == {"cos", "sin"}
    assert not rotary.state_dict()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning's bf16-true does
    try:
        assert Rotary(8, 4, 10_000.0).cos.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    x = torch.randn(1, 1, 2048, 8).bfloat16()
    rotated = apply_rotary(x, *rotary.cos_sin(2048))
    assert torch.equal(rotated, apply_rotary(x.float(), *exact.cos_sin(2048)).bfloat16())
    meta = Rotary(8, 4, 10_000.0).to("meta").bfloat16()
    assert meta.cos.dtype == torch.float32


@pytest.mark.parametrize("norm", [nn.RMSNorm(64), nn.LayerNorm(64)], ids=["rms", "layer"])
def test_norms_and_attention_round_once_in_bf16(norm: nn.Module) -> None:
    """Statistics in bfloat16 would differ by several units of rounding (2^-8) from float64."""
    torch.manual_seed(0)
    x = (torch.randn(32, 64) * 3 + 5).bfloat16()
    exact = norm.double()(x.double()).detach()
    found = norm.bfloat16()(x).detach().double()
    assert float(((found - exact).abs() / exact.abs().clamp(min=0.05)).max()) < 2**-7
    query, key, value = torch.randn(3, 1, 2, 64, 16).bfloat16()
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    ideal = functional.scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True)
    assert float((mixed.double() - ideal).abs().max()) < 2**-7 * float(ideal.abs().max())


def test_losses_are_float32_in_a_bf16_model() -> None:
    tokens, images = torch.randint(0, 7, (2, 5)), torch.rand(2, 1, 4, 4)
    decoder = LanguageModelling(Transformer(7, 4, dim=8, layers=1, heads=2).bfloat16())
    for task in (decoder, LanguageModelling(decoder.model, chunked_loss=False)):
        loss = task.training_step((tokens[:, :-1], tokens[:, 1:]), 0)
        assert loss.dtype == torch.float32
        assert float(loss.detach()) != float(loss.detach().bfloat16())
    classifier = Classification(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).bfloat16())
    assert classifier.training_step((images.bfloat16(), torch.tensor([0, 2])), 0).dtype == torch.float32
    image = SequenceToImage(nn.Sequential(nn.Linear(16, 16)).bfloat16())
    assert image.training_step((torch.rand(2, 16).bfloat16(), torch.rand(2, 16).bfloat16()), 0).dtype == torch.float32
