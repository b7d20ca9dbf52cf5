"""Flaws on purpose: an independent reader finds exactly what the plan and the record announce."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections import Counter
from datetime import date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Iterator

import pytest

import generator
from conftest import DAYS, contents, files_below, refused, report, upload, wattif
from server import Server

ALL = "missing=1%,duplicate=0.5%,disorder=2%,late=1.5%,null=0.01,spike=.02,malformed=3%"
SHARES = {
    "missing": Fraction(1, 100),
    "duplicate": Fraction(1, 200),
    "disorder": Fraction(2, 100),
    "late": Fraction(3, 200),
    "null": Fraction(1, 100),
    "spike": Fraction(2, 100),
    "malformed": Fraction(3, 100),
}
THREE_DAYS = ("--start", "2024-02-28", "--end", "2024-03-01")
ROW = re.compile(r'\{"meter_id":"0A[0-9A-F]{10}","timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ","reading":(.{5})\}')
BROKEN = re.compile(r'\{"meter_id":"0A[0-9A-F]{10}","timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ')


# Of 8 meters, 96 rows and two days with all flaws, one file after the other in the order of names.
PINNED = "38bb46352e9814726e9351d24fb6699835bb4fb517e2400c948ec3335aad7bcf"


def expected_counts(rows: int) -> dict[str, int]:
    """Say how many rows of a meter-day have each flaw."""
    return {kind: max(1, int(share * rows + Fraction(1, 2))) for kind, share in SHARES.items()}


def lines_of(content: bytes) -> Iterator[tuple[str, str, str, str]]:
    """Yield each line with its meter, timestamp and what is known of its reading: 'broken', or the five characters."""
    text = content.decode()
    assert text.endswith("\n")
    for line in text.splitlines():
        whole = ROW.fullmatch(line)
        assert whole or BROKEN.fullmatch(line), line
        if whole:
            parsed = json.loads(line)
            assert list(parsed) == ["meter_id", "timestamp", "reading"]
        yield line, line[13:25], line[40:60], whole[1] if whole else "broken"


def blocks(content: bytes) -> Iterator[list[tuple[str, str, str, str]]]:
    """Yield the lines of a file meter by meter."""
    lines = list(lines_of(content))
    first = 0
    for number in range(1, len(lines) + 1):
        if number == len(lines) or lines[number][1] != lines[first][1]:
            yield lines[first:number]
            first = number


def find_flaws(day: str, interval: int, rows: int, lines: list, clean: dict[str, str]) -> dict[str, Any]:
    """Find the flaws of a meter-day. `clean` has the meter's reading of each timestamp, of all days."""
    steps = {
        f"{datetime.fromisoformat(day) + timedelta(seconds=interval * n):%Y-%m-%dT%H:%M:%SZ}": n for n in range(rows)
    }
    own = [line for line in lines if line[2] in steps]
    late_here = [line for line in lines if line[2] not in steps]
    assert lines == own + late_here  # late ones come last
    assert [line[2] for line in late_here] == sorted(line[2] for line in late_here)
    before = f"{date.fromisoformat(day) - timedelta(days=1)}"
    assert all(line[2].startswith(before) for line in late_here)
    found: Counter[str] = Counter()
    places: dict[str, list[int]] = {}
    numbers = [steps[line[2]] for line in own]
    for place, number in enumerate(numbers):
        kind = {"null ": "null", "999.9": "spike", "broken": "malformed"}.get(own[place][3])
        if place and number == numbers[place - 1]:
            assert own[place] == own[place - 1] and not kind
            kind = "duplicate"
        elif place + 1 < len(numbers) and numbers[place + 1] == number - 1:
            assert not kind and own[place + 1][3].startswith("0.")
            kind = "disorder"
            number -= 1
        elif not kind:
            assert own[place][3] == clean[own[place][2]]
        if kind:
            found[kind] += 1
            places.setdefault(kind, []).append(number)
    assert all(line[3] == clean[line[2]] for line in late_here)
    absent = sorted(set(range(rows)) - set(numbers))
    return {"found": found, "absent": absent, "late": [line[2] for line in late_here], "places": places}


