"""What a tracking server already has from earlier attempts: no step of a metric is sent twice, and none is left out.

A server that only appends cannot be rewound. A resume repeats the steps after its checkpoint exactly, so their values
are those that the server has. What a killed attempt logged without sending it is in `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.core.files import open_regular, parse_json
from trainer.runs.metrics_lines import OWN_NAMES
from trainer.tracking.metrics_file import APART

_LONGEST_LINE = 1 << 22


class SentSteps:
    """The last step of each metric that the server had when this attempt began.

    Args:
        last: Name to step.
    """

    def __init__(self, last: Mapping[str, int]) -> None:
        self._last = dict(last)

    def new(self, metrics: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Return the metrics that the server does not have at this step."""
        return {name: value for name, value in metrics.items() if step > self._last.get(name, -1)}

    def missing(self, path: Path, until: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the step and the metrics of each line of `metrics.jsonl` up to `until` that the server lacks.

        They count as sent once the next one is asked for. Only metrics whose last step on the server is that of a line:
        others were logged with a step of their own, which the file does not have.
        """
        on_axis = {name for step, metrics in _lines(path) for name in metrics if self._last.get(name) == step}
        for step, metrics in _lines(path):
            new = self.new({name: metrics[name] for name in metrics.keys() & on_axis}, step) if step <= until else {}
            if new and new.keys() != {"epoch"}:
                yield step, new
                self._last.update(dict.fromkeys(new, step))


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the lines as they were logged: with their own names, NaN as a number, and the epoch as a metric."""
    try:
        file = open_regular(path)
    except OSError:
        return
    with file:
        while text := file.readline(_LONGEST_LINE):
            try:
                line = parse_json(text.decode())
                step, epoch = int(line["step"]), line.get("epoch")
                metrics = {name.removeprefix(APART): float(line[name]) for name in line if name not in OWN_NAMES}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if f"{APART}step" in line:  # `self.log("step", x)`: the loggers got x as the step
                continue
            yield step, {**metrics, **({"epoch": epoch} if epoch is not None else {})}
