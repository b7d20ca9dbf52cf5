"""Every run ends: signals, whatever hangs, and logs that nobody reads."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import DAYS, ROOT, begin, children_of, environment, gone, report, spool, start, until, upload, wattif
from credentials import metadata_environment, service_account
from server import Request, Server, TokenServer

SMALL = (*DAYS, "--interval", "3600", "--meters", "60", "--batch-size", "10")
SOON = "generator.GRACE_SECONDS = 2"  # instead of 20


def ended(process: Any, signum: int, began: float) -> dict[str, Any]:
    """Wait for the end of a run that got a signal, and return its report."""
    out, err = process.communicate(timeout=30)
    assert 1.5 < time.monotonic() - began < 15, err
    assert process.returncode == 128 + signum and "Traceback" not in err, err
    told = json.loads(out)
    assert told["exit_status"] == 128 + signum
    return told


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("processes", [1, 2])
def test_uploads_that_hang_do_not_hold_a_stop(tmp_path: Path, signum: int, processes: int) -> None:
    flags = (*SMALL, "--processes", processes, "--json")
    with Server(fault=lambda request: "stall" if request.number > 20 else None) as server:
        with begin(server, tmp_path, *flags, patch=SOON) as process:
            until(lambda: len(server.requests) > 22)
            children = children_of(process.pid)
            began = time.monotonic()
            process.send_signal(signum)
            told = ended(process, signum, began)
            until(lambda: gone(children))
        assert told["objects_done"] <= len(server.objects) and told["no_response"] > 0
        assert told["files_left"] == len(spool(tmp_path))
        server.fault = lambda request: None
        assert upload(server, *SMALL, "--temp-dir", tmp_path, "--resume").returncode == 0
    assert len(server.objects) == 120 and not spool(tmp_path)


@pytest.mark.parametrize("mode", ["--resume", "--verify"])
def test_a_listing_that_hangs_does_not_hold_a_stop(tmp_path: Path, mode: str) -> None:
    flags = ("--bucket", "a-bucket", *SMALL, "--temp-dir", tmp_path, "--json", mode)
    with Server(fault=lambda request: "stall") as server:
        with start(*flags, patch=SOON, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: server.requests)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert ended(process, signal.SIGTERM, began)["objects_done"] == 0


@pytest.mark.parametrize("source", ["metadata", "service account"])
def test_a_token_source_that_hangs_does_not_hold_a_stop(tmp_path: Path, source: str) -> None:
    with Server() as server, TokenServer(fault=lambda path: "stall") as tokens:
        env = metadata_environment(tokens.url) if source == "metadata" else service_account(tmp_path, tokens.url)
        flags = ("--bucket", "a-bucket", *SMALL, "--temp-dir", tmp_path / "temp", "--json")
        with start(*flags, patch=SOON, API_ENDPOINT_OVERRIDE=server.url, **env) as process:
            until(lambda: tokens.paths)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert ended(process, signal.SIGTERM, began)["objects_done"] == 0


def test_a_signal_while_a_run_waits_for_credentials_is_told_as_such(tmp_path: Path) -> None:
    with TokenServer(fault=lambda path: 503) as tokens:
        flags = ("--bucket", "a-bucket", *SMALL, "--temp-dir", tmp_path, "--json")
        with start(*flags, **metadata_environment(tokens.url)) as process:
            until(lambda: len(tokens.paths) > 1)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
    assert process.returncode == json.loads(out)["exit_status"] == 143
    assert "stopped by SIGTERM; run it again" in err and "credentials" not in err


def test_a_fleet_that_takes_long_to_draw_does_not_hold_a_stop(tmp_path: Path) -> None:
    hang = "generator.log.debug('it hangs') or generator.threading.Event().wait()"
    flags = (*SMALL, "--output-dir", tmp_path, "--processes", 1, "--json", "-v")
    with start(*flags, patch=f"{SOON}; generator.draw_block = lambda *_: {hang}") as process:
        assert any("it hangs" in line for line in process.stderr)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert ended(process, signal.SIGTERM, began)["objects_done"] == 0


def test_files_that_are_not_yet_written_are_not_begun_after_a_signal(tmp_path: Path) -> None:
    flags = (*DAYS, "--meters", 20_000, "--batch-size", 20_000, "--processes", 1, "--json")
    with start(*flags, "--output-dir", tmp_path) as process:
        until(lambda: sum(1 for _ in tmp_path.rglob("*.ndjson")) > 20)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert 20 < json.loads(out)["objects_done"] == sum(1 for _ in tmp_path.rglob("*.ndjson")) < 20_000


def test_a_run_that_was_complete_when_the_signal_came_has_succeeded(tmp_path: Path) -> None:
    def fault(request: Request) -> None:
        if len(server.objects) == 119 and request.number:
            process.send_signal(signal.SIGTERM)

    with Server(delay=0.02) as server:
        flags = ("--bucket", "a-bucket", *SMALL, "--processes", 1, "--transfer-workers", 1, "--upload-workers", 1)
        server.fault = fault
        with start(*flags, "--temp-dir", tmp_path, "--json", STORAGE_EMULATOR_HOST=server.url) as process:
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopping: " in err and "stopped by" not in err
    assert json.loads(out)["exit_status"] == 0 and len(server.objects) == 120


def test_nohup_is_heeded(tmp_path: Path) -> None:
    with Server(delay=0.05) as server:
        with begin(server, tmp_path, *SMALL, "--processes", 1, prefix=("nohup",)) as process:
            process.send_signal(signal.SIGHUP)
            assert process.wait(timeout=60) == 0
    assert len(server.objects) == 120


def test_ctrl_c_during_the_imports_ends_the_run(tmp_path: Path) -> None:
    # An import that never ends stands for a slow disk.
    (tmp_path / "orjson.py").write_text("import sys, time\nprint('imports', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, str(ROOT / "generator.py"), *SMALL, "--output-dir", str(tmp_path / "out")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment(PYTHONPATH=str(tmp_path)), stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == b"imports\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == b"generator.py: stopped before anything was done\n"


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-", "2> >(exec true)"])
@pytest.mark.parametrize("verbose", [(), ("-v",)])
def test_a_log_that_cannot_be_written_changes_nothing(tmp_path: Path, redirect: str, verbose: tuple) -> None:
    shell = ("bash", "-c", f'"$@" {redirect}', "bash")
    with Server(fault=lambda request: 503 if request.number == 3 else None) as server:
        flags = (*SMALL, "--temp-dir", tmp_path, "--json", *verbose)
        assert report(upload(server, *flags, prefix=shell))["objects_done"] == 120
        done = upload(server, *flags, "--verify", prefix=shell)
    assert done.returncode == 0 and report(done)["objects_done"] == 120
    assert wattif(*SMALL, "--end", "2023-01-01", "--output-dir", tmp_path, prefix=shell).returncode == 2


def test_json_has_its_line_whatever_keeps_a_run_from_beginning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Server(fault=lambda request: "stall" if request.number > 20 else None) as server:
        there = {"STORAGE_EMULATOR_HOST": server.url}
        with begin(server, tmp_path, *SMALL) as process:
            locked = wattif("--bucket", "a-bucket", *SMALL, "--temp-dir", tmp_path, "--json", **there)
            process.kill()
        server.fault = lambda request: 403
        listing = wattif("--bucket", "a-bucket", *SMALL, "--temp-dir", tmp_path, "--json", "--resume", **there)
    lost = wattif("--bucket", "a-bucket", *SMALL, "--temp-dir", tmp_path, "--json", GOOGLE_APPLICATION_CREDENTIALS="no")
    full = wattif(*DAYS, "--meters", 10**7, "--output-dir", tmp_path, "--processes", 1, "--json")
    place = wattif(*SMALL, "--output-dir", tmp_path / "file", "--json")
    for done, status, word in (
        (locked, 1, "in use"),
        (listing, 1, "HTTP 403"),
        (lost, 2, "credentials"),
        (full, 2, "free"),
        (place, 2, "written"),
    ):
        told = report(done)
        assert done.returncode == told["exit_status"] == status and word in told["error"], done.stderr
        assert told["objects_done"] == 0 and told["error"] in done.stderr
