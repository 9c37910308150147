"""What a configuration may read: environment variables, files within limits, and no secret in what is written."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from trainer.checks.config import check
from trainer.config import yaml_limits
from trainer.config.compose import compose, frozen_hydra
from trainer.config.environment import may_read, may_set
from trainer.config.hydra_node import problems_of_logging
from trainer.core import secrets
from trainer.core.errors import UserError
from trainer.core.files import append_line, write_atomic
from trainer.runs.directory import RunDirectory
from trainer.runs.records import AttemptOutcome, Failure
from trainer.runtime import process

PASSWORD = "hunter2hunter"
SECRET = "sk-4f9a8b7c6d5e4f3a"
MOST_S = 5.0
"""Each refusal takes milliseconds; the attacks took 40 s and more."""


def composed(*overrides: str, **options: Any) -> dict[str, Any]:
    return compose(list(overrides), config_dirs=[], **options).config


def refused(*overrides: str) -> UserError:
    began = time.process_time()
    with pytest.raises(UserError) as caught:
        composed(*overrides)
    assert time.process_time() - began < MOST_S
    return caught.value


def experiment(text: str, name: str = "evil") -> str:
    path = Path("conf/experiment") / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package _global_\n{text}")
    return f"experiment={name}"


# Environment variables.


@pytest.mark.parametrize(
    "name",
    [
        *("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "GITHUBTOKEN"),
        *("SSH_AUTH_SOCK", "MY_PASS", "KEY", "PGPASSWORD", "api_key", "TRAINER_KEY"),
    ],
)
def test_a_secret_is_known_by_its_name(name: str) -> None:
    """blocked by: words of the name of a variable"""
    assert secrets.looks_secret(name)
    assert not may_read(name, [name, "*"])


@pytest.mark.honest
@pytest.mark.parametrize(
    "name", ["TOKENIZERS_PARALLELISM", "HOME", "PATH", "PWD", "SLURM_JOB_ID", "COMPASS", "KEYBOARD"]
)
def test_other_variables_are_no_secrets(name: str) -> None:
    assert not secrets.looks_secret(name)


def test_a_config_reads_only_variables_that_are_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: a list of variables, and `security.env`"""
    for name in ("DATABASE_URL", "MY_WIDTH", "TRAINER_X", "SLURM_JOB_NAME", "SCRATCH", "WORK"):
        monkeypatch.setenv(name, f"value of {name}")
    error = refused("+x=${oc.env:MY_WIDTH}")
    assert "a config may not read the variable MY_WIDTH" in error.message
    assert error.fix == "if it is no secret: security.env=[MY_WIDTH]"
    assert "value of" not in str(error)
    assert composed("+x=${oc.env:MY_WIDTH}", "security.env=[MY_WIDTH]")["x"] == "value of MY_WIDTH"
    assert composed("+x=${oc.env:MY_W_NOT_SET,7}")["x"] == "7"
    for name in ("TRAINER_X", "SLURM_JOB_NAME", "SCRATCH", "WORK", "HOME"):
        assert composed(f"+x=${{oc.env:{name}}}")["x"] == os.environ[name]
    for expression in ("${oc.decode:${oc.env:MY_WIDTH}}", "a-${oc.env:MY_WIDTH}-b", "${oc.env:${y}}"):
        assert "a config may not read" in refused(experiment(f"y: MY_WIDTH\nx: {expression}\n")).message


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "TRAINER_TOKEN", "SLURM_JOB_PASSWORD"])
def test_a_secret_is_not_read_even_if_it_is_named(name: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: names of secrets come before `security.env`"""
    monkeypatch.setenv(name, SECRET)
    error = refused(f"+x=${{oc.env:{name}}}", f"security.env=[{name}]")
    assert "looks like a secret" in error.message
    assert SECRET not in str(error)


def test_a_password_in_an_address_is_not_read(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: values with a password in an address are secrets"""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{PASSWORD}@mlflow.example")
    assert "looks like a secret" in refused("+x=${oc.env:MLFLOW_TRACKING_URI}").message
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    assert composed("+x=${oc.env:MLFLOW_TRACKING_URI}")["x"] == "https://mlflow.example"


def test_a_config_file_cannot_name_a_variable_for_itself(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: `security` is taken from the command line and the primary config only"""
    monkeypatch.setenv("MY_WIDTH", "7")
    chosen = experiment("security: {env: [MY_WIDTH]}\nx: ${oc.env:MY_WIDTH}\n")
    assert "must not give permissions to itself" in refused(chosen).message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("env_copy: [AWS_SECRET_ACCESS_KEY]", "env_copy"),
        ("env_copy: [MY_WIDTH]", "env_copy"),
        *((f"env_set: {{{name}: /tmp/evil}}", f"env_set.{name}") for name in ("LD_PRELOAD", "PYTHONPATH", "PATH")),
        *((f"env_set: {{{name}: /tmp/evil}}", f"env_set.{name}") for name in ("NCCL_NET_PLUGIN", "BASH_ENV", "CXX")),
        *((f"env_set: {{{name}: x}}", f"env_set.{name}") for name in ("HTTPS_PROXY", "WANDB_BASE_URL", "GIT_SSH")),
    ],
)
def test_hydras_variables(text: str, part: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: a list of variables that choose no code and no address"""
    for name in ("AWS_SECRET_ACCESS_KEY", "MY_WIDTH"):
        monkeypatch.setenv(name, SECRET)
    assert f"hydra.job.{part}" in refused(experiment(f"hydra: {{job: {{{text}}}}}")).message


@pytest.mark.honest
def test_harmless_variables_may_be_set() -> None:
    for name in ("OMP_NUM_THREADS", "NCCL_DEBUG", "TOKENIZERS_PARALLELISM", "CUDA_LAUNCH_BLOCKING", "HF_HUB_OFFLINE"):
        assert may_set(name, [])
    assert may_set("MY_OWN", ["MY_OWN"])
    assert not may_set("MY_OWN", [])


@pytest.mark.parametrize(
    "node",
    [
        {"handlers": {"x": {"()": "os.system", "command": "touch PWNED"}}},
        {"handlers": {"x": {"class": "subprocess.Popen", "args": ["touch"]}}},
        {"formatters": {"x": {"()": "builtins.eval"}}},
        {"formatters": {"x": {"class": "mine.Evil"}}},
        {"filters": {"x": {"()": "os.system"}}},
        {"handlers": {"x": {"class": "logging.StreamHandler", "stream": "ext://antigravity.x"}}},
        {"handlers": {"x": {"class": "logging.handlers.SocketHandler", "host": "evil"}}},
        {"handlers": {"x": {"class": "logging.FileHandler", "filename": "/home/me/.bashrc"}}},
        {"handlers": {"x": {"class": "logging.handlers.QueueHandler", "queue": {"()": "os.system"}}}},
    ],
)
def test_the_configuration_of_logging_calls_nothing(node: dict[str, Any], workdir: Path) -> None:
    """blocked by: classes of `logging` and log files only"""
    assert all("refused" in one.message for one in problems_of_logging(node))
    assert list(problems_of_logging(node))
    text = json.dumps({"hydra": {"job_logging": {"version": 1, **node}}})
    assert "refused" in str(refused(experiment(text)))
    assert not Path("PWNED").exists()


@pytest.mark.honest
def test_hydras_own_configurations_of_logging_are_accepted(workdir: Path) -> None:
    for name in ("default", "stdout", "none", "disabled"):
        composed(f"hydra/job_logging={name}")


@pytest.mark.parametrize("url", ["s3://evil/x", "s3://evil/${name}", "${elsewhere}"])
def test_a_config_file_does_not_choose_where_weights_are_sent(url: str, workdir: Path) -> None:
    """blocked by: `checkpoint.dir` is taken from the command line, conf/checkpoint/ and the primary config only"""
    chosen = experiment(f"elsewhere: s3://evil/x\ncheckpoint: {{dir: '{url}'}}\n")
    error = refused(chosen)
    assert "checkpoint.dir: a config file must not choose where the weights are sent" in error.message
    assert "set it on the command line" in error.fix
    Path("conf/checkpoint").mkdir()
    Path("conf/checkpoint/store.yaml").write_text("defaults: [default]\ndir: s3://mine/x\n")
    assert "must not choose" in refused("checkpoint=store", chosen).message


@pytest.mark.honest
def test_the_project_chooses_where_weights_are_sent(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "me")
    assert composed("checkpoint.dir=s3://mine/x")["checkpoint"]["dir"] == "s3://mine/x"
    chosen = experiment("seed: 3\n")
    assert composed(chosen, "checkpoint.dir=s3://mine/x")["checkpoint"]["dir"] == "s3://mine/x"
    Path("conf/checkpoint").mkdir()
    Path("conf/checkpoint/store.yaml").write_text("defaults: [default]\ndir: s3://mine/${oc.env:USER}\n")
    assert composed("checkpoint=store", chosen)["checkpoint"]["dir"] == "s3://mine/me"
    Path("conf/config.yaml").write_text(
        "defaults: [{model: mlp}, {data: digits}, _self_, {experiment: null}]\ncheckpoint: {dir: s3://mine/y}\n"
    )
    assert composed(chosen)["checkpoint"]["dir"] == "s3://mine/y"


# Files.


def bomb(levels: int = 9) -> str:
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def test_an_anchor_bomb_is_refused_at_once(workdir: Path) -> None:
    """blocked by: aliases are counted before they are expanded"""
    assert len(bomb()) < 500
    error = refused(experiment(bomb()))
    assert "its aliases expand to too much" in error.message
    assert "evil.yaml" in error.message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("x: " + "{a: " * 5000 + "1" + "}" * 5000, "nested too deeply"),
        ("- " * 5000 + "x", "nested too deeply"),
        ("x: &a [*a]\n", "the anchor a holds itself"),
        ("x: &a {b: [1, {c: *a}]}\n", "the anchor a holds itself"),
        ("x:\n" + "".join(f"  k{i}: 1\n" for i in range(30_000)), "too many values"),
        ("x: " + "a" * (2 << 20), "larger than"),
    ],
    ids=["lists", "mappings", "dashes", "recursive", "recursive mapping", "many", "long"],
)
def test_files_have_limits(text: str, part: str, workdir: Path) -> None:
    """blocked by: limits of bytes, depth and values, before the file is built"""
    assert part in refused(experiment(text)).message


