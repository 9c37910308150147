"""The table of `benchmarks/gpu`, and what it says of kernels and waits."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_cases import CASES, LOG_EVERY, TRACED, Case

GUARD = "callbacks/guard.py"
WAITING_CALLS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMalloc", "cudaFree")


def read_trace(path: Path) -> dict[str, Any]:
    """Read the kernels of a trace of `TRACED` steps: milliseconds a step, and calls in which the host waits."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "kernel":
            kernels[event["name"][:90]] += event["dur"] / 1e3 / TRACED
        elif event.get("cat") == "cuda_runtime" and event["name"] in WAITING_CALLS:
            calls[event["name"]] += 1
    return {
        "kernels_ms": dict(kernels.most_common(20)),
        "gpu_busy_ms": sum(kernels.values()),
        "waiting_calls": {name: count / TRACED for name, count in calls.items()},
    }


def number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def waits_of(facts: dict[str, Any]) -> tuple[float | None, float | None]:
    """Waits of a step that is not logged, and of one that is: the mean of the watched steps; None: not measured.

    The guard reads the result of the step before, which is there by then.
    """
    means = []
    for logged in (False, True):
        steps = [found for step, found in facts["waits"].items() if (int(step) % LOG_EVERY == 0) == logged]
        counts = [sum(count for place, count in found.items() if GUARD not in place) for found in steps]
        means.append(sum(counts) / len(counts) if counts else None)
    return means[0], means[1]


def missed_goals(facts: dict[str, Any], case: Case, mfu: float | None, on_gpu: bool) -> list[str]:
    """What is not as it should be."""
    missed = []
    if case.goal is not None and mfu is not None and mfu < case.goal:
        missed.append(f"MFU below {case.goal:.0%}")
    if on_gpu and waits_of(facts)[0]:
        missed.append("the host waits")
    return missed


def table(results: dict[str, dict[str, Any]], peak: float | None, on_gpu: bool) -> tuple[str, bool]:
    """Markdown, and whether everything ran and every goal was met."""
    lines = [
        "| case | parameters | tokens/s | MFU | ms a step | host CPU ms | peak allocated GB | reserved GB "
        "| host waits a step | of a logged one | stall of a save, ms | first step s | start s | goal |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    is_good = True
    for name, facts in results.items():
        case = CASES[name]
        if "failure" in facts:
            lines.append(f"| {case.title} | {facts['failure']} |" + " |" * 12)
            is_good = False
            continue
        mfu = facts["tokens_per_s"] * facts["flops_per_token"] / peak if peak else None
        missed = missed_goals(facts, case, mfu, on_gpu)
        is_good = is_good and not missed
        waits, logged_waits = waits_of(facts) if on_gpu else (None, None)
        goal = f"{case.goal:.0%} MFU, " if case.goal is not None else ""
        verdict = f"{goal}no waits: {'MISSED: ' + ', '.join(missed) if missed else 'met'}" if on_gpu else ""
        cells = [
            case.title,
            f"{facts['parameters']:,}",
            f"{facts['tokens_per_s']:,.0f}",
            number(mfu, "{:.1%}"),
            f"{facts['step_ms']:.1f}",
            f"{facts['host_cpu_ms']:.1f}",
            number(facts.get("peak_allocated_gb"), "{:.1f}"),
            number(facts.get("peak_reserved_gb"), "{:.1f}"),
            number(waits, "{:.2g}"),
            number(logged_waits, "{:.2g}"),
            number(facts.get("save_stall_ms"), "{:.0f}"),
            f"{facts['first_step_s']:.1f}",
            f"{facts['start_s']:.1f}",
            verdict,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines), is_good


def kernels(results: dict[str, dict[str, Any]]) -> str:
    """The kernels that take longest, and where the host waits."""
    lines: list[str] = []
    for name, facts in results.items():
        if facts.get("kernels_ms"):
            lines += ["", f"{CASES[name].title}: kernels {facts['gpu_busy_ms']:.1f} ms a step, of which", ""]
            lines += [f"- {ms:.2f} ms `{kernel}`" for kernel, ms in list(facts["kernels_ms"].items())[:12]]
        if facts.get("waiting_calls"):
            calls = ", ".join(f"{call} {count:g}" for call, count in facts["waiting_calls"].items())
            lines += ["", f"Calls a step in which the host may wait (in the trace): {calls}"]
        places = Counter(place for found in facts.get("waits", {}).values() for place in found)
        if places:
            lines += ["", "Waits: " + ", ".join(f"`{place}` in {count} steps" for place, count in places.items())]
    return "\n".join(lines)


def text_of(machine: dict[str, str], tests: str, body: str, details: str, toy: bool) -> str:
    facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    note = "**Toy sizes on CPU: this shows that the commands work. The figures mean nothing.**\n\n" if toy else ""
    return (
        f"# Training on one GPU\n\n`benchmarks/gpu`\n\n{facts}\n- GPU tests: {tests}\n\n{note}"
        "MFU = tokens/s * (6 N + 12 L d T) / peak: N parameters without position embeddings and an untied input "
        f"embedding, L layers of width d, T tokens of a sequence.\n\n{body}\n{details}\n"
    )
