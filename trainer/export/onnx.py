"""Export of a network as ONNX, compared with torch before it is kept. Needs the packages of the extra `export`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from trainer.core.errors import EnvironmentFault, TrainerError, UserError
from trainer.core.install import pip_install

FILE = "model.onnx"
OPSET = 20
"""The newest opset that current runtimes fully support. It has GELU."""
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""Tolerances of fp32 outputs: a runtime fuses operations and orders sums differently."""


class _Network(nn.Module):
    """A wrapper without attributes for the exporter, because some of a LightningModule's raise without a Trainer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.network(*inputs)
        return output


def export_onnx(
    network: nn.Module, inputs: tuple[torch.Tensor, ...], target: Path, metadata: dict[str, str]
) -> tuple[list[Path], float]:
    """Write `model.onnx` and compare its outputs with torch's on the batch and on its first sample alone.

    The batch size is dynamic, and so is the length of token ids. Weights above 2 GB go into a separate file.

    Args:
        network: The network.
        inputs: Arguments of its forward: a batch of at least 2 samples.
        target: The folder to write.
        metadata: Properties of the ONNX model.

    Returns:
        The files, and the largest absolute difference of the outputs.

    Raises:
        EnvironmentFault: If onnxruntime or onnxscript is not installed.
        UserError: If the network cannot be expressed in ONNX.
        TrainerError: If the outputs differ.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError as error:
        message = f"--format=onnx needs a package that is not installed: {error.name}."
        raise EnvironmentFault(message, pip_install("export")) from None
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its warnings list unsupported torchvision functions
    network = network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    target.mkdir(parents=True, exist_ok=True)
    names = [f"input_{number}" if number else "input" for number in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter and onnxscript, about their internals
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
                "Use --format=safetensors, or remove control flow that depends on tensor values from forward.",
            ) from error
        assert program is not None
        program.model.metadata_props.update(metadata)
        program.save(target / FILE)
    session = onnxruntime.InferenceSession(str(target / FILE), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in (inputs, tuple(one[:1] for one in inputs)):
        arrays = {name: one.numpy() for name, one in zip(names, batch, strict=True)}
        outputs = torch.from_numpy(session.run(None, arrays)[0])
        with torch.no_grad():
            expected = network(*batch)
        worst = max(worst, (outputs - expected).abs().max().item())
        if not torch.allclose(outputs, expected, rtol=RELATIVE, atol=ABSOLUTE):
            raise TrainerError(
                f"The outputs of the exported network differ from torch's by up to {worst:.3g}.",
                "Nothing was exported. Use --format=safetensors, or report the model.",
            )
    return sorted(path for path in target.iterdir()), worst


def _reason(error: BaseException) -> str:
    """Return the first line of the cause: the exporter's own message begins with a list of the steps it tried."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no reason given'}".rstrip(".")


def _free(tensor: torch.Tensor) -> dict[int, object]:
    """Return the dynamic dimensions. With AUTO the exporter may fix the length if the network needs that."""
    if tensor.is_floating_point() or tensor.dim() < 2:
        return {0: torch.export.Dim.DYNAMIC}
    return {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.AUTO}
