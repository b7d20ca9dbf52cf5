"""What a person and a program are told: the live line, the report, JSON."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import generator
from conftest import (
    DAY,
    DAYS,
    KEYS,
    ROOT,
    begin,
    contents,
    environment,
    files_below,
    report,
    start,
    until,
    upload,
    wattif,
)
from server import Server

SMALL = (*DAYS, "--interval", "3600", "--meters", "150", "--batch-size", "10")
ERASE = "\r\x1b[K"


def on_a_terminal(columns: int, *args: Any, **env: str) -> str:
    """Run the command line with standard error on a pseudo-terminal and return what it wrote there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, str(ROOT / "generator.py"), *map(str, args)]
    with subprocess.Popen(
        command, env=environment(**env), stdin=theirs, stdout=subprocess.PIPE, stderr=theirs
    ) as process:
        os.close(theirs)
        written = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the last writer has gone
                break
            written += chunk
        assert process.wait() == 0 and process.stdout.read() == b""
    os.close(ours)
    return written.decode()


@pytest.mark.parametrize("columns", [80, 30, 5, 0])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_terminal_has_one_live_line(tmp_path: Path, columns: int, processes: int) -> None:
    flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path, "--processes", processes, "-v")
    started = time.monotonic()
    with Server(delay=0.03) as server:
        screen = on_a_terminal(columns, *SMALL, *flags, STORAGE_EMULATOR_HOST=server.url)
    elapsed = time.monotonic() - started
    # What stands between two erasures and does not end its line is a live line, gone before the next thing is written.
    live = [piece for piece in screen.split(ERASE) if piece and "\n" not in piece]
    assert 3 <= len(live) <= 10 * elapsed + 1
    assert all(len(line) < (columns or 80) and re.match(r" *\d+%", line) for line in live)
    if columns in (80, 30):
        assert any(re.search(r"\d+/300 objects", line) for line in live)
    if columns in (80, 0):
        assert any(re.search(r"\[#+\.+\].* objects .*B/s .* left", line) for line in live)
    lines = [piece for piece in screen.split(ERASE) if "\n" in piece]
    assert all(piece.endswith("\r\n") and piece.count("\n") == 1 for piece in lines)  # none torn, nothing left behind
    assert sum("uploaded" in line for line in lines) == (31 if processes == 1 else 34) and "\x1b" not in "".join(
        lines + live
    )


def test_without_a_terminal_there_is_no_live_line(tmp_path: Path) -> None:
    with Server(delay=0.03) as server:
        done = upload(server, *SMALL, "--temp-dir", tmp_path)
    assert done.returncode == 0 and "\r" not in done.stderr and "%" not in done.stderr and "\x1b" not in done.stderr


def test_a_verbose_run_logs_its_progress(tmp_path: Path) -> None:
    flags = (*SMALL, "--output-dir", tmp_path)
    told = wattif(*flags, "-v", patch="generator.LOG_SECONDS = 0").stderr
    assert re.search(r"INFO MainProcess/MainThread: 100%.*300/300 objects.*B/s", told)
    assert "%" not in wattif(*flags, patch="generator.LOG_SECONDS = 0").stderr


def test_json_reports_what_was_done(tmp_path: Path) -> None:
    with Server(delay=0.05, fault=lambda request: 429 if request.number < 5 else None) as server:
        made = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json"))
        resumed = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json", "--resume"))
        verified = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json", "--verify"))
        repaired = report(wattif(*SMALL, "--output-dir", tmp_path / "out", "--json"))
    assert made["objects_planned"] == made["objects_done"] == 300 and made["readings"] == 7200
    assert made["bytes"] == 7200 * 79 and made["exit_status"] == 0 and made["error"] is None
    assert made["answers"] == {"200": 300, "429": 5} and made["throttled_answers"] == made["retries"] == 5
    assert 0.05 <= made["latency_p50_seconds"] <= made["latency_p99_seconds"] <= made["latency_max_seconds"]
    assert sum(made["throughput_bytes"]) > made["bytes"]  # with the metadata of each object
    assert made["mean_objects_per_second"] == pytest.approx(300 / made["elapsed_seconds"], rel=0.01)
    assert made["mean_bytes_per_second"] == pytest.approx(made["bytes"] / made["elapsed_seconds"], rel=0.01)
    assert resumed["objects_skipped"] == 300 and resumed["objects_done"] == 0
    assert resumed["answers"]["200"] > 0 and resumed["latency_max_seconds"] == 0  # listings are no uploads
    assert verified["mode"] == "verify" and verified["objects_done"] == 300
    assert repaired["mode"] == "write" and repaired["answers"] == {} and repaired["latency_max_seconds"] == 0


