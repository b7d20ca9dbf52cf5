"""The command line: the help page, and one line for every bad input."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pytest

import generator
from conftest import DAYS, ROOT, SPOOL, begin, environment, refused, report, wattif
from server import Server

SMALL = (*DAYS, "--interval", "3600")
BAD_FLAGS = [
    (("--start", "2024-02-30", "--end", "2024-03-01"), "--start"),
    (("--start", "01.02.2024", "--end", "2024-03-01"), "--start"),
    (("--start", "2024-1-1", "--end", "2024-03-01"), "--start"),
    (("--start", "20240101", "--end", "2024-03-01"), "--start"),
    (("--start", "2024-01-01", "--end", "tomorrow"), "--end"),
    (("--start", "2024-01-02", "--end", "2024-01-01"), "--end"),
    (("--start", "2024-01-02"), "--end"),
    (("--end", "2024-01-02"), "--start"),
    ((*DAYS, "--meters", "0"), "--meters"),
    ((*DAYS, "--meters", "-5"), "--meters"),
    ((*DAYS, "--meters", "1e3"), "--meters"),
    ((*DAYS, "--meters", str(2**36 + 1)), "--meters"),
    ((*DAYS, "--meters", "9" * 5000), "--meters"),
    ((*DAYS, "--interval", "0"), "--interval"),
    ((*DAYS, "--interval", "7"), "--interval"),
    ((*DAYS, "--interval", "172800"), "--interval"),
    ((*DAYS, "--seed", "-1"), "--seed"),
    ((*DAYS, "--seed", "x\ny\x1b[31m"), "--seed"),
    ((*DAYS, "--batch-size", "0"), "--batch-size"),
    ((*DAYS, "--write-workers", "0"), "--write-workers"),
    ((*DAYS, "--upload-workers", "0"), "--upload-workers"),
    ((*DAYS, "--transfer-workers", "0"), "--transfer-workers"),
    ((*DAYS, "--bucket", ""), "--bucket"),
    ((*DAYS, "--bucket", "ab"), "--bucket"),
    ((*DAYS, "--bucket", "a" * 64), "--bucket"),
    *(
        ((*DAYS, "--bucket", name), "--bucket")
        for name in ("gs://", "gs://My_bucket", "gs://bucket//", "gs://bucket/a//b")
    ),
    *(
        ((*DAYS, "--prefix", path), "--prefix")
        for path in ("", "/", "/a", "a//b", "a//", "a/../b", ".", "a\nb", 901 * "x")
    ),
    ((*DAYS, "--bucket", "gs://bucket/a", "--prefix", "b"), "--prefix b and --bucket"),
    ((*DAYS, "--bucket", "Bucket"), "--bucket"),
    ((*DAYS, "--bucket", "bücket"), "--bucket"),
    ((*DAYS, "--bucket", "-bucket"), "--bucket"),
    ((*DAYS, "--bucket", "bucket_"), "--bucket"),
    ((*DAYS, "--bucket", "192.168.5.4"), "--bucket"),
    ((*DAYS, "--bucket", "goog-bucket"), "--bucket"),
    ((*DAYS, "--bucket", "my-g00gle-bucket"), "--bucket"),
    ((*DAYS, "--bucket", "a..b"), "--bucket"),
    ((*DAYS, "--bucket", "a.b\n"), "--bucket"),
    ((*DAYS, "--bucket", "a." + "b" * 64), "--bucket"),
    ((*DAYS, "--bucket", "a-bucket", "--output-dir", "out"), "--bucket"),
    ((*DAYS, "--max-disk", "1GB", "--output-dir", "out"), "--max-disk"),
    ((*DAYS, "--rps-limit", "5", "--output-dir", "out"), "--rps-limit"),
    ((*DAYS, "--resume", "--verify"), "--verify"),
    ((*DAYS, "--output-dir", ""), "--output-dir"),
    ((*DAYS, "--output-dir", "/proc/nope"), "--output-dir"),
    ((*DAYS, "--output-dir", "/dev/null"), "--output-dir"),
    ((*DAYS, "--output-dir", "/dev/null/\nbelow"), "--output-dir"),
    ((*DAYS, "--meterz", "5"), "--meterz"),
    ((*DAYS, "--meter", "5"), "--meter"),
    ((*DAYS, "a\nstray\nword"), "stray"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, flags: tuple[str, ...], named: str) -> None:
    done = wattif("--temp-dir", tmp_path / "temp", *flags, STORAGE_EMULATOR_HOST="http://127.0.0.1:1")
    refused(done, named)
    assert list(tmp_path.iterdir()) == []


def test_missing_credentials_are_refused(tmp_path: Path) -> None:
    done = wattif(*DAYS, "--temp-dir", tmp_path / "temp", "--processes", 1)
    refused(done, "--bucket")
    assert "gcloud auth application-default login" in done.stderr and list(tmp_path.iterdir()) == []
    refused(wattif(*DAYS, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path / "no-such-file")), "--bucket")


@pytest.mark.parametrize(
    "host", ["localhost:9023", "http://", "http://[::1", "http://localhost:port", "ftp://localhost"]
)
def test_an_emulator_that_cannot_be_is_refused(tmp_path: Path, host: str) -> None:
    refused(wattif(*DAYS, "--temp-dir", tmp_path / "temp", STORAGE_EMULATOR_HOST=host), "STORAGE_EMULATOR_HOST")
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_with_its_default() -> None:
    page = wattif("--help", COLUMNS="500").stdout  # so that no line is broken
    for setting in fields(generator.Run):
        if setting.metadata:
            name = f"--{setting.name.replace('_', '-')}"
            (line,) = re.findall(rf"^ +(?:-v, )?{name} .*(?:\n {{20,}}.*)?$", page, re.M)
            assert setting.default in (None, False, MISSING) or f"(default: {setting.default})" in line
    for default in ("smart-meter-fake-data-t", "/mnt/sm-disk/", "1000", "(default: none)"):
        assert default in page
    assert "exit status: 0 " in page and "STORAGE_EMULATOR_HOST" in page and "SECONDS" in page
    assert all(len(line) <= 120 for line in wattif("--help").stdout.splitlines())


def test_today_and_yesterday_are_utc_days() -> None:
    before = datetime.now(timezone.utc).date()
    done = wattif("--start", "yesterday", "--end", "today", "--dry-run")
    after = datetime.now(timezone.utc).date()
    plans = [f"days         {today - timedelta(days=1)} to {today}\n" for today in (before, after)]
    assert done.returncode == 0 and any(plan in done.stdout for plan in plans)
    done = wattif("--start", "today", "--end", "yesterday", "--dry-run")
    assert done.returncode == 2 and "--end" in done.stderr


def test_a_rate_that_is_none_is_refused() -> None:
    for rate in ("0", "-1", "x", "1e3", "inf", "nan"):
        done = wattif(*DAYS, "--rps-limit", rate, "--dry-run")
        assert done.returncode == 2 and "--rps-limit" in done.stderr and done.stderr.count("\n") == 1


def slurm(task: int, count: int, last: int) -> dict[str, str]:
    """What Slurm tells a task of an array."""
    values = {"ID": task, "COUNT": count, "MAX": last}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("env", "flags", "source"),
    [
        ({"BATCH_TASK_INDEX": "2", "BATCH_TASK_COUNT": "4"}, (), "BATCH_TASK_INDEX"),
        ({"CLOUD_RUN_TASK_INDEX": "2", "CLOUD_RUN_TASK_COUNT": "4"}, (), "CLOUD_RUN_TASK_INDEX"),
        ({"JOB_COMPLETION_INDEX": "2"}, ("--task-count", 4), "JOB_COMPLETION_INDEX"),
        (slurm(2, 4, 3), (), "SLURM_ARRAY_TASK_ID"),
        (slurm(2, 1, 2), ("--task-count", 4), "SLURM_ARRAY_TASK_ID"),  # run again
        ({"BATCH_TASK_INDEX": "9", "BATCH_TASK_COUNT": "9"}, ("--task-index", 2, "--task-count", 4), "--task-index"),
    ],
)
def test_the_task_comes_from_the_engine(env: dict[str, str], flags: tuple, source: str) -> None:
    done = wattif(*SMALL, "--meters", 10, "--dry-run", *flags, **env)
    assert done.returncode == 0 and f"task         2 of 4 (from {source})" in done.stdout
    assert "objects      4 of" in done.stdout  # files 5 and 6 of ten, on two days


@pytest.mark.parametrize(
    ("env", "flags", "named"),
    [
        ({}, ("--task-index", 1), "--task-count"),
        ({}, ("--task-count", 2), "--task-index"),
        ({}, ("--task-index", 2, "--task-count", 2), "--task-index"),
        ({}, ("--task-index", -1, "--task-count", 2), "--task-index"),
        ({}, ("--task-index", 0, "--task-count", 0), "--task-count"),
        ({"JOB_COMPLETION_INDEX": "1"}, (), "--task-count"),
        ({"BATCH_TASK_INDEX": "one", "BATCH_TASK_COUNT": "2"}, (), "BATCH_TASK_INDEX"),
        (slurm(7, 1, 7), (), "--task-count N"),  # a part of an array
        (slurm(1, 4, 4), (), "--task-count N"),  # from 1 to 4
        (slurm(7, 1, 7), ("--task-count", 4), "SLURM"),
    ],
)
def test_half_a_task_is_refused(env: dict[str, str], flags: tuple, named: str) -> None:
    done = wattif(*SMALL, "--dry-run", *flags, **env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--strat", "2024-01-01"), "--strat is no flag; did you mean --start?"),
        (("--start=2024-01-01", "--metres=5"), "--metres is no flag; did you mean --meters?"),
        (("--qqqqqq",), "--qqqqqq is no flag; see --help"),
        (("-x",), "-x is no flag; see --help"),
        ((*DAYS, "--gzip=1"), "argument --gzip: it has no value; drop '1'"),
        ((*DAYS, "--output-dir", "gs://my-bucket"), "'gs://my-bucket' is not a directory, as . or /tmp; see --bucket"),
        ((*DAYS, "--output-dir", ""), "--output-dir: '' is not a directory, as . or /tmp"),
        ((*DAYS, "--temp-dir="), "--temp-dir: '' is not a directory, as . or /tmp"),
        ((*DAYS, "--bucket", "My_Bucket"), "has upper-case letters, a bucket has none; write my_bucket"),
        ((*DAYS, "--meters", "1k"), "'1k' is not a whole number from 1 to "),
        ((*DAYS, "--meters", "1,00"), "'1,00' is not a whole number from 1 to "),
        (("--start", "2024-02-30", "--end", "2024-03-01"), "'2024-02-30' is no day as YYYY-MM-DD"),
        ((*DAYS, "--expect", "objects_don>1"), "did you mean objects_done?"),
        ((*DAYS, "--max-disk", "20 XB"), "'20 XB' is not a size such as 500000000, 500MB or 2GiB"),
    ],
)
def test_a_wrong_flag_is_told_with_what_to_write(flags: tuple, told: str) -> None:
    refused(wattif(*flags), told)


@pytest.mark.parametrize(
    ("text", "meters"), [("1,000", 1000), ("1_000", 1000), ("2,000,000", 2_000_000), ("12_345", 12_345), ("7", 7)]
)
def test_a_number_may_have_separators(text: str, meters: int) -> None:
    assert generator.read_settings([*DAYS, "--meters", text]).meters == meters


@pytest.mark.parametrize(
    ("text", "size"), [("20gb", 2 * 10**10), ("20GB", 2 * 10**10), ("2gIb", 2 << 30), ("5m", 5 * 10**6)]
)
def test_a_size_may_be_in_any_case(text: str, size: int) -> None:
    assert generator.read_settings([*DAYS, "--max-disk", text]).max_disk == size


def test_without_arguments_there_are_examples() -> None:
    done = wattif()
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 6
    usage, examples = done.stderr.split("examples:\n")
    assert usage.count("\n") == 2 and "--help" in usage and examples.count("\n  generator.py --start ") == 2
    for line in examples.splitlines():
        generator.make_plan(generator.read_settings(line.split()[1:]))


def test_version() -> None:
    assert wattif("--version").stdout == f"WattIf {generator.VERSION}\n"


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    for name in ("orjson", "bloom_filter", "google_crc32c"):
        lost = f"import runpy, sys; sys.modules['{name}'] = None; runpy.run_path('generator.py', run_name='__main__')"
        command = [sys.executable, "-c", lost]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"{name} is not installed; pip install -r requirements.txt, " in done.stderr
        assert "or run it by .venv/bin/python or: uv run generator.py\n" in done.stderr


def test_the_script_can_be_executed() -> None:
    assert os.access(ROOT / "generator.py", os.X_OK)


def test_today_is_the_same_for_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "STARTED", datetime(2024, 1, 1, 23, 59, 59, tzinfo=timezone.utc))
    run = generator.read_settings(["--start", "yesterday", "--end", "today"])
    assert (run.start, run.end) == (date(2023, 12, 31), date(2024, 1, 1))


def test_a_dry_run_checks_directories_space_and_locks(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "file").write_text("")
    for flag, directory in (("--output-dir", tmp_path / "file"), ("--temp-dir", tmp_path / "file" / "below")):
        refused(wattif(*DAYS, flag, directory, "--dry-run"), flag)
        refused(wattif(*DAYS, flag, directory, STORAGE_EMULATOR_HOST="http://localhost:1"), flag)
    before = [*tmp_path.iterdir()]
    done = wattif(*DAYS, "--temp-dir", small_disk / "new", "--dry-run")
    refused(done, "--temp-dir")
    fits = re.search(r"give --max-disk (\d+MB), or", done.stderr)[1]
    assert wattif(*DAYS, "--temp-dir", small_disk / "new", "--dry-run", "--max-disk", fits).returncode == 0
    assert [*tmp_path.iterdir()] == before and not [*small_disk.iterdir()]
    spool = tmp_path / SPOOL
    spool.mkdir()
    lock = os.open(spool, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (spool / "kept").write_text("")
    done = wattif(*DAYS, "--meters", 2, "--temp-dir", tmp_path, "--dry-run")
    assert done.returncode == 1 and "is in use by another run" in done.stderr
    os.close(lock)
    assert wattif(*DAYS, "--meters", 2, "--temp-dir", tmp_path, "--dry-run").returncode == 0
    assert (spool / "kept").exists()


def test_a_disk_that_has_no_room_for_two_files_needs_another_directory(small_disk: Path) -> None:
    done = wattif(*DAYS, "--meters-per-file", 10, "--temp-dir", small_disk, "--dry-run")
    refused(done, "; give another directory\n")


def test_a_dry_run_needs_no_right_to_write_but_where_it_would(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    done = wattif(*DAYS, "--meters", 2, "--output-dir", f"{out}/", "--dry-run")
    assert (
        done.returncode == 0
        and f"\ndestination  {out}/dt=YYYY-MM-DD/\n" in done.stdout
        and not (tmp_path / "a").exists()
    )


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (("--meters", 1), ["objects      2 of 682,560 bytes, 2 uploads (class A operations)"]),
        (
            ("--meters", 600_000, "--interval", 86_400),
            ["This is a lot: 94.8 MB in 1,200,000 objects; see in the README"],
        ),
        (("--meters", 800_000), ["This is a lot: 1.09 TB in 1,600,000 objects; see in the README"]),
        (("--meters", 5000, "--rps-limit", 1001), ["A cold bucket takes 1,000 objects/s"]),
        (("--meters", 500_000, "--processes", 8), ["A cold bucket takes 1,000 objects/s"]),
    ],
)
def test_the_plan_says_what_a_run_will_cost_and_ask_for(tmp_path: Path, flags: tuple, lines: list[str]) -> None:
    done = wattif(*DAYS, *flags, "--max-disk", "100MB", "--temp-dir", tmp_path, "--dry-run")
    assert done.returncode == 0 and all(f"\n{line}" in done.stdout for line in lines), done.stdout


def test_a_plan_within_bounds_has_no_warning(tmp_path: Path) -> None:
    for flags in (("--rps-limit", 1000), ("--ramp", 2000), ("--processes", 8, "--meters", 20_000)):
        done = wattif(*DAYS, "--interval", 3600, *flags, "--temp-dir", tmp_path, "--dry-run")
        assert done.returncode == 0 and "cold bucket" not in done.stdout and "a lot" not in done.stdout


def test_plan_and_report_say_when(tmp_path: Path) -> None:
    told = wattif(*DAYS, "--meters", 1, "--output-dir", tmp_path).stderr.splitlines()
    moment = "[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2} UTC"
    assert re.fullmatch(f"started      {moment}", told[0]) and re.fullmatch(f"ended        {moment}", told[-1])
    assert re.match("2 of 2 objects, 17,280 readings, ", told[-2])


def test_the_advice_after_a_verification_fits(tmp_path: Path) -> None:
    flags = (*DAYS, "--interval", 3600, "--meters", 4, "--output-dir", tmp_path)
    assert wattif(*flags).returncode == 0
    first, second, *_ = sorted((tmp_path / "dt=2024-01-01").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes().replace(b"0.", b"1."))
    (tmp_path / "dt=2024-01-02" / "stray").write_text("x")
    told = wattif(*flags, "--verify").stderr
    assert "\nmissing objects: if all flags are those of the upload, run it with --resume instead of --verify\n" in told
    assert ", run it without --verify, which makes them again\n" in told
    assert (
        f"\nunexpected objects: if they belong to no other run, rm {tmp_path}/NAME deletes one, with the NAME above\n"
        in told
    )
    assert "1 missing, 1 different, 1 unexpected, 0 unchecked" in told
    assert "gcloud" not in told


def test_an_interrupted_run_counts_what_is_missing(tmp_path: Path) -> None:
    with Server(delay=0.05) as server:
        flags = (*DAYS, "--interval", 3600, "--meters", 100, "--json", "--processes", 1)
        with begin(server, tmp_path, *flags) as process:
            process.terminate()
            out, err = process.communicate(timeout=30)
    made = report(subprocess.CompletedProcess([], process.returncode, out, err))
    assert made["objects_missing"] == 200 - made["objects_done"] > 0
    assert f"{made['objects_done']} of 200 objects, " in err and f", {made['objects_missing']} missing\n" in err
