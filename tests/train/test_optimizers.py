"""AdamW with small states, and Muon: beside torch's own, in bits, bytes and losses."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.ranks import run_ranks
from trainer.models.transformer import Transformer
from trainer.optimizers import LowMemoryAdamW, Muon, is_quantized, orthogonalized, round_stochastically
from trainer.train.parameter_groups import hidden_matrices, parameter_groups

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="the extra torchao is not installed")


def trained(make: Any, dtype: torch.dtype = torch.float32, steps: int = 60, lr: float = 3e-3) -> tuple[float, Any]:
    """The loss of a small regression after `steps`, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 256)).to(dtype)
    inputs = torch.randn(64, 256, generator=generator)
    target = torch.tanh(inputs @ torch.randn(256, 256, generator=generator) / 16)
    optimizer = make(net.parameters(), lr=lr)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(inputs.to(dtype)).float(), target)
        loss.backward()
        optimizer.step()
    return float(loss.detach()), optimizer


def test_fp32_states_are_torchs_adamw() -> None:
    torch.manual_seed(0)
    mine, theirs = (nn.Parameter(torch.randn(33, 7)) for _ in range(2))
    theirs.data.copy_(mine.data)
    ours = LowMemoryAdamW([mine], lr=0.01, weight_decay=0.1, states="float32")
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.1)
    for _ in range(50):
        mine.grad = torch.randn(33, 7)
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@needs_torchao
def test_8bit_states_train_as_fp32_ones_in_a_quarter_of_their_bytes() -> None:
    exact, reference = trained(torch.optim.AdamW)
    small, optimizer = trained(LowMemoryAdamW)
    assert small == pytest.approx(exact, rel=0.03)
    sizes = [
        sum(v.numel() * v.element_size() for state in one.state.values() for k, v in state.items() if k != "step")
        for one in (reference, optimizer)
    ]
    assert sizes[1] / sizes[0] == pytest.approx(0.25, abs=0.03)
    restored = LowMemoryAdamW([nn.Parameter(torch.zeros_like(p)) for g in optimizer.param_groups for p in g["params"]])
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, after = (list(one.state.values()) for one in (optimizer, restored))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(before, after, strict=True) for key in a)
    assert after[0]["exp_avg.codes"].dtype == torch.uint8


def test_bf16_weights_lose_small_updates_unless_they_are_rounded_stochastically_or_have_masters() -> None:
    """An update of 2^-11 of a weight: nearest rounding drops every one of 512, which add up to a quarter."""
    ends = {}
    for name, options in {
        "nearest": {"stochastic_rounding": False},
        "stochastic": {},
        "masters": {"master_weights": True},
    }.items():
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = LowMemoryAdamW([weight], lr=2**-11, weight_decay=0.0, states="bfloat16", **options)
        for _ in range(512):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        ends[name] = float(weight.detach().float().mean())
    assert ends["nearest"] == 1.0
    assert ends["stochastic"] == pytest.approx(0.75, abs=0.01)
    assert ends["masters"] == pytest.approx(0.75, abs=0.003)


def test_bf16_moments_decay() -> None:
    """With betas of 0.999 a nearest rounding in bf16 would keep the second moment at its start forever."""
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = LowMemoryAdamW([weight], lr=0.0, states="bfloat16")
    for step in range(1000):
        weight.grad = torch.full_like(weight, 1.0 if step < 200 else 0.0)
        optimizer.step()
    expected = (1 - 0.999**200) * 0.999**800
    moment = optimizer.state[weight]["exp_avg_sq"]
    assert moment.dtype == torch.bfloat16
    assert float(moment.float().mean()) == pytest.approx(expected, rel=0.02)


