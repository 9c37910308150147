"""Idioms of Hydra users: their own keys and resolvers, Hydra's own node, and changed targets."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainer.cli.fit import main as fit
from trainer.config.compose import Composed, compose, frozen_hydra, points, printed
from trainer.config.hydra_node import replaced
from trainer.config.hydra_record import env_set, hydra_node
from trainer.config.own_keys import similar_key
from trainer.config.schema import Config
from trainer.config.typed import key_names
from trainer.core.errors import UserError
from trainer.runs.directory import RunDirectory


def composed(*overrides: str) -> Composed:
    return compose(list(overrides), config_dirs=[])


def refused(*overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        composed(*overrides)
    return caught.value


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def experiment(text: str, name: str = "mine") -> str:
    write(f"conf/experiment/{name}.yaml", f"# @package _global_\n{text}")
    return f"experiment={name}"


def made(job: Composed) -> RunDirectory:
    return RunDirectory.create(job.config, overrides=[], choices={}, code_root=Path(), hydra=frozen_hydra(job))


# The user's own keys.

OWN = [
    *(
        "paths: {a: 1}",
        "tags: [dev]",
        "task_name: train",
        "width: 3",
        "extras: {x: null}",
        "train: true",
        "test: false",
    ),
    *("ckpt_path: null", "lr: 0.1", "batch_size: 8", "mode: fit", "date: today", "seeds: [1, 2]", "dataset: {root: x}"),
    *(
        "names: {a: b}",
        "models: {a: {x: 1}}",
        "net: {x: 1}",
        "optim: {lr: 1}",
        "optimized_metric: val/acc",
        "wandb: {}",
    ),
]


def test_user_keys_in_files_are_kept_and_can_be_set(workdir: Path) -> None:
    chosen = experiment("\n".join(OWN) + "\n")
    written = OmegaConf.to_container(OmegaConf.create("\n".join(OWN)))
    assert isinstance(written, dict)
    config = made(composed(chosen)).config()
    assert {key: config[key] for key in written} == written
    assert list(config)[-len(OWN) :] == list(written)
    changed = composed(chosen, "task_name=test", "tags=[a]", "paths.a=2", "lr=0.3", "optimizer.lr=${lr}").config
    assert (changed["task_name"], changed["tags"], changed["paths"]) == ("test", ["a"], {"a": 2})
    assert changed["optimizer"]["lr"] == 0.3


SLIPS = [
    *[("trainr: {max_steps: 3}", "trainer"), ("tranier: {max_steps: 3}", "trainer"), ("seeed: 3", "seed")],
    *[("Trainer: {max_steps: 3}", "trainer"), ("fine_tune: {}", "finetune"), ("chekpoints: {}", "checkpoint")],
    *[("optimiser: {lr: 1}", "optimizer"), ("runsdir: x", "runs_dir"), ("model_: {_target_: x}", "model")],
    *[("models: {_target_: x}", "model"), ("resource: {gpus: 1}", "resources"), ("callback: {}", "callbacks")],
]


def test_a_misspelt_section_in_a_file_is_refused(workdir: Path) -> None:
    error = str(refused(experiment("\n".join(text for text, _ in SLIPS) + "\n")))
    assert f"{len(SLIPS)} problems" in error
    for text, meant in SLIPS:
        assert f"{text.partition(':')[0]}: unknown key\n    did you mean {meant}?" in error


def test_user_keys_on_the_command_line_need_a_plus(workdir: Path) -> None:
    assert "to add your own key: +newkey=1" in refused("newkey=1").fix
    assert composed("+newkey=1").config["newkey"] == 1
    assert composed("+paths.deep.x=1", "name=${paths.deep.x}").config["name"] == "1"
    write("conf/experiment/mine.yaml", "# @package _global_\npaths: {root: /a}\n")
    assert "did you mean paths.root? to add it: +paths.rot=1" in refused("experiment=mine", "paths.rot=1").fix
    assert composed("experiment=mine", "+paths.new=1").config["paths"] == {"root": "/a", "new": 1}
    assert "paths" not in composed("experiment=mine", "~paths").config
    for slip in ("+seeed=3", "+tranier.max_steps=5", "+modle=mlp", "+lr=3"):
        assert "did you mean" in refused(slip).fix


def test_no_key_of_the_schema_looks_like_a_misspelling_of_another() -> None:
    names = key_names(Config)
    assert all(similar_key(name, [other for other in names if other != name]) is None for name in names)


# Resolvers.


def test_resolvers_of_hydra_and_omegaconf(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIDTH", "7")
    text = """
