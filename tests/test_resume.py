"""Resume and verify: what is there already, in a bucket and in a directory."""

from __future__ import annotations

import json
import os
import signal
from array import array
from pathlib import Path
from typing import Any, Callable

import pytest

import generator
from conftest import DAYS, children_of, contents, files_below, start, until, upload, wattif
from server import Server, StoredObject

SMALL = (*DAYS, "--interval", "3600", "--processes", "2")
KINDS = [(), ("--meters-per-file", 4), ("--gzip",), ("--gzip", "--meters-per-file", 4)]


def listings(server: Server) -> list[Any]:
    """The requests that list."""
    return [request for request in server.requests if request.method == "GET"]


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
        assert f"{len(missing)} objects" in done.stderr and f"{len(names) - len(missing)} skipped" in done.stderr
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
    assert names[first].startswith(bounds[0]) and names[last].startswith(bounds[1])


def test_resume_of_local_files(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 30, "--output-dir", tmp_path)
    assert wattif(*flags).returncode == 0
    wanted = files_below(tmp_path)
    names = sorted(wanted)
    (tmp_path / names[3]).unlink()
    (tmp_path / names[40]).write_bytes(b"half")
    kept = (tmp_path / names[5]).stat().st_mtime_ns
    done = wattif(*flags, "--resume")
    assert done.returncode == 0 and "2 objects" in done.stderr and "58 skipped" in done.stderr
    assert files_below(tmp_path) == wanted and (tmp_path / names[5]).stat().st_mtime_ns == kept


def test_a_role_that_only_creates_is_told_to_resume(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 10, "--temp-dir", tmp_path)
    with Server() as server:
        server.fault = lambda request: 403 if request.name in server.objects else None
        assert upload(server, *flags).returncode == 0
        done = upload(server, *flags)
        assert done.returncode == 1 and "--resume skips what is there" in done.stderr
        assert upload(server, *flags, "--resume").returncode == 0


def test_a_bucket_that_cannot_be_listed_ends_the_run(tmp_path: Path) -> None:
    for flag in ("--resume", "--verify"):
        for status, reason in ((404, "there is no bucket gs://a-bucket"), (403, "no permission to list gs://a-bucket")):
            with Server() as server:
                server.fault = lambda request, status=status: status if request.method == "GET" else None
                done = upload(server, *SMALL, "--meters", 10, "--temp-dir", tmp_path, flag)
            assert done.returncode == 1 and f"error: {reason}" in done.stderr
            assert "Traceback" not in done.stderr


def test_a_refusal_ends_the_run_while_files_are_skipped(tmp_path: Path) -> None:
    flags = ("--start", "2024-01-01", "--end", "2024-01-01", "--interval", 3600, "--meters", 2000, "--batch-size", 20)
    with Server() as server:
        assert upload(server, *flags, "--temp-dir", tmp_path, "--processes", 1).returncode == 0
        for name in sorted(server.objects)[:20]:  # a batch, after which the listing has nothing to do for the pipeline
            del server.objects[name]
        server.requests.clear()
        server.delay, server.page, server.fault = 0.02, 10, lambda request: 403 if request.name else None
        done = upload(server, *flags, "--temp-dir", tmp_path, "--processes", 1, "--resume")
    assert done.returncode == 1 and "no permission to create" in done.stderr
    assert len(listings(server)) < 150  # of 198 pages


