"""The README: its commands parse, its job definitions are well-formed, its readers read."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from datetime import date, datetime
from pathlib import Path

import polars
import pytest
import yaml

import generator
from conftest import ROOT, environment, upload, wattif
from server import Server

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [code for name, code in fenced if name == language]


def commands(text: str) -> list[list[str]]:
    """The arguments of every call of the script in a text."""
    calls = re.findall(r"^.*(?:python|run) generator\.py (--.*?)(?: >>.*)?$", text.replace("\\\n", " "), re.M)
    return [shlex.split(call) for call in calls]


def test_every_command_is_accepted_by_the_parser() -> None:
    texts = [code for language in ("sh", "crontab", "ini", "yaml") for code in blocks(language)]
    found = [call for text in [*texts, generator.__doc__] for call in commands(text)]
    assert len(found) >= 11
    for arguments in found:
        if "--task-count" not in arguments or "--task-index" in arguments:
            generator.make_plan(generator.read_settings(arguments))
        else:
            generator.build_parser().parse_args(arguments)


def test_the_first_command_makes_what_the_readme_shows(tmp_path: Path) -> None:
    (arguments,) = commands(re.search(r"<!-- run -->(.*?)<!-- /run -->", README, re.S)[1])
    script = str(ROOT / "generator.py")
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    # The machine decides on the number of processes and on the speed.
    shown, told = (
        [line.split(" in ")[0] if "objects/s" in line else line for line in text.splitlines() if line[:4] != "proc"]
        for text in (blocks("")[0], done.stderr)
    )
    assert told[: len(shown)] == shown
    rows = blocks("json")[0]
    assert rows.encode() in b"".join(path.read_bytes() for path in tmp_path.rglob("*.ndjson"))


def test_cloud_batch_job() -> None:
    job = json.loads(next(block for block in blocks("json") if "taskGroups" in block))
    (group,) = job["taskGroups"]
    script = group["taskSpec"]["runnables"][0]["script"]["text"]
    assert subprocess.run(["sh", "-n"], input=script, env=environment(), text=True, check=False).returncode == 0
    (arguments,) = commands(script)
    generator.make_plan(generator.read_settings(arguments))
    (disk,) = job["allocationPolicy"]["instances"][0]["policy"]["disks"]
    (volume,) = group["taskSpec"]["volumes"]
    assert volume["mountPath"] == generator.DEFAULT_TEMP_DIR.rstrip("/") and volume["deviceName"] == disk["deviceName"]
    assert disk["newDisk"]["type"] == "local-ssd" and int(group["taskCount"]) > 1


def test_kubernetes_job(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = map(yaml.safe_load, blocks("yaml"))
    spec = job["spec"]
    assert job["kind"] == "Job" and spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    (arguments,) = commands(container["args"][0])
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    run = generator.read_settings(arguments)
    assert (run.task_index, run.task_count) == (3, spec["completions"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["scratch"] == generator.DEFAULT_TEMP_DIR.rstrip("/")
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}


def test_crontab_line() -> None:
    path, line = blocks("crontab")[0].splitlines()
    assert path.startswith("PATH=")
    assert re.match(r"(\S+ ){5}cd /opt/wattif && ", line) and "%" not in line  # cron takes % for a newline
    assert len(commands(line)) == 1


def test_systemd_units(tmp_path: Path) -> None:
    service, timer = blocks("ini")
    assert len(commands(service)) == 1
    python = shlex.quote(sys.executable)
    (tmp_path / "wattif.service").write_text(
        service.replace("/opt/wattif/.venv/bin/python", python).replace("/opt/wattif", str(tmp_path))
    )
    (tmp_path / "wattif.timer").write_text(timer)
    if shutil.which("systemd-analyze"):
        units = [str(tmp_path / f"wattif.{kind}") for kind in ("service", "timer")]
        command = ["systemd-analyze", "verify", *units]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
        assert "wattif" not in done.stderr, done.stderr


def test_inline_script_metadata_names_the_requirements() -> None:
    block = re.search(r"^# /// script\n((?:# .*\n)+)# ///$", (ROOT / "generator.py").read_text(), re.M)[1]
    metadata = dict(line[2:].split(" = ", 1) for line in block.splitlines())
    assert json.loads(metadata["dependencies"]) == (ROOT / "requirements.txt").read_text().split()
    assert json.loads(metadata["requires-python"]) == ">=3.8"


def test_flags_have_a_row_each() -> None:
    flags = set(re.findall(r"--[a-z][a-z-]+", wattif("--help").stdout))
    table = README.split("## Flags")[1].split("## Output")[0]
    assert flags == set(re.findall(r"--[a-z][a-z-]+", table))


@pytest.fixture(params=[(), ("--gzip",), ("--meters-per-file", "3")])
def readings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Make readings in the current directory and return the sum of each day's."""
    flags = ("--start", "2024-01-01", "--end", "2024-01-02", "--meters", 7, "--interval", 60)
    assert wattif(*flags, *request.param, "--output-dir", tmp_path / "readings").returncode == 0
    plain = tmp_path / "plain"
    assert wattif(*flags, "--output-dir", plain).returncode == 0
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for path in plain.rglob("*.ndjson") for line in path.read_text().splitlines()]
    return {
        day: sum(row["reading"] for row in rows if row["timestamp"].startswith(day))
        for day in ("2024-01-01", "2024-01-02")
    }


