"""Resume and verify: what is there already, in a bucket and in a directory."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Callable

import pytest

from conftest import (
    DAY,
    DAYS,
    Emulator,
    children_of,
    contents,
    files_below,
    listings,
    report,
    start,
    until,
    upload,
    wattif,
)
from server import Request, Server, StoredObject, refusal

SMALL = (*DAYS, "--interval", "3600", "--processes", "2")


KINDS = [(), ("--meters-per-file", 4), ("--gzip",), ("--gzip", "--meters-per-file", 4)]


def damage(server: Server, name: str, content: bytes) -> None:
    """Put other content in an object's place."""
    server.objects[name] = StoredObject(len(content), server.crc32c(content), "", content)


@pytest.mark.parametrize("kind", KINDS)
def test_resume_makes_only_what_is_missing(expected: Callable[..., dict], tmp_path: Path, kind: tuple) -> None:
    flags = (*SMALL, "--meters", 30, *kind, "--temp-dir", tmp_path / "temp")
    wanted = expected(*SMALL, "--meters", 30, *kind)
    names = sorted(wanted)
    with Server(page=7) as server:
        assert upload(server, *flags).returncode == 0
        missing = [names[1], names[len(names) // 2], names[-1]]
        for name in missing:
            del server.objects[name]
        missing.append(names[2])  # which has another size, that of no object
        damage(server, names[2], b"" if "--gzip" in kind else wanted[names[2]][:-79])
        server.requests.clear()
        done = upload(server, *flags, "--resume")
        assert done.returncode == 0, done.stderr
        assert sorted(request.name for request in server.requests if request.name) == sorted(missing)
        assert f"{len(missing)} of " in done.stderr and f"{len(names) - len(missing)} skipped" in done.stderr
        assert contents(server) == wanted
        server.page = 1000
        server.requests.clear()
        assert upload(server, *flags, "--resume", "--processes", 1).returncode == 0
        assert len(server.requests) == 2  # one listing for each day and nothing else
        assert all(request.query["fields"] == "items(name,size,crc32c),nextPageToken" for request in server.requests)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_slice_lists_only_its_range_of_names(tmp_path: Path, kind: tuple) -> None:
    flags = (*SMALL, "--meters", 40, *kind, "--temp-dir", tmp_path, "--processes", 1)
    with Server() as server:
        assert upload(server, *flags).returncode == 0
        names = sorted(name for name in server.objects if "dt=2024-01-01/" in name)
        first, last = len(names) // 4, len(names) // 2
        server.requests.clear()
        done = upload(server, *flags, "--resume", "--task-index", 1, "--task-count", 4)
    assert done.returncode == 0 and f"{2 * (last - first)} skipped" in done.stderr
    bounds = server.requests[0].query["startOffset"], server.requests[0].query["endOffset"]
    assert [sum(name < bound for name in names) for bound in bounds] == [first, last]
    assert (names[first], names[last]) == bounds


def test_resume_of_local_files(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 30, "--output-dir", tmp_path)
    assert wattif(*flags).returncode == 0
    wanted = files_below(tmp_path)
    names = sorted(wanted)
    (tmp_path / names[3]).unlink()
    (tmp_path / names[40]).write_bytes(b"half")
    kept = (tmp_path / names[5]).stat().st_mtime_ns
    done = wattif(*flags, "--resume")
    assert done.returncode == 0 and "2 of 60 objects" in done.stderr and "58 skipped" in done.stderr
    assert files_below(tmp_path) == wanted and (tmp_path / names[5]).stat().st_mtime_ns == kept


def test_a_role_that_only_creates_is_told_to_resume(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 10, "--temp-dir", tmp_path)
    with Server(create_only=True) as server:
        assert upload(server, *flags).returncode == 0
        done = upload(server, *flags)
        assert done.returncode == 1 and "what is there cannot be replaced: --resume skips it" in done.stderr
        assert upload(server, *flags, "--resume").returncode == 0


def test_a_bucket_that_cannot_be_listed_ends_the_run(tmp_path: Path) -> None:
    for flag in ("--resume", "--verify"):
        for status, words, remedy in (
            (404, "The specified bucket does not exist.", "create gs://a-bucket, or name another one with --bucket"),
            (403, "x@y does not have storage.objects.list access", "grant roles/storage.objectViewer on gs://a-bucket"),
        ):
            with Server() as server:
                answer = refusal(status, words)
                server.fault = lambda request, answer=answer: answer if request.method == "GET" else None
                done = upload(server, *SMALL, "--meters", 10, "--temp-dir", tmp_path, flag)
            assert done.returncode == 1 and f"error: cannot go on: HTTP {status}: {words}; {remedy}" in done.stderr
            assert "Traceback" not in done.stderr


def test_a_refusal_ends_the_run_while_files_are_skipped(tmp_path: Path) -> None:
    # The first day lacks ten objects. The second of them is refused once the listing of the second day is being read.
    flags = (*DAYS, "--interval", 86_400, "--meters", 500, "--temp-dir", tmp_path, "--processes", 1)
    flags = (*flags, "--batch-size", 5)
    is_reading = threading.Event()

    def refuse(request: Request) -> int | None:
        if request.query.get("prefix") == "dt=2024-01-02/":
            is_reading.set()
            server.closing.wait(0.1)
        if not request.name or len(server.objects) <= 990:
            return None
        assert is_reading.wait(30)
        return 403

    with Server(page=1000) as server:
        assert upload(server, *flags).returncode == 0
        for name in sorted(server.objects)[:10]:
            del server.objects[name]
        server.requests.clear()
        server.page, server.fault = 5, refuse
        done = upload(server, *flags, "--resume")
    assert done.returncode == 1 and " uploads failed, at last " in done.stderr and "HTTP 403" in done.stderr
    assert 98 < len(listings(server)) < 150  # of 198 pages


def test_what_was_uploaded_before_a_listing_failed_is_counted(tmp_path: Path) -> None:
    def refuse(request: Request) -> int | None:
        return 403 if request.query.get("prefix") == "dt=2024-01-02/" else None

    with Server(delay=0.02, fault=refuse) as server:
        done = upload(server, *SMALL, "--meters", 100, "--temp-dir", tmp_path, "--resume", "--json", "--batch-size", 5)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["error"].startswith("cannot go on: HTTP 403: scripted; ")
    assert 0 < report["objects_done"] == len(server.objects) <= 100


def test_a_listing_is_retried_and_counted(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 10, "--temp-dir", tmp_path, "--processes", 1)
    with Server(fault=lambda request: 503 if request.number == 20 else None) as server:
        assert upload(server, *flags).returncode == 0
        done = upload(server, *flags, "--resume", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["retries"] == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("processes", [1, 3])
def test_verify_finds_what_is_missing_different_and_unexpected(tmp_path: Path, kind: tuple, processes: int) -> None:
    flags = (*SMALL, "--meters", 30, *kind, "--temp-dir", tmp_path / "temp", "--processes", processes)
    with Server(page=7) as server:
        assert upload(server, *flags).returncode == 0
        done = upload(server, *flags, "--verify")
        assert done.returncode == 0 and "0 missing, 0 different, 0 unexpected" in done.stderr, done.stderr
        names = sorted(server.objects)
        del server.objects[names[0]]
        content = bytearray(server.objects[names[3]].content)
        content[-5] ^= 1  # the same size
        damage(server, names[3], bytes(content))
        strange = [
            "dt=2024-01-01/0A0000ABCDEF.ndjson.bak",
            "dt=2024-01-02/a\nname",
            "dt=2024-01-02/~ünexpected",
            names[0] + ".part",
        ]
        for name in strange:
            damage(server, name, b"")
        damage(server, "dt=2024-01-03/0A0000ABCDEF.ndjson", b"")  # another day
        before = dict(server.objects)
        server.requests.clear()
        done = upload(server, *flags, "--verify", "--json")
    assert json.loads(done.stdout)["responses"] == {"200": len(server.requests)}
    assert done.returncode == 1 and "1 missing, 1 different, 4 unexpected" in done.stderr
    assert f"missing: {names[0]}\n" in done.stderr and f"different: {names[3]}\n" in done.stderr
    assert f"unexpected: {strange[0]}\n" in done.stderr and "unexpected: dt=2024-01-02/a\\nname\n" in done.stderr
    assert server.objects == before and not list((tmp_path / "temp").iterdir())


def test_verify_of_tasks_knows_the_meters_of_the_others(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 30, "--temp-dir", tmp_path)
    with Server() as server:
        assert upload(server, *flags).returncode == 0
        damage(server, "dt=2024-01-01/0A0000ABCDEF.ndjson", b"")
        reports = [upload(server, *flags, "--verify", "--task-index", index, "--task-count", 3) for index in range(3)]
    assert sorted(done.returncode for done in reports) == [0, 0, 1]
    assert ["1 unexpected" in done.stderr for done in reports] == [done.returncode == 1 for done in reports]
    assert all("20 objects" in done.stderr for done in reports)


def test_verify_needs_no_disk_and_says_that_a_process_died(tmp_path: Path) -> None:
    flags = ("--bucket", "a-bucket", *SMALL, "--meters", 60, "--verify", "--max-disk", 20_000, "--retry-timeout", 3)
    with Server(fault=lambda request: "stall" if "2024-01-02" in request.query["prefix"] else None) as server:
        with start(*flags, "--temp-dir", tmp_path / "none", STORAGE_EMULATOR_HOST=server.url) as process:
            until(
                lambda: len(server.requests) >= 6
            )  # both have told all of the first day, and ask again for the second
            os.kill(children_of(process.pid)[0], signal.SIGKILL)
            _, told = process.communicate(timeout=60)
    assert "their process was killed (out of memory?); run it again: files 0 to 29 of each day\n" in told
    assert 20 < told.count("\nmissing: ") <= 40 and not (tmp_path / "none").exists()


def test_verify_of_local_files(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 12, "--output-dir", tmp_path)
    assert wattif(*flags).returncode == 0 and wattif(*flags, "--verify").returncode == 0
    names = sorted(files_below(tmp_path))
    (tmp_path / names[1]).unlink()
    with (tmp_path / names[2]).open("r+b") as file:
        file.write(b"[")
    (tmp_path / "dt=2024-01-02" / "notes").symlink_to("nowhere")
    (tmp_path / "dt=2024-01-02" / ".77.part").touch()  # what a killed run leaves
    (tmp_path / "dt=2024-01-02" / "user.part").touch()
    done = wattif(*flags, "--verify")
    assert done.returncode == 1 and "1 missing, 1 different, 2 unexpected" in done.stderr
    assert wattif(*DAYS, "--output-dir", tmp_path / "nowhere", "--verify", "--meters", 2).returncode == 1
    assert not (tmp_path / "nowhere").exists()


def test_a_signal_ends_the_comparison_of_a_long_list_of_names(tmp_path: Path) -> None:
    # All files of a year are missing, so no batch is made for minutes.
    flags = ("--start", "2024-01-01", "--end", "2024-12-31", "--meters", 200_000, "--interval", 86_400)
    with start(*flags, "--verify", "--processes", 1, "--output-dir", tmp_path / "none", "-v") as process:
        assert any("drawing meters" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM; run it again\n" in told


def test_verify_of_very_many_missing_files_takes_no_time_worth_speaking_of(tmp_path: Path) -> None:
    # A sum that copies all findings for each new one would take minutes of CPU time.
    flags = (*DAY, "--interval", 86_400, "--meters", 60_000, "--processes", 1, "--output-dir", tmp_path / "none")
    done = wattif(*flags, "--verify", "--json", prefix=("prlimit", "--cpu=15"))
    assert done.returncode == 1 and report(done)["objects_missing"] == 60_000, done.stderr[-300:]
    assert len(report(done)["failures"]) == 20


def test_verify_of_a_few_missing_files_lists_twenty(tmp_path: Path) -> None:
    # They are all found before the process tells of them for the first time.
    flags = (*DAY, "--interval", 3600, "--meters", 100, "--processes", 1, "--output-dir", tmp_path / "none")
    done = wattif(*flags, "--verify", "--json")
    assert report(done)["objects_missing"] == 100 and len(report(done)["failures"]) == 20


def test_verify_on_an_emulator_that_heeds_no_bounds(emulator: Emulator, tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 20, "--temp-dir", tmp_path)
    assert emulator.run(*flags).returncode == 0
    names = [*emulator.objects()]
    if names != sorted(names):
        pytest.skip("this version of the emulator does not list in the order of names, as the service does")
    done = emulator.run(*flags, "--verify", "--processes", 3)
    assert done.returncode == 0 and "0 missing, 0 different, 0 unexpected" in done.stderr, done.stderr
