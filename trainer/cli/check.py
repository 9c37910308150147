"""`trainer check`: find the problems of a job, or of every job of a sweep, before it is launched."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from trainer.cli import deep
from trainer.cli.job import Job, check_all, describe
from trainer.cli.overrides import compose_all, overrides_parser
from trainer.config.problems import Problems
from trainer.core.errors import DONE, TrainerError
from trainer.starter.folder import expand
from trainer.train.model_facts import ModelFacts

_DESCRIPTION = (
    "Check a job without launching it: keys, types, the arguments of every _target_, the launch shape and the batch "
    "split. With -m every job of the sweep is checked. --deep also builds the model (on the meta device, without "
    "memory for its weights) and counts its parameters and FLOPs; if the command line names data or an experiment, it "
    "also prepares the data."
)


def main(argv: list[str]) -> int:
    """Run `trainer check`: print the plan and return 0, or raise the problems. With --json both are printed."""
    parser = overrides_parser("check", _DESCRIPTION, "trainer check experiment=quickstart trainer.max_steps=100")
    parser.add_argument("--json", action="store_true", help="print one JSON object: ok, problems, jobs")
    parser.add_argument(
        "--deep",
        action="store_true",
        help="also count the model's parameters and FLOPs, and try checkpoint.dir; takes seconds",
    )
    arguments = parser.parse_intermixed_args(argv)
    try:
        stream = sys.stderr if arguments.json else sys.stdout
        arguments.overrides = expand(arguments.overrides, arguments.config_dir, keep=False, stream=stream)
        # --deep counts a model that is named without data as published: it need not fit the default data.
        jobs = check_all(compose_all(arguments), fits=not arguments.deep)
        if arguments.deep:
            deep.ask_object_stores(jobs)
        counts: list[ModelFacts | None] = [*deep.count(jobs)] if arguments.deep else [None] * len(jobs)
    except TrainerError as error:
        if not arguments.json:
            raise
        _print({"ok": False, "problems": _problems(error), "jobs": []})
        return error.code
    if arguments.json:
        facts = [_facts(job, counted) for job, counted in zip(jobs, counts, strict=True)]
        _print({"ok": True, "problems": [], "jobs": facts})
        return DONE
    for job, counted in zip(jobs, counts, strict=True):
        lines = [*describe(job), *(deep.describe(counted) if counted else [])]
        print("\n".join(f"{word:<11}{text}" for word, text in lines), end="\n\n")
    print("no problems found" if len(jobs) == 1 else f"no problems found in {len(jobs)} jobs")
    return DONE


def _problems(error: TrainerError) -> list[dict[str, str]]:
    problems = error.problems if isinstance(error, Problems) else (error,)
    return [{"message": one.message, "fix": one.fix} for one in problems]


def _facts(job: Job, counted: ModelFacts | None) -> dict[str, Any]:
    plan = job.batch()
    facts = {} if counted is None else asdict(counted)
    facts.pop("error", None)
    return {
        "overrides": job.composed.overrides,
        "choices": job.composed.choices,
        "shape": asdict(job.shape),
        "batch": None
        if plan is None
        else {"global": plan.global_batch, "micro": plan.micro_batch, "accumulate": plan.accumulate},
        "strategy": job.config["strategy"]["name"],
        **facts,
    }


def _print(value: dict[str, Any]) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")
