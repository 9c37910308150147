"""Composing a job: search path, did-you-mean over the whole tree, types, and `+`."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.compose import Composed, compose, points, printed
from trainer.config.hydra_errors import UNUSED_PARTS
from trainer.core.errors import UserError
from trainer.runs.registry import VARIABLE, runs_dir_from


def composed(*overrides: str, config_dirs: tuple[Path, ...] = ()) -> Composed:
    return compose(list(overrides), config_dirs=list(config_dirs))


def refused(*overrides: str, config_dirs: tuple[Path, ...] = ()) -> str:
    """Return the whole message, which must never contain Hydra's advice to add `+key`."""
    with pytest.raises(UserError) as caught:
        composed(*overrides, config_dirs=config_dirs)
    text = str(caught.value)
    assert "use +" not in text
    assert caught.value.fix
    return text


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_default_job_is_resolved_plain_and_complete(workdir: Path) -> None:
    job = composed()
    assert job.config["name"] == "mlp-digits"
    assert job.choices["model"] == "mlp"
    assert job.choices["experiment"] is None
    # Not in tracking/wandb.yaml: the default of the dataclass.
    assert job.config["tracking"]["finish_timeout_s"] == 60
    assert "hydra" not in job.config


def test_runs_dir_default_matches_the_registry(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert composed().config["runs_dir"] == str(runs_dir_from(None)) == "runs"
    monkeypatch.setenv(VARIABLE, "/scratch/me")
    assert composed().config["runs_dir"] == str(runs_dir_from(None)) == "/scratch/me"
    assert composed("runs_dir=mine").config["runs_dir"] == "mine"


def test_hydra_global_state_is_restored(workdir: Path) -> None:
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    composed()
    refused("model=mpl")
    assert not GlobalHydra.instance().is_initialized()
    assert not HydraConfig.initialized()
    assert {"launcher": "basic"} in ConfigStore.instance().load("hydra/config.yaml").node.defaults


@pytest.mark.parametrize(
    ("override", "mistake", "suggestion"),
    [
        ("trainr.max_steps=5", "trainr", "trainer.max_steps"),
        ("trainer.max_step=5", "trainer.max_step", "did you mean trainer.max_steps?"),
        ("data.batchsize=3", "data.batchsize", "did you mean data.batch_size?"),
        ("model.hiden=3", "model.hiden", "did you mean model.hidden?"),
        ("modle=mlp", "modle", "did you mean model=mlp?"),
        ("lr=0.1", "lr", "did you mean optimizer.lr?"),
        ("strategy=dpp", "dpp", "did you mean strategy=ddp? choose one of: "),
        ("model=mpl", "mpl", "did you mean model=mlp?"),
        ("+trainer.max_step=5", "trainer.max_step", "did you mean trainer.max_steps?"),
        ("++trainer.max_step=5", "trainer.max_step", "did you mean trainer.max_steps?"),
        ("+model.hiden=3", "model.hiden", "did you mean model.hidden?"),
        ("+trainr.max_steps=5", "trainr", "trainer.max_steps"),
        ("optimizer.amsgrd=true", "optimizer.amsgrd", "did you mean optimizer.amsgrad?"),
        ("~trainer.max_step", "trainer.max_step", "--cfg job"),
        ("+trainer.max_steps=5", "already has trainer.max_steps", "remove the +: trainer.max_steps=5"),
        ("+model=mlp", "model", "write model=mlp"),
        ("trainer=fast", "trainer is a section", "trainer.max_steps"),
        ("callbacks.early_stopping.patience=3", "is null", "callbacks=early_stopping"),
        ("callbacks.ema.decay=3", "callbacks.ema", "early_stopping"),
        ("model=null", "model=null", "mlp"),
        ("~model", "model", "model=VALUE"),
        ("trainer.max_steps=1,2", "several values", "add -m"),
        ("trainer.max_steps", "expected KEY=VALUE", "key=value"),
        ("a=b=c=[", "cannot be read", "quote"),
        ("name=${nope}", "nope", "--cfg job"),
        ("model.hidden=???", "model.hidden has no value", "model.hidden=VALUE"),
        ("hydra.foo=3", "hydra.foo", "--cfg all"),
        ("strategy.name=dpp", "strategy.name=dpp", "did you mean ddp?"),
        ("tracking.tags=3", "tracking.tags=3: expected a list", "write tracking.tags=[a,b]"),
        ("trainer.max_steps=ten", "trainer.max_steps=ten: expected an integer", "trainer.max_steps=10"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: expected an integer", "trainer.max_steps=10"),
        ("trainer.sync_batchnorm=maybe", "expected true or false", "trainer.sync_batchnorm=true"),
        ("report=flase", "report=flase: expected true or false", "did you mean report=false? write report=true or rep"),
        ("trainer.benchmark=flase", "true or false or null", "did you mean trainer.benchmark=false?"),
        ("sweep.method=grid", "sweep.method=grid: an option of a sweep", "use trainer sweep"),
        ("seed=[1]", "seed=[1]: expected an integer", "seed=10"),
        ("callbacks=[{_target_: my.Own}]", "callbacks takes the names of its config files", "+callbacks.NAME={_targe"),
        ("logger=[csv,{_target_: a.B}]", "logger takes the names of its config files", "+logger.NAME={_target_: "),
        ("callbacks=[default,5]", "callbacks takes the names of its config files", "choose from: default, device_"),
        ("model=[{_target_: my.Net}]", "model takes the names of its config files", "model={...}"),
        ("data=7", "data takes the names of its config files", "choose from: audio_folder"),
        ("callbacks=false", "callbacks takes the names of its config files", "choose from: default"),
        ("experiment={seed: 3}", "experiment takes the names of its config files", "quickstart"),
        ("seed=true", "seed=true: expected an integer", "seed=10"),
    ],
)
def test_each_mistake_is_reported_with_a_fix(workdir: Path, override: str, mistake: str, suggestion: str) -> None:
    text = refused(override)
    assert mistake in text
    assert suggestion in text


def test_unknown_group_option_lists_all_options(workdir: Path) -> None:
    assert "choose one of: csv, mlflow, none, tensorboard, trackio, wandb" in refused("tracking=wanddb")


def test_all_wrong_types_are_reported_at_once(workdir: Path) -> None:
    text = refused("trainer.max_steps=ten", "seed=x")
    assert "2 problems" in text
    assert "seed=x" in text
    assert "trainer.max_steps=ten" in text


def test_keys_that_the_schema_or_the_target_knows_need_no_plus(workdir: Path) -> None:
    job = composed("tracking=none", "tracking.project=x", "optimizer.amsgrad=true", "+optimizer.maximize=true")
    assert job.config["tracking"]["project"] == "x"
    assert job.config["optimizer"]["amsgrad"] is True
    assert job.config["optimizer"]["maximize"] is True


def test_a_callback_can_be_added_with_its_target_last(workdir: Path) -> None:
    job = composed("callbacks.mine.every=3", "callbacks.mine._target_=collections.Counter", "+callbacks.x={a:1}")
    assert job.config["callbacks"]["mine"] == {"_target_": "collections.Counter", "every": 3}


def test_values_are_converted_to_the_types_of_the_schema(workdir: Path) -> None:
    job = composed("trainer.max_steps=1e3", "checkpoint.every_minutes=5", "name=7", "trainer.deterministic=yes")
    assert job.config["trainer"]["max_steps"] == 1000
    assert isinstance(job.config["checkpoint"]["every_minutes"], float)
    assert job.config["name"] == "7"
    assert job.config["trainer"]["deterministic"] is True


def test_null_for_an_unset_group_has_no_effect(workdir: Path) -> None:
    assert composed("experiment=null").choices["experiment"] is None


def test_search_order_is_config_dir_then_own_conf_then_shipped(workdir: Path) -> None:
    write(workdir / "conf/model/mlp.yaml", "_target_: trainer.models.mlp.MLP\nhidden: [7]\n")
    write(workdir / "conf/model/own.yaml", "_target_: trainer.models.mlp.MLP\nhidden: [8]\n")
    assert composed().config["model"] == {"_target_": "trainer.models.mlp.MLP", "hidden": [7]}
    extra = workdir / "extra"
    write(extra / "model/own.yaml", "_target_: trainer.models.mlp.MLP\nhidden: [9]\n")
    assert composed("model=own").config["model"]["hidden"] == [8]
    assert composed("model=own", config_dirs=(extra,)).config["model"]["hidden"] == [9]
    assert composed("model=own", config_dirs=(Path("extra"),)).config["model"]["hidden"] == [9]


def test_a_users_experiment_overrides_groups_and_values(workdir: Path) -> None:
    text = "# @package _global_\ndefaults:\n  - override /tracking: none\ntrainer: {max_epochs: 3}\nname: mine\n"
    write(workdir / "conf/experiment/mine.yaml", text)
    job = composed("experiment=mine", "trainer.log_every_n_steps=2")
    assert (job.choices["tracking"], job.config["name"], job.config["trainer"]["max_epochs"]) == ("none", "mine", 3)
    assert composed("experiment=mine", "trainer.max_epochs=4").config["trainer"]["max_epochs"] == 4


def test_a_misspelt_key_in_a_users_file_is_refused(workdir: Path) -> None:
    write(workdir / "conf/experiment/mine.yaml", "# @package _global_\ntrainer: {max_step: 3}\n")
    assert "did you mean trainer.max_steps?" in refused("experiment=mine")
    write(workdir / "conf/experiment/mine.yaml", "# @package _global_\ntrainr: {max_steps: 3}\n")
    assert "did you mean trainer?" in refused("experiment=mine")


def test_a_wrong_option_inside_a_users_file_names_the_file(workdir: Path) -> None:
    write(workdir / "conf/experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /model: resnt\n")
    text = refused("experiment=mine")
    assert "conf/experiment/mine.yaml" in text
    assert "choose one of" in text


def test_a_group_that_is_chosen_twice_is_reported_with_a_fix(workdir: Path) -> None:
    write(workdir / "conf/experiment/mine.yaml", "# @package _global_\nname: mine\n")
    message = refused("+experiment=mine")
    assert "experiment: chosen twice" in message
    assert "the job already has this group: write experiment=mine" in message
    assert composed("experiment=mine").config["name"] == "mine"


def test_a_missing_hydra_plugin_is_refused(workdir: Path) -> None:
    write(workdir / "conf/experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /hydra/sweeper: ax\n")
    message = refused("experiment=mine")
    assert "hydra/sweeper=ax" in message
    assert "mine.yaml" in message


def test_a_choice_for_an_unused_part_of_hydra_is_composed(workdir: Path) -> None:
    assert "job_logging" not in used_parts(composed("experiment=quickstart"))
    write(workdir / "conf/experiment/mine.yaml", "# @package _global_\ndefaults:\n  - override /hydra/sweeper: basic\n")
    job = composed("experiment=mine", "hydra/job_logging=stdout")
    assert used_parts(job) == {"sweeper": "basic", "job_logging": "stdout"}
    assert job.tree.hydra.job_logging.version == 1


def used_parts(job: Composed) -> dict[str, str]:
    chosen = job.tree.hydra.runtime.choices
    return {part: chosen[f"hydra/{part}"] for part in UNUSED_PARTS if chosen[f"hydra/{part}"] is not None}


@pytest.mark.parametrize("key", ["launcher.n_jobs", "sweeper.max_batch_size", "job_logging.root.level"])
def test_a_key_of_an_unused_part_of_hydra_is_refused(workdir: Path, key: str) -> None:
    assert f"hydra.{key}: trainer does not use this part of Hydra" in refused(f"hydra.{key}=3")


def test_broken_yaml_names_file_and_line(workdir: Path) -> None:
    write(workdir / "conf/model/mine.yaml", "_target_: x\nhidden: [1\nfoo: 2\n")
    text = refused("model=mine")
    assert "conf/model/mine.yaml, line 3" in text


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("a: ${", "conf/model/mine.yaml: no viable alternative"),
        ("- 1\n- 2\n", "model=[1, 2]: expected a section with keys"),
        ("\tx: 1\n", "conf/model/mine.yaml, line 1"),
    ],
)
def test_invalid_config_files_are_one_message(workdir: Path, content: str, named: str) -> None:
    write(workdir / "conf/model/mine.yaml", content)
    assert named in refused("model=mine")


