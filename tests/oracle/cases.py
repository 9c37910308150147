"""What plain Lightning and we train: one case for each hook, callback, loader, scheduler, logger and idiom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LIGHTNING = "lightning.pytorch.callbacks"


@dataclass(frozen=True)
class Case:
    """A job by the paths of its parts, so that a configuration can name them.

    `trainer` has Lightning's names for both. `differs` says, for a number of ranks, why the weights may differ; all
    else is compared there, too.
    """

    name: str
    model: str = "modules.Plain"
    data: str | None = "data.Data"
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[dict[str, Any], ...] = ()
    model_arguments: dict[str, Any] = field(default_factory=dict)
    worlds: tuple[int, ...] = (1, 2)
    two_ranks: bool = False
    """Two ranks show what one does not: who has which samples, what is reduced, who decides. Without --slow the other
    cases are trained on one rank only."""
    differs: dict[int, str] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    """For us only: what is in the configuration here and in the module's code there."""
    stock: dict[str, Any] = field(default_factory=dict)
    """For plain Lightning only."""
    unused: bool = False
    """Not every backward pass reaches all parameters, of which DDP has to be told."""

    def node(self, part: str) -> dict[str, Any]:
        """The configuration of `model` or `data`."""
        target = getattr(self, part)
        return {"_target_": f"tests.oracle.{target}", **(self.model_arguments if part == "model" else {})}


def _callback(name: str, **arguments: Any) -> dict[str, Any]:
    where = name if "." in name else f"{LIGHTNING}.{name}"
    return {"_target_": where, **arguments}


_STATISTICS = {2: "batch normalisation sees the samples of one rank, and which those are is not the same"}
_PAIRS = {2: "the ranks' shares of a global batch are not the same, and the mean of means depends on them"}

_ORDER = {2: "the samples of a step are gathered in another order"}

MODULES = [
    Case("plain", two_ranks=True),
    Case("returns a dict", "modules.ReturnsDict"),
    Case("skips batches by None", "modules.SkipsBatches", worlds=(1,)),
    Case("skips epochs by -1", "modules.SkipsEpochs", two_ranks=True),
    Case("manual", "modules.Manual", two_ranks=True),
    Case("manual accumulation", "modules.ManualAccumulation", two_ranks=True),
    Case("manual scheduler", "modules.ManualScheduler"),
    Case("two optimizers", "modules.Adversaries", unused=True, two_ranks=True),
    Case("two optimizers, unequal steps", "modules.StepsTheCriticMoreOften", unused=True, two_ranks=True),
    Case("optimizer_step", "modules.WarmsUpInOptimizerStep"),
    Case("optimizer_zero_grad", "modules.OwnZeroGrad"),
    Case("configure_gradient_clipping", "modules.OwnClipping"),
    Case("backward", "modules.OwnBackward", two_ranks=True),
    Case("gradient hooks", "modules.ScalesGradients", two_ranks=True),
    Case("moving average of its own", "modules.Averages"),
    Case("rate halved by epoch", "modules.HalvesItsRate"),
    Case("epoch hooks", "modules.EpochHooks", two_ranks=True),
    Case("built in setup", "modules.BuiltInSetup"),
    Case("built in configure_model", "modules.BuiltInConfigureModel"),
    Case("no optimizer", "modules.NoOptimizer"),
    Case("its own loaders", "modules.OwnLoaders", data=None, two_ranks=True),
    Case("moves batches", "modules.MovesBatches"),
    Case("batches with names", "modules.NamedBatches", "data.NamedData"),
    Case("ragged targets", "modules.Ragged", "data.RaggedData"),
    Case("torchmetrics", "modules.Measured", two_ranks=True),
    Case("callbacks of its own", "modules.OwnCallbacks"),
    Case("buffers", "modules.Buffers", two_ranks=True),
    Case("batch normalisation", "modules.Normalised", differs=_STATISTICS),
    Case("dataloader_iter", "modules.ReadsTheIterator", two_ranks=True),
    Case("writes through its logger", "modules.LogsByItself", two_ranks=True),
    Case("state of its own in the checkpoint", "modules.Checkpoints"),
    Case("older package name", "other_package.OlderName"),
    Case("older package name, data, callback", "other_package.OlderName", "other_package.OlderData",
         callbacks=(_callback("tests.oracle.other_package.OlderCallback"),), two_ranks=True),
    Case("older package name, data alone", "modules.Plain", "other_package.OlderData",
         callbacks=(_callback("pytorch_lightning.callbacks.EarlyStopping", monitor="val_loss", patience=5),)),
]  # fmt: skip

