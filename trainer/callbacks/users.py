"""The callbacks of the section `callbacks`, as they are; progress bars stay silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from trainer.callbacks.stopping import StopsByLoss
from trainer.config.combinations import callback_class
from trainer.config.instantiate import instantiate


def build(section: Mapping[str, Any]) -> list[Callback]:
    """Call each node of `section`; null switches one off.

    A progress bar draws on a terminal, and a rank writes a log file: a line an update, megabytes a day. So it counts
    and gives its metrics (`trainer.progress_bar_metrics`), and draws nothing; `trainer logs -f` shows the progress.
    Lightning's EarlyStopping may be without a `monitor` here.
    """
    callbacks = [_made(name, node) for name, node in section.items() if node]
    for callback in callbacks:
        if isinstance(callback, (TQDMProgressBar, RichProgressBar)):
            callback._refresh_rate = 0  # as refresh_rate=0, which RichProgressBar takes, too
    return callbacks


def _made(name: str, node: Mapping[str, Any]) -> Callback:
    if callback_class(node) == "EarlyStopping" and node.get("monitor") is None:
        node = {**node, "_target_": f"{StopsByLoss.__module__}.{StopsByLoss.__name__}", "name": name}
        node.pop("monitor", None)
    return instantiate(dict(node), where=f"callbacks.{name}")  # type: ignore[no-any-return]
