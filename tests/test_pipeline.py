"""The pipeline: the order of uploads, batches, processes, and what their results add up to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Callable

import pytest

from conftest import DAY, DAYS, contents, files_below, listings, planned, upload, wattif
from server import Index, Request, Server, StoredObject

ONE = (*DAYS, "--processes", "1")
SMALL = (*ONE, "--interval", "3600")
DAILY = (*DAY, "--interval", "86400")  # files of one row


def parts_touched(arrivals: list[str], count: int, processes: int = 1) -> int:
    """Return how many of 16 equal parts of the sorted names any `count` arrivals in a row touch, at the least.

    Only the time in which all processes are at work is looked at: each one covers its own range of the names.
    """
    place = {name: position for position, name in enumerate(sorted(arrivals))}
    parts = [16 * place[name] // len(arrivals) for name in arrivals]
    slices = [processes * place[name] // len(arrivals) for name in arrivals]
    begin = max(slices.index(number) for number in range(processes))
    end = len(slices) - max(slices[::-1].index(number) for number in range(processes))
    assert end - begin > len(arrivals) // 4, "the processes hardly worked at the same time"
    return min(len(set(parts[first : first + count])) for first in range(begin, end - count + 1))


def arrivals_of(*flags: Any, objects: dict[str, StoredObject] | None = None) -> list[str]:
    """Upload to a server that has some objects already, and return the names of what arrives, in that order."""
    arrivals: list[str] = []

    def note(request: Request) -> None:
        if request.name:
            arrivals.append(request.name)

    with Server(fault=note) as server:
        server.objects.update(objects or {})
        done = upload(server, *DAILY, *flags)
        assert done.returncode == 0, done.stderr
        assert len(server.objects) == planned(done.stderr, "objects")
    return arrivals


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (1, ("--meters", 4800)),
        (1, ("--meters", 4800, "--meters-per-file", 2)),
        # Several processes at one pace, so that none of them begins or ends long before the others.
        (2, ("--meters", 2400, "--gzip", "--rps-limit", 500)),
        (4, ("--meters", 2400, "--rps-limit", 500)),
    ],
)
def test_uploads_are_spread_over_the_names_of_the_day(tmp_path: Path, processes: int, flags: tuple) -> None:
    arrivals = arrivals_of(*flags, "--processes", processes, "--temp-dir", tmp_path)
    assert len(arrivals) == len(set(arrivals)) >= 2400
    assert parts_touched(arrivals, 200, processes) >= 12


def test_batches_of_one_file_are_spread_over_the_names_of_the_day(tmp_path: Path) -> None:
    flags = ("--meters", 60_000, "--meters-per-file", 100, "--batch-size", 100, "--processes", 1)
    arrivals = arrivals_of(*flags, "--temp-dir", tmp_path)
    assert len(arrivals) == 600 and parts_touched(arrivals, 100) >= 12


@pytest.mark.parametrize("left", ["every second", "the first half"])
def test_what_resume_uploads_is_spread_over_its_names(tmp_path: Path, left: str) -> None:
    assert wattif(*DAILY, "--meters", 2400, "--output-dir", tmp_path / "out").returncode == 0
    files = files_below(tmp_path / "out")
    names = sorted(files)
    there = names[::2] if left == "every second" else names[:1200]
    objects = {name: StoredObject(len(files[name]), "", "", files[name]) for name in there}
    flags = ("--meters", 2400, "--resume", "--processes", 1, "--temp-dir", tmp_path / "temp")
    arrivals = arrivals_of(*flags, objects=objects)
    assert sorted(arrivals) == sorted(set(names) - set(there))
    assert parts_touched(arrivals, 200) >= 12


def test_an_index_in_the_order_of_names_is_split_and_all_objects_arrive(
    expected: Callable[..., dict], tmp_path: Path
) -> None:
    # The model answers 429 to what a range cannot take, and splits a range that has been busy for three seconds.
    index = Index(30)
    flags = (*DAILY, "--meters", 800, "--processes", 2)
    with Server(index=index) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0, done.stderr
    assert len(index.ranges) > 2 and contents(server) == expected(*flags)


@pytest.mark.parametrize("flag", ["--resume", "--verify"])
def test_listings_are_in_the_order_of_names(tmp_path: Path, flag: str) -> None:
    flags = (*DAYS, "--interval", 86_400, "--meters", 300, "--temp-dir", tmp_path, "--processes", 1)
    with Server(page=20) as server:
        assert upload(server, *flags).returncode == 0
        server.requests.clear()
        assert upload(server, *flags, flag).returncode == 0
        pages = [request.query.get("pageToken", request.query["prefix"]) for request in listings(server)]
    assert pages == sorted(pages) and len(pages) == len(server.requests) == 30


def test_verify_reports_every_file_that_differs(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 100, "--batch-size", 10, "--processes", 1, "--output-dir", tmp_path)
    assert wattif(*flags).returncode == 0
    names = sorted(files_below(tmp_path))[::7]
    for name in names:
        (tmp_path / name).write_bytes(b"{")
    done = wattif(*flags, "--verify")
    assert sorted(re.findall("^different: (.*)$", done.stderr, re.M)) == names


def test_resume_lists_a_day_before_its_first_upload(tmp_path: Path) -> None:
    flags = (*DAYS, "--interval", 86_400, "--meters", 100, "--temp-dir", tmp_path, "--processes", 1, "--resume")
    with Server(page=10) as server:
        assert upload(server, *flags).returncode == 0
        for name in sorted(server.objects)[::2]:
            del server.objects[name]
        server.requests.clear()
        assert upload(server, *flags).returncode == 0
    for day in ("dt=2024-01-01/", "dt=2024-01-02/"):
        listed = [request.number for request in listings(server) if request.query["prefix"] == day]
        sent = [request.number for request in server.requests if request.name.startswith(day)]
        assert len(listed) == 5 and len(sent) == 50 and max(listed) < min(sent)


def test_verbose_logs_each_batch(tmp_path: Path) -> None:
    with Server() as server:
        done = upload(
            server, "--temp-dir", tmp_path, *SMALL, "--meters", 25, "--batch-size", 10, "--processes", 1, "-v"
        )
    uploaded = r"^[\d-]+ [\d:,]+ DEBUG ForkProcess-1/upload_\d: 2024-01-0[12]: uploaded (\d+) of (\d+) files$"
    counts = [(int(done), int(whole)) for done, whole in re.findall(uploaded, done.stderr, re.M)]
    assert sorted(counts) == [(1, 1), *[(8, 8)] * 5, (9, 9)]
    assert len(re.findall(r" ForkProcess-1/write_0: 2024-01-0[12]: wrote \d+ files", done.stderr)) == 7


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_make_the_same_objects(expected: Callable[..., dict], tmp_path: Path, processes: int) -> None:
    flags = (*SMALL, "--meters", 31)
    with Server() as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", "--processes", processes, "--batch-size", 7)
    assert done.returncode == 0, done.stderr
    assert f"processes    {processes}" in done.stderr and "62 objects, 1,488 readings" in done.stderr
    assert contents(server) == expected(*flags)
    assert list((tmp_path / "temp").iterdir()) == []
