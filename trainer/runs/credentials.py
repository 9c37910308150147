"""Recognize keys and credentials by name and by content: they stay out of the code snapshot of a run."""

from __future__ import annotations

import codecs
import re
from pathlib import Path, PurePath

_KEPT = {".project-root"}
"""Dotfiles that are copied: rootutils finds the root of a project by this one."""
_FOLDERS = {".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure"}
_SECRET_FOLDERS = {"secrets", "credentials"}
_COPY = re.compile(r"(~|[.-](bak|backup|old|orig|save|copy|sw[op]|\d+))+$", re.IGNORECASE)
"""Ending of a copy that an editor or a person made, such as `server.key.old`."""
_DOTFILES = re.compile(
    r"\.(env.*|netrc|npmrc|pypirc|pgpass|my\.cnf|git-credentials|htpasswd|boto|s3cfg|dockercfg|vault.*|wandb|token.*"
    r"|secrets?.*|credentials?.*|passwd.*|password.*)",
    re.IGNORECASE,
)
_TOOLS = re.compile(
    r"(.*/)?\.(git|pre-commit|vscode|idea|editorconfig|docker|flake8|pylintrc|python-version|ruff|mypy|pytest|coverage"
    r"|codespell|readthedocs|circleci|travis|DS_Store|devcontainer|isort|style|yapf|clang|cursor|claude|ipynb)"
)
_WORDS = r"(token|secrets?|passwords?|passwd|credentials?|api[_-]?keys?)"
_NAMES = re.compile(
    r"id_[^.]*(\.pub)?|_?netrc|kubeconfig|kaggle\.json"
    r"|.*\.(pem|key|p8|p12|pfx|jks|keystore|keytab|kdbx|ppk|gpg|ovpn|kubeconfig|env|token|secret|htpasswd)"
    r"|.*(client[_-]?secret|service[_-]?account|credentials).*\.json"
    rf"|((auth|access|api|aws|gcp|hf|wandb|github|gh|refresh|my)[_.-])?{_WORDS}(\.(ini|cfg|ya?ml|toml|json))?"
    r"|((auth|access|api|hf|wandb|github|gh|refresh|my)[_.-])?(token|secrets?|passwords?|api[_-]?keys?)\.txt",
    re.IGNORECASE,
)
"""File names of keys and credentials. `tokens.txt` is none: that is a vocabulary."""
_TOKENS: dict[bytes, bytes] = {
    b"PRIVATE KEY": rb"(?m)-----BEGIN [A-Z0-9 ]*PRIVATE KEY[A-Z ]*-----(?:\s|\\n|^[\w-]+: [^\n]*\n)*"
    rb"[A-Za-z0-9+/]{16}[^-]*",
    b"PuTTY-User-Key-File": rb"PuTTY-User-Key-File-\d[\s\S]*",
    b"AGE-SECRET-KEY-1": rb"AGE-SECRET-KEY-1[0-9A-Z]{20,}",
    b"machine ": rb"machine\s+\S+\s+login\s+\S+\s+password\s+[^\s{<$]+",
    b"://": rb"\b[a-z][a-z0-9+.-]*://[^/\s:@\"'<>{}$]+:(?!(?i:password|passwd|pass|secret|token|\*+|x+)@)[^/\s:@\"'<>{}$]{8,}@",
    b"AKIA": rb"\bAKIA(?![0-9A-Z]*EXAMPLE)[0-9A-Z]{16}\b",
    b"ASIA": rb"\bASIA(?![0-9A-Z]*EXAMPLE)[0-9A-Z]{16}\b",
    b"secret_access_key": rb"aws_secret_access_key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}\b",
    b"SECRET_ACCESS_KEY": rb"AWS_SECRET_ACCESS_KEY[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}\b",
    b"AccountKey=": rb"AccountKey=[A-Za-z0-9+/]{60,}",
    b"AIza": rb"\bAIza[\w-]{35}",
    b"ya29.": rb"\bya29\.[\w-]{20,}",
    b"gh": rb"\bgh[pousr]_[A-Za-z0-9]{36,}",
    b"github_pat_": rb"\bgithub_pat_\w{22,}",
    b"glpat-": rb"\bglpat-[\w-]{20,}",
    b"hf_": rb"\bhf_[A-Za-z0-9]{30,}\b",
    b"sk-": rb"\bsk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{32,}",
    b"k_live_": rb"\b[rs]k_live_\w{20,}",
    b"xox": rb"\bxox[abeoprs]-[\w-]{10,}",
    b"npm_": rb"\bnpm_[A-Za-z0-9]{36}\b",
    b"pypi-AgE": rb"\bpypi-AgE[\w-]{40,}",
    b"SG.": rb"\bSG\.[\w-]{22}\.[\w-]{43}",
    b"wandb_v1_": rb"\bwandb_v1_\w{20,}",
    b"WANDB_API_KEY": rb"WANDB_API_KEY[\"']?\]?\s*[=:]\s*[\"']?\w{40,}",
    b"nvapi-": rb"\bnvapi-[\w-]{40,}",
    b"dckr_pat_": rb"\bdckr_pat_[\w-]{20,}",
    b"r8_": rb"\br8_[A-Za-z0-9]{37}\b",
    b"eyJ": rb"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
}
"""Text that each kind of token contains, which is searched first because that is fast, and its form."""
_FORMS = {mark: re.compile(form) for mark, form in _TOKENS.items()}


def is_of_a_tool(name: str) -> bool:
    """Return whether a dotfile belongs to git, an editor or a checker, which no run needs."""
    return _TOOLS.match(name) is not None


def is_hidden(relative: PurePath) -> bool:
    """Return whether a path within a project is a dotfile or in a dotfolder."""
    return any(part.startswith(".") and part not in (*_KEPT, "..") for part in relative.parts)


def is_credential(path: PurePath, is_module: bool = False) -> bool:
    """Return whether a path has the name of a key or of credentials; a module may have any, such as `secrets.py`."""
    name = _COPY.sub("", path.name)
    if not _FOLDERS.isdisjoint(path.parts) or _DOTFILES.fullmatch(path.name) or _DOTFILES.fullmatch(name):
        return True
    if is_module:
        return False
    is_inside = not path.is_absolute() and not _SECRET_FOLDERS.isdisjoint(path.parts[:-1])  # a folder of the project
    return is_inside or any(map(_NAMES.fullmatch, (path.name, name)))


def has_key(content: bytes) -> bool:
    """Return whether a text holds a private key, a password or a token of a known form."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as editors on Windows write
        content = content.decode("utf-16", "replace").encode()
    return any(mark in content and form.search(content) is not None for mark, form in _FORMS.items())


def masked(text: str) -> str:
    """Return a text with its keys and tokens replaced by `***`."""
    content = text.encode(errors="surrogateescape")
    for mark, form in _FORMS.items():
        if mark in content:
            content = form.sub(b"***", content)
    return content.decode(errors="surrogateescape")


def leads_to_credential(link: Path) -> bool:
    """Return whether a link leads to a file with the name of credentials, such as `~/.ssh/id_rsa`."""
    return link.is_symlink() and is_credential(link.resolve())
