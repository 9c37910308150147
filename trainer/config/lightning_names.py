"""Option names of other trainers: Lightning's Trainer (old and new), LightningCLI, the template, Hugging Face.

Imported only if a job has one of these names, so that other jobs do not pay for the table.
"""

from __future__ import annotations

from typing import Any

from trainer.config.lightning_arguments import TAKEN
from trainer.config.problems import as_written
from trainer.config.typed import key_names
from trainer.core.errors import UserError

_REMOVE = "remove it"
_CALLBACK = "callbacks.{name}._target_=lightning.pytorch.callbacks."

WRITE = {
    # Lightning 1.x
    "gpus": "resources.gpus_per_node={value}",
    "num_gpus": "resources.gpus_per_node={value}",
    "num_processes": "resources.cpu_processes={value} on CPU, resources.gpus_per_node={value} on GPUs",
    "nb_gpu_nodes": "resources.nodes={value}",
    "auto_select_gpus": f"{_REMOVE}; CUDA_VISIBLE_DEVICES selects GPUs",
    "tpu_cores": f"{_REMOVE}: only NVIDIA GPUs and CPUs are supported",
    "ipus": f"{_REMOVE}: only NVIDIA GPUs and CPUs are supported",
    "hpus": f"{_REMOVE}: only NVIDIA GPUs and CPUs are supported",
    "distributed_backend": "strategy={value}",
    "amp_level": "trainer.precision=16-mixed",
    "amp_backend": "trainer.precision=16-mixed",
    "auto_lr_find": _CALLBACK.format(name="lr_finder") + "LearningRateFinder",
    "auto_scale_batch_size": "data.micro_batch=auto: the largest that fits; the global batch stays as it is",
    "checkpoint_callback": f"{_REMOVE}: checkpoints are always saved (section checkpoint)",
    "early_stop_callback": "callbacks=early_stopping",
    "flush_logs_every_n_steps": f"{_REMOVE}: each logged line is written to disk immediately",
    "log_gpu_memory": "callbacks=device_stats",
    "max_nb_epochs": "trainer.max_epochs={value}",
    "min_nb_epochs": "trainer.min_epochs={value}",
    "move_metrics_to_cpu": _REMOVE,
    "multiple_trainloader_mode": "return a lightning.pytorch.utilities.CombinedLoader(loaders, mode) from the module",
    "overfit_pct": "trainer.overfit_batches={value}",
    "prepare_data_per_node": "set it on the data module: self.prepare_data_per_node = {value}",
    "process_position": f"{_REMOVE}: `trainer fit` draws the progress bar",
    "progress_bar_refresh_rate": f"{_REMOVE}: `trainer fit` draws the progress bar",
    "reload_dataloaders_every_epoch": "trainer.reload_dataloaders_every_n_epochs=1",
    "replace_sampler_ddp": "trainer.use_distributed_sampler={value}",
    "resume_from_checkpoint": "`trainer resume RUN` resumes; finetune.init_from={value} starts from its weights",
    "row_log_interval": "trainer.log_every_n_steps={value}",
    "stochastic_weight_avg": "callbacks=swa",
    "terminate_on_nan": "resilience.on_nonfinite=stop",
    "test_percent_check": "trainer.limit_test_batches={value}",
    "track_grad_norm": "callbacks=gradient_norm",
    "train_percent_check": "trainer.limit_train_batches={value}",
    "truncated_bptt_steps": f"{_REMOVE}; split the sequence in a training_step with automatic_optimization = False",
    "val_percent_check": "trainer.limit_val_batches={value}",
    "weights_save_path": "runs_dir={value}",
    "weights_summary": "trainer.enable_model_summary=true",
    # Hugging Face's TrainingArguments, and other common names
    "adam_epsilon": "optimizer.eps={value}",
    "auto_find_batch_size": "data.micro_batch=auto",
    "batch_size": "data.batch_size={value} (global: samples per optimizer step over all ranks)",
    "bf16": "trainer.precision=bf16-mixed",
    "ckpt_path": "`trainer resume RUN` resumes; finetune.init_from={value} starts from its weights",
    "cudnn_benchmark": "trainer.benchmark={value}",
    "dataloader_num_workers": "data.num_workers={value}",
    "ddp_bucket_cap_mb": "strategy.bucket_cap_mb={value}",
    "ddp_find_unused_parameters": "strategy.find_unused_parameters={value}",
    "epochs": "trainer.max_epochs={value}",
    "eval_steps": "trainer.val_check_interval={value}",
    "fp16": "trainer.precision=16-mixed",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches={value}",
    "gradient_checkpointing": "strategy.activation_checkpointing=full",
    "learning_rate": "optimizer.lr={value}",
    "logging_steps": "trainer.log_every_n_steps={value}",
    "lr": "optimizer.lr={value}",
    "lr_scheduler_type": "scheduler={value}",
    "max_grad_norm": "trainer.gradient_clip_norm={value}",
    "micro_batch_size": "data.micro_batch={value}",
    "num_epochs": "trainer.max_epochs={value}",
    "num_train_epochs": "trainer.max_epochs={value}",
    "num_workers": "data.num_workers={value}",
    "optim": "optimizer={value}",
    "output_dir": "runs_dir={value}",
    "per_device_train_batch_size": "data.micro_batch={value}",
    "save_steps": "checkpoint.every_n_steps={value}",
    "save_total_limit": "checkpoint.keep_last={value}",
    "seed": "seed={value}",
    "steps": "trainer.max_steps={value}",
    "tf32": "trainer.matmul_precision=high",
    "torch_compile": "strategy.compile={value}",
    "warmup_steps": "scheduler.warmup_steps={value}",
    "weight_decay": "optimizer.weight_decay={value}",
}
"""Replacement for each unsupported name under `trainer.`."""