def test_json_reports_failed_and_interrupted_runs_too(tmp_path: Path) -> None:
    with Server(fault=lambda request: 404) as server:
        failed = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json"))
    assert failed["exit_status"] == 1 and "HTTP 404" in failed["error"]
    assert 1 <= failed["objects_failed"] <= 2 and len(failed["failures"]) == 1  # a line for what is equal
    with Server(delay=0.05) as server:
        flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path / "t", "--json", "--processes", 2)
        with start(*SMALL, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: server.objects)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=30)
        done = subprocess.CompletedProcess([], process.returncode, out, err)
        interrupted = report(done)
        assert interrupted["exit_status"] == process.returncode == 143
        assert interrupted["objects_done"] == len(server.objects) < 300


@pytest.mark.parametrize(("redirected", "reason"), [(">/dev/full", "No space"), (">&-", "closed")])
def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path, redirected: str, reason: str) -> None:
    shell = ("sh", "-c", f'exec "$@" {redirected}', "sh")
    done = wattif(*SMALL, "--output-dir", tmp_path, "--json", prefix=shell)
    assert done.returncode == 1 and f"error: standard output cannot be written: {reason}" in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_reader_of_standard_error_that_leaves_does_not_change_the_run(
    expected: Callable[..., dict], tmp_path: Path, processes: int
) -> None:
    flags = (*SMALL, "--processes", processes)
    with Server(delay=0.01) as server:
        with begin(server, tmp_path / "temp", *flags, "-v") as process:
            process.stderr.close()
            assert process.wait(timeout=60) == 0
    assert contents(server) == expected(*flags)
    with start(*flags, "--output-dir", tmp_path / "out", "--json") as process:
        process.stderr.close()
        assert json.loads(process.stdout.read())["objects_done"] == 300
        assert process.wait(timeout=60) == 0
    assert files_below(tmp_path / "out") == contents(server)


