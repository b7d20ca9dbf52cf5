"""What the tests share: the command line as a user calls it, the emulator, and the files a run should make."""

from __future__ import annotations

import contextlib
import os
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

from server import Server

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DAYS = ("--start", "2024-01-01", "--end", "2024-01-02")


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a machine without an account and outside of any engine."""
    drop = ("GOOGLE_", "STORAGE_", "CLOUDSDK_", "BATCH_TASK_", "CLOUD_RUN_", "JOB_COMPLETION_", "SLURM_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    return {**kept, "NO_GCE_CHECK": "true", "HOME": "/nonexistent", "COLUMNS": "80", **more}


def start(*args: Any, prefix: Sequence[str] = (), **env: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    command = [*prefix, sys.executable, str(ROOT / "generator.py"), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment(**env), stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
    )


def wattif(*args: Any, prefix: Sequence[str] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line and wait for its end."""
    with start(*args, prefix=prefix, **env) as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
    """Run the command line against a server, which must find nothing wrong with any request."""
    done = wattif("--bucket", "a-bucket", *args, STORAGE_EMULATOR_HOST=server.url, **more)
    assert not server.problems
    return done


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
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
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
