"""Signatures read from source text, and the check of a target's arguments against them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.compose import compose
from trainer.config.instantiate import read_plain
from trainer.config.signature import Signature, argument_names, read
from trainer.config.sources import NotFound
from trainer.config.targets import problems_of_targets
from trainer.core.paths import conf_dir

MODULE = '''
"""A package of a user's."""
import dataclasses
from abc import ABC
import torch.nn as nn
from lightning.pytorch import LightningModule
from .inner import Base, helper as renamed
from .star import *

class Net(nn.Module):
    def __init__(self, width: int, depth: "int | None" = 2, *, scale: float = 1.0, names: list[str] = ()): ...

    @classmethod
    def small(cls, width: int = 3): ...

class Chosen(nn.Module):
    def __init__(self, kind: Literal["a", "b"] | None = None, level: Literal[Level.LOW] = Level.LOW): ...

class NoInit(LightningModule):
    pass

class Inherits(Base):
    pass

class Passes(Base):
    def __init__(self, extra: bool, **kwargs): ...

class Abstract(ABC):
    def __init__(self, size: int): ...

@dataclasses.dataclass
class Options:
    size: int
    kind: str = "a"

class Made(metaclass=type("M", (type,), {})):
    pass

@renamed
def decorated(a): ...

def function(a: int, b=1, **kwargs): ...

if True:
    def conditional(c): ...

