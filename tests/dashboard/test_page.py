"""The page in headless Chromium: what a person reads, with the mouse, the keyboard and a screen reader."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dashboard.chromium import PROGRAM, Page, chromium
from tests.dashboard.conftest import Dashboard, running
from tests.dashboard.fake_runs import make_run, make_sweep
from trainer.dashboard.catalogue import key_of
from trainer.runs.records import PlannedRun
from trainer.sweeps.records import Owner, TrialRun

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="Debian's package chromium is not installed")

SCRIPT = "<img src=x onerror=document.title='broken'>"
IMAGES = Path(__file__).parents[2] / "build" / "dashboard"
DRAWN = (
    "document.querySelectorAll('.panel').length && [...document.querySelectorAll('.panel')]"
    ".every((one) => one.dataset.points > 0 && one.getAttribute('aria-busy') === 'false')"
)
OBSERVE = (
    "window.made = 0; new MutationObserver((all) => all.forEach((one) => window.made += one.addedNodes.length))"
    ".observe(document.querySelector('table.runs tbody'), {childList: true})"
)
GROUP = (
    "(() => { const one = document.querySelector('[aria-label=\"Group runs by\"]');"
    " one.value = 'seeds'; one.dispatchEvent(new Event('change')); })()"
)
LOSS = "[...document.querySelectorAll('.panel')].find((one) => one.ariaLabel === 'train/loss')"
CONTROLS = ("button", "link", "checkbox", "combobox", "slider", "searchbox", "textbox")
ROWS = "table.runs tbody tr[data-key]"


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    """A thousand runs would be slow to make; what is rendered of forty is what is rendered of any number."""
    folder.mkdir()
    made = {}
    for seed in range(40):
        name = "vit" if seed % 2 else "resnet"
        run = make_run(folder, name, seed=seed, optimizer__lr=0.01 if seed % 4 < 2 else 0.001, ago_s=5000 - seed)
        made[f"{name}-{seed}"] = run.path
    made["failed"] = make_run(folder, "failed", outcome="failed", reason=f"ValueError: {SCRIPT}", ago_s=100).path
    more = {SCRIPT: 1.0, "gpu/power_w": 300.0}
    alive = make_run(folder, "alive", outcome=None, ago_s=60, model__note=SCRIPT, metrics=more)
    alive.write_plan(PlannedRun(engine="formula", device="NVIDIA A40", peak_bytes=2**30, steps=5000, train_s=300.0))
    made["alive"] = alive.path
    return made


@pytest.fixture(scope="module")
def sweep(folder: Path, runs: dict[str, Path]) -> str:
    """A sweep of ten trials beside the runs: eight that ended, one that runs, one that waits; its key."""
    made = make_sweep(folder, [path for name, path in runs.items() if name.startswith("vit")])
    owner = Owner(number=0, host="elsewhere", boot_id="x", pid=1, pid_started=1, time=time.time())
    made.add_owner(8, owner)
    made.add_run(8, 0, TrialRun(path=str(runs["alive"]), first_attempt=0))
    return key_of(made.path)


@pytest.fixture(scope="module")
def dashboard(folder: Path, runs: dict[str, Path]) -> Iterator[Dashboard]:
    with running(str(folder), cache=folder.parent / "cache") as one:
        one.rows()
        yield one


@pytest.fixture(scope="module")
def page(dashboard: Dashboard) -> Iterator[Page]:
    with chromium() as one:
        yield one
        assert one.messages == []
        here = (f"http://127.0.0.1:{dashboard.port}/", "data:", "about:")
        assert [url for url in one.requests if not url.startswith(here)] == []


def start(page: Page, dashboard: Dashboard, address: str = "") -> None:
    """Open the page anew, as with the printed URL, then at an address."""
    page.resize(1400, 900)
    if not page.requests:
        page.open(dashboard.url)
        page.wait(f"document.querySelectorAll({ROWS!r}).length > 0")
    page.open("about:blank")
    page.open(f"http://127.0.0.1:{dashboard.port}/{address}")
    page.wait(f"document.querySelectorAll({ROWS!r}).length > 0 || document.querySelector('.parallel svg') !== null")


def test_the_table_and_the_curves(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    assert page.text("#count") == "42 runs"
    assert "token" not in page.js("location.href")
    header = " ".join(page.texts("table.runs thead th"))
    for column in ("Name", "State", "Step", "val/acc", "train/loss", "lr", "seed"):
        assert column in header
    for same in ("max_steps", "precision", "batch_size"):
        assert same not in header
    first = page.texts(ROWS)[0]
    assert first.startswith("alive")
    assert "running" in first
    assert "1,000 / 1,000" in first
    assert "failed" in page.texts(ROWS)[1]
    page.wait(DRAWN)
    assert page.texts(".panel h3") == ["val/acc", "train/loss", SCRIPT]
    page.screenshot(IMAGES / "test-light.png")
    page.resize(1400, 900, dark=True)
    assert page.wait("getComputedStyle(document.body).backgroundColor !== 'rgb(247, 247, 245)'")
    page.screenshot(IMAGES / "test-dark.png")


def test_typing_filters_without_asking_the_server(page: Page, dashboard: Dashboard) -> None:
    """The prototype rebuilt the table of all rows at each letter, after a request."""
    start(page, dashboard)
    page.wait(DRAWN)
    page.key("/")
    before = [url for url in page.requests if "/api/rows" not in url]
    page.js(OBSERVE)
    page.type("vit lr>0.005")
    assert page.wait("document.querySelector('#count').innerText === '10 of 42 runs'")
    assert all("vit" in row for row in page.texts(ROWS))
    after = [url for url in page.requests if "/api/rows" not in url]
    curves = [url for url in after[len(before) :] if "/api/curves" not in url and "/api/metrics" not in url]
    assert curves == []
    assert page.js("window.made") <= 12 * 60  # rows in view only, once for each letter
    page.wait("location.hash.includes('q=vit+lr%3E0.005')")
    page.reload()
    assert page.wait("document.querySelector('#count')?.innerText === '10 of 42 runs'")
    assert page.js("document.querySelector('#filter').value") == "vit lr>0.005"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("state=failed", 1),
        ("state=failed,running", 2),
        ("state!=finished", 2),
        ("name=v*", 20),
        ("name~esne", 20),
        ("optimizer.lr<=0.001 name=resnet", 10),
        ("seed=3", 1),
        ("step>=1000", 42),
        ("train/loss>", 42),
        ("nowhere=1", 0),
        ('"vit"', 20),
        ("(((", 0),
    ],
)
def test_the_filter(page: Page, dashboard: Dashboard, text: str, count: int) -> None:
    if page.js("document.querySelector('#filter') === null"):
        start(page, dashboard)
    page.js(
        f"(() => {{ const one = document.querySelector('#filter'); one.value = {text!r};"
        " one.dispatchEvent(new Event('input')); })()"
    )
    expected = "42 runs" if count == 42 else f"{count} of 42 runs"
    page.wait(f"document.querySelector('#count').innerText === {expected!r}")


def test_only_the_rows_in_view_are_in_the_document(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    page.resize(1400, 400)
    page.wait(f"document.querySelectorAll({ROWS!r}).length < 30")
    assert page.js("document.querySelector('table.runs').getAttribute('aria-rowcount')") == "43"
    page.js("document.querySelector('.scroller').scrollTop = 1e6")
    page.wait(f"[...document.querySelectorAll({ROWS!r})].at(-1).getAttribute('aria-rowindex') === '43'")
    assert page.js(f"document.querySelectorAll({ROWS!r}).length") < 30


def test_sorting_puts_the_best_first_and_unknown_values_last(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    page.js("[...document.querySelectorAll('.heading')].find((one) => one.title === 'train/loss').click()")
    page.js("[...document.querySelectorAll('.heading')].find((one) => one.title === 'train/loss').click()")
    page.wait("document.querySelector('th[aria-sort=ascending]')?.innerText.includes('train/loss')")
    title = page.js("document.querySelector('th[aria-sort]').innerText.trim()")
    column = page.texts("table.runs thead th").index(title)
    losses = [float(text) for text in page.texts(f"{ROWS} td:nth-child({column + 1})")]
    assert losses == sorted(losses)
    assert len(set(losses)) > 1


def test_colors_stay_when_others_are_chosen(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    color = "getComputedStyle(document.querySelector('table.runs tbody tr:nth-child(2) .pick input')).backgroundColor"
    own = page.js(color)
    name = page.texts(ROWS)[1]
    page.js("document.querySelector('table.runs tbody tr:nth-child(1) .pick input').click()")
    page.wait("document.querySelector('table.runs tbody tr').getAttribute('aria-selected') === 'false'")
    assert page.js(color) == own
    page.reload()
    page.wait(f"document.querySelectorAll({ROWS!r}).length > 3")
    assert page.texts(ROWS)[1] == name
    assert page.js(color) == own


def test_a_metric_is_found_by_typing_and_read_by_keys(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    page.wait(DRAWN)
    page.key("m")
    page.type("power")
    assert page.wait("document.querySelector('.combo-list [aria-selected=true]')?.innerText === 'gpu/power_w'")
    page.key("Enter")
    page.wait("document.querySelector('.panel h3').innerText === 'gpu/power_w'")
    page.wait(DRAWN)
    page.js(f"{LOSS}.querySelector('.canvas').focus()")
    page.key("End")
    page.wait("document.querySelector('#live').innerText.startsWith('step 1,000, alive: ')")
    page.key("ArrowLeft")
    page.wait("document.querySelector('#live').innerText.startsWith('step 990, alive: ')")
    page.key("ArrowDown")
    page.wait("document.querySelector('#live').innerText.startsWith('step 990, failed: ')")
    assert page.text(".panel:nth-child(3) .readout").startswith("step 990")
    page.key("t")
    table = page.wait("document.querySelector('.panel:nth-child(3) .plot-table table')?.innerText")
    assert "smallest" in table
    assert "alive" in table


def test_a_zoom_asks_for_its_detail_and_is_kept_in_the_address(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    page.wait(DRAWN)
    points = "[...document.querySelectorAll('.panel')].map((one) => Number(one.dataset.points))"
    before = page.js(points)
    page.drag(".panel .u-over", 0.4, 0.6)
    page.wait("location.hash.includes('z=')")
    page.wait(f"{points}.every((count, place) => count < {before}[place] / 2)")
    page.wait(DRAWN)
    (start_, end) = (float(one) for one in re.findall(r"z=([\d.]+)%7E([\d.]+)", page.js("location.hash"))[0])
    assert 300 < start_ < 500 < end < 700
    page.key("0")
    page.wait(f"JSON.stringify({points}) === '{str(before).replace(' ', '')}'")


def test_seeds_are_averaged_and_smoothing_keeps_the_raw_line(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard, "#/runs?q=vit&sm=0.9")
    page.wait(DRAWN)
    asked = page.js(
        "fetch('/api/curves', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify("
        "{metric: 'train/loss', runs: [document.querySelector('tr[data-key]').dataset.key], smoothing: 0.9})})"
        ".then((answer) => answer.arrayBuffer()).then((data) => new TextDecoder().decode(new Uint8Array(data, 4, 400)))"
    )
    assert '"raw_x"' in asked
    page.js(GROUP)
    page.wait("document.querySelectorAll('.legend li').length === 2")
    named = sorted(text.split(" ")[0] for text in page.texts(".legend li"))
    assert named == ["lr=0.001", "lr=0.01"]
    page.wait(DRAWN)
    page.screenshot(IMAGES / "test-groups.png")


def test_text_of_files_is_never_markup(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard, "#/runs?q=failed")
    page.js("document.querySelector('table.runs tbody a').click()")
    assert page.wait("document.querySelector('.reason')?.innerText") == f"ValueError: {SCRIPT}"
    start(page, dashboard, "#/runs?q=alive")
    page.js("document.querySelector('table.runs tbody a').click()")
    page.wait(DRAWN)
    assert SCRIPT in page.texts(".panel h3")
    for tab in ("config", "timeline", "logs", "checkpoints", "system"):
        page.js(f"document.querySelector('#tab-{tab}').click()")
        page.wait(f"document.querySelector('#tab-{tab}').ariaSelected === 'true'")
        if tab == "config":
            assert page.wait(f"document.querySelector('#part').innerText.includes({SCRIPT!r})")
    assert page.js("document.querySelectorAll('img').length") == 0
    assert "alive" in page.js("document.title")


def test_the_page_of_a_run(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard, "#/runs?q=alive")
    page.js("document.querySelector('table.runs tbody a').click()")
    head = page.wait("document.querySelector('.runhead')?.innerText")
    for text in ("running", "step 1,000 of 1,000", "640 samples/s", "Stop …"):
        assert text in head
    page.js("document.querySelector('#tab-timeline').click()")
    page.wait("document.querySelector('.stack')?.innerText.includes('Where the time went')")
    text = page.text(".stack")
    assert "train 20s" in text.replace("\n", " ")
    page.js("document.querySelector('#tab-logs').click()")
    page.wait("document.querySelector('.log')?.innerText.includes('step 199/1000')")
    (log,) = Path(str(dashboard.get("/api/rows")["rows"][0]["path"])).glob("logs/*/rank-0.log")
    with log.open("a") as file:
        file.write("something new\n")
    page.wait("document.querySelector('.log').innerText.includes('something new')")
    page.js("document.querySelector('#tab-system').click()")
    used = page.wait(
        "document.querySelector('#part')?.innerText.includes('gpu power') && document.querySelector('#part').innerText"
    )
    assert "1,500 W" in used
    rows = page.texts("#part section.sheet:nth-of-type(2) tbody tr")
    assert [" ".join(row.split()) for row in rows] == [
        "memory, tensors 1.00 GiB not measured",
        "training 5 min 0 s 21 s so far",
    ]
    assert "0.01667 kWh" in used
    page.js("document.querySelector('#tab-checkpoints').click()")
    page.wait("document.querySelector('#part').innerText.includes('No checkpoint')")
    page.js("document.querySelector('.runhead button').click()")
    assert "It saves a checkpoint and stops" in page.wait("document.querySelector('dialog[open]')?.innerText")
    page.key("Escape")
    page.wait("!document.querySelector('dialog')")
    page.js("history.back()")
    page.wait("document.querySelector('table.runs') !== null")


def test_the_curve_of_an_active_run_grows(page: Page, dashboard: Dashboard, runs: dict[str, Path]) -> None:
    start(page, dashboard, "#/runs?q=alive&m=train/loss")
    page.wait(DRAWN)
    before = page.js("Number(document.querySelector('.panel').dataset.points)")
    with (runs["alive"] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1010, "epoch": 2, "time": 4e9, "train/loss": 0.25}\n')
    page.wait(f"Number(document.querySelector('.panel').dataset.points) === {before} + 1")


def test_parameters_are_ranked_and_chosen(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard, "#/runs?q=vit")
    page.js("[...document.querySelectorAll('#header nav a')].find((one) => one.innerText === 'Parameters').click()")
    assert page.wait("document.querySelector('#count')?.innerText") == "20 runs with val/acc"
    assert page.texts(".importance tbody tr")[0].startswith("optimizer.lr")
    assert page.js("document.querySelectorAll('.parallel .line').length") == 20
    page.js("document.querySelector('.grab[data-axis=\"optimizer.lr\"]').focus()")
    page.key("ArrowUp")
    page.wait("document.querySelector('#count').innerText === '10 of 20 runs with val/acc'")
    page.wait("document.querySelector('#live').innerText.startsWith('0.001')")
    page.screenshot(IMAGES / "test-parameters.png")
    page.key("Escape")
    page.wait("document.querySelector('#count').innerText === '20 runs with val/acc'")


def test_the_trials_of_a_sweep(page: Page, dashboard: Dashboard, sweep: str) -> None:
    start(page, dashboard, f"#/parameters?sweep={sweep}")
    page.wait("document.querySelector('#count')?.innerText === '9 runs with val/acc'")
    assert page.texts(".importance tbody tr")[0].startswith("optimizer.lr")
    assert "running" in page.text(".stack section:last-child")  # the state of its run
    rows = page.texts(".stack table tbody tr:has(a), .stack table tbody tr:has(.state)")
    assert rows[0].startswith("vit-")
    assert "trial 7" in rows[0]
    assert "0.87" in rows[0]
    assert page.js("document.querySelector('[aria-label=Sweep]').selectedOptions[0].innerText").startswith("search ")
    page.js("document.querySelector('.stack table a').click()")
    page.wait("document.querySelector('.runhead h1')?.innerText.startsWith('vit')")


def test_a_screen_reader_is_given_the_whole_page(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    page.wait(DRAWN)
    nodes = page.accessibility()
    named = {(node["role"], node["name"]) for node in nodes}
    for role, name in (
        ("searchbox", "Filter the runs"), ("grid", "Runs"), ("combobox", "x axis"), ("slider", "Smoothing"),
        ("combobox", "Add a metric"), ("region", "train/loss"), ("button", "log y"), ("main", ""), ("banner", ""),
    ):  # fmt: skip
        assert (role, name) in named
    charts = [node["name"] for node in nodes if node["role"] == "group"]
    charts = [name for name in charts if name.startswith("train/loss by step, 8 lines")]
    assert "alive ends at" in charts[0]
    assert {node["name"] for node in nodes if node["role"] == "columnheader"} >= {"Name", "State", "train/loss"}
    assert [node for node in nodes if node["role"] in CONTROLS and not node["name"].strip()] == []


def test_a_narrow_window_shows_one_part_at_a_time(page: Page, dashboard: Dashboard) -> None:
    start(page, dashboard)
    page.resize(390, 800)
    wide = "document.documentElement.scrollWidth"
    page.wait(f"{wide} <= 390")
    assert page.js("getComputedStyle(document.querySelector('.pane.charts')).display") == "none"
    page.click("[data-pane=charts]")
    page.wait("getComputedStyle(document.querySelector('.pane.table')).display === 'none'")
    page.wait(DRAWN)
    assert page.js(wide) <= 390
    page.screenshot(IMAGES / "test-narrow.png")


def test_a_server_that_has_ended_is_said(folder: Path, runs: dict[str, Path]) -> None:
    with chromium() as page:
        with running(str(runs["failed"]), cache=folder.parent / "cache") as one:
            page.open(one.url)
            page.wait(f"document.querySelectorAll({ROWS!r}).length === 1")
        page.wait("document.querySelector('[role=alert]')?.innerText.includes('does not answer')")
        assert page.texts(ROWS)[0].startswith("failed")
