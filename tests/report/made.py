"""A run directory with everything that a report shows, and a parser that holds the page to what it may contain."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import yaml

from tests.runs.test_bill import NOVEMBER_ENDS, PRICES, usage
from trainer.config.shape import LaunchShape
from trainer.core.records import dumps
from trainer.runs import events
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome, BestCheckpoint, HeartbeatRecord, Launch

BEGAN = NOVEMBER_ENDS - 7200
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "footer", "section", "div", "p", "span", "b"),
    *("h1", "h2", "h3", "dl", "dt", "dd", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code", "pre"),
    *("small", "figure", "figcaption", "details", "summary", "svg", "line", "path", "rect", "circle", "text"),
}


def make(folder: Path, name: str = "job-abcdefgh", *, lr: float = 0.1, hostile: str = "") -> RunDirectory:
    """A run on two GPUs, killed twice, whose third attempt has finished. `hostile` is in each text of its files."""
    run = RunDirectory(folder / name)
    for inside in (run.live_dir, run.logs_dir, run.attempts_dir, run.checkpoints_dir, run.path / "evaluations"):
        inside.mkdir(parents=True)
    config = {
        "name": name.rpartition("-")[0],
        "seed": 7,
        "trainer": {"max_steps": 90, "precision": "auto"},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr},
        "strategy": {"name": f"ddp{hostile}"},
        "cluster": {"name": "local", **PRICES},
        "tracking": {"name": "none", "notes": f"a note{hostile}"},
    }
    run.config_path.write_text(yaml.safe_dump(config, sort_keys=False))
    run.overrides_path.write_text(f"optimizer.lr={lr} 'tracking.notes=a note{hostile}'\n")
    manifest = {
        "choices": {"model": "mlp", "data": "digits", "optimizer": "adamw", "tracking": f"none{hostile}"},
        "host": f"login{hostile}",
        "user": "anna",
        "python": "3.11.7",
        "installed": {"versions": {"torch": "2.13.0", f"mine{hostile}": "1"}},
        "code": {"commit": "c0ffee", "dirty": True},
    }
    run.manifest_path.write_text(json.dumps(manifest))
    run.write_launch(Launch(cluster="local", shape=LaunchShape(1, 2, "cuda"), host="elsewhere", pid=1))
    run.add_event(events.Created(time=BEGAN))
    for attempt, (step, second) in enumerate(((0, 0), (20, 1000), (50, 2000))):
        run.add_event(events.Started(time=BEGAN + second, attempt=attempt, step=step, world_size=2))
        run.write_usage(usage(attempt, devices=2, measured=2, began=BEGAN + second, seconds=900.0))
        beat = HeartbeatRecord(
            attempt=attempt,
            began=BEGAN + second + 100,
            phase="finished" if attempt == 2 else "train",
            spent={"import": 100.0, "train": 700.0},
            first_step=step,
            step=step + 30 + 10 * (attempt == 2),
            host=f"node1{hostile}",
            device=f"cuda:0, NVIDIA H200{hostile}",
            best=BestCheckpoint(metric="val/acc", mode="max", value=0.9, step=80),
        )
        name = "rank-0.json" if attempt == 2 else f"attempt-{attempt:02d}-rank-0.json"
        (run.live_dir / name).write_text(dumps(beat))
        died = {"outcome": "failed", "restarted": True, "reason": f"rank 1 was killed by SIGKILL{hostile}"}
        ended = {"outcome": "finished"} if attempt == 2 else died
        run.write_outcome(AttemptOutcome(attempt=attempt, step=beat.step, **ended))
    run.add_event(events.NodeLost(time=BEGAN, node=f"node1{hostile}", reason=f"NOT_RESPONDING{hostile}"))
    with run.metrics_path.open("w") as file:
        for step in range(1, 91):
            line = {"step": step, "epoch": 0, "time": BEGAN + step, "train/loss": 100 / step, f"mine{hostile}": step}
            if step % 10 == 0:
                line |= {"val/loss": 110 / step, "val/acc": step / 100}
            file.write(json.dumps(line) + "\n")
    measured = {"step": 80, "split": f"test{hostile}", "metrics": {f"test/acc{hostile}": 0.88}}
    (run.path / "evaluations" / "step-00000080-test.json").write_text(json.dumps(measured))
    return run


class Page(HTMLParser):
    """What a browser reads: tags, attributes, text by section, and the curves."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.words: list[str] = []
        self.paths: list[str] = []
        self.titles: list[str] = []
        self.figures: dict[str, list[str]] = {}
        """Caption of each chart to the paths of its lines."""
        self.html = html
        self.feed(html)
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        assert not {
            name for name, _ in attrs if name.startswith("on") or name in ("href", "src", "style", "xlink:href")
        }
        if tag != "meta":
            self.open.append(tag)
        values = dict(attrs)
        if tag == "path" and str(values.get("class")).startswith("line") and values.get("d") != "M0 5H22":
            self.figures[next(reversed(self.figures))].append(str(values["d"]))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "style":
            return
        self.words.append(data)
        if inside == "h2":
            self.titles.append(data)
        if inside == "b" and "figcaption" in self.open:
            self.figures[data] = []


def points(path: str) -> list[tuple[float, float]]:
    """The pixels of a path."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]
