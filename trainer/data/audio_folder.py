"""Recordings in a folder a class: WAV in, log-mel spectrogram out."""

from __future__ import annotations

import wave
from functools import partial
from math import log10
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.data.class_folders import ClassFolders, Read

SILENCE = 1e-6
"""Floor of the power before its logarithm."""
SAMPLE_BYTES = 2


class AudioFolder(ClassFolders):
    """Batches of (n, 1, mels, frames) float32 and (n,) int64 from `root/CLASS/*.wav`, 16-bit PCM."""

    suffixes = (".wav",)
    provides: ClassVar[dict[str, Any]] = {"input_shape": [1, "mels", "frames"], "num_classes": None}
    """`frames`: trainer/checks/fits.py derives it from `rate` and `seconds`, as `shape` does."""

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        num_workers: int = 2,
        rate: int = 8000,
        seconds: float = 1.0,
        mels: int = 40,
        augment: bool = True,
        held_out: float = 0.1,
        max_bad: int = 100,
    ) -> None:
        """`rate`: samples a second; a file of another rate counts as bad. `seconds`: of a clip, which is cut from
        the recording (in training, with `augment`, anywhere; else its middle) or filled up with silence.
        """
        super().__init__(root, batch_size, num_workers, held_out, max_bad)
        self.rate, self.samples, self.mels, self.augment = rate, round(rate * seconds), mels, augment
        self.window = rate // 40
        """Samples of a spectrum: 25 ms. The next one starts 10 ms later."""
        self.hop = rate // 100

    def shape(self) -> list[int]:
        return [1, self.mels, 1 + self.samples // self.hop]

    def reader(self, training: bool) -> tuple[Read, bool]:
        random = training and self.augment
        filters = mel_filters(self.mels, self.window // 2 + 1, self.rate)
        clip = partial(read_clip, rate=self.rate, samples=self.samples, random=random)
        return partial(_spectrogram_of, clip=clip, filters=filters, window=self.window, hop=self.hop), random


def read_clip(path: Path, rate: int, samples: int, random: bool) -> torch.Tensor:
    """(samples,) float32 in -1..1; several channels are averaged. Raises ValueError or OSError."""
    try:
        with wave.open(str(path)) as file:
            channels, width, found_rate, frames = file.getparams()[:4]
            raw = file.readframes(frames)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"not a WAV file: {error}") from error
    if width != SAMPLE_BYTES or found_rate != rate:
        raise ValueError(f"{8 * width} bits at {found_rate} Hz, not 16 at {rate}")
    if len(raw) < SAMPLE_BYTES * channels * rate // 20:
        raise ValueError("shorter than 50 ms")
    values = numpy.frombuffer(raw, "<i2").reshape(-1, channels).mean(1).astype(numpy.float32) / 2**15
    room = len(values) - samples
    if room <= 0:
        return torch.nn.functional.pad(torch.from_numpy(values), (0, -room))
    begin = int(torch.randint(room + 1, ())) if random else room // 2
    return torch.from_numpy(values[begin : begin + samples].copy())


def log_mel(clip: torch.Tensor, filters: torch.Tensor, window: int, hop: int) -> torch.Tensor:
    """(1, mels, frames): decibels of the power in each band, shifted and scaled to about -1..1."""
    spectrum = torch.stft(clip, window, hop, window=torch.hann_window(window), return_complex=True)
    power = filters @ spectrum.abs().square()
    return (10 * torch.log10(power + SILENCE) / 40).unsqueeze(0)


def mel_filters(mels: int, bins: int, rate: int) -> torch.Tensor:
    """(mels, bins) triangles, evenly spaced on the mel scale (O'Shaughnessy: 2595 log10(1 + f / 700))."""
    top = 2595 * log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, mels + 2) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def _spectrogram_of(path: Path, clip: Read, filters: torch.Tensor, window: int, hop: int) -> torch.Tensor:
    return log_mel(clip(path), filters, window, hop)
