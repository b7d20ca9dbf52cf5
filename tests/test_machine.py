"""The machine: directories, memory, processes and signals."""

from __future__ import annotations

import os
import platform
import re
import signal
import threading
from pathlib import Path
from typing import Callable

import pytest

from conftest import (
    DAY,
    DAYS,
    SPOOL,
    begin,
    children_of,
    contents,
    files_below,
    gone,
    planned,
    refused,
    spool,
    start,
    until,
    upload,
    wattif,
)
from server import Request, Server

SMALL = (*DAYS, "--interval", "3600", "--meters", "60", "--batch-size", "10")
SLOW = ("--upload-workers", 1, "--transfer-workers", 1)


def test_a_temp_dir_that_cannot_be_is_refused() -> None:
    for directory in ("/dev/null/temp", "/proc/temp", ""):
        refused(wattif(*DAYS, "--temp-dir", directory, STORAGE_EMULATOR_HOST="http://127.0.0.1:1"), "--temp-dir")


def test_too_little_free_disk_is_refused(tmp_path: Path) -> None:
    refused(wattif(*DAYS, "--meters", 10**7, "--output-dir", tmp_path), "--output-dir")
    flags = ("--meters", 10**7, "--batch-size", 100_000, "--upload-workers", 200, "--temp-dir", tmp_path)
    refused(wattif(*DAYS, *flags, STORAGE_EMULATOR_HOST="http://127.0.0.1:1"), "--temp-dir")
    assert list(tmp_path.iterdir()) == []


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
        assert report.count("stopping: ") == report.count("stopped by ") == 1
        assert 15 < len(server.objects) < 120 and not spool(tmp_path)
        assert f"{len(server.objects)} of " in report and "0 failed" in report
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
            until(lambda: gone(children))


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
            until(lambda: gone(children))
        assert contents(server).items() <= wanted.items()
        server.delay = 0
        done = upload(server, "--temp-dir", temp, *flags, "--resume")
    assert done.returncode == 0 and contents(server) == wanted and not spool(temp)


def test_what_is_not_wattifs_stays(tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("mine.txt", "0A0000ABCDEF.ndjson", ".wattif-4-x/4.1.dt=2024-01-01/mine.txt")]
    mine[2].parent.mkdir(parents=True)
    for path in mine:
        path.write_text("mine")
    with Server() as server:
        assert upload(server, *SMALL, "--temp-dir", tmp_path).returncode == 0
    assert files_below(tmp_path) == {str(path.relative_to(tmp_path)): b"mine" for path in mine}


def test_a_symbolic_link_in_the_temp_directory_is_not_followed(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "dt=2024-01-01"
    mine.mkdir(parents=True)
    (mine / "0A0000ABCDEF.ndjson").write_text("mine")
    temp = tmp_path / "temp"
    temp.mkdir()
    with Server() as server:
        (temp / SPOOL).symlink_to(mine)
        refused(upload(server, *SMALL, "--temp-dir", temp), "--temp-dir")
        (temp / SPOOL).unlink()
        (temp / SPOOL).mkdir()
        (temp / SPOOL / "5.1.dt=2024-01-01").symlink_to(mine)
        assert upload(server, *SMALL, "--temp-dir", temp).returncode == 0
    assert files_below(mine) == {"0A0000ABCDEF.ndjson": b"mine"} and not list(temp.iterdir())


def test_a_spool_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("giving a directory away takes privileges")
    (tmp_path / SPOOL).mkdir()
    os.chown(tmp_path / SPOOL, 12345, 12345)
    with Server() as server:
        done = upload(server, *SMALL, "--temp-dir", tmp_path)
    refused(done, "belongs to another user")
    assert not server.requests


def test_two_runs_on_one_temp_directory(tmp_path: Path) -> None:
    with Server(delay=0.05) as server:
        with begin(server, tmp_path, *SMALL, "--end", "2024-12-31", "--transfer-workers", 1) as process:
            done = upload(server, *SMALL, "--temp-dir", tmp_path)
            assert done.returncode == 1 and "is in use by another run" in done.stderr
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


def test_what_an_earlier_run_left_does_not_count_as_full(small_disk: Path) -> None:
    left = small_disk / SPOOL / "4.1.dt=2024-01-01"
    left.mkdir(parents=True)
    (left / "0A0000ABCDEF.ndjson").write_bytes(bytes(3_500_000))
    flags = (*DAY, "--meters", 12, "--processes", 1)
    with Server() as server:
        done = upload(server, *flags, "--temp-dir", small_disk)
        assert done.returncode == 2 and "has 4.19 MB free" in done.stderr and not left.exists()
        assert upload(server, *flags, "--temp-dir", small_disk, "--max-disk", "3MB").returncode == 0
    assert len(server.objects) == 12


def test_a_temp_directory_that_vanishes_ends_the_run(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*DAY, "--meters", 30, "--processes", 1, "--batch-size", 10)
    with Server(delay=0.02) as server:

        def vanish(request: Request) -> None:
            if request.number == 5:
                (tmp_path / "temp").rename(tmp_path / "elsewhere")

        server.fault = vanish
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", "--transfer-workers", 1)
        assert done.returncode == 1 and "error: " in done.stderr and "Traceback" not in done.stderr
        wanted = expected(*flags)
        assert contents(server).items() <= wanted.items() and f"{len(server.objects)} of " in done.stderr
        server.fault = lambda request: None
        assert upload(server, *flags, "--temp-dir", tmp_path / "temp", "--resume").returncode == 0
    assert contents(server) == wanted


def test_hostile_directories_are_directories_like_others(tmp_path: Path) -> None:
    for name in ("a\nb \x1b[31m ü ñ", "-x", "a'b\"c %s{}"):
        done = wattif(*SMALL, "--output-dir", tmp_path / name)
        assert done.returncode == 0 and len(files_below(tmp_path / name)) == 120
        assert "\x1b" not in done.stderr and "a\nb" not in done.stderr
        with Server() as server:
            assert upload(server, *SMALL, "--temp-dir", tmp_path / name / "temp").returncode == 0
            assert len(server.objects) == 120


def test_what_an_earlier_run_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    mine = tmp_path / "dt=2024-01-01" / "0A0000000000.ndjson"
    mine.parent.mkdir()
    mine.write_text("mine")
    with Server(fault=lambda request: 400 if request.number == 3 else None) as server:
        assert upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 25).returncode == 1
        assert len(files_below(tmp_path)) == 2
        assert upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 25).returncode == 0
    assert files_below(tmp_path) == {"dt=2024-01-01/0A0000000000.ndjson": b"mine"}
    assert len(server.objects) == 50