@pytest.mark.parametrize("more", [(), ("--gzip",), ("--meters-per-file", 2)])
@pytest.mark.parametrize("interval", [10, 900])
def test_a_reader_finds_exactly_what_is_announced(tmp_path: Path, interval: int, more: tuple) -> None:
    flags = (*THREE_DAYS, "--meters", 3, "--interval", interval, *more, "--processes", 1)
    # The day before, too, for the rows that come late on the first day.
    before = ("--start", "2024-02-27", "--end", "2024-03-01", *flags[4:])
    assert wattif(*before, "--output-dir", tmp_path / "clean").returncode == 0
    done = wattif(*flags, "--flaws", ALL, "--output-dir", tmp_path / "flawed", "--json")
    told, rows = report(done), 86_400 // interval
    open_file = gzip.decompress if "--gzip" in more else bytes
    clean: dict[str, dict[str, str]] = {}
    for content in files_below(tmp_path / "clean").values():
        for _, meter, moment, reading in lines_of(open_file(content)):
            clean.setdefault(meter, {})[moment] = reading
    totals, delivered, parsed, other, total = Counter(), 0, 0, 0, Decimal(0)
    distinct: set[tuple[str, str]] = set()
    late_by_day: dict[tuple[str, str], list[str]] = {}
    absent_by_day: dict[tuple[str, str], list[str]] = {}
    for name, content in files_below(tmp_path / "flawed").items():
        day = name[3:13]
        for lines in blocks(open_file(content)):
            meter = lines[0][1]
            found = find_flaws(day, interval, rows, lines, clean[meter])
            counts = expected_counts(rows)
            assert {kind: counts[kind] for kind in found["found"]} == found["found"]
            assert len(found["absent"]) == counts["missing"] + counts["late"] and len(found["late"]) == counts["late"]
            late_by_day[meter, day] = found["late"]
            midnight = datetime.fromisoformat(day)
            moments = (midnight + timedelta(seconds=interval * number) for number in found["absent"])
            absent_by_day[meter, day] = [f"{moment:%Y-%m-%dT%H:%M:%SZ}" for moment in moments]
            totals.update(found["found"])
            delivered += len(lines)
            parsed += sum(line[3] != "broken" for line in lines)
            other += len(found["late"])
            distinct.update((meter, line[2]) for line in lines if line[3] != "broken")
            total += sum(Decimal(line[3]) for line in lines if line[3].startswith("0."))
    for (meter, day), moments in late_by_day.items():  # what comes late is what the day before lacks
        if day != "2024-02-28":
            assert set(moments) <= set(absent_by_day[meter, f"{date.fromisoformat(day) - timedelta(days=1)}"])
    assert {**totals, "missing": 9 * expected_counts(rows)["missing"], "late": other} == told["flaws"]
    assert told["rows_delivered"] == delivered and told["rows_parsed"] == parsed
    assert told["rows_distinct"] == len(distinct) and told["rows_of_another_date"] == other
    assert Decimal(told["readings_sum"]) == total and told["readings"] == 9 * rows
    assert told["bytes"] == sum(map(len, files_below(tmp_path / "flawed").values()))
    assert wattif(*flags, "--flaws", ALL, "--output-dir", tmp_path / "flawed", "--verify").returncode == 0


def test_the_plan_tells_the_truth_before_anything_is_made(tmp_path: Path) -> None:
    done = wattif(*DAYS, "--meters", 20, "--flaws", "late=1%,duplicate=0.1%", "--output-dir", tmp_path, "--dry-run")
    assert "\nflaws        360 duplicate, 3,440 late\n" in done.stdout
    assert "\nrows         345,960 delivered, 345,960 parsed, 345,600 distinct, 3,440 of another date\n" in done.stdout
    assert done.returncode == 0 and not files_below(tmp_path)


