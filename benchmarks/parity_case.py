"""One case of `benchmarks/parity`: a model on a number of ranks. Started by it, writes a file in a folder.

That is `found.json`, or `memory.json` if the number of rounds is 0.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import parity_peers
from parity_data import CASES
from parity_turns import Blocks, Ranks
from parity_variants import VARIANTS, Ended, train, train_alone

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


STEPS_ALONE = 25


def measure_memory(name: str, ranks: int, folder: Path) -> dict[str, float]:
    """{variant: MB at the peak of a rank}, each in new processes without a twin."""
    peaks = {}
    for variant in VARIANTS:
        running = Ranks(partial(train_alone, variant, name), ranks, STEPS_ALONE, folder / "memory" / variant)
        try:
            peaks[variant] = running.reached()[0]
            running.results()
        finally:
            running.kill()
    return peaks


def mean_over_ranks(losses: list[dict[int, float]]) -> dict[int, float]:
    return {step: sum(one[step] for one in losses) / len(losses) for step in losses[0]}


def main() -> None:
    name, ranks, rounds, count, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5])
    run.silence_known_warnings()
    planned = CASES[name].blocks[ranks]
    blocks = Blocks(int(count) or planned.count, planned.settle, planned.measured)
    parity_peers.load()
    if not rounds:
        (folder / "memory.json").write_text(json.dumps(measure_memory(name, ranks, folder)))
        return
    found = measure(name, ranks, rounds, blocks, folder)
    (folder / "found.json").write_text(json.dumps({"blocks": blocks.count, "steps": blocks.steps, **found}))


if __name__ == "__main__":
    main()