def test_a_child_that_dies_fails_the_run_and_names_its_slice(tmp_path: Path) -> None:
    with Server(delay=0.05) as server:
        flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path, "--processes", 2, "--batch-size", 5)
        with start(*SMALL, "--meters", 100, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: len(server.objects) > 10)
            os.kill(children_of(process.pid)[0], signal.SIGKILL)
            _, report = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "failed: files 0 to 49 of each day: their process was killed (out of memory?)" in report
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
            until(lambda: gone(children))


def test_processes_that_cannot_be_started_end_the_run(tmp_path: Path) -> None:
    patch = """
real, number = generator.os.fork, generator.itertools.count()
def fork():
    if next(number) == 8:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return real()
generator.os.fork = fork
None"""
    with Server(delay=0.02) as server:
        flags = (*SMALL, "--meters", 1000, "--processes", 12, "--temp-dir", tmp_path)
        done = upload(server, *flags, patch=patch)
    assert done.returncode == 1 and "error: cannot start 12 processes: Resource" in done.stderr
    assert "lower --processes" in done.stderr and len(server.objects) < 2000


def test_free_disk_is_compared_with_what_compressed_files_need_at_least(small_disk: Path) -> None:
    # 45 files of 31 MB in all take 3.4 MB, 500 take much more than the disk has; whether 50 do is not known before.
    flags = (*DAY, "--gzip", "--output-dir", small_disk)
    refused(wattif(*flags, "--meters", 500), "--output-dir")
    assert not list(small_disk.iterdir())
    done = wattif(*flags, "--meters", 45, "--interval", 30, "--processes", 1)
    assert done.returncode == 0, done.stderr
    done = wattif(*flags, "--meters", 45, "--interval", 30, "--resume")  # needs nothing, and there is next to nothing
    assert done.returncode == 0 and "45 skipped" in done.stderr


def test_a_signal_to_the_process_group_is_told_once(tmp_path: Path) -> None:
    # As Ctrl-C does: the children get it too.
    with Server(delay=0.05) as server:
        with begin(server, tmp_path, *SMALL, *SLOW, "--processes", 3, prefix=["setsid"]) as process:
            os.killpg(process.pid, signal.SIGINT)
            _, told = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in told
    assert told.count("stopping: ") == told.count("stopped by SIGINT") == 1
    assert "process ended" not in told
    assert f"{len(server.objects)} of " in told and "0 failed" in told and not spool(tmp_path)


def test_nothing_is_retried_after_a_signal(tmp_path: Path) -> None:
    with Server(fault=lambda request: 503 if request.number >= 20 else None) as server:
        with begin(server, tmp_path, *SMALL, "--processes", 1, "--transfer-workers", 4) as process:
            until(lambda: len(server.requests) > 24)
            process.send_signal(signal.SIGTERM)
            assert any("stopping: " in line for line in process.stderr)
            requests = len(server.requests)
            _, told = process.communicate(timeout=30)
    assert process.returncode == 143 and "stopped by SIGTERM" in told and "Traceback" not in told
    assert len(server.requests) <= requests + 8  # what was under way, of two batches
    assert len(server.objects) == 20 and "20 objects, " in told


