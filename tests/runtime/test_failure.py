"""What becomes of an exception that ends a rank: judged here in-process, and seen in real jobs at the end."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Dataset

from tests.conftest import TrainerCli
from trainer.checkpoint.commit import failed
from trainer.core.errors import DONE, JOB_FAILED, EnvironmentFault, UserError
from trainer.runs import cause
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointFailed
from trainer.runtime import failure
from trainer.runtime.attempt import Attempt
from trainer.runtime.heartbeat import Heartbeat
from trainer.runtime.process import Rank
from trainer.train import run as train_run


def an_attempt(folder: Path, number: int = 0, step: int = 0, rank: int = 0) -> Attempt:
    """One rank of one, which began at step 0 and is at `step`."""
    run = RunDirectory(folder / "stand-in-abcdefgh")
    for needed in (run.attempts_dir, run.live_dir, run.checkpoints_dir, run.attempt_logs(number)):
        needed.mkdir(parents=True, exist_ok=True)
    place = Rank(rank, rank, 1, 1, number)
    attempt = Attempt(run, place, Heartbeat(run, place))
    attempt.first_step, attempt.heartbeat.step = 0, step
    return attempt


def raised(make: Callable[[], object]) -> BaseException:
    """The exception of a call, with its traceback."""
    try:
        make()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def throw(error: BaseException) -> Callable[[], object]:
    def call() -> object:
        raise error

    return call


def optimizer(name: str, **options: Any) -> torch.optim.Optimizer:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    made: torch.optim.Optimizer = getattr(torch.optim, name)([weight], **options)
    return made


class NoImage(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return {"x": index}["image"]


MISTAKES: dict[str, Callable[[], object]] = {
    "constructor": lambda: nn.Linear(3),  # type: ignore[call-arg]
    "attribute": lambda: nn.Linear(3, 3).head,
    "shapes": lambda: nn.Linear(3, 3)(torch.zeros(2, 5)),
    "dtypes": lambda: nn.Linear(3, 3)(torch.zeros(2, 3, dtype=torch.int64)),
    "targets": lambda: nn.functional.cross_entropy(torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64)),
    "label": lambda: nn.functional.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 7])),
    "state dict": lambda: nn.Linear(3, 3).load_state_dict(nn.Linear(2, 2).state_dict()),
    "no gradient": lambda: torch.zeros(1).backward(),
    "views": lambda: torch.zeros(6).view(4, 2),
    "concatenation": lambda: torch.cat([torch.zeros(2, 3), torch.zeros(2, 4)]),
    "no GPU": lambda: torch.zeros(1, device="cuda"),
    "key": lambda: {"a": 1}["image"],
    "missing file": lambda: Path("nowhere/at/all.csv").read_text(),
    "division": lambda: 1 / 0,
    "in a loader's process": lambda: list(DataLoader(NoImage(), num_workers=1)),
}
REFUSALS: dict[str, Callable[[], object]] = {
    "Lightning's": lambda: MixedPrecision("bf16-mixed", "cpu").clip_gradients(optimizer("AdamW", fused=True), 1.0),
    "torch's": lambda: optimizer("SparseAdam").step(),
}
ALWAYS: dict[str, Callable[[], object]] = {
    "import": lambda: __import__("no_such_module"),
    "name": lambda: eval("no_such_name"),
    "syntax": lambda: compile("def f(:", "model.py", "exec"),
    "abstract": throw(NotImplementedError("training_step")),
    "Lightning's": throw(MisconfigurationException("no train_dataloader")),
    "Hydra's": throw(InstantiationException("Error in call to target")),
    "ours": throw(UserError("data.root is wrong", "set data.root=FOLDER")),
    "early stopping": throw(RuntimeError("Early stopping conditioned on metric `val/loss` which is not available.")),
    "unused": throw(RuntimeError("parameters were not used in producing the loss, and DDP waits: a")),
}
MAYBE_ANOTHER_TIME: dict[str, Callable[[], object]] = {
    "disk": throw(OSError(errno.ENOSPC, "No space left on device")),
    "file system": throw(OSError(errno.ESTALE, "Stale file handle")),
    "network": throw(ConnectionResetError("peer")),
    "time": throw(TimeoutError("no answer")),
    "gloo": throw(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")),
    "nccl": throw(RuntimeError("NCCL error: unhandled system error")),
    "loader": throw(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_before_the_first_step_is_not_tried_again(tmp_path: Path, name: str) -> None:
    attempt = an_attempt(tmp_path)
    assert failure.conclude(raised(MISTAKES[name]), attempt) == DONE
    (end,) = attempt.directory.attempts()
    assert (end.outcome, end.exit_code, end.mend) == ("failed", 93, True)
    assert [event.event for event in attempt.directory.events()] == ["failed"]
    assert "Traceback" not in end.reason
    assert "test_failure.py:" in (end.where or "")


def test_a_save_that_failed_ends_the_run_with_the_reason_of_the_rank_that_wrote(tmp_path: Path) -> None:
    """All ranks agree to stop, and only the one that wrote knows why."""
    attempt = an_attempt(tmp_path, number=1)
    assert "could not be written; see the log" in train_run._failed_save(attempt)
    full = failed(Path("step-00000020"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    for number, reason in ((1, str(full)), (0, "of an earlier attempt")):
        attempt.directory.add_event(CheckpointFailed(attempt=number, reason=reason))
    assert train_run._failed_save(attempt) == str(full)
    assert "No space left on device" in str(full)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_by_a_package_is_not_tried_again_whatever_its_class(tmp_path: Path, name: str) -> None:
    error = raised(REFUSALS[name])
    assert type(error) is RuntimeError
    assert failure.conclude(error, an_attempt(tmp_path)) == DONE
    later = an_attempt(tmp_path / "later", step=3)  # a refusal comes before the first step
    assert failure.conclude(error, later) == JOB_FAILED


@pytest.mark.parametrize("name", ALWAYS)
def test_what_no_attempt_can_help_is_never_tried_again(tmp_path: Path, name: str) -> None:
    assert failure.conclude(raised(ALWAYS[name]), an_attempt(tmp_path, step=7)) == DONE


@pytest.mark.parametrize("name", MAYBE_ANOTHER_TIME)
def test_what_may_be_gone_the_next_time_is_tried_again_and_again(tmp_path: Path, name: str) -> None:
    for number in range(3):
        attempt = an_attempt(tmp_path, number)
        assert failure.conclude(raised(MAYBE_ANOTHER_TIME[name]), attempt) == JOB_FAILED
    assert attempt.directory.attempts() == []


@pytest.mark.parametrize(
    ("before", "now", "tries"),
    [
        (("own words", 5), ("own words", 5), False),
        (("own words", 5), ("own words", 6), True),
        (("own words", 5), ("other words", 5), True),
        (("at 0x7f12", 5), ("at 0x7e34", 5), False),
    ],
)
def test_the_same_words_at_the_same_step_are_not_tried_a_third_time(
    tmp_path: Path, before: tuple[str, int], now: tuple[str, int], tries: bool
) -> None:
    assert failure.conclude(raised(throw(RuntimeError(before[0]))), an_attempt(tmp_path, 0, before[1])) == JOB_FAILED
    code = failure.conclude(raised(throw(RuntimeError(now[0]))), an_attempt(tmp_path, 1, now[1]))
    assert code == (JOB_FAILED if tries else DONE)


def test_only_the_first_rank_to_fail_records_the_end(tmp_path: Path) -> None:
    for rank in (1, 0):
        failure.conclude(raised(throw(TypeError(f"rank {rank}"))), an_attempt(tmp_path, rank=rank))
    run = RunDirectory(tmp_path / "stand-in-abcdefgh")
    assert [(end.reason, end.rank) for end in run.attempts()] == [("TypeError: rank 1", 1)]
    assert len(run.events()) == 1


def test_a_machine_that_must_change_leaves_a_resume_to_it(tmp_path: Path) -> None:
    attempt = an_attempt(tmp_path)
    assert failure.conclude(raised(throw(EnvironmentFault("no pyarrow", "pip install it"))), attempt) == DONE
    assert attempt.directory.attempts()[0].mend is False


def test_the_cause_is_what_the_rank_wrote_and_not_what_it_took_along(tmp_path: Path) -> None:
    attempt = an_attempt(tmp_path)
    log = attempt.directory.rank_log(0, 0)
    log.write_text("Traceback (most recent call last):\nRuntimeError: Connection closed by peer\n")
    failure.conclude(raised(MAYBE_ANOTHER_TIME["gloo"]), attempt)
    failure.conclude(raised(throw(RuntimeError("the reason\nin two lines"))), an_attempt(tmp_path, rank=1))
    found = cause.find(attempt.directory, 0)
    assert (found.reason, found.rank, found.lines) == ("RuntimeError: the reason\nin two lines", 1, [])


CODE = """
import logging, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

