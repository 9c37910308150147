"""Data from strangers: bombs, lies, pipes and names that pose as something else."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import struct
import threading
import tracemalloc
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch

from tests.security.bounds import ends_within
from tests.security.image_bombs import BOMBS, encoded
from trainer.config.compose import compose
from trainer.core.errors import UserError
from trainer.data import cache, untrusted
from trainer.data.audio_folder import read_clip
from trainer.data.class_folders import LabelledFiles
from trainer.data.files import read_folder
from trainer.data.hf_dataset import hf_dataset
from trainer.data.idx import read_idx
from trainer.data.image_folder import read_image
from trainer.data.image_table import ImageColumn, Row
from trainer.data.remote import RemoteFolder
from trainer.data.shard_index import IndexedFile
from trainer.data.tables import Tables, column_of, find_tables
from trainer.data.token_shards import TokenShards
from trainer.data.tokenize import Shard, _documents
from trainer.data.tokenizers import BytePairs, TokenizerChoice
from trainer.starter.choose import Machine, choose
from trainer.starter.folder import expand
from trainer.starter.scan import Texts, scan
from trainer.starter.write import as_yaml
from trainer.tasks.classification import IGNORED

MIB = 2**20
CPU_S = 10.0


@contextmanager
def ends_soon(memory: int | None = None) -> Iterator[None]:
    """Fail if the block takes long, or allocates more bytes at a time."""
    if memory:
        tracemalloc.start()
    try:
        with ends_within(CPU_S):
            yield
        assert not memory or tracemalloc.get_traced_memory()[1] < memory
    finally:
        tracemalloc.stop()


def reads_as_bad(path: Path, read: Callable[[Any], torch.Tensor]) -> None:
    data = LabelledFiles([(path, 1)], read, (3, 64, 64), max_bad=1, random=False)
    with ends_soon(memory=100 * MIB):
        image, label = data[0]
    assert label == IGNORED
    assert not image.any()


@pytest.mark.filterwarnings("default")  # as a job has it: Pillow only warns of images between its limit and twice that
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_an_image_bomb_is_a_bad_sample(tmp_path: Path, bomb: bytes) -> None:
    """blocked by: a limit on pixels before decoding, and every error of a decoder is a bad sample"""
    path = tmp_path / "image.jpg"
    path.write_bytes(bomb)
    reads_as_bad(path, partial(read_image, size=64, random=False))


def test_an_image_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: a closed list of image formats"""
    from PIL import EpsImagePlugin

    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "image.png").write_bytes(BOMBS["eps"])
    reads_as_bad(tmp_path / "image.png", partial(read_image, size=64, random=False))
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("what", ["pipe", "device", "sparse"])
@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_pipe_or_a_device_in_a_folder_is_a_bad_sample(tmp_path: Path, kind: str, what: str) -> None:
    """blocked by: only regular files are opened, and without waiting"""
    path = tmp_path / "sample"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    image, audio = partial(read_image, size=64, random=False), partial(read_clip, rate=8000, samples=80, random=False)
    reads_as_bad(path, image if kind == "image" else audio)


def wav(path: Path, *, rate: int = 8000, frames: int = 8000, promised: int | None = None) -> Path:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(numpy.arange(frames, dtype="<i2").tobytes())
    content = bytearray(buffer.getvalue())
    content[24:28] = struct.pack("<I", rate)
    if promised is not None:
        content[40:44] = struct.pack("<I", promised)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_recording_with_a_wrong_length_costs_a_clip(tmp_path: Path) -> None:
    """blocked by: only the clip is read, and a header is believed up to the size of the file"""
    lying = wav(tmp_path / "lying.wav", promised=2**32 - 1)
    clip = read_clip(lying, 8000, 8000, random=False)
    assert torch.equal(clip, torch.arange(8000) / 2**15)
    large = wav(tmp_path / "large.wav", promised=2**32 - 46)
    with large.open("r+b") as file:
        file.truncate(2**32 - 2)
    with ends_soon(memory=10 * MIB):
        assert len(read_clip(large, 8000, 8000, random=True)) == 8000


def test_recordings_with_rate_0_are_counted_as_unreadable(tmp_path: Path) -> None:
    """blocked by: rates and lengths are checked before they are divided"""
    for name in ("yes/0.wav", "no/0.wav", "yes/1.wav"):
        wav(tmp_path / name, rate=0)
    with pytest.raises(UserError, match="none of 3 WAV files can be read"):
        scan(tmp_path)
    wav(tmp_path / "no/1.wav", promised=2**32 - 1)
    assert scan(tmp_path).seconds == 1.0  # type: ignore[union-attr]