@pytest.mark.parametrize("processes", [2, 3])
def test_a_refusal_in_one_process_stops_all(tmp_path: Path, processes: int) -> None:
    flags = (*DAY, "--interval", 86_400, "--meters", 300, *SLOW, "--processes", processes, "--temp-dir", tmp_path)
    names: list[str] = []

    def refuse(request: Request) -> int | None:
        if request.name < names[100]:  # of the first slice
            return 403
        server.closing.wait(0.1)
        return None

    with Server(fault=lambda request: names.append(request.name)) as server:
        assert upload(server, *flags).returncode == 0
        names.sort()
        server.objects.clear()
        server.requests.clear()
        server.fault = refuse
        done = upload(server, *flags)
    assert done.returncode == 1 and done.stderr.count("error: nothing was accepted: HTTP 403") == 1, done.stderr
    assert len(server.objects) < 60  # the other processes would have gone on for 10 seconds and more
    assert f"{len(server.objects)} of " in done.stderr


def page_faults(server: Server, tmp_path: Path, patch: str) -> int:
    """Return the minor page faults of an upload of 300 objects of 683 kB."""
    flags = (*DAY, "--meters", 300, "--processes", 1, "--temp-dir", tmp_path, "--bucket", "a-bucket")
    with start(*flags, patch=patch, STORAGE_EMULATOR_HOST=server.url) as process:
        process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    assert status == 0
    return usage.ru_minflt


def test_memory_of_finished_uploads_is_used_again(tmp_path: Path) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("it is glibc that gives memory back")
    with Server(keep=False) as server:
        kept = page_faults(server, tmp_path, "pass")
        given_back = page_faults(server, tmp_path, "generator.keep_freed_memory = lambda: None")
    assert given_back - kept > 300 * 20, (kept, given_back)  # measured: 55 for each object


def test_a_failure_stops_every_process_at_once_however_slow_the_parent_is(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 1000, "--processes", 2, "--batch-size", 4, "--temp-dir", tmp_path)
    with Server() as server:

        def refuse(request: Request) -> int:
            if request.number == 0:
                process.send_signal(signal.SIGSTOP)  # the parent hears nothing of what its children tell
            return 400

        server.fault = refuse
        with start("--bucket", "a-bucket", *flags, "-v", STORAGE_EMULATOR_HOST=server.url) as process:
            children = until(lambda: server.requests and children_of(process.pid))
            until(lambda: all(state(child) in "ZX" for child in children))
            process.send_signal(signal.SIGCONT)
            _, told = process.communicate(timeout=60)
    assert process.returncode == 1 and "nothing was accepted" in told
    left = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*.ndjson"))
    assert 0 < left <= planned(told, "disk")


def test_children_that_cannot_tell_their_parent_anything_do_not_outlive_it(tmp_path: Path) -> None:
    flags = (*DAY, "--interval", 86_400, "--meters", 100_000, "--processes", 2, "--batch-size", 5)
    with Server() as server:
        to = ("--bucket", "a-bucket", "--temp-dir", tmp_path)
        with start(*flags, *to, STORAGE_EMULATOR_HOST=server.url) as process:
            children = until(lambda: server.objects and children_of(process.pid))
            process.send_signal(signal.SIGSTOP)
            until(lambda: not any(state(child) in "RD" for child in children) and stands_still(server))
            process.kill()
            until(lambda: all(state(child) in "ZX" for child in children))
        assert upload(server, *SMALL, "--temp-dir", tmp_path).returncode == 0


def state(pid: int) -> str:
    """The state of a process as proc(5) writes it; X once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def stands_still(server: Server) -> bool:
    """Whether nothing arrives for a second, for the pipes of the children are full."""
    before = len(server.requests)
    threading.Event().wait(1.0)
    return len(server.requests) == before


def as_nobody() -> tuple[str, ...]:
    """Return the beginning of a command line that runs as another user. Skips the test where none can run it."""
    if os.getuid():
        pytest.skip("running as another user takes privileges")
    command = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if wattif("--help", prefix=command).returncode:
        pytest.skip("this directory, or Python, cannot be read by other users")
    return command


def test_two_users_share_a_temp_directory(expected: Callable[..., dict], tmp_path: Path) -> None:
    nobody = as_nobody()
    for folder in [tmp_path, *tmp_path.parents][:-2]:
        folder.chmod(0o755)
    temp = tmp_path / "temp"
    temp.mkdir()
    temp.chmod(0o1777)
    with Server(delay=0.05) as server:
        with begin(server, temp, *SMALL) as mine:
            modes = {path.name: path.stat().st_mode & 0o7777 for path in temp.iterdir()}
            done = upload(server, *SMALL, "--temp-dir", temp, prefix=nobody)
            assert done.returncode == 0, done.stderr
            mine.communicate(timeout=60)
    assert mine.returncode == 0 and modes == {SPOOL: 0o700}
    assert contents(server) == expected(*SMALL) and not list(temp.iterdir())


def test_a_spool_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / SPOOL).touch()
    with Server() as server:
        refused(upload(server, *SMALL, "--temp-dir", tmp_path), str(tmp_path / SPOOL))
    assert not server.requests and (tmp_path / SPOOL).is_file()


def test_what_takes_the_place_of_the_spool_is_not_cleared(tmp_path: Path) -> None:
    # Who may write to the directory above exchanges the spool when it has been locked.
    mine, temp = tmp_path / "mine", tmp_path / "temp"
    left = ("file", "folder/file")
    for root in (mine, temp / SPOOL):
        (root / "folder").mkdir(parents=True)
        for name in left:
            (root / name).write_text("mine")
    patch = f"""
