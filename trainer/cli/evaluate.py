"""`trainer evaluate [RUN]`: the metrics of one of a run's checkpoints on held-out data."""

from __future__ import annotations

import argparse
import json

from trainer.cli.chosen import choose, run_on_ranks
from trainer.core.files import read_json
from trainer.runs.registry import find, runs_dir_from
from trainer.supervise import entry

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
    run_on_ranks(run, entry.EVALUATE, [checkpoint.path.name, options.split], quiet=options.json)
    record = read_json(run.path / "evaluations" / f"step-{checkpoint.step:08d}-{options.split}.json")
    if options.json:
        print(json.dumps(record))
    else:
        print(f"{run.path.name}, step {checkpoint.step}:")
        width = max((len(name) + 2 for name in record["metrics"]), default=0)
        width = max(20, width)
        for name, value in sorted(record["metrics"].items()):
            print(f"  {name:<{width}}{value:.4f}")
    return 0
