"""The catalogue as the tables of docs/hardware.md: `python -m trainer.hardware.table`."""

from __future__ import annotations

import sys

from trainer.hardware.catalogue import DEVICES
from trainer.hardware.device import GIB, Arithmetic, Device

_ARITHMETICS: tuple[Arithmetic, ...] = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "fp4")


def rates() -> list[str]:
    """Return the lines of the table of figures."""
    header = ["device", "capability", "SMs", "GiB", "GB/s", *_ARITHMETICS, "link GB/s", "W"]
    lines = [_row(header), _row(["---"] * len(header))]
    return lines + [_row(_figures(one)) for one in DEVICES.values()]


def sources() -> list[str]:
    """Return the lines of the table of sources."""
    lines = [_row(["device", "data sheet", "memory", "compared with a copy", "note"]), _row(["---"] * 5)]
    for one in DEVICES.values():
        memory = "" if one.memory_source == one.peak_source else _short(one.memory_source)
        pages: dict[str, list[str]] = {}
        for figure, page in one.seen.items():
            pages.setdefault(page, []).append(figure)
        compared = "; ".join(f"[{', '.join(figures)}]({page})" for page, figures in pages.items())
        lines.append(_row([f"`{one.name}`", one.peak_source, memory, compared, one.note]))
    return lines


def _figures(one: Device) -> list[str]:
    link = "" if one.link is None else f"{one.link.bytes_s / 1e9:g} {one.link.reach}"
    return [
        f"`{one.name}`",
        one.compute_capability,
        "" if one.multiprocessors is None else str(one.multiprocessors),
        f"{one.memory_bytes / GIB:.1f}",
        f"{one.bandwidth_bytes_s / 1e9:g}",
        *(f"{one.peak_tflops[kind]:g}" if kind in one.peak_tflops else "" for kind in _ARITHMETICS),
        link,
        f"{one.power_watts:g}",
    ]


def _short(source: str) -> str:
    text, _, address = source.partition("https://")
    return f"[{text.rstrip(': ')}](https://{address})" if address else source


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join([*rates(), "", *sources(), ""]))
