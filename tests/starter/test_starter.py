"""`trainer fit data=FOLDER`: what is seen, what is chosen, what is written; and that it learns."""

from __future__ import annotations

import io
import json
import subprocess
import wave
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from trainer.checks.config import check
from trainer.config.compose import Composed, compose
from trainer.core.errors import UserError
from trainer.starter.choose import Machine, choose
from trainer.starter.folder import expand
from trainer.starter.scan import AudioFiles, IdxFiles, Images, Texts, Tokens, scan
from trainer.starter.write import as_yaml

Command = Callable[..., "subprocess.CompletedProcess[str]"]
CPU, GPUS = Machine(0, 2), Machine(8, 64)


def images(root: Path, classes: int, each: int, side: int, mode: str = "RGB") -> Path:
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(each):
            Image.new(mode, (side + 3, side)).save(root / f"class{label}" / f"{number}.png")
    return root


def recording(path: Path, rate: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(b"\1\0" * round(rate * seconds))


def texts(root: Path) -> Path:
    root.mkdir()
    for number in range(5):
        (root / f"{number}.txt").write_text("To be, or not to be, that is the question.\n" * 200)
    return root


def tokens(root: Path) -> Path:
    root.mkdir()
    meta = {"vocab_size": 1000, "tokens": {"train": 10_000_000, "val": 1000, "test": 1000}, "bytes": {"val": 4000}}
    (root / "meta.json").write_text(json.dumps(meta))
    (root / "train-00000.bin").touch()
    return root


def test_sees_what_a_folder_holds(tmp_path: Path) -> None:
    grey = images(tmp_path / "grey", classes=2, each=5, side=28, mode="L")
    assert scan(grey) == Images(grey, files=8, classes=2, side=28, grey=True)
    photos = images(tmp_path / "split" / "train", classes=3, each=4, side=90).parent
    images(photos / "test", classes=3, each=1, side=90)
    assert scan(photos) == Images(photos, files=12, classes=3, side=90, grey=False)
    voices = tmp_path / "voices"
    for number in range(10):
        recording(voices / "yes" / f"{number}.wav", 8000, 0.5)
        recording(voices / "no" / f"{number}.wav", 8000, 1.5)
    (voices / "readme.txt").write_text("two words")
    assert scan(voices) == AudioFiles(voices, files=16, classes=2, rate=8000, seconds=1.5)
    prose = texts(tmp_path / "prose")
    assert scan(prose) == Texts(prose, 5, 5 * 43 * 200, (".txt",))
    assert scan(prose / "1.txt") == Texts(prose / "1.txt", 1, 43 * 200, (".txt",))
    shards = tokens(tmp_path / "shards")
    assert scan(shards) == Tokens(shards, 10_000_000, 1000)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte.gz").touch()
    assert scan(tmp_path / "idx") == IdxFiles(tmp_path / "idx")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.bin", r"holds 1 \.bin: no images, WAV files, text or token shards"),
        ("dataset_info.json", r"Hugging Face dataset.*\n.*data=hf_dataset data\.root="),
        ("a.jsonl", r"trainer data tokenize .*, then trainer fit data=\./shards"),
        ("a.png", "1 images, but not in one folder per class"),
    ],
)
def test_what_cannot_be_trained_on_says_why(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        scan(tmp_path)


def composed(name: str, text: str, folder: Path) -> Composed:
    (folder / "experiment").mkdir(parents=True, exist_ok=True)
    (folder / "experiment" / f"{name}.yaml").write_text(text)
    return compose([f"experiment={name}"], config_dirs=[folder], cwd=folder)


@pytest.mark.parametrize("machine", [CPU, Machine(0, 1), Machine(1, 8), GPUS], ids=str)
def test_each_kind_gives_an_experiment_that_composes(tmp_path: Path, machine: Machine) -> None:
    root = tmp_path / "it's a folder"
    root.mkdir()
    for name in ("meta.json", "train-images-idx3-ubyte"):  # check looks
        (root / name).touch()
    kinds = [
        Images(root, 1438, 10, 8, True),
        Images(root, 1_200_000, 1000, 400, False),
        AudioFiles(root, 900, 5, 8000, 1.2),
        Texts(root, 3, 1_000_000, (".txt", ".md")),
        Tokens(root, 10_000_000_000, 50_257),
        IdxFiles(root),
    ]
    for number, found in enumerate(kinds):
        config = composed(f"kind{number}", as_yaml(choose(found, machine), "any"), tmp_path / "conf").config
        config["resources"] |= {"gpus": 0, "cpu_processes": machine.ranks}  # this machine has no GPUs to resolve
        check(config)
        assert config["data"]["root"] == str(root)
        assert config["data"]["batch_size"] % machine.ranks == 0
        assert config["strategy"]["name"] == ("single" if machine.ranks == 1 else "ddp")


def test_more_data_and_more_machine_make_a_larger_model(tmp_path: Path) -> None:
    few, many = (Tokens(tmp_path, count, 50_257) for count in (10_000_000, 10_000_000_000))
    assert choose(few, GPUS).values["model"]["dim"] < choose(many, GPUS).values["model"]["dim"]
    assert choose(many, CPU).values["model"]["dim"] == 256
    photos = Images(tmp_path, 1_200_000, 1000, 400, False)
    assert choose(photos, CPU).groups["model"] == "vgg_small"
    assert choose(Images(tmp_path, 1438, 10, 8, True), CPU).groups["model"] == "resnet_small"
    assert choose(AudioFiles(tmp_path, 90_000, 5, 8000, 1.2), CPU).groups["model"] == "resnet_small"
    assert choose(photos, CPU).values["data"]["size"] == 64
    assert choose(photos, GPUS).groups["model"] == "resnet50"
    assert choose(photos, GPUS).values["data"]["size"] == 224


def test_characters_are_not_mirrored(tmp_path: Path) -> None:
    grey, coloured = (choose(Images(tmp_path, 1000, 10, 28, grey), CPU).values["data"] for grey in (True, False))
    assert (grey["mirror"], coloured["mirror"]) == (False, True)


def test_writes_once_and_then_keeps_what_was_edited(workdir: Path) -> None:
    root, output = texts(workdir / "prose"), io.StringIO()
    assert expand(["seed=1", "data=./prose"], [], keep=True, stream=output) == ["experiment=prose", "seed=1"]
    assert "43,000 bytes in 5 files" in output.getvalue()
    path = workdir / "conf" / "experiment" / "prose.yaml"
    path.write_text(path.read_text().replace("lr: 0.002", "lr: 0.005"))
    assert expand(["data=./prose"], [], keep=True, stream=output) == ["experiment=prose"]
    config = compose(["experiment=prose"], config_dirs=[], cwd=workdir).config
    assert (config["optimizer"]["lr"], config["name"], config["data"]["root"]) == (0.005, "prose", str(root))
    other = texts(workdir / "other").rename(workdir / "conf" / "prose")
    assert expand([f"data={other}"], [], keep=True, stream=output) == ["experiment=prose-2"]


def test_without_a_file_the_job_is_the_same(workdir: Path) -> None:
    texts(workdir / "my prose")
    plain = expand(["data=./my prose"], [], keep=False, stream=io.StringIO())
    assert not (workdir / "conf").exists()
    written = expand(["data=./my prose"], [], keep=True, stream=io.StringIO())
    assert compose(plain, config_dirs=[], cwd=workdir).config == compose(written, config_dirs=[], cwd=workdir).config


def test_the_command_line_wins(workdir: Path) -> None:
    texts(workdir / "prose")
    given = ["data=./prose", "model=rnn_decoder", "optimizer.lr=0.1", "name=mine", "resources.cpu_processes=1"]
    config = compose(expand(given, [], keep=True, stream=io.StringIO()), config_dirs=[], cwd=workdir).config
    assert config["model"]["_target_"].endswith("RecurrentDecoder")
    assert (config["optimizer"]["lr"], config["name"], config["strategy"]["name"]) == (0.1, "mine", "single")


def test_options_of_the_group_are_left_alone(workdir: Path) -> None:
    (workdir / "text").mkdir()
    for overrides in (["data=text"], ["data=nothing"], ["model=mlp"], ["data.root=./text"]):
        assert expand(overrides, [], keep=True, stream=io.StringIO()) == overrides


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["data=./nowhere"], "no such file or folder"), (["data=./prose", "experiment=quickstart"], "leave experiment=")],
)
def test_mistakes_are_named(workdir: Path, overrides: list[str], message: str) -> None:
    texts(workdir / "prose")
    with pytest.raises(UserError, match=message):
        expand(overrides, [], keep=True, stream=io.StringIO())


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """The digits of scikit-learn as PNG files in a folder a class."""
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = tmp_path / "scans" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).round().astype(numpy.uint8)).save(folder / f"{number}.png")
    return tmp_path / "scans"


