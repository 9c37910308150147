"""What a rank imports before it trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TrainerCli
from trainer.core.errors import JOB_FAILED

pytestmark = pytest.mark.executed

_PROBE = """
import gc, inspect, json, os, sys
from importlib.metadata import entry_points
opened, resolved = [], []
sys.addaudithook(lambda event, details: opened.append(str(details[0])) if event == "open" else None)
lstat, getmodule = os.lstat, inspect.getmodule
os.lstat = lambda *given, **named: resolved.append(given) or lstat(*given, **named)
from trainer.runtime.imports import quick_imports
with quick_imports():
    import trainer.train.run
scipy_signal = "scipy.signal" in sys.modules
import scipy.signal
is_whole = scipy.signal.windows.hamming(3).tolist()[1] == 1.0
found = {"resolved": len(resolved), "restored": inspect.getmodule is getmodule, "hydra": "hydra.conf" in sys.modules}
from lightning.fabric.utilities import registry
del opened[:]
found["same"] = registry.entry_points(group="lightning.pytorch.callbacks_factory") == entry_points(
    group="lightning.pytorch.callbacks_factory")
del opened[:]
registry._load_external_callbacks("lightning.pytorch.callbacks_factory")
found["opened"] = len(opened)
print(json.dumps(found))
print(json.dumps([scipy_signal, is_whole, gc.isenabled(), gc.get_freeze_count() > 100_000]))
"""


def test_an_import_takes_no_detours_and_leaves_no_trace() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True)
    found, collected = map(json.loads, done.stdout.splitlines())
    assert collected == [False, True, True, True]
    assert found["resolved"] < 2000  # 22,000 if torch's operators look for their modules by file
    assert found | {"resolved": 0} == {"resolved": 0, "restored": True, "hydra": True, "same": True, "opened": 0}


def test_torchmetrics_still_imports_it() -> None:
    """When this fails, `_import_torchmetrics` of trainer/runtime/imports.py can go."""
    probe = "import sys, torchmetrics; print('scipy.signal' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "True\n"


def test_what_cannot_be_imported_is_not_tried_again(trainer_cli: TrainerCli, workdir: Path) -> None:
    """A file of the user's that is called like a package goes before it."""
    (workdir / "lightning.py").write_text("")
    done = trainer_cli("fit", "debug=fast", "resources.gpus=0")
    assert done.returncode == JOB_FAILED, done.stdout + done.stderr
    assert "No module named 'lightning.pytorch'; 'lightning' is not a package" in done.stdout
    (run,) = (workdir / "runs").iterdir()
    assert [path.name for path in (run / "logs").glob("attempt-*")] == ["attempt-00"]
