"""Run directories with any content in any file: one message at most, and the other runs are listed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from tests.dashboard.fake_runs import make_sweep
from tests.runs.test_directory import make
from tests.security.bad_files import KINDS
from tests.security.bounds import ends_within
from trainer.cli import main
from trainer.core import records
from trainer.core.errors import DONE
from trainer.core.text import log_text, one_line, printable
from trainer.dashboard.catalogue import Catalogue, key_of
from trainer.dashboard.details import details_of
from trainer.dashboard.sweep_tables import sweeps_of
from trainer.launch import bar
from trainer.launch.follow import Follower
from trainer.plan import past
from trainer.runs import comparison, seal
from trainer.runs.comparison import compare
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved, Created, Started, Straggler
from trainer.runs.records import AttemptOutcome, HeartbeatRecord, Launch
from trainer.runs.registry import all_runs
from trainer.sweeps.directory import SweepDirectory

FILES = (
    "plan.json",
    "summary.json",
    "wandb.json",
    "live/node-0.json",
    "live/attempt-00-rank-0.json",
    "usage/attempt-00-node-0.json",
    "checkpoints/remote.json",
    "evaluations/step-00000003.json",
    f".changing-{socket.gethostname()}-1",
    "config.yaml",
    "overrides.txt",
    "launch.json",
    "events.jsonl",
    "metrics.jsonl",
    "manifest.json",
    "attempts/attempt-00.json",
    "live/rank-0.json",
    "logs/attempt-00/rank-0.log",
    "logs/attempt-00/rank-0.failure.json",
    "logs/attempt-00/node-0.log",
)


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run that failed, with a record of each kind."""
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")  # what nobody foresaw is raised here
    run = make(tmp_path)
    run.attempt_logs(0).mkdir()
    run.rank_log(0, 0).write_text("one line\n")
    run.write_launch(Launch(cluster="local", pid=2**30, host=socket.gethostname(), boot_id="another"))
    run.add_event(Started(attempt=0, step=0, world_size=1))
    run.write_heartbeat(
        0, HeartbeatRecord(phase="train", step=3, time=time.time() - 999, began=1.0, spent={"train": 1})
    )
    run.write_outcome(AttemptOutcome(attempt=0, outcome="failed", reason="a reason", log="logs/attempt-00/rank-0.log"))
    run.metrics_path.write_text('{"step": 3, "epoch": 0, "time": 1.0, "loss": 0.5}\n')
    run.usage_dir.mkdir()
    run.evaluations_dir.mkdir()
    return run


def copy(run: RunDirectory, number: int) -> RunDirectory:
    path = run.path.parent / f"bad-{number:08d}"
    shutil.copytree(run.path, path)
    return RunDirectory(path)


def bad_runs(run: RunDirectory, file: str) -> dict[str, RunDirectory]:
    made = {}
    for number, (kind, put) in enumerate(KINDS.items()):
        made[kind] = copy(run, number)
        path = made[kind].path / file
        path.unlink(missing_ok=True)
        put(path)
    return made


