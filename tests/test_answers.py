"""Answers of the bucket: refusals, odd ones, lost ones."""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import DAY, DAYS, contents, files_below, report, spool, until, upload, wattif
from server import ACCOUNT, Reply, Request, Server, StoredObject, denied, document, refusal

SMALL = (*DAYS, "--interval", 3600, "--meters", 30, "--batch-size", 10, "--processes", 1)  # 60 objects of 1,896 bytes
LARGE = (*DAY, "--meters", 100, "--meters-per-file", 25, "--processes", 1)  # 4 objects of 17 MB, in two chunks each
KINDS = {"multipart": SMALL, "resumable": LARGE}
CHUNK = 16 << 20
NAME = re.compile(r"dt=[^/]*/[^/]*$")  # of an object, at the end of a path
HTML = Reply(200, b"<html><title>Log in to the network</title></html>", "Content-Type: text/html\r\n")
# What the service says, as people report it.
OBJECT = "Object 'a-bucket/{}' is "
HOLD = f"{OBJECT}under active Temporary hold and cannot be deleted, overwritten or archived until hold is removed."
RETENTION = (
    f"{OBJECT}subject to bucket's retention policy or object retention and cannot be deleted or overwritten until "
)
RETENTION += "2026-09-30T15:58:01.185839-07:00"
NO_CREATE = f"{ACCOUNT} does not have storage.objects.create access to the Google Cloud Storage object."
NO_KEY = (
    "Permission denied on Cloud KMS key. Please ensure that your Cloud Storage service account has been authorized "
)
NO_KEY += "to use this key."
PERIMETER = (
    "Request is prohibited by organization's policy. vpcServiceControlsUniqueIdentifier: d4CSCzEPJIJWrNUzRcTMOg_f"
)
NO_PAYER = "Bucket is a requester pays bucket but no user project provided."
NO_BILLING = "The billing account for the owning project is disabled in state absent"
NO_BUCKET = "The specified bucket does not exist."
FILTERED = "There is an IP filtering condition that is preventing access to the resource."
NO_PRIVILEGE = "-dac_override,-dac_read_search"  # to read any file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What should arrive, for each kind of upload."""
    directories = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, directory in directories.items():
        assert wattif(*KINDS[kind], "--output-dir", directory).returncode == 0
    return {kind: files_below(directory) for kind, directory in directories.items()}


def last_byte(request: Request) -> int:
    """Return the place of the last byte that a request sends of a resumable upload, 0 for another request."""
    return int(re.split("[-/]", request.headers.get("content-range", "bytes 0-0/0"))[1])


def completes(request: Request) -> bool:
    """Say whether the object should be there after a request."""
    return request.query.get("uploadType") == "multipart" or last_byte(request) > CHUNK


def stored(content: bytes) -> StoredObject:
    """Describe an object."""
    return StoredObject(len(content), Server.crc32c(content), "", content)


def only_failed(done: Any, names: Any, wanted: dict[str, bytes], temp_dir: Path) -> dict[str, Any]:
    """Assert that a run failed with some files alone, which it keeps. Returns the report."""
    told = report(done)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not told["error"], done.stderr
    assert sorted(NAME.search(path)[0] for path in files_below(temp_dir)) == sorted(names)
    assert told["objects_failed"] == told["files_left"] == len(names)
    assert told["objects_done"] == len(wanted) - len(names)
    assert told["bytes"] == sum(len(content) for name, content in wanted.items() if name not in names)
    return told


