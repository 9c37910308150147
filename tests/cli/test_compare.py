"""`trainer compare`: what differs between runs, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.runs.test_directory import make
from trainer.cli import main
from trainer.core.errors import DONE, USER_MUST_CHANGE
from trainer.core.files import append_line
from trainer.runs import code_comparison, curves
from trainer.runs.comparison import compare
from trainer.runs.curves import first_difference
from trainer.runs.directory import RunDirectory
from trainer.runs.records import HeartbeatRecord

DIFF = """\
--- {first}/code/model.py
+++ {second}/code/model.py
@@ -1,3 +1,3 @@
 x = 1
-y = 2
+y = 3\\x1b[2J
"""


def log(run: RunDirectory, *losses: float) -> None:
    for step, loss in enumerate(losses, start=1):
        line = {"step": step, "epoch": 0, "time": 1e9 * loss, "train/loss": loss, "train/samples_per_s": 100 * loss}
        append_line(run.metrics_path, json.dumps(line))


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def change_manifest(run: RunDirectory, **values: Any) -> None:
    manifest = {**run.manifest(), **values}
    run.manifest_path.write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


@pytest.fixture
def runs(workdir: Path) -> list[RunDirectory]:
    """Three runs of one project; the second and the third differ from the first."""
    made = []
    for name, constant in (("a", "2"), ("b", "3\x1b[2J"), ("c", "2")):
        (workdir / "project").mkdir(exist_ok=True)
        (workdir / "project/model.py").write_text(f"x = 1\ny = {constant}\n")
        (workdir / "project/same.py").write_text("z = 1\n")
        made.append(make(workdir, name))
    log(made[0], 3.0, 2.0)
    log(made[1], 3.0, 1.0)
    log(made[2], 3.0, 2.0, 1.5)
    return made


def test_two_runs(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    a, b, _ = runs
    change(b.config_path, "max_steps: 10", "max_steps: 20")
    versions = a.manifest()["installed"]["versions"]
    change_manifest(b, installed={"versions": {**versions, "torch": "9.9", "extra-package": "1"}, "origins": {}})
    change_manifest(b, data={"data.path": {"path": "/d", "bytes": 5}})
    a.write_heartbeat(0, HeartbeatRecord(phase="train", host="node1", device="cuda:0, NVIDIA H200", step=2))
    b.write_heartbeat(0, HeartbeatRecord(phase="train", host="node1", device="cpu", step=2))
    assert main(["compare", a.id, b.id]) == DONE
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert DIFF.format(first=a.path.name, second=b.path.name) in text
    rows = [line.split() for line in text.splitlines()]
    for row in (
        ["trainer.max_steps", "10", "20"],
        ["torch", versions["torch"], "9.9"],
        ["extra-package", "(not", "installed)", "1"],
        ["train/loss", "2", "1"],
    ):
        assert row in rows, text
    assert ["devices", "of", "the", "ranks", '["NVIDIA', 'H200"]', '["cpu"]'] in rows
    assert ["data.path.bytes", "(none)", "5"] in rows
    assert f"metrics of {b.path.name}: differ from those of the first run at step 2: train/loss" in text
    for equal in ("same.py", "numpy", "strategy", "hosts of the ranks", "epoch", "equal:", "created"):
        assert equal not in text, equal
    assert main(["compare", a.id, b.id, "--files"]) == DONE
    assert "@@" not in capsys.readouterr().out


def test_equal_parts_are_named_and_left_out(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    a, _, c = runs
    change(c.config_path, "name: c", "name: a")
    assert main(["compare", a.id, c.id]) == DONE
    text = capsys.readouterr().out
    assert f"metrics of {c.path.name}: equal to those of the first run at 2 steps\n" in text
    assert text.endswith("equal: config, code, packages, hardware, data\n")
    assert text.startswith("results\n")


def test_a_run_of_an_older_version_did_not_record_its_packages(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = runs
    change_manifest(a, installed=None, data=None, machine=None)
    change_manifest(b, packages={**b.manifest()["packages"], "numpy": "0.1"})
    assert main(["compare", *(run.id for run in runs), "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    labels = [run.path.name for run in runs]
    assert told["runs"] == [str(run.path) for run in runs]
    assert told["sections"]["packages"]["not_recorded"] == labels[:1]
    assert list(told["sections"]["packages"]["rows"]) == ["numpy"]  # one of the few that all have recorded
    assert told["sections"]["data"] == {"rows": {}, "not_recorded": labels[:1]}
    assert told["sections"]["config"]["rows"] == {"name": dict(zip(labels, "abc", strict=True))}
    assert set(told["sections"]["code"]["rows"]) == {"code/model.py"}
    assert told["curves"] == {
        labels[1]: {"steps": 2, "step": 2, "metrics": ["train/loss"]},
        labels[2]: {"steps": 2},
    }
    assert told["diffs"] == {}  # of three runs
    assert main(["compare", a.id, c.id]) == DONE
    text = capsys.readouterr().out
    assert f"packages\n  not recorded by {a.path.name}, made by an older version\n" in text
    assert ["processor", "(not", "recorded)"] in [line.split()[:3] for line in text.splitlines()]


def test_long_values_have_lines_of_their_own_and_secrets_are_masked(
    runs: list[RunDirectory], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, _, c = runs
    monkeypatch.setenv("MY_TOKEN", "abc123secret")
    change(a.config_path, "name: a", "name: abc123secret")
    change(c.config_path, "name: c", f"name: {'long' * 30}")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["compare", a.id, c.id]) == DONE
    assert f"  name\n    {a.path.name}  ***\n    {c.path.name}  {'long' * 30}\n" in capsys.readouterr().out
    assert main(["compare", a.id, c.id, "--json"]) == DONE
    assert "abc123secret" not in capsys.readouterr().out


def test_code_that_has_no_diff(runs: list[RunDirectory]) -> None:
    a, b, _ = runs
    (a.code_dir / "weights.bin").write_bytes(b"\xff\xfe")
    (b.code_dir / "weights.bin").write_bytes(b"\xff\xff")
    (b.code_dir / "new.py").write_text("new\n")
    (a.code_dir / "link").symlink_to("/one")
    (b.code_dir / "link").symlink_to("/two")
    found = compare([a, b])
    assert found.diffs["code/weights.bin"] == "not text, or too long for a diff"
    assert found.diffs["code/new.py"].endswith("@@ -0,0 +1,2 @@\n+new\n+")
    assert found.sections["code"].rows["code/link"] == {a.path.name: "link to /one", b.path.name: "link to /two"}
    (a.code_dir / "model.py").write_text("x\n" * (code_comparison._MOST_LINES + 1))
    assert compare([a, b]).diffs["code/model.py"] == "not text, or too long for a diff"


def test_curves(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    nan = {"train/loss": float("nan")}
    lines = [{"step": 1, **nan}, {"step": 2, "train/loss": 1}, {"step": 2, "val/acc": 0.5}, {"step": 4, "val/acc": 1}]
    first.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "val')
    second.write_text(json.dumps({"step": 1, **nan, "gpu/power_w": 3}) + "\n[]\n" + json.dumps(lines[1]) + "\n")
    assert first_difference(first, second) == {"steps": 2}
    with second.open("a") as file:
        file.write(json.dumps({"step": 3, "val/acc": 0}) + "\n" + json.dumps({"step": 4, "val/acc": 0.9}) + "\n")
    assert first_difference(first, second) == {"steps": 3, "step": 4, "metrics": ["val/acc"]}
    assert first_difference(first, tmp_path / "absent") == {"steps": 0}


def test_a_huge_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1").write_text(json.dumps({"step": 1, "a": 1}) + "\n" + json.dumps({"step": 2, "a": 2}) + "\n")
    monkeypatch.setattr(curves, "_MOST_BYTES", 10)
    assert first_difference(tmp_path / "1", tmp_path / "1") == {"steps": 1}


def test_one_run_is_refused(runs: list[RunDirectory], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", runs[0].id, str(runs[0].path)]) == USER_MUST_CHANGE
    assert "is the only run named" in capsys.readouterr().err
