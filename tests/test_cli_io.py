"""Tests of `addcow io`: the commands of qemu-io.

The output is compared with the format strings of qemu-io 1.6, without times. Written data is read
from the files.
"""

import re
from pathlib import Path

import pytest

from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    KiB,
    MiB,
    addcow,
    bits,
    draw,
    draw_raw,
    guest,
    guest_picture,
    io,
    local_clusters,
    look,
    pair,
    put,
    refused,
    snapshot,
    succeed,
    virtual_size,
)

pytestmark = pytest.mark.sample(1)

TIME = r"(?:\d+\.\d{4} sec|\d+:\d\d:\d\d\.\d\d)"
RATE = rf"{TIME} \([\d.]+ (?:bytes|[KMGTP]iB)/sec and [\d.]+ ops/sec\)"
TOP = "top.add-cow"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A disk of 1 MiB: base.img of 16 clusters, and TOP with its second cluster local."""
    pair(tmp_path, "A-CDEFGHJKLMNOPQ", "-X--------------")
    return tmp_path


def reports(lines: list[str], *expected: str) -> None:
    """Compare lines two by two with "wrote 1/1 bytes at offset 0|1 bytes, 1 ops"."""
    assert len(lines) == 2 * len(expected), lines
    for at, each in enumerate(expected):
        first, second = each.split("|")
        assert lines[2 * at] == first
        assert re.fullmatch(rf"{re.escape(second)}; {RATE}", lines[2 * at + 1]), lines[2 * at + 1]


# ---- read and write ----


def test_write_and_read_report_like_qemu_io(here: Path) -> None:
    result = io(TOP, "write -P 1 0 64k", "read -P 1 0 64k", "read 64k 512", cwd=here)
    reports(
        result.lines,
        "wrote 65536/65536 bytes at offset 0|64 KiB, 1 ops",
        "read 65536/65536 bytes at offset 0|64 KiB, 1 ops",
        "read 512/512 bytes at offset 65536|512 bytes, 1 ops",
    )


def test_sizes_are_shown_in_binary_units(here: Path) -> None:
    result = io(TOP, "read 0 1M", "read 0 1536", "read 512 98816", cwd=here)
    reports(
        result.lines,
        "read 1048576/1048576 bytes at offset 0|1 MiB, 1 ops",
        "read 1536/1536 bytes at offset 0|1.500 KiB, 1 ops",
        "read 98816/98816 bytes at offset 512|96.500 KiB, 1 ops",
    )


def test_write_changes_image_and_bitmap_only(here: Path) -> None:
    before = snapshot(here)["base.img"]
    io(TOP, "write -P 90 192k 64k", cwd=here)
    assert look(here / "top.raw") == "0X0Z" + "0" * 12
    assert bits(here / TOP) == ".1.1............"
    assert snapshot(here)["base.img"] == before


def test_write_copies_up_the_rest_of_its_clusters(here: Path) -> None:
    io(TOP, "write -P 1 130k 65k", cwd=here)
    expected = b"C" * 2 * KiB + b"\1" * 65 * KiB + b"D" * 61 * KiB
    assert guest(here / TOP, 128 * KiB, 128 * KiB) == expected
    assert bits(here / TOP) == ".111............"


def test_write_default_pattern_is_0xcd(here: Path) -> None:
    io(TOP, "write 0 64k", "read -P 0xcd 0 64k", cwd=here)
    assert guest(here / TOP, 0, CLUSTER) == b"\xcd" * CLUSTER


def test_write_zeroes_hides_the_backing(here: Path) -> None:
    result = io(TOP, "write -z 128k 64k", "read -P 0 128k 64k", cwd=here)
    assert result.lines[0] == "wrote 65536/65536 bytes at offset 131072"
    assert guest_picture(here / TOP).startswith("AX0D")
    assert bits(here / TOP).startswith(".11.")


def test_writes_last_from_one_command_to_the_next(here: Path) -> None:
    io(TOP, "write -P 7 640k 128k", "write -P 8 640k 512", cwd=here)
    io(TOP, "read -P 8 640k 512", "read -P 7 655872 130560", cwd=here)


def test_io_numbers_take_hex_and_suffixes(here: Path) -> None:
    result = io(TOP, "write -P 0xff 0x10000 0x200", "read -P 255 64k 0.5k", cwd=here)
    assert result.lines[0] == "wrote 512/512 bytes at offset 65536"
    assert result.lines[2] == "read 512/512 bytes at offset 65536"


def test_io_accepts_option_f(here: Path) -> None:
    assert succeed("io", "-f", "add-cow", "-c", "length", TOP, cwd=here).lines == ["1 MiB"]


# ---- vectors ----


def test_readv_and_writev_take_several_lengths(here: Path) -> None:
    result = io(TOP, "writev -P 3 4k 4k 8k 512", "readv -P 3 4k 512 12k", cwd=here)
    reports(
        result.lines,
        "wrote 12800/12800 bytes at offset 4096|12.500 KiB, 1 ops",
        "read 12800/12800 bytes at offset 4096|12.500 KiB, 1 ops",
    )
    expected = b"A" * 4096 + b"\3" * 12800 + b"A" * (CLUSTER - 16896)
    assert guest(here / TOP, 0, CLUSTER) == expected


# ---- asynchronous ----


def test_aio_reports_when_it_is_done(here: Path) -> None:
    result = io(
        TOP,
        "aio_write -P 5 0 64k",
        "aio_write -P 6 64k 4k 60k",
        "aio_flush",
        "aio_read -P 5 0 64k",
        "aio_read -P 6 64k 4k 60k",
        "aio_flush",
        cwd=here,
    )
    assert sorted(result.lines[0:4:2]) == [
        "wrote 65536/65536 bytes at offset 0",
        "wrote 65536/65536 bytes at offset 65536",
    ]
    assert sorted(result.lines[4:8:2]) == [
        "read 65536/65536 bytes at offset 0",
        "read 65536/65536 bytes at offset 65536",
    ]
    assert all(re.fullmatch(rf"64 KiB, 1 ops; {RATE}", line) for line in result.lines[1::2])
    assert guest(here / TOP, 0, 128 * KiB) == b"\5" * CLUSTER + b"\6" * CLUSTER


def test_aio_requests_are_finished_at_exit(here: Path) -> None:
    io(TOP, *(f"aio_write -P {at + 1} {at * 64}k 64k" for at in range(16)), cwd=here)
    for at in range(16):
        assert guest(here / TOP, at * CLUSTER, CLUSTER) == bytes([at + 1]) * CLUSTER


def test_aio_zeroes_and_quiet(here: Path) -> None:
    result = io(TOP, "aio_write -z -q 128k 64k", "aio_flush", "aio_read -q -P 0 128k 64k", cwd=here)
    assert result.lines == []
    assert guest_picture(here / TOP).startswith("AX0D")


def test_aio_pattern_failure(here: Path) -> None:
    result = addcow("io", "-c", "aio_read -P 9 0 4k", "-c", "aio_flush", TOP, cwd=here)
    assert result.status == 1
    assert "Pattern verification failed at offset 0, 4096 bytes" in result.said


# ---- options of reading ----


def test_failed_pattern_is_reported_and_sets_the_exit_status(here: Path) -> None:
    result = addcow("io", "-c", "read -P 9 8k 4k", "-c", "length", TOP, cwd=here)
    assert result.status == 1
    assert result.lines[0] == "Pattern verification failed at offset 8192, 4096 bytes"
    assert result.lines[1] == "read 4096/4096 bytes at offset 8192"
    assert result.lines[-1] == "1 MiB"


@pytest.mark.long
def test_failed_pattern_in_the_last_byte_is_detected(here: Path) -> None:
    io(TOP, "write -P 1 0 64k", cwd=here)
    put(here / "top.raw", CLUSTER - 1, b"\2")
    for command in ("read -P 1 0 64k", "readv -P 1 0 4k 60k", "read -q -P 1 65024 512"):
        result = addcow("io", "-c", command, TOP, cwd=here)
        assert result.status == 1
        assert "Pattern verification failed" in result.said


def test_pattern_of_a_part_of_the_read_range(here: Path) -> None:
    io(TOP, "write -P 1 512 512", cwd=here)
    part = "read -P 1 -s 512 -l 512 0 4k"
    assert io(TOP, part, cwd=here).lines[0] == "read 4096/4096 bytes at offset 0"
    result = addcow("io", "-c", "read -P 1 -s 1k -l 512 0 4k", TOP, cwd=here)
    assert result.status == 1
    assert result.lines[0] == "Pattern verification failed at offset 1024, 512 bytes"


def test_pattern_from_an_offset_to_the_end(here: Path) -> None:
    io(TOP, "write -P 1 2k 2k", "read -P 1 -s 2k 0 4k", "read -P 65 -l 2k 0 4k", cwd=here)
    assert addcow("io", "-c", "read -P 1 -s 2k 0 8k", TOP, cwd=here).status == 1


def test_read_v_dumps_bytes(here: Path) -> None:
    io(TOP, "write -P 1 4k 512", "write -P 126 4608 256", "write -P 57 4864 256", cwd=here)
    lines = io(TOP, "read -v 4k 1k", cwd=here).lines
    assert len(lines) == 64 + 2
    assert lines[0] == "00001000:  " + "01 " * 16 + " " + "." * 16
    assert lines[31].startswith("000011f0:  01 ")
    # Letters and digits show as themselves, everything else as a dot.
    assert lines[32] == "00001200:  " + "7e " * 16 + " " + "." * 16
    assert lines[48] == "00001300:  " + "39 " * 16 + " " + "9" * 16
    assert lines[64] == "read 1024/1024 bytes at offset 4096"


def test_io_quiet_prints_only_failures(here: Path) -> None:
    assert io(TOP, "write -q -P 1 0 4k", "read -q -P 1 0 4k", cwd=here).lines == []
    result = addcow("io", "-c", "read -q -P 2 0 4k", TOP, cwd=here)
    assert result.status == 1
    assert result.lines == ["Pattern verification failed at offset 0, 4096 bytes"]


@pytest.mark.parametrize("command", ["write", "read", "writev", "readv", "aio_read", "aio_write"])
def test_io_report_is_machine_readable_with_option_c(here: Path, command: str) -> None:
    lines = io(TOP, f"{command} -C 0 64k", "aio_flush", cwd=here).lines
    assert len(lines) == 1
    assert re.fullmatch(r"65536,1,\d+:\d\d:\d\d\.\d\d,\d+\.\d{3},\d+\.\d{3}", lines[0])


# ---- asking ----


def test_io_length_prints_the_virtual_size(tmp_path: Path) -> None:
    pair(tmp_path, "AB", "---")
    with (tmp_path / "top.raw").open("ab") as file:
        file.write(b"x" * 700)
    assert virtual_size(tmp_path / TOP) == 3 * CLUSTER + 512
    assert io(TOP, "length", cwd=tmp_path).lines == ["192.500 KiB"]


def test_io_alloc_counts_sectors(here: Path) -> None:
    result = io(
        TOP, "alloc 0", "alloc 64k", "alloc 64k 128", "alloc 64k 256", "alloc 0 2048", cwd=here
    )
    assert result.lines == [
        "0/1 sectors allocated at offset 0 bytes",
        "1/1 sectors allocated at offset 64 KiB",
        "128/128 sectors allocated at offset 64 KiB",
        "128/256 sectors allocated at offset 64 KiB",
        "128/2048 sectors allocated at offset 0 bytes",
    ]


def test_io_map_lists_runs_by_sectors(here: Path) -> None:
    lines = io(TOP, "write -q 896k 64k", "map", cwd=here).lines
    assert lines == [
        f"[{0:24d}] {128:8d}/{2048:8d} sectors not allocated at offset 0 bytes (0)",
        f"[{64 * KiB:24d}] {128:8d}/{1920:8d} sectors     allocated at offset 64 KiB (1)",
        f"[{128 * KiB:24d}] {1536:8d}/{1792:8d} sectors not allocated at offset 128 KiB (0)",
        f"[{896 * KiB:24d}] {128:8d}/{256:8d} sectors     allocated at offset 896 KiB (1)",
        f"[{960 * KiB:24d}] {128:8d}/{128:8d} sectors not allocated at offset 960 KiB (0)",
    ]


def test_io_map_of_an_all_allocated_image_is_one_run(tmp_path: Path) -> None:
    draw(tmp_path / TOP, "AB--", "", compatible=ALL_ALLOCATED)
    assert io(TOP, "map", "alloc 0 512", cwd=tmp_path).lines == [
        f"[{0:24d}] {512:8d}/{512:8d} sectors     allocated at offset 0 bytes (1)",
        "512/512 sectors allocated at offset 0 bytes",
    ]


def test_io_flush_publishes_bits_and_prints_nothing(here: Path) -> None:
    assert io(TOP, "write -q 0 64k", "flush", "aio_flush", cwd=here).lines == []
    assert local_clusters(here / TOP) == [0, 1]


# ---- sources of commands ----


def test_io_reads_commands_from_standard_input(here: Path) -> None:
    script = "write -P 4 0 64k\n\nread -P 4 0 64k\nlength\n"
    lines = succeed("io", TOP, cwd=here, stdin=script).lines
    reports(
        lines[:4],
        "wrote 65536/65536 bytes at offset 0|64 KiB, 1 ops",
        "read 65536/65536 bytes at offset 0|64 KiB, 1 ops",
    )
    assert lines[4] == "1 MiB"
    assert guest_picture(here / TOP)[:2] == "\4X"


def test_failed_command_on_standard_input_sets_the_exit_status(here: Path) -> None:
    result = addcow("io", TOP, cwd=here, stdin="read -P 9 0 512\nread -P 65 0 512\n")
    assert result.status == 1
    assert result.lines[0] == "Pattern verification failed at offset 0, 512 bytes"


def test_io_with_c_does_not_read_standard_input(here: Path) -> None:
    before = snapshot(here)
    assert succeed("io", "-c", "length", TOP, cwd=here, stdin="write 0 64k\n").lines == ["1 MiB"]
    assert snapshot(here) == before


def test_io_quit_ends_the_session(here: Path) -> None:
    assert io(TOP, "length", "quit", "length", cwd=here).lines == ["1 MiB"]
    lines = succeed("io", TOP, cwd=here, stdin="length\nquit\nlength\n").lines
    assert lines == ["1 MiB"]


# ---- refusals ----


@pytest.mark.long
def test_io_read_only_refuses_writes(here: Path) -> None:
    before = snapshot(here)
    for command in ("write 0 64k", "writev 0 64k", "write -z 0 64k", "aio_write 0 64k"):
        result = addcow("io", "-r", "-c", command, "-c", "aio_flush", TOP, cwd=here)
        assert result.status == 1, command
        assert "wrote" not in result.said
        assert result.said != ""
    assert snapshot(here) == before
    reading = succeed("io", "-r", "-c", "read -P 65 0 64k", "-c", "length", TOP, cwd=here)
    assert reading.lines[-1] == "1 MiB"
    assert snapshot(here) == before


@pytest.mark.parametrize("command", ["read", "write", "readv", "writev", "aio_read", "aio_write"])
@pytest.mark.parametrize("where", ["1M 512", "1048064 1k", "7E 512"])
def test_io_out_of_range_is_an_input_output_error(here: Path, command: str, where: str) -> None:
    before = snapshot(here)
    result = addcow("io", "-c", f"{command} {where}", "-c", "aio_flush", TOP, cwd=here)
    assert result.status == 1
    assert f"{command} failed: Input/output error" in result.said
    assert snapshot(here) == before


def test_io_reports_an_unknown_command(here: Path) -> None:
    result = addcow("io", "-c", "bogus", "-c", "length", TOP, cwd=here)
    assert 'command "bogus" not found' in result.said
    assert result.lines[-1] == "1 MiB"
    assert result.status == 1


def test_io_reports_missing_arguments(here: Path) -> None:
    result = addcow("io", "-c", "read", "-c", "write 0", TOP, cwd=here)
    assert result.status == 1
    for command, count in (("read", 0), ("write", 1)):
        expected = f"bad argument count {count} to {command}, expected at least 2 arguments"
        assert expected in result.said


@pytest.mark.parametrize(
    "command",
    [
        "read abc 512",
        "read 0 4z",
        "read -512 512",
        "write -P 999 0 512",
        "write -P x 0 512",
        "write -x 0 512",
        "write -z -P 3 0 512",
        "read -s 512 0 1k",
        "read -P 1 -s 2k 0 1k",
        "length 3",
        "alloc",
    ],
)
def test_io_reports_invalid_arguments_and_changes_nothing(here: Path, command: str) -> None:
    before = snapshot(here)
    result = addcow("io", "-c", command, TOP, cwd=here)
    assert result.status == 1
    assert len(result.said.splitlines()) >= 1
    assert "wrote" not in result.said
    assert snapshot(here) == before


def test_io_refuses_a_missing_backing_before_the_first_command(tmp_path: Path) -> None:
    draw(tmp_path / TOP, "-X", "gone.img")
    before = snapshot(tmp_path)
    message = refused("io", "-c", "write 0 512", TOP, cwd=tmp_path)
    assert "gone.img" in message
    assert snapshot(tmp_path) == before


def test_io_refuses_a_raw_file(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    before = snapshot(tmp_path)
    refused("io", "-f", "add-cow", "-c", "write 0 512", "base.img", cwd=tmp_path)
    assert snapshot(tmp_path) == before


# ---- large offsets ----


@pytest.mark.long
def test_write_past_two_tebibytes_sets_its_bit(tmp_path: Path) -> None:
    succeed("create", "-q", TOP, "3T", cwd=tmp_path)
    # Without the flag the bitmap counts, and what has no bit reads as zeros.
    put(tmp_path / TOP, 32, b"\0")
    at = 5 * MiB * MiB // 2 + CLUSTER
    commands = f"write -P 5 {at} 64k", f"read -P 5 {at} 64k", f"read -P 0 {at + CLUSTER} 1M"
    io(TOP, *commands, cwd=tmp_path)
    assert local_clusters(tmp_path / TOP) == [at // CLUSTER]
    assert guest(tmp_path / TOP, at - 1, CLUSTER + 2) == b"\0" + b"\5" * CLUSTER + b"\0"


# ---- discard, truncate ----


def test_discard_frees_whole_clusters_which_read_as_zeros(here: Path) -> None:
    result = io(TOP, "discard 1k 190k", "d -q 192k 64k", "discard -C 0 1k", cwd=here)
    assert result.lines[0] == "discard 194560/194560 bytes at offset 1024"
    assert re.fullmatch(rf"190 KiB, 1 ops; {RATE}", result.lines[1])
    assert re.fullmatch(r"1024,1,[\d:.]+,[\d.]+,[\d.]+", result.lines[2])
    assert len(result.lines) == 3
    assert guest_picture(here / TOP) == "A0C0EFGHJKLMNOPQ"
    assert bits(here / TOP) == ".1.1............"
    assert (here / "top.raw").stat().st_blocks == 0


def test_discard_to_the_end_takes_a_partial_last_cluster(here: Path) -> None:
    io(TOP, "truncate 196096", "discard 128k 65024", "read -P 0 128k 65024", cwd=here)
    assert bits(here / TOP) == ".11"


def test_write_zeroes_may_unmap(here: Path) -> None:
    io(TOP, "write -z -u 64k 64k", "aio_write -zu 128k 64k", "aio_flush", cwd=here)
    assert guest_picture(here / TOP).startswith("A00D")
    assert (here / "top.raw").stat().st_blocks == 0


def test_truncate_changes_the_size_within_a_session(here: Path) -> None:
    commands = ["write -P 7 960k 64k", "truncate 2M", "length", "read -P 7 960k 64k"]
    commands += ["read -P 0 1M 1M", "write -P 8 1536k 4k", "t 100k", "length", "truncate 1M"]
    result = io(TOP, *commands, "read -P 0 102400 946176", "write -P 9 512k 64k", cwd=here)
    assert [line for line in result.lines if re.fullmatch("[0-9]+ .iB", line)] == [
        "2 MiB",
        "100 KiB",
    ]
    wanted = b"A" * CLUSTER + b"X" * (36 * KiB)
    wanted = wanted.ljust(512 * KiB, b"\0") + b"\x09" * CLUSTER
    assert guest(here / TOP, 0, MiB) == wanted.ljust(MiB, b"\0")
    assert addcow("check", TOP, cwd=here).status == 0


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("write -u 0 4k", "-u requires -z to be specified"),
        ("discard 0", "bad argument count 1 to discard, expected at least 2 arguments"),
        ("discard 0 1 2", "discard: one offset and one length; see 'help'"),
        ("discard x 1", "non-numeric length argument -- x"),
        ("discard 1M 512", "discard failed: Input/output error"),
        ("truncate", "bad argument count 0 to truncate, expected 1 arguments"),
        ("truncate 1000", "The new size must be a multiple of 512"),
        ("truncate x", "non-numeric length argument -- x"),
        ("truncate -1", "non-numeric length argument -- -1"),
    ],
)
def test_wrong_change_is_refused_and_the_next_command_runs(
    here: Path, command: str, says: str
) -> None:
    before = snapshot(here)
    result = addcow("io", "-c", command, "-c", "length", TOP, cwd=here)
    assert (result.status, result.said.count(says)) == (1, 1), result
    assert "1 MiB" in result.stdout
    assert snapshot(here) == before


@pytest.mark.parametrize("command", ["truncate 2M", "truncate 512", "discard 64k 64k"])
def test_change_of_a_disk_that_others_need_is_refused(here: Path, command: str) -> None:
    draw(here / "above.add-cow", "-" * 16, TOP, backing_format="add-cow")
    before = snapshot(here)
    assert "above.add-cow" in refused("io", "-c", command, TOP, cwd=here)
    assert addcow("io", "-r", "-c", command, TOP, cwd=here).status == 1
    assert snapshot(here) == before
