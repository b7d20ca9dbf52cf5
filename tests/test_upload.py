"""Uploads: what arrives, what is deleted, and what a run says when the bucket or the disk refuses."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Callable

import pytest

from conftest import DAY, DAYS, Emulator, contents, files_below, spool, upload, wattif
from server import Reply, Request, Server

ONE = (*DAYS, "--processes", "1")
SMALL = (*ONE, "--interval", "3600")
SIXTY = (*SMALL, "--meters", 60, "--batch-size", 10)


def test_a_refusal_of_every_upload_and_then_of_the_disk_ends_the_run(tmp_path: Path) -> None:
    temp = tmp_path / "temp"

    def refuse(request: Request) -> int:
        for left in temp.glob(".wattif-*"):
            left.rename(tmp_path / "away")
        return 400

    # The second batch is being compressed when the first request comes, and waits for the uploads of the first.
    flags = (*DAY, "--meters", 400, "--gzip", "--processes", 1)
    with Server(fault=refuse) as server:
        done = upload(server, *flags, "--upload-workers", 1, "--temp-dir", temp, "--json")
    assert done.returncode == json.loads(done.stdout)["exit_status"] == 1 and "Traceback" not in done.stderr


def test_a_file_that_disappears_before_its_upload(expected: Callable[..., dict], tmp_path: Path) -> None:
    removed: list[Path] = []

    def remove(request: Request) -> None:
        if request.number == 1:  # the second batch is written, and nothing but this file is read
            paths = tmp_path.glob(".wattif-*/*.0.dt=*/*.ndjson")
            removed.append(next(path for path in paths if path.name not in request.name))
            removed[0].unlink()

    flags = (*SIXTY, "--upload-workers", 1, "--transfer-workers", 1, "--temp-dir", tmp_path)
    with Server(fault=remove) as server:
        done = upload(server, *flags)
        assert done.returncode == 1 and "; 1 failed" in done.stderr, done.stderr
        assert f"{removed[0]}: FileNotFoundError" in done.stderr
        server.fault = lambda request: None
        assert upload(server, *flags, "--resume").returncode == 0
    assert contents(server) == expected(*SIXTY)


def test_a_file_that_cannot_be_deleted_ends_the_run_and_is_counted(tmp_path: Path) -> None:
    paths: list[Path] = []
    mounted: list[Path] = []

    def block(request: Request) -> None:
        if request.number == 25:  # a file on which something is mounted cannot be deleted
            (path,) = tmp_path.glob(f".wattif-*/*.{request.name}")
            paths.append(path)
            if not subprocess.run(["mount", "--bind", path, path], capture_output=True, check=False).returncode:
                mounted.append(path)

    with Server(fault=block) as server:
        done = upload(server, *SIXTY, "--temp-dir", tmp_path, "--json")
    if not mounted:
        pytest.skip("mounting a file takes privileges")
    subprocess.run(["umount", mounted[0]], check=True)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and report["error"].startswith("cannot go on: OSError: ")
    assert str(paths[0]) in report["error"] and "Traceback" not in done.stderr
    assert 25 < report["objects_done"] == len(server.objects) < 120


def test_full_days_arrive_exactly(emulator: Emulator, expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*DAYS, "--meters", 100)
    done = emulator.run(*flags, "--temp-dir", tmp_path / "temp", "--batch-size", 30)
    assert done.returncode == 0, done.stderr
    assert "200 objects, 1,728,000 readings" in done.stderr and done.stdout == ""
    made, wanted = emulator.objects(), expected(*flags)
    assert len(wanted) == 200
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
    assert "error: nothing was accepted: HTTP 404" in done.stderr
    assert "create gs://no-such-bucket, or name" in done.stderr
    assert "Traceback" not in done.stderr
    left = {1: "1 file of 1.9 kB", 2: "2 files of 3.79 kB"}[len(spool(tmp_path))]  # the first of each process
    assert f"left below {tmp_path} until your next run there: {left}\n" in done.stderr


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "gcloud auth application-default login"),
        (403, "grant roles/storage.objectUser on gs://a-bucket"),
        (404, "create gs://a-bucket"),
    ],
)
def test_as_many_refusals_as_a_batch_has_files_end_the_run(tmp_path: Path, status: int, remedy: str) -> None:
    with Server(fault=lambda request: status if 20 <= request.number < 30 else None) as server:
        done = upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 1000, "--batch-size", 10)
    assert done.returncode == 1 and "error: 10 uploads failed, at last /" in done.stderr
    assert remedy in done.stderr and (status == 401 or f": HTTP {status}: scripted; " in done.stderr)
    assert 20 <= len(server.objects) <= 80


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_among_successes_fails_that_file_alone(tmp_path: Path, status: int) -> None:
    with Server(fault=lambda request: status if request.number == 20 else None) as server:
        done = upload(server, "--temp-dir", tmp_path, *SIXTY)
    assert done.returncode == 1 and len(server.objects) == 119 and "; 1 failed" in done.stderr
    assert "error: " not in done.stderr


def test_as_many_failures_as_a_batch_has_files_end_the_run_early(tmp_path: Path) -> None:
    with Server(fault=lambda request: 400 if 20 <= request.number < 50 else None) as server:
        done = upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 1000, "--batch-size", 10)
    assert done.returncode == 1 and re.search(r"^error: [12][0-9] uploads failed, at last /", done.stderr, re.M)
    assert "fix that, then run it again with --resume" in done.stderr
    assert len(server.objects) <= 80 and "HTTP 400: scripted" in done.stderr


def test_one_failed_file_does_not_end_the_run(tmp_path: Path) -> None:
    with Server(fault=lambda request: 400 if request.number == 10 else None) as server:
        done = upload(server, "--temp-dir", tmp_path, *SMALL, "--meters", 11, "--batch-size", 1)
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


@pytest.mark.parametrize("kind", [(), ("--meters-per-file", 3), ("--gzip", "--meters-per-file", 3)])
def test_files_are_deleted_after_their_upload(expected: Callable[..., dict], tmp_path: Path, kind: tuple) -> None:
    flags = (*DAY, "--end", "2024-01-09", "--interval", 600, "--meters", 7, "--processes", 1, *kind)
    temp = tmp_path / "temp"
    counts: list[int] = []

    def look(request: Request) -> None:
        counts.append(len(spool(temp)))
        (path,) = temp.glob(f".wattif-*/*.{request.name}")
        paths.append(path)

    paths: list[Path] = []
    with Server(fault=look) as server:
        done = upload(server, *flags, "--temp-dir", temp, "--batch-size", 3)
    assert done.returncode == 0 and contents(server) == expected(*flags)
    # Each object was a file of its own, and those of three batches, of one file or three, were there at once.
    assert len(set(paths)) == len(server.objects) and max(counts) <= (4 if kind else 10)
    assert not list(temp.iterdir())


def test_a_file_that_somebody_else_deletes_during_its_upload_is_no_error(
    expected: Callable[..., dict], tmp_path: Path
) -> None:
    def delete(request: Request) -> None:
        (path,) = (tmp_path / "temp").glob(f".wattif-*/*.{request.name}")
        path.unlink()  # the client has it open

    with Server(fault=delete) as server:
        done = upload(server, *SIXTY, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0 and "0 failed" in done.stderr and "error" not in done.stderr, done.stderr
    assert contents(server) == expected(*SIXTY) and not list((tmp_path / "temp").iterdir())


def account(tmp_path: Path, token_server: str) -> dict[str, str]:
    """Write credentials whose tokens come from a server, and return the environment that names them."""
    path = tmp_path / "credentials.json"
    description = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/a",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": f"{token_server}/token",
        "credential_source": {"file": str(path)},
    }
    path.write_text(json.dumps(description))  # which serves as the token, too
    return {"GOOGLE_APPLICATION_CREDENTIALS": str(path)}


def test_a_login_that_is_no_longer_accepted_ends_the_run(tmp_path: Path) -> None:
    answer = Reply(400, b'{"error": "invalid_grant", "error_description": "it has expired"}')
    with Server(fault=lambda request: answer) as server:
        flags = ("--bucket", "a-bucket", *SIXTY, "--temp-dir", tmp_path / "temp", "--retry-timeout", 5)
        done = wattif(*flags, **account(tmp_path, server.url))
    assert done.returncode == 1 and "the credentials were not accepted: run 'gcloud auth" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_token_server_that_cannot_be_reached_is_no_lost_login(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 2, "--batch-size", 1, "--retry-timeout", 1, "--temp-dir", tmp_path / "temp")
    done = wattif("--bucket", "a-bucket", *flags, **account(tmp_path, "http://127.0.0.1:1"))
    assert done.returncode == 1 and "gcloud auth" not in done.stderr and "Traceback" not in done.stderr
    assert "error: nothing was accepted: the token source: ConnectionRefusedError: " in done.stderr


@pytest.mark.parametrize(("more", "content_type"), [((), "application/x-ndjson"), (("--gzip",), "application/gzip")])
def test_large_and_compressed_objects_arrive(
    emulator: Emulator, expected: Callable[..., dict], tmp_path: Path, more: tuple, content_type: str
) -> None:
    # 17 MB and 0.7 MB: a resumable upload of two chunks and a multipart one, unless they are compressed.
    flags = (*DAY, "--meters", 26, "--meters-per-file", 25, *more)
    done = emulator.run(*flags, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0, done.stderr
    blobs = emulator.objects()
    assert {name: blob.download_as_bytes(raw_download=True) for name, blob in blobs.items()} == expected(*flags)
    assert {blob.content_type for blob in blobs.values()} == {content_type}
