"""Every strategy on real gloo ranks beside one process: the same losses, and checkpoints that move between all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import golden, matrix
from tests.distributed.ranks import run_scenarios

IN_FULL = bool(os.environ.get("TRAINER_ALL_PAIRS"))
"""All 49 pairs of strategies, all precisions on four ranks, and curves of 50 steps."""
CURVE = 50 if IN_FULL else 10
"""Steps of the loss curves."""
END = CURVE + 4
"""Where the resumed runs end."""
SHARDED = ("fsdp", "hsdp", "tp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
STRATEGIES = ("ddp", *SHARDED)
OPTIONS: dict[tuple[int, str], dict[str, Any]] = {
    (2, "hsdp"): {"shard_size": 1},
    (4, "hsdp"): {"shard_size": 2},
    (4, "tp"): {"tensor_parallel_size": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip_accumulate": {"clip": 0.05, "accumulate": 2},
    "batch_norm": {"net": {"batch_norm": True}, "steps": 6},
    "bf16-mixed": {"precision": "bf16-mixed", "steps": 6},
    "bf16-true": {"precision": "bf16-true", "steps": 6},
}
EXACT = ("plain", "clip_accumulate")
"""Variants in fp32 whose losses equal those of one process to 1e-5."""
WITHIN = {"32-true": 1e-5, "bf16-mixed": 5e-3, "bf16-true": 5e-3}
"""bfloat16 has 8 bits: a product that is rounded elsewhere moves a loss by about a thousandth."""
OF_ONE = ("fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
CPU = {"offload_optimizer": "cpu"}
OFFLOAD = (
    ("deepspeed_zero1", 1, CPU),
    ("deepspeed_zero2", 1, CPU),
    ("deepspeed_zero3", 1, CPU),
    ("deepspeed_zero3", 2, {**CPU, "offload_parameters": "cpu"}),
    ("fsdp", 1, {"cpu_offload": True}),
)
OFFLOADED = 6
"""Steps of the runs with offload: DeepSpeed's other code path, on CPU ranks as on GPUs."""
SMALL = {"states": "bfloat16", "precision": "bf16-true"}
"""AdamW with bf16 states, stochastic rounding, and under DeepSpeed fp32 master weights."""
OF_SMALL = ("ddp", "fsdp", "deepspeed_zero2", "deepspeed_zero3")
ON_FOUR = {
    "plain": STRATEGIES,
    "bf16-mixed": STRATEGIES if IN_FULL else ("hsdp", "tp", "deepspeed_zero2"),
    "bf16-true": STRATEGIES if IN_FULL else ("ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero3"),
}
"""Variant to the strategies of four ranks: each in fp32 and in one other precision, as all are on two ranks."""
TO_FOUR = (
    ("ddp", "fsdp"),
    ("fsdp", "deepspeed_zero3"),
    ("deepspeed_zero3", "tp"),
    ("deepspeed_zero3", "deepspeed_zero3"),
    ("deepspeed_zero2", "hsdp"),
    ("tp", "ddp"),
)
"""Strategy of two ranks that wrote a checkpoint, and that of four that goes on from it."""
Results = dict[str, dict[str, Any]]


def pairs() -> list[tuple[str, str]]:
    """Each strategy once as source and as target, beside those of other numbers of ranks; in full each with each."""
    count = len(STRATEGIES)
    shifts = range(count) if IN_FULL else (1,)
    return [(STRATEGIES[index], STRATEGIES[(index + shift) % count]) for shift in shifts for index in range(count)]


def scenario(ranks: int, strategy: str, variant: str = "plain", **more: Any) -> dict[str, Any]:
    options = OPTIONS.get((ranks, strategy), {})
    name = f"{strategy}-{ranks}-{variant}"
    return {"name": name, "strategy": strategy, "options": options, "steps": CURVE, **VARIANTS[variant], **more}


def resumed(ranks: int, strategy: str, source: Path, label: str) -> dict[str, Any]:
    found = scenario(ranks, strategy, load=str(source / f"step-{CURVE:08d}"), from_step=CURVE)
    return {**found, "name": f"{label}-to-{strategy}-{ranks}", "steps": END}


