"""Targets that execute are refused at the prompt and in the worker, and honest ones are not.

Each attack is a node for the section `model`, or nested in one. The prompt must refuse it from source text, or leave it
to the worker, which must refuse it before it calls anything: a call of the target would raise `Called`.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.security.attacks import ATTACKS, KEPT, NOT_INSTALLED, USERS, get
from trainer.checks.config import check
from trainer.config import allow, instantiate, nodes
from trainer.config.compose import compose
from trainer.config.problems import Problems, raise_all
from trainer.config.sources import NotFound, find
from trainer.config.targets import problems_of_targets
from trainer.core.errors import UserError


@pytest.fixture
def project(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (workdir / "mine.py").write_text(USERS)
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(instantiate, "_trusted", ())
    return workdir


def problems(section: str, node: dict[str, Any], project: Path, **more: Any) -> list[UserError]:
    config: dict[str, Any] = {name: {"_target_": "mine.net"} for name in ("model", "data", "task", "optimizer")}
    config = {**config, "scheduler": {}, "callbacks": {}, **more}
    return problems_of_targets({**config, section: node}, project)


def is_refusal(error: UserError) -> bool:
    return "refused" in error.message


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_before_anything_is_called(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the prompt, alone and nested; in the worker, where only a node that all checks pass is called.

    blocked by: a list of what may be named, judged by where the object is defined
    """
    node = ATTACKS[name]
    before = set(project.iterdir())
    top = str(node["_target_"]).partition(".")[0]
    installed = not isinstance(find(top, project), NotFound)
    assert installed or top in NOT_INSTALLED or top == "networkx", "the attack names nothing that is here"
    at_prompt = [
        any(map(is_refusal, problems("model", node, project))),
        any(map(is_refusal, problems("model", {"_target_": KEPT, "x": [node]}, project))),
    ]
    reached: list[str] = []

    def partial(target: Any, *args: Any, **arguments: Any) -> Any:
        harmless = re.search(r"recorder|_discovered|ReLU", f"{target!r}")
        return functools.partial(target, *args, **arguments) if harmless else lambda: reached.append(repr(target))

    monkeypatch.setattr(nodes, "functools", SimpleNamespace(partial=partial))
    try:
        with pytest.raises(UserError) as caught:
            instantiate.instantiate(node, where="model")
    except ModuleNotFoundError:
        pytest.fail("a module was imported before it was judged")
    assert reached == []
    assert set(project.iterdir()) - before <= {project / "__pycache__"}
    if not installed:
        pytest.skip(f"{top} is not installed")
    assert is_refusal(caught.value), caught.value.message
    assert all(at_prompt) or name in LEFT_TO_THE_WORKER, (name, at_prompt)


LEFT_TO_THE_WORKER = {
    "a partial of the user's module",
    "jinja2 environment",
}
"""Attacks that source text does not show."""


def test_it_is_the_definition_that_counts(project: Path) -> None:
    """An alias of an activation may be named, one of a loader may not, whatever the alias.

    blocked by: the definition counts, not the path that leads to it
    """
    built = instantiate.instantiate({"_target_": "mine.Net", "f": get("mine.act")})
    assert type(built).__name__ == "Net"
    (refused,) = problems("model", {"_target_": "mine.loader", "f": "x"}, project)
    assert "torch.serialization.load" in refused.message
    assert "security.allow=[torch.serialization.load]" in refused.fix


@pytest.mark.honest
def test_one_line_allows_all_that_is_refused_and_keeps_what_is_allowed(project: Path) -> None:
    """A list on the command line replaces the list of the config."""
    nodes = {
        "_target_": "torch.nn.Sequential",
        "_args_": [{"_target_": "sympy.Symbol"}, {"_target_": "jinja2.Template"}],
    }
    with pytest.raises(Problems) as caught:
        raise_all(problems("model", nodes, project, security={"allow": ["monai"]}))
    lines = set(re.findall(r"security\.allow=\[(.*)\]", caught.value.fix))
    assert lines == {"monai,sympy.core.symbol.Symbol,jinja2.environment.Template"}
    allowed = {"allow": lines.pop().split(",")}
    assert not any(map(is_refusal, problems("model", nodes, project, security=allowed)))