log = logging.getLogger(__name__)

class Data(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.zeros(32, 4), torch.zeros(32, 1)), batch_size=4)

class Model(LightningModule):
    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.net = kind, nn.Linear(4, 1)
        if kind == "unused":
            self.spare = nn.Linear(3, 3)
        log.info("made by the user")
        logging.getLogger("urllib3").debug("not to be seen")
        rank_zero_info("said on rank zero")
        rank_zero_warn("warned on rank zero")

    def training_step(self, batch, batch_idx):
        is_last = self.global_rank == self.trainer.world_size - 1  # the others wait in a collective
        if self.kind == "own" and self.trainer.global_step == 2 and is_last:
            raise RuntimeError("own words")
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        kind = torch.optim.Adafactor if self.kind == "refused" else torch.optim.SGD
        return kind(self.parameters(), lr=0.1)
"""
PROMPT_S = 30.0
JOB = ("model=m", "data=d", "tracking=none", "resources.gpus=0", "name=m")


def fit(trainer_cli: TrainerCli, kind: str, ranks: int, *more: str) -> tuple[RunDirectory, str]:
    Path("mine.py").write_text(CODE)
    for section, name, target in (("model", "m", "mine.Model"), ("data", "d", "mine.Data")):
        (folder := Path("conf", section)).mkdir(parents=True)
        (folder / f"{name}.yaml").write_text(f"_target_: {target}\n")
    limits = (f"resources.cpu_processes={ranks}", "trainer.max_steps=4", f"+model.kind={kind}")
    done: subprocess.CompletedProcess[str] = trainer_cli("fit", *JOB, *limits, *more)
    assert done.returncode == (0 if kind == "none" else 1), done.stdout + done.stderr
    return RunDirectory(next(Path("runs").iterdir())), done.stdout + done.stderr


@pytest.mark.usefixtures("workdir")
def test_unused_parameters_are_named_once_and_the_option_with_them(trainer_cli: TrainerCli) -> None:
    run, said = fit(trainer_cli, "unused", 2)
    assert said.count("parameters were not used in producing the loss") == 1
    assert "gradients: spare.weight, spare.bias\n  set strategy.find_unused_parameters=true" in said
    assert "Traceback" not in said
    assert "trainer resume" not in said
    assert "died" not in said
    following = next(line for line in said.splitlines() if line.startswith("  next "))
    assert re.search(r"fix it, then: .*trainer fit model=m .* \+model\.kind=unused$", following)
    assert [event.event for event in run.events()] == ["created", "started", "first_step", "failed"]
    assert "Traceback (most recent call last)" in run.rank_log(0, 1).read_text()


@pytest.mark.usefixtures("workdir")
def test_a_pair_that_only_the_ranks_can_know_is_refused_once(trainer_cli: TrainerCli) -> None:
    """A module's own Adafactor on sharded parameters: torch raises a RuntimeError in the first step."""
    run, said = fit(trainer_cli, "refused", 2, "strategy=fsdp")
    assert "placement" in said
    assert [(end.outcome, end.exit_code) for end in run.attempts()] == [("failed", 93)]
    assert [event.event for event in run.events()] == ["created", "started", "failed"]


