"""Texts with labels in tables: what is kept, cut and left out, and that a model learns from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from tests.conftest import TrainerCli
from tests.data.saved_tables import save_splits, save_to_disk
from trainer.core.errors import UserError
from trainer.data.arrays import Arrays
from trainer.data.hf_dataset import hf_dataset
from trainer.data.labelled_text import LabelledText
from trainer.data.mixture import Mixture
from trainer.data.text_table import TextTable
from trainer.models.rnn import RecurrentTextClassifier

MOODS = {"mood": {"names": ["sad", "glad"], "_type": "ClassLabel"}}


def opened(root: Path, **options: Any) -> LabelledText:
    data = hf_dataset(str(root), cache=str(root.parent / "cache"), **options)
    assert isinstance(data, LabelledText)
    data.prepare_data()
    data.setup("fit")
    return data


def rows_of(data: LabelledText, split: str = "train") -> tuple[list[list[int]], list[int]]:
    found = getattr(data, split)
    assert isinstance(found, Arrays)
    inputs, targets = found.gather(torch.arange(len(found)), 0)
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    assert torch.equal(found[0][0], inputs[0])
    return inputs.tolist(), targets.tolist()


def words(path: Path) -> str:
    """A tokenizer with marks around a text, as BERT's."""
    ids = {"[PAD]": 7, "[CLS]": 1, "[SEP]": 2, "well": 3, "done": 4, "[UNK]": 0}
    made = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.save(str(path))
    return str(path)


def test_texts_keep_their_labels_when_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = ["abc", None, "de", "f", "too long for it", ""]
    splits = {
        "train": {"text": texts, "mood": [1, 0, None, 0, 1, 1]},
        "validation": {"text": ["v"], "mood": [0]},
        "test": {"text": ["t"], "mood": [1]},
    }
    save_splits(tmp_path / "saved", splits, MOODS)
    data = opened(tmp_path / "saved", label_column="mood", sequence_length=4)
    assert rows_of(data) == ([[*b"abc", 0], [*b"f", 0, 0, 0], [*b"too "]], [1, 0, 1])
    assert rows_of(data, "test") == ([[*b"t", 0, 0, 0]], [1])
    assert data.facts() == {"num_classes": 2, "vocab_size": 256, "sequence_length": 4, "pad_id": 0}
    said = data.meta["splits"]["train"]
    assert (said["of"], said["rows"], said["cut"], said["bad"]) == (6, 3, 1, 3)
    assert len(said["bad_names"]) == 3
    assert "1 of 3 texts truncated to 4 tokens" in caplog.text
    assert "train: 1 rows have no usable label: data-00000-of-00002.arrow:2" in caplog.text.replace(
        str(tmp_path / "saved" / "train") + "/", ""
    )
    with pytest.raises(UserError, match="1 rows have a label that is none of the classes"):
        opened(tmp_path / "saved", label_column="mood", sequence_length=4, max_bad=0)


def test_a_tokenizer_puts_its_marks_around_a_text_and_says_what_fills_up(tmp_path: Path) -> None:
    rows = {"text": ["well done", "done", "well well well done"] * 8, "kind": ["b", "a", "b"] * 8}
    save_to_disk(tmp_path / "saved", rows)
    tokenizer = words(tmp_path / "tokenizer.json")
    data = opened(
        tmp_path / "saved",
        text_column="text",
        label_column="kind",
        sequence_length=5,
        tokenizer=tokenizer,
        held_out=0.2,
    )
    assert data.facts() == {"num_classes": 2, "vocab_size": 8, "sequence_length": 5, "pad_id": 7}
    known = {(1, 3, 4, 2, 7): 1, (1, 4, 2, 7, 7): 0, (1, 3, 3, 3, 2): 1}
    for split in ("train", "val", "test"):
        for ids, label in zip(*rows_of(data, split), strict=True):
            assert known[tuple(ids)] == label
    assert data.meta["classes"] == ["a", "b"]
    assert data.tokenizer().decode([3, 4]) == "well done"


