#!/usr/bin/env python3
"""Lightning's own tests as the judge of our loop: run with ours in every Trainer; what fails, again with Lightning's,
and once more with ours.

    git clone --depth 1 --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning /tmp/lightning
    .venv/bin/python benchmarks/lightning_suite.py /tmp/lightning                       loops and what depends on them
    .venv/bin/python benchmarks/lightning_suite.py /tmp/lightning tests_pytorch/loops   only these
    .venv/bin/python benchmarks/lightning_suite.py /tmp/lightning tests_pytorch         all of them: about an hour

The checkout must be of the installed version (of a tag whose loops are the same); only its tests are used, on the
installed package. What fails with both loops lacks a package, or a GPU, and says nothing. A test that fails with ours
only is listed, and is a bug, or a difference that the docstring of `trainer/train/loop.py` tells: those are in
`KNOWN`. Exit code 1 where there are others.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PATHS = (
    "tests_pytorch/loops",
    "tests_pytorch/core",
    "tests_pytorch/callbacks",
    "tests_pytorch/trainer/optimization",
    "tests_pytorch/trainer/flags",
    "tests_pytorch/trainer/logging_",
    "tests_pytorch/models/test_hooks.py",
)
TEST_TIMEOUT_S = 240
KNOWN: dict[str, str] = {}
"""Test (without its parameters) to the reason for which it fails with our loop."""


def outcomes(checkout: Path, paths: list[str], loop: str, timeout_s: float) -> dict[str, dict[str, object]]:
    """Of the tests `paths`: {"outcome", "lean"}, the latter the micro-batches that the lean loop trained itself."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "outcomes.jsonl"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "lightning_suite_plugin"]
        command += ["-p", "no:cacheprovider", "-o", "addopts=", f"--timeout={TEST_TIMEOUT_S}", "--tb=no"]
        command += ["--continue-on-collection-errors", *paths]  # a file that needs a package which is not installed
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), str(checkout / "tests")]),
            "LIGHTNING_SUITE_LOOP": loop,
            "LIGHTNING_SUITE_OUT": str(out),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        log = Path(folder) / "log"
        with log.open("w") as stream:
            process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                sys.exit(f"{loop}: not done in {timeout_s:.0f} s\n{log.read_text()[-2000:]}")
        if code not in (0, 1) or not out.exists():
            sys.exit(f"{loop}: pytest ended with {code}\n{log.read_text()[-4000:]}")
        found: dict[str, dict[str, object]] = {}
        for line in out.read_text().splitlines():
            entry = json.loads(line)
            found[entry.pop("test")] = entry
        return found


def compare(lean: dict[str, dict[str, object]], stock: dict[str, dict[str, object]]) -> tuple[str, list[str]]:
    """The table, and the tests that fail with ours only and for no known reason. `stock` has at least those that did
    not pass with ours."""
    passed = {test for test, one in lean.items() if one["outcome"] == "passed"}
    with_stock = {test for test, one in stock.items() if one["outcome"] == "passed"}
    failed = sorted(with_stock - passed)
    known = [test for test in failed if test.partition("[")[0] in KNOWN]
    batches = [int(str(one["lean"])) for one in lean.values()]
    lines = [
        "| tests | ours passes | fail with both, or skipped | newly failing | known | ran lean | lean batches |",
        "|---|---|---|---|---|---|---|",
        f"| {len(lean)} | {len(passed)} | {len(lean) - len(passed) - len(failed)} | {len(failed)} | {len(known)} "
        f"| {sum(map(bool, batches))} | {sum(batches)} |",
    ]
    lines += [f"- {test}: {KNOWN[test.partition('[')[0]]}" for test in known]
    return "\n".join(lines), [test for test in failed if test not in known]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a clone of Lightning, at the installed version")
    parser.add_argument("paths", nargs="*", default=list(PATHS), help="below its folder tests; default: the loops'")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for each of the two runs")
    options = parser.parse_args()
    if not (options.checkout / "tests" / "tests_pytorch").is_dir():
        parser.error(f"{options.checkout} has no tests/tests_pytorch: clone Lightning as the top of this file says")
    checkout = options.checkout.resolve()
    lean = outcomes(checkout, [f"tests/{path}" for path in options.paths], "lean", options.timeout)
    failed = [test for test, one in lean.items() if one["outcome"] == "failed"]
    stock = outcomes(checkout, failed, "stock", options.timeout) if failed else {}
    again = [test for test, one in stock.items() if one["outcome"] == "passed"]
    if again:  # a busy machine fails tests that wait
        lean |= outcomes(checkout, again, "lean", options.timeout)
    text, new = compare(lean, stock)
    print(text)
    for test in new:
        print(f"newly failing: {test}")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
