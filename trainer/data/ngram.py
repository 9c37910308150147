"""Baselines for language models over bytes: `python -m trainer.data.ngram [FOLDER]`.

An n-gram model with Witten-Bell interpolation (Witten and Bell 1991): the estimate of each order is mixed with
that of the next lower one, by how many different bytes have followed the context; below the unigrams is the
uniform distribution. Counted on the training files, measured on the held-out ones that `Text` measures on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy

from trainer.data.text import Text
from trainer.data.tokens import TokenWindows

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


def _stream(dataset: object) -> numpy.ndarray:
    assert isinstance(dataset, TokenWindows)
    return dataset.files[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the baselines of a folder's held-out files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="folder or file; none: the standard library")
    data = Text(root=parser.parse_args(arguments).root, sequence_length=1)
    data.prepare_data()
    data.setup()
    train, val, test = (_stream(dataset) for dataset in (data.train, data.val, data.test))
    print(f"{'bits a byte':<12}{'val':>8}{'test':>8}")
    for order, name in ((1, "unigram"), (2, "2-gram"), (3, "3-gram")):
        values = [bits_per_byte(train, held_out, order) for held_out in (val, test)]
        print(f"{name:<12}{values[0]:>8.3f}{values[1]:>8.3f}")


if __name__ == "__main__":
    main()
