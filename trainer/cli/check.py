"""`trainer check`: everything about a job, or every job of a sweep, that can be found wrong before it is launched."""

from __future__ import annotations

import json
import sys
from typing import Any

from trainer.cli import deep
from trainer.cli.job import Job, check_all, describe
from trainer.cli.overrides import compose_all, parser
from trainer.config.problems import Problems
from trainer.core.errors import DONE, TrainerError
from trainer.starter.folder import expand

_DESCRIPTION = """Check a job without launching it: keys, types, arguments of every _target_, launch shape, batch split.
With -m every job of the sweep is checked. --deep also makes the model (without memory for its weights) and, where
the command line names data or an experiment, prepares the data: it counts parameters and operations."""


def main(argv: list[str]) -> int:
    """Returns 0 and prints the plan, or raises what is wrong; with --json both are printed as JSON."""
    made = parser("check", _DESCRIPTION)
    made.add_argument("--json", action="store_true", help="print one JSON object: ok, problems, jobs")
    made.add_argument("--deep", action="store_true", help="count the model's parameters and FLOPs; takes seconds")
    arguments = made.parse_intermixed_args(argv)
    try:
        say = sys.stderr if arguments.json else sys.stdout
        arguments.overrides = expand(arguments.overrides, arguments.config_dir, keep=False, say=say)
        # --deep makes the model, with data of its own size where none is named.
        jobs = check_all(compose_all(arguments), fits=not arguments.deep)
        counted = deep.counted(jobs) if arguments.deep else [None] * len(jobs)
    except TrainerError as error:
        if not arguments.json:
            raise
        _print({"ok": False, "problems": _listed(error), "jobs": []})
        return error.code
    if arguments.json:
        _print(
            {"ok": True, "problems": [], "jobs": [_facts(job, found) for job, found in zip(jobs, counted, strict=True)]}
        )
        return DONE
    for job, found in zip(jobs, counted, strict=True):
        lines = [*describe(job), *(deep.described(found) if found else [])]
        print("\n".join(f"{word:<11}{text}" for word, text in lines), end="\n\n")
    print("nothing wrong found" if len(jobs) == 1 else f"nothing wrong found in {len(jobs)} jobs")
    return DONE


def _listed(error: TrainerError) -> list[dict[str, str]]:
    found = error.problems if isinstance(error, Problems) else (error,)
    return [{"message": one.message, "fix": one.fix} for one in found]


def _facts(job: Job, counted: dict[str, Any] | None) -> dict[str, Any]:
    plan = job.batch()
    return {
        "overrides": job.composed.overrides,
        "choices": job.composed.choices,
        "shape": job.shape.to_dict(),
        "batch": None
        if plan is None
        else {"global": plan.global_batch, "micro": plan.micro_batch, "accumulate": plan.accumulate},
        "strategy": job.config["strategy"]["name"],
        **(counted or {}),
    }


def _print(value: dict[str, Any]) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")
