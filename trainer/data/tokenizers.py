"""How text becomes tokens, and the files that hold them. Imports no torch: `trainer data tokenize` uses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy

from trainer.core.errors import UserError

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "[SEP]")
"""What tokenizers call the token behind a document: GPT-2's and ours, Llama 3's, Llama 2's and T5's, BERT's."""

TOKENIZER = "tokenizer.json"
PADDING = ("[PAD]", "<pad>", "<|pad|>")


class Tokenizer(Protocol):
    """Text to ids; `end_of_text` is put behind each document."""

    vocab_size: int
    end_of_text: int
    padding: int
    """Behind texts that are shorter than others of a batch."""

    def encode(self, text: bytes) -> Sequence[int] | numpy.ndarray:
        """Ids of a UTF-8 text."""
        ...

    def whole(self, text: bytes, longest: int) -> tuple[Sequence[int] | numpy.ndarray, bool]:
        """Ids of a text that stands for itself, with what the tokenizer puts around one ([CLS] and [SEP]), cut to
        `longest` of them; and whether it was cut."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text; bytes that are not UTF-8 become U+FFFD."""
        ...


class Bytes:
    """One token a byte; no text holds the byte 0, so it ends documents."""

    vocab_size = 256
    end_of_text = padding = 0

    def encode(self, text: bytes) -> numpy.ndarray:
        return numpy.frombuffer(text, numpy.uint8)

    def whole(self, text: bytes, longest: int) -> tuple[numpy.ndarray, bool]:
        return self.encode(text[:longest]), len(text) > longest

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
        self.padding: int = next((ids[name] for name in PADDING if name in ids), self.end_of_text)

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

    def whole(self, text: bytes, longest: int) -> tuple[Sequence[int], bool]:
        self._trained.enable_truncation(longest)
        try:
            found = self._trained.encode(text.decode())
        finally:
            self._trained.no_truncation()
        return found.ids, bool(found.overflowing)

    def decode(self, ids: Sequence[int]) -> str:
        return self._trained.decode(list(ids))


class TokenizerChoice:
    """`data.tokenizer` and `data.vocab_size`: bytes, bpe with so many ids, or the path of a tokenizer.json."""

    def __init__(self, name: str, vocab_size: int) -> None:
        """Raises UserError where there is no such file."""
        self.name = name
        self.given = None if name in ("bytes", "bpe") else Path(name).expanduser()
        if self.given is not None and not self.given.is_file():
            raise UserError(f"data.tokenizer={name} is not known", "use bytes, bpe or the path of a tokenizer.json")
        self.vocab_size = Bytes.vocab_size if name == "bytes" else vocab_size

    def key(self) -> tuple[str | bytes, int]:
        """What the name of a prepared folder depends on, beside the texts."""
        return self.given.read_bytes() if self.given else self.name, self.vocab_size

    def make(self, folder: Path, texts: Callable[[], Iterable[bytes]]) -> Tokenizer:
        """The tokenizer; `tokenizer.json` in `folder` unless it is of bytes. `texts`: to train byte pairs on."""
        if self.name == "bytes":
            return Bytes()
        if self.given is None:
            return BytePairs.train(texts(), self.vocab_size, folder / TOKENIZER)
        shutil.copyfile(self.given, folder / TOKENIZER)
        return BytePairs(self.given)

    def load(self, folder: Path) -> Tokenizer:
        """What `make` gave for this folder."""
        return Bytes() if self.name == "bytes" else BytePairs(folder / TOKENIZER)


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
