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
from trainer.checks.config import check
from trainer.config import allow, instantiate, nodes
from trainer.config.compose import compose
from trainer.config.problems import Problems
from trainer.config.sources import NotFound, find
from trainer.config.targets import problems_of_targets
from trainer.core.errors import UserError

KEPT = "tests.config.recorder.Kept"
COMMAND = "touch PWNED"
EXPRESSION = "open('PWNED', 'w')"


def get(path: str) -> dict[str, Any]:
    return {"_target_": "hydra.utils.get_method", "path": path}


def called(path: str, *args: Any, **arguments: Any) -> dict[str, Any]:
    return {"_target_": path, **({"_args_": list(args)} if args else {}), **arguments}


RELU = {"_target_": "torch.nn.ReLU"}
ATTACKS: dict[str, dict[str, Any]] = {
    # evaluation of text
    "typing evaluates a forward reference": called("typing.ForwardRef._evaluate", EXPRESSION),
    "typing hints": called("typing.get_type_hints", get("mine.Net")),
    "typing_extensions hints": called("typing_extensions.get_type_hints", get("mine.Net")),
    "inspect signature": called("inspect.signature", get("mine.net"), eval_str=True),
    "eval": called("builtins.eval", EXPRESSION),
    "exec": called("builtins.exec", EXPRESSION),
    "import": called("builtins.__import__", "antigravity"),
    "compile": called("builtins.compile", EXPRESSION, "x", "eval"),
    "sympy": called("sympy.sympify", EXPRESSION),
    "sympy parser": called("sympy.parsing.sympy_parser.parse_expr", EXPRESSION),
    "sympy lambdify": called("sympy.lambdify", ["x"], EXPRESSION),
    "mpmath": called("mpmath.mp.quad", get("builtins.print"), [0, 1]),
    "jinja2": called("jinja2.Template", "{{ cycler.__init__.__globals__.os.system('touch PWNED') }}"),
    "jinja2 environment": called("jinja2.Environment.from_string", "{{ 1 }}"),
    "pygments lexer file": called("pygments.lexers.load_lexer_from_file", "evil.py"),
    "pygments formatter file": called("pygments.formatters.load_formatter_from_file", "evil.py"),
    "numexpr in numpy": called("numpy.f2py.compile", "x"),
    "pydantic": called("pydantic.create_model", "M", x=EXPRESSION),
    "networkx": called("networkx.read_gpickle", "evil.pkl"),
    "onnxscript": called("onnxscript.script"),
    "doctest": called("doctest.run_docstring_examples", EXPRESSION, {}),
    "code": called("code.interact"),
    "runpy": called("runpy.run_path", "evil.py"),
    "timeit": called("timeit.timeit", EXPRESSION),
    "cProfile": called("cProfile.run", EXPRESSION),
    "trace": called("trace.Trace.run", EXPRESSION),
    "pdb": called("pdb.run", EXPRESSION),
    # torch
    "benchmark timer": called("torch.utils.benchmark.Timer", EXPRESSION),
    "benchmark timer where it is defined": called("torch.utils.benchmark.utils.timer.Timer", EXPRESSION),
    "fx graph module": called("torch.fx.GraphModule", RELU, {}),
    "fx graph module where it is defined": called("torch.fx.graph_module.GraphModule", RELU, {}),
    "fx code": called("torch.fx.graph_module._forward_from_src", EXPRESSION, {}),
    "fx exec": called("torch.fx.graph_module._exec_with_source", EXPRESSION, {}),
    "package importer": called("torch.package.PackageImporter", "evil.pt"),
    "package's private importer": called("torch.package.importer._SysImporter.import_module", "antigravity"),
    "tree map": called("torch.utils._pytree.tree_map", get("mine.net"), [1]),
    "load": called("torch.load", "evil.pt"),
    "load where it is defined": called("torch.serialization.load", "evil.pt"),
    "legacy load": called("torch.serialization._legacy_load", "evil.pt"),
    "save": called("torch.save", 1, "PWNED"),
    "hub": called("torch.hub.load", "evil/evil", "evil"),
    "cpp extension": called("torch.utils.cpp_extension.load_inline", "evil", "int main"),
    "a class of cpp_extension": called("torch.utils.cpp_extension.CppExtension", "evil", ["evil.cpp"]),
    "a module that calls remotely": called("torch.distributed.nn.api.remote_module.RemoteModule", "w", "os.system"),
    "jit load": called("torch.jit.load", "evil.pt"),
    "jit script module": called("torch.jit.ScriptModule"),
    "jit compilation unit": called("torch.jit.CompilationUnit", "def f(): pass"),
    "a library of operators": called("torch.ops.load_library", "evil.so"),
    "classes": called("torch.classes.load_library", "evil.so"),
    "model zoo": called("torch.utils.model_zoo.load_url", "http://evil"),
    "an opener among the datasets": called("torch.utils.data.datapipes.iter.FileOpener", ["PWNED"], mode="w"),
    "an opener where it is defined": called(
        "torch.utils.data.datapipes.iter.fileopener.FileOpenerIterDataPipe", ["PWNED"], mode="w"
    ),
    "spawn": called("torch.multiprocessing.spawn", get("mine.net")),
    "elastic": called("torch.distributed.run.main", ["evil.py"]),
    "rpc": called("torch.distributed.rpc.init_rpc", "w"),
    "store": called("torch.distributed.TCPStore", "0.0.0.0", 1234),
    "a checkpoint reader": called("torch.distributed.checkpoint.FileSystemReader", "evil"),
    "dcp load": called("torch.distributed.checkpoint.load", {}),
    "export": called("torch.export.load", "evil.pt2"),
    "inductor": called("torch._inductor.aoti_load_package", "evil.pt2"),
    "compile backend": called("torch.compile", RELU, backend="evil"),
    "dynamo": called("torch._dynamo.optimize", "evil"),
    "profiler": called("torch.profiler.profile"),
    "from_file": called("torch.from_file", "PWNED", shared=True, size=8),
    "storage from file": called("torch.UntypedStorage.from_file", "PWNED", True, 8),
    "tensorboard": called("torch.utils.tensorboard.SummaryWriter", "PWNED"),
    "a tensor's method": called("torch.Tensor.map_", 1),
    "a private function of nn": called("torch.nn.functional._verify_batch_size", [1]),
    "import through nn": called("torch.nn.functional.importlib.import_module", "antigravity"),
    "through nn to warnings": called("torch.nn.modules.module.warnings.warn", "x"),
    "numpy in torch": called("torch.utils.data._utils.worker.os.system", COMMAND),
    # numpy
    "numpy library": called("numpy.ctypeslib.load_library", "evil", "."),
    "tofile": called("numpy.ndarray.tofile", [1], "PWNED"),
    "numpy load": called("numpy.load", "evil.npy", allow_pickle=True),
    "numpy where it is defined": called("numpy.lib._npyio_impl.load", "evil.npy", allow_pickle=True),
    "memmap": called("numpy.memmap", "PWNED", mode="w+", shape=[1]),
    "numpy open": called("numpy.DataSource.open", "evil"),
    "apply": called("numpy.apply_along_axis", get("mine.net"), 0, [1]),
    "vectorize": called("numpy.vectorize", get("mine.net")),
    "fromregex": called("numpy.fromregex", "x", "y", "i4"),
    "scipy": called("scipy.io.loadmat", "evil.mat"),
    "sklearn": called("sklearn.datasets.load_svmlight_file", "x"),
    "joblib": called("joblib.load", "evil"),
    "imageio": called("imageio.imwrite", "PWNED", [1]),
    "skimage": called("skimage.io.imsave", "PWNED", [1]),
    "PIL": called("PIL.Image.open", "evil.png"),
    # chains
    "partial of system": called("functools.partial", get("os.system"), COMMAND),
    "reduce": called("functools.reduce", get("mine.net"), [COMMAND]),
    "operator call": called("operator.call", get("os.system"), COMMAND),
    "attrgetter": called("operator.attrgetter", "__globals__"),
    "methodcaller": called("operator.methodcaller", "system", COMMAND),
    "map": called("builtins.map", get("os.system"), [COMMAND]),
    "starmap": called("itertools.starmap", get("os.system"), [[COMMAND]]),
    "getattr": called("builtins.getattr", get("mine.net"), "__globals__"),
    "type": called("builtins.type", "Evil", [], {}),
    "make_dataclass": called("dataclasses.make_dataclass", "x", []),
    "namedtuple": called("collections.namedtuple", "x", "y"),
    "deepcopy": called("copy.deepcopy", 1),
    "get_class": {"_target_": "hydra.utils.get_class", "path": "subprocess.Popen"},
    "get_object": {"_target_": "hydra.utils.get_object", "path": "sys.modules"},
    "get_static_method": {"_target_": "hydra.utils.get_static_method", "path": "os.system"},
    "hydra instantiates": called("hydra.utils.instantiate", {"_target_": "os.system"}),
    "omegaconf loads": called("omegaconf.OmegaConf.load", "evil.yaml"),
    "a resolver": called("omegaconf.OmegaConf.register_new_resolver", "x", get("mine.net")),
    "left to the target": {"_target_": KEPT, "_recursive_": False, "inner": [called("os.system", COMMAND)]},
    "a method left to the target": {"_target_": KEPT, "_recursive_": False, "inner": get("os.system")},
    "in positional arguments": called("torch.nn.Sequential", called("os.system", COMMAND)),
    "in a list of mappings": {"_target_": KEPT, "x": [{"y": {"z": called("os.system", COMMAND)}}]},
    "partial": {"_target_": "os.system", "_partial_": True, "_args_": [COMMAND]},
    # re-exports by the user's modules
    "a name of the user": called("mine.system", COMMAND),
    "a module of the user": called("mine.subprocess.run", COMMAND),
    "an alias": called("mine.loader", "evil.pt"),
    "a partial of the user's module": called("mine.bound"),
    "double underscores": called("mine.net.__globals__.get", "os"),
    "globals of a class": called("mine.Net.__init__.__globals__.get", "os"),
    # this package and Lightning
    "our import": called("trainer.config.instantiate.import_module", "antigravity"),
    "our writer": called("trainer.core.files.write_atomic", "PWNED", "x"),
    "our cache": called("trainer.data.cache.prepared", "PWNED", get("mine.net")),
    "our reader of pickles": called("trainer.checkpoint.foreign.read_pickled", "evil.pt"),
    "our loader": called("trainer.checkpoint.io.load_state", "evil", weights_only=False),
    "our command line": called("trainer.cli.main", ["rm", "x"]),
    "our n-grams": called("trainer.data.ngram.main", ["x"]),
    "our tokens": called("trainer.data.tokenizers.write_tokens", "PWNED", [], None),
    "our node": called("trainer.supervise.node.main"),
    "our starter": called("trainer.starter.folder.expand", ["data=PWNED"]),
    "Lightning's loader": called("lightning.pytorch.core.saving._load_from_checkpoint", get("mine.Net"), "evil.ckpt"),
    "a checkpoint of the user's class": called("mine.Net.load_from_checkpoint", "evil.ckpt"),
    "a checkpoint without weights_only": called("mine.Net.load_from_checkpoint", "evil.ckpt", weights_only=False),
    "Lightning's files": called("lightning.fabric.utilities.cloud_io._load", "evil.ckpt"),
    "Lightning's command line": called("lightning.pytorch.cli.LightningCLI"),
    "a callback of the command line": called("lightning.pytorch.cli.SaveConfigCallback", None, {}, "PWNED"),
    "Lightning's server": called("lightning.pytorch.serve.ServableModuleValidator"),
    "Lightning's launcher": called("lightning.fabric.cli._run"),
    "Lightning's data": called("lightning.pytorch.demos.mnist_datamodule.MNIST", "evil"),
    "deepspeed launcher": called("deepspeed.launcher.runner.main", ["evil.py"]),
    "deepspeed builder": called("deepspeed.ops.op_builder.builder.OpBuilder", "evil"),
    "a metric's helper": called("torchmetrics.utilities.imports.RequirementCache", "x"),
    # other packages
    "fsspec": called("fsspec.open", "PWNED", "w"),
    "cloudpickle": called("cloudpickle.loads", "x"),
    "requests": called("requests.get", "http://evil"),
    "huggingface_hub": called("huggingface_hub.snapshot_download", "evil/evil"),
    "wandb": called("wandb.init"),
    "wandb's launch": called("wandb.sdk.launch.launch", "evil"),
    "safetensors": called("safetensors.torch.save_file", {}, "PWNED"),
    "tokenizers": called("tokenizers.Tokenizer.from_file", "evil"),
    "click": called("click.edit", "x", editor=COMMAND),
    "setuptools": called("setuptools.setup", script_args=["x"]),
    "pip": called("pip.main", ["install", "evil"]),
    "pytest": called("pytest.main", ["evil.py"]),
    "ninja": called("ninja._program", "ninja", []),
    "virtualenv": called("virtualenv.cli_run", ["PWNED"]),
    "mkdocs": called("mkdocs.__main__.cli"),
    "rich": called("rich.inspect", 1),
    "psutil": called("psutil.Popen", [COMMAND]),
    "filelock": called("filelock.FileLock", "PWNED"),
    "antlr": called("antlr4.FileStream", "evil"),
    "yaml": called("yaml.unsafe_load", "x"),
    "os": called("os.system", COMMAND),
    "pathlib": called("pathlib.Path.write_text", "PWNED", "x"),
    "subprocess": called("subprocess.Popen", [COMMAND]),
    "ctypes": called("ctypes.CDLL", "evil.so"),
    "logging": called("logging.config.dictConfig", {"version": 1}),
    "importlib": called("importlib.import_module", "antigravity"),
    "atexit": called("atexit.register", get("mine.net")),
    "weakref": called("weakref.finalize", 1, get("mine.net")),
    "threading": called("threading.Timer", 0, get("mine.net")),
    "concurrent": called("concurrent.futures.ThreadPoolExecutor", 1, "x", get("mine.net")),
    "shelve": called("shelve.open", "PWNED"),
    "sqlite": called("sqlite3.connect", "PWNED"),
    "webbrowser": called("webbrowser.open", "http://evil"),
    "transformers' pipeline": called("transformers.pipeline", "text-generation", "evil/evil"),
    "transformers with code": called("transformers.AutoModel.from_pretrained", "evil/evil", trust_remote_code=True),
    "transformers' kernels": called("transformers.AutoModel.from_pretrained", "e", attn_implementation="evil/kernel"),
    "transformers' loader of classes": called(
        "transformers.dynamic_module_utils.get_class_from_dynamic_module", "a.B", "evil/evil"
    ),
    "a partial with code": called(
        "functools.partial", get("transformers.AutoModel.from_pretrained"), "evil", trust_remote_code=True
    ),
    "auto_map of ours": called("trainer.models.hf.HuggingFace", config={"model_type": "gpt2", "auto_map": {"a": "b"}}),
    "code of ours": called("trainer.models.hf.HuggingFace", config={"model_type": "gpt2", "trust_remote_code": True}),
    "timm unpickles": called("timm.create_model", "resnet50", checkpoint_path="evil.pth"),
    "timm unpickles for us": called("trainer.models.timm.create", "resnet50", options={"checkpoint_path": "evil.pth"}),
    "timm's folder": called("timm.create_model", "local-dir:evil"),
    "timm's loader": called("timm.models.load_checkpoint", RELU, "evil.pth"),
    "peft imports": called("peft.LoraConfig", megatron_core="antigravity"),
    "torchvision downloads": called("torchvision.datasets.utils.download_url", "http://evil", "."),
    "torchvision writes": called("torchvision.io.write_file", "PWNED", 1),
}
_NOT_INSTALLED = {"transformers", "timm", "peft", "torchvision"}

