"""The command line: the help page, the plan, and one line for every bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from conftest import DAYS, files_below, wattif

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
    ((*DAYS, "--bucket", "gs://bucket"), "--bucket"),
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


def refused(done: Any, flag: str) -> None:
    """Assert that a run was refused before any work, in one line that names the flag."""
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"generator\.py: error: [^\n\x1b]+\n", done.stderr), done.stderr
    assert flag in done.stderr and len(done.stderr) < 1100


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, flags: tuple[str, ...], named: str) -> None:
    done = wattif("--temp-dir", tmp_path / "temp", *flags, STORAGE_EMULATOR_HOST="http://127.0.0.1:1")
    refused(done, named)
    assert list(tmp_path.iterdir()) == []


def test_a_temp_dir_that_cannot_be_is_refused() -> None:
    for directory in ("/dev/null/temp", "/proc/temp", ""):
        refused(wattif(*DAYS, "--temp-dir", directory, STORAGE_EMULATOR_HOST="http://127.0.0.1:1"), "--temp-dir")


def test_too_little_free_disk_is_refused(tmp_path: Path) -> None:
    refused(wattif(*DAYS, "--meters", 10**9, "--output-dir", tmp_path), "--output-dir")
    flags = ("--meters", 10**9, "--batch-size", 100_000, "--upload-workers", 1000, "--temp-dir", tmp_path)
    refused(wattif(*DAYS, *flags, STORAGE_EMULATOR_HOST="http://127.0.0.1:1"), "--temp-dir")
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


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path) -> None:
    flags = ("--start", "2024-01-01", "--end", "2024-01-31", "--temp-dir", tmp_path / "temp", "--processes", 1)
    done = wattif(*flags, "--dry-run")
    assert done.returncode == 0 and done.stdout == "" and list(tmp_path.iterdir()) == []
    for fact in (
        "2024-01-01 to 2024-01-31",
        "1,000, a reading every 10 s, seed 0",
        "267,840,000",
        "31,000 of 682,560 bytes",
        "21,159,360,000 (21.2 GB)",
        "at most 207,667,200 bytes (208 MB)",
        "gs://smart-meter-fake-data-t/dt=YYYY-MM-DD/",
    ):
        assert fact in done.stderr


def test_the_plan_of_a_run_that_stays_here_is_exact(tmp_path: Path) -> None:
    done = wattif(*DAYS, "--meters", 3, "--interval", 900, "--output-dir", tmp_path)
    total = sum(map(len, files_below(tmp_path).values()))
    assert f"bytes        {total:,}" in done.stderr and f"at most {6 * 8192 + 2 * 4096:,} bytes" in done.stderr
    assert "6 objects, 576 readings, 45.5 kB" in done.stderr


def test_help_names_every_flag_with_its_default() -> None:
    page = wattif("--help").stdout
    for flag in ("--start", "--end", "--bucket", "--output-dir", "--temp-dir", "--dry-run", "-v, --verbose"):
        assert flag in page
    for default in ("smart-meter-fake-data-t", "/mnt/sm-disk/", "1,000", "(default:\n                        10)"):
        assert default in page
    assert "example:" in page and "SECONDS" in page
