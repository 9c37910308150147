"""A model built on the meta device gets, parameter by parameter, the bits that building it whole gives."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

from trainer.models.transformer import Transformer
from trainer.strategies.deferred import construct, make_whole, recipes


class Unusual(nn.Module):
    """Values given at once, `.data`, views, one that is never initialised twice, a tied layer, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(2, 3) * 0.1)
        self.embedding = nn.Embedding(7, 3, padding_idx=1)
        self.layer = nn.Linear(3, 3)
        self.layer.weight.data.normal_(std=0.3)
        with torch.no_grad():
            self.layer.bias[1:].fill_(4.0)
            self.layer.weight.mul_(2.0)
        nn.init.trunc_normal_(self.embedding.weight, std=math.pi)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.layer.weight
        self.tied.requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.recurrent = nn.GRU(3, 4)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: Transformer(vocab_size=40, sequence_length=8, dim=32, layers=2, heads=4),
    "untied": lambda: Transformer(vocab_size=40, sequence_length=8, dim=32, layers=2, heads=4, tied=False),
    "unusual": Unusual,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bits_are_those_of_the_whole_model(name: str) -> None:
    torch.manual_seed(11)
    expected = NETWORKS[name]()
    after = torch.get_rng_state()
    torch.manual_seed(11)
    built = construct(NETWORKS[name])
    assert torch.equal(torch.get_rng_state(), after)
    assert all(parameter.is_meta for parameter in built.parameters())
    assert not any(buffer.is_meta for buffer in built.buffers())
    made = {key: recipe.make() for key, recipe in recipes(built).items()}
    assert set(made) == {key for key, _ in expected.named_parameters(remove_duplicate=False)}
    for key, parameter in expected.named_parameters(remove_duplicate=False):
        assert torch.equal(made[key], parameter), key
    assert torch.equal(torch.get_rng_state(), after)
    make_whole(built)
    torch.testing.assert_close(built.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert [one.requires_grad for one in built.parameters()] == [one.requires_grad for one in expected.parameters()]


def test_memory_that_is_used_again_is_not_taken_for_what_was_there() -> None:
    """Which storage gets the address of a freed one is chance: often enough to meet it."""
    held: list[torch.Tensor] = []
    for turn in range(150):
        held = [*held[-20:], torch.empty(1 + turn % 13)]
        assert all(parameter.is_meta for parameter in construct(Unusual).parameters())


def reads_a_parameter() -> nn.Module:
    layer = nn.Linear(3, 3)
    torch.nn.init.constant_(layer.bias, layer.weight.sum().item())
    with torch.no_grad():
        layer.weight += layer.bias
    return layer


def is_orthogonal() -> nn.Module:
    layer = nn.Linear(3, 3)
    torch.nn.init.orthogonal_(layer.weight)
    return layer


def changes_it_after_assigning() -> nn.Module:
    layer = nn.Linear(3, 3)
    weight = nn.Parameter(torch.empty(3, 3))
    layer.weight = weight
    nn.init.normal_(weight)
    return layer


def has_its_own_generator() -> nn.Module:
    layer = nn.Linear(3, 3)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(5))
    nn.init.normal_(layer.weight.chunk(3)[1])
    return layer


RECORDED = [reads_a_parameter, is_orthogonal, changes_it_after_assigning, has_its_own_generator]


@pytest.mark.parametrize("build", RECORDED)
def test_unusual_initializations_are_recorded(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(4)
    expected = build().state_dict()
    after = torch.get_rng_state()
    torch.manual_seed(4)
    built = construct(build)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(parameter.is_meta for parameter in built.parameters())
    make_whole(built)
    torch.testing.assert_close(built.state_dict(), expected, rtol=0, atol=0)


def writes_to_two() -> nn.Module:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        torch._foreach_mul_([layer.weight, layer.bias], 2.0)
    return layer


def changes_it_under_two_names() -> nn.Module:
    layer = nn.Linear(3, 3)
    weight = nn.Parameter(torch.empty(3, 3))
    layer.weight = weight
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        weight.zero_()
    nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("build", [writes_to_two, changes_it_under_two_names])
def test_what_cannot_be_written_down_is_built_whole(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(4)
    expected = build().state_dict()
    torch.manual_seed(4)
    built = construct(build)
    assert recipes(built) == {}
    torch.testing.assert_close(built.state_dict(), expected, rtol=0, atol=0)


def test_a_part_is_made_with_the_bits_of_the_whole() -> None:
    built = construct(lambda: Transformer(vocab_size=40, sequence_length=8, dim=32, layers=1, heads=4))
    for name, recipe in (recipes(built) | recipes(construct(Unusual))).items():
        whole = recipe.make()
        for dim in range(whole.dim()):
            size = max(1, whole.shape[dim] // 3)
            expected = whole.narrow(dim, whole.shape[dim] - size, size)
            part = torch.empty_like(expected, memory_format=torch.contiguous_format)
            recipe.fill(part, [0 if one != dim else whole.shape[dim] - size for one in range(whole.dim())])
            assert torch.equal(part, expected), name


def test_a_mistake_of_the_users_is_raised_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"):
        construct(_wrong)


def _wrong() -> nn.Module:
    raise ValueError("mine")


GROWTH = """
import resource, torch
from trainer.models.transformer import Transformer
from trainer.strategies.deferred import construct, recipes
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
construct(lambda: torch.nn.Linear(600, 600))  # what the first use of anything costs
before = peak()
model = construct(lambda: Transformer(vocab_size=100, sequence_length=8, dim=768, layers=10, heads=4))
for recipe in recipes(model).values():
    recipe.make()
print((peak() - before) / sum(one.nbytes for one in model.parameters()))
"""


def test_no_more_than_a_few_parameters_are_in_memory_at_once() -> None:
    ran = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 0.25  # of the 283 MB that the parameters have together
