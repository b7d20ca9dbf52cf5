"""A small, fast stand-in for the upload side of Cloud Storage on loopback.

It takes multipart and resumable uploads, checks each body's length and CRC32C, lists objects, answers late if told
to, and misbehaves as a script of faults says. Tests run it in a thread; the benchmark runs several processes of it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import re
import socket
import sys
import threading
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import google_crc32c

REASONS = {200: "OK", 308: "Resume Incomplete"}


class Request(NamedTuple):
    """One request: its number from 0 on, counted over the server, and what it asks for."""

    number: int
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    name: str  # the object, where the request names one


class StoredObject(NamedTuple):
    """An object as it arrived; the content only if the server keeps it."""

    size: int
    crc32c: str
    content_type: str
    content: bytes | None


@dataclass
class Upload:
    """An upload that is under way."""

    name: str
    content_type: str
    crc32c: str
    content: bytearray = field(default_factory=bytearray)


class Hangup(Exception):
    """The connection has ended, by the client or by a fault."""


class Connection:
    """Reads requests from and writes answers to one client."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray(1 << 20)
        self.filled = 0

    def receive(self) -> None:
        """Read more into the buffer, which grows as needed."""
        if self.filled == len(self.buffer):
            self.buffer.extend(bytes(len(self.buffer)))
        with memoryview(self.buffer) as view:
            count = self.sock.recv_into(view[self.filled :])
        if not count:
            raise Hangup
        self.filled += count

    def head(self) -> tuple[str, str, dict[str, str], int]:
        """Read a request's head: method, target, headers, and where the body begins."""
        while (end := self.buffer.find(b"\r\n\r\n", 0, self.filled)) < 0:
            self.receive()
        lines = self.buffer[:end].decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = dict(line.split(": ", 1) for line in lines[1:])
        return method, target, {key.lower(): value for key, value in headers.items()}, end + 4

    def body(self, start: int, length: int) -> memoryview:
        """Read the body and return a view of it, valid until `done`."""
        while self.filled < start + length:
            self.receive()
        return memoryview(self.buffer)[start : start + length]

    def done(self, used: int) -> None:
        """Forget a request."""
        self.buffer[: self.filled - used] = self.buffer[used : self.filled]
        self.filled -= used

    def answer(self, status: int, body: bytes = b"{}", headers: str = "") -> bytes:
        """Render an answer."""
        reason = REASONS.get(status, "Error")
        head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}{headers}\r\n".encode() + body