a: ${oc.env:WIDTH}
b: ${oc.decode:${oc.env:WIDTH}}
c: ${oc.select:nowhere,5}
d: ${oc.create:{x:1}}
e: ${oc.dict.keys:.d2}
f: ${oc.dict.values:.d2}
d2: {k: 1}
g: ${oc.deprecated:.b}
h: ${hydra:job.name}
i: ${hydra:runtime.choices.model}
j: ${hydra:runtime.cwd}
"""
    with pytest.warns(UserWarning, match="deprecated"):
        config = composed(experiment("own:" + text.replace("\n", "\n  ")), "security.env=[WIDTH]").config["own"]
    assert {key: value for key, value in config.items() if key != "d2"} == {
        **{"a": "7", "b": 7, "c": 5, "d": {"x": 1}, "e": ["k"], "f": [1], "g": 7, "h": "trainer", "i": "mlp"},
        "j": str(workdir),
    }


def test_the_time_is_resolved_once(workdir: Path) -> None:
    text = "stamp: ${now:%H:%M:%S.%f}\nhydra: {job: {name: 'at_${now:%H:%M:%S.%f}'}}\n"
    job = composed(experiment(text + "other: '${hydra:job.name}'\n"))
    stamp = job.config["stamp"]
    assert job.config["other"] == f"at_{stamp}"
    assert f"stamp: {stamp}" in printed(job, "job", resolve=True).replace("'", "")
    later = compose(["experiment=mine"], config_dirs=[], number=1, after=job)
    assert later.config["stamp"] == stamp


def test_users_resolvers(workdir: Path) -> None:
    write("src/mine/maths.py", "def double(x):\n    return 2 * x\n")
    write(
        "conf/resolvers.py",
        "from omegaconf import OmegaConf\nfrom mine.maths import double\n"
        "OmegaConf.register_new_resolver('eval', eval)\nOmegaConf.register_new_resolver('double', double)\n",
    )
    path = list(sys.path)
    for _ in range(2):  # registering twice would raise
        job = composed("+a=${eval:'1 + 2'}", "+b=${double:4}")
        assert (job.config["a"], job.config["b"]) == (3, 8)
        assert "b: 8" in printed(job, "job", resolve=True)
        assert "mine.maths" not in job.config
        made(job)
    assert not OmegaConf.has_resolver("eval")
    assert sys.path == path
    assert "torch" not in {name for name in sys.modules if name.startswith("mine")}
    write("conf/resolvers.py", "import not_there\n")
    assert "resolvers.py: ModuleNotFoundError" in refused().message


STRUCTURED = """
from dataclasses import dataclass
from enum import Enum
from hydra.core.config_store import ConfigStore

Act = Enum("Act", "relu gelu")

@dataclass
class Own:
    _target_: str = "trainer.models.mlp.MLP"
    width: int = 3
    act: Act = Act.gelu

