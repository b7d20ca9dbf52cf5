"""How fast WattIf is, next to what else would do the job, measured side by side: `python tests/benchmark.py`.

Every figure is the median of several runs that alternate with those of its reference, unless its row says otherwise,
and each ratio is that of two such figures. CPU seconds are those of the measured process and its children, start-up
(a run with one meter) taken off; the upload server, tests/server.py, is a process of its own and not counted.

`python tests/benchmark.py --quick` runs every section once with tiny counts. It shows that the benchmark still works;
its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Sequence

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
os.environ["POLARS_MAX_THREADS"] = "1"  # it is read when Polars is imported

import duckdb
import orjson
import polars

import generator

DAY = date(2024, 1, 1)
ROWS = 8640  # of a meter-day
FILE_BYTES = 682_560
SCRIPT = str(TESTS.parent / "generator.py")
RUN = [sys.executable, SCRIPT, "--start", str(DAY), "--end", str(DAY)]
INDEX_WRITES = 60  # a second in each range of the model of the bucket's index

PLAIN_WRITES = f"""
import os, sys
buffer, folder = bytearray({FILE_BYTES}), sys.argv[1]
os.makedirs(folder)
for number in range(int(sys.argv[2])):
    descriptor = os.open(f"{{folder}}/{{number:012}}", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, buffer)
    os.close(descriptor)
"""

# Uploads the files of a folder from the first to before the last, in the order of their names. It tries as long as
# it takes, for a reference that gives up has no time.
STOCK_UPLOAD = """
import os, sys
from google.cloud import storage
from google.cloud.storage import retry, transfer_manager
folder, first, last, batch, workers = sys.argv[1], *map(int, sys.argv[2:])
names = sorted(os.listdir(folder))[first:last]
bucket = storage.Client(project=None).bucket("a-bucket")
options = {"retry": retry.DEFAULT_RETRY.with_timeout(600)}
for start in range(0, len(names), batch):
    results = transfer_manager.upload_many_from_filenames(
        bucket,
        names[start : start + batch],
        source_directory=folder,
        upload_kwargs=options,
        worker_type="thread",
        max_workers=workers,
    )
    assert not any(results), results
"""


# ----------------------------------------------------------------------------------------------------
# How much is measured, and with what.


@dataclass(frozen=True)
class Form:
    """How much is measured: the full form or the quick one."""

    divisor: int  # of every count of meters
    most_runs: int  # of each command

    def count(self, full: int) -> int:
        """Return how many meters take the place of those of the full form: two at least, for start-up is one."""
        return max(2, full // self.divisor)

    def runs(self, full: int) -> int:
        """Return how many runs take the place of those of the full form."""
        return min(full, self.most_runs)


FULL, QUICK = Form(1, 9), Form(50, 1)


class Cost(NamedTuple):
    """What one command took, or several at once."""

    cpu: float  # seconds
    wall: float  # seconds


def environment(**more: str) -> dict[str, str]:
    """Return the environment of the measured commands; of the caller's it has only the path.

    So no interpreter's option, proxy, account or scheduler of the caller changes what is measured.
    """
    clean = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8", "NO_GCE_CHECK": "true"}
    return {**clean, **more}


@contextlib.contextmanager
def start(command: Sequence[Any], stderr: Any, **env: str) -> Iterator[subprocess.Popen[str]]:
    """Start a command and yield its process, which does not outlive the context."""
    arguments = [*map(str, command)]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(
        arguments, env=environment(**env), stdin=quiet, stdout=quiet, stderr=stderr, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # does nothing if the process has been waited for


def wait_for(process: subprocess.Popen[str]) -> Any:
    """Wait for the end of a process and return what it and its children used."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
    return usage


