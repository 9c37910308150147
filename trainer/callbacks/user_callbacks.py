"""Builds the callbacks of the section `callbacks`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from trainer.callbacks.early_stopping import LossEarlyStopping
from trainer.config.combinations import callback_class
from trainer.config.instantiate import instantiate


def build(section: Mapping[str, Any]) -> list[Callback]:
    """Instantiate each node of `section`; null switches a callback off.

    Progress bars draw nothing: in a rank's log file each update would be a line, megabytes a day. They still count and
    provide their metrics (`trainer.progress_bar_metrics`); `trainer logs -f` shows the progress. EarlyStopping may
    have no `monitor` here.
    """
    callbacks = [_build_one(name, node) for name, node in section.items() if node]
    for callback in callbacks:
        if isinstance(callback, (TQDMProgressBar, RichProgressBar)):
            callback._refresh_rate = 0  # like refresh_rate=0, but works for RichProgressBar, too
    return callbacks


def _build_one(name: str, node: Mapping[str, Any]) -> Callback:
    if callback_class(node) == "EarlyStopping" and node.get("monitor") is None:
        node = {**node, "_target_": f"{LossEarlyStopping.__module__}.{LossEarlyStopping.__name__}", "name": name}
        node.pop("monitor", None)
    return instantiate(dict(node), where=f"callbacks.{name}")  # type: ignore[no-any-return]
