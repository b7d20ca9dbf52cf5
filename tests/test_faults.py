"""Nothing is lost: interruptions, a misbehaving server or disk. The end is always the same set of objects."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterator

import pytest

from conftest import DAYS, children_of, contents, disk_use, files_below, start, until, upload, wattif
from server import Request, Server

SMALL = (*DAYS, "--interval", "3600", "--meters", "60", "--batch-size", "10")


def spool(temp_dir: Path) -> list[Path]:
    """What lies in a temp directory."""
    return [path for path in temp_dir.rglob("*") if not path.is_dir()]


def begin(server: Server, temp_dir: Path, *flags: Any) -> subprocess.Popen[str]:
    """Start an upload that is still under way after its first objects."""
    bucket = ("--bucket", "a-bucket", "--temp-dir", temp_dir)
    process = start(*bucket, *flags, STORAGE_EMULATOR_HOST=server.url)
    until(lambda: len(server.objects) > 15)
    return process


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_batches_finish_and_resume_goes_on(
    expected: Callable[..., dict], tmp_path: Path, processes: int, number: int, status: int
) -> None:
    flags = (*SMALL, "--processes", processes)
    with Server(delay=0.05) as server:
        with begin(server, tmp_path / "temp", *flags, "--transfer-workers", 2) as process:
            process.send_signal(number)
            _, report = process.communicate(timeout=30)
        assert process.returncode == status and "; run it again with --resume\n" in report
        assert 15 < len(server.objects) < 120 and not spool(tmp_path)
        assert f"{len(server.objects)} objects, " in report and "0 failed" in report
        server.delay = 0
        assert upload(server, "--temp-dir", tmp_path / "temp", *flags, "--resume").returncode == 0
    assert contents(server) == expected(*SMALL)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_signal_stops_at_once(tmp_path: Path, processes: int) -> None:
    with Server(fault=lambda request: "stall" if request.number > 20 else None) as server:
        with begin(server, tmp_path, *SMALL, "--processes", processes) as process:
            until(lambda: len(server.requests) > 25)
            children = children_of(process.pid)
            process.send_signal(signal.SIGTERM)
            assert any("stopping: " in line for line in process.stderr)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=10) == 130
            until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@pytest.mark.parametrize("victim", ["parent", "child", "everything"])
def test_after_kill_9_resume_completes(expected: Callable[..., dict], tmp_path: Path, victim: str) -> None:
    flags = (*SMALL, "--processes", 2)
    temp = tmp_path / "temp"
    wanted = expected(*SMALL)
    with Server(delay=0.05) as server:
        with begin(server, temp, *flags, "--transfer-workers", 2) as process:
            children = children_of(process.pid)
            for pid in {"parent": [process.pid], "child": children[:1], "everything": [*children, process.pid]}[victim]:
                os.kill(pid, signal.SIGKILL)
            process.communicate(timeout=30)
            assert process.returncode == (1 if victim == "child" else -9)
            until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
        assert contents(server).items() <= wanted.items()
        server.delay = 0
        done = upload(server, "--temp-dir", temp, *flags, "--resume")
    assert done.returncode == 0 and contents(server) == wanted and not spool(temp)


def test_an_unfinished_file_has_another_name_and_is_cleared(tmp_path: Path) -> None:
    # A file-size limit ends the write in the middle, as a kill would; the limit itself only makes write() fail.
    limit = 500_000
    resource_limit = ("prlimit", f"--fsize={limit}:{limit}")
    run = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", "3", "--processes", "1")
    out = tmp_path / "out"
    done = wattif(*run, "--output-dir", out, prefix=resource_limit)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not spool(out)
    with Server() as server:
        left = tmp_path / ".wattif-4-x" / "4.1.dt=2023-01-01"
        left.mkdir(parents=True)
        for name in ("020000ABCDEF.ndjson", ".77.part"):
            (left / name).write_bytes(b"half")
        assert upload(server, *run, "--temp-dir", tmp_path, prefix=resource_limit).returncode == 1
        assert not server.objects
        assert upload(server, *run, "--temp-dir", tmp_path).returncode == 0
    assert len(server.objects) == 3 and list(tmp_path.iterdir()) == [out]


def test_what_is_not_wattifs_stays(tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("mine.txt", "020000ABCDEF.ndjson", ".wattif-4-x/4.1.dt=2024-01-01/mine.txt")]
    mine[2].parent.mkdir(parents=True)
    for path in mine:
        path.write_text("mine")
    (mine[2].parent / "020000ABCDEF.ndjson").write_text("left by a run")
    with Server() as server:
        assert upload(server, *SMALL, "--temp-dir", tmp_path).returncode == 0
    assert files_below(tmp_path) == {str(path.relative_to(tmp_path)): b"mine" for path in mine}


def test_a_symbolic_link_in_the_temp_directory_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "dt=2024-01-01"
    mine.mkdir(parents=True)
    (mine / "020000ABCDEF.ndjson").write_text("mine")
    temp = tmp_path / "temp"
    temp.mkdir()
    with Server() as server:
        for link in (".wattif-4-x", ".wattif-5-x/5.1.dt=2024-01-01"):
            (temp / link).parent.mkdir(exist_ok=True)
            (temp / link).symlink_to(mine)
            assert upload(server, *SMALL, "--temp-dir", temp).returncode == 0
            assert files_below(mine) == {"020000ABCDEF.ndjson": b"mine"} and (temp / link).is_symlink()


def test_two_runs_on_one_temp_directory(tmp_path: Path) -> None:
    with Server(delay=0.05) as server:
        with begin(server, tmp_path, *SMALL, "--end", "2024-12-31", "--transfer-workers", 1) as process:
            done = upload(server, *SMALL, "--temp-dir", tmp_path)
            assert done.returncode == 1 and f"is in use by process {process.pid}" in done.stderr
            server.delay = 0.001  # files come and go while others look
            for _ in range(5):
                assert upload(server, *SMALL, "--temp-dir", tmp_path).returncode == 1
            server.delay = 0.05
            assert upload(server, *SMALL, "--temp-dir", tmp_path / "other", "--start", "2024-01-02").returncode == 0
            process.kill()
            until(lambda: not children_of(process.pid) and process.wait() is not None)
        server.delay = 0
        until(lambda: upload(server, *SMALL, "--temp-dir", tmp_path).returncode == 0)  # once the children are gone
    assert len(server.objects) >= 120


FAULTS = [429, 500, 502, 503, 504, 408, "reset", "cut"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_retried(expected: Callable[..., dict], tmp_path: Path, fault: Any) -> None:
    flags = (*SMALL, "--processes", 1)
    with Server(fault=lambda request: fault if request.number in (3, 4, 30) else None) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["retries"] == 3 and report["objects_done"] == 120
    assert report["throttled_answers"] == (3 if fault in (429, 503) else 0)
    assert report["answers"].get(str(fault), 0) == (3 if isinstance(fault, int) else 0)
    assert report["unanswered_requests"] == (3 if fault == "reset" else 0)
    assert contents(server) == expected(*SMALL)


def test_a_stalled_request_times_out_and_is_retried(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*SMALL, "--processes", 1, "--retry-timeout", 6)
    with Server(fault=lambda request: "stall" if request.number == 30 else None) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0 and "1 requests without one" in done.stderr, done.stderr
    assert contents(server) == expected(*SMALL)


@pytest.mark.parametrize(("fault", "reason"), [(503, "HTTP 503: scripted"), ("stall", "ReadTimeout: ")])
def test_an_object_that_never_arrives_does_not_keep_the_others(
    expected: Callable[..., dict], tmp_path: Path, fault: Any, reason: str
) -> None:
    wanted = expected(*SMALL)
    cursed = sorted(wanted)[5]
    with Server(fault=lambda request: fault if request.name == cursed else None) as server:
        # One batch at a time: while the last file of a batch is tried again, nothing else is accepted.
        flags = ("--retry-timeout", 2, "--temp-dir", tmp_path / "temp", "--upload-workers", 1, "--processes", 1)
        done = upload(server, *SMALL, *flags)
        assert done.returncode == 1 and f"{cursed}: " in done.stderr and reason in done.stderr, done.stderr
        assert contents(server) == {name: content for name, content in wanted.items() if name != cursed}
        server.fault = lambda request: None
        assert upload(server, *SMALL, "--resume", "--temp-dir", tmp_path / "temp").returncode == 0
    assert contents(server) == wanted and not spool(tmp_path / "temp")


@pytest.mark.parametrize("fault", ["down", 503, "stall"])
def test_an_endpoint_that_is_down_ends_the_run_in_time(tmp_path: Path, fault: Any) -> None:
    server = Server(fault=lambda request: fault)
    with server if fault != "down" else Server() as served:
        url = "http://127.0.0.1:1" if fault == "down" else served.url
        flags = ("--bucket", "a-bucket", "--retry-timeout", 2, "--batch-size", 100, "--meters", 1000)
        started = time.monotonic()
        done = wattif(*SMALL, *flags, "--temp-dir", tmp_path, STORAGE_EMULATOR_HOST=url)
        elapsed = time.monotonic() - started
    assert done.returncode == 1 and "error: nothing arrives in gs://a-bucket any more" in done.stderr
    assert elapsed < 60  # and not 100 / 16 times as long as each request may take, for each of 20 batches
    assert "Traceback" not in done.stderr


def test_a_resumable_upload_survives_faults(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", 60, "--meters-per-file", 30, "--processes", 1)
    with Server(fault=lambda request: {1: 503, 3: "reset", 5: 429}.get(request.number)) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0, done.stderr
    assert contents(server) == expected(*flags)


def test_an_upload_whose_session_is_lost_does_not_end_the_run(expected: Callable[..., dict], tmp_path: Path) -> None:
    lost: list[str] = []

    def lose(request: Request) -> Any:
        if "upload_id" in request.query and not lost:
            lost.append(request.name)
        return 404 if "upload_id" in request.query and request.name in lost else None

    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", 60, "--meters-per-file", 20, "--processes", 1)
    with Server(fault=lose) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp")
        assert done.returncode == 1 and "; 1 failed" in done.stderr and "no bucket" not in done.stderr
        server.fault = lambda request: None
        assert upload(server, *flags, "--temp-dir", tmp_path / "temp", "--resume").returncode == 0
    assert contents(server) == expected(*flags)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, where this machine lets a test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a file system takes privileges")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_ends_the_run(expected: Callable[..., dict], small_disk: Path) -> None:
    # Files that take long to write, so that others have yet to be written when the first one is uploaded.
    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", 480, "--meters-per-file", 40, "--gzip")
    where = ("--processes", 1, "--temp-dir", small_disk, "--max-disk", "85MB")
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)

    def fill(request: Request) -> None:
        with (small_disk / "ballast").open("ab") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, ballast.tell() + shutil.disk_usage(small_disk).free)

    with Server(fault=lambda request: fill(request) if request.number == 0 else None) as server:
        done = upload(server, *flags, *where)
        assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
        wanted = expected(*flags)
        assert 1 <= len(server.objects) < 12 and contents(server).items() <= wanted.items()
        assert f"{len(server.objects)} objects, " in done.stderr and not list(small_disk.rglob("*.part"))
        (small_disk / "ballast").unlink()
        assert upload(server, *flags, *where, "--resume").returncode == 0
    assert contents(server) == wanted


def test_what_an_earlier_run_left_does_not_count_as_full(small_disk: Path) -> None:
    left = small_disk / ".wattif-4-x" / "4.1.dt=2024-01-01"
    left.mkdir(parents=True)
    (left / "020000ABCDEF.ndjson").write_bytes(bytes(3_500_000))
    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", 12, "--processes", 1)
    with Server() as server:
        done = upload(server, *flags, "--temp-dir", small_disk)
        assert done.returncode == 2 and "has 4.19 MB free" in done.stderr and not left.exists()
        assert upload(server, *flags, "--temp-dir", small_disk, "--max-disk", "3MB").returncode == 0
    assert len(server.objects) == 12


def test_a_temp_directory_that_vanishes_ends_the_run(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", 30, "--processes", 1, "--batch-size", 10)
    with Server(delay=0.02) as server:

        def vanish(request: Request) -> None:
            if request.number == 0:
                (tmp_path / "temp").rename(tmp_path / "elsewhere")

        server.fault = vanish
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", "--transfer-workers", 1)
        assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
        wanted = expected(*flags)
        assert contents(server).items() <= wanted.items() and f"{len(server.objects)} objects, " in done.stderr
        server.fault = lambda request: None
        assert upload(server, *flags, "--temp-dir", tmp_path / "temp", "--resume").returncode == 0
    assert contents(server) == wanted


def test_a_refusal_of_every_upload_and_then_of_the_disk_ends_the_run(tmp_path: Path) -> None:
    temp = tmp_path / "temp"

    def refuse(request: Request) -> int:
        for spool in temp.glob(".wattif-*"):
            spool.rename(tmp_path / "away")
        return 400

    # The second batch is being compressed when the first request comes, and waits for the uploads of the first.
    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--meters", 400, "--gzip", "--processes", 1)
    with Server(fault=refuse) as server:
        done = upload(server, *flags, "--upload-workers", 1, "--temp-dir", temp, "--json")
    assert done.returncode == json.loads(done.stdout)["exit_status"] == 1 and "Traceback" not in done.stderr


def test_a_file_that_disappears_before_its_upload(expected: Callable[..., dict], tmp_path: Path) -> None:
    removed: list[Path] = []

    def remove(request: Request) -> None:
        if request.number == 0:  # the first batch is written, and nothing but this file is read
            paths = tmp_path.glob(".wattif-*/*.0.dt=*/*.ndjson")
            removed.append(next(path for path in paths if path.name not in request.name))
            removed[0].unlink()

    flags = (*SMALL, "--processes", 1, "--upload-workers", 1, "--transfer-workers", 1, "--temp-dir", tmp_path)
    with Server(fault=remove) as server:
        done = upload(server, *flags)
        assert done.returncode == 1 and "; 1 failed" in done.stderr, done.stderr
        assert f"{removed[0]}: FileNotFoundError" in done.stderr
        server.fault = lambda request: None
        assert upload(server, *flags, "--resume").returncode == 0
    assert contents(server) == expected(*SMALL)


def test_a_file_that_cannot_be_deleted_ends_the_run_and_is_counted(tmp_path: Path) -> None:
    mounted: list[Path] = []

    def block(request: Request) -> None:
        if request.number == 25:  # a file on which something is mounted cannot be moved or deleted
            (path,) = tmp_path.glob(f".wattif-*/*{request.name}")
            if not subprocess.run(["mount", "--bind", path, path], capture_output=True, check=False).returncode:
                mounted.append(path)

    with Server(fault=block) as server:
        done = upload(server, *SMALL, "--processes", 1, "--temp-dir", tmp_path, "--json")
    if not mounted:
        pytest.skip("mounting a file takes privileges")
    subprocess.run(["umount", mounted[0]], check=True)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["error"].startswith("cannot delete ") and "Traceback" not in done.stderr
    assert 25 < report["objects_done"] == len(server.objects) < 120


def test_max_disk_caps_the_use_of_all_processes(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = ("--start", "2024-01-01", "--end", "2024-01-02", "--meters", 40, "--interval", 60, "--processes", 2)
    temp, peak = tmp_path / "temp", [0]

    def look(request: Request) -> None:
        peak[0] = max(peak[0], disk_use(temp))

    with Server(delay=0.01, fault=look) as server:
        done = upload(server, *flags, "--temp-dir", temp, "--max-disk", "1MB")
    assert done.returncode == 0 and 500_000 < peak[0] <= 1_000_000
    assert contents(server) == expected(*flags)
    for size, processes in (("200kB", 1), ("0.3MB", 2)):  # a file takes 115 kB, a process's directories 29 kB
        assert f"processes    {processes}" in wattif(*flags, "--max-disk", size, "--dry-run").stderr
    assert wattif(*flags, "--max-disk", "1MB", "--output-dir", tmp_path / "out").returncode == 2
    for size in ("100kB", "0", "-1", "1XB", "1iB", "GB", "1e9", "9" * 30):
        done = wattif(*flags, "--max-disk", size, "--dry-run")
        assert done.returncode == 2 and "--max-disk" in done.stderr and done.stderr.count("\n") == 1


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    modes: set[int] = set()

    def look(request: Request) -> None:
        for path in [*(tmp_path / "temp").rglob("*")]:
            try:
                modes.add(path.lstat().st_mode & 0o777)
            except FileNotFoundError:
                continue

    with Server(fault=look) as server:
        assert upload(server, *SMALL, "--temp-dir", tmp_path / "temp").returncode == 0
    assert modes == {0o700, 0o600}
    assert wattif(*SMALL, "--output-dir", tmp_path / "out").returncode == 0
    assert {path.stat().st_mode & 0o777 for path in spool(tmp_path / "out")} == {0o666 & ~umask()}


def umask() -> int:
    """The process's umask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_hostile_directories_are_directories_like_others(tmp_path: Path) -> None:
    for name in ("a\nb", "\x1b[31m", "ü ñ", "-x", "a'b\"c", "%s{}"):
        done = wattif(*SMALL, "--output-dir", tmp_path / name)
        assert done.returncode == 0 and len(files_below(tmp_path / name)) == 120
        assert "\x1b" not in done.stderr and "a\nb" not in done.stderr
        with Server() as server:
            assert upload(server, *SMALL, "--temp-dir", tmp_path / name / "temp").returncode == 0
            assert len(server.objects) == 120


