"""No key, token or password of the user's project is copied into a run directory; what is left out is said."""

from __future__ import annotations

import codecs
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePath

import pytest

from tests.runs.test_code_snapshot import git
from trainer.cli import main
from trainer.core.errors import DONE
from trainer.runs.code_files import MODULES
from trainer.runs.credentials import has_key, is_credential, is_hidden, is_of_a_tool, masked
from trainer.runs.registry import all_runs

LETTERS = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zA" * 4
"""Stands for the random part of each token; the tokens are joined here, so that no scanner finds one in this file."""
BASE64 = f"MIIEvQ{LETTERS}\n{LETTERS}"


def pem(kind: str) -> str:
    return "\n".join([f"-----BEGIN {kind}-----", BASE64, f"-----END {kind}-----", ""])


TOKENS = {
    "GitHub": "ghp" + "_" + LETTERS[:36],
    "GitHub fine-grained": "github" + "_pat_" + LETTERS[:40],
    "GitLab": "glpat" + "-" + LETTERS[:20],
    "Hugging Face": "hf" + "_" + LETTERS[:34],
    "OpenAI": "sk" + "-proj-" + LETTERS[:48],
    "Anthropic": "sk" + "-ant-api03-" + LETTERS[:60],
    "AWS": "AKIA" + "Q" * 15 + "7",
    "AWS secret": "aws_secret_access_key" + " = " + LETTERS[:40],
    "Azure": "Account" + "Key=" + LETTERS[:86] + "==",
    "Google": "AI" + "za" + LETTERS[:35],
    "Slack": "xox" + "b-123456789012-" + LETTERS[:24],
    "Stripe": "sk" + "_live_" + LETTERS[:24],
    "npm": "npm" + "_" + LETTERS[:36],
    "PyPI": "pypi" + "-AgEIcHlwaS5vcmc" + LETTERS[:60],
    "SendGrid": "SG" + f".{LETTERS[:22]}.{LETTERS[:43]}",
    "W&B": "WANDB_API" + "_KEY=" + "0123456789abcdef" * 2 + "01234567",
    "JWT": "ey" + f"J{LETTERS[:20]}.ey" + f"J{LETTERS[:30]}.{LETTERS[:40]}",
    "netrc": "machine " + f"api.wandb.ai login user password {LETTERS[:40]}",
    "URL": "postgres:" + f"//admin:{LETTERS[:12]}@db.example.org/x",
    "RSA": pem("RSA PRIVATE " + "KEY"),
    "OpenSSH": pem("OPENSSH PRIVATE " + "KEY"),
    "PGP": pem("PGP PRIVATE " + "KEY BLOCK").replace("\n", "\nVersion: GnuPG v2\n\n", 1),
}
SECRET = "hunter2-" + LETTERS[:8]
"""A secret of no known form: only the name of its file says what it is."""
NAMED = (
    ".env",
    ".env.local",
    "prod.env",
    ".netrc",
    "_netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".ssh/config",
    ".aws/credentials",
    ".config/gcloud/key.json",
    ".labels.json",
    "id_rsa",
    "keys/id_ed25519",
    "server.pem",
    "server.key",
    "store.p12",
    "kaggle.json",
    "credentials.json",
    "credentials.toml",
    "client_secret_12.apps.json",
    "service-account.json",
    "secrets.yaml",
    "token",
    "wandb_api_key.txt",
    "password.txt",
)
KEPT = (
    "id_map.json",
    "tokens.txt",
    "tokenizer.json",
    "special_token_map.json",
    "passwords.py",
    "keys.md",
    "mine/data.csv",
)
"""Names that look like those, and are needed by code."""


def plant(project: Path) -> dict[str, str]:
    """Write every secret into the project; returns file to secret."""
    planted = {name: SECRET for name in NAMED}
    planted |= {f"notes/{number}.txt": token for number, token in enumerate(TOKENS.values())}
    planted["settings.py"] = f'TOKEN = "{TOKENS["Hugging Face"]}"\n'
    planted["tracked.md"] = f"the key is {TOKENS['AWS']}\n"
    planted["mine/__init__.py"] = ""
    planted["mine/notebook.ipynb"] = f'{{"cells": ["{TOKENS["GitHub"]}"]}}'
    for name, content in planted.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(content)
    (project / "a_link.txt").symlink_to(project / "id_rsa")
    return planted


def contents(run: Path) -> Iterator[tuple[str, bytes]]:
    """Every file of a run directory, and the text of every link."""
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.is_symlink():
            yield name, str(path.readlink()).encode()
        elif path.is_file():
            yield name, path.read_bytes()