OPTIMIZERS = [
    Case("length known", "optimizing.KnowsItsLength", two_ranks=True),
    Case("plateau", "optimizing.Plateau", two_ranks=True),
    Case("plateau of steps", "optimizing.PlateauOfSteps", worlds=(1,)),
    Case("by epoch", "optimizing.StepsByEpoch"),
    Case("every second step", "optimizing.StepsBySecondStep"),
    Case("lr_scheduler_step", "optimizing.OwnSchedulerStep"),
    Case("schedules in turn", "optimizing.SequentialSchedules"),
    Case("parameter groups", "optimizing.Groups"),
    Case("LBFGS", "optimizing.Newton", two_ranks=True),
    Case("partly frozen", "optimizing.PartlyFrozen", two_ranks=True),
]

LOADERS = [
    Case("data without validation", data="data.NoValidation"),
    Case("subclass", data="data.SubclassData", two_ranks=True),
    Case("dict of loaders", "modules.TwoSources", "data.DictData", two_ranks=True),
    Case("list of loaders", "modules.ListedSources", "data.ListData", two_ranks=True),
    Case("shortest of several", "modules.TwoSources", "data.ShortestData", two_ranks=True),
    Case("several validations", "modules.SeveralValidations", "data.ValidationsData", two_ranks=True),
    Case("stream", data="data.StreamData", two_ranks=True),
    Case("sampler that shares out", data="data.StridedData", stock={"use_distributed_sampler": False}, two_ranks=True),
    Case("DistributedSampler", data="data.DistributedData", two_ranks=True),
    Case("order of its own", data="data.BackwardsData", two_ranks=True),
    Case("batch sampler", data="data.BatchSamplerData", two_ranks=True),
    Case("batches from the dataset", data="data.UnbatchedData", two_ranks=True),
    Case("list of batches", data="data.Listed", two_ranks=True),
    Case("worker process", data="data.WorkersData", two_ranks=True),
    Case("smaller last batch", data="data.TailData", differs=_PAIRS, two_ranks=True),
    Case("split in setup", data="data.SplitInSetup", two_ranks=True),
    Case("asks its trainer", data="data.AsksItsTrainer", two_ranks=True),
    Case("data moves batches", data="data.MovesBatchesItself"),
]

CALLBACKS = [
    Case("early stopping", trainer={"max_epochs": 6},
         callbacks=(_callback("EarlyStopping", monitor="val_loss", patience=1, min_delta=0.5),), two_ranks=True),
    Case("accumulation by epoch", trainer={"max_epochs": 3},
         callbacks=(_callback("GradientAccumulationScheduler", scheduling={0: 1, 1: 3}),), two_ranks=True),
    Case("rate monitor", callbacks=(_callback("LearningRateMonitor", logging_interval="step"),)),
    Case("device monitor", callbacks=(_callback("DeviceStatsMonitor"),)),
    Case("summary", callbacks=(_callback("ModelSummary", max_depth=2),)),
    Case("averaged weights", trainer={"max_epochs": 4},
         callbacks=(_callback("StochasticWeightAveraging", swa_lrs=0.05, swa_epoch_start=2),), two_ranks=True),
    Case("exponential average", callbacks=(_callback("EMAWeightAveraging", decay=0.9),)),
    Case("thawed at an epoch", trainer={"max_epochs": 3}, callbacks=(_callback("tests.oracle.callbacks.Thaw"),),
         differs={2: "Lightning has each rank train thawed layers alone; tests/strategies has ours"}),
    Case("timer", trainer={"max_epochs": 2}, callbacks=(_callback("Timer", duration="00:01:00:00"),), two_ranks=True),
    Case("model checkpoint", two_ranks=True,
         callbacks=(_callback("ModelCheckpoint", monitor="val_loss", save_last=True),)),
    Case("pruning", callbacks=(_callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.3),)),
    Case("changes gradients", callbacks=(_callback("tests.oracle.callbacks.Noise"),)),
    Case("clips from the third batch", callbacks=(_callback("tests.oracle.callbacks.ClipsLate"),)),
    Case("stops the training", callbacks=(_callback("tests.oracle.callbacks.StopsAt", step=4),), two_ranks=True),
    Case("keeps a state", callbacks=(_callback("tests.oracle.callbacks.Counts"),)),
]  # fmt: skip