def exchange(lock, flags):
    import os
    os.rename({str(temp / SPOOL)!r}, {str(temp / "aside")!r})
    os.symlink({str(mine)!r}, {str(temp / SPOOL)!r})
generator.fcntl.flock = exchange
None"""
    with Server() as server:
        done = upload(server, *SMALL, "--temp-dir", temp, patch=patch)
    assert "Traceback" not in done.stderr and "deleting" in done.stderr
    assert {name: (mine / name).read_text() for name in left} == dict.fromkeys(left, "mine")
    assert files_below(temp / "aside") == {}


@pytest.mark.parametrize("kind", [(), ("--gzip",)])
def test_a_disk_error_names_the_path_and_the_flags_that_help(tmp_path: Path, kind: tuple) -> None:
    flags = (*DAY, "--meters", 5, "--processes", 1, *kind)
    with Server() as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", prefix=("prlimit", "--fsize=20000"))
        assert done.returncode == 1 and not server.objects and "Traceback" not in done.stderr
    error = re.search(r"^error: cannot go on: .*File too large: '(.*)'; see (.*); fix that", done.stderr, re.M)
    assert error[1].startswith(f"{tmp_path}/temp/{SPOOL}/") and error[2] == "--temp-dir, --max-disk and --batch-size"
    assert not spool(tmp_path / "temp")
    done = wattif(*flags, "--output-dir", tmp_path / "out", prefix=("prlimit", "--fsize=20000"))
    assert done.returncode == 1 and "; see --output-dir; " in done.stderr and not spool(tmp_path / "out")


def test_without_the_default_temp_directory_it_is_that_of_the_system(tmp_path: Path) -> None:
    absent, system = tmp_path / "absent", tmp_path / "system"
    system.mkdir()
    patch = f"generator.DEFAULT_TEMP_DIR = {str(absent)!r}"
    with Server() as server:
        done = upload(server, *SMALL, patch=patch, TMPDIR=str(system))
        assert done.returncode == 0 and f" at once in {system}\n" in done.stderr and not absent.exists()
        absent.mkdir()
        done = upload(server, *SMALL, patch=patch, TMPDIR=str(system))
        assert done.returncode == 0 and f" at once in {absent}\n" in done.stderr
    assert " at once in /tmp\n" in wattif(*SMALL, "--dry-run", patch="generator.DEFAULT_TEMP_DIR = '/no'").stdout


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 4),
        ({"cpu.max": "max 100000"}, 4),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "20000 100000"}, 1),
        ({"cpu.max": "800000 100000"}, 4),
    ],
)
def test_the_cores_are_those_that_affinity_and_quota_allow(tmp_path: Path, files: dict[str, str], cores: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    patch = (
        f"generator.os.sched_getaffinity = lambda _: range(4); generator.CONTROL_GROUPS = generator.Path('{tmp_path}')"
    )
    done = wattif(*DAY, "--dry-run", patch=patch)
    assert done.returncode == 0 and planned(done.stdout, "processes") == cores, done.stderr
    assert planned(wattif(*DAY, "--dry-run", "--processes", 7, patch=patch).stdout, "processes") == 7


def test_an_object_over_5_tib_is_refused() -> None:
    flags = (*DAY, "--interval", 1, "--meters", 806_000, "--meters-per-file", 806_000, "--dry-run")
    refused(wattif(*flags), "--meters-per-file")
    assert "5 TiB" not in wattif(*flags, "--meters", 805_000).stderr


def test_the_limit_of_open_files_is_raised(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 400, "--batch-size", 200, "--processes", 1, "--temp-dir", tmp_path)
    with Server(delay=0.05) as server:
        done = upload(server, *flags, "--transfer-workers", 80, prefix=("prlimit", "--nofile=60:2000"))
    assert done.returncode == 0 and len(server.objects) == 800, done.stderr
