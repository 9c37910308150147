"""Translation of LightningCLI options into overrides: `--trainer.max_epochs 5` is `trainer.max_epochs=5`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_HEADS = {"trainer": "trainer", "model": "model", "data": "data", "optimizer": "optimizer", "lr_scheduler": "scheduler"}
_PLAIN = {"seed_everything": "seed", "ckpt_path": "finetune.init_from"}
_MODULES = {"optimizer": "torch.optim.", "scheduler": "torch.optim.lr_scheduler."}


def rewritten(arguments: Sequence[str]) -> str:
    """Return the command line to write instead, or an empty string if no argument is one of LightningCLI."""
    words: list[str] = []
    notes: list[str] = []
    changed = False
    left = list(arguments)
    while left:
        word = left.pop(0)
        option, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not _is_lightnings(option):
            words.append(word)
            continue
        changed = True
        if option == "print_config":
            words.append("--cfg job")
            continue
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("-") else "true"
        if option == "config":
            name = Path(value).stem
            words.append(f"experiment={name}")
            notes.append(
                f"{value} becomes conf/experiment/{name}.yaml, with `# @package _global_` in its first line, _target_ "
                "for class_path, and the keys of init_args one level up"
            )
            continue
        words.append(_override(option, value))
    if not changed:
        return ""
    return "; ".join([f"write {' '.join(words)}", *notes])


def _is_lightnings(option: str) -> bool:
    head = option.partition(".")[0]
    return head in _HEADS or option in (*_PLAIN, "config", "print_config")


def _override(option: str, value: str) -> str:
    if option in _PLAIN:
        return f"{_PLAIN[option]}={value}"
    head, _, rest = option.partition(".")
    section = _HEADS[head]
    rest = rest.removeprefix("init_args.")
    if rest in ("", "class_path") and section != "trainer":
        path = value if "." in value else _MODULES.get(section, "my_package.") + value
        return f"{section}._target_={path}"
    return f"{section}.{rest}={value}"
