"""Property-based tests of everything that is read: overrides, YAML, records, SLURM's output, and files of data.

The property: the right value, a TrainerError, or the skip that is documented; within a second; nothing is executed,
and nothing is written outside of the folder of the test. The corpus holds valid files, from which the cases are
mutated, and files that once broke it. In the suite the cases are always the same; see CONTRIBUTING.md for a long run.
"""

from __future__ import annotations

import functools
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, configuration, example, given, settings
from hypothesis import strategies as st

from tests.security.bounds import ends_within
from trainer.checkpoint.commit import _digest, is_committed
from trainer.config.compose import compose
from trainer.core import records
from trainer.core.errors import TrainerError
from trainer.data.audio_folder import read_clip
from trainer.data.hf_dataset import hf_dataset
from trainer.data.idx import read_idx
from trainer.data.image_folder import read_image
from trainer.data.tables import find_tables, record_batches
from trainer.data.token_shards import TokenShards
from trainer.data.tokenize import Shard, _json_lines
from trainer.data.tokenizers import BytePairs
from trainer.runs import events, metrics_lines
from trainer.runs.directory import RunDirectory
from trainer.runs.records import CommandFailure, NodeCheck
from trainer.slurm import facts, lost_nodes, pending, query
from trainer.slurm.options import seconds
from trainer.starter.scan import scan

CORPUS = Path(__file__).with_name("corpus")
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
_DEFAULT = settings()
CPU_S = 1.0
_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "pickle.find_class",
)
_COPIED = (
    "hydra.conf",
    "hydra.types",
    "omegaconf.base",
    "omegaconf.dictconfig",
    "omegaconf.listconfig",
    "omegaconf.nodes",
)
_PLAIN = {
    "builtins": ("bool", "bytes", "dict", "float", "int", "list", "str"),
    "collections": ("defaultdict",),
    "typing": ("Any", "Dict", "List"),
}
"""Modules and names in the pickles by which `config/primary.py` copies a parsed config in memory."""
_watch: dict[str, Any] = {"root": None, "seen": [], "cases": 0}


def _audit(name: str, arguments: tuple[Any, ...]) -> None:
    root = _watch["root"]
    if root is None:
        return
    if name == "pickle.find_class" and (arguments[0] in _COPIED or arguments[1] in _PLAIN.get(arguments[0], ())):
        return
    if name in _FORBIDDEN:
        _watch["seen"].append((name, arguments[:1]))
    elif name == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int):
        writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        if writes and not os.path.abspath(arguments[0]).startswith(root):
            _watch["seen"].append((name, arguments[0]))


sys.addaudithook(_audit)


@pytest.fixture(autouse=True)
def _counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    _watch["cases"] = 0
    yield
    record_property("attacks", _watch["cases"])


@pytest.fixture(scope="module", autouse=True)
def _quiet_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not NIGHTLY:
        configuration.set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


