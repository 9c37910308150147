"""Name what to install: packages by their own names, and releases that must not be used.

Messages never advise `pip install 'trainer[...]'`. Outside a checkout that asks an index for the package of that name,
which is somebody else's.
"""

from __future__ import annotations

from trainer.core.errors import EnvironmentFault

EXTRAS = {
    "images": ("pillow>=10",),
    "faces": ("scikit-image>=0.25,<1",),
    "datasets": ("pyarrow>=17",),
    "hf": ("transformers>=5,<6",),
    "peft": ("peft>=0.21,<1", "transformers>=5,<6"),
    "torchao": ("torchao>=0.16,<1",),
    "tensorboard": ("tensorboard>=2.19",),
    "mlflow": ("mlflow-skinny>=3.1",),
    "trackio": ("trackio>=0.43,<1",),
    "sweep": ("optuna>=4.5,<6", "cmaes>=0.12"),
    "s3": ("s3fs>=2025.3",),
    "export": ("onnx>=1.18,<2", "onnxscript>=0.5,<1", "onnxruntime>=1.22,<2"),
}
"""The optional dependencies of pyproject.toml by extra."""
MALICIOUS = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
"""Releases that steal credentials when they are imported: https://github.com/advisories/GHSA-w37p-236h-pfx3."""


def pip_install(extra: str) -> str:
    """Return the command that installs the packages of an extra."""
    return "pip install " + " ".join(f"'{package}'" for package in EXTRAS[extra])


def refuse_malicious() -> None:
    """Check, before anything imports them, that no malicious release is installed.

    Raises:
        EnvironmentFault: One is installed.
    """
    from importlib import metadata  # a tenth of the CPU time of `trainer ls`

    for package, releases in MALICIOUS.items():
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if version in releases:
            raise EnvironmentFault(
                f"{package} {version} is installed, a malicious upload (advisory GHSA-w37p-236h-pfx3)",
                f"pip uninstall {package}, install {package}==2.6.6 or newer, and replace every credential that this "
                "machine could read",
            )
