"""What a rank does before it imports anything heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("options", [(), *([("-P",)] if sys.version_info >= (3, 11) else [])])
def test_the_working_directory_does_not_hide_the_frozen_code(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "mine.py").write_text("")
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "rank.py").write_text(
        "from trainer.runtime.process import frozen_code_first\n"
        "frozen_code_first()\nimport mine\nprint(mine.__file__)\n"
    )
    found = os.pathsep.join([str(tmp_path / "frozen"), str(tmp_path), str(Path(__file__).parents[2])])
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, *options, "-m", "rank"],
        cwd=tmp_path,
        env={**variables, "PYTHONPATH": found},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.stdout.strip(), done.stderr) == (str(tmp_path / "frozen" / "mine.py"), "")
