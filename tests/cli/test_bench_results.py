"""The results of `trainer bench faults`: written after each job, read by the next call, summed up in a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from trainer.cli import bench
from trainer.core.errors import DONE, JOB_FAILED, UserError
from trainer.faultbench.bench import Result

GOOD = Result(0, "ddp", "kill", "kill", None, 2, 3, 12.5, 4.0, "abc")
BAD = Result(1, "fsdp", "hang", "hang", "it hung\nfor long", 1, 0, 300.0, 290.0, "abc")


def test_results_are_read_back_without_those_to_repeat(tmp_path: Path) -> None:
    out = tmp_path / "results" / "faults"
    assert bench.read_results(out, 1) == []
    bench.write_results(out, 1, [GOOD, BAD])
    assert bench.read_results(out, 1) == [GOOD]
    text = out.with_suffix(".md").read_text()
    assert text.startswith("# Faults, seed 1: 1 of 2 ended as required\n")
    assert text.endswith("\nNot as required:\n\n- 1 fsdp hang: it hung\n")
    with pytest.raises(UserError, match=r"holds results of --seed 1\n"):
        bench.read_results(out, 2)


def test_a_row_for_each_kind() -> None:
    slower = replace(GOOD, number=2, lost_steps=6, down_s=10.0)
    header, kill, hang = bench.summary_table([GOOD, BAD, slower]).splitlines()
    assert header.split("  ")[0].startswith("fault")
    assert kill.split() == ["kill", "2", "2", "4.5", "6", "7", "10"]
    assert hang.split() == ["hang", "1", "0", "0.0", "0", "290", "290"]


class StandInBench:
    """In place of the bench: every job fails."""

    def __init__(self, folder: Path, seed: int, strategies: list[str], kinds: list[str]) -> None:
        pass

    def run(self, numbers: list[int], report, at_once: int) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        for number in numbers:
            report(replace(BAD, number=number))


def test_jobs_that_ended_as_required_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "FaultBench", StandInBench)
    out = str(tmp_path / "faults")
    bench.write_results(tmp_path / "faults", 0, [GOOD])
    options = ["faults", "--out", out, "--keep", str(tmp_path / "runs")]
    assert bench.main([*options, "--n", "1"]) == DONE
    assert "1 faults, 1 of them done, seed 0, ddp; runs in " in capsys.readouterr().out
    assert bench.main([*options, "--n", "3"]) == JOB_FAILED
    output = capsys.readouterr().out
    assert [line.split()[0] for line in output.splitlines() if "steps lost" in line and "290.0 s" in line] == ["1", "2"]
    assert output.endswith("\n1 of 3 ended as required\n")
