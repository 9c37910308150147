"""Lightning's metrics of a training batch, without its wait for the device for each metric of the progress bar.

At every batch Lightning makes a number of each value that was logged with `prog_bar=True`, although a bar shows it only
now and then, and a run without a bar never. Here it becomes a number when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from torch import Tensor


class BarMetrics(dict[str, Any]):
    """`Trainer.progress_bar_metrics`, whose tensors become numbers when they are read."""

    def __getitem__(self, name: str) -> Any:
        """Return the number."""
        value = super().__getitem__(name)
        if isinstance(value, Tensor):
            value = convert_tensors_to_scalars(value)
            self[name] = value
        return value

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names. Overridden, so that `dict(self)` and `{**self}` read by `__getitem__`."""
        return super().__iter__()

    def get(self, name: str, default: Any = None) -> Any:
        """Return the number, or `default`."""
        return self[name] if name in self else default  # noqa: SIM401  that would be this method

    def items(self) -> Any:
        """Return names and numbers."""
        return self._numbers().items()

    def values(self) -> Any:
        """Return the numbers."""
        return self._numbers().values()

    def copy(self) -> dict[str, Any]:
        """Return a plain dict of the numbers."""
        return self._numbers()

    def __eq__(self, other: object) -> bool:
        """Compare the numbers."""
        return self._numbers() == other

    __hash__ = None

    def __repr__(self) -> str:
        """Show the numbers."""
        return repr(self._numbers())

    def _numbers(self) -> dict[str, Any]:
        return {name: self[name] for name in self}


def collect(connector: _LoggerConnector, results: _ResultCollection) -> None:
    """Do what `_LoggerConnector.on_batch_end` does with the `results` of a training batch."""
    bar = connector._progress_bar_metrics
    if not isinstance(bar, BarMetrics):
        connector._progress_bar_metrics = bar = BarMetrics(bar)
    callback_metrics, logged = connector._callback_metrics, connector._logged_metrics
    for _, metric in results.valid_items():
        value = results._get_cache(metric, True)
        if not isinstance(value, Tensor):
            continue
        name, forked_name = results._forked_name(metric, True)
        if metric.meta.logger:
            logged[forked_name] = value
        callback_metrics[name] = value
        callback_metrics[forked_name] = value
        if metric.meta.prog_bar:
            bar[forked_name] = value
    results.batch = None
    results.batch_size = None
