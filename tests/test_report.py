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
    SLOT,
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
    assert sum(": uploaded " in line for line in lines) == (31 if processes == 1 else 34) and "\x1b" not in "".join(
        lines + live
    )


def test_without_a_terminal_there_is_no_live_line(tmp_path: Path) -> None:
    with Server(delay=0.03) as server:
        done = upload(server, *SMALL, "--temp-dir", tmp_path)
    assert done.returncode == 0 and " left" not in done.stderr and not re.search("[\r\x1b]", done.stderr)


def test_a_verbose_run_logs_its_progress(tmp_path: Path) -> None:
    flags = (*SMALL, "--output-dir", tmp_path)
    told = wattif(*flags, "-v", patch="generator.LOG_SECONDS = 0").stderr
    assert re.search(r"INFO MainProcess/MainThread: 100%.*300/300 objects.*B/s", told)
    assert " left" not in wattif(*flags, patch="generator.LOG_SECONDS = 0").stderr


def test_json_reports_what_was_done(tmp_path: Path) -> None:
    with Server(delay=0.05, fault=lambda request: 429 if request.number < 5 else None) as server:
        made = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json"))
        resumed = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json", "--resume"))
        verified = report(upload(server, *SMALL, "--temp-dir", tmp_path, "--json", "--verify"))
        repaired = report(wattif(*SMALL, "--output-dir", tmp_path / "out", "--json"))
    assert made["objects_planned"] == made["objects_done"] == 300 and made["readings"] == 7200
    assert made["bytes"] == 7200 * 79 and made["exit_status"] == 0 and made["error"] is None
    assert made["throttling"]["objects_per_second"] is None  # nothing was before it
    assert made["responses"] == {"200": 300, "429": 5} and made["throttled"] == made["retries"] == 5
    assert 0.05 <= made["latency_p50_seconds"] <= made["latency_p99_seconds"] <= made["latency_max_seconds"]
    assert sum(slot["bytes"] for slot in made["timeline"]) == made["bytes"]
    assert made["mean_objects_per_second"] == pytest.approx(300 / made["elapsed_seconds"], rel=0.01)
    assert made["mean_bytes_per_second"] == pytest.approx(made["bytes"] / made["elapsed_seconds"], rel=0.01)
    assert resumed["objects_skipped"] == 300 and resumed["objects_done"] == 0
    assert resumed["responses"]["200"] > 0 and resumed["latency_max_seconds"] is None  # listings are no uploads
    assert verified["mode"] == "verify" and verified["objects_done"] == 300
    assert repaired["mode"] == "write" and repaired["responses"] == {} and repaired["latency_max_seconds"] is None


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


def settings(*flags: str) -> generator.Run:
    """The settings of a run of 400 files."""
    return generator.read_settings([*DAY, "--interval", "3600", "--meters", "400", "--output-dir", "x", *flags])


def test_latencies_are_within_the_stated_error() -> None:
    seconds = [0.1 * 1.1**exponent for exponent in range(100)]
    latencies = Counter(map(generator.bucket_of, seconds))
    for share, latency in ((0.5, seconds[49]), (0.95, seconds[94]), (0.99, seconds[98]), (1.0, seconds[99])):
        assert generator.percentile(latencies, share) == pytest.approx(latency, rel=0.025)
    assert all(latency <= generator.LATENCY_BASE ** generator.bucket_of(latency) * 1.000001 for latency in seconds)
    assert generator.percentile(Counter(), 0.5) is None


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
    return generator.Progress(run, generator.make_plan(run), ctypes.c_byte(0))


def arrived(progress: generator.Progress, objects: int, **more: Any) -> generator.Result:
    """The result of objects of a million bytes that arrive now, and whose batch is done."""
    size, slots = 1_000_000 * objects, generator.Timeline()
    slots[int(generator.time.monotonic() - progress.started)] = generator.Slot(objects=objects, bytes=size)
    return generator.Result(objects_done=objects, bytes=size, timeline=slots, **more)


def test_the_live_line_says_what_is_done_and_what_is_left(clock: Clock) -> None:
    progress = some_progress()
    assert "  0%" in progress.live_line(200) and "0/400 objects" in progress.live_line(200)
    assert "drawing the fleet" in progress.live_line(200)
    progress.add(generator.Result(slices_drawn=len(progress.plan.slices)))
    assert "? left" in progress.live_line(200)
    progress.add(generator.Result(objects_skipped=100))  # which took no time worth speaking of
    assert "100/400 objects" in progress.live_line(200) and "? left" in progress.live_line(200)
    for _ in range(50):
        progress.add(arrived(progress, 2))
        clock.now += 1.0
    line = progress.live_line(200)
    assert line.startswith(" 50%") and "200/400 objects" in line and "  2 MB/s  " in line
    assert "0:01:40 left" in line  # 200 more, two a second
    progress.add(generator.Result(objects_failed=20, timeline=generator.Timeline({50: generator.Slot(retries=1234)})))
    assert "220/400 objects" in progress.live_line(200) and "1,234 retries" in progress.live_line(200)
    assert "0:01:15 left" in progress.live_line(200)  # 180 more, 120 in 50 seconds