def cases(number: int) -> settings:
    """`number` cases that are always the same; a hundred times as many others in a nightly run."""
    return settings(
        max_examples=number * (100 if NIGHTLY else 1),
        derandomize=not NIGHTLY,
        database=_DEFAULT.database if NIGHTLY else None,
        deadline=None,
        phases=[*_DEFAULT.phases] if NIGHTLY else [Phase.explicit, Phase.generate],  # shrinking takes minutes
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def held(root: Path, *documented: type[Exception]) -> Iterator[None]:
    """Check the property of what the block does; `documented` are the exceptions of a skip."""
    _watch.update(root=str(root), seen=[], cases=_watch["cases"] + 1)
    begin = time.process_time()
    try:
        with ends_within(10.0):
            yield
    except (TrainerError, *documented):
        pass
    finally:
        taken = time.process_time() - begin
        _watch["root"] = None
    assert not _watch["seen"]
    assert taken < CPU_S, f"took {taken:.2f} s of CPU time"


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 1e308, math.nan, math.inf]))
TEXTS = st.one_of(
    st.text(max_size=8), st.sampled_from(["", "\n", "\x1b[2J", "../../x", "/etc/passwd", "${oc.env:HOME}"])
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


@functools.cache
def seeds_of(kind: str) -> list[bytes]:
    """The files of the corpus that are small enough to be worth mutating."""
    return [path.read_bytes() for path in sorted((CORPUS / kind).iterdir()) if path.stat().st_size < 4096]


@st.composite
def mutated(draw: st.DrawFn, kind: str) -> bytes:
    """A file of the corpus with some bytes changed, left out, repeated or cut off, or any bytes."""
    content = bytearray(draw(st.sampled_from(seeds_of(kind))))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        length = draw(st.integers(1, 8))
        how = draw(st.sampled_from(["set", "set", "set", "drop", "insert", "cut", "repeat"]))
        if how == "set":
            content[at : at + length] = draw(
                st.one_of(st.binary(max_size=8), st.sampled_from([b"\xff" * 4, b"\0" * 4]))
            )
        elif how == "drop":
            del content[at : at + length]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif how == "cut":
            del content[at:]
        else:
            content[at:at] = content[at : at + length] * 3
    return bytes(content)


@st.composite
def altered(draw: st.DrawFn, kind: str) -> bytes:
    """A JSON object of the corpus with values replaced, keys left out or added at any depth."""
    content = json.loads(draw(st.sampled_from([seed for seed in seeds_of(kind) if is_json(seed)])))
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while isinstance(place, dict) and place:
            key = draw(st.sampled_from(sorted(place)))
            if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            how = draw(st.sampled_from(["replace", "replace", "drop", "add"]))
            if how == "drop":
                del place[key]
            else:
                place[key if how == "replace" else draw(TEXTS)] = draw(JSON)
            break
    return json.dumps(content).encode()


def is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def files(kind: str) -> st.SearchStrategy[bytes]:
    has_objects = any(map(is_json, seeds_of(kind)))
    return st.one_of(mutated(kind), altered(kind)) if has_objects else mutated(kind)


def _commit(root: Path, content: bytes) -> None:
    if is_json(content):  # signed again: else nothing but the signature would be tested
        signed = json.loads(content)
        signed["digest"] = _digest({key: value for key, value in signed.items() if key != "digest"})
        content = json.dumps(signed).encode()
    (root / "COMMIT").write_bytes(content)
    is_committed(root)


def _record(name: str, read: Callable[[RunDirectory], object]) -> Callable[[Path, bytes], None]:
    def check(root: Path, content: bytes) -> None:
        run = RunDirectory(root)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        read(run)

    return check


def _of_class(kind: type[Any]) -> Callable[[Path, bytes], None]:
    def check(root: Path, content: bytes) -> None:
        (root / "record.json").write_bytes(content)
        records.read_or_skip(kind, root / "record.json")

    return check


def _metrics(root: Path, content: bytes) -> None:
    (root / "metrics.jsonl").write_bytes(content)
    rewound = metrics_lines.rewind(root / "metrics.jsonl", 3)
    assert all(line["step"] <= 3 for line in rewound.recent)


def _events(root: Path, content: bytes) -> None:
    for one in events.parse(content.decode(errors="replace"), root / "events.jsonl"):
        assert isinstance(one, events.Event)


RECORDS: dict[str, Callable[[Path, bytes], None]] = {
    "attempt": _record("attempts/attempt-00.json", lambda run: run.outcome(0)),
    "failure": _record("logs/attempt-00/rank-0.failure.json", lambda run: run.failures(0)),
    "launch": _record("launch.json", lambda run: run.launch()),
    "heartbeat": _record("live/rank-0.json", lambda run: run.heartbeat(0)),
    "manifest": _record("manifest.json", lambda run: run.manifest()),
    "preflight": _of_class(NodeCheck),
    "command": _of_class(CommandFailure),
    "commit": _commit,
    "events": _events,
    "metrics": _metrics,
}


def _image(root: Path, content: bytes) -> None:
    image = read_image(io.BytesIO(content), 16, random=False)  # type: ignore[arg-type]
    assert image.shape == (3, 16, 16)
    assert image.isfinite().all()


def _audio(root: Path, content: bytes) -> None:
    (root / "a.wav").write_bytes(content)
    clip = read_clip(root / "a.wav", 8000, 400, random=False)
    assert clip.shape == (400,)
    assert clip.abs().max() <= 1


def _idx(name: str) -> Callable[[Path, bytes], None]:
    def check(root: Path, content: bytes) -> None:
        (root / name).write_bytes(content)
        assert read_idx(root / name).size <= 10 * len(content) * 1032

    return check


def _shards(root: Path, content: bytes) -> None:
    (root / "meta.json").write_bytes(content)
    for split in ("train", "val", "test"):
        (root / f"{split}-00000.bin").write_bytes(bytes(range(200)) + content[: len(content) % 7])
    data = TokenShards(str(root), sequence_length=4)
    data.setup()
    assert data.facts()["vocab_size"] >= 0
    assert data.train is not None
    inputs, targets = data.train[0]
    assert inputs.shape == targets.shape == (4,)


def _tokenizer(root: Path, content: bytes) -> None:
    (root / "tokenizer.json").write_bytes(content)
    tokenizer = BytePairs(root / "tokenizer.json")
    assert 0 <= tokenizer.end_of_text < tokenizer.vocab_size


def _dataset(name: str) -> Callable[[Path, bytes], None]:
    def check(root: Path, content: bytes) -> None:
        (root / name).write_bytes(content)
        tables = find_tables(root)
        assert all(path.resolve().is_relative_to(root.resolve()) for paths in tables.files.values() for path in paths)
        tables.class_names("label")

    return check


def _table(name: str) -> Callable[[Path, bytes], None]:
    def check(root: Path, content: bytes) -> None:
        (root / name).write_bytes(content)
        hf_dataset(str(root), text_column="text")
        for batch in record_batches(root / name):
            batch.to_pydict()

    return check


def _lines(root: Path, content: bytes) -> None:
    (root / "a.jsonl").write_bytes(content)
    shard = Shard()
    documents = list(_json_lines(root / "a.jsonl", "text", shard))
    assert len(documents) + shard.bad <= content.count(b"\n") + 1


def _folder(root: Path, content: bytes) -> None:
    for name in ("a/0.png", "b/0.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    scan(root)


DATA: dict[str, tuple[Callable[[Path, bytes], None], int]] = {
    "image": (_image, 400),
    "audio": (_audio, 150),
    "idx": (_idx("a"), 100),
    "idx.gz": (_idx("a.gz"), 100),
    "shards": (_shards, 150),
    "tokenizer": (_tokenizer, 150),
    "dataset_info": (_dataset("dataset_info.json"), 60),
    "dataset_dict": (_dataset("dataset_dict.json"), 60),
    "state": (_dataset("state.json"), 60),
    "jsonl": (_lines, 100),
    "folder": (_folder, 60),
    "parquet": (_table("train.parquet"), 60),
    "arrow": (_table("train.arrow"), 60),
}
SHARED = {"folder": "image"}
"""Readers whose files are those of another."""


def fuzzed(kind: str, read: Callable[[Path, bytes], None], number: int, root: Path) -> None:
    """Check the property for `number` cases of a kind, each in an empty folder."""
    counter = iter(range(10**9))

    @cases(number)
    @given(content=files(SHARED.get(kind, kind)))
    def check(content: bytes) -> None:
        folder = root / str(next(counter))
        folder.mkdir()
        with held(folder, OSError, ValueError):
            read(folder, content)

    check()


@pytest.mark.parametrize("kind", RECORDS)
def test_records(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """blocked by: records are validated when they are read"""
    counter = iter(range(10**9))

    @cases(150)
    @given(content=files(kind))
    def check(content: bytes) -> None:
        folder = tmp_path / str(next(counter))
        folder.mkdir()
        with held(folder):
            RECORDS[kind](folder, content)

    check()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", DATA)
def test_data(tmp_path: Path, kind: str) -> None:
    """blocked by: limits and checks before anything is unpacked"""
    read, number = DATA[kind]
    fuzzed(kind, read, number, tmp_path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_corpus(tmp_path: Path, path: Path) -> None:
    """blocked by: the mend that each of these files has led to"""
    kind = path.parent.name
    if kind in RECORDS:
        with held(tmp_path):
            RECORDS[kind](tmp_path, path.read_bytes())
    elif kind in DATA:
        with held(tmp_path, OSError, ValueError):
            DATA[kind][0](tmp_path, path.read_bytes())
    else:
        assert kind in SLURM or kind == "yaml"


SLURM: dict[str, Callable[[], object]] = {
    "squeue": lambda: query.states(["1"]),
    "scontrol-job": lambda: pending.explain("1"),
    "scontrol-node": lambda: lost_nodes.find(["n1"]),
    "sinfo": facts._partitions,
    "sacctmgr": lambda: facts.accounts_of("me"),
    "hostnames": lambda: (query.hostnames("n[1-2]"), facts.usable_nodes("p")),
}


@pytest.mark.parametrize("kind", SLURM)
def test_slurm_output(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """blocked by: lines that are not understood are left out"""
    printed = [""]
    for module in (query, facts, pending):
        monkeypatch.setattr(module, "run", lambda *command, **options: printed[0])
    monkeypatch.setattr(lost_nodes, "call", lambda *command, **options: printed[0])

    @cases(200)
    @given(content=mutated(kind))
    def check(content: bytes) -> None:
        printed[0] = content.decode(errors="replace")
        with held(tmp_path):
            SLURM[kind]()

    check()


def test_slurm_times(tmp_path: Path) -> None:
    """blocked by: numbers have a length"""

    @cases(200)
    @given(text=st.one_of(st.text(alphabet="0123456789:-\n\u0663", max_size=12), st.text(), st.just("9" * 5000)))
    def check(text: str) -> None:
        with held(tmp_path):
            assert (seconds(text) or 0) >= 0

    check()


KEYS = [
    "seed",
    "name",
    "trainer.max_epochs",
    "optimizer.lr",
    "data.root",
    "resources.gpus",
    "callbacks.x",
    "model",
    "x.y",
]
VALUES = st.one_of(
    TEXTS,
    NUMBERS.map(str),
    JSON.map(json.dumps),
    st.sampled_from(
        ["[", "{", "${", "${x}", "${oc.env:PATH}", "'", "null", "range(1)", "!!python/x", "a,b", "\\", "~"]
    ),
)


def test_overrides(workdir: Path) -> None:
    """blocked by: overrides are parsed, and checked by the schema"""
    compose([], config_dirs=[], cwd=workdir)  # imports Hydra

    @cases(12)
    @example(key="", sign="~", value="6227020801")
    @given(key=st.one_of(st.sampled_from(KEYS), TEXTS), sign=st.sampled_from(["", "+", "++", "~"]), value=VALUES)
    def check(key: str, sign: str, value: str) -> None:
        with held(workdir):
            compose([f"{sign}{key}={value}"], config_dirs=[], cwd=workdir)

    check()


def test_yaml(workdir: Path) -> None:
    """blocked by: YAML without tags, and checked by the schema"""
    compose([], config_dirs=[], cwd=workdir)
    (workdir / "conf" / "experiment").mkdir(parents=True)
    path = workdir / "conf" / "experiment" / "fuzz.yaml"

    @cases(12)
    @example(content=(CORPUS / "yaml" / "header.yaml").read_bytes())
    @given(content=mutated("yaml"))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        with held(workdir):
            compose(["experiment=fuzz"], config_dirs=[workdir / "conf"], cwd=workdir)

    check()