def accuracy(trainer_cli: Command) -> float:
    """Of the latest run, on the test split."""
    done = trainer_cli("evaluate", "--json", timeout=250)
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout)["metrics"]["test/acc"])


def last_validation(workdir: Path) -> float:
    """Accuracy of the only run in its last validation."""
    (metrics,) = (workdir / "runs").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return float([line["val/acc"] for line in lines if "val/acc" in line][-1])


@pytest.mark.parametrize(
    "is_whole", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(900)])], ids=["begun", "whole"]
)
def test_a_folder_of_scans_is_learnt(trainer_cli: Command, workdir: Path, scans: Path, is_whole: bool) -> None:
    """As a whole within 2 points of `experiment=quickstart`, which was written by hand."""
    cut_short = [] if is_whole else ["trainer.max_epochs=2"]
    options = ("tracking=none", "resources.gpus=0", "resources.cpu_processes=1")
    done = trainer_cli("fit", f"data={scans}", *options, *cut_short, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "grey images in 10 class folders, 1,438 to train on, 8 pixels a side" in done.stdout
    assert "wrote conf/experiment/scans.yaml" in done.stdout
    if is_whole:
        assert accuracy(trainer_cli) >= 0.965
    else:
        assert last_validation(workdir) >= 0.3  # by chance: 0.1


def test_the_standard_library_alone_gives_what_was_written_by_hand(workdir: Path) -> None:
    """The same data, model and number of steps as `experiment=text_transformer`; the rest may differ in details."""
    found = Texts(Path("/usr/lib/python3"), 1500, 12_000_000, (".py",))
    alone = composed("alone", as_yaml(choose(found, CPU), "alone"), workdir / "conf").config
    by_hand = compose(["experiment=text_transformer"], config_dirs=[], cwd=workdir).config
    assert alone["model"] == by_hand["model"]
    assert {**alone["data"], "root": None, "patterns": None} == by_hand["data"]
    for key in ("max_steps", "max_epochs", "gradient_clip_norm"):
        assert alone["trainer"][key] == by_hand["trainer"][key]
    assert alone["optimizer"] == by_hand["optimizer"]
