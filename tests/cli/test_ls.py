"""`trainer ls`: which runs, in which order, with which columns, and as which output."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.runs.ended import ended_run
from trainer.cli import main
from trainer.core.errors import DONE, ENVIRONMENT_MUST_CHANGE, USER_MUST_CHANGE
from trainer.core.files import append_line
from trainer.runs.directory import RunDirectory

CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"optimizer": {"lr": 0.1}, "model": {"depth": 18, "heads": None}},
    "large": {"optimizer": {"lr": 0.001}, "model": {"depth": 50, "heads": None}},
    "wide": {"optimizer": {"lr": 0.01}, "model": {"depth": 18, "width": 2}},
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[RunDirectory]:
    """Three runs, the oldest first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TRAINER_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setenv("TRAINER_TRACEBACK", "1")
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "runs").mkdir()
    made = [
        ended_run(tmp_path / "runs", "small", config=CONFIGS["small"], accuracies=(0.5, 0.9, 0.7)),
        ended_run(tmp_path / "runs", "large", "failed", config=CONFIGS["large"], accuracies=(0.6, 0.95)),
        ended_run(tmp_path / "runs", "wide", None, config=CONFIGS["wide"], accuracies=()),
    ]
    for hours, run in enumerate(reversed(made), start=1):
        os.utime(run.config_path, (time.time() - hours * 3600, time.time() - hours * 3600))
    return made


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The names of the runs, in order."""
    assert main(["ls", "--json", *arguments]) == DONE
    return [row["name"] for row in json.loads(capsys.readouterr().out)]


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        ("state=finished", ["small"]),
        ("state=finished,failed", ["large", "small"]),
        ("state!=finished", ["wide", "large"]),
        ("state=finished model=mlp val/acc>0.6", ["small"]),
        ("val/acc>0.9", ["large"]),
        ("val/acc >= 0.7", ["large", "small"]),
        ("val/acc.max>0.85 optimizer.lr>1e-2", ["small"]),
        ("val/acc.min<0.55", ["small"]),
        ("loss.best<0.4", ["small"]),
        ("model.depth=18 optimizer.lr<0.05", ["wide"]),
        ("name=*a*e", ["large"]),
        ('name="small"', ["small"]),
        ("'name'=small", ["small"]),
        ("name=small,wide", ["wide", "small"]),
        ("val/acc=null", ["wide"]),
        ("model.heads=null", ["wide", "large", "small"]),
        ("model.width!=2", ["large", "small"]),
        ("tags=a step<3", ["wide", "large"]),
        ("age<90m", ["wide"]),
        ("created>150m", ["large", "wide"][::-1]),
        ("created<2001-01-01", []),
    ],
)
def test_conditions(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], conditions: str, names: list[str]
) -> None:
    assert listed(capsys, "--where", conditions) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--where", "stat=finished"], r"--where: no run has stat\n  did you mean state\?"),
        (["--where", "lr>0.1"], r"--where: no run has lr\n  did you mean optimizer.lr\?"),
        (["--where", "acc>0.1"], r"no run has acc\n  did you mean val/acc\?"),
        (["--where", "modle.depth=3"], r"no run has modle.depth\n  did you mean model.depth\?"),
        (["--where", ""], r"--where: its value is empty"),
        (["--where", "state"], r"cannot read 'state'\n  write conditions as KEY=VALUE"),
        (["--where", "state=finished >3"], r"cannot read '>3'"),
        (["--where", "state=finished;import os"], r"cannot read 'os'|no run has import"),
        (["--where", "val/acc>high"], r"--where val/acc>high: > needs one number\n  such as 0.9"),
        (["--where", "val/acc>1,2"], r"> needs one number"),
        (["--where", "__import__('os')=1"], r"cannot read"),
        (["--sort", "val/loss"], r"--sort: no run has val/loss\n"),
        (["--columns", "id,vall/acc"], r"--columns: no run has vall/acc\n  did you mean val/acc\?"),
        (["--columns", ","], r"--columns names no column"),
        (["--limit", "0"], r"0 is not a number of runs"),
        (["--csv", "--json"], r"not allowed with argument"),
        (["--watch", "--csv"], r"not allowed with argument"),
    ],
)
def test_a_mistake_names_what_is_near(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["ls", *arguments]) == USER_MUST_CHANGE
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) <= 3


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("stat", "state"),
        ("trainer.max_stepss", "trainer.max_steps"),
        ("strategy.nmae", "strategy.name"),
        ("modle", "model"),
        ("val/acc", None),
        ("model.depth", None),
        ("experiment", None),
        ("optimizer", None),
    ],
)
def test_a_key_is_judged_without_runs(workdir: Path, capsys: pytest.CaptureFixture[str], key: str, near: str) -> None:
    code = main(["ls", "--where", f"{key}=3"])
    error = capsys.readouterr().err
    assert (code, error == "") == ((DONE, True) if near is None else (USER_MUST_CHANGE, False))
    assert near is None or re.search(rf"no run has {key}\n  did you mean {near}\?", error), error


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--sort", "val/acc"], ["large", "small", "wide"]),  # the better one first, no value last
        (["--sort", "loss"], ["small", "large", "wide"]),
        (["--sort", "val/acc.min"], ["large", "small", "wide"]),
        (["--sort", "optimizer.lr"], ["large", "wide", "small"]),
        (["--sort", "name", "--reverse"], ["wide", "small", "large"]),
        (["--sort", "model.width"], ["wide", "large", "small"]),
        (["--reverse"], ["small", "large", "wide"]),
        (["-n", "2"], ["wide", "large"]),
        (["--limit", "1", "--sort", "val/acc"], ["large"]),
        (["--state", "failed", "--state", "dead"], ["wide", "large"]),
    ],
)
def test_orders(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], arguments: list[str], names: list[str]
) -> None:
    assert listed(capsys, *arguments) == names


def test_columns(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", "--columns", "name,val/acc,val/acc.best,best,optimizer.lr,model,tags,step"]) == DONE
    assert capsys.readouterr().out.splitlines() == [
        "NAME   val/acc  val/acc.best  BEST          optimizer.lr  model  TAGS   STEP",
        'wide                                        0.01          mlp    ["a"]  0/3',
        'large  0.95     0.95          val/acc 0.95  0.001         mlp    ["a"]  2/3',
        'small  0.7      0.9           val/acc 0.9   0.1           mlp    ["a"]  3/3',
    ]
    assert main(["ls", "--columns", "+val/acc", "--where", "name=small", "--json"]) == DONE
    (row,) = json.loads(capsys.readouterr().out)
    assert list(row) == ["id", "name", "state", "step", "best", "age", "strategy", "where", "val/acc"]
    assert (row["best"], row["val/acc"], row["where"]) == (0.9, 0.7, "local")
    assert main(["ls", "--where", "name=none"]) == DONE
    assert capsys.readouterr().out == "none of 3 runs meets the conditions\n"


def test_csv_and_parquet(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    append_line(runs[0].metrics_path, json.dumps({"step": 4, "val/\x1b[2Jbad": 1.0, "val/acc": "nan"}))
    runs[0].unseal()
    assert main(["ls", "--csv"]) == DONE
    text = capsys.readouterr().out
    assert "\x1b" not in text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["name"], row["state"], row["val/acc"], row["optimizer.lr"], row["model.width"]) for row in rows] == [
        ("wide", "dead", "", "0.01", "2"),
        ("large", "failed", "0.95", "0.001", ""),
        ("small", "finished", "nan", "0.1", ""),
    ]
    assert "trainer.max_steps" not in rows[0]  # equal in all runs
    assert main(["ls", "--csv", "--columns", "name,loss", "-n", "2"]) == DONE
    assert capsys.readouterr().out == "name,loss\nwide,\nlarge,0.5\n"
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "runs.parquet"
    assert main(["ls", "--parquet", str(file)]) == DONE
    assert capsys.readouterr().out == f"wrote 3 runs to {file}\n"
    table = parquet.read_table(file).to_pydict()
    assert table["name"] == ["wide", "large", "small"]
    assert table["optimizer.lr"] == [0.01, 0.001, 0.1]
    assert table["model.width"] == [2, None, None]
    assert table["val/acc"][:2] == [None, 0.95]
    assert table["val/acc"][2] != table["val/acc"][2]
    assert main(["ls", "--parquet", "/nowhere/at/all"]) == ENVIRONMENT_MUST_CHANGE
    assert "cannot write /nowhere/at/all" in capsys.readouterr().err


def test_parquet_without_pyarrow(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["ls", "--parquet", str(tmp_path / "a")]) == ENVIRONMENT_MUST_CHANGE
    assert "trainer: --parquet needs pyarrow\n  pip install" in capsys.readouterr().err


def test_watching_without_a_terminal_ends_with_the_last_run(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ls", "--watch"]) == DONE
    output = capsys.readouterr().out
    assert output.count("STATE") == 1
    assert "\x1b" not in output


def test_watching_redraws_in_place_on_a_terminal(runs: list[RunDirectory]) -> None:
    code = (
        "import os, pty, sys\nfrom trainer.cli import ls, main\nls.EVERY_S = 0.05\nsys.exit(main(['ls', '--watch']))\n"
    )
    primary, secondary = os.openpty()
    child = subprocess.Popen([sys.executable, "-c", code], stdout=secondary, stderr=secondary)
    os.close(secondary)
    try:
        seen = b""
        while seen.count(b"STATE") < 3:
            seen += os.read(primary, 4096)
        assert seen.count(b"\x1b[4F\x1b[J") >= 2
        child.send_signal(2)
        with contextlib.suppress(OSError):  # EIO: the child has closed its end
            while os.read(primary, 4096):  # a full terminal would keep it from ending
                pass
        assert child.wait(timeout=300) == DONE
    finally:
        child.kill()
        child.wait()
        os.close(primary)


def test_text_of_a_run_cannot_change_the_terminal(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ended_run(tmp_path / "runs", "evil", config={"optimizer": {"lr": "\x1b[2J\nx"}})
    assert main(["ls", "--columns", "name,optimizer.lr"]) == DONE
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "\\nx" in output
