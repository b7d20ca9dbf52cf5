"""How fast WattIf is, next to what else would do the job, measured side by side: `python tests/benchmark.py`.

Every figure is the median of several runs that alternate with those of its reference, and the ratio is that of the
two. CPU seconds are those of the measured process and its children, start-up (a run with one meter) taken off;
the upload server, tests/server.py, is a process of its own and not counted.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
os.environ["POLARS_MAX_THREADS"] = "1"

import duckdb
import orjson
import polars

import generator

DAY = date(2024, 1, 1)
ROWS = 8640
RUNS = 5
SCRIPT = str(TESTS.parent / "generator.py")
RUN = [sys.executable, SCRIPT, "--start", str(DAY), "--end", str(DAY)]

PLAIN_WRITES = """
import os, sys
buffer, folder = bytearray(682_560), sys.argv[1]
os.makedirs(folder)
for number in range(int(sys.argv[2])):
    descriptor = os.open(f"{folder}/{number:012}", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, buffer)
    os.close(descriptor)
"""

STOCK_UPLOAD = """
import os, sys
from google.cloud import storage
from google.cloud.storage import transfer_manager
folder, count = sys.argv[1], int(sys.argv[2])
names = sorted(os.listdir(folder))[:count]
bucket = storage.Client(project=None).bucket("a-bucket")
for start in range(0, count, 100):
    results = transfer_manager.upload_many_from_filenames(
        bucket, names[start : start + 100], source_directory=folder, worker_type="thread", max_workers=16
    )
    assert not any(results), results