@pytest.mark.honest
def test_the_line_of_a_refusal_allows_the_target(project: Path) -> None:
    node = {"_target_": "sympy.Symbol", "name": "x"}
    (refused,) = problems("model", node, project)
    found = re.search(r"security\.allow=\[(.*)\]", refused.fix)
    assert found is not None
    assert not problems("model", node, project, security={"allow": [found[1]]})
    assert not problems("model", node, project, security={"allow": ["sympy"]})
    instantiate.trust([found[1]])
    assert str(instantiate.instantiate(node, where="model")) == "x"
    instantiate.trust(())
    with pytest.raises(UserError, match="refused"):
        instantiate.instantiate(node, where="model")


@pytest.mark.parametrize(
    ("section", "target", "kind"),
    [
        ("model", "torch.optim.SGD", "not a Module"),
        ("optimizer", "torch.nn.Linear", "not an Optimizer"),
        ("scheduler", "torch.optim.Adam", "not an LRScheduler"),
        ("data", "torch.utils.data.TensorDataset", "not a LightningDataModule"),
        ("task", "trainer.data.digits.Digits", "not a Module"),
    ],
)
def test_a_section_takes_its_own_kind(project: Path, section: str, target: str, kind: str) -> None:
    """blocked by: the base class of what a section takes"""
    found = [one for one in problems(section, {"_target_": target}, project) if is_refusal(one)]
    assert len(found) == 1
    assert kind in found[0].message
    with pytest.raises(UserError, match=kind):
        instantiate.locate(target, f"{section}._target_")
    assert allow.refusal(target, f"model.part.{section}._target_", project) is None


HONEST = [
    *("torch.nn.Linear", "torch.nn.modules.linear.Linear", "torch.nn.TransformerEncoderLayer", "torch.optim.Muon"),
    *("torch.optim.swa_utils.AveragedModel", "torch.optim.swa_utils.get_ema_multi_avg_fn", "torch.nn.Parameter"),
    *("torch.optim.lr_scheduler.OneCycleLR", "torch.optim.lr_scheduler.LambdaLR", "torch.nn.init.kaiming_normal_"),
    *("torch.utils.data.DataLoader", "torch.utils.data.WeightedRandomSampler", "torch.utils.data.TensorDataset"),
    *("torch.utils.data.default_collate", "torch.nn.functional.cross_entropy", "torch.nn.functional.gelu"),
    *("torch.tensor", "torch.Generator", "torch.distributions.Normal", "torch.nn.Embedding.from_pretrained"),
    *("lightning.pytorch.callbacks.LambdaCallback", "pytorch_lightning.callbacks.RichProgressBar"),
    *("lightning.pytorch.loggers.CSVLogger", "lightning.pytorch.demos.boring_classes.BoringModel"),
    *("torchmetrics.Accuracy", "torchmetrics.MetricCollection", "torchmetrics.classification.MulticlassF1Score"),
    *("torchmetrics.functional.accuracy", "torchmetrics.image.PeakSignalNoiseRatio", "trainer.schedules.cosine"),
    *(
        "trainer.models.layers.SwiGLU",
        "trainer.data.augment.CropAndFlip",
        "trainer.tasks.classification.Classification",
    ),
    *("deepspeed.ops.adam.DeepSpeedCPUAdam", "datetime.timedelta", "collections.OrderedDict", "functools.partial"),
    *("numpy.float32", "numpy.random.default_rng", "math.sqrt", "omegaconf.DictConfig"),
]


@pytest.mark.honest
@pytest.mark.parametrize("target", HONEST)
def test_an_honest_target_is_accepted_at_both_places(target: str, project: Path) -> None:
    assert allow.refusal(target, "model.part._target_", project) is None
    assert callable(instantiate.locate(target, "model.part._target_"))