ConfigStore.instance().store(group="model", name="stored_by_a_test", node=Own)
"""


def test_users_structured_configs(workdir: Path) -> None:
    write("conf/resolvers.py", STRUCTURED)
    run = made(composed("model=stored_by_a_test", "model.width=4"))
    assert run.config()["model"] == {"_target_": "trainer.models.mlp.MLP", "width": 4, "act": "gelu"}


def test_config_path_option(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("configs/train.yaml", "defaults: [data: digits, model: mlp, _self_]\nname: mine\n")
    assert fit(["--config-path", "configs", "-cn", "train", "--cfg", "job", "--package", "name"]) == 0
    assert capsys.readouterr().out == "# @package name\nmine\n"


def test_project_root_is_set_as_by_rootutils(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROJECT_ROOT", raising=False)
    assert "PROJECT_ROOT" in refused("name=${oc.env:PROJECT_ROOT}").message
    write(".project-root", "")
    assert composed("+root=${oc.env:PROJECT_ROOT}").config["root"] == str(workdir)
    assert "PROJECT_ROOT" not in os.environ


def test_an_unknown_resolver_is_refused_with_the_line_that_registers_it(workdir: Path) -> None:
    error = refused("+a=${eval:'1 + 2'}")
    assert error.message == "a: unknown resolver eval in ${eval:...}"
    line = 'from omegaconf import OmegaConf; OmegaConf.register_new_resolver("eval", eval)'
    assert error.fix == f"add to conf/resolvers.py: {line}"
    write("conf/resolvers.py", line)
    assert composed("+a=${eval:'1 + 2'}").config["a"] == 3
    write("mine/__init__.py", "OmegaConf.register_new_resolver(\n    'mul', lambda x, y: x * y, replace=True)\n")
    fix = refused("+a=${mul:2,3}").fix
    assert "mine/__init__.py:1" in fix
    assert "OmegaConf.register_new_resolver('mul', lambda x, y: x * y, replace=True)" in fix


# Hydra's own node.


@pytest.mark.parametrize(
    ("text", "mistake", "fix"),
    [
        ("hydra: {launcher: {n_jobs: 3}}", "hydra.launcher.n_jobs", "cluster="),
        ("hydra: {sweeper: {max_batch_size: 3}}", "hydra.sweeper.max_batch_size", "-m"),
        ("hydra: {sweeper: {_target_: a.B}}", "hydra.sweeper._target_=a.B", "-m"),
        ("hydra: {callbacks: {x: {_target_: a.B}}}", "hydra.callbacks.x", "Lightning callback"),
        ("hydra: {output_subdir: null}", "hydra.output_subdir=null", ".hydra"),
        ("defaults: [override /hydra/launcher: joblib]", "hydra/launcher=joblib", "cluster="),
        ("defaults: [override /hydra/sweeper: ax]", "hydra/sweeper=ax", "-m"),
        ("defaults: [override /hydra/job_logging: colorlog]", "hydra/job_logging=colorlog", "hydra-colorlog"),
    ],
)
def test_unused_keys_of_hydra_are_refused_in_files(workdir: Path, text: str, mistake: str, fix: str) -> None:
    error = refused(experiment(text + "\n"))
    assert error.message.startswith(mistake)
    assert fix in error.fix


@pytest.mark.parametrize("key", ["hydra.job.env_set.A=1", "hydra.sweeper.params.seed=1,2"])
def test_a_new_entry_of_a_hydra_mapping_needs_a_plus(workdir: Path, key: str) -> None:
    assert refused(f"{key.partition('=')[0]}=1").fix == f"write '+{key.partition('=')[0]}=1'"


def test_a_run_keeps_the_files_of_hydra_with_its_own_path(workdir: Path) -> None:
    write("conf/paths/default.yaml", "out: ${hydra:runtime.output_dir}\nlogs: ${hydra:runtime.cwd}/logs\n")
    text = """
defaults:
  - /paths: default
task_name: train
hydra:
  run: {dir: "${paths.logs}/${task_name}/${now:%Y}"}
  job: {name: theirs, env_set: {FOO: "${task_name}"}}
  job_logging: {handlers: {file: {filename: "${hydra.runtime.output_dir}/${task_name}.log"}}}
  sweep: {subdir: "${nowhere}"}
