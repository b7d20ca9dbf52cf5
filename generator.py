#!/usr/bin/env python3
"""Fill a Google Cloud Storage bucket with synthetic smart-meter readings, as fast as machine and network allow.

One meter, one day, is one NDJSON object, gs://BUCKET/dt=YYYY-MM-DD/<meter_id>.ndjson, with a row every 10 seconds:

    {"meter_id":"020000A1B2C3","timestamp":"2024-01-01T00:00:10Z","reading":0.609}

See what a run would do, keep the files here, or upload them:

    python generator.py --start 2024-01-01 --end 2024-01-31 --dry-run
    python generator.py --start 2024-01-01 --end 2024-01-01 --meters 20 --output-dir readings
    python generator.py --start 2024-01-01 --end 2024-01-31 --bucket my-datalake-bucket

The same flags give the same bytes on every machine and every Python. The readings are random: they test
infrastructure and say nothing about electricity.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zlib
from array import array
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import date, datetime, timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence
from urllib.request import getproxies

import orjson
from bloom_filter import BloomFilter

if TYPE_CHECKING:
    from google.cloud.storage import Bucket

log = logging.getLogger("wattif")

# The data contract: pipelines and re-runs rely on every constant from here to the fleet.

DAY_SECONDS = 86_400
DEFAULT_SEED = 0
ROW = b'{"meter_id":"000000000000","timestamp":"2024-01-01T00:00:00Z","reading":0.111}\n'
ROW_BYTES = len(ROW)
ID_OFFSET = ROW.index(b"000000000000")
DIGITS_OFFSET = ROW.index(b"111")
CONTENT_TYPES = {False: "application/x-ndjson", True: "application/gzip"}

BLOCK_METERS = 1 << 20
BLOCKS = 1 << 16
MAX_METERS = BLOCKS * BLOCK_METERS
SUFFIX_BITS = 24
LOCALLY_ADMINISTERED = 0x02 << 40

# A reading is a level from 0 to 899: its first digit is a random byte modulo 9, the others are bytes modulo 10.
# The bytes above the last whole multiple (252 and 250) would favour the low digits and are dropped.
DIGIT_TABLES = tuple(bytes(ord("0") + byte % base for byte in range(256)) for base in (9, 10, 10))
UNEVEN_BYTES = tuple(bytes(range(256 - 256 % base, 256)) for base in (9, 10, 10))

DEFAULT_BUCKET = "smart-meter-fake-data-t"
DEFAULT_TEMP_DIR = "/mnt/sm-disk/"
SPOOL = "wattif"
REQUEST_TIMEOUT = 60.0
UPLOAD_CHUNK_BYTES = 16 << 20
TICK_SECONDS = 0.1
NAMED_FAILURES = 10


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line that names the flag and what to do."""


class RunError(Exception):
    """A run cannot begin or go on; the message is one line."""


