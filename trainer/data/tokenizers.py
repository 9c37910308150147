"""Tokenizers, and the files that hold tokens. Imports no torch, because `trainer data tokenize` uses it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

from trainer.core.errors import UserError
from trainer.data.untrusted import JSON_BYTES, open_regular, shown

END_OF_TEXT = "<|endoftext|>"
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "[SEP]")
"""Names of the end-of-text token: that of GPT-2 and this project, Llama 3's, Llama 2's and T5's, BERT's."""

TOKENIZER = "tokenizer.json"
PADDING = ("[PAD]", "<pad>", "<|pad|>")
MAX_VOCABULARY = 2**24
"""Maximum number of ids. The largest published vocabularies have 2**18."""


class Tokenizer(Protocol):
    """Converts text to ids; `end_of_text` is appended to each document."""

    vocab_size: int
    end_of_text: int
    padding: int
    """Appended to texts that are shorter than others in a batch."""

    def encode(self, text: bytes) -> Sequence[int] | numpy.ndarray:
        """Return the ids of a UTF-8 text."""
        ...

    def whole(self, text: bytes, longest: int) -> tuple[Sequence[int] | numpy.ndarray, bool]:
        """Return the ids of a text that is a sample by itself, truncated to `longest`, and whether it was truncated.

        Includes the special tokens that the tokenizer adds around a text ([CLS] and [SEP]).
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        ...


class Bytes:
    """One token per byte. Texts never hold the byte 0, so it ends documents."""

    vocab_size = 256
    end_of_text = padding = 0

    def encode(self, text: bytes) -> numpy.ndarray:
        """Return the bytes of a text as uint8."""
        return numpy.frombuffer(text, numpy.uint8)

    def whole(self, text: bytes, longest: int) -> tuple[numpy.ndarray, bool]:
        """Return the bytes truncated to `longest`, and whether they were truncated."""
        return self.encode(text[:longest]), len(text) > longest

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(ids).decode(errors="replace")


class BytePairs:
    """A `tokenizer.json`: byte-level byte-pair encoding trained on the user's text, or any other tokenizer.

    The encoding is that of Sennrich et al. 2016, on bytes as in GPT-2. Hugging Face's library reads the file.

    Args:
        path: The file.

    Raises:
        UserError: The file is no tokenizer, or it has none of `ENDS`.
    """

    def __init__(self, path: Path) -> None:
        self._trained: Any = _trained(path)
        # The saved file may enable truncation and padding.
        self._trained.no_truncation()
        self._trained.no_padding()
        ids = self._trained.get_vocab()
        self.vocab_size: int = max(ids.values(), default=0) + 1
        if self.vocab_size > MAX_VOCABULARY:
            problem = f"{shown(path)} has the id {self.vocab_size - 1}; the embedding of a model has a row for each"
            raise UserError(problem, "use another tokenizer.json")
        ends = [ids[name] for name in ENDS if name in ids]
        if not ends:
            raise UserError(f"{shown(path)} has no end-of-text token", f"add one of {', '.join(ENDS)}")
        self.end_of_text: int = ends[0]
        self.padding: int = next((ids[name] for name in PADDING if name in ids), self.end_of_text)

    @classmethod
    def train(cls, texts: Iterable[bytes], vocab_size: int, path: Path) -> BytePairs:
        """Train byte pairs on the texts and write `path`, a `tokenizer.json`. Takes about 1 s per 5 MB of text."""
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
        """Return the ids of a text, without special tokens."""
        ids: Sequence[int] = self._trained.encode(text.decode(), add_special_tokens=False).ids
        return ids

    def whole(self, text: bytes, longest: int) -> tuple[Sequence[int], bool]:
        """Return the ids with special tokens, truncated to `longest`, and whether they were truncated."""
        self._trained.enable_truncation(longest)
        try:
            encoding = self._trained.encode(text.decode())
        finally:
            self._trained.no_truncation()
        return encoding.ids, bool(encoding.overflowing)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text."""
        return str(self._trained.decode(list(ids)))


class TokenizerChoice:
    """The options `data.tokenizer` and `data.vocab_size`.

    Args:
        name: `bytes`; `bpe`; or the path of a `tokenizer.json`.
        vocab_size: Vocabulary size of `bpe`.

    Raises:
        UserError: The file does not exist.
    """

    def __init__(self, name: str, vocab_size: int) -> None:
        self.name = name
        self.given = None if name in ("bytes", "bpe") else Path(name).expanduser()
        if self.given is not None and not self.given.is_file():
            raise UserError(
                f"data.tokenizer={name}: unknown tokenizer", "use bytes, bpe or the path of a tokenizer.json"
            )
        self.vocab_size = Bytes.vocab_size if name == "bytes" else vocab_size

    def key(self) -> tuple[str | bytes, int]:
        """Return the settings that determine the name of a prepared folder, besides the texts."""
        return self.given.read_bytes() if self.given else self.name, self.vocab_size

    def make(self, folder: Path, texts: Callable[[], Iterable[bytes]]) -> Tokenizer:
        """Return the tokenizer, and write `tokenizer.json` to `folder` unless it is of bytes.

        Args:
            folder: The prepared folder.
            texts: Returns the texts that byte pairs are trained on.
        """
        if self.name == "bytes":
            return Bytes()
        if self.given is None:
            return BytePairs.train(texts(), self.vocab_size, folder / TOKENIZER)
        shutil.copyfile(self.given, folder / TOKENIZER)
        return BytePairs(self.given)

    def load(self, folder: Path) -> Tokenizer:
        """Return the tokenizer that `make` returned for this folder."""
        return Bytes() if self.name == "bytes" else BytePairs(folder / TOKENIZER)


def _trained(path: Path) -> Any:
    """Return the tokenizer in a file as Hugging Face's library reads it. Raises UserError if it does not."""
    from tokenizers import Tokenizer as Trained

    try:
        with open_regular(path) as file:
            content = file.read(4 * JSON_BYTES + 1)
        if len(content) > 4 * JSON_BYTES:
            raise ValueError(f"larger than {4 * JSON_BYTES:,} bytes")
        return Trained.from_str(content.decode())
    except BaseException as error:  # the library raises plain Exceptions, and Rust's panics are BaseExceptions
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        reason = shown(str(error).partition("\n")[0])[:200]
        raise UserError(f"{shown(path)} is no tokenizer.json: {reason}", "use another tokenizer.json") from None


def token_type(vocab_size: int) -> type[numpy.unsignedinteger]:
    """Return the smaller of uint16 and uint32 that holds every id."""
    return numpy.uint16 if vocab_size <= 2**16 else numpy.uint32


def write_tokens(path: Path, texts: Iterable[bytes], tokenizer: Tokenizer) -> tuple[int, int]:
    """Write the tokens of the texts, each followed by its end-of-text token, as plain little-endian integers.

    Returns:
        Number of tokens, and bytes of text. An end-of-text token counts as one byte, so that bits per byte can be
        compared with those of a model that reads the same stream of bytes.
    """
    tokens, length = 0, 0
    with path.open("wb") as file:
        for text in texts:
            ids = numpy.append(tokenizer.encode(text), tokenizer.end_of_text)
            file.write(ids.astype(token_type(tokenizer.vocab_size)).tobytes())
            tokens += len(ids)
            length += len(text) + 1
    return tokens, length