def test_flaws_do_not_depend_on_their_order_or_the_split_of_the_work(tmp_path: Path) -> None:
    flags = (*DAYS, "--meters", 8, "--interval", 900)
    assert wattif(*flags, "--flaws", ALL, "--output-dir", tmp_path / "one", "--processes", 1).returncode == 0
    wanted = files_below(tmp_path / "one")
    other = ",".join(reversed(ALL.split(",")))
    assert wattif(*flags, "--flaws", other, "--output-dir", tmp_path / "three", "--processes", 3).returncode == 0
    for index in range(4):
        task = ("--task-index", index, "--task-count", 4)
        assert wattif(*flags, "--flaws", ALL, "--output-dir", tmp_path / "four", *task).returncode == 0
    assert wanted == files_below(tmp_path / "three") == files_below(tmp_path / "four")
    assert wattif(*flags, "--output-dir", tmp_path / "clean").returncode == 0
    assert files_below(tmp_path / "clean") != wanted
    assert hashlib.sha256(b"".join(wanted[name] for name in sorted(wanted))).hexdigest() == PINNED


@pytest.mark.parametrize("rows", [4, 7, 96])
def test_all_ways_to_place_flaws_are_equally_likely(rows: int) -> None:
    counts = {"missing": 1, "disorder": 1}
    ways: Counter[Any] = Counter(tuple(generator.draw_flaws(str(n), rows, counts)) for n in range(40_000))
    # A row for the one and a pair for the other: the pair begins at rows - 1 places, of the others 2 are taken.
    assert all(len({row for row, _ in way}) == 2 for way in ways)
    possible = (rows - 1) * (rows - 2)
    even = 40_000 / possible
    statistic = sum((count - even) ** 2 / even for count in ways.values()) + even * (possible - len(ways))
    assert len(ways) <= possible and statistic < possible + 5 * (2 * possible) ** 0.5
    for way in ways:
        taken = {kind: row for row, kind in way}
        assert taken["disorder"] < rows - 1 and taken["missing"] not in (taken["disorder"], taken["disorder"] + 1)


@pytest.mark.parametrize("kind", generator.FLAWS)
def test_flawed_rows_are_spread_evenly_over_the_day(kind: str) -> None:
    hours: Counter[int] = Counter()
    for number in range(300):
        hours.update(row // 360 for row, _ in generator.draw_flaws(str(number), 8640, {kind: 86}))
    even = 300 * 86 / 24
    assert sum((hours[hour] - even) ** 2 / even for hour in range(24)) < 63  # 1 in 100,000 by chance, with 23 degrees


def test_half_of_the_rows_may_have_flaws(tmp_path: Path) -> None:
    for rows in (2, 3, 24):
        half = generator.draw_flaws("a", rows, {"disorder": rows // 2})
        assert [row for row, _ in half] == sorted(row for row, _ in half) and half[-1][0] < rows - 1
        assert all(later - row >= 2 for (row, _), (later, _) in zip(half, half[1:]))
    done = wattif(*DAYS, "--meters", 1, "--interval", 3600, "--flaws", "disorder=50%", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flaws", "words"),
    [
        *(
            (text, "--flaws: ")
            for text in ("", "late", "late=", "late=x", "late=1%,", ",late=1%", "late=-1%", "late=1e-3")
        ),
        *((text, "above 0 and below 1") for text in ("late=0", "late=0%", "late=1", "late=100%", "late=1.5")),
        ("lost=1%", "each KIND once, of missing, duplicate, disorder, late, null, spike, malformed"),
        ("late=1%,null=1%,late=2%", "'late=2%' is not KIND=SHARE"),
        ("late=40%,null=11%", "--flaws has 4,406 of a meter-day's 8,640 rows; at most half"),
    ],
)
def test_a_malformed_specification_is_one_line(tmp_path: Path, flaws: str, words: str) -> None:
    done = wattif(*DAYS, "--meters", 1, "--output-dir", tmp_path, "--flaws", flaws)
    refused(done, "--flaws")
    assert words in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--start", "0001-01-01", "--end", "0001-01-01", "--flaws", "late=1%"),
            "--start 0001-01-01 has no day before",
        ),
        ((*DAYS, "--interval", 86_400, "--flaws", "null=1%"), "1 of a meter-day's 1 rows"),
    ],
)
def test_flaws_that_cannot_be_are_one_line(tmp_path: Path, flags: tuple, words: str) -> None:
    done = wattif(*flags, "--meters", 1, "--output-dir", tmp_path)
    refused(done, words)
    assert not files_below(tmp_path)


