"""Relay between the run directory and the ranks of one of several nodes: heartbeats, requests, traces.

Every file that all nodes share costs the file server a request each time it is read. So the node process writes the
heartbeats of its ranks as one file, only the first node reads those of the others, and the ranks look for requests in a
folder of their node (`runs/node_folder.py`). The interval grows with the number of nodes, so that the requests per
second of the whole job stay bounded (docs/scale.md).
"""

from __future__ import annotations

import contextlib

from trainer.runs.directory import RunDirectory
from trainer.runs.node_folder import NodeFolder

SHORTEST_S = 0.5
"""Seconds between two looks at the run directory in a job on two nodes or some more."""
NODES_PER_S = 128
"""Nodes whose files the first one reads in a second, at most."""


def interval_s(nodes: int) -> float:
    """Return the seconds between two looks of a node process at the run directory; 0: as often as at its processes."""
    return 0.0 if nodes == 1 else max(SHORTEST_S, nodes / NODES_PER_S)


class Relay:
    """One node's part in it.

    Args:
        run: The run.
        folder: The folder of this node.
        node: Number of this node.
        attempt: The attempt that begins.
    """

    def __init__(self, run: RunDirectory, folder: NodeFolder, node: int, attempt: int) -> None:
        self._run, self._folder, self._node = run, folder, node
        run.live.keep(attempt, node=node)

    def publish(self) -> None:
        """Write the heartbeats of this node's ranks. An error of the file system must not end the training."""
        beats = self._folder.heartbeats()
        if beats:
            with contextlib.suppress(OSError):
                self._run.live.write_node(self._node, beats)

    def request_stop(self) -> None:
        """Ask the ranks of this node to save and stop."""
        self._folder.stop_request.touch()