def test_a_soak_of_faults_a_kill_and_a_resume(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (
        "--start",
        "2024-01-01",
        "--end",
        "2024-01-04",
        "--interval",
        7200,
        "--meters",
        500,
        "--processes",
        3,
        "--retry-timeout",
        15,
    )
    kinds = [429, 500, 502, 503, 504, "reset", "cut"]
    draw = random.Random(1)
    script = [draw.choice(kinds) if draw.random() < 0.1 else None for _ in range(10_000)]
    script[100:2000:1000] = ["stall"] * 2
    lock = threading.Lock()
    asked: Counter[Any] = Counter()

    def fault(request: Request) -> Any:
        about = (request.method, request.name or str(request.query))
        with lock:
            asked.update([about, None])
            # Not three times in a row for one request, for which the tool would be right to give up in time.
            return script[asked[None] % len(script)] if asked[about] % 3 else None

    temp = tmp_path / "temp"
    with Server(fault=fault, page=100) as server:
        with start("--bucket", "a-bucket", "--temp-dir", temp, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: len(server.objects) > 700)
            os.kill(children_of(process.pid)[1], signal.SIGKILL)
            process.communicate(timeout=100)
        assert process.returncode == 1 and len(server.objects) < 2000
        done = upload(server, "--temp-dir", temp, *flags, "--resume")
        assert done.returncode == 0, done.stderr
        done = upload(server, "--temp-dir", temp, *flags, "--verify")
        assert done.returncode == 0, done.stderr
    assert contents(server) == expected(*flags) and len(server.objects) == 2000 and not spool(temp)