USERS = """
import functools
import subprocess
from os import system

import torch
from lightning.pytorch import LightningModule
from torch import load as loader


def net(*args, **kwargs):
    raise RuntimeError("called")


bound = functools.partial(system, "touch PWNED")
act = torch.nn.functional.gelu


class Net(LightningModule):
    def __init__(self, *args, **kwargs):
        super().__init__()
"""


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
    """At the prompt, alone and nested; in the worker, where only a node that all checks pass is called."""
    node = ATTACKS[name]
    before = set(project.iterdir())
    top = str(node["_target_"]).partition(".")[0]
    installed = not isinstance(find(top, project), NotFound)
    assert installed or top in _NOT_INSTALLED or top == "networkx", "the attack names nothing that is here"
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
    if top not in _NOT_INSTALLED or installed:
        assert is_refusal(caught.value) or "has no" in caught.value.message or "exist" in caught.value.message
    assert reached == []
    assert set(project.iterdir()) - before <= {project / "__pycache__"}
    assert all(at_prompt) or name in LEFT_TO_THE_WORKER or not installed, (name, at_prompt)


LEFT_TO_THE_WORKER = {
    "a partial of the user's module",
    "jinja2 environment",
}
"""Attacks that source text does not show."""


def test_it_is_the_definition_that_counts(project: Path) -> None:
    """An alias of an activation may be named, one of a loader may not, whatever the alias."""
    built = instantiate.instantiate({"_target_": "mine.Net", "f": get("mine.act")})
    assert type(built).__name__ == "Net"
    (refused,) = problems("model", {"_target_": "mine.loader", "f": "x"}, project)
    assert "torch.serialization.load" in refused.message
    assert "security.allow=[torch.serialization.load]" in refused.fix


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