@dataclass(frozen=True)
class Run:
    """Everything that one run is told; the first seven fields alone determine the objects."""

    start: date
    end: date
    meters: int
    interval: int
    seed: int
    meters_per_file: int
    gzip: bool
    task_index: int
    task_count: int
    task_source: str
    bucket: str | None
    directory: str
    batch_size: int
    processes: int
    write_workers: int
    upload_workers: int
    transfer_workers: int

    @property
    def days(self) -> range:
        """The days of the run, both ends included, as proleptic Gregorian ordinals."""
        return range(self.start.toordinal(), self.end.toordinal() + 1)

    @property
    def rows(self) -> int:
        """Readings of one meter in one day."""
        return DAY_SECONDS // self.interval

    @property
    def slices(self) -> list[range]:
        """Each process's share of this task's files of a day, by their indices: contiguous, none of them empty."""
        files = share(range(-(-self.meters // self.meters_per_file)), self.task_index, self.task_count)
        count = min(self.processes, len(files))
        return [share(files, index, count) for index in range(count)]

    def meters_of(self, files: range) -> range:
        """The fleet indices of the meters in contiguous files."""
        return range(files.start * self.meters_per_file, min(files.stop * self.meters_per_file, self.meters))

    @property
    def objects(self) -> int:
        """Objects of this task."""
        return len(self.days) * sum(map(len, self.slices))

    @property
    def readings(self) -> int:
        """Readings of this task."""
        return len(self.days) * self.rows * sum(len(self.meters_of(files)) for files in self.slices)

    def most_bytes(self, readings: int, files: int) -> int:
        """The size of files with so many readings altogether: exact, or with --gzip what it never exceeds."""
        size = readings * ROW_BYTES
        return size + size // 1000 + 64 * files if self.gzip else size

    @property
    def file_bytes(self) -> int:
        """The most bytes of one file."""
        return self.most_bytes(min(self.meters_per_file, self.meters) * self.rows, 1)

    @property
    def batch_files(self) -> int:
        """Files of a batch: fewer where they are large, so that a batch takes no more disk."""
        return max(1, self.batch_size // self.meters_per_file)

    def files_on_disk(self, files: range) -> int:
        """The most files of a slice that wait on disk at once: a batch for each thread that writes or uploads."""
        return min(len(self.days) * len(files), self.batch_files * (self.write_workers + self.upload_workers))

    @property
    def disk_bytes(self) -> int:
        """The most disk that this task uses at once."""
        if not self.bucket:
            return self.most_bytes(self.readings, self.objects)
        return self.file_bytes * sum(map(self.files_on_disk, self.slices))

    @property
    def destination(self) -> str:
        """Where the objects go, for people."""
        return f"gs://{self.bucket}" if self.bucket else self.directory


def share(whole: range, index: int, count: int) -> range:
    """The index-th of `count` contiguous shares of a range, whose lengths differ by one at the most."""
    return whole[len(whole) * index // count : len(whole) * (index + 1) // count]


# The fleet


def probe_once(bloom: BloomFilter, suffix: int) -> tuple[int]:
    """Say which bit of the filter stands for a suffix: the drawn number is random already and needs no hash."""
    return (suffix % bloom.num_bits_m,)


def draw_fleet(seed: int, first: int, last: int) -> array[int]:
    """Draw meters first..last-1 of the fleet that the seed determines.

    Returns their addresses (48-bit integers) as an array of 8 bytes each. Each block has a generator and a filter
    of its own, of the block's capacity whatever the size of the fleet, so that a larger fleet begins with the
    smaller one and no block before `first` is drawn. One probe of a filter with 8 bits for each meter rejects
    at most every eighth number that is new; a number that was drawn before is always rejected.
    """
    fleet = array("Q")
    for block in range(first // BLOCK_METERS, -(-last // BLOCK_METERS)):
        base = LOCALLY_ADMINISTERED | block << SUFFIX_BITS
        skipped = max(0, first - block * BLOCK_METERS)
        bloom = BloomFilter(BLOCK_METERS, 0.02, probe_once)
        draw = random.Random(f"{seed}/{block}").getrandbits
        add, append = bloom.add, fleet.append
        for index in range(min(BLOCK_METERS, last - block * BLOCK_METERS)):
            suffix = draw(SUFFIX_BITS)
            while suffix in bloom:
                suffix = draw(SUFFIX_BITS)
            add(suffix)
            if index >= skipped:
                append(base | suffix)
    return fleet


def meter_id(address: int) -> str:
    """Write a meter's address as 12 upper-case hex digits."""
    return f"{address:012X}"


# The day template and the readings


def render_day_template(day: date, interval: int) -> bytes:
    """Render the rows of one meter-day, DAY_SECONDS / interval of ROW_BYTES each, with ROW's placeholders."""
    midnight = datetime(day.year, day.month, day.day)
    steps = itertools.repeat(timedelta(seconds=interval), DAY_SECONDS // interval - 1)
    timestamps = itertools.accumulate(steps, initial=midnight)
    option = orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
    row = orjson.loads(ROW)
    rendered = []
    for row["timestamp"] in timestamps:
        rendered.append(orjson.dumps(row, option=option))
    return b"".join(rendered)


def draw_digits(key: str, rows: int) -> list[bytes]:
    """Draw the three digits of `rows` readings as columns; a key always gives the same digits.

    The random bytes are SHAKE128 of the key (FIPS 202). The margin over the expected 2.4% of uneven bytes is
    six standard deviations for a day of readings; where it is not enough, more are drawn.
    """
    size = rows * 256 // 250 + math.isqrt(rows)
    columns = [b""]
    while min(map(len, columns)) < rows:
        drawn = hashlib.shake_128(key.encode()).digest(len(DIGIT_TABLES) * size)
        parts = (drawn[start : start + size] for start in range(0, len(drawn), size))
        columns = [part.translate(*how)[:rows] for part, *how in zip(parts, DIGIT_TABLES, UNEVEN_BYTES)]
        size *= 2
    return columns


def generate_smart_meter_readings_for_day(
    day: date, template: bytes, meters: Iterable[int], seed: int
) -> Iterator[bytearray]:
    """Yield the rows of each meter for one day, stamped column by column into copies of the day's template.

    Every item is the same buffer, valid until the next one is asked for. An ID differs little from the one
    before it (meters of a block share six digits), so only the columns that change are written.
    """
    buffer = bytearray(template)
    rows = len(template) // ROW_BYTES
    stamped = template[ID_OFFSET : ID_OFFSET + 12]
    for address in meters:
        digits = meter_id(address).encode()
        for offset, (old, new) in enumerate(zip(stamped, digits), ID_OFFSET):
            if old != new:
                buffer[offset::ROW_BYTES] = bytes((new,)) * rows
        stamped = digits
        columns = draw_digits(f"{seed}/{address:012X}/{day}", rows)
        for offset, column in enumerate(columns, DIGITS_OFFSET):
            buffer[offset::ROW_BYTES] = column
        yield buffer


# The pipeline of one process


class File(NamedTuple):
    """A file that is whole on disk."""

    name: str
    readings: int
    bytes: int


@dataclass
class Outcome:
    """What became of some files; outcomes add up to that of the run."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    fatal: str = ""

    def add(self, other: Outcome) -> None:
        """Add what became of other files. Where neither can go on, the first reason stands."""
        self.counts.update(other.counts)
        self.failures.extend(other.failures)
        self.fatal = self.fatal or other.fatal


def partition(day: date) -> str:
    """Name the Hive partition of a day."""
    return f"dt={day}"


def file_name(run: Run, index: int, address: int) -> str:
    """Name the index-th file of a day, whose first meter has an address, below its partition."""
    stem = meter_id(address)
    if run.meters_per_file > 1:
        meters = run.meters_of(range(index, index + 1))
        stem = f"meters-{meters[0]:09d}-{meters[-1]:09d}"
    return f"{stem}.ndjson.gz" if run.gzip else f"{stem}.ndjson"


def compress(chunks: Iterable[bytearray]) -> Iterator[bytes]:
    """Compress as gzip level 1 does, without a time stamp in the header, holding one chunk at a time."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()


def write_file(path: str, chunks: Iterable[bytes | bytearray], mode: int) -> int:
    """Write a file that is whole whenever its name exists: it has another name until the last byte is in.

    Returns its size in bytes. Raises OSError where the file system refuses; the unfinished file is then removed.
    """
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    size = 0
    try:
        for chunk in chunks:
            size += len(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        os.rename(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    finally:
        os.close(descriptor)
    return size


def write_batch(
    run: Run, day: date, template: bytes, batch: Sequence[tuple[str, array[int]]]
) -> tuple[list[File], str]:
    """Write a batch of files, each given by its name and its meters, of one day.

    Returns those that are whole and, where the file system refused one, why the run cannot go on.
    """
    started = time.perf_counter()
    folder = os.path.join(run.directory, partition(day))
    meters = itertools.chain.from_iterable(addresses for _, addresses in batch)
    readings = generate_smart_meter_readings_for_day(day, template, meters, run.seed)
    files = []
    try:
        os.makedirs(folder, mode=0o700 if run.bucket else 0o777, exist_ok=True)
        for name, addresses in batch:
            chunks = itertools.islice(readings, len(addresses))
            path = os.path.join(folder, name)
            size = write_file(path, compress(chunks) if run.gzip else chunks, 0o600 if run.bucket else 0o666)
            files.append(File(name, run.rows * len(addresses), size))
    except OSError as error:
        return files, f"cannot write {error.filename or folder}: {error.strerror}"
    log.debug("%s: wrote %d files in %.3f s", day, len(files), time.perf_counter() - started)
    return files, ""


def deliver_batch(run: Run, bucket: Bucket | None, day: date, written: Future[tuple[list[File], str]]) -> Outcome:
    """Wait until a batch is written, upload it if there is a bucket, delete what arrived, and count."""
    files, fatal = written.result()
    started = time.perf_counter()
    folder = os.path.join(run.directory, partition(day))
    results = upload_files(run, bucket, day, folder, files) if bucket else [None] * len(files)
    outcome = Outcome(fatal=fatal)
    for file, error in zip(files, results):
        path = os.path.join(folder, file.name)
        if error is None:
            outcome.counts.update(objects=1, readings=file.readings, bytes=file.bytes)
            if bucket:
                os.unlink(path)
        else:
            outcome.counts["failed"] += 1
            outcome.failures.append(f"{path}: {explain(error)}")
            outcome.fatal = outcome.fatal or refusal(error, run)
    if files and not outcome.counts["objects"]:
        reason = f"nothing of a batch of {len(files)} arrived in {run.destination}; the last error was: "
        outcome.fatal = outcome.fatal or reason + explain(results[-1])
    if bucket:
        seconds = time.perf_counter() - started
        log.debug("%s: uploaded %d of %d files in %.3f s", day, outcome.counts["objects"], len(files), seconds)
    return outcome


def upload_files(run: Run, bucket: Bucket, day: date, folder: str, files: list[File]) -> list[Exception | None]:
    """Upload files of one day and return, for each, the error that kept it from arriving."""
    from google.cloud.storage import retry, transfer_manager

    return transfer_manager.upload_many_from_filenames(
        bucket,
        [file.name for file in files],
        source_directory=folder,
        blob_name_prefix=f"{partition(day)}/",
        blob_constructor_kwargs={"chunk_size": UPLOAD_CHUNK_BYTES},
        upload_kwargs={
            "content_type": CONTENT_TYPES[run.gzip],
            "timeout": REQUEST_TIMEOUT,
            "retry": retry.DEFAULT_RETRY,
        },
        worker_type=transfer_manager.THREAD,
        max_workers=run.transfer_workers,
    )


def explain(error: BaseException | None) -> str:
    """Say in one short line what an error is."""
    code = getattr(error, "code", None)
    text = f"HTTP {int(code)}" if code else " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 200 else f"{text[:200]}..."


def refusal(error: BaseException, run: Run) -> str:
    """Say what to do where an error means that every other upload would fail as well; otherwise nothing."""
    from google.auth.exceptions import GoogleAuthError, TransportError

    code = getattr(error, "code", None)
    if code == 401 or (isinstance(error, GoogleAuthError) and not isinstance(error, TransportError)):
        remedy = "the credentials were not accepted: log in again, or give the VM a service account"
    elif code == 403:
        remedy = f"no permission to create objects in gs://{run.bucket}: grant roles/storage.objectUser on the bucket"
    elif code == 404:
        remedy = f"there is no bucket gs://{run.bucket}: create it, or name another one with --bucket"
    else:
        return ""
    return f"{remedy} ({explain(error)})"


def run_pipeline(
    run: Run, files: range, bucket: Bucket | None, stopping: threading.Event, report: Callable[[Outcome], None]
) -> None:
    """Generate a slice of the files day by day, batch by batch, and report what became of each batch.

    `free` counts the files that may still be put on disk. A batch takes its number away, what was delivered
    comes back, and a file whose upload failed keeps its place: so the announced disk use is never passed.
    """
    meters = run.meters_of(files)
    fleet = draw_fleet(run.seed, meters.start, meters.stop)
    log.debug("drew meters %d to %d", meters[0], meters[-1])
    free = run.files_on_disk(files)
    pending: dict[Future[Outcome], int] = {}

    def name_and_meters(index: int) -> tuple[str, array[int]]:
        start = index * run.meters_per_file - meters.start
        addresses = fleet[start : start + run.meters_per_file]
        return file_name(run, index, addresses[0]), addresses

    def settle() -> int:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        freed = 0
        for future in done:
            outcome = future.result()
            freed += pending.pop(future) - outcome.counts["failed"]
            if outcome.fatal:
                stopping.set()
            report(outcome)
        return freed

    with ThreadPoolExecutor(run.write_workers, "write") as write_executor, ThreadPoolExecutor(
        run.upload_workers, "upload"
    ) as upload_executor:
        for day in map(date.fromordinal, run.days):
            if stopping.is_set():
                break
            template = render_day_template(day, run.interval)
            todo = files
            while todo:
                while pending and free < run.batch_files:
                    free += settle()
                if not free:
                    stopping.set()
                    report(Outcome(fatal="files whose upload failed take up the disk"))
                if stopping.is_set():
                    break
                now, todo = todo[: min(run.batch_files, free)], todo[min(run.batch_files, free) :]
                free -= len(now)
                written = write_executor.submit(write_batch, run, day, template, [*map(name_and_meters, now)])
                pending[upload_executor.submit(deliver_batch, run, bucket, day, written)] = len(now)
        while pending:
            settle()


# The run


@contextlib.contextmanager
def claim_spool(temp_dir: str) -> Iterator[str]:
    """Hold the directory in which files wait for their upload, TEMP_DIR/wattif, for one run.

    The lock is on the temp directory itself, so a crash leaves none behind. What an earlier run left in the spool
    is cleared, and nothing else is ever touched. Files whose upload fails stay; otherwise the temp directory is
    left as it was found. Raises RunError where another run holds it.
    """
    spool = os.path.join(temp_dir, SPOOL)
    holder = os.path.join(spool, "pid")
    lock = os.open(temp_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        lock_or_name_holder(lock, temp_dir, holder)
        if os.path.lexists(spool):
            log.warning("clearing %s, which an earlier run left", spool)
            shutil.rmtree(spool)
        os.mkdir(spool, 0o700)
        write_file(holder, [b"%d" % os.getpid()], 0o600)
        yield spool
        os.unlink(holder)
        for folder, _, _ in os.walk(spool, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    finally:
        os.close(lock)


def lock_or_name_holder(lock: int, temp_dir: str, holder: str) -> None:
    """Lock an open directory, or raise RunError that names the process which the file `holder` says has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process = "another run"
        with contextlib.suppress(OSError), open(holder) as file:
            process = f"process {file.read()}"
        raise RunError(f"--temp-dir {temp_dir} is in use by {process}; wait for it or give another one") from None


def find_credentials() -> Any:
    """Find the Application Default Credentials, or None for an emulator. Raises UsageError where there are none."""
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return None
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError

    try:
        return google.auth.default()[0]
    except DefaultCredentialsError:
        raise UsageError(
            "--bucket needs Google credentials: run 'gcloud auth application-default login', set "
            "GOOGLE_APPLICATION_CREDENTIALS to a key file, or keep the files here with --output-dir"
        ) from None


def open_bucket(run: Run, credentials: Any) -> Bucket | None:
    """Return the bucket, if there is one, of a client of this process's own with a connection for each upload."""
    if not run.bucket:
        return None
    # The library otherwise reads the bucket's metadata in the background, for traces that nobody asked for and
    # with a permission that uploads do not need.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google.cloud import storage
    from requests.adapters import HTTPAdapter

    client = storage.Client(project=None, credentials=credentials)
    session = client._http  # as the library's documentation does to widen the pool of connections
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=run.upload_workers * run.transfer_workers))
    # With trust_env, requests looks for proxies, certificates and .netrc anew on every request.
    session.trust_env = bool(getproxies() or {"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"} & set(os.environ))
    return client.bucket(run.bucket)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of finished uploads for the next ones; elsewhere do nothing.

    Otherwise every buffer of an object's size is a new mapping, page by page. See mallopt(3) for the numbers.
    """
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 512 << 20)
        mallopt(top_pad, 16 << 20)
        mallopt(arena_max, 1)


def run_child(run: Run, files: range, credentials: Any, connection: Connection, inherited: list[Connection]) -> None:
    """Be one of several processes: do a slice and send what became of each batch, at last None.

    Signals are the parent's to handle. Whatever it sends means to stop; when it is gone, so is this process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for other in inherited:
        other.close()
    stopping = threading.Event()

    def follow_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            while connection.recv():
                stopping.set()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    run_pipeline(run, files, open_bucket(run, credentials), stopping, connection.send)
    connection.send(None)


def run_children(run: Run, credentials: Any, stopping: threading.Event, report: Callable[[Outcome], None]) -> None:
    """Run a pipeline for each slice in a process of its own, started before any thread or client exists."""
    if run.bucket:
        import google.cloud.storage.transfer_manager  # noqa: F401 - once for all children
    context = multiprocessing.get_context("fork")
    children: dict[Connection, tuple[multiprocessing.process.BaseProcess, range]] = {}
    for files in run.slices:
        ours, theirs = context.Pipe()
        process = context.Process(target=run_child, args=(run, files, credentials, theirs, [ours, *children]))
        process.start()
        theirs.close()
        children[ours] = (process, files)
    told = False
    while children:
        if stopping.is_set() and not told:
            told = True
            for connection in children:
                with contextlib.suppress(OSError):
                    connection.send("stop")
        for connection in multiprocessing.connection.wait(list(children), TICK_SECONDS):
            process, files = children[connection]
            try:
                outcome = connection.recv()
            except (EOFError, OSError):
                process.join()
                meters = run.meters_of(files)
                ending = f"meters {meters[0]} to {meters[-1]}: their process ended with exit code {process.exitcode}"
                outcome = Outcome(failures=[f"{ending}; run again"])
                del children[connection]
            if outcome is None:
                process.join()
                del children[connection]
            else:
                report(outcome)


def execute(run: Run, credentials: Any) -> Outcome:
    """Do a whole run and return what became of it. SIGINT and SIGTERM let the batches in flight finish."""
    stopping = threading.Event()
    total = Outcome()

    def stop(number: int, frame: Any) -> None:
        if stopping.is_set():
            os._exit(128 + number)
        stopping.set()
        total.counts["signal"] = number

    def report(outcome: Outcome) -> None:
        total.add(outcome)
        if outcome.fatal:
            stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if run.bucket and run.slices:
            run = replace(run, directory=stack.enter_context(claim_spool(run.directory)))
        if len(run.slices) > 1:
            run_children(run, credentials, stopping, report)
        elif run.slices:
            run_pipeline(run, run.slices[0], open_bucket(run, credentials), stopping, report)
    return total


# Reporting


def say(line: str) -> None:
    """Tell a person something, on standard error."""
    print(line, file=sys.stderr, flush=True)


def in_bytes(count: float) -> str:
    """Write a number of bytes with three significant digits in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def describe_plan(run: Run) -> str:
    """Say what a run will do: days, meters, readings, objects, bytes, disk, destination."""
    size = run.readings * ROW_BYTES
    inexact = run.gzip or run.meters % run.meters_per_file
    lines = {
        "days": f"{run.start} to {run.end}",
        "meters": f"{run.meters:,}, a reading every {run.interval} s, seed {run.seed}",
        "task": f"{run.task_index} of {run.task_count:,} (from {run.task_source})" if run.task_source else "",
        "readings": f"{run.readings:,}",
        "objects": f"{run.objects:,} of {'at most ' if inexact else ''}{run.file_bytes:,} bytes",
        "bytes": f"{size:,} ({in_bytes(size)}){' before compression' if run.gzip else ''}",
        "processes": f"{len(run.slices)}",
        "disk": f"at most {run.disk_bytes:,} bytes ({in_bytes(run.disk_bytes)}) at once in {run.directory}",
        "destination": f"{run.destination}/dt=YYYY-MM-DD/",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items() if value)


def describe_outcome(total: Outcome, seconds: float) -> str:
    """Say in one line what a run did: objects, readings, bytes, seconds, rates, failures."""
    counts = total.counts
    return (
        f"{counts['objects']:,} objects, {counts['readings']:,} readings, {in_bytes(counts['bytes'])} "
        f"in {seconds:.1f} s: {counts['objects'] / seconds:,.1f} objects/s, {counts['readings'] / seconds:,.0f} "
        f"readings/s, {in_bytes(counts['bytes'] / seconds)}/s; {counts['failed']:,} failed"
    )


def conclude(run: Run, total: Outcome, seconds: float) -> int:
    """Report what became of a run and return its exit status: 0, 1, or 128 and the signal that ended it."""
    for failure in total.failures[:NAMED_FAILURES]:
        say(f"failed: {failure}")
    if len(total.failures) > NAMED_FAILURES:
        say(f"failed: {len(total.failures) - NAMED_FAILURES:,} more; their files are there too")
    if total.fatal:
        say(f"error: {total.fatal}")
    say(describe_outcome(total, seconds))
    if total.counts["signal"]:
        say(f"interrupted by {signal.Signals(total.counts['signal']).name}")
        return 128 + total.counts["signal"]
    return int(total.counts["objects"] < run.objects)


# The command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message without a usage text, control characters escaped, and exit with status 2."""
        line = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in message)
        say(f"{self.prog}: error: {line[:1000]}")
        raise SystemExit(2)


def day(text: str) -> date:
    """Parse a day; argparse names the flag."""
    with contextlib.suppress(ValueError):
        parsed = datetime.strptime(text, "%Y-%m-%d").date()
        if parsed.isoformat() == text:
            return parsed
    raise argparse.ArgumentTypeError(f"{text!r} is not a day of the calendar; write it as YYYY-MM-DD")


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of whole numbers within bounds; argparse names the flag."""

    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,20}", text) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least:,} to {most:,}")

    return parse


def interval(text: str) -> int:
    """Parse the seconds between readings; argparse names the flag."""
    seconds = whole_number(1, DAY_SECONDS)(text)
    if DAY_SECONDS % seconds:
        raise argparse.ArgumentTypeError(f"{text} s do not divide a day of {DAY_SECONDS:,} s; take 1, 10, 60 or 900")
    return seconds


def bucket_name(text: str) -> str:
    """Parse a bucket's name by the rules of https://cloud.google.com/storage/docs/buckets#naming."""
    longest = 222 if "." in text else 63
    if not (
        3 <= len(text) <= longest
        and all(re.fullmatch("[a-z0-9_-]{1,63}", part) for part in text.split("."))
        and text[0] not in "_-"
        and text[-1] not in "_-"
        and not re.fullmatch(r"(\d+\.){3}\d+", text)
        and not text.startswith("goog")
        and not re.search("g[o0][o0]g[l1]e", text)
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be a bucket: 3 to 63 lower-case letters, digits, '-', '_' and '.', letters or digits at "
            "both ends, no IP address, not google nor anything that begins with goog"
        )
    return text


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser(
        prog="generator.py",
        usage="%(prog)s --start DATE --end DATE [--bucket NAME | --output-dir DIR] [options]",
        description="Generate synthetic smart-meter readings (NDJSON) and upload them to Google Cloud Storage.",
        epilog="example:\n  %(prog)s --start 2024-01-01 --end 2024-01-31 --meters 1000 --bucket my-datalake-bucket\n"
        "uploads a month of 1,000 meters, 31,000 objects of 683 kB, to gs://my-datalake-bucket/dt=2024-01-01/ and on",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    days = parser.add_argument_group("days (UTC)")
    days.add_argument("--start", type=day, required=True, metavar="DATE", help="first day, YYYY-MM-DD")
    days.add_argument("--end", type=day, required=True, metavar="DATE", help="last day, included")

    where = parser.add_argument_group("destination")
    where.add_argument(
        "--bucket", type=bucket_name, metavar="NAME", help=f"upload to gs://NAME (default: {DEFAULT_BUCKET})"
    )
    where.add_argument("--output-dir", metavar="DIR", help="keep the files in DIR instead: no account, no network")

    def number(
        group: Any, flag: str, default: int | None, most: int, text: str, metavar: str = "N", least: int = 1
    ) -> None:
        default_text = "from the engine's environment, else one share" if default is None else f"{default:,}"
        help_text = f"{text} (default: {default_text})"
        group.add_argument(flag, type=whole_number(least, most), default=default, metavar=metavar, help=help_text)

    data = parser.add_argument_group("data")
    number(data, "--meters", 1000, MAX_METERS, "size of the fleet")
    data.add_argument(
        "--interval",
        type=interval,
        default=10,
        metavar="SECONDS",
        help="seconds between readings; must divide a day (default: 10)",
    )
    number(data, "--seed", DEFAULT_SEED, 2**63 - 1, "fleet and readings follow from it", least=0)
    number(data, "--meters-per-file", 1, MAX_METERS, "meters that share an object, one after the other")
    data.add_argument("--gzip", action="store_true", help="compress the objects (level 1)")

    tasks = parser.add_argument_group("many machines")
    number(tasks, "--task-index", None, MAX_METERS, "which share of the run this is, from 0 on", "I", least=0)
    number(tasks, "--task-count", None, MAX_METERS, "into how many shares the run is split")

    tuning = parser.add_argument_group("tuning")
    tuning.add_argument(
        "--temp-dir",
        default=DEFAULT_TEMP_DIR,
        metavar="DIR",
        help=f"where files wait for their upload; created if missing (default: {DEFAULT_TEMP_DIR})",
    )
    number(tuning, "--batch-size", 100, 100_000, "files for each call of the transfer manager")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    number(tuning, "--processes", cores, 1024, "pipelines, each with its own threads (the cores it may use)")
    number(tuning, "--write-workers", 1, 1024, "threads that generate and write, each a batch")
    number(tuning, "--upload-workers", 2, 1024, "batches that are uploaded at once")
    number(tuning, "--transfer-workers", 16, 1024, "uploads at once within a batch: the transfer manager's max_workers")

    other = parser.add_argument_group("other")
    other.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    other.add_argument("-v", "--verbose", action="store_true", help="log each batch and decision")
    other.add_argument("-h", "--help", action="help", help="show this page and exit")
    return parser


# Engines that run array jobs, and the variables in which they say a task's index, count and first index.
ENGINES = (
    ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT", ""),  # Cloud Batch
    ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT", ""),  # Cloud Run jobs
    ("JOB_COMPLETION_INDEX", "", ""),  # Kubernetes Indexed Jobs, which do not say the count
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),  # Slurm job arrays
)


def find_task(args: argparse.Namespace) -> tuple[int, int, str]:
    """Return which share of the run this is, of how many, and who said so. Raises UsageError on half an answer."""
    index, count, source = args.task_index, args.task_count, "--task-index"
    engine = next((names for names in ENGINES if names[0] in os.environ), None)
    if index is None and engine:
        source, count_name, first_name = engine
        values = [os.environ.get(name, "0") for name in (source, first_name)]
        if count is None and count_name in os.environ:
            values.append(os.environ[count_name])
        if not all(re.fullmatch("[0-9]{1,12}", value) for value in values):
            raise UsageError(f"{source} and its like are not numbers; give --task-index and --task-count instead")
        index, count = int(values[0]) - int(values[1]), int(values[2]) if len(values) > 2 else count
    if index is None and count is None:
        return 0, 1, ""
    if index is None or count is None:
        missing = "--task-count" if count is None else "--task-index"
        raise UsageError(f"{missing} is missing: {source if count is None else '--task-count'} is there without it")
    if not 0 <= index < count:
        raise UsageError(f"--task-index {index} (from {source}) must be from 0 to {count - 1}: --task-count is {count}")
    return index, count, source


def plan(args: argparse.Namespace) -> Run:
    """Turn parsed flags into a run. Raises UsageError where they do not go together."""
    if args.end < args.start:
        raise UsageError(f"--end {args.end} is before --start {args.start}; swap them")
    if args.bucket and args.output_dir is not None:
        raise UsageError("--bucket and --output-dir exclude each other; drop one")
    bucket = None if args.output_dir is not None else args.bucket or DEFAULT_BUCKET
    index, count, source = find_task(args)
    derived = {
        "bucket": bucket,
        "directory": args.temp_dir if bucket else args.output_dir,
        "task_index": index,
        "task_count": count,
        "task_source": source,
    }
    return Run(**{name: derived.get(name, getattr(args, name, None)) for name in Run.__dataclass_fields__})


def prepare_directory(run: Run) -> None:
    """Create the run's directory and see that it can be written and has room. Raises UsageError if not."""
    flag = f"--{'temp' if run.bucket else 'output'}-dir {run.directory!r}"
    try:
        os.makedirs(run.directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=run.directory):
            free = shutil.disk_usage(run.directory).free
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{flag} cannot be created or written: {reason}; name a directory of yours") from None
    if free < run.disk_bytes:
        raise UsageError(
            f"{flag} has {in_bytes(free)} free and the run needs {in_bytes(run.disk_bytes)}; "
            + ("lower --batch-size or name another disk" if run.bucket else "name another disk or fewer days or meters")
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 if every object is where it should be."""
    parser = build_parser()
    args = parser.parse_args(argv)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(threadName)s: %(message)s" if args.verbose else "%(message)s",
        level=logging.ERROR,
    )
    log.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", message=r".*\bPython\b")  # packages that lament an old Python
    try:
        run = plan(args)
        if not args.dry_run:
            credentials = find_credentials() if run.bucket else None
            prepare_directory(run)
    except UsageError as error:
        parser.error(str(error))
    say(describe_plan(run))
    if args.dry_run:
        return 0
    started = time.monotonic()
    try:
        total = execute(run, credentials)
    except RunError as error:
        say(f"{parser.prog}: error: {error}")
        return 1
    return conclude(run, total, time.monotonic() - started)


if __name__ == "__main__":
    raise SystemExit(main())