@pytest.mark.usefixtures("workdir")
def test_own_words_are_tried_once_more_and_logging_is_seen(trainer_cli: TrainerCli) -> None:
    run, said = fit(trainer_cli, "own", 2)
    assert said.count("RuntimeError: own words") == 2  # of the attempt that was tried again, and of the end
    assert len(run.attempts()) == 2
    for attempt in run.attempts():  # and not after `resilience.collective_timeout_s`, 1,800 s
        began = max(one.time for one in run.failures(attempt.attempt) if "own words" in one.reason)
        assert attempt.time - began < PROMPT_S
    assert "in      mine.py:" in said
    log = run.rank_log(0, 0).read_text()
    for words in ("made by the user", "said on rank zero"):
        assert log.count(words) == 1
        assert re.search(rf"^\[[-\d]+ [\d:,]+\]\[[\w.]+\]\[INFO\] - {words}$", log, re.M)
    assert "UserWarning: warned on rank zero" in log
    for words in ("GPU available", "not to be seen", "litlogger"):
        assert words not in log


@pytest.mark.executed
def test_the_failure_module_needs_no_torch() -> None:
    code = "import sys, trainer.runtime.failure; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"


def test_half_a_failure_file_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    run.attempt_logs(0).mkdir(parents=True)
    run.failure_record(0, 0).write_text('{"reason": "cut')
    run.failure_record(0, 1).write_text(json.dumps({"of": "another version"}))
    assert cause.failures(run, 0) == []
    cut, missing = capsys.readouterr().err.splitlines()
    assert cut.startswith(f"trainer: {run.failure_record(0, 0)} is damaged: Unterminated string")
    assert missing == f"trainer: {run.failure_record(0, 1)} is damaged: reason is missing; this record is left out"
