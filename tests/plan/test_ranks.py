"""What two real ranks allocate is what was simulated; states with frozen layers and tensor parallelism."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from tests.plan.drawn import Drawn, batch_of, by_simulation, case_of, module_of, optimizer_of, setting_of
from tests.plan.ranks_cases import CASES
from trainer.config.instantiate import locate
from trainer.config.strategy import Tp
from trainer.plan import parts
from trainer.plan.decoder import Decoder
from trainer.plan.simulation import simulate
from trainer.plan.states import Layout, states
from trainer.train.parameter_groups import parameter_groups

ROOT = Path(__file__).parents[2]
ADAMW = {"_target_": "torch.optim.AdamW"}


def test_two_real_ranks_allocate_what_was_simulated(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "tests.plan.real_rank"]
    ranks = [
        subprocess.Popen([*arguments, str(rank), str(tmp_path / "store")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=400)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    for case, real in zip(CASES, json.loads(outputs[0].splitlines()[-1]), strict=True):
        simulated = by_simulation(case)
        assert simulated.states == real["states"], case
        if not case.lora_rank:
            assert states_in_closed_form(case) == real["states"], case
        assert simulated.peak == pytest.approx(real["peak"], rel=0.05), (case, simulated.parts, real["parts"])


def states_in_closed_form(case: Drawn) -> dict[str, int]:
    """The states of a case as the simulation names them."""
    decoder, layout = Decoder(**case.model), case_of(case).layout
    frozen = {one.name for one in decoder.parameters() if one.name.startswith(case.frozen or ("-",))}
    known = states(decoder.parameters(), layout, case_of(case).optimizer, frozen)
    return {
        parts.PARAMETERS: known.parameters + decoder.buffer_bytes(),
        parts.GRADIENTS: known.gradients,
        parts.OPTIMIZER: known.optimizer,
    }


def test_frozen_layers_have_neither_gradients_nor_states() -> None:
    case = replace(CASES[0], strategy="single", ranks=1, group=1)
    decoder = Decoder(**case.model)
    frozen = {one.name for one in decoder.parameters() if one.name.startswith(("embedding", "body.0"))}

    def module() -> object:
        made = module_of(case)
        for name, parameter in made.model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return made

    found = simulate(module, batch_of(case), lambda one: optimizer_of(case, one), setting_of(case)).states
    known = states(decoder.parameters(), Layout("single", precision=case.precision), ADAMW, frozen)
    assert (known.gradients, known.optimizer) == (found[parts.GRADIENTS], found[parts.OPTIMIZER])


def test_states_of_tensor_parallelism() -> None:
    case = replace(CASES[0], strategy="tp", ranks=4, group=1)
    setting = replace(setting_of(replace(case, strategy="single")), strategy=Tp(tensor_parallel_size=2), world_size=4)
    decoder = Decoder(**case.model)
    found = simulate(lambda: module_of(case), batch_of(case), lambda one: optimizer_of(case, one), setting).states
    known = states(decoder.parameters(), Layout("tp", 2, 2, 4, precision=case.precision), ADAMW, set())
    assert found == {
        parts.PARAMETERS: known.parameters + decoder.buffer_bytes(),
        parts.GRADIENTS: known.gradients,
        parts.OPTIMIZER: known.optimizer,
    }


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        (1, 64),
        (2, 3),
        (3, 2),
        (3, 64),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(1, 2), (1, 3), (2, 2), (2, 64), (3, 3)]),
    ],
)
def test_states_of_deepspeed_are_those_of_its_engine(stage: int, ranks: int) -> None:
    """DeepSpeed 0.19.8; two real ranks of `test_two_real_ranks_allocate_what_was_simulated` hold the same."""
    linear = functional.linear
    case = replace(CASES[0], strategy=f"deepspeed_zero{stage}", ranks=ranks, group=1)
    simulated, decoder = by_simulation(case), Decoder(**case.model)
    found = simulated.states
    assert (
        simulated.work.elements == simulated.work.trained == sum(math.prod(one.shape) for one in decoder.parameters())
    )
    known = states(decoder.parameters(), Layout(case.strategy, 1, 1, ranks, precision=case.precision), ADAMW, set())
    assert found[parts.PARAMETERS] == known.parameters + decoder.buffer_bytes()  # which keep float32
    assert found[parts.OPTIMIZER] == known.optimizer
    assert found[parts.GRADIENTS] == known.gradients
    assert functional.linear is linear, "what is simulated afterwards would be counted with DeepSpeed's"


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "torch.optim.Adam", "amsgrad": True},
        {"_target_": "torch.optim.NAdam"},
        {"_target_": "torch.optim.SGD"},
        {"_target_": "torch.optim.RMSprop", "centered": True, "momentum": 0.9},
        {"_target_": "torch.optim.Adagrad"},
        {"_target_": "trainer.optimizers.LowMemoryAdamW", "states": "8bit"},
        {"_target_": "trainer.optimizers.LowMemoryAdamW", "states": "bfloat16"},
        {"_target_": "trainer.optimizers.Muon"},
    ],
    ids=lambda node: "-".join(map(str, node.values())),
)
def test_states_of_an_optimizer_are_those_of_a_real_step(node: dict[str, object]) -> None:
    decoder = Decoder(**CASES[0].model)
    module = module_of(CASES[0])
    target = locate(str(node["_target_"]), "optimizer._target_")
    parameters: list[object] = list(module.parameters())
    if node["_target_"] == "trainer.optimizers.Muon":
        parameters = list(parameter_groups(module, "all", muon=True))
    optimizer = target(parameters, lr=1e-3, **{key: value for key, value in node.items() if key != "_target_"})
    module.training_step(batch_of(CASES[0]), 0).backward()
    optimizer.step()
    held = [one for state in optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor)]
    assert states(decoder.parameters(), Layout("single"), node, set()).optimizer == sum(one.nbytes for one in held)
