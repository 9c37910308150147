"""`trainer bench devices`: which cases a machine has, a real measurement, the table and the chart."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from trainer.cli import bench_devices, main
from trainer.core.errors import JOB_FAILED, UserError
from trainer.core.gpu import Gpu
from trainer.doctor.bars import bars
from trainer.doctor.devices import Row, cases, measure

SVG = "{http://www.w3.org/2000/svg}"
TINY = ["experiment=quickstart", "model.hidden=[16]", "tracking=none"]


def gpu(index: int, name: str) -> Gpu:
    return Gpu(str(index), index, f"GPU-{index}", name)


def test_the_cases_of_a_machine_with_gpus() -> None:
    gpus = [gpu(0, "NVIDIA H200"), gpu(1, "NVIDIA H200")]
    found = cases(gpus, 16, ["ddp", "fsdp"])
    assert [(one.device, one.ranks, one.strategy, one.precision) for one in found] == [
        ("CPU", 1, "single", "32-true"),
        ("CPU", 1, "single", "bf16-mixed"),
        ("CPU", 2, "ddp", "32-true"),
        ("CPU", 2, "ddp", "bf16-mixed"),
        ("CPU", 2, "fsdp", "32-true"),
        ("CPU", 2, "fsdp", "bf16-mixed"),
        ("GPU 0", 1, "single", "32-true"),
        ("GPU 0", 1, "single", "bf16-mixed"),
        ("GPU 1", 1, "single", "32-true"),
        ("GPU 1", 1, "single", "bf16-mixed"),
        ("2 GPUs", 2, "ddp", "32-true"),
        ("2 GPUs", 2, "ddp", "bf16-mixed"),
        ("2 GPUs", 2, "fsdp", "32-true"),
        ("2 GPUs", 2, "fsdp", "bf16-mixed"),
    ]
    assert found[8].entries == ("1",)
    assert "resources.gpus=2" in found[-1].overrides
    old = cases([gpu(0, "Tesla T4")], 1, ["ddp"])
    assert [one.precision for one in old if one.device == "GPU 0"] == ["32-true", "16-mixed"], "bf16 would be emulated"
    assert not any(one.ranks == 2 for one in old), "two ranks on one core measure nothing"


def test_a_step_is_measured_on_this_machine(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_orphans: None
) -> None:
    monkeypatch.setattr(bench_devices, "usable_cores", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workdir / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["bench", "devices", *TINY, "--steps", "2", "--out", "found/devices"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    found = json.loads((workdir / "found/devices.json").read_text())
    first, second = found["rows"]
    assert (first["precision"], second["precision"]) == ("32-true", "bf16-mixed")
    assert first["speedup"] == 1.0
    assert second["speedup"] == pytest.approx(second["samples_s"] / first["samples_s"])
    assert first["samples_s"] == pytest.approx(32 / first["step_s"])
    assert "CPU     1      single    32-true" in (workdir / "found/devices.md").read_text()
    chart = ElementTree.parse(workdir / "found/devices.svg").getroot()
    assert len(chart.findall(f"{SVG}rect")) == 3, "the background and two bars"
    assert sorted(path.name for path in workdir.iterdir()) == ["cache", "found"], "no runs are left"


def test_a_job_that_fails_is_a_row(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = cases([], 1, [])[0]
    row = measure(case, [*TINY, "model.hiden=[3]"], 2, None)
    assert "hiden" in row.problem
    assert row.samples_s is None
    monkeypatch.setattr(bench_devices, "measure", lambda *arguments: row)
    monkeypatch.setattr(bench_devices, "usable_cores", lambda: 1)
    assert main(["bench", "devices"]) == JOB_FAILED
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--strategies", "fdsp"], r"--strategies: unknown strategy fdsp"),
        (["experiment=quikstart"], r"experiment=quikstart"),
        ([*TINY, "model.hiden=[3]"], r"hiden"),
        (["--out", "taken/devices"], r"--out taken/devices: File exists"),
    ],
)
def test_a_mistake_measures_nothing(
    arguments: list[str], problem: str, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: object) -> None:
        pytest.fail("measured")

    monkeypatch.setattr(bench_devices, "measure", measured)
    (workdir / "taken").write_text("a file, where a folder would be made")
    with pytest.raises(UserError, match=problem):
        bench_devices.main(arguments)


def test_bars_are_in_proportion_and_labels_are_escaped() -> None:
    chart = ElementTree.fromstring(bars("A & B", "samples", [("<a>", "CPU", 10.0, "10"), ("b", "GPU 0", 20.0, "20")]))
    _, first, second = chart.findall(f"{SVG}rect")
    assert float(second.attrib["width"]) == pytest.approx(2 * float(first.attrib["width"]), abs=1)
    assert first.attrib["fill"] != second.attrib["fill"]
    assert "<a>" in [text.text for text in chart.findall(f"{SVG}text")]
    wide = ElementTree.fromstring(bars("x", "y", [("a", "CPU", 1.0, "1"), ("b", "GPU", 1000.0, "1000")]))
    assert "logarithmic" in str(wide.findall(f"{SVG}text")[1].text)
    assert ElementTree.fromstring(bars("x", "y", [])).tag == f"{SVG}svg"


def test_the_chart_leaves_out_what_failed() -> None:
    rows = [
        Row(device="CPU", ranks=1, strategy="single", precision="32-true", label="a", samples_s=5.0, speedup=1.0),
        Row(device="GPU 0", ranks=1, strategy="single", precision="32-true", label="b", problem="out of memory"),
    ]
    assert len(ElementTree.fromstring(bench_devices.plot(rows)).findall(f"{SVG}rect")) == 2
