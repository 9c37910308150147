"""`trainer best`, `trainer diff`, and the curves of `trainer show`."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.runs.ended import ended_run
from trainer.cli import main
from trainer.cli.sparkline import ASCII, UNICODE, sparkline
from trainer.core.errors import DONE, USER_MUST_CHANGE
from trainer.runs import sampled
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Evaluation


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunDirectory]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRAINER_RUNS_DIR", raising=False)
    (tmp_path / "runs").mkdir()
    return [
        ended_run(tmp_path / "runs", "low", accuracies=(0.5, 0.8, 0.7)),
        ended_run(tmp_path / "runs", "high", "failed", accuracies=(0.6, 0.95, 0.1)),
        ended_run(tmp_path / "runs", "none", accuracies=()),
    ]


def test_the_best_run_its_step_and_its_checkpoint(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    low, high, _ = (run.path.name for run in runs)
    assert main(["best", "val/acc"]) == DONE
    assert capsys.readouterr().out.splitlines() == [
        "val/acc 0.95 at step 2",
        f"  run         {high}",
        f"  checkpoint  runs/{high}/checkpoints/step-00000002",
    ]
    shutil.rmtree(runs[1].checkpoints_dir / "step-00000002")
    (runs[1].checkpoints_dir / "step-00000001" / "COMMIT").unlink()  # a list does not look for it
    assert main(["best", "val/acc", "-n", "5", "--json"]) == DONE
    first, second = json.loads(capsys.readouterr().out)
    assert (first["run"], first["mode"], first["value"], first["step"]) == (high, "max", 0.95, 2)
    assert (first["checkpoint_step"], first["checkpoint_value"]) == (3, 0.1)
    assert (second["run"], second["value"], second["checkpoint_step"]) == (low, 0.8, 2)
    assert main(["best", "val/acc", "--where", "state=failed"]) == DONE
    assert "step-00000003 (0.1; none of step 2 was kept)\n" in capsys.readouterr().out
    shutil.rmtree(runs[1].checkpoints_dir)
    assert main(["best", "val/acc"]) == DONE
    assert "  checkpoint  none was kept\n" in capsys.readouterr().out


def test_the_direction(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    for run, value in zip(runs, (3.0, 1.0, 2.0), strict=True):
        run.metrics_path.write_text(json.dumps({"step": 1, "loss": value, "gadgets": value}) + "\n")
        run.unseal()
    assert main(["best", "loss", "--json"]) == DONE  # by its name
    assert json.loads(capsys.readouterr().out)[0]["value"] == 1.0
    assert main(["best", "gadgets"]) == USER_MUST_CHANGE
    assert capsys.readouterr().err == (
        "trainer: it is not known whether a lower or a higher gadgets is better\n  add --mode min, or --mode max\n"
    )
    assert main(["best", "gadgets", "--mode", "max", "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)[0]["value"] == 3.0
    for run in runs:
        text = run.config_path.read_text()
        run.config_path.write_text(text + "checkpoint: {monitor: gadgets, mode: min}\n")
        run.unseal()
    assert main(["best", "gadgets", "--json"]) == DONE  # as in the configuration
    assert json.loads(capsys.readouterr().out)[0]["value"] == 1.0
    runs[0].config_path.write_text(runs[0].config_path.read_text().replace("mode: min", "mode: max"))
    runs[0].unseal()
    assert main(["best", "gadgets"]) == USER_MUST_CHANGE
    assert "the runs disagree whether" in capsys.readouterr().err
    assert main(["best", "val/loss"]) == USER_MUST_CHANGE
    error = capsys.readouterr().err
    assert "no run has a value of val/loss\n  did you mean loss? metrics of the runs: gadgets, loss" in error


def test_an_evaluated_metric(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    runs[0].evaluations_dir.mkdir()
    record = Evaluation(step=2, split="test", metrics={"test/acc": 0.625, "test/auc": float("nan")})
    (runs[0].evaluations_dir / "step-00000002-test.json").write_text(json.dumps(record.__dict__))
    assert main(["best", "test/acc", "--json"]) == DONE
    (best,) = json.loads(capsys.readouterr().out)
    assert (best["value"], best["step"], best["checkpoint_step"]) == (0.625, 2, 2)
    assert main(["ls", "--columns", "name,test/acc,test/auc", "--sort", "test/acc", "-n", "1"]) == DONE
    assert capsys.readouterr().out.splitlines()[1].split() == ["low", "0.625", "nan"]
    assert main(["show", runs[0].id]) == DONE
    assert "\n  evaluated    step 2, test: test/acc 0.625, test/auc nan\n" in capsys.readouterr().out
    assert main(["diff", runs[0].id, runs[1].id]) == DONE
    assert re.search(r"test/acc \(evaluated on test\) +0\.625 +\(none\)", capsys.readouterr().out)


def test_diff_takes_two_runs(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", runs[0].id, runs[1].id, "--json"]) == DONE
    compared = json.loads(capsys.readouterr().out)
    assert main(["compare", runs[0].id, runs[1].id, "--json"]) == DONE
    assert json.loads(capsys.readouterr().out) == compared
    assert main(["diff", runs[0].id]) == USER_MUST_CHANGE
    assert main(["diff", *(run.id for run in runs)]) == USER_MUST_CHANGE
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("curve", "width", "expected"),
    [
        ([], 10, ""),
        ([(3, 1.0)], 10, ""),
        ([(step, float(step)) for step in range(8)], 30, UNICODE),
        ([(step, float(step)) for step in range(800)], 8, UNICODE),
        ([(step, -float(step)) for step in range(800)], 8, UNICODE[::-1]),
        ([(step, 3.0) for step in range(5)], 5, UNICODE[4] * 5),
        ([(0, 0.0), (1, 0.0), (2, 0.0), (99, 1.0)], 4, f"{UNICODE[0]}  {UNICODE[-1]}"),
        ([(0, -1e308), (1, 1e308)], 4, f"{UNICODE[0]}{UNICODE[-1]}"),
    ],
)
def test_a_curve_in_one_line(curve: sampled.Curve, width: int, expected: str) -> None:
    assert sparkline(curve, width, UNICODE) == expected


def test_show_draws_curves_within_80_columns(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"step": step, "loss": 1 / (step + 1), "x" * 50: step, "val/acc": "nan"} for step in range(500)]
    runs[0].metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["show", runs[0].id]) == DONE
    shown = [line for line in capsys.readouterr().out.splitlines() if "loss" in line or "xxx" in line]
    assert all(len(line) <= 80 for line in shown)
    short = [{name: line[name] for name in ("step", "loss", "val/acc")} for line in lines]
    runs[0].metrics_path.write_text("".join(json.dumps(line) + "\n" for line in short))
    assert main(["show", runs[0].id]) == DONE
    output = capsys.readouterr().out
    assert re.search(rf"\n  metrics      loss     0\.002  [{UNICODE}]{{30}}\n               val/acc  nan\n", output), (
        output
    )
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True))
    assert main(["show", runs[0].id]) == DONE
    text = sys.stdout.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert re.search(rf"loss     0\.002  [{re.escape(ASCII)}]{{30}}\n", text)


def test_a_large_file_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "time": 0.0, "a": step}) + "\n" for step in range(100_000)))
    assert sampled.sampled_curves(path)["a"][-1] == (99_999, 99_999.0)
    monkeypatch.setattr(sampled, "WHOLE_BYTES", 1 << 20)
    monkeypatch.setattr(sampled, "_PART_BYTES", 1 << 10)
    curve = sampled.sampled_curves(path)["a"]
    assert 500 < len(curve) < 3000
    assert (curve[0], curve[-1]) == ((0, 0.0), (99_999, 99_999.0))
    assert max(after[0] - before[0] for before, after in itertools.pairwise(curve)) < 3000
    assert sampled.sampled_curves(tmp_path) == sampled.sampled_curves(tmp_path / "none") == {}
