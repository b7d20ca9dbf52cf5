"""Credentials: token sources that fail for a while or for good, certificates, proxies, and what is never shown."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import ssl
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable

import pytest

import generator
from conftest import DAY, DAYS, contents, report, spool, start, until, upload, wattif
from credentials import Certificates, external_account, make_certificates, metadata_environment, service_account
from server import Reply, Request, Server, TokenServer, denied, document, refusal

SMALL = (*DAYS, "--interval", "3600", "--meters", "30", "--processes", "1")
LARGE = (*DAY, "--meters", "52", "--meters-per-file", "26", "--processes", "1")  # resumable uploads in two chunks
LOG_IN = "run 'gcloud auth application-default login' or give the VM a service account"
# Before the library gives a token up, it waits for up to 15 s between tries of its own.
HASTE = "import google.auth._exponential_backoff as b; b._BaseExponentialBackoff._calculate_jitter = lambda _: 0.05"
SOURCES: dict[str, Callable[[Path, str], dict[str, str]]] = {
    "metadata": lambda _, url: metadata_environment(url),
    "service account": service_account,
    "exchange": external_account,
}


def run_with(env: dict[str, str], server: Server, temp: Path, *flags: Any, **more: Any) -> Any:
    """Run an upload with credentials."""
    return wattif("--bucket", "a-bucket", "--temp-dir", temp, *flags, API_ENDPOINT_OVERRIDE=server.url, **env, **more)


def told(status: int, err: str, *words: str) -> None:
    """Assert that a run failed, and said why in one line with some words."""
    assert status == 1 and "Traceback" not in err, err
    (line,) = re.findall("^error: .*", err, re.M)
    assert all(word in line for word in words) and len(line) < 600, line


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates that nobody trusts unless told to."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.mark.parametrize(
    ("source", "status", "tries"),  # of the library before it gives up
    [
        *(("metadata", 503, 5), ("metadata", 429, 5), ("metadata", 404, 1)),
        *(("service account", 503, 3), ("exchange", 503, 1)),
    ],
)
def test_a_passing_fault_of_the_token_source_is_retried(
    expected: Callable[..., dict], tmp_path: Path, source: str, status: int, tries: int
) -> None:
    asked: Counter[str] = Counter()

    def fault(path: str) -> int | None:
        # The search for the metadata server, the first token, and tokens in the middle, when the old one is still
        # valid. Of two uploads that ask at once, one at least is refused as often as the library tries.
        if path != "/" and not path.endswith(("/token", "/sts")):
            return None
        middle = len(server.objects) > 20
        asked[f"{path} {middle}"] += 1
        faults = 1 if path == "/" else 2 * tries - 1 if middle else tries
        return status if asked[f"{path} {middle}"] <= faults else None

    # Less than 225 s before a token's end, the library asks for another one before each request.
    with TokenServer(200, fault) as tokens, Server(token=tokens.accepts) as server:
        env = SOURCES[source](tmp_path, tokens.url)
        flags = ("--upload-workers", 1, "--transfer-workers", 2, "--json")
        done = run_with(env, server, tmp_path / "temp", *SMALL, *flags, patch=HASTE)
    assert done.returncode == 0, done.stderr
    assert report(done)["retries"] >= 2 and report(done)["responses"] == {"200": 60}
    assert contents(server) == expected(*SMALL) and not spool(tmp_path / "temp")


@pytest.mark.parametrize("source", ["service account", "exchange"])
@pytest.mark.parametrize(
    ("code", "words"),
    [("invalid_grant", "Invalid JWT Signature."), ("deleted_client", "The OAuth client was deleted.")],
)
def test_credentials_that_are_refused_end_the_run_at_once(tmp_path: Path, source: str, code: str, words: str) -> None:
    body = json.dumps({"error": code, "error_description": words}).encode()
    with TokenServer(fault=lambda path: Reply(400, body)) as tokens, Server() as server:
        began = time.monotonic()
        done = run_with(SOURCES[source](tmp_path, tokens.url), server, tmp_path / "temp", *SMALL)
        assert time.monotonic() - began < 15 and len(tokens.paths) <= 2 and not server.requests
    told(done.returncode, done.stderr, code, words, LOG_IN)
    assert "assertion" not in done.stderr


def test_a_metadata_server_that_is_ill_for_good_is_told_in_its_words(tmp_path: Path) -> None:
    with TokenServer(fault=lambda path: 503 if path.endswith("/token") else None) as tokens, Server() as server:
        env = metadata_environment(tokens.url)
        done = run_with(env, server, tmp_path / "temp", *SMALL, "--retry-timeout", 2, patch=HASTE)
    told(done.returncode, done.stderr, "TransportError: ", "503")
    assert "--scopes" not in done.stderr  # which are only in the URL


@pytest.mark.parametrize("source", ["service account", "exchange"])
@pytest.mark.parametrize("content", [[], {}, {"expires_in": "soon"}, 3])
def test_an_odd_answer_of_a_token_source_is_asked_for_again(tmp_path: Path, source: str, content: Any) -> None:
    odd = Reply(200, json.dumps(content).encode())
    with TokenServer(fault=lambda path: odd) as tokens, Server() as server:
        env = SOURCES[source](tmp_path, tokens.url)
        done = run_with(env, server, tmp_path / "temp", *SMALL, "--retry-timeout", 2)
        told(done.returncode, done.stderr, "the token source: ")
        assert "Traceback" not in done.stderr and len(tokens.paths) > 1
        tokens.fault = lambda path: odd if len(tokens.paths) % 2 else None
        tokens.paths.clear()
        assert run_with(env, server, tmp_path / "temp", *SMALL).returncode == 0


def test_a_token_source_that_does_not_answer_has_no_more_time_than_a_request(tmp_path: Path) -> None:
    with TokenServer(fault=lambda path: "stall") as tokens, Server() as server:
        env = service_account(tmp_path, tokens.url)
        began = time.monotonic()
        done = run_with(env, server, tmp_path / "temp", *SMALL, "--retry-timeout", 3)
    told(done.returncode, done.stderr, "the token source: ", "timed out")
    assert time.monotonic() - began < 20


def test_a_token_source_that_does_not_shake_hands_has_no_more_time_either(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, Server() as server:
        env = service_account(tmp_path, f"https://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        done = run_with(env, server, tmp_path / "temp", *SMALL, "--retry-timeout", 3)
    told(done.returncode, done.stderr, "the token source: ", "timed out")
    assert time.monotonic() - began < 20


def test_a_metadata_server_may_come_up_late(expected: Callable[..., dict], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path / "temp", *SMALL)
    env = metadata_environment(f"http://127.0.0.1:{port}")
    with contextlib.ExitStack() as stack, Server() as server:
        process = stack.enter_context(start(*flags, patch=HASTE, API_ENDPOINT_OVERRIDE=server.url, **env))
        time.sleep(2)  # nothing shows that it has asked
        assert process.poll() is None, process.stderr.read()
        tokens = stack.enter_context(TokenServer(port=port))
        server.token = tokens.accepts
        assert process.wait(60) == 0, process.stderr.read()
    assert contents(server) == expected(*SMALL)


def test_missing_credentials_are_told_soon(tmp_path: Path) -> None:
    # Where nothing answers at the metadata server's address, one search of the library takes 12 s.
    with contextlib.suppress(OSError):
        if Path("/sys/class/dmi/id/product_name").read_text().startswith("Google"):
            pytest.skip("this is a VM of Compute Engine")
    flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path, *SMALL)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        patch = f"import google.auth.compute_engine._metadata as m; m._GCE_DEFAULT_MDS_IP = '{address}'"
        with start(*flags, patch=patch, NO_GCE_CHECK="false", PYTHONWARNINGS="ignore") as process:
            _connection, _ = silent.accept()
            began = time.monotonic()
            _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 15 and process.returncode == 2
    assert err.startswith("generator.py: error: --bucket needs ") and LOG_IN in err and err.count("\n") == 1


@pytest.mark.parametrize("flags", [SMALL, LARGE])
def test_tokens_that_are_revoked_cost_nothing(expected: Callable[..., dict], tmp_path: Path, flags: Any) -> None:
    tokens = TokenServer()
    tokens.fault = lambda path: tokens.route(path)._replace(headers="Connection: close\r\n")  # or a request meets it
    server = Server(token=tokens.accepts, fault=lambda request: tokens.revoke() if request.number in (2, 5) else None)
    with tokens, server:
        env = service_account(tmp_path, tokens.url)
        done = run_with(env, server, tmp_path / "temp", *flags, "--json")
    assert done.returncode == 0, done.stderr
    made = report(done)
    assert made["responses"]["401"] >= 1 and made["retries"] == made["objects_failed"] == 0
    wanted = expected(*flags)
    assert contents(server) == wanted and made["responses"]["200"] <= 2 * len(wanted)


def test_a_server_that_demands_a_client_certificate_is_reached(
    expected: Callable[..., dict], tmp_path: Path, certificates: Certificates
) -> None:
    if sys.version_info < (3, 9):
        pytest.skip("google-auth needs pyOpenSSL for it there")
    connections = []
    context = certificates.context(client=True)
    with Server(delay=0.1, fault=lambda _: connections.append(len(server.sockets)), tls=context) as server:
        env = {**certificates.client_environment(), "REQUESTS_CA_BUNDLE": str(certificates.authority)}
        flags = ("--meters", 60, "--transfer-workers", 16)
        done = upload(server, *SMALL, *flags, "--temp-dir", tmp_path / "temp", "--json", **env)
    assert done.returncode == 0, done.stderr
    assert report(done)["retries"] == 0 and max(connections) > 10
    assert contents(server) == expected(*SMALL, *flags)


CERTIFICATE = "set REQUESTS_CA_BUNDLE to the file with the certificate"
PASSWORD = "put user and password into HTTPS_PROXY"
NAME = "check the network, HTTPS_PROXY and STORAGE_EMULATOR_HOST"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("untrusted", ("certificate verify failed", CERTIFICATE)),
        ("other ciphers", ("handshake failure",)),
        ("proxy of http", ("HTTP 407", PASSWORD)),
        ("proxy of https", ("OSError: Tunnel connection failed: 407", PASSWORD)),
        ("proxy of tokens", ("OSError: Tunnel connection failed: 407", PASSWORD)),
        ("proxy with #", ("Failed to parse: …", "%23 for #")),
        ("no such name", ("gaierror: ", NAME)),
        ("no such token endpoint", ("gaierror: ", NAME)),
        ("no such exchange", ("gaierror: ", NAME)),
    ],
)
def test_what_no_retry_mends_is_told_at_once(
    tmp_path: Path, certificates: Certificates, where: str, words: tuple[str, ...]
) -> None:
    old = certificates.context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.set_ciphers("CAMELLIA128-SHA")
    with Server(fault=lambda request: 407) as proxy, Server(tls=certificates.context()) as untrusted, Server(
        tls=old
    ) as aged:
        env = {
            "untrusted": {"STORAGE_EMULATOR_HOST": untrusted.url},
            "other ciphers": {"STORAGE_EMULATOR_HOST": aged.url},
            "proxy of http": {"STORAGE_EMULATOR_HOST": "http://storage.invalid", "http_proxy": proxy.url},
            "proxy of https": {"STORAGE_EMULATOR_HOST": "https://storage.invalid", "https_proxy": proxy.url},
            "proxy of tokens": {**service_account(tmp_path, "https://token.invalid"), "https_proxy": proxy.url},
            "proxy with #": {"STORAGE_EMULATOR_HOST": "http://storage.invalid", "http_proxy": "http://me:a#b@c:1"},
            "no such name": {"STORAGE_EMULATOR_HOST": "http://storage.invalid"},
            "no such token endpoint": service_account(tmp_path, "https://token.invalid"),
            "no such exchange": external_account(tmp_path, "https://token.invalid"),
        }[where]
        with start("--bucket", "a-bucket", "--temp-dir", tmp_path / "temp", *SMALL, **env) as process:
            until(lambda: spool(tmp_path / "temp"))  # the first upload begins
            began = time.monotonic()
            _, err = process.communicate(timeout=60)
            assert time.monotonic() - began < 5
    told(process.returncode, err, *words)


def test_a_client_certificate_that_is_wanted_is_told() -> None:
    # On loopback the connection may be gone before the alert of TLS 1.3 is read.
    error = ssl.SSLError(1, "[SSL: TLSV13_ALERT_CERTIFICATE_REQUIRED] tlsv13 alert certificate required (_ssl.c:2580)")
    assert "set GOOGLE_API_USE_CLIENT_CERTIFICATE=true" in generator.explain(error, SimpleNamespace(bucket="a-bucket"))


def test_a_refused_connection_is_retried(expected: Callable[..., dict], tmp_path: Path) -> None:
    server = Server()
    address = server.listener.getsockname()
    server.listener.close()
    flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path / "temp", *SMALL, "--json")
    with start(*flags, STORAGE_EMULATOR_HOST=server.url) as process:
        until(lambda: spool(tmp_path / "temp"))
        time.sleep(1)  # nothing shows that it has tried
        server.listener = socket.create_server(address)
        with server:
            out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and json.loads(out)["no_response"] >= 1, err
    assert contents(server) == expected(*SMALL)


def test_a_refused_connection_does_not_say_that_an_object_is_there(tmp_path: Path) -> None:
    server = Server(create_only=True, may_read=False, fault=lambda request: denied("storage.objects.delete"))
    address = server.listener.getsockname()
    server.listener.close()
    flags = ("--bucket", "a-bucket", "--temp-dir", tmp_path / "temp", *DAY, "--meters", 1, "--interval", 3600, "-v")
    with start(*flags, STORAGE_EMULATOR_HOST=server.url) as process:
        assert any("again in " in line for line in process.stderr)
        server.listener = socket.create_server(address)
        with server:
            _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "nothing was accepted: HTTP 403" in err and len(spool(tmp_path)) == 1


def test_the_wait_for_a_turn_makes_no_token_old(tmp_path: Path) -> None:
    flags = (*DAY, "--interval", 86_400, "--meters", 8, "--processes", 1, "--rps-limit", 2, "--json")
    with TokenServer(lifetime=2) as tokens, Server(token=tokens.accepts) as server:
        done = run_with(service_account(tmp_path, tokens.url), server, tmp_path / "temp", *flags)
    assert done.returncode == 0 and report(done)["responses"] == {"200": 8}, done.stderr


def test_who_pays_is_told_to_the_bucket(tmp_path: Path) -> None:
    bill = refusal(400, "Bucket is a requester pays bucket but no user project provided.")
    payers: list[str | None] = []

    def fault(request: Request) -> Reply | None:
        payers.append(request.headers.get("x-goog-user-project"))
        return None if payers[-1] else bill

    with TokenServer() as tokens, Server(token=tokens.accepts, fault=fault) as server:
        env = service_account(tmp_path, tokens.url)
        done = run_with(env, server, tmp_path / "temp", *SMALL)
        told(
            done.returncode,
            done.stderr,
            "no user project provided.; set GOOGLE_CLOUD_QUOTA_PROJECT to the project that pays",
        )
        done = run_with(env, server, tmp_path / "temp", *SMALL, GOOGLE_CLOUD_QUOTA_PROJECT="payer")
        assert done.returncode == 0, done.stderr
    assert payers == [None] + ["payer"] * 60


SAID = (
    "'Bearer token-1' Bearer token-1 ya29.hush upload_id=hush&x refresh_token=hush client_secret%3Dhush //me:hush@it "
)
SAID += "'password': 'hush' X-Goog-Signature=hush upload_id%3Dhush assertion=hush -----BEGIN PRIVATE KEY-----\nhush"
TOKEN_ANSWERS = {
    "token": Reply(400, json.dumps({"error": "invalid_grant", "error_description": SAID, "token": "hush"}).encode()),
    "token page": Reply(403, f"<html>{SAID}</html>".encode()),
    "token of two lines": document({"access_token": "token-1\nhush", "expires_in": 3600}),
}


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        *(("upload", "service account"), ("chunk", "service account"), ("stall", "service account")),
        *(("token", "service account"), ("token", "exchange"), ("token page", "metadata")),
        ("token of two lines", "service account"),
    ],
)
def test_secrets_are_not_shown(tmp_path: Path, kind: str, source: str) -> None:
    def fault(request: Request) -> Any:
        if kind == "upload" or "upload_id" in request.query:
            return "stall" if kind == "stall" else refusal(400, SAID)
        return None

    def token_fault(path: str) -> Reply | None:
        return TOKEN_ANSWERS.get(kind) if path.endswith(("/token", "/sts")) else None

    with TokenServer(fault=token_fault) as tokens, Server(token=tokens.accepts, fault=fault) as server:
        env = SOURCES[source](tmp_path, tokens.url)
        patch = f"generator.SLOWEST_RATE = 10**9; {HASTE}"  # or a stall takes 6 minutes for objects of this size
        done = run_with(env, server, tmp_path / "temp", *LARGE, "--retry-timeout", 2, "--json", patch=patch)
    told(done.returncode, done.stderr, report(done)["error"])
    assert not re.search(r"token-1|hush|upload_id(=|%3D)\w", done.stderr + done.stdout)


@pytest.mark.parametrize("broken", ["key", "file"])
def test_a_broken_key_file_is_not_shown(tmp_path: Path, broken: str) -> None:
    env = service_account(tmp_path, "http://127.0.0.1:1")
    file = Path(env["GOOGLE_APPLICATION_CREDENTIALS"])
    made = json.loads(file.read_text())
    key = made["private_key"].splitlines()[5]
    made["private_key"] = made["private_key"][:-100]
    file.write_text(json.dumps(made)[: None if broken == "key" else -100])
    done = wattif("--bucket", "a-bucket", *SMALL, **env)
    assert done.returncode == 2 and LOG_IN in done.stderr and done.stderr.count("\n") == 1
    assert key[:10] not in done.stderr and "BEGIN" not in done.stderr
