"""N-gram models of bytes: what a language model has to beat.

Witten-Bell interpolation (Witten and Bell 1991): the estimate of each order is mixed with that of the next lower one,
by how many different bytes have followed the context; below the unigrams is the uniform distribution.
"""

from __future__ import annotations

import numpy

VALUES = 256


def bits_per_byte(train: numpy.ndarray, held_out: numpy.ndarray, order: int) -> float:
    """Mean -log2 P(byte | the `order - 1` bytes before it) of `held_out`, both uint8; its first bytes are left out.

    `order` 1 to 3: the counts are a dense table of 256^order numbers.
    """
    targets = held_out[order - 1 :]
    probabilities: numpy.ndarray = numpy.full(len(targets), 1 / VALUES)
    for used in range(1, order + 1):
        table = numpy.bincount(_codes(train, used), minlength=VALUES**used).reshape(-1, VALUES)
        contexts, following = numpy.divmod(_codes(held_out, used)[order - used :], VALUES)
        total = table.sum(1)[contexts]
        different = (table > 0).sum(1)[contexts]
        mixed = table[contexts, following] + different * probabilities
        probabilities = numpy.where(total > 0, mixed / numpy.maximum(total + different, 1), probabilities)
    return float(-numpy.log2(probabilities).mean())


def _codes(text: numpy.ndarray, length: int) -> numpy.ndarray:
    """Each run of `length` bytes as one number."""
    codes = numpy.zeros(len(text) - length + 1, numpy.int64)
    for place in range(length):
        codes = codes * VALUES + text[place : len(text) - length + 1 + place]
    return codes