class Server:
    """The server; a context manager whose threads end with it.

    `fault` is asked about each request once its first bytes are here. It returns None, a status to answer, or
    'reset' (hang up inside the body), 'stall' (never answer) or 'cut' (do as asked and send half an answer).
    """

    def __init__(
        self,
        delay: float = 0.0,
        keep: bool = True,
        fault: Callable[[Request], Any] = lambda request: None,
        page: int = 1000,
        deaf: bool = False,
    ) -> None:
        self.delay, self.keep, self.fault, self.page = delay, keep, fault, page
        self.deaf = deaf  # to the bounds of a listing, as some emulators are
        self.objects: dict[str, StoredObject] = {}
        self.uploads: dict[str, Upload] = {}
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.sockets: set[socket.socket] = set()
        self.threads: list[threading.Thread] = []
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(512)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> Server:
        self.start(self.accept)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):  # another process has shut it down
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with self.lock:
            for sock in self.sockets:
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()

    def start(self, target: Callable[..., None], *args: Any) -> None:
        """Run a function in a thread that ends with the server."""
        thread = threading.Thread(target=target, args=args, daemon=True)
        self.threads.append(thread)
        thread.start()

    def accept(self) -> None:
        """Serve every connection in a thread of its own."""
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                if self.closing.is_set():
                    sock.close()
                    return
                self.sockets.add(sock)
            self.start(self.serve, sock)

    def serve(self, sock: socket.socket) -> None:
        """Answer the requests of one connection until either side hangs up."""
        connection = Connection(sock)
        try:
            while True:
                self.handle(connection)
        except (Hangup, OSError):
            pass
        finally:
            with self.lock:
                self.sockets.discard(sock)
            sock.close()

    def handle(self, connection: Connection) -> None:
        """Read one request and answer it."""
        method, target, headers, start = connection.head()
        length = int(headers.get("content-length", 0))
        parts = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        with connection.body(start, min(length, 4096)) as first:
            name = self.name_of(query, first)
        with self.lock:
            request = Request(len(self.requests), method, unquote(parts.path), query, headers, name)
            self.requests.append(request)
        fault = self.fault(request)
        if fault == "stall":
            self.closing.wait()
        if fault in ("reset", "stall"):
            raise Hangup
        with connection.body(start, length) as body:
            if isinstance(fault, int):
                status, answer, extra = fault, {"error": {"message": "scripted"}}, ""
            else:
                status, answer, extra = self.route(request, body)
        connection.done(start + length)
        if self.delay:
            self.closing.wait(self.delay)
        reply = connection.answer(status, json.dumps(answer).encode(), extra)
        if fault == "cut":
            connection.sock.sendall(reply[: len(reply) - 20])
            raise Hangup
        connection.sock.sendall(reply)

    def name_of(self, query: dict[str, str], body: memoryview) -> str:
        """Find which object a request is about."""
        if "upload_id" in query:
            return query["name"]
        if query.get("uploadType") == "multipart":
            return json.loads(bytes(body).split(b"\r\n\r\n", 2)[1].split(b"\r\n--", 1)[0])["name"]
        if query.get("uploadType") == "resumable":
            return json.loads(bytes(body))["name"]
        return ""

    def route(self, request: Request, body: memoryview) -> tuple[int, dict[str, Any], str]:
        """Do what a request asks for and return status, answer and further header lines."""
        if "upload_id" in request.query:
            announced = request.headers.get("x-goog-hash", "crc32c=")[len("crc32c=") :]
            made = Upload(request.name, request.query["type"], announced)
            upload = self.uploads.setdefault(request.query["upload_id"], made) if self.keep else made
            first, last, total = map(int, re.split("[-/]", request.headers["content-range"][6:]))
            if last + 1 - first != len(body) or (self.keep and first != len(upload.content)):
                self.problems.append(f"{request.name}: {len(body)} bytes came as {request.headers['content-range']}")
            if self.keep:
                upload.content += body
            if last + 1 < total:
                return 308, {}, f"Range: bytes=0-{last}\r\n"
            return self.store(upload, memoryview(upload.content), total)
        if request.query.get("uploadType") == "resumable":
            content_type = request.headers["x-upload-content-type"]
            state = urlencode({"upload_id": request.number, "name": request.name, "type": content_type})
            return 200, {}, f"Location: {self.url}{request.path}?uploadType=resumable&{state}\r\n"
        if request.query.get("uploadType") == "multipart":
            boundary = request.headers["content-type"].split('boundary="')[1].rstrip('"').encode()
            head = bytes(body[:4096])
            middle = head.index(b"\r\n\r\n") + 4
            metadata = json.loads(head[middle : head.index(b"\r\n--", middle)])
            begin = head.index(b"\r\n\r\n", middle) + 4
            content_type = head[middle:begin].split(b"content-type: ")[1].split(b"\r\n")[0].decode()
            content = body[begin : len(body) - len(boundary) - 6]
            if bytes(body[len(body) - len(boundary) - 6 :]) != b"\r\n--" + boundary + b"--":
                self.problems.append(f"{request.name}: the body has another length than announced")
            upload = Upload(request.name, content_type, metadata.get("crc32c", ""))
            return self.store(upload, content, len(content))
        if request.method == "GET" and request.path.endswith("/o"):
            return 200, self.listing(request), ""
        return 404, {"error": {"message": f"{request.method} {request.path}"}}, ""

    @staticmethod
    def crc32c(content: bytes) -> str:
        """Write the checksum of a content as Cloud Storage does."""
        return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()

    def store(self, upload: Upload, content: memoryview, size: int) -> tuple[int, dict[str, Any], str]:
        """Store an object whose content is what the client says it is."""
        crc32c = upload.crc32c
        if self.keep:
            crc32c = self.crc32c(bytes(content))
            if upload.crc32c not in ("", crc32c):
                self.problems.append(f"{upload.name}: CRC32C {crc32c} is not the {upload.crc32c} announced")
                return 400, {"error": {"message": "crc32c"}}, ""
        with self.lock:
            kept = bytes(content) if self.keep else None
            self.objects[upload.name] = StoredObject(size, crc32c, upload.content_type, kept)
        return 200, {"name": upload.name, "size": str(size), "crc32c": crc32c}, ""

    def listing(self, request: Request) -> dict[str, Any]:
        """Answer a listing, a page at a time."""
        query = request.query
        first = max("" if self.deaf else query.get("startOffset", ""), query.get("pageToken", ""))
        with self.lock:
            last = chr(0x10FFFF) if self.deaf else query.get("endOffset", chr(0x10FFFF))
            found = (name for name in self.objects if name.startswith(query.get("prefix", "")))
            names = sorted(name for name in found if first <= name < last)
            items = [
                {"name": name, "size": str(self.objects[name].size), "crc32c": self.objects[name].crc32c}
                for name in names[: self.page]
            ]
        return {"items": items, **({"nextPageToken": names[self.page]} if len(names) > self.page else {})}


def main() -> None:
    """Print the address and serve, from several processes, until standard input ends; then say what was amiss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    server = Server(delay=args.delay, keep=False)
    print(server.url, flush=True)
    for _ in range(args.processes - 1):
        if not os.fork():
            break
    with server:
        sys.stdin.read()
    if server.problems:
        raise SystemExit(server.problems[0])


if __name__ == "__main__":
    main()
