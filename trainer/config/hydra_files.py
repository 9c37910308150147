"""The copy of Hydra's own files that a run keeps, and the link to the run at `hydra.run.dir`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.hydra_node import DEFAULT_SWEEP_DIR, SUBDIR, part_of, replaced
from trainer.core.errors import UserError
from trainer.core.secrets import mask


@dataclass(frozen=True)
class HydraFiles:
    """The files of `.hydra/` that a run keeps, and the location of Hydra's own output directory."""

    placeholder: str
    """Text in the files and the configuration that stands for the run directory, whose name is not yet known."""
    texts: dict[str, str]
    """Content by file name."""
    link: str | None
    """Path of the link to the run; None: `hydra.run.dir` is Hydra's default."""

    def keep(self, run_path: Path, config: dict[str, Any], cwd: Path) -> dict[str, Any]:
        """Write the files into a newly created run, and return its configuration with its own path in it."""
        folder = run_path / SUBDIR
        folder.mkdir()
        for name, text in self.texts.items():
            (folder / name).write_text(mask(text.replace(self.placeholder, str(run_path))), encoding="utf-8")
        if self.link is not None:
            _link_to(run_path, cwd / Path(self.link).expanduser())
        return replaced(config, self.placeholder, str(run_path))  # type: ignore[no-any-return]


def hydra_files(tree: Any, job: Any, overrides: list[str], placeholder: str, multirun: bool) -> HydraFiles:
    """Return the files that Hydra would write. Call this while `${hydra:...}` can be resolved."""
    import yaml
    from omegaconf import OmegaConf

    _complete_logging(tree.hydra)
    node = _resolved(tree.hydra)
    node["mode"] = "MULTIRUN" if multirun else "RUN"
    texts = {
        "hydra.yaml": yaml.safe_dump({"hydra": node}, sort_keys=False, allow_unicode=True, width=110),
        "config.yaml": OmegaConf.to_yaml(job),
        "overrides.yaml": OmegaConf.to_yaml(OmegaConf.create(overrides)),
    }
    return HydraFiles(placeholder, texts, _link(tree.hydra, node, multirun))


def _resolved(node: Any) -> dict[str, Any]:
    """Return plain values. A key that cannot be resolved keeps its interpolations, since nothing reads it."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    plain: dict[str, Any] = {}
    for key in node:
        inner = node._get_node(key)
        if not OmegaConf.is_config(inner):
            inner = OmegaConf.create({key: inner._value()})
            inner._set_parent(node._get_parent())
            plain.update(OmegaConf.to_container(inner, enum_to_str=True))  # type: ignore[arg-type]
            continue
        try:
            plain[key] = OmegaConf.to_container(inner, resolve=True, enum_to_str=True)
        except OmegaConfBaseException:
            plain[key] = OmegaConf.to_container(inner, resolve=False, enum_to_str=True)
    return plain


def _complete_logging(node: Any) -> None:
    """Merge the keys of `hydra.job_logging` into Hydra's default if none of its options was chosen."""
    from omegaconf import OmegaConf

    written = part_of(node, "job_logging")
    if written and "version" not in written:
        import hydra.conf

        default = Path(hydra.conf.__file__).parent / "hydra" / "job_logging" / "default.yaml"
        node.job_logging = OmegaConf.merge(OmegaConf.load(default), node.job_logging)


def _link(written: Any, node: dict[str, Any], multirun: bool) -> str | None:
    """Return Hydra's output directory if a config file or the command line sets one, else None."""
    defaults = {"run": "outputs/${now:", "sweep": DEFAULT_SWEEP_DIR}
    part = "sweep" if multirun else "run"
    raw = written[part]._get_node("dir")._value()
    if str(raw).startswith(defaults[part]):
        return None
    folder = node[part]["dir"]
    return os.path.join(folder, str(node["sweep"]["subdir"])) if multirun else str(folder)


def require_free(link: str, cwd: Path) -> None:
    """Raise UserError if `hydra.run.dir` exists and is neither a link nor an empty directory."""
    path = cwd / Path(link).expanduser()
    if path.is_symlink() or not path.exists() or (path.is_dir() and path != cwd and not any(path.iterdir())):
        return
    fix = (
        "the run is in runs_dir/NAME-ID, and hydra.run.dir becomes a link to it: name a path that does not exist, "
        "or remove it and set runs_dir=FOLDER name=NAME"
    )
    raise UserError(f"hydra.run.dir={link}: already exists", fix)


def _link_to(run_path: Path, link: Path) -> None:
    """Create the link; a link to an earlier run is replaced."""
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_dir() and not link.is_symlink():
            link.rmdir()  # empty: checked by require_free
        link.unlink(missing_ok=True)
        link.symlink_to(run_path, target_is_directory=True)
    except OSError as error:
        print(f"hydra.run.dir={link}: cannot create a link to {run_path} ({error.strerror})", flush=True)
