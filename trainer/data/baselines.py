"""N-gram models of bytes: baselines that a language model has to beat.

Witten-Bell interpolation (Witten and Bell 1991, "The Zero-Frequency Problem", method C): the estimate of each order is
interpolated with that of the next lower order, weighted by the number of distinct bytes seen after the context. Below
the unigrams is the uniform distribution.
"""

from __future__ import annotations

import numpy

VALUES = 256


def bits_per_byte(train: numpy.ndarray, held_out: numpy.ndarray, order: int) -> float:
    """Return the cross entropy of `held_out` under an n-gram model of `train`, in bits per byte.

    The mean of -log2 P(byte | previous `order - 1` bytes), without the first `order - 1` bytes of `held_out`. With
    context c, its count n(c), and t(c) distinct bytes seen after it: `P(b | c) = (n(c b) + t(c) P(b | shorter c)) /
    (n(c) + t(c))`.

    Args:
        train: Training text as uint8, shape `(bytes,)`.
        held_out: Text to measure on as uint8, shape `(bytes,)`.
        order: Order of the model, 1 to 3: the counts are a dense table of 256^order integers.
    """
    targets = held_out[order - 1 :]
    probabilities: numpy.ndarray = numpy.full(len(targets), 1 / VALUES)
    for length in range(1, order + 1):
        table = numpy.bincount(_codes(train, length), minlength=VALUES**length).reshape(-1, VALUES)
        contexts, following = numpy.divmod(_codes(held_out, length)[order - length :], VALUES)
        total = table.sum(1)[contexts]
        distinct = (table > 0).sum(1)[contexts]
        mixed = table[contexts, following] + distinct * probabilities
        probabilities = numpy.where(total > 0, mixed / numpy.maximum(total + distinct, 1), probabilities)
    return float(-numpy.log2(probabilities).mean())


def _codes(text: numpy.ndarray, length: int) -> numpy.ndarray:
    """Encode each run of `length` consecutive bytes as one integer."""
    codes = numpy.zeros(len(text) - length + 1, numpy.int64)
    for offset in range(length):
        codes = codes * VALUES + text[offset : len(text) - length + 1 + offset]
    return codes
