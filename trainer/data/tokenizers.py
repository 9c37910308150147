"""How text becomes tokens, and the files that hold them. Imports no torch: `trainer data tokenize` uses it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy

from trainer.errors import UserError

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "[SEP]")
"""What tokenizers call the token behind a document: GPT-2's and ours, Llama 3's, Llama 2's and T5's, BERT's."""


class Tokenizer(Protocol):
    """Text to ids; `end_of_text` is put behind each document."""

    vocab_size: int
    end_of_text: int

    def encode(self, text: bytes) -> Sequence[int] | numpy.ndarray:
        """Ids of a UTF-8 text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        ...


class Bytes:
    """One token a byte; no text holds the byte 0, so it ends documents."""

    vocab_size = 256
    end_of_text = 0

    def encode(self, text: bytes) -> numpy.ndarray:
        return numpy.frombuffer(text, numpy.uint8)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class BytePairs:
    """A tokenizer.json: byte-level pairs, as GPT-2's, trained on one's own text (Sennrich et al. 2016), or any other
    that Hugging Face's library reads."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where it has none of `ENDS`."""
        from tokenizers import Tokenizer as Trained

        self._trained = Trained.from_file(str(path))
        # As it was saved it may cut or fill up whatever it encodes.
        self._trained.no_truncation()
        self._trained.no_padding()
        ids = self._trained.get_vocab()
        self.vocab_size: int = max(ids.values()) + 1
        ends = [ids[name] for name in ENDS if name in ids]
        if not ends:
            raise UserError(f"{path} has no token for the end of a text", f"add one of {', '.join(ENDS)}")
        self.end_of_text: int = ends[0]

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int, path: Path) -> BytePairs:
        """Writes `path`, a Hugging Face tokenizer.json. About 5 MB of text a second."""
        from tokenizers import ByteLevelBPETokenizer

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(
            (text.decode() for text in texts),
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            show_progress=False,
        )
        trained.save(str(path))
        return cls(path)

    def encode(self, text: bytes) -> Sequence[int]:
        return self._trained.encode(text.decode(), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._trained.decode(list(ids))


def token_type(vocab_size: int) -> type[numpy.unsignedinteger]:
    """The smallest of uint16 and uint32 that holds every id."""
    return numpy.uint16 if vocab_size <= 2**16 else numpy.uint32


def write_tokens(path: Path, texts: Iterable[bytes], tokenizer: Tokenizer) -> tuple[int, int]:
    """Write the tokens of the texts, each with its end, as plain little-endian integers.

    Returns (tokens, bytes of text); an end counts as one byte, so that bits a byte can be compared with those of
    a model that reads the same stream of bytes.
    """
    tokens, length = 0, 0
    with path.open("wb") as file:
        for text in texts:
            ids = numpy.append(tokenizer.encode(text), tokenizer.end_of_text)
            file.write(ids.astype(token_type(tokenizer.vocab_size)).tobytes())
            tokens += len(ids)
            length += len(text) + 1
    return tokens, length
