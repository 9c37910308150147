"""The catalogue of GPUs: complete, consistent with the chips, and compared with Lightning's table."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import lightning.fabric.utilities.throughput as lightning_table
import pytest
import torch

from trainer.core.errors import UserError
from trainer.hardware import table
from trainer.hardware.catalogue import DEVICES, GIB, device, known, names

ROOT = Path(__file__).parents[2]

# FLOP per clock of a multiprocessor in fp16 with sums in fp32, from NVIDIA's white papers, and the boost clock in GHz.
CLOCKED = {
    "Tesla V100-SXM2-16GB": (1024, 1.53),
    "Tesla V100-PCIE-16GB": (1024, 1.37),
    "Tesla V100S-PCIE-32GB": (1024, 1.597),
    "Tesla T4": (1024, 1.59),
    "NVIDIA GeForce RTX 2080 Ti": (512, 1.635),
    "NVIDIA TITAN RTX": (1024, 1.77),
    "Quadro RTX 8000": (1024, 1.77),
    "NVIDIA A100-SXM4-80GB": (2048, 1.41),
    "NVIDIA A30": (2048, 1.44),
    "NVIDIA A10": (1024, 1.695),
    "NVIDIA A40": (1024, 1.74),
    "NVIDIA RTX A4000": (1024, 1.56),
    "NVIDIA RTX A5000": (1024, 1.695),
    "NVIDIA RTX A6000": (1024, 1.80),
    "NVIDIA GeForce RTX 3090": (512, 1.695),
    "NVIDIA GeForce RTX 3090 Ti": (512, 1.86),
    "NVIDIA L4": (1024, 2.04),
    "NVIDIA L40": (512, 2.49),
    "NVIDIA L40S": (1024, 2.49),
    "NVIDIA RTX 6000 Ada Generation": (1024, 2.505),
    "NVIDIA GeForce RTX 4080": (512, 2.505),
    "NVIDIA GeForce RTX 4090": (512, 2.52),
    "NVIDIA H100 80GB HBM3": (4096, 1.83),
    "NVIDIA H100 PCIe": (4096, 1.62),
    "NVIDIA H100 NVL": (4096, 1.545),
    "NVIDIA H20": (1024, 1.83),
    "NVIDIA B200": (8192, 1.86),
    "NVIDIA GeForce RTX 5080": (512, 2.617),
    "NVIDIA GeForce RTX 5090": (512, 2.407),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (1024, 2.617),
    "AMD Instinct MI210": (1024, 1.7),
    "AMD Instinct MI250X": (1024, 1.7),
    "AMD Instinct MI300X": (2048, 2.1),
    "AMD Instinct MI355X": (4096, 2.4),
}
# Width of the memory bus in bits, and Gb/s of one of its lines.
WIRED = {
    "Tesla V100-SXM2-16GB": (4096, 1.752),
    "Tesla V100S-PCIE-32GB": (4096, 2.214),
    "Tesla T4": (256, 10),
    "NVIDIA GeForce RTX 2080 Ti": (352, 14),
    "NVIDIA TITAN RTX": (384, 14),
    "Quadro RTX 6000": (384, 14),
    "Quadro RTX 8000": (384, 14),
    "NVIDIA A100-SXM4-40GB": (5120, 2.43),
    "NVIDIA A100-SXM4-80GB": (5120, 3.186),
    "NVIDIA A100 80GB PCIe": (5120, 3.024),
    "NVIDIA A30": (3072, 2.43),
    "NVIDIA A10": (384, 12.5),
    "NVIDIA A10G": (384, 12.5),
    "NVIDIA A40": (384, 14.5),
    "NVIDIA RTX A4000": (256, 14),
    "NVIDIA RTX A5000": (384, 16),
    "NVIDIA RTX A6000": (384, 16),
    "NVIDIA GeForce RTX 3090": (384, 19.5),
    "NVIDIA GeForce RTX 3090 Ti": (384, 21),
    "NVIDIA L4": (192, 12.5),
    "NVIDIA L40": (384, 18),
    "NVIDIA L40S": (384, 18),
    "NVIDIA RTX 6000 Ada Generation": (384, 20),
    "NVIDIA GeForce RTX 4080": (256, 22.4),
    "NVIDIA GeForce RTX 4090": (384, 21),
    "NVIDIA H100 80GB HBM3": (5120, 5.23),
    "NVIDIA H100 PCIe": (5120, 3.186),
    "NVIDIA H100 NVL": (6144, 5.1),
    "NVIDIA H200": (6144, 6.25),
    "NVIDIA H200 NVL": (6144, 6.25),
    "NVIDIA B200": (8192, 8),
    "NVIDIA GeForce RTX 5080": (256, 30),
    "NVIDIA GeForce RTX 5090": (512, 28),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": (512, 25),
    "NVIDIA RTX PRO 6000 Blackwell Workstation Edition": (512, 28),
    "AMD Instinct MI210": (4096, 3.2),
    "AMD Instinct MI250X": (4096, 3.2),
    "AMD Instinct MI300X": (8192, 5.2),
    "AMD Instinct MI325X": (8192, 6),
    "AMD Instinct MI355X": (8192, 8),
}
# fp16 in TFLOP/s by Lightning 2.6: it compares a part of the name, and some rows are the vector rate, the rate with
# sparsity or that of two GPUs.
WRONG_IN_LIGHTNING = {
    "NVIDIA H100 NVL": 1978.8,  # the pair
    "NVIDIA L40S": 121.0,  # the row of L4
    "NVIDIA L40": 121.0,  # the row of L4
    "NVIDIA GeForce RTX 3090": 35.6,  # the vector rate
    "NVIDIA GeForce RTX 4090": 82.6,  # the vector rate
    "NVIDIA RTX A6000": 38.7,  # the vector rate
    "NVIDIA A40": 37.4,  # the vector rate
    "NVIDIA TITAN RTX": 32.6,  # the vector rate
    "NVIDIA GeForce RTX 2080 Ti": 28.5,  # the vector rate
    "NVIDIA GeForce RTX 3090 Ti": 40.0,
    "NVIDIA GeForce RTX 4080": 48.7,
    "NVIDIA RTX A4000": 37.4,  # the row of A40
    "NVIDIA A10G": 125.0,  # the row of A10
}


@pytest.mark.parametrize("name", names())
def test_every_figure_is_there_and_has_a_source(name: str) -> None:
    one = device(name)
    assert 10 * GIB < one.memory_bytes < 300 * GIB
    assert 200e9 < one.bandwidth_bytes_s < 9e12
    assert 60 <= one.power_watts <= 1500
    assert all((one.memory_source, one.bandwidth_source, one.peak_source, one.link_source, one.power_source))
    assert re.fullmatch(r"\d+\.\d|gfx\w+", one.compute_capability)
    assert re.fullmatch(r"[345] x16", one.pcie)
    assert {"fp32", "fp16"} <= set(one.peak_tflops)
    assert all(page.startswith("https://") for page in one.seen.values())


@pytest.mark.parametrize("name", names())
def test_rates_follow_the_width_of_the_type(name: str) -> None:
    rates = device(name).peak_tflops
    ordered = [rates[kind] for kind in ("fp64", "fp32", "tf32", "bf16", "fp8", "fp4") if kind in rates]
    assert ordered == sorted(ordered)
    assert rates.get("bf16", rates["fp16"]) == rates["fp16"]
    if "fp8" in rates:
        assert rates["fp8"] == pytest.approx(2 * rates["bf16"], rel=0.02)
    if "tf32" in rates:
        assert rates["tf32"] == pytest.approx(rates["bf16"] / 2, rel=0.02)


@pytest.mark.parametrize("name", CLOCKED)
def test_the_peak_is_what_the_chip_does_in_a_clock(name: str) -> None:
    one = device(name)
    assert one.multiprocessors is not None
    per_clock, clock = CLOCKED[name]
    assert one.peak_tflops["fp16"] == pytest.approx(one.multiprocessors * per_clock * clock / 1e3, rel=0.015)


@pytest.mark.parametrize("name", WIRED)
def test_the_bandwidth_is_that_of_the_memory_bus(name: str) -> None:
    """Data sheets round: 8.19 TB/s of HBM3E to 8 TB/s."""
    bits, rate = WIRED[name]
    assert device(name).bandwidth_bytes_s == pytest.approx(bits * rate / 8 * 1e9, rel=0.025)


def test_what_a_device_supports_follows_its_generation() -> None:
    for one in DEVICES.values():
        is_nvidia = one.compute_capability[0].isdigit()
        generation = float(one.compute_capability) if is_nvidia else None
        if generation is not None:
            assert one.supports("bf16") == one.supports("tf32") == (generation >= 8.0), one.name
            assert one.supports("fp8") == (generation >= 8.9), one.name
            assert one.supports("fp4") == (generation >= 10.0), one.name


def test_names_are_compared_whole() -> None:
    rates = {name: device(name).peak_tflops["bf16"] for name in names() if "H100" in name}
    assert rates == {"NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 NVL": 835.5, "NVIDIA H100 PCIe": 756.5}
    assert device("NVIDIA L40S").peak_tflops["bf16"] == pytest.approx(
        2 * device("NVIDIA L40").peak_tflops["bf16"], 0.01
    )
    assert device("NVIDIA A100-SXM4-40GB").memory_bytes < 0.51 * device("NVIDIA A100-SXM4-80GB").memory_bytes
    for unknown in ("NVIDIA H100", "H100", "NVIDIA A100", "NVIDIA GeForce RTX 3080", "NVIDIA H200 MIG 1g.18gb"):
        assert known(unknown) is None
    old = known("A100-SXM4-40GB")  # by a driver before release 470
    assert old is not None
    assert old.name == "NVIDIA A100-SXM4-40GB"


def test_geforce_has_half_the_rate_of_the_same_chip_for_workstations() -> None:
    per_clock = {}
    for name in ("NVIDIA GeForce RTX 3090", "NVIDIA RTX A6000"):
        one = device(name)
        assert one.multiprocessors
        per_clock[name] = one.peak_tflops["fp16"] / one.peak_tflops["fp32"]
    assert per_clock["NVIDIA GeForce RTX 3090"] * 2 == pytest.approx(per_clock["NVIDIA RTX A6000"], rel=0.01)
    assert "half" in device("NVIDIA GeForce RTX 3090").note


def test_an_unknown_device_is_not_guessed() -> None:
    with pytest.raises(UserError) as caught:
        device("NVIDIA H201")
    assert "NVIDIA H200" in caught.value.fix


def test_where_lightnings_table_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that Lightning mends fails here: then it leaves the list."""
    differs = {}
    for name in names():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = lightning_table.get_available_flops(torch.device("cuda"), torch.float16)
        if theirs and abs(theirs / 1e12 / device(name).peak_tflops["fp16"] - 1) > 0.02:
            differs[name] = theirs / 1e12
    assert differs == WRONG_IN_LIGHTNING
    # It never finds its rows of H200, and they have the rate with sparsity.
    assert lightning_table._CUDA_FLOPS["h200 sxm1"][torch.float16] == pytest.approx(
        2e12 * device("NVIDIA H200").peak_tflops["fp16"], rel=0.02
    )


def test_the_page_has_the_tables_of_the_catalogue() -> None:
    page = (ROOT / "docs/hardware.md").read_text()
    for lines in (table.rates(), table.sources()):
        assert "\n".join(lines) in page, "python -m trainer.hardware.table"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("H100", "did you mean NVIDIA H100 80GB HBM3 or NVIDIA H100 NVL or NVIDIA H100 PCIe? "),
        ("H10O", "did you mean NVIDIA H100 80GB HBM3 or NVIDIA H100 NVL or NVIDIA H100 PCIe? "),
        ("rtx4090", "did you mean NVIDIA GeForce RTX 4090? "),
        ("a fast one", ""),
    ],
)
def test_an_unknown_name_gets_those_near_it_and_how_to_list_all(name: str, expected: str) -> None:
    with pytest.raises(UserError) as raised:
        device(name)
    assert raised.value.fix == f"{expected}python -m trainer.hardware.table lists all"
