"""`trainer bench faults`: run jobs with injected faults and compare each bit for bit with an undisturbed job.

`trainer bench devices` is in `bench_devices.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

from trainer.cli.common import table
from trainer.cli.options import make_parser
from trainer.core.errors import DONE, JOB_FAILED, UserError
from trainer.core.near import did_you_mean, listed
from trainer.faultbench.bench import FaultBench, Result
from trainer.faultbench.cases import KINDS

_DESCRIPTION = (
    "Run small training jobs of two ranks, inject one fault into each, and compare its final state bit for bit with "
    "that of an undisturbed job. Exit code 0 if every job resumed, or failed, as its fault requires, else 1. `trainer "
    "bench devices` compares the devices of this machine; see its --help."
)


def main(argv: list[str]) -> int:
    """Run `trainer bench` and return the exit code."""
    if argv[:1] == ["devices"]:
        from trainer.cli.bench_devices import main as devices

        return devices(argv[1:])
    options = _parse(argv)
    strategies = options.strategies.split(",")
    kinds = options.kinds.split(",") if options.kinds else []
    if options.at_once < 1:
        raise UserError(f"--at-once {options.at_once} must be at least 1", "leave it out for one job at a time")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--kinds: unknown fault {kind}", f"{did_you_mean(kind, KINDS)}use one of: {listed(KINDS)}")
    folder = Path(options.keep or tempfile.mkdtemp(prefix="trainer-faults-")).absolute()
    out = Path(options.out) if options.out else None
    results = read_results(out, options.seed) if out else []
    known = {result.number for result in results}
    more = f", {len(results)} of them done" if results else ""
    print(f"{options.n} faults{more}, seed {options.seed}, {listed(strategies)}; runs in {folder}", flush=True)

    def report(result: Result) -> None:
        results.append(result)
        print(
            f"{result.number:>4}  {result.strategy:<16}{result.case:<28}{result.lost_steps:>3} steps lost"
            f"{result.down_s:>7.1f} s  {result.problem or 'as required'}",
            flush=True,
        )
        if out:
            write_results(out, options.seed, results)

    numbers = [number for number in range(options.n) if number not in known]
    FaultBench(folder, options.seed, strategies, kinds).run(numbers, report, options.at_once)
    print("\n" + summary_table(results))
    survived = sum(result.problem is None for result in results)
    print(f"\n{survived} of {len(results)} ended as required")
    return DONE if survived == len(results) else JOB_FAILED


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("bench", _DESCRIPTION, "trainer bench faults --n 20 --seed 1", allow_abbrev=True)
    parser.add_argument(
        "what",
        choices=["faults"],
        metavar="{faults,devices}",
        help="the benchmark; devices has options of its own: trainer bench devices --help",
    )
    parser.add_argument(
        "--n", type=int, default=len(KINDS), metavar="N", help=f"number of faults (default: {len(KINDS)}, one per kind)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the ranks, steps and times that are hit (default: 0)"
    )
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="jobs to run in parallel (default: 1)")
    parser.add_argument(
        "--strategies",
        default="ddp",
        metavar="A,B",
        help="strategies to use in turn, such as ddp,fsdp,deepspeed_zero2 (default: ddp)",
    )
    parser.add_argument(
        "--kinds", metavar="A,B", help=f"kinds of fault (default: all): {listed(KINDS, limit=len(KINDS))}"
    )
    parser.add_argument(
        "--keep",
        metavar="DIR",
        help="directory of the runs; those that pass are deleted (default: a temporary directory)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="write results to FILE.json and FILE.md after each job; jobs that have passed according to FILE.json are "
        "not run again",
    )
    return parser.parse_args(argv)


def summary_table(results: list[Result]) -> str:
    """Return a table with one row per kind: jobs, jobs that ended as required, steps lost, seconds of downtime."""
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


def read_results(out: Path, seed: int) -> list[Result]:
    """Return the results that an earlier call wrote to `out`, only those that ended as required.

    Raises:
        UserError: If they have another seed.
    """
    try:
        content = json.loads(out.with_suffix(".json").read_text())
    except FileNotFoundError:
        return []
    if content["seed"] != seed:
        raise UserError(f"{out} holds results of --seed {content['seed']}", "use that seed, or another --out")
    return [Result(**result) for result in content["results"] if result["problem"] is None]


def write_results(out: Path, seed: int, results: list[Result]) -> None:
    """Write the results to `out` with the suffixes .json (all of them) and .md (a summary)."""
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