def close(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(expected)
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Results:
    singles = [scenario(1, "single", variant) for variant in VARIANTS if variant != "batch_norm"]
    whole = {**scenario(1, "single"), "name": "whole", "steps": END}
    sharded = [
        scenario(1, strategy, variant) for strategy in OF_ONE for variant in ("plain", "bf16-mixed", "bf16-true")
    ]
    return run_scenarios(1, [*singles, whole, *sharded], folder, "one")


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Results:
    curves = [scenario(2, strategy, variant) for variant in VARIANTS for strategy in STRATEGIES]
    offloaded = [
        {**scenario(2, strategy), "name": f"{strategy}-2-offload-{number}", "options": options, "steps": OFFLOADED}
        for strategy, number, options in OFFLOAD
    ]
    kept = {**scenario(2, "fsdp", "clip_accumulate"), "name": "fsdp-2-sync-step", "options": {"gradient_sync": "step"}}
    small = [
        {**scenario(2, strategy, **SMALL), "name": f"{strategy}-2-small-{steps}", "steps": steps}
        for strategy in OF_SMALL
        for steps in (6, 9)
    ]
    return run_scenarios(2, [*curves, *offloaded, kept, *small], folder, "two")


@pytest.fixture(scope="module")
def four_ranks(folder: Path, two_ranks: Results) -> Results:
    """Also what goes on from checkpoints of two ranks (`TO_FOUR`): four ranks are started only once."""
    curves = [scenario(4, one, variant) for variant, strategies in ON_FOUR.items() for one in strategies]
    to_four = [resumed(4, target, folder / f"{source}-2-plain", f"{source}-2") for source, target in TO_FOUR]
    return run_scenarios(4, [*curves, *to_four], folder, "four")


@pytest.mark.parametrize("variant", EXACT)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_give_the_losses_of_one(one_rank: Results, two_ranks: Results, strategy: str, variant: str) -> None:
    found = two_ranks[f"{strategy}-2-{variant}"]
    assert found["failure"] is None
    assert close(found["losses"], one_rank[f"single-1-{variant}"]["losses"]) < 1e-5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_four_ranks_give_the_losses_of_one(one_rank: Results, four_ranks: Results, strategy: str) -> None:
    assert close(four_ranks[f"{strategy}-4-plain"]["losses"], one_rank["single-1-plain"]["losses"]) < 1e-5


def test_the_matrix(one_rank: Results, two_ranks: Results, four_ranks: Results, tables: dict[str, list[str]]) -> None:
    """Every strategy on one and two ranks in every precision, on four in some, beside one process in that precision."""
    rows: list[matrix.Row] = []
    for ranks, results in ((1, one_rank), (2, two_ranks), (4, four_ranks)):
        for precision, variant in (("32-true", "plain"), ("bf16-mixed", "bf16-mixed"), ("bf16-true", "bf16-true")):
            for strategy in {1: OF_ONE, 2: STRATEGIES, 4: ON_FOUR[variant]}[ranks]:
                expected = one_rank[f"single-1-{variant}"]["losses"]
                found = results[f"{strategy}-{ranks}-{variant}"]
                assert found["failure"] is None
                rows.append((strategy, ranks, precision, close(found["losses"], expected)))
    tables[matrix.TITLE] = matrix.lines(rows)
    assert len(rows) == 3 * (len(OF_ONE) + len(STRATEGIES)) + sum(map(len, ON_FOUR.values()))
    assert [row for row in rows if not row[3] < WITHIN[row[2]]] == []


def test_golden_losses(one_rank: Results, two_ranks: Results, tables: dict[str, list[str]]) -> None:
    """Bit for bit those that were recorded on this machine type; on another, to 1e-5 those of another."""
    results = {**one_rank, **two_ranks}
    wanted = ["single-1-plain", *(f"{strategy}-2-{variant}" for strategy in STRATEGIES for variant in EXACT)]
    curves = {name: results[name]["losses"] for name in wanted}
    if os.environ.get(golden.RECORD):
        assert IN_FULL, golden.HOW
        golden.record(curves)
    recorded, is_this_machine = golden.recorded()
    expected = {name: curve[:CURVE] for name, curve in recorded.items()}
    assert set(expected) == set(curves)
    if not is_this_machine:
        tables["golden losses"] = [f"none of {golden.machine()}; compared to 1e-5 with another's", golden.HOW]
        assert {name for name in wanted if not close(curves[name], expected[name]) < 1e-5} == set()
        return
    changed = [name for name in wanted if curves[name] != expected[name]]
    assert changed == [], f"other losses than recorded on this machine type; if that is meant: {golden.HOW}"


def test_sharded_parameters_were_never_whole(two_ranks: Results) -> None:
    """They were built on the meta device; that these train as ddp does, bit for bit, is the test before this."""
    on_meta = {strategy: two_ranks[f"{strategy}-2-plain"]["on_meta"] for strategy in STRATEGIES}
    assert on_meta["fsdp"] == on_meta["hsdp"] == on_meta["deepspeed_zero3"] > 20
    assert (on_meta["ddp"], on_meta["deepspeed_zero2"]) == (0, 0)


def test_gradients_are_reduced_each_micro_batch_or_once_a_step(two_ranks: Results) -> None:
    """The same losses to rounding; by default no rank keeps more than its shard between micro-batches."""
    found, kept = two_ranks["fsdp-2-clip_accumulate"], two_ranks["fsdp-2-sync-step"]
    assert close(kept["losses"], found["losses"]) < 1e-5
    shard, whole = found["gradient_bytes"], kept["gradient_bytes"]
    assert shard < 0.7 * whole  # two ranks: a half, and padding
    assert found["reductions"] == 2 * kept["reductions"]


def test_offloading_changes_no_bit(two_ranks: Results) -> None:
    expected = two_ranks["ddp-2-plain"]["losses"][:OFFLOADED]
    runs = [two_ranks[f"{strategy}-2-offload-{number}"] for strategy, number, _ in OFFLOAD]
    assert [run["losses"] == expected for run in runs] == [True] * len(OFFLOAD)
    assert len({(run["weights"], run["state"]) for run in runs}) == 1


@pytest.mark.parametrize("strategy", OF_ONE)
def test_one_rank_of_a_sharded_strategy_is_one_process(one_rank: Results, strategy: str) -> None:
    assert close(one_rank[f"{strategy}-1-plain"]["losses"], one_rank["single-1-plain"]["losses"]) < 1e-6


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3"])
def test_sharding_over_two_ranks_changes_no_bit(two_ranks: Results, strategy: str) -> None:
    """Two summands have one order; with tensor parallel the sums inside a layer have another."""
    for key in ("losses", "weights", "state", "rates"):
        assert two_ranks[f"{strategy}-2-plain"][key] == two_ranks["ddp-2-plain"][key], key


@pytest.mark.parametrize("strategy", SHARDED)
def test_batch_norm_keeps_the_statistics_of_rank_0(two_ranks: Results, strategy: str) -> None:
    if strategy == "tp":
        pytest.skip("its two ranks read the same samples: another batch to normalise over")
    assert close(two_ranks[f"{strategy}-2-batch_norm"]["losses"], two_ranks["ddp-2-batch_norm"]["losses"]) < 1e-5


@pytest.fixture(scope="module")
def moved(folder: Path, one_rank: Results, two_ranks: Results, four_ranks: Results) -> Results:
    """Checkpoints of 2 ranks on 2 (`pairs`), and some from and to 1 and 4."""
    to_two = [resumed(2, target, folder / f"{source}-2-plain", f"{source}-2") for source, target in pairs()]
    to_two += [
        resumed(2, target, folder / f"{source}-plain", source)
        for source, target in (
            ("single-1", "fsdp"),
            ("single-1", "deepspeed_zero3"),
            ("fsdp-1", "deepspeed_zero2"),
            ("fsdp-4", "ddp"),
            ("tp-4", "deepspeed_zero3"),
            ("hsdp-4", "tp"),
            ("deepspeed_zero3-4", "fsdp"),
            ("deepspeed_zero1-4", "deepspeed_zero1"),
        )
    ]
    for strategy in OF_SMALL:
        source = {"load": str(folder / f"{strategy}-2-small-6" / "step-00000006"), "from_step": 6}
        to_two.append({**scenario(2, strategy, **SMALL, **source), "name": f"{strategy}-small", "steps": 9})
    to_one = [
        resumed(1, target, folder / f"{source}-plain", source)
        for source, target in (
            ("ddp-2", "single"),
            ("fsdp-4", "single"),
            ("tp-4", "single"),
            ("deepspeed_zero3-4", "single"),
            ("deepspeed_zero2-2", "fsdp"),
            ("fsdp-2", "deepspeed_zero3"),
        )
    ]
    return {
        **run_scenarios(2, to_two, folder, "to-two"),
        **{name: four_ranks[name] for name in (f"{source}-2-to-{target}-4" for source, target in TO_FOUR)},
        **run_scenarios(1, to_one, folder, "to-one"),
    }


def test_any_checkpoint_continues_in_any_strategy(moved: Results, one_rank: Results) -> None:
    """Also the optimizer's state and the schedule: a missing moment or a wrong rate moves the loss by far more."""
    expected = one_rank["whole"]["losses"][CURVE:]
    rates = one_rank["whole"]["rates"]
    moved = {name: found for name, found in moved.items() if not name.endswith("-small")}
    table = {name: close(found["losses"], expected) for name, found in moved.items()}
    print(json.dumps(table, indent=1))
    assert len(table) == len(pairs()) + 8 + len(TO_FOUR) + 6
    assert {name: error for name, error in table.items() if not error < 1e-5} == {}
    for name, found in moved.items():
        assert found["failure"] is None, name
        assert found["global_step"] == END, name
        assert found["rates"] == rates, name


def test_a_resumed_run_ends_in_the_same_bits(moved: Results, two_ranks: Results) -> None:
    """Within the strategies that agree in every bit, moving between them changes none either."""
    exact = ("ddp", "fsdp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
    ends = {
        (found["weights"], found["state"])
        for source, target in pairs()
        if source in exact and target in exact
        for found in [moved[f"{source}-2-to-{target}-2"]]
    }
    assert len(ends) == 1


@pytest.mark.parametrize("strategy", OF_SMALL)
def test_small_states_resume_in_the_same_bits(moved: Results, two_ranks: Results, strategy: str) -> None:
    whole, halves = two_ranks[f"{strategy}-2-small-9"], moved[f"{strategy}-small"]
    assert halves["losses"] == whole["losses"][6:]
    assert (halves["weights"], halves["state"]) == (whole["weights"], whole["state"])