@pytest.mark.honest
@pytest.mark.parametrize(
    "target",
    [
        *("transformers.BertForSequenceClassification", "transformers.AutoModelForCausalLM.from_pretrained"),
        *("transformers.GPT2Config", "transformers.get_cosine_schedule_with_warmup", "transformers.Adafactor"),
        *("timm.create_model", "timm.models.resnet50", "timm.scheduler.CosineLRScheduler", "timm.data.Mixup"),
        *("peft.LoraConfig", "peft.get_peft_model", "peft.PeftModel.from_pretrained", "torchao.optim.AdamW8bit"),
        *("torchvision.models.resnet50", "torchvision.transforms.v2.Compose", "torchvision.datasets.CIFAR10"),
        *("torchvision.transforms.ToTensor", "torchvision.ops.MLP", "torchvision.models.ResNet50_Weights.DEFAULT"),
    ],
)
def test_packages_that_may_be_installed_are_accepted_by_name(target: str, tmp_path: Path) -> None:
    """Not installed here: their modules are left empty, with names that are created at run time."""
    parts = target.split(".")
    names = [part for part in parts if part.islower() and part != parts[-1]]
    package = tmp_path
    for name in names:
        package /= name
        package.mkdir()
        (package / "__init__.py").write_text("def __getattr__(name): ...\n")
    source = tmp_path / parts[0]
    assert source.is_dir()
    assert allow.refusal(target, "model.part._target_", tmp_path) is None