@pytest.mark.parametrize(
    "place",
    [
        ("--bucket", "gs://a-bucket/sets/one/"),
        ("--bucket", "gs://a-bucket", "--prefix", "sets/one"),
        ("--prefix", "sets/one/"),
    ],
)
def test_a_bucket_has_a_place_for_each_set(tmp_path: Path, place: tuple) -> None:
    flags = (*DAYS, "--meters", 5, "--interval", 3600, "--temp-dir", tmp_path / "temp")
    assert wattif(*flags[:-2], "--output-dir", tmp_path / "wanted", "--prefix", "sets/one").returncode == 0
    wanted = files_below(tmp_path / "wanted")
    assert all(name.startswith("sets/one/dt=2024-01-0") for name in wanted) and len(wanted) == 10
    with Server() as server:
        assert upload(server, *flags, "--seed", 1).returncode == 0  # which is another set
        others = dict(contents(server))
        done = upload(server, *flags, *place, "--json")
        assert done.returncode == 0 and report(done)["destination"] == "gs://a-bucket/sets/one"
        assert "gs://a-bucket/sets/one/dt=YYYY-MM-DD/\n" in done.stderr
        assert contents(server) == {**others, **wanted}
        assert upload(server, *flags, *place, "--verify").returncode == 0
        del server.objects[min(wanted)]
        done = upload(server, *flags, *place, "--verify", "--json")
        assert report(done)["failures"] == [f"missing: {min(wanted)}"]
        done = upload(server, *flags, *place, "--resume", "--json")
        assert done.returncode == 0 and report(done)["objects_skipped"] == 9 and report(done)["objects_unexpected"] == 0
        assert contents(server) == {**others, **wanted}
    done = wattif(*flags[:-2], "--output-dir", tmp_path / "wanted", "--prefix", "sets/one", "--verify")
    assert done.returncode == 0, done.stderr


def test_resume_says_what_it_does_not_make(tmp_path: Path) -> None:
    flags = (*DAYS, "--meters", 20, "--interval", 3600, "--temp-dir", tmp_path / "temp")
    with Server(page=7) as server:
        assert upload(server, *flags, "--seed", 1).returncode == 0
        done = upload(server, *flags, "--resume", "--json", "--processes", 3)
    told = report(done)
    assert done.returncode == 0 and told["objects_done"] == 40 and told["objects_unexpected"] == 40
    assert "\nunexpected objects in gs://a-bucket: 40; another shape or seed there doubles the rows" in done.stderr


def test_a_bucket_with_flaws_is_verified_and_resumed(tmp_path: Path) -> None:
    flags = (*DAYS, "--meters", 10, "--interval", 900, "--temp-dir", tmp_path / "temp", "--flaws", ALL)
    with Server(page=3) as server:
        done = upload(server, *flags, "--json")
        assert done.returncode == 0 and report(done)["readings_sum"]
        assert upload(server, *flags, "--verify").returncode == 0
        names = sorted(server.objects)
        changed = server.objects[names[3]]
        content = changed.content.replace(b"999.9", b"999.8", 1)
        server.objects[names[3]] = changed._replace(content=content, crc32c=Server.crc32c(content))
        assert report(upload(server, *flags, "--verify", "--json"))["failures"] == [f"different: {names[3]}"]
        del server.objects[names[5]]
        done = upload(server, *flags, "--resume", "--json")
        told = report(done)
        assert done.returncode == 0 and told["objects_skipped"] == 19 and told["readings_sum"] is None
        # A day that was made with other flaws: the sizes differ.
        other = (*flags[:-1], "malformed=5%")
        assert report(upload(server, *other, "--resume", "--json"))["objects_done"] == 20
        assert upload(server, *other, "--verify").returncode == 0 and len(contents(server)) == 20
