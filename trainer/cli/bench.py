"""`trainer bench faults`: real jobs with real faults, each compared bit for bit with the job that was left alone."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from trainer.cli.common import table
from trainer.core.errors import DONE, JOB_FAILED, UserError
from trainer.core.near import did_you_mean, listed
from trainer.faultbench.bench import FaultBench, Result
from trainer.faultbench.cases import KINDS

_DESCRIPTION = """Train small jobs of two ranks, hurt each of them in one way, and compare what they end with, bit for
bit, with a job that was left alone. Ends with 0 when every job ended as required."""


def main(argv: list[str]) -> int:
    options = _parse(argv)
    strategies = options.strategies.split(",")
    kinds = options.kinds.split(",") if options.kinds else []
    if options.at_once < 1:
        raise UserError(f"--at-once {options.at_once} must be at least 1", "leave it out for one job at a time")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"there is no fault {kind}", f"{did_you_mean(kind, KINDS)}choose of: {listed(KINDS)}")
    folder = Path(options.keep or tempfile.mkdtemp(prefix="trainer-faults-")).absolute()
    out = Path(options.out) if options.out else None
    done = earlier(out, options.seed) if out else []
    known = {result.number for result in done}
    more = f", {len(done)} of them done" if done else ""
    print(f"{options.n} faults{more}, seed {options.seed}, {listed(strategies)}; runs in {folder}", flush=True)

    def report(result: Result) -> None:
        done.append(result)
        said = result.problem or "as required"
        print(
            f"{result.number:>4}  {result.strategy:<16}{result.case:<28}{result.lost_steps:>3} steps lost"
            f"{result.down_s:>7.1f} s  {said}",
            flush=True,
        )
        if out:
            write(out, options.seed, done)

    numbers = [number for number in range(options.n) if number not in known]
    FaultBench(folder, options.seed, strategies, kinds).run(numbers, report, options.at_once)
    print("\n" + summary_table(done))
    survived = sum(result.problem is None for result in done)
    print(f"\n{survived} of {len(done)} ended as required")
    return DONE if survived == len(done) else JOB_FAILED


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trainer bench", description=_DESCRIPTION, epilog="example: trainer bench faults --n 20 --seed 1"
    )
    parser.add_argument("what", choices=["faults"])
    parser.add_argument("--n", type=int, default=len(KINDS), help="how many faults; default: each kind once")
    parser.add_argument("--seed", type=int, default=0, help="draws ranks, steps and moments")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="jobs side by side")
    parser.add_argument("--strategies", default="ddp", help="in turn, such as ddp,fsdp,deepspeed_zero2")
    parser.add_argument("--kinds", help=f"only these: {listed(KINDS)}")
    parser.add_argument("--keep", metavar="DIR", help="where the runs are made; those that failed stay")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="results as FILE.json and FILE.md, after each case; what is there and as required is not run again",
    )
    return parser.parse_args(argv)


def summary_table(results: list[Result]) -> str:
    """One row a kind: how many, survived, steps lost, seconds down."""
    rows = []
    for kind in dict.fromkeys(result.kind for result in results):
        of_kind = [result for result in results if result.kind == kind]
        survived = [result for result in of_kind if result.problem is None]
        down = [result.down_s for result in of_kind]
        rows.append(
            [
                kind,
                str(len(of_kind)),
                str(len(survived)),
                f"{statistics.mean(result.lost_steps for result in of_kind):.1f}",
                str(max(result.lost_steps for result in of_kind)),
                f"{statistics.median(down):.0f}",
                f"{max(down):.0f}",
            ]
        )
    return table(rows, ["fault", "jobs", "as required", "steps lost", "most", "seconds down", "most"])


def earlier(out: Path, seed: int) -> list[Result]:
    """What a run with this `--out` has done already, without what did not end as required."""
    try:
        content = json.loads(out.with_suffix(".json").read_text())
    except FileNotFoundError:
        return []
    if content["seed"] != seed:
        raise UserError(f"{out} has results of --seed {content['seed']}", "use that seed, or another --out")
    return [Result(**result) for result in content["results"] if result["problem"] is None]


def write(out: Path, seed: int, results: list[Result]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {"seed": seed, "results": [asdict(result) for result in results]}
    out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    survived = sum(result.problem is None for result in results)
    lines = [f"# Faults, seed {seed}: {survived} of {len(results)} ended as required", ""]
    lines += [f"Commits: {', '.join(dict.fromkeys(result.commit for result in results))}.", ""]
    lines += ["```", summary_table(results), "```"]
    failed = [result for result in results if result.problem is not None]
    lines += ["", "Not as required:", ""] if failed else []
    lines += [f"- {one.number} {one.strategy} {one.case}: {(one.problem or '').splitlines()[0]}" for one in failed]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
