"""`trainer data tokenize`: every format, bad records, resuming; and reading the shards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from tests.data.saved_tables import save_parquet, save_to_disk
from trainer.core.errors import UserError
from trainer.data import tokenize as module
from trainer.data.text import Text
from trainer.data.token_shards import TokenShards
from trainer.data.tokenize import Settings, Shard, tokenize
from trainer.data.tokenizers import BytePairs, Bytes
from trainer.data.tokens import TokenWindows


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    root.mkdir()
    for number in range(30):
        (root / f"{number:02d}.txt").write_text(f"The file with number {number} is a file. " * 5)
    lines = [json.dumps({"text": f"Line {number} of the lines."}) for number in range(30)]
    lines += ["{not json", json.dumps({"body": "no text"}), json.dumps({"text": ""})]
    (root / "lines.jsonl").write_text("\n".join(lines))
    (root / "latin.txt").write_bytes("Straße".encode("latin-1"))
    return root


def silent(done: int, units: int, totals: Shard) -> None:
    pass


def test_a_tokenizer_of_another_model_is_used_as_it_is(texts: Path, tmp_path: Path) -> None:
    """Also one whose end has another name, that adds tokens of its own, and that cuts what it encodes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    theirs = Tokenizer(models.WordLevel({"[UNK]": 0, "file": 1, "is": 2, "</s>": 3}, unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.Whitespace()
    theirs.post_processor = processors.TemplateProcessing(single="</s> $0 </s>", special_tokens=[("</s>", 3)])
    theirs.enable_truncation(4)
    path = tmp_path / "theirs.json"
    theirs.save(str(path))
    assert BytePairs(path).encode(b"The file with number 1 is a file") == [0, 1, 0, 0, 0, 2, 0, 1]
    data = Text(root=str(texts), patterns=["*.txt"], tokenizer=str(path), sequence_length=8, cache=str(tmp_path))
    data.setup()
    assert data.facts()["vocab_size"] == 4
    assert data.train is not None
    first = torch.cat(data.train[0]).tolist()  # type: ignore[misc]
    assert set(first) == {0, 1, 2}
    with pytest.raises(UserError, match="use bytes, bpe or the path"):
        Text(tokenizer="sentencepiece")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "a.json"))
    with pytest.raises(UserError, match="no end-of-text token"):
        BytePairs(tmp_path / "a.json")


def stream(out: Path, kind: type = numpy.uint16) -> list[int]:
    return [int(token) for path in sorted(out.glob("*.bin")) for token in numpy.fromfile(path, kind)]


def test_every_document_once_and_bad_ones_named(texts: Path, tmp_path: Path) -> None:
    totals = tokenize([texts], tmp_path / "out", Settings(held_out=0.2), 2, silent)
    assert (totals.documents, totals.bad) == (60, 4)
    assert len(totals.bad_names) == 4
    for place in ("latin.txt", "lines.jsonl:31", "lines.jsonl:32", "lines.jsonl:33"):
        assert any(place in name for name in totals.bad_names)
    documents = Bytes().decode(stream(tmp_path / "out")).split("\0")
    expected = {path.read_text() for path in texts.glob("??.txt")} | {f"Line {n} of the lines." for n in range(30)}
    assert sorted(documents) == sorted([*expected, ""])
    assert min(totals.tokens.values()) > 0


def test_tables_are_read_row_by_row(tmp_path: Path) -> None:
    """Parquet, and what `datasets` saves, whose JSON files are no text."""
    rows = {"body": ["One.", None, "Two."], "text": [1, 2, 3]}
    save_parquet(tmp_path / "parquet" / "0.parquet", rows)
    save_to_disk(tmp_path / "saved", rows, shards=1)
    for folder in ("parquet", "saved"):
        shard, documents = Shard(), []
        for path in module._files([tmp_path / folder]):
            documents += [(Path(name).name, text) for name, text in module._documents(path, "body", shard)]
        assert [text for _, text in documents] == [b"One.", b"Two."]
        assert [name.rpartition(":")[2] for name, _ in documents] == ["0", "2"]
        assert (shard.bad, shard.bad_names[0].endswith(":1: empty")) == (1, True)
    with pytest.raises(UserError, match="has no column content"):
        list(module._documents(tmp_path / "parquet" / "0.parquet", "content", Shard()))


