"""Export a sweep to a storage of Optuna, for optuna-dashboard and Optuna's own plots. It is written, never read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from trainer.core.errors import EnvironmentFault, UserError
from trainer.sweeps.adaptive import load, trial_of
from trainer.sweeps.advance import directions, past_of
from trainer.sweeps.directory import SweepDirectory
from trainer.sweeps.progress import TrialView
from trainer.sweeps.records import Spec


def write_storage(sweep: SweepDirectory, spec: Spec, found: Sequence[TrialView], path: Path) -> None:
    """Write an SQLite file with every trial, aside, and rename it into place.

    Raises:
        UserError: The name would be read as another address.
        EnvironmentFault: Optuna is not installed, or the file cannot be written.
    """
    optuna = load()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if any(character in str(path) for character in "?#%"):
        raise UserError(f"{path}: SQLite takes ?, # and % for something else", "use another name")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        storage = optuna.storages.RDBStorage(f"sqlite:///{temporary}")
        study = optuna.create_study(
            storage=storage, study_name=sweep.path.name, directions=directions(spec, found), sampler=None
        )
        study.add_trials([trial_of(spec, past_of(sweep, spec, view)) for view in found])
        storage.engine.dispose()
        os.replace(temporary, path)
    except OSError as error:
        raise EnvironmentFault(f"{path}: {error.strerror}", "name another file: --output FILE") from None
    finally:
        temporary.unlink(missing_ok=True)
