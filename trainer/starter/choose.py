"""Choice of an experiment from the contents of a folder and the hardware of a machine, each value with its reason.

The sizes are those of the hand-written experiments, which were measured (docs/models.md). Sizes in between and beyond
follow the rules given here. The result is a starting point to edit, not the outcome of a search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.starter.scan import AudioFiles, Contents, IdxFiles, Images, Texts, Tokens

CPU_SIDE, GPU_SIDE = 64, 224
"""Maximum image size without and with a GPU, in pixels per side."""
VGG_SIDE = 24
"""Minimum image size for the three pooling layers of `vgg_small`, in pixels per side."""
MANY = 20_000
"""Number of training samples from which large batches are used."""
CPU_SAMPLES, GPU_SAMPLES = 275_000, 10_000_000
"""Samples seen over all epochs, which sets the epochs: minutes on 2 CPU cores, about an hour on a GPU."""
CPU_STEPS = 240
"""Steps of 4,096 tokens of text: about four minutes on two CPU cores."""
MAX_PASSES = 8
"""Maximum passes over a text; more make a model memorize it (Muennighoff et al. 2023: 4 cost nothing)."""
TOKENS_PER_PARAMETER = 20
"""Compute-optimal number of tokens per parameter (Hoffmann et al. 2022)."""
DECODERS = ((3e6, 256, 4, 4), (25e6, 512, 8, 8), (85e6, 768, 12, 12), (300e6, 1024, 24, 16))
"""Decoder sizes: parameters without embeddings, dim, layers, heads."""


@dataclass(frozen=True)
class Machine:
    """The hardware to train on."""

    gpus: int
    cores: int

    @property
    def ranks(self) -> int:
        """Number of ranks: one per GPU; without a GPU one per core, at most two."""
        return self.gpus or min(2, self.cores)

    def __str__(self) -> str:
        return f"{self.gpus} GPUs" if self.gpus > 1 else "1 GPU" if self.gpus else f"no GPU, {self.cores} CPU cores"


@dataclass
class Plan:
    """An experiment: options of config groups, values by section, and their reasons."""

    contents: Contents
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """One sentence per section."""

    def choose(self, group: str, option: str, why: str, **values: Any) -> None:
        """Select an option of a config group, and set values in it."""
        self.groups[group] = option
        self.fill(group, why, **values)

    def fill(self, section: str, why: str, **values: Any) -> None:
        """Set the values of a section."""
        self.values[section], self.reasons[section] = values, why

    def without(self, groups: set[str]) -> None:
        """Remove the choices for these groups and sections, which the command line sets."""
        for group in groups & {*self.groups, *self.values}:
            for part in (self.groups, self.values, self.reasons):
                part.pop(group, None)


def choose(contents: Contents, machine: Machine) -> Plan:
    """Return the experiment for this data on this machine."""
    plan = Plan(contents)
    if isinstance(contents, (Texts, Tokens)):
        _choose_language_model(plan, contents, machine)
    else:
        _choose_classifier(plan, contents, machine)
    if machine.ranks == 1:
        plan.choose("strategy", "single", "one process")
    else:
        plan.choose("strategy", "ddp", f"{machine.ranks} ranks, and the model fits on each of them")
    if not machine.gpus:
        plan.fill("resources", "one process per core, at most two", cpu_processes=machine.ranks)
    return plan


def _choose_classifier(plan: Plan, contents: Images | AudioFiles | IdxFiles, machine: Machine) -> None:
    files = 55_000 if isinstance(contents, IdxFiles) else contents.files
    epochs = max(3, min(40, round((GPU_SAMPLES if machine.gpus else CPU_SAMPLES) / max(1, files))))
    batch_size = (128 if machine.gpus else 64) * machine.ranks if files >= MANY else 16 * machine.ranks
    workers = min(8, machine.cores // machine.ranks) if machine.gpus else max(0, machine.cores // machine.ranks - 1)
    # With few epochs augmentation only makes learning harder; it pays when each sample is seen often.
    augment = epochs >= 10
    common: dict[str, Any] = {"root": str(contents.root), "batch_size": batch_size, "augment": augment}
    repeats = f"each sample is seen {epochs} times, {'so with' if augment else 'too few for'} augmentation"
    if isinstance(contents, IdxFiles):
        side = 28
        plan.choose("data", "fashion_mnist", f"IDX files; {repeats}", **common)
    elif isinstance(contents, Images):
        side = max(8, min(GPU_SIDE if machine.gpus else CPU_SIDE, contents.side))
        mirror = ", but not mirrored: grey images often are characters" if augment and contents.grey else ""
        values = {"num_workers": workers, "size": side, "grey": contents.grey, "mirror": not contents.grey}
        plan.choose("data", "image_folder", f"{side} pixels a side; {repeats}{mirror}", **common, **values)
    else:
        side = 40
        seconds = min(contents.seconds, 10.0 if machine.gpus else 4.0)
        timing: dict[str, Any] = {"num_workers": workers, "rate": contents.rate, "seconds": seconds}
        plan.choose("data", "audio_folder", f"log-mel spectrograms of {seconds:g} s; {repeats}", **common, **timing)
    _choose_network(plan, (side, files), machine, is_audio=isinstance(contents, AudioFiles))
    plan.fill("trainer", "enough to learn: minutes on a CPU, an hour on a GPU", max_epochs=epochs)
    why = "the usual optimizer for convolutional networks; the learning rate scales with the batch (Goyal et al. 2017)"
    plan.choose("optimizer", "sgd", why, lr=round(0.1 * min(8.0, batch_size / 128), 4))
    warmup = min(200, max(10, epochs * files // batch_size // 10))
    plan.choose("scheduler", "cosine", "warmup for a tenth of the steps, then decay to 0", warmup_steps=warmup)


def _choose_network(plan: Plan, size: tuple[int, int], machine: Machine, is_audio: bool) -> None:
    """Choose a convolutional network. `size`: pixels of a side, and number of training files."""
    side, files = size
    if not machine.gpus and not is_audio and side >= VGG_SIDE and files >= MANY:
        plan.choose("model", "vgg_small", "343 thousand parameters: learns more in few epochs than a small ResNet")
    elif not machine.gpus:
        plan.choose("model", "resnet_small", "78 thousand parameters: minutes without a GPU")
    elif side <= CPU_SIDE:
        plan.choose("model", "resnet18", f"first layer at full resolution, for {side} pixels a side", stem="small")
    elif files < 50_000:
        plan.choose("model", "resnet18", f"{files:,} images are too few for a deeper network")
    else:
        plan.choose("model", "resnet50", f"{files:,} images of {side} pixels a side")


def _choose_language_model(plan: Plan, contents: Texts | Tokens, machine: Machine) -> None:
    tokens = contents.tokens if isinstance(contents, Tokens) else round(0.9 * contents.num_bytes)
    length = 1024 if machine.gpus else 256
    length = max(16, min(length, tokens // 64))
    batch_size = machine.ranks * (32 if machine.gpus else max(1, 16 // machine.ranks))
    values: dict[str, Any] = {"root": str(contents.root), "batch_size": batch_size, "sequence_length": length}
    if isinstance(contents, Tokens):
        plan.choose("data", "token_shards", f"sequences of {length} tokens", **values)
    else:
        patterns = None if contents.root.is_file() else [f"*{suffix}" for suffix in contents.suffixes]
        why = f"bytes, which need no tokenizer; sequences of {length}"
        plan.choose("data", "text", why, **values, patterns=patterns)
    passes = MAX_PASSES * tokens // (batch_size * length)
    steps = max(20, passes if machine.gpus else min(passes, CPU_STEPS))
    limit = tokens / TOKENS_PER_PARAMETER if machine.gpus else DECODERS[0][0]
    fitting = [shape for shape in DECODERS if shape[0] <= limit] or [DECODERS[0]]
    size, dim, layers, heads = fitting[-1]
    why = f"{size / 1e6:g} million parameters and embeddings: " + (
        f"{TOKENS_PER_PARAMETER} tokens per parameter (Hoffmann et al. 2022)"
        if machine.gpus and len(fitting) > 1
        else "the smallest size"
    )
    # With more than two passes over the text a model without dropout begins to memorize it.
    dropout = 0.1 if steps * batch_size * length > 2 * tokens else 0.0
    plan.choose("model", "transformer", why, dim=dim, layers=layers, heads=heads, dropout=dropout)
    plan.fill(
        "trainer",
        f"{steps * batch_size * length / tokens:.1f} passes over the text, at most {MAX_PASSES}",
        max_epochs=None,
        max_steps=steps,
        val_check_interval=max(10, steps // 2),
        gradient_clip_norm=1.0,
    )
    rate = 0.002 if dim <= 256 else 0.0006
    why = "AdamW as for GPT-3 and Llama"
    plan.choose("optimizer", "adamw", why, lr=rate, betas=[0.9, 0.95], weight_decay=0.1)
    plan.choose("scheduler", "cosine", "warmup, then decay to a tenth", warmup_steps=max(5, steps // 6))
