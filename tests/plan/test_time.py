"""The time of a step: counted work, rooflines, collectives, calibration, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.plan.drawn import by_simulation, case_of, draw
from trainer.cli.initial import settle_micro_batch
from trainer.cli.planning import formula_plans, planned_shape, variant_of
from trainer.config.compose import compose
from trainer.core.records import dumps, from_json, to_json
from trainer.hardware import baseline
from trainer.hardware.catalogue import device
from trainer.plan import calibration, forecast, past, rates, storage
from trainer.plan.calibration import Kind, Measurement, correction
from trainer.plan.collectives import Links, Traffic, seconds, traffic
from trainer.plan.decoder_work import work_of
from trainer.plan.job import alternatives
from trainer.plan.outlook import Surroundings, roofline_of, with_forecasts
from trainer.plan.roofline import Rates, StepTime, step_time
from trainer.plan.states import Layout
from trainer.plan.work import Counts, Work
from trainer.runs.directory import RunDirectory
from trainer.runs.events import CheckpointSaved
from trainer.runs.sampled import sampled_curves, step_seconds

LINKS = Links(100e9, 10e9, 0.0, 0.0)
GPU = Rates(1e12, 1e10, 1e-6, True, LINKS, "")


@pytest.mark.parametrize("seed", [1, 3, 4, 7, 8, 12, 13])
def test_the_closed_form_counts_what_the_simulation_counts(seed: int) -> None:
    """FLOPs to 1 in a thousand, bytes of other operators within 20%."""
    case = draw(seed)
    simulated, formula = by_simulation(case).work, work_of(case_of(case))
    assert (formula.elements, formula.trained) == (simulated.elements, simulated.trained)
    for name in ("forward", "backward"):
        counted, known = getattr(simulated, name), getattr(formula, name)
        # Checkpointing does not compute the last matrix product of a block again.
        limit = 0.12 if name == "backward" and case.checkpointing == "full" else 0.001
        assert known.flops == pytest.approx(counted.flops, rel=limit), name
        assert known.matrix_bytes == pytest.approx(counted.matrix_bytes, rel=0.25), name
        assert known.other_bytes == pytest.approx(counted.other_bytes, rel=0.2), name
        assert known.operators == pytest.approx(counted.operators, rel=0.6), name


def test_flops_are_those_of_the_matrix_products_and_of_attention() -> None:
    case = draw(7)  # gelu, one rank, no checkpointing
    model = case.model
    n, d, width = case.batch * model["sequence_length"], model["dim"], 4 * model["dim"]
    keys = d // model["heads"] * (model["kv_heads"] or model["heads"])
    products = 2 * n * (2 * d * d + 2 * d * keys + 2 * d * width)
    attention = 2 * 2 * n * model["sequence_length"] / 2 * d
    forward = model["layers"] * (products + attention) + 2 * n * d * model["vocab_size"]
    assert by_simulation(case).work.forward.flops == pytest.approx(forward, rel=1e-6)


def test_collectives_take_what_a_ring_takes() -> None:
    one = Traffic("all-gather", 8e9, 1, 8, 1, "forward")
    assert seconds(one, LINKS) == pytest.approx(8e9 * 7 / 8 / 100e9)
    assert seconds(replace(one, kind="all-reduce"), LINKS) == pytest.approx(2 * 8e9 * 7 / 8 / 100e9)
    over_nodes = replace(one, ranks=16, nodes=2)
    slow = replace(LINKS, network_bytes_s=5e9)
    assert seconds(over_nodes, slow) == pytest.approx(8e9 / 2 / (8 * 5e9)), "eight adapters receive half of it"
    assert seconds(replace(one, ranks=1), LINKS) == 0.0


@pytest.mark.parametrize(
    ("strategy", "layout", "sizes"),
    [
        ({}, Layout("ddp", world_size=8), [4000.0]),
        ({"comm_hook": "bf16_compress"}, Layout("ddp", world_size=8), [2000.0]),
        ({}, Layout("fsdp", 8, 1, 8, precision="bf16-mixed"), [2000.0, 2000.0, 4000.0]),
        ({"reshard_after_forward": False}, Layout("fsdp", 8, 1, 8, precision="bf16-mixed"), [2000.0, 4000.0]),
        ({}, Layout("hsdp", 4, 1, 8, precision="bf16-mixed"), [2000.0, 2000.0, 4000.0, 1000.0]),
        ({}, Layout("deepspeed_zero2", 1, 1, 8, precision="bf16-mixed"), [2000.0, 2000.0]),
        ({}, Layout("deepspeed_zero3", 1, 1, 8, precision="bf16-mixed"), [2000.0, 2000.0, 2000.0]),
        ({}, Layout("single"), []),
    ],
)
def test_what_a_strategy_sends(strategy: dict[str, Any], layout: Layout, sizes: list[float]) -> None:
    sent = traffic(strategy, layout, 4, Work(elements=1000, trained=1000, units=3))
    assert [one.bytes for one in sent] == sizes


def test_a_collective_costs_only_what_computation_does_not_hide() -> None:
    work = Work(Counts(flops=1e12), Counts(flops=2e12), Counts(other_bytes=1e10))
    hidden = step_time(work, [Traffic("all-gather", 100e9, 1, 2, 1, "forward")], 1, GPU)
    assert hidden == StepTime(3.0, 0.0, 0.0, 1.0, 0.0, 0.5)
    exposed = step_time(work, [Traffic("all-gather", 400e9, 1, 2, 1, "forward")], 2, GPU)
    assert (exposed.exposed, exposed.hidden, exposed.total) == (2.0, 2.0, 9.0)
    once = Traffic("all-reduce", 300e9, 1, 2, 1, "backward", per_step=True)
    assert step_time(work, [once], 2, GPU).exposed == pytest.approx(1.0), "hidden by the last backward pass only"


def test_the_host_costs_only_where_the_device_waits_for_it() -> None:
    work = Work(Counts(flops=1e9, operators=2000))
    assert step_time(work, [], 1, GPU).host == pytest.approx(0.001)
    assert step_time(work, [], 1, replace(GPU, is_asynchronous=False)).host == pytest.approx(0.002)


def measured(step_s: float, size: float = 1e12, model: str = "a", source: str = "trainer time") -> Measurement:
    return Measurement(
        hardware="cpu",
        kind=Kind(model=model, strategy="single", precision="32-true"),
        ranks=1,
        micro_batch=1,
        accumulate=1,
        work=Work(Counts(flops=size, operators=1)),
        step_s=step_s,
        steps=20,
        source=source,
        time=1.0,
    )


def test_a_plan_is_corrected_by_the_most_similar_measurements() -> None:
    kind, work = measured(1.0).kind, measured(1.0).work
    assert correction([], kind, work, GPU) == calibration.Correction()
    other = correction([measured(3.0, model="b")], kind, work, GPU)
    assert (round(other.factor, 6), other.error) == (3.0, None)
    same = correction([measured(3.0, model="b"), measured(2.0), measured(2.2)], kind, work, GPU)
    assert same.factor == pytest.approx((2.0 * 2.2) ** 0.5)
    assert same.error == pytest.approx(0.1)
    sizes = [measured(2.0), measured(300.0, size=1e14)]
    assert correction(sizes, kind, work, GPU).factor == pytest.approx(2.0, rel=0.01), "a similar size counts more"


def test_measurements_and_rates_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = measured(2.0)
    assert from_json(Measurement, to_json(one), "here") == one
    calibration.keep(one)
    calibration.keep(replace(one, step_s=3.0))
    calibration.keep(replace(one, hardware="gpu"))
    (tmp_path / "trainer/timings/broken.json").write_text('{"hardware": 1}')
    assert calibration.measurements("cpu") == [replace(one, step_s=3.0)], "a later one of the same job replaces it"
    machine = rates.Machine("cpu, 1 thread", 1e9, 1e9, 1e-6, 1.0)
    rates.keep_machine(machine)
    assert rates.machine("cpu, 1 thread") == machine
    assert rates.machine("another") is None
    assert "cpu, 1 thread" in dumps(machine)


def test_the_rates_of_a_gpu_are_shares_of_its_data_sheet() -> None:
    found = rates.of_device(device("NVIDIA H200"), "bf16")
    assert found is not None
    assert found.flops_s == pytest.approx(0.6 * 989.5e12)
    assert found.links.node_bytes_s == pytest.approx(0.8 * 450e9)
    assert found.links.network_bytes_s == pytest.approx(0.8 * 50e9)
    stated = rates.of_device(device("NVIDIA H200"), "bf16", 7e9)
    assert stated is not None
    assert stated.links.network_bytes_s == 7e9
    assert rates.of_device(device("Tesla T4"), "bf16") is None
    pcie = rates.of_device(device("Tesla T4"), "fp16")
    assert pcie is not None
    assert pcie.links.node_bytes_s == pytest.approx(0.8 * 16 * 0.985e9)


JOB = forecast.Job(32, 100, 3200, 8, 8, "cuda", 700.0, 3600.0, 10**9, 20.0)


def config(**trainer: Any) -> dict[str, Any]:
    cluster = {"save_before_end_s": 180, "price_per_gpu_hour": 2.0, "currency": "EUR", "grid_gco2_per_kwh": 400}
    return {"trainer": trainer, "cluster": cluster, "resilience": {"agree_every_s": 1.0}}


def test_figures_until_the_end() -> None:
    found = forecast.forecast(config(max_epochs=99), JOB, StepTime(1.0, 0, 0, 0, 0), calibration.Correction(2.0), 0.01)
    assert (found.steps, found.epochs, found.train_s) == (9900, 99.0, 19800.0)
    assert (found.samples_s, found.tokens_s, found.mfu) == (16.0, 1600.0, 0.16)
    assert found.device_hours == pytest.approx(44.0)
    assert found.energy_kwh == pytest.approx(44 * 0.7 * 0.9)
    assert found.cost == pytest.approx(88.0)
    assert found.co2_kg == pytest.approx(44 * 0.7 * 0.9 * 0.4)
    assert found.allocations == 6  # of 3600 - 120 - 180 s
    assert found.save_before_end_s == 80  # 30 + 1 + 2 * 2 + 2 * 20, in tens
    assert not found.not_known
    assert found.error.startswith("not known")


def test_what_is_not_known_has_a_reason() -> None:
    job = replace(JOB, samples_per_epoch=None, save_s=None)
    bare = config(max_epochs=3)
    bare["cluster"] = {"save_before_end_s": 180}
    found = forecast.forecast(bare, job, StepTime(1.0, 0, 0, 0, 0), calibration.Correction(), None)
    assert (found.steps, found.cost, found.co2_kg, found.save_before_end_s, found.mfu) == (None,) * 5
    assert set(found.not_known) == {"train_s", "cost", "co2_kg", "save_before_end_s"}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 1000, "max_epochs": 2}, 200),
        ({"max_time": "00:01:00:00"}, 3600),
        ({}, 1000),
        ({"max_epochs": 1, "limit_train_batches": 0.25}, 25),
        ({"max_epochs": -1}, None),
    ],
)
def test_the_length_of_a_training(options: dict[str, Any], steps: int | None) -> None:
    assert forecast.length(options, JOB, 1.0, {}) == steps


def test_measured_saves_of_past_runs(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "digits-abc")
    run.path.mkdir()
    (run.path / "config.yaml").write_text("name: digits\n")
    run.add_event(CheckpointSaved(step=1, bytes=1000, blocked_s=1.0, written_s=3.0))
    run.add_event(CheckpointSaved(step=2, bytes=1000))
    found = past.saves(tmp_path)
    assert found == [past.Save(4.0, 1000, "digits-abc")]
    assert past.slowest_save(found, 500) == (4.0, "digits-abc")
    assert past.slowest_save(found, 5000) == (20.0, "digits-abc")
    assert past.slowest_save(found, 50000) is None, "too small to compare"


def test_the_step_time_of_a_run_is_that_of_its_throughput(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "train/samples_per_s": 1}', "{broken", '{"step": 1, "val/loss": 1}']
    lines += [f'{{"step": {step}, "train/samples_per_s": {rate}}}' for step, rate in ((2, 60), (3, 64), (4, 70))]
    path.write_text("\n".join(lines))
    assert step_seconds(sampled_curves(path), 32) == 0.5
    assert step_seconds(sampled_curves(path), None) is None
    assert step_seconds(sampled_curves(tmp_path / "missing"), 32) is None


def test_quota_and_free_space(tmp_path: Path) -> None:
    output = (
        "Disk quotas for user anna (uid 1000):\n  Filesystem blocks quota limit grace files\n  /home 900* 1000 1200 0"
    )
    assert storage.left_of_quota(output) == 100 * 1024
    assert storage.left_of_quota("  /home 900 0 0 0 12 0 0 0") is None
    found = storage.space(tmp_path / "runs" / "not" / "yet")
    assert found.free_bytes is not None
    assert storage.Space(5, 3).least == 3


def test_past_runs_of_the_job_calibrate_its_alternatives_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The job's own row and those beside it: else the slower one may seem faster."""
    gpu = device("NVIDIA A100-SXM4-40GB")
    job_words = ["model=gpt2_124m", "data=text", "resources.gpus=4", f"runs_dir={tmp_path}", "strategy=ddp"]
    config = compose(job_words, config_dirs=[]).config
    settle_micro_batch(config)
    job = variant_of(config, planned_shape(config, gpu), gpu)
    others = [one for one in alternatives(job, config["data"]["batch_size"]) if one != job]
    plans = formula_plans(config, [job, *others], gpu.memory_bytes, skip=True)
    around = Surroundings(config, gpu)
    before = with_forecasts(plans, around)

    def runs(runs_dir: Path, one: past.Workload) -> list[Measurement]:
        found = from_work(one)
        rate = roofline_of(job, around)
        assert isinstance(rate, Rates)
        return [replace(found, step_s=3 * found.step_s / found.ratio(rate))]

    monkeypatch.setattr(past, "same_jobs", runs)
    after = with_forecasts(plans, around)
    ratios = [
        two.forecast.step_s / one.forecast.step_s
        for one, two in zip(before, after, strict=True)
        if one.forecast is not None and two.forecast is not None
    ]
    assert len(ratios) > 3
    assert ratios == pytest.approx([3.0] * len(ratios))