def test_a_run_without_standard_error(tmp_path: Path) -> None:
    done = wattif(*SMALL, "--output-dir", tmp_path, "--json", prefix=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    assert done.returncode == 0 and report(done)["objects_done"] == 300


def response(seconds: float, method: str = "POST") -> Any:
    """What the client library says of a response that came after some seconds."""
    request = SimpleNamespace(method=method, body=None, url="", headers={})
    return SimpleNamespace(request=request, status_code=204, headers={}, elapsed=timedelta(seconds=seconds))


def settings(*flags: str) -> generator.Run:
    """The settings of a run of 400 files."""
    return generator.read_settings([*DAY, "--interval", "3600", "--meters", "400", "--output-dir", "x", *flags])


def test_latencies_are_within_the_stated_error() -> None:
    run = settings()
    sender = generator.Sender(run, ctypes.c_byte(0), None, 0.0)
    seconds = [0.1 * 1.1**exponent for exponent in range(100)]
    for latency in seconds:
        sender.on_response(response(latency))
        sender.on_response(response(1000.0, "GET"))  # a listing is no upload
    counted = generator.Result()
    for result in sender.counts:
        counted += result
    assert counted.answers == {204: 200} and sum(counted.latencies.values()) == 100
    for share, latency in ((0.5, seconds[49]), (0.95, seconds[94]), (0.99, seconds[98]), (1.0, seconds[99])):
        assert generator.percentile(counted.latencies, share) == pytest.approx(latency, rel=0.025)
    assert generator.percentile(Counter(), 0.5) == 0


class Clock:
    """A clock that a test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(generator, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The script's clock."""
    return Clock(monkeypatch)


def some_progress(*flags: str) -> generator.Progress:
    """The progress of a run that has just begun."""
    run = settings(*flags)
    return generator.Progress(run, generator.make_plan(run))


def arrived(objects: int, **more: Any) -> generator.Result:
    """The result of objects of a million bytes that have arrived, and whose batch is done."""
    sizes = {"bytes": 1_000_000 * objects, "arrived_bytes": 1_000_000 * objects}
    return generator.Result(objects_done=objects, arrived_objects=objects, **sizes, **more)


def test_the_live_line_says_what_is_done_and_what_is_left(clock: Clock) -> None:
    progress = some_progress()
    assert "  0%" in progress.live_line(200) and "0/400 objects" in progress.live_line(200)
    assert "? left" in progress.live_line(200)
    progress.add(generator.Result(objects_skipped=100))  # which took no time worth speaking of
    assert "100/400 objects" in progress.live_line(200) and "? left" in progress.live_line(200)
    for _ in range(50):
        progress.add(arrived(2))
        clock.now += 1.0
    line = progress.live_line(200)
    assert line.startswith(" 50%") and "200/400 objects" in line and "  2 MB/s  " in line
    assert "0:01:40 left" in line  # 200 more, two a second
    progress.add(generator.Result(objects_failed=20, retries=1234))
    assert "220/400 objects" in progress.live_line(200) and "1,234 retries" in progress.live_line(200)
    assert "0:01:15 left" in progress.live_line(200)  # 180 more, 120 in 50 seconds


def test_means_are_those_of_the_whole_run(clock: Clock) -> None:
    progress = some_progress()
    for _ in range(50):
        progress.add(arrived(4, readings=96))
        clock.now += 2.0
    record = progress.record(0)
    assert record["elapsed_seconds"] == 100.0 and record["objects_done"] == 200
    assert record["mean_objects_per_second"] == 2.0 and record["mean_bytes_per_second"] == 2_000_000
    assert record["peak_objects_per_second"] == 4.0 and record["peak_bytes_per_second"] == 4_000_000
    assert record["readings"] == 4800 and record["exit_status"] == 1  # half of the objects are not there
    assert progress.record(15)["exit_status"] == 143


def test_a_run_is_complete_if_all_objects_are_there_and_no_other(clock: Clock) -> None:
    endings = [
        ({}, 0),
        ({"objects_skipped": 1}, 1),  # there are more than planned
        ({"objects_failed": 1, "failures": [("a", "b")]}, 1),
        ({"failures": [("a process died", "b")]}, 1),
        ({"error": "no"}, 1),
        ({"objects_unexpected": 1}, 1),
    ]
    for more, status in endings:
        progress = some_progress("--verify")
        progress.add(arrived(300, objects_skipped=100))
        progress.add(generator.Result(**more))
        assert progress.record(0)["exit_status"] == status, more


def test_the_throughput_of_a_long_run_has_few_slots(clock: Clock) -> None:
    progress = some_progress()
    for _ in range(10_000):
        progress.add(arrived(1))
        clock.now += 1.0
    record = progress.record(0)
    assert record["throughput_slot_seconds"] == 167 and len(record["throughput_bytes"]) <= 60
    assert sum(record["throughput_bytes"]) == 10_000 * 1_000_000
    assert set(record["throughput_bytes"][:-1]) == {167 * 1_000_000}


@pytest.mark.parametrize("tick", [0.103, 0.15, 0.24])
def test_a_steady_run_has_no_gaps_in_its_throughput(clock: Clock, tick: float) -> None:
    progress = some_progress()
    for _ in range(int(45 / tick)):
        progress.add(arrived(1))
        clock.now += tick
    slots = progress.record(0)["throughput_bytes"]
    assert len(slots) >= 44 and 0 not in slots[:-1]


def test_results_add_up() -> None:
    total = generator.Result(objects_done=1, failures=["a"], error="first", answers=Counter({200: 1}))
    total += generator.Result(objects_done=2, failures=["b"], error="second", answers=Counter({200: 1, 503: 1}))
    assert (total.objects_done, total.failures, total.error) == (3, ["a", "b"], "first")
    assert total.answers == {200: 2, 503: 1}


def test_the_readme_names_every_key_of_the_report() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{key}`" in readme or f"…_{key.split('_')[1]}_…" in readme for key in KEYS)
