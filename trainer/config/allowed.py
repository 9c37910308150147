"""What a `_target_` may name outside of the user's own code, by the place and the kind of its definition.

A class needs a base class of `KINDS` and a definition in a module of `CLASS_MODULES`. A function must be in
`FUNCTIONS`, or be public in a module of `FUNCTION_MODULES`, which hold nothing that reaches files, processes or the
interpreter. `allow.py` applies the rules to source text, `allow_objects.py` to imported objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MODULE, OPTIMIZER, SCHEDULER = "a Module", "an Optimizer", "an LRScheduler"
DATA_MODULE, DATASET, CALLBACK, LOGGER = "a LightningDataModule", "a Dataset", "a Callback", "a Logger"
PART = "a part"
"""Kinds of classes that only arguments may be: samplers, transforms, distributions, configurations of models."""


def _below(packages: Iterable[str], *names: str) -> list[str]:
    return [f"{package}.{name}" for package in packages for name in names]


KINDS: dict[str, str] = {
    **dict.fromkeys(
        [
            *_below(("torch.nn", "torch.nn.modules", "torch.nn.modules.module"), "Module"),
            *_below(("lightning", "lightning.pytorch", "lightning.pytorch.core"), "LightningModule"),
            "lightning.pytorch.core.module.LightningModule",
            *("transformers.modeling_utils.PreTrainedModel", "transformers.PreTrainedModel"),
            *("torchmetrics.Metric", "torchmetrics.metric.Metric"),
        ],
        MODULE,
    ),
    **dict.fromkeys(_below(("torch.optim", "torch.optim.optimizer"), "Optimizer"), OPTIMIZER),
    **dict.fromkeys(
        [
            *_below(("torch.optim.lr_scheduler",), "LRScheduler", "_LRScheduler", "ReduceLROnPlateau"),
            "timm.scheduler.scheduler.Scheduler",
        ],
        SCHEDULER,
    ),
    **dict.fromkeys(
        [
            *_below(("lightning", "lightning.pytorch", "lightning.pytorch.core"), "LightningDataModule"),
            "lightning.pytorch.core.datamodule.LightningDataModule",
        ],
        DATA_MODULE,
    ),
    **dict.fromkeys(
        [*_below(("torch.utils.data", "torch.utils.data.dataset"), "Dataset", "IterableDataset")],
        DATASET,
    ),
    **dict.fromkeys(
        [
            *_below(("lightning", "lightning.pytorch", "lightning.pytorch.callbacks"), "Callback"),
            "lightning.pytorch.callbacks.callback.Callback",
        ],
        CALLBACK,
    ),
    **dict.fromkeys(
        [
            *_below(("lightning.pytorch.loggers", "lightning.pytorch.loggers.logger"), "Logger"),
            *_below(("lightning.fabric.loggers", "lightning.fabric.loggers.logger"), "Logger"),
        ],
        LOGGER,
    ),
    **dict.fromkeys(
        [
            *_below(("torch.utils.data", "torch.utils.data.dataloader"), "DataLoader"),
            *_below(("torch.utils.data", "torch.utils.data.sampler"), "Sampler"),
            *("torch.distributions.distribution.Distribution", "torch.distributions.Distribution"),
            *_below(("transformers.configuration_utils", "transformers"), "PretrainedConfig", "PreTrainedConfig"),
            *_below(("transformers.tokenization_utils_base", "transformers"), "PreTrainedTokenizerBase"),
            "transformers.data.data_collator.DataCollatorMixin",
            "transformers.utils.quantization_config.QuantizationConfigMixin",
            *_below(("peft.config", "peft"), "PeftConfig", "PeftConfigMixin"),
            "torchao.core.config.AOBaseConfig",
        ],
        PART,
    ),
}
"""Kind by base class, under each name that packages use for it."""

SECTION_KINDS = {
    "model": (MODULE,),
    "task": (MODULE,),
    "data": (DATA_MODULE,),
    "optimizer": (OPTIMIZER,),
    "scheduler": (SCHEDULER,),
    "callbacks": (CALLBACK,),
    "logger": (LOGGER,),
}
"""Kinds of a section's own target; nested targets may be of any kind."""

PACKAGES = {
    *("trainer", "torch", "lightning", "torchmetrics", "torchvision", "torchaudio", "timm", "transformers", "peft"),
    *("torchao", "deepspeed"),
}
"""Packages with classes that a configuration may name."""

