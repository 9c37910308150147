"""A network as ONNX, compared with torch before it is given out. Needs the packages of the extra `export`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from trainer.core.errors import EnvironmentFault, TrainerError, UserError

FILE = "model.onnx"
OPSET = 20
"""The newest that current runtimes have everywhere; GELU is in it."""
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""Allowed differences of fp32 outputs: a runtime fuses and orders sums in its own way."""


class _Network(nn.Module):
    """The exporter follows attributes of what it is given; a LightningModule has some that raise without a Trainer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(*inputs)


def export_onnx(
    network: nn.Module, inputs: tuple[torch.Tensor, ...], target: Path, metadata: dict[str, str]
) -> tuple[list[Path], float]:
    """Write `model.onnx` into the folder `target`; returns the files and the largest difference of the outputs.

    `inputs` is a batch of at least 2 samples. Free in the file are the number of samples and, of token ids, their
    length. Weights above 2 GB go into a file beside it. Checked on the batch and on its first sample alone.
    Raises EnvironmentFault without the packages, TrainerError where the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError as error:
        message = f"ONNX needs a package that is missing: {error.name}."
        raise EnvironmentFault(message, "pip install 'trainer[export]'") from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells which of torchvision's functions it lacks
    network = network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    target.mkdir(parents=True, exist_ok=True)
    names = [f"input_{number}" if number else "input" for number in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's and onnxscript's own, about their insides
        try:
            program = torch.onnx.export(
                _Network(network),
                inputs,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=names,
                output_names=["output"],
                dynamic_shapes=(tuple(_free(one) for one in inputs),),
            )
        except Exception as error:
            why = _reason(error)
            raise UserError(
                f"--format=onnx: {type(network).__name__} cannot be expressed in ONNX: {why}.",
                "Use --format=safetensors, or take out of forward what depends on values.",
            ) from error
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(target / FILE)
    session = onnxruntime.InferenceSession(str(target / FILE), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (inputs, tuple(one[:1] for one in inputs)):
        fed = {name: one.numpy() for name, one in zip(names, batch, strict=True)}
        found = torch.from_numpy(session.run(None, fed)[0])
        with torch.no_grad():
            expected = network(*batch)
        worst = max(worst, (found - expected).abs().max().item())
        if not torch.allclose(found, expected, rtol=RELATIVE, atol=ABSOLUTE):
            raise TrainerError(
                f"The exported network gives other outputs than torch: they differ by up to {worst:.3g}.",
                "Nothing was exported. Use --format=safetensors, or report the model.",
            )
    return sorted(path for path in target.iterdir()), worst


def _reason(error: BaseException) -> str:
    """The first line that says something: the exporter's own begins with a heading of the steps that it tried."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no reason given'}".rstrip(".")


def _free(tensor: torch.Tensor) -> dict[int, object]:
    """The dimensions that may be of another size later; AUTO: fixed after all where the network needs it."""
    if tensor.is_floating_point() or tensor.dim() < 2:
        return {0: torch.export.Dim.DYNAMIC}
    return {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.AUTO}
