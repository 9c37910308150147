"""What is logged reaches a server that fails for a while, once and in order; nothing waits for it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from trainer.tracking import sender
from trainer.tracking.sender import Sender
from trainer.tracking.sent import SentSteps


class Server:
    """Takes calls while `is_up`; refuses the odd ones for good."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.asked = 0
        self.is_up = threading.Event()

    def take(self, number: int) -> None:
        self.asked += 1
        if number % 2:
            raise ValueError(f"\x1b[31m{number} is odd")
        if not self.is_up.is_set():
            raise ConnectionError("no route to host")
        self.taken.append(number)


def test_an_outage_delays_and_a_refusal_drops(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sender, "PAUSE_S", 0.01)
    server = Server()
    queue = Sender("mlflow", lambda error: isinstance(error, ValueError), 20.0)
    for number in (2, 3, 4):
        queue.put(lambda number=number: server.take(number))  # type: ignore[misc]
    while server.asked < 3:
        threading.Event().wait(0.01)
    assert server.taken == []
    server.is_up.set()
    assert queue.close() == 0
    assert server.taken == [2, 4]
    queue.put(lambda: server.take(6))  # the run ends a logger that Lightning has ended before
    assert queue.close() == 0
    assert server.taken == [2, 4, 6]
    said = capfd.readouterr().out
    assert said.count("no route to host") == 1
    assert "refused: \\x1b[31m3 is odd" in said or "refused: 3 is odd" in said
    assert "\x1b" not in said


def test_a_dead_server_does_not_keep_the_end_waiting(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server()
    queue = Sender("mlflow", lambda error: False, 0.2)
    queue.put(lambda: server.take(2))
    assert queue.close() == 1
    assert queue.close() == 1
    assert "did not take the last 1 of what was logged" in capfd.readouterr().out


def test_only_what_a_server_lacks_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "epoch": 0, "time": 1.0, "loss": 1.5},
        {"step": 2, "epoch": 0, "time": 2.0, "loss": "nan", "logged/time": 0.5, "by_samples": 1.0},
        {"step": 3, "epoch": 0, "time": 3.0, "loss": 0.5},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    lines[0]["logged/time"] = 0.25
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    sent = SentSteps({"loss": 1, "epoch": 1, "time": 1, "by_samples": 1000})
    ((step, metrics),) = list(sent.missing(path, 2))
    assert "by_samples" not in metrics
    assert (step, metrics["time"], metrics["epoch"], metrics["loss"] != metrics["loss"]) == (2, 0.5, 0, True)
    assert sent.new({"loss": 1.0, "new": 2.0}, 2) == {"new": 2.0}
    assert sent.new({"loss": 1.0}, 3) == {"loss": 1.0}
