"""The settings that docs/gpu.md recommends are jobs that pass every check, with the language models that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documentation import ROOT
from trainer.checks.config import check
from trainer.cli.initial import settle_micro_batch
from trainer.config.cluster import CLUSTERS
from trainer.config.compose import compose
from trainer.config.schema import CheckpointOptions, ResilienceOptions, Resources, TrainerOptions
from trainer.config.strategy import STRATEGIES

PAGE = (ROOT / "docs" / "gpu.md").read_text()
ROWS = re.findall(r"^\| ([^|]+) \| `(resources[^`]+|cluster[^`]+)` \|", PAGE, re.MULTILINE)
JOB = ["model=llama3_8b", "data=token_shards", "data.root=tokens", "data.batch_size=1024", "model.vocab_size=128256"]


def test_the_page_has_a_row_for_each_situation() -> None:
    assert len(ROWS) >= 6


@pytest.mark.parametrize(("situation", "overrides"), ROWS)
def test_the_recommended_settings_are_a_valid_job(
    situation: str, overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster, because this machine may have no GPU."""
    (tmp_path / "tokens").mkdir()
    monkeypatch.chdir(tmp_path)
    composed = compose(["cluster=slurm", *JOB, *overrides.split()], config_dirs=[], cwd=tmp_path)
    settle_micro_batch(composed.config)
    check(composed.config, tmp_path, fits=False)


def test_each_option_that_the_page_names_exists() -> None:
    classes = {
        "trainer": [TrainerOptions],
        "resources": [Resources],
        "checkpoint": [CheckpointOptions],
        "resilience": [ResilienceOptions],
        "strategy": list(STRATEGIES.values()),
        "cluster": list(CLUSTERS.values()),
    }
    named = set(re.findall(rf"\b({'|'.join(classes)})\.([a-z][a-z_0-9]*)", PAGE))
    assert len(named) >= 15
    unknown = [f"{section}.{key}" for section, key in named if not any(hasattr(one, key) for one in classes[section])]
    assert unknown == []
