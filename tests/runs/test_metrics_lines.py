"""What a resume keeps of `metrics.jsonl`, whatever state a crash has left it in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.runs.metrics_lines import lines_after, rewind


def line(step: int, time: float = 0.0) -> str:
    return json.dumps({"step": step, "time": time, "loss": step / 2})


@pytest.mark.parametrize(
    ("text", "kept", "dropped"),
    [
        ("", [], 0),
        (f"{line(1)}\n{line(2)}\n{line(3)}\n", [1, 2], 1),
        (f"{line(1)}\n{line(2)}\n{line(3)[:-4]}", [1, 2], 1),
        (f"{line(1)}\n{line(2)}", [1, 2], 0),  # whole but for its end: another line would be appended to it
        (f"{line(1)}\n\nnonsense\n[1]\n{line(2)}\n", [1, 2], 3),
        (f'{{"step": 1}}\n{{"step": "x", "time": 0}}\n{line(2)}\n', [2], 2),
        (f"{line(3)}\n{line(1)}\n", [1], 1),
    ],
)
def test_the_next_line_is_one_of_its_own(tmp_path: Path, text: str, kept: list[int], dropped: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    assert rewind(path, 2).dropped == dropped
    with path.open("a") as file:
        file.write(line(9) + "\n")
    assert [json.loads(one)["step"] for one in path.read_text().splitlines()] == [*kept, 9]
    assert [one["step"] for one in lines_after(path, 1)] == [step for step in [*kept, 9] if step > 1]


def test_lines_of_the_last_seconds_may_not_have_been_sent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{line(step, time)}\n" for step, time in ((1, 90.0), (2, 95.1), (3, 99.0), (4, 100.0))))
    assert [one["step"] for one in rewind(path, 3).recent] == [2, 3]  # 5 s before the last line, which is dropped
    assert lines_after(tmp_path / "missing", 0) == []
