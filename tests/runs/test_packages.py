"""The packages and data of a manifest: equal to what pip lists, without credentials, for little time."""

from __future__ import annotations

import json
import os
import time
from importlib import metadata
from pathlib import Path

from tests.runs.test_directory import make
from trainer.runs import manifest
from trainer.runs.data_files import data_files
from trainer.runs.packages import installed, normalized, requirements

COMMIT = "0123456789012345678901234567890123456789"


def test_the_installed_packages_are_those_of_importlib_for_less_than_a_tenth_of_a_second() -> None:
    expected: dict[str, str] = {}
    for package in metadata.distributions():
        expected.setdefault(normalized(package.metadata["Name"]), package.version)
    took = []
    for _ in range(3):
        manifest._installed.cache_clear()
        began = time.process_time()
        recorded = manifest.environment()
        took.append(time.process_time() - began)
    assert recorded["installed"]["versions"] == expected
    assert expected["torch"]
    assert min(took) < 0.1


def test_names_versions_and_origins(tmp_path: Path) -> None:
    for name in ("Own_Pkg-1.2+cpu.dist-info", "old-0.3-py3.11.egg-info", "from_git-2.0.dist-info", "here-1.dist-info"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkout.egg-info").mkdir()
    (tmp_path / "checkout.egg-info/PKG-INFO").write_text("Metadata-Version: 2.1\nName: checkout\nVersion: 7\n")
    vcs = {"url": "https://me:secret@host/x.git", "vcs_info": {"vcs": "git", "commit_id": COMMIT}}
    (tmp_path / "from_git-2.0.dist-info/direct_url.json").write_text(json.dumps(vcs))
    (tmp_path / "here-1.dist-info/direct_url.json").write_text(json.dumps({"url": "file:///src/here", "dir_info": {}}))
    later = tmp_path / "later"
    (later / "old-9.dist-info").mkdir(parents=True)
    found = installed([str(tmp_path / "absent.zip"), str(tmp_path), str(later)])
    assert found["versions"] == {"checkout": "7", "from-git": "2.0", "here": "1", "old": "0.3", "own-pkg": "1.2+cpu"}
    assert found["origins"] == {"from-git": f"git+https://host/x.git@{COMMIT}", "here": "file:///src/here"}
    assert requirements({"installed": found}) == [
        "checkout==7",
        f"from-git @ git+https://host/x.git@{COMMIT}",
        "# here==1 was installed from file:///src/here",
        "old==0.3",
        "own-pkg==1.2+cpu",
    ]
    assert requirements({"packages": {"torch": "2"}}) == []


def test_a_launch_writes_them_with_the_machine(tmp_path: Path) -> None:
    written = make(tmp_path).manifest()
    assert written["installed"]["versions"]["torch"] == metadata.version("torch")
    assert written["machine"]["cores"] >= 1
    assert written["machine"]["cpu"]
    assert written["data"] == {}


def test_the_files_of_the_section_data(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.bin").write_bytes(b"12345")
    os.utime(tmp_path / "set/a.bin", (100, 100.25))
    os.utime(tmp_path / "set", (200, 200))
    section = {
        "_target_": "a/b",
        "path": "set",
        "name": "set",  # not named as a path
        "files": ["set/a.bin", "set/gone.bin", "https://host/a"],
        "more": {"train_file": "set/a.bin"},
        "null": "a\0/b",
    }
    one = {"path": str(tmp_path / "set/a.bin"), "bytes": 5, "modified": 100.25}
    assert data_files(section, tmp_path) == {
        "data.path": {"path": str(tmp_path / "set"), "entries": 1, "modified": 200.0},
        "data.files[0]": one,
        "data.more.train_file": one,
    }
    assert data_files(None, tmp_path) == {}
