"""From what a folder holds and what the machine has to an experiment: each choice with its reason.

The sizes are those that the hand-written experiments were measured with (docs/models.md); in between and beyond
they follow the rules named here. They are a start that can be edited, not a search.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.starter.look import Found, IdxFiles, Pictures, Recordings, Texts, Tokens

CPU_SIDE, GPU_SIDE = 64, 224
"""Pixels of a side at most."""
VGG_SIDE = 24
"""Pixels that are enough for its three poolings."""
MANY = 20_000
"""Samples that fill large batches."""
CPU_SAMPLES, GPU_SAMPLES = 275_000, 10_000_000
"""Pictures or recordings seen in all, which sets the epochs: minutes on two CPU cores, about an hour on a GPU."""
CPU_STEPS = 240
"""Of 4,096 tokens of text: about four minutes on two CPU cores."""
MOST_PASSES = 8
"""Over a text: after more, a model without much dropout learns it by heart (Muennighoff et al. 2023 find 4 free)."""
TOKENS_A_PARAMETER = 20
"""Hoffmann et al. 2022."""
DECODERS = ((3e6, 256, 4, 4), (25e6, 512, 8, 8), (85e6, 768, 12, 12), (300e6, 1024, 24, 16))
"""Parameters without embeddings, dim, layers, heads."""


@dataclass(frozen=True)
class Machine:
    """What there is to train on."""

    gpus: int
    cores: int

    @property
    def ranks(self) -> int:
        """One a GPU; without one, two processes where there are two cores."""
        return self.gpus or min(2, self.cores)

    def __str__(self) -> str:
        return f"{self.gpus} GPUs" if self.gpus > 1 else "1 GPU" if self.gpus else f"no GPU, {self.cores} CPU cores"


@dataclass
class Plan:
    """An experiment: options of groups, values by section, and why."""

    found: Found
    groups: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    """Section to one sentence."""

    def choose(self, group: str, option: str, why: str, **values: Any) -> None:
        """An option of a Hydra group and values in it."""
        self.groups[group] = option
        self.fill(group, why, **values)

    def fill(self, section: str, why: str, **values: Any) -> None:
        """Values of a section."""
        self.values[section], self.reasons[section] = values, why

    def without(self, groups: set[str]) -> None:
        """Leave these to the user, who named them on the command line."""
        for group in groups & {*self.groups, *self.values}:
            for part in (self.groups, self.values, self.reasons):
                part.pop(group, None)


def choose(found: Found, machine: Machine) -> Plan:
    """The experiment for this data on this machine."""
    plan = Plan(found)
    if isinstance(found, (Texts, Tokens)):
        _language(plan, found, machine)
    else:
        _classes(plan, found, machine)
    if machine.ranks == 1:
        plan.choose("strategy", "single", "one process")
    else:
        plan.choose("strategy", "ddp", f"{machine.ranks} ranks, and the model fits on each of them")
    if not machine.gpus:
        plan.fill("resources", "one process a core, two at most", cpu_processes=machine.ranks)
    return plan


def _classes(plan: Plan, found: Pictures | Recordings | IdxFiles, machine: Machine) -> None:
    files = 55_000 if isinstance(found, IdxFiles) else found.files
    epochs = max(3, min(40, round((GPU_SAMPLES if machine.gpus else CPU_SAMPLES) / max(1, files))))
    batch_size = (128 if machine.gpus else 64) * machine.ranks if files >= MANY else 16 * machine.ranks
    workers = min(8, machine.cores // machine.ranks) if machine.gpus else max(0, machine.cores // machine.ranks - 1)
    # Augmentation pays once the same samples come back; before, it only makes the few passes harder.
    augment = epochs >= 10
    common: dict[str, Any] = {"root": str(found.root), "batch_size": batch_size, "augment": augment}
    again = f"seen {epochs} times each, {'so with' if augment else 'too few for'} augmentation"
    if isinstance(found, IdxFiles):
        side = 28
        plan.choose("data", "fashion_mnist", f"IDX files; {again}", **common)
    elif isinstance(found, Pictures):
        side = max(8, min(GPU_SIDE if machine.gpus else CPU_SIDE, found.side))
        mirror = "" if not augment or not found.grey else ", but not mirrored: grey pictures often are characters"
        values = {"num_workers": workers, "size": side, "grey": found.grey, "mirror": not found.grey}
        plan.choose("data", "image_folder", f"{side} pixels a side; {again}{mirror}", **common, **values)
    else:
        side = 40
        seconds = min(found.seconds, 10.0 if machine.gpus else 4.0)
        timing: dict[str, Any] = {"num_workers": workers, "rate": found.rate, "seconds": seconds}
        plan.choose("data", "audio_folder", f"log-mel spectrograms of {seconds:g} s; {again}", **common, **timing)
    _network(plan, side, files, machine, is_sound=isinstance(found, Recordings))
    plan.fill("trainer", "samples enough to learn, in minutes on a CPU or an hour on a GPU", max_epochs=epochs)
    why = "what convolutional networks are trained with; its rate grows with the batch (Goyal et al. 2017)"
    plan.choose("optimizer", "sgd", why, lr=round(0.1 * min(8.0, batch_size / 128), 4))
    warmup = min(200, max(10, epochs * files // batch_size // 10))
    plan.choose("scheduler", "cosine", "a tenth of the steps to warm up, then down to 0", warmup_steps=warmup)


def _network(plan: Plan, side: int, files: int, machine: Machine, is_sound: bool) -> None:
    if not machine.gpus and not is_sound and side >= VGG_SIDE and files >= MANY:
        plan.choose("model", "vgg_small", "343 thousand parameters: learns more in few passes than a small ResNet")
    elif not machine.gpus:
        plan.choose("model", "resnet_small", "78 thousand parameters: minutes without a GPU")
    elif side <= CPU_SIDE:
        plan.choose("model", "resnet18", f"full size kept at first, for {side} pixels a side", stem="small")
    elif files < 50_000:
        plan.choose("model", "resnet18", f"{files:,} pictures are few for a deeper one")
    else:
        plan.choose("model", "resnet50", f"{files:,} pictures of {side} pixels a side")


def _language(plan: Plan, found: Texts | Tokens, machine: Machine) -> None:
    tokens = found.tokens if isinstance(found, Tokens) else round(0.9 * found.num_bytes)
    length = 1024 if machine.gpus else 256
    length = max(16, min(length, tokens // 64))
    batch_size = machine.ranks * (32 if machine.gpus else max(1, 16 // machine.ranks))
    values: dict[str, Any] = {"root": str(found.root), "batch_size": batch_size, "sequence_length": length}
    if isinstance(found, Tokens):
        plan.choose("data", "token_shards", f"windows of {length} tokens", **values)
    else:
        patterns = None if found.root.is_file() else [f"*{suffix}" for suffix in found.suffixes]
        why = f"bytes, which need no vocabulary; windows of {length}"
        plan.choose("data", "text", why, **values, patterns=patterns)
    passes = MOST_PASSES * tokens // (batch_size * length)
    steps = max(20, passes if machine.gpus else min(passes, CPU_STEPS))
    limit = tokens / TOKENS_A_PARAMETER if machine.gpus else DECODERS[0][0]
    fitting = [shape for shape in DECODERS if shape[0] <= limit] or [DECODERS[0]]
    size, dim, layers, heads = fitting[-1]
    why = f"{size / 1e6:g} million parameters and embeddings: " + (
        f"{TOKENS_A_PARAMETER} tokens for each parameter (Hoffmann et al. 2022)"
        if machine.gpus and len(fitting) > 1
        else "the smallest that is worth it"
    )
    # More than a pass over the text: some of it would be learnt by heart.
    dropout = 0.1 if steps * batch_size * length > 2 * tokens else 0.0
    plan.choose("model", "transformer", why, dim=dim, layers=layers, heads=heads, dropout=dropout)
    plan.fill(
        "trainer",
        f"{steps * batch_size * length / tokens:.1f} passes over the text, {MOST_PASSES} at most",
        max_epochs=None,
        max_steps=steps,
        val_check_interval=max(10, steps // 2),
        gradient_clip_norm=1.0,
    )
    rate = 0.002 if dim <= 256 else 0.0006
    why = "AdamW as GPT-3 and Llama have it"
    plan.choose("optimizer", "adamw", why, lr=rate, betas=[0.9, 0.95], weight_decay=0.1)
    plan.choose("scheduler", "cosine", "to warm up, then down to a tenth", warmup_steps=max(5, steps // 6))