def test_sources_of_a_mixture_must_have_the_same_classes(tmp_path: Path) -> None:
    for name, kinds in (("one", ["neg", "pos"]), ("two", ["pos", "best"])):
        save_to_disk(tmp_path / name, {"text": ["a", "b"] * 20, "kind": kinds * 20})
    sources = {name: opened(tmp_path / name, label_column="kind") for name in ("one", "two")}
    mixed = Mixture(sources, {"one": 1, "two": 1}, seed=0)
    with pytest.raises(UserError, match=r"one has the classes .'neg', 'pos'. and two has .'best', 'pos'."):
        mixed.facts()
    tokenizer = words(tmp_path / "tokenizer.json")
    assert opened(tmp_path / "one", label_column="kind", tokenizer=tokenizer).facts()["pad_id"] == 7


def test_a_token_that_is_padding_too_counts_where_others_follow() -> None:
    model = RecurrentTextClassifier(10, 2, pad_id=0, dim=4, hidden=4).eval()
    rows = torch.tensor([[5, 6, 0, 7, 8, 0], [5, 6, 0, 7, 9, 0], [5, 6, 0, 7, 8, 3], [0, 0, 0, 0, 0, 0]])
    logits = model(rows)
    assert not torch.equal(logits[0], logits[1])
    longer = torch.cat([rows[:1], torch.zeros(1, 4, dtype=torch.int64)], 1)
    assert torch.allclose(model(longer)[0], logits[0], atol=1e-6)
    assert torch.isfinite(logits).all()
    whole = RecurrentTextClassifier(10, 2, pad_id=None, dim=4, hidden=4).eval()
    assert not torch.allclose(whole(longer)[0], whole(rows[:1])[0])


def test_without_a_label_column_it_is_text_to_go_on(tmp_path: Path) -> None:
    save_to_disk(tmp_path / "saved", {"text": ["some text"] * 40, "label": [0, 1] * 20})
    assert isinstance(hf_dataset(str(tmp_path / "saved")), TextTable)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"] * 9, "label": [0] * 9}, {"label_column": "lable"}, r"no such column\n  did you mean .*=label"),
        ({"text": ["a"] * 9, "half": [0.5] * 9}, {"label_column": "half"}, "expected classes, got float"),
        ({"text": [None] * 9, "kind": [0] * 9}, {"label_column": "kind"}, "train has no usable row"),
        ({"input_ids": [[1]] * 9, "kind": [0] * 9}, {"label_column": "kind"}, "cannot be classified"),
        ({"text": [1] * 9, "kind": [0] * 9}, {"label_column": "kind"}, "holds int64, not text"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    save_to_disk(tmp_path / "saved", columns)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "saved", held_out=0.2, **options)


def test_a_recurrent_network_learns_to_tell_texts(trainer_cli: TrainerCli, workdir: Path) -> None:
    """Whether the same letter comes first and last: nothing that one letter alone tells."""
    draw = numpy.random.default_rng(0)
    letters = draw.choice(list("ab"), (400, 2))
    rows = {
        "text": [first + "".join(draw.choice(list("xyz"), draw.integers(1, 5))) + last for first, last in letters],
        "same": [int(first == last) for first, last in letters],
    }
    save_to_disk(workdir / "saved", rows)
    done = trainer_cli(
        "fit",
        *("data=hf_dataset", "data.root=saved", "data.label_column=same", "data.sequence_length=8"),
        *("data.held_out=0.2", f"data.cache={workdir / 'cache'}", "model=rnn_text", "model.hidden=32", "model.dim=16"),
        *("model.dropout=0", "trainer.max_epochs=15", "optimizer.lr=0.01", "tracking=none", "resources.gpus=0"),
        "resources.cpu_processes=1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (workdir / "runs").iterdir()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["val/acc"] for line in lines if "val/acc" in line][-1] > 0.9
