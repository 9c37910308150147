"""Audio recordings in one folder per class: WAV in, log-mel spectrogram out."""

from __future__ import annotations

import os
import wave
from functools import partial
from math import log10
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch

from trainer.data.class_folders import ClassFolders, Reader
from trainer.data.untrusted import open_regular

SILENCE = 1e-6
"""Floor of the power before the logarithm: -60 dB."""
SAMPLE_BYTES = 2


class AudioFolder(ClassFolders):
    """Spectrograms of 16-bit PCM recordings in `root/CLASS/*.wav`.

    Batches: `(batch, 1, mels, frames)` float32 spectrograms and `(batch,)` int64 classes. `frames` is
    `1 + samples // hop`, one every 10 ms.

    Args:
        root: Folder with one folder per class, or with `train`, `val` and `test` folders that hold these.
        batch_size: Global batch size.
        num_workers: Worker processes per rank.
        rate: Samples per second. A file with another sampling rate counts as bad.
        seconds: Length of a clip in seconds. Longer recordings are cropped: at a random position in training with
            `augment`, else at the middle. Shorter ones are padded with silence.
        mels: Number of mel bands.
        augment: Crop at random positions in training.
        held_out: Fraction of the files for each of validation and test, if no folder gives them.
        max_bad: Unreadable files per process that are tolerated.
    """

    suffixes = (".wav",)
    provides: ClassVar[dict[str, Any]] = {"input_shape": [1, "mels", "frames"], "num_classes": None}
    """`trainer/checks/fits.py` derives `frames` from `rate` and `seconds`, as `shape` does."""

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        *,
        num_workers: int = 2,
        rate: int = 8000,
        seconds: float = 1.0,
        mels: int = 40,
        augment: bool = True,
        held_out: float = 0.1,
        max_bad: int = 100,
    ) -> None:
        super().__init__(root, batch_size, num_workers=num_workers, held_out=held_out, max_bad=max_bad)
        self.rate, self.samples, self.mels, self.augment = rate, round(rate * seconds), mels, augment
        self.window = rate // 40
        """Samples per spectrum: 25 ms."""
        self.hop = rate // 100
        """Samples between the starts of two spectra: 10 ms."""

    def shape(self) -> list[int]:
        """Return `[1, mels, frames]`."""
        return [1, self.mels, 1 + self.samples // self.hop]

    def reader(self, training: bool) -> tuple[Reader, bool]:
        """Return the function that reads a file, and whether it is random."""
        random = training and self.augment
        filters = mel_filters(self.mels, self.window // 2 + 1, self.rate)
        clip = partial(read_clip, rate=self.rate, samples=self.samples, random=random)
        return partial(_spectrogram_of, read=clip, filters=filters, window=self.window, hop=self.hop), random


def read_clip(path: Path, rate: int, samples: int, random: bool) -> torch.Tensor:
    """Read a clip of a WAV file, averaged over its channels.

    Args:
        path: The file.
        rate: Expected sampling rate in Hz.
        samples: Length of the clip.
        random: Crop at a random position; else at the middle.

    Returns:
        Samples in -1..1, float32 of shape `(samples,)`.

    Raises:
        ValueError: The file is no 16-bit PCM at `rate`, or shorter than 50 ms.
        OSError: The file cannot be read.
    """
    with open_regular(path) as content:
        try:
            with wave.open(content) as file:
                channels, width, file_rate, promised = file.getparams()[:4]
        except (wave.Error, EOFError, RuntimeError, OverflowError) as error:
            raise ValueError(f"not a WAV file: {error}") from error
        if width != SAMPLE_BYTES or file_rate != rate:
            raise ValueError(f"{8 * width} bits at {file_rate} Hz, not 16 at {rate}")
        # The header may promise more than there is: recorders that write to a pipe do not know the length.
        begin, frame_bytes = content.tell(), SAMPLE_BYTES * channels
        frames = min(promised, (os.fstat(content.fileno()).st_size - begin) // frame_bytes)
        if frames * frame_bytes < frame_bytes * rate // 20:
            raise ValueError("shorter than 50 ms")
        spare = frames - samples
        start = 0 if spare <= 0 else int(torch.randint(spare + 1, ())) if random else spare // 2
        content.seek(begin + start * frame_bytes)
        raw = content.read(min(frames, samples) * frame_bytes)
    values = numpy.frombuffer(raw, "<i2").reshape(-1, channels).mean(1).astype(numpy.float32) / 2**15
    return torch.nn.functional.pad(torch.from_numpy(values), (0, max(0, -spare)))


def log_mel(clip: torch.Tensor, filters: torch.Tensor, window: int, hop: int) -> torch.Tensor:
    """Return the log-mel spectrogram of a clip.

    The power in each band in decibels, divided by 40 to scale it to about -1..1.

    Args:
        clip: Samples of shape `(samples,)`.
        filters: Mel filters of shape `(mels, window // 2 + 1)`.
        window: Samples per spectrum, under a Hann window.
        hop: Samples between the starts of two spectra.

    Returns:
        Tensor of shape `(1, mels, frames)`.
    """
    spectrum = torch.stft(clip, window, hop, window=torch.hann_window(window), return_complex=True)
    power = filters @ spectrum.abs().square()
    return (10 * torch.log10(power + SILENCE) / 40).unsqueeze(0)


def mel_filters(mels: int, bins: int, rate: int) -> torch.Tensor:
    """Return triangular filters evenly spaced on the mel scale.

    The scale is that of O'Shaughnessy 1987, "Speech Communication: Human and Machine": `mel(f) = 2595 log10(1 + f /
    700)`.

    Args:
        mels: Number of filters.
        bins: Number of frequency bins from 0 to `rate / 2`.
        rate: Sampling rate in Hz.

    Returns:
        Tensor of shape `(mels, bins)`.
    """
    top = 2595 * log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, mels + 2) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins)
    rising = (frequencies - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - frequencies) / (corners[2:] - corners[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)


def _spectrogram_of(path: Path, read: Reader, filters: torch.Tensor, window: int, hop: int) -> torch.Tensor:
    return log_mel(read(path), filters, window, hop)
