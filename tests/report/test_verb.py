"""`trainer report`: the files that it writes, the PDF, and what it refuses."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from tests.dashboard.fake_runs import make_run, make_sweep
from tests.report.made import Page, make
from trainer.cli.report import main
from trainer.core.errors import EnvironmentFault, UserError
from trainer.report import pdf


@pytest.fixture
def runs(workdir: Path) -> list[str]:
    for name in ("slow-aaaaaaaa", "fast-bbbbbbbb"):
        make(workdir / "runs", name)
    return ["aaaaaaaa", "bbbbbbbb"]


def test_one_run_and_several(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(runs[:1]) == 0
    assert capsys.readouterr().out == "runs/slow-aaaaaaaa/report.html\n"
    assert "slow aaaaaaaa finished" in Page(Path("runs/slow-aaaaaaaa/report.html").read_text()).text
    assert main([*runs, runs[0], "--json"]) == 0  # a run that is named twice is one run
    files = json.loads(capsys.readouterr().out)["files"]
    assert files == [str(Path.cwd() / "report-aaaaaaaa-bbbbbbbb.html")]
    assert "2 runs compared" in Page(Path(files[0]).read_text()).text


def test_a_sweep(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "runs").mkdir()
    sweep = make_sweep(workdir / "runs", [make_run(workdir / "runs", f"trial{number}").path for number in range(8)])
    assert main(["--sweep", sweep.id]) == 0
    assert capsys.readouterr().out == f"sweeps/{sweep.path.name}/report.html\n"
    html = (sweep.path / "report.html").read_text()
    text = Page(html).text
    assert "10 trials of 10 by random: 8 finished, 2 " in text
    assert "Best val/acc 0.87 in trial 7." in text
    assert "Importance parameter explains" in text
    assert html.count("<title>trial ") == 8  # a line of each in the parallel coordinates
    assert text.index("trial 7: val/acc 0.87") > text.index("trial 0: val/acc 0.8")  # the best is drawn last
    assert "Parallel coordinates of 8 trials over optimizer.lr, +model.depth and val/acc." in html
    rows = text.partition("trial state val/acc step optimizer.lr +model.depth run")[2]
    assert rows.split()[:3] == ["7", "finished", "0.87"]
    with pytest.raises(UserError, match="a sweep, not runs"):
        main(["--sweep", sweep.id, "aaaaaaaa"])


def test_what_it_refuses(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="not the name of an HTML file"):
        main(["-o", "report.txt"])
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        main([*runs, "-o", "nowhere/report.html"])
    with pytest.raises(UserError, match="there is no run"):
        main(["cccccccc"])
    monkeypatch.setattr(pdf, "BROWSERS", ("no-such-browser",))
    with pytest.raises(EnvironmentFault) as refused:
        main([runs[0], "--pdf"])
    assert "apt-get install chromium" in str(refused.value)
    assert not Path("runs/slow-aaaaaaaa/report.html").exists()


def test_a_browser_that_fails_or_hangs_is_an_error(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for script, message in (("echo no display >&2; exit 1", "no display"), ("sleep 600", "no end after 0.3 s")):
        Path("browser").write_text(f"#!/bin/sh\n{script}\n")
        Path("browser").chmod(0o700)
        with pytest.raises(EnvironmentFault, match=message):
            pdf.print_pdf("<p>", Path("page.pdf"), "./browser", timeout_s=0.3 if "sleep" in script else 60)


browser = next((name for name in pdf.BROWSERS if shutil.which(name)), None)


@pytest.mark.skipif(browser is None, reason="no Chromium")
def test_the_pdf_has_the_text_and_asks_nobody(runs: list[str]) -> None:
    assert main([runs[0], "--pdf", "-o", "report.html"]) == 0
    printed = Path("report.pdf")
    assert printed.read_bytes().startswith(b"%PDF")
    assert stat.S_IMODE(printed.stat().st_mode) == 0o600
    if shutil.which("pdftotext"):
        text = subprocess.run(["pdftotext", printed, "-"], capture_output=True, text=True, check=True).stdout
        assert "Time, energy and cost" in text
        assert "trainer repro slow-aaaaaaaa" in text