def from_work(job: past.Workload) -> Measurement:
    return Measurement(
        hardware=job.hardware,
        kind=job.kind,
        ranks=job.ranks,
        micro_batch=job.micro_batch,
        accumulate=job.accumulate,
        work=job.work,
        sent=job.sent,
        step_s=1.0,
        steps=1,
        source="a run",
        time=0.0,
    )


def test_a_plan_takes_what_doctor_has_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The slowest GPU of each node, the median of the nodes; other GPUs and slower precisions are left as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = device("NVIDIA H100 80GB HBM3")
    assert baseline.of_hardware(gpu.name) == {}
    for host, scale in (("a", 1.0), ("b", 0.9), ("c", 0.5)):
        empty = baseline.Baseline(host=host, hardware="NVIDIA H200" if host == "c" else gpu.name)
        values = {
            "matrix bf16 GPU 0": 700e12,
            "matrix bf16 GPU 1": 600e12,
            "memory GPU 0": 3e12,
            "all-reduce of 8": 2e11,
        }
        baseline.write(empty.with_measured({name: value * scale for name, value in values.items()}))
    found = baseline.of_hardware(gpu.name)
    assert found == pytest.approx({"matrix bf16": 570e12, "memory": 2.85e12, "all-reduce of 8": 1.9e11})
    measured = rates.of_device(gpu, "bf16", measured=found)
    assert measured is not None
    assert measured.flops_s == pytest.approx(0.85 * 570e12)
    assert measured.bytes_s == pytest.approx(0.85 * 2.85e12)
    assert measured.links.node_bytes_s == pytest.approx(1.9e11 * 2 * 7 / 8)
    assert measured.source == "85% of what trainer doctor measured, its all-reduce"
    in_fp16 = rates.of_device(gpu, "fp16", measured=found)
    assert in_fp16 is not None
    assert in_fp16.flops_s == pytest.approx(0.6 * 989.5e12)
