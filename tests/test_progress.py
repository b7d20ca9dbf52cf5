"""What a person and a program are told: the live line, the report, JSON, the limiter."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import statistics
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import generator
from conftest import DAYS, ROOT, environment, files_below, start, until, upload, wattif
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
    assert sum("uploaded" in line for line in lines) == (30 if processes == 1 else 32) and "\x1b" not in "".join(
        lines + live
    )


def test_without_a_terminal_there_is_no_live_line(tmp_path: Path) -> None:
    with Server(delay=0.03) as server:
        done = upload(server, *SMALL, "--temp-dir", tmp_path)
    assert done.returncode == 0 and "\r" not in done.stderr and "%" not in done.stderr and "\x1b" not in done.stderr


def test_a_verbose_run_logs_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generator, "LOG_SECONDS", 0)
    assert generator.main([*SMALL, "--output-dir", str(tmp_path), "-v"]) == 0
    assert re.search(r"100%.*300/300 objects.*B/s", caplog.text)
    caplog.clear()
    assert generator.main([*SMALL, "--output-dir", str(tmp_path)]) == 0
    assert "%" not in caplog.text


KEYS = {
    **dict.fromkeys(["mode", "destination"], str),
    **dict.fromkeys(
        ["exit_status", "readings", "bytes", "mean_bytes_per_second", "peak_bytes_per_second", "unanswered_requests"],
        int,
    ),
    **dict.fromkeys([f"objects_{kind}" for kind in ("planned", "done", "skipped", "failed")], int),
    **dict.fromkeys([f"objects_{kind}" for kind in ("missing", "different", "unexpected")], int),
    **dict.fromkeys(["throttled_answers", "retries", "throughput_slot_seconds"], int),
    **dict.fromkeys(["elapsed_seconds", "mean_objects_per_second", "peak_objects_per_second"], float),
    **dict.fromkeys([f"latency_{q}_seconds" for q in ("p50", "p95", "p99", "max")], float),
    "error": (str, type(None)),
    "failures": list,
    "answers": dict,
    "throughput_bytes": list,
}


def report(done: Any) -> dict[str, Any]:
    """Parse the line of JSON, which has the documented keys and types and nothing else."""
    assert done.stdout.count("\n") == 1
    parsed = json.loads(done.stdout)
    assert set(parsed) == set(KEYS)
    assert all(isinstance(parsed[key], kind) for key, kind in KEYS.items()), parsed
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{key}`" in readme or f"…_{key.split('_')[1]}_…" in readme for key in KEYS)
    return parsed


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
    assert resumed["objects_skipped"] == 300 and resumed["objects_done"] == 0
    assert verified["mode"] == "verify" and verified["objects_done"] == 300
    assert repaired["mode"] == "write" and repaired["answers"] == {} and repaired["latency_max_seconds"] == 0


def test_json_reports_failed_and_interrupted_runs_too(tmp_path: Path) -> None:
    with Server(fault=lambda request: 404) as server:
        failed = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json"))
    assert failed["exit_status"] == 1 and "there is no bucket" in failed["error"]
    assert failed["objects_failed"] == len(failed["failures"]) > 0
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


@pytest.mark.parametrize(("redirected", "reason"), [(">/dev/full", "No space"), (">&-", "it is closed")])
def test_a_report_that_cannot_be_written_is_an_error(tmp_path: Path, redirected: str, reason: str) -> None:
    shell = ("sh", "-c", f'exec "$@" {redirected}', "sh")
    done = wattif(*SMALL, "--output-dir", tmp_path, "--json", prefix=shell)
    assert done.returncode == 1 and f"error: --json cannot write to standard output: {reason}" in done.stderr


def test_a_reader_of_standard_error_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    with start(*SMALL, "--output-dir", tmp_path, "-v") as process:
        process.stderr.close()
        process.wait(timeout=60)
    assert len(files_below(tmp_path)) == 300


def test_a_run_without_standard_error(tmp_path: Path) -> None:
    done = wattif(*SMALL, "--output-dir", tmp_path, "--json", prefix=("sh", "-c", 'exec "$@" 2>&-', "sh"))
    assert done.returncode == 0 and report(done)["objects_done"] == 300


def some_progress(*flags: str) -> Any:
    """Make the progress of a run that is not done."""
    args = generator.build_parser().parse_args(["--start", "2024-01-01", "--end", "2024-01-01", *flags])
    return generator.Progress(generator.plan(args), False)


def test_latencies_are_within_the_stated_error() -> None:
    gauge = generator.Gauge(60.0)
    request = SimpleNamespace(method="POST", body=None, url="", headers={})
    seconds = [0.1 * 1.1**exponent for exponent in range(100)]
    for latency in seconds:
        gauge.begin(request)
        gauge.last.started -= latency
        gauge.end(request, 204)
    progress = some_progress()
    progress.update(gauge.drain())
    for share, latency in ((0.5, seconds[49]), (0.95, seconds[94]), (0.99, seconds[98]), (1.0, seconds[99])):
        assert progress.latency(share) == pytest.approx(latency, rel=0.025)
    assert not gauge.counts


def test_throughput_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = some_progress("--output-dir", "x")
    now = [0.0]
    progress.started = progress.shown = 0.0
    monkeypatch.setattr(generator.time, "monotonic", lambda: now[0])
    for _ in range(10_000):
        now[0] += 1.0
        progress.update(generator.Outcome(Counter(bytes=7, objects=1)))
    assert len(progress.slots) <= generator.SLOTS and sum(progress.slots) == 70_000
    assert progress.slot_seconds == 256 and progress.peaks == [7, 1]
    assert len(generator.sparkline(progress.slots)) == len(progress.slots)


@pytest.mark.parametrize("tick", [0.103, 0.15, 0.24])
def test_a_steady_run_has_no_gaps_in_its_throughput(monkeypatch: pytest.MonkeyPatch, tick: float) -> None:
    progress = some_progress("--output-dir", "x")
    progress.started = progress.shown = 0.0
    for number in range(1, int(45 / tick)):
        monkeypatch.setattr(generator.time, "monotonic", lambda number=number: number * tick)
        progress.update(generator.Outcome(Counter(bytes=7, objects=1)))
    assert len(progress.slots) >= 44 and 0 not in progress.slots


def assert_paced(arrivals: list[float], limit: int) -> None:
    """Assert that `limit` requests came in a second, evenly; a test machine that halts for a moment does not count."""
    seconds = [later - earlier for earlier, later in zip(arrivals, arrivals[limit:])]
    assert 0.95 <= statistics.median(seconds) <= 1.05 and min(seconds) >= 0.75, seconds


@pytest.mark.parametrize(("limit", "meters", "processes"), [(25, 40, 1), (25, 40, 2), (8, 12, 8)])
@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_rps_limit_paces_the_uploads(tmp_path: Path, limit: int, meters: int, processes: int, delay: float) -> None:
    arrivals: list[float] = []
    flags = ("--meters", meters, "--interval", 3600, "--processes", processes, "--temp-dir", tmp_path)
    with Server(delay=delay, fault=lambda request: arrivals.append(time.monotonic())) as server:
        done = upload(server, *DAYS, *flags, "--rps-limit", limit)
    assert done.returncode == 0 and len(arrivals) == 2 * meters
    assert_paced(arrivals, limit)


def test_rps_limit_leaves_the_whole_rate_to_the_process_that_has_work(tmp_path: Path) -> None:
    arrivals: list[float] = []
    flags = (*DAYS, "--meters", 152, "--interval", 3600, "--temp-dir", tmp_path)
    with Server() as server:
        assert upload(server, *flags, "--task-index", 0, "--task-count", 2).returncode == 0
        server.fault = lambda request: arrivals.append(time.monotonic()) if request.name else None
        assert upload(server, *flags, "--resume", "--processes", 2, "--rps-limit", 50).returncode == 0
    assert len(arrivals) == 152
    assert_paced(arrivals, 50)


def test_rps_limit_is_shared_by_no_more_processes_than_objects_a_second() -> None:
    for limit, processes in (("0.5", 1), ("1.5", 2), ("500", 8)):
        flags = (*SMALL, "--rps-limit", limit, "--processes", 8, "--dry-run")
        assert f"processes    {processes}" in wattif(*flags).stderr
        assert "processes    8" in wattif(*flags, "--verify").stderr


def test_rps_limit_counts_objects_and_not_their_chunks(tmp_path: Path) -> None:
    # Objects of 20 MB go up in two chunks each; a limit that took chunks for objects would halve the rate.
    begun: list[float] = []
    flags = ("--meters", 290, "--meters-per-file", 29, "--rps-limit", 5, "--temp-dir", tmp_path, "--processes", 1)
    with Server(fault=lambda request: begun.append(time.monotonic()) if request.method == "POST" else None) as server:
        done = upload(server, "--start", "2024-01-01", "--end", "2024-01-01", *flags)
    assert done.returncode == 0 and len(begun) == 10 and 9 / (begun[-1] - begun[0]) > 4


def test_latencies_are_without_the_wait_for_a_turn(tmp_path: Path) -> None:
    flags = ("--temp-dir", tmp_path, "--rps-limit", 20, "--meters", 30, "--json")
    with Server() as server:
        made = report(upload(server, *SMALL, *flags))
    assert made["objects_done"] == 60 and made["latency_p50_seconds"] < 0.5  # while the last one waits for three


def test_a_paced_run_stops_soon(tmp_path: Path) -> None:
    flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path, "--rps-limit", "0.5", "--processes", 2)
    with Server() as server:
        with start(*SMALL, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: len(server.objects) > 1)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
    assert process.returncode == 143


def test_an_outage_begins_after_the_last_success() -> None:
    gauge = generator.Gauge(60.0)

    def answer(status: int, began: float = 0.0, **more: Any) -> None:
        request = SimpleNamespace(method="GET", body=None, headers={}, **more)
        gauge.begin(request)
        gauge.last.started -= began
        gauge.end(request, status)

    answer(200, url="a")
    answer(503, began=100.0, url="b")  # it began long before
    answer(503, url="c")
    answer(503, url="d")
    for call in gauge.failing:
        gauge.failing[call] -= 59.0
    answer(200, url="e")
    assert not gauge.failing
    answer(408, url="f")
    gauge.failing.update((call, began - 61.0) for call, began in gauge.failing.items())
    answer(429, url="f")  # one call alone is no outage
    answer(0, url="g")
    with pytest.raises(generator.Outage):
        answer(200, url="h")


def test_today_and_yesterday_are_utc_days() -> None:
    before = datetime.now(timezone.utc).date()
    done = wattif("--start", "yesterday", "--end", "today", "--dry-run")
    after = datetime.now(timezone.utc).date()
    plans = [f"days         {today - timedelta(days=1)} to {today}\n" for today in (before, after)]
    assert done.returncode == 0 and any(plan in done.stderr for plan in plans)
    done = wattif("--start", "today", "--end", "yesterday", "--dry-run")
    assert done.returncode == 2 and "--end" in done.stderr
    for rate in ("0", "-1", "x", "1e3", "inf", "nan"):
        done = wattif(*DAYS, "--rps-limit", rate, "--dry-run")
        assert done.returncode == 2 and "--rps-limit" in done.stderr and done.stderr.count("\n") == 1