@pytest.mark.parametrize(
    ("kind", "answer", "may_read"),
    [
        ("multipart", None, True),  # the retry is refused as the server does
        ("multipart", 412, True),
        ("multipart", RETENTION, False),
        ("multipart", None, False),
        ("resumable", None, False),  # the session tells that it is done
        ("resumable", 410, True),  # it is lost, too, and an upload from the start is refused
        ("resumable", 410, False),
    ],
)
def test_an_upload_whose_answer_is_lost_is_delivered(
    made: dict[str, Any], tmp_path: Path, kind: str, answer: Any, may_read: bool
) -> None:
    wanted, asked = made[kind], Counter()
    chosen = sorted(wanted)[:: len(wanted) // 3]

    def fault(request: Request) -> Any:
        if request.name not in chosen or not completes(request):
            return None
        asked[request.name] += 1
        if asked[request.name] == 1:
            return "lost"
        return refusal(403, answer.format(request.name)) if answer == RETENTION else answer

    with Server(fault=fault, create_only=True, may_read=may_read) as server:
        done = upload(server, *KINDS[kind], "--temp-dir", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert contents(server) == wanted and not spool(tmp_path)
    assert set(asked.values()) == {2} and report(done)["objects_done"] == len(wanted)
    unchecked = 0 if may_read or (kind, answer) == ("resumable", None) else len(chosen)
    assert report(done)["objects_unchecked"] == unchecked
    assert (f", {unchecked} unchecked\n" in done.stderr) == bool(unchecked)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[79:], "the bucket has 1,817 bytes"),
        (lambda content: content.replace(b"0", b"1"), "the bucket has 1,896 bytes with CRC32C"),
        (None, "Permission 'storage.objects.create' denied"),  # nothing is there
        (lambda content: content, "0A0000"),  # an equal one is there, but that is not what the answer says
    ],
)
def test_a_refused_retry_does_not_say_which_object_is_there(
    made: dict[str, Any], tmp_path: Path, change: Any, reason: str
) -> None:
    wanted, asked = made["multipart"], Counter()
    name = sorted(wanted)[20]

    def fault(request: Request) -> Any:
        if request.name != name:
            return None
        if request.method == "GET":
            return document({}) if reason == "0A0000" else None
        asked[name] += 1
        return 503 if asked[name] == 1 else None if change else denied("storage.objects.create")

    with Server(fault=fault, create_only=True) as server:
        if change:
            server.objects[name] = stored(change(wanted[name]))
        done = upload(server, *SMALL, "--temp-dir", tmp_path, "--json")
    assert reason in only_failed(done, [name], wanted, tmp_path)["failures"][0]
    assert contents(server) == {**wanted, name: change(wanted[name])} if change else name not in server.objects


