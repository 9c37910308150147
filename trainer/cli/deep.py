"""`trainer check --deep`: facts that need torch, computed in a separate process."""

from __future__ import annotations

from trainer.cli.child import ask
from trainer.cli.job import Job
from trainer.config.problems import raise_all
from trainer.core.errors import TrainerError, UserError
from trainer.runs.remote_checkpoints import url_of
from trainer.supervise import entry
from trainer.train.model_facts import BuildRequest, ModelFacts

TIMEOUT_S = 1800.0
"""Most of it may be spent on preparing the data, such as tokenizing many files."""


def count(jobs: list[Job]) -> list[ModelFacts]:
    """Return the facts about the model of each job.

    Raises:
        TrainerError: If the process fails or takes too long.
        UserError: With the errors of all jobs.
    """
    answers = ask(
        entry.DEEP,
        [BuildRequest(config=job.config, with_data=names_data(job.composed.overrides)) for job in jobs],
        ModelFacts,
        count=len(jobs),
        timeout_s=TIMEOUT_S,
        what="--deep",
        shorten="leave --deep out; the run itself has no such limit",
    )
    raise_all([UserError(one.error.message, one.error.fix) for one in answers if one.error])
    return answers


def ask_object_stores(jobs: list[Job]) -> None:
    """Check that the checkpoints of the jobs can be written to their object stores (`checkpoint.dir`).

    Raises:
        TrainerError: With all that is wrong with credentials, buckets and permissions.
    """
    from trainer.checkpoint.object_store import probe

    problems = []
    for url in {url for job in jobs if (url := url_of(job.config)) is not None}:
        try:
            probe(url)
        except TrainerError as error:
            problems.append(error)
    raise_all(problems)


def describe(counted: ModelFacts) -> list[tuple[str, str]]:
    """Return the facts as lines of the plan: a title and a text."""
    total, trainable = counted.parameters or 0, counted.trainable or 0
    lines = [("parameters", f"{total:,}" + ("" if trainable == total else f", {trainable:,} of them trainable"))]
    if not total and counted.not_counted:
        lines = []
    if counted.not_counted:
        return [*lines, ("FLOPs", f"not counted: {counted.not_counted}")]
    forward, training, tokens = counted.forward_flops or 0, counted.training_flops or 0, counted.tokens
    unit = f"per token, for sequences of {tokens:,}" if tokens else "per sample"
    flops = f"forward {_flops(forward / (tokens or 1))}, training {_flops(training / (tokens or 1))} {unit}"
    at = ", ".join(f"{key} {value}" for key, value in (counted.at or {}).items())
    return [*lines, ("FLOPs", flops), *([("counted at", at)] if at else [])]


def _flops(operations: float) -> str:
    for size, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if operations >= size:
            return f"{operations / size:.4g} {unit}"
    return f"{operations / 1e3:.4g} kFLOP"


def names_data(overrides: list[str]) -> bool:
    """Return whether to prepare the job's data: no if only a model is named, which is counted as published."""
    names = [override.lstrip("+~").partition("=")[0] for override in overrides]
    data = any(name in ("data", "experiment") or (name.startswith("data.") and name not in _SPLIT) for name in names)
    return data or "model" not in names


_SPLIT = ("data.batch_size", "data.micro_batch")
"""Keys of `data` that say nothing about what the data is."""