@pytest.mark.parametrize("target", HONEST)
def test_an_honest_target_is_accepted_at_both_places(target: str, project: Path) -> None:
    assert allow.refusal(target, "model.part._target_", project) is None
    assert callable(instantiate.locate(target, "model.part._target_"))


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


def config_targets(folder: Path) -> set[str]:
    """Return every target that the config files and generated files below a folder name."""
    found: set[str] = set()
    for path in folder.rglob("*.yaml"):
        for node in nodes.nodes_inside(yaml.safe_load(path.read_text()), ""):
            found.add(str(node[1]["_target_"]))
    return found


def test_every_shipped_config_names_what_is_allowed() -> None:
    targets = config_targets(ROOT / "conf")
    assert len(targets) > 40
    assert [one for one in targets if allow.refusal(one, "x.y._target_", ROOT)] == []


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "tests" / "projects").iterdir()))
def test_the_configs_of_test_projects_name_what_is_allowed(folder: str) -> None:
    project = ROOT / "tests" / "projects" / folder
    for target in config_targets(project) if project.is_dir() else ():
        assert allow.refusal(target, "x.y._target_", project) is None


def test_the_oracles_modules_are_allowed() -> None:
    for file in (ROOT / "tests" / "oracle").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                assert allow.refusal(f"tests.oracle.{file.stem}.{node.name}", "model._target_", ROOT) is None


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_passes_the_checks_of_targets(experiment: str) -> None:
    config = compose([f"experiment={experiment}"], config_dirs=[]).config
    assert problems_of_targets(config, ROOT) == []


