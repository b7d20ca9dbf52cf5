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
from typing import Iterator

import duckdb
import polars
import pytest
import yaml

import generator
from conftest import ROOT, Emulator, environment, upload, wattif
from server import Server

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The code blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
    return [code for name, code in fenced if name == language]


def commands(text: str) -> list[list[str]]:
    """The arguments of every call of the script in a text."""
    whole = text.replace("\\\n", " ")
    whole = re.sub(r"\$+\(date -u -d '7 days ago' \+[\\%]?%F\)", "2024-01-01", whole)
    script = r"(?:python|run) (?:/code/wattif/)?generator\.py"
    end = r"(?:'|'? && .*|\"|\\n\"\].*| >>.*)?$"  # of a quoted command, or of the output
    calls = re.findall(rf"^.*{script} (--.*?){end}", whole, re.M)
    return [shlex.split(call) for call in calls]


def test_every_command_is_accepted_by_the_parser() -> None:
    texts = [code for language in ("sh", "crontab", "ini", "yaml") for code in blocks(language)]
    found = [call for text in [*texts, generator.__doc__] for call in commands(text)]
    assert len(found) >= 12
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
    # The machine decides on the number of processes and on the speed, and the clock on the moments.
    shown, told = (
        [
            line.split(" in ")[0] if "objects/s" in line else line
            for line in re.sub("^(proc|star|ende|written|   ).*\n", "", text, flags=re.M).splitlines()
        ]
        for text in (blocks("")[0], done.stderr)
    )
    assert told == shown
    row = re.search(r'`({"meter_id".*?})`', README)[1]
    assert f"{row}\n".encode() in b"".join(path.read_bytes() for path in tmp_path.rglob("*.ndjson"))


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


def test_systemd_unit(tmp_path: Path) -> None:
    (service,) = blocks("ini")
    assert len(commands(service)) == 1 and "After=network-online.target" in service and "TimeoutStopSec=" in service
    unit = service.replace("/opt/wattif/.venv/bin/python", shlex.quote(sys.executable))
    unit = unit.replace("/opt/wattif", str(tmp_path)).replace("User=wattif", "User=root")
    (tmp_path / "wattif.service").write_text(unit)
    (tmp_path / "wattif.timer").write_text(
        "[Timer]\n" + "\n".join(re.findall("`(OnCalendar=.*?|Persistent=.*?)`", README))
    )
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


def test_the_help_page_is_in_the_readme() -> None:
    (shown,) = (code for code in blocks("") if code.startswith("usage: "))
    assert wattif("--help", COLUMNS="120").stdout == shown and shown.count("\n") <= 50


def test_the_readme_is_short() -> None:
    assert README.count("\n") <= 300


def test_cloud_run_job() -> None:
    (command,) = (code for code in blocks("sh") if "gcloud run jobs" in code)
    (arguments,) = commands(command)
    run = generator.read_settings(arguments)
    assert run.resume and run.max_disk and "--task-timeout=24h" in command
    assert subprocess.run(["sh", "-n"], input=command, env=environment(), text=True).returncode == 0


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


def executed(word: str, replaced: tuple[str, str] = ("", "")) -> tuple[dict, str]:
    """Run the block of Python with a word in it and return its names and what it printed."""
    (code,) = (code.replace(*replaced) for code in blocks("python") if word in code)
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return names, printed.getvalue()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, emulator_url: str) -> Iterator[None]:
    """Let gcsfs speak to the emulator, without an account and without asking for the kind of a bucket."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", emulator_url)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    yield
    duckdb.unregister_filesystem("gs")


@pytest.mark.parametrize("flags", [(), ("--gzip",)])
def test_duckdb_reads_a_bucket(emulator: Emulator, offline: None, tmp_path: Path, flags: tuple) -> None:
    shape = ("--start", "2024-01-01", "--end", "2024-01-02", "--interval", 3600, "--meters", 7)
    assert emulator.run(*shape, *flags, "--temp-dir", tmp_path).returncode == 0
    names, _ = executed("register_filesystem", ("'readings/", f"'gs://{emulator.bucket.name}/"))
    rows = names["readings"].aggregate("dt::VARCHAR, count(*)", "dt").fetchall()
    assert sorted(rows) == [("2024-01-01", 168), ("2024-01-02", 168)]


def test_duckdb_reads_the_output(offline: None, readings: dict[str, float]) -> None:
    names, printed = executed("register_filesystem")
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
    ((arguments,),) = (commands(code) for code in blocks("sh") if "--flaws" in code)
    command = [sys.executable, str(ROOT / "generator.py"), *arguments, "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    monkeypatch.chdir(tmp_path)
    names, _ = executed("ignore_errors")
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
    names, _ = executed("runs.ndjson")
    records = [json.loads(line) for line in told]
    means = sorted(record["mean_objects_per_second"] for record in records)
    assert [row[1] for row in names["nights"].fetchall()] == means
    slots = [slot for record in records for slot in record["timeline"] if record["started"] == records[-1]["started"]]
    assert sum(row[1] for row in names["timeline"].fetchall()) == sum(slot["objects"] for slot in slots)
    added = Counter()
    for record in records:
        added.update({float(bound): count for bound, count in record["latency_histogram"].items()})
    assert dict(names["histogram"].fetchall()) == added and sum(added.values()) == 60


def test_polars_pandas_and_pyarrow_read_the_output(readings: dict[str, float]) -> None:
    names, _ = executed("polars")
    frame, table, batches = names["frame"], names["table"], list(names["batches"])
    assert dict(frame.schema) == {
        "meter_id": polars.String,
        "timestamp": polars.Datetime("us", "UTC"),
        "reading": polars.Float64,
        "dt": polars.Date,
    }
    assert all(isinstance(meter, str) for meter in table["meter_id"])
    for day, total in readings.items():
        part, rows = frame.filter(polars.col("dt") == date.fromisoformat(day)), table[table["dt"] == day]
        assert len(part) == len(rows) == 7 * 1440
        assert [part["reading"].sum(), rows["reading"].sum()] == pytest.approx([total, total])
        assert part["timestamp"].min() == datetime.fromisoformat(f"{day}T00:00:00+00:00") == rows["timestamp"].min()
    assert sum(batch.num_rows for batch in batches) == 2 * 7 * 1440
    assert sum(sum(batch["reading"].to_pylist()) for batch in batches) == pytest.approx(sum(readings.values()))
    assert {str(day) for batch in batches for day in batch["dt"].to_pylist()} == set(readings)


def test_the_spark_example_is_python() -> None:
    (code,) = (code for code in blocks("python") if "spark" in code)
    compile(code, "README.md", "exec")
    assert '"spark.sql.session.timeZone", "UTC"' in code


def test_the_bigquery_commands_and_definitions_parse() -> None:
    (command,) = (code for code in blocks("sh") if "bq load" in code)
    assert subprocess.run(["sh", "-n"], input=command, env=environment(), text=True).returncode == 0
    words = shlex.split(command.replace("\\\n", " "))
    assert {"--replace", "--time_partitioning_field=dt"} < set(words) and "--autodetect" not in words
    (definition,) = (json.loads(code) for code in blocks("json") if "sourceFormat" in code)
    columns = {field["name"]: field["type"] for field in definition["schema"]["fields"]}
    assert columns == dict(column.split(":") for column in words[-1].split(","))
    rule = json.loads(re.search(r"`(\{\"rule\".*?\]\})`", README)[1])
    assert rule["rule"][0]["action"] == {"type": "Delete"}
