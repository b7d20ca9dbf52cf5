"""What a run says of the bucket: each key of the record against a server that knows the truth."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import generator
from conftest import DAY, DAYS, files_below, refused, report, start, until, upload, wattif
from server import Reply, Request, Server, denied

DAILY = (*DAYS, "--interval", "86400")
SLOW_DISK = (
    "import time; rename = generator.os.rename; generator.os.rename = lambda a, b: (time.sleep(0.05), rename(a, b))"
)
BUSY = "generator.BUSY_SHARE = 0.1"  # other tests share the CPU
SLOTS = generator.Slot


def seconds(*slots: dict[str, Any]) -> list[generator.Slot]:
    """The slots of a run, second by second."""
    return [SLOTS(**counts) for counts in slots]


def busy(count: int, objects: int = 100, throttled: int = 0) -> list[generator.Slot]:
    """Some equal seconds."""
    responses = Counter({200: objects, 429: throttled}) if throttled else Counter({200: objects})
    return [SLOTS(objects=objects, responses=responses) for _ in range(count)]


@pytest.mark.parametrize("processes", [1, 3])
def test_the_timeline_is_what_the_server_saw(tmp_path: Path, processes: int) -> None:
    answered: list[tuple[float, int]] = []

    def fault(request: Request) -> int | str | None:
        status = 429 if request.number % 50 == 49 else 503 if request.number % 70 == 69 else 200
        if request.number % 90 == 89:
            return "reset"
        answered.append((time.monotonic(), status))
        return status if status != 200 else None

    flags = (*DAILY, "--meters", 300, "--processes", processes, "--rps-limit", 150, "--temp-dir", tmp_path, "--json")
    with Server(delay=0.05, fault=fault) as server:
        made = report(upload(server, *flags))
    statuses = Counter(status for _, status in answered)
    resets = len(server.requests) - len(answered)
    slots = made["timeline"]
    assert made["responses"] == {str(status): count for status, count in statuses.items()}
    assert made["no_response"] == resets > 0 and made["retries"] == statuses[429] + statuses[503] + resets
    assert (
        made["throttled"]
        == statuses[429] + statuses[503]
        == sum(slot["responses"].get(status, 0) for slot in slots for status in ("429", "503"))
    )
    assert sum(slot["objects"] for slot in slots) == made["objects_done"] == 600
    assert sum(slot["bytes"] for slot in slots) == made["bytes"] == 600 * 79
    # The run began before its first request, by less than the first slots that have none.
    assert [slot["second"] for slot in slots] == list(range(len(slots))) and {slot["seconds"] for slot in slots} == {1}
    first = next(slot["second"] for slot in slots if slot["responses"])
    begun = answered[0][0]
    truth = Counter(int(moment - begun) for moment, status in answered)
    told = Counter({slot["second"] - first: sum(slot["responses"].values()) for slot in slots})
    for second in range(len(slots)):  # the seconds of the server begin up to one later
        until_then = [sum(truth[earlier] for earlier in range(second + more)) for more in (0, 2)]
        assert until_then[0] - 5 <= sum(told[earlier] for earlier in range(second + 1)) <= until_then[1] + 5
    assert made["asked_objects_per_second"] == 150
    assert sum(slot["asked"] for slot in slots) - made["late_starts"] <= len(server.requests)
    # Answers came after 50 ms; a request that was reset at once does not count, nor one that was throttled.
    assert sum(made["latency_histogram"].values()) == statuses[200]
    assert 0.05 <= made["service_p50_seconds"] < 0.5 and made["service_p50_seconds"] <= made["latency_p50_seconds"]
    assert all(0.05 <= slot["p50"] <= slot["p99"] for slot in slots if slot["responses"].get("200"))
    assert min(map(float, made["latency_histogram"])) >= 0.05


def test_a_request_that_timed_out_counts_with_the_time_it_took(tmp_path: Path) -> None:
    fault = lambda request: "stall" if request.number == 30 else None  # noqa: E731
    flags = (*DAILY, "--meters", 40, "--processes", 1, "--retry-timeout", 6, "--temp-dir", tmp_path, "--json")
    with Server(fault=fault) as server:
        made = report(upload(server, *flags))
    assert made["objects_done"] == 80 and made["no_response"] == made["retries"] == 1
    assert sum(made["latency_histogram"].values()) == 81
    assert made["latency_max_seconds"] == pytest.approx(2.0, rel=0.3)  # a third of --retry-timeout


@pytest.mark.parametrize("processes", [1, 3])
def test_throttling_began_when_it_did(tmp_path: Path, processes: int) -> None:
    times: list[float] = []

    def fault(request: Request) -> int | None:
        times.append(time.monotonic())
        elapsed = times[-1] - times[0]
        return 429 if elapsed > 4 and request.number % 3 == 0 else None

    flags = (*DAILY, "--meters", 300, "--processes", processes, "--rps-limit", 80, "--temp-dir", tmp_path, "--json")
    with Server(fault=fault) as server:
        done = upload(server, *flags)
    made = report(done)
    first = next(slot["second"] for slot in made["timeline"] if slot["responses"])
    onset = made["throttling"]
    assert first + 3 <= onset["second"] <= first + 5
    assert 30 < onset["objects_per_second"] < 90
    assert 10 < onset["objects_per_second_since"] < 75  # a retry takes a turn, too
    started = time.strptime(made["started"], "%Y-%m-%dT%H:%M:%SZ")
    begun = time.strptime(onset["utc"], "%Y-%m-%dT%H:%M:%SZ")
    assert time.mktime(begun) - time.mktime(started) == pytest.approx(onset["second"], abs=1)
    assert f"throttling began after {onset['second']} s ({onset['utc'][11:19]} UTC), at " in done.stderr
    assert re.search("^throttled    ·+[▁-█·]+   at most [0-9]+% of the answers$", done.stderr, re.M)
    assert re.search(r"^uploaded     [▁-█·]+   at most \d+ objects/s, [\d.]+ kB/s$", done.stderr, re.M)
    assert re.search(r"^p99          [▁-█·]+   [\d.]+ m?s to [\d.]+ m?s$", done.stderr, re.M)


def test_throttling_is_found_to_the_second() -> None:
    calm = busy(20)
    assert generator.find_throttling(calm) is None
    assert generator.find_throttling([*calm, *busy(5, 90, 10)]) == 20
    assert generator.find_throttling([*busy(3), *busy(1, 99, 1), *busy(20)]) is None  # a stray one
    assert generator.find_throttling([*busy(3), *busy(1, 89, 11), *busy(20)]) == 3  # 11 of 1,000
    assert generator.find_throttling([]) is None


def test_the_sustained_rate_is_that_of_the_best_window_without_throttling() -> None:
    assert generator.find_sustained(busy(4), 4.0) is None  # too short
    assert generator.find_sustained(busy(20), 20.5) == 100
    run = [*busy(10, 50), *busy(5, 200), *busy(10, 300, 30)]
    assert generator.find_sustained(run, 25.5) == 200
    assert generator.find_sustained(busy(30, 100, 2), 30.5) is None
    long = [*busy(300, 100), *busy(6, 400), *busy(294, 100)]
    assert generator.find_sustained(long, 600.5) == 130  # 60 seconds
    assert generator.find_sustained([*busy(600, 100), *busy(60, 400), *busy(540, 100)], 1200.5) == 400


def test_the_steady_time_is_when_every_process_has_files() -> None:
    run = seconds(
        {}, {"first_uploads": 2}, {}, {"first_uploads": 1}, *[{}] * 6, {"last_files": 1}, {}, {"last_files": 2}
    )
    assert generator.find_steady(run) == (4, 10)
    assert generator.find_steady(seconds({}, {})) == (0, 0)


def test_the_steady_rate_and_the_tail(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 240, "--rps-limit", 60, "--processes", 3, "--temp-dir", tmp_path, "--json")
    with Server() as server:
        made = report(upload(server, *flags, "--batch-size", 10))
    assert made["steady_objects_per_second"] == pytest.approx(60, abs=10)
    assert made["steady_bytes_per_second"] == pytest.approx(79 * made["steady_objects_per_second"], rel=0.02)
    assert 0 < made["tail_seconds"] < 3
    assert made["sustained_objects_per_second"] == pytest.approx(60, abs=10) and made["throttling"] is None
    with Server() as server:
        short = report(upload(server, *DAILY, "--meters", 20, "--temp-dir", tmp_path, "--json"))
    assert short["steady_objects_per_second"] is short["sustained_objects_per_second"] is None


@pytest.mark.parametrize(
    ("limit", "flags", "server", "patch"),
    [
        ("cpu", ("--meters", 400, "--interval", 10, "--processes", 1), {}, BUSY),
        ("bucket", ("--meters", 120, "--processes", 2), {"delay": 0.5}, ""),
        ("disk", ("--meters", 60, "--processes", 2), {}, SLOW_DISK),
        ("rps-limit", ("--meters", 60, "--rps-limit", 30), {}, ""),
        ("rps-limit", ("--meters", 60, "--ramp", 30), {}, ""),
    ],
)
def test_what_limited_a_run(tmp_path: Path, limit: str, flags: tuple, server: dict, patch: str) -> None:
    with Server(keep=False, **server) as opened:
        done = upload(opened, *DAY, "--interval", 3600, *flags, "--temp-dir", tmp_path, "--json", patch=patch)
    made = report(done)
    assert made["limited_by"] == limit, made
    named = "--ramp" if "--ramp" in flags else "--rps-limit" if limit == "rps-limit" else f"the {limit}"
    assert f"\nlimited by {named}: " in done.stderr
    shares = [made[f"{kind}_share"] for kind in ("answer", "file", "turn")]
    assert all(0 <= share <= 1.01 for share in shares) and 0 < made["cpu_share"] < 2


def test_nothing_limited_what_did_not_upload(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 5, "--temp-dir", tmp_path, "--json")
    with Server() as server:
        upload(server, *flags)
        assert report(upload(server, *flags, "--verify"))["limited_by"] is None
        assert report(upload(server, *flags, "--resume"))["limited_by"] is None
    with Server(fault=lambda request: 404) as server:
        failed = report(upload(server, *flags))
    assert failed["limited_by"] is None and failed["responses"] and len(failed["timeline"]) >= 1


def test_a_stranger_can_repeat_the_run(tmp_path: Path) -> None:
    flags = ("--start", "today", "--end", "today", "--interval", 43_200, "--meters", 3, "--flaws", "late=0.5")
    more = ("--output-dir", tmp_path / "out", "--expect", "retries < 1", "--json")
    made = report(wattif(*flags, *more, BATCH_TASK_INDEX="0", BATCH_TASK_COUNT="2"))
    settings = made["settings"]
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert settings["start"] in (today, made["started"][:10]) and settings["end"] == settings["start"]
    assert settings["task_index"] == 0 and settings["task_count"] == 2 and settings["task_source"] == "BATCH_TASK_INDEX"
    assert settings["flaws"] == {"late": 0.5} and settings["expect"] == ["retries < 1"] and settings["processes"] >= 1
    flags_of = {name.replace("_", "-") for name in settings} - {"task-source"}
    told = wattif("--help").stdout
    assert set(re.findall(r"--([a-z-]+)", told)) >= flags_of
    assert made["wattif"] == generator.VERSION and made["google_cloud_storage"][0] == "3"


def test_a_dry_run_prints_the_plan_as_json(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 7, "--output-dir", tmp_path / "out", "--json")
    done = wattif(*flags, "--dry-run")
    planned = json.loads(done.stdout)
    assert done.returncode == 0 and planned["objects_planned"] == 14 and planned["bytes_planned"] == 14 * 79
    made = report(wattif(*flags))
    assert {**planned["settings"], "dry_run": False} == made["settings"]
    assert all(made[key] == value for key, value in planned.items() if key != "settings")


@pytest.mark.parametrize(
    ("rules", "met", "status"),
    [
        (["objects_done>=14"], [True], 0),
        (["objects_done >= 14", " retries<1 "], [True, True], 0),
        (["objects_done>14", "retries<=0"], [False, True], 3),
        (["elapsed_seconds<1e-3"], [False], 3),
        (["steady_objects_per_second>0"], [False], 3),  # too short: null is never met
        (["steady_objects_per_second<1e9"], [False], 3),
    ],
)
def test_expectations_are_met_or_not(tmp_path: Path, rules: list[str], met: list[bool], status: int) -> None:
    flags = [part for rule in rules for part in ("--expect", rule)]
    done = wattif(*DAILY, "--meters", 7, "--output-dir", tmp_path, "--json", *flags)
    made = report(done)
    assert done.returncode == made["exit_status"] == status
    assert [rule["met"] for rule in made["expectations"]] == met
    for rule in made["expectations"]:
        assert f"\n{'met' if rule['met'] else 'not met'}: {rule['rule']} (" in done.stderr
        assert made[re.split("[<>]", rule["rule"])[0]] == rule["value"]


def test_a_failed_run_keeps_its_status_whatever_is_expected(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 7, "--temp-dir", tmp_path, "--json", "--expect", "objects_done>100", "--record")
    with Server(fault=lambda request: 404 if request.number == 5 else None) as server:
        made = report(upload(server, *flags))
    assert made["exit_status"] == 1 and made["expectations"][0]["met"] is False
    assert len(server.objects) == 13 and not any("_wattif" in name for name in server.objects)  # and no record


@pytest.mark.parametrize("rule", ["retries", "retries=1", "retries<", "retries<x", "<1", "retries<1,2", "Retries<1"])
def test_a_rule_of_a_bad_form_is_refused(tmp_path: Path, rule: str) -> None:
    refused(wattif(*DAILY, "--output-dir", tmp_path / "out", "--dry-run", "--expect", rule), "--expect")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["latency", "error", "host", "timeline", "limited_by"])
def test_a_rule_about_no_number_of_the_record_is_refused(tmp_path: Path, key: str) -> None:
    done = wattif(*DAILY, "--output-dir", tmp_path / "out", "--expect", f"{key}<1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"--expect {key}<1" in done.stderr and "latency_p99_seconds" in done.stderr


@pytest.mark.parametrize("flags", [(), ("--prefix", "a/b"), ("--task-index", 1, "--task-count", 3)])
def test_the_record_is_put_beside_the_data(tmp_path: Path, flags: tuple) -> None:
    flags = (*DAILY, "--meters", 7, "--temp-dir", tmp_path, *flags)
    with Server() as server:
        made = report(upload(server, *flags, "--record", "--json", "--expect", "retries>5"))
        verified = report(upload(server, *flags, "--verify", "--json"))
    assert made["exit_status"] == 3  # which delivered all
    below = "a/b/" if "--prefix" in flags else ""
    task = "task-1-of-3" if "--task-index" in flags else "task-0-of-1"
    name = f"{below}_wattif/2024-01-01_2024-01-02_{task}.json"
    stored = server.objects[name]
    assert json.loads(stored.content) == made and stored.content_type == "application/json"
    assert sum(made["responses"].values()) == made["objects_done"]  # its own request is not in it
    assert verified["exit_status"] == 0 and verified["objects_unexpected"] == 0


def test_the_record_of_files_is_a_file(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 7, "--output-dir", tmp_path, "--record", "--json")
    done = wattif(*flags)
    stored = files_below(tmp_path)["_wattif/2024-01-01_2024-01-02_task-0-of-1.json"]
    assert done.returncode == 0 and json.loads(stored) == report(done)
    assert report(wattif(*flags, "--resume"))["objects_skipped"] == 14
    assert files_below(tmp_path)["_wattif/2024-01-01_2024-01-02_task-0-of-1.json"] == stored


@pytest.mark.parametrize("create_only", [False, True])
def test_a_run_that_makes_nothing_keeps_the_record_of_the_one_that_did(tmp_path: Path, create_only: bool) -> None:
    flags, name = (
        (*DAILY, "--meters", 7, "--temp-dir", tmp_path, "--json"),
        "_wattif/2024-01-01_2024-01-02_task-0-of-1.json",
    )
    with Server(create_only=create_only) as server:
        assert upload(server, *flags).returncode == 0
        resumed = report(upload(server, *flags, "--resume", "--record"))  # the first one made none
        assert json.loads(server.objects[name].content) == resumed and resumed["objects_skipped"] == 14
        again = report(upload(server, *flags, "--resume", "--record"))
        assert again["exit_status"] == 0 and json.loads(server.objects[name].content) == resumed


def test_the_latency_of_a_large_object_is_that_of_all_its_parts(tmp_path: Path) -> None:
    flags = (*DAY, "--meters", 52, "--meters-per-file", 26, "--processes", 1, "--temp-dir", tmp_path, "--json")
    with Server(keep=False, delay=0.3) as server:
        made = report(upload(server, *flags))
    assert made["responses"] == {"200": 4, "308": 2}  # a session and two chunks for each
    assert sum(made["latency_histogram"].values()) == made["objects_done"] == 2
    assert 0.9 <= made["service_p50_seconds"] <= made["latency_p50_seconds"] < 3


def test_a_record_that_cannot_be_stored_is_an_error(tmp_path: Path) -> None:
    def fault(request: Request) -> Reply | None:
        return denied("storage.objects.create") if request.name.startswith("_wattif") else None

    with Server(fault=fault) as server:
        done = upload(server, *DAILY, "--meters", 7, "--temp-dir", tmp_path, "--record", "--json")
    made = report(done)
    assert done.returncode == made["exit_status"] == 1 and made["objects_done"] == 14 == len(server.objects)
    assert "the record cannot be stored as _wattif/2024-01-01_2024-01-02_task-0-of-1.json: HTTP 403" in made["error"]
    assert made["error"] in done.stderr


def test_a_signal_while_the_record_is_stored_ends_the_run(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 7, "--temp-dir", tmp_path, "--record", "--json", "--bucket", "a-bucket")
    with Server(fault=lambda request: "stall" if request.name.startswith("_wattif") else None) as server:
        with start(*flags, patch="generator.GRACE_SECONDS = 1", STORAGE_EMULATOR_HOST=server.url) as process:
            until(lambda: any(request.name.startswith("_wattif") for request in server.requests))
            process.terminate()
            out, err = process.communicate(timeout=30)
    made = report(subprocess.CompletedProcess([], process.returncode, out, err))
    assert process.returncode == made["exit_status"] == 143 and made["objects_done"] == 14
    assert "cannot be stored as _wattif/" in made["error"] and "the run was stopped" in made["error"]
    assert "Traceback" not in err


def test_records_of_tasks_add_up(tmp_path: Path) -> None:
    flags = (*DAILY, "--meters", 30, "--rps-limit", 60, "--json")
    with Server() as server:
        tasks = [
            report(upload(server, *flags, "--temp-dir", tmp_path, "--task-index", task, "--task-count", 3))
            for task in range(3)
        ]
        whole = report(upload(server, *flags, "--temp-dir", tmp_path))
    for key in ("objects_planned", "objects_done", "bytes", "readings", "rows_parsed", "asked_objects_per_second"):
        assert sum(task[key] for task in tasks) == whole[key], key
    added = sum((Counter(task["latency_histogram"]) for task in tasks), Counter())
    assert sum(added.values()) == sum(whole["latency_histogram"].values()) == 60
    bounds = {float(bound) for bound in added}
    assert all(
        bound == float(f"{generator.LATENCY_BASE ** generator.bucket_of(bound * 0.999):.6g}") for bound in bounds
    )
