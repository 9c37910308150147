"""Variables with which the process of a node is started: `supervise/node.py` reads them."""

from __future__ import annotations

FOLLOWER_VARIABLE = "TRAINER_FOLLOWER"
"""Process id of the command whose end also ends this node process; unset if it is independent."""
RENDEZVOUS_VARIABLE = "TRAINER_RENDEZVOUS"
"""Name of the first node."""
PEERS_VARIABLE = "TRAINER_PEERS"
"""Names of the nodes of this attempt, separated by commas."""
THEN_VARIABLE = "TRAINER_NODE_THEN"
"""JSON list of a command that replaces this process once it is done: the next trial of a sweep."""
NODES_VARIABLE = "TRAINER_NODES"
"""Number of nodes of this attempt; fewer than requested if `resources.min_nodes` allows it."""
