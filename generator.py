#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# dependencies = ["google-cloud-storage>=3.0,<4", "bloom-filter>=1.3.3,<2", "orjson>=3.10,<4"]
# ///
"""Fill a Google Cloud Storage bucket with synthetic smart-meter readings.

A meter's day is one NDJSON object, gs://BUCKET/dt=YYYY-MM-DD/<meter_id>.ndjson, a row every 10 s.
Keep the files, or upload them:

    python generator.py --start 2024-01-01 --end 2024-01-01 --meters 20 --output-dir readings
    python generator.py --start 2024-01-01 --end 2024-01-31 --bucket my-datalake-bucket
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Ctrl-C ends the run during the imports, too.
    text = b"generator.py: stopped before anything was done\n"
    signal.signal(signal.SIGINT, lambda *_: os.write(2, text) and os._exit(130))

import argparse
import atexit
import base64
import contextlib
import ctypes
import difflib
import fcntl
import functools
import hashlib
import heapq
import http.client
import importlib.metadata
import itertools
import logging
import math
import mmap
import multiprocessing.connection
import operator
import random
import re
import resource
import shutil
import struct
import sys
import threading
import time
import zlib
from array import array
from collections import Counter, deque
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from datetime import date, datetime, timedelta, timezone
from fractions import Fraction
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple, NoReturn, Sequence

try:
    import google_crc32c  # with which the client library computes checksums
    import orjson
    from bloom_filter import BloomFilter
except ImportError as missing:
    remedy = "pip install -r requirements.txt, or run it by .venv/bin/python or: uv run generator.py"
    sys.stderr.write(f"generator.py: error: {missing.name} is not installed; {remedy}\n")
    raise SystemExit(2) from None

VERSION = "2.0.0"
STARTED = datetime.now(timezone.utc)  # by which `today` is meant

log = logging.getLogger("wattif")

# A run makes a file, in the bucket an object, for each meter and day, or for some meters; its place
# is its position among those of the day. A task is one machine's share of a run, a slice a share of
# a task for one process: a range of places. A batch goes to the transfer manager in one call; its
# files wait in the spool. Results say what became of files and requests, and add up to the record.

# --- Constants; down to UNEVEN_BYTES they are the data contract, which pipelines rely on. ---------

DAY_SECONDS = 86_400
ROW = b'{"meter_id":"000000000000","timestamp":"2024-01-01T00:00:00Z","reading":0.111}\n'
ROW_BYTES = len(ROW)
ID_OFFSET = ROW.index(b"000000000000")
DIGITS_OFFSET = ROW.index(b"111")
READING_OFFSET = ROW.index(b"0.111")
ROW_END = ROW[READING_OFFSET + len("0.111") :]
# Of a row with a flaw, this many bytes are followed by these. Other flaws concern whole rows.
FLAWS = {
    "missing": (0, b""),
    "duplicate": (ROW_BYTES, b""),
    "disorder": (0, b""),
    "late": (0, b""),
    "null": (READING_OFFSET, b"null " + ROW_END),
    "spike": (READING_OFFSET, b"999.9" + ROW_END),
    "malformed": (ROW.index(b'","reading"'), b"\n"),
}
BLOCK_METERS = 1 << 20
MAX_METERS = BLOCK_METERS << 16
SUFFIX_BITS = 24
LOCALLY_ADMINISTERED = 0x0A << 40  # the letter in front keeps IDs from being taken for numbers
FILTER_BITS = 8_537_887  # of a block's Bloom filter: for 2^20 meters and 2% false positives
# A reading is a level from 0 to 899: the first digit is a random byte modulo 9, others modulo 10.
# Bytes above the last whole multiple (252 and 250) would favour low digits and are dropped.
DIGIT_TABLES = tuple(bytes(ord("0") + byte % base for byte in range(256)) for base in (9, 10, 10))
UNEVEN_BYTES = tuple(bytes(range(256 - 256 % base, 256)) for base in (9, 10, 10))

RATES = (0.1, 10**6)  # objects a second that can be asked for
DEFAULT_BUCKET = "smart-meter-fake-data-t"
CONTROL_GROUPS = Path("/sys/fs/cgroup")
DEFAULT_TEMP_DIR = "/mnt/sm-disk/"
PARTIAL = re.compile(r"\.[0-9a-f]+\.part")  # the name of a file that is being written
DISK_BLOCK = 4096  # bytes; what a file system rounds a file up to, and what a directory takes
UPLOAD_CHUNK_BYTES = 16 << 20  # for objects over 8 MiB; measured: larger ones cost page faults
MAX_WAIT_SECONDS = 60.0  # for a response, and before a retry
PAUSE_GROWTH = 1.3  # of a retry's longest pause, 1 s at first; with 2, batches wait for few files
SLOWEST_RATE = 50_000  # bytes a second: an upload has as much time more as its bytes take at this
TICK_SECONDS = 0.1  # how soon a signal, a finished batch or a dead process is noticed
LATENCY_SHARES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}  # of the uploads
LATENCY_BASE = 1.05  # each bucket of the latency histogram is 5% wider than the one before
THROTTLED = (429, 503)  # the statuses with which Cloud Storage asks for fewer requests
MOST_SLOTS = 120  # of the timeline in the record
EXACT_SECONDS = 6 * 3600  # for which it is kept to the second
BUSY_SHARE = 0.6  # of the CPU: measured 0.68 to 1.07 in runs that it limits, at most 0.5 in others
LEAST_SHARE = 0.1  # of the connections' time: where they waited less, no wait limits the run
LATE_SECONDS = 0.05  # an upload may begin as long after its turn, or an interval if that is longer
COLD_RATE = 1000  # objects a second that a new bucket takes
PROCESS_RATE = 350  # objects a second that a process uploads at most, by the benchmark
BARS = "▁▂▃▄▅▆▇█"
NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
# Of the record, what may be null and is no number to judge:
WORDS = {"exit_status", "error", "readings_sum", "throttling", "limited_by"}
EXPECTATION = rf"\s*([a-z][a-z0-9_]*)\s*(<=?|>=?)\s*({NUMBER})\s*"
SECRET_NAME = r"""(?:upload_id|token|secret|signature|password|assertion)(?:=|%3D|['"]:\s?['"])"""
SECRET = re.compile(  # what is not told but for the name in front of it
    rf"""(?is)(bearer\s|ya29\.|eyJ|{SECRET_NAME})[^\s&'"]+"""
    r"""|(?<=//)\S+(?=@)|(?:(?<=Failed to parse: )|-----BEGIN).*"""
)
TOKEN_REFUSED = "invalid_|unauthorized_|unsupported_|access_denied|deleted_|be refreshed|reauth"
OVERWRITE = r"objects\.delete'? (access|denied)|cannot be deleted"  # words that no name can have
IS_THERE = re.compile(f"(?i)HTTP (412(?!.*constraint)|403.*({OVERWRITE}))")  # what a refusal says
NO_NAME = "not known|name resolution|No address associated"
NO_TLS = "certificate|WRONG_VERSION|HANDSHAKE_FAIL|_PROTOCOL|PROTOCOL_"
LASTING = re.compile(f"(?i){NO_TLS}|failed: 407|{NO_NAME}")  # what no retry mends
LOG_IN = "run 'gcloud auth application-default login' or give the VM a service account"
REMEDIES = (  # what to do, by the words of an error, the most telling first
    (f"HTTP 401|{TOKEN_REFUSED}", f"the credentials were not accepted: {LOG_IN}"),
    (r"scopes\b(?!=)|scope\(s\)", "stop the VM; 'gcloud compute instances set-service-account VM --scopes=storage-rw'"),
    (r"\bKMS\b", "grant the bucket's service agent roles/cloudkms.cryptoKeyEncrypterDecrypter on the key"),
    ("VPC Service Controls|organization's policy", "run inside the service perimeter, or widen it"),
    ("requester pays|user project", "set GOOGLE_CLOUD_QUOTA_PROJECT to the project that pays"),
    ("billing", "enable billing for the project of gs://{bucket}"),
    (r"\bIP filter", "add this machine's address to the IP filter of gs://{bucket}"),
    (OVERWRITE, "what is there cannot be replaced: --resume skips it"),
    (r"objects\.(list|get)\b", "grant roles/storage.objectViewer on gs://{bucket}"),
    (r"objects\.create\b", "grant roles/storage.objectCreator on gs://{bucket}"),
    ("HTTP 403", "grant roles/storage.objectUser on gs://{bucket}"),
    ("HTTP 404", "create gs://{bucket}, or name another one with --bucket"),
    ("certificate.required", "set GOOGLE_API_USE_CLIENT_CERTIFICATE=true, with a certificate that it knows"),
    ("certificate", "set REQUESTS_CA_BUNDLE to the file with the certificate of your proxy"),
    ("(HTTP|failed:) 407", "put user and password into HTTPS_PROXY: http://USER:PASSWORD@HOST:PORT"),
    ("Failed to parse", "see HTTPS_PROXY; in a password, write %23 for #, %2F for / and %3F for ?"),
    ("HTTP 30[0-9]", "something redirects uploads; check HTTPS_PROXY and STORAGE_EMULATOR_HOST"),
    (f"{NO_NAME}|Connection refused|timed out", "check the network, HTTPS_PROXY and STORAGE_EMULATOR_HOST"),
)
VERIFY_ADVICE = {
    "missing": "if all flags are those of the upload, run it with --resume instead of --verify",
    "different": "if all flags are those of the upload, run it without --verify, which makes them again",
    "unexpected": "if they belong to no other run, {delete} {destination}/NAME deletes one, with the NAME above",
}
MAX_DIFFERENCES = 20  # listed by each process of --verify; the rest are only counted
LOG_SECONDS = 30  # between progress lines where there is no terminal
GRACE_SECONDS = 20  # that a signal leaves to what is under way
FAILED = -1  # what stops a run if no signal does: otherwise it is the signal's number


class RunError(Exception):
    """A run cannot begin: one line that says what to do, and the exit status if it is not 2."""


class OddAnswer(OSError):
    """An answer of the service is not what it should be: one line that says how."""

    is_uncertain: bool  # whether an earlier try may have stored the object


@contextlib.contextmanager
def understanding(answer: str) -> Iterator[None]:
    """Raise OddAnswer where an answer of the service cannot be understood."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        raise OddAnswer(f"{answer} is not what it should be: {explain(error)}") from None


# --- Settings, each with its flag, and the plan that follows from them. ---------------------------


def parse_day(text: str) -> date:
    """Parse a day; argparse names the flag."""
    if text in ("today", "yesterday"):
        return STARTED.date() - timedelta(days=text == "yesterday")
    with contextlib.suppress(ValueError):
        if re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return date.fromisoformat(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no day as YYYY-MM-DD, today or yesterday (UTC)")


def parse_number(least: float, most: int, text: str) -> float:
    """Parse a number within bounds, a whole one if `least` is; argparse names the flag."""
    kind, plain = type(least), text
    if re.fullmatch(r"[0-9]{1,3}([,_][0-9]{3})+(\.[0-9]+)?", text):
        plain = re.sub("[,_]", "", text)
    fraction, name = ("", "whole number") if kind is int else (r"(\.[0-9]{1,6})?", "number")
    if re.fullmatch("[0-9]{1,20}" + fraction, plain) and least <= kind(plain) <= most:
        return kind(plain)
    raise argparse.ArgumentTypeError(f"{text!r} is not a {name} from {least:,} to {most:,}")


def parse_size(text: str) -> int:
    """Parse a size in bytes, with a decimal or binary unit or none; argparse names the flag."""
    match = re.fullmatch(r"(?i)([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?:([kmgt])(i?))?b?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500000000, 500MB or 2GiB")
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def parse_flaws(text: str) -> dict[str, Fraction]:
    """Parse the shares of flawed rows by their kinds; argparse names the flag."""
    shares: dict[str, Fraction] = {}
    for part in text.split(","):
        kind, _, share = part.partition("=")
        match = re.fullmatch(r"([0-9]{1,3}|[0-9]{0,3}\.[0-9]{1,12})(%?)", share)
        part_of_rows = Fraction(match[1]) / (100 if match[2] else 1) if match else Fraction(0)
        if kind not in FLAWS or kind in shares or not 0 < part_of_rows < 1:
            rule = f"KIND=SHARE above 0 and below 1, as late=1% or late=0.01; each KIND once, of {', '.join(FLAWS)}"
            raise argparse.ArgumentTypeError(f"{part!r} is not {rule}")
        shares[kind] = part_of_rows
    return {kind: shares[kind] for kind in FLAWS if kind in shares}


def parse_prefix(text: str) -> str:
    """Parse a path below which objects are, as object names have it; argparse names the flag."""
    parts = (text[:-1] if text.endswith("/") else text).split("/")
    if any(part in ("", ".", "..") for part in parts) or not text.isprintable() or len(text.encode()) > 900:
        rule = "at most 900 bytes, no control characters, no part that is empty, '.' or '..'"
        raise argparse.ArgumentTypeError(f"{text!r} is not a path such as tests/one: {rule}")
    return "/".join(parts)


def parse_bucket(text: str) -> str:
    """Parse NAME, gs://NAME or gs://NAME/PATH, by https://cloud.google.com/storage/docs/buckets#naming."""
    if text.startswith("gs://"):
        name, _, path = text[len("gs://") :].partition("/")
        return parse_bucket(name) + (f"/{parse_prefix(path)}" if path else "")
    without_dots = "[a-z0-9][a-z0-9_-]{1,61}[a-z0-9]"
    with_dots = r"(?=.{3,222}$)[a-z0-9][a-z0-9_-]{,62}(\.[a-z0-9_-]{1,63})+(?<![_-])"
    reserved = r"^goog|g[o0][o0]g[l1]e|^(\d+\.){3}\d+$"
    if re.fullmatch(f"{without_dots}|{with_dots}", text) and not re.search(reserved, text):
        return text
    if text != text.lower():
        raise argparse.ArgumentTypeError(f"{text!r} has upper-case letters, a bucket has none; write {text.lower()}")
    rule = "3 to 63 of a-z, 0-9, '-', '_' and '.', a letter or digit at both ends; no IP address, no google"
    raise argparse.ArgumentTypeError(f"{text!r} is not the name of a bucket: {rule}")


def parse_pattern(pattern: str, meaning: str, text: str) -> str:
    """Parse what a regular expression matches; argparse names the flag."""
    if re.fullmatch(pattern, text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")


DIRECTORY = functools.partial(parse_pattern, "(?!gs://)(?s:.)+", "a directory, as . or /tmp; see --bucket")
RULE = functools.partial(parse_pattern, EXPECTATION, "KEY<NUMBER, KEY<=NUMBER, KEY>NUMBER or KEY>=NUMBER")


def flag(meaning: str, default: Any = False, metavar: str = "", parse: Any = None, **more: Any) -> Any:
    """Declare a setting and its flag: without a parser or a number's bounds, a switch."""
    options: dict[str, Any] = {"action": "store_true"}
    if parse:
        parse = functools.partial(parse_number, *parse) if isinstance(parse, tuple) else parse
        options = {"metavar": metavar, "type": parse, "default": default}
        meaning += "" if default is None else " (default: %(default)s)"
    return field(default=default, metadata={**options, **more, "help": meaning})


@dataclass(frozen=True)
class Run:
    """The settings of a run, by the groups of --help. Only days and data affect the objects."""

    start: date = flag("first day (UTC): YYYY-MM-DD, today or yesterday", None, "DATE", parse_day)
    end: date = flag("last day, included", None, "DATE", parse_day)
    bucket: str | None = flag(f"upload to gs://NAME (default: {DEFAULT_BUCKET})", None, "NAME", parse_bucket)
    prefix: str | None = flag("path in the bucket or DIR, also as --bucket gs://NAME/PATH", None, "PATH", parse_prefix)
    output_dir: str | None = flag("keep the files in DIR: no account, no network", None, "DIR", DIRECTORY)
    meters: int = flag("size of the fleet", 1000, "N", (1, MAX_METERS))
    interval: int = flag("between readings; divides a day", 10, "SECONDS", (1, DAY_SECONDS))
    flaws: Any = flag(f"KIND=SHARE,…: rows with flaws; {', '.join(FLAWS)}", None, "FLAWS", parse_flaws)
    seed: int = flag("fleet and readings follow from it", 0, "N", (0, 2**63 - 1))
    meters_per_file: int = flag("meters that share an object", 1, "K", (1, MAX_METERS))
    gzip: bool = flag("compress the objects (level 1)")
    resume: bool = flag("skip the objects that are there already")
    verify: bool = flag("upload nothing; compare names, sizes and CRC32C of what is there")
    dry_run: bool = flag("print the plan and stop")
    verbose: bool = flag("log each batch and decision")
    rps_limit: float | None = flag("at most R objects a second, all tasks and processes together", None, "R", RATES)
    ramp: float | None = flag("begin with R objects a second and double them, to warm a bucket up", None, "R", RATES)
    ramp_minutes: float = flag("in which a ramp doubles", 20, "M", (0.01, 1440))
    json: bool = flag("print the record as a line of JSON on standard output")
    record: bool = flag("put the record beside the data, into _wattif/, once all is delivered")
    expect: Any = flag("exit status 3 unless KEY<N (or <=, >, >=); repeatable", None, "RULE", RULE, action="append")
    task_index: int = flag("which share of the run this is, from 0 on", None, "I", (0, MAX_METERS))
    task_count: int = flag("how many shares there are", None, "N", (1, MAX_METERS))
    task_source: str = ""  # the flag or the scheduler's variable that named the task, if any
    temp_dir: str = flag(f"where files wait (default: {DEFAULT_TEMP_DIR} or $TMPDIR)", None, "DIR", DIRECTORY)
    max_disk: int | None = flag("limit for them, as 20GB (default: none)", None, "SIZE", parse_size)
    batch_size: int = flag("files per call of the transfer manager", 100, "N", (1, 100_000))
    processes: int = flag("worker processes (default: the cores allowed)", None, "N", (1, 1024))
    write_workers: int = flag("threads per process that generate files", 1, "N", (1, 1024))
    upload_workers: int = flag("batches that a process uploads at once", 2, "N", (1, 1024))
    transfer_workers: int = flag("uploads at once in a batch: max_workers", 16, "N", (1, 1024))
    retry_timeout: int = flag("seconds for a request, besides its bytes at 50 kB/s", 120, "S", (1, DAY_SECONDS))

    @functools.cached_property
    def day_rows(self) -> int:
        """The rows of a meter-day without flaws."""
        return DAY_SECONDS // self.interval

    def destination(self) -> str:
        """Return the bucket or directory, with the prefix, below which the days are."""
        root = f"gs://{self.bucket}" if self.bucket else str(self.output_dir).rstrip("/")
        return f"{root}/{self.prefix}" if self.prefix else root

    def day_prefix(self, day: date) -> str:
        """Return how the names of a day's objects begin."""
        return f"{self.prefix}/dt={day}/" if self.prefix else f"dt={day}/"

    def meters_of(self, places: range) -> range:
        """Return the fleet indices of the meters in contiguous files."""
        per_file = self.meters_per_file
        return range(places.start * per_file, min(places.stop * per_file, self.meters))

    @functools.cached_property
    def flaw_counts(self) -> Counter[str]:
        """The rows of a meter-day that have each flaw."""
        half, shares = Fraction(1, 2), self.flaws or {}
        return Counter({kind: max(1, math.floor(share * self.day_rows + half)) for kind, share in shares.items()})

    @functools.cached_property
    def meter_day_bytes(self) -> int:
        """The size of a meter's rows of a day, before compression."""
        counts = self.flaw_counts
        rows = self.day_rows - counts["missing"] - counts["malformed"] + counts["duplicate"]
        return rows * ROW_BYTES + counts["malformed"] * (FLAWS["malformed"][0] + 1)

    def file_bytes(self, meters: int) -> int:
        """Return the size of a file of so many meters: exact, or with --gzip at most."""
        size = meters * self.meter_day_bytes
        return size + size // 1000 + 64 if self.gzip else size


@dataclass(frozen=True)
class Plan:
    """What follows from the settings, for this task."""

    days: range  # as proleptic Gregorian ordinals
    day_files: int  # files of a day, all tasks together
    slices: list[range]  # the places of each process's files, none of them empty
    batch_files: int  # most files of a batch
    pending_batches: int  # most batches that a process has under way
    objects: int
    readings: int
    bytes: int  # of the objects, before compression
    disk_bytes: int  # most disk in use at once
    least_disk: int  # the least --max-disk, in bytes


def make_plan(run: Run) -> Plan:
    """Compute slices, sizes, counts and disk use. Raises RunError if --max-disk is too small."""
    days = range(run.start.toordinal(), run.end.toordinal() + 1)
    day_files = -(-run.meters // run.meters_per_file)
    task_files = split(range(day_files), run.task_index, run.task_count)
    largest = run.file_bytes(min(run.meters_per_file, run.meters))
    objects = len(days) * len(task_files)
    meter_days = len(days) * len(run.meters_of(task_files))
    readings, size = meter_days * run.day_rows, meter_days * run.meter_day_bytes
    file_disk = (-(-largest // DISK_BLOCK) + 2 * bool(run.bucket)) * DISK_BLOCK  # with directories
    room = sys.maxsize if run.max_disk is None or run.verify else run.max_disk // file_disk  # files
    least = 2 * file_disk
    if room < 2:
        raise RunError(f"--max-disk has no room for 2 files; give at least {least}, in bytes")
    # The disk holds pending batches, and failed files until they would outnumber a batch.
    processes = min(run.processes, len(task_files), room // 2)
    room //= max(1, processes)
    workers = run.write_workers + run.upload_workers
    batch_files = max(1, min(run.batch_size // run.meters_per_file, room // (workers + 1)))
    pending_batches = min(workers, room // batch_files - 1)
    disk = objects * file_disk + len(days) * DISK_BLOCK
    if run.bucket:
        disk = min(objects, processes * (pending_batches + 1) * batch_files) * file_disk
    slices = [split(task_files, index, processes) for index in range(processes)]
    return Plan(days, day_files, slices, batch_files, pending_batches, objects, readings, size, disk, least)


def plan_record(run: Run, plan: Plan) -> dict[str, Any]:
    """Return settings and plan, under the names of the record, with the truth about the rows."""
    meter_days = plan.readings // run.day_rows
    flaws = Counter({kind: count * meter_days for kind, count in run.flaw_counts.items()})
    delivered = plan.readings - flaws["missing"] + flaws["duplicate"]  # as many come late as are late
    parsed = delivered - flaws["malformed"]
    return {
        "settings": {setting.name: getattr(run, setting.name) for setting in fields(run)},
        "mode": "verify" if run.verify else "upload" if run.bucket else "write",
        "destination": run.destination(),
        "objects_planned": plan.objects,
        "bytes_planned": plan.bytes,
        "disk_bytes_planned": plan.disk_bytes,
        "processes": len(plan.slices),
        "flaws": {**flaws},
        "rows_delivered": delivered,
        "rows_parsed": parsed,
        "rows_distinct": parsed - flaws["duplicate"],
        "rows_of_another_date": flaws["late"],
    }


def split(whole: range, index: int, count: int) -> range:
    """Return the index-th of `count` parts of a range; their lengths differ by at most one."""
    return whole[len(whole) * index // count : len(whole) * (index + 1) // count]


# --- The fleet: blocks of meters, and the slices and files that are made of them. -----------------


class Slice(NamedTuple):
    """One process's part of the files of each day."""

    places: range
    addresses: array[int]  # of their meters and those of the next file: 48 bits in 8 bytes each


class File(NamedTuple):
    """A file that a run makes, of any day; without a place, one that the destination has."""

    name: str
    size: int | None  # bytes; with --gzip it is not known beforehand
    place: int | None = None
    addresses: Sequence[int] = ()  # of its meters
    checksum: str | None = None  # CRC32C in Base64, of what is written or there
    thousandths: int = 0  # sum of the readings in it, with --flaws


def draw_block(seed: int, block: int, count: int) -> array[int]:
    """Draw the addresses of the first `count` meters of a block, whatever the other blocks have."""
    # A random number needs no hash to have its bit. At most 1 in 8 new ones is rejected.
    bloom = BloomFilter(BLOCK_METERS, 0.02, lambda _, suffix: (suffix % FILTER_BITS,))
    draw = random.Random(f"{seed}/{block}").getrandbits
    addresses = array("Q")
    for _ in range(count):
        suffix = draw(SUFFIX_BITS)
        while suffix in bloom:
            suffix = draw(SUFFIX_BITS)
        bloom.add(suffix)
        addresses.append(LOCALLY_ADMINISTERED | block << SUFFIX_BITS | suffix)
    return addresses


def draw_slice(run: Run, plan: Plan, places: range, stop: ctypes.c_byte) -> Slice:
    """Draw the meters of a slice and of the file after it. Raises CancelledError on a stop."""
    meters = run.meters_of(range(places.start, min(places.stop + 1, plan.day_files)))
    log.debug("drawing meters %d to %d", meters[0], meters[-1])
    addresses = array("Q")
    for first in range(meters.start - meters.start % BLOCK_METERS, meters.stop, BLOCK_METERS):
        if stop.value:
            raise CancelledError
        count = min(BLOCK_METERS, run.meters - first)
        drawn: Sequence[int] = draw_block(run.seed, first // BLOCK_METERS, count)
        if run.meters_per_file == 1:  # a slice is a range of names
            drawn = sorted(drawn)
        addresses.extend(drawn[max(0, meters.start - first) : meters.stop - first])
    return Slice(places, addresses)


def make_file(run: Run, part: Slice, place: int) -> File:
    """Return the file at a place of a slice, or the one after its last."""
    meters = run.meters_of(range(place, place + 1))
    first = part.places.start * run.meters_per_file
    addresses = part.addresses[meters.start - first : meters.stop - first]
    stem = f"{addresses[0]:012X}"
    if run.meters_per_file > 1:
        stem = f"meters-{meters[0]:09d}-{meters[-1]:09d}"
    size = None if run.gzip else run.file_bytes(len(meters))
    return File(f"{stem}.ndjson{'.gz' if run.gzip else ''}", size, place, addresses)


# --- Results, and the digits of the readings. -----------------------------------------------------


class Sum:
    """Counts that add up, field by field."""

    def add(self, **counts: Any) -> None:
        """Add counts to the fields of these names."""
        for name, value in counts.items():
            total = getattr(self, name)
            if isinstance(total, Counter):
                total.update(value)
            elif value:
                total += value  # in place: a sum would copy all failures each time
                setattr(self, name, total)

    def __iadd__(self, other: Any) -> Any:
        self.add(**vars(other))
        return self


@dataclass
class Slot(Sum):
    """What happened in some seconds of a run."""

    objects: int = 0  # that arrived
    bytes: int = 0  # of objects
    responses: Counter[int] = field(default_factory=Counter)  # by HTTP status
    retries: int = 0
    no_response: int = 0  # requests without one
    asked: int = 0  # turns that were due
    late: int = 0  # those that nobody took, or long after they were due
    # Of uploads since they were due, and since they began, by exponent of LATENCY_BASE:
    latencies: Counter[int] = field(default_factory=Counter)
    services: Counter[int] = field(default_factory=Counter)
    first_uploads: int = 0  # of processes
    last_files: int = 0  # of processes, which have no file left
    asked_more: float = 0.0  # objects a second by which the rate that is asked has risen
    answer_seconds: float = 0.0  # for which upload connections waited for answers and for retries
    file_seconds: float = 0.0  # for files
    turn_seconds: float = 0.0  # for their turn

    def throttled(self) -> int:
        """Return how many answers asked for fewer requests."""
        return sum(self.responses[status] for status in THROTTLED)


def slot_seconds(second: int) -> int:
    """Return the length of the slot of a second: 1, 2 from EXACT_SECONDS on, 4 from twice that."""
    return 1 << (second // EXACT_SECONDS).bit_length()


class Timeline(dict):
    """The slots of a run by the second in which they begin."""

    def at(self, second: int) -> Slot:
        """Return the slot of a second."""
        return self[second - second % slot_seconds(second)]

    def __missing__(self, second: int) -> Slot:
        slot = self[second] = Slot()
        return slot

    def __iadd__(self, other: Any) -> Timeline:
        for second, slot in other.items():
            self.at(second).add(**vars(slot))
        return self


@dataclass
class Result(Sum):
    """Counts and findings. Results add up to the run's, under the names of the record."""

    errors: list[str] = field(default_factory=list)  # why the run cannot go on
    objects_done: int = 0  # delivered; with --verify as they should be
    objects_skipped: int = 0  # that --resume found to be there
    objects_failed: int = 0
    objects_missing: int = 0  # --verify finds this and the next three, --resume unexpected ones too
    objects_different: int = 0
    objects_unexpected: int = 0
    objects_unchecked: int = 0  # that are there, but cannot be compared; also after an upload
    failures: list[tuple[str, str]] = field(default_factory=list)  # what is wrong, with which file
    files_left: int = 0  # whose upload failed
    bytes_left: int = 0  # of these files
    slices_drawn: int = 0
    readings: int = 0  # in the objects done
    thousandths: int = 0  # sum of what can be read of them, with --flaws
    bytes: int = 0  # of the objects done
    timeline: Timeline = field(default_factory=Timeline)


def fatal_result(error: Exception, run: Run) -> Result:
    """Say why a run cannot go on. Raises errors that only the script itself can cause."""
    if isinstance(error, CancelledError):  # the run has stopped
        return Result()
    is_known = isinstance(error, (OSError, MemoryError, RuntimeError))
    if not is_known and not type(error).__module__.startswith("google."):
        raise error
    hint = "; lower --meters or workers" if isinstance(error, (MemoryError, RuntimeError)) else ""
    if getattr(error, "filename", None):
        hint = "; see --temp-dir, --max-disk and --batch-size" if run.bucket else "; see --output-dir"
    return Result([f"cannot go on: {explain(error, None if hint else run)}{hint}"])


def delivered(run: Run, file: File) -> Result:
    """Return the result of a file that is where it should be."""
    readings, size = run.day_rows * len(file.addresses), file.size or 0
    return Result(objects_done=1, readings=readings, thousandths=file.thousandths, bytes=size)


@functools.lru_cache(maxsize=3)
def render_day_template(day: date, interval: int) -> bytes:
    """Render the DAY_SECONDS / interval rows of a meter-day, with ROW's placeholders."""
    steps = itertools.repeat(timedelta(seconds=interval), DAY_SECONDS // interval - 1)
    option = orjson.OPT_NAIVE_UTC | orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
    row = orjson.loads(ROW)
    times = itertools.accumulate(steps, initial=datetime(day.year, day.month, day.day))
    return b"".join(orjson.dumps({**row, "timestamp": moment}, option=option) for moment in times)


def draw_digits(key: str, rows: int) -> list[bytearray]:
    """Draw the three digits of `rows` readings as columns; a key always gives the same digits."""
    # SHAKE128 (FIPS 202), with six standard deviations more than the expected 2.4% of uneven bytes.
    size = rows * 256 // 250 + math.isqrt(rows)
    while True:
        drawn = bytearray(hashlib.shake_128(key.encode()).digest(len(DIGIT_TABLES) * size))
        columns = []
        for start, table, uneven in zip(range(0, len(drawn), size), DIGIT_TABLES, UNEVEN_BYTES):
            columns.append(drawn[start : start + size].translate(table, uneven)[:rows])
        if all(len(column) == rows for column in columns):
            return columns
        size *= 2


# --- Flaws on purpose: which rows have them, and what can still be read. --------------------------


def draw_flaws(key: str, rows: int, counts: dict[str, int]) -> list[tuple[int, str]]:
    """Draw rows and their flaws in the order of rows; all ways to place them are equally likely."""
    # A shuffle (Fisher and Yates) as far as needed. A place of the kind "disorder" has two rows.
    kinds = [kind for kind in FLAWS for _ in range(counts.get(kind, 0))]
    places, moved, drawn = rows - counts.get("disorder", 0), {}, []
    random_bytes = hashlib.shake_128(f"flaws/{key}".encode()).digest(8 * len(kinds))
    numbers = struct.unpack(f"<{len(kinds)}Q", random_bytes)
    for first, (number, kind) in enumerate(zip(numbers, kinds)):
        other = first + number % (places - first)
        drawn.append((moved.get(other, other), kind))
        moved[other] = moved.get(first, first)
    drawn.sort()
    pairs = itertools.accumulate((kind == "disorder" for _, kind in drawn), initial=0)
    return [(place + before, kind) for (place, kind), before in zip(drawn, pairs)]


def add_digits(column: bytearray) -> int:
    """Add up the ASCII digits of a column."""
    # Adler-32 (RFC 1950) has 1 + the sum of the bytes, modulo 65521, in its lower half.
    pieces = (column[first : first + 7000] for first in range(0, len(column), 7000))
    sums = ((zlib.adler32(piece) & 0xFFFF) - 1 - ord("0") * len(piece) for piece in pieces)
    return sum(digits % 65521 for digits in sums)


class Spoiler:
    """Puts flaws into the rows of meters on one day, and adds up what can still be read."""

    def __init__(self, run: Run, day: date) -> None:
        self.counts, self.seed, self.rows = run.flaw_counts, run.seed, run.day_rows
        self.day, self.thousandths = day, 0
        if "late" in self.counts:
            self.day_before = day - timedelta(days=1)
            self.template_before = render_day_template(self.day_before, run.interval)

    def spoil(self, address: int, clean: bytearray, columns: list[bytearray]) -> bytes:
        """Return the rows of a meter-day with flaws, after them the late ones of the day before."""
        view, parts, done, key = memoryview(clean), [], 0, f"{self.seed}/{address:012X}"
        hundreds, tens, ones = map(add_digits, columns)
        self.thousandths += 100 * hundreds + 10 * tens + ones
        for row, kind in draw_flaws(f"{key}/{self.day}", self.rows, self.counts):
            start, (kept, tail) = row * ROW_BYTES, FLAWS[kind]
            parts.append(view[done : start + kept])
            done = start + ROW_BYTES
            if kind == "disorder":
                parts += view[done : done + ROW_BYTES], view[start:done]
                done += ROW_BYTES
            elif kind == "duplicate":
                self.thousandths += reading_of(columns, row)
                done = start
            else:
                self.thousandths -= reading_of(columns, row)
                parts.append(tail)
        parts.append(view[done:])
        if "late" in self.counts:
            parts += self.late_rows(address, f"{key}/{self.day_before}")
        return b"".join(parts)

    def late_rows(self, address: int, key: str) -> Iterator[bytes]:
        """Yield the rows of a meter that are late on the day before."""
        columns, template = draw_digits(key, self.rows), self.template_before
        for row, kind in draw_flaws(key, self.rows, self.counts):
            if kind == "late":
                start = row * ROW_BYTES
                middle = template[start + ID_OFFSET + 12 : start + DIGITS_OFFSET]
                digits = bytes(column[row] for column in columns)
                yield b"%s%012X%s%s%s" % (ROW[:ID_OFFSET], address, middle, digits, ROW_END)
                self.thousandths += reading_of(columns, row)


def reading_of(columns: list[bytearray], row: int) -> int:
    """Return the reading of a row, in thousandths."""
    hundreds, tens, ones = (column[row] for column in columns)
    return 100 * hundreds + 10 * tens + ones - 111 * ord("0")


# --- Meter-days, and batches of files, which one pool of threads writes. --------------------------


def generate_smart_meter_readings_for_day(
    day: date, template: bytes, meters: Any, seed: int, spoiler: Spoiler | None = None
) -> Iterator[Any]:
    """Yield the rows of each meter for one day, in one buffer: the next meter's replace them."""
    buffer = bytearray(template)
    rows = len(template) // ROW_BYTES
    columns = {digit: bytearray([digit]) * rows for digit in b"0123456789ABCDEF"}
    stamped, day_text = template[ID_OFFSET : ID_OFFSET + 12], str(day)
    for address in meters:
        meter_id = b"%012X" % address
        for offset, (old, new) in enumerate(zip(stamped, meter_id), ID_OFFSET):
            if old != new:  # few columns, because IDs that follow each other differ little
                buffer[offset::ROW_BYTES] = columns[new]
        stamped = meter_id
        digits = draw_digits(f"{seed}/{address:012X}/{day_text}", rows)
        for offset, column in enumerate(digits, DIGITS_OFFSET):
            buffer[offset::ROW_BYTES] = column
        yield spoiler.spoil(address, buffer, digits) if spoiler else buffer


def compress(chunks: Iterable[bytearray]) -> Iterator[bytes]:
    """Compress as gzip level 1 does, without a time stamp in the header, a chunk at a time."""
    compressor = zlib.compressobj(1, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()


class Batch(NamedTuple):
    """Files of one day that are uploaded or verified together."""

    day: date
    folder: str  # where the files are or will be
    files: Sequence[File]


def measure(chunks: Iterable[Any], use: Callable[[Any], Any] = len) -> tuple[int, str]:
    """Use each chunk of a content. Returns its size in bytes and its CRC32C, in Base64."""
    size, checksum = 0, google_crc32c.Checksum()
    for chunk in chunks:
        use(chunk)
        size += len(chunk)
        checksum.update(bytes(chunk))
    return size, base64.b64encode(checksum.digest()).decode()


def write_file(path: str, chunks: Iterable[Any], is_measured: bool) -> tuple[int, str | None]:
    """Write a file, which is whole once it has its name. Returns size and, if asked, CRC32C."""
    partial = f"{os.path.dirname(path)}/.{os.urandom(8).hex()}.part"  # no other task has this name
    try:
        with open(partial, "xb") as file:
            measured = measure(chunks, file.write) if is_measured else (sum(map(file.write, chunks)), None)
        os.rename(partial, path)
    except OSError as error:
        error.filename = path  # that of a write has none
        raise
    finally:
        Path(partial).unlink(missing_ok=True)  # something has failed if it is there
    return measured


def write_batch(run: Run, batch: Batch, stop: ctypes.c_byte) -> list[File]:
    """Write a batch until a stop, --verify only draws it. Returns files, sizes, checksums."""
    template = render_day_template(batch.day, run.interval)
    meters = itertools.chain.from_iterable(file.addresses for file in batch.files)
    spoiler, written = Spoiler(run, batch.day), []
    spoiling = spoiler if run.flaws else None
    rows = generate_smart_meter_readings_for_day(batch.day, template, meters, run.seed, spoiling)
    if not run.verify:
        os.makedirs(batch.folder, exist_ok=True)
    for file in batch.files:
        if stop.value:
            break
        chunks: Iterable[Any] = itertools.islice(rows, len(file.addresses))
        chunks = compress(chunks) if run.gzip else chunks
        path, before = os.path.join(batch.folder, file.name), spoiler.thousandths
        size, checksum = measure(chunks) if run.verify else write_file(path, chunks, bool(run.bucket))
        thousandths = spoiler.thousandths - before
        written.append(file._replace(size=size, checksum=checksum, thousandths=thousandths))
    log.debug("%s: wrote %d files", batch.day, len(written))
    return written


# --- Uploading, by the other pool of threads: pace, retries, answers, failures. -------------------


def next_turn(now: float, last: float, interval: float) -> tuple[float, int]:
    """Return when the next turn is due, on a grid from the last one on, and how many were lost.

    All times are in seconds. A turn that is past is lost, unless it is the one after the last.
    """
    lost = max(0, math.ceil((now - last) / interval) - 1)
    return last + (lost + 1) * interval, lost


class Pace(NamedTuple):
    """How fast a process uploads, and for how long it has not been faster."""

    rate: float  # objects a second
    held: float = 0.0  # seconds for which the rate has not grown
    lowered: float = math.inf  # seconds since it was lowered


def next_pace(pace: Pace, seconds: float, faults: float | None, doubling: float, most: float) -> Pace:
    """Return the pace of --ramp after some more seconds.

    With `faults`, the share of 429, 503 and requests without an answer, or None without requests:

        rate * 0.75                         above 5%
        rate * 0.9                          above 1%, if the rate has been held for doubling / 5
        rate                                above 1%, or None
        rate * 2 ** (seconds / doubling)    otherwise, at most `most`

    A rate that was lowered is held for doubling / 5, and is never below 0.1. To warm up a bucket,
    https://cloud.google.com/storage/docs/request-rate asks for a doubling of 20 minutes or more.
    """
    held, lowered = pace.held + seconds, pace.lowered + seconds
    if lowered < doubling / 5 or faults is None:
        return Pace(pace.rate, held, lowered)
    if faults > 0.05 or (faults > 0.01 and held >= doubling / 5):
        return Pace(max(0.1, pace.rate * (0.75 if faults > 0.05 else 0.9)), 0.0, 0.0)
    if faults > 0.01:
        return Pace(pace.rate, held, lowered)
    return Pace(max(pace.rate, min(most, pace.rate * 2 ** (seconds / doubling))), 0.0, lowered)


class ThreadState(threading.local):
    """What a thread knows of its request; moments are those of the monotonic clock."""

    retries: int  # of the request so far
    deadline: float  # after which it is not tried again
    sending: float  # seconds left for its bytes, without end until their number is known
    due: float = math.inf  # when the answer must be there; a thread of the library sets none
    is_sent: bool  # whether the server has all of the request
    status: int  # of the response, 0 before that
    arrived: dict[str, Any]  # what of an object did, by fields of a Slot
    turn: float  # when the upload was due to begin
    started: float  # when it did
    is_uncertain: bool  # whether an earlier try may have stored the object
    is_between_chunks: bool = False  # of an object, which has one deadline


def is_last_part(request: Any) -> bool:
    """Say whether an object is whole with what a request sends."""
    span = re.search("-([0-9]+)/([0-9]+)", request.headers.get("Content-Range", ""))
    return "=multipart" in request.url or (bool(span) and int(span[1]) + 1 == int(span[2]))


def shared_byte() -> ctypes.c_byte:
    """Return a byte, 0 at first, in memory that this process will share with its children."""
    return ctypes.c_byte.from_buffer(mmap.mmap(-1, 1))


@dataclass
class Sender:
    """Sends the requests of one process, uploads at their turn, and counts what is answered."""

    run: Run
    stop: ctypes.c_byte
    credentials: Any  # None for an emulator
    start: float  # of the run, on the monotonic clock
    share: float = 1.0  # of the run's files
    turn: float = 0.0  # when the last turn was due; at first, one of the grid
    pace: Pace | None = None  # None without a limit
    paced: float | None = None  # when it was last adapted
    told: float = 0.0  # its rate when that was last counted
    recent: deque[tuple[float, bool]] = field(default_factory=deque)  # ends of requests; by a fault?
    turn_lock: threading.Lock = field(default_factory=threading.Lock)
    limit: float = 1.0  # how many uploads may be under way now
    busy: int = 0  # how many are
    narrowed: float = 0.0  # when the limit was last halved, on the monotonic clock
    changed: threading.Condition = field(default_factory=threading.Condition)
    accepted: bool = False  # whether the bucket has taken an object
    accepted_any: ctypes.c_byte = field(default_factory=shared_byte)  # of any process
    reached: bool = False  # whether the service has answered
    given_up: int = 0  # requests given up since one last succeeded
    counts: deque[tuple[int | None, dict]] = field(default_factory=deque)  # by second, not yet taken
    stored: dict[str, tuple[int, str | None]] = field(default_factory=dict)  # by name
    thread: ThreadState = field(default_factory=ThreadState)
    bucket: Any = None  # once it is open

    def count(self, moment: float | None = None, **counts: Any) -> None:
        """Count what happens now, or at another moment, in the slot of that second."""
        second = int((time.monotonic() if moment is None else moment) - self.start)
        self.counts.append((second, counts))  # which needs no lock

    def note(self, **counts: Any) -> None:
        """Count what has no moment, in the result of the process."""
        self.counts.append((None, counts))

    def take_counted(self) -> Result:
        """Return what was counted since it was last taken."""
        taken = Result()
        for _ in range(len(self.counts)):  # other threads go on counting
            second, counts = self.counts.popleft()
            (taken if second is None else taken.timeline.at(second)).add(**counts)
        return taken

    def retrying(self, request: Callable, is_upload: bool = False, is_uncertain: bool = False) -> Any:
        """Return a function that makes a request, again if it fails: the library's retry."""
        from google.cloud.storage.retry import DEFAULT_RETRY

        thread, is_first = self.thread, not self.thread.is_between_chunks
        thread.retries, thread.sending = 0, math.inf
        thread.is_uncertain = is_uncertain
        if is_first:
            thread.deadline = time.monotonic() + self.run.retry_timeout

        def before_retry(error: Exception) -> None:
            # After two requests in a row were given up, others are tried once until one succeeds.
            cause = cause_of(error)
            hopeless = not self.reached and LASTING.search(cause)
            # The last try has a second; a pause never takes that from it.
            left = thread.deadline - time.monotonic() - min(1.0, self.patience())
            if left <= 0 or self.given_up > 1 or hopeless:
                self.given_up += 1
                raise error
            growth = PAUSE_GROWTH ** min(thread.retries, 50)  # a larger power would overflow one day
            longest = min(growth, MAX_WAIT_SECONDS)
            pause = min(random.uniform(0, longest), left)
            log.debug("again in %.1f s: %s", pause, cause)
            self.wait_until(time.monotonic() + pause)
            if not self.stop.value:
                self.count(retries=1, answer_seconds=pause * is_upload)
            thread.retries += 1

        # The library decides what is worth a retry. Its pauses and its timeouts are replaced.
        retry = DEFAULT_RETRY.with_delay(initial=0.0, maximum=0.0).with_timeout(None)
        return retry(functools.partial(self.attempt, is_upload, is_first, request), on_error=before_retry)

    def attempt(self, is_upload: bool, is_first: bool, request: Callable[[], Any]) -> Any:
        """Make a request once, an upload when there is room, an object's first one at its turn."""
        thread, entered = self.thread, time.monotonic()
        with self.room() if is_upload else contextlib.nullcontext():
            now = time.monotonic()
            self.count(answer_seconds=(now - entered) * is_upload)
            if is_first or thread.retries:
                thread.turn = self.take_turn() if is_upload and self.pace else now
                thread.started = time.monotonic()
            if self.stop.value:
                raise CancelledError
            thread.deadline += time.monotonic() - entered
            try:
                response = request()
            except Exception as error:
                thread.is_between_chunks = False  # or the next object would have this one's deadline
                is_about_token = type(error).__module__ == "google.auth.exceptions"
                if is_about_token and not re.search(TOKEN_REFUSED, str(error), re.I):
                    raise ConnectionError(error) from error  # it is retried: the source may recover
                if thread.is_uncertain and IS_THERE.match(cause_of(error)):
                    raise FileExistsError from error  # an earlier try has stored the object
                raise
        self.given_up = 0
        return response

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """Wait until there is room for an upload, and take it among those under way."""
        with self.changed:
            while self.busy >= int(self.limit) and not self.stop.value:
                self.changed.wait(TICK_SECONDS)
            self.busy += 1
        try:
            yield
        finally:
            with self.changed:
                self.busy -= 1
                self.changed.notify(2)

    def adjust(self, began: float, allowed: float, timed_out: bool) -> None:
        """Halve the uploads under way on a timeout, raise them on a quick answer: see RFC 5681."""
        # Over a quarter of the time it may take is not quick: with many more it would time out.
        most = self.run.upload_workers * self.run.transfer_workers
        now = time.monotonic()
        with self.changed:
            if self.given_up > 1:  # an outage: nobody need wait for the others to find that out
                self.limit = most
            elif timed_out and began > self.narrowed:  # once for all that were under way
                self.limit, self.narrowed = max(1.0, self.limit / 2), now
            elif not timed_out and now - began < allowed / 4:
                self.limit = min(self.limit + (1 / self.limit if self.narrowed else 1), most)

    def take_turn(self) -> float:
        """Wait for the next turn. Returns when it, or the first lost before it, was due."""
        entered = time.monotonic()
        with self.turn_lock:  # threads queue, so none takes a turn early
            now = time.monotonic()
            interval = 1 / self.rate_at(now)
            if not self.accepted:  # a process begins with one upload; until then no turn is lost
                self.turn += (now - self.turn) // interval * interval
            first = self.turn + interval
            self.turn, lost = next_turn(now, self.turn, interval)
            due = self.turn
            self.wait_until(due)
        now = time.monotonic()
        seconds = Counter(int(first + number * interval - self.start) for number in range(lost))
        for second, turns in seconds.items():
            self.count(self.start + second, asked=turns, late=turns)
        is_late = now - due > max(interval, LATE_SECONDS)
        self.count(due, asked=1, late=int(is_late), turn_seconds=now - entered)
        return first

    def rate_at(self, now: float) -> float:
        """Return how many objects a second may begin now, with --ramp by what was answered."""
        run, pace = self.run, self.pace
        doubling = 60 * run.ramp_minutes
        window = min(10.0, doubling / 10)
        self.paced = self.paced or now
        if run.ramp and now - self.paced >= window / 10:
            while self.recent and self.recent[0][0] < now - window:
                self.recent.popleft()
            ends = [is_fault for _, is_fault in list(self.recent)]
            faults = sum(ends) / len(ends) if ends else None
            most = self.share * (run.rps_limit or math.inf)
            pace = next_pace(pace, now - self.paced, faults, doubling, most)
            self.pace, self.paced = pace, now
        self.count(asked_more=pace.rate - self.told)
        self.told = pace.rate
        return pace.rate

    def wait_until(self, due: float) -> None:
        """Wait until a time of the monotonic clock, or until the run stops."""
        while not self.stop.value and (left := due - time.monotonic()) > 0:
            time.sleep(min(left, TICK_SECONDS))

    def patience(self) -> float:
        """Return the seconds that an answer may take, so that there is time for another try."""
        return min(MAX_WAIT_SECONDS, self.run.retry_timeout / 3)

    def send(self, forward: Callable[..., Any], request: Any, **options: Any) -> Any:
        """Send a request by the session's own `send`, for as long as it may take."""
        thread, began = self.thread, time.monotonic()
        needed = len(request.body or b"") / SLOWEST_RATE
        thread.sending = min(thread.sending, needed)
        left = max(1.0, thread.deadline - began) + thread.sending  # a last try has a second
        thread.due = began + min(self.patience() + needed, left)
        thread.is_sent, thread.status, thread.arrived = False, 0, {}
        self.count(began, no_response=1)  # until the response comes
        try:
            return forward(request, **{**options, "timeout": thread.due - began})
        except OddAnswer as error:  # it is not the service's, or says that the session is lost
            error.is_uncertain = thread.is_uncertain
            raise
        finally:
            self.count_request(request, began)

    def count_request(self, request: Any, began: float) -> None:
        """Count a request that has ended, with what its response said, if there was one."""
        thread, counts, now = self.thread, self.thread.arrived, time.monotonic()
        spent = min(now - began, thread.sending)
        thread.sending -= spent
        thread.deadline += spent
        status = thread.status
        timed_out = not status and now >= thread.due
        if status:
            counts["responses"] = {status: 1}
            self.count(began, no_response=-1)
        if request.method != "GET":
            is_refused = 400 <= status < 500
            thread.is_uncertain |= thread.is_sent and is_last_part(request) and not is_refused
            if timed_out or 0 < status < 400:
                self.adjust(began, thread.due - began, timed_out)
            counts["answer_seconds"] = now - began
            # An object has one answer, to its last part. What is refused at once would flatter.
            if timed_out or "objects" in counts:
                took, late = now - thread.started, now - thread.turn
                counts.update(latencies={bucket_of(late): 1}, services={bucket_of(took): 1})
            if self.run.ramp:
                self.recent.append((now, status in THROTTLED or not status))
        self.count(now, **counts)

    def renew_token(self, refresh: Callable[[Any], None], request: Any) -> None:
        """Refresh the credentials in time. An answer that is none is a fault that may pass."""
        from google.auth.exceptions import TransportError

        self.thread.due = time.monotonic() + self.patience()
        try:
            with understanding("the answer"):
                refresh(functools.partial(request, timeout=self.patience()))
        except OddAnswer as error:
            raise TransportError(error) from error

    def timed_response(self, sock: Any, *args: Any, **options: Any) -> http.client.HTTPResponse:
        """Read a response that must be whole in time, which each byte would have otherwise."""
        self.thread.is_sent = bool(options.get("method"))  # a proxy asked for a tunnel has none
        response = http.client.HTTPResponse(sock, *args, **options)
        raw, due = response.fp.raw, self.thread.due
        read, left = raw.readinto, lambda: min(max(due - time.monotonic(), 1e-3), DAY_SECONDS)
        raw.readinto = lambda buffer: sock.settimeout(left()) or read(buffer)
        return response

    def on_response(self, response: Any, **_: Any) -> None:
        """Keep what a response says of an object: a hook of the HTTP session. Raises OddAnswer."""
        request, status, thread = response.request, response.status_code, self.thread
        thread.status = status
        is_object = status == 200 and (request.method == "PUT" or "=multipart" in request.url)
        if request.method == "PUT" and status in (200, 308):
            thread.arrived["bytes"] = len(request.body or b"")
        self.reached = self.reached or status < 400  # what refuses may be a proxy
        if is_object or (status == 200 and "/o/" in request.url):
            with understanding("what the bucket says of an object"):
                answer = orjson.loads(response.content)
                size = int(answer["size"])
                self.stored[answer["name"]] = size, answer.get("crc32c")
                if is_object:
                    thread.arrived = {"bytes": size, **thread.arrived, "objects": 1}
        sent, kept = request.headers.get("Content-Range", ""), response.headers.get("Range", "")
        is_kept = re.findall("-[0-9]+", sent) == re.findall("-[0-9]+", kept)
        is_lost = status in (404, 410) or (status == 308 and (is_last_part(request) or not is_kept))
        if "upload_id" in request.url and is_lost:
            raise OddAnswer("the service has lost the session of the upload, or a part of it")
        is_session = status == 200 and "=resumable" in request.url and not is_object
        thread.is_between_chunks = status == 308 or is_session


def find_credentials(run: Run, stop: ctypes.c_byte) -> Any:
    """Find the Application Default Credentials, or None for an emulator. Raises RunError."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    host, port = r"([\w.-]+|\[[0-9a-fA-F:]+\])", "(:[1-9][0-9]{,4})?"
    if re.fullmatch(rf"https?://{host}{port}(/.*)?", emulator):
        return None
    if emulator:
        raise RunError("STORAGE_EMULATOR_HOST must be like http://localhost:9023; --bucket uses it")
    import google.auth.compute_engine

    is_vm = "GCE_METADATA_HOST" in os.environ or google.auth.compute_engine.detect_gce_residency_linux()
    if not is_vm or "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:  # there is nothing to wait for
        run = replace(run, retry_timeout=1)
    try:  # again, as the metadata server of a VM that has just started may not be up yet
        return Sender(run, stop, None, 0.0).retrying(google.auth.default)()[0]
    except (google.auth.exceptions.GoogleAuthError, OSError, ValueError, AttributeError) as error:
        raise RunError(f"--bucket needs credentials ({explain(error)}): {LOG_IN}") from None


def open_bucket(run: Run, sender: Sender) -> Any:
    """Open the bucket with a client that has a connection for each concurrent upload."""
    # The library otherwise reads the bucket's metadata, which uploads have no permission for.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    from google.cloud import storage
    from urllib3.connection import HTTPConnection

    client = sender.retrying(lambda: storage.Client(project=None, credentials=sender.credentials))()
    session = client._http  # as the library's documentation does to widen the pool of connections
    for adapter in session.adapters.values():  # one may have a client's certificate, and keeps it
        adapter.init_poolmanager(10, run.upload_workers * run.transfer_workers)
    session.send = functools.partial(sender.send, session.send)
    HTTPConnection.response_class = sender.timed_response
    session.hooks["response"].append(sender.on_response)
    session.max_redirects = 0  # an upload that is sent elsewhere is not where it should be
    if sender.credentials:
        credentials = session.credentials
        credentials.refresh = functools.partial(sender.renew_token, credentials.refresh)
    # Otherwise requests looks for proxies, certificates and a .netrc anew on every request.
    known = session.merge_environment_settings(client.api_endpoint, {}, None, None, None)
    session.proxies, session.verify = known["proxies"] or None, known["verify"]
    session.trust_env = False
    session.headers = session.params = None  # nor does it merge: the library's headers are complete
    return client.bucket(run.bucket)


def upload_batch(run: Run, sender: Sender, batch: Batch, written: Future[list[File]]) -> list[Result]:
    """Upload a batch once it is written, delete what arrived, and return a result for each file."""
    began = time.monotonic()
    files = written.result()
    if not run.bucket:  # it stays where it is
        sender.count(objects=len(files), bytes=sum(file.size or 0 for file in files))
        return [delivered(run, file) for file in files]
    connections = min(run.transfer_workers, len(batch.files))
    sender.count(file_seconds=(time.monotonic() - began) * connections)
    from google.cloud.storage import transfer_manager

    blobs = {}  # by path
    for file in files:
        blob = sender.bucket.blob(run.day_prefix(batch.day) + file.name, UPLOAD_CHUNK_BYTES)
        blob.crc32c = file.checksum  # the service compares, not the library
        blobs[os.path.join(batch.folder, file.name)] = blob
    content_type = "application/gzip" if run.gzip else "application/x-ndjson"
    pool = {"worker_type": transfer_manager.THREAD, "max_workers": run.transfer_workers}
    errors: dict[str, Any] = dict.fromkeys(blobs)
    # All files, then from the start those whose session was lost, apart if the object may be there.
    for is_uncertain in (None, True, False):
        states = {path: getattr(error, "is_uncertain", None) for path, error in errors.items()}
        paths = [path for path, state in states.items() if state is is_uncertain]
        retry = functools.partial(sender.retrying, is_upload=True, is_uncertain=bool(is_uncertain))
        options = {"content_type": content_type, "checksum": None, "retry": retry}
        pairs = [(path, blobs[path]) for path in paths]
        ends = transfer_manager.upload_many(pairs, upload_kwargs=options, **pool)
        errors.update(zip(paths, ends))
    uploads = zip(files, blobs, blobs.values(), errors.values())
    results = [check_upload(run, sender, *upload) for upload in uploads]
    try:
        for path in itertools.compress(blobs, (not result.objects_failed for result in results)):
            Path(path).unlink(missing_ok=True)  # somebody else may have deleted it
    except OSError as error:
        results.append(fatal_result(error, run))
    remove_if_empty(batch.folder)
    done = sum(result.objects_done for result in results)
    log.debug("%s: uploaded %d of %d files", batch.day, done, len(files))
    return results


def check_upload(run: Run, sender: Sender, file: File, path: str, blob: Any, error: Any) -> Result:
    """Return what became of an upload: it arrived if the bucket has the file as it should be."""
    is_answer_lost, is_readable = isinstance(error, FileExistsError), True
    if is_answer_lost:
        try:
            error = blob.reload(retry=sender.retrying)
        except Exception as failure:
            is_readable = not cause_of(failure).startswith("HTTP 403")  # the role may only create
            error = failure if is_readable else None
    if isinstance(error, CancelledError):
        return Result()
    size, checksum = sender.stored.pop(blob.name, (0, None))
    reason = explain(error, run).replace(blob.name, "…") if error else ""
    if not error and is_readable and (size != file.size or checksum not in (None, file.checksum)):
        found, wanted = f"{size:,} bytes with CRC32C {checksum}", f"{file.size:,} with {file.checksum}"
        reason = f"the bucket has {found}, not {wanted}"
    if reason:
        fatal = "" if sender.accepted_any.value else f"nothing was accepted: {reason}"
        if re.match(f"the token source.*({TOKEN_REFUSED})", reason, re.I):
            fatal = fatal or reason  # nor will it give another one
        return Result([fatal] if fatal else [], objects_failed=1, failures=[(reason, path)])
    if is_answer_lost:
        sender.count(objects=1, bytes=file.size or 0)
    sender.count(first_uploads=int(not sender.accepted))
    sender.accepted = sender.accepted_any.value = True
    return replace(delivered(run, file), objects_unchecked=int(not is_readable))


def cause_of(error: BaseException) -> str:
    """Say what an error is, without secrets: its innermost cause."""
    source = ""
    for _ in range(20):  # there are wrappers of wrappers; the innermost is the cause
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)  # urllib3 has responses without one
        inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if type(error).__name__ in ("RefreshError", "TransportError"):  # of google.auth
            source = "the token source"
        if inner is None or status:
            break
        error = inner
    if not status:
        kind = "" if isinstance(error, OddAnswer) else type(error).__name__
        words = error
        if len(error.args) > 1 and isinstance(error.args[0], str) and not isinstance(error, ValueError):
            words = error.args[0]
    else:
        kind = f"HTTP {status}"
        words = " ".join(map(str, error.args)) if status < 400 else ""
        words = response.headers.get("Location", words).partition("?")[0]  # secrets may follow
        words = response.text if "text/plain" in response.headers.get("Content-Type", "") else words
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            words = response.json()["error"]["message"]
    words = re.sub(r"\s+", " ", SECRET.sub(r"\1…", str(words))).rstrip()
    return ": ".join(filter(None, (source, kind, words)))


def explain(error: BaseException, run: Run | None = None) -> str:
    """Say in 200 characters what an error is and, of a run's request, what to do about it."""
    cause = cause_of(error)
    remedy = next((remedy for pattern, remedy in REMEDIES if re.search(pattern, cause, re.I)), "")
    is_foreign = bool(run) and run.bucket == DEFAULT_BUCKET
    if is_foreign and remedy.startswith(("create gs", "grant roles/storage")):
        remedy = "this is the default bucket; name yours with --bucket"
    if len(cause) > 200:  # the end says most
        cause = f"{cause[:40]}…{cause[-159:]}"
    return f"{cause}; {remedy.format(bucket=run.bucket)}" if run and remedy else cause


# --- The pipeline of one process: what is there already, batches, and the pools. ------------------


def list_day(run: Run, plan: Plan, part: Slice, sender: Sender, day: date) -> Iterator[File]:
    """Yield what a day has in the slice's range of names, sorted. Raises client and OS errors."""
    places, prefix = part.places, run.day_prefix(day)
    first = make_file(run, part, places.start).name if places.start > 0 else ""
    end = make_file(run, part, places.stop).name if places.stop < plan.day_files else None
    if sender.bucket:
        options = {"fields": "items(name,size,crc32c),nextPageToken", "retry": sender.retrying}
        bounds = {"start_offset": prefix + first, "end_offset": end and prefix + end}
        files = read_listing(sender.bucket.list_blobs(prefix=prefix, **bounds, **options), prefix)
    else:
        folder = os.path.join(str(run.output_dir), prefix)
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        whole = (name for name in names if not PARTIAL.fullmatch(name))
        files = (File(name, os.lstat(folder + name).st_size) for name in whole)
    for file in files:
        if first <= file.name and (not end or file.name < end):  # some emulators heed no bounds
            yield file


def read_listing(listing: Any, prefix: str) -> Iterator[File]:
    """Yield the objects below a prefix. Raises OddAnswer and client errors."""
    last, empty = "", 0
    with understanding("the bucket's listing"):
        for page in listing.pages:
            empty += 1
            for blob in page:
                if not blob.name.startswith(prefix) or blob.name <= last:
                    raise ValueError(f"{blob.name} is not in order below {prefix}")
                if blob.size or not blob.name.endswith("/"):  # and no placeholder of a folder
                    yield File(blob.name[len(prefix) :], int(blob.size), checksum=blob.crc32c)
                last, empty = blob.name, 0
            if empty == 100:
                raise ValueError("100 pages in a row are empty")
            if not listing.next_page_token:  # an empty one would begin again
                break


def choose_files(run: Run, part: Slice, stored: Iterator[File], sender: Sender, day: date) -> Iterator[File]:
    """Yield the files to make or, with --verify, those that are there. Counts the others."""
    files = (make_file(run, part, place) for place in part.places)
    both = heapq.merge(files, stored, key=lambda item: item.name)  # for a full outer join by name
    for name, same in itertools.groupby(both, key=lambda item: item.name):
        if sender.stop.value:
            raise CancelledError
        by_origin = {item.place is None: item for item in same}
        file, listed = by_origin.get(False), by_origin.get(True)
        if run.verify and file and listed:
            yield file._replace(size=listed.size, checksum=listed.checksum)
        elif run.verify:
            kind = "missing" if file else "unexpected"
            sender.note(failures=[(kind, run.day_prefix(day) + name)], **{f"objects_{kind}": 1})
        elif not file:
            sender.note(objects_unexpected=1)
        elif listed and listed.size and file.size in (None, listed.size):
            sender.note(objects_skipped=1)
        else:
            yield file


def verify_batch(run: Run, sender: Sender, batch: Batch, drawn: Future[list[File]]) -> list[Result]:
    """Compare what is stored of a batch with what should be, by size and CRC32C."""

    def compare(stored: File, file: File) -> Result:
        name = run.day_prefix(batch.day) + file.name
        checksum, problem = stored.checksum, "it has no CRC32C"
        try:
            if stored.size != file.size:
                checksum = ""  # nor is it read, as a pipe without an end is
            elif run.output_dir:
                with open(os.path.join(batch.folder, file.name), "rb") as opened:
                    checksum = measure(iter(functools.partial(opened.read, 1 << 20), b""))[1]
            elif not checksum:  # listings have none where the customer manages the keys
                sender.bucket.blob(name).reload(retry=sender.retrying)
                checksum = sender.stored.pop(name, (0, None))[1]
        except CancelledError:
            return Result()
        except Exception as error:
            fatal_result(error, run)  # which raises it if it is our fault
            problem = explain(error)
        if checksum not in (None, file.checksum):
            return Result(objects_different=1, failures=[("different", name)])
        if checksum is None:
            return Result(objects_unchecked=1, failures=[(f"unchecked ({problem})", name)])
        sender.count(objects=1, bytes=file.size)
        return delivered(run, file)

    with ThreadPoolExecutor(run.transfer_workers) as pool:
        return [*pool.map(compare, batch.files, drawn.result())]


def scatter(items: Any) -> Iterator[Any]:
    """Yield the items of a sequence in strides of about the square root of its length."""
    stride = math.isqrt(len(items)) or 1
    return itertools.chain.from_iterable(items[first::stride] for first in range(stride))


def plan_batches(run: Run, plan: Plan, part: Slice, folder: str, sender: Sender) -> Iterator[Batch]:
    """Yield a slice's batches day by day: to verify in the order of names, to upload in strides."""
    # Cloud Storage is slow to follow names in order, so batch b of B has the files b, b + B, ...
    # Batches and their files are scattered again, so that a few in a row cover the whole slice.
    for day in map(date.fromordinal, plan.days):
        chosen = choose_files(run, part, list_day(run, plan, part, sender, day), sender, day)
        if run.verify:
            while files := [*itertools.islice(chosen, plan.batch_files)]:
                yield Batch(day, os.path.join(folder, run.day_prefix(day)), files)
            continue
        needed = array("Q", (file.place for file in chosen)) if run.resume else part.places
        count = -(-len(needed) // plan.batch_files)
        for number in scatter(range(count)):
            files = [make_file(run, part, place) for place in scatter(needed[number::count])]
            name = f"{os.getpid()}.{number}.dt={day}" if run.bucket else run.day_prefix(day)
            if run.bucket and not sender.accepted:  # one alone, in case the bucket is wrong
                yield Batch(day, os.path.join(folder, f"first.{name}"), [files.pop(0)])
            if files:
                yield Batch(day, os.path.join(folder, name), files)


def run_batches(run: Run, plan: Plan, places: range, folder: str, sender: Sender) -> Iterator[Result]:
    """Upload or verify a slice. Yields the results of batches, and an empty one every tick."""
    pending: list[Future[list[Result]]] = []  # batches under way
    plan_executor = ThreadPoolExecutor(1, "plan")
    write_executor = ThreadPoolExecutor(run.write_workers, "write")
    upload_executor = ThreadPoolExecutor(run.upload_workers, "upload")
    with plan_executor, write_executor, upload_executor:
        try:
            part = draw_slice(run, plan, places, sender.stop)
            sender.note(slices_drawn=1)
            keep_freed_memory()  # but not that of the drawing; before there is a thread
            sender.bucket = open_bucket(run, sender) if run.bucket else None
            batches = plan_batches(run, plan, part, folder, sender)
            while True:
                planned = plan_executor.submit(next, batches, None)
                while not planned.done() or len(pending) == plan.pending_batches:
                    yield collect(run, pending, planned)
                batch = planned.result()
                if batch is None or sender.stop.value:
                    break
                written = write_executor.submit(write_batch, run, batch, sender.stop)
                finish = verify_batch if run.verify else upload_batch
                pending.append(upload_executor.submit(finish, run, sender, batch, written))
                while pending and run.bucket and not (run.verify or sender.accepted):  # the first
                    yield collect(run, pending)
        except Exception as error:
            yield fatal_result(error, run)
        while pending:
            yield collect(run, pending)
        sender.count(last_files=int(sender.accepted), asked_more=-sender.told)


def collect(run: Run, pending: list[Future[list[Result]]], *others: Future[Any]) -> Result:
    """Wait a tick for a future to end. Moves ended batches out of `pending` into a result."""
    wait([*pending, *(one for one in others if not one.done())], TICK_SECONDS, FIRST_COMPLETED)
    total = Result()
    for future in [future for future in pending if future.done()]:
        pending.remove(future)
        try:
            for result in future.result():
                total += result
        except Exception as error:
            total += fatal_result(error, run)
    return total


def run_slice(run: Run, plan: Plan, folder: str, sender: Sender, places: range) -> Iterator[Result]:
    """Yield the results of a slice. An error stops the whole run."""
    rate = run.ramp or run.rps_limit
    if rate:
        sender.share = len(places) / plan.day_files
        sender.pace = Pace(rate * sender.share)
        # All processes alternate.
        sender.turn = sender.start + places.start / plan.day_files / sender.pace.rate
    failed = listed = 0
    last = [Result()]  # with what was counted since the end of the last batch
    for result in itertools.chain(run_batches(run, plan, places, folder, sender), last):
        result += sender.take_counted()
        failed += result.objects_failed
        if result.objects_failed and failed >= max(2, plan.batch_files):
            reason, path = result.failures[-1]
            result.errors.append(f"{failed:,} uploads failed, at last {path}: {reason}")
        if run.verify:
            del result.failures[max(0, MAX_DIFFERENCES - listed) :]
            listed += len(result.failures)
        if result.errors and not sender.stop.value:  # at once, for the parent may be slow
            sender.stop.value = FAILED
        yield result


# --- The machine: directories, memory, processes and signals. -------------------------------------


def remove_if_empty(directory: str) -> None:
    """Remove a directory, unless files whose upload failed are in it."""
    with contextlib.suppress(OSError):
        os.rmdir(directory)


def claim_directory(run: Run, plan: Plan) -> str:
    """Return a directory for the files that is writable and has room; --dry-run makes none. Raises RunError."""
    if run.verify or not plan.slices:
        return run.output_dir or ""
    directory = run.temp_dir if run.bucket else str(run.output_dir)
    needed = plan.disk_bytes if run.bucket or not run.gzip else plan.bytes // 12  # gzip leaves 8%
    needed = needed if run.bucket or not run.resume else 0  # files may be there already
    which = f"--{'temp' if run.bucket else 'output'}-dir {directory!r}"
    spool = os.path.join(directory, f".wattif-{os.getuid()}") if run.bucket else directory
    wanted = Path(os.path.abspath(spool))
    try:
        existing = next(path for path in (wanted, *wanted.parents) if os.path.lexists(path))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise OSError(0, "no directory that can be written", existing)
        if not run.dry_run:
            os.makedirs(spool, exist_ok=True)
        if run.bucket and os.path.lexists(spool):
            lock_spool(spool, run.dry_run)
        free = shutil.disk_usage(existing).free
    except BlockingIOError:
        raise RunError(f"{which} is in use by another run; wait or give another", 1) from None
    except OSError as error:
        cause = f"{error.filename or directory}: {error.strerror or error}"
        raise RunError(f"{which} cannot be written: {cause}; name another") from None
    if free < needed:
        megabytes = free * 9 // 10**7
        cap = f"--max-disk {megabytes}MB, or " if megabytes * 10**6 >= plan.least_disk else ""
        remedy = f"give {cap}another directory" if run.bucket else "lower --meters"
        raise RunError(f"{which} has {in_bytes(free)} free, not {in_bytes(needed)}; {remedy}")
    return spool


def lock_spool(spool: str, is_trial: bool) -> None:
    """Lock a directory of this user until this process ends, and empty it unless it is a trial."""
    lock = os.open(spool, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    if os.fstat(lock).st_uid != os.getuid():
        raise OSError(0, "it belongs to another user", spool)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a crash leaves no lock behind
    if is_trial:
        return
    os.umask(0o077)  # nobody else reads what is in it
    os.fchmod(lock, 0o700)
    atexit.register(remove_if_empty, spool)
    for left in os.scandir(lock):
        log.warning("deleting %s/%s, which an earlier run left", spool, left.name)
        path = f"/proc/self/fd/{lock}/{left.name}"  # even if another directory has taken its place
        (shutil.rmtree if left.is_dir(follow_symlinks=False) else os.unlink)(path)


def count_cores() -> int:
    """Return the cores that affinity and control groups leave to this process: see cgroups(7)."""
    cores, groups = [len(os.sched_getaffinity(0))], Path("/proc/self/cgroup")
    for path in re.findall("^0::/(.*)", groups.read_text() if groups.exists() else "", re.M):
        for folder in (CONTROL_GROUPS / path, *(CONTROL_GROUPS / path).parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                quota, period = map(int, (folder / "cpu.max").read_text().split())
                cores.append(-(-quota // period))
    return min(cores)


def keep_freed_memory() -> None:
    """Let glibc keep the memory of finished uploads instead of mapping it anew: see mallopt(3)."""
    mmap_from, trim_at, top_pad, arenas = (-3, 32 << 20), (-1, 512 << 20), (-2, 16 << 20), (-8, 1)
    with contextlib.suppress(OSError, AttributeError):
        for option in (mmap_from, trim_at, top_pad, arenas):
            ctypes.CDLL("libc.so.6").mallopt(*option)


def run_child(work: Callable[[range], Any], places: range, results: Any, parent: int) -> None:
    """Be one of several processes: send a slice's results."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive its parent
    if os.getppid() != parent:  # it has ended before that
        os._exit(1)
    for result in work(places):
        results.send(result)


def run_processes(run: Run, plan: Plan, work: Callable[[range], Any], stop: ctypes.c_byte) -> Iterator[Result]:
    """Run each slice in a process of its own. Yields their results, and an empty one every tick."""
    if run.bucket:
        import google.cloud.storage.transfer_manager  # noqa: F401 - once for all children
    context = multiprocessing.get_context("fork")  # before any thread or client exists
    children: dict[Any, tuple[range, Any]] = {}  # places and process, by the connection to read
    try:
        for places in plan.slices:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=run_child, args=(work, places, theirs, os.getpid()), daemon=True)
            child.start()
            theirs.close()
            children[ours] = (places, child)
    except OSError as error:
        stop.value = stop.value or FAILED
        yield Result([f"cannot start {len(plan.slices)} processes: {error.strerror}; lower --processes"])
    while children:
        yield Result()
        for ours in multiprocessing.connection.wait(list(children), TICK_SECONDS):
            try:
                yield ours.recv()
            except (EOFError, OSError):
                places, child = children.pop(ours)
                child.join()
                if child.exitcode:
                    is_killed = child.exitcode == -signal.SIGKILL
                    how = f"ended with exit code {child.exitcode}"
                    how = "was killed (out of memory?)" if is_killed else how
                    files = f"files {places[0]} to {places[-1]} of each day"
                    yield Result(failures=[(f"their process {how}; run it again", files)])


def handle_signals() -> ctypes.c_byte:
    """Return the byte that stops a run. A signal sets it, a second one ends the run at once."""
    stop, parent = shared_byte(), os.getpid()

    def handle(signum: int, _: Any) -> None:
        if os.getpid() != parent:  # which gets the signal too, or is meant to
            return
        if signum == signal.SIGALRM:
            raise KeyboardInterrupt  # out of whatever the run waits for
        if stop.value > 0:
            os._exit(128 + signum)
        stop.value = signum
        signal.alarm(GRACE_SECONDS)
        say("stopping: what is under way is finished; another signal stops at once")

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handle)
    return stop


# --- Measuring: what the timeline says of the bucket. ---------------------------------------------


def bucket_of(seconds: float) -> int:
    """Return the bucket of a latency: the exponent of LATENCY_BASE that gives its upper bound."""
    return math.ceil(math.log(max(seconds, 1e-6), LATENCY_BASE))


def percentile(latencies: Counter[int], share: float) -> float | None:
    """Return the seconds within which a share of the responses came, to 2.5%; None without any."""
    left = share * sum(latencies.values())
    for bucket, count in sorted(latencies.items()):
        left -= count
        if left <= 0:
            return round(LATENCY_BASE ** (bucket - 0.5), 6)
    return None


def per_second(timeline: Timeline, elapsed: float) -> list[Slot]:
    """Return a slot for each second of a run; a longer one is that of its first second."""
    nothing = Slot()
    return [timeline.get(second, nothing) for second in range(max([int(elapsed), *timeline]) + 1)]


def fold(seconds: Sequence[Slot], most: int) -> tuple[int, list[Slot]]:
    """Add up slots to at most `most` ones of equal length. Returns this length, and them."""
    length = -(-len(seconds) // most) or 1
    folded = [Slot() for _ in range(0, len(seconds), length)]
    for second, slot in enumerate(seconds):
        folded[second // length].add(**vars(slot))
    return length, folded


def throttled_share(slots: Sequence[Slot]) -> float:
    """Return the share of throttled answers."""
    answers = sum(sum(slot.responses.values()) for slot in slots)
    return sum(slot.throttled() for slot in slots) / max(1, answers)


def find_throttling(seconds: Sequence[Slot]) -> int | None:
    """Return the first throttled second whose ten seconds have over 1% of throttled answers."""
    for second, slot in enumerate(seconds):
        if slot.throttled() and throttled_share(seconds[second : second + 10]) > 0.01:
            return second
    return None


def find_sustained(seconds: Sequence[Slot], elapsed: float) -> float | None:
    """Return the most objects a second over a tenth of the run with under 1% throttled, if any."""
    width, whole = min(60, max(5, int(elapsed / 10))), seconds[: int(elapsed)]
    counts = [(slot.objects, slot.throttled(), sum(slot.responses.values())) for slot in whole]
    sums = [[0, *itertools.accumulate(column)] for column in zip(*counts)]
    calm = []
    for first in range(len(whole) - width + 1):
        objects, throttled, answers = (column[first + width] - column[first] for column in sums)
        if 100 * throttled < max(1, answers):
            calm.append(objects)
    return round(max(calm) / width, 3) if calm else None


def find_steady(seconds: Sequence[Slot]) -> tuple[int, int]:
    """Return the range of seconds in which every process had files to upload."""
    begun = [second for second, slot in enumerate(seconds) if slot.first_uploads]
    ended = [second for second, slot in enumerate(seconds) if slot.last_files]
    return (begun[-1] + 1, ended[0]) if begun and ended else (0, 0)


def make_record(progress: Progress, signum: int) -> dict[str, Any]:
    """Return the record of a run, which a signal may have stopped: see README."""
    run, plan, total = progress.run, progress.plan, progress.total
    elapsed = max(time.monotonic() - progress.started, 1e-3)
    counted = re.compile("objects|files|bytes|readings")
    counts = {name: value for name, value in vars(total).items() if counted.match(name)}
    there = total.objects_done + total.objects_skipped
    if not run.verify:
        counts["objects_missing"] = plan.objects - there - total.objects_failed
    unexpected = run.verify and total.objects_unexpected
    status = int(bool(there != plan.objects or unexpected or total.errors or total.failures))
    is_told = run.flaws and total.objects_done == plan.objects
    return {
        "started": f"{progress.date:%Y-%m-%dT%H:%M:%SZ}",
        "host": os.uname().nodename,
        "wattif": VERSION,
        "python": sys.version.split()[0],
        "google_cloud_storage": importlib.metadata.version("google-cloud-storage"),
        **plan_record(run, plan),
        "exit_status": 128 + signum if signum > 0 and status else status,
        "error": total.errors[0] if total.errors else None,
        **counts,
        "failures": [*name_failures(total.failures, run.verify)],
        "readings_sum": "{}.{:03}".format(*divmod(total.thousandths, 1000)) if is_told else None,
        "elapsed_seconds": round(elapsed, 3),
        **measure_bucket(progress, elapsed),
        "expectations": [],
    }


def measure_bucket(progress: Progress, elapsed: float) -> dict[str, Any]:
    """Return what the record says of the rates, answers and latencies, and of what limited them."""
    seconds = per_second(progress.total.timeline, elapsed)
    whole = fold(seconds, 1)[1][0]
    length, slots = fold(seconds, MOST_SLOTS)
    same = ("objects", "bytes", "responses", "retries", "no_response", "late", "asked")
    timeline = []
    for number, slot in enumerate(slots):
        times = {name: percentile(slot.latencies, LATENCY_SHARES[name]) for name in ("p50", "p99")}
        counts = {name: getattr(slot, name) for name in same}
        timeline.append({"second": number * length, "seconds": length, **counts, **times})
    shares = LATENCY_SHARES.items()
    histogram = sorted(whole.latencies.items())
    return {
        **measure_rates(progress, seconds, elapsed),
        "responses": whole.responses,
        "throttled": whole.throttled(),
        "no_response": whole.no_response,
        "retries": whole.retries,
        "late_starts": whole.late,
        **{f"latency_{name}_seconds": percentile(whole.latencies, share) for name, share in shares},
        **{f"service_{name}_seconds": percentile(whole.services, share) for name, share in shares},
        "latency_histogram": {f"{LATENCY_BASE**bucket:.6g}": count for bucket, count in histogram},
        **find_limit(progress, whole, elapsed),
        "timeline": timeline,
    }


def measure_rates(progress: Progress, seconds: Sequence[Slot], elapsed: float) -> dict[str, Any]:
    """Return what was asked of the bucket, what it took, and since when it throttled."""
    run, plan, total = progress.run, progress.plan, progress.total
    asked = (run.rps_limit or 0) * plan.objects / len(plan.days) / plan.day_files
    if run.ramp:
        asked = max(itertools.accumulate(slot.asked_more for slot in seconds))
    first, last = find_steady(seconds)
    length, steady = fold(seconds[first:last], MOST_SLOTS)
    rates: dict[str, Any] = {}
    for name, done in (("bytes", total.bytes), ("objects", total.objects_done)):
        counts = [getattr(slot, name) for slot in seconds]
        peak = max(count / slot_seconds(second) for second, count in enumerate(counts))
        median = sorted(getattr(slot, name) for slot in steady)[len(steady) // 2 :][:1]
        rates[f"mean_{name}_per_second"] = round(done / elapsed, 3)
        rates[f"peak_{name}_per_second"] = round(max(peak, sum(counts) / elapsed), 3)
        steady_rate = round(median[0] / length, 3) if last - first >= 5 else None
        rates[f"steady_{name}_per_second"] = steady_rate
    onset, throttling = find_throttling(seconds), None
    if onset is not None:
        answered = next(second for second, slot in enumerate(seconds) if slot.responses)
        before = counts[max(answered + 1, onset - 10) : onset]  # the first is no whole second
        since = counts[onset : last if last > onset else None]
        throttling = {
            "second": onset,
            "utc": f"{progress.date + timedelta(seconds=onset):%Y-%m-%dT%H:%M:%SZ}",
            "objects_per_second": round(sum(before) / len(before), 3) if before else None,
            "objects_per_second_since": round(sum(since) / len(since), 3),
        }
    sustained = find_sustained(seconds, elapsed) if run.bucket and not run.verify else None
    return {
        **rates,
        "asked_objects_per_second": round(asked, 3) or None,
        "tail_seconds": round(elapsed - last, 3) if last else None,
        "sustained_objects_per_second": sustained,
        "throttling": throttling,
    }


def find_limit(progress: Progress, whole: Slot, elapsed: float) -> dict[str, Any]:
    """Return how busy the CPU was, what uploads waited for, and what limited the run by that."""
    run, plan = progress.run, progress.plan
    processes, is_upload = max(1, len(plan.slices)), bool(run.bucket) and not run.verify
    connections = processes * run.upload_workers * min(run.transfer_workers, plan.batch_files)
    cpu = (sum(os.times()[:4]) - progress.cpu_before) / elapsed / min(processes, count_cores())
    shares = {}
    for name in ("answer", "file", "turn"):
        waited = getattr(whole, f"{name}_seconds") / connections
        shares[f"{name}_share"] = round(waited / elapsed, 3)
    share, limit = max(zip(shares.values(), ("bucket", "disk", "rps-limit")))
    if not is_upload:
        limit, shares = "disk", dict.fromkeys(shares)
    elif share < LEAST_SHARE:
        limit = None
    if limit != "rps-limit" and cpu > BUSY_SHARE:
        limit = "cpu"
    return {
        "limited_by": limit if whole.objects and not run.verify else None,
        "cpu_share": round(cpu, 3),
        **shares,
        "upload_connections": connections if is_upload and plan.slices else 0,
    }


# --- Reporting: standard error is for people, standard output for programs. -----------------------


def on_terminal() -> bool:
    """Say whether standard error is a terminal on which a line can be erased."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def say(line: str, end: str = "\n") -> None:
    """Write a line to standard error over the live line, with control characters escaped."""
    line = "".join(one if one.isprintable() else repr(one)[1:-1] for one in line)
    # A full disk or a closed pipe is ignored. The buffer of sys.stderr would keep the text.
    with contextlib.suppress(OSError):
        text = ("\r\x1b[K" if on_terminal() else "") + line + end
        os.write(sys.stderr.fileno(), text.encode(sys.stderr.encoding, "backslashreplace"))


def in_bytes(count: float) -> str:
    """Write a number of bytes with three significant digits in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def in_time(seconds: float) -> str:
    """Write a duration in its two largest units, or in seconds or milliseconds."""
    if seconds < 60:
        return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:,.0f} h {seconds % 3600 // 60:.0f} min"


def many(count: int, noun: str) -> str:
    """Write a number of things."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def describe_rate(run: Run, objects: int) -> str:
    """Say how many objects a second a run asks for, and how long it takes if all goes well.

    A ramp from S a second on that doubles in M seconds has S * M / ln 2 * (2 ** (t / M) - 1) by t.
    """
    limit = run.rps_limit or math.inf
    seconds, rates = objects / limit, []
    if run.ramp:
        doubling = 60 * run.ramp_minutes
        scale = run.ramp * doubling / math.log(2)
        ramped = min(objects, (limit / run.ramp - 1) * scale)
        seconds = doubling * math.log2(1 + ramped / scale) + (objects - ramped) / limit
        rates.append(f"{run.ramp:,g} objects/s, doubled every {run.ramp_minutes:g} min")
    if run.rps_limit:
        rates.append(f"at most {limit:,g} objects/s")
    return f"{', '.join(rates)}; at least {in_time(seconds)}"


def describe_plan(run: Run, plan: Plan) -> Iterator[str]:
    """Yield what a run will do: days, meters, readings, objects, bytes, rate, disk, destination."""
    largest = run.file_bytes(min(run.meters_per_file, run.meters))
    inexact = "at most " if run.gzip or run.meters % run.meters_per_file else ""
    is_upload, all_objects = run.bucket and not run.verify, len(plan.days) * plan.day_files
    uploads = f", {many(plan.objects, 'upload')} (class A operations)" if is_upload else ""
    record = plan_record(run, plan)
    flaws = ", ".join(f"{count:,} {kind}" for kind, count in record["flaws"].items())
    rows = ((name, count) for name, count in record.items() if name.startswith("rows_"))
    kinds = ", ".join(f"{count:,} {name[5:].replace('_', ' ')}" for name, count in rows)
    disk = f"at most {plan.disk_bytes:,} bytes ({in_bytes(plan.disk_bytes)}) at once in "
    task = f"{run.task_index} of {run.task_count:,} (from {run.task_source})"
    lines = {
        "started": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC",
        "days": f"{run.start} to {run.end}",
        "meters": f"{run.meters:,}, a reading every {run.interval} s, seed {run.seed}",
        "task": run.task_source and task,
        "readings": f"{plan.readings:,}",
        "flaws": flaws,
        "rows": flaws and kinds,
        "objects": f"{plan.objects:,} of {inexact}{largest:,} bytes{uploads}",
        "bytes": f"{plan.bytes:,} ({in_bytes(plan.bytes)}){' before compression' * run.gzip}",
        "processes": f"{len(plan.slices)}",
        "rate": is_upload and (run.ramp or run.rps_limit) and describe_rate(run, all_objects),
        "disk": not run.verify and f"{disk}{run.temp_dir if run.bucket else run.output_dir}",
        "destination": f"{run.destination()}/dt=YYYY-MM-DD/",
    }
    yield from (f"{name:<13}{text}" for name, text in lines.items() if text)
    if plan.bytes > 10**12 or plan.objects > 10**6:
        size = f"{in_bytes(plan.bytes)} in {many(plan.objects, 'object')}"
        yield f"This is a lot: {size}; see in the README what a run costs"
    fastest = PROCESS_RATE * len(plan.slices) * run.task_count
    fastest = run.rps_limit or min(fastest, all_objects / 60)
    if is_upload and not run.ramp and fastest > COLD_RATE:
        yield f"A cold bucket takes {COLD_RATE:,} objects/s; warm it up with --ramp {COLD_RATE}"


class Progress:
    """What a run has done so far: shown on a terminal, logged elsewhere."""

    def __init__(self, run: Run, plan: Plan, stop: ctypes.c_byte) -> None:
        self.run, self.plan, self.stop, self.total = run, plan, stop, Result()
        self.started = self.shown = time.monotonic()
        self.date, self.cpu_before = datetime.now(timezone.utc), sum(os.times()[:4])
        self.arrived = self.retries = 0  # objects and requests
        self.first = 0.0  # when the first object came

    def add(self, result: Result) -> None:
        """Add a result, and show the progress if it is time to."""
        now, interactive = time.monotonic(), on_terminal()
        self.total += result
        for slot in result.timeline.values():
            self.arrived += slot.objects
            self.retries += slot.retries
        if self.arrived and not self.first:
            self.first = now - TICK_SECONDS
        if now - self.shown < (TICK_SECONDS if interactive else LOG_SECONDS):
            return
        self.shown = now
        if interactive:
            say(self.live_line((os.get_terminal_size(2).columns or 80) - 1), end="")
        else:
            log.info("%s", self.live_line(200))

    def live_line(self, width: int) -> str:
        """Say how far the run is, in `width` characters at most; what matters least is cut off."""
        total, planned, now = self.total, max(1, self.plan.objects), time.monotonic()
        failed = f"{total.objects_failed:,} failed  " if total.objects_failed else ""
        handled = self.arrived + total.objects_failed
        handled += total.objects_missing + total.objects_different
        done = min(handled + total.objects_skipped, planned)
        state = "? left"
        if self.stop.value:
            state = "stopping"
        elif self.first:
            left = (now - self.first) / handled * (planned - done)
            state = f"{timedelta(seconds=round(left))} left"
        elif total.slices_drawn < len(self.plan.slices) and not handled:
            state = "drawing the fleet"
        second = max(1, int(now - self.started))
        lately = range(max(0, second - 10), second)  # whole seconds
        speed = in_bytes(sum(total.timeline.at(one).bytes for one in lately) / len(lately))
        bar = f"[{'#' * (20 * done // planned):.<20}]  " if width > 70 else ""
        line = f"{100 * done // planned:3d}%  {bar}{done:,}/{planned:,} objects  {failed}{speed}/s"
        return f"{line}  {state}  {self.retries:,} retries"[:width]


def name_failures(failures: Sequence[tuple[str, str]], verify: bool) -> Iterator[str]:
    """Yield a line for each finding of --verify, or for all uploads that failed for one reason."""
    if verify:
        yield from (f"{reason}: {name}" for reason, name in failures)
        return
    for reason, alike in itertools.groupby(sorted(failures), key=operator.itemgetter(0)):
        first, *others = (name for _, name in alike)
        yield f"{first}{f' and {len(others):,} more' if others else ''}: {reason}"


def draw_rows(kind: str, seconds: Sequence[Slot]) -> Iterator[str]:
    """Yield what arrived, the throttled share and the slowest answers as bars on one time axis."""
    width = max(10, min(len(seconds), shutil.get_terminal_size().columns - 60))
    length, slots = fold(seconds, width)
    objects = [slot.objects / length for slot in slots]
    size = in_bytes(max(slot.bytes for slot in slots) / length)
    shares = [throttled_share([slot]) for slot in slots]
    p99 = [percentile(slot.latencies, 0.99) or 0.0 for slot in slots]
    slowest = f"{in_time(min(filter(None, p99), default=0))} to {in_time(max(p99))}"
    for name, values, extremes in (
        (kind, objects, f"at most {max(objects):,.0f} objects/s, {size}/s"),
        ("throttled", shares, f"at most {max(shares):.0%} of the answers"),
        ("p99", p99, slowest),
    ):
        if any(values):
            heights = (math.ceil(len(BARS) * value / max(values)) for value in values)
            yield f"{name:<13}{''.join(f'·{BARS}'[height] for height in heights)}   {extremes}"
    end = f"{len(seconds) // 60}:{len(seconds) % 60:02d}"
    yield f"{'':13}0:00 {end:>{max(len(slots) - 5, 0)}}"


def describe_measurements(progress: Progress, record: dict[str, Any]) -> Iterator[str]:
    """Yield what the bucket did: rows of bars, and sentences that interpret the numbers."""
    seconds = per_second(progress.total.timeline, record["elapsed_seconds"])
    if len(seconds) > 3 and "utf" in sys.stderr.encoding.lower():
        kinds = {"upload": "uploaded", "write": "written", "verify": "verified"}
        rows = [*draw_rows(kinds[record["mode"]], seconds)]
        if len(rows) > 1:  # not the time axis alone
            yield from rows
    if record["responses"] or record["no_response"]:
        responses = sorted(record["responses"].items())
        answers = ", ".join(f"{count:,} of {status}" for status, count in responses) or "none"
        silent = many(record["no_response"], "request")
        yield f"responses    {answers}; {silent} without one, {record['retries']:,} retries"
    if record["latency_histogram"]:
        times = {name: in_time(record[f"latency_{name}_seconds"]) for name in LATENCY_SHARES}
        yield f"latency      {', '.join(map(' '.join, times.items()))}"
    onset, sustained = record["throttling"], record["sustained_objects_per_second"]
    if onset:
        before = onset["objects_per_second"]
        at = "" if before is None else f", at {before:,.0f} objects/s"
        moment = f"{in_time(onset['second'])} ({onset['utc'][11:19]} UTC)"
        since = f"{onset['objects_per_second_since']:,.0f} objects/s since"
        yield f"throttling began after {moment}{at}; {since}"
    if sustained:
        least = "" if onset else "at least "
        yield f"the bucket sustains {least}{sustained:,.0f} objects/s without throttling"
    if record["late_starts"]:
        asked, late = record["asked_objects_per_second"], many(record["late_starts"], "turn")
        yield f"asked for {asked:,.4g} objects/s; {late} unused or late"
    limit, count = record["limited_by"], record["upload_connections"]
    if limit and count:
        pace = "--ramp" if progress.run.ramp else "--rps-limit"
        waits = {"disk": ("file", "files"), "rps-limit": ("turn", "their turn")}
        kind, things = waits.get(limit, ("answer", "answers"))
        name = pace if limit == "rps-limit" else f"the {limit}"
        waiting = f"{record[f'{kind}_share']:.0%} of {count:,} upload connections were waiting"
        busy = f"the CPU was {record['cpu_share']:.0%} busy"
        yield f"limited by {name}: {waiting} for {things}, {busy}"
    for rule in record["expectations"]:
        value = "null" if rule["value"] is None else rule["value"]
        yield f"{'met' if rule['met'] else 'not met'}: {rule['rule']} ({value})"


def print_report(progress: Progress, record: dict[str, Any]) -> None:
    """Tell people what became of the run."""
    run, status, place = progress.run, record["exit_status"], progress.run.destination()
    again = f"run it again{'' if run.verify else ' with --resume'}"
    for failure in record["failures"]:
        say(failure if run.verify else f"failed: {failure}")
    if record["files_left"]:
        left = f"{many(record['files_left'], 'file')} of {in_bytes(record['bytes_left'])}"
        say(f"left below {run.temp_dir} until your next run there: {left}")
    if record["error"]:
        say(f"error: {record['error']}; fix that, then {again}")
    if status > 128:
        say(f"stopped by {signal.Signals(status - 128).name}; {again}")
    kinds = ["failed", "skipped", "missing"] + ["unchecked"] * (record["objects_unchecked"] > 0)
    if run.verify:
        kinds = ["missing", "different", "unexpected", "unchecked"]
        for kind, advice in VERIFY_ADVICE.items():
            delete = "gcloud storage rm" if run.bucket else "rm"
            if record[f"objects_{kind}"]:
                say(f"{kind} objects: {advice.format(delete=delete, destination=place)}")
    elif record["objects_unexpected"]:
        trouble = "another shape or seed there doubles the rows of every glob; see --prefix"
        say(f"unexpected objects in {place}: {record['objects_unexpected']:,}; {trouble}")
    found = ", ".join(f"{record[f'objects_{kind}']:,} {kind}" for kind in kinds)
    objects, readings, size = (record[key] for key in ("objects_done", "readings", "bytes"))
    seconds = record["elapsed_seconds"]
    planned = many(record["objects_planned"], "object")
    done = f"{objects:,} of {planned}, {many(readings, 'reading')}, {in_bytes(size)}"
    speeds = f"{objects / seconds:,.1f} objects/s, {readings / seconds:,.0f} readings/s"
    say(f"{done} in {seconds:.2f} s: {speeds}, {in_bytes(size / seconds)}/s; {found}")
    for line in describe_measurements(progress, record):
        say(line)
    say(f"ended        {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a question for the most similar of some names, or nothing."""
    return "".join(f"; did you mean {one}?" for one in difflib.get_close_matches(name, known, 1))


def judge(run: Run, record: dict[str, Any]) -> None:
    """Add to the record what --expect found, and exit status 3 where that alone is wrong."""
    kinds = (int, float, type(None))
    known = {key for key, value in record.items() if isinstance(value, kinds)} - WORDS
    for rule in run.expect or ():
        key, sign, number = re.fullmatch(EXPECTATION, rule).groups()
        if key not in known:
            numbers = ", ".join(sorted(known))
            raise RunError(f"--expect {rule}: the record has no such number{nearest(key, known)} (it has {numbers})")
        value = record[key]
        is_met = value is not None and COMPARISONS[sign](value, float(number))
        record["expectations"].append({"rule": f"{key}{sign}{number}", "value": value, "met": is_met})
        if not is_met and not record["exit_status"]:
            record["exit_status"] = 3


def store_record(run: Run, stop: ctypes.c_byte, record: dict[str, Any]) -> None:
    """Put the record of a complete run beside its data; without a new object it replaces none."""
    name = f"_wattif/{run.start}_{run.end}_task-{run.task_index}-of-{run.task_count}.json"
    name = f"{run.prefix}/{name}" if run.prefix else name
    path, text = Path(str(run.output_dir), name), render_json(record)
    try:
        if run.bucket:
            sender = Sender(run, stop, find_credentials(run, stop), time.monotonic())
            generation = None if record["objects_done"] else 0
            options = {"retry": sender.retrying, "if_generation_match": generation}
            with contextlib.suppress(FileExistsError):  # an answer was lost
                blob = open_bucket(run, sender).blob(name)
                blob.upload_from_string(text, "application/json", **options)
        elif record["objects_done"] or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(str(path), [text.encode()], is_measured=False)
    except (Exception, KeyboardInterrupt) as error:
        if not record["objects_done"] and IS_THERE.match(cause_of(error)):
            return  # one is there
        if not stop.value:
            fatal_result(error, run)  # which raises it if it is our fault
        cause = "the run was stopped" if stop.value else explain(error, run)
        record["error"] = f"the record cannot be stored as {name}: {cause}"
        record["exit_status"] = 128 + stop.value if stop.value else 1


def render_json(record: dict[str, Any]) -> str:
    """Render a record as a line of JSON; the shares of flaws are fractions."""
    return orjson.dumps(record, float, orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE).decode()


def print_out(text: str, status: int) -> int:
    """Print on standard output. Returns the exit status: 1 if only that fails."""
    try:
        with open(sys.stdout.fileno(), "w", closefd=False, errors="backslashreplace") as out:
            out.write(text)
    except (OSError, AttributeError) as error:  # it is None if it was closed
        say(f"error: standard output cannot be written: {getattr(error, 'strerror', 'closed')}")
        return status or 1
    return status


# --- The command line. ----------------------------------------------------------------------------

USAGE = """\
usage: generator.py --start DATE --end DATE [--bucket NAME | --output-dir DIR] [options]
       generator.py --help
examples:
  generator.py --start 2024-01-01 --end 2024-01-01 --meters 20 --output-dir readings
  generator.py --start 2024-01-01 --end 2024-01-31 --bucket my-datalake-bucket
  generator.py --start yesterday --end yesterday --bucket my-datalake-bucket --resume
"""
EPILOG = """\
exit status: 0 all is there, 1 it is not, 2 refused before any work, 3 an --expect is not met, 128 + N signal N
credentials: Application Default Credentials, as of gcloud auth application-default login; none with
STORAGE_EMULATOR_HOST=http://localhost:9023, to which uploads go then"""
GROUPS = {  # of the settings that begin with these
    "start": "what to make, and where",
    "rps_limit": "measure",
    "task_index": "many machines (default: from Cloud Batch, Cloud Run, Slurm or Kubernetes)",
    "temp_dir": "tuning",
}
SCHEDULERS = (  # their variables for a task's index, the number of tasks and the last index
    ("BATCH_TASK_INDEX", "BATCH_TASK_COUNT"),  # Cloud Batch
    ("CLOUD_RUN_TASK_INDEX", "CLOUD_RUN_TASK_COUNT"),  # Cloud Run jobs
    ("JOB_COMPLETION_INDEX", ""),  # Kubernetes Indexed Jobs, which do not say the count
    ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MAX"),
)


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line, a flag for each setting."""

    def refuse(message: str) -> NoReturn:
        raise RunError(message[:1000].replace("ignored explicit argument", "it has no value; drop"))

    parser = argparse.ArgumentParser(
        prog="generator.py",
        usage="%(prog)s --start DATE --end DATE [--bucket NAME | --output-dir DIR] [options]",
        epilog=EPILOG,
        allow_abbrev=False,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = refuse
    for setting in fields(Run):
        if setting.name in GROUPS:
            group = parser.add_argument_group(GROUPS[setting.name])
        names = ["-v"] * (setting.name == "verbose") + [f"--{setting.name.replace('_', '-')}"]
        if setting.metadata:
            group.add_argument(*names, **setting.metadata)
    group.add_argument("--version", action="version", version=f"WattIf {VERSION}", help="print the version")
    group.add_argument("-h", "--help", action="help", help="print this")
    return parser


def find_task(index: int | None, count: int | None) -> tuple[int, int, str]:
    """Return the task's index, the number of tasks, and who named it: flags or a scheduler."""
    source = "--task-index"
    names = next((names for names in SCHEDULERS if names[0] in os.environ), ())
    if names and None in (index, count):
        values = [os.environ.get(name, "0") for name in names]
        for name, value in zip(names, values):
            if not re.fullmatch("[0-9]{1,12}", value):
                raise RunError(f"{name}={value} is no number; give --task-index and --task-count")
        task, tasks, *last = map(int, values)
        if count is None and last and last[0] != tasks - 1:
            raise RunError("this is no whole Slurm array from 0 on; give --task-count N")
        if index is None:
            index, source = task, names[0]
        count = count or tasks or None
    if index is None and count is None:
        return 0, 1, ""
    if index is None or count is None or index >= count:
        task = "?" if index is None else index
        rule = "give --task-count N and --task-index from 0 to N - 1"
        raise RunError(f"task {task} (from {source}) of {count or '?'} cannot be; {rule}")
    return index, count, source


def read_settings(argv: Sequence[str]) -> Run:
    """Turn the command line into the settings of a run. Raises RunError if flags do not fit."""
    args, unknown = build_parser().parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [f"--{setting.replace('_', '-')}" for setting in vars(args)]
        raise RunError(f"{name} is no flag{nearest(name, known) or '; see --help'}")
    if None in (args.start, args.end):
        raise RunError("--start and --end are required; give both, as YYYY-MM-DD, today or yesterday")
    args.bucket, _, path = (args.bucket or "").partition("/")
    if path and args.prefix:
        raise RunError(f"--prefix {args.prefix} and --bucket have a path; drop one")
    args.prefix = args.prefix or path or None
    args.bucket = args.bucket or (DEFAULT_BUCKET if args.output_dir is None else None)
    if args.temp_dir is None:
        args.temp_dir = DEFAULT_TEMP_DIR if os.path.isdir(DEFAULT_TEMP_DIR) else os.environ.get("TMPDIR") or "/tmp"
    args.processes = args.processes or count_cores()
    args.task_index, args.task_count, args.task_source = find_task(args.task_index, args.task_count)
    run = Run(**vars(args))
    check_settings(run)
    return run


def check_settings(run: Run) -> None:
    """Raise RunError if settings do not fit together."""
    flawed, per_file = sum(run.flaw_counts.values()), run.meters_per_file
    is_early = run.start == date.min and run.flaw_counts["late"]
    is_large = run.bucket and run.file_bytes(min(per_file, run.meters)) > 5 << 40
    begin, most = run.ramp or 0, run.rps_limit or math.inf
    problems = {
        f"--end {run.end} is before --start {run.start}; swap them": run.end < run.start,
        f"--interval {run.interval} does not divide a day; take 1, 10, 60 or 900": DAY_SECONDS % run.interval,
        f"--ramp {begin:g} begins above --rps-limit {most:g}; lower it": begin > most,
        "--meters-per-file names files with nine digits; lower --meters": per_file > 1 and run.meters > 10**9,
        f"--flaws has {flawed:,} of a meter-day's {run.day_rows:,} rows; at most half": 2 * flawed > run.day_rows,
        f"--start {run.start} has no day before it, for rows that are late": is_early,
        "an object has at most 5 TiB; lower --meters-per-file": is_large,
    }
    pairs = [("resume", "verify"), ("record", "verify")]
    pairs += [(name, "output_dir") for name in ("bucket", "max_disk", "rps_limit", "ramp")]
    for one, other in pairs:
        exclusive = f"--{one} and --{other} exclude each other; drop one".replace("_", "-")
        problems[exclusive] = getattr(run, one) and getattr(run, other) not in (None, False)
    for problem, is_so in problems.items():
        if is_so:
            raise RunError(problem)


def execute(run: Run, plan: Plan, stop: ctypes.c_byte, progress: Progress) -> None:
    """Do what the plan says, and add up the results. Raises RunError if the run cannot begin."""
    credentials = find_credentials(run, stop) if run.bucket else None
    folder = claim_directory(run, plan)
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    for line in describe_plan(run, plan):
        say(line)
    sender = Sender(run, stop, credentials, progress.started)
    work = functools.partial(run_slice, run, plan, folder, sender)
    try:
        for result in run_processes(run, plan, work, stop):
            progress.add(result)
    finally:
        for child in multiprocessing.active_children():  # when the time after a signal is over
            child.kill()
            child.join()
        paths = Path(folder).rglob("*") if run.bucket and folder else ()
        left = [path.lstat().st_size for path in paths if not path.is_dir()]
        progress.add(Result(files_left=len(left), bytes_left=sum(left)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 0 if every object is where it should be."""
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - it was closed
    stop = handle_signals()
    progress = None
    words = sys.argv[1:] if argv is None else argv
    if not words:
        for line in USAGE.splitlines():
            say(line)
        return 2
    try:
        run = read_settings(words)
        handler = logging.Handler()
        handler.emit = lambda entry: say(handler.format(entry))
        line = "%(asctime)s %(levelname)s %(processName)s/%(threadName)s: " if run.verbose else ""
        logging.basicConfig(format=f"{line}%(message)s", level=logging.CRITICAL, handlers=[handler])
        logging.captureWarnings(True)  # that packages give, for instance of an old Python
        log.setLevel(logging.DEBUG if run.verbose else logging.WARNING)
        plan = make_plan(run)
        progress = Progress(run, plan, stop)
        judge(run, make_record(progress, 0))
        if run.dry_run:
            claim_directory(run, plan)
            text = "".join(f"{line}\n" for line in describe_plan(run, plan))
            return print_out(render_json(plan_record(run, plan)) if run.json else text, 0)
        with contextlib.suppress(CancelledError, KeyboardInterrupt):  # a signal has ended it
            execute(run, plan, stop, progress)
        record = make_record(progress, stop.value)
        judge(run, record)
        if run.record and record["exit_status"] in (0, 3):
            store_record(run, stop, record)
        signal.alarm(0)
        print_report(progress, record)
    except RunError as error:
        say(f"generator.py: error: {error.args[0]}")
        status = 128 + stop.value if stop.value > 0 else (*error.args, 2)[1]
        if progress is None:
            return status
        record = {**make_record(progress, 0), "error": error.args[0], "exit_status": status}
    return print_out(render_json(record), record["exit_status"]) if run.json else record["exit_status"]


if __name__ == "__main__":
    raise SystemExit(main())
