"""NVIDIA's GeForce and RTX cards. GeForce cards multiply bf16 and fp16 at half rate when the sum is kept in fp32.

torch sums in fp32, so the half rate is the peak here; NVIDIA's figures for GeForce ("AI TOPS") are for sums in fp16,
with 2:4 sparsity. TITAN RTX and the RTX cards for workstations have the full rate. The GeForce figures are those of the
Founders Edition; cards of other makers run at other clocks.
"""

from __future__ import annotations

from trainer.hardware.device import Figure
from trainer.hardware.nvidia import nvidia, reported, sheet

_HALF = "half matrix rate with sums in fp32, which torch keeps"
_TURING_PAPER = "NVIDIA Turing architecture white paper, appendix A and B"
_GA102_PAPER = "NVIDIA Ampere GA102 white paper V2, appendix A, nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
_AD102_PAPER = "NVIDIA Ada architecture white paper V2, appendix A"
_GB202_PAPER = "NVIDIA RTX Blackwell architecture white paper, appendix A"
_TURING_SEEN: dict[Figure, str] = dict.fromkeys(
    ("bandwidth", "power"),
    "https://hardwareluxx.de/index.php/news/hardware/grafikkarten/47968-titan-rtx-fuer-2-699-euro-mit-voller-tu102-gpu-und-24-gb-gddr6-vorgestellt.html",
)
_AD102_SEEN: dict[Figure, str] = dict.fromkeys(
    ("peak", "bandwidth", "power"), "https://hmc-tech.com/gpus/nvidia-geforce-rtx-4090-vs-nvidia-rtx-pro-5000-blackwell"
)
_GB202_SEEN: dict[Figure, str] = dict.fromkeys(
    ("bandwidth", "power"), "https://www.spheron.network/blog/nvidia-rtx-5090-specs/"
)
_RTX_PRO = "https://hmc-tech.com/gpu/nvidia-rtx-pro-6000-blackwell-vs-amd-radeon-pro-duo-polaris"
_RTX_PRO_SPECS = "https://hardware-corner.net/rtx-5090-vs-rtx-pro-6000-spec-comparison-20250321"

_TURING = [
    nvidia("NVIDIA GeForce RTX 2080 Ti", ("Turing", "7.5", 68), reported(10.75), 616, {"fp32": 14.2, "fp16": 56.9},
           watts=260, document=_TURING_PAPER, nvlink=(100, "bridge"), pcie="3 x16", seen=_TURING_SEEN, note=_HALF),
    nvidia("NVIDIA TITAN RTX", ("Turing", "7.5", 72), sheet(24), 672, {"fp32": 16.3, "fp16": 130.5}, watts=280,
           document="NVIDIA TITAN RTX data sheet", nvlink=(100, "bridge"), pcie="3 x16", seen=_TURING_SEEN),
    nvidia("Quadro RTX 6000", ("Turing", "7.5", 72), sheet(24), 672, {"fp32": 16.3, "fp16": 130.5}, watts=295,
           document="NVIDIA Quadro RTX 6000 data sheet", nvlink=(100, "bridge"), pcie="3 x16"),
    nvidia("Quadro RTX 8000", ("Turing", "7.5", 72), sheet(48), 672, {"fp32": 16.3, "fp16": 130.5}, watts=295,
           document="NVIDIA Quadro RTX 8000 data sheet", nvlink=(100, "bridge"), pcie="3 x16"),
]  # fmt: skip

_AMPERE = [
    nvidia("NVIDIA GeForce RTX 3090", ("Ampere", "8.6", 82), reported(23.68), 936,
           {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0, "fp16": 71.0}, watts=350, document=_GA102_PAPER,
           nvlink=(112.5, "bridge"),
           seen=dict.fromkeys(
               ("bandwidth", "power"),
               "https://cpu-gpu.alldbin.com/graphics-card-comparison/"
               "GeForce-RTX-3090-and-GeForce-RTX-3050-6GB-mobile-comparison.html",
           ), note=_HALF),
    nvidia("NVIDIA GeForce RTX 3090 Ti", ("Ampere", "8.6", 84), sheet(24), 1008,
           {"fp32": 40.0, "tf32": 40.0, "bf16": 80.0, "fp16": 80.0}, watts=450,
           document="NVIDIA GeForce RTX 3090 Ti specifications",
           nvlink=(112.5, "bridge"),
           seen=dict.fromkeys(
               ("bandwidth", "power"), "https://topcpu.net/pt/gpu-c/geforce-rtx-2060-tu104-vs-geforce-rtx-3090-ti"
           ), note=_HALF),
    nvidia("NVIDIA RTX A4000", ("Ampere", "8.6", 48), reported(15.61, "DengKaiCQ/VGGT-Long/issues/6"), 448,
           {"fp32": 19.2, "tf32": 38.3, "bf16": 76.7, "fp16": 76.7}, watts=140, document="NVIDIA RTX A4000 data sheet",
           seen={"memory": "https://github.com/DengKaiCQ/VGGT-Long/issues/6",
                 **dict.fromkeys(
                     ("bandwidth", "power"),
                     "https://sysrqmts.com/tr/gpus/compare/nvidia-geforce-rtx-3080-12-gb-vs-nvidia-rtx-a4000")}),
    nvidia("NVIDIA RTX A5000", ("Ampere", "8.6", 64), sheet(24), 768,
           {"fp32": 27.8, "tf32": 55.6, "bf16": 111.1, "fp16": 111.1}, watts=230,
           document="NVIDIA RTX A5000 data sheet",
           nvlink=(112.5, "bridge")),
    nvidia("NVIDIA RTX A6000", ("Ampere", "8.6", 84), reported(47.40), 768,
           {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8, "fp16": 154.8}, watts=300,
           document="NVIDIA RTX A6000 data sheet",
           nvlink=(112.5, "bridge"), note="error correction is off by default, and takes 3 GiB when it is on"),
]  # fmt: skip

