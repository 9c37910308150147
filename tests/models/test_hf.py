"""model=hf gives the logits of `transformers` itself, and LoRA trains only what it adds.

In a process of its own, which imports transformers and peft once: together they take some seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

APART = Path(sys.prefix) / "transformers"
"""Where ./launch/test puts transformers and peft."""
SCRIPT = Path(__file__).parent / "hf_process.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not (APART / "peft").is_dir():
        pytest.skip(f"./launch/test puts transformers and peft into {APART}")
    folder = tmp_path_factory.mktemp("hf")
    path = os.pathsep.join([str(APART), str(SCRIPT.parents[2])])
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    answer: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return answer


def test_a_folder_gives_the_logits_of_its_class(found: dict[str, Any]) -> None:
    assert found["folder"] == {"class": "GPT2LMHeadModel", "difference": 0.0, "blocks": ["GPT2Block"] * 2}


def test_without_pretrained_the_folder_gives_only_the_shape(found: dict[str, Any]) -> None:
    assert found["not pretrained"]["same shapes"]
    assert not found["not pretrained"]["same weights"]


def test_a_config_is_sized_by_the_data(found: dict[str, Any]) -> None:
    assert found["config"] == [3, 16, 61]
    assert found["images"] == [2, 10]


def test_a_classifier_has_the_classes_of_the_data_and_does_not_see_padding(found: dict[str, Any]) -> None:
    assert found["classifier"]["shape"] == [3, 5]
    assert found["classifier"]["change by padding"] < 1e-5


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("class", "no model class with this name"),
        ("folder", "holds no config.json"),
        ("architecture", "no such architecture"),
        ("vocabulary", "99 token ids, but the model only 61"),
        ("length", "sequences of 99 tokens, but the model 16 positions"),
    ],
)
def test_mistakes(found: dict[str, Any], mistake: str, message: str) -> None:
    assert message in found["mistakes"][mistake]


def test_deferred_parameters_are_those_of_the_whole_model(found: dict[str, Any]) -> None:
    """Strategies that shard a model build it on the meta device."""
    assert found["deferred"] == {"on meta": True, "equal": True}


FAMILIES = ("gpt2", "llama", "gemma2", "cohere", "granite", "recurrent_gemma", "mixtral")


@pytest.mark.parametrize("family", [*FAMILIES, "lora on the head"])
def test_the_loss_is_that_of_the_library_without_all_logits(found: dict[str, Any], family: str) -> None:
    """Tied, capped and scaled outputs; LoRA adapters on the output layer need all logits."""
    loss = found["losses"][family]
    assert loss["computes"]
    assert loss["rows"] <= 32 if family in FAMILIES else loss["rows"] == 45  # 9 positions a chunk; the width is 32
    assert max(loss["loss"], loss["gradients"], loss["evaluation"]) < 1e-5
    assert loss["logits"] == 0


def test_a_network_that_changes_its_logits_in_another_way_is_trained_on_all_of_them(found: dict[str, Any]) -> None:
    unknown = found["unknown"]
    assert {name for name, one in unknown.items() if one["computes"]} == {"doubled"}
    assert all(one["loss"] < 1e-6 for one in unknown.values()), unknown


def test_lora_starts_as_the_base_and_trains_only_what_it_adds(found: dict[str, Any]) -> None:
    for name in ("ours", "theirs"):
        lora = found[f"lora {name}"]
        assert lora["difference at the start"] == 0.0
        assert lora["changed"], name
        assert all(".lora_" in part or part.startswith("model.norm") for part in lora["changed"]), lora["changed"]
    assert any(part.startswith("model.norm") for part in found["lora ours"]["changed"])
    # In the blocks alone: query, key, value, out and the three of SwiGLU, two matrices each.
    assert found["lora ours"]["added"] == 2 * 7 * 2


def test_lora_goes_on_from_weights_without_and_with_it(found: dict[str, Any]) -> None:
    assert found["lora from base"] == 0.0
    assert found["lora from lora"] == 0.0


def test_exported_weights_hold_the_additions(found: dict[str, Any]) -> None:
    """GPT-2's linear layers hold the transpose, and one of them is square: its shape does not tell."""
    merged = found["merged"]
    assert merged["ours"] < 1e-6
    assert merged["theirs"] < 1e-5
    assert merged["wrong"] == {}
    assert (merged["layers"], len(merged["square"])) == (8, 2)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(merged["files"])


def test_lora_says_what_layers_there_are(found: dict[str, Any]) -> None:
    assert "finetune.lora_layers: no linear layer of the model matches querry" in found["mistakes"]["lora"]
