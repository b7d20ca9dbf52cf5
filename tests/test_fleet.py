"""The fleet: meters that are drawn block by block, and the slices of their names."""

from __future__ import annotations

import ctypes
import signal
import time
from array import array
from pathlib import Path

import pytest

import generator
from conftest import DAY, DAYS, files_below, start, upload, wattif
from server import Server

BLOCK = generator.BLOCK_METERS
SMALL = (*DAYS, "--interval", "3600")
# Twenty meters are three blocks of eight, and slices begin and end inside of them.
SMALL_BLOCKS = "generator.BLOCK_METERS, generator.FILTER_BITS = 8, 64"


def drawn(places: range, *flags: str) -> generator.Slice:
    """Draw a slice of the largest fleet."""
    run = generator.read_settings([*DAY, "--meters", str(2**36), "--seed", "7", "--output-dir", "x", *flags])
    return generator.draw_slice(run, generator.make_plan(run), places, ctypes.c_byte(0))


def test_a_larger_fleet_begins_with_the_smaller_one() -> None:
    large = generator.draw_block(7, 0, 5000)
    assert generator.draw_block(7, 0, 1234) == large[:1234]
    assert len(set(large)) == 5000
    assert generator.draw_block(8, 0, 5000) != large


def test_files_of_a_larger_fleet_are_those_of_the_smaller_one_and_more(tmp_path: Path) -> None:
    for meters in (30, 50):
        flags = (*SMALL, "--meters", meters, "--output-dir", tmp_path / str(meters))
        assert wattif(*flags).returncode == 0
    small, large = files_below(tmp_path / "30"), files_below(tmp_path / "50")
    assert small.items() < large.items() and len(large) == 100


@pytest.fixture(scope="module")
def last_block() -> array[int]:
    """The addresses of the last block there is."""
    return generator.draw_block(7, 65_535, BLOCK)


def test_the_meters_of_a_block_are_all_different(last_block: array[int]) -> None:
    assert len(set(last_block)) == len(last_block) == BLOCK and last_block.itemsize == 8
    assert all(address >> 24 == 0x0AFFFF for address in last_block)


def test_a_slice_is_drawn_without_the_blocks_before_it(last_block: array[int]) -> None:
    # A slice has one meter more than its files: the next one's, whose name bounds its own.
    last = 65_535 * BLOCK
    block = sorted(last_block)
    assert list(drawn(range(last + 5, last + 9)).addresses) == block[5:10]


def test_the_first_and_the_last_slice_have_no_bound(tmp_path: Path) -> None:
    # Tasks of two files each: at both ends of the fleet, and one whose next file is in the next block.
    flags = (*DAY, "--meters", 2**19, "--interval", 86_400, "--resume", "--task-count", 2**18, "--processes", 1)
    bounds = []
    with Server() as server:
        for index in (0, 3, 2**18 - 1):
            server.requests.clear()
            done = upload(server, *flags, "--task-index", index, "--temp-dir", tmp_path, patch=SMALL_BLOCKS)
            assert done.returncode == 0 and "2 objects, " in done.stderr, done.stderr
            query = server.requests[0].query
            bounds.append([query.get(bound, "")[14:20] for bound in ("startOffset", "endOffset")])
    assert bounds == [["", "0A0000"], ["0A0000", "0A0001"], ["0AFFFF", ""]]
    assert len(server.objects) == 6


def test_verify_of_a_slice_across_blocks(tmp_path: Path) -> None:
    flags = (*SMALL, "--meters", 20, "--output-dir", tmp_path)

    def run(*more: object) -> int:
        return wattif(*flags, *more, patch=SMALL_BLOCKS).returncode

    assert run("--processes", 3) == 0
    assert sorted({name[14:20] for name in files_below(tmp_path)}) == ["0A0000", "0A0001", "0A0002"]
    assert len(files_below(tmp_path)) == 40
    assert [run("--verify", "--task-index", index, "--task-count", 4) for index in range(4)] == [0] * 4
    (tmp_path / "dt=2024-01-02" / "0A0001FFFFFF.ndjson").touch()
    assert sum(run("--verify", "--task-index", index, "--task-count", 4) for index in range(4)) == 1
    assert run("--verify", "--processes", 3) == 1


@pytest.mark.parametrize("meters_per_file", [1, 1000])
def test_a_signal_ends_the_drawing_of_a_large_fleet(tmp_path: Path, meters_per_file: int) -> None:
    # 57 blocks take half a minute or more; a signal is noticed after the block that is being drawn.
    flags = ("--meters", 60_000_000, "--meters-per-file", meters_per_file, "--interval", 86_400, "--processes", 1)
    bucket = {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:1"}  # it is not asked for anything before
    with start("--bucket", "a-bucket", *DAY, *flags, "--temp-dir", tmp_path, "-v", **bucket) as process:
        assert any("drawing meters 0 to 59999999" in line for line in process.stderr)
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM" in told and "0 objects, " in told
    assert time.monotonic() - signalled < 20 and not files_below(tmp_path)


def test_a_fleet_that_does_not_fit_ends_the_run(tmp_path: Path) -> None:
    flags = ("--meters", 5_000_000, "--meters-per-file", 2_500_000, "--interval", 86_400, "--processes", 1)
    done = wattif(*DAYS, *flags, "--output-dir", tmp_path, prefix=("prlimit", "--as=100000000"))
    assert done.returncode == 1 and "lower --meters" in done.stderr and "Traceback" not in done.stderr