def test_the_result_does_not_depend_on_the_workers_and_resumes(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "UNIT_BYTES", 1500)
    tokenize([texts], tmp_path / "one", Settings(), 1, silent)
    tokenize([texts], tmp_path / "two", Settings(), 2, silent)
    shards = sorted(path.name for path in (tmp_path / "one").glob("*.bin"))
    assert len(shards) >= 9
    for name in shards:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    # As if killed before shard 1 was recorded: only that one is made again.
    kept, lost = (tmp_path / "two" / f"shard-{number:05d}.json" for number in (0, 1))
    before = (kept.stat().st_mtime_ns, lost.stat().st_mtime_ns)
    lost.unlink()
    (tmp_path / "two" / "meta.json").unlink()
    tokenize([texts], tmp_path / "two", Settings(), 1, silent)
    assert (tmp_path / "two" / "meta.json").read_text() == (tmp_path / "one" / "meta.json").read_text()
    assert kept.stat().st_mtime_ns == before[0]
    assert lost.stat().st_mtime_ns > before[1]


def test_other_settings_need_another_folder(texts: Path, tmp_path: Path) -> None:
    tokenize([texts], tmp_path / "out", Settings(), 1, silent)
    with pytest.raises(UserError, match="holds shards of other files or settings"):
        tokenize([texts], tmp_path / "out", Settings(held_out=0.3), 1, silent)


def test_byte_pairs_are_learnt_or_given(texts: Path, tmp_path: Path) -> None:
    tokenize([texts], tmp_path / "learnt", Settings("bpe", vocab_size=300), 1, silent)
    learnt = BytePairs(tmp_path / "learnt" / "tokenizer.json")
    assert "The file with number" in learnt.decode(stream(tmp_path / "learnt"))
    given = Settings(str(tmp_path / "learnt" / "tokenizer.json"))
    tokenize([texts], tmp_path / "given", given, 1, silent)
    assert stream(tmp_path / "given") == stream(tmp_path / "learnt")


def test_the_command_and_the_data_module(texts: Path, tmp_path: Path) -> None:
    arguments = ["data", "tokenize", str(texts), str(tmp_path / "out"), "--held-out", "0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "60 documents" in done.stdout
    assert "lines.jsonl:31" in done.stderr
    data = TokenShards(str(tmp_path / "out"), batch_size=4, sequence_length=16)
    data.setup()
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (4, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert data.facts() == {"vocab_size": 256, "sequence_length": 16, "bytes_per_token": 1.0}


def test_missing_shards_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainer data tokenize TEXT_FOLDER"):
        TokenShards(str(tmp_path)).setup()


def test_windows_over_several_files(tmp_path: Path) -> None:
    """Files of 10, 0, 4 and 9 tokens: 3, 0, 1 and 2 windows of 3, none across a border."""
    paths = []
    for number, size in enumerate((10, 0, 4, 9)):
        paths.append(tmp_path / f"{number}.bin")
        (100 * number + numpy.arange(size)).astype(numpy.uint16).tofile(paths[-1])
    windows = TokenWindows(paths, 3, numpy.uint16)
    assert len(windows) == 6
    inputs, targets = windows.gather(torch.tensor([5, 0, 3, 2]), 0)
    assert inputs.tolist() == [[303, 304, 305], [0, 1, 2], [200, 201, 202], [6, 7, 8]]
    assert torch.equal(targets, inputs + 1)
    assert windows[4][0].tolist() == [300, 301, 302]