CLASS_MODULES = (
    *("torch.nn", "torch.optim", "torch.utils.data", "torch.ao.nn", "torch.distributions"),
    *("lightning.pytorch", "lightning.fabric.loggers"),
    *("torchmetrics", "torchaudio.models", "torchaudio.transforms", "timm", "transformers", "peft", "torchao"),
    *("torchvision.models", "torchvision.datasets", "torchvision.transforms", "torchvision.ops", "deepspeed.ops"),
    *("trainer.models", "trainer.data", "trainer.tasks", "trainer.schedules", "trainer.callbacks"),
    *("trainer.faultbench", "trainer.tracking", "trainer.optimizers"),
)
"""Modules in which classes of `KINDS` may be defined."""

EXPORTING = ("lightning", "torchmetrics", "transformers", "peft", "torchao", "timm")
"""Packages whose names at the top level lead to their submodules."""

CLOSED_MODULES = (
    *("torch.utils.data.datapipes", "torch.utils.data.graph", "torch.nn.backends", "torch.nn.cpp"),
    *("lightning.pytorch.cli", "lightning.pytorch.serve", "lightning.pytorch.demos.mnist_datamodule"),
    *("transformers.integrations", "transformers.pipelines", "transformers.cli", "transformers.commands"),
    *("transformers.dynamic_module_utils", "transformers.testing_utils", "transformers.trainer"),
    *("timm.models._hub", "timm.models._helpers", "timm.utils", "timm.data.readers"),
    *("peft.auto", "peft.helpers", "deepspeed.ops.op_builder", "torchao.testing", "torchao._models"),
    *("trainer.data.cache", "torchvision.datasets.utils"),
    *("torchvision.datasets.lsun", "timm.data.dataset", "transformers.data.datasets"),  # indices that are pickles
)
"""Parts of `CLASS_MODULES` that open files for writing, load pickles or code, or start servers."""

FREE_MODULES = (
    *("torchvision.transforms", "timm.data.transforms", "timm.data.mixup", "timm.data.random_erasing"),
    *("trainer.data.augment", "trainer.schedules"),
)
"""Modules all of whose classes may be named: transforms of images have no common base class."""

FUNCTION_MODULES = (
    *("torchvision.models", "torchvision.transforms", "torchvision.ops", "torchmetrics.functional"),
    *("timm.models", "timm.layers", "timm.loss", "timm.scheduler", "trainer.schedules"),
)
"""Modules whose public functions compute, or build a model, a loss or a schedule."""

_CLOSED_FUNCTIONS = {
    *("timm.models.load_checkpoint", "timm.models.load_pretrained", "timm.models.load_state_dict"),
    *("timm.models.resume_checkpoint", "timm.models.load_state_dict_from_hf", "timm.models.push_to_hf_hub"),
    *("timm.models.save_for_hf", "timm.models.load_custom_pretrained", "timm.models.load_model_config_from_hf"),
    *("timm.models.remap_state_dict", "timm.models.clean_state_dict", "timm.models.download_cached_file"),
    *("timm.models.build_model_with_cfg", "timm.models.get_cache_dir", "timm.models.set_cache_dir"),
}

