"""The modules that a run imports: those that the prompt would have, as they were at launch."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from trainer.config.shape import LaunchShape
from trainer.config.sources import Definition, find
from trainer.runs import code_snapshot as snapshots
from trainer.runs.directory import RunDirectory
from trainer.supervise.rank_environment import Interpreter, environment
from trainer.supervise.rendezvous import Place

CLASS = "class Net:\n    state = {state!r}\n"


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=n", "-c", "user.email=e@x.invalid"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def write(root: Path, **files: str) -> None:
    """`a__b=text` is the file a/b.py; a name with a dot is a path as it is."""
    for name, text in files.items():
        path = root / (name if "." in name else name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def launch(project: Path) -> RunDirectory:
    config = {"name": "job", "runs_dir": str(project / "runs")}
    return RunDirectory.create(config, overrides=[], choices={}, code_root=project)


def in_worker(run: RunDirectory, project: Path, code: str, path: str = "") -> str:
    """What `code` prints where the ranks of `run` run; `path`: the PYTHONPATH of the shell."""
    inherited = {"PATH": "/usr/bin:/bin", "PYTHONPATH": path} if path else {"PATH": "/usr/bin:/bin"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        variables = environment(
            inherited, Interpreter(code_dir=run.code_dir), LaunchShape(1, 1, "cpu"), Place(), attempt=0
        )
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code]
    done = subprocess.run(command, env=variables, cwd=project, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def assert_frozen(project: Path, live: Path, module: str, path: str = "") -> RunDirectory:
    """`module`, written in the file `live`, is seen by the prompt, and by the run as it was at launch."""
    live.write_text(CLASS.format(state="launched"))
    assert isinstance(find(f"{module}.Net", project), Definition)
    run = launch(project)
    show = f"import {module} as m; print(m.Net.state, m.__file__)"
    before = in_worker(run, project, show, path)
    live.write_text(CLASS.format(state="edited since"))
    after = in_worker(run, project, show, path)
    assert before.split()[0] == after.split()[0] == "launched"
    assert str(run.path) in after
    return run


@pytest.mark.parametrize("name", ["data", "runs", "wandb", "venv", "env", "build", "outputs"])
@pytest.mark.parametrize("in_git", [True, False])
def test_a_folder_with_code_is_code_whatever_its_name(workdir: Path, name: str, in_git: bool) -> None:
    write(workdir, **{f"mine/{name}/__init__.py": "", "mine/__init__.py": "", f"{name}x/__init__.py": ""})
    write(
        workdir, **{".project-root": "", ".gitignore": f"{name}/\n"}
    )  # as many projects do, for the folder of that name at the top
    if in_git:
        git(workdir, "init")
    assert_frozen(workdir, workdir / f"mine/{name}/nets.py", f"mine.{name}.nets")


def test_outputs_and_environments_are_not_code(workdir: Path) -> None:
    old = launch(workdir)
    write(workdir, **{f"{old.path.name}/later.py": "", "env/pyvenv.cfg": "", "env/lib/thing.py": ""})
    write(workdir, **{"wandb/run-20240101_010101-abc/files/code/net.py": "", "node_modules/a.py": "", "net.py": ""})
    old.path.rename(workdir / "older")  # a run, outside of runs_dir
    run = launch(workdir)
    taken = {path.relative_to(run.code_dir).as_posix() for path in run.code_dir.rglob("*") if path.is_file()}
    assert taken == {"net.py", f"{old.path.name}/later.py"}


def test_what_git_ignores_is_taken_where_it_is_imported_or_in_a_package(workdir: Path) -> None:
    git(workdir, "init")
    ignored = "_version.py\n*_pb2.py\n*.so\n*.vocab\n*.html\nsecret.txt\n*.log\n.env\n"
    extension = f"mine/fast{EXTENSION_SUFFIXES[0]}"
    write(workdir, **{".gitignore": ignored, "mine/__init__.py": "", "mine/_version.py": "v = 1", "secret.txt": ""})
    write(workdir, **{extension: "", "mine/words.vocab": "", "mine/pages/a.html": "", "gen/x_pb2.py": "", ".env": ""})
    write(workdir, **{"train.log": "", "mine/.env": "key", "mine/table.parquet": ""})
    code = launch(workdir).code_dir
    taken = {path.relative_to(code).as_posix() for path in code.rglob("*") if path.is_file()}
    wanted = {"mine/_version.py", extension, "mine/words.vocab", "mine/pages/a.html", "gen/x_pb2.py"}
    assert wanted <= taken
    assert taken - wanted == {"mine/__init__.py", "mine/table.parquet"}


def test_resources_of_packages_are_taken_outside_git_and_data_is_linked(workdir: Path) -> None:
    write(workdir, **{"mine/__init__.py": "", "mine/tokens.spm": "", "mine/t/page.mustache": "", "photo.jpg": ""})
    write(workdir, **{f"mine/digits/{i}.png": "" for i in range(400)}, **{"lists/train.csv": ""})
    run = launch(workdir)
    assert (run.code_dir / "mine/tokens.spm").is_file()
    assert (run.code_dir / "mine/t/page.mustache").is_file()
    assert (run.code_dir / "lists/train.csv").is_file()
    assert not (run.code_dir / "photo.jpg").exists()
    assert run.manifest()["code"]["left_out"] == ["mine/digits/"]
    assert (run.code_dir / "mine/digits/399.png").samefile(workdir / "mine/digits/399.png")


def test_a_copy_has_the_mode_and_the_times_of_its_file(workdir: Path) -> None:
    write(workdir, train=CLASS)
    script = workdir / "train.py"
    script.chmod(0o750)
    os.utime(script, ns=(10**18, 10**18 + 7))
    copy = launch(workdir).code_dir / "train.py"
    assert (copy.read_text(), copy.stat().st_mode & 0o777) == (CLASS, 0o750)
    assert copy.stat().st_mtime_ns == 10**18 + 7  # which bytecode is compared with


def test_large_files_are_linked_and_named(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "MOST_FILES", 3)
    write(workdir, **{"mine/__init__.py": "", "mine/a.py": "", "mine/b.py": "x = 3", "mine/readme.md": "", "z.md": ""})
    (workdir / "mine/weights.bin").write_bytes(b"0" * (6 * 1024**2))
    run = launch(workdir)
    assert run.manifest()["code"]["left_out"] == ["mine/readme.md", "mine/weights.bin", "z.md"]
    assert (run.code_dir / "mine/weights.bin").stat().st_size == 6 * 1024**2
    assert in_worker(run, workdir, "from mine.b import x; print(x)") == "3"


def test_linked_packages_and_namespaces_are_frozen(workdir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write(elsewhere, **{"shared/__init__.py": "", "shared/more/__init__.py": ""})
    git(workdir, "init")
    (workdir / "shared").symlink_to(elsewhere / "shared")
    (elsewhere / "shared" / "loop").symlink_to(elsewhere / "shared")
    git(workdir, "add", ".")
    assert_frozen(workdir, elsewhere / "shared/more/nets.py", "shared.more.nets")
    (workdir / "space/inner").mkdir(parents=True)
    assert_frozen(workdir, workdir / "space/inner/nets.py", "space.inner.nets")


def test_src_is_frozen_installed_or_not(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mine", types.ModuleType("mine"))  # that of another project, imported already
    project = workdir / "project"
    write(project, **{"src/mine/__init__.py": "", "conf/model/m.yaml": ""})
    live = project / "src/mine/nets.py"
    assert_frozen(project, live, "mine.nets")
    monkeypatch.setenv("PYTHONPATH", str(project / "src"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(project / "src")])  # as a .pth file does
    find.__globals__["_top"].cache_clear()
    run = assert_frozen(project, live, "mine.nets", path=str(project / "src"))
    assert run.manifest()["code"]["paths"] == ["code", "code/src"]


def test_a_module_in_src_does_not_hide_an_installed_one(workdir: Path) -> None:
    write(workdir, **{"src/yaml/__init__.py": "state = 'mine'", "src/own.py": "state = 'own'"})
    run = launch(workdir)
    shown = in_worker(run, workdir, "import yaml, own; print(own.state, hasattr(yaml, 'safe_load'), own.__file__)")
    assert shown.split()[:2] == ["own", "True"]
    assert str(run.path) in shown


def test_an_editable_install_by_a_finder(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = workdir / "library"
    write(library, **{"lib/__init__.py": "", "tests/__init__.py": "", "plain/inner.py": ""})
    project = workdir / "project"
    project.mkdir()
    finder = types.ModuleType("__editable___mine_0_1_finder")
    finder.MAPPING = {"renamed": str(library / "lib"), "plain": str(library / "plain")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, finder.__name__, finder)
    write(library, lib__nets=CLASS.format(state="launched"))
    run = launch(project)
    write(library, lib__nets=CLASS.format(state="edited since"))
    shown = in_worker(run, project, "import renamed.nets as m, plain.inner; print(m.Net.state)")
    assert shown == "launched"


@pytest.mark.parametrize("how", ["PYTHONPATH", "from __file__"])
def test_a_project_in_a_folder_of_a_repository(workdir: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    git(workdir, "init")
    write(workdir, **{"common/__init__.py": "", "projects/one/net.py": "", "other/big/__init__.py": "", ".root": ""})
    write(workdir, common__blocks=CLASS.format(state="launched"))
    project = workdir / "projects/one"
    head = "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parents[2]))\n"
    write(project, net=(head if how == "from __file__" else "") + "from common.blocks import Net\n")
    git(workdir, "add", ".")
    path = ""
    if how == "PYTHONPATH":
        path = str(workdir)
        monkeypatch.setenv("PYTHONPATH", path)
        monkeypatch.setattr(sys, "path", [*sys.path, path])
    run = launch(project)
    write(workdir, common__blocks=CLASS.format(state="edited since"))
    write(project, net="from common.blocks import Net\nedited\n")
    assert in_worker(run, project, "import net; print(net.Net.state)", path) == "launched"
    assert (run.code_dir / "projects/one/net.py").is_file()


def test_a_module_that_puts_the_project_first_does_not_bring_back_the_live_code(workdir: Path) -> None:
    head = "import os, sys\nsys.path.insert(0, os.getcwd())\n"
    write(workdir, net=head + "from inner import state\n", inner="state = 'launched'\n")
    run = launch(workdir)
    write(workdir, inner="state = 'edited since'\n", late="state = 'new'\n")
    shown = "import trainer.runtime.frozen as f; f.install(); import net, late; print(net.state, late.state)"
    assert in_worker(run, workdir, shown, str(Path(__file__).parents[2])) == "launched new"


def test_a_run_made_before_imports_as_it_did(workdir: Path) -> None:
    write(workdir, net="state = 'launched'")
    run = launch(workdir)
    run.manifest_path.write_text('{"code": {"files": 1}}')
    assert in_worker(run, workdir, "import net; print(net.state)") == "launched"