def test_a_whole_run_holds_none_of_the_secrets_around_it(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_orphans: None
) -> None:
    """A fit of two steps, launched in a project with a secret of each kind, and uncommitted changes of secrets.

    blocked by: files are left out by name and by tokens in them; dotfiles always
    """
    monkeypatch.setenv("WANDB_API_KEY", "fedcba9876543210" * 2 + "76543210")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", LETTERS[5:45])
    planted = plant(workdir)
    for name in KEPT:
        (workdir / name).write_text("[1]\n")
    git(workdir, "init")
    (workdir / "tracked.env").write_text("nothing\n")
    (workdir / "changed.md").write_text("nothing\n")
    git(workdir, "add", "-f", "tracked.md", "tracked.env", "changed.md")
    git(workdir, "commit", "-m", "x")
    (workdir / "tracked.env").write_text(f"PASSWORD={SECRET}\n")
    (workdir / "changed.md").write_text(f"something\n{TOKENS['Slack']}\n")
    limits = ["trainer.max_steps=2", "trainer.limit_val_batches=0", "resources.cpu_processes=1"]
    assert main(["fit", "experiment=quickstart", *limits]) == DONE
    (run,) = all_runs(workdir / "runs")
    secrets = {*TOKENS.values(), SECRET, LETTERS[5:45], "fedcba9876543210", LETTERS[:12], LETTERS[:20]}
    found = [(name, one) for name, content in contents(run.path) for one in secrets if one.encode() in content]
    assert found == []
    files = {name for name, _ in contents(run.path)}
    assert {f"code/{name}" for name in KEPT} <= files
    assert {f"code/{name}" for name in planted} & files == {
        "code/settings.py",
        "code/tracked.md",
        "code/mine/__init__.py",
    }
    assert (run.code_dir / "settings.py").resolve() == workdir / "settings.py"  # a run may import it
    assert "something" in (run.path / "code.diff").read_text()
    code = run.manifest()["code"]
    assert {*NAMED, "notes/0.txt", "a_link.txt", "tracked.env"} <= {*code["withheld"], *code["hidden"]}
    assert sorted(code["keys"]) == ["changed.md", "settings.py", "tracked.md"]
    said = capfd.readouterr().out
    assert "left out of the run's code snapshot, because they may hold credentials: " in said
    assert "dotfiles are not part of the run's code snapshot: " in said
    assert "WARNING: keys or tokens are in the text of " in said


@pytest.mark.parametrize("kind", TOKENS)
def test_each_kind_of_token_is_found_and_masked_within_a_text(kind: str) -> None:
    """blocked by: the forms of tokens"""
    text = f"before\n  x: {TOKENS[kind]}\nafter --\n"
    assert has_key(text.encode())
    assert LETTERS[:12] not in masked(text)
    assert masked(text).startswith("before\n  x: ")
    assert masked(text).endswith("after --\n")


@pytest.mark.honest
def test_code_without_secrets_is_no_secret() -> None:
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split("\n")
    files = [PurePath(name) for name in listed if name and (root / name).is_file()]
    assert len(files) > 300 or not (root / ".git").exists()
    wrong = [
        name.as_posix()
        for name in files
        if is_credential(name, name.suffix in MODULES) or has_key((root / name).read_bytes())
    ]
    assert wrong == []
    assert not any(is_credential(PurePath(name), name.endswith(".py")) for name in KEPT)
    examples = (
        b"AKIAIOSFODNN7EXAMPLE https://user:password@host/ sk-learn-is-a-library hf_hub_download_of_a_model ghp_short"
    )
    assert not has_key(examples)
    assert all(is_of_a_tool(name) for name in (".gitignore", ".github/workflows/x.yml", "a/.pre-commit-config.yaml"))
    assert not is_hidden(PurePath(".project-root"))


def test_a_search_for_keys_takes_no_more_time_than_the_text_is_long() -> None:
    """Texts on which a careless expression would try every division of the text.

    blocked by: expressions without nested repetition
    """
    for mark in (
        "-----BEGIN PRIVATE " + "KEY-----\n" + "a: " * 50_000,
        "machine " + "a " * 50_000,
        "x://" + "a:" * 50_000,
    ):
        assert not has_key(mark.encode())


@pytest.mark.parametrize(
    "path", ["server.key.old", "id_rsa-2", ".env~", "secrets/prod.yaml", "conf/credentials/db.toml"]
)
def test_copies_of_keys_and_folders_of_secrets_are_recognized(path: str) -> None:
    """blocked by: suffixes of copies, and names of folders"""
    assert is_credential(PurePath(path), False)


@pytest.mark.honest
@pytest.mark.parametrize(
    ("path", "is_module"),
    [
        ("secrets/__init__.py", True),
        ("monkey.bak", False),
        ("/home/me/secrets/project/data.csv", False),
        ("tokens.txt.1", False),
        ("notes/secretary.txt", False),
    ],
)
def test_other_names_are_no_credentials(path: str, is_module: bool) -> None:
    assert not is_credential(PurePath(path), is_module)


def test_a_token_in_a_utf_16_file_is_found() -> None:
    """blocked by: both byte orders are searched"""
    token = "ghp_" + "a1B2" * 9
    for content in (token.encode("utf-16"), codecs.BOM_UTF16_BE + token.encode("utf-16-be"), token.encode()):
        assert has_key(content)
    assert not has_key("ordinary text".encode("utf-16"))
