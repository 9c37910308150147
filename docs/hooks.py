"""Add pages to the documentation site that are files elsewhere in the repository, and rewrite the links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "vulnerabilities.md",
}
"""File at the top of the repository to page of the site."""
BENCHMARKS, RESULTS = "benchmarks/README.md", "benchmarks/results"


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the top of the repository, and those of the benchmarks with a list of their results."""
    results = sorted((ROOT / RESULTS).glob("*.md"))
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, BENCHMARKS, content=(ROOT / BENCHMARKS).read_text(encoding="utf-8")))
    for path in results:
        files.append(File.generated(config, f"{RESULTS}/{path.name}", content=path.read_text(encoding="utf-8")))
    listed = "".join(f"- [{path.stem}]({path.name})\n" for path in results)
    files.append(File.generated(config, f"{RESULTS}/index.md", content=f"# Benchmark results\n\n{listed}"))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links that are right in the repository to what they are on the site."""
    if page.file.src_uri in PAGES.values():
        markdown = re.sub(r"\]\(docs/", "](", markdown)
        for source, target in PAGES.items():
            markdown = markdown.replace(f"]({source})", f"]({target})")
    if page.file.src_uri == BENCHMARKS:
        return markdown.replace("](../docs/", "](../").replace("](results)", "](results/index.md)")
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source})", f"]({target})")
    markdown = re.sub(r"\]\(\.\./benchmarks/results/?\)", f"]({RESULTS}/index.md)", markdown)
    return re.sub(r"\]\(\.\./(benchmarks/results/[\w-]+\.md)", r"](\1", markdown)
