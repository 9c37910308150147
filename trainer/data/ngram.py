"""Baselines for language models over bytes: `python -m trainer.data.ngram [FOLDER]`.

The n-gram models of `baselines.py`, counted on the training files and measured on the held-out files, with the splits
of `Text`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy

from trainer.data.baselines import bits_per_byte
from trainer.data.text import Text
from trainer.data.tokens import TokenWindows


def _stream(dataset: object) -> numpy.ndarray:
    assert isinstance(dataset, TokenWindows)
    return dataset.files[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the baselines of a folder's held-out files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", help="folder or file (default: the standard library)")
    data = Text(root=parser.parse_args(arguments).root, sequence_length=1)
    data.prepare_data()
    data.setup()
    train, val, test = (_stream(dataset) for dataset in (data.train, data.val, data.test))
    print(f"{'bits/byte':<12}{'val':>8}{'test':>8}")
    for order, name in ((1, "unigram"), (2, "2-gram"), (3, "3-gram")):
        values = [bits_per_byte(train, held_out, order) for held_out in (val, test)]
        print(f"{name:<12}{values[0]:>8.3f}{values[1]:>8.3f}")


if __name__ == "__main__":
    main()