def test_stochastic_rounding_is_right_on_average_and_the_same_again() -> None:
    values = torch.full((200_000,), 1.0 + 0.3 * 2**-7)
    noise = [torch.randint(0, 1 << 16, values.shape, dtype=torch.int32) for _ in range(2)]
    rounded = [round_stochastically(values, one) for one in (*noise, noise[0])]
    assert set(rounded[0].tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded[0].double().mean()) == pytest.approx(1 + 0.3 * 2**-7, abs=1e-5)
    assert torch.equal(rounded[0], rounded[2])
    assert not torch.equal(rounded[0], rounded[1])
    special = torch.tensor([float("inf"), float("-inf"), float("nan")])
    kept = round_stochastically(special, torch.full((3,), 65535, dtype=torch.int32))
    assert torch.equal(kept[:2], special[:2])
    assert kept[2].isnan()


def test_the_rounding_of_two_copies_is_the_same() -> None:
    """As on the ranks of ddp, whatever their random number generators did."""
    copies = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weight = nn.Parameter(torch.ones(512, dtype=torch.bfloat16))
        optimizer = LowMemoryAdamW([weight], lr=1e-3, states="bfloat16")
        for _ in range(5):
            torch.rand(seed)
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        copies.append(weight.detach().clone())
    assert torch.equal(*copies)
    assert len(set(copies[0].tolist())) > 1


def test_which_parameters_have_8bit_states() -> None:
    shapes = [(64, 256), (50257, 768), (256,), (65536,), (16, 128), (64, 100), (64, 320), (64, 64, 4, 4)]
    found = [is_quantized(torch.empty(shape, device="meta")) for shape in shapes]
    assert found == [True, True, False, False, False, False, True, True]


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (LowMemoryAdamW, "lr", -1.0),
        (LowMemoryAdamW, "betas", (0.9, 1.0)),
        (LowMemoryAdamW, "states", "4bit"),
        (Muon, "momentum", 2.0),
        (Muon, "weight_decay", -0.1),
    ],
)
def test_values_that_train_wrongly_are_refused(make: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        make([nn.Parameter(torch.ones(2, 2))], **{name: value})


def test_muon_is_torchs_for_matrices() -> None:
    torch.manual_seed(0)
    start = torch.randn(48, 16)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = Muon([{"params": [mine], "muon": True}], lr=0.01)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(10):
        mine.grad = torch.randn(48, 16)
        theirs.grad = mine.grad.clone()
        ours.step()
        reference.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    values = torch.linalg.svdvals(orthogonalized(torch.randn(64, 32), 5).float())
    assert 0.5 < float(values.min()) < float(values.max()) < 1.3


def small_transformer() -> Transformer:
    return Transformer(vocab_size=50, sequence_length=8, dim=32, layers=2, heads=2)


def test_muon_gets_hidden_matrices_only() -> None:
    model = small_transformer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    hidden = {names[one] for one in hidden_matrices(model)}
    assert hidden
    assert all(name.endswith(".weight") and "norm" not in name for name in hidden)
    assert not any("embed" in name or "head" in name for name in hidden)
    groups = parameter_groups(model, "matrices", muon=True)
    assert {(group["muon"], group.get("weight_decay")) for group in groups} == {
        (True, None),
        (False, None),
        (False, 0.0),
    }
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    Muon(groups)


def test_muon_of_a_network_without_blocks_leaves_out_its_head() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert hidden_matrices(net) == {id(net[0].weight), id(net[2].weight)}


def test_decay_of_matrices_only() -> None:
    model = small_transformer()
    decayed, rest = parameter_groups(model, "matrices")
    assert all(parameter.dim() >= 2 for parameter in decayed["params"])
    assert all(parameter.dim() < 2 for parameter in rest["params"])
    assert rest["weight_decay"] == 0.0


@needs_torchao
def test_sharding_changes_no_bit(tmp_path: Path) -> None:
    """Weights, codes and scales of two ranks, put together, are those of one process."""
    output = tmp_path / "found.json"
    run_ranks(2, Path(__file__).with_name("optimizer_rank.py"), [str(output)], tmp_path, 120.0)
    found = json.loads(output.read_text())
    assert len(found) == 9
    assert set(found.values()) == {0.0}, found
