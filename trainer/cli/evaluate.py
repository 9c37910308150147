"""`trainer evaluate [RUN]`: the metrics of one of a run's checkpoints on held-out data."""

from __future__ import annotations

import argparse
import json
import sys

from trainer.cli.chosen import choose, run_on_ranks
from trainer.errors import JOB_FAILED
from trainer.runs.files import read_json
from trainer.runs.registry import find, runs_dir_from

_EXAMPLE = "example: trainer evaluate k3v9 --split test --checkpoint best"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer evaluate", description=__doc__, epilog=_EXAMPLE)
    parser.add_argument("run", nargs="?", help="id, prefix, name or path; the latest without it")
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|STEP")
    parser.add_argument("--runs-dir", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    run = find(options.run, runs_dir_from(options.runs_dir))
    checkpoint = choose(run, options.checkpoint)
    code = run_on_ranks(run, "evaluate", [checkpoint.path.name, options.split])
    if code != 0:
        print(f"trainer: the evaluation of {run.path.name} failed (exit {code})", file=sys.stderr)
        return JOB_FAILED
    record = read_json(run.path / "evaluations" / f"step-{checkpoint.step:08d}-{options.split}.json")
    if options.json:
        print(json.dumps(record))
    else:
        print(f"{run.path.name}, step {checkpoint.step}:")
        for name, value in sorted(record["metrics"].items()):
            print(f"  {name:<20}{value:.4f}")
    return 0