def test_a_new_project_passes(workdir: Path) -> None:
    arguments = [sys.executable, "-m", "trainer", "init", "fresh"]
    subprocess.run(arguments, check=True, cwd=workdir, capture_output=True, env={"PATH": "", "PYTHONPATH": str(ROOT)})
    config = compose([], config_dirs=[], cwd=workdir / "fresh").config
    check({**config, "resources": {**config["resources"], "gpus": 0}}, workdir / "fresh")


def test_modules_of_the_standard_library_are_not_of_the_project(project: Path) -> None:
    """Whatever folder the job starts in, including one that holds the interpreter."""
    import sysconfig

    for folder in (Path("/"), Path(sys.prefix), Path(sysconfig.get_path("stdlib")).parent):
        assert allow.refusal("os.system", "model._target_", folder) is not None
        assert allow.refusal("sympy.sympify", "model._target_", folder) is not None


def test_a_config_file_must_not_allow_itself(workdir: Path) -> None:
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


def test_every_problem_is_reported_at_once(project: Path) -> None:
    config = compose([], config_dirs=[], cwd=project).config
    config["model"] = {"_target_": "os.system", "x": {"_target_": "sympy.sympify"}}
    config["callbacks"]["evil"] = {"_target_": "torch.hub.load"}
    with pytest.raises(Problems) as caught:
        check({**config, "resources": {**config["resources"], "gpus": 0}}, project)
    assert len([one for one in caught.value.problems if "refused" in one.message]) == 3
