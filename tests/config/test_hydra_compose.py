"""Config trees composed by Hydra's compose API and by this project have the same values at the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra import compose as hydras_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from trainer.config.compose import compose, points
from trainer.core.errors import UserError
from trainer.core.paths import conf_dir

TARGET = "_target_: trainer.models.mlp.MLP\n"
FILES = {
    "config.yaml": """
defaults:
  - data: digits
  - model: own
  - optimizer: adamw
  - paths: default
  - nets@extra.net: small
  - optional absent: nothing
  - _self_
  - optional experiment: null
task_name: train
tags: [dev, one]
width: 3
model: {dropout: 0.25}
nested: {a: {b: 1, c: [1, 2]}, d: null}
""",
    "first.yaml": "defaults: [config, _self_]\nwidth: 4\nname: first\n",
    "self_first.yaml": "defaults: [_self_, model: own, data: digits]\nmodel: {hidden: [1], dropout: 0.5}\n",
    "self_last.yaml": "defaults: [model: own, data: digits, _self_]\nmodel: {hidden: [1], dropout: 0.5}\n",
    "by_data.yaml": "defaults: [data: digits, model: own, nets@model.net: '${data}_net']\n",
    "model/own.yaml": TARGET + "hidden: [7, 8]\ndropout: 0.1\n",
    "model/with_net.yaml": "defaults: [own, /nets@net: small, /nets@nets.second: large, _self_]\nsize: 9\n",
    "model/here.yaml": "defaults:\n  - /nets/small@_here_\n  - own\nmore: 1\n",
    "model/global_net.yaml": "defaults:\n  - /nets@_global_.anywhere: large\n  - own\n",
    "paths/default.yaml": "root: ${oc.env:HOME}\nlogs: ${paths.root}/logs\n",
    "paths/cluster.yaml": "defaults: [default]\nroot: /scratch\n",
    "nets/small.yaml": "_target_: torch.nn.Linear\nin_features: ${width}\nout_features: 2\n",
    "nets/large.yaml": "_target_: torch.nn.Linear\nin_features: 30\nout_features: 20\n",
    "nets/digits_net.yaml": "_target_: torch.nn.ReLU\n",
    "packaged/deep.yaml": "# @package model.inner\nx: 1\ny: ${model.inner.x}\n",
    "packaged/group.yaml": "# @package _group_\nx: 2\n",
    "packaged/global.yaml": "# @package _global_\nwidth: 5\nmodel: {dropout: 0.75}\n",
    "experiment/all.yaml": """
# @package _global_
defaults:
  - /packaged: deep
  - override /model: with_net
  - override /paths: cluster
  - override /nets@extra.net: large
tags: ${merge_not}
nested: {a: {c: [3]}, e: {f: 1}}
merge_not: [only, this]
""",
    "experiment/inherits.yaml": "# @package _global_\ndefaults: [all, _self_]\nnested: {a: {b: 5}}\nwidth: 6\n",
}

CASES: dict[str, list[str]] = {
    "the defaults": [],
    "another primary config": ["--first"],
    "_self_ first": ["--self_first"],
    "_self_ last": ["--self_last"],
    "an option that names another": ["--by_data"],
    "an own group": ["paths=cluster"],
    "a group at a package": ["nets@extra.net=large"],
    "a new group at a package": ["+nets@model.head=large"],
    "a group in two places": ["+nets@one=small", "+nets@two=large"],
    "groups inside a group": ["model=with_net"],
    "a group here": ["model=here"],
    "a group at a package from the root": ["model=global_net"],
    "@package with a path": ["+packaged=deep"],
    "@package _group_": ["+packaged=group"],
    "@package _global_": ["+packaged=global"],
    "two options of a group": ["+packaged=[deep,global]"],
    "an experiment that overrides": ["experiment=all"],
    "an experiment on an experiment": ["experiment=inherits", "model=own"],
    "a group away": ["~paths"],
    "values": ["width=9", "task_name=test", "tags=[a,b,c]", "nested.a.c=[]", "model.hidden=[1,2,3]"],
    "values in mappings": ["nested.a={b:2}", "nested.d=5", "extra.net.in_features=1"],
    "new keys": ["+mine=1", "+mine2={a:[1,{b:2}]}", "++width=2", "+nested.a.z=1", "++nested.q.r=2"],
    "keys away": ["~nested.a.b", "~tags", "~model.dropout=0.25"],
    "quotes and interpolations": ["task_name='a b'", "+x=${width}", '+y="${task_name}_x"'],
    "casts and functions": ["width=float(3)", "+t=str(1)"],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, text in FILES.items():
        path = folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.lstrip())
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_tree_equals_the_one_of_hydra(project: Path, name: str) -> None:
    configs = [one[2:] for one in CASES[name] if one.startswith("--")] or ["config"]
    overrides = [one for one in CASES[name] if not one.startswith("--")]
    with initialize_config_dir(str(project / "conf"), version_base="1.3"):
        # Hydra resolves relative defaults in the first directory, even with hydra.searchpath on the command line.
        searched = f"hydra.searchpath=[file://{conf_dir()}]"
        expected = OmegaConf.to_container(hydras_compose(configs[0], [*overrides, searched]))
    job = compose(overrides, config_dirs=[], config_name=configs[0], cwd=project)
    actual: Any = OmegaConf.to_container(job.job)
    assert isinstance(expected, dict)
    assert {key: actual.get(key, "absent") for key in expected} == expected
    added = set(actual) - set(expected)
    shipped = {
        "name",
        "runs_dir",
        "task",
        "scheduler",
        "strategy",
        "cluster",
        "checkpoint",
        "tracking",
        "notify",
        "callbacks",
    }
    assert added <= shipped | {"optimizer"}, added


def test_the_frozen_configuration_has_user_keys_resolved(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = compose(["experiment=all", "width=11"], config_dirs=[], cwd=project).config
    assert config["paths"] == {"root": "/scratch", "logs": "/scratch/logs"}
    assert (config["width"], config["tags"], config["task_name"]) == (11, ["only", "this"], "train")
    assert config["model"]["net"]["in_features"] == 11
    assert list(config).index("trainer") < list(config).index("task_name")


def test_shipped_groups_are_added_to_a_users_primary_config(project: Path) -> None:
    job = compose(["strategy=fsdp", "scheduler=constant"], config_dirs=[], cwd=project)
    assert (job.config["strategy"]["name"], job.choices["scheduler"]) == ("fsdp", "constant")
    assert (job.config["name"], job.config["cluster"]["name"]) == ("train", "local")
    with pytest.raises(UserError, match="did you mean strategy=fsdp"):
        compose(["strategy=fspd"], config_dirs=[], cwd=project)
    swept = points(["strategy=fsdp", "width=1,2"], config_dirs=[], cwd=project)
    assert swept == [["strategy=fsdp", "width=1"], ["strategy=fsdp", "width=2"]]
