"""Uploads: what arrives, what stays on disk, and what a run says when the bucket or the disk refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Callable

import pytest

from conftest import DAYS, Emulator, contents, disk_use, files_below, upload, wattif
from server import Request, Server

ONE = (*DAYS, "--processes", "1")
SMALL = (*ONE, "--interval", "3600")


def announced(report: str) -> int:
    """The disk use in bytes that the plan announces."""
    return int(re.search(r"^disk +at most ([\d,]+) bytes", report, re.M)[1].replace(",", ""))


def test_full_days_arrive_exactly(emulator: Emulator, expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*DAYS, "--meters", 300)
    done = emulator.run(*flags, "--temp-dir", tmp_path / "temp", "--batch-size", 70)
    assert done.returncode == 0, done.stderr
    assert "600 objects, 5,184,000 readings" in done.stderr and done.stdout == ""
    made, wanted = emulator.objects(), expected(*flags)
    assert len(wanted) == 600
    assert {name: (b.size, b.crc32c, b.content_type) for name, b in made.items()} == {
        name: (len(content), Server.crc32c(content), "application/x-ndjson") for name, content in wanted.items()
    }
    assert list((tmp_path / "temp").iterdir()) == []


def test_a_repeated_run_overwrites_objects_with_equal_ones(
    emulator: Emulator, expected: Callable[..., dict], tmp_path: Path
) -> None:
    for batch_size in (4, 100):
        done = emulator.run(*SMALL, "--meters", 9, "--temp-dir", tmp_path, "--batch-size", batch_size)
        assert done.returncode == 0, done.stderr
    wanted = expected(*SMALL, "--meters", 9)
    assert {name: blob.download_as_bytes() for name, blob in emulator.objects().items()} == wanted


def test_a_missing_bucket_ends_the_run_early(emulator_url: str, tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 100, "--batch-size", 5, "--temp-dir", tmp_path)
    done = wattif("--bucket", "no-such-bucket", *flags, STORAGE_EMULATOR_HOST=emulator_url)
    assert done.returncode == 1
    assert "error: there is no bucket gs://no-such-bucket: create it" in done.stderr
    assert "Traceback" not in done.stderr
    assert 5 <= len(list(tmp_path.rglob("*.ndjson"))) <= 15


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "the credentials were not accepted"), (403, "no permission"), (404, "there is no bucket")],
)
def test_a_permanent_refusal_ends_the_run_early(tmp_path: Path, status: int, message: str) -> None:
    # Ten requests are refused, all others accepted: only the refusal itself can end the run.
    with Server(fault=lambda request: status if 20 <= request.number < 30 else None) as server:
        done = upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 1000, "--batch-size", 10)
    assert done.returncode == 1 and f"error: {message}" in done.stderr
    assert 20 <= len(server.objects) <= 80
    if status == 403:
        assert "--resume skips what is there" in done.stderr and "HTTP 403: scripted" in done.stderr


def test_a_batch_in_which_nothing_arrives_ends_the_run_early(tmp_path: Path) -> None:
    with Server(fault=lambda request: 400 if 20 <= request.number < 50 else None) as server:
        done = upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 1000, "--batch-size", 10)
    assert done.returncode == 1 and "error: nothing arrives in gs://a-bucket any more; see to it" in done.stderr
    assert len(server.objects) <= 80 and "HTTP 400: scripted" in done.stderr


def test_a_failed_file_alone_in_its_batch_does_not_end_the_run(tmp_path: Path) -> None:
    with Server(fault=lambda request: 400 if request.number == 10 else None) as server:
        done = upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 11, "--batch-size", 10)
    assert done.returncode == 1 and len(server.objects) == 21 and "; 1 failed" in done.stderr


def test_a_failed_file_stays_and_is_named(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 25, "--batch-size", 10)
    wanted = expected(*flags)
    failing = sorted(wanted)[7]
    with Server(fault=lambda request: 400 if request.name == failing else None) as server:
        done = upload(server, "--temp-dir", tmp_path / "temp", *flags)
    assert done.returncode == 1
    ((left, content),) = files_below(tmp_path / "temp").items()
    assert left.endswith(failing) and content == wanted.pop(failing)
    assert f"failed: {tmp_path}/temp/{left}: HTTP 400" in done.stderr and "1 failed" in done.stderr
    assert contents(server) == wanted


def test_what_an_earlier_run_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    mine = tmp_path / "dt=2024-01-01" / "020000000000.ndjson"
    mine.parent.mkdir()
    mine.write_text("mine")
    with Server(fault=lambda request: 400 if request.number == 3 else None) as server:
        assert upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 25).returncode == 1
        assert len(files_below(tmp_path)) == 2
        assert upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 25).returncode == 0
    assert files_below(tmp_path) == {"dt=2024-01-01/020000000000.ndjson": b"mine"}
    assert len(server.objects) == 50


@pytest.mark.parametrize("bypassed", [False, True])
def test_proxies_of_the_environment_are_heeded(tmp_path: Path, bypassed: bool) -> None:
    flags = ("--bucket", "a-bucket", *SMALL, "--meters", 5, "--temp-dir", tmp_path, "--retry-timeout", 2)
    with Server() as server:
        proxy = {"http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}
        if not bypassed:
            proxy = {"http_proxy": server.url, "no_proxy": ""}
        endpoint = server.url if bypassed else "http://storage.invalid"
        done = wattif(*flags, STORAGE_EMULATOR_HOST=endpoint, **proxy)
    assert done.returncode == 0 and len(server.objects) == 10, done.stderr


@pytest.mark.parametrize("kind", [("--meters-per-file", 3), ("--gzip", "--meters-per-file", 3)])
def test_files_that_are_written_over_shorter_ones_and_longer_ones(
    expected: Callable[..., dict], tmp_path: Path, kind: tuple
) -> None:
    flags = ("--start", "2024-01-01", "--end", "2024-01-09", "--interval", 600, "--meters", 7, "--processes", 1, *kind)
    inodes: set[int] = set()

    def look(request: Request) -> None:
        (path,) = (tmp_path / "temp").glob(f".wattif-*/*{request.name}")
        inodes.add(path.stat().st_ino)

    with Server(fault=look) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", "--batch-size", 3)
    assert done.returncode == 0 and contents(server) == expected(*flags)
    assert len(inodes) <= 3 < len(server.objects) == 27  # three batches of one file are on disk
    assert not list((tmp_path / "temp").iterdir())


@pytest.mark.parametrize("failing", [False, True])
def test_a_slow_server_holds_generation_back(tmp_path: Path, failing: bool) -> None:
    peak = 0

    def measure(request: Request) -> int | None:
        nonlocal peak
        peak = max(peak, disk_use(tmp_path))
        return 400 if failing and request.number % 5 == 0 else None

    with Server(delay=0.01, fault=measure) as server:
        done = upload(server, "--temp-dir", tmp_path, *ONE, "--interval", 60, "--meters", 60, "--batch-size", 4)
    bound = announced(done.stderr)
    assert bound == 4 * 3 * (28 + 2) * 4096
    assert bound * 0.6 < peak <= bound
    assert done.returncode == int(failing)
    if failing:
        assert "error: files whose upload failed fill the disk" in done.stderr
        assert len(server.objects) < 90 and 8 < len(list(tmp_path.rglob("*.ndjson"))) <= 12
    else:
        assert len(server.objects) == 120


def test_verbose_logs_each_batch(tmp_path: Path) -> None:
    with Server() as server:
        done = upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 25, "--batch-size", 10, "-v")
    assert (
        len(
            re.findall(
                r"^[\d-]+ [\d:,]+ DEBUG MainProcess/upload_\d: 2024-01-0[12]: uploaded \d+ of \d+", done.stderr, re.M
            )
        )
        == 6
    )
    assert len(re.findall(r" MainProcess/write_0: 2024-01-0[12]: wrote \d+ files", done.stderr)) == 6