_ADA = [
    nvidia("NVIDIA RTX 6000 Ada Generation", ("Ada", "8.9", 142), reported(44.43, "DINGYANB/MTVCrafter/issues/21"), 960,
           {"fp32": 91.1, "tf32": 182.1, "bf16": 364.2, "fp16": 364.2, "fp8": 728.5}, watts=300,
           document="NVIDIA RTX 6000 Ada data sheet",
           seen={"memory": "https://github.com/DINGYANB/MTVCrafter/issues/21"},
           note="memory with error correction on; off, torch reports 47.4 GiB"),
    nvidia("NVIDIA GeForce RTX 4080", ("Ada", "8.9", 76), sheet(16), 717,
           {"fp32": 48.7, "tf32": 48.7, "bf16": 97.5, "fp16": 97.5, "fp8": 194.9}, watts=320, document=_AD102_PAPER,
           note=_HALF),
    nvidia("NVIDIA GeForce RTX 4090", ("Ada", "8.9", 128), reported(23.52, "Soul-AILab/SoulX-FlashTalk/issues/5"), 1008,
           {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2, "fp8": 330.3}, watts=450, document=_AD102_PAPER,
           seen=_AD102_SEEN, note=_HALF),
]  # fmt: skip

_BLACKWELL = [
    nvidia("NVIDIA GeForce RTX 5080", ("Blackwell", "12.0", 84), sheet(16), 960,
           {"fp32": 56.3, "tf32": 56.3, "bf16": 112.6, "fp16": 112.6, "fp8": 225.1, "fp4": 900.4}, watts=360,
           document=_GB202_PAPER,
           pcie="5 x16", note=_HALF),
    nvidia("NVIDIA GeForce RTX 5090", ("Blackwell", "12.0", 170),
           reported(31.36, "TrajectoryCrafter/TrajectoryCrafter/issues/20"), 1792,
           {"fp32": 104.8, "tf32": 104.8, "bf16": 209.5, "fp16": 209.5, "fp8": 419.0, "fp4": 1676.0}, watts=575,
           document=_GB202_PAPER,
           pcie="5 x16",
           seen={**_GB202_SEEN, "memory": "https://github.com/TrajectoryCrafter/TrajectoryCrafter/issues/20"},
           note=_HALF),
    nvidia("NVIDIA RTX PRO 6000 Blackwell Server Edition", ("Blackwell", "12.0", 188), reported(94.97), 1597,
           {"fp32": 120.0, "tf32": 250.0, "bf16": 500.0, "fp16": 500.0, "fp8": 1000.0, "fp4": 2000.0}, watts=600,
           document="NVIDIA RTX PRO 6000 Blackwell Server Edition data sheet", pcie="5 x16",
           note="matrix rates as rounded by the data sheet"),
    nvidia("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", ("Blackwell", "12.0", 188), reported(94.97), 1792,
           {"fp32": 126.0, "tf32": 251.9, "bf16": 503.8, "fp16": 503.8, "fp8": 1007.6, "fp4": 2015.2}, watts=600,
           document="NVIDIA RTX PRO Blackwell white paper", pcie="5 x16",
           seen={"peak": _RTX_PRO, "power": _RTX_PRO, "bandwidth": _RTX_PRO_SPECS}),
    nvidia("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", ("Blackwell", "12.0", 188), reported(94.97), 1792,
           {"fp32": 109.7, "tf32": 219.4, "bf16": 438.9, "fp16": 438.9, "fp8": 877.8, "fp4": 1755.6}, watts=300,
           document="NVIDIA RTX PRO Blackwell white paper", pcie="5 x16"),
]  # fmt: skip

DEVICES = [*_TURING, *_AMPERE, *_ADA, *_BLACKWELL]
