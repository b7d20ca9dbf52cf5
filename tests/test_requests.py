"""Requests: retries, faults, outages, and a soak of all of them. The end is always the same set of objects."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import generator
from conftest import DAY, DAYS, children_of, contents, files_below, report, spool, start, until, upload, wattif
from credentials import service_account
from server import Reply, Request, Server, TokenServer

SMALL = (*DAYS, "--interval", "3600", "--meters", "60", "--batch-size", "10")
FAULTS = [429, 500, 502, 503, 504, 408, "reset", "cut", "garbled"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_retried(expected: Callable[..., dict], tmp_path: Path, fault: Any) -> None:
    flags = (*SMALL, "--processes", 1)
    with Server(fault=lambda request: fault if request.number in (3, 4, 30) else None) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp", "--json")
    assert done.returncode == 0, done.stderr
    made = report(done)
    assert made["retries"] == 3 and made["objects_done"] == 120
    assert made["throttled"] == (3 if fault in (429, 503) else 0)
    assert made["responses"].get(str(fault), 0) == (3 if isinstance(fault, int) else 0)
    assert made["no_response"] == (3 if fault == "reset" else 0)
    assert contents(server) == expected(*SMALL)


def test_a_stalled_request_times_out_and_is_retried(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*SMALL, "--processes", 1, "--retry-timeout", 6)
    with Server(fault=lambda request: "stall" if request.number == 30 else None) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0 and "1 request without one" in done.stderr, done.stderr
    assert contents(server) == expected(*SMALL)


@pytest.mark.parametrize(("fault", "reason"), [(503, "HTTP 503: scripted"), ("stall", ": timed out")])
def test_an_object_that_never_arrives_does_not_keep_the_others(
    expected: Callable[..., dict], tmp_path: Path, fault: Any, reason: str
) -> None:
    wanted = expected(*SMALL)
    cursed = sorted(wanted)[5]
    with Server(fault=lambda request: fault if request.name == cursed else None) as server:
        # One batch at a time: while the last file of a batch is tried again, nothing else is accepted.
        flags = ("--retry-timeout", 2, "--temp-dir", tmp_path / "temp", "--upload-workers", 1, "--processes", 1)
        done = upload(server, *SMALL, *flags)
        assert done.returncode == 1 and f"{cursed}: " in done.stderr and reason in done.stderr, done.stderr
        assert contents(server) == {name: content for name, content in wanted.items() if name != cursed}
        server.fault = lambda request: None
        assert upload(server, *SMALL, "--resume", "--temp-dir", tmp_path / "temp").returncode == 0
    assert contents(server) == wanted and not spool(tmp_path / "temp")


@pytest.mark.parametrize("fault", ["down", 503, "stall"])
def test_an_endpoint_that_is_down_ends_the_run_in_time(tmp_path: Path, fault: Any) -> None:
    server = Server(fault=lambda request: fault)
    with server if fault != "down" else Server() as served:
        url = "http://127.0.0.1:1" if fault == "down" else served.url
        flags = ("--bucket", "a-bucket", "--retry-timeout", 2, "--batch-size", 100, "--meters", 1000)
        started = time.monotonic()
        done = wattif(*SMALL, *flags, "--temp-dir", tmp_path, STORAGE_EMULATOR_HOST=url)
        elapsed = time.monotonic() - started
    assert done.returncode == 1 and "error: nothing was accepted: " in done.stderr
    assert len(spool(tmp_path)) <= 2 and elapsed < 30  # one file for each process, as long as a request may take
    assert "Traceback" not in done.stderr


def test_a_resumable_upload_survives_faults(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (*DAY, "--meters", 60, "--meters-per-file", 30, "--processes", 1)
    with Server(fault=lambda request: {1: 503, 3: "reset", 5: 429}.get(request.number)) as server:
        done = upload(server, *flags, "--temp-dir", tmp_path / "temp")
    assert done.returncode == 0, done.stderr
    assert contents(server) == expected(*flags)


def test_a_request_is_tried_for_as_long_as_the_flag_says(tmp_path: Path) -> None:
    tries: list[float] = []

    def fault(request: Request) -> int:
        tries.append(time.monotonic())
        return 503

    flags = (*DAY, "--interval", 86_400, "--meters", 1, "--retry-timeout", 8, "--temp-dir", tmp_path)
    with Server(fault=fault) as server:
        done = upload(server, *flags)
    # The last try has the last second. Without it a pause that would pass the eight seconds would end it all.
    assert done.returncode == 1 and 6.5 < tries[-1] - tries[0] < 8.5


def test_all_parts_of_an_object_have_one_time(tmp_path: Path) -> None:
    tries: list[float] = []

    def fault(request: Request) -> int | None:
        if "upload_id" in request.query:
            tries.append(time.monotonic())
            # The first part fails for 6 of the 8 seconds, the last one for ever.
            is_first = request.headers["content-range"].startswith("bytes 0-")
            return 503 if not is_first or tries[-1] - tries[0] < 6 else None
        return None

    flags = (*DAY, "--meters", 30, "--meters-per-file", 30, "--retry-timeout", 8, "--temp-dir", tmp_path)
    with Server(fault=fault) as server:
        done = upload(server, *flags)
    assert done.returncode == 1 and "HTTP 503" in done.stderr and 6.5 < tries[-1] - tries[0] < 12


@pytest.mark.parametrize("has_session", [True, False])
def test_an_object_after_a_large_one_that_failed_has_its_own_time(tmp_path: Path, has_session: bool) -> None:
    cursed: list[str] = []
    begun: Counter[str] = Counter()
    tries: list[float] = []

    def fault(request: Request) -> Any:
        if len(server.objects) == 1 and not cursed:
            cursed.append(request.name)
        if request.name in cursed:
            tries.append(time.monotonic())
            if has_session:
                return "reset" if "upload_id" in request.query else None
            return 503 if tries[-1] - tries[0] < 1.9 else Reply(200, b"")  # which does not say where the session is
        begun.update([request.name] * (request.method == "POST"))
        return 503 if cursed and begun[request.name] == 1 and request.method == "POST" else None

    flags = (*DAY, "--meters", 100, "--meters-per-file", 25, "--processes", 1, "--retry-timeout", 3)
    with Server(fault=fault) as server:
        done = upload(server, *flags, "--transfer-workers", 1, "--temp-dir", tmp_path, "--json")
    assert done.returncode == 1 and report(done)["objects_failed"] == 1, done.stderr
    assert sorted(begun.values()) == [1, 2, 2] and len(server.objects) == 3


@pytest.mark.parametrize("fault", ["drip", "stall"])
@pytest.mark.parametrize("kind", [("--interval", 3600), ("--meters", 20, "--meters-per-file", 20)])
def test_an_upload_ends_in_the_time_that_its_bytes_allow(tmp_path: Path, fault: str, kind: tuple) -> None:
    flags = (*DAY, "--meters", 1, *kind, "--retry-timeout", 2, "--temp-dir", tmp_path)
    with Server(fault=lambda request: fault) as server:
        started = time.monotonic()
        done = upload(server, *flags, "--json")
        elapsed = time.monotonic() - started
    # The initiation of an upload of 13.6 MB sends as little as a small object.
    assert done.returncode == 1 and "timed out" in report(done)["error"], done.stderr
    assert 1.5 < report(done)["elapsed_seconds"] < elapsed < 20


def test_the_time_for_the_bytes_is_given_once_for_all_tries(tmp_path: Path) -> None:
    # A request of 2.3 kB has 2.3 s for its bytes and 3 s more. Without pauses, nothing but the answers takes time.
    flags = (*DAY, "--interval", 3600, "--meters", 1, "--retry-timeout", 3, "--temp-dir", tmp_path)
    patch = "generator.SLOWEST_RATE = 1000; generator.random.uniform = lambda low, high: 0.0"
    with Server(delay=0.2, fault=lambda request: 503) as server:
        done = upload(server, *flags, "--json", patch=patch)
    assert done.returncode == 1 and 3 < report(done)["elapsed_seconds"] < 9, done.stderr


def test_a_chunk_that_drips_ends_in_the_time_that_its_bytes_allow(tmp_path: Path) -> None:
    flags = (*DAY, "--interval", 10, "--meters", 13, "--meters-per-file", 13, "--retry-timeout", 1)
    bytes_of_object = 13 * 682_560
    slowest = generator.SLOWEST_RATE

    def fault(request: Request) -> str | None:
        return "drip" if "upload_id" in request.query else None

    patch = f"generator.SLOWEST_RATE = {slowest * 100}"  # the test has no three minutes
    with Server(fault=fault) as server:
        started = time.monotonic()
        done = upload(server, *flags, "--temp-dir", tmp_path, patch=patch)
        elapsed = time.monotonic() - started
    assert done.returncode == 1 and "timed out" in done.stderr
    assert elapsed < 1 + bytes_of_object / slowest / 100 + 3


@pytest.mark.parametrize(("method", "is_sent"), [("POST", True), (None, False)])
def test_an_answer_of_a_proxy_that_was_asked_for_a_tunnel_says_nothing_of_an_object(method: Any, is_sent: bool) -> None:
    sender = generator.Sender(SimpleNamespace(), ctypes.c_byte(0), None, start=0.0)
    sender.thread.due = time.monotonic() + 10
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender.timed_response(ours, method=method)
    assert sender.thread.is_sent == is_sent


def test_the_number_of_uploads_under_way_follows_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(generator.time, "monotonic", lambda: now[0])
    run = SimpleNamespace(upload_workers=2, transfer_workers=16)
    sender = generator.Sender(run, ctypes.c_byte(0), None, start=0.0)

    def answered(seconds: float, timed_out: bool = False) -> float:
        began, now[0] = now[0], now[0] + seconds
        sender.adjust(began, 40.0, timed_out=timed_out)
        return sender.limit

    assert [answered(9.0) for _ in range(7)] == [2, 3, 4, 5, 6, 7, 8]  # with each round of answers, twice as many
    assert answered(11.0) == 8  # so slow that more of them would time out
    assert answered(40.0, timed_out=True) == 4
    now[0] -= 20
    assert answered(15.0, timed_out=True) == 4  # it was under way when the limit was halved
    now[0] += 100
    assert [answered(1.0) for _ in range(4)] == [
        4.25,
        pytest.approx(4.485, abs=0.01),
        *[pytest.approx(4.8, abs=0.15)] * 2,
    ]
    for _ in range(1000):
        answered(0.01)
    assert sender.limit == 32
    for _ in range(20):
        answered(40.0, timed_out=True)
    assert sender.limit == 1


def test_a_bucket_that_throttles_does_not_get_more_uploads_at_once(tmp_path: Path) -> None:
    under_way, peaks, lock = [0], [0], threading.Lock()

    def fault(request: Request) -> int | None:
        with lock:
            under_way[0] += 1
            peaks.append(under_way[0])
        server.closing.wait(0.02)  # so that those that come at the same time meet
        with lock:
            under_way[0] -= 1
        return 503 if 0 < request.number < 40 else None

    flags = (*DAY, "--interval", 86_400, "--meters", 40, "--processes", 1, "--temp-dir", tmp_path)
    with Server(fault=fault) as server:
        done = upload(server, *flags)
    assert done.returncode == 0 and max(peaks[:40]) <= 3 < max(peaks), (done.stderr, peaks)


def test_a_slow_line_carries_every_byte_once(tmp_path: Path) -> None:
    # 64 uploads at once would take 3.6 seconds each, and may take 2.7.
    flags = (*DAY, "--meters", 96, "--processes", 2, "--upload-workers", 1, "--transfer-workers", 32)
    flags = (*flags, "--retry-timeout", 6, "--temp-dir", tmp_path, "--json")
    with Server(keep=False, rate=12e6) as server:
        done = upload(server, *flags, patch="generator.SLOWEST_RATE = 1_000_000")
    made = report(done)
    assert done.returncode == 0 and made["retries"] <= 9, done.stderr
    assert made["bytes"] / made["elapsed_seconds"] > 0.7 * 12e6


def test_the_bytes_of_a_large_object_have_their_time_beside_that_for_retries(tmp_path: Path) -> None:
    # A part takes 3.4 seconds; it may take 6.7 and what its answer may.
    flags = (*DAY, "--meters", 26, "--meters-per-file", 26, "--processes", 1, "--retry-timeout", 2)
    with Server(keep=False, rate=5e6) as server:
        flags = (*flags, "--temp-dir", tmp_path, "--json")
        done = upload(server, *flags, patch="generator.SLOWEST_RATE = 2_500_000")
    assert done.returncode == report(done)["retries"] == 0, done.stderr


def test_a_soak_of_faults_a_kill_and_a_resume(expected: Callable[..., dict], tmp_path: Path) -> None:
    flags = (
        "--start",
        "2024-01-01",
        "--end",
        "2024-01-04",
        "--interval",
        7200,
        "--meters",
        250,
        "--processes",
        3,
        "--retry-timeout",
        15,
    )
    kinds = [429, 500, 502, 503, 504, "reset", "cut"]
    draw = random.Random(1)
    script = [draw.choice(kinds) if draw.random() < 0.1 else None for _ in range(10_000)]
    script[100:1100:500] = ["stall"] * 2
    lock = threading.Lock()
    asked: Counter[Any] = Counter()

    def fault(request: Request) -> Any:
        about = (request.method, request.name or str(request.query))
        with lock:
            asked.update([about, None])
            # Not three times in a row for one request, for which the tool would be right to give up in time.
            return script[asked[None] % len(script)] if asked[about] % 3 else None

    temp = tmp_path / "temp"
    with Server(fault=fault, page=100) as server:
        with start("--bucket", "a-bucket", "--temp-dir", temp, *flags, STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: len(server.objects) > 350)
            os.kill(children_of(process.pid)[1], signal.SIGKILL)
            process.communicate(timeout=100)
        assert process.returncode == 1 and len(server.objects) < 1000
        done = upload(server, "--temp-dir", temp, *flags, "--resume")
        assert done.returncode == 0, done.stderr
        done = upload(server, "--temp-dir", temp, *flags, "--verify")
        assert done.returncode == 0, done.stderr
    assert contents(server) == expected(*flags) and len(server.objects) == 1000 and not spool(temp)


def soak(tmp_path: Path, seconds: int) -> dict[str, Any]:
    """Upload for a while with a role that may only create, and return the report: all objects are there, exactly.

    Two of 100 answers are lost, one of 30 is 503, the bucket throttles for one second of eight, a token is renewed
    every 5 seconds, and for one of four renewals the token server is down at first. When nearly all has been sent, the
    faults end, so that nobody waits for the last retries. `soak(path, 600)` is the long form.
    """
    flags = (*DAYS, "--interval", 3600, "--meters", 14 * seconds, "--batch-size", 20, "--processes", 2)
    draw, lock = random.Random(2), threading.Lock()

    def fault(request: Request) -> Any:
        with lock:
            number = draw.random()
        if len(server.objects) > 26 * seconds:
            return None
        if time.monotonic() % 8 < 1:
            return 429
        return "lost" if number < 0.02 else 503 if number < 0.05 else None

    def token_fault(path: str) -> int | None:
        return 503 if len(tokens.paths) % 4 == 1 else None

    rules = {"create_only": True, "fault": fault}
    with TokenServer(lifetime=230, fault=token_fault) as tokens, Server(token=tokens.accepts, **rules) as server:
        account = {"API_ENDPOINT_OVERRIDE": server.url, **service_account(tmp_path, tokens.url)}
        limit = ("--rps-limit", 50, "--temp-dir", tmp_path / "temp", "--json")
        with start("--bucket", "a-bucket", *flags, *limit, **account) as process:
            out, err = process.communicate(timeout=3 * seconds + 60)
        assert process.returncode == 0 and len(tokens.paths) > seconds / 20, err[-2000:]
    assert wattif(*flags, "--output-dir", tmp_path / "wanted").returncode == 0
    assert contents(server) == files_below(tmp_path / "wanted") and not spool(tmp_path / "temp")
    return json.loads(out)


def test_a_soak_with_lost_answers_and_a_role_that_may_only_create(tmp_path: Path) -> None:
    made = soak(tmp_path, 20)
    assert made["objects_done"] == 560 and made["no_response"] and made["responses"]["403"]


@pytest.mark.parametrize("bypassed", [False, True])
def test_proxies_of_the_environment_are_heeded(tmp_path: Path, bypassed: bool) -> None:
    flags = ("--bucket", "a-bucket", *SMALL, "--meters", 5, "--temp-dir", tmp_path, "--retry-timeout", 2)
    with Server() as server:
        proxy = {"http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"}
        if not bypassed:
            proxy = {"http_proxy": server.url, "no_proxy": ""}
        endpoint = server.url if bypassed else "http://storage.invalid"
        done = wattif(*flags, STORAGE_EMULATOR_HOST=endpoint, **proxy)
    assert done.returncode == 0 and len(server.objects) == 10, done.stderr


def test_after_two_requests_that_were_given_up_no_other_one_waits_as_long(tmp_path: Path) -> None:
    # Ten rounds of four uploads would take five seconds each.
    flags = (*DAY, "--interval", 86_400, "--meters", 200, "--batch-size", 40, "--processes", 1, "--retry-timeout", 5)
    with Server(fault=lambda request: 503 if request.number else None) as server:
        started = time.monotonic()
        done = upload(server, *flags, "--upload-workers", 1, "--transfer-workers", 4, "--temp-dir", tmp_path)
    assert done.returncode == 1 and "error: 79 uploads failed, at last " in done.stderr
    assert "HTTP 503: scripted; fix that, then run it again with --resume" in done.stderr
    assert time.monotonic() - started < 30


def test_a_server_that_falls_silent_does_not_hold_the_run(tmp_path: Path) -> None:
    # Timeouts narrow the uploads to one at a time, and forty of them, each given up after 3 s, would take two minutes.
    flags = (*DAY, "--interval", 86_400, "--meters", 200, "--batch-size", 40, "--processes", 1, "--retry-timeout", 3)
    with Server(fault=lambda request: "stall" if request.number > 10 else None) as server:
        started = time.monotonic()
        done = upload(server, *flags, "--temp-dir", tmp_path)
    assert done.returncode == 1 and re.search("error: [0-9]+ uploads failed, at last .*timed out", done.stderr)
    assert time.monotonic() - started < 40


def test_a_request_that_succeeds_ends_an_outage(tmp_path: Path) -> None:
    # One request at a time: three objects never arrive, the third of which is tried once. Those after it arrive, and
    # for one of them it takes a retry, as long as it may have.
    flags = (*DAY, "--interval", 86_400, "--meters", 20, "--batch-size", 20, "--processes", 1, "--retry-timeout", 2)
    cursed: list[str] = []
    asked: Counter[str] = Counter()

    def fault(request: Request) -> int | None:
        if request.number and len(cursed) < 3 and request.name not in cursed:
            cursed.append(request.name)
        asked[request.name] += 1
        if request.name in cursed:
            return 503
        return 503 if len(server.objects) == 10 and asked[request.name] == 1 else None

    with Server(fault=fault) as server:
        done = upload(server, *flags, "--upload-workers", 1, "--transfer-workers", 1, "--temp-dir", tmp_path, "--json")
    made = report(done)
    assert made["objects_failed"] == 3 and made["objects_done"] == len(server.objects) == 17
    assert [asked[name] > 1 for name in cursed] == [True, True, False]
    assert sorted(count for name, count in asked.items() if name not in cursed) == [1] * 16 + [2]
