"""Tell whether a run has ended for good, and seal it when its end is recorded."""

from __future__ import annotations

import socket
from collections.abc import Mapping

from trainer.core import records
from trainer.core.errors import TrainerError
from trainer.runs import seal
from trainer.runs.directory import RunDirectory
from trainer.runs.facts import flat_config
from trainer.runs.state import State, ended_state
from trainer.runs.summary import summary_in_state

READER_WAITS_NS = 5 * 10**9
"""A reader seals what nobody has changed for this long."""
DEAD_WAITS_NS = 60 * 10**9
"""The delay for a run without a recorded outcome: the process that killed it may still record one."""


def is_over(run: RunDirectory) -> bool:
    """Return whether the newest attempt of the last launch recorded an end after which the job does not run again."""
    ends = [end for end in run.attempts() if end.attempt >= run.launch().attempt]
    return bool(ends) and ends[-1].outcome in ("finished", "stopped") and not ends[-1].restarted


def waits_ns_of(run: RunDirectory, state: State, jobs: Mapping[str, str] | None) -> int | None:
    """Return for how long a run must be unchanged before a reader seals it; None if its state may change by itself.

    Args:
        run: The run.
        state: Its state.
        jobs: The states of SLURM jobs, as `runs.state.state_of` takes them.
    """
    launch = run.launch()
    if state.is_active or not launch.was_made:
        return None
    if launch.slurm_job_id and not is_over(run) and jobs is None:
        return None
    if state.name != "dead":
        return READER_WAITS_NS
    # On another host only the heartbeats tell, which may come again.
    is_known = launch.host == socket.gethostname() or launch.slurm_job_id is not None
    return DEAD_WAITS_NS if is_known else None


def seal_ended(run: RunDirectory) -> bool:
    """Seal a run whose end has just been recorded, by the process that ends last. Returns whether it was sealed.

    A reader seals what this cannot: a run without an outcome, or with a record that is damaged.
    """
    try:
        sources, skips = seal.signatures(run), records.skips
        launch = run.launch()
        state = ended_state(run, launch)
        if state.name == "dead" or run.attempts()[-1].outcome == "requeue":
            return False
        config = run.config()
        facts = summary_in_state(run, state, config)
        flat = flat_config(run, config, run.manifest())
        return records.skips == skips and seal.write(run, seal.summary_of(run, facts, flat, sources, is_over(run)))
    except (TrainerError, OSError):
        return False
