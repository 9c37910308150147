"""One case of `benchmarks/parity`: a model on a number of ranks. Started by it, writes `found.json` in a folder."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from parity_data import CASES
from parity_turns import Blocks, Train, in_turn, started
from parity_variants import VARIANTS, train

from trainer.worker import run

CONTROL = "bare again"
"""A second bare loop, whose ratio should be 1: what it misses by is what the measurement cannot tell."""


def measure(name: str, ranks: int, rounds: int, blocks: Blocks, folder: Path) -> dict[str, Any]:
    """{variant: [[cost of a block, ...] a round]}; every round has new processes, so another layout of the memory."""
    costs: dict[str, list[Any]] = {}
    weights: set[str] = set()
    for number in range(rounds):
        variants: dict[str, Train] = {one: partial(train, one, name, blocks.steps) for one in VARIANTS}
        variants[CONTROL] = variants["bare"]
        with started(variants, ranks, blocks, folder / str(number)) as running:
            for variant, cost in in_turn(running, blocks).items():
                costs.setdefault(variant, []).append(cost)
            for one in running.values():
                one.go()
            found = {variant: one.results() for variant, one in running.items()}
        weights |= {fingerprint for results in found.values() for fingerprint, _ in results}
        assert len(weights) == 1, "the variants ended with different weights"
        losses = _mean_over_ranks([results for _, results in found["bare"]])
        assert losses, "no loss was read"
        assert losses == found["ours"][0][1], f"losses differ: {losses} and {found['ours'][0][1]}"
    return {"costs": costs, "weights": weights.pop(), "losses": losses}


def _mean_over_ranks(losses: list[dict[int, float]]) -> dict[int, float]:
    return {step: sum(one[step] for one in losses) / len(losses) for step in losses[0]}


def main() -> None:
    name, ranks, rounds, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
    run.silence_known_warnings()
    planned = CASES[name].blocks[ranks]
    blocks = Blocks(int(count) or planned.count, planned.settle, planned.measured)
    found = measure(name, ranks, rounds, blocks, folder)
    (folder / "found.json").write_text(json.dumps({"blocks": blocks.count, "steps": blocks.steps, **found}))


if __name__ == "__main__":
    main()