def executed(name: str) -> tuple[dict, str]:
    """Run a marked block of Python and return its names and what it printed."""
    code = re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README, re.S)[1]
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return names, printed.getvalue()


def test_duckdb_reads_the_output(readings: dict[str, float]) -> None:
    names, printed = executed("duckdb")
    table = names["readings"]
    assert dict(zip(table.columns, map(str, table.types))) == {
        "meter_id": "VARCHAR",
        "timestamp": "TIMESTAMP WITH TIME ZONE",
        "reading": "DOUBLE",
        "dt": "DATE",
    }
    query = "dt::VARCHAR, count(*), sum(reading), min(timestamp)::VARCHAR"
    for day, count, total, first in table.aggregate(query, "dt").fetchall():
        assert (count, total) == (7 * 1440, pytest.approx(readings.pop(day)))
        assert first == f"{day} 00:00:00+00"
    assert not readings
    assert "2024-01-02" in printed


def test_duckdb_finds_the_flaws_that_are_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (arguments,) = commands(re.search(r"<!-- flaws -->\n```sh\n(.*?)```", README, re.S)[1])
    command = [sys.executable, str(ROOT / "generator.py"), *arguments, "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    monkeypatch.chdir(tmp_path)
    names, _ = executed("flaws-duckdb")
    found = dict(zip(names["found"].columns, *names["found"].fetchall()))
    flaws = told["flaws"]
    assert {kind: found[kind] for kind in ("late", "duplicate", "disorder", "spike", "malformed")} == {
        kind: flaws[kind] for kind in ("late", "duplicate", "disorder", "spike", "malformed")
    }
    assert (found["nulls"], found["delivered"]) == (flaws["null"], told["rows_delivered"])
    assert (found["parsed"], found["distinct_rows"]) == (told["rows_parsed"], told["rows_distinct"])
    assert str(found["readings_sum"]) == told["readings_sum"] and found["late"] == told["rows_of_another_date"]
    absent = 2 * 20 * 8640 - found["of_these_days"]
    assert absent == flaws["missing"] + flaws["malformed"] + flaws["late"] // 2  # those of the last of two days
    text = README.split("## Flawed data")[1]
    for name in ("delivered", "parsed", "distinct", "of_another_date"):
        said = f"{told[f'rows_{name}']:,} {name.replace('_', ' ')}"
        assert said in done.stderr and said in text
    assert f"`{flaws['null']:,}` of each kind" in text and set(flaws.values()) == {3440}


def test_duckdb_compares_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--interval", 3600, "--temp-dir", tmp_path / "temp", "--json")
    told = []
    with Server() as server:
        for day in (1, 2):
            done = upload(server, "--start", f"2024-01-0{day}", "--end", f"2024-01-0{day}", "--meters", 30, *flags)
            told.append(done.stdout)
    (tmp_path / "runs.ndjson").write_text("".join(told))
    monkeypatch.chdir(tmp_path)
    names, _ = executed("runs")
    records = [json.loads(line) for line in told]
    means = sorted(record["mean_objects_per_second"] for record in records)
    assert [row[1] for row in names["nights"].fetchall()] == means
    slots = [slot for record in records for slot in record["timeline"] if record["started"] == records[-1]["started"]]
    assert sum(row[1] for row in names["timeline"].fetchall()) == sum(slot["objects"] for slot in slots)
    added = Counter()
    for record in records:
        added.update({float(bound): count for bound, count in record["latency_histogram"].items()})
    assert dict(names["histogram"].fetchall()) == added and sum(added.values()) == 60


def test_polars_reads_the_output(readings: dict[str, float]) -> None:
    names, printed = executed("polars")
    frame = names["readings"].collect()
    assert dict(frame.schema) == {
        "meter_id": polars.String,
        "timestamp": polars.Datetime("us", "UTC"),
        "reading": polars.Float64,
        "dt": polars.Date,
    }
    for day, total in readings.items():
        part = frame.filter(polars.col("dt") == date.fromisoformat(day))
        assert len(part) == 7 * 1440 and part["reading"].sum() == pytest.approx(total)
        assert part["timestamp"].min() == datetime.fromisoformat(f"{day}T00:00:00+00:00")
    assert "2024-01-02" in printed
