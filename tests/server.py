"""A small, fast stand-in for the upload side of Cloud Storage on loopback, and one for the sources of its tokens.

It takes multipart and resumable uploads, checks each body's length and CRC32C, lists objects, answers late and reads
slowly if told to, and misbehaves as a script of faults says. Tests run it in a thread; the benchmark runs several
processes of it.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import json
import multiprocessing
import os
import re
import socket
import ssl
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import google_crc32c

SPLIT_SECONDS = 3.0  # in which a range of the index must be near its limit to be split
PIECE = 1 << 14  # the bytes that a connection reads at a time where the rate is limited
ACCOUNT = "tester@example.iam.gserviceaccount.com"
REASONS = {200: "OK", 308: "Resume Incomplete"}
ERRORS = {400: "invalid", 401: "authError", 403: "forbidden", 404: "notFound", 412: "conditionNotMet"}


class Request(NamedTuple):
    """One request: its number from 0 on, counted over the server, and what it asks for."""

    number: int
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    name: str  # the object, where the request names one


class Reply(NamedTuple):
    """An answer; each of its further header lines ends with CRLF."""

    status: int
    body: bytes
    headers: str = ""


def document(content: Any, headers: str = "") -> Reply:
    """Make the answer of a request that succeeds."""
    return Reply(200, json.dumps(content).encode(), headers)


def refusal(status: int, message: str) -> Reply:
    """Make an answer as the service does for a request that fails."""
    errors = [{"message": message, "domain": "global", "reason": ERRORS.get(status, "backendError")}]
    return Reply(status, json.dumps({"error": {"code": status, "message": message, "errors": errors}}).encode())


def denied(permission: str, kind: str = "object") -> Reply:
    """Refuse a request for want of a permission, in the service's words."""
    access = f"does not have {permission} access to the Google Cloud Storage {kind}"
    return refusal(403, f"{ACCOUNT} {access}. Permission '{permission}' denied on resource (or it may not exist).")


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
    answer: Reply | None = None  # once its last bytes are here


class Range:
    """A range of the index, from its lowest name on, and what was written to it of late."""

    def __init__(self, first: str) -> None:
        self.first = first
        self.names: deque[str] = deque(maxlen=100)
        self.times: deque[float] = deque()  # within SPLIT_SECONDS


