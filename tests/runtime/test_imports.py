"""What a rank imports before it trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import TrainerCli
from trainer.core.errors import JOB_FAILED

_PROBE = """
import gc, json, sys
from trainer.runtime.imports import quick_imports
with quick_imports():
    import trainer.train.run
scipy_signal = "scipy.signal" in sys.modules
import scipy.signal
is_whole = scipy.signal.windows.hamming(3).tolist()[1] == 1.0
print(json.dumps([scipy_signal, is_whole, gc.isenabled(), gc.get_freeze_count() > 100_000]))
"""


def test_scipy_is_left_for_those_who_use_it_and_garbage_is_collected_again() -> None:
    done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [False, True, True, True]


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
