"""What a job needs on this machine beside Python packages."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.config.combinations import problems_of_packages
from trainer.config.compose import compose

NVME = "strategy.offload_optimizer=nvme"


@pytest.mark.parametrize(
    ("compiler", "expected"),
    [
        ('#!/bin/sh\ngrep -q io_pgetevents && echo "$*" > $FOLDER/seen\n', []),
        (
            "#!/bin/sh\necho 'fatal error: libaio.h: No such file or directory' >&2\nexit 1\n",
            ["strategy.offload_optimizer=nvme needs libaio, its headers and a C compiler"],
        ),
        (None, ["strategy.offload_optimizer=nvme needs libaio, its headers and a C compiler"]),
    ],
    ids=["builds", "only the library, no headers", "no compiler"],
)
def test_offload_to_nvme_needs_what_deepspeed_builds_its_operator_with(
    compiler: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if compiler is not None:
        (tmp_path / "my-cc").write_text(compiler.replace("$FOLDER", str(tmp_path)))
        (tmp_path / "my-cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CC", "my-cc -m64")
    monkeypatch.setenv("LDFLAGS", "-L/opt/aio/lib")
    config = compose(["experiment=quickstart", "strategy=deepspeed_zero3", NVME], config_dirs=[]).config
    assert [problem.message for problem in problems_of_packages(config)] == expected
    if not expected:
        assert (tmp_path / "seen").read_text().split()[0] == "-m64"
        assert (tmp_path / "seen").read_text().split()[-2:] == ["-L/opt/aio/lib", "-laio"]
