"""What W&B's client sees of the output is masked: its console log is uploaded."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.conftest import clean_environment

CODE = """
import io, json, sys
from trainer.core.secrets import MaskedStream

buffer = io.StringIO()
before, sys.stdout = sys.stdout, MaskedStream(buffer)
from wandb.sdk.lib import console_capture

seen = []
console_capture.capture_stdout(lambda data, written: seen.append(data))
print("the token is", "correct-horse-battery", flush=True)
sys.stdout.writelines(["again correct-horse-battery"])
before.write(json.dumps([buffer.getvalue(), "".join(seen)]))
"""


def test_secrets_are_masked_before_wandb_sees_them() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**clean_environment(), "MY_TOKEN": "correct-horse-battery"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    written, seen = json.loads(done.stdout)
    assert written == seen == "the token is ***\nagain ***"
