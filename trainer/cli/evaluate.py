"""`trainer evaluate [RUN]`: compute the metrics of a checkpoint on held-out data."""

from __future__ import annotations

from trainer.cli.chosen import choose, judge, run_on_ranks
from trainer.cli.options import add_checkpoint_option, add_output_options, add_run, add_trust, make_parser
from trainer.core import records
from trainer.core.errors import DONE
from trainer.runs.records import Evaluation
from trainer.runs.registry import runs_dir_from
from trainer.runs.seal import changing
from trainer.runs.trust import find_trusted
from trainer.supervise import entry

_DESCRIPTION = (
    "Compute the metrics of one of a run's checkpoints on held-out data, with the launch shape of the run, on this "
    "machine. The metrics are also written to RUN/evaluations/."
)


def main(argv: list[str]) -> int:
    """Run `trainer evaluate` and return the exit code."""
    example = "trainer evaluate k3v9 --split test --checkpoint best"
    parser = make_parser("evaluate", _DESCRIPTION, example, allow_abbrev=True)
    add_run(parser)
    parser.add_argument(
        "--split", choices=["test", "val"], default="test", help="part of the data to use (default: test)"
    )
    add_checkpoint_option(parser)
    add_trust(parser)
    add_output_options(parser)
    options = parser.parse_args(argv)
    run = find_trusted(options.run, runs_dir_from(options.runs_dir), options.trust)
    judge(run)
    checkpoint = choose(run, options.checkpoint)
    with changing(run):
        run_on_ranks(run, entry.EVALUATE, [checkpoint.path.name, options.split], quiet=options.json)
    record = records.read_existing(Evaluation, run.evaluation_path(checkpoint.step, options.split))
    if options.json:
        print(records.dumps(record))
    else:
        print(f"{run.path.name}, step {checkpoint.step}:")
        width = max([20, *(len(name) + 2 for name in record.metrics)])
        for name, value in sorted(record.metrics.items()):
            print(f"  {name:<{width}}{f'{value:.4f}' if isinstance(value, (int, float)) else value}")
    return DONE
