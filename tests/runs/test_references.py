"""Which run or sweep a reference on the command line names, and what is said when it names none or several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from trainer.core.errors import EnvironmentFault, UserError
from trainer.runs import registry
from trainer.runs.directory import RunDirectory
from trainer.runs.records import Launch
from trainer.sweeps import directory

RUNS, SWEEPS = "runs", "sweeps"
KINDS: dict[str, Any] = {RUNS: (registry.find, "config.yaml"), SWEEPS: (directory.find, "spec.json")}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Four of a kind in a folder of the working directory, the youngest last."""
    name = str(request.param)
    monkeypatch.chdir(tmp_path)
    for age, one in enumerate(["one-b2345678", "two-abcdefgh", "one-aaaa2345", "b2345678-c2345678"]):
        made = tmp_path / name / one / KINDS[name][1]
        made.parent.mkdir(parents=True)
        made.touch()
        os.utime(made, (1e9 + age, 1e9 + age))
    return name


def named(kind: str, reference: str | None) -> str:
    found = KINDS[kind][0](reference, Path(kind))
    return str(found.path.name)


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (None, "b2345678-c2345678"),
        ("abcdefgh", "two-abcdefgh"),
        ("two-abcdefgh", "two-abcdefgh"),
        ("one", "one-aaaa2345"),  # its latest
        ("b2345678", "one-b2345678"),  # an id comes before a name
        ("ab", "two-abcdefgh"),
        ("tw", "two-abcdefgh"),
        ("one-b", "one-b2345678"),
    ],
)
def test_an_id_comes_before_a_name_and_that_before_a_prefix(kind: str, reference: str | None, name: str) -> None:
    assert named(kind, reference) == name


def test_a_path_names_what_is_there(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / kind / "two-abcdefgh"
    assert named(kind, str(path)) == named(kind, f"./{kind}/two-abcdefgh") == "two-abcdefgh"
    monkeypatch.chdir(path)
    assert named(kind, ".") == "two-abcdefgh"


def test_a_folder_that_is_none_does_not_hide_what_has_its_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    assert named(kind, "two") == "two-abcdefgh"


LONG = "a" * 300
SAID = {
    RUNS: {
        "": "an empty text names no run\n  leave it out for the latest run; trainer ls lists the runs",
        "a": "a matches 2 runs\n  use a longer prefix: two-abcdefgh, one-aaaa2345",
        "tow": "there is no run tow in runs\n  did you mean two? trainer ls lists the runs",
        "zzzz9999": "there is no run zzzz9999 in runs\n  trainer ls lists the runs",
        LONG: f"there is no run {LONG} in runs\n  trainer ls lists the runs",
        f"./{LONG}": f"./{LONG} does not exist\n  trainer ls lists the runs",
        "./runs": "./runs is not a run directory\n  it has no config.yaml; trainer ls lists the runs",
    },
    SWEEPS: {
        "": "an empty text names no sweep\n  leave it out for the latest sweep; trainer sweep ls lists the sweeps",
        "a": "a matches 2 sweeps\n  use a longer prefix: two-abcdefgh, one-aaaa2345",
        "tow": "there is no sweep tow in sweeps\n  did you mean two? trainer sweep ls lists the sweeps",
        "zzzz9999": "there is no sweep zzzz9999 in sweeps\n  trainer sweep ls lists the sweeps",
        LONG: f"there is no sweep {LONG} in sweeps\n  trainer sweep ls lists the sweeps",
        f"./{LONG}": f"./{LONG} is not a sweep\n  it has no spec.json; trainer sweep ls lists the sweeps",
        "./sweeps": "./sweeps is not a sweep\n  it has no spec.json; trainer sweep ls lists the sweeps",
    },
}


def test_what_names_none_or_several_says_so(kind: str) -> None:
    said = {}
    for reference in SAID[kind]:
        with pytest.raises(UserError) as raised:
            named(kind, reference)
        said[reference] = str(raised.value)
    assert said == SAID[kind]


def test_a_slurm_job_names_its_run_unless_it_is_the_beginning_of_a_name(tmp_path: Path) -> None:
    for name, job in {"one-4711aaaa": "17", "two-abcdefgh": "4711", "three-bcdefghi": None}.items():
        run = RunDirectory(tmp_path / name)
        run.path.mkdir()
        run.config_path.touch()
        run.write_launch(Launch(slurm_job_id=job))
    assert registry.find("17", tmp_path).path.name == "one-4711aaaa"
    assert registry.find("4711", tmp_path).path.name == "two-abcdefgh"
    (tmp_path / "two-abcdefgh" / "launch.json").write_text("{")  # it may be the job of another run
    assert registry.find("4711", tmp_path).path.name == "one-4711aaaa"


@pytest.mark.parametrize("kind", KINDS, indirect=False)
def test_a_folder_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(EnvironmentFault, match=f"^{loop} cannot be read: Too many levels of symbolic links\n"):
        KINDS[kind][0](None, loop)
    with pytest.raises(UserError, match=f"^there are no {kind} in {tmp_path}/nowhere\n"):
        KINDS[kind][0](None, tmp_path / "nowhere")