def cost_of(*commands: Sequence[Any], **env: str) -> Cost:
    """Run commands at once to their ends and return what they took together."""
    cpu, started = 0.0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors, contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(command, errors, **env)) for command in commands]
        for process in processes:
            usage = wait_for(process)
            cpu += usage.ru_utime + usage.ru_stime
            if process.returncode:
                errors.seek(0)
                raise SystemExit(f"{process.args} ended with {process.returncode}:\n{errors.read()[-5000:]}")
        return Cost(cpu, time.perf_counter() - started)


@contextlib.contextmanager
def upload_server(*flags: Any, processes: int = 2) -> Iterator[str]:
    """Run the upload server and yield its address."""
    command = [sys.executable, TESTS / "server.py", "--processes", processes, *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen([*map(str, command)], env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        yield process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait() == 0, "the server found something wrong"


def alternate(*works: Callable[[], Any], runs: int) -> list[list[Any]]:
    """Run each work in turn, several times, and return the figures of each."""
    rounds = [[work() for work in works] for _ in range(runs)]
    return [list(figures) for figures in zip(*rounds)]


def medians(*works: Callable[[], float], runs: int) -> list[float]:
    """Run each work in turn, several times, and return the median of each."""
    return [statistics.median(figures) for figures in alternate(*works, runs=runs)]


def quotient(dividend: float, divisor: float) -> float:
    """Divide; in the quick form a difference of two runs may be nothing."""
    return dividend / divisor if divisor else math.inf


def row(name: str, figure: str, ratio: float | None = None, reference: str = "") -> None:
    """Print a line of the table."""
    print(f"| {name} | {figure} | {reference if ratio is None else f'{ratio:.2f} times {reference}'} |", flush=True)


# ----------------------------------------------------------------------------------------------------
# Rows in memory. Each way makes the meter-days of some addresses, each in a new buffer.

TEMPLATE = generator.render_day_template(DAY, 10)
TIMESTAMPS = [datetime(2024, 1, 1) + timedelta(seconds=10 * index) for index in range(ROWS)]
TEXTS = polars.Series([f"{timestamp.isoformat()}Z" for timestamp in TIMESTAMPS])
LEVELS = polars.Series(range(900)) / 1000
OPTION = orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE


def with_wattif(addresses: list[int]) -> None:
    """Stamp a copy of the day's template. Like all ways, it writes each meter-day to a buffer, over the one before."""
    buffer = io.BytesIO()
    for meter_day in generator.generate_smart_meter_readings_for_day(DAY, TEMPLATE, addresses, 0):
        buffer.seek(0)
        buffer.write(meter_day)


def row_by_row(addresses: list[int]) -> None:
    """Render each row, the reading always with three decimals as WattIf's are."""
    rows = io.BytesIO()
    for address in addresses:
        meter_id = f"{address:012X}"
        rows.seek(0)
        for timestamp in TIMESTAMPS:
            reading = orjson.Fragment(f"{int(random.uniform(0.0, 0.9) * 1000) / 1000:.3f}")
            values = {"meter_id": meter_id, "timestamp": timestamp, "reading": reading}
            rows.write(orjson.dumps(values, option=OPTION))


def row_by_row_as_numbers(addresses: list[int]) -> None:
    """Render each row without the zeros at the end of a reading: rows of any length."""
    rows = io.BytesIO()
    for address in addresses:
        meter_id = f"{address:012X}"
        rows.seek(0)
        for timestamp in TIMESTAMPS:
            values = {"meter_id": meter_id, "timestamp": timestamp, "reading": round(random.uniform(0.0, 0.9), 3)}
            rows.write(orjson.dumps(values, option=OPTION))


def with_polars(addresses: list[int]) -> None:
    """Make a data frame of each meter-day and write it."""
    buffer = io.BytesIO()
    for address in addresses:
        buffer.seek(0)
        meter_ids = polars.repeat(f"{address:012X}", ROWS, eager=True)
        readings = LEVELS.sample(ROWS, with_replacement=True)
        columns = {"meter_id": meter_ids, "timestamp": TEXTS, "reading": readings}
        polars.DataFrame(columns).write_ndjson(buffer)


def with_duckdb(database: duckdb.DuckDBPyConnection, addresses: list[int]) -> None:
    """Copy the result of a query to a file for each meter-day, in memory if there is a file system for that."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        for address in addresses:
            database.execute(
                f"COPY (SELECT '{address:012X}' AS meter_id, strftime(TIMESTAMP '{DAY}' + INTERVAL 10 SECOND * i, "
                "'%Y-%m-%dT%H:%M:%SZ') AS timestamp, floor(random() * 900) / 1000 AS reading "
                f"FROM range({ROWS}) AS t(i)) TO '{folder}/{address:012X}.json'"
            )


def rows_in_memory(form: Form) -> None:
    """Compare ways to make a meter-day in memory, by CPU seconds."""
    fleet = sorted(generator.draw_block(0, 0, 1000))
    database = duckdb.connect()
    database.execute("SET threads = 1")

    def measured(make: Callable[[list[int]], None], meters: int) -> Callable[[], float]:
        def seconds() -> float:
            started = time.process_time()
            make(fleet[:meters])
            return (time.process_time() - started) / meters

        return seconds

    ways = {
        "WattIf": measured(with_wattif, form.count(300)),
        "`orjson.dumps` of each row": measured(row_by_row, form.count(20)),
        "the same, readings as `round(x, 3)`": measured(row_by_row_as_numbers, form.count(20)),
        "Polars": measured(with_polars, form.count(50)),
        "DuckDB": measured(functools.partial(with_duckdb, database), form.count(20)),
    }
    seconds = medians(*ways.values(), runs=form.runs(5))
    for name, used in zip(ways, seconds):
        ratio = quotient(used, seconds[0])
        row(
            f"rows in memory, one thread: {name}",
            f"{quotient(ROWS, used) / 1e6:.2f} million/s",
            ratio,
            "WattIf's CPU time",
        )


def flaws(form: Form) -> None:
    """Compare rows with flaws to clean ones, each meter-day written to a buffer, by CPU seconds."""
    meters = sorted(generator.draw_block(0, 0, 1000))[: form.count(300)]
    six = ",".join(f"{kind}={{0}}" for kind in generator.FLAWS if kind != "late")

    def measured(specification: str) -> Callable[[], float]:
        argv = ["--start", str(DAY), "--end", str(DAY), "--output-dir", "x"]
        run = generator.read_settings([*argv, *(["--flaws", specification] if specification else [])])

        def seconds() -> float:
            spoiler = generator.Spoiler(run, DAY) if run.flaws else None
            started, buffer = time.process_time(), io.BytesIO()
            for rows in generator.generate_smart_meter_readings_for_day(DAY, TEMPLATE, meters, 0, spoiler):
                buffer.seek(0)
                buffer.write(rows)
            return (time.process_time() - started) / len(meters)

        return seconds

    shares = {"no flaws": "", "six kinds, 0.1% each": six.format("0.1%"), "and late": six.format("0.1%") + ",late=0.1%"}
    shares["six kinds, 2% each"] = six.format("2%")
    seconds = medians(*(measured(specification) for specification in shares.values()), runs=form.runs(9))
    for name, used in zip(shares, seconds):
        row(f"a meter-day in memory: {name}", f"{used * 1e6:.0f} µs CPU", quotient(used, seconds[0]), "no flaws")
    more = 6 * (round(0.02 * ROWS) - round(0.001 * ROWS))
    row("each further row with a flaw", f"{(seconds[3] - seconds[1]) / more * 1e6:.2f} µs CPU")


# ----------------------------------------------------------------------------------------------------
# Whole runs.


def to_disk(form: Form, scratch: Path) -> None:
    """Compare a run with --output-dir to plain writes, by CPU seconds for each file.

    No file is deleted before the end: on ext4 that makes the next ones dearer, by what came before.
    """
    count, folders = form.count(200), itertools.count()

    def measured(command: Callable[[Path, int], list[Any]]) -> Callable[[], float]:
        def once() -> float:
            start_up, whole = (cost_of(command(scratch / f"disk-{next(folders)}", files)) for files in (1, count))
            return (whole.cpu - start_up.cpu) / (count - 1)

        return once

    wattif = measured(lambda folder, files: [*RUN, "--meters", files, "--processes", 1, "--output-dir", folder])
    plain = measured(lambda folder, files: [sys.executable, "-c", PLAIN_WRITES, folder, files])
    ours, theirs = medians(wattif, plain, runs=form.runs(9))
    for folder in scratch.glob("disk-*"):
        shutil.rmtree(folder)
    row("to disk: plain writes", f"{theirs * 1e3:.2f} ms CPU a file", 1.0, "plain writes")
    row("to disk: WattIf", f"{ours * 1e3:.2f} ms CPU a file", quotient(ours, theirs), "plain writes")


def upload_cost(form: Form, scratch: Path) -> None:
    """Compare a whole run to the stock upload of files that lie there ready, by CPU seconds for each object."""
    count, ready = form.count(1000), scratch / "ready"
    cost_of([*RUN, "--meters", count, "--output-dir", ready])
    with upload_server() as url:

        def measured(command: Callable[[int], list[Any]]) -> Callable[[], float]:
            def once() -> float:
                start_up, whole = (cost_of(command(n), STORAGE_EMULATOR_HOST=url) for n in (1, count))
                return (whole.cpu - start_up.cpu) / (count - 1)

            return once

        flags = ["--bucket", "a-bucket", "--temp-dir", scratch / "temp", "--processes", 1]
        stock = [sys.executable, "-c", STOCK_UPLOAD, ready / f"dt={DAY}"]
        works = (measured(lambda n: [*RUN, *flags, "--meters", n]), measured(lambda n: [*stock, 0, n, 100, 16]))
        ours, theirs = medians(*works, runs=form.runs(9))
    shutil.rmtree(ready)
    row("object: stock upload of ready files", f"{theirs * 1e3:.2f} ms CPU", 1.0, "stock")
    row("object: whole run of WattIf", f"{ours * 1e3:.2f} ms CPU", quotient(ours, theirs), "stock")


def throughput(form: Form, scratch: Path) -> None:
    """Compare 1 and 2 processes, and 1 and 100 meters a file, by wall and CPU seconds."""
    count = form.count(600)
    for delay in (0.0, 0.05):
        with upload_server("--delay", delay) as url:

            def measured(processes: int, per_file: int, url: str = url) -> Callable[[], tuple[float, float]]:
                flags = ["--bucket", "a-bucket", "--temp-dir", scratch / "temp", "--processes", processes]
                command = [*RUN, *flags, "--meters-per-file", per_file, "--meters"]

                def once() -> tuple[float, float]:
                    start_up, whole = (cost_of([*command, n], STORAGE_EMULATOR_HOST=url) for n in (processes, count))
                    more = count - processes
                    return quotient(more, whole.wall - start_up.wall), (whole.cpu - start_up.cpu) / more

                return once

            figures = alternate(measured(1, 1), measured(2, 1), measured(1, 100), runs=form.runs(5))
        speeds = [statistics.median(speed for speed, _ in runs) for runs in figures]
        cpu = [statistics.median(cpu for _, cpu in runs) for runs in figures]
        answer = f"answers after {delay * 1e3:.0f} ms"
        for name, speed, used in zip(("1 process", "2 processes", "1 process, 100 meters a file"), speeds, cpu):
            rate = speed * FILE_BYTES / 1e6
            objects = f"{speed:,.0f} meter-days/s, {rate:,.0f} MB/s, {used * 1e3:.2f} ms CPU each"
            row(f"upload, {answer}: {name}", objects, quotient(speed, speeds[0]), "1 process")


def on_the_index(form: Form, scratch: Path) -> None:
    """Compare uploads in strides to uploads in the order of names, on the model of the bucket's index, by wall seconds.

    Both have two processes, each with half of the names and as many uploads at once as is WattIf's default.
    There is one run of each, for it takes long. The objects are tiny.
    """
    count, at_once, ready = form.count(8000), 32, scratch / "tiny"
    tiny = [*RUN, "--interval", 86_400, "--meters", count, "--processes", 2]
    cost_of([*tiny, "--output-dir", ready])
    strides = [*tiny, "--retry-timeout", 600, "--bucket", "a-bucket", "--temp-dir", scratch / "temp"]
    # A single batch for each process, so that none waits for the last upload of the one before.
    stock = [sys.executable, "-c", STOCK_UPLOAD, ready / f"dt={DAY}"]
    halves = [[*stock, first, first + count // 2, count, at_once] for first in (0, count // 2)]
    seconds = []
    for commands in (halves, [strides]):
        with upload_server("--index", INDEX_WRITES, processes=1) as url:  # processes would not share the model
            seconds.append(cost_of(*commands, STORAGE_EMULATOR_HOST=url).wall)
    for name, used in zip(("stock upload of ready files, in the order of names", "WattIf, in strides"), seconds):
        figure = f"{count / used:,.0f} objects/s, {used:.1f} s (one run)"
        row(f"index model, {count:,} objects, 2 x {at_once} at once: {name}", figure, used / seconds[0], "stock's time")


def fleet(form: Form) -> None:
    """Show what it costs to draw and sort a meter of the fleet."""
    meters = form.count(1 << 18)

    def drawn() -> float:
        started = time.process_time()
        sorted(generator.draw_block(0, 0, meters))
        return (time.process_time() - started) / meters

    row("fleet", f"{medians(drawn, runs=form.runs(5))[0] * 1e6:.2f} µs a meter")


def memory(form: Form, scratch: Path) -> None:
    """Show what memory the process of a slice needs with few meters and with many.

    It is read while the run goes on: what wait4 tells counts the memory of the benchmark, from which the run forked.
    """
    sizes, batches, batch = [form.count(full) for full in (2000, 1_000_000, 8_000_000)], 10, form.count(100)
    flags = ["--bucket", "a-bucket", "--temp-dir", scratch / "temp", "--processes", 1, "--batch-size", batch, "-v"]
    with upload_server() as url:

        def measured(meters: int) -> Callable[[], float]:
            def once() -> float:
                command = [*RUN, *flags, "--meters", meters]
                with start(command, subprocess.PIPE, STORAGE_EMULATOR_HOST=url) as process:
                    uploaded = (line for line in process.stderr if f"uploaded {batch} of {batch} files" in line)
                    assert len([*itertools.islice(uploaded, batches)]) == batches, "the run ended early"
                    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    status = Path(f"/proc/{child}/status").read_text()
                    process.send_signal(signal.SIGINT)
                    process.stderr.read()
                    return int(status.split("VmHWM:")[1].split()[0]) * 1024

            return once

        peaks = medians(*map(measured, sizes), runs=form.runs(3))
    for meters, peak in zip(sizes, peaks):
        row(f"peak memory after {batches * batch:,} objects, {meters:,} meters", f"{peak / 1e6:.0f} MB")
    row("memory for each meter more", f"{(peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0]):.1f} bytes")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure WattIf and what else would do the job.")
    parser.add_argument("--quick", action="store_true", help="only show that every section runs to its end")
    form = QUICK if parser.parse_args().quick else FULL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # so that no process and file is left
    if form == QUICK:
        print("The quick form: its figures mean nothing.\n")
    print("| what | measured | ratio |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        rows_in_memory(form)
        flaws(form)
        to_disk(form, scratch)
        upload_cost(form, scratch)
        throughput(form, scratch)
        on_the_index(form, scratch)
        fleet(form)
        memory(form, scratch)


if __name__ == "__main__":
    main()
