"""The store over which the ranks of a job find each other, in place of torch's server on every interface."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import FileStore, PrefixStore, Store, TCPStore

from trainer.runtime.process import STORE_VARIABLE, Rank

_opened = 0
"""Process groups that were initialized in this process, so that a later one does not read the keys of an earlier."""


def use_private_store() -> None:
    """Make `env://`, torch's default for a process group, use the store that the node process has named.

    It is replaced rather than named in our call of `init_process_group`, because Lightning, DeepSpeed and users'
    modules initialize groups as well. Does nothing in a rank that was started in another way.
    """
    if os.environ.get(STORE_VARIABLE):
        # `torch.distributed.rendezvous` is a function as well. The table is not public; torch 2.11 to 2.13 have it, and
        # `register_rendezvous_handler` refuses a name that is taken.
        sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers["env"] = _rendezvous


def _rendezvous(url: str, timeout: timedelta = timedelta(minutes=5), **_: Any) -> Iterator[tuple[Store, int, int]]:
    """Yield the store, the rank and the number of ranks, as torch's handlers do."""
    global _opened
    rank = Rank.from_environment()
    store = _open(os.environ[STORE_VARIABLE], rank, timeout)
    _opened += 1
    yield PrefixStore(str(_opened), store), rank.rank, rank.world_size
    raise RuntimeError("a process group cannot meet again with the same store")


def _open(where: str, rank: Rank, timeout: timedelta) -> Store:
    kind, _, value = where.partition(":")
    if kind == "file":  # each attempt has its own: the addresses of dead ranks are of no use
        return FileStore(str(Path(value) / f"ranks-{rank.attempt}"))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(f"{value}/ranks", TCPStore(address, port, timeout=timeout))
