"""Instantiating targets, and reading a frozen configuration back."""

from __future__ import annotations

import functools
from collections import Counter, OrderedDict
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.config.instantiate import accepts, freeze, instantiate, load, locate, read_plain
from trainer.config.strategy import Ddp
from trainer.core.errors import UserError


def test_nested_nodes_are_built_first() -> None:
    inner = {"_target_": "datetime.timedelta", "days": 2}
    built = instantiate({"_target_": "collections.OrderedDict", "a": inner, "b": [inner, 1], "c": {"d": inner}})
    two_days = timedelta(days=2)
    assert built == OrderedDict(a=two_days, b=[two_days, 1], c={"d": two_days})


def test_partial_positional_and_not_recursive() -> None:
    part = instantiate({"_target_": "fractions.Fraction", "_partial_": True, "numerator": 3})
    assert isinstance(part, functools.partial)
    assert part(denominator=4) == Fraction(3, 4)
    assert instantiate({"_target_": "fractions.Fraction", "_args_": [6]}, 3) == Fraction(1, 2)
    plain = {"_target_": "datetime.timedelta", "days": 2}
    kept = instantiate({"_target_": "collections.OrderedDict", "_recursive_": False, "a": plain})
    assert kept == {"a": plain}


def test_extra_arguments_take_precedence() -> None:
    assert instantiate({"_target_": "fractions.Fraction", "numerator": 3}, numerator=5) == 5


def test_accepts_requires_a_named_argument() -> None:
    assert accepts(Fraction, "denominator")
    assert not accepts(Counter, "anything")


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "pathlib.Path.write_text",
        "trainer.config.sources.sys.exit",
        "trainer.config.instantiate.import_module",
    ],
)
def test_dangerous_targets_are_refused_at_the_call_too(path: str) -> None:
    with pytest.raises(UserError, match="refused") as caught:
        locate(path, "model._target_")
    assert caught.value.message.startswith("model._target_=")


def test_reexports_of_the_standard_library_are_seen_through(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / "innocent_looking.py").write_text(
        "import subprocess\nfrom os import system as model\nrun = subprocess.run\n"
    )
    monkeypatch.syspath_prepend(workdir)
    for name in ("model", "run", "subprocess.run", "subprocess"):
        with pytest.raises(UserError, match="refused"):
            locate(f"innocent_looking.{name}")


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("nowhere_at_all.Net", "no module named nowhere_at_all"),
        ("trainer.config.nothing.Net", "trainer.config.nothing does not exist"),
        ("trainer.config.batch.Nothing", "trainer.config.batch.Nothing does not exist"),
        ("tests.config.test_instantiate.KEPT", "not a class or a function"),
    ],
)
def test_a_target_that_cannot_be_called_is_refused(path: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        locate(path, "model._target_")
    assert part in caught.value.message


def test_a_node_without_target(workdir: Path) -> None:
    with pytest.raises(UserError, match=r"model\._target_ is missing"):
        instantiate({"hidden": 3}, where="model")


def test_import_errors_inside_a_users_module_keep_their_cause(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(workdir)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        locate("needs_more.Net")


def test_a_frozen_configuration_round_trips(workdir: Path) -> None:
    config = compose(["trainer.max_steps=5", 'name="größe"', "optimizer.eps=1e-9"], config_dirs=[]).config
    path = workdir / "config.yaml"
    path.write_text(freeze(config), encoding="utf-8")
    assert read_plain(path) == config
    loaded = load(path)
    assert loaded.trainer.max_steps == 5
    assert type(loaded.strategy) is Ddp
    assert vars(loaded.strategy) == vars(Ddp())
    assert loaded.model == config["model"]
    assert loaded.optimizer["eps"] == 1e-9
    assert list(read_plain(path)) == list(config)