"""
    job = composed(experiment(text), "seed=5", "security.env=[FOO]")
    assert job.config["paths"]["out"] == f"{workdir}/runs/mlp-digits-ID"
    assert f"out: {workdir}/runs/mlp-digits-ID" in printed(job, "job", resolve=True)
    run = made(job)
    assert run.config()["paths"]["out"] == str(run.path)
    node = hydra_node(run.path)
    assert (node["job"]["name"], node["runtime"]["output_dir"], node["mode"]) == ("theirs", str(run.path), "RUN")
    assert node["overrides"]["task"] == ["experiment=mine", "seed=5", "security.env=[FOO]"]
    assert node["runtime"]["choices"]["paths"] == "default"
    assert node["job_logging"]["handlers"]["file"]["filename"] == f"{run.path}/train.log"
    assert node["job_logging"]["version"] == 1
    assert env_set(run.path) == {"FOO": "train"}
    (link,) = (workdir / "logs/train").iterdir()
    assert link.resolve() == run.path.resolve()
    assert "logs: ${hydra:runtime.cwd}/logs" in (run.path / ".hydra" / "config.yaml").read_text()
    assert OmegaConf.load(run.path / ".hydra" / "overrides.yaml") == ["experiment=mine", "seed=5", "security.env=[FOO]"]


def test_hydra_run_dir_is_a_link_to_the_latest_run(workdir: Path) -> None:
    first, second = made(composed("hydra.run.dir=out/a")), made(composed("hydra.run.dir=out/a"))
    assert Path("out/a").resolve() == second.path.resolve() != first.path.resolve()
    write("full/file", "")
    with pytest.raises(UserError, match=r"hydra\.run\.dir=full: already exists"):
        frozen_hydra(composed("hydra.run.dir=full"))
    with pytest.raises(UserError, match=r"hydra\.run\.dir=\.: already exists"):
        frozen_hydra(composed("hydra.run.dir=."))
    assert frozen_hydra(composed()).link is None


def test_the_run_path_is_replaced_at_any_depth() -> None:
    assert replaced({"a": ["x/ID", {"b": "ID"}], "c": 3}, "ID", "1") == {"a": ["x/1", {"b": "1"}], "c": 3}


# Sweeps.


def test_a_sweep_in_a_file(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2', optimizer.lr: 'choice(0.1,0.2)'}}}\n"
    chosen = experiment(text)
    swept = points([chosen], config_dirs=[], multirun=False)
    assert swept is not None
    assert [point[:2] for point in swept] == [
        [f"seed={seed}", f"optimizer.lr={lr}"] for seed in (1, 2) for lr in ("0.1", "0.2")
    ]
    over = points([chosen, "seed=7", "optimizer.lr=1,2"], config_dirs=[], multirun=False)
    assert over == [[chosen, "seed=7", "optimizer.lr=1"], [chosen, "seed=7", "optimizer.lr=2"]]
    assert points(["seed=1"], config_dirs=[], multirun=False) is None
    assert fit([chosen, "--cfg", "job", "--package", "seed"]) == 0
    assert capsys.readouterr().out.split("\n")[1::2] == ["1", "1", "2", "2"]
    assert fit([chosen, "name=a,b", "--cfg", "job", "--package", "name"]) == 0
    assert capsys.readouterr().out.count("\na\n") == 4
    assert fit([chosen, "resources.gpus=0", "--dry-run"]) == 0
    assert "grid, 4 points" in capsys.readouterr().out


def test_the_mode_on_the_command_line(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["name=n${hydra:job.num}", "--cfg", "job", "--package", "name", "--resolve"]
    assert fit(["hydra.mode=MULTIRUN", "seed=1,2", *command]) == 0
    assert capsys.readouterr().out.split("\n")[1::2] == ["n0", "n1"]
    with pytest.raises(UserError, match="several values"):
        fit(["seed=1,2", *command])
    job = compose(["hydra.sweep.dir=all", "hydra.mode=MULTIRUN"], config_dirs=[], number=1)
    assert frozen_hydra(job).link == os.path.join("all", "1")


# Changed targets.

MODEL = "_target_: trainer.models.mlp.MLP\nhidden: [3]\ndropout: 0.5\n"


def own_model() -> None:
    write("mine.py", "class Net:\n    def __init__(self, hidden: int = 3, depth=1): ...\n")
    write("conf/model/own.yaml", MODEL)


def test_a_changed_target_drops_the_previous_arguments(workdir: Path) -> None:
    own_model()
    job = composed("model=own", "model.depth=2", "model._target_=mine.Net")
    assert job.config["model"] == {"_target_": "mine.Net", "depth": 2}
    (note,) = job.notes
    assert "model.hidden, model.dropout" in note
    assert composed("model=own", "model={_target_: mine.Net, depth: 3}").config["model"]["depth"] == 3
    assert "hidden" not in composed("model=own", "model={_target_: mine.Net, depth: 3}").config["model"]
    same = composed("model=own", "model._target_=trainer.models.mlp.MLP")
    assert (same.config["model"]["hidden"], same.notes) == ([3], ())


def test_a_changed_optimizer_keeps_lr_and_weight_decay(workdir: Path) -> None:
    muon = composed("optimizer._target_=torch.optim.Muon", "optimizer.momentum=0.5")
    before = composed().config["optimizer"]
    kept = {key: before[key] for key in ("lr", "weight_decay")}
    assert muon.config["optimizer"] == {"_target_": "torch.optim.Muon", "momentum": 0.5, **kept}
    assert "optimizer.betas" in muon.notes[0]
    sgd = composed("optimizer._target_=torch.optim.SGD", "optimizer.lr=0.3").config["optimizer"]
    assert sgd["lr"] == 0.3
    assert "betas" not in sgd


def test_targets_of_nested_nodes_and_callbacks_can_change(workdir: Path) -> None:
    own_model()
    inner = "{_target_: torch.optim.Adam, _partial_: true, lr: 1, betas: [1, 2]}"
    write("conf/model/deep.yaml", f"_target_: builtins.dict\noptimizer: {inner}\n".replace("builtins.dict", "mine.Net"))
    changed = composed("model=deep", "model.optimizer._target_=torch.optim.SGD").config["model"]
    assert changed["optimizer"] == {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 1}
    stop = composed("callbacks=early_stopping", "callbacks.early_stopping._target_=collections.Counter")
    assert stop.config["callbacks"]["early_stopping"] == {"_target_": "collections.Counter"}


def test_each_job_of_a_sweep_is_composed_from_scratch(workdir: Path) -> None:
    own_model()
    swept: Any = points(["model=own", "model._target_=mine.Net,trainer.models.mlp.MLP"], config_dirs=[])
    first, second = [compose(point, config_dirs=[]).config["model"] for point in swept]
    assert "hidden" not in first
    assert second["hidden"] == [3]