TRAINER = [
    Case("accumulation", trainer={"accumulate_grad_batches": 2}, two_ranks=True),
    Case("accumulation with a rest", trainer={"accumulate_grad_batches": 4}, two_ranks=True),
    Case("clipping by norm", trainer={"gradient_clip_val": 0.05}, two_ranks=True),
    Case("clipping by value", trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    Case("max_steps in mid-epoch", trainer={"max_steps": 4}),
    Case("min_epochs", trainer={"min_epochs": 3, "max_epochs": 4},
         callbacks=(_callback("EarlyStopping", monitor="val_loss", patience=0, min_delta=10.0),), two_ranks=True),
    Case("some training batches", trainer={"limit_train_batches": 2, "max_epochs": 3}),
    Case("a part of the training batches", trainer={"limit_train_batches": 0.67}, two_ranks=True),
    Case("one validation batch", "optimizing.Plateau", trainer={"limit_val_batches": 1}),
    Case("validation within an epoch", "modules.EpochHooks", trainer={"val_check_interval": 0.34}, two_ranks=True),
    Case("validation every second epoch", trainer={"check_val_every_n_epoch": 2, "max_epochs": 4}),
    Case("sanity check", "modules.Measured", trainer={"num_sanity_val_steps": 2}, two_ranks=True),
    Case("double precision", trainer={"precision": "64-true"}),
    Case("bf16-mixed", trainer={"precision": "bf16-mixed"},
         differs={2: "sums of half precision are not the same in another order"}),
    Case("anomalies", trainer={"detect_anomaly": True}),
    Case("overfit one batch", trainer={"overfit_batches": 1, "max_epochs": 3}, two_ranks=True),
    Case("loaders made again", trainer={"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}, two_ranks=True),
]  # fmt: skip

_NETWORK = {"_target_": "tests.oracle.modules.network"}

CONFIGS = [
    Case("its part of the configuration", "modules.TakesConfig",
         model_arguments={"cfg": {"sizes": [12, 16], "optim": {"lr": 0.2}}}),
    Case("partials", "modules.TakesPartials",
         model_arguments={
             "net": _NETWORK,
             "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.02, "betas": [0.8, 0.9]},
             "scheduler": {"_target_": "torch.optim.lr_scheduler.StepLR", "_partial_": True, "step_size": 1},
         }),
    Case("not recursive", "modules.TakesNodes",
         model_arguments={
             "_recursive_": False,
             "net": {**_NETWORK, "seed": 3},
             "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.3},
         }),
    *(Case(f"containers, {convert}", "modules.TakesContainers",
           model_arguments={
               "_convert_": convert, "plain": [1, 2], "config": {"more": {"a": 1}}, "nested": [{"b": [1]}, 2],
           })
      for convert in ("none", "partial", "object", "all")),
    Case("logger of its own", "modules.LogsByItself", overrides=("logger=csv",), two_ranks=True),
    Case("W&B, offline", "modules.LogsByItself", overrides=("tracking=wandb", "tracking.mode=offline"), worlds=(1,)),
]  # fmt: skip

HABITS = [
    Case("callbacks with a checkpoint", "habits.ReturnsCallbacks", trainer={"max_epochs": 4}, two_ranks=True),
    Case("collections of metrics", "habits.LogsCollections", two_ranks=True),
    Case("every reduction", "habits.Reduces", two_ranks=True),
    Case("logs in hooks", "habits.LogsInHooks"),
    Case("module asks its trainer", "habits.AsksItsTrainer", two_ranks=True),
    Case("module asks its trainer, accumulating", "habits.AsksItsTrainer", trainer={"accumulate_grad_batches": 2},
         differs={2: "its loss depends on the number of the batch, and a step's samples are in other micro-batches"}),
    Case("nested hyper-parameters", "habits.KeepsNestedHyperParameters",
         model_arguments={"_convert_": "all", "nested": {"a": {"b": [1, {"c": None}]}}, "lr": 0.2}),
    Case("named tuples", "habits.TakesFields", "habits_data.NamedTuples"),
    Case("dataclasses", "habits.TakesFields", "habits_data.DataclassBatches"),
    Case("batches of a class", "habits.TakesSamples", "habits_data.SampleBatches"),
    Case("nested batches", "habits.TakesNestedBatches", "habits_data.NestedBatches"),
    Case("the batch alone", "habits.TakesTheBatchAlone"),
    Case("open arguments", "habits.TakesMore"),
    Case("compiled by itself", "habits.Compiled", two_ranks=True),
    Case("a part in evaluation mode", "habits.FreezesParts"),
    Case("modes of its own", "habits.OwnModes"),
    Case("talks to the ranks", "habits.Talks", two_ranks=True),
    Case("a loss in double precision", "habits.Doubles", two_ranks=True),
    Case("tied parameters", "habits.Tied", two_ranks=True),
    Case("lazy layers", "habits.Lazy", two_ranks=True),
    Case("gradient penalty", "habits.Penalised", two_ranks=True),
    Case("two passes a step", "habits.Sharpness", two_ranks=True),
    Case("averaged copy", "habits.AveragedCopy"),
    Case("stops itself", "habits.StopsItself"),
    Case("saves by hand", "habits.SavesByHand", two_ranks=True),
    Case("augments", "habits.Augments"),
    Case("collate gives None", "habits.SkipsWhatIsNone", "habits_data.NothingForSomeBatches", worlds=(1,)),
    Case("names its validations", "habits.TwoValidationNames", "data.ValidationsData"),
    Case("validations in turn", "modules.SeveralValidations", "habits_data.SequentialValidations"),
    Case("validations side by side", "habits.ValidatesPairs", "habits_data.PairedValidations", two_ranks=True),
    Case("validations under names", "modules.SeveralValidations", "habits_data.NamedValidations"),
    Case("no validation loader in the list", data="habits_data.EmptyValidations"),
    Case("collects outputs", "habits.CollectsOutputs", two_ranks=True),
    Case("module within a module", "habits.Child"),
    Case("queue", "habits.TrainsTwoBatchesBack", differs=_ORDER),
    Case("epoch to the schedule", "habits_optimizing.TimmStyle"),
    Case("warm-up by super", "habits_optimizing.WarmsUp"),
    Case("steps rarely", "habits_optimizing.StepsRarely", two_ranks=True),
    Case("two schedules", "habits_optimizing.TwoSchedules"),
    Case("chained schedules", "habits_optimizing.Chained"),
    Case("lenient plateau", "habits_optimizing.LenientPlateau"),
    Case("plateau of the training", "habits_optimizing.PlateauOfTraining", trainer={"max_epochs": 5}, worlds=(1,)),
    Case("cyclic", "habits_optimizing.Cyclic"),
    Case("wrapped optimizer", "habits_optimizing.LooksAhead"),
    Case("sparse rows", "habits_optimizing.SparseRows", two_ranks=True),
    Case("two optimizers with schedules", "habits_optimizing.TwoWithSchedules", unused=True, two_ranks=True),
    Case("adds groups", "habits_optimizing.AddsGroups", trainer={"max_epochs": 3}),
    Case("joined datasets", data="habits_data.Joined"),
    Case("list as a dataset", data="habits_data.PlainLists"),
    Case("fetches batches", data="habits_data.FetchesData"),
    Case("samples under names", data="habits_data.KeysData"),
    Case("drop_last", data="habits_data.DropLast", two_ranks=True),
    Case("spawned worker", data="habits_data.Spawned", worlds=(1,)),
    Case("endless stream", data="habits_data.EndlessData", two_ranks=True,
         trainer={"limit_train_batches": 4, "max_epochs": 3}),
    Case("endless stream to max_steps", data="habits_data.EndlessData", trainer={"max_steps": 7, "max_epochs": -1}),
    Case("endless stream, validated by step", data="habits_data.EndlessData",
         trainer={"max_steps": 9, "val_check_interval": 3, "max_epochs": -1}, worlds=(1,)),
    Case("cycled loaders", "modules.TwoSources", "habits_data.CycledLoaders", two_ranks=True),
    Case("longest of several", "habits.FirstAndMore", "habits_data.LongestLoaders", two_ranks=True),
    Case("nested loaders", "habits.FirstAndListed", "habits_data.NestedLoaders", two_ranks=True),
    Case("data that asks for the epoch", data="habits_data.SetsEpochs",
         trainer={"reload_dataloaders_every_n_epochs": 1, "max_epochs": 3}),
    Case("dataset told its epoch", data="habits_data.SharedEpochs", trainer={"max_epochs": 3},
         callbacks=(_callback("tests.oracle.habits_callbacks.TellsTheEpoch"),)),
    Case("set up once", data="habits_data.PreparedOnce", two_ranks=True),
    Case("data keeps a state", data="habits_data.KeepsState"),
    Case("generated batches", data="habits_data.Generated", two_ranks=True),
    Case("data transfers batches", data="habits_data.TransfersItself"),
    Case("weighted sampler", data="habits_data.Weighted", stock={"use_distributed_sampler": True}, two_ranks=True),
    Case("subset sampler", data="habits_data.FewOfMany", two_ranks=True),
    Case("averages late", callbacks=(_callback("tests.oracle.habits_callbacks.AveragesLate"),)),
    Case("changes batches", callbacks=(_callback("tests.oracle.habits_callbacks.ChangesBatches"),)),
    Case("trains by metrics", callbacks=(_callback("tests.oracle.habits_callbacks.ReadsMetrics"),), worlds=(1,)),
    Case("swaps weights", callbacks=(_callback("tests.oracle.habits_callbacks.SwapsWeights"),)),
    Case("accumulates more by epoch", trainer={"max_epochs": 3},
         callbacks=(_callback("tests.oracle.habits_callbacks.ChangesAccumulation"),)),
    Case("sets the rate", callbacks=(_callback("tests.oracle.habits_callbacks.SetsTheRate"),)),
    Case("probes by itself", callbacks=(_callback("tests.oracle.habits_callbacks.ChecksItself"),), worlds=(1,)),
    Case("lottery ticket", callbacks=(_callback("ModelPruning", pruning_fn="l1_unstructured", amount=0.2,
         use_lottery_ticket_hypothesis=True),), worlds=(1,)),
    Case("rich bars", callbacks=(_callback("RichProgressBar"), _callback("RichModelSummary")),
         stock={"enable_progress_bar": True}, two_ranks=True),
    Case("tqdm bar", callbacks=(_callback("TQDMProgressBar", refresh_rate=1),), stock={"enable_progress_bar": True}),
    Case("early stopping on training", trainer={"max_epochs": 6},
         callbacks=(_callback("EarlyStopping", monitor="train_loss", patience=1, min_delta=10.0,
                              check_on_train_epoch_end=True),), two_ranks=True),
    Case("stops at a threshold", trainer={"max_epochs": 8},
         callbacks=(_callback("EarlyStopping", monitor="val_loss", stopping_threshold=1.5),)),
    Case("throughput", callbacks=(_callback("ThroughputMonitor", window_size=2, batch_size_fn={
         "_target_": "hydra.utils.get_method", "path": "tests.oracle.habits_callbacks.size"}),)),
    Case("min_steps", trainer={"min_steps": 11, "max_epochs": 6},
         callbacks=(_callback("EarlyStopping", monitor="val_loss", patience=0, min_delta=10.0),)),
    Case("float validation interval of 2 batches", "modules.EpochHooks",
         trainer={"val_check_interval": 0.5, "limit_val_batches": 0.5}, worlds=(1,)),
    Case("the first validation batches", data="habits_data.MuchValidation", two_ranks=True,
         trainer={"limit_val_batches": 2}),
    Case("a part of the validation", data="habits_data.MuchValidation", two_ranks=True,
         trainer={"limit_val_batches": 0.5}),
    Case("accumulation, plateau", "optimizing.Plateau", trainer={"accumulate_grad_batches": 4, "max_epochs": 3}),
    Case("accumulation, warm-up by super", "habits_optimizing.WarmsUp", trainer={"accumulate_grad_batches": 2}),
    Case("accumulation, schedules by step", "habits_optimizing.TwoSchedules", trainer={"accumulate_grad_batches": 4}),
    Case("clipping, hook", "habits.LogsInHooks",
         trainer={"gradient_clip_val": 0.05, "gradient_clip_algorithm": "norm"}),
    Case("sanity check of all", "habits.LogsCollections", trainer={"num_sanity_val_steps": -1}),
]  # fmt: skip

CASES = [*CONFIGS, *MODULES, *OPTIMIZERS, *LOADERS, *CALLBACKS, *TRAINER, *HABITS]