_ACTIVATIONS = (
    *("celu", "dropout", "dropout1d", "dropout2d", "dropout3d", "elu", "gelu", "glu", "gumbel_softmax", "hardshrink"),
    *("hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_softmax", "logsigmoid", "mish", "normalize", "prelu"),
    *("relu", "relu6", "rrelu", "selu", "sigmoid", "silu", "softmax", "softmin", "softplus", "softshrink", "softsign"),
    *("tanh", "tanhshrink", "threshold", "pad", "interpolate", "one_hot", "layer_norm", "rms_norm", "group_norm"),
    *("scaled_dot_product_attention", "cosine_similarity", "pairwise_distance", "pixel_shuffle", "pixel_unshuffle"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool1d", "avg_pool2d", "max_pool2d"),
)
_LOSSES = (
    *("binary_cross_entropy", "binary_cross_entropy_with_logits", "cosine_embedding_loss", "cross_entropy", "ctc_loss"),
    *("gaussian_nll_loss", "hinge_embedding_loss", "huber_loss", "kl_div", "l1_loss", "margin_ranking_loss"),
    *("mse_loss", "multi_margin_loss", "multilabel_margin_loss", "multilabel_soft_margin_loss", "nll_loss"),
    *("poisson_nll_loss", "smooth_l1_loss", "soft_margin_loss", "triplet_margin_loss"),
    "triplet_margin_with_distance_loss",
)
_INITIALISERS = (
    *("constant_", "dirac_", "eye_", "kaiming_normal_", "kaiming_uniform_", "normal_", "ones_", "orthogonal_"),
    *("sparse_", "trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zeros_", "calculate_gain"),
)
_OF_TORCH = (
    *("abs", "arange", "cos", "device", "exp", "eye", "full", "linspace", "log", "logspace", "nn.Parameter", "ones"),
    *("rand", "randn", "relu", "selu", "sigmoid", "sin", "softmax", "sqrt", "square", "tanh", "tensor", "zeros"),
    *("Generator", "Size", "nn.parameter.Parameter", "utils.data.default_collate", "utils.data.default_convert"),
    *("utils.data.random_split", "utils.data._utils.collate.default_collate", "utils.data.dataset.random_split"),
    *("optim.swa_utils.get_ema_multi_avg_fn", "optim.swa_utils.get_swa_multi_avg_fn"),
    *("optim.swa_utils.get_ema_avg_fn", "optim.swa_utils.get_swa_avg_fn"),
    *("nn.Embedding.from_pretrained", "nn.EmbeddingBag.from_pretrained"),
    *("nn.modules.sparse.Embedding.from_pretrained", "nn.modules.sparse.EmbeddingBag.from_pretrained"),
    *("utils.data.collate.default_collate", "utils.data._utils.collate.default_convert"),
)
_OF_NUMPY = (
    *(
        "arange",
        "array",
        "asarray",
        "linspace",
        "logspace",
        "ones",
        "zeros",
        "random.default_rng",
        "random.RandomState",
    ),
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool_"),
)
_OF_MATH = (
    *("ceil", "cos", "exp", "floor", "fsum", "gcd", "hypot", "isqrt", "lcm", "log", "log10", "log1p", "log2", "pow"),
    *("prod", "sin", "sqrt", "tan", "tanh", "degrees", "radians", "fabs", "copysign", "dist", "erf"),
)

DISCOVERY = {f"hydra.utils.get_{kind}" for kind in ("class", "method", "static_method", "object")}
"""Functions that return the object at their argument `path`, which is checked like a `_target_`."""

_MODEL_FUNCTIONS = (
    *("trainer.models.timm.create", *_below(("timm", "timm.models", "timm.models._factory"), "create_model")),
    *_below(("peft", "peft.mapping_func", "peft.mapping"), "get_peft_model"),
)
_DATA_FUNCTIONS = (
    *("trainer.data.hf_dataset.hf_dataset", "trainer.data.stream.Stream"),
    "lightning.pytorch.core.datamodule.LightningDataModule.from_datasets",
    "lightning.pytorch.LightningDataModule.from_datasets",
)
_OPTIMIZER_FUNCTIONS = _below(
    ("timm.optim", "timm.optim._optim_factory", "timm.optim.optim_factory"), "create_optimizer_v2"
)
_SCHEDULES = _below(
    ("transformers", "transformers.optimization"),
    *("get_scheduler", "get_constant_schedule", "get_constant_schedule_with_warmup", "get_linear_schedule_with_warmup"),
    *("get_cosine_schedule_with_warmup", "get_cosine_with_hard_restarts_schedule_with_warmup", "get_wsd_schedule"),
    *("get_cosine_with_min_lr_schedule_with_warmup", "get_polynomial_decay_schedule_with_warmup"),
    "get_inverse_sqrt_schedule",
)
SECTION_FUNCTIONS: dict[str, Sequence[str]] = {
    "model": (*_MODEL_FUNCTIONS, "torchvision.models", "timm.models"),
    "task": (),
    "data": _DATA_FUNCTIONS,
    "optimizer": _OPTIMIZER_FUNCTIONS,
    "scheduler": ("trainer.schedules", "timm.scheduler", *_SCHEDULES),
    "callbacks": (),
    "logger": (),
}
"""Functions, and modules of functions, for a section's own target."""
FUNCTIONS = {
    *_MODEL_FUNCTIONS,
    *_DATA_FUNCTIONS,
    *_OPTIMIZER_FUNCTIONS,
    *_SCHEDULES,
    *DISCOVERY,
    *("hydra.utils.to_absolute_path", "hydra.utils.get_original_cwd"),
    *("omegaconf.DictConfig", "omegaconf.ListConfig", "omegaconf.OmegaConf.create", "omegaconf.OmegaConf.to_container"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.omegaconf.OmegaConf.create", "omegaconf.omegaconf.OmegaConf.to_container"),
    *(f"torch.nn.functional.{name}" for name in (*_ACTIVATIONS, *_LOSSES)),
    *(f"torch.nn.init.{name}" for name in _INITIALISERS),
    *(f"torch.{name}" for name in _OF_TORCH),
    *(f"numpy.{name}" for name in _OF_NUMPY),
    *(f"math.{name}" for name in _OF_MATH),
    *("collections.Counter", "collections.OrderedDict", "collections.defaultdict", "collections.deque"),
    *("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta"),
    *("decimal.Decimal", "fractions.Fraction", "functools.partial", "random.Random"),
    *_below(("transformers", "transformers.data.data_collator"), "DataCollatorWithPadding", "default_data_collator"),
    "lightning.pytorch.utilities.data.extract_batch_size",
}
"""Functions and classes that may be named one by one: they compute, or build an object from values."""

_DTYPES = (
    *("bfloat16", "bool", "complex128", "complex64", "double", "float", "float16", "float32", "float64", "half"),
    *("float8_e4m3fn", "float8_e5m2", "int", "int16", "int32", "int64", "int8", "long", "short", "uint8"),
)
VALUES = {
    *(f"torch.{name}" for name in _DTYPES),
    *(f"torch.{name}" for name in ("channels_last", "contiguous_format", "preserve_format", "strided", "inf", "pi")),
    *(f"{package}.{name}" for package in ("math", "numpy") for name in ("e", "inf", "nan", "pi")),
}
"""Objects for `hydra.utils.get_object` that are not called."""

BUILDERS = ("from_pretrained", "from_config", "for_model")
"""Class methods of transformers and peft that build a model, a tokenizer or a configuration."""
BUILDING = ("transformers", "peft")
LOADER = "load_from_checkpoint"
"""Lightning's class method: allowed with `weights_only: true`."""

REFUSED_ARGUMENTS = {
    **dict.fromkeys(
        ("trust_remote_code", "auto_map", "code_revision", "custom_pipeline", "use_kernels", "kernel_config"),
        "code from the model's folder would run",
    ),
    **dict.fromkeys(
        ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_custom_load"),
        "timm would unpickle the file",
    ),
    **dict.fromkeys(("megatron_core", "auto_mapping"), "peft would import the module that it names"),
}
"""Arguments that turn a model's file into code, and why."""
ARGUMENTS_OF = (
    "functools.partial",
    *("trainer.models.hf", "trainer.models.timm", "transformers", "timm", "peft"),
)
"""Where `REFUSED_ARGUMENTS` are refused."""


def under(name: str, modules: Iterable[str]) -> bool:
    """Return whether the dotted `name` is one of `modules`, or in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def holds_classes(name: str) -> bool:
    """Return whether a class with this dotted name may be named if it is of one of the `KINDS`."""
    package, _, rest = name.partition(".")
    exported = package in EXPORTING and rest[:1].isupper()
    return (exported or under(name, CLASS_MODULES)) and not under(name, CLOSED_MODULES)


def is_function(name: str, section: str = "") -> bool:
    """Return whether a function with this dotted name may be named, as the target of `section` or inside of one."""
    if section and not under(name, SECTION_FUNCTIONS[section]):
        return False
    if name in FUNCTIONS:
        return True
    parts = name.split(".")
    private = any(part.startswith("_") for part in parts)
    return under(name, FUNCTION_MODULES) and not (private or under(name, CLOSED_MODULES) or name in _CLOSED_FUNCTIONS)


def is_named(name: str, section: str) -> bool:
    """Return whether an object is listed by its full name, for the target of `section` or inside of one."""
    return (name in FUNCTIONS or name in VALUES) and (not section or under(name, SECTION_FUNCTIONS[section]))


def is_builder(name: str) -> bool:
    """Return whether this is a class method that builds a model, or Lightning's loader, of a class that may be named.

    `allow.argument_refusal` judges their arguments.
    """
    package, method = name.partition(".")[0], name.rpartition(".")[2]
    known = method == LOADER or (method in BUILDERS and package in BUILDING)
    return known and holds_classes(name)
