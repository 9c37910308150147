"""The closed form and the simulated step agree, and both with what a real step allocates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from tests.plan.drawn import Drawn, batch_of, by_formula, by_simulation, draw, module_of, optimizer_of, setting_of
from trainer.config.strategy import STRATEGIES
from trainer.models.transformer import Transformer
from trainer.plan import parts
from trainer.plan.closed_form import NoFormula
from trainer.plan.decoder import Decoder
from trainer.plan.simulation import Setting, simulate, steps
from trainer.plan.tracked import Tracked
from trainer.strategies.blocks import prepare

SEEDS = range(20)
EVERY_CHOICE = {3, 5, 7, 8, 9, 13, 15, 19}
"""Seeds that together draw each value of each choice, and each strategy with and without checkpointing."""
LIMIT = 0.05


def test_the_seeds_of_the_default_suite_draw_every_value() -> None:
    """So that a change of `draw` does not silently leave one out."""
    every, default = ({pair for seed in seeds for pair in drawn(seed)} for seeds in (SEEDS, EVERY_CHOICE))
    assert default == every


def drawn(seed: int) -> set[tuple[str, Any]]:
    """The values of a case by name, without its sizes that follow from the others."""
    case = draw(seed)
    values = {**case.model, **vars(case), "pair": (case.strategy, case.checkpointing)}
    return {(name, value) for name, value in values.items() if name not in ("model", "ranks", "group")}


@pytest.mark.parametrize(
    "seed", [seed if seed in EVERY_CHOICE else pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS]
)
def test_both_engines_agree(seed: int) -> None:
    """Parameters, gradients and states to the byte, the peak within 5%."""
    case = draw(seed)
    simulated, formula = by_simulation(case), by_formula(case)
    known = formula.states
    buffers = Decoder(**case.model).buffer_bytes()
    assert simulated.states == {
        parts.PARAMETERS: known.parameters + buffers,
        parts.GRADIENTS: known.gradients,
        parts.OPTIMIZER: known.optimizer,
    }, case
    assert formula.peak == pytest.approx(simulated.peak, rel=LIMIT), (case, simulated.parts, formula.parts)
    assert sum(simulated.parts.values()) == simulated.peak
    assert sum(formula.parts.values()) == formula.peak


def test_both_engines_agree_on_a_deep_gated_model_with_checkpointing() -> None:
    """Where the logits are small, the peak is in the backward pass of a block and grows with what a block leaves."""
    sizes = {"vocab_size": 512, "sequence_length": 256, "dim": 128, "layers": 8, "heads": 4, "ffn_dim": 448}
    case = Drawn(sizes | {"tied": False}, 8, "fsdp", 8, 8, "bf16-mixed", "full", "cuda", False, "float32")
    assert by_formula(case).peak == pytest.approx(by_simulation(case).peak, rel=0.01)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_decoder_has_the_parameters_of_the_model(seed: int) -> None:
    arguments: dict[str, Any] = dict(draw(seed).model)
    decoder = Decoder(**arguments)
    with torch.device("meta"):
        model = Transformer(arguments.pop("vocab_size"), arguments.pop("sequence_length"), **arguments)
    named = [(name, tuple(one.shape)) for name, one in model.named_parameters()]
    assert sorted((one.name, one.shape) for one in decoder.parameters()) == sorted(named)
    assert decoder.buffer_bytes() == sum(one.nbytes for one in model.buffers())


def test_dropout_on_a_cpu_has_no_formula() -> None:
    case = draw(0)
    with pytest.raises(NoFormula, match="dropout"):
        by_formula(Drawn(**{**vars(case), "device": "cpu", "model": case.model | {"dropout": 0.1}}))


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_real_step_allocates_what_was_simulated(precision: str, checkpointing: str) -> None:
    """The same step on tensors with values."""
    model = {"vocab_size": 512, "sequence_length": 256, "dim": 64, "layers": 3, "heads": 4, "tied": False}
    case = Drawn(model, 2, "single", 1, 1, precision, checkpointing, "cpu", False, "float32")
    setting = setting_of(case)
    with Tracked(case.model["vocab_size"], 1) as tracked, tracked.resizing():
        module = module_of(case)
        prepare(module, setting.strategy)
        real = steps(module, batch_of(case), lambda one: optimizer_of(case, one), setting, tracked)
    simulated = by_simulation(case)
    assert simulated.states == real.states
    assert simulated.peak == pytest.approx(real.peak, rel=0.01)


def test_ddp_keeps_gradients_that_are_not_reduced_yet_beside_its_buckets() -> None:
    model = {"vocab_size": 300, "sequence_length": 16, "dim": 256, "layers": 2, "heads": 4, "tied": True}
    case = Drawn(model, 1, "ddp", 2, 1, "32-true", "none", "cpu", True, "float32")
    for planned in (by_simulation(case), by_formula(case)):
        assert planned.parts[parts.GRADIENTS] == pytest.approx(2 * by_formula(case).states.gradients, rel=LIMIT)


def test_tensors_without_memory_are_not_counted() -> None:
    with Tracked(block=1) as tracked:
        kept = torch.empty(100), torch.empty(10_000, device="meta")
    assert tracked.alive == kept[0].nbytes


class Regression(LightningModule):
    """A module on inputs that are not integers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(256, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.layer(batch).square().mean()


def test_inputs_are_converted_to_a_true_precision() -> None:
    setting = Setting(STRATEGIES["single"](), 1, precision="bf16-true", device="cpu", block=1)
    found = simulate(Regression, torch.zeros(64, 256), lambda one: torch.optim.SGD(one.parameters()), setting)
    assert 64 * 256 * 2 < found.peak < 64 * 256 * 4


def test_inputs_are_converted_to_the_weights_of_deepspeed() -> None:
    """Else products would be in float32, which real kernels refuse and fake ones do not."""
    strategy = STRATEGIES["deepspeed_zero1"](reduce_bucket_size=256, allgather_bucket_size=256)
    setting = Setting(strategy, 2, precision="bf16-mixed", device="cpu", block=1)
    found = simulate(Regression, torch.zeros(64, 256), lambda one: torch.optim.SGD(one.parameters()), setting)
    assert 64 * 256 * 2 < found.peak < 64 * 256 * 4
