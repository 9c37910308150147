"""The report of a run: what a person reads in it, and what no file of a run can put into it."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.report.made import Page, make, points
from tests.security.bounds import ends_within
from trainer.report import write
from trainer.report.chart import Line, chart
from trainer.report.markup import element
from trainer.report.page import MOST_BYTES, report, report_of_several
from trainer.report.page import page as page_of
from trainer.runs.curves import Curve
from trainer.runs.directory import RunDirectory

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e&amp;</svg></style>"


def test_what_a_person_reads(tmp_path: Path) -> None:
    run = make(tmp_path)
    page = Page(report(run))
    assert page.titles == [
        "Results",
        "Curves",
        "Time, energy and cost",
        "Attempts and faults",
        "Command and configuration",
        "Where it ran",
        "How to reproduce it",
    ]
    for words in (
        "job abcdefgh finished",
        "mlp on digits, ddp on 2 ranks (NVIDIA H200); 90 optimizer steps in",
        "best val/acc 0.9 at step 80",
        "optimizer steps 90 of 90",
        "1.5 GPU hours",
        "3 kWh 1.2 kg CO2e",
        "cost 3.00 EUR",
        "train/loss 1.111 90 1.111 90 100 1 90",
        "step 80, test test/acc 0.88",
        "2 interruptions survived.",
        "1 2026-11-30 22:16 UTC 20 50 failed, restarted rank 1 was killed by SIGKILL",
        "2 2026-11-30 22:33 UTC 50 90 finished",
        "node lost node node1, NOT_RESPONDING",
        "trainer fit optimizer.lr=0.1 'tracking.notes=a note'",
        "optimizer.lr 0.1 0.001",
        "trainer.max_steps 90 null",
        "Energy from the counters of the hardware: GPUs 3 kWh.",
        "Cost in EUR: 2 per GPU hour.",
        "commit c0ffee with uncommitted changes",
        "trainer repro job-abcdefgh",
        "torch==2.13.0",
    ):
        assert words in page.text, words
    assert "redone" in page.text  # 30 steps were done, 20 were saved
    assert "Not in this report" not in page.text
    assert "://" not in page.html
    assert "default-src 'none'" in page.html


def test_a_run_killed_twice_is_one_curve_with_the_places_where_it_continued(tmp_path: Path) -> None:
    html = report(make(tmp_path))
    page = Page(html)
    assert list(page.figures) == ["loss", "val/acc", "mine"]
    train, validation = (points(path) for path in page.figures["loss"])
    assert (len(train), len(validation)) == (90, 9)
    for curve in (train, validation):
        assert [x for x, _ in curve] == sorted({x for x, _ in curve})
        assert [y for _, y in curve] == sorted(y for _, y in curve)  # a falling loss: its pixels grow downwards
    assert html.count('class="resume"') == 2 * len(page.figures)
    assert "Dotted: a restart or resume continued here." in page.text
    assert 'role="img" aria-label="Chart of train/loss, val/loss over the optimizer steps 1 to 90.' in html


def test_no_text_of_a_run_becomes_markup(tmp_path: Path) -> None:
    (tmp_path / "<b>&").mkdir()
    one = make(tmp_path / "<b>&", hostile=HOSTILE)
    for html in (report(one), report_of_several([one, make(tmp_path, "other-bbbbbbbb", hostile=HOSTILE)])):
        page = Page(html)  # which asserts that there are only the tags and attributes of ours
        assert "<script>alert(1)</script>" in page.text  # as text
        assert "\x1b" not in html
        assert "\u202e" not in html


def test_secret_keys_and_values_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "hunter2hunter2")
    run = make(tmp_path)
    run.config_path.write_text(run.config_path.read_text() + "logger: {mine: {api_key: sesame-open-1}}\n")
    run.overrides_path.write_text("+logger.mine.api_key=sesame-open-1 data.image_key=photo name=hunter2hunter2\n")
    text = write.write(run).read_text()
    assert "logger.mine.api_key</code></td><td><code>***" in text
    assert "hunter2" not in text
    assert "sesame-open-1" not in text + report_of_several([run, make(tmp_path, "other-bbbbbbbb")])
    assert "data.image_key=photo" in text
    assert (run.path / "report.html").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("length", [50_000, 5_000_000])
def test_an_endless_word_among_the_overrides_costs_little(tmp_path: Path, length: int) -> None:
    run = make(tmp_path)
    run.overrides_path.write_text("a=" + "b" * length)
    with ends_within(20, f"the report with {length} characters"):
        assert Page(report(run)).text


FILES = (
    *("config.yaml", "overrides.txt", "manifest.json", "launch.json", "events.jsonl", "metrics.jsonl"),
    *("attempts/attempt-02.json", "live/rank-0.json", "usage/attempt-00-node-0.json"),
    *("evaluations/step-00000080-test.json", "checkpoints", "attempts", "live", "usage", "evaluations"),
)


@pytest.mark.parametrize("name", FILES)
def test_damage_costs_one_section_and_not_the_report(name: str, tmp_path: Path) -> None:
    whole = len(Page(report(make(tmp_path / "whole"))).text)
    for number, damage in enumerate(("garbage", "list", "nothing", "folder", "pipe")):
        run = make(tmp_path / str(number))
        path = run.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if damage == "garbage":
            path.write_bytes(b"\x00\xff{[\n" * 50)
        elif damage == "list":
            path.write_text('[1, {"step": "x"}, null]\n')
        elif damage == "folder":
            path.mkdir()
        elif damage == "pipe":
            os.mkfifo(path)
        page = Page(report(run))
        assert "How to reproduce it" in page.titles
        assert len(page.text) > whole / 4


def test_a_failed_run_says_why_and_a_new_one_has_no_empty_sections(tmp_path: Path) -> None:
    run = make(tmp_path)
    outcome = json.loads(run.attempt_record(2).read_text())
    failed = {**outcome, "outcome": "failed", "reason": "ValueError: the loss is not a number"}
    run.attempt_record(2).write_text(json.dumps(failed))
    page = Page(report(run))
    assert "job abcdefgh failed" in page.text
    assert ". ValueError: the loss is not a number" in page.text
    new = RunDirectory(tmp_path / "new-aaaaaaaa")
    new.path.mkdir()
    new.config_path.write_text("name: new\n")
    new.overrides_path.write_text("\n")
    page = Page(report(new))
    assert page.titles == ["Command and configuration", "How to reproduce it"]
    assert "never launched" in page.text


def test_numbers_that_are_not_finite_and_single_points(tmp_path: Path) -> None:
    run = make(tmp_path)
    lines = [{"step": step, "train/loss": "nan" if step > 5 else 2.0, "test/acc": 0.5} for step in range(1, 9)]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]) + '{"step": 8, "tr')
    page = Page(report(run))
    assert "2 not finite, the first at step 6" in page.text
    assert "test/acc" in page.figures


def test_a_huge_run_stays_below_one_megabyte(tmp_path: Path) -> None:
    run = make(tmp_path)
    with run.metrics_path.open("w") as file:
        for step in range(1, 400):
            values = {f"train/metric_{number}": (step * number) % 97 / 97 for number in range(300)}
            file.write(json.dumps({"step": step, **values}) + "\n")
    run.overrides_path.write_text("a=b " * 100_000)
    outcome = run.attempt_record(0).read_text()
    for attempt in range(3, 600):
        run.attempt_record(attempt).write_text(outcome)
    html = report(run)
    assert len(html.encode()) < MOST_BYTES
    page = Page(html)
    assert len(page.figures) == 24
    assert "276 more metrics are in metrics.jsonl." in page.text
    assert "100 more rows are left out." in page.text


def test_what_does_not_fit_is_left_out_from_the_end() -> None:
    parts = [element("p", "x" * 3000) for _ in range(400)]
    html = page_of("title", parts, "here")
    assert MOST_BYTES - 10_000 < len(html.encode()) < MOST_BYTES
    assert "because the report would be larger than 1 MB." in Page(html).text


@pytest.mark.parametrize("smallest", [5e-324, 1e-5, 0.0, -1.0])
def test_a_loss_over_decades_has_a_logarithmic_axis_where_there_is_a_logarithm(smallest: float) -> None:
    curve = Curve(8)
    curve.add(1, smallest)
    curve.add(2, 1.0)
    html = chart("loss", [Line("train/loss", curve, 0)])
    assert ("log scale" in html) == (smallest == 1e-5)


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [make(tmp_path, "slow-aaaaaaaa", lr=0.1), make(tmp_path, "fast-bbbbbbbb", lr=0.3)]
    page = Page(report_of_several(runs))
    assert page.titles == ["Results", "Curves", "What differs", "How to reproduce them"]
    assert "2 runs compared slow, fast: 2 finished." in page.text
    assert "slow finished 90 0.9 at 80" in page.text
    assert "optimizer.lr 0.1 0.3" in page.text
    assert "seed 7" not in page.text  # equal
    assert all(len(lines) == 2 for lines in page.figures.values())
    same = [make(tmp_path / folder, "job-abcdefgh") for folder in ("a", "b")]
    assert "job-abcdefgh" in Page(report_of_several(same)).text


def test_the_end_of_a_training_writes_it_once_and_survives_its_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(tmp_path)
    path = run.path / "report.html"
    write.at_end(run, on_slurm=True)  # this run is not on SLURM
    assert not path.exists()
    write.at_end(run, on_slurm=False)
    assert "2 interruptions survived." in path.read_text()
    path.unlink()

    config = run.config_path.read_text()
    run.config_path.write_text(f"report: false\n{config}")
    write.at_end(run, on_slurm=False)
    run.config_path.write_text(config)
    last = run.attempt_record(2).read_text()
    for other in ('"outcome": "requeue"', '"restarted": true, "outcome": "failed"'):
        run.attempt_record(2).write_text(
            last.replace('"restarted": false, ', "").replace('"outcome": "finished"', other)
        )
        write.at_end(run, on_slurm=False)  # not the end
    run.attempt_record(2).write_text(last)
    assert not path.exists()

    def fail(*arguments: Any, **options: Any) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "report", fail)
        write.at_end(run, on_slurm=False)
    assert "report.html was not written: OSError: [Errno 28] No space left on device" in capsys.readouterr().out

    released = threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(write, "LIMIT_S", 0.05)
        patch.setattr(write, "report", lambda *arguments, **options: str(released.wait(60)))
        write.at_end(run, on_slurm=False)
    assert "was not written within 0.05 s" in capsys.readouterr().out
    released.set()


def test_reading_stops_at_the_deadline_and_says_so(tmp_path: Path) -> None:
    run = make(tmp_path)
    with run.metrics_path.open("a") as file:
        file.writelines(json.dumps({"step": step, "train/loss": 1.0}) + "\n" for step in range(91, 2000))
    page = Page(report(run, deadline=time.monotonic() - 1))
    assert "Reading was stopped at step 256 to end in time; trainer report reads all." in page.text
    assert "Reading was stopped" not in Page(report(run)).text


def test_any_values_of_metrics_are_drawn_or_left_out(tmp_path: Path) -> None:
    """Drawn by seed; a logarithm of what is nearly 0 once cost a section."""
    draw = random.Random(1)
    extremes = [0, -1, 1e-300, 1e299, -1e299, 1e300, 5e-324, "nan", "inf", None, True, "x", [], {}, 10**17]
    names = ["train/loss", "val/loss", "a", "b/", "/", "x/y/z", ""]
    for number in range(12):
        run = make(tmp_path / str(number))
        lines = []
        for at in range(draw.choice([1, 2, 30, 400])):
            step = draw.choice([at, at, at, draw.randrange(-5, 1000), 2**60, "7", None])
            values = {
                draw.choice(names): draw.choice([*extremes, *(draw.gauss(0, 1) for _ in range(8))]) for _ in "1234"
            }
            lines.append(json.dumps({"step": step, **values}))
        run.metrics_path.write_text("\n".join(lines))
        assert "Not in this report" not in Page(report(run)).titles
