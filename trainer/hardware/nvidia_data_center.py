"""NVIDIA's GPUs for data centers, from the data sheet of each product; rates with 2:4 sparsity are halved.

fp64 includes tensor cores where the product has them. GPUs with HBM keep no memory aside for error correction, those
with GDDR6 a sixteenth.
"""

from __future__ import annotations

from trainer.hardware.device import Figure
from trainer.hardware.nvidia import Peaks, nvidia, reported, sheet

_L40S_SHEET = "https://www.mullet.se/product.html?product_id=355414"
_HOPPER_WHITE_PAPER = "https://glennklockwood.com/garden/processors/h100"
_BLACKWELL_BRIEF = "https://glennklockwood.com/garden/processors/B200"
_TOTALS = "https://github.com/modal-labs/modal-client/pull/2797"
"""Total memory by nvidia-smi of H100, A100, A10, L40S, L4 and T4; torch reports a little less."""

_VOLTA = ("Volta", "7.0", 80)
_SXM2: Peaks = {"fp64": 7.8, "fp32": 15.7, "fp16": 125.0}
_V100_PCIE: Peaks = {"fp64": 7.0, "fp32": 14.0, "fp16": 112.0}
_V100_SHEET = "NVIDIA Tesla V100 data sheet, 2018"
_V100_32 = reported(31.75, "hiyouga/LlamaFactory/issues/182")
_V100 = [
    nvidia("Tesla V100-SXM2-16GB", _VOLTA, sheet(16), 900, _SXM2, watts=300,
           document=_V100_SHEET, nvlink=(300, "mesh"), pcie="3 x16"),
    nvidia("Tesla V100-SXM2-32GB", _VOLTA, _V100_32, 900, _SXM2, watts=300, document=_V100_SHEET,
           nvlink=(300, "mesh"), pcie="3 x16"),
    nvidia("Tesla V100-PCIE-16GB", _VOLTA, sheet(16), 900, _V100_PCIE, watts=250,
           document=_V100_SHEET, pcie="3 x16"),
    nvidia("Tesla V100-PCIE-32GB", _VOLTA, _V100_32, 900, _V100_PCIE, watts=250, document=_V100_SHEET, pcie="3 x16"),
    nvidia("Tesla V100S-PCIE-32GB", _VOLTA, _V100_32, 1134, {"fp64": 8.2, "fp32": 16.4, "fp16": 130.0}, watts=250,
           document="NVIDIA V100 data sheet, 2020", pcie="3 x16",
           seen={"peak": "https://github.com/winston-zhang-orz/gpu-specs/blob/main/specs.md"}),
]  # fmt: skip

_T4 = [
    nvidia("Tesla T4", ("Turing", "7.5", 40), reported(14.56), 320, {"fp32": 8.1, "fp16": 65.0}, watts=70,
           document="NVIDIA T4 product brief PB-09256-001", pcie="3 x16",
           seen={"peak": "https://github.com/winston-zhang-orz/gpu-specs/blob/main/specs.md", "memory": _TOTALS,
                 "bandwidth": "https://sysrqmts.com/en/gpus/nvidia/tesla/t4"},
           note="the data sheet rounds the bandwidth of its 256 bits at 10 Gb/s to 300 GB/s"),
]  # fmt: skip

