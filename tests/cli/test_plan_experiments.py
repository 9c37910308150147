"""`trainer plan` of each shipped experiment, on CPU ranks and GPUs, with a little data where its own is not here."""

from __future__ import annotations

import json
import warnings
import wave
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_modules import small_fashion as small_fashion
from trainer.cli import main, planning
from trainer.core import records
from trainer.data.locations import EMOJI
from trainer.plan import parts
from trainer.plan.messages import SimulationAnswer, SimulationRequest
from trainer.plan.run import simulate_all
from trainer.runtime.torch_setup import silence_known_warnings

EXPERIMENTS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/experiment").glob("*.yaml"))
ON = {
    "cpu": ["resources.gpus=0", "resources.cpu_processes=2", "strategy=ddp"],
    "gpu": ["resources.gpus=2", "strategy=fsdp", "--gpu", "NVIDIA H100 80GB HBM3"],
}


def here(_: str, request: SimulationRequest, *__: Any, **___: Any) -> list[SimulationAnswer]:
    """Simulate in this process, which has imported torch."""
    with warnings.catch_warnings():
        silence_known_warnings()
        answers = simulate_all(records.loads(SimulationRequest, records.dumps(request), "the request"))
    return records.loads(list[SimulationAnswer], records.dumps(answers), "the answers")


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--alternatives", "0", "--json"]) == 0, capsys.readouterr().err
    job: dict[str, Any] = json.loads(capsys.readouterr().out)["job"]
    return job


def stand_in(experiment: str, folder: Path, fashion: Path) -> list[str]:
    """Make a little of the data that an experiment wants to have been downloaded; the overrides for it."""
    if experiment == "shakespeare":
        (folder / "play_gut.txt").write_text("To be, or not to be. " * 2000)
        return [f"data.root={folder}"]
    if experiment == "spoken_prompts":
        for number in range(60):
            path = folder / "voices" / f"voice{number % 2}" / f"{number}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes(bytes(16000))
        return [f"data.root={folder / 'voices'}"]
    if experiment == "few_garments":
        (folder / "weights.pth").touch()  # a plan reads no weights
        return [f"data.root={fashion}", "data.train_samples=200", f"finetune.init_from={folder / 'weights.pth'}"]
    return [f"data.root={fashion}"] if "fashion_mnist" in experiment else []


@pytest.mark.parametrize(
    ("experiment", "device"),
    [
        pytest.param(experiment, device, marks=() if place % 2 == number else pytest.mark.slow)
        for place, experiment in enumerate(EXPERIMENTS)
        for number, device in enumerate(ON)
    ],
)
@pytest.mark.usefixtures("workdir")
def test_each_shipped_experiment_is_planned(
    experiment: str,
    device: str,
    small_fashion: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "emoji" in experiment and not Path(EMOJI[0]).is_file():
        pytest.skip("apt-get install fonts-noto-color-emoji")
    monkeypatch.setattr(planning, "ask", here)
    overrides = [f"experiment={experiment}", *stand_in(experiment, tmp_path, small_fashion)]
    job = planned(capsys, *overrides, *ON[device])
    assert job["engine"] == "simulation"
    assert job["fits"] is (True if device == "gpu" else None)
    assert sum(job["parts"].values()) == job["peak_bytes"]
    assert job["parts"][parts.REST] > 0
    # At most two states of what is trained, in fp32 as the weights; a GPU's memory is given out in blocks.
    assert 0 < job["parts"][parts.OPTIMIZER] <= 2.1 * job["parts"][parts.PARAMETERS]
    assert job["forecast"]["step_s"] > 0
    assert job["forecast"]["steps"] > 0


@pytest.mark.usefixtures("workdir")
def test_both_engines_plan_a_shipped_decoder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once its sizes are in the configuration, which come from the data otherwise."""
    monkeypatch.setattr(planning, "ask", here)
    decoder = ["experiment=text_transformer", "model.vocab_size=256", "model.sequence_length=256", *ON["gpu"]]
    formula, simulation = (planned(capsys, *decoder, "--engine", engine) for engine in ("formula", "simulation"))
    assert formula["parts"][parts.PARAMETERS] == simulation["parts"][parts.PARAMETERS]
    # The simulation gives each count of steps of Adam a block of 512 bytes.
    assert formula["parts"][parts.OPTIMIZER] == pytest.approx(simulation["parts"][parts.OPTIMIZER], rel=0.002)
    assert formula["peak_bytes"] == pytest.approx(simulation["peak_bytes"], rel=0.05)
