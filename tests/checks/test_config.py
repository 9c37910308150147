"""The problems that `check` finds in a composed configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from trainer.checks.config import check
from trainer.config.compose import compose
from trainer.config.problems import Problems
from trainer.core.errors import UserError


def checked(*overrides: str) -> None:
    check(compose(["resources.gpus=0", *overrides], config_dirs=[]).config)


@pytest.mark.parametrize(
    ("data", "key", "value", "fix"),
    [
        ("text", "max_bytes", "0", "data.max_bytes=1 or more"),
        ("text", "max_bytes", "1GB", "data.max_bytes=1073741824"),
        ("image_folder", "max_pixels", "0", "data.max_pixels=1 or more"),
        ("image_folder", "max_bad", "-1", "data.max_bad=0 or more"),
    ],
)
def test_limits_of_data_are_checked_at_the_prompt(workdir: Path, data: str, key: str, value: str, fix: str) -> None:
    (workdir / "text.txt").write_text("a")
    with pytest.raises(UserError) as caught:
        checked(f"data={data}", "data.root=.", f"++data.{key}={value}")
    assert fix in str(caught.value)


IMPOSSIBLE = [
    *("data.sequence_length=0", "data.held_out=1.5", "data.held_out=-0.1", "data.vocab_size=-1"),
    *("model.dim=0", "model.layers=-1", "model.heads=3", "model.kv_heads=3", "model.dropout=1.5"),
    *("optimizer.lr=-1", "optimizer.weight_decay=-0.1", "optimizer.eps=-1e-8", "scheduler.warmup_steps=-3"),
    *("optimizer.betas=[0.9]", "optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9,0.99,0.999]"),
]


@pytest.mark.parametrize("override", IMPOSSIBLE)
def test_values_that_a_rank_would_refuse_are_refused_at_the_prompt(workdir: Path, override: str) -> None:
    (workdir / "text.txt").write_text("a")
    with pytest.raises(UserError) as caught:
        checked("experiment=text_transformer", "data.root=.", f"++{override}")
    assert override.partition("=")[0].rpartition(".")[2] in caught.value.message


@pytest.mark.parametrize("override", ["data.cache_gb=0", "data.cache_gb=-1", "data.shuffle_shards=0"])
def test_limits_of_a_cache_are_checked_at_the_prompt(override: str) -> None:
    with pytest.raises(UserError, match=override.replace(".", r"\.")):
        checked("model=transformer", "data=token_shards", "data.root=https://host/shards", override)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "RMSprop", "Adagrad", "Adadelta", "NAdam"])
@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_torch_refuses_what_is_refused(name: str, key: str) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    with pytest.raises(ValueError, match=f"Invalid {key}|Invalid learning rate"):
        getattr(torch.optim, name)(parameters, **{"lr": 0.1, key: -0.1})
    getattr(torch.optim, name)(parameters, **{"lr": 0.1, key: 0.0})


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("resources.gpus=-1", "resources.gpus=0"),
        ("resources.cpu_processes=0", "resources.cpu_processes=1"),
        ("data.batch_size=0", "data.batch_size=1"),
        ("data.batch_size=many", "data.batch_size=32"),
        ("data.micro_batch=-1", "data.micro_batch=1"),
        ("data.micro_batch=autto", "data.micro_batch=32 or auto"),
        ("data.num_workers=-1", "data.num_workers=0"),
        ("trainer.max_steps=-2", "trainer.max_steps=1"),
        ("trainer.max_epochs=0", "trainer.max_epochs=1"),
        ("trainer.max_epochs=-1", "trainer.max_epochs=10"),
        ("trainer.max_time=10m", "DD:HH:MM:SS"),
        ("trainer.precision=bf16-mix", "trainer.precision=bf16-mixed"),
        ("trainer.log_every_n_steps=0", "trainer.log_every_n_steps=1"),
        ("trainer.val_check_interval=0", "trainer.val_check_interval=1"),
        ("trainer.val_check_interval=1.5", "trainer.val_check_interval=1 or more"),
        ("trainer.val_check_interval=0.0", "trainer.val_check_interval=1 or more"),
        ("trainer.limit_train_batches=0", "trainer.limit_train_batches=1 or more"),
        ("trainer.limit_val_batches=-1", "trainer.limit_val_batches=0 or more"),
        ("trainer.limit_test_batches=2.5", "trainer.limit_test_batches=0.25"),
        ("trainer.check_val_every_n_epoch=0", "trainer.check_val_every_n_epoch=1"),
        ("trainer.num_sanity_val_steps=-2", "trainer.num_sanity_val_steps=-1"),
        ("trainer.profiler=xla", "advanced, memory, nsys, pytorch, simple, torch"),
        ("cluster.price_per_gpu_hour=-2", "cluster.price_per_gpu_hour=0"),
        ("cluster.grid_gco2_per_kwh=.inf", "cluster.grid_gco2_per_kwh=0"),
        ("trainer.profile_after=4", "also set trainer.profiler=torch"),
        ("trainer.profile_rank=1", "also set trainer.profiler=torch"),
        ("trainer.profiler=memory", "trainer.profiler=torch"),
        ("trainer.profiler=nsys", "trainer.profiler=torch"),
        ("trainer.deterministic=maybe", "false, true, warn"),
        ("trainer.accumulate_grad_batches=2", "data.batch_size=128 data.micro_batch=32"),
        ("trainer.gradient_clip_norm=0", "above 0"),
        ("checkpoint.every_minutes=nan", "above 0"),
        ("checkpoint.keep_last=0", "checkpoint.keep_last=1"),
        ("checkpoint.mode=maximum", "max, min"),
        ("checkpoint.on_failure=ignore", "stop, warn"),
        ("tracking.mode=ofline", "did you mean tracking.mode=offline?"),
        ("resilience.max_restarts=-1", "resilience.max_restarts=0"),
        ("seed=-1", "seed=0"),
        ("name='a b/c'", "name=a-b-c"),
        ("name=.hidden", "name=hidden"),
        ("runs_dir=taken", "directory"),
        ("runs_dir=", "TRAINER_RUNS_DIR"),
        ("data.batch_size=33", "data.batch_size=32 or data.batch_size=34"),
        ("strategy=single resources.cpu_processes=2", "resources.cpu_processes=1"),
        ("strategy.activation_checkpointing=ful", "did you mean strategy.activation_checkpointing=full?"),
        ("strategy.broadcast_buffers=never", "always, auto, evaluation"),
        ("strategy=fsdp strategy.reduce_dtype=bf16", "bfloat16, float32"),
        ("strategy=fsdp strategy.prefetch=-1", "strategy.prefetch=0"),
        ("strategy=hsdp strategy.shard_size=3 resources.cpu_processes=4", "1, 2, 4"),
        ("strategy=tp strategy.tensor_parallel_size=3 resources.cpu_processes=2", "1, 2"),
        ("strategy=tp strategy.tensor_parallel_size=0", "strategy.tensor_parallel_size=1"),
        ("strategy=deepspeed_zero2 strategy.offload_optimizer=gpu", "cpu, none, nvme"),
        ("strategy=deepspeed_zero3 strategy.reduce_bucket_size=0", "strategy.reduce_bucket_size=1"),
        ("model.dropout=much", "model.dropout"),
    ],
)
def test_each_mistake_is_one_problem_with_key_and_fix(workdir: Path, override: str, fix: str) -> None:
    (workdir / "taken").write_text("")
    with pytest.raises(UserError) as caught:
        checked(*override.split(" ") if override.startswith("strategy") else [override])
    assert not isinstance(caught.value, Problems)
    key = override.partition("=")[0]
    assert key in caught.value.message
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.profile_rank=2", "trainer.profile_rank=2: the ranks of this job are 0 to 1"),
        ("trainer.max_steps=10", "trainer.max_steps=10: no step is left after the first 10"),
    ],
)
def test_a_profile_of_nothing_is_refused(workdir: Path, override: str, message: str) -> None:
    job = ["trainer.profiler=torch", "resources.gpus=0", "resources.cpu_processes=2"]
    with pytest.raises(UserError, match=re.escape(message)):
        checked(*job, override)
    checked(*job, "trainer.profile_rank=1", "trainer.max_steps=11")


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_time=00:01:30:00", "trainer.max_epochs=null", "scheduler=constant"],
        ["trainer.limit_val_batches=0", "checkpoint.keep_best=0", "checkpoint.mode=max"],
        ["data.batch_size=32", "data.micro_batch=4", "resources.cpu_processes=4"],
        ["data.batch_size=32", "data.micro_batch=4", "resources.cpu_processes=4", "trainer.accumulate_grad_batches=2"],
        ["trainer.limit_train_batches=3.0", "trainer.limit_val_batches=0.0", "trainer.overfit_batches=0.5"],
        ["strategy=single", "resources.cpu_processes=1"],
        ["callbacks=early_stopping", "optimizer=sgd", "scheduler=constant", "tracking=none"],
    ],
)
def test_valid_configurations_pass(workdir: Path, overrides: list[str]) -> None:
    checked(*overrides)


def test_all_problems_are_reported_at_once_values_first(workdir: Path) -> None:
    with pytest.raises(Problems) as caught:
        checked("trainer.max_steps=0", "model.dropout=much", "seed=-1")
    first = [problem.message.partition("=")[0] for problem in caught.value.problems]
    assert first == ["trainer.max_steps", "seed", "model.dropout"]
    assert str(caught.value).startswith("3 problems")


def test_a_missing_argument_of_the_data_is_reported(workdir: Path) -> None:
    """The trainer passes `data.batch_size` on if it is set; a class that requires it cannot be built without."""
    (workdir / "own.py").write_text("class Rows:\n    def __init__(self, batch_size, folder='x'): ...\n")
    with pytest.raises(UserError, match=r"data\.batch_size is missing: own\.Rows needs it"):
        check(compose(["data._target_=own.Rows"], config_dirs=[]).config)
    check(compose(["data._target_=own.Rows", "data.batch_size=32"], config_dirs=[]).config)


@pytest.mark.parametrize(
    ("strategy", "is_refused"),
    [
        ("strategy=ddp", False),
        ("strategy=fsdp", False),
        ("strategy=tp strategy.tensor_parallel_size=2", False),
        ("strategy=tp strategy.tensor_parallel_size=4", True),
        ("strategy=hsdp", True),
        ("strategy=deepspeed_zero2", True),
    ],
)
def test_local_checkpoints_on_several_nodes_are_for_ranks_that_load_what_their_node_saved(
    workdir: Path, strategy: str, is_refused: bool
) -> None:
    local = ["checkpoint.local_dir=/local", "checkpoint.local_every_n_steps=5"]
    nodes = ["cluster=slurm", "resources.nodes=2"]
    for overrides, expected in (([*nodes, *local], is_refused), (nodes, False), (local, False)):
        try:
            checked("resources.cpu_processes=4", *strategy.split(" "), *overrides)
            problem = ""
        except UserError as error:  # the default model defines no layers to split
            problem = str(error)
        assert ("ranks load what other nodes saved" in problem) == expected, problem