_AMPERE = ("Ampere", "8.0", 108)
_A100_PEAKS: Peaks = {"fp64": 19.5, "fp32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}
_A100_SHEET = "NVIDIA A100 data sheet, nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_A100_80 = reported(79.25, "HiDream-ai/VAREdit/issues/6")
_A100_40 = reported(39.50, "TianheWu/CoSeR/issues/10")
_A100_SEEN: dict[Figure, str] = {
    "peak": "https://github.com/winston-zhang-orz/gpu-specs/blob/main/specs.md",
    "bandwidth": "https://github.com/astroC86/gpu-datasheet",
    "memory": _TOTALS,
}
_A800 = "a variant for export with 400 GB/s of NVLink"
_A100 = [
    nvidia("NVIDIA A100-SXM4-40GB", _AMPERE, _A100_40, 1555, _A100_PEAKS, watts=400, document=_A100_SHEET,
           nvlink=(600, "switch"),
           seen=_A100_SEEN),
    nvidia("NVIDIA A100-SXM4-80GB", _AMPERE, _A100_80, 2039, _A100_PEAKS, watts=400, document=_A100_SHEET,
           nvlink=(600, "switch"),
           seen=_A100_SEEN),
    nvidia("NVIDIA A100-PCIE-40GB", _AMPERE, _A100_40, 1555, _A100_PEAKS, watts=250, document=_A100_SHEET,
           nvlink=(600, "bridge"),
           seen=_A100_SEEN),
    nvidia("NVIDIA A100 80GB PCIe", _AMPERE, _A100_80, 1935, _A100_PEAKS, watts=300, document=_A100_SHEET,
           nvlink=(600, "bridge"),
           seen=_A100_SEEN),
    nvidia("NVIDIA A800-SXM4-80GB", _AMPERE, _A100_80, 2039, _A100_PEAKS, watts=400, document="NVIDIA A800 data sheet",
           nvlink=(400, "switch"), note=_A800),
    nvidia("NVIDIA A800 80GB PCIe", _AMPERE, _A100_80, 1935, _A100_PEAKS, watts=300, document="NVIDIA A800 data sheet",
           nvlink=(400, "bridge"), note=_A800),
    nvidia("NVIDIA A30", ("Ampere", "8.0", 56), reported(23.53, "google/RB-Modulation/issues/5"), 933,
           {"fp64": 10.3, "fp32": 10.3, "tf32": 82.0, "bf16": 165.0, "fp16": 165.0}, watts=165,
           document="NVIDIA A30 data sheet",
           nvlink=(200, "bridge"), seen={"memory": "https://github.com/google/RB-Modulation/issues/5"}),
    nvidia("NVIDIA A10", ("Ampere", "8.6", 72), reported(22.03), 600,
           {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0, "fp16": 125.0}, watts=150, document="NVIDIA A10 data sheet",
           seen={"peak": "https://github.com/astroC86/gpu-datasheet", "memory": _TOTALS,
                 "bandwidth": "https://github.com/astroC86/gpu-datasheet"}),
    nvidia("NVIDIA A10G", ("Ampere", "8.6", 80), reported(22.03), 600,
           {"fp32": 35.0, "tf32": 35.0, "bf16": 70.0, "fp16": 70.0}, watts=300,
           document="NVIDIA A10G for AWS data sheet, NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf",
           note="half the matrix rate of the A10"),
    nvidia("NVIDIA A40", ("Ampere", "8.6", 84), reported(44.34), 696,
           {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7}, watts=300, document="NVIDIA A40 data sheet",
           nvlink=(112.5, "bridge"),
           seen={"peak": "https://hmc-tech.com/gpu/nvidia-l40-vs-nvidia-a40",
                 "power": "https://hmc-tech.com/gpu/nvidia-l40-vs-nvidia-a40",
                 "bandwidth": "https://github.com/astroC86/gpu-datasheet"}),
]  # fmt: skip

_ADA_SEEN: dict[Figure, str] = {"peak": _L40S_SHEET, "bandwidth": _L40S_SHEET, "power": _L40S_SHEET}
_ADA = [
    nvidia("NVIDIA L4", ("Ada", "8.9", 58), reported(22.03), 300,
           {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0, "fp16": 121.0, "fp8": 242.5}, watts=72,
           document="NVIDIA L4 data sheet",
           seen={"peak": "https://github.com/winston-zhang-orz/gpu-specs/blob/main/specs.md", "memory": _TOTALS}),
    nvidia("NVIDIA L40", ("Ada", "8.9", 142), reported(44.40, "QwenLM/Qwen3-VL/issues/2097"), 864,
           {"fp32": 90.5, "tf32": 90.5, "bf16": 181.05, "fp16": 181.05, "fp8": 362.0}, watts=300,
           document="NVIDIA L40 data sheet",
           seen=_ADA_SEEN, note="half the matrix rate of the L40S"),
    nvidia("NVIDIA L40S", ("Ada", "8.9", 142), reported(44.42, "stepfun-ai/Step-Video-T2V/issues/8"), 864,
           {"fp32": 91.6, "tf32": 183.0, "bf16": 362.05, "fp16": 362.05, "fp8": 733.0}, watts=350,
           document="NVIDIA L40S data sheet",
           seen={**_ADA_SEEN, "memory": _TOTALS}),
]  # fmt: skip

_HOPPER = ("Hopper", "9.0", 132)
_SXM5: Peaks = {"fp64": 67.0, "fp32": 67.0, "tf32": 494.5, "bf16": 989.5, "fp16": 989.5, "fp8": 1979.0}
_NVL: Peaks = {"fp64": 60.0, "fp32": 60.0, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5, "fp8": 1670.5}
_H100_SHEET = "NVIDIA H100 data sheet, resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200_SHEET = "NVIDIA H200 data sheet, hpc-datasheet-sc23-h200"
_SXM5_SEEN: dict[Figure, str] = dict.fromkeys(("peak", "bandwidth", "link", "power"), _HOPPER_WHITE_PAPER)
_H200_SEEN: dict[Figure, str] = {
    "peak": "https://github.com/astroC86/gpu-datasheet",
    "bandwidth": "https://github.com/astroC86/gpu-datasheet",
}
_GH200 = "the power is that of the module with its processor; 900 GB/s of NVLink-C2C reach that processor"
_HOPPERS = [
    nvidia("NVIDIA H100 80GB HBM3", _HOPPER, reported(79.11, "vllm-project/vllm/issues/27508"), 3350, _SXM5, watts=700,
           document=_H100_SHEET, nvlink=(900, "switch"), pcie="5 x16", seen={**_SXM5_SEEN, "memory": _TOTALS}),
    nvidia("NVIDIA H100 PCIe", ("Hopper", "9.0", 114), sheet(80), 2000,
           {"fp64": 51.0, "fp32": 51.0, "tf32": 378.0, "bf16": 756.5, "fp16": 756.5, "fp8": 1513.0}, watts=350,
           document=_H100_SHEET,
           nvlink=(600, "bridge"), pcie="5 x16",
           seen={"peak": "https://github.com/winston-zhang-orz/gpu-specs/blob/main/specs.md",
                 **dict.fromkeys(("bandwidth", "power"), "https://manuals.plus/m/56b0c3ef7d0a1c470c0af8f05a0bd1f29a778007472ba941201fbbb185c9bccd")}),
    nvidia("NVIDIA H100 NVL", _HOPPER, reported(93.02), 3900, _NVL, watts=400, document=_H100_SHEET,
           nvlink=(600, "bridge"),
           pcie="5 x16", seen={"bandwidth": "https://grokipedia.com/page/210100120"},
           note="a card; some tables give the rates of the pair"),
    nvidia("NVIDIA H800", _HOPPER, reported(79.11, "vllm-project/vllm/issues/27508"), 3350, {**_SXM5, "fp64": 1.0},
           watts=700,
           document="NVIDIA H800 data sheet", nvlink=(400, "switch"), pcie="5 x16", note="a variant for export",
           seen=dict.fromkeys(("peak", "bandwidth"), "https://github.com/astroC86/gpu-datasheet")),
    nvidia("NVIDIA H20", ("Hopper", "9.0", 78), sheet(96), 4000,
           {"fp64": 1.0, "fp32": 44.0, "tf32": 74.0, "bf16": 148.0, "fp16": 148.0, "fp8": 296.0}, watts=400,
           document="NVIDIA H20 data sheet", nvlink=(900, "switch"), pcie="5 x16", note="a variant for export",
           seen=dict.fromkeys(("peak", "bandwidth", "link"),
                              "https://github.com/citsjtu2020/LLM-Prof/blob/main/hardware_spec.md")),
    nvidia("NVIDIA H200", _HOPPER, reported(139.72), 4800, _SXM5, watts=700, document=_H200_SHEET,
           nvlink=(900, "switch"),
           pcie="5 x16", seen=_H200_SEEN),
    nvidia("NVIDIA H200 NVL", _HOPPER, sheet(141), 4800, _NVL, watts=600, document=_H200_SHEET,
           nvlink=(900, "bridge"), pcie="5 x16"),
    nvidia("NVIDIA GH200 120GB", _HOPPER, reported(94.50), 4000, _SXM5, watts=1000, document="NVIDIA GH200 data sheet",
           nvlink=(900, "switch"), pcie="5 x16", note=_GH200),
    nvidia("NVIDIA GH200 480GB", _HOPPER, reported(94.50), 4000, _SXM5, watts=1000, document="NVIDIA GH200 data sheet",
           nvlink=(900, "switch"), pcie="5 x16", note=_GH200,
           seen={"memory": "https://github.com/mredenti/PowerCapping/blob/main/configuration/OpenCL_benchmark.md"}),
    nvidia("NVIDIA GH200 144G HBM3e", _HOPPER, sheet(144), 4900, _SXM5, watts=1000, document="NVIDIA GH200 data sheet",
           nvlink=(900, "switch"), pcie="5 x16", note=_GH200),
]  # fmt: skip

_BLACKWELL_SEEN: dict[Figure, str] = dict.fromkeys(("peak", "bandwidth", "link", "power"), _BLACKWELL_BRIEF)
_B200_REPORT = reported(178.35, "unslothai/unsloth/issues/3411")
_BLACKWELL = [
    nvidia("NVIDIA B100", ("Blackwell", "10.0", None), sheet(192), 8000,
           {"fp64": 30.0, "fp32": 60.0, "tf32": 875.0, "bf16": 1750.0, "fp16": 1750.0, "fp8": 3500.0, "fp4": 7000.0},
           watts=700, document="NVIDIA HGX B100 data sheet, an eighth", nvlink=(1800, "switch"), pcie="5 x16",
           seen={"bandwidth": "https://achoenix.github.io/optical_io/nvidia_system.html",
                 "power": "https://achoenix.github.io/optical_io/nvidia_system.html"}),
    nvidia("NVIDIA B200", ("Blackwell", "10.0", 148), _B200_REPORT, 8000,
           {"fp64": 37.0, "fp32": 75.0, "tf32": 1125.0, "bf16": 2250.0, "fp16": 2250.0, "fp8": 4500.0, "fp4": 9000.0},
           watts=1000, document="NVIDIA HGX B200 data sheet, an eighth", nvlink=(1800, "switch"), pcie="5 x16",
           seen={**_BLACKWELL_SEEN, "peak": "https://hmc-tech.com/gpu/nvidia-b200-vs-nvidia-l40s"},
           note="some systems run the memory at 7.7 TB/s"),
    nvidia("NVIDIA GB200", ("Blackwell", "10.0", 152), reported(184.31), 8000,
           {"fp64": 40.0, "fp32": 80.0, "tf32": 1250.0, "bf16": 2500.0, "fp16": 2500.0, "fp8": 5000.0, "fp4": 10000.0},
           watts=1200, document="NVIDIA GB200 NVL72 data sheet, a 72nd", nvlink=(1800, "switch"), pcie="5 x16",
           seen={"peak": _BLACKWELL_BRIEF, "power": _BLACKWELL_BRIEF}, note="one of the two GPUs of a superchip"),
]  # fmt: skip

DEVICES = [*_V100, *_T4, *_A100, *_ADA, *_HOPPERS, *_BLACKWELL]
