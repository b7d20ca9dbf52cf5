"""The command line: the help page, and one line for every bad input."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

import generator
from conftest import DAYS, refused, wattif

SMALL = (*DAYS, "--interval", "3600")
BAD_FLAGS = [
    (("--start", "2024-02-30", "--end", "2024-03-01"), "--start"),
    (("--start", "01.02.2024", "--end", "2024-03-01"), "--start"),
    (("--start", "2024-1-1", "--end", "2024-03-01"), "--start"),
    (("--start", "20240101", "--end", "2024-03-01"), "--start"),
    (("--start", "2024-01-01", "--end", "tomorrow"), "--end"),
    (("--start", "2024-01-02", "--end", "2024-01-01"), "--end"),
    (("--start", "2024-01-02"), "--end"),
    (("--end", "2024-01-02"), "--start"),
    ((*DAYS, "--meters", "0"), "--meters"),
    ((*DAYS, "--meters", "-5"), "--meters"),
    ((*DAYS, "--meters", "1e3"), "--meters"),
    ((*DAYS, "--meters", str(2**36 + 1)), "--meters"),
    ((*DAYS, "--meters", "9" * 5000), "--meters"),
    ((*DAYS, "--interval", "0"), "--interval"),
    ((*DAYS, "--interval", "7"), "--interval"),
    ((*DAYS, "--interval", "172800"), "--interval"),
    ((*DAYS, "--seed", "-1"), "--seed"),
    ((*DAYS, "--seed", "x\ny\x1b[31m"), "--seed"),
    ((*DAYS, "--batch-size", "0"), "--batch-size"),
    ((*DAYS, "--write-workers", "0"), "--write-workers"),
    ((*DAYS, "--upload-workers", "0"), "--upload-workers"),
    ((*DAYS, "--transfer-workers", "0"), "--transfer-workers"),
    ((*DAYS, "--bucket", ""), "--bucket"),
    ((*DAYS, "--bucket", "ab"), "--bucket"),
    ((*DAYS, "--bucket", "a" * 64), "--bucket"),
    *(
        ((*DAYS, "--bucket", name), "--bucket")
        for name in ("gs://", "gs://My_bucket", "gs://bucket//", "gs://bucket/a//b")
    ),
    *(
        ((*DAYS, "--prefix", path), "--prefix")
        for path in ("", "/", "/a", "a//b", "a//", "a/../b", ".", "a\nb", 901 * "x")
    ),
    ((*DAYS, "--bucket", "gs://bucket/a", "--prefix", "b"), "--prefix b and --bucket"),
    ((*DAYS, "--bucket", "Bucket"), "--bucket"),
    ((*DAYS, "--bucket", "bücket"), "--bucket"),
    ((*DAYS, "--bucket", "-bucket"), "--bucket"),
    ((*DAYS, "--bucket", "bucket_"), "--bucket"),
    ((*DAYS, "--bucket", "192.168.5.4"), "--bucket"),
    ((*DAYS, "--bucket", "goog-bucket"), "--bucket"),
    ((*DAYS, "--bucket", "my-g00gle-bucket"), "--bucket"),
    ((*DAYS, "--bucket", "a..b"), "--bucket"),
    ((*DAYS, "--bucket", "a.b\n"), "--bucket"),
    ((*DAYS, "--bucket", "a." + "b" * 64), "--bucket"),
    ((*DAYS, "--bucket", "a-bucket", "--output-dir", "out"), "--bucket"),
    ((*DAYS, "--max-disk", "1GB", "--output-dir", "out"), "--max-disk"),
    ((*DAYS, "--rps-limit", "5", "--output-dir", "out"), "--rps-limit"),
    ((*DAYS, "--resume", "--verify"), "--verify"),
    ((*DAYS, "--output-dir", ""), "--output-dir"),
    ((*DAYS, "--output-dir", "/proc/nope"), "--output-dir"),
    ((*DAYS, "--output-dir", "/dev/null"), "--output-dir"),
    ((*DAYS, "--output-dir", "/dev/null/\nbelow"), "--output-dir"),
    ((*DAYS, "--meterz", "5"), "--meterz"),
    ((*DAYS, "--meter", "5"), "--meter"),
    ((*DAYS, "a\nstray\nword"), "stray"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, flags: tuple[str, ...], named: str) -> None:
    done = wattif("--temp-dir", tmp_path / "temp", *flags, STORAGE_EMULATOR_HOST="http://127.0.0.1:1")
    refused(done, named)
    assert list(tmp_path.iterdir()) == []


def test_missing_credentials_are_refused(tmp_path: Path) -> None:
    done = wattif(*DAYS, "--temp-dir", tmp_path / "temp", "--processes", 1)
    refused(done, "--bucket")
    assert "gcloud auth application-default login" in done.stderr and list(tmp_path.iterdir()) == []
    refused(wattif(*DAYS, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "no-such-file")), "--bucket")


@pytest.mark.parametrize(
    "host", ["localhost:9023", "http://", "http://[::1", "http://localhost:port", "ftp://localhost"]
)
def test_an_emulator_that_cannot_be_is_refused(tmp_path: Path, host: str) -> None:
    refused(wattif(*DAYS, "--temp-dir", tmp_path / "temp", STORAGE_EMULATOR_HOST=host), "STORAGE_EMULATOR_HOST")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_with_its_default() -> None:
    page = wattif("--help", COLUMNS="500").stdout  # so that no line is broken
    for setting in fields(generator.Run):
        if setting.metadata:
            name = f"--{setting.name.replace('_', '-')}"
            (line,) = re.findall(rf"^ +(?:-v, )?{name} .*(?:\n {{20,}}.*)?$", page, re.M)
            assert setting.default in (None, False, MISSING) or f"(default: {setting.default})" in line
    for default in ("smart-meter-fake-data-t", "/mnt/sm-disk/", "1000", "(default: none)"):
        assert default in page
    assert "example:" in page and "SECONDS" in page
    assert all(len(line) <= 120 for line in wattif("--help").stdout.splitlines())


def test_today_and_yesterday_are_utc_days() -> None:
    before = datetime.now(timezone.utc).date()
    done = wattif("--start", "yesterday", "--end", "today", "--dry-run")
    after = datetime.now(timezone.utc).date()
    plans = [f"days         {today - timedelta(days=1)} to {today}\n" for today in (before, after)]
    assert done.returncode == 0 and any(plan in done.stderr for plan in plans)
    done = wattif("--start", "today", "--end", "yesterday", "--dry-run")
    assert done.returncode == 2 and "--end" in done.stderr


def test_a_rate_that_is_none_is_refused() -> None:
    for rate in ("0", "-1", "x", "1e3", "inf", "nan"):
        done = wattif(*DAYS, "--rps-limit", rate, "--dry-run")
        assert done.returncode == 2 and "--rps-limit" in done.stderr and done.stderr.count("\n") == 1


def slurm(task: int, first: int, last: int, step: int, count: int) -> dict[str, str]:
    """What Slurm tells a task of an array."""
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in zip(names, (task, first, last, step, count))}


@pytest.mark.parametrize(
    ("env", "flags", "source"),
    [
        ({"BATCH_TASK_INDEX": "2", "BATCH_TASK_COUNT": "4"}, (), "BATCH_TASK_INDEX"),
        ({"CLOUD_RUN_TASK_INDEX": "2", "CLOUD_RUN_TASK_COUNT": "4"}, (), "CLOUD_RUN_TASK_INDEX"),
        ({"JOB_COMPLETION_INDEX": "2"}, ("--task-count", 4), "JOB_COMPLETION_INDEX"),
        (slurm(2, 0, 3, 1, 4), (), "SLURM_ARRAY_TASK_ID"),
        (slurm(3, 1, 4, 1, 4), (), "SLURM_ARRAY_TASK_ID"),
        (slurm(4, 0, 6, 2, 4), (), "SLURM_ARRAY_TASK_ID"),
        (slurm(2, 2, 2, 1, 1), ("--task-count", 4), "SLURM_ARRAY_TASK_ID"),  # one element that is run again
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
        (slurm(8, 0, 4, 1, 5), (), "SLURM"),
        (slurm(7, 7, 7, 1, 1), (), "--task-count N"),
        (slurm(0, 0, 0, 1, 1), (), "--task-count N"),
        (slurm(7, 3, 7, 4, 2), (), "--task-count N"),
        (slurm(7, 3, 7, 1, 2), (), "--task-count N"),
        (slurm(0, 0, 7, 1, 2), (), "--task-count N"),
        (slurm(7, 7, 7, 1, 1), ("--task-count", 4), "SLURM"),
    ],
)
def test_half_a_task_is_refused(env: dict[str, str], flags: tuple, named: str) -> None:
    done = wattif(*SMALL, "--dry-run", *flags, **env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr
