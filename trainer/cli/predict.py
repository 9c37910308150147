"""`trainer predict [RUN]`: what a checkpoint makes of each sample of a data set, in its order."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from trainer.cli.chosen import choose, run_on_ranks
from trainer.core.errors import UserError
from trainer.core.files import read_json
from trainer.runs.directory import RunDirectory
from trainer.runs.registry import find, runs_dir_from
from trainer.supervise import entry

_EXAMPLE = "example: trainer predict k3v9 --checkpoint last data.root=new_pictures"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="trainer predict", description=__doc__, epilog=_EXAMPLE, allow_abbrev=False)
    parser.add_argument("run", nargs="?", help="id, prefix, name or path; the latest without it")
    parser.add_argument("overrides", nargs="*", metavar="data.x=value", help="other data than the run's own")
    parser.add_argument("--split", choices=["test", "val", "predict"], default="test")
    parser.add_argument("--checkpoint", default="best", metavar="best|last|STEP")
    parser.add_argument("--ranks", type=int, default=None, metavar="N", help="processes here; those of the run")
    parser.add_argument("--runs-dir", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args(argv)
    if options.run and "=" in options.run:
        options.overrides.insert(0, options.run)
        options.run = None
    if options.ranks is not None and options.ranks < 1:
        raise UserError(f"--ranks={options.ranks} must be at least 1", "leave it out for as many as the run has")
    run = find(options.run, runs_dir_from(options.runs_dir))
    checkpoint = choose(run, options.checkpoint)
    data = _data(run, options.overrides)
    target = run.path / "predictions" / f"step-{checkpoint.step:08d}-{options.split}"
    staging = target.parent / f".{target.name}.{os.getpid()}"
    staging.mkdir(parents=True)
    try:
        arguments = [checkpoint.path.name, options.split, json.dumps(data), str(staging)]
        run_on_ranks(run, entry.PREDICT, arguments, options.ranks, quiet=options.json)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    _say(target, options.json)
    return 0


def _say(target: Path, as_json: bool) -> None:
    record = read_json(target / "predictions.json")
    if as_json:
        print(json.dumps({"path": str(target), **record}))
        return
    print(f"{record['run']}, step {record['step']}, {record['split']} -> {target}")
    for output in record["outputs"].values():
        each = ", a row for each batch" if output.get("row") == "batch" else ""
        print(f"  {output['file']:<32}  {' x '.join(map(str, output['shape']))} {output['dtype']}{each}")
    if not record["outputs"]:
        print("  nothing: predict_step returned None for each batch")


def _data(run: RunDirectory, overrides: list[str]) -> dict[str, Any]:
    """The section `data` of the run with the overrides in it. Raises UserError for keys that its target has not."""
    import yaml

    from trainer.config.instantiate import read_whole
    from trainer.config.problems import raise_all
    from trainer.config.targets import problems_of_targets

    config = read_whole(run.config_path)
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key.startswith("data."):
            raise UserError(f"{override}: only the data can be another", "write data.KEY=VALUE")
        node = config["data"]
        *sections, name = key.split(".")[1:]
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = yaml.safe_load(value)
    if overrides:
        raise_all(list(problems_of_targets(config, Path.cwd())))
    return config["data"]