def test_a_pipe_as_config_file_is_refused_at_once(workdir: Path) -> None:
    """blocked by: only regular files are opened, and without waiting"""
    chosen = experiment("seed: 1\n")
    Path("conf/experiment/evil.yaml").unlink()
    os.mkfifo("conf/experiment/evil.yaml")
    refused(chosen)


@pytest.mark.honest
def test_ordinary_aliases_are_read(workdir: Path) -> None:
    chosen = experiment("a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, z: 3}\nc: [*a, *a]\n")
    config = composed(chosen)
    assert config["b"] == {"x": 1, "y": [1, 2], "z": 3}
    assert config["c"] == [config["a"], config["a"]]


@pytest.mark.honest
def test_every_shipped_file_is_far_below_the_limits() -> None:
    for path in (ROOT / "conf").rglob("*.yaml"):
        yaml_limits.require_small(path.read_text(), yaml_limits.MOST_NODES_WRITTEN // 20, deepest=10)


@pytest.mark.parametrize(
    "lines",
    [
        ["a0: xx", *(f"a{i}: ${{a{i - 1}}}${{a{i - 1}}}" for i in range(1, 17))],
        ["a0: [1, 2]", *(f'a{i}: ["${{a{i - 1}}}", "${{a{i - 1}}}"]' for i in range(1, 17))],
        ["a0: {x: 1}", *(f'a{i}: {{x: "${{a{i - 1}}}", y: "${{a{i - 1}}}"}}' for i in range(1, 17))],
        [f"a{i}: ${{a{i + 1}}}" for i in range(200)],
        ["a0: 0", *(f"a{i}: ${{oc.select:a{i - 1}}}${{oc.select:a{i - 1}}}" for i in range(1, 17))],
        ["n: a", "a0: 0", *(f"a{i}: ${{${{n}}{i - 1}}}${{${{n}}{i - 1}}}" for i in range(1, 17))],
        ["a0: " + "x" * 60_000, *(f"a{i}: ${{a0}}${{a0}}${{a0}}${{a0}}${{a0}}" for i in range(1, 9))],
    ],
    ids=["text", "lists", "mappings", "chain", "select", "dynamic", "size"],
)
def test_interpolations_have_limits(lines: list[str], workdir: Path) -> None:
    """blocked by: limits of number, depth and text of interpolations"""
    error = refused(experiment("\n".join(lines) + "\n"))
    assert "interpolations" in error.message


@pytest.mark.honest
def test_a_byte_order_mark_keeps_the_header(workdir: Path) -> None:
    chosen = experiment("seed: 5\n")
    path = Path("conf/experiment/evil.yaml")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert composed(chosen)["seed"] == 5


def test_one_bad_file_makes_no_command_read_the_others(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: only the files that are chosen are read"""
    for i in range(50):
        experiment("seed: 1\n", f"other{i}")
    opened: list[str] = []
    before = yaml_limits.read

    def read(path: Path) -> str:
        opened.append(path.name)
        return before(path)

    monkeypatch.setattr(yaml_limits, "read", read)
    Path("conf/experiment/bad.yaml").write_bytes(b"# @package _global_\nx: \xff\xfe\n")
    assert "bad.yaml is not UTF-8" in refused("experiment=bad").message
    Path("conf/experiment/bad.yaml").write_text("x: ${a\n")
    assert "bad.yaml" in refused("experiment=bad").message
    assert not [name for name in opened if name.startswith("other")]
    assert composed("experiment=other1")["seed"] == 1


@pytest.mark.parametrize("path", ["pkg://antigravity", "pkg://mine.conf", "structured://x", "http://evil"])
def test_a_search_path_imports_nothing(path: str, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: only folders may be searched"""
    Path("mine").mkdir()
    Path("mine/__init__.py").write_text("open('PWNED', 'w')\n")
    monkeypatch.syspath_prepend(str(workdir))
    assert "hydra.searchpath" in refused(f"hydra.searchpath=['{path}']").message
    Path("conf").mkdir(exist_ok=True)
    Path("conf/config.yaml").write_text(
        f"defaults: [{{model: mlp}}, {{data: digits}}, _self_]\nhydra: {{searchpath: ['{path}']}}\n"
    )
    assert "hydra.searchpath" in refused().message
    assert not Path("PWNED").exists()


def test_resolvers_of_another_folder_are_not_run(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """blocked by: resolvers.py is run in the project only"""
    other = tmp_path_factory.mktemp("other")
    (other / "resolvers.py").write_text(f"open({str(workdir / 'PWNED')!r}, 'w')\n")
    with pytest.raises(UserError, match="outside of the project"):
        compose([], config_dirs=[other])
    assert not Path("PWNED").exists()


# What is written.


def test_no_record_of_a_run_has_the_value_of_a_secret(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: values of secret variables are masked in every write"""
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    monkeypatch.setenv("DATABASE_URL", f"postgres://me:{PASSWORD}@db/x")
    overrides = [f"+note=a {SECRET} b", f"+url='postgres://me:{PASSWORD}@db/x'"]
    job = compose(overrides, config_dirs=[])
    with pytest.raises(UserError, match="has the value of MY_API_TOKEN") as caught:
        check(job.config)
    assert SECRET not in str(caught.value)
    run = RunDirectory.create(job.config, overrides=overrides, choices={}, code_root=workdir, hydra=frozen_hydra(job))
    run.write_outcome(AttemptOutcome(attempt=0, outcome="failed", reason=f"bad {SECRET}"))
    append_line(run.events_path, f'{{"event": "x", "text": "{SECRET}"}}')
    write_atomic(run.path / "more.txt", SECRET)
    found = [path for path in run.path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    found += [path for path in run.path.rglob("*") if path.is_file() and b"hunter2hunter" in path.read_bytes()]
    assert found == []
    assert run.config()["note"] == "a *** b"
    assert "***" in run.overrides_path.read_text()


def test_the_log_of_a_rank_has_no_secret(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: values of secret variables are masked in the streams of a rank"""
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    stream = io.StringIO()
    masked = secrets.MaskedStream(stream)
    print("token", SECRET, file=masked)
    masked.writelines([f"{SECRET}\n"])
    assert stream.getvalue() == "token ***\n***\n"
    # As a rank does it, with a traceback.
    code = (
        "import sys\nfrom pathlib import Path\nfrom trainer.runtime import process\n"
        "process.redirect_output(Path(sys.argv[1]))\nimport os, logging\nlogging.basicConfig(stream=sys.stderr)\n"
        "logging.warning(os.environ['MY_API_TOKEN'])\nraise RuntimeError('key ' + os.environ['MY_API_TOKEN'])\n"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code, str(workdir)], check=False, cwd=ROOT)
    log = RunDirectory(workdir).rank_log(0, 0).read_text()
    assert "RuntimeError: key ***" in log
    assert SECRET not in log
    assert process.redirect_output is not None


def test_the_tracking_service_gets_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: values of secret variables are masked before they are sent"""
    from trainer.tracking.weights_and_biases import masked

    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    assert masked({"a": [f"x{SECRET}"], "password": "abc", "n": 1}) == {"a": ["x***"], "password": "***", "n": 1}


@pytest.mark.honest
@pytest.mark.parametrize("value", ["finished", "disabled", "12345678", "/home/me/key", "short", "required"])
def test_ordinary_words_are_not_masked(value: str) -> None:
    assert secrets.mask(f"a {value} b", {"MY_TOKEN": value}) == f"a {value} b"


def test_values_of_secrets_are_masked_longest_first() -> None:
    """blocked by: the longest value is masked first"""
    environ = {"A_KEY": "abcdefg1", "B_KEY": "abcdefg1-and-more2", "C_PATH": "abcdefg1"}
    assert secrets.mask("abcdefg1-and-more2 abcdefg1", environ) == "*** ***"
    assert secrets.mask_inside({"x": ["abcdefg1", 1, None, ("abcdefg1",)]}, environ) == {
        "x": ["***", 1, None, ("***",)]
    }


def test_a_failure_record_has_no_secret(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: values of secret variables are masked in every write"""
    monkeypatch.setenv("MY_API_TOKEN", SECRET)
    run = RunDirectory(workdir)
    run.attempt_logs(0).mkdir(parents=True)
    fields = {name: None for name in Failure.__dataclass_fields__}
    write_atomic(run.failure_record(0, 0), json.dumps({**fields, "message": SECRET}))
    assert SECRET not in run.failure_record(0, 0).read_text()