"""


class Cost(NamedTuple):
    """What a process took."""

    cpu: float
    wall: float
    peak_bytes: int


def cost_of(command: list[Any], **env: str) -> Cost:
    """Run a command to its end and return what it took."""
    started = time.perf_counter()
    process = subprocess.Popen([*map(str, command)], env={**os.environ, **env}, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, command
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, usage.ru_maxrss * 1024)


def alternate(*works: Callable[[], float], runs: int = RUNS) -> list[list[float]]:
    """Run each work in turn, several times, and return the figures of each."""
    rounds = [[work() for work in works] for _ in range(runs)]
    return [list(figures) for figures in zip(*rounds)]


def row(name: str, figure: str, ratio: float | None = None, reference: str = "") -> None:
    """Print a line of the table."""
    print(f"| {name} | {figure} | {f'{ratio:.2f} times {reference}' if ratio else reference} |", flush=True)


@contextlib.contextmanager
def upload_server(delay: float = 0.0) -> Iterator[str]:
    """Run the upload server and yield its address."""
    command = [sys.executable, str(TESTS / "server.py"), "--processes", "2", "--delay", str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait() == 0, "the server found something wrong"


def rows_in_memory() -> None:
    """Compare ways to make a meter-day in memory, by CPU seconds."""
    template = generator.render_day_template(DAY, 10)
    fleet = generator.draw_fleet(0, range(1000), by_name_among=1000)  # as in a run of 1,000 meters
    timestamps = [datetime(2024, 1, 1) + timedelta(seconds=10 * index) for index in range(ROWS)]
    texts = polars.Series([f"{timestamp.isoformat()}Z" for timestamp in timestamps])
    levels = polars.Series(range(900)) / 1000
    option = orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
    database = duckdb.connect()
    database.execute("SET threads = 1")

    def stamped(meter_ids: list[str]) -> None:
        for _ in generator.generate_smart_meter_readings_for_day(DAY, template, fleet[: len(meter_ids)], 0):
            pass

    def row_by_row(meter_ids: list[str]) -> None:
        for meter_id in meter_ids:
            rows = io.BytesIO()
            for timestamp in timestamps:
                reading = orjson.Fragment(f"{int(random.uniform(0.0, 0.9) * 1000) / 1000:.3f}")
                row = {"meter_id": meter_id, "timestamp": timestamp, "reading": reading}
                rows.write(orjson.dumps(row, option=option))

    def row_by_row_as_numbers(meter_ids: list[str]) -> None:  # without the zeros at the end: rows of any length
        for meter_id in meter_ids:
            rows = io.BytesIO()
            for timestamp in timestamps:
                row = {"meter_id": meter_id, "timestamp": timestamp, "reading": round(random.uniform(0.0, 0.9), 3)}
                rows.write(orjson.dumps(row, option=option))

    def with_polars(meter_ids: list[str]) -> None:
        for meter_id in meter_ids:
            readings = levels.sample(ROWS, with_replacement=True)
            columns = {"meter_id": polars.repeat(meter_id, ROWS, eager=True), "timestamp": texts, "reading": readings}
            polars.DataFrame(columns).write_ndjson(io.BytesIO())

    def with_duckdb(meter_ids: list[str]) -> None:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            for meter_id in meter_ids:
                database.execute(
                    f"COPY (SELECT '{meter_id}' AS meter_id, strftime(TIMESTAMP '{DAY}' + INTERVAL 10 SECOND * i, "
                    "'%Y-%m-%dT%H:%M:%SZ') AS timestamp, floor(random() * 900) / 1000 AS reading "
                    f"FROM range({ROWS}) AS t(i)) TO '{folder}/{meter_id}.json'"
                )

    def seconds(work: Callable[[list[str]], None], meters: int) -> Callable[[], float]:
        meter_ids = [f"{address:012X}" for address in fleet[:meters]]

        def timed() -> float:
            started = time.process_time()
            work(meter_ids)
            return (time.process_time() - started) / meters

        return timed

    names = ("WattIf", "`orjson.dumps` of each row", "the same, readings as `round(x, 3)`", "Polars", "DuckDB")
    counted = ((stamped, 300), (row_by_row, 20), (row_by_row_as_numbers, 20), (with_polars, 50), (with_duckdb, 20))
    works = [seconds(work, meters) for work, meters in counted]
    medians = [statistics.median(figures) for figures in alternate(*works)]
    for name, median in zip(names, medians):
        ratio = median / medians[0]
        row(f"rows in memory, one thread: {name}", f"{ROWS / median / 1e6:.2f} million/s", ratio, "WattIf's CPU time")


def to_disk(scratch: Path) -> None:
    """Compare a run with --output-dir to plain writes, by CPU seconds for each file.

    No file is deleted before the end: on ext4 that makes the next ones dearer, by what came before.
    """
    count, folders = 200, itertools.count()

    def measured(command: Callable[[Path, int], list[Any]]) -> Callable[[], float]:
        def once() -> float:
            costs = [cost_of(command(scratch / f"disk-{next(folders)}", files)).cpu for files in (1, count)]
            return (costs[1] - costs[0]) / (count - 1)

        return once

    wattif = measured(lambda folder, files: [*RUN, "--meters", files, "--processes", 1, "--output-dir", folder])
    plain = measured(lambda folder, files: [sys.executable, "-c", PLAIN_WRITES, folder, files])
    ours, theirs = map(statistics.median, alternate(wattif, plain, runs=9))
    for folder in scratch.glob("disk-*"):
        shutil.rmtree(folder)
    row("to disk: plain writes", f"{theirs * 1e3:.2f} ms CPU a file", 1.0, "plain writes")
    row("to disk: WattIf", f"{ours * 1e3:.2f} ms CPU a file", ours / theirs, "plain writes")


def upload_cost(scratch: Path) -> None:
    """Compare a whole run to the stock upload of files that lie there ready, by CPU seconds for each object."""
    count = 1000
    ready = scratch / "ready"
    cost_of([*RUN, "--meters", count, "--output-dir", ready])
    with upload_server() as url:

        def difference(command: Callable[[int], list[Any]]) -> Callable[[], float]:
            def measured() -> float:
                costs = [cost_of(command(n), STORAGE_EMULATOR_HOST=url).cpu for n in (1, count)]
                return (costs[1] - costs[0]) / (count - 1)

            return measured

        whole = [*RUN, "--bucket", "a-bucket", "--temp-dir", scratch / "temp", "--processes", 1, "--meters"]
        stock = [sys.executable, "-c", STOCK_UPLOAD, ready / f"dt={DAY}"]
        works = (difference(lambda n: [*whole, n]), difference(lambda n: [*stock, n]))
        ours, theirs = map(min, alternate(*works, runs=9))
    row("object: stock upload of ready files", f"{theirs * 1e3:.2f} ms CPU (least)", 1.0, "stock")
    row("object: whole run of WattIf", f"{ours * 1e3:.2f} ms CPU (least)", ours / theirs, "stock")


def throughput(scratch: Path) -> None:
    """Compare 1 and 2 processes, and 1 and 100 meters a file, by wall and CPU seconds."""
    count = 600
    for delay in (0.0, 0.05):
        with upload_server(delay) as url:

            def measured(processes: int, per_file: int, url: str = url) -> Callable[[], Any]:
                flags = ["--bucket", "a-bucket", "--temp-dir", scratch / "temp", "--processes", processes]
                command = [*RUN, *flags, "--meters-per-file", per_file, "--meters"]

                def once() -> Any:
                    whole, start_up = (cost_of([*command, n], STORAGE_EMULATOR_HOST=url) for n in (count, processes))
                    return count / (whole.wall - start_up.wall), (whole.cpu - start_up.cpu) / count

                return once

            works = [measured(1, 1), measured(2, 1), measured(1, 100)]
            figures = alternate(*works)
        speeds = [statistics.median(speed for speed, _ in runs) for runs in figures]
        cpu = [statistics.median(cpu for _, cpu in runs) for runs in figures]
        answer = f"answers after {delay * 1e3:.0f} ms"
        for name, speed, used in zip(("1 process", "2 processes", "1 process, 100 meters a file"), speeds, cpu):
            objects = f"{speed:,.0f} meter-days/s, {speed * ROWS * 79 / 1e6:,.0f} MB/s, {used * 1e3:.2f} ms CPU each"
            row(f"upload, {answer}: {name}", objects, speed / speeds[0], "1 process")


def fleet_and_memory(scratch: Path) -> None:
    """Show what a meter of the fleet costs, and what memory a run needs with few and with many."""
    meters = 1 << 18

    def drawn() -> float:
        started = time.process_time()
        generator.draw_fleet(0, range(meters), by_name_among=meters)
        return (time.process_time() - started) / meters

    row("fleet", f"{statistics.median(drawn() for _ in range(RUNS)) * 1e6:.2f} µs a meter")
    peaks = []
    with upload_server() as url:
        for fleet in (1000, 1_000_000, 8_000_000):
            flags = ["--bucket", "a-bucket", "--temp-dir", scratch / "temp", "--processes", 1, "-v", "--meters", fleet]
            env = {**os.environ, "STORAGE_EMULATOR_HOST": url}
            with subprocess.Popen([*map(str, RUN + flags)], env=env, stderr=subprocess.PIPE, text=True) as process:
                batches = (line for line in process.stderr if "uploaded 100 of 100" in line)
                for _ in zip(range(10), batches):
                    pass
                process.send_signal(signal.SIGINT)
                process.stderr.read()
                _, _, usage = os.wait4(process.pid, 0)
                process.returncode = 0
            peaks.append(usage.ru_maxrss * 1024)
            row(f"peak memory after 1,000 objects, {fleet:,} meters", f"{peaks[-1] / 1e6:.0f} MB")
    row("memory for each meter more", f"{(peaks[2] - peaks[0]) / 7_999_000:.1f} bytes")


def main() -> None:
    """Print the table."""
    print("| what | measured | ratio |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rows_in_memory()
        to_disk(scratch)
        upload_cost(scratch)
        throughput(scratch)
        fleet_and_memory(scratch)


if __name__ == "__main__":
    main()