@pytest.mark.parametrize(
    ("first", "refused"),
    [
        (429, denied("storage.objects.delete")),
        (HTML, denied("storage.objects.delete")),  # somebody else's answer
        ("lost", refusal(403, NO_CREATE.replace("tester", "hold-of-retention-policy.objects.delete"))),
        (503, refusal(412, "Request violates constraint 'constraints/storage.restrictAuthTypes'")),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_says_only_then_that_an_object_is_there_when_a_try_can_have_stored_it(
    made: dict[str, Any], tmp_path: Path, kind: str, first: Any, refused: Reply
) -> None:
    wanted, asked = made[kind], Counter()
    name = sorted(wanted)[3]

    def fault(request: Request) -> Any:
        if request.name != name or not completes(request):
            return None
        asked[name] += 1
        return first if asked[name] == 1 else refused

    with Server(fault=fault, may_read=False) as server:
        done = upload(server, *KINDS[kind], "--temp-dir", tmp_path, "--json")
    only_failed(done, [name], wanted, tmp_path)
    assert asked[name] == 2


def test_after_a_session_that_was_not_begun_no_object_is_there(made: dict[str, Any], tmp_path: Path) -> None:
    wanted, asked = made["resumable"], Counter()
    name = sorted(wanted)[3]

    def fault(request: Request) -> Any:
        asked[request.name] += 1
        if request.name != name:
            return None
        return 503 if asked[name] == 1 else denied("storage.objects.delete")

    with Server(fault=fault, may_read=False) as server:
        done = upload(server, *LARGE, "--temp-dir", tmp_path, "--json")
    only_failed(done, [name], wanted, tmp_path)
    assert asked[name] == 2


def test_after_a_part_that_is_not_the_last_no_object_is_there(made: dict[str, Any], tmp_path: Path) -> None:
    wanted, asked = made["resumable"], Counter()
    name = sorted(wanted)[3]

    def fault(request: Request) -> Any:
        if request.name != name or not last_byte(request):
            return None
        asked[completes(request)] += 1
        return denied("storage.objects.delete") if completes(request) else "lost" if asked[False] == 1 else None

    with Server(fault=fault, may_read=False) as server:
        done = upload(server, *LARGE, "--temp-dir", tmp_path, "--json")
    only_failed(done, [name], wanted, tmp_path)
    assert asked == {False: 2, True: 1}


@pytest.mark.parametrize(
    ("status", "kind", "reason"),
    [
        (401, "multipart", "InvalidOperation: Anonymous credentials cannot be refreshed."),
        (403, "resumable", f"HTTP 403: {NO_BUCKET}"),
        (404, "multipart", f"HTTP 404: {NO_BUCKET}"),
    ],
)
def test_a_wrong_bucket_costs_one_file_of_each_process(tmp_path: Path, status: int, kind: str, reason: str) -> None:
    def refuse(request: Request) -> Reply:
        until(lambda: len(server.requests) >= 2)  # one of each process
        return refusal(status, NO_BUCKET)

    with Server(fault=refuse) as server:
        done = upload(server, *KINDS[kind], "--processes", 2, "--temp-dir", tmp_path, "--json")
    told, left = report(done), spool(tmp_path)
    assert (
        done.returncode == 1 and len(server.requests) == len(left) == told["files_left"] == told["objects_failed"] == 2
    )
    assert told["bytes_left"] == sum(path.stat().st_size for path in left)
    assert told["error"].startswith(f"nothing was accepted: {reason}; ")
    assert told["failures"] == [f"{min(map(str, left))} and 1 more: {told['error'][len('nothing was accepted: ') :]}"]
    size = "3.79 kB" if kind == "multipart" else "34.1 MB"
    assert f"\nleft below {tmp_path} until your next run there: 2 files of {size}\n" in done.stderr


def test_equal_failures_are_told_once(made: dict[str, Any], tmp_path: Path) -> None:
    held = dict.fromkeys(sorted(made["multipart"])[3:60:12], HOLD)
    words = {**held, sorted(made["multipart"])[30]: "Invalid argument."}
    refused = {name: refusal(403 if name in held else 400, text.format(name)) for name, text in words.items()}
    with Server(fault=lambda request: refused.get(request.name)) as server:
        done = upload(server, *SMALL, "--temp-dir", tmp_path, "--json")
    told = only_failed(done, refused, made["multipart"], tmp_path)
    assert sum(told["latency_histogram"].values()) == told["objects_done"]  # what was refused at once would flatter
    first = min(str(path) for path in spool(tmp_path) if NAME.search(str(path))[0] in held)
    assert f"{first} and 4 more: HTTP 403: " in told["failures"][1] and len(told["failures"]) == 2
    assert done.stderr.count("\nfailed: ") == 2
    assert all(f"\nfailed: {line}\n" in done.stderr for line in told["failures"])


@pytest.mark.parametrize(
    ("status", "words", "remedy"),
    [
        (
            403,
            "Provided scope(s) are not authorized",
            "gcloud compute instances set-service-account VM --scopes=storage-rw",
        ),
        (403, NO_KEY, "cloudkms.cryptoKeyEncrypterDecrypter"),
        (403, PERIMETER, "service perimeter"),
        (403, NO_BILLING, "enable billing"),
        (403, FILTERED, "to the IP filter of gs://a-bucket"),
        (400, NO_PAYER, "GOOGLE_CLOUD_QUOTA_PROJECT"),
        (403, RETENTION.format("dt=2024-01-01/0A0000ABCDEF.ndjson"), "--resume skips it"),
        (403, HOLD.format("dt=2024-01-01/0A0000ABCDEF.ndjson"), "--resume skips it"),
        (403, NO_CREATE, "grant roles/storage.objectCreator on gs://a-bucket"),
        (404, NO_BUCKET, "create gs://a-bucket, or name another one with --bucket"),
        (404, NO_BUCKET, "default bucket"),
        (403, NO_CREATE, "default bucket"),  # it is somebody else's
    ],
)
def test_the_remedy_fits_the_words_of_the_service(tmp_path: Path, status: int, words: str, remedy: str) -> None:
    flags = (*DAY, "--interval", 86_400, "--meters", 1, "--temp-dir", tmp_path)
    with Server(fault=lambda request: refusal(status, words)) as server:
        if remedy == "default bucket":
            done = wattif(*flags, STORAGE_EMULATOR_HOST=server.url)
            assert re.search("default bucket; .*--bucket", done.stderr), done.stderr
        else:
            done = upload(server, *flags)
    (told,) = re.findall(f"^error: nothing was accepted: HTTP {status}: {re.escape(words)}; (.*)", done.stderr, re.M)
    assert done.returncode == 1 and remedy in told


def test_a_refusal_of_one_process_ends_nothing_where_another_was_accepted(made: dict[str, Any], tmp_path: Path) -> None:
    wanted, held = made["multipart"], []
    second = sorted(name for name in wanted if "2024-01-01" in name)[15:]  # the files of the second process

    def hold(request: Request) -> Any:
        if request.name in second and held in ([], [request.name]):
            # The other process goes on, so its first object was accepted.
            until(lambda: sum(other.name not in second for other in server.requests) > 1)
            held[:] = [request.name]
            return refusal(403, HOLD.format(request.name))
        return None

    with Server(fault=hold) as server:
        done = upload(server, *SMALL, "--processes", 2, "--temp-dir", tmp_path, "--json")
    only_failed(done, held, wanted, tmp_path)
    assert len(held) == 1 and contents(server) == {name: wanted[name] for name in wanted if name not in held}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_does_not_fit_is_not_believed(made: dict[str, Any], tmp_path: Path, kind: str) -> None:
    wanted = made[kind]
    first, *names = sorted(wanted)

    def fits(name: str, but: dict[str, str]) -> Reply:
        content = wanted[name]
        return document({"name": name, "size": str(len(content)), "crc32c": Server.crc32c(content), **but})

    with Server() as server:
        odd = [
            lambda name: Reply(302, b"", f"Location: {server.url}/login?Signature=aSecret\r\n"),
            lambda name: document({}),
            lambda name: HTML,
            lambda name: Reply(200, b""),
            lambda name: fits(name, {"name": first}),
            lambda name: fits(name, {"size": "1895"}),
            lambda name: fits(name, {"crc32c": "AAAAAA=="}),
            lambda name: document({"name": name}),
            lambda name: document([]),
        ]
        odd_answers = {name: answer(name) for name, answer in zip(names[1::2] if kind == "multipart" else names, odd)}
        answers = {first: document({"name": first, "size": str(len(wanted[first]))}), **odd_answers}  # without CRC32C

        def fault(request: Request) -> Any:
            if request.path == "/login":
                return HTML
            return answers.get(request.name) if completes(request) else None

        server.fault = fault
        done = upload(server, *KINDS[kind], "--temp-dir", tmp_path, "--json")
    only_failed(done, odd_answers, wanted, tmp_path)
    assert all(request.path != "/login" for request in server.requests)
    assert f"HTTP 302: {server.url}/login" in done.stderr and "aSecret" not in done.stderr
    assert all(wanted[NAME.search(path)[0]] == content for path, content in files_below(tmp_path).items())
    assert contents(server) == {name: content for name, content in wanted.items() if name not in answers}


def test_a_file_that_changes_in_the_spool_is_not_delivered(made: dict[str, Any], tmp_path: Path) -> None:
    wanted, changed = made["multipart"], []

    def change(request: Request) -> None:
        if request.number == 1:  # the second batch is written, and nothing but this file is read
            paths = [path for path in tmp_path.glob(".wattif-*/*.0.dt=*/*.ndjson") if path.name not in request.name]
            content = paths[0].read_bytes()
            for path, other in zip(paths, (content[79:], b"", content + content[-79:], content.replace(b"0", b"1"))):
                path.write_bytes(other)
                changed.append(f"dt=2024-01-01/{path.name}")

    flags = ("--upload-workers", 1, "--transfer-workers", 1, "--temp-dir", tmp_path, "--json")
    with Server(fault=change, expect_corruption=True) as server:
        done = upload(server, *SMALL, *flags)
    only_failed(done, changed, wanted, tmp_path)
    assert contents(server) == {name: content for name, content in wanted.items() if name not in changed}


def test_a_large_file_that_is_cut_between_its_chunks_is_not_delivered(made: dict[str, Any], tmp_path: Path) -> None:
    wanted = made["resumable"]
    name = sorted(wanted)[2]

    def cut(request: Request) -> None:
        if request.name == name and last_byte(request) == CHUNK - 1:
            (path,) = tmp_path.glob(f".wattif-*/*{name}")
            os.truncate(path, CHUNK + 79)

    with Server(fault=cut, expect_corruption=True) as server:
        done = upload(server, *LARGE, "--temp-dir", tmp_path, "--json")
    only_failed(done, [name], wanted, tmp_path)
    assert contents(server) == {other: content for other, content in wanted.items() if other != name}


@pytest.mark.parametrize("for_ever", [False, True])
def test_a_lost_session_is_begun_once_more(made: dict[str, Any], tmp_path: Path, for_ever: bool) -> None:
    wanted, asked = made["resumable"], Counter()
    whole = Reply(308, b"", f"Range: bytes=0-{len(wanted[min(wanted)]) - 1}\r\n")
    half = Reply(308, b"", "Range: bytes=0-8388607\r\n")
    ways = [(True, 404), (False, half), (True, whole), (False, Reply(308, b""))]  # for the last part, or the first
    lost = dict(zip(sorted(wanted)[for_ever:], ways))  # if the first one is never accepted, the run ends

    def lose(request: Request) -> Any:
        if request.name not in lost or not last_byte(request) or completes(request) != lost[request.name][0]:
            return None
        asked[request.name] += 1
        return lost[request.name][1] if for_ever or asked[request.name] == 1 else None

    with Server(fault=lose) as server:
        done = upload(server, *LARGE, "--temp-dir", tmp_path, "--json")
    assert set(asked.values()) == {2} and len(asked) == len(lost)
    if for_ever:
        only_failed(done, lost, wanted, tmp_path)
        assert "create gs://" not in done.stderr  # the bucket is there
    else:
        assert done.returncode == 0 and not spool(tmp_path), done.stderr
    assert contents(server) == {name: content for name, content in wanted.items() if not for_ever or name not in lost}


def test_verify_reads_each_checksum_where_the_keys_are_the_customers(made: dict[str, Any], tmp_path: Path) -> None:
    wanted = made["multipart"]
    names = sorted(wanted)
    together = threading.Barrier(5)  # as many as read at the same time; a day has 30 objects

    def meet(request: Request) -> Any:
        try:
            if request.name:
                together.wait(20)
        except threading.BrokenBarrierError:
            return 400
        return None

    flags = (*SMALL, "--upload-workers", 1, "--transfer-workers", 5, "--temp-dir", tmp_path, "--verify", "--json")
    with Server(cmek=True) as server:
        server.objects = {name: stored(content) for name, content in wanted.items()}
        server.fault = meet
        done = upload(server, *flags, "--batch-size", 60)
        assert done.returncode == 0 and report(done)["objects_done"] == 60, done.stderr
        assert sorted(request.name for request in server.requests if request.name) == names
        server.objects[names[3]] = stored(wanted[names[4]])
        server.objects[names[7]] = stored(wanted[names[7]][79:])
        server.fault = lambda request: None
        done = upload(server, *flags)
        assert report(done)["failures"] == [f"different: {names[3]}", f"different: {names[7]}"] and done.returncode == 1
        odd = dict(zip(names, (document({}), document([]), HTML, Reply(200, b""))))
        server.fault = lambda request: odd.get(request.name, denied("storage.objects.get")) if request.name else None
        done = upload(server, *flags)
    told = report(done)
    assert done.returncode == 1 and told["objects_unchecked"] == 59 and told["failures"][7] == f"different: {names[7]}"
    assert told["objects_different"] == 1 and re.match(r"unchecked \(HTTP 403: .*objects\.get", told["failures"][4])


def test_verify_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert wattif(*SMALL, "--output-dir", tmp_path).returncode == 0
    name = sorted(files_below(tmp_path))[5]
    (tmp_path / name).chmod(0)
    prefix = () if os.getuid() else ("setpriv", "--bounding-set", NO_PRIVILEGE, "--inh-caps", NO_PRIVILEGE)
    done = wattif(*SMALL, "--output-dir", tmp_path, "--verify", "--json", prefix=prefix)
    told = report(done)
    assert done.returncode == told["objects_unchecked"] == 1 and told["objects_done"] == 59
    assert told["failures"] == [
        f"unchecked (PermissionError: [Errno 13] Permission denied: '{tmp_path}/{name}'): {name}"
    ]


def test_verify_opens_no_file_of_another_size(tmp_path: Path) -> None:
    assert wattif(*SMALL, "--output-dir", tmp_path).returncode == 0
    name = sorted(files_below(tmp_path))[5]
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)  # nobody ever writes to it
    done = wattif(*SMALL, "--output-dir", tmp_path, "--verify", "--json")
    assert done.returncode == 1 and report(done)["failures"] == [f"different: {name}"]


ITEM = {"name": "dt=2024-01-01/0A0000ABCDEF.ndjson", "size": "1896", "crc32c": "AAAAAA=="}
LISTINGS = {
    "HTML": [HTML],
    "nothing": [Reply(200, b"")],
    "list": [document([])],
    "null": [document(None)],
    "no name": [document({"items": [{}]})],
    "no items": [document({"items": 3})],
    "no size": [document({"items": [{"name": ITEM["name"]}]})],
    "no number": [document({"items": [{**ITEM, "size": "many"}]})],
    "not sorted": [document({"items": [ITEM, {**ITEM, "name": "dt=2024-01-01/0A0000ABCDEE.ndjson"}]})],
    "too large a number": [document({"items": [{**ITEM, "size": float("inf")}]})],
    "one page": [document({"items": [ITEM], "nextPageToken": "again"})],
    "two pages": [document({"items": [ITEM], "nextPageToken": token}) for token in ("one", "other")],
}


@pytest.mark.parametrize(
    ("flag", "kind"), [*(("--verify", kind) for kind in LISTINGS), ("--resume", "HTML"), ("--resume", "two pages")]
)
def test_a_listing_that_is_none_ends_the_run_in_one_line(tmp_path: Path, flag: str, kind: str) -> None:
    pages = LISTINGS[kind]

    def answer(request: Request) -> Any:
        return pages[request.number % len(pages)] if request.number < 50 else 400

    with Server(fault=answer) as server:
        done = upload(server, *DAY, *SMALL[len(DAYS) :], "--temp-dir", tmp_path, flag, "--json")
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(server.requests) <= 4
    assert report(done)["error"].startswith("cannot go on: the bucket's listing is not what it should be: ")
    assert done.stderr.count("\nerror: ") == 1 and re.search(r"^\d+ of \d+ objects?, .* in ", done.stderr, re.M), (
        done.stderr
    )


def test_a_listing_whose_pages_stay_empty_ends(tmp_path: Path) -> None:
    with Server(fault=lambda request: document({"nextPageToken": str(request.number)})) as server:
        done = upload(server, *SMALL, "--verify", "--json")
    assert done.returncode == 1 and len(server.requests) == 100 and "are empty" in report(done)["error"]


def test_a_listing_ends_with_a_token_that_is_empty(made: dict[str, Any]) -> None:
    with Server(page=60) as server:
        server.objects = {name: stored(content) for name, content in made["multipart"].items()}
        server.fault = lambda request: document({**server.listing(request), "nextPageToken": ""})
        assert upload(server, *SMALL, "--verify").returncode == 0 and len(server.requests) == 2


def test_placeholders_of_folders_are_not_unexpected(made: dict[str, Any], tmp_path: Path) -> None:
    with Server() as server:
        server.objects = {name: stored(content) for name, content in made["multipart"].items()}
        server.objects.update({"dt=2024-01-01/": stored(b""), "dt=2024-01-02/more/": stored(b"")})
        assert upload(server, *SMALL, "--verify").returncode == 0
        assert upload(server, *SMALL, "--resume", "--temp-dir", tmp_path).returncode == 0
        server.objects["dt=2024-01-02/"] = stored(b"some bytes")  # is no placeholder
        assert "1 unexpected" in upload(server, *SMALL, "--verify").stderr
