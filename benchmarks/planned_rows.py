"""Planned against published throughput and memory: `python benchmarks/planned_rows.py`.

Throughput is the closed form's, not calibrated. Memory is planned with `--simulate`, which takes minutes for each row
with selective checkpointing. Rows that no strategy of this trainer can train are listed with the reason.
"""

from __future__ import annotations

import argparse
import functools
import sys
from dataclasses import dataclass, replace
from typing import Any

from kept import keep

from trainer.hardware.catalogue import Device, device
from trainer.plan.allowance import allowance
from trainer.plan.closed_form import Case
from trainer.plan.collectives import of_tensor_parallelism, traffic
from trainer.plan.decoder import Decoder
from trainer.plan.decoder_work import work_of
from trainer.plan.rates import compiled, of_device
from trainer.plan.roofline import step_time
from trainer.plan.states import Layout

_TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
_FOUNDRY = "llm-foundry, scripts/train/benchmarking"
_BLOG = "PyTorch blog, 2024-11-25"
_KEMPNER = "KempnerForge, benchmarks"
_SHARE = "micro-batch assumed; with full checkpointing 77% of the peak, which no other row reaches"
_LIMITS = {"time": 0.2, "memory": 0.1}
_POWER = 0.845
"""Share of the matrix rate of H100 at 500 W of 700 W: the square root of the power, an assumption."""
_LLAMA3 = {"vocab_size": 128256, "norm": "rms", "tied": False}
MODELS: dict[str, dict[str, Any]] = {
    "8B": {"dim": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "ffn_dim": 14336, **_LLAMA3},
    "70B": {"dim": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn_dim": 28672, **_LLAMA3},
    "405B": {"dim": 16384, "layers": 126, "heads": 128, "kv_heads": 8, "ffn_dim": 53248, **_LLAMA3},
    "Llama 2 7B": {"vocab_size": 32000, "dim": 4096, "layers": 32, "heads": 32, "ffn_dim": 11008, "tied": False},
    "MPT 1B": {"vocab_size": 50368, "dim": 2048, "layers": 24, "heads": 16, "activation": "gelu", "norm": "layer"},
    "OLMo 7B": {"vocab_size": 100352, "dim": 4096, "layers": 32, "heads": 32, "ffn_dim": 11008, "tied": False},
    "MPT 7B": {"vocab_size": 50368, "dim": 4096, "layers": 32, "heads": 32, "activation": "gelu", "norm": "layer"},
    "MPT 13B": {"vocab_size": 50368, "dim": 5120, "layers": 40, "heads": 40, "activation": "gelu", "norm": "layer"},
}


@dataclass(frozen=True)
class Row:
    """A published row."""

    name: str
    model: str
    length: int
    micro_batch: int
    ranks: int
    checkpointing: str
    compile: bool
    tokens_s: float
    gib: float | None
    source: str
    gpu: str = "NVIDIA H100 80GB HBM3"
    tensor: int = 1
    is_titan: bool = False
    note: str = ""


ROWS = [
    Row("8B, 8 H100, eager", "8B", 8192, 2, 8, "selective", False, 5762, 82.4, _TITAN, is_titan=True),
    Row("8B, 8 H100, compiled", "8B", 8192, 2, 8, "selective", True, 6667, 77.0, _TITAN, is_titan=True),
    Row("8B, 128 H100, eager", "8B", 8192, 2, 128, "selective", False, 5605, 67.0, _TITAN, is_titan=True),
    Row("8B, 128 H100, compiled", "8B", 8192, 2, 128, "selective", True, 6514, 62.0, _TITAN, is_titan=True),
    Row("70B, 128 H100, compiled", "70B", 8192, 1, 128, "full", True, 956, None, _BLOG, note="micro-batch assumed"),
    Row(
        *("405B, 512 H100, compiled", "405B", 8192, 1, 512, "full", True, 149, None, _BLOG),
        tensor=4, note="micro-batch and tensor parallelism of 4 assumed",
    ),
    Row("7B, 128 A100", "Llama 2 7B", 4096, 2, 128, "none", False, 3700, None, "PyTorch blog, 2024-03-13",
        "NVIDIA A100-SXM4-80GB", note="micro-batch assumed"),
    Row("MPT 7B, 8 H100", "MPT 7B", 2048, 6, 8, "none", False, 10643, None, _FOUNDRY, note="micro-batch assumed"),
    Row("MPT 13B, 8 H100", "MPT 13B", 2048, 4, 8, "full", False, 4792, None, _FOUNDRY, note="micro-batch assumed"),
    Row("MPT 1B, 8 H100", "MPT 1B", 2048, 8, 8, "none", False, 45455, None, _FOUNDRY, note="micro-batch assumed"),
    Row("OLMo 7B, H100, compiled", "OLMo 7B", 4096, 2, 64, "none", True, 10000, None, "OLMo-core README",
        note="micro-batch and 64 ranks assumed"),
    Row("8B, 1 H200", "8B", 4096, 4, 1, "full", False, 10471, None, _KEMPNER, "NVIDIA H200", note=_SHARE),
    Row("8B, 4 H200", "8B", 4096, 4, 4, "full", False, 9746, None, _KEMPNER, "NVIDIA H200", note=_SHARE),
]  # fmt: skip
NOT_PLANNED = [
    f"405B, 512 H100, 100 and 128 tokens/s ({_TITAN}): pipeline parallelism, which no strategy here has",
    f"70B, 256 H100, 829 tokens/s and 71.9 GiB ({_TITAN}): float8, whose rate and memory are not planned",
]


def main() -> int:
    """Print the table; with `--keep` write it to benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulate", action="store_true", help="plan the memory of the rows that have one")
    parser.add_argument("--keep", action="store_true", help="write the table to benchmarks/results/planned_rows.md")
    arguments = parser.parse_args()
    lines = [
        "| row | published | planned | error | within 20% | memory published | planned | error | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    off: dict[str, list[tuple[Row, float]]] = {"time": [], "memory": []}
    for row in ROWS:
        planned = tokens_s(row)
        error = planned / row.tokens_s - 1
        off["time"].append((row, error))
        name = row.name + (f" ({row.note})" if row.note else "")
        memory = f"| {row.gib or ''} | "
        if arguments.simulate and row.gib is not None:
            gib = simulated_gib(replace(row, name="", compile=False, tokens_s=0.0, gib=None))  # as without compiling
            memory += f"{gib:.1f} GiB | {gib / row.gib - 1:+.1%}"
            off["memory"].append((row, gib / row.gib - 1))
        else:
            memory += "| "
        lines.append(
            f"| {name} | {row.tokens_s:,.0f} | {planned:,.0f} tokens/s of a GPU | {error:+.1%} "
            f"| {'yes' if abs(error) <= 0.2 else 'no'} {memory} | {row.source} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(
        [
            *lines,
            "",
            *verdicts(off),
            "",
            "The shares of the data sheet in `trainer/plan/rates.py` were fitted to these rows: the errors are those "
            "of a fit with four numbers and the assumed power of torchtitan's GPUs, not of a prediction. "
            "torchtitan's GPUs have 2.4 TB/s and 500 W; its selective "
            "checkpointing computes every second matrix product again, ours none.",
            "",
            "Not planned:",
            "",
            *(f"- {one}" for one in NOT_PLANNED),
        ]
    )
    print(text)
    if arguments.keep:
        keep("planned_rows", "Planned against published throughput and memory", text)
    return 0


def verdicts(off: dict[str, list[tuple[Row, float]]]) -> list[str]:
    """Return how many rows are within the limits, and which are not, with what is known of the reason."""
    lines = []
    for kind, errors in off.items():
        limit = _LIMITS[kind]
        if not errors:
            continue
        beyond = [f"{row.name} ({error:+.0%}: {row.note})" for row, error in errors if abs(error) > limit]
        which = f"; not: {', '.join(beyond)}" if beyond else ""
        lines.append(f"- {kind}: {len(errors) - len(beyond)} of {len(errors)} rows within {limit:.0%}{which}")
    return lines


def case_of(row: Row) -> Case:
    """Return the row as the closed form takes it."""
    layout = Layout(
        "tp" if row.tensor > 1 else "fsdp", row.ranks // row.tensor, row.tensor, row.ranks, precision="bf16-mixed"
    )
    model = Decoder(sequence_length=row.length, **MODELS[row.model])
    node = {"_target_": "torch.optim.AdamW", "fused": True}
    return Case(model, row.micro_batch, layout, node, checkpointing=row.checkpointing)


def tokens_s(row: Row) -> float:
    """Return the planned tokens a second of each GPU."""
    case = case_of(row)
    work = work_of(case)
    if row.is_titan:  # its selective checkpointing computes every second matrix product again
        again = replace(work.forward, flops=work.forward.flops / 2, matrix_bytes=0, other_bytes=0, operators=0)
        work = replace(work, backward=work.backward + again)
    work = compiled(work) if row.compile else work
    gpu: Device = device(row.gpu)
    rates = of_device(replace(gpu, bandwidth_bytes_s=2.4e12) if row.is_titan else gpu, "bf16")
    assert rates is not None
    if row.is_titan:
        rates = replace(rates, flops_s=rates.flops_s * _POWER)
    sent = traffic({"name": case.layout.strategy}, case.layout, 8, work)
    features = 2.0 * row.micro_batch * row.length * case.model.dim
    sent += of_tensor_parallelism(row.tensor, 8, case.model.layers, features)
    tokens = row.micro_batch * row.length / row.tensor
    return tokens / step_time(work, sent, 1, rates).total


@functools.cache
def simulated_gib(row: Row) -> float:
    """Return the planned memory of a GPU with its allowance, by simulation."""
    import torch

    from trainer.config.strategy import Fsdp
    from trainer.models.transformer import Transformer
    from trainer.plan.simulation import Setting, simulate
    from trainer.tasks.language_modelling import LanguageModelling

    sizes = dict(MODELS[row.model])
    vocabulary = sizes.pop("vocab_size")
    tokens = torch.empty(row.micro_batch, row.length, dtype=torch.long, device="meta")
    found = simulate(
        lambda: LanguageModelling(Transformer(vocabulary, row.length, **sizes)),
        (tokens, tokens),
        lambda module: torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True),
        Setting(
            Fsdp(activation_checkpointing=row.checkpointing),  # type: ignore[arg-type]
            row.ranks,
            8,
            "bf16-mixed",
            "cuda",
            clips=True,
            classes=vocabulary,
        ),
    )
    return (found.peak + sum(allowance(found.peak, row.ranks).values())) / 2**30


if __name__ == "__main__":
    sys.exit(main())
