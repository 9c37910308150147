"""What a sweep decides, from files and pure functions: links, next steps, limits, pruning, questions to Optuna."""

from __future__ import annotations

import errno
import math
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.core.errors import EnvironmentFault
from trainer.sweeps import decide
from trainer.sweeps.advance import Claim, acquire, revised
from trainer.sweeps.analysis import Row, Table, importance, slices
from trainer.sweeps.directory import Names, SweepDirectory, request_stop
from trainer.sweeps.directory import decide as link
from trainer.sweeps.evolution import share_of
from trainer.sweeps.past import Past
from trainer.sweeps.points import scaled
from trainer.sweeps.progress import TrialView
from trainer.sweeps.pruning import why_pruned
from trainer.sweeps.records import Owner, Parameter, Prune, Result, ResultState, Spec

RATE = Parameter(key="lr", kind="float", low=1e-4, high=1.0, log=True)
WIDTH = Parameter(key="width", kind="int", low=1.0, high=64.0)
KIND = Parameter(key="kind", kind="choice", choices=["a", "b"])
SPEC = Spec(
    revision=0,
    id="abcdefgh",
    name="s",
    command=[],
    fixed=["experiment=quickstart"],
    parameters=[RATE, WIDTH, KIND],
    method="tpe",
    trials=8,
    cwd="/",
    runs_dir="/runs",
)


def view(
    number: int, state: ResultState | None = None, *, owner: bool = False, alive: bool = False, **more: Any
) -> TrialView:
    result = Result(state=state, time=0.0, **more) if state else None
    someone = Owner(number=0, host="h", boot_id="b", pid=1, pid_started=1, time=0.0) if owner else None
    spent = {"gpu_hours": more.get("gpu_hours", 0.0), "cost": more.get("cost", 0.0)}
    return TrialView(number, Names(), result, someone, None, alive, **spent)


def _link_many(path: Path, count: int) -> int:
    return sum(link(path / f"{number}.trial", Prune(step=1, value=0.0, reason="", time=0.0)) for number in range(count))


def test_of_several_processes_one_links_each_decision(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        won = pool.starmap(_link_many, [(tmp_path, 60)] * 3)
    assert sum(won) == 60
    assert len(list(tmp_path.iterdir())) == 60, "nothing temporary is left"


def test_a_link_whose_reply_is_lost_counts_as_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.link

    def replayed(source: Any, target: Any) -> None:
        real(source, target)
        raise FileExistsError(target)  # what NFS tells a client that asked twice

    monkeypatch.setattr(os, "link", replayed)
    record = Prune(step=1, value=0.0, reason="", time=0.0)
    assert link(tmp_path / "a", record)
    assert not link(tmp_path / "a", record)


def test_a_full_disk_is_an_error_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = SweepDirectory.new(tmp_path / "sweeps", "s")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for write in (lambda: request_stop(sweep, "stop"), lambda: sweep.write_spec(SPEC)):
        with pytest.raises(EnvironmentFault, match="cannot be written: No space left"):
            write()
    assert not sweep.exists()
    assert [path for path in sweep.path.iterdir() if path.is_file()] == []


def test_interrupted_trials_come_first_then_new_ones_then_questions() -> None:
    found = [view(0, "finished"), view(1), view(2, owner=True), view(3, owner=True, alive=True)]
    assert decide.next_step(SPEC, found, is_stopped=False).claim == 2
    assert decide.claimable(found) == [2, 1]
    busy = [view(number, owner=True, alive=True) for number in range(4)]
    assert decide.next_step(SPEC, busy, is_stopped=False).ask == 4
    assert decide.next_step(SPEC, [view(number, "finished") for number in range(8)], is_stopped=False) == decide.Next()


def test_a_generation_waits_for_the_results_of_the_earlier_ones() -> None:
    spec = replace(SPEC, generation=2)
    found = [view(0, "finished"), view(1, owner=True, alive=True)]
    assert decide.next_step(spec, found, is_stopped=False).why_not
    assert decide.next_step(spec, [view(0, "finished"), view(1, "failed")], is_stopped=False).ask == 2


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (replace(SPEC, max_gpu_hours=2.0), "max_gpu_hours"),
        (replace(SPEC, max_cost=5.0), "max_cost"),
        (replace(SPEC, max_failure_rate=0.3), "1 of 2 ended trials failed"),
        (replace(SPEC, until=10.0), "until"),
    ],
)
def test_limits_start_no_further_trial(spec: Spec, why: str) -> None:
    found = [view(0, "finished", gpu_hours=1.5, cost=3.0), view(1, "failed", gpu_hours=1.0, cost=2.5), view(2)]
    assert why in decide.next_step(spec, found, is_stopped=False, now=11.0).why_not
    loose = replace(spec, max_gpu_hours=4.0, max_cost=8.5, max_failure_rate=0.5, until=12.0)
    assert decide.next_step(loose, found, is_stopped=False, now=11.0).claim == 2
    assert "stopped" in decide.next_step(loose, found, is_stopped=True).why_not


