"""How times, sizes, amounts and shares are written: in the tables, `show`, `plan`, the follow bar and the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from trainer.cli import common, ls_output
from trainer.core import units
from trainer.launch import bar
from trainer.report import scale, words
from trainer.runs import bill_text

TEXTS: list[tuple[Callable[[Any], str], dict[Any, str]]] = [
    (units.gib, {0: "0.0 MiB", 2**27 - 1: "128.0 MiB", 2**27: "0.12 GiB", 3 * 2**30: "3.00 GiB"}),
    (
        units.seconds,
        {
            0: "0 ms",
            0.0123: "12.3 ms",
            0.1: "0.1 s",
            12.34: "12.3 s",
            999.4: "999 s",
            999.6: "1,000 s",
            1234: "1,234 s",
        },
    ),
    (units.three_digits, {0: "0", 0.01234: "0.0123", 123.4: "123", 15360.0: "15,360"}),
    (units.duration, {0: "0 s", 59.6: "1 min 0 s", 3599.6: "1 h 0 min", 7320: "2 h 2 min", 90000: "1 d 1 h"}),
    (
        common.duration,
        {0: "0s", 59.9: "59s", 60: "1m", 3599: "59m", 86400: "1d", 200000: "2d", math.inf: "?", math.nan: "?"},
    ),
    (
        common.size,
        {
            **{None: "", 0: "0 B", 999: "999 B", 1000: "1 kB", 648_000: "648 kB"},
            **{999_600: "1 MB", 1_234_567_890: "1.23 GB", 999_600_000: "1 GB", 5 * 10**15: "5,000 TB"},
        },
    ),
    (common.number, {None: "", 0.123456: "0.1235", "none": "none", 3: "3", math.nan: "nan"}),
    (bar.duration, {0: "0:00", 65: "1:05", 59.6: "1:00", 3723: "1:02:03", 183_840: "2 d 03:04", math.inf: "?"}),
    (bar.short, {4.5: "4.50", 45.25: "45.2", 912: "912", 4520: "4,520", 45_200: "45.2k", 1.2e6: "1.20M", 3e9: "3.00G"}),
    (
        words.span,
        {
            **{None: "not known", -1.0: "not known", math.nan: "not known", 0.04: "0.0 s", 9.94: "9.9 s", 9.96: "10 s"},
            **{59.4: "59 s", 59.7: "1 min", 90.0: "1 min 30 s", 3599.7: "1 h", 11_520.0: "3 h 12 min"},
            **{86_399.9: "1 d", 100_000.0: "1 d 3 h"},
        },
    ),
    (words.percent, {None: "not known", 0.0: "0.0%", 0.9949: "99.5%", 0.996: "99.6%", 0.9996: "100%", 1.0: "100%"}),
    (words.number, {None: "-", True: "True", 12345: "12,345", 0.123456: "0.1235", "x": "x"}),
    (words.moment, {None: None, -1.0: None, math.nan: None, 5e9: None, 0.0: "1970-01-01 00:00 UTC"}),
    (scale.short, {0: "0", 1500: "1500", 15_000: "15k", -2e7: "-20M", 3e9: "3G", 3e-5: "3e-5", 0.05: "0.05"}),
    (bill_text.energy, {None: "not measured", 0.5: "500 Wh", 1: "1 kWh", 1234.5: "1,234 kWh", 1e-7: "0.000100 Wh"}),
    (bill_text.co2, {None: "not known", 0.25: "250 g CO2e", 2.5: "2.5 kg CO2e"}),
]


@pytest.mark.parametrize(("write", "texts"), TEXTS, ids=[f"{one.__module__}.{one.__qualname__}" for one, _ in TEXTS])
def test_numbers_as_text(write: Callable[[Any], str], texts: dict[Any, str]) -> None:
    assert {value: write(value) for value in texts} == texts


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [
        (None, "EUR", "not known"),
        (0.0, "EUR", "0.00 EUR"),
        (0.004, "EUR", "<0.01 EUR"),
        (1234.5, None, "1,234.50"),
    ],
)
def test_amounts_of_money(amount: float | None, currency: str | None, text: str) -> None:
    assert bill_text.money(amount, currency) == text


@pytest.mark.parametrize(
    ("values", "column"),
    [
        ([1, None, 2], [1, None, 2]),
        ([True, None], [True, None]),
        ([1, 2.5, "nan", None], [1.0, 2.5, pytest.approx(math.nan, nan_ok=True), None]),
        ([1, True], ["1", "true"]),
        ([1, "a", [2], None], ["1", "a", "[2]", None]),
        ([2**63, 1], [str(2**63), "1"]),  # a column of numbers has 64 bits
        ([10**400, 0.5], [str(10**400), "0.5"]),
        ([], []),
    ],
)
def test_a_column_of_a_parquet_file_has_one_type(values: list[Any], column: list[Any]) -> None:
    assert ls_output._column(values) == column


def test_columns_are_named_once_and_at_least_one() -> None:
    assert ls_output.split_columns(" id, lr ,,id") == ["id", "lr"]
    assert ls_output.split_columns("+val/acc,id") == [*ls_output.DEFAULT, "val/acc"]
    for text in ("", "+", " , "):
        with pytest.raises(Exception, match="--columns names no column"):
            ls_output.split_columns(text)


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0.0, 10.0, False, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
        (-1.0, 1.0, False, [-1.0, -0.5, 0.0, 0.5, 1.0]),
        (3.0, 3.0, False, [3.0]),
        (-math.inf, math.inf, False, []),
        (1e-4, 1.0, True, [1e-4, 1e-3, 1e-2, 1e-1, 1.0]),
        (0.9, 25.0, True, [1.0, 10.0]),
        (2.0, 25.0, True, [2.0, 5.0, 10.0, 20.0]),
        (3.0, 4.0, True, [3.0, 3.2, 3.4, 3.6, 3.8, 4.0]),
        (1e-300, 1e300, True, [10.0**power for power in range(-242, 300, 121)]),
    ],
)
def test_marks_of_an_axis_are_round(low: float, high: float, log: bool, ticks: list[float]) -> None:
    assert scale.Scale(low, high, 0, 100, log=log).ticks(5) == pytest.approx(ticks)


def test_an_axis_covers_its_values_and_has_equal_ones_in_the_middle() -> None:
    axis = scale.covering([1.0, 3.0], 0, 110)
    assert [axis(value) for value in (1.0, 2.0, 3.0)] == pytest.approx([5, 55, 105])
    axis = scale.covering([1.0, 100.0], 0, 110, log=True)
    assert [axis(value) for value in (1.0, 10.0, 100.0)] == pytest.approx([5, 55, 105])
    for log in (False, True):
        assert scale.covering([2.0, 2.0], 0, 110, log=log)(2.0) == pytest.approx(55)
    assert scale.covering([0.0], 0, 110)(0.0) == 55


def test_a_time_of_less_than_a_second_is_not_none() -> None:
    assert [units.duration(value) for value in (0, 0.0012, 0.46, 1, 40)] == ["0 s", "1.2 ms", "0.46 s", "1 s", "40 s"]
