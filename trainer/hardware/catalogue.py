"""GPUs by the exact name that `torch.cuda.get_device_name` returns. A device that is not in the table is not guessed.

Names are compared whole: `NVIDIA H100 NVL`, `NVIDIA H100 PCIe` and `NVIDIA H100 80GB HBM3` have three different peaks,
and `NVIDIA L40` has half of that of `NVIDIA L40S`. A name that stands for two products (GeForce RTX 3080: 10 and 12 GB)
is left out. Intel's Gaudi is, too: torch shows it as `hpu`, which this trainer has no backend for.
"""

from __future__ import annotations

import re
from difflib import get_close_matches

from trainer.core.errors import UserError
from trainer.hardware import amd, nvidia_data_center, nvidia_workstation
from trainer.hardware.device import GIB as GIB
from trainer.hardware.device import Device as Device

LIST_ALL = "python -m trainer.hardware.table"
"""The command that prints the catalogue."""
_MOST_NEAR = 6
DEVICES: dict[str, Device] = {
    one.name: one for one in (*nvidia_data_center.DEVICES, *nvidia_workstation.DEVICES, *amd.DEVICES)
}


def known(name: str) -> Device | None:
    """Return the entry of a device; None if the catalogue does not have it.

    Drivers before release 470 left out the vendor: `A100-SXM4-40GB` is `NVIDIA A100-SXM4-40GB`.
    """
    return DEVICES.get(name) or DEVICES.get(f"NVIDIA {name}")


def device(name: str) -> Device:
    """Return the entry of a device.

    Raises:
        UserError: The catalogue does not have it; the message suggests the nearest name.
    """
    found = known(name)
    if found is None:
        raise UserError(f"--gpu {name!r}: the hardware catalogue does not have this device", suggestion(name))
    return found


def suggestion(name: str = "") -> str:
    """Return the devices whose names are near `name`, and the command that lists all."""
    known_words = {word for one in names() for word in _words(one)}
    words = {word for word in _words(name) if any(character.isdigit() for character in word)}
    words = {near for word in words for near in _near(word, known_words)}
    shared = {one: len(words & set(_words(one))) for one in names()}
    most = max(shared.values(), default=0)
    near = [one for one in names() if most and shared[one] == most][:_MOST_NEAR]
    near = near or get_close_matches(name, names())
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}{LIST_ALL} lists all"


def _near(word: str, known: set[str]) -> list[str]:
    return [word] if word in known else get_close_matches(word, sorted(known), cutoff=0.7)


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case; RTX4090 has the words rtx and 4090."""
    return re.findall(r"[a-z]+\d+\w*|\d+\w*|[a-z]+", re.sub(r"(rtx|gtx)(?=\d)", r"\1 ", name.lower()))


def names() -> list[str]:
    """Return the names of all devices."""
    return sorted(DEVICES)