def test_the_live_line_says_that_a_run_is_stopping(clock: Clock) -> None:
    progress = some_progress()
    progress.add(arrived(progress, 8))
    progress.add(generator.Result(objects_failed=2))
    clock.now += 1.0
    assert " 2 failed  " in progress.live_line(200) and " left" in progress.live_line(200)
    progress.stop.value = signal.SIGTERM
    assert "  stopping  " in progress.live_line(200) and " left" not in progress.live_line(200)


def test_the_time_left_is_right_from_a_tenth_of_a_steady_run_on(clock: Clock) -> None:
    progress = some_progress()
    clock.now += 7.0  # for which the fleet was drawn
    for second in range(100):
        clock.now += 1.0
        progress.add(arrived(progress, 4))
        if second >= 10:
            (left,) = re.findall(r"(\d+):(\d+):(\d+) left", progress.live_line(200))
            seconds = 3600 * int(left[0]) + 60 * int(left[1]) + int(left[2])
            assert seconds == pytest.approx(99 - second, rel=0.1, abs=1)


def test_means_are_those_of_the_whole_run(clock: Clock) -> None:
    progress = some_progress()
    for _ in range(50):
        progress.add(arrived(progress, 4, readings=96))
        clock.now += 2.0
    record = generator.make_record(progress, 0)
    assert record["elapsed_seconds"] == 100.0 and record["objects_done"] == 200
    assert record["mean_objects_per_second"] == 2.0 and record["mean_bytes_per_second"] == 2_000_000
    assert record["peak_objects_per_second"] == 4.0 and record["peak_bytes_per_second"] == 4_000_000
    assert record["readings"] == 4800 and record["exit_status"] == 1  # half of the objects are not there
    assert generator.make_record(progress, 15)["exit_status"] == 143


def test_a_run_is_complete_if_all_objects_are_there_and_no_other(clock: Clock) -> None:
    endings = [
        ({}, 0),
        ({"objects_skipped": 1}, 1),  # there are more than planned
        ({"objects_failed": 1, "failures": [("a", "b")]}, 1),
        ({"failures": [("a process died", "b")]}, 1),
        ({"errors": ["no"]}, 1),
        ({"objects_unexpected": 1}, 1),
    ]
    for more, status in endings:
        progress = some_progress("--verify")
        progress.add(arrived(progress, 300, objects_skipped=100))
        progress.add(generator.Result(**more))
        assert generator.make_record(progress, 0)["exit_status"] == status, more


@pytest.mark.parametrize(("hours", "seconds"), [(2, 60), (5, 150), (30, 900)])
def test_the_timeline_of_a_long_run_has_few_slots_and_keeps_peaks(clock: Clock, hours: int, seconds: int) -> None:
    progress = some_progress()
    for second in range(hours * 3600):
        progress.add(arrived(progress, 5 if second == 5000 else 1))
        clock.now += 1.0
    clock.now -= 1.0
    record = generator.make_record(progress, 0)
    timeline = record["timeline"]
    assert len(timeline) == 120 and {slot["seconds"] for slot in timeline} == {seconds}
    assert [slot["second"] for slot in timeline] == list(range(0, 120 * seconds, seconds))
    assert sum(slot["objects"] for slot in timeline) == hours * 3600 + 4
    assert record["peak_objects_per_second"] == 5 and len(progress.total.timeline) < 21_600 + 3 * 10_800
    if hours <= 6:
        assert {slot["objects"] for slot in timeline} == {seconds, seconds + 4}


def test_a_run_without_an_answer_has_no_time_axis(clock: Clock) -> None:
    progress = some_progress()
    clock.now += 10.0
    told = "\n".join(generator.describe_measurements(progress, generator.make_record(progress, 0)))
    progress.add(arrived(progress, 5))
    shown = "\n".join(generator.describe_measurements(progress, generator.make_record(progress, 0)))
    assert "0:00" not in told and "0:00" in shown


def test_results_add_up() -> None:
    total = generator.Result(objects_done=1, failures=[("a", "b")], errors=["first"])
    more = generator.Timeline({3: generator.Slot(objects=1, responses=Counter({200: 1}))})
    total += generator.Result(objects_done=2, failures=[("c", "d")], errors=["second"], timeline=more)
    total += generator.Result(timeline=generator.Timeline({3: generator.Slot(responses=Counter({200: 1, 503: 1}))}))
    assert (total.objects_done, total.failures, total.errors) == (3, [("a", "b"), ("c", "d")], ["first", "second"])
    assert total.timeline[3].responses == {200: 2, 503: 1} and total.timeline[3].throttled() == 1
    assert more[3].responses == {200: 1}  # what was added is as it was


def test_the_readme_names_every_key_of_the_report() -> None:
    readme = (ROOT / "README.md").read_text()
    assert all(f"`{key}`" in readme for key in {*KEYS, *SLOT})
