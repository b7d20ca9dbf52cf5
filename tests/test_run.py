"""Processes, tasks and the files that a run is split into."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from conftest import DAYS, Emulator, children_of, contents, files_below, start, until, upload, wattif
from server import Server

SMALL = (*DAYS, "--interval", "3600")


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_make_the_same_objects(expected: Callable[..., dict], tmp_path: Path, processes: int) -> None:
    flags = (*SMALL, "--meters", 31)
    with Server() as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", "--processes", processes, "--batch-size", 7)
    assert done.returncode == 0, done.stderr
    assert f"processes    {processes}" in done.stderr and "62 objects, 1,488 readings" in done.stderr
    assert contents(server) == expected(*flags)
    assert list((tmp_path / "temp").iterdir()) == []


def test_there_are_no_more_processes_than_files(tmp_path: Path) -> None:
    done = wattif(*SMALL, "--meters", 30, "--meters-per-file", 10, "--processes", 8, "--output-dir", tmp_path)
    assert done.returncode == 0 and "processes    3" in done.stderr


def test_a_child_that_dies_fails_the_run_and_names_its_slice(tmp_path: Path) -> None:
    with Server(delay=0.05) as server:
        flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path, "--processes", 2, "--batch-size", 5)
        with start(*SMALL, "--meters", 100, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: len(server.objects) > 10)
            os.kill(children_of(process.pid)[0], signal.SIGKILL)
            _, report = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "failed: files 0 to 49 of each day: their process ended with exit code -9" in report
        and "Traceback" not in report
    )
    assert 100 <= len(server.objects) < 200


def test_children_do_not_outlive_the_parent(tmp_path: Path) -> None:
    with Server(delay=0.05) as server:
        flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path, "--processes", 3, "--batch-size", 5)
        with start(*SMALL, "--meters", 1000, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            children = until(lambda: len(server.objects) > 10 and children_of(process.pid))
            assert len(children) == 3
            process.kill()
            until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@pytest.mark.parametrize("count", [1, 3, 40])
def test_tasks_together_write_the_objects_of_one_run(tmp_path: Path, count: int) -> None:
    flags = (*SMALL, "--meters", 70, "--meters-per-file", 3)
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
    assert union == files_below(tmp_path / "whole") and len(union) == 48


@pytest.mark.parametrize(
    ("env", "flags", "source"),
    [
        ({"BATCH_TASK_INDEX": "2", "BATCH_TASK_COUNT": "4"}, (), "BATCH_TASK_INDEX"),
        ({"CLOUD_RUN_TASK_INDEX": "2", "CLOUD_RUN_TASK_COUNT": "4"}, (), "CLOUD_RUN_TASK_INDEX"),
        ({"JOB_COMPLETION_INDEX": "2"}, ("--task-count", 4), "JOB_COMPLETION_INDEX"),
        (
            {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"},
            (),
            "SLURM_ARRAY_TASK_ID",
        ),
        ({"BATCH_TASK_INDEX": "9", "BATCH_TASK_COUNT": "9"}, ("--task-index", 2, "--task-count", 4), "--task-index"),
    ],
)
def test_the_task_comes_from_the_engine(env: dict[str, str], flags: tuple, source: str) -> None:
    done = wattif(*SMALL, "--meters", 10, "--dry-run", *flags, **env)
    assert done.returncode == 0 and f"task         2 of 4 (from {source})" in done.stderr
    assert "objects      4 of" in done.stderr  # files 5 and 6 of ten, on two days


@pytest.mark.parametrize(
    ("env", "flags", "named"),
    [
        ({}, ("--task-index", 1), "--task-count"),
        ({}, ("--task-count", 2), "--task-index"),
        ({}, ("--task-index", 2, "--task-count", 2), "--task-index"),
        ({}, ("--task-index", -1, "--task-count", 2), "--task-index"),
        ({}, ("--task-index", 0, "--task-count", 0), "--task-count"),
        ({"JOB_COMPLETION_INDEX": "1"}, (), "--task-count"),
        ({"BATCH_TASK_INDEX": "one", "BATCH_TASK_COUNT": "2"}, (), "BATCH_TASK_INDEX"),
        ({"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "5"}, (), "SLURM"),
    ],
)
def test_half_a_task_is_refused(env: dict[str, str], flags: tuple, named: str) -> None:
    done = wattif(*SMALL, "--dry-run", *flags, **env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr


def test_tasks_on_a_shared_disk_do_not_meet(tmp_path: Path) -> None:
    # In namespaces of their own, as containers are, tasks have the same process and thread IDs.
    namespace = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("making a namespace takes privileges")
    flags = (*DAYS, "--meters", 200, "--output-dir", tmp_path, "--processes", 1)
    tasks = [start(*flags, "--task-index", index, "--task-count", 2, prefix=namespace) for index in range(2)]
    for task in tasks:
        with task:
            _, report = task.communicate(timeout=60)
        assert task.returncode == 0, report
    assert wattif(*flags, "--verify").returncode == 0


@pytest.mark.parametrize("flags", [(), ("--gzip",), ("--meters-per-file", 4), ("--gzip", "--meters-per-file", 4)])
def test_files_of_several_meters_and_compressed_ones(tmp_path: Path, flags: tuple) -> None:
    plain, made = tmp_path / "plain", tmp_path / "made"
    assert wattif(*SMALL, "--meters", 10, "--output-dir", plain).returncode == 0
    assert wattif(*SMALL, "--meters", 10, "--output-dir", made, *flags, "--processes", 2).returncode == 0
    files = files_below(made)
    assert all(name.endswith(".ndjson.gz" if "--gzip" in flags else ".ndjson") for name in files)
    if "--meters-per-file" in flags:
        spans = ["000000000-000000003", "000000004-000000007", "000000008-000000009"]
        stems = [f"dt=2024-01-0{day}/meters-{span}" for day in (1, 2) for span in spans]
        assert [name.split(".")[0] for name in sorted(files)] == stems
    for content in files.values() if "--gzip" in flags else []:
        assert content[:4] == b"\x1f\x8b\x08\x00" and content[4:8] == bytes(4)  # no name, no time stamp
    rows = {name: gzip.decompress(content) if "--gzip" in flags else content for name, content in files.items()}
    assert sorted(b"".join(rows.values()).splitlines()) == sorted(b"".join(files_below(plain).values()).splitlines())
    for content in rows.values():
        parsed = [json.loads(line) for line in content.splitlines()]
        meters = list(dict.fromkeys(row["meter_id"] for row in parsed))
        assert len(meters) == len(parsed) // 24  # one meter after the other
        assert [row["meter_id"] for row in parsed] == [meter for meter in meters for _ in range(24)]
        assert all(parsed[n]["timestamp"] < parsed[n + 1]["timestamp"] for n in range(23))


@pytest.mark.parametrize(("more", "content_type"), [((), "application/x-ndjson"), (("--gzip",), "application/gzip")])
def test_large_and_compressed_objects_arrive(
    emulator: Emulator, expected: Callable[..., dict], tmp_path: Path, more: tuple, content_type: str
) -> None:
    # 17 MB and 0.7 MB: a resumable upload of two chunks and a multipart one, unless they are compressed.
    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", 26, "--meters-per-file", 25, *more)
    done = emulator.run(*flags, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0, done.stderr
    blobs = emulator.objects()
    assert {name: blob.download_as_bytes(raw_download=True) for name, blob in blobs.items()} == expected(*flags)
    assert {blob.content_type for blob in blobs.values()} == {content_type}


def test_large_files_make_smaller_batches(tmp_path: Path) -> None:
    plans = []
    for flags in ((), ("--meters-per-file", 10), ("--meters-per-file", 1000)):
        done = wattif(*DAYS, "--meters", 5000, "--processes", 1, "--dry-run", *flags)
        plans.append(int(done.stderr.split("at most ")[-1].split(" bytes")[0].replace(",", "")))
    assert plans[0] == 300 * 169 * 4096  # a file takes 167 blocks of the disk, and two for directories
    assert plans[0] >= plans[1] >= 300 * 682_560 and plans[2] < 3.01 * 1000 * 682_560
    with Server() as server:
        done = upload(
            server, *SMALL, "--meters", 64, "--meters-per-file", 4, "--batch-size", 8, "--temp-dir", tmp_path, "-v"
        )
    assert done.returncode == 0 and "uploaded 2 of 2 files" in done.stderr and "of 3 files" not in done.stderr


def test_processes_that_cannot_be_started_end_the_run(tmp_path: Path) -> None:
    with Server(delay=0.02) as server:
        flags = (*SMALL, "--meters", 1000, "--processes", 12, "--temp-dir", tmp_path)
        done = upload(server, *flags, prefix=("prlimit", "--nofile=22"))
    assert done.returncode == 1 and "error: cannot start 12 processes (" in done.stderr
    assert "lower --processes" in done.stderr and len(server.objects) < 2000


def test_a_fleet_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    flags = ("--meters", 30_000_000, "--meters-per-file", 10_000_000, "--interval", 86_400, "--processes", 1)
    done = wattif(*DAYS, *flags, "--output-dir", tmp_path, prefix=("prlimit", "--as=140000000"))
    assert done.returncode == 1 and "lower --meters" in done.stderr and "Traceback" not in done.stderr