alias = Net
'''


@pytest.fixture
def package(workdir: Path) -> Path:
    root = workdir / "mine"
    root.mkdir()
    (root / "__init__.py").write_text(MODULE)
    (root / "inner.py").write_text(
        "class Base:\n    def __init__(self, first: str, second=0): ...\ndef helper(f): ...\n"
    )
    (root / "star.py").write_text("def starred(s): ...\n")
    (root / "lazy.py").write_text("def __getattr__(name): ...\n")
    (root / "broken.py").write_text("def f(:\n")
    return workdir


def names(path: str, cwd: Path) -> list[str] | None:
    return argument_names(path, cwd)


def test_arguments_of_every_kind_of_definition(package: Path) -> None:
    assert names("mine.Net", package) == ["width", "depth", "scale", "names"]
    assert names("mine.Net.small", package) == ["width"]
    assert names("mine.Inherits", package) == ["first", "second"]
    assert names("mine.Base", package) == ["first", "second"]
    assert names("mine.renamed", package) == ["f"]
    assert names("mine.starred", package) == ["s"]
    assert names("mine.conditional", package) == ["c"]
    assert names("mine.NoInit", package) == []
    assert names("mine.Abstract", package) == ["size"]
    assert names("mine.Options", package) == ["size", "kind"]


def test_dynamic_definitions_are_unknown(package: Path) -> None:
    for path in ("mine.Made", "mine.decorated", "mine.alias", "mine.lazy.anything", "mine.broken.f", "math.sqrt"):
        assert read(path, package) is None, path
    assert names("mine.function", package) is None  # **kwargs
    assert names("mine.Passes", package) is None


def test_a_missing_name_comes_with_the_existing_ones(package: Path) -> None:
    missing = read("mine.Nett", package)
    assert isinstance(missing, NotFound)
    assert "Net" in missing.known
    assert isinstance(read("mine.inner.Bas", package), NotFound)
    assert isinstance(read("minne.Net", package), NotFound)


def test_installed_packages_are_read_through_their_reexports(workdir: Path) -> None:
    adamw = read("torch.optim.AdamW", workdir)
    assert isinstance(adamw, Signature)
    assert adamw.arguments[0].name == "params"
    assert {"lr", "betas", "weight_decay", "fused"} <= set(adamw.names())
    assert "patience" in (names("lightning.pytorch.callbacks.EarlyStopping", workdir) or [])
    # It inherits __init__ from nn.Module, whose file is not parsed.
    assert names("torch.nn.Identity", workdir) is None


@pytest.mark.executed
def test_reading_imports_nothing(package: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.config.signature import read\n"
        "for path in ('torch.optim.AdamW', 'mine.Net', 'lightning.pytorch.callbacks.EarlyStopping'):\n"
        "    assert read(path, Path.cwd()), path\n"
        "assert not {'torch', 'lightning', 'mine'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=package, check=True, timeout=300)


def problems(*overrides: str, cwd: Path) -> list[str]:
    config = compose(list(overrides), config_dirs=[], cwd=cwd).config
    return [str(problem) for problem in problems_of_targets(config, cwd)]


def use(cwd: Path, section: str, text: str) -> list[str]:
    file = cwd / "conf" / section / "mine.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return problems(f"{section}=mine", cwd=cwd)


@pytest.mark.parametrize(
    ("section", "text", "expected"),
    [
        ("model", "_target_: mine.Net\nwidth: 3\nwidht: 4\n", ["model.widht", "mine.Net takes no argument widht"]),
        ("model", "_target_: mine.Net\ndepth: 4\n", ["model.width is missing: mine.Net needs it"]),
        ("model", "_target_: mine.Net\nwidth: wide\n", ["model.width=wide: expected an integer"]),
        ("model", "_target_: mine.Net\nwidth: 1\ndepth: a\n", ["model.depth=a: expected an integer or null"]),
        ("model", "_target_: mine.Net\nwidth: true\n", ["model.width=true: expected an integer"]),
        ("model", "_target_: mine.Net\nwidth: 1\nnames: [1]\n", ["model.names=[1]: expected a list"]),
        ("model", "_target_: mine.Net\nwidth: 1\nscale: [1]\n", ["model.scale=[1]: expected a number"]),
        ("model", "_target_: mine.Chosen\nkind: 3\n", ["model.kind=3: expected a string or null"]),
        ("model", "_target_: mine.Nett\n", ["mine has no Nett", "did you mean mine.Net?"]),
        ("model", "_target_: minne.Net\n", ["no module named minne", "did you mean mine?"]),
        ("model", "_target_: mine.inner\n", ["this is a module", "Base"]),
        ("model", "_target_: not a path\n", ["not the import path"]),
        ("model", "hidden: 3\n", ["model._target_ is missing"]),
        ("data", "_target_: mine.Net\nwidth: 1\nbatch_sise: 3\n", ["data.batch_sise"]),
        ("optimizer", "_target_: torch.optim.AdamW\nlr: fast\n", ["optimizer.lr=fast: expected a number"]),
        ("optimizer", "_target_: torch.optim.AdmW\n", ["did you mean torch.optim.AdamW?"]),
        ("callbacks", "mine: {patience: 3}\n", ["callbacks.mine", "_target_"]),
        ("callbacks", "mine: 3\n", ["callbacks.mine"]),
        ("model", "_target_: mine.Net\nwidth: 1\nscale: {_target_: mine.Base, frst: 1}\n", ["model.scale.frst"]),
    ],
)
def test_problems_name_the_key_and_a_fix(package: Path, section: str, text: str, expected: list[str]) -> None:
    text_of_problems = "\n".join(use(package, section, text))
    for part in expected:
        assert part in text_of_problems


@pytest.mark.parametrize(
    ("section", "text"),
    [
        ("model", "_target_: mine.Net\nwidth: null\nscale: 2\ndepth: null\nnames: [a]\n"),
        ("model", "_target_: mine.Net.small\nwidth: 3\n"),
        ("model", "_target_: mine.Chosen\nkind: c\nlevel: 3\n"),
        ("model", "_target_: mine.Passes\nextra: true\nfirst: a\nanything: 3\n"),
        ("data", "_target_: mine.NoInit\nbatch_size: 8\nmicro_batch: null\nnum_workers: 0\n"),
        ("task", "_target_: mine.Options\nsize: 3\nkind: b\nmodel: 1\n"),
        ("optimizer", "_target_: torch.optim.SGD\nlr: 1\n"),
        ("scheduler", "_target_: torch.optim.lr_scheduler.StepLR\nstep_size: 3\n"),
        ("callbacks", "off: null\nmine: {_target_: mine.Net, _partial_: true}\n"),
        ("model", "_target_: mine.Net\n_args_: [3]\n"),
    ],
)
def test_valid_arguments_pass(package: Path, section: str, text: str) -> None:
    remaining = [problem for problem in use(package, section, text) if "model: " not in problem]
    if section == "task":
        remaining = [problem for problem in remaining if "task.model" not in problem]
    assert remaining == []


@pytest.mark.parametrize(
    "path",
    [
        *("os.system", "subprocess.run", "builtins.eval", "pathlib.Path.write_text", "urllib.request.urlopen"),
        *("importlib.import_module", "pickle.load", "shutil.rmtree", "socket.create_connection", "code.interact"),
        *("torch.load", "torch.hub.load", "torch.utils.cpp_extension.load", "torch.distributed.run.main"),
        *("numpy.load", "fsspec.open", "logging.config.dictConfig", "trainer.__builtins__", "hydra.utils.call"),
        *("mine.os.system", "mine.inner.subprocess.run", "mine.startfile"),
    ],
)
def test_targets_that_reach_files_and_processes_are_refused(package: Path, path: str) -> None:
    (package / "mine/__init__.py").write_text("import os\nfrom nt import *\n")  # exists on Windows only
    (package / "mine/inner.py").write_text("import subprocess\n")
    assert "refused" in "".join(use(package, "model", f"_target_: {path}\n"))


def test_the_arguments_of_every_target_that_ships_are_known(tmp_path: Path) -> None:
    """A misspelt argument of a target whose signature cannot be read is found only after the queue."""
    files = [path for path in conf_dir().rglob("*.yaml") if path.parent.name in ("model", "data", "task", "scheduler")]
    targets = {str(read_plain(path).get("_target_")) for path in files} - {"None"}
    unread = [target for target in sorted(targets) if not isinstance(read(target, tmp_path), Signature)]
    assert unread == []


def test_looking_for_pip_leaves_distutils_as_it_is() -> None:
    """setuptools' finder takes the question for the start of pip; torch.compile could not import setuptools then."""
    code = (
        "from trainer.config.sources import installed_spec\n"
        "assert installed_spec('pip') is not None\n"
        "import _distutils_hack\n"
        "assert 'spec_for_distutils' not in vars(_distutils_hack.DISTUTILS_FINDER)\n"
    )
    subprocess.run([sys.executable, "-c", "import _distutils_hack; _distutils_hack.add_shim()\n" + code], check=True)
