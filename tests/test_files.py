"""Batches of files: what is written, and what a disk does to it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from conftest import DAY, DAYS, SPOOL, contents, files_below, spool, start, upload, wattif
from server import Request, Server

SMALL = (*DAYS, "--interval", "3600")


def umask() -> int:
    """The process's umask."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_an_unfinished_file_has_another_name_and_is_cleared(tmp_path: Path) -> None:
    # A file-size limit ends the write in the middle, as a kill would; the limit itself only makes write() fail.
    limit = 500_000
    resource_limit = ("prlimit", f"--fsize={limit}:{limit}")
    run = (*DAY, "--meters", "3", "--processes", "1")
    out = tmp_path / "out"
    done = wattif(*run, "--output-dir", out, prefix=resource_limit)
    assert done.returncode == 1 and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert not spool(out)
    with Server() as server:
        left = tmp_path / SPOOL / "4.1.dt=2023-01-01"
        left.mkdir(parents=True)
        for name in ("0A0000ABCDEF.ndjson", ".77.part"):
            (left / name).write_bytes(b"half")
        (tmp_path / SPOOL / "plain").touch()
        assert upload(server, *run, "--temp-dir", tmp_path, prefix=resource_limit).returncode == 1
        assert not server.objects
        assert upload(server, *run, "--temp-dir", tmp_path).returncode == 0
    assert len(server.objects) == 3 and list(tmp_path.iterdir()) == [out]


def test_a_full_disk_ends_the_run(expected: Callable[..., dict], small_disk: Path) -> None:
    # Files that take long to write, so that others have yet to be written when the first one is uploaded.
    flags = (*DAY, "--meters", 480, "--meters-per-file", 40, "--gzip")
    where = ("--processes", 1, "--temp-dir", small_disk, "--max-disk", "85MB")
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)

    def fill(request: Request) -> None:
        with contextlib.suppress(OSError), (small_disk / "ballast").open("ab", 0) as ballast:
            while True:
                ballast.write(bytes(1 << 16))

    with Server(fault=lambda request: fill(request) if request.number == 0 else None) as server:
        done = upload(server, *flags, *where)
        assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
        wanted = expected(*flags)
        assert 1 <= len(server.objects) < 12 and contents(server).items() <= wanted.items()
        assert f"{len(server.objects)} of " in done.stderr and not list(small_disk.rglob("*.part"))
        (small_disk / "ballast").unlink()
        assert upload(server, *flags, *where, "--resume").returncode == 0
    assert contents(server) == wanted


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    modes: set[int] = set()

    def look(request: Request) -> None:
        for path in [*(tmp_path / "temp").rglob("*")]:
            try:
                modes.add(path.lstat().st_mode & 0o777)
            except FileNotFoundError:
                continue

    with Server(fault=look) as server:
        assert upload(server, *SMALL, "--meters", 60, "--temp-dir", tmp_path / "temp").returncode == 0
    assert modes == {0o700, 0o600}
    assert wattif(*SMALL, "--meters", 60, "--output-dir", tmp_path / "out").returncode == 0
    assert {path.stat().st_mode & 0o777 for path in spool(tmp_path / "out")} == {0o666 & ~umask()}


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