def refusal(key: str, value: Any) -> UserError:
    """Return the error for a key of WRITE, with the user's value in the replacement."""
    return UserError(f"trainer.{key}={as_written(value)}: unknown key", _fix(WRITE[key], as_written(value)))


def _fix(template: str, value: str) -> str:
    text = template.format(value=value)
    return text if text.startswith((_REMOVE, "`", "set ", "return ")) else f"write {text}"


_EVALUATE = "`trainer evaluate RUN --split=test` after the training"
TOP = {
    "ckpt_path": WRITE["ckpt_path"],
    "deterministic": "trainer.deterministic={value}",
    "extras": f"{_REMOVE}; `trainer fit --cfg job` prints the configuration",
    "hparams_search": "-m with several values, as in -m optimizer.lr=0.1,0.01: one job per value",
    "lr_scheduler": "scheduler={value}",
    "model_checkpoint": "callbacks=model_checkpoint",
    "optimized_metric": "checkpoint.monitor={value}",
    "paths": "runs_dir={value} for the directory of the runs; define your own keys in config files",
    "print_config": "`trainer fit --cfg job` prints the configuration",
    "seed_everything": "seed={value}",
    "tags": "tracking.tags={value}",
    "task_name": "name={value}",
    "test": f"{_REMOVE}; {_EVALUATE}",
    "train": f"{_REMOVE}; to evaluate without training: `trainer evaluate RUN --split=test`",
}
"""Replacement for each top-level name of the lightning-hydra-template and of LightningCLI."""


def refusal_at_top(line: str, key: str, value: str) -> UserError | None:
    """Return the error for a top-level `key` of another project; None if the name is not known from one."""
    from trainer.config.schema import TrainerOptions

    text = TOP.get(key) or WRITE.get(key)
    if text is None and key in (*TAKEN, *key_names(TrainerOptions)):
        text = f"trainer.{key}={{value}}"
    return UserError(f"{line}: unknown key", _fix(text, value)) if text is not None else None


def problems_at_top(config: dict[str, Any]) -> list[UserError]:
    """Return an error for each top-level key of the template whose value requests what `trainer fit` does not do."""
    problems = []
    if config.get("ckpt_path") is not None:
        problems.append(refusal_at_top(f"ckpt_path={config['ckpt_path']}", "ckpt_path", str(config["ckpt_path"])))
    if config.get("train") is False:
        problems.append(refusal_at_top("train=false", "train", "false"))
    return [problem for problem in problems if problem is not None]


def left_for_later(config: dict[str, Any]) -> str:
    """Return a line for the user if the template's `test: true` requests another command; else an empty string."""
    return f"test: true has no effect: run {_EVALUATE}" if config.get("test") is True else ""
