#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["google-cloud-storage>=3.0,<4", "bloom-filter>=1.3.3,<2", "orjson>=3.10,<4"]
# ///
"""Fill a Google Cloud Storage bucket with synthetic smart-meter readings, as fast as machine and network allow.

One meter, one day, is one NDJSON object, gs://BUCKET/dt=YYYY-MM-DD/<meter_id>.ndjson, with a row every 10 seconds:

    {"meter_id":"020000A1B2C3","timestamp":"2024-01-01T00:00:10Z","reading":0.609}

Keep the files here; upload them from this machine; upload them from ten machines, of which this is the first:

    python generator.py --start 2024-01-01 --end 2024-01-01 --meters 20 --output-dir readings
    python generator.py --start 2024-01-01 --end 2024-01-31 --bucket my-datalake-bucket
    python generator.py --start 2024-01-01 --end 2024-01-31 --meters 1000000 --task-index 0 --task-count 10

The same flags give the same bytes on every machine and every Python. The readings are random: they test
infrastructure and say nothing about electricity.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import heapq
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.connection
import operator
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
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timedelta, timezone
from multiprocessing.connection import Connection
from typing import IO, TYPE_CHECKING, Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence

import orjson
from bloom_filter import BloomFilter

if TYPE_CHECKING:
    from google.cloud.storage import Bucket

log = logging.getLogger("wattif")

# The data contract: pipelines and re-runs rely on every constant from here to CONTENT_TYPES.

DAY_SECONDS = 86_400
DEFAULT_SEED = 0
ROW = b'{"meter_id":"000000000000","timestamp":"2024-01-01T00:00:00Z","reading":0.111}\n'
ROW_BYTES = len(ROW)
ID_OFFSET = ROW.index(b"000000000000")
DIGITS_OFFSET = ROW.index(b"111")

BLOCK_METERS = 1 << 20
MAX_METERS = BLOCK_METERS << 16
SUFFIX_BITS = 24
LOCALLY_ADMINISTERED = 0x02 << 40

# A reading is a level from 0 to 899: its first digit is a random byte modulo 9, the others are bytes modulo 10.
# The bytes above the last whole multiple (252 and 250) would favour the low digits and are dropped.
DIGIT_TABLES = tuple(bytes(ord("0") + byte % base for byte in range(256)) for base in (9, 10, 10))
UNEVEN_BYTES = tuple(bytes(range(256 - 256 % base, 256)) for base in (9, 10, 10))

CONTENT_TYPES = {False: "application/x-ndjson", True: "application/gzip"}  # by --gzip

DEFAULT_BUCKET = "smart-meter-fake-data-t"
DEFAULT_TEMP_DIR = "/mnt/sm-disk/"
SPOOL = re.compile(r"\.wattif-(\d+)-\w+")  # the directory of a run's process, in the temp directory
UNFINISHED = re.compile(r"\.[0-9a-f]+\.part")
SPOOLED = re.compile(rf"([0-9A-F]{{12}}|meters-\d+-\d+)\.ndjson(\.gz)?|{UNFINISHED.pattern}")
DISK_BLOCK = 4096  # what a file system rounds a file up to, and what a directory takes
UPLOAD_CHUNK_BYTES = 16 << 20  # objects over 8 MiB go up in chunks; measured: larger ones cost page faults
REQUEST_TIMEOUT = 60.0
TICK_SECONDS = 0.1  # between looks at what has happened, and between live lines
LATENCY_BASE = 1.05  # each bucket of the latency histogram is 5% wide
PACED_SECONDS = 10  # of uploads that a paced run has in flight, so that it stops soon after a signal
NAMED = 20  # of what each process of --verify finds
SLOTS = 60  # of the throughput over a run
RATE_SECONDS = 10  # over which the live line's MB/s are taken
LOG_SECONDS = 30  # between progress lines where there is no terminal
ERASE = "\r\x1b[K"  # the live line


class RunError(Exception):
    """A run cannot begin or go on; the message is one line that says what to do."""

    def __init__(self, message: str, status: int = 2) -> None:
        """Take the message and the exit status: 2 for bad input, for which nothing was done."""
        super().__init__(message)
        self.status = status


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
    bucket: str | None  # without one the files stay in the directory
    directory: str
    task_index: int
    task_count: int
    task_source: str
    resume: bool
    verify: bool
    batch_size: int
    max_disk: int | None
    processes: int
    write_workers: int
    upload_workers: int
    transfer_workers: int
    retry_timeout: int
    rps_limit: float | None

    @property
    def days(self) -> range:
        """The days of the run, both ends included, as proleptic Gregorian ordinals."""
        return range(self.start.toordinal(), self.end.toordinal() + 1)

    @property
    def rows(self) -> int:
        """Readings of one meter in one day."""
        return DAY_SECONDS // self.interval

    @property
    def day_files(self) -> range:
        """The indices of a day's files, those of all tasks."""
        return range(-(-self.meters // self.meters_per_file))

    @property
    def slices(self) -> list[range]:
        """Each process's share of this task's files of a day: contiguous, none of them empty."""
        files = share(self.day_files, self.task_index, self.task_count)
        count = min(self.processes, len(files))
        if not self.verify:
            room = (self.max_disk or sys.maxsize) // self.file_disk
            count = min(count, room, math.ceil(self.rps_limit or sys.maxsize))
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

    def file_bytes(self, meters: int) -> int:
        """The size of a file of so many meters: exact, or with --gzip what it never exceeds."""
        size = meters * self.rows * ROW_BYTES
        return size + size // 1000 + 64 if self.gzip else size

    @property
    def file_disk(self) -> int:
        """The most bytes of disk that a file takes; one to be uploaded with a directory and the one above that."""
        size = self.file_bytes(min(self.meters_per_file, self.meters))
        return (-(-size // DISK_BLOCK) + 2 * bool(self.bucket)) * DISK_BLOCK

    @property
    def batches(self) -> int:
        """The most batches that a process has in flight: one for each thread that writes or uploads one."""
        return self.write_workers + self.upload_workers

    def files_on_disk(self, files: range) -> int:
        """The most files of a slice that wait on disk at once; where files are large, they make smaller batches."""
        room = sys.maxsize if self.verify else (self.max_disk or sys.maxsize) // len(self.slices) // self.file_disk
        in_batches = self.batches * max(1, self.batch_size // self.meters_per_file)
        return min(room, in_batches, len(self.days) * len(files))

    @property
    def disk_bytes(self) -> int:
        """The most disk that this task uses at once."""
        if self.bucket:
            return self.file_disk * sum(map(self.files_on_disk, self.slices))
        return self.file_disk * self.objects + len(self.days) * DISK_BLOCK

    @property
    def destination(self) -> str:
        """Where the objects go, for people."""
        return f"gs://{self.bucket}" if self.bucket else self.directory

    @property
    def again(self) -> str:
        """How to go on after a run that ended early, for people."""
        return "run it again" if self.verify else "run it again with --resume"


def share(whole: range, index: int, count: int) -> range:
    """The index-th of `count` contiguous shares of a range, whose lengths differ by one at the most."""
    return whole[len(whole) * index // count : len(whole) * (index + 1) // count]


# The fleet


def draw_fleet(seed: int, meters: range, by_name_among: int = 0, stopping: Sequence[str] = ()) -> array[int]:
    """Draw a contiguous part of the fleet that the seed determines, by the fleet indices of its meters.

    Returns their addresses (48-bit integers) as an array of 8 bytes each, in the order of their indices. With
    `by_name_among`, the number of meters of the whole fleet, those of a block are in the order of their names instead:
    all of them are drawn for that, and the meter after the last one follows, unless it is of another block.

    Each block has a generator and a filter of its own, of the block's capacity whatever the size of the fleet, so that
    a larger fleet begins with the smaller one and no block before the first meter's is drawn. One probe of a filter
    with 8 bits for each meter rejects at most every eighth number that is new; a number that was drawn before is
    always rejected. What is drawn ends with a block where the run is to stop.
    """
    log.debug("drawing meters %d to %d", meters[0], meters[-1])
    fleet = array("Q")
    shift = SUFFIX_BITS - (8 if by_name_among else 0)  # 256 parts are sorted in less memory than one
    for block in range(meters.start // BLOCK_METERS, -(-meters.stop // BLOCK_METERS)):
        if stopping:
            break
        # The drawn number is random already and needs no hash to say which bit of the filter is its own.
        bloom = BloomFilter(BLOCK_METERS, 0.02, lambda bloom, suffix: (suffix % bloom.num_bits_m,))
        draw = random.Random(f"{seed}/{block}").getrandbits
        parts = [array("I") for _ in range(1 << SUFFIX_BITS - shift)]
        for _ in range(min(BLOCK_METERS, (by_name_among or meters.stop) - block * BLOCK_METERS)):
            suffix = draw(SUFFIX_BITS)
            while suffix in bloom:
                suffix = draw(SUFFIX_BITS)
            bloom.add(suffix)
            parts[suffix >> shift].append(suffix)
        for part in parts:
            fleet.extend(map(block_address(block).__or__, sorted(part) if by_name_among else part))
    skipped = meters.start % BLOCK_METERS
    del fleet[skipped + len(meters) + bool(by_name_among) :], fleet[:skipped]
    return fleet


def block_address(block: int) -> int:
    """Return the lowest address of a block."""
    return LOCALLY_ADMINISTERED | block << SUFFIX_BITS


class Entry(NamedTuple):
    """What the destination has under a name; the CRC32C only of an object, else -1."""

    name: str
    size: int
    checksum: int


class File(NamedTuple):
    """A file: its name, the addresses of its meters, and what was found under the name, if anything was looked for."""

    name: str
    meters: array[int]
    found: Entry | None = None


def name_files(run: Run, files: range, fleet: array[int]) -> Iterator[File]:
    """Yield the files of a slice, made of the part of the fleet that was drawn for it, in the order of their names.

    A file of several meters is named by its index. Those of one meter are in the order of their names within a block:
    then a slice is one range of names, in which no other slice has any, and meters that follow one another have much
    of their IDs in common.
    """
    first = files.start * run.meters_per_file
    for index in files:
        meters = run.meters_of(range(index, index + 1))
        addresses = fleet[meters.start - first : meters.stop - first]
        stem = f"meters-{meters[0]:09d}-{meters[-1]:09d}" if run.meters_per_file > 1 else f"{addresses[0]:012X}"
        yield File(f"{stem}.ndjson.gz" if run.gzip else f"{stem}.ndjson", addresses)


def bound_names(run: Run, files: range, fleet: array[int]) -> tuple[str, str | None]:
    """Bound a slice's names, from one to before the other; the first and last slice have all before and after."""

    def bound(index: int) -> str:
        if run.meters_per_file > 1:
            return f"meters-{index * run.meters_per_file:09d}"
        block, place = divmod(index, BLOCK_METERS)
        return f"{fleet[index - files.start] if place else block_address(block):012X}"

    last = run.day_files.stop
    return bound(files.start) if files.start else "", None if files.stop == last else bound(files.stop)


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


def draw_digits(key: str, rows: int) -> list[bytearray]:
    """Draw the three digits of `rows` readings as columns; a key always gives the same digits.

    The random bytes are SHAKE128 of the key (FIPS 202). The margin over the expected 2.4% of uneven bytes is
    six standard deviations for a day of readings; where it is not enough, more are drawn.
    """
    size = rows * 256 // 250 + math.isqrt(rows)
    while True:
        drawn = bytearray(hashlib.shake_128(key.encode()).digest(len(DIGIT_TABLES) * size))
        columns = []
        for start, table, uneven in zip(range(0, len(drawn), size), DIGIT_TABLES, UNEVEN_BYTES):
            column = drawn[start : start + size].translate(table, uneven)
            del column[rows:]
            columns.append(column)
        if all(len(column) == rows for column in columns):
            return columns
        size *= 2


def generate_smart_meter_readings_for_day(
    day: date, template: bytes, meters: Iterable[int], seed: int
) -> Iterator[bytearray]:
    """Yield the rows of each meter for one day, stamped column by column into copies of the day's template.

    Every item is the same buffer, valid until the next one is asked for. An ID differs little from the one
    before it (meters of a block share six digits), so only the columns that change are written.
    """
    buffer = bytearray(template)
    rows = len(template) // ROW_BYTES
    columns = {digit: bytearray([digit]) * rows for digit in b"0123456789ABCDEF"}
    stamped, day_text = template[ID_OFFSET : ID_OFFSET + 12], str(day)
    for address in meters:
        meter_id = b"%012X" % address
        for offset, (old, new) in enumerate(zip(stamped, meter_id), ID_OFFSET):
            if old != new:
                buffer[offset::ROW_BYTES] = columns[new]
        stamped = meter_id
        for offset, column in enumerate(draw_digits(f"{seed}/{address:012X}/{day_text}", rows), DIGITS_OFFSET):
            buffer[offset::ROW_BYTES] = column
        yield buffer


def compress(chunks: Iterable[bytearray]) -> Iterator[bytes]:
    """Compress as gzip level 1 does, without a time stamp in the header, holding one chunk at a time."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()


# A batch: written by one pool, uploaded and deleted by the other


class Batch(NamedTuple):
    """Files of one day for one call of the transfer manager, or to be verified."""

    day: date
    folder: str  # where they are or will be
    template: bytes  # the day's
    files: Sequence[File]
    spare: list[str]  # local files that were uploaded, to be written over


@dataclass
class Outcome:
    """What became of some files; outcomes add up to that of the run."""

    counts: Counter[Any] = field(default_factory=Counter)  # by kind, ("status", HTTP status) or ("latency", exponent)
    failures: list[str] = field(default_factory=list)
    fatal: str = ""

    def add(self, other: Outcome) -> None:
        """Add what became of other files. Where neither can go on, the first reason stands."""
        self.counts.update(other.counts)
        self.failures.extend(other.failures)
        self.fatal = self.fatal or other.fatal


Report = Callable[[Outcome], None]


def batch_contents(run: Run, batch: Batch) -> Iterator[Iterable[Any]]:
    """Yield the content of each file of a batch, as chunks to be used up before the next file."""
    meters = itertools.chain.from_iterable(file.meters for file in batch.files)
    readings = generate_smart_meter_readings_for_day(batch.day, batch.template, meters, run.seed)
    for file in batch.files:
        chunks = itertools.islice(readings, len(file.meters))
        yield compress(chunks) if run.gzip else chunks


def write_file(path: str, part: str, chunks: Iterable[bytes | bytearray], mode: int) -> int:
    """Write a file that is whole whenever its name exists: it has the name `part` until the last byte is in.

    Returns its size in bytes. Raises OSError where the file system refuses; the unfinished file is then removed.
    """
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, mode)
    try:
        with open(descriptor, "wb") as file:
            file.writelines(chunks)
            size = file.tell()
            if os.fstat(descriptor).st_size > size:  # it was a longer file
                file.truncate()
        os.rename(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    return size


def unfinished(folder: str) -> str:
    """Return a name for a file that is not whole; no two tasks on a shared disk have the same one."""
    return os.path.join(folder, f".{os.urandom(8).hex()}.part")


def write_batch(run: Run, batch: Batch) -> list[int]:
    """Write the files of a batch and return their sizes. Raises OSError where the disk refuses."""
    started = time.perf_counter()
    with contextlib.suppress(FileExistsError):
        os.mkdir(batch.folder, 0o700 if run.bucket else 0o777)
    sizes = []
    for file, chunks in zip(batch.files, batch_contents(run, batch)):
        part = unfinished(batch.folder)
        with contextlib.suppress(IndexError):
            part = batch.spare.pop()
        sizes.append(write_file(os.path.join(batch.folder, file.name), part, chunks, 0o600 if run.bucket else 0o666))
    log.debug("%s: wrote %d files in %.3f s", batch.day, len(sizes), time.perf_counter() - started)
    return sizes


def deliver_batch(run: Run, bucket: Bucket | None, batch: Batch, written: Future[list[int]]) -> Outcome:
    """Wait until a batch is written, upload it if there is a bucket, delete what arrived, and count.

    What is deleted becomes a spare file, to be written over. A new file instead costs 0.25 to 0.85 ms of CPU more, as
    measured on ext4, which passes over the inodes of files that were deleted within the last minute.
    """
    sizes = written.result()
    started = time.perf_counter()
    errors = upload_batch(run, bucket, batch) if bucket else itertools.repeat(None)
    outcome = Outcome()
    for file, size, error in zip(batch.files, sizes, errors):
        path = os.path.join(batch.folder, file.name)
        if error:
            outcome.add(Outcome(Counter(failed=1), [f"{path}: {explain(error)}"], refusal(error, run)))
            continue
        outcome.counts.update(objects=1, readings=run.rows * len(file.meters), bytes=size)
        if bucket:
            spare = unfinished(run.directory)
            try:
                os.rename(path, spare)
                batch.spare.append(spare)
            except FileNotFoundError:
                log.debug("%s was deleted by somebody else", path)
            except OSError as refused:
                reason = f"cannot delete {path}: {refused.strerror}; see to it, then {run.again}"
                outcome.add(Outcome(fatal=reason))
    if bucket:
        done, seconds = outcome.counts["objects"], time.perf_counter() - started
        log.debug("%s: uploaded %d of %d files in %.3f s", batch.day, done, len(sizes), seconds)
        with contextlib.suppress(OSError):  # it holds a file whose upload failed
            os.rmdir(batch.folder)
    return outcome


# Uploading


class Outage(OSError):
    """No request has succeeded for --retry-timeout seconds; the library does not retry this one."""


@dataclass
class Gauge:
    """What the HTTP session of a process shares with its pipeline: pace and patience in, answers out."""

    patience: float  # --retry-timeout
    limit: float | None = None  # --rps-limit
    turns: IO[bytes] | None = None  # a file of all processes, with the time of the last upload's turn
    counts: Counter[Any] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)
    last: threading.local = field(default_factory=threading.local)  # the thread's last request
    succeeded: float = 0.0  # when a request last was
    failing: dict[Any, float] = field(default_factory=dict)  # the calls that failed since, and from when on

    def begin(self, request: Any) -> None:
        """See to a request that is about to be sent: count a retry, let uploads begin evenly, at their turn.

        Raises Outage where several calls have failed and none succeeded for too long.
        """
        # The first of these headers has an ID of the library's call.
        call = (request.url, request.headers.get("x-goog-api-client"), request.headers.get("content-range"))
        again = call == getattr(self.last, "call", None)
        with self.lock:
            turn = time.monotonic()
            if len(self.failing) > 1 and turn - min(self.failing.values()) > self.patience:
                raise Outage(f"nothing was accepted for {self.patience:.0f} s")
            self.counts["retries"] += again
            if self.limit and self.turns and request.method == "POST" and not again:
                fcntl.lockf(self.turns, fcntl.LOCK_EX)  # the kernel unlocks it where a process is killed
                try:
                    last = array("d", os.pread(self.turns.fileno(), 8, 0))[0]
                    turn = max(last + 1 / self.limit, turn)
                    os.pwrite(self.turns.fileno(), array("d", [turn]).tobytes(), 0)
                finally:
                    fcntl.lockf(self.turns, fcntl.LOCK_UN)
        time.sleep(max(0.0, turn - time.monotonic()))
        self.last.call, self.last.started = call, time.monotonic()

    def end(self, request: Any, status: int = 0) -> None:
        """Count how the thread's last request was answered; status 0 stands for not at all."""
        size, seconds = len(request.body or b""), time.monotonic() - self.last.started  # without the wait for a turn
        with self.lock:
            self.counts["status", status] += 1
            if status and request.method != "GET":
                self.counts["latency", round(math.log(max(seconds, 1e-6), LATENCY_BASE))] += 1
            if status in (200, 308) and size:
                self.counts["sent_bytes"] += size
                self.counts["arrived"] += status == 200 and (request.method == "PUT" or "=multipart" in request.url)
            if status in (0, 408, 429) or status >= 500:
                self.failing.setdefault(self.last.call, max(self.last.started, self.succeeded))
            else:
                self.succeeded = time.monotonic()
                self.failing.clear()

    def drain(self) -> Outcome:
        """Return what was counted since the last time."""
        with self.lock:
            counts, self.counts = self.counts, Counter()
        return Outcome(counts)


def open_bucket(run: Run, credentials: Any, gauge: Gauge) -> Bucket | None:
    """Return the bucket, if there is one, of a client of this process's own with a connection for each upload."""
    if not run.bucket:
        return None
    # The library otherwise reads the bucket's metadata in the background, for traces that nobody asked for and
    # with a permission that uploads do not need.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google.cloud import storage
    from requests.adapters import HTTPAdapter

    class GaugedAdapter(HTTPAdapter):
        def send(self, request: Any, *args: Any, **kwargs: Any) -> Any:
            gauge.begin(request)
            try:
                return super().send(request, *args, **kwargs)
            except Exception:
                gauge.end(request)
                raise

    client = storage.Client(project=None, credentials=credentials)
    session = client._http  # as the library's documentation does to widen the pool of connections
    for scheme in ("https://", "http://"):
        session.mount(scheme, GaugedAdapter(pool_maxsize=run.upload_workers * run.transfer_workers))
    session.hooks["response"].append(lambda answer, **_: gauge.end(answer.request, answer.status_code))
    # Otherwise requests looks for proxies, certificates and a .netrc anew on every request.
    found = session.merge_environment_settings(client.api_endpoint, {}, None, None, None)
    session.proxies, session.verify, session.trust_env = found["proxies"], found["verify"], False
    return client.bucket(run.bucket)


def request_options(run: Run) -> dict[str, Any]:
    """Say how long a request may take and how long it is tried again, by the library's exponential backoff."""
    from google.cloud.storage import retry

    timeout = min(REQUEST_TIMEOUT, run.retry_timeout / 3)  # so that a request without an answer is tried again
    return {"timeout": timeout, "retry": retry.DEFAULT_RETRY.with_timeout(run.retry_timeout)}


def upload_batch(run: Run, bucket: Bucket, batch: Batch) -> list[Exception | None]:
    """Upload the files of a batch and return, for each, the error that kept it from arriving."""
    from google.cloud.storage import transfer_manager

    return transfer_manager.upload_many_from_filenames(
        bucket,
        [file.name for file in batch.files],
        source_directory=batch.folder,
        blob_name_prefix=f"dt={batch.day}/",
        blob_constructor_kwargs={"chunk_size": UPLOAD_CHUNK_BYTES},
        upload_kwargs={"content_type": CONTENT_TYPES[run.gzip], **request_options(run)},
        worker_type=transfer_manager.THREAD,
        max_workers=run.transfer_workers,
    )


def explain(error: BaseException) -> str:
    """Say in one short line what an error is: the server's own words, if it sent any."""
    error = getattr(error, "cause", None) or error  # of a RetryError
    text = f"{type(error).__name__}: {error}"
    response = getattr(error, "response", None)
    if response is not None:
        text = f"HTTP {response.status_code}"
        with contextlib.suppress(ValueError, TypeError, KeyError):
            text += f": {response.json()['error']['message']}"
    line = " ".join(text.split())
    return line if len(line) < 200 else f"{line[:200]}..."


def refusal(error: BaseException, run: Run) -> str:
    """Say what to do where an error means that every other request would fail as well; otherwise nothing."""
    from google.auth.exceptions import GoogleAuthError, TransportError

    code, response = getattr(error, "code", None), getattr(error, "response", None)
    if isinstance(error, GoogleAuthError) and not isinstance(error, TransportError):
        code = 401
    if code == 404 and "upload_id=" in str(error):  # only this upload's session is gone
        return ""
    remedies = {
        401: "the credentials were not accepted: log in again, or give the VM a service account",
        403: f"no permission to create or overwrite objects in gs://{run.bucket}: grant roles/storage.objectUser "
        "on it; with a role that only creates, --resume skips what is there",
        404: f"there is no bucket gs://{run.bucket}: create it, or name another one with --bucket",
    }
    if response is not None and response.request.method == "GET":
        remedies[403] = f"no permission to list gs://{run.bucket}: grant roles/storage.objectViewer on it"
    return f"{remedies[code]} ({explain(error)})" if code in remedies else ""


def end_of_run(error: Exception, run: Run) -> Outcome:
    """Say why a run cannot go on, and what to do: disk, memory, threads or a listing were refused to it.

    Raises any other error again.
    """
    if not isinstance(error, (OSError, MemoryError, RuntimeError)) and not type(error).__module__.startswith("google."):
        raise error
    reason = refusal(error, run) if run.bucket else ""
    advice = f"see to it, or lower --meters or the numbers of workers, then {run.again}"
    return Outcome(fatal=reason or f"cannot go on: {explain(error)}; {advice}")


# What is there already


def measure(chunks: Iterable[bytes | bytearray]) -> tuple[int, int]:
    """Return the size and the CRC32C of a content."""
    import google_crc32c  # what the client library computes it with

    size = checksum = 0
    for chunk in chunks:
        size += len(chunk)
        checksum = google_crc32c.extend(checksum, bytes(chunk))
    return size, checksum


def differ(kind: str, day: date, name: str) -> Outcome:
    """Return that a name is missing, different or unexpected."""
    return Outcome(Counter({kind: 1}), [f"{kind}: dt={day}/{name}"])


def verify_batch(run: Run, batch: Batch) -> Outcome:
    """Compare what was found under the names of a batch with what a run would put there: size and CRC32C."""
    outcome = Outcome()
    for file, chunks in zip(batch.files, batch_contents(run, batch)):
        made, found = measure(chunks), file.found[1:]
        if not run.bucket and made[0] == found[0]:
            with contextlib.suppress(OSError), open(os.path.join(batch.folder, file.name), "rb") as opened:
                found = measure(iter(functools.partial(opened.read, 1 << 20), b""))
        if made == found:
            outcome.counts.update(objects=1, readings=run.rows * len(file.meters), bytes=made[0])
        else:
            outcome.add(differ("different", batch.day, file.name))
    return outcome


# The pipeline of one process


@dataclass(frozen=True)
class Pipeline:
    """What a process works with: its slice of the run's files, the bucket, if there is one, and who is told."""

    run: Run
    files: range
    fleet: array[int]  # as draw_fleet gives it for the meters of these files
    bucket: Bucket | None
    stopping: Sequence[str]  # not empty where the run is to stop
    report: Report


def list_day(pipeline: Pipeline, day: date) -> Iterator[Entry]:
    """Yield what a day has within the names of the slice, in their order. Raises what the client or disk does."""
    run, bucket, prefix = pipeline.run, pipeline.bucket, f"dt={day}/"
    first, last = bound_names(run, pipeline.files, pipeline.fleet)

    def is_own(name: str) -> bool:
        return first <= name and (last is None or name < last)

    if bucket:
        bounds = {"start_offset": prefix + first, "end_offset": prefix + last if last else None}
        wanted = "items(name,size,crc32c),nextPageToken"
        blobs = bucket.client.list_blobs(bucket, prefix=prefix, fields=wanted, **bounds, **request_options(run))
        entries = (
            Entry(blob.name[len(prefix) :], blob.size, int.from_bytes(base64.b64decode(blob.crc32c or ""), "big"))
            for blob in blobs
        )
    else:
        folder = os.path.join(run.directory, prefix)
        names = sorted(filter(is_own, os.listdir(folder))) if os.path.isdir(folder) else []
        entries = (Entry(name, os.lstat(folder + name).st_size, -1) for name in names if not UNFINISHED.fullmatch(name))
    yield from (entry for entry in entries if is_own(entry.name))  # not every emulator heeds the bounds


def choose_files(pipeline: Pipeline, day: date) -> Iterator[File]:
    """Yield the files of a day that are to be made or verified, and report what else the destination shows."""
    run, report, own = pipeline.run, pipeline.report, name_files(pipeline.run, pipeline.files, pipeline.fleet)
    if not (run.resume or run.verify):
        yield from own
        return
    name_of, skipped = operator.attrgetter("name"), Outcome(Counter(skipped=1))
    both = heapq.merge(own, list_day(pipeline, day), key=name_of)
    for name, same in itertools.groupby(both, name_of):
        known = {type(item): item for item in same}
        file, found = known.get(File), known.get(Entry)
        whole = file and found and (found.size == run.file_bytes(len(file.meters)) or (run.gzip and found.size))
        if pipeline.stopping:
            return
        if run.verify and not (file and found):
            report(differ("missing" if file else "unexpected", day, name))
        elif run.resume and whole:
            report(skipped)
        elif file:
            yield file._replace(found=found)


def plan_batches(pipeline: Pipeline, batch_files: int, spare: list[str]) -> Iterator[Batch]:
    """Yield day by day, batch by batch, what is to be made or verified."""
    numbers = itertools.count()
    for day in map(date.fromordinal, pipeline.run.days):
        template = render_day_template(day, pipeline.run.interval)
        files = choose_files(pipeline, day)
        while batch := [*itertools.islice(files, batch_files)]:
            name = f"{os.getpid()}.{next(numbers)}.dt={day}" if pipeline.bucket else f"dt={day}"
            yield Batch(day, os.path.join(pipeline.run.directory, name), template, batch, spare)
        if pipeline.stopping:
            return


def run_pipeline(pipeline: Pipeline) -> None:
    """Generate or verify a slice of the files day by day, batch by batch, and report what became of each batch.

    `free` counts the files that may still be put on disk. A batch takes its number away, what was delivered
    comes back, and a file whose upload failed keeps its place: so the announced disk use is never passed. The
    run ends early where an outcome is fatal, and where as many files in a row failed as a batch has.
    """
    run = pipeline.run
    free, failed_in_a_row = run.files_on_disk(pipeline.files), 0
    in_flight, paced = free, run.rps_limit and not run.verify
    if paced:  # it is to stop soon after a signal, too
        in_flight = max(1, int(PACED_SECONDS * run.rps_limit / len(run.slices)))
    enough = max(2, free // run.batches)  # failures in a row
    batch_files = max(1, min(free // run.batches, in_flight // run.upload_workers))
    if paced and batch_files > run.transfer_workers:  # no thread idle in a batch's last round
        batch_files -= batch_files % run.transfer_workers
    pending: dict[Future[Outcome], int] = {}
    spare: list[str] = []
    settled = 0.0  # when

    def report(outcome: Outcome) -> None:
        pipeline.report(outcome)
        if time.monotonic() > settled + TICK_SECONDS:  # many files may be skipped before there is a batch
            settle(0.0)

    def settle(seconds: float = TICK_SECONDS) -> None:
        nonlocal free, failed_in_a_row, settled
        done, _ = wait(pending, seconds, FIRST_COMPLETED)
        settled = time.monotonic()
        pipeline.report(Outcome())
        for future in done:
            error = future.exception()
            outcome = end_of_run(error, run) if error else future.result()
            free += pending.pop(future) - outcome.counts["failed"]
            failed_in_a_row = 0 if outcome.counts["objects"] else failed_in_a_row + outcome.counts["failed"]
            if outcome.failures and failed_in_a_row >= enough:
                reason = f"nothing arrives in {run.destination} any more; see to it, then {run.again}"
                outcome.add(Outcome(fatal=f"{reason} (the last error was {outcome.failures[-1]})"))
            pipeline.report(outcome)

    with contextlib.ExitStack() as stack:
        write_executor = stack.enter_context(ThreadPoolExecutor(run.write_workers, "write"))
        upload_executor = stack.enter_context(ThreadPoolExecutor(run.upload_workers, "upload"))
        try:
            for batch in plan_batches(replace(pipeline, report=report), batch_files, spare):
                count = len(batch.files)
                while pending and (len(pending) == run.batches or count > min(free, in_flight - sum(pending.values()))):
                    settle()
                if not pipeline.stopping and free < count:
                    reason = f"files whose upload failed fill the disk; see to the cause, then {run.again}"
                    pipeline.report(Outcome(fatal=reason))
                if pipeline.stopping:
                    break
                free -= count
                work = write_executor.submit(verify_batch if run.verify else write_batch, run, batch)
                if not run.verify:
                    work = upload_executor.submit(deliver_batch, run, pipeline.bucket, batch, work)
                pending[work] = count
        finally:
            while pending:
                settle()
            for path in spare:
                with contextlib.suppress(OSError):  # the next run clears it
                    os.unlink(path)


# A run: its directory, its processes, its signals


def run_slice(
    run: Run, credentials: Any, turns: IO[bytes] | None, index: int, stopping: list[str], report: Report
) -> None:
    """Do or verify the index-th slice; what makes that impossible ends the run. Reports go on together, every tick."""
    gauge, told, due, named = Gauge(run.retry_timeout, run.rps_limit, turns), Outcome(), 0.0, 0

    def tell(outcome: Outcome, now: bool = False) -> None:
        nonlocal told, due, named
        if run.verify:  # the counts tell how many there are
            del outcome.failures[max(0, NAMED - named) :]
            named += len(outcome.failures)
        told.add(outcome)
        if outcome.fatal:
            stopping.append(outcome.fatal)
        if now or outcome.fatal or time.monotonic() > due:
            told.add(gauge.drain())
            report(told)
            told, due = Outcome(), time.monotonic() + TICK_SECONDS

    try:
        bucket = open_bucket(run, credentials, gauge)
        files = run.slices[index]
        fleet = draw_fleet(run.seed, run.meters_of(files), run.meters if run.meters_per_file == 1 else 0, stopping)
        if not stopping:
            run_pipeline(Pipeline(run, files, fleet, bucket, stopping, tell))
    except Exception as error:
        tell(end_of_run(error, run))
    tell(Outcome(), now=True)


def clear_spools(directory: str) -> None:
    """Delete the files and directories that earlier runs left in the temp directory, and nothing else."""
    spools = [os.path.join(directory, name) for name in os.listdir(directory) if SPOOL.fullmatch(name)]
    found = [place for spool in spools if not os.path.islink(spool) for place in os.walk(spool, topdown=False)]
    left = [os.path.join(folder, name) for folder, _, names in found for name in names if SPOOLED.fullmatch(name)]
    if left:
        log.warning("clearing %d files that an earlier run left in %r", len(left), directory)
    for path in left:
        os.unlink(path)
    for folder, _, _ in found:
        with contextlib.suppress(OSError):  # something else is in it
            os.rmdir(folder)


@contextlib.contextmanager
def claim_directory(run: Run) -> Iterator[tuple[Run, IO[bytes] | None]]:
    """See that the run's directory can be written and has room; yield a run that uses it, and a file for its turns.

    Files that wait for their upload lie in a directory of the run's own below the temp directory, which one run at
    a time has. What an earlier run left there is cleared, and nothing else is ever touched. Files whose upload fails
    stay; otherwise the temp directory is left as it was found. Raises RunError where the directory cannot be had.
    """
    directory, needed, advice = run.directory, run.disk_bytes, "lower --batch-size or --max-disk"
    if not run.bucket:
        advice = "ask for fewer days or meters"
        if run.resume or run.gzip:  # some files are there already; others compress to 8% at the best
            needed = 0 if run.resume else run.readings * ROW_BYTES // 12
    flag = f"--{'temp' if run.bucket else 'output'}-dir {directory!r}"
    with contextlib.ExitStack() as stack:
        try:
            os.makedirs(directory, exist_ok=True)
            turns = stack.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0))
            turns.write(array("d", [-math.inf]).tobytes())
            if run.rps_limit:
                fcntl.lockf(turns, fcntl.LOCK_EX)  # not every file system can
                fcntl.lockf(turns, fcntl.LOCK_UN)
            if run.bucket:
                lock = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, lock)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a crash leaves no lock behind
                clear_spools(directory)
            free = shutil.disk_usage(directory).free
            if free < needed:
                raise RunError(f"{flag} has {in_bytes(free)} free, {in_bytes(needed)} are needed; {advice}")
            if run.bucket:
                run = replace(run, directory=tempfile.mkdtemp(prefix=f".wattif-{os.getpid()}-", dir=directory))
        except BlockingIOError:
            spools = filter(None, map(SPOOL.fullmatch, os.listdir(directory)))
            holders = " or ".join(f"process {spool[1]}" for spool in spools) or "another run"
            raise RunError(f"{flag} is in use by {holders}; wait or give another one", 1) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(f"{flag} cannot be created or written: {reason}; name a directory of yours") from None
        yield run, turns
        if run.bucket:
            with contextlib.suppress(OSError):  # files whose upload failed are in it
                os.rmdir(run.directory)


def find_credentials() -> Any:
    """Find the Application Default Credentials, or None for an emulator. Raises RunError where there are none."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    if emulator:
        if re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:[1-9][0-9]{,4})?(/.*)?", emulator):
            return None
        raise RunError("STORAGE_EMULATOR_HOST must be like http://localhost:9023; with --bucket it is used")
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    try:
        return google.auth.default()[0]
    except (GoogleAuthError, OSError, ValueError, AttributeError) as error:
        raise RunError(
            f"--bucket needs Google credentials ({explain(error)}): run 'gcloud auth application-default login', "
            "give the VM a service account, or keep the files with --output-dir"
        ) from None


def keep_freed_memory() -> None:
    """Let glibc keep the memory of finished uploads for the next ones; elsewhere do nothing.

    Otherwise every buffer of an object's size is a new mapping, page by page. See mallopt(3) for the numbers.
    """
    mmap_threshold, trim_threshold, top_pad, arena_max = (-3, 32 << 20), (-1, 512 << 20), (-2, 16 << 20), (-8, 1)
    with contextlib.suppress(OSError, AttributeError):
        for parameter in (mmap_threshold, trim_threshold, top_pad, arena_max):
            ctypes.CDLL("libc.so.6").mallopt(*parameter)


def run_child(work: Callable[..., None], index: int, ours: Connection, others: Sequence[Connection]) -> None:
    """Be one of several processes: do the index-th slice and send what became of each batch.

    Signals are the parent's to handle. Whatever it sends means to stop; when it is gone, so is this process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for other in others:  # a copy would hide that the parent is gone
        other.close()
    stopping: list[str] = []

    def follow_parent() -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                stopping.append(ours.recv())
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    work(index, stopping, ours.send)


def run_children(run: Run, work: Callable[..., None], stopping: list[str], report: Report) -> None:
    """Do each slice in a process of its own, started before any thread or client exists.

    However this function ends, the connections are closed, and a child without one ends too.
    """
    if run.bucket:
        import google.cloud.storage.transfer_manager  # noqa: F401 - once for all children
    context = multiprocessing.get_context("fork")
    children: dict[Connection, tuple[range, multiprocessing.process.BaseProcess]] = {}
    with contextlib.ExitStack() as stack:
        try:
            for index, files in enumerate(run.slices):
                ours, theirs = map(stack.enter_context, context.Pipe())
                child = context.Process(target=run_child, args=(work, index, theirs, [ours, *children]), daemon=True)
                child.start()
                theirs.close()
                children[ours] = (files, child)
        except OSError as error:
            reason = f"cannot start {len(run.slices)} processes ({error.strerror}): lower --processes"
            report(Outcome(fatal=reason))
            return
        while children:
            for connection in children if stopping else ():
                with contextlib.suppress(OSError):
                    connection.send("stop")
            report(Outcome())
            for connection in multiprocessing.connection.wait(list(children), TICK_SECONDS):
                try:
                    outcome = connection.recv()
                except (EOFError, OSError):
                    files, child = children.pop(connection)
                    child.join()
                    outcome = Outcome()
                    if child.exitcode:
                        ending = f"their process ended with exit code {child.exitcode}; {run.again}"
                        outcome.failures.append(f"files {files[0]} to {files[-1]} of each day: {ending}")
                if outcome.fatal:
                    stopping.append(outcome.fatal)
                report(outcome)


def execute(run: Run, credentials: Any, turns: IO[bytes] | None, progress: Progress) -> int:
    """Do a whole run, with its progress and report, and return its exit status.

    The first SIGINT or SIGTERM lets the batches in flight finish; the second ends the process at once.
    """
    stopping: list[str] = []
    signals: list[int] = []

    def stop(number: int, frame: Any) -> None:
        signals.append(number)
        told = "stopping: the batches in flight finish; another signal stops at once\n" if len(signals) == 1 else ""
        # Not by say(), whose write the signal may have interrupted.
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{ERASE if on_terminal() else ''}{told}".encode())
        if not told:
            os._exit(128 + number)
        stopping.append("signal")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    keep_freed_memory()
    work = functools.partial(run_slice, run, credentials, turns)
    if len(run.slices) > 1:
        run_children(run, work, stopping, progress.update)
    elif run.slices:
        work(0, stopping, progress.update)
    return progress.conclude(signals[0] if signals else 0)


# Reporting: standard error is for people, standard output for programs


def on_terminal() -> bool:
    """Say whether standard error is a terminal on which a line can be erased."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def show(text: str) -> None:
    """Write text to standard error in place of the live line; that its disk is full or its reader gone ends no run."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{ERASE if on_terminal() else ''}{text}")
        sys.stderr.flush()


def say(line: str) -> None:
    """Tell a person one line, with control characters escaped."""
    show("".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in line) + "\n")


def in_bytes(count: float) -> str:
    """Write a number of bytes with three significant digits in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def describe_plan(run: Run) -> None:
    """Say what a run will do: days, meters, readings, objects, bytes, disk, destination."""
    size = run.readings * ROW_BYTES
    inexact = "at most " if run.gzip or run.meters % run.meters_per_file else ""
    say(f"days         {run.start} to {run.end}")
    say(f"meters       {run.meters:,}, a reading every {run.interval} s, seed {run.seed}")
    if run.task_source:
        say(f"task         {run.task_index} of {run.task_count:,} (from {run.task_source})")
    say(f"readings     {run.readings:,}")
    say(f"objects      {run.objects:,} of {inexact}{run.file_bytes(min(run.meters_per_file, run.meters)):,} bytes")
    say(f"bytes        {size:,} ({in_bytes(size)}){' before compression' if run.gzip else ''}")
    say(f"processes    {len(run.slices)}")
    if not run.verify:
        say(f"disk         at most {run.disk_bytes:,} bytes ({in_bytes(run.disk_bytes)}) at once in {run.directory}")
    say(f"destination  {run.destination}/dt=YYYY-MM-DD/")


class Progress:
    """What a run has done so far: a live line on a terminal, a log line now and then elsewhere, a report at the end.

    Throughput is kept in at most SLOTS slots of equal length, which doubles whenever they are full.
    """

    def __init__(self, run: Run, as_json: bool) -> None:
        """Begin to count time."""
        self.run, self.as_json, self.total = run, as_json, Outcome()
        self.started = self.shown = time.monotonic()
        self.marks = deque([(0.0, 0, 0)], RATE_SECONDS)  # each second: the time, the bytes and objects till then
        self.slots, self.slot_seconds = [0], 1
        self.peaks = [0.0, 0.0]  # bytes and objects a second, in the best one

    def update(self, outcome: Outcome) -> None:
        """Add what became of some files, and show it if it is time to."""
        self.total.add(outcome)
        now, interactive = time.monotonic(), on_terminal()
        if now - self.started >= self.marks[-1][0] // 1 + 1:  # on whole seconds, which do not drift
            self.mark(now - self.started)
        if now - self.shown < (TICK_SECONDS if interactive else LOG_SECONDS):
            return
        self.shown = now
        if interactive:
            show(self.live_line((os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1))
        else:
            log.info("%s", self.live_line(200))

    def mark(self, elapsed: float) -> None:
        """Take down what arrived since the last mark; of uploads what was answered, which is known sooner."""
        uploads = self.run.bucket and not self.run.verify
        kinds = ("sent_bytes", "arrived") if uploads else ("bytes", "objects")
        self.marks.append((elapsed, *(self.total.counts[kind] for kind in kinds)))
        since, (seconds, *gains) = self.marks[-2][0], map(operator.sub, self.marks[-1], self.marks[-2])
        seconds = max(seconds, min(elapsed, 1.0))  # the end of a run makes no second of its own
        self.peaks = [max(peak, gain / seconds) for peak, gain in zip(self.peaks, gains)]
        while since // self.slot_seconds >= SLOTS:
            self.slots = [sum(self.slots[index : index + 2]) for index in range(0, len(self.slots), 2)]
            self.slot_seconds *= 2
        if gains[0]:
            self.slots += [0] * (int(since) // self.slot_seconds + 1 - len(self.slots))
            self.slots[-1] += gains[0]

    def live_line(self, width: int) -> str:
        """Say how far the run is, in at most `width` characters; what matters least is left out first."""
        counts, objects = self.total.counts, max(1, self.run.objects)
        done = sum(counts[kind] for kind in ("objects", "skipped", "failed", "missing", "different"))
        elapsed = time.monotonic() - self.started
        seconds, size, _ = map(operator.sub, self.marks[-1], self.marks[0])
        left = elapsed / (done - counts["skipped"]) * (objects - done) if done > counts["skipped"] else math.inf
        pieces = [
            f"{100 * done // objects:3d}%",
            f"{done:,}/{self.run.objects:,} objects",
            f"{in_bytes(size / max(seconds, 1.0))}/s",
            f"{timedelta(seconds=round(left))} left" if left < 8e6 else "",
            f"{counts['readings']:,} readings",
            f"{counts['retries']:,} retries" if counts["retries"] else "",
        ]
        pieces = [piece for piece in pieces if piece]
        while pieces and len("  ".join(pieces)) > width:
            pieces.pop()
        room = min(30, width - len("  ".join(pieces)) - 4)
        if room >= 8:
            full = room * done // objects
            pieces.insert(1, f"[{'#' * full}{'.' * (room - full)}]")
        return "  ".join(pieces)

    def latency(self, share: float) -> float:
        """Return the seconds within which a share of the answers came, with an error of 2.5% at the most."""
        latencies = sorted((key[1], count) for key, count in self.total.counts.items() if key[0] == "latency")
        exponents, counts = zip(*latencies or [(-math.inf, 0)])
        reached = [*itertools.accumulate(counts)]
        return LATENCY_BASE ** exponents[bisect.bisect_left(reached, share * reached[-1])]

    def summary(self, number: int) -> dict[str, Any]:
        """Return the report for programs on a run that signal `number` or nothing ended; the README has its keys."""
        counts, total, run = self.total.counts, self.total, self.run
        elapsed = max(time.monotonic() - self.started, 1e-3)
        self.mark(elapsed)
        complete = counts["objects"] + counts["skipped"] == run.objects and not counts["unexpected"]
        statuses = {key[1]: counts[key] for key in sorted(key for key in counts if key[0] == "status")}
        kinds = ("skipped", "failed", "missing", "different", "unexpected")
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
        return {
            "mode": "verify" if run.verify else "upload" if run.bucket else "write",
            "destination": run.destination,
            "exit_status": 128 + number if number else int(not complete or bool(total.fatal or total.failures)),
            "error": total.fatal or None,
            "objects_planned": run.objects,
            "objects_done": counts["objects"],
            **{f"objects_{kind}": counts[kind] for kind in kinds},
            "failures": total.failures,
            "readings": counts["readings"],
            "bytes": counts["bytes"],
            "elapsed_seconds": round(elapsed, 3),
            "mean_bytes_per_second": round(counts["bytes"] / elapsed),
            "mean_objects_per_second": round(counts["objects"] / elapsed, 3),
            "peak_bytes_per_second": round(self.peaks[0]),
            "peak_objects_per_second": round(self.peaks[1], 3),
            **{f"latency_{name}_seconds": round(self.latency(share), 6) for name, share in shares.items()},
            "answers": {str(code): count for code, count in statuses.items() if code},
            "unanswered_requests": statuses.get(0, 0),
            "throttled_answers": statuses.get(429, 0) + statuses.get(503, 0),
            "retries": counts["retries"],
            "throughput_bytes": self.slots,
            "throughput_slot_seconds": self.slot_seconds,
        }

    def conclude(self, number: int) -> int:
        """Report what became of the run, which signal `number` or nothing ended, and return its exit status."""
        made, verify = self.summary(number), self.run.verify
        for failure in made["failures"]:
            say(failure if verify else f"failed: {failure}")
        if made["error"]:
            say(f"error: {made['error']}")
        if number:
            say(f"stopped by {signal.Signals(number).name}; {self.run.again}")
        kinds = ("missing", "different", "unexpected") if verify else ("failed", "skipped")
        say(
            f"{made['objects_done']:,} objects, {made['readings']:,} readings, {in_bytes(made['bytes'])} in "
            f"{made['elapsed_seconds']:.2f} s: {made['mean_objects_per_second']:,.1f} objects/s, "
            f"{made['readings'] / made['elapsed_seconds']:,.0f} readings/s, "
            f"{in_bytes(made['mean_bytes_per_second'])}/s; "
            + ", ".join(f"{made[f'objects_{kind}']:,} {kind}" for kind in kinds)
        )
        if made["answers"]:
            answers = ", ".join(f"{count:,} of {code}" for code, count in made["answers"].items())
            times = (f"{key} {1000 * made[f'latency_{key}_seconds']:,.0f} ms" for key in ("p50", "p95", "p99", "max"))
            say(
                f"answers      {answers}; {made['unanswered_requests']:,} requests without one; "
                f"{made['throttled_answers']:,} throttled (429, 503), {made['retries']:,} retries"
            )
            say(f"latency      {', '.join(times)}")
        if len(self.slots) > 1 and self.peaks[0]:
            peaks = f"{in_bytes(self.peaks[0])}/s, {self.peaks[1]:,.0f} objects/s"
            say(f"throughput   {sparkline(self.slots)} at most {peaks}")
        if not self.as_json:
            return made["exit_status"]
        try:
            with open(sys.stdout.fileno(), "w", closefd=False) as out:
                print(json.dumps(made), file=out)
        except (OSError, AttributeError) as error:  # closed, it is None
            say(f"error: --json cannot write to standard output: {getattr(error, 'strerror', 'it is closed')}")
            return made["exit_status"] or 1
        return made["exit_status"]


def sparkline(values: Sequence[int]) -> str:
    """Draw values as bars of eight heights, in ASCII where standard error has nothing else."""
    bars = "▁▂▃▄▅▆▇█"
    if bars.encode(sys.stderr.encoding, "ignore") == b"":
        bars = "_.-:=+*#"
    return "".join(bars[value * 7 // max(values)] for value in values)


# The command line


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are like those of the rest of the script."""

    def error(self, message: str) -> NoReturn:
        """Raise RunError."""
        raise RunError(message[:1000])


def parse_day(text: str) -> date:
    """Parse a day; argparse names the flag."""
    today = datetime.now(timezone.utc).date()
    if text in ("today", "yesterday"):
        return today - timedelta(days=text == "yesterday")
    with contextlib.suppress(ValueError):
        if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return date.fromisoformat(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a day: write YYYY-MM-DD, today or yesterday (UTC)")


def numbers(least: float, most: int, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Return a parser of numbers within bounds, whole ones or of kind float; argparse names the flag."""
    pattern, name = ("[0-9]{1,20}", "whole number") if kind is int else (r"[0-9]{1,20}(\.[0-9]{1,6})?", "number")

    def parse(text: str) -> Any:
        if re.fullmatch(pattern, text) and least <= kind(text) <= most:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {least:,} to {most:,}")

    return parse


def parse_size(text: str) -> int:
    """Parse a size in bytes, with a decimal or binary unit or none; argparse names the flag."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?:([kKMGT])(i?))?B?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500000000, 500MB, 20GB or 2GiB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index((match[2] or " ").upper()))


def parse_bucket(text: str) -> str:
    """Parse a bucket's name by the rules of https://cloud.google.com/storage/docs/buckets#naming."""
    shape = r"[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]|(?=.{3,222}$)[a-z0-9][a-z0-9_-]{,62}(\.[a-z0-9_-]{1,63})+(?<![_-])"
    if not re.fullmatch(shape, text) or re.search(r"^goog|g[o0][o0]g[l1]e|^(\d+\.){3}\d+$", text):
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

    def add(flags: str, metavar: str, kind: Any, default: Any, meaning: str, **more: Any) -> None:
        shown = f" (default: {default:,})" if isinstance(default, int) else f" (default: {default})" if default else ""
        group.add_argument(*flags.split(), metavar=metavar, type=kind, default=default, help=meaning + shown, **more)

    def switch(flags: str, meaning: str) -> None:
        group.add_argument(*flags.split(), action="store_true", help=meaning)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = numbers(1, 1024)
    meters = numbers(1, MAX_METERS)

    group = parser.add_argument_group("days (UTC)")
    add("--start", "DATE", parse_day, None, "first day: YYYY-MM-DD, today or yesterday", required=True)
    add("--end", "DATE", parse_day, None, "last day, included", required=True)

    group = parser.add_argument_group("destination")
    add("--bucket", "NAME", parse_bucket, None, f"upload to gs://NAME (default: {DEFAULT_BUCKET})")
    add("--output-dir", "DIR", str, None, "keep the files in DIR instead: no account, no network")

    group = parser.add_argument_group("data")
    add("--meters", "N", meters, 1000, "size of the fleet")
    add("--interval", "SECONDS", numbers(1, DAY_SECONDS), 10, "seconds between readings; must divide a day")
    add("--seed", "N", numbers(0, 2**63 - 1), DEFAULT_SEED, "fleet and readings follow from it")
    add("--meters-per-file", "K", meters, 1, "meters that share an object, one after the other")
    switch("--gzip", "compress the objects (level 1)")

    group = parser.add_argument_group("what to do")
    switch("--resume", "skip the objects that are there already")
    switch("--verify", "upload nothing; compare names, sizes and CRC32C of what is there")
    switch("--dry-run", "print the plan and stop")
    switch("--json", "print the report as a line of JSON on standard output")
    switch("-v --verbose", "log each batch and decision")
    group.add_argument("-h", "--help", action="help", help="show this page and exit")

    group = parser.add_argument_group("many machines (default: what the engine's environment says, else one share)")
    add("--task-index", "I", numbers(0, MAX_METERS), None, "which share of the run this is, from 0 on")
    add("--task-count", "N", meters, None, "how many shares there are")

    group = parser.add_argument_group("tuning")
    add("--temp-dir", "DIR", str, DEFAULT_TEMP_DIR, "where files wait for their upload; created if missing")
    add("--max-disk", "SIZE", parse_size, None, "most bytes waiting there, as 20GB (default: batches in flight)")
    add("--batch-size", "N", numbers(1, 100_000), 100, "files for each call of the transfer manager")
    add("--processes", "N", threads, cores, "pipelines, each with its own threads; the cores it may use")
    add("--write-workers", "N", threads, 1, "threads of a process that generate and write, each a batch")
    add("--upload-workers", "N", threads, 2, "batches that a process uploads at once")
    add("--transfer-workers", "N", threads, 16, "uploads at once within a batch (max_workers)")
    add("--retry-timeout", "SECONDS", numbers(1, DAY_SECONDS), 120, "how long a request is tried again")
    add("--rps-limit", "R", numbers(0.1, 10**6, float), None, "objects a second at most, evenly paced")
    return parser


# Engines that run array jobs, and the variables in which they say a task's index, count and first index.
ENGINES = (
    ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT", ""),  # Cloud Batch
    ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT", ""),  # Cloud Run jobs
    ("JOB_COMPLETION_INDEX", "", ""),  # Kubernetes Indexed Jobs, which do not say the count
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),  # Slurm job arrays
)


def find_task(args: argparse.Namespace) -> tuple[int, int, str]:
    """Return which share of the run this is, of how many, and who said so. Raises RunError on half an answer."""
    index, count, source = args.task_index, args.task_count, "--task-index"
    engine = next((names for names in ENGINES if names[0] in os.environ), None)
    if engine and None in (index, count):
        told = [os.environ.get(name, "0") for name in engine]
        if not all(re.fullmatch("[0-9]{1,12}", value) for value in told):
            raise RunError(f"{engine[0]} and its like are not numbers; give --task-index and --task-count instead")
        if index is None:
            index, source = int(told[0]) - int(told[2]), engine[0]
        count = count or int(told[1]) or None
    if index is None and count is None:
        return 0, 1, ""
    if index is None or count is None:
        missing, there = ("--task-count", source) if count is None else ("--task-index", "--task-count")
        raise RunError(f"{missing} is missing: {there} is there without it")
    if not 0 <= index < count:
        raise RunError(f"--task-index {index} (from {source}) must be from 0 to {count - 1}: --task-count is {count}")
    return index, count, source


def plan(args: argparse.Namespace) -> Run:
    """Turn parsed flags into a run. Raises RunError where they do not go together."""
    if args.end < args.start:
        raise RunError(f"--end {args.end} is before --start {args.start}; swap them")
    if DAY_SECONDS % args.interval:
        raise RunError(f"--interval {args.interval} does not divide a day of {DAY_SECONDS:,} s; take 1, 10, 60 or 900")
    exclusive = [("resume", "verify"), *((flag, "output_dir") for flag in ("bucket", "max_disk", "rps_limit"))]
    for flag, other in exclusive:
        if getattr(args, flag) and getattr(args, other) not in (None, False):
            raise RunError(f"--{flag} and --{other} exclude each other; drop one".replace("_", "-"))
    if args.meters_per_file > 1 and args.meters > 10**9:
        raise RunError("--meters-per-file names files with nine digits: at most 1,000,000,000 --meters")
    values = vars(args).copy()
    values["bucket"] = None if args.output_dir is not None else args.bucket or DEFAULT_BUCKET
    values["directory"] = args.temp_dir if values["bucket"] else args.output_dir
    values["task_index"], values["task_count"], values["task_source"] = find_task(args)
    run = Run(**{known.name: values[known.name] for known in fields(Run)})
    if args.max_disk is not None and not args.verify and args.max_disk < run.file_disk:
        raise RunError(f"--max-disk {args.max_disk:,} has no room for one file; that takes {run.file_disk:,} bytes")
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 if every object is where it should be."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - it was closed
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", message=r".*\bPython\b")  # packages that lament an old Python
    try:
        args = build_parser().parse_args(argv)
        line = "%(asctime)s %(levelname)s %(processName)s/%(threadName)s: " if args.verbose else ""
        logging.basicConfig(format=f"{ERASE if on_terminal() else ''}{line}%(message)s", level=logging.CRITICAL)
        log.setLevel(logging.DEBUG if args.verbose else logging.WARNING)
        run = plan(args)
        if args.dry_run:
            describe_plan(run)
            return 0
        credentials = find_credentials() if run.bucket else None
        idle = run.verify or not run.slices
        with contextlib.nullcontext((run, None)) if idle else claim_directory(run) as (claimed, turns):
            describe_plan(run)
            return execute(claimed, credentials, turns, Progress(run, args.json))
    except RunError as error:
        say(f"generator.py: error: {error}")
        return error.status


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        say("stopped by SIGINT")
        raise SystemExit(128 + signal.SIGINT) from None
