"""What FSDP2 gathers in a step of a transformer, when, and in which types it computes, in a fake process group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fsdp_bytes import Count, sharded, step, train
from trainer import strategies
from trainer.config.strategy import Fsdp
from trainer.models.transformer import Transformer

RANKS, LAYERS = 4, 3
OPTIONS: dict[str, Any] = {"vocab_size": 96, "dim": 32, "layers": LAYERS, "heads": 4, "tied": False}
BFLOAT16_BYTES = 2


@pytest.fixture(autouse=True)
def fake_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def sizes() -> tuple[int, int, int]:
    """Bytes in bfloat16 of the embedding, of a block, and of norm and head."""
    network = Transformer(sequence_length=8, **OPTIONS)
    parts = [network.embedding], [network.body[0]], [network.norm, network.head]
    found = [sum(p.numel() for part in group for p in part.parameters()) * BFLOAT16_BYTES for group in parts]
    return found[0], found[1], found[2]


def test_only_blocks_before_the_last_are_gathered_twice() -> None:
    embedding, block, last = sizes()
    found = step(OPTIONS, RANKS)
    assert found.gathers == 1 + LAYERS + (LAYERS - 1) + 1
    assert found.gathered == embedding + (2 * LAYERS - 1) * block + last
    assert found.reduced == 2 * (embedding + LAYERS * block + last)  # float32
    assert found.held <= max(embedding + block, 2 * block + last)  # never all that is outside of the blocks


def test_nothing_is_freed_after_the_forward_pass_if_not_wanted() -> None:
    found = step(OPTIONS, RANKS, Fsdp(reshard_after_forward=False))
    assert found.gathered == sum(size * count for size, count in zip(sizes(), (1, LAYERS, 1), strict=True))


def test_weights_are_gathered_in_float32_if_wanted() -> None:
    assert step(OPTIONS, RANKS, Fsdp(param_dtype="float32")).gathered == 2 * step(OPTIONS, RANKS).gathered


def test_layers_that_share_a_weight_stay_with_the_root() -> None:
    found = step({**OPTIONS, "tied": True}, RANKS)
    assert found.gathers == 1 + LAYERS + (LAYERS - 1)


class Events(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in ("_allgather_base_", "embedding", "embedding_dense_backward"):
            self.events.append(name)
        return func(*args, **(kwargs or {}))


def test_the_first_block_is_gathered_while_the_embedding_computes() -> None:
    module = sharded(OPTIONS, RANKS, Fsdp())
    train(module)
    with Events() as seen:
        train(module)
    gather = "_allgather_base_"
    assert seen.events[:3] == [gather, gather, "embedding"]
    assert seen.events[-1] == "embedding_dense_backward"
    assert seen.events.count(gather) == 2 * LAYERS + 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("more", [{}, {"norm": "layer", "positions": "learned", "tied": True}], ids=["llama", "gpt2"])
def test_the_residual_stream_is_float32_as_in_ddp(more: dict[str, Any]) -> None:
    """A warning would be an error: torch warns if a norm has no fast kernel for its types."""

    def seen(module: nn.Module) -> list[torch.dtype]:
        found = []
        for part in module.modules():
            if type(part).__name__ in ("Block", "FSDPBlock"):
                part.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].dtype))
        train(module)
        return found

    expected = seen(sharded({**OPTIONS, **more}, RANKS, None))
    assert expected == [torch.float32] * LAYERS
    assert seen(sharded({**OPTIONS, **more}, RANKS, Fsdp())) == expected


def test_an_evaluation_leaves_nothing_gathered() -> None:
    module = sharded(OPTIONS, RANKS, Fsdp())
    parts: list[Any] = [part for part in module.modules() if isinstance(part, FSDPModule)]
    count = Count(module)
    with torch.no_grad():
        train(module, backward=False)
    assert count.held_now() > 0
    module.strategy.on_validation_end()  # type: ignore[union-attr,operator]
    assert count.held_now() == 0
    assert parts


def test_the_error_of_freed_weights_says_what_uses_them() -> None:
    strategy = strategies.build(Fsdp(), 1, torch.device("cpu"), 60.0)
    error = RuntimeError("setStorage: sizes [8, 16] ... are out of bounds for storage of size 0")
    strategy.on_exception(error)
    assert "create_graph=True" in str(error)
    assert "strategy=ddp" in str(error)
