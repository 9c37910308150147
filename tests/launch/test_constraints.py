"""constraints.txt: all that `./launch/test` installs is pinned, at one version for each Python that is supported."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PINS = [
    Requirement(line)
    for line in (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]
CHOSEN_BY_TORCH = ("nvidia-", "cuda-", "triton")
"""Of the build for CUDA, which has them at versions of its own."""


def needed(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[str]:
    """The installed packages that `requirement` needs, its extras' too, by canonical name."""
    name = canonicalize_name(requirement.name)
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return
    yield name
    for extra in ("", *requirement.extras):
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for line in found.requires or []:
            part = Requirement(line)
            if part.marker is None or part.marker.evaluate({"extra": extra}):
                yield from needed(part, seen)


def test_everything_that_is_installed_is_pinned() -> None:
    pinned = {canonicalize_name(pin.name): pin for pin in PINS if pin.marker is None or pin.marker.evaluate()}
    names = set(needed(Requirement("trainer[dev]"), set())) - {"trainer"}
    assert len(names) > 80
    own = {name for name in names if not name.startswith(CHOSEN_BY_TORCH)}
    assert own - pinned.keys() == set()
    assert {name for name in own if not pinned[name].specifier.contains(distribution(name).version)} == set()


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_no_package_has_two_pins(python: str) -> None:
    names = [
        canonicalize_name(pin.name)
        for pin in PINS
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert len(names) == len(set(names))
    assert "torch" in names