def test_a_file_that_is_not_utf8_is_one_message(workdir: Path) -> None:
    write(workdir / "conf/model/mine.yaml", "").write_bytes(b"a: \xff\xfe\n")
    assert "conf/model/mine.yaml" in refused("model=mine")


def test_a_config_directory_that_does_not_exist(workdir: Path) -> None:
    text = refused(config_dirs=(Path("nowhere"),))
    assert "--config-dir nowhere" in text


def test_a_search_path_that_does_not_exist(workdir: Path) -> None:
    assert "/nowhere/at/all" in refused("hydra.searchpath=[file:///nowhere/at/all]")


def test_an_unknown_config_name_lists_the_existing_ones(workdir: Path) -> None:
    with pytest.raises(UserError, match="--config-name nope") as caught:
        compose([], config_dirs=[], config_name="nope")
    assert caught.value.fix == "configs: config"


def test_sweep_points_are_in_the_order_of_hydra(workdir: Path) -> None:
    sweep = points(["model=mlp", "seed=1,2", "optimizer.lr=choice(0.1,0.2)"], config_dirs=[])
    assert sweep[1] == ["model=mlp", "seed=1", "optimizer.lr=0.2"]
    assert len(sweep) == 4


def test_printed_parts_of_the_config(workdir: Path) -> None:
    job = composed()
    assert printed(job, "job", "trainer").startswith("# @package trainer\nmax_steps: null\n")
    assert "name: ${hydra:" in printed(job, "job")
    assert "name: mlp-digits" in printed(job, "job", resolve=True)
    assert printed(job, "hydra").startswith("hydra:\n")
    assert "\nhydra:\n" in "\n" + printed(job, "all")
    with pytest.raises(UserError, match="--package nope"):
        printed(job, "job", "nope")


@pytest.mark.parametrize("written", ["callbacks=emma", "callbacks=[default,emma]", "callbacks=early_stoping"])
def test_a_misspelt_callback_is_not_mistaken_for_a_group_of_hydra(written: str) -> None:
    """Hydra has its own callbacks, in hydra/callbacks."""
    with pytest.raises(UserError) as caught:
        compose([written], config_dirs=[])
    assert "there is no callbacks e" in caught.value.message
    assert "choose one of: " in caught.value.fix
    assert "early_stopping" in caught.value.fix
