"""torch.compile of blocks and of the loss: the same gradients, what is refused, and a cache that outlives a process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.config.strategy import Auto, Single
from trainer.core.errors import UserError
from trainer.models import linear_cross_entropy
from trainer.models.transformer import Transformer
from trainer.runtime.compile_cache import use_compile_cache
from trainer.strategies import resolved
from trainer.strategies.blocks import prepare
from trainer.tasks.language_modelling import LanguageModelling

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    return tmp_path / "trainer" / "compile" / f"torch-{torch.__version__}"


def test_the_cache_is_private_and_stays_where_it_is(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_compile_cache() == home
    assert os.environ[VARIABLE] == str(home)
    assert home.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(VARIABLE, "")
    home.chmod(0o755)
    assert use_compile_cache() == home
    assert home.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv(VARIABLE, "/scratch/mine")
    assert use_compile_cache() == Path("/scratch/mine")


def test_a_cache_of_somebody_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.parent.mkdir(parents=True)
    home.symlink_to(home.parent)
    with pytest.raises(UserError, match=VARIABLE):
        use_compile_cache()
    home.unlink()
    home.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: home.stat().st_uid + 1)
    with pytest.raises(UserError, match="would be run"):
        use_compile_cache()


def test_a_home_that_cannot_be_written_leaves_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv(VARIABLE, "")
    assert use_compile_cache() is None
    assert os.environ[VARIABLE] == ""
    assert "torch's own folder" in caplog.text


def test_the_options_reach_torch_compile(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **options: asked.append(options))
    network = Transformer(11, 8, dim=8, layers=2, heads=2)
    monkeypatch.setattr(network.head, "compile_loss", lambda **options: asked.append(options), raising=False)
    options = Single(compile=True, compile_mode="reduce-overhead", compile_fullgraph=True, compile_dynamic=False)
    prepare(LanguageModelling(network), options)
    common = {"fullgraph": True, "dynamic": False}
    assert asked == [{"mode": "reduce-overhead", **common}] * 2 + [{"mode": None, **common}]
    marks: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    for _ in range(3):
        network(torch.zeros(1, 8, dtype=torch.long))
    assert len(marks) == 3
    chosen = resolved(Auto(compile=True, compile_mode="max-autotune", activation_checkpointing="full"), 1, "cuda")
    assert (chosen.compile_mode, chosen.compile, chosen.activation_checkpointing) == ("max-autotune", True, "full")


def losses(compiled: bool, tokens: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    network = Transformer(50, 15, dim=16, layers=1, heads=2, document_end=3)
    task = LanguageModelling(network)
    options = Single(compile=compiled, compile_fullgraph=True, activation_checkpointing="selective")
    prepare(task, options)
    loss = task.training_step((tokens[:, :-1], tokens[:, 1:]), 0)
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in task.parameters() if parameter.grad is not None)]


@pytest.mark.filterwarnings("ignore")  # torch's own, about its internals, which are errors in the middle of tracing
def test_compiled_blocks_and_loss_equal_eager_ones_and_come_from_the_cache_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Inductor on the CPU, with a document mask, one graph a block and selective checkpointing."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "vec_isa_ok", False)  # an empty cache has torch try every vector unit: 12 s of CPU
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 4 * 50 * 15)
    tokens = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    hits = []
    expected = losses(False, tokens)
    for _ in range(2):
        torch._dynamo.reset()  # forgets what this process has compiled, as a new process would
        counters.clear()
        for one, other in zip(losses(True, tokens), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        inductor = counters["inductor"]
        hits.append((inductor["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"], inductor))
    assert any(home.iterdir())
    assert hits[0][0] < hits[1][0]
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy.compile_mode=max-autotune"], "nothing is compiled"),
        (["strategy.compile_dynamic=false"], "compile_dynamic=false: nothing is compiled"),
        (["strategy.compile_fullgraph=true"], "compile_fullgraph=true: nothing is compiled"),
        (["strategy.compile=true", "strategy.compile_mode=fast"], "choose one of"),
        (["strategy.compile=true", "strategy.compile_mode=reduce-overhead"], "this job has no GPU"),
        (["strategy.compile=true", "strategy.compile_dynamic=maybe"], "compile_dynamic"),
    ],
)
def test_what_cannot_be_compiled_is_refused_at_the_prompt(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(compose(["resources.gpus=0", *overrides], config_dirs=[]).config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=fsdp"], "strategy=fsdp gathers"),
        (["strategy=deepspeed_zero1"], "strategy=deepspeed_zero1 gathers"),
        (["strategy=ddp", "data.batch_size=32", "data.micro_batch=4"], "4 micro-batches a step"),
        (["strategy=ddp"], None),
    ],
)
def test_cuda_graphs_are_refused_where_addresses_change(
    overrides: list[str], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.config import combinations

    options = ["strategy.compile=true", "strategy.compile_mode=reduce-overhead", *overrides]
    config = compose(["resources.gpus=2", "cluster=local", *options], config_dirs=[]).config
    accumulate = 4 if "data.micro_batch=4" in overrides else 1
    job = combinations.Job(config, 2, 2, on_gpus=True, accumulate=accumulate)
    found = [str(problem) for problem in combinations.problems_of_combinations(job)]
    assert [message in one for one in found] == [True] if message is not None else found == []