class Index:
    """A model of Cloud Storage's index, which is kept in the order of names.

    Each range of names takes `limit` writes a second. One that took three quarters of that for SPLIT_SECONDS is split
    at the median of its latest names. See https://cloud.google.com/storage/docs/request-rate.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.ranges = [Range("")]
        self.lock = threading.Lock()

    def admits(self, name: str, now: float) -> bool:
        """Say whether an object may be written now; if not, the answer is 429."""
        with self.lock:
            position = bisect.bisect_right([part.first for part in self.ranges], name) - 1
            part = self.ranges[position]
            while part.times and part.times[0] < now - SPLIT_SECONDS:
                part.times.popleft()
            if len(part.times) - bisect.bisect_left(part.times, now - 1) >= self.limit:
                return False
            part.names.append(name)
            part.times.append(now)
            if len(part.times) >= 0.75 * self.limit * SPLIT_SECONDS:
                median = sorted(part.names)[len(part.names) // 2]
                self.ranges[position : position + 1] = [Range(part.first), Range(median)]
            return True


class Line:
    """A line of `rate` bytes a second, shared by all connections of all processes in turn."""

    def __init__(self, rate: float, closing: threading.Event) -> None:
        self.rate, self.closing = rate, closing
        self.free = multiprocessing.Value("d", 0.0)  # the time at which it has carried all that it was given

    def carry(self, count: int) -> None:
        """Wait until some bytes are through. A wait that lasted too long is made up for, up to 0.05 s of it."""
        with self.free.get_lock():
            now = time.monotonic()
            self.free.value = max(self.free.value, now - 0.05) + count / self.rate
            pause = self.free.value - now
        self.closing.wait(pause)


class Hangup(Exception):
    """The connection has ended, by the client or by a fault."""


class Connection:
    """Reads requests from and writes answers to one client."""

    def __init__(self, sock: socket.socket, line: Line | None = None) -> None:
        self.sock, self.line = sock, line
        self.buffer = bytearray(1 << 16)  # small, as there may be hundreds
        self.filled = 0

    def receive(self) -> None:
        """Read more into the buffer, which grows as needed."""
        if self.filled == len(self.buffer):
            self.buffer.extend(bytes(len(self.buffer)))
        end = self.filled + PIECE if self.line else len(self.buffer)
        with memoryview(self.buffer) as view:
            count = self.sock.recv_into(view[self.filled : end])
        if not count:
            raise Hangup
        self.filled += count
        if self.line:
            self.line.carry(count)

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

    @staticmethod
    def render(reply: Reply) -> bytes:
        """Render an answer, which is JSON unless its own headers say something else."""
        status, body, headers = reply
        if "content-type:" not in headers.lower():
            headers += "Content-Type: application/json\r\n"
        head = f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}\r\nContent-Length: {len(body)}\r\n"
        return f"{head}{headers}\r\n".encode() + body


class Server:
    """The server; a context manager whose threads end with it.

    `fault` is asked about each request once its first bytes are here. It returns None, a status or a Reply to answer
    in place of what was asked, 'reset' (hang up inside the body), 'stall' (never answer), or, for a request that is
    done as asked, 'lost' (hang up), 'cut' (send half an answer), 'garbled' (send a chunk without a size) or 'drip'
    (send it one byte every 0.2 s).
    A listing has pages of `page` names. With `keep` off, contents are neither checked nor stored. When the server
    ends, it raises what was wrong with the requests, corrupt contents only if none are expected.

    `rate` bounds the bytes a second that it reads, over all connections. With `tls` it serves HTTPS. `token` says
    whether it accepts an access token. The bucket's rules: `create_only` forbids to overwrite an object, without
    `may_read` neither objects nor listings can be read, and with `cmek` a listing has no CRC32C.
    """

    def __init__(
        self,
        delay: float = 0.0,
        keep: bool = True,
        fault: Callable[[Request], Any] = lambda request: None,
        page: int = 1000,
        index: Index | None = None,
        rate: float | None = None,
        tls: ssl.SSLContext | None = None,
        token: Callable[[str], bool] | None = None,
        create_only: bool = False,
        may_read: bool = True,
        cmek: bool = False,
        expect_corruption: bool = False,
    ) -> None:
        self.delay, self.keep, self.fault, self.page, self.index = delay, keep, fault, page, index
        self.tls, self.token, self.expect_corruption = tls, token, expect_corruption
        self.create_only, self.may_read, self.cmek = create_only, may_read, cmek
        self.objects: dict[str, StoredObject] = {}
        self.uploads: dict[str, Upload] = {}
        self.requests: list[Request] = []
        self.problems: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.line = Line(rate, self.closing) if rate else None
        self.sockets: set[socket.socket] = set()
        self.threads: list[threading.Thread] = []
        self.listener = socket.socket()
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if rate:  # or the kernel takes much that is not read yet
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(512)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.listener.getsockname()[1]}"

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
                with contextlib.suppress(OSError):  # the client has just gone
                    # Not the method of a TLS socket, which makes the thread that reads from it fail.
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        assert not self.problems, self.problems

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
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            with self.lock:
                if self.closing.is_set():
                    sock.close()
                    return
                self.sockets.add(sock)
            self.start(self.serve, sock)

    def serve(self, sock: socket.socket) -> None:
        """Answer the requests of one connection until either side hangs up."""
        connection = Connection(sock, self.line)
        try:
            if isinstance(sock, ssl.SSLSocket):
                sock.do_handshake()
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
            name = self.name_of(unquote(parts.path), query, first)
        with self.lock:
            request = Request(len(self.requests), method, unquote(parts.path), query, headers, name)
            self.requests.append(request)
        fault = self.fault(request)
        if fault == "stall":
            self.closing.wait()
        if fault in ("reset", "stall"):
            raise Hangup
        with connection.body(start, length) as body:
            reply = self.reply(request, fault, body)
        connection.done(start + length)
        if self.delay:
            self.closing.wait(self.delay)
        self.send(connection.sock, connection.render(reply), fault)

    def send(self, sock: socket.socket, answer: bytes, fault: Any) -> None:
        """Send an answer, as far and as fast as a fault lets it."""
        if fault == "drip":
            for byte in answer:
                sock.sendall(bytes([byte]))
                self.closing.wait(0.2)
        elif fault == "cut":
            sock.sendall(answer[: len(answer) - 20])
        elif fault == "garbled":
            sock.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n")
        elif fault != "lost":
            sock.sendall(answer)
        if fault in ("cut", "lost", "garbled"):
            raise Hangup

    def reply(self, request: Request, fault: Any, body: memoryview) -> Reply:
        """Answer as a fault says, or refuse a request that comes without a token or too soon, or do it."""
        if isinstance(fault, Reply):
            return fault
        if isinstance(fault, int):
            return refusal(fault, "scripted")
        if self.token and not self.token(request.headers.get("authorization", "")[len("Bearer ") :]):
            return refusal(401, "Invalid Credentials")
        writes = request.name and request.method != "GET"
        if writes and self.index and not self.index.admits(request.name, time.monotonic()):
            return refusal(429, "scripted")
        if request.query.get("ifGenerationMatch") == "0" and request.name in self.objects:
            return refusal(412, "At least one of the pre-conditions you specified did not hold.")
        return self.route(request, body)

    def name_of(self, path: str, query: dict[str, str], body: memoryview) -> str:
        """Find which object a request is about."""
        if "upload_id" in query:
            return query["name"]
        if query.get("uploadType") == "multipart":
            return json.loads(bytes(body).split(b"\r\n\r\n", 2)[1].split(b"\r\n--", 1)[0])["name"]
        if query.get("uploadType") == "resumable":
            return json.loads(bytes(body))["name"]
        return path.partition("/o/")[2]

    def route(self, request: Request, body: memoryview) -> Reply:
        """Do what a request asks for."""
        if "upload_id" in request.query:
            return self.resume(request, body)
        if request.query.get("uploadType") == "resumable":
            return self.begin(request, body)
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
            return document(self.listing(request)) if self.may_read else denied("storage.objects.list", "bucket")
        if request.method == "GET" and request.name:
            return self.metadata(request.name)
        return refusal(404, f"{request.method} {request.path}")

    def begin(self, request: Request, body: memoryview) -> Reply:
        """Begin a resumable upload, whose state is in the URL of its session: any process may take its parts."""
        if self.create_only and request.name in self.objects:
            return denied("storage.objects.delete")
        content_type = request.headers["x-upload-content-type"]
        crc32c = json.loads(bytes(body)).get("crc32c", "")
        state = {"upload_id": request.number, "name": request.name, "type": content_type, "crc32c": crc32c}
        return document({}, f"Location: {self.url}{request.path}?uploadType=resumable&{urlencode(state)}\r\n")

    def resume(self, request: Request, body: memoryview) -> Reply:
        """Take a part of a resumable upload. What has come before is skipped; an upload that is done stays done.

        The CRC32C was announced at the start, or is in the header of the last part.
        """
        announced = request.headers.get("x-goog-hash", "crc32c=")[len("crc32c=") :]
        made = Upload(request.name, request.query["type"], request.query.get("crc32c", ""))
        upload = self.uploads.setdefault(request.query["upload_id"], made) if self.keep else made
        upload.crc32c = upload.crc32c or announced
        if upload.answer:
            return upload.answer
        content_range = request.headers["content-range"][len("bytes ") :]
        if content_range.startswith("*"):  # asks how much has come
            size = len(upload.content)
            return Reply(308, b"", f"Range: bytes=0-{size - 1}\r\n" if size else "")
        first, last, total = map(int, re.split("[-/]", content_range))
        if last + 1 - first != len(body) or (self.keep and first > len(upload.content)):
            self.problems.append(f"{request.name}: {len(body)} bytes came as {content_range}")
        if self.keep:
            upload.content += body[max(0, len(upload.content) - first) :]
        if last + 1 < total:
            return Reply(308, b"", f"Range: bytes=0-{last}\r\n")
        upload.answer = self.store(upload, memoryview(upload.content), total)
        return upload.answer

    @staticmethod
    def crc32c(content: bytes) -> str:
        """Write the checksum of a content as Cloud Storage does."""
        return base64.b64encode(google_crc32c.Checksum(content).digest()).decode()

    def store(self, upload: Upload, content: memoryview, size: int) -> Reply:
        """Store an object whose content is what the client says it is."""
        crc32c = upload.crc32c
        if self.keep:
            crc32c = self.crc32c(bytes(content))
            if upload.crc32c not in ("", crc32c):
                message = f'Provided CRC32C "{upload.crc32c}" doesn\'t match calculated CRC32C "{crc32c}".'
                if not self.expect_corruption:
                    self.problems.append(f"{upload.name}: {message}")
                return refusal(400, message)
        with self.lock:
            if self.create_only and upload.name in self.objects:
                return denied("storage.objects.delete")
            kept = bytes(content) if self.keep else None
            self.objects[upload.name] = StoredObject(size, crc32c, upload.content_type, kept)
            return document(self.item(upload.name))

    def metadata(self, name: str) -> Reply:
        """Answer what is known of an object."""
        if not self.may_read:
            return denied("storage.objects.get")
        with self.lock:
            return document(self.item(name)) if name in self.objects else refusal(404, f"No such object: {name}")

    def item(self, name: str) -> dict[str, str]:
        """Describe an object; the CRC32C only if it is known."""
        stored = self.objects[name]
        return {"name": name, "size": str(stored.size), **({"crc32c": stored.crc32c} if stored.crc32c else {})}

    def listing(self, request: Request) -> dict[str, Any]:
        """Answer a listing, a page at a time."""
        query = request.query
        first = max(query.get("startOffset", ""), query.get("pageToken", ""))
        with self.lock:
            last = query.get("endOffset", chr(0x10FFFF))
            found = (name for name in self.objects if name.startswith(query.get("prefix", "")))
            names = sorted(name for name in found if first <= name < last)
            items = [self.item(name) for name in names[: self.page]]
        if self.cmek:
            items = [{"name": item["name"], "size": item["size"]} for item in items]
        return {"items": items, **({"nextPageToken": names[self.page]} if len(names) > self.page else {})}


class TokenServer:
    """The sources of tokens: a VM's metadata server, a service account's token endpoint and a token exchange (STS).

    A context manager. Each token is a new one and valid for `lifetime` seconds; the client library asks for the next
    one 225 s before its end, so with less than that before every request. `fault` is asked about each path; it
    returns None, a status or a Reply to answer, or "stall". A test can let it come up late on a `port` that it knows.
    """

    def __init__(self, lifetime: float = 3600, fault: Callable[[str], Any] = lambda path: None, port: int = 0) -> None:
        self.lifetime, self.fault = lifetime, fault
        self.paths: list[str] = []  # of the requests
        self.ends: dict[str, float] = {}  # by token
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.server = TokenListener(("127.0.0.1", port), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> TokenServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def accepts(self, token: str) -> bool:
        """Say whether a token was issued here and is still valid."""
        return time.time() < self.ends.get(token, 0)

    def revoke(self) -> None:
        """Make all tokens invalid that were issued so far."""
        with self.lock:
            self.ends = dict.fromkeys(self.ends, 0.0)

    def issue(self) -> Reply:
        """Answer with a new token, as each of the sources would."""
        with self.lock:
            token = f"token-{len(self.ends) + 1}"
            self.ends[token] = time.time() + self.lifetime
        kind = "urn:ietf:params:oauth:token-type:access_token"  # only the exchange says it
        made = {"access_token": token, "expires_in": int(self.lifetime), "token_type": "Bearer"}
        return document({**made, "issued_token_type": kind})

    def route(self, path: str) -> Reply:
        """Answer a request."""
        if path == "/sts" or path.endswith("/token"):  # both a service account's and a VM's
            return self.issue()
        text = {
            "/": "",
            "/computeMetadata/v1/project/project-id": "a-project",
            "/computeMetadata/v1/universe/universe-domain": "googleapis.com",
        }
        if path in text:
            return Reply(200, text[path].encode(), "Content-Type: application/text\r\n")
        if path.startswith("/computeMetadata/v1/instance/service-accounts/"):
            scopes = ["https://www.googleapis.com/auth/cloud-platform"]
            return document({"aliases": ["default"], "email": ACCOUNT, "scopes": scopes})
        return refusal(404, path)

    def handler(self) -> type[BaseHTTPRequestHandler]:
        """Make the class that takes the requests."""
        source = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                path = urlsplit(self.path).path
                with source.lock:
                    source.paths.append(path)
                reply = source.fault(path) or source.route(path)
                if reply == "stall":
                    source.closing.wait()
                    return
                if isinstance(reply, int):
                    reply = refusal(reply, "scripted")
                made = Connection.render(reply._replace(headers=f"{reply.headers}Metadata-Flavor: Google\r\n"))
                with contextlib.suppress(OSError):  # the client has gone
                    self.wfile.write(made)

            do_GET = do_POST = answer

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


class TokenListener(ThreadingHTTPServer):
    """Takes as many connections at once as a run may have."""

    request_queue_size = 512
    daemon_threads = True


def main() -> None:
    """Print the address and serve, from several processes, until standard input ends; then say what was amiss."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--index", type=float, help="writes a second that each range of the index takes")
    parser.add_argument("--rate", type=float, help="bytes a second that all processes together read")
    args = parser.parse_args()
    server = Server(delay=args.delay, keep=False, index=Index(args.index) if args.index else None, rate=args.rate)
    print(server.url, flush=True)
    for _ in range(args.processes - 1):
        if not os.fork():
            break
    with server:
        sys.stdin.read()


if __name__ == "__main__":
    main()
