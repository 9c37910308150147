"""The lean loop steps torch's optimizers without their decorators, and with them where something may listen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trainer.train.plain_step import make_step

OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind not in (Optimizer, torch.optim.LBFGS)
]


def made(kind: Any = SGD, **options: Any) -> tuple[torch.nn.Parameter, Any]:
    """A parameter with a gradient and its optimizer."""
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3) / 7)
    weight.grad = torch.linspace(-1, 1, 6).reshape(2, 3)
    return weight, kind([weight], lr=0.1, **options)


def decorated(optimizer: Optimizer, step: Callable[[Optimizer], object]) -> bool:
    """Whether torch's decorators run in a step."""
    with mock.patch(
        "torch.autograd.profiler.record_function", side_effect=torch.autograd.profiler.record_function
    ) as seen:
        step(optimizer)
    return bool(seen.called)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_weights_and_state_are_those_of_step(kind: type[Optimizer]) -> None:
    ended = []
    for plain in (False, True):
        weight, optimizer = made(kind)
        assert weight.grad is not None
        step = make_step(optimizer) if plain else kind.step
        for number in range(4):
            gradient = torch.linspace(-1, 1, 6).reshape(2, 3) * (number + 1)
            weight.grad = gradient.to_sparse() if kind is torch.optim.SparseAdam else gradient
            step(optimizer)  # type: ignore[call-arg]
        ended.append((weight.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])))
    torch.testing.assert_close(*ended, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [SGD, torch.optim.Adam, torch.optim.AdamW])
def test_the_decorators_are_left_out(kind: type[Optimizer]) -> None:
    _, optimizer = made(kind)
    assert not decorated(optimizer, make_step(optimizer))
    assert decorated(optimizer, kind.step)


def test_the_gradient_mode_is_restored() -> None:
    weight, optimizer = made()
    step = make_step(optimizer)
    step(optimizer)
    assert torch.is_grad_enabled()
    weight.grad = torch.ones(2, 3)
    with mock.patch("torch.optim.sgd.sgd", side_effect=ValueError), pytest.raises(ValueError):
        step(optimizer)
    assert torch.is_grad_enabled()


HOOKS: dict[str, Callable[[Optimizer, Any], Any]] = {
    "before": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "after": lambda optimizer, hook: optimizer.register_step_post_hook(hook),
    "before any": lambda _, hook: register_optimizer_step_pre_hook(hook),
    "after any": lambda _, hook: register_optimizer_step_post_hook(hook),
}


@pytest.mark.parametrize("place", HOOKS)
def test_hooks_are_called(place: str) -> None:
    _, optimizer = made()
    step, calls = make_step(optimizer), []
    handle = HOOKS[place](optimizer, lambda *_: calls.append(place))
    try:
        step(optimizer)
    finally:
        handle.remove()
    assert calls == [place]
    assert not decorated(optimizer, step)


def test_a_profiler_sees_its_range() -> None:
    _, optimizer = made()
    step = make_step(optimizer)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(optimizer)
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


def test_a_step_that_is_replaced_later_is_called() -> None:
    _, optimizer = made()
    step, calls = make_step(optimizer), []
    with mock.patch.object(SGD, "step", side_effect=lambda: calls.append("class")):
        step(optimizer)
    optimizer.step = lambda: calls.append("instance")
    step(optimizer)
    assert calls == ["class", "instance"]


def test_another_optimizer_is_the_one_that_steps() -> None:
    weight, optimizer = made()
    other_weight, other = made()
    make_step(optimizer)(other)
    assert not torch.equal(weight, other_weight)
    assert torch.equal(weight, made()[0])


def test_a_scheduler_learns_of_the_step() -> None:
    for before in (True, False):
        _, optimizer = made()
        step = make_step(optimizer) if before else None
        scheduler = StepLR(optimizer, 1)
        step = step or make_step(optimizer)
        assert decorated(optimizer, step) == before
        scheduler.step()  # warns, which is an error, if it was not told


def test_others_are_stepped_as_they_are() -> None:
    class Own(SGD):
        def step(self, closure: Any = None) -> Any:
            calls.append("own")
            return super().step(closure)

    calls: list[str] = []
    _, own = made(Own)
    make_step(own)(own)
    assert calls == ["own"]
    _, differentiable = made(differentiable=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        make_step(differentiable)(differentiable)
