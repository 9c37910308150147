"""`trainer predict [RUN]`: write the predictions of a checkpoint for each sample of a data set, in its order."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from trainer.cli.chosen import choose, judge, make_room, run_on_ranks
from trainer.cli.options import Parser, add_checkpoint_option, add_output_options, add_run, add_trust, make_parser
from trainer.core import records
from trainer.core.errors import DONE, UserError
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Predictions
from trainer.runs.registry import runs_dir_from
from trainer.runs.trust import find_trusted
from trainer.supervise import entry

_DESCRIPTION = (
    "Run predict_step of a checkpoint on each sample of a data set, on this machine, and write the outputs as NumPy "
    "files in the order of the samples to RUN/predictions/step-STEP-SPLIT."
)
_RECORD = "predictions.json"


def _parser() -> Parser:
    parser = make_parser("predict", _DESCRIPTION, "trainer predict k3v9 --checkpoint last data.root=new_images")
    add_run(parser)
    parser.add_argument("overrides", nargs="*", metavar="data.KEY=VALUE", help="use other data than the run's own")
    parser.add_argument(
        "--split", choices=["test", "val", "predict"], default="test", help="part of the data to use (default: test)"
    )
    add_checkpoint_option(parser)
    add_trust(parser)
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="number of processes, on this machine (default: those of the run)"
    )
    add_output_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Run `trainer predict` and return the exit code."""
    options = _parser().parse_intermixed_args(argv)
    if options.run and "=" in options.run:
        options.overrides.insert(0, options.run)
        options.run = None
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks={options.ranks} must be at least 1", "leave it out to use those of the run")
    run = find_trusted(options.run, runs_dir_from(options.runs_dir), options.trust)
    judge(run)
    checkpoint = choose(run, options.checkpoint)
    data = _data(run, options.overrides)
    target = run.path / "predictions" / f"step-{checkpoint.step:08d}-{options.split}"
    staging = target.parent / f".{target.name}.{os.getpid()}"
    make_room(target, _RECORD, delete=False)
    staging.mkdir(parents=True)
    try:
        arguments = [checkpoint.path.name, options.split, json.dumps(data), str(staging)]
        run_on_ranks(run, entry.PREDICT, arguments, options.ranks, quiet=options.json)
        make_room(target, _RECORD)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _print_record(target, options.json)
    return DONE


def _print_record(target: Path, as_json: bool) -> None:
    record = records.read_existing(Predictions, target / _RECORD)
    if as_json:
        print(json.dumps({"path": str(target), **records.to_json(record)}))
        return
    print(f"{record.run}, step {record.step}, {record.split} -> {target}")
    for output in record.outputs.values():
        each = ", one row per batch" if output.row == "batch" else ""
        print(f"  {output.file:<32}  {' x '.join(map(str, output.shape))} {output.dtype}{each}")
    if not record.outputs:
        print("  nothing: predict_step returned None for each batch")


def _data(run: RunDirectory, overrides: list[str]) -> dict[str, Any]:
    """Return the section `data` of the run's configuration with the overrides applied.

    Raises:
        UserError: For an override that is not of the section `data`, or that its target does not accept.
    """
    from trainer.config.instantiate import read_whole
    from trainer.config.override_value import value_of
    from trainer.config.problems import raise_all
    from trainer.config.targets import problems_of_targets

    config = read_whole(run.config_path)
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key.startswith("data."):
            raise UserError(f"{override}: only the section data can be overridden", "write data.KEY=VALUE")
        node, path = config["data"], "data"
        *sections, name = key.split(".")[1:]
        for section in sections:
            node, path = node.setdefault(section, {}), f"{path}.{section}"
            if not isinstance(node, dict):
                raise UserError(f"{override}: {path} is a value, not a section", f"write {path}=VALUE")
        node[name] = value_of(override)
    if overrides:
        raise_all(list(problems_of_targets(config, Path.cwd())))
    data: dict[str, Any] = config["data"]
    return data
