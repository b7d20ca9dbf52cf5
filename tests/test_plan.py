"""The plan: sizes, counts, disk, processes and tasks, and that runs keep to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable

import pytest

from conftest import DAYS, contents, disk_use, files_below, planned, refused, upload, wattif
from server import Request, Server

SMALL = (*DAYS, "--interval", "3600")


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path) -> None:
    flags = ("--start", "2024-01-01", "--end", "2024-01-31", "--temp-dir", tmp_path / "temp", "--processes", 1)
    done = wattif(*flags, "--dry-run")
    assert done.returncode == 0 and done.stderr == "" and list(tmp_path.iterdir()) == []
    for fact in (
        "2024-01-01 to 2024-01-31",
        "1,000, a reading every 10 s, seed 0",
        "267,840,000",
        "31,000 of 682,560 bytes",
        "21,159,360,000 (21.2 GB)",
        "at most 276,889,600 bytes (277 MB)",
        "gs://smart-meter-fake-data-t/dt=YYYY-MM-DD/",
    ):
        assert fact in done.stdout


def test_the_plan_of_a_run_that_stays_here_is_exact(tmp_path: Path) -> None:
    done = wattif(*DAYS, "--meters", 3, "--interval", 900, "--output-dir", tmp_path)
    total = sum(map(len, files_below(tmp_path).values()))
    assert f"bytes        {total:,}" in done.stderr and f"at most {6 * 8192 + 2 * 4096:,} bytes" in done.stderr
    assert "6 of 6 objects, 576 readings, 45.5 kB" in done.stderr


def test_max_disk_caps_the_use_of_all_processes(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*DAYS, "--meters", 40, "--interval", 60, "--processes", 2)
    temp, peak = tmp_path / "temp", [0]

    def look(request: Request) -> None:
        peak[0] = max(peak[0], disk_use(temp))

    with Server(delay=0.01, fault=look) as server:
        done = upload(server, *flags, "--temp-dir", temp, "--max-disk", "1MB")
    assert done.returncode == 0 and 400_000 < peak[0] <= 1_000_000
    assert contents(server) == expected(*flags)
    for size, processes in (
        ("250kB", 1),
        ("0.5MB", 2),
    ):  # a file takes 123 kB with its directory, a process two of them
        assert f"processes    {processes}" in wattif(*flags, "--max-disk", size, "--dry-run").stdout
    assert wattif(*flags, "--max-disk", "1MB", "--output-dir", tmp_path / "out").returncode == 2
    for size in ("245kB", "100kB", "0", "-1", "1XB", "1iB", "GB", "1e9", "9" * 30):
        refused(wattif(*flags, "--max-disk", size, "--dry-run"), "--max-disk")
    assert "give at least 245760, in bytes" in wattif(*flags, "--max-disk", "245kB", "--dry-run").stderr
    assert wattif(*flags, "--max-disk", "245760", "--dry-run").returncode == 0


@pytest.mark.parametrize("failing", [False, True])
def test_a_slow_server_holds_generation_back(tmp_path: Path, failing: bool) -> None:
    uses = [0]

    def measure(request: Request) -> int | None:
        uses.append(disk_use(tmp_path))
        return 400 if failing and request.number % 5 == 4 else None

    with Server(delay=0.01, fault=measure) as server:
        done = upload(
            server, "--temp-dir", tmp_path, *DAYS, "--processes", 1, "--interval", 60, "--meters", 60, "--batch-size", 4
        )
    # Three batches are under way, and as many files as a fourth one has may have failed.
    bound = planned(done.stderr, "disk")
    assert bound == 4 * 4 * (28 + 2) * 4096
    assert bound * 0.4 < max(uses) <= bound
    assert done.returncode == int(failing)
    if failing:
        assert re.search(r"^error: [4-7] uploads failed, at last /.*: HTTP 400", done.stderr, re.M)
        assert len(server.objects) < 60 and 4 <= len(list(tmp_path.rglob("*.ndjson"))) <= 16
    else:
        assert len(server.objects) == 120


def test_rps_limit_does_not_change_the_number_of_processes() -> None:
    for limit in ("0.5", "500"):
        assert "processes    8" in wattif(*SMALL, "--rps-limit", limit, "--processes", 8, "--dry-run").stdout


def test_there_are_no_more_processes_than_files(tmp_path: Path) -> None:
    done = wattif(*SMALL, "--meters", 30, "--meters-per-file", 10, "--processes", 8, "--output-dir", tmp_path)
    assert done.returncode == 0 and "processes    3" in done.stderr


@pytest.mark.parametrize("count", [1, 3, 9])
def test_tasks_together_write_the_objects_of_one_run(tmp_path: Path, count: int) -> None:
    flags = (*SMALL, "--meters", 20, "--meters-per-file", 3)
    assert wattif(*flags, "--output-dir", tmp_path / "whole").returncode == 0
    union: dict[str, bytes] = {}
    for index in range(count):
        directory = tmp_path / str(index)
        done = wattif(*flags, "--task-index", index, "--task-count", count, "--output-dir", directory)
        assert done.returncode == 0, done.stderr
        made = files_below(directory) if directory.exists() else {}
        assert not set(made) & set(union)
        assert f"task         {index} of {count} (from --task-index)" in done.stderr
        assert f"{len(made)} objects" in done.stderr
        union.update(made)
    assert union == files_below(tmp_path / "whole") and len(union) == 14


def test_large_files_make_smaller_batches(tmp_path: Path) -> None:
    plans: list[int] = []
    for flags in ((), ("--meters-per-file", 10), ("--meters-per-file", 1000)):
        done = wattif(*DAYS, "--meters", 5000, "--processes", 1, "--dry-run", *flags)
        plans.append(planned(done.stdout, "disk"))
    assert plans[0] == 400 * 169 * 4096  # a file takes 167 blocks of the disk, and two for directories
    assert plans[0] >= plans[1] >= 400 * 682_560 and plans[2] < 4.01 * 1000 * 682_560
    with Server() as server:
        done = upload(
            server, *SMALL, "--meters", 64, "--meters-per-file", 4, "--batch-size", 8, "--temp-dir", tmp_path, "-v"
        )
    assert done.returncode == 0 and "uploaded 2 of 2 files" in done.stderr and "of 3 files" not in done.stderr


def test_the_plan_of_many_processes_is_made_at_once() -> None:
    # Once per slice would be a million steps here, and 1,024 times that if each slice computed all of them.
    done = wattif(*DAYS, "--meters", 20_000, "--processes", 1024, "--dry-run", prefix=("prlimit", "--cpu=20"))
    assert done.returncode == 0 and planned(done.stdout, "processes") == 1024