@pytest.mark.filterwarnings("default")
def test_a_bomb_among_the_images_does_not_end_the_choice_of_an_experiment(tmp_path: Path) -> None:
    """blocked by: the header reader of the data modules"""
    for name in ("a/0.png", "b/0.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(BOMBS["png"])
    with pytest.raises(UserError, match="none of 2 images can be read"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ((0, 8, 3, (60_000, 28, 28)), 100),
        ((0, 8, 3, (2**32 - 1,) * 3), 100),
        ((0, 8, 255, (2,) * 3), 100),
        ((0, 8, 2, (2, 2)), 300 * MIB),
        ((0, 13, 2, (2, 2)), 4),
        ((0, 8, 0, ()), 300 * MIB),
    ],
    ids=["short", "huge", "255-dimensions", "unpacks-to-more", "wrong-type", "no-dimension"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_lying_idx_file_is_named(tmp_path: Path, suffix: str, header: tuple[Any, ...], length: int) -> None:
    """blocked by: the shape in the header is compared with the limit first, and no more than it is unpacked"""
    zero, kind, dimensions, shape = header
    path = tmp_path / f"train-images-idx3-ubyte{suffix}"
    head = struct.pack(f">HBB{len(shape)}I", zero, kind, dimensions, *shape)
    if suffix:
        path.write_bytes(gzip.compress(head + bytes(length), 1))
    else:
        path.write_bytes(head)
        os.truncate(path, len(head) + length)
    with ends_soon(memory=30 * MIB), pytest.raises(UserError, match=r"cannot be read|holds .* bytes unpacked"):
        read_idx(path)


def test_sparse_and_enormous_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: holes are binary, and texts have a limit in all"""
    (tmp_path / "good.txt").write_text("good")
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.write(b"text")
        file.truncate(2**40)
    (tmp_path / "lines.jsonl").write_bytes(b"")
    os.truncate(tmp_path / "lines.jsonl", 2**40)
    os.mkfifo(tmp_path / "pipe.txt")
    with ends_soon(memory=10 * MIB):
        assert [file.name for file in read_folder(tmp_path, ["*.txt"])] == ["good.txt"]
        shard = Shard()
        assert not list(_documents(tmp_path / "lines.jsonl", "text", shard))
        assert not list(_documents(tmp_path / "sparse.txt", "text", shard))
        assert shard.bad == 2
    (tmp_path / "large.txt").write_text("x" * 1000)
    with pytest.raises(UserError, match=r"1,000 bytes.*\n.*data\.max_bytes"):
        read_folder(tmp_path, ["*.txt"], max_bytes=1000)
    monkeypatch.setattr(untrusted, "available_bytes", lambda: 2006)
    with pytest.raises(UserError, match="999 are left"):
        read_folder(tmp_path, ["*.txt"])


def test_a_deep_json_line_is_a_bad_record(tmp_path: Path) -> None:
    """blocked by: an error of the parser is a bad record"""
    (tmp_path / "a.jsonl").write_text("[" * 100_000 + '\n{"text": "good"}\n')
    shard = Shard()
    assert [text for _, text in _documents(tmp_path / "a.jsonl", "text", shard)] == [b"good"]
    assert shard.bad == 1


def test_a_parquet_file_does_not_unpack_to_more_than_the_limit(tmp_path: Path) -> None:
    """blocked by: a limit on what a row group unpacks to, and on the rows of it that are read at a time"""
    path = tmp_path / "train.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["x" * MIB] * 64}), path, compression="zstd", use_dictionary=False
    )
    assert path.stat().st_size < MIB
    tables = find_tables(tmp_path, max_bytes=8 * MIB)
    with pytest.raises(UserError, match=r"train\.parquet holds .* bytes unpacked"):
        list(column_of(tables.files["train"], "text", tables.max_bytes))
    assert len(list(column_of(tables.files["train"], "text"))) >= 1
    # One long text in a dictionary, to which each of many rows refers: 64 MiB from a row group of one.
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * MIB] * 64}), path, compression="zstd")
    before = pyarrow.default_memory_pool().max_memory()
    sizes = [chunk.nbytes for _, _, chunk in column_of(tables.files["train"], "text", 8 * MIB)]
    assert max(sizes) <= 9 * MIB
    assert sum(sizes) >= 64 * MIB
    assert before <= pyarrow.default_memory_pool().max_memory()


@pytest.mark.parametrize(
    "files",
    [
        {"state.json": {"_data_files": [{"filename": "../../secret.arrow"}]}},
        {"state.json": {"_data_files": [{"filename": "/etc/passwd"}]}},
        {"state.json": {"_data_files": [{"filename": 3}]}},
        {"state.json": {"_data_files": 3}},
        {"state.json": {}},
        {"state.json": []},
        {"dataset_dict.json": {"splits": 3}},
        {"dataset_dict.json": {"splits": [["train"]]}},
        {"dataset_dict.json": {"splits": {"train": 1}}},
        {"train.parquet": "no table"},
        {"train.arrow": "no table"},
        {"train.arrow": "ARROW1 no table"},
        {"train.arrow": ""},
        {"train.parquet": ""},
    ],
    ids=lambda files: json.dumps(files)[:60],
)
def test_a_lying_dataset_is_named(tmp_path: Path, files: dict[str, Any]) -> None:
    """blocked by: names and types in the JSON of a dataset are checked"""
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with ends_soon(), pytest.raises(UserError, match=r"cannot be read|no name of a file|no list|no JSON object"):
        hf_dataset(str(tmp_path))


@pytest.mark.parametrize("features", [{"label": {"names": 3}}, {"label": {"names": [1]}}, {"label": {"names": {}}}])
def test_lying_class_names_are_named(tmp_path: Path, features: dict[str, Any]) -> None:
    """blocked by: names and types in the JSON of a dataset are checked"""
    path = tmp_path / "train.arrow"
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": features}))
    with pytest.raises(UserError, match="names of the classes are"):
        Tables(tmp_path, {"train": [path]}).class_names("label")


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "a/../../secret.png", "a\0b"])
def test_a_table_cannot_name_a_file_outside_of_its_folder(tmp_path: Path, name: str) -> None:
    """blocked by: paths in data stay inside the root"""
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    root = tmp_path / "root"
    root.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": [name, "a/b.png"]}), root / "train.parquet")
    column = ImageColumn(root, "image", {})
    with pytest.raises(ValueError, match="outside of"):
        column(Row(root / "train.parquet", 0))
    assert column(Row(root / "train.parquet", 1)) == root / "a" / "b.png"


WORDS = {"type": "WordLevel", "unk_token": "x"}
BAD_TOKENIZERS = {
    "binary": b"\x80\x04pickle",
    "empty": b"",
    "list": b"[]",
    "object": b"{}",
    "no model": b'{"version": "1.0", "model": null}',
    "no words": json.dumps({"version": "1.0", "model": {**WORDS, "vocab": {}}}).encode(),
    "huge id": json.dumps({"version": "1.0", "model": {**WORDS, "vocab": {"x": 2**31, "</s>": 0}}}).encode(),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    """blocked by: every error of the library names the file, and ids have a limit"""
    (tmp_path / "tokenizer.json").write_bytes(content)
    choice = TokenizerChoice(str(tmp_path / "tokenizer.json"), 100)
    (tmp_path / "out").mkdir()
    with ends_soon(), pytest.raises(UserError, match=r"tokenizer\.json (is no tok|has the id|has no end)"):
        choice.make(tmp_path / "out", lambda: [b""])


def test_a_pipe_is_no_tokenizer(tmp_path: Path) -> None:
    """blocked by: only regular files are opened, and without waiting"""
    os.mkfifo(tmp_path / "tokenizer.json")
    with ends_soon(), pytest.raises(UserError, match="not a regular file"):
        BytePairs(tmp_path / "tokenizer.json")


META = {"vocab_size": 256, "tokens": {"train": 99, "val": 99}, "bytes": {"val": 99}}
BAD_SHARDS: dict[str, tuple[Any, bytes]] = {
    "list": ([], bytes(200)),
    "text": ({**META, "vocab_size": "256"}, bytes(200)),
    "negative": ({**META, "vocab_size": -1}, bytes(200)),
    "huge": ({**META, "vocab_size": 2**40}, bytes(200)),
    "no tokens": ({**META, "tokens": 3}, bytes(200)),
    "no bytes": ({"vocab_size": 256, "tokens": META["tokens"]}, bytes(200)),
    "odd size": (META, bytes(201)),
    "unknown id": (META, b"\xff\xff" * 100),
    "no JSON": ("no JSON", bytes(200)),
}


@pytest.mark.parametrize(("meta", "content"), BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_lying_shards_are_named(tmp_path: Path, meta: Any, content: bytes) -> None:
    """blocked by: types and ranges of the header, and of the tokens, are checked"""
    (tmp_path / "meta.json").write_text(meta if isinstance(meta, str) else json.dumps(meta))
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}-00000.bin").write_bytes(content)

    def read() -> None:
        data = TokenShards(str(tmp_path), sequence_length=4)
        data.setup()
        data.facts()
        assert data.train is not None
        data.train[0]

    with ends_soon(), pytest.raises(UserError):
        read()


class _Endless(BaseHTTPRequestHandler):
    """Sends without an end, whatever part was asked for; under /packed what unpacks to a thousand times as much."""

    blocks: ClassVar = {"plain": bytes(MIB), "packed": gzip.compress(bytes(64 * MIB))}

    def do_GET(self) -> None:
        self.send_response(200)
        block = self.blocks[self.path.split("/")[1]]
        if self.path.startswith("/packed"):
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            for _ in range(1000):
                self.wfile.write(block)
        except OSError:
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("path", ["plain", "packed"])
def test_a_web_server_that_does_not_end_is_cut_off(path: str, tmp_path: Path) -> None:
    """blocked by: no more is read than the index, or the limit of the index, says"""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Endless) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            folder = RemoteFolder(f"http://127.0.0.1:{server.server_port}/{path}")
            with ends_soon(16 * MIB), pytest.raises(UserError, match="is larger than 1,000 bytes"):
                folder.read("meta.json", 1000)
            for size in (10, MIB):
                with (
                    open(tmp_path / "shard", "w+b") as file,
                    ends_soon(16 * MIB),
                    pytest.raises(UserError, match="is larger than its index says"),
                ):
                    folder.fetch("train-00000.bin", IndexedFile(size, "0" * 64), file.fileno())
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "url",
    [
        *("reference://::file:///tmp/x.json", "reference::file:///tmp/x.json", "s3://a/b::reference://::http://evil/x"),
        *("simplecache::s3://bucket/x", "zip://x::http://evil/x.zip", "https://evil/x::file:///etc"),
    ],
)
def test_a_chain_of_protocols_is_refused(url: str) -> None:
    """blocked by: one protocol; fsspec before 2026 evaluates Jinja templates in a table of references"""
    with pytest.raises(UserError, match="a chain of protocols"):
        RemoteFolder(url)


def test_caches_are_private(tmp_path: Path) -> None:
    """blocked by: mode 0700"""
    before = os.umask(0)
    try:
        folder = cache.prepared(tmp_path / "a" / "b" / "text-0", lambda path: None)
    finally:
        os.umask(before)
    for path in (folder, folder.parent, folder.parent.parent):
        assert path.stat().st_mode & 0o777 == 0o700


NAMES = [
    "x\ncallbacks:\n  evil: {_target_: os.system}\n#",
    "x\r\nname: other",
    "x\x85name: other",
    "x\u2028name: other",
    "${oc.env:HOME}",
    "\\${oc.env:HOME}",
    'a" #',
    "a' b\\",
    "a: b # c",
    "\x1b]0;title\x07",
    "!!python",
    "caf\u00e9 \U0001f600",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_the_name_of_a_folder_is_data_in_an_experiment(workdir: Path, name: str) -> None:
    """blocked by: YAML from a dumper, and interpolations escaped"""
    root = workdir / name
    root.mkdir()
    for number in range(3):
        (root / f"{number}.txt").write_text("To be, or not to be.\n" * 200)
    text = as_yaml(choose(Texts(root, 3, 1_000_000, (".txt",)), Machine(0, 1)), "any")
    assert [one for one in text if not one.isprintable() and one != "\n"] == []
    output = io.StringIO()
    written = compose(expand([f"data={root}"], [], keep=True, stream=output), config_dirs=[], cwd=workdir).config
    again = compose(expand([f"data={root}"], [], keep=True, stream=output), config_dirs=[], cwd=workdir).config
    assert "using conf/experiment/" in output.getvalue()
    plain = compose(expand([f"data={root}"], [], keep=False, stream=output), config_dirs=[], cwd=workdir).config
    assert written["data"]["root"] == str(root)
    assert written == again == plain
    default = compose(["data=text", "model=transformer"], config_dirs=[], cwd=workdir).config
    assert written["callbacks"] == default["callbacks"]
    assert "\x1b" not in output.getvalue()


def test_names_in_the_log_are_one_line_of_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """blocked by: control characters are escaped where names from data are logged"""
    path = tmp_path / "a\n\x1b[2Jfinished at step 1"
    path.touch()
    data = LabelledFiles([(path, 1)], partial(read_image, size=8, random=False), (3, 8, 8), max_bad=0, random=False)
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as caught:
        data[0]
    for text in (caplog.messages[0], caught.value.message):
        assert "\\x1b" in text
        assert text.isprintable()