@pytest.mark.parametrize(
    "defined",
    ["torchvision.datasets.lsun.LSUNClass", "timm.data.dataset.ImageDataset", "transformers.data.datasets.TextDataset"],
)
def test_a_dataset_that_unpickles_an_index_beside_the_data_is_refused(defined: str, tmp_path: Path) -> None:
    """By the module of its definition, which a name of the package leads to; the refusal says how to allow it.

    blocked by: a list of modules that unpickle
    """
    module, _, name = defined.rpartition(".")
    package = tmp_path.joinpath(*module.split("."))
    package.mkdir(parents=True)
    for folder in (package, *package.parents[: module.count(".")]):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text(
        f"from torch.utils.data import Dataset\n\nclass {name}(Dataset):\n    def __init__(self, root): ...\n"
    )
    (package.parent / "__init__.py").write_text(f"from {module} import {name}\n")
    refused = allow.refusal(f"{module.rpartition('.')[0]}.{name}", "data.part._target_", tmp_path)
    assert refused is not None
    assert f"security.allow=[{defined}]" in refused.error("data.part._target_", "x").fix
    assert allow.refusal(f"{module.rpartition('.')[0]}.{name}", "data.part._target_", tmp_path, [defined]) is None


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "aliases.timm.create_model", "checkpoint_path": "evil.pth"},
        {"_target_": "aliases.build", "model_name": "local-dir:evil"},
        {"_target_": "aliases.build", "_args_": ["resnet18", False, None, None, "evil.pth"]},
        {"_target_": "timm.create_model", "_args_": ["resnet18", False, {"file": "evil.pth"}]},
    ],
)
def test_refused_arguments_are_those_of_the_definition_and_have_no_places(
    node: dict[str, Any], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a name in the user's module, and by place: both at the prompt and in the worker, before the call.

    blocked by: a list of arguments that load files, by the definition of the target
    """
    (project / "timm").mkdir()
    (project / "timm" / "__init__.py").write_text("from timm.models._factory import create_model\n")
    (project / "timm" / "models").mkdir()
    (project / "timm" / "models" / "__init__.py").touch()
    (project / "timm" / "models" / "_factory.py").write_text(
        "def create_model(model_name, pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None,\n"
        "                 checkpoint_path=None):\n    raise RuntimeError('called')\n"
    )
    (project / "aliases.py").write_text("import timm\nfrom timm import create_model as build\n")
    for name in ("aliases", "timm", "timm.models", "timm.models._factory"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert any(map(is_refusal, problems("model", {"_target_": "mine.net", "net": node}, project)))
    with pytest.raises(UserError, match="refused"):
        instantiate.instantiate(node)
    assert allow.argument_refusal("timm.create_model", {"_args_": ["resnet18", True]}) is None
    assert allow.argument_refusal("mine.Net", {"checkpoint_path": "mine.pt"}, "mine.Net") is None


def config_targets(folder: Path) -> set[str]:
    """Return every target that the config files and generated files below a folder name."""
    found: set[str] = set()
    for path in folder.rglob("*.yaml"):
        for node in nodes.nodes_inside(yaml.safe_load(path.read_text()), ""):
            found.add(str(node[1]["_target_"]))
    return found


@pytest.mark.honest
def test_every_shipped_config_names_what_is_allowed() -> None:
    targets = config_targets(ROOT / "conf")
    assert len(targets) > 40
    assert [one for one in targets if allow.refusal(one, "x.y._target_", ROOT)] == []


@pytest.mark.honest
@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "tests" / "projects").iterdir()))
def test_the_configs_of_test_projects_name_what_is_allowed(folder: str) -> None:
    project = ROOT / "tests" / "projects" / folder
    for target in config_targets(project) if project.is_dir() else ():
        assert allow.refusal(target, "x.y._target_", project) is None


@pytest.mark.honest
def test_the_oracles_modules_are_allowed() -> None:
    for file in (ROOT / "tests" / "oracle").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                assert allow.refusal(f"tests.oracle.{file.stem}.{node.name}", "model._target_", ROOT) is None


@pytest.mark.honest
@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_passes_the_checks_of_targets(experiment: str) -> None:
    config = compose([f"experiment={experiment}"], config_dirs=[]).config
    assert problems_of_targets(config, ROOT) == []


@pytest.mark.honest
def test_a_new_project_passes(workdir: Path) -> None:
    arguments = [sys.executable, "-m", "trainer", "init", "fresh"]
    subprocess.run(arguments, check=True, cwd=workdir, capture_output=True, env={"PATH": "", "PYTHONPATH": str(ROOT)})
    config = compose([], config_dirs=[], cwd=workdir / "fresh").config
    check({**config, "resources": {**config["resources"], "gpus": 0}}, workdir / "fresh")


def test_modules_of_the_standard_library_are_not_of_the_project(project: Path) -> None:
    """Whatever folder the job starts in, including one that holds the interpreter.

    blocked by: the library is known by its folder, wherever the job starts
    """
    import sysconfig

    for folder in (Path("/"), Path(sys.prefix), Path(sysconfig.get_path("stdlib")).parent):
        assert allow.refusal("os.system", "model._target_", folder) is not None
        assert allow.refusal("sympy.sympify", "model._target_", folder) is not None


def test_a_config_file_must_not_allow_itself(workdir: Path) -> None:
    """blocked by: `security` is taken from the command line and the primary config only"""
    (workdir / "conf/experiment").mkdir(parents=True)
    evil = "# @package _global_\nsecurity: {allow: [os]}\nmodel: {_target_: os.system}\n"
    (workdir / "conf/experiment/evil.yaml").write_text(evil)
    with pytest.raises(UserError, match="must not give permissions to itself") as caught:
        compose(["experiment=evil"], config_dirs=[])
    assert "security.allow=[os]" in caught.value.fix
    assert compose(["security.allow=[sympy]"], config_dirs=[]).config["security"]["allow"] == ["sympy"]
    (workdir / "conf/config.yaml").write_text(
        "defaults: [{model: mlp}, {data: digits}, _self_, {experiment: null}]\nsecurity: {allow: [sympy]}\n"
    )
    assert compose([], config_dirs=[]).config["security"]["allow"] == ["sympy"]
    with pytest.raises(UserError, match="must not give permissions to itself"):
        compose(["experiment=evil"], config_dirs=[])


@pytest.mark.honest
def test_every_problem_is_reported_at_once(project: Path) -> None:
    config = compose([], config_dirs=[], cwd=project).config
    config["model"] = {"_target_": "os.system", "x": {"_target_": "sympy.sympify"}}
    config["callbacks"]["evil"] = {"_target_": "torch.hub.load"}
    with pytest.raises(Problems) as caught:
        check({**config, "resources": {**config["resources"], "gpus": 0}}, project)
    assert len([one for one in caught.value.problems if "refused" in one.message]) == 3