@pytest.mark.parametrize("file", FILES)
def test_any_content_of_a_file_is_one_message_at_most_and_hides_no_other_run(
    good: RunDirectory,
    file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """blocked by: regular files only, limits of size and nesting, records that are validated"""
    bad = bad_runs(good, file)
    record_property("attacks", len(bad))
    for arguments in (["ls"], ["ls", "--json"], ["best", "loss"]):
        with ends_within(60, " ".join(arguments)):
            assert main(arguments) == DONE
        said = capsys.readouterr()
        if arguments[0] == "best":
            continue
        assert good.id in said.out
        for kind, run in bad.items():
            is_run = file != "config.yaml" or run.exists()
            assert not is_run or run.id in said.out or f"skipped {run.path.name}: " in said.err, kind
    output = str(good.path.parent.parent / "report.html")
    for kind, run in bad.items():
        for verb, *options in (["show"], ["why"], ["logs"], ["report", "-o", output], ["compare", str(good.path)]):
            if kind == "64 GB without content" and (verb == "logs" or file == "metrics.jsonl"):
                continue  # a log is printed, and metrics are compared, however long they are
            if options and file.startswith("logs/"):
                continue  # they do not read them
            monkeypatch.setattr(records, "_skipped", set())  # each verb is a process of its own
            with ends_within(20, f"{verb} with {file} as {kind}"):
                code = main([verb, str(run.path), *options])
            said = capsys.readouterr()
            assert code in (0, 2, 3), (verb, kind)
            assert code == 0 or said.err.startswith("trainer: "), (verb, kind, said.err)
            assert len(said.err.splitlines()) < 12, (verb, kind)
            assert "Traceback" not in said.err
            if verb != "logs":
                assert printable(said.out) == said.out


def test_names_of_folders_that_are_almost_ours_are_ignored(
    good: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    """blocked by: names are matched as a whole"""
    for name in ("checkpoints/step-00000020-copy", "checkpoints/step-²", "checkpoints/step-00000004", "logs/attempt-²"):
        (good.path / name).mkdir()
    for name in (
        "attempts/attempt-².json",
        "live/rank-².json",
        f"live/rank-{'9' * 200}.json",
        "attempts/attempt-x.json",
    ):
        (good.path / name).write_text("{}")
    (good.path / "live" / "attempt-x-rank-0.json").mkdir()
    (good.path.parent / "a file").write_text("")
    (good.path.parent / "bad-\udcff\udcfe").mkdir()  # a name that is not UTF-8
    shutil.copy(good.config_path, good.path.parent / "bad-\udcff\udcfe" / "config.yaml")
    for arguments in (["ls"], ["ls", "--json"], ["show", good.id], ["why", good.id], ["logs", good.id]):
        assert main(arguments) == DONE, arguments
    said = capsys.readouterr()
    assert r"\udcff\udcfe" in said.out


PLANS: list[dict[str, object]] = [
    {"engine": "x\x1b[2J", "device": "\x1b]0;x", "currency": "\x1b[2J", "peak_bytes": 10**18, "cost": -1e308},
    {"engine": "formula", "step_s": 1e-308, "train_s": 1e308, "energy_kwh": 1e308, "tokens_per_s": 1e-308},
    {"engine": "formula", "step_s": math.nan, "train_s": math.inf, "peak_bytes": -5, "device_hours": -math.inf},
]
BATCHES: list[object] = [
    {"batch_size": "8"},
    [1],
    "x",
    {"batch_size": True},
    {"batch_size": 10**400},
    {"batch_size": 8},
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_that_lies_is_shown_beside_any_configuration_and_metrics(
    good: RunDirectory,
    plan: dict[str, object],
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    """blocked by: numbers that no plan has are left out, and every text is escaped"""
    good.plan_path.write_text(json.dumps(plan))
    values = {"gpu/peak_allocated_gb": 1e308, "train/samples_per_s": 1e-308, "train/tokens_per_s": 1e308}
    lines = [{"step": step, "time": 1.0, "train/loss": 1.0, **values} for step in range(9)]
    good.metrics_path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config = good.config()
    for data in BATCHES:
        good.config_path.write_text(json.dumps({**config, "data": data}))
        for verb in ("show", "why", "report"):
            assert main([verb, str(good.path)]) == DONE, (verb, data)
            said = capsys.readouterr()
            assert CONTROL.findall(said.out + said.err) == []
        assert "\x1b" not in (good.path / "report.html").read_text()
        details_of(good)
    record_property("attacks", len(BATCHES))


@pytest.mark.parametrize(
    "values",
    ['"written_s": 1e999', '"written_s": NaN', '"written_s": -1e308', '"written_s": 1e308, "blocked_s": 1e308'],
)
def test_the_saves_of_another_run_do_not_end_a_plan(good: RunDirectory, values: str) -> None:
    """blocked by: measurements that no machine makes are left out"""
    lines = [f'{{"time": 1, "event": "checkpoint", "step": 1, "bytes": {size}, {values}}}' for size in (-1, 0, 10**9)]
    good.events_path.write_text("\n".join([*lines, ""]))
    assert past.saves(good.path.parent) == []
    good.add_event(CheckpointSaved(step=2, bytes=10**9, written_s=2.0, blocked_s=0.5))
    assert past.slowest_save(past.saves(good.path.parent), 2 * 10**9) == (5.0, good.path.name)


LIES: list[object] = [
    *(None, -1, 1e308, 10**400, "x\x1b[2J", [1], [[1]], True, {"a": [1]}, {"a": None}, {"loss": 10**400}),
    *({"value": 1}, {"value": 1, "metric": [1], "step": "x"}, {"goodput": "x", "wall_s": "y", "seconds": [1]}),
    [{"step": 1, "path": "a"}],
    [{"step": 10**400, "path": "\x1b[2J", "bytes": "x", "committed": "y"}],
]


def test_a_sealed_summary_that_lies_hides_no_other_run(
    good: RunDirectory, capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """blocked by: the facts of a sealed summary are validated down to the parts that are shown"""
    bad = [copy(good, number) for number in range(len(LIES))]
    for path in (good.path.parent, *good.path.parent.rglob("*")):
        os.utime(path, (time.time() - 500,) * 2)
    assert main(["ls"]) == DONE
    sealed = [seal.parse(run.summary_path.read_bytes()) for run in bad]
    assert sealed[0] is not None
    for name in sealed[0].facts:
        for run, one, lie in zip(bad, sealed, LIES, strict=True):
            assert one is not None
            run.summary_path.write_bytes(seal.content_of(replace(one, facts={**one.facts, name: lie})))
        capsys.readouterr()
        for arguments in (["ls"], ["ls", "--json"], ["ls", "--csv"], ["ls", "--cost"], ["best", "loss"]):
            assert main(arguments) == DONE, name
            said = capsys.readouterr()
            assert arguments[0] == "best" or good.id in said.out, (arguments, name)
            assert CONTROL.findall(said.out + said.err) == [], (arguments, name)
        catalogue = Catalogue([good.path.parent])
        catalogue.refresh()
        assert len(catalogue.changes(0)["rows"]) == 1 + len(bad)
    record_property("attacks", len(sealed[0].facts) * len(bad))


def test_code_that_takes_long_to_compare_ends(good: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: a limit on the CPU time of all diffs"""
    other = copy(good, 1)
    for run, step in ((good, 1), (other, 2)):
        for name in range(5):
            lines = [str(line % 100) if line % step == 0 else f"{name} {line}" for line in range(1000)]
            (run.code_dir / f"{name}.py").write_text("\n".join(lines))
    assert all("@@" in one for one in compare([good, other]).diffs.values())
    monkeypatch.setattr(comparison, "_DIFFS_S", 0.0)
    assert set(compare([good, other]).diffs.values()) == {"no diff: those before it have taken too long"}


def test_a_link_among_the_runs_does_not_hide_them(good: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    """blocked by: an entry that cannot be examined is no folder"""
    runs, sweeps = good.path.parent, good.path.parent.parent / "sweeps"
    sweep = make_sweep(runs, [good.path] * 8)
    for folder in (runs, sweeps):
        (folder / "loop").symlink_to("loop")
        (folder / "there").symlink_to("back")
        (folder / "back").symlink_to("there")
    for arguments in (["ls"], ["show"], ["why", good.id], ["sweep", "ls"], ["sweep", "status", sweep.id]):
        assert main(arguments) == DONE, arguments
        said = capsys.readouterr()
        assert (sweep.id if arguments[0] == "sweep" else good.id) in said.out, said
    assert [run.id for run in all_runs(runs)] == [good.id]
    catalogue = Catalogue([runs])
    catalogue.refresh()
    assert [row["id"] for row in catalogue.changes(0)["rows"]] == [good.id]
    assert list(sweeps_of([runs])) == [key_of(sweep.path)]


SWEEP_FILES = (
    *("spec.json", "spec-1.json", "trials/00009.trial", "trials/00001.owner-0", "trials/00001.run-0"),
    *("trials/00001.result", "trials/00001.retry-1", "trials/00001.prune", "arrays/000.array", "trials"),
)


@pytest.mark.parametrize("file", SWEEP_FILES)
def test_any_content_of_a_file_of_a_sweep_hides_no_other_sweep(
    good: RunDirectory,
    file: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """blocked by: records are validated, and a sweep that cannot be read is skipped with its name"""
    runs = good.path.parent
    sweep = make_sweep(runs, [good.path] * 8)
    output = str(runs.parent / "report.html")
    for number, (kind, put) in enumerate(KINDS.items()):
        bad = SweepDirectory(sweep.path.parent / f"bad-{number:08d}")
        shutil.copytree(sweep.path, bad.path)
        path = bad.path / file
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        put(path)
        for arguments in (["sweep", "ls"], ["report", "--sweep", str(bad.path), "-o", output]):
            monkeypatch.setattr(records, "_skipped", set())
            with ends_within(20, f"{arguments} with {file} as {kind}"):
                code = main(arguments)
            said = capsys.readouterr()
            assert code == DONE or (arguments[0] == "report" and code in (2, 3)), (arguments, kind)
            assert code == DONE or said.err.startswith("trainer: "), (kind, said.err)
            assert "Traceback" not in said.err
            if arguments[0] == "sweep":
                assert sweep.id in said.out
                is_sweep = file != "spec.json" or bad.exists()
                assert not is_sweep or bad.id in said.out or f"skipped {bad.path.name}: " in said.err, kind
        with ends_within(20, f"the dashboard with {file} as {kind}"):
            assert key_of(sweep.path) in sweeps_of([runs])
        shutil.rmtree(bad.path)
    record_property("attacks", len(KINDS))


def test_a_run_of_another_user_does_not_hide_the_others(
    good: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a second user where this runs as root, to whom nothing is forbidden.

    blocked by: what cannot be read is skipped with a line
    """
    runs = Path(tempfile.mkdtemp())
    try:
        runs.chmod(0o755)
        readable, closed, closed_files = (runs / name for name in ("ours-aaaaaaaa", "closed-bbbbbbbb", "half-cccccccc"))
        for path in (readable, closed, closed_files):
            shutil.copytree(good.path, path)
        for path in (readable, closed_files):
            for one in (path, *path.rglob("*")):
                one.chmod(0o755)
        for name in ("events.jsonl", "metrics.jsonl", "attempts", "live", "checkpoints", "logs", "control"):
            (closed_files / name).chmod(0)
        closed.chmod(0)
        (runs / "into-closed").symlink_to(closed / "code")  # whose kind the other user cannot see
        monkeypatch.setenv("TRAINER_RUNS_DIR", str(runs))
        monkeypatch.chdir("/")
        if os.getuid() == 0:
            os.seteuid(65534)
        try:
            codes = [main(arguments) for arguments in (["ls"], ["ls", "--json"])]
            codes += [main([verb, "ours-aaaaaaaa"]) for verb in ("show", "why", "logs")]
            refused = [main([verb, "half-cccccccc"]) for verb in ("show", "why", "logs")]
        finally:
            os.seteuid(os.getuid())
        said = capsys.readouterr()
        assert codes == [DONE] * 5
        assert all(code in (0, 2, 3) for code in refused)
        assert "aaaaaaaa" in said.out
        assert "bbbbbbbb" not in said.out
    finally:
        (runs / "into-closed").unlink()
        for one in (runs, *runs.iterdir(), *(runs / "half-cccccccc").iterdir()):
            one.chmod(0o700)
        shutil.rmtree(runs)


EVIL = (
    "x\x1b]0;title\x07\x1b[2J\x9b31m\u202etxt.exe\u2066\x08\x7f\u2028\ufeff\x1b[31mred\x1b[0m\r\nnext  trainer rm --all"
)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def test_no_control_character_of_a_record_reaches_the_terminal(
    good: RunDirectory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """blocked by: every text of a run is escaped where it is printed"""
    evil = EVIL.replace("\r\n", "\n")
    good.path.rename(good.path.with_name(f"{EVIL.replace('/', '')}-aaaaaaaa"))
    run = RunDirectory(good.path.with_name(f"{EVIL}-aaaaaaaa"))
    run.overrides_path.write_text(evil)
    run.metrics_path.write_text(json.dumps({"step": 3, evil: 0.5}) + "\n")
    beat = HeartbeatRecord(phase="train", host=evil, device=evil, metrics={evil: 1.0}, began=1.0, spent={evil: 3.0})
    run.write_heartbeat(0, beat)
    run.add_event(Created(overrides=[evil]))
    run.add_event(Straggler(attempt=0, rank=0, host=evil, reason=evil))
    outcome = AttemptOutcome(attempt=0, outcome="failed", reason=evil, host=evil, where=evil, log=evil, lines=[evil])
    run.write_outcome(outcome)
    run.write_launch(Launch(cluster=evil, slurm_job_id=None))
    config = run.config() | {"strategy": {"name": evil}, "cluster": {"name": evil}}
    run.config_path.write_text(json.dumps(config))
    (run.path.parent / f"{EVIL}-bbbbbbbb").mkdir()
    (run.path.parent / f"{EVIL}-bbbbbbbb" / "config.yaml").write_text("{ [")
    run.rank_log(0, 0).write_text(EVIL + "\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for arguments in (
        ["ls"],
        ["show", "aaaaaaaa", "--ranks"],
        ["why", "aaaaaaaa"],
        ["logs", "aaaaaaaa"],
        ["logs", "aaaaaaaa", "--rank", "7"],
        ["show", "bbbbbbbb"],
        ["ls", "--json"],
    ):
        main(arguments)
        said = capsys.readouterr()
        assert CONTROL.findall(said.out + said.err) == [], arguments
        if arguments[-1] != "--json":
            assert "txt.exe" in said.out + said.err, arguments
        if arguments[0] != "logs":  # whose lines are the log's own
            assert not re.search("^next ", said.out, re.M), arguments


def test_the_follower_and_its_bar_write_no_control_character_of_the_run(good: RunDirectory) -> None:
    """blocked by: every text of a run is escaped where it is printed"""

    class Terminal(StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    good.rank_log(0, 0).write_text(f"Warning: {EVIL}\n")
    good.write_outcome(AttemptOutcome(attempt=0, outcome="failed", reason=EVIL, lines=[EVIL], where=EVIL))
    beat = HeartbeatRecord(phase="train", step=3, max_steps=9, rate=2.0, rate_unit=EVIL, eta_s=float("inf"))
    good.write_heartbeat(0, beat)
    follower = Follower(good, terminal)
    with ends_within(20, "the follower"):
        follower.show()
        follower.conclude()
    own = terminal.getvalue().replace("\r\x1b[K", "")
    assert CONTROL.findall(own) == []
    assert own.count("txt.exe") >= 3
    assert CONTROL.findall(bar.render(beat, 100)) == []


@pytest.mark.honest
def test_what_people_write_is_printed_as_it_is() -> None:
    for text in ("Größe 12 µm", "loss → 0.5\tok", "日本語", "👩‍💻 e\u0301", "می‌خواهم"):
        assert printable(text) == text
    assert printable("a\r\nb\x1b[1;31mred\x1b[0m") == "a\nbred"
    assert one_line("a\nb\tc") == r"a\nb\tc"
    assert log_text("1%\r2%\r\n") == "1%\n2%\n"
    assert printable("\x1b]0;x\x07\u202e\ud800") == r"\x1b]0;x\x07\u202e\ud800"