@pytest.mark.parametrize("key", ["gpu_hours", "cost"])
def test_a_limit_counts_what_runs_and_what_another_trial_would_take(key: str) -> None:
    def why_not(limit: float, found: list[TrialView], plan: float | None = None) -> str:
        limits: dict[str, Any] = {f"max_{key}": limit, f"planned_{key}": plan}
        spec = replace(SPEC, **limits)
        return decide.next_step(spec, found, is_stopped=False).why_not

    running = [view(0, owner=True, alive=True), view(1, owner=True, alive=True), view(2)]
    for one in running[:2]:
        setattr(one, key, 1.0)
    assert not why_not(2.1, running)
    assert why_not(2.0, running) == f"its trials have used 2 of sweep.max_{key}=2"
    assert not why_not(12.0, running, plan=4.0), "both end at 4, and a third one"
    reason = f"its trials have used 2, those that run may use 6 more, and another one 4: beyond sweep.max_{key}=11"
    assert why_not(11.0, running, plan=4.0) == reason
    ended = [*running, view(3, "finished", **{key: 2.0}), view(4, "failed", **{key: 0.1}), view(5, "pruned")]
    assert not why_not(8.1, ended, plan=100.0), "measured, not planned: 1 + 1 + 2 + 0.1, 1 + 1 more, 2"
    assert "another one 2: beyond" in why_not(8.0, ended, plan=100.0)


def test_asha_keeps_one_of_three_at_each_rung() -> None:
    spec = replace(SPEC, prune="asha", prune_after=1, prune_factor=3)
    curves = {number: [float(number)] * 3 for number in range(9)}
    assert [why_pruned(spec, number, curves, "min") is None for number in range(9)] == [True] * 3 + [False] * 6
    assert why_pruned(spec, 3, curves, "min") == (1, "place 4 of 9 at validation 1; the best 3 continue")
    late = {**{number: [float(number)] for number in range(9)}, 0: [0.0] * 3, 1: [1.0] * 3, 2: [2.0] * 3}
    assert why_pruned(spec, 2, late, "min") == (3, "place 3 of 3 at validation 3; the best 1 continue")
    assert why_pruned(spec, 8, curves, "max") is None
    assert why_pruned(spec, 5, {5: [1.0]}, "min") is None, "alone at a rung"
    assert why_pruned(spec, 5, {5: [], 6: [1.0]}, "min") is None, "before its first validation"


def test_hyperband_compares_within_a_bracket_and_median_with_all() -> None:
    spec = replace(SPEC, prune="hyperband")
    curves = {number: [float(number)] for number in range(9)}
    assert why_pruned(spec, 3, curves, "min") is not None
    assert why_pruned(spec, 4, curves, "min") is None, "the first rung of its bracket is later"
    spec = replace(SPEC, prune="median", prune_after=2)
    curves = {number: [float(number), float(number)] for number in range(6)}
    assert why_pruned(spec, 5, curves, "min") is not None
    assert why_pruned(spec, 1, curves, "min") is None
    assert why_pruned(spec, 5, {**curves, 5: [5.0]}, "min") is None


def test_a_value_is_where_its_share_says() -> None:
    for parameter in (RATE, WIDTH):
        for share in (0.01, 0.3, 0.99):
            assert share_of(parameter, scaled(parameter, share)) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("method", ["tpe", "cmaes"])
def test_a_question_depends_on_files_seed_and_number_only(method: str) -> None:
    adaptive = pytest.importorskip("trainer.sweeps.adaptive")
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    spec = replace(SPEC, method=method)

    def search(spec: Spec) -> list[Past]:
        past: list[Past] = []
        for number in range(30):
            values = adaptive.suggest(spec, past[::-1], ["minimize"], number).values
            loss = abs(math.log10(float(values["lr"])) + 2) + abs(int(values["width"]) - 20) / 20
            past.append(Past(number, values, None if number == 3 else [loss]))
        return past

    first = search(spec)
    assert first == search(spec)
    assert first != search(replace(spec, seed=1))
    early = [one.objective[0] for one in first[:10] if one.objective]
    late = [one.objective[0] for one in first[20:] if one.objective]
    assert sum(late) / len(late) < sum(early) / len(early), "it learns"