def test_what_was_uploaded_before_a_listing_failed_is_counted(tmp_path: Path) -> None:
    def refuse(request: Any) -> Any:
        return 403 if request.query.get("prefix") == "dt=2024-01-02/" else None

    with Server(delay=0.02, fault=refuse) as server:
        done = upload(server, *SMALL, "--meters", 100, "--temp-dir", tmp_path, "--resume", "--json", "--batch-size", 5)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and "no permission to list" in report["error"]
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
            "dt=2024-01-01/020000ABCDEF.ndjson.bak",
            "dt=2024-01-02/a\nname",
            "dt=2024-01-02/~ünexpected",
            names[0] + ".part",
        ]
        for name in strange:
            damage(server, name, b"")
        server.deaf = processes == 3
        damage(server, "dt=2024-01-03/020000ABCDEF.ndjson", b"")  # another day
        before = dict(server.objects)
        server.requests.clear()
        done = upload(server, *flags, "--verify", "--json")
    assert json.loads(done.stdout)["answers"] == {"200": len(server.requests)}
    assert done.returncode == 1 and "1 missing, 1 different, 4 unexpected" in done.stderr
    assert f"missing: {names[0]}\n" in done.stderr and f"different: {names[3]}\n" in done.stderr
    assert f"unexpected: {strange[0]}\n" in done.stderr and "unexpected: dt=2024-01-02/a\\nname\n" in done.stderr
    assert server.objects == before and not list((tmp_path / "temp").iterdir())


def test_verify_of_tasks_knows_the_meters_of_the_others(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 30, "--temp-dir", tmp_path)
    with Server() as server:
        assert upload(server, *flags).returncode == 0
        damage(server, "dt=2024-01-01/020000ABCDEF.ndjson", b"")
        reports = [upload(server, *flags, "--verify", "--task-index", index, "--task-count", 3) for index in range(3)]
    assert sorted(done.returncode for done in reports) == [0, 0, 1]
    assert ["1 unexpected" in done.stderr for done in reports] == [done.returncode == 1 for done in reports]
    assert all("20 objects" in done.stderr for done in reports)


def test_verify_needs_no_disk_and_says_that_a_process_died(tmp_path: Path) -> None:
    flags = ("--bucket", "a-bucket", *SMALL, "--meters", 60, "--verify", "--max-disk", 20_000, "--retry-timeout", 2)
    with Server(fault=lambda request: "stall" if "2024-01-02" in request.query["prefix"] else None) as server:
        with start(*flags, "--temp-dir", tmp_path / "none", STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: len(server.requests) >= 4)  # both have found all of the first day missing
            os.kill(children_of(process.pid)[0], signal.SIGKILL)
            _, told = process.communicate(timeout=60)
    assert "files 0 to 29 of each day: their process ended with exit code -9; run it again\n" in told
    assert 20 < told.count("\nmissing: ") <= 40 and not (tmp_path / "none").exists()


def test_names_of_the_last_block_are_bounded() -> None:
    args = ["--start", "2024-01-01", "--end", "2024-01-01", "--meters", str(2**36), "--task-count", "8"]
    run = generator.plan(generator.build_parser().parse_args([*args, "--task-index", "6"]))
    files = generator.share(run.day_files, 6, 8)
    names = [generator.bound_names(run, part, array("Q")) for part in (files, range(files.stop, files.stop + 2**20))]
    assert names == [("02C000000000", "02E000000000"), ("02E000000000", "02E001000000")]
    assert generator.bound_names(run, range(2**36 - 2**20, 2**36), array("Q")) == ("02FFFF000000", None)


def test_verify_of_a_slice_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # With blocks of eight meters, 20 meters are three blocks, and slices begin and end inside of them.
    monkeypatch.setattr(generator, "BLOCK_METERS", 8)
    flags = [*SMALL, "--meters", "20", "--output-dir", str(tmp_path)]
    assert generator.main([*flags, "--processes", "3"]) == 0
    assert len(files_below(tmp_path)) == 40
    for index in range(4):
        assert generator.main([*flags, "--verify", "--task-index", str(index), "--task-count", "4"]) == 0
    (tmp_path / "dt=2024-01-02" / "020001FFFFFF.ndjson").touch()
    verdicts = [generator.main([*flags, "--verify", "--task-index", str(i), "--task-count", "4"]) for i in range(4)]
    assert sum(verdicts) == 1
    assert generator.main([*flags, "--verify", "--processes", "3"]) == 1


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
