"""One case of `benchmarks/parity`: a model on a number of ranks. Started by it, writes `found.json` in a folder."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from parity_data import CASES
from parity_turns import Blocks, Ranks
from parity_variants import VARIANTS, Ended, train

from trainer.train import run


def measure(name: str, ranks: int, rounds: int, blocks: Blocks, folder: Path) -> dict[str, Any]:
    """Each variant in turn in new processes. `costs`: {variant: [[cost of a block and its twin's, ...] a round]}, the
    first pair of a round being the warm-up's."""
    costs: dict[str, list[Any]] = {}
    weights: set[str] = set()
    losses: list[dict[int, float]] = []
    for number in range(rounds):
        for variant in VARIANTS:
            running = Ranks(partial(train, variant, name), ranks, blocks, folder / str(number) / variant)
            try:
                costs.setdefault(variant, []).append([running.reached() for _ in range(1 + blocks.count)])
                ended: list[Ended] = running.results()
            finally:
                running.kill()
            weights = weights.union(*(one.weights for one in ended))
            losses += [mean_over_ranks([one.twin_losses for one in ended])]
            if variant == "bare":
                losses += [mean_over_ranks([one.losses for one in ended])]
            elif variant == "ours":
                losses += [ended[0].losses]
    assert len(weights) == 1, "the variants ended with different weights"
    assert losses[0], "no loss was read"
    assert all(one == losses[0] for one in losses), f"losses differ: {losses}"
    return {"costs": costs, "weights": weights.pop(), "losses": losses[0]}


def mean_over_ranks(losses: list[dict[int, float]]) -> dict[int, float]:
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