def test_an_edited_grid_gets_only_the_points_that_are_new() -> None:
    lr = Parameter(key="lr", kind="choice", choices=["1", "2"])
    spec = replace(SPEC, method="grid", parameters=[lr, KIND])
    before = decide.planned(spec, 0, 4)
    wider = replace(spec, parameters=[replace(lr, choices=["3", "1", "2"]), KIND])
    new = decide.added(wider, before, decide.planned(wider, 0, 6))
    assert [(one.number, one.values["lr"]) for one in new] == [(4, "3"), (5, "3")]


@pytest.mark.parametrize("method", ["grid", "random"])
def test_an_extension_that_was_killed_is_completed(tmp_path: Path, method: Any) -> None:
    lr = Parameter(key="lr", kind="choice", choices=["1", "2"])
    spec = replace(SPEC, method=method, parameters=[lr, KIND], trials=4)
    sweep = SweepDirectory.new(tmp_path / "sweeps", "s")
    sweep.add_trials(decide.planned(spec, 0, 4))
    sweep.write_spec(spec)
    wider = replace(lr, choices=["3", "1", "2"]) if method == "grid" else lr
    sweep.write_spec(revised(spec, parameters=[wider, KIND], trials=6))
    claims = [acquire(sweep) for _ in range(6)]
    assert [claim.trial.number for claim in claims if isinstance(claim, Claim)] == list(range(6))
    points = [tuple(sweep.trial(number).values.items()) for number in range(6)]
    assert len(set(points)) == 6 or method == "random"
    assert acquire(sweep) == ""


def rows(*trials: tuple[str, str, float]) -> Table:
    made = [
        Row(number, "finished", {"lr": lr, "kind": kind}, (value,), 1, None, "", 0.0, 0.0)
        for number, (lr, kind, value) in enumerate(trials)
    ]
    return Table(made, ["val/loss"], ["minimize"], ["lr", "kind"], [RATE, KIND])


def test_the_parameter_that_matters_is_the_important_one() -> None:
    table = rows(*[(str(10**-number), kind, number + 0.01 * (kind == "a")) for number in range(1, 5) for kind in "ab"])
    found = importance(table)
    assert list(found) == ["lr", "kind"]
    assert found["lr"] > 0.95
    assert found["kind"] < 0.05
    assert slices(table)[0].points[0] == ("0.1", 1.01, 0)
    assert importance(rows(("1", "a", 1.0))) == {}


def test_of_equal_trials_the_first_is_the_best_and_several_metrics_have_a_front() -> None:
    assert [row.number for row in rows(("1", "a", 2.0), ("1", "a", 1.0), ("1", "b", 1.0)).ranked()] == [1, 2, 0]
    both = rows(("1", "a", 0.0), ("1", "a", 0.0), ("1", "a", 0.0))
    for number, values in enumerate([(1.0, 1.0), (2.0, 3.0), (2.0, 2.0)]):
        object.__setattr__(both.rows[number], "values", values)
    front = replace(both, directions=["minimize", "maximize"], metrics=["a", "b"])
    assert [row.number for row in front.ranked()] == [0, 1]


def test_reading_a_thousand_trials_takes_less_than_a_second(tmp_path: Path) -> None:
    from trainer.sweeps.analysis import table_of
    from trainer.sweeps.progress import settle, views

    sweep = SweepDirectory.new(tmp_path / "sweeps", "many")
    spec = replace(SPEC, method="random", trials=1000)
    sweep.write_spec(spec)
    began = time.process_time()
    sweep.add_trials(decide.planned(spec, 0, 1000))
    for number in range(1000):
        (sweep.trials_dir / f"{number:05d}.result").write_text(
            f'{{"state": "finished", "values": [{number}], "metric": "val/loss", "mode": "min", "time": 0}}'
        )
        (sweep.trials_dir / f"{number:05d}.owner-0").write_text("{}")
    made = time.process_time()
    found = settle(sweep, spec, views(sweep, None))
    assert table_of(sweep, spec, found).ranked()[0].number == 0
    took = time.process_time() - made
    print(f"1,000 trials: written in {made - began:.2f} s, read in {took:.2f} s of CPU")
    assert took < 3, "0.3 s on an idle machine"
