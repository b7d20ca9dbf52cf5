"""What the tests share: the command line as a user calls it, the emulator, and the files a run should make."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from server import Request, Server

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DAY = ("--start", "2024-01-01", "--end", "2024-01-01")
SPOOL = f".wattif-{os.getuid()}"  # below the temp directory
DAYS = ("--start", "2024-01-01", "--end", "2024-01-02")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a machine without an account; of the caller's it has only the path."""
    clean = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8", "COLUMNS": "80"}
    return {**clean, "NO_GCE_CHECK": "true", **more}


class Process(subprocess.Popen):
    """A process that is killed if the test that started it fails, so that none is left behind."""

    def __exit__(self, kind: Any, value: Any, traceback: Any) -> None:
        if kind:
            self.kill()
        super().__exit__(kind, value, traceback)


def start(*args: Any, prefix: Sequence[str] = (), patch: str = "", **env: str) -> Process:
    """Start the command line in a process of its own, where `patch` is run before it."""
    script = [str(ROOT / "generator.py")]
    if patch:
        script = ["-c", f"import generator; {patch}; raise SystemExit(generator.main())"]
        env["PYTHONPATH"] = str(ROOT)
    command = [*prefix, sys.executable, *script, *map(str, args)]
    pipe = subprocess.PIPE
    return Process(command, env=environment(**env), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def wattif(*args: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line and wait for its end."""
    with start(*args, **more) as process:
        out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def begin(server: Server, temp_dir: Path, *flags: Any, **more: Any) -> Process:
    """Start an upload that is still under way after its first objects."""
    bucket = ("--bucket", "a-bucket", "--temp-dir", temp_dir)
    process = start(*bucket, *flags, STORAGE_EMULATOR_HOST=server.url, **more)
    try:
        until(lambda: len(server.objects) > 15)
    except BaseException:
        process.kill()
        raise
    return process


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Wait until a condition holds and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return result


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def gone(pids: Sequence[int]) -> bool:
    """Say whether none of some processes is left."""
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def files_below(directory: Path) -> dict[str, bytes]:
    """Read every file below a directory, by its path within."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if not p.is_dir()}


def disk_use(temp_dir: Path) -> int:
    """The bytes of disk that runs use below a temp directory; a file that is renamed meanwhile counts once."""
    used = {}
    for path in temp_dir.glob(".wattif-*/**/*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            used[status.st_ino] = status.st_blocks * 512
    return sum(used.values())


def spool(temp_dir: Path) -> list[Path]:
    """What lies in a temp directory, but for directories."""
    return [path for path in temp_dir.rglob("*") if not path.is_dir()]


def refused(done: Any, flag: str) -> None:
    """Assert that a run was refused before any work, in one line that names the flag."""
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"generator\.py: error: [^\n\x1b]+\n", done.stderr), done.stderr
    assert flag in done.stderr and len(done.stderr) < 1100


def planned(report: str, what: str) -> int:
    """Return a number of the plan: the first in the line that begins with a word."""
    return int(re.search(rf"^{what} +(?:at most )?([\d,]+)", report, re.M)[1].replace(",", ""))


RATES = ("mean", "peak", "steady", "sustained", "asked")
QUANTILES = ("p50", "p95", "p99", "max")
KINDS = ("planned", "done", "skipped", "failed", "missing", "different", "unexpected", "unchecked")
NUMBER = (int, float, type(None))
KEYS = {  # of the record
    **dict.fromkeys(["started", "host", "wattif", "python", "google_cloud_storage", "mode", "destination"], str),
    **dict.fromkeys(["settings", "responses", "latency_histogram", "flaws"], dict),
    **dict.fromkeys(["failures", "timeline", "expectations"], list),
    **dict.fromkeys(["error", "readings_sum", "limited_by"], (str, type(None))),
    **dict.fromkeys([f"objects_{kind}" for kind in KINDS], int),
    **dict.fromkeys(["exit_status", "readings", "bytes", "bytes_planned", "disk_bytes_planned", "processes"], int),
    **dict.fromkeys(["throttled", "no_response", "retries", "late_starts", "files_left", "bytes_left"], int),
    **dict.fromkeys([f"rows_{kind}" for kind in ("delivered", "parsed", "distinct", "of_another_date")], int),
    **dict.fromkeys([f"{rate}_objects_per_second" for rate in RATES], NUMBER),
    **dict.fromkeys([f"{rate}_bytes_per_second" for rate in RATES[:3]], NUMBER),
    **dict.fromkeys([f"{kind}_{q}_seconds" for kind in ("latency", "service") for q in QUANTILES], NUMBER),
    **dict.fromkeys([f"{kind}_share" for kind in ("cpu", "answer", "file", "turn")], NUMBER),
    **dict.fromkeys(["elapsed_seconds", "tail_seconds", "upload_connections"], NUMBER),
    "throttling": (dict, type(None)),
}
SLOT = {"second", "seconds", "objects", "bytes", "responses", "retries", "no_response", "late", "asked", "p50", "p99"}


def report(done: Any) -> dict[str, Any]:
    """Parse the line of JSON, which has the documented keys and types and nothing else."""
    assert done.stdout.count("\n") == 1, done.stderr
    parsed = json.loads(done.stdout)
    assert set(parsed) == set(KEYS)
    assert all(isinstance(parsed[key], kind) for key, kind in KEYS.items()), parsed
    assert parsed["peak_objects_per_second"] >= parsed["mean_objects_per_second"]
    slots = parsed["timeline"]
    assert 1 <= len(slots) <= 120 and all(set(slot) == SLOT for slot in slots)
    for key in ("retries", "no_response"):
        assert parsed[key] == sum(slot[key] for slot in slots)
    return parsed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, where this machine lets a test mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system takes privileges")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture
def expected(tmp_path: Path) -> Any:
    """Return a function that says which objects the same flags should make, from a run with --output-dir."""

    def make(*args: Any) -> dict[str, bytes]:
        directory = tmp_path / f"expected-{uuid.uuid4()}"
        done = wattif(*args, "--output-dir", directory)
        assert done.returncode == 0, done.stderr
        return files_below(directory)

    return make


def upload(server: Server, *args: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line against a server."""
    return wattif("--bucket", "a-bucket", *args, STORAGE_EMULATOR_HOST=server.url, **more)


def listings(server: Server) -> list[Request]:
    """The requests that list."""
    return [request for request in server.requests if request.method == "GET" and request.path.endswith("/o")]


def contents(server: Server) -> dict[str, bytes]:
    """What has arrived at a server."""
    return {name: stored.content for name, stored in server.objects.items()}


class Emulator:
    """The emulator of Cloud Storage, with a new bucket for each test."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.client = storage.Client(
            project="tests", credentials=AnonymousCredentials(), client_options={"api_endpoint": url}
        )
        self.bucket = self.client.create_bucket(f"bucket-{uuid.uuid4()}")

    def run(self, *args: Any, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against the bucket."""
        return wattif("--bucket", self.bucket.name, *args, STORAGE_EMULATOR_HOST=self.url, **env)

    def objects(self) -> dict[str, storage.Blob]:
        """List the bucket."""
        return {blob.name: blob for blob in self.client.list_blobs(self.bucket)}


@pytest.fixture(scope="session")
def emulator_url() -> Iterator[str]:
    """Start the emulator on a free port of loopback and stop it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "gcp_storage_emulator",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "-M",
        "-q",
    ]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment(), stdout=quiet, stderr=quiet) as process:
        try:
            deadline = time.monotonic() + 30
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except ConnectionRefusedError:
                    assert process.poll() is None and time.monotonic() < deadline, "the emulator does not start"
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.fixture
def emulator(emulator_url: str) -> Iterator[Emulator]:
    """Give a test an empty bucket of the emulator and forget its objects afterwards."""
    yield Emulator(emulator_url)
    urllib.request.urlopen(f"{emulator_url}/wipe").close()
