"""The data contract: rows, files, the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest

import generator
from conftest import DAYS, files_below, wattif

# Of the files of the fixture, one after the other in the order of names: pipelines rely on every byte.


PINNED = "5e980024da77aaa77ebb76018001e57cf257b95067d112e2ef64b29f3cdc5fb9"


CHI_SQUARE = {8: 42.7, 9: 44.8, 899: 1115.0}


def chi_square(counts: Counter, cells: int) -> float:
    """Pearson's statistic of counts against an even distribution over `cells`."""
    even = sum(counts.values()) / cells
    return sum((counts[cell] - even) ** 2 / even for cell in range(cells))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of 40 meters over two days."""
    directory = tmp_path_factory.mktemp("contract")
    done = wattif(*DAYS, "--meters", 40, "--output-dir", directory)
    assert done.returncode == 0, done.stderr
    return files_below(directory)


def test_files_are_one_for_each_meter_and_day(files: dict[str, bytes]) -> None:
    names = [re.fullmatch(r"dt=(2024-01-0[12])/(0A0000[0-9A-F]{6})\.ndjson", name) for name in files]
    assert all(names) and len(names) == 80
    assert Counter(match[1] for match in names) == {"2024-01-01": 40, "2024-01-02": 40}
    assert len({match[2] for match in names}) == 40


def test_every_row_is_as_the_contract_says(files: dict[str, bytes]) -> None:
    row = re.compile(rb'\{"meter_id":"([0-9A-F]{12})","timestamp":"([0-9TZ:-]{20})","reading":0\.[0-8][0-9]{2}\}\n')
    for name, content in files.items():
        day, meter = name[3:13], name[14:26].encode()
        midnight = datetime.fromisoformat(day)
        times = [(midnight + timedelta(seconds=second)).isoformat().encode() + b"Z" for second in range(0, 86_400, 10)]
        assert len(content) == 8640 * 79  # so there is nothing but what matches
        assert row.findall(content) == [(meter, time) for time in times]


def test_rows_are_json(files: dict[str, bytes]) -> None:
    name, content = next(iter(files.items()))
    rows = [json.loads(line) for line in content.splitlines()]
    assert all(type(row["reading"]) is float and 0.0 <= row["reading"] < 0.9 for row in rows)
    assert rows[1] == {"meter_id": name[14:26], "timestamp": f"{name[3:13]}T00:00:10Z", "reading": rows[1]["reading"]}
    assert len({row["reading"] for row in rows}) > 890  # of 900 levels


def test_readings_are_even_over_all_levels_and_decimals(files: dict[str, bytes]) -> None:
    levels: Counter = Counter()
    for content in files.values():
        levels.update(int(content[start : start + 3]) for start in range(74, len(content), 79))
    assert sum(levels.values()) == 80 * 8640
    assert chi_square(levels, 900) < CHI_SQUARE[899]
    for divisor, cells in ((100, 9), (10, 10), (1, 10)):
        digits: Counter = Counter()
        for level, count in levels.items():
            digits[level // divisor % 10] += count
        assert chi_square(digits, cells) < CHI_SQUARE[cells - 1]


def test_meters_and_days_have_readings_of_their_own(files: dict[str, bytes]) -> None:
    readings = {bytes(content[74::79] + content[76::79]) for content in files.values()}
    assert len(readings) == len(files)


def test_bytes_are_pinned(files: dict[str, bytes]) -> None:
    assert hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest() == PINNED


@pytest.mark.parametrize("interval", [1, 480, 900, 86_400])
def test_rows_follow_the_interval(tmp_path: Path, interval: int) -> None:
    done = wattif(
        "--start", "2023-02-28", "--end", "2023-03-01", "--meters", 2, "--interval", interval, "--output-dir", tmp_path
    )
    assert done.returncode == 0, done.stderr
    contents = files_below(tmp_path)
    assert len(contents) == 4
    for name, content in contents.items():
        rows = [json.loads(line) for line in content.splitlines()]
        times = [f"{s // 3600:02d}:{s // 60 % 60:02d}:{s % 60:02d}" for s in range(0, 86_400, interval)]
        assert [row["timestamp"] for row in rows] == [f"{name[3:13]}T{time}Z" for time in times]
        assert len(content) == 79 * len(rows)


def test_a_leap_day_and_the_last_year_are_days_like_others(tmp_path: Path) -> None:
    for first, last, days in (("2024-02-28", "2024-03-01", 3), ("9999-12-31", "9999-12-31", 1)):
        directory = tmp_path / first
        done = wattif("--start", first, "--end", last, "--meters", 1, "--interval", 3600, "--output-dir", directory)
        assert done.returncode == 0 and len(files_below(directory)) == days, done.stderr


def test_batches_and_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    made = []
    for number, tuning in enumerate([(), ("--batch-size", 3, "--write-workers", 4), ("--batch-size", 1000)]):
        directory = tmp_path / str(number)
        assert wattif(*DAYS, "--meters", 11, "--interval", 600, "--output-dir", directory, *tuning).returncode == 0
        made.append(files_below(directory))
    assert made[0] == made[1] == made[2] and len(made[0]) == 22


def test_the_seed_determines_fleet_and_readings(tmp_path: Path) -> None:
    for seed in (1, 2):
        flags = ("--meters", 5, "--interval", 600, "--seed", seed, "--output-dir", tmp_path / str(seed))
        assert wattif(*DAYS, *flags).returncode == 0
    first, second = files_below(tmp_path / "1"), files_below(tmp_path / "2")
    assert not set(first) & set(second) and not set(first.values()) & set(second.values())


def test_no_meter_id_can_be_taken_for_a_number(files: dict[str, bytes]) -> None:
    for name in files:
        with pytest.raises(ValueError, match="could not convert"):
            float(name[14:26])


def test_a_meter_stamped_after_one_of_another_block_is_whole() -> None:
    template = generator.render_day_template(date(2024, 1, 1), 3600)
    meters = [0x0A0000ABCDEF, 0x0AFFFF123456, 0x0A0000ABCDEF]
    made = [
        bytes(rows) for rows in generator.generate_smart_meter_readings_for_day(date(2024, 1, 1), template, meters, 0)
    ]
    assert made[0] == made[2] != made[1]
    assert [json.loads(line)["meter_id"] for line in made[1].splitlines()] == ["0AFFFF123456"] * 24


def test_few_rows_are_drawn_again_until_there_are_enough() -> None:
    # One row draws few bytes, so among many keys some have none that is even: all must still give three digits.
    columns = [generator.draw_digits(f"key {number}", 1) for number in range(20_000)]
    assert all(len(column) == 1 for digits in columns for column in digits)
    counts = Counter(int(first) for first, _, _ in columns)
    assert chi_square(counts, 9) < CHI_SQUARE[8]
