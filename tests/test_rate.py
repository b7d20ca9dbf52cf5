"""The rate limit: its turns with a simulated clock, and runs that keep to it within wide bounds."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections import Counter, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import generator
from conftest import DAY, DAYS, children_of, refused, report, start, until, upload, wattif
from server import Index, Request, Server

SMALL = (*DAYS, "--interval", "3600")
DAILY = (*DAY, "--interval", "86400")


def turns(rate: float, clock: list[float]) -> list[float]:
    """Return when turns begin, one asked for at each time of a clock, or when the turn before has begun."""
    last, begun = -1 / rate, [0.0]
    for now in clock:
        asked = max(now, begun[-1])
        last, _ = generator.next_turn(asked, last, 1 / rate)
        begun.append(max(asked, last))
    return begun[1:]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1, 7, 12.5, 1000])
def test_turns_that_are_asked_for_at_once_lie_on_a_grid(rate: float) -> None:
    assert turns(rate, [0.0] * 50) == pytest.approx([number / rate for number in range(50)])


def test_a_turn_is_the_first_one_that_is_still_to_come() -> None:
    assert generator.next_turn(0.0, -0.5, 0.5) == (0.0, 0)
    assert generator.next_turn(0.0, 0.0, 0.5) == (0.5, 0)
    assert generator.next_turn(1.5, 0.0, 0.5) == (1.5, 2)  # just due
    assert generator.next_turn(1.51, 0.0, 0.5) == (2.0, 3)
    assert generator.next_turn(1.51, 4.0, 0.5) == (4.5, 0)  # those before it are taken
    assert generator.next_turn(1000.0, 8.0, 2.0) == (1000.0, 495)


def test_lost_turns_are_not_caught_up() -> None:
    # Nobody asks for nine seconds; afterwards turns are as far apart as ever.
    begun = turns(4, [0.0] * 4 + [9.1] * 8)
    assert begun == [0.0, 0.25, 0.5, 0.75, *(9.25 + number / 4 for number in range(8))]


@pytest.mark.parametrize("rate", [3, 10, 12.5, 333])
def test_no_second_has_more_turns_than_the_rate(rate: float) -> None:
    # Clocks that stand still and jump, by steps which have nothing to do with the grid.
    clock = [0.0]
    for number in range(3000):
        clock.append(clock[-1] + (0.0, 0.0031, 0.0, 0.29, 0.0, 0.0, 0.017)[number % 7])
    begun = turns(rate, clock)
    assert begun == sorted(set(begun))
    most = max(sum(first <= later < first + 1 - 1e-9 for later in begun[i : i + 400]) for i, first in enumerate(begun))
    assert most <= -(-rate // 1)


def paced(requests: list[float], limit: float) -> bool:
    """Say whether requests took the time that a limit gives them, and not three times as long.

    The first one may arrive late, which shortens the time, and a test machine may halt for a moment.
    """
    least = (len(requests) - 1) / limit
    return 0.85 * least < requests[-1] - requests[0] < 3 * least + 5


@pytest.mark.parametrize(("limit", "processes"), [(40, 1), (40, 2), (20, 8)])
def test_rps_limit_is_that_of_all_processes_together(tmp_path: Path, limit: int, processes: int) -> None:
    arrivals: list[float] = []
    flags = ("--meters", 3 * limit, "--processes", processes, "--temp-dir", tmp_path)
    with Server(fault=lambda request: arrivals.append(time.monotonic())) as server:
        done = upload(server, *DAILY, *flags, "--rps-limit", limit)
    assert done.returncode == 0 and len(arrivals) == 3 * limit
    assert paced(arrivals, limit), arrivals


def test_a_slow_server_does_not_slow_a_paced_run(tmp_path: Path) -> None:
    arrivals: list[float] = []
    with Server(delay=0.3, fault=lambda request: arrivals.append(time.monotonic())) as server:
        done = upload(server, *DAILY, "--meters", 80, "--rps-limit", 20, "--temp-dir", tmp_path)
    assert done.returncode == 0 and paced(arrivals, 20), arrivals


def test_retries_wait_for_their_turn_too(tmp_path: Path) -> None:
    arrivals: list[float] = []
    asked: Counter[str] = Counter()

    def refuse_once(request: Request) -> int | None:
        arrivals.append(time.monotonic())
        asked[request.name] += 1
        return 503 if asked[request.name] == 1 else None

    with Server(fault=refuse_once) as server:
        done = upload(server, *DAILY, "--meters", 60, "--rps-limit", 30, "--processes", 2, "--temp-dir", tmp_path)
    assert done.returncode == 0 and len(arrivals) == 120 and len(server.objects) == 60
    assert paced(arrivals, 30), arrivals
    busiest = max(sum(first <= later < first + 1 for later in arrivals) for first in arrivals)
    assert busiest <= 45  # with a machine that halts and goes on; without turns for retries it is 60


def test_a_task_has_its_share_of_the_rate(tmp_path: Path) -> None:
    arrivals: list[float] = []
    flags = ("--meters", 120, "--rps-limit", 40, "--task-index", 1, "--task-count", 2, "--temp-dir", tmp_path)
    with Server(fault=lambda request: arrivals.append(time.monotonic())) as server:
        done = upload(server, *DAILY, *flags)
    assert done.returncode == 0 and len(arrivals) == 60
    assert paced(arrivals, 20), arrivals


def test_a_process_that_has_nothing_to_do_leaves_its_share_unused(tmp_path: Path) -> None:
    arrivals: list[float] = []
    flags = (*DAILY, "--meters", 120, "--temp-dir", tmp_path)
    with Server() as server:
        assert upload(server, *flags, "--task-index", 0, "--task-count", 2).returncode == 0
        server.fault = lambda request: arrivals.append(time.monotonic()) if request.name else None
        assert upload(server, *flags, "--resume", "--processes", 2, "--rps-limit", 40).returncode == 0
    assert len(arrivals) == 60 and paced(arrivals, 20), arrivals


def test_rps_limit_counts_objects_and_not_their_chunks(tmp_path: Path) -> None:
    # Objects of 20 MB go up in three requests each, here one after the other: four begin within three seconds. If each
    # request took a turn, they would take eleven; if what follows a large object took none, four would take none.
    times: list[tuple[str, float]] = []
    flags = ("--meters", 116, "--meters-per-file", 29, "--rps-limit", 1, "--temp-dir", tmp_path, "--processes", 1)
    one_at_once = ("--upload-workers", 1, "--transfer-workers", 1)
    with Server(fault=lambda request: times.append((request.method, time.monotonic()))) as server:
        done = upload(server, *DAY, *flags, *one_at_once)
    assert done.returncode == 0 and len(server.objects) == 4 and len(times) == 12
    begun = [at for method, at in times if method == "POST"]
    assert len(begun) == 4 and all(later - earlier > 0.5 for earlier, later in zip(begun, begun[1:]))
    assert 2.5 < times[-1][1] - times[0][1] < 8


def test_latencies_are_without_the_wait_for_a_turn(tmp_path: Path) -> None:
    flags = ("--temp-dir", tmp_path, "--rps-limit", 20, "--meters", 60, "--json")
    with Server() as server:
        made = report(upload(server, *DAILY, *flags))
    assert made["objects_done"] == 60 and made["latency_p50_seconds"] < 0.5  # while the last one waits for three


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_paced_run_stops_soon(tmp_path: Path, signum: Any) -> None:
    # Its threads wait for turns up to two minutes away, which are given up.
    flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path, "--rps-limit", "0.5", "--processes", 2)
    with Server() as server:
        with start(*SMALL, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: server.objects)
            process.send_signal(signum)
            _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and "0 failed" in told
    assert len(server.objects) < 10 and not [*tmp_path.iterdir()]


def test_the_wait_for_a_turn_does_not_use_up_the_time_for_retries(tmp_path: Path) -> None:
    # The last object waits for its turn longer than a request may be retried, and then has a passing fault.
    last: list[str] = []

    def fault(request: Request) -> int | None:
        names = {known.name for known in server.requests}
        if len(names) == 16 and not last:
            last.append(request.name)
            return 503
        return None

    flags = (*DAY, "--meters", 16, "--interval", 3600, "--processes", 1, "--rps-limit", 5, "--retry-timeout", 2)
    with Server(fault=fault) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path)
    assert last and done.returncode == 0 and len(server.objects) == 16, done.stderr


@pytest.mark.parametrize(("tasks", "processes"), [(1, 1), (1, 8), (6, 1), (3, 4)])
def test_the_turns_of_all_tasks_and_processes_lie_on_one_grid(tmp_path: Path, tasks: int, processes: int) -> None:
    due: list[float] = []
    for task in range(tasks):
        share = ("--task-index", str(task), "--task-count", str(tasks), "--processes", str(processes))
        run = generator.read_settings([*DAY, "--meters", "240", "--output-dir", str(tmp_path), *share])
        run = dataclasses.replace(run, rps_limit=20.0)
        plan = generator.make_plan(run)
        for places in plan.slices:
            sender = generator.Sender(run, ctypes.c_byte(1), None, start=0.0)  # it is stopped before it begins
            list(generator.run_slice(run, plan, str(tmp_path), sender, places))
            due += [sender.turn + turn / sender.pace.rate for turn in range(1000)]
    due = sorted(due)[:200]
    assert all(later - earlier == pytest.approx(0.05) for earlier, later in zip(due, due[1:]))


def test_an_object_after_a_failed_large_one_takes_a_turn(tmp_path: Path) -> None:
    begun: list[float] = []

    def refuse(request: Request) -> int | None:
        if request.method == "POST":
            begun.append(time.monotonic())
        return 400 if request.method == "PUT" and len(begun) > 1 else None

    flags = ("--meters", 116, "--meters-per-file", 29, "--batch-size", 116, "--rps-limit", 1, "--processes", 1)
    one_at_once = ("--upload-workers", 1, "--transfer-workers", 1)
    with Server(fault=refuse) as server:
        done = upload(server, *DAY, *flags, *one_at_once, "--temp-dir", tmp_path)
    assert done.returncode == 1 and len(begun) == 4
    assert all(later - earlier > 0.5 for earlier, later in zip(begun, begun[1:]))


def test_the_retry_of_a_part_waits_for_its_turn_too(tmp_path: Path) -> None:
    failed: list[Request] = []

    def fault(request: Request) -> int | None:
        if "upload_id" not in request.query or len(failed) == 3:
            return None
        failed.append(request)
        return 503

    flags = ("--meters", 25, "--meters-per-file", 25, "--rps-limit", 2, "--processes", 1, "--json")
    with Server(fault=fault) as server:
        made = report(upload(server, *DAY, *flags, "--temp-dir", tmp_path))
    assert made["retries"] == 3 and sum(slot["asked"] for slot in made["timeline"]) >= 4


def test_a_thread_takes_no_turn_before_it_is_due() -> None:
    stop, start = ctypes.c_byte(0), time.monotonic()
    run = SimpleNamespace(upload_workers=1, transfer_workers=20, ramp=None, ramp_minutes=20)
    pace = generator.Pace(5.0)
    sender = generator.Sender(run, stop, None, start=start, turn=start, pace=pace, accepted=True, limit=20.0)

    threads = [threading.Thread(target=sender.take_turn) for _ in range(20)]
    for thread in threads:
        thread.start()
    until(lambda: sender.turn >= start + 0.6)
    assert sender.turn <= time.monotonic() + 0.2
    stop.value = 1
    for thread in threads:
        thread.join()


def paces(doubling: float, faults: Callable[[float, float], float | None], seconds: int = 600) -> list[float]:
    """Return the rate of a ramp from 10 objects a second on, second by second, up to 100."""
    pace, rates = generator.Pace(10.0), [10.0]
    for second in range(seconds):
        pace = generator.next_pace(pace, 1.0, faults(second, pace.rate), doubling, 100.0)
        rates.append(pace.rate)
    return rates


def test_a_ramp_doubles_as_long_as_answers_are_good() -> None:
    rates = paces(60, lambda second, rate: 0.01)
    assert [rates[minute * 60] for minute in range(4)] == pytest.approx([10, 20, 40, 80])
    assert rates[-1] == max(rates) == 100


@pytest.mark.parametrize("faults", [0.011, 0.05, None])
def test_a_ramp_holds_while_some_answers_are_bad_or_there_are_none(faults: float | None) -> None:
    rates = paces(60, lambda second, rate: faults if 60 <= second < 70 else 0.0)
    assert rates[60:71] == [rates[60]] * 11 and rates[71] > rates[70]
    assert rates[130] == pytest.approx(2 * rates[70])  # growth goes on from there


def test_a_ramp_drops_by_a_tenth_after_a_fifth_of_holding() -> None:
    rates = paces(60, lambda second, rate: 0.02 if second >= 60 else 0.0)
    assert rates[71] == pytest.approx(20) and rates[72] == pytest.approx(18) and rates[83] == pytest.approx(18)
    assert rates[84] == pytest.approx(16.2)


def test_a_ramp_drops_by_a_quarter_at_once_and_then_waits() -> None:
    rates = paces(60, lambda second, rate: 0.5 if 60 <= second < 64 else 0.0)
    assert rates[61:73] == pytest.approx([15] * 12) and rates[73] > 15  # no second drop, and held for a fifth
    held_first = paces(60, lambda second, rate: 0.02 if 60 <= second < 65 else 0.5 if second == 65 else 0.0)
    assert held_first[66] == pytest.approx(15)
    again = paces(60, lambda second, rate: 0.5 if second >= 60 else 0.0)
    assert [again[second] for second in (61, 72, 73, 85)] == pytest.approx([15, 15, 11.25, 8.4375])


def test_a_ramp_never_ends_below_one_object_in_ten_seconds() -> None:
    rates = paces(5, lambda second, rate: 1.0)
    assert rates[-1] == 0.1 and min(rates) == 0.1
    assert generator.next_pace(generator.Pace(0.05), 1.0, 0.0, 60, 0.05).rate == 0.05  # its share may be less


def test_a_ramp_warms_up_a_bucket(tmp_path: Path) -> None:
    # The model answers 429 to what a range cannot take, and splits a range that has been busy for three seconds.
    flags = (*DAYS, "--interval", 86_400, "--processes", 2, "--temp-dir", tmp_path, "--json")
    with Server(index=Index(60)) as server:
        ramped = report(upload(server, *flags, "--meters", 700, "--ramp", 40, "--ramp-minutes", 0.3))
    assert ramped["objects_done"] == len(server.objects) == 1400
    with Server(index=Index(60)) as server:
        cold = report(upload(server, *flags, "--meters", 300))
    assert ramped["throttled"] < 0.03 * sum(ramped["responses"].values())
    assert cold["throttled"] > 0.1 * sum(cold["responses"].values())
    assert ramped["asked_objects_per_second"] > 60  # more than a range takes


def test_a_ramp_finds_the_rate_that_a_bucket_sustains(tmp_path: Path) -> None:
    limit, accepted = 60, deque()

    def fault(request: Request) -> int | None:
        now = time.monotonic()
        with server.lock:
            while accepted and accepted[0] < now - 1:
                accepted.popleft()
            if len(accepted) >= limit:
                return 429
            accepted.append(now)
        return None

    flags = (*DAYS, "--interval", 86_400, "--meters", 600, "--processes", 3, "--temp-dir", tmp_path, "--json")
    with Server(fault=fault) as server:
        made = report(upload(server, *flags, "--ramp", 40, "--ramp-minutes", 0.3))
    assert made["objects_done"] == 1200 and made["throttling"]["second"] > 5
    assert made["sustained_objects_per_second"] == pytest.approx(limit, rel=0.15)


def test_a_ramp_ends_at_the_limit(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 150, "--processes", 2, "--temp-dir", tmp_path, "--json")
    with Server() as server:
        made = report(upload(server, *flags, "--ramp", 20, "--ramp-minutes", 0.05, "--rps-limit", 30))
    assert made["objects_done"] == 150 and made["asked_objects_per_second"] == pytest.approx(30)


def test_a_ramp_above_the_limit_is_refused(tmp_path: Path) -> None:
    flags = ("--bucket", "a-bucket", "--rps-limit", 10, "--temp-dir", tmp_path)
    done = wattif(*DAY, *flags, "--ramp", 11, STORAGE_EMULATOR_HOST="http://localhost:1")
    refused(done, "--ramp 11 begins above --rps-limit 10")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--rps-limit", 50), "at most 50 objects/s; at least 2 min 0 s"),
        (("--ramp", 10, "--ramp-minutes", 1), "10 objects/s, doubled every 1 min; at least 2 min 59 s"),
        (
            ("--ramp", 10, "--ramp-minutes", 1, "--rps-limit", 40),
            "10 objects/s, doubled every 1 min, at most 40 objects/s; at least 3 min 25 s",
        ),
        (("--rps-limit", 50, "--task-index", 0, "--task-count", 3), "at most 50 objects/s; at least 2 min 0 s"),
    ],
)
def test_the_plan_says_the_rate_and_the_least_time(tmp_path: Path, flags: tuple, line: str) -> None:
    done = wattif(*DAYS, "--meters", 3000, "--bucket", "a-bucket", "--dry-run", *flags)
    assert done.returncode == 0 and f"\nrate         {line}\n" in done.stdout, done.stderr


def test_turns_that_nobody_took_are_counted_and_lengthen_latencies(tmp_path: Path) -> None:
    flags = ("--bucket", "a-bucket", "--meters", 200, "--processes", 1, "--rps-limit", 40, "--temp-dir", tmp_path)
    with Server() as server:
        with start(*DAILY, *flags, "--json", STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: len(server.objects) > 60)
            process.send_signal(signal.SIGSTOP)
            for child in children_of(process.pid):
                os.kill(child, signal.SIGSTOP)
            frozen = time.monotonic()
            until(lambda: time.monotonic() > frozen + 2)
            for child in children_of(process.pid):
                os.kill(child, signal.SIGCONT)
            process.send_signal(signal.SIGCONT)
            out, err = process.communicate(timeout=60)
    made = report(subprocess.CompletedProcess([], process.returncode, out, err))
    assert made["objects_done"] == 200 and made["asked_objects_per_second"] == 40
    assert 70 <= made["late_starts"] <= 200  # 40 a second for two seconds, and some at the start
    slots = made["timeline"]
    assert sum(slot["late"] for slot in slots) == made["late_starts"]
    assert 200 <= sum(slot["asked"] for slot in slots) <= 200 + made["late_starts"]
    assert any(slot["objects"] == 0 and slot["late"] >= 35 for slot in slots)  # a second in the middle
    assert made["latency_max_seconds"] > 1.8  # from the first turn that was lost
    assert f"asked for 40 objects/s; {made['late_starts']:,} turns unused or late" in err


def test_a_run_that_is_slower_than_asked_does_not_pass_for_one_that_is_not(tmp_path: Path) -> None:
    flags = ("--meters", 120, "--rps-limit", 100, "--transfer-workers", 2, "--upload-workers", 1, "--processes", 1)
    with Server(delay=0.1) as server:
        made = report(upload(server, *DAILY, *flags, "--temp-dir", tmp_path, "--json"))
    asked = sum(slot["asked"] for slot in made["timeline"])
    assert made["late_starts"] == asked - 120 > 300 and made["limited_by"] == "bucket"
