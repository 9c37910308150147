"""The fenced blocks of README.md and docs/, and the comparison of what they show with what a program prints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL
)
_PATH = re.compile(r"# ([\w./-]+\.(?:py|ya?ml))\n")
_COMMAND = re.compile(r"(trainer|pip|python|sudo|mkdocs|pytest) |\./launch/")
_DIAGRAM = re.compile("[─│►▼┌└├]")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_shell(self) -> bool:
        """Whether it is commands, also where the fence names no language."""
        return self.language in ("bash", "sh") or (not self.language and bool(_COMMAND.match(self.text)))

    @property
    def commands(self) -> list[str]:
        """One a line, without comments; a backslash continues a line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [" ".join(command.split()) for line in lines if (command := line.partition("  #")[0].strip())]

    @property
    def path(self) -> str | None:
        """The file that it is, from a first line such as `# conf/model/mine.yaml`."""
        match = _PATH.match(self.text) if self.language in ("python", "yaml") else None
        return match[1] if match else None

    @property
    def tree(self) -> tuple[str, list[str]] | None:
        """A folder and the names in it, from a first line that is a path with a slash at its end."""
        head, *rest = self.text.splitlines()
        if self.language not in ("", "text", "tree") or not re.fullmatch(r"[\w<>./-]+/", head):
            return None
        lines = [line.strip(" │├└─") for line in rest if re.match(r" {2}\S|[│├└]", line)]
        entries = [re.split(r" {3,}", line, maxsplit=1)[0] for line in lines]  # three blanks, then the description
        return head, [name for entry in entries for name in entry.split() if "<" not in name and name != "..."]

    @property
    def is_diagram(self) -> bool:
        return self.language in ("", "text") and bool(_DIAGRAM.search(self.text))

    def shows(self, output: str) -> bool:
        """Whether this is in the block, with other numbers, hosts, devices, files and ranks."""
        return _general(output) in _general(self.text)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, match.start()) + 1, match["language"], match["text"])
        for match in _FENCE.finditer(text)
    ]


def documented(page: str, start: str) -> Block:
    """The block of `docs/PAGE` that begins with `start`: for the test that makes what the block shows.

    tests/test_docs.py leaves such a block to that test, which it finds by this call.
    """
    (block,) = [one for one in blocks(ROOT / "docs" / page) if one.text.startswith(start)]
    return block


def _general(text: str) -> str:
    """The text with a placeholder for all that differs from run to run."""
    text = re.sub(r'"[^"\n]*"', '"FILE"', " ".join(text.split()))
    text = re.sub(r"\((?:cuda|cpu)[^)]*\)", "(DEVICE)", text)
    text = re.sub(r"\b(?:nccl|gloo)\b", "BACKEND", text)
    text = re.sub(r"[A-Za-z_]*\d[\w.]*(?:,\d{3})*", "#", text)
    return re.sub(r"#(?:, #)+", "#", text)
