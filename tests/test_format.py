"""Tests of the header, field by field, and of cluster arithmetic.

The offsets are those of docs/format.md. Each edit of a valid header breaks one rule. Values at a
limit are accepted.
"""

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import addcow_mp
from addcow_mp.format.geometry import Geometry, virtual_size
from addcow_mp.format.header import (
    FIXED_SIZE,
    KNOWN_FORMATS,
    Header,
    format_name,
    header_size,
    violations,
)
from addcow_mp.units import GiB
from support.command import (
    ALL_ALLOCATED,
    KiB,
    MiB,
    TiB,
    addcow,
    draw,
    draw_raw,
    guest_picture,
    io,
    overlay_bytes,
    pair,
    patch,
    put,
    refused,
    succeed,
)
from support.properties import tried

PROPERTY = tried(100)

# docs/format.md: first byte, length. A header whose every byte is another one shows each.
PLACES = {
    "magic": (0, 4),
    "backing_offset": (4, 4),
    "backing_size": (8, 4),
    "image_offset": (12, 4),
    "image_size": (16, 4),
    "cluster_bits": (20, 4),
    "features": (24, 8),
    "compatible_features": (32, 8),
    "header_size": (40, 4),
    "backing_format": (44, 16),
    "image_format": (60, 16),
}
BYTES = bytes(range(100, 176))

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
FORMATS = st.binary(min_size=16, max_size=16)
HEADERS = st.builds(
    Header,
    magic=st.binary(min_size=4, max_size=4),
    backing_offset=U32,
    backing_size=U32,
    image_offset=U32,
    image_size=U32,
    cluster_bits=U32,
    features=U64,
    compatible_features=U64,
    header_size=U32,
    backing_format=FORMATS,
    image_format=FORMATS,
)


def changed(header: Header, field: str, value: Any) -> Header:
    """The same header with another value in one field."""
    return header._replace(**{field: value})


# ---- where the fields are ----


def test_the_fixed_header_is_76_bytes_without_a_gap() -> None:
    assert FIXED_SIZE == 76
    assert Header._fields == tuple(PLACES)
    assert sum(length for _, length in PLACES.values()) == 76


@pytest.mark.parametrize("field", PLACES)
def test_each_field_is_read_from_its_place(field: str) -> None:
    start, length = PLACES[field]
    raw = BYTES[start : start + length]
    found = getattr(Header.unpack(BYTES), field)
    assert found == (raw if isinstance(found, bytes) else int.from_bytes(raw, "little"))


@pytest.mark.parametrize("field", PLACES)
def test_each_field_is_written_to_its_place_and_nowhere_else(field: str) -> None:
    start, length = PLACES[field]
    whole = Header.unpack(BYTES)
    value = getattr(whole, field)
    other: Any = value[::-1] if isinstance(value, bytes) else value ^ 1
    packed = changed(whole, field, other).pack()
    assert packed[:start] == BYTES[:start]
    assert packed[start : start + length] != BYTES[start : start + length]
    assert packed[start + length :] == BYTES[start + length :]


@PROPERTY
@given(HEADERS)
def test_any_header_survives_packing(header: Header) -> None:
    assert Header.unpack(header.pack()) == header


@PROPERTY
@given(st.binary(min_size=76, max_size=76))
def test_any_76_bytes_unpack_and_are_checked(raw: bytes) -> None:
    header = Header.unpack(raw)
    assert header.pack() == raw
    assert all(rule and problem for rule, problem in violations(header))


def test_new_overlay_has_the_documented_header(tmp_path: Path) -> None:
    draw_raw(tmp_path / "base.img", "A")
    succeed("create", "-b", "base.img", "-F", "raw", "top.add-cow", cwd=tmp_path)
    head = (tmp_path / "top.add-cow").read_bytes()[: 64 * KiB]
    assert head[:4] == b"ACOW"
    assert struct.unpack("<IIIII", head[4:24]) == (76, 8, 84, 7, 16)
    assert struct.unpack("<QQI", head[24:44]) == (0, 0, 65536)
    assert head[44:76] == b"raw".ljust(16, b"\0") * 2
    assert head[76:] == b"base.imgtop.raw".ljust(64 * KiB - 76, b"\0")


def test_new_overlay_without_a_backing_has_the_documented_header(tmp_path: Path) -> None:
    succeed("create", "-o", "cluster_size=4k", "top.add-cow", "1M", cwd=tmp_path)
    head = (tmp_path / "top.add-cow").read_bytes()[: 4 * KiB]
    assert struct.unpack("<IIIII", head[4:24]) == (0, 0, 76, 7, 12)
    assert struct.unpack("<QQI", head[24:44]) == (0, ALL_ALLOCATED, 4096)
    assert head[44:76] == bytes(16) + b"raw".ljust(16, b"\0")
    assert head[76:] == b"top.raw".ljust(4 * KiB - 76, b"\0")


# ---- the rules ----


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


# Edits of an overlay over base.img with clusters of 64 KiB: place, bytes, rule, what is said.
BREAKS = [
    (4, u32(0), "names", "backing name offset 0 and size 8: one is 0"),
    (8, u32(0), "names", "backing name offset 76 and size 0: one is 0"),
    (4, u32(75), "names", "backing name offset is 75, must be at least 76"),
    (4, u32(1), "names", "backing name offset is 1, must be at least 76"),
    (4, u32(65529), "names", "backing name ends at 65537, behind header_size 65536"),
    (4, u32(2**32 - 1), "names", "backing name ends at 4294967303"),
    (8, u32(1024), "names", "backing name size is 1024, must be 1 to 1023"),
    (8, u32(2**32 - 1), "names", "backing name size is 4294967295"),
    (12, u32(0), "names", "image name offset is 0, must be at least 76"),
    (12, u32(75), "names", "image name offset is 75, must be at least 76"),
    (12, u32(65530), "names", "image name ends at 65537, behind header_size 65536"),
    (16, u32(0), "names", "image name size is 0, must be 1 to 4095"),
    (16, u32(4096), "names", "image name size is 4096, must be 1 to 4095"),
    (20, u32(11), "header", "cluster_bits is 11, must be 12 to 21"),
    (20, u32(22), "header", "cluster_bits is 22, must be 12 to 21"),
    (20, u32(0), "header", "cluster_bits is 0"),
    (20, u32(2**32 - 1), "header", "cluster_bits is 4294967295"),
    (20, u32(15), "header", "header_size is 65536, must be 32768"),
    (24, b"\1", "header", "unknown feature bits 0x1 are set"),
    (31, b"\x20", "header", "unknown feature bits 0x2000000000000000 are set"),
    (40, u32(0), "header", "header_size is 0, must be 65536"),
    (40, u32(4096), "header", "header_size is 4096, must be 65536"),
    (40, u32(65535), "header", "header_size is 65535, must be 65536"),
    (40, u32(131072), "header", "header_size is 131072, must be 65536"),
    (44, bytes(3), "formats", "backing format is empty"),
    (44, b"\0aw", "formats", "backing format is empty"),
    (44, b"new", "formats", "backing format 'new' is unknown"),
    (44, b"RAW", "formats", "backing format 'RAW' is unknown"),
    (44, b"r\xe4w", "formats", r"backing format 'r\xe4w' is unknown"),
    (44, b"raw4567890123456", "formats", "backing format is not NUL-terminated and zero-padded"),
    (59, b"x", "formats", "backing format is not NUL-terminated and zero-padded"),
    (60, bytes(3), "formats", "image format is empty"),
    (60, b"row", "formats", "image format 'row' is unknown"),
    (75, b"x", "formats", "image format is not NUL-terminated and zero-padded"),
]

# Without a backing its format is one too many, and a region of no bytes holds no names.
FOLLOWED = [(4, u32(0)), (40, u32(0))]


@pytest.fixture
def top(tmp_path: Path) -> Path:
    return pair(tmp_path, "ABC", "-X-")


@pytest.mark.parametrize(("offset", "edit", "rule", "told"), BREAKS)
def test_one_edit_of_a_header_breaks_one_rule(
    top: Path, offset: int, edit: bytes, rule: str, told: str
) -> None:
    put(top, offset, edit)
    broken = list(violations(Header.unpack(top.read_bytes()[:76])))
    assert broken[0].rule == rule
    assert told in broken[0].problem
    assert len(broken) == 1 or (offset, edit) in FOLLOWED


@pytest.mark.parametrize(("offset", "edit", "rule", "told"), BREAKS)
def test_edited_header_is_refused_and_check_names_the_rule(
    top: Path, offset: int, edit: bytes, rule: str, told: str
) -> None:
    put(top, offset, edit)
    for use in (addcow_mp.open, addcow_mp.info, addcow_mp.commit, addcow_mp.flatten):
        with pytest.raises(addcow_mp.FormatError) as caught:
            use(top)
        assert caught.value.fields["rule"] == rule
        assert str(top) in str(caught.value)
        assert told in str(caught.value)
    report = addcow_mp.check(top)
    assert report.exit_code == 2
    assert rule in {one.name for one in report.findings if told in one.message}


def test_backing_format_without_a_backing_breaks_a_rule(tmp_path: Path) -> None:
    top = tmp_path / "top.add-cow"
    draw(top, "A", backing="")
    put(top, 44, b"raw")
    with pytest.raises(addcow_mp.FormatError, match="backing format is set without a backing"):
        addcow_mp.info(top)


@pytest.mark.parametrize("edit", [b"ACOX", b"acow", b"\0COW", b"WOCA"])
def test_file_without_the_magic_is_not_add_cow(top: Path, edit: bytes) -> None:
    put(top, 0, edit)
    with pytest.raises(addcow_mp.NotAddcowError):
        addcow_mp.info(top)
    assert addcow("check", top.name, cwd=top.parent).status == 63


@pytest.mark.parametrize("length", [4, 75, 76, 77, 4096, 65535])
def test_file_shorter_than_its_header_is_refused(top: Path, length: int) -> None:
    top.write_bytes(top.read_bytes()[:length])
    said = refused("info", top.name, cwd=top.parent)
    assert f"the file is {length} bytes long" in said
    assert addcow("check", top.name, cwd=top.parent).status == 2


@pytest.mark.parametrize("length", [0, 1, 3])
def test_file_too_short_for_the_magic_is_not_add_cow(top: Path, length: int) -> None:
    top.write_bytes(top.read_bytes()[:length])
    assert "not an add-cow file" in refused("info", top.name, cwd=top.parent)


def test_check_reports_each_broken_rule(top: Path) -> None:
    put(top, 24, b"\1")
    put(top, 8, u32(1024))
    put(top, 16, u32(0))
    put(top, 44, b"new")
    put(top, 60, bytes(3))
    findings = [one.name for one in addcow_mp.check(top).findings]
    assert findings == ["header", "names", "names", "formats", "formats"]


# ---- what is legal at its limit ----


def test_valid_header_breaks_no_rule(top: Path) -> None:
    assert list(violations(Header.unpack(top.read_bytes()[:76]))) == []


@pytest.mark.parametrize("bits", range(12, 22))
def test_every_cluster_size_is_opened(tmp_path: Path, bits: int) -> None:
    draw_raw(tmp_path / "base.img", "AB")
    draw(tmp_path / "top.add-cow", "-X", cluster=1 << bits)
    info = addcow_mp.info(tmp_path / "top.add-cow")
    assert info.header.header_size == header_size(1 << bits) == max(4096, 1 << bits)
    assert (info.total_clusters, info.allocated_clusters) == (2, 1)


@pytest.mark.parametrize("known", KNOWN_FORMATS)
def test_every_known_format_breaks_no_rule(top: Path, known: str) -> None:
    patch(top, 44, known.encode().ljust(16, b"\0"))
    patch(top, 60, known.encode().ljust(16, b"\0"))
    assert list(violations(Header.unpack(top.read_bytes()[:76]))) == []


@pytest.mark.parametrize(
    ("what", "longest"),
    [("image", "./" * 2044 + "top.raw"), ("backing", "./" * 507 + ".base.img")],
)
def test_names_at_the_limit_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, longest: str
) -> None:
    assert len(longest) == {"image": 4095, "backing": 1023}[what]
    # The system's own limit is 4095 bytes too, so a directory would be too much.
    monkeypatch.chdir(tmp_path)
    for name in ("top.raw", ".base.img"):
        draw_raw(Path(name), "A-")
    names: dict[str, Any] = {"image": "top.raw", "backing": ".base.img", what: longest}
    Path("top.add-cow").write_bytes(overlay_bytes(size=2 * 65536, **names))
    with addcow_mp.open("top.add-cow") as disk:
        assert disk.read(65535, 2) == b"A\0"


@pytest.mark.parametrize("image_first", [False, True])
@pytest.mark.parametrize("end", [65536, 60000, 4096])
def test_names_may_lie_anywhere_behind_the_fixed_header(
    top: Path, end: int, image_first: bool
) -> None:
    names = [(12, b"top.raw"), (4, b"base.img")]
    patch(top, 76, bytes(15))
    for place, name in names if image_first else reversed(names):
        end -= len(name)
        patch(top, place, u32(end))
        patch(top, end, name)
    assert guest_picture(top) == "AXC"
    assert addcow_mp.check(top).exit_code == 0
    with addcow_mp.open(top) as disk:
        assert disk.read(0, 192 * KiB) == b"A" * 65536 + b"X" * 65536 + b"C" * 65536


@pytest.mark.parametrize("raw", [b"", b"\0\0", b"raw", b"raw\0\0x", b"\xff\xfe\0", bytes(range(9))])
def test_format_field_is_shown_whatever_its_bytes(raw: bytes) -> None:
    shown = raw.split(b"\0")[0]
    assert format_name(raw) == "".join(
        chr(byte) if byte < 128 else f"\\x{byte:02x}" for byte in shown
    )


# ---- ALL_ALLOCATED ----


@PROPERTY
@given(HEADERS, st.booleans())
def test_setting_all_allocated_changes_only_its_bit(header: Header, value: bool) -> None:
    flagged = header.with_all_allocated(value)
    assert flagged.all_allocated is value
    assert flagged.compatible_features | 1 == header.compatible_features | 1
    assert changed(flagged, "compatible_features", header.compatible_features) == header


UNKNOWN = 0xF0F0_0000_0000_00F0


def test_setting_the_flag_keeps_unknown_bits(top: Path) -> None:
    before = top.read_bytes()
    put(top, 32, struct.pack("<Q", UNKNOWN))
    addcow_mp.flatten(top, jobs=0)
    after = top.read_bytes()
    assert struct.unpack("<Q", after[32:40]) == (UNKNOWN | 1,)
    assert after[:32] + after[40:65536] == before[:32] + before[40:65536]


def test_clearing_the_flag_keeps_unknown_bits(top: Path) -> None:
    before = top.read_bytes()
    put(top, 32, struct.pack("<Q", UNKNOWN | 1))
    addcow_mp.commit(top, jobs=0)
    after = top.read_bytes()
    assert struct.unpack("<Q", after[32:40]) == (UNKNOWN,)
    assert after[:32] + after[40:65536] == before[:32] + before[40:65536]


def test_write_does_not_change_the_header(top: Path) -> None:
    put(top, 32, struct.pack("<Q", UNKNOWN))
    before = top.read_bytes()[:65536]
    io(top.name, "write 0 192k", cwd=top.parent)
    assert top.read_bytes()[:65536] == before


# ---- geometry ----

# Lengths of .add-cow files, observed on the reference: cluster size, virtual size, length.
LENGTHS = [
    (4 * KiB, 0, 4096),
    (4 * KiB, 512, 8192),
    (4 * KiB, 128 * MiB, 8192),
    (4 * KiB, 128 * MiB + 512, 12288),
    (4 * KiB, 1 * GiB, 36864),
    (4 * KiB, 1 * TiB, 33558528),
    (64 * KiB, 0, 65536),
    (64 * KiB, 512, 131072),
    (64 * KiB, 1 * GiB, 131072),
    (64 * KiB, 1 * TiB, 2162688),
    (2 * MiB, 512, 4194304),
    (2 * MiB, 1 * TiB, 4194304),
]


@pytest.mark.parametrize(("cluster", "size", "length"), LENGTHS)
def test_file_length_equals_that_of_the_reference(
    tmp_path: Path, cluster: int, size: int, length: int
) -> None:
    addcow_mp.create(tmp_path / "top.add-cow", size=size, cluster_size=cluster)
    assert (tmp_path / "top.add-cow").stat().st_size == length
    assert (tmp_path / "top.raw").stat().st_size == size
    assert header_size(cluster) + Geometry(size, cluster).bitmap_length == length


CLUSTERS = st.integers(12, 21).map(lambda bits: 1 << bits)
SECTORS = st.integers(0, 2**54 - 1) | st.integers(0, 2**10)


@PROPERTY
@given(SECTORS.map(lambda sectors: 512 * sectors), CLUSTERS)
def test_clusters_cover_the_disk_and_end_with_it(size: int, cluster: int) -> None:
    geometry = Geometry(size, cluster)
    clusters = geometry.clusters
    assert clusters * cluster >= size > (clusters - 1) * cluster or size == clusters == 0
    assert geometry.span(0, clusters) == (0, size)
    assert geometry.touched(0, size) == (0, clusters)
    assert geometry.bitmap_used * 8 >= clusters > (geometry.bitmap_used - 1) * 8 or not clusters
    assert geometry.bitmap_length % cluster == 0
    assert 0 <= geometry.bitmap_length - geometry.bitmap_used < cluster


@PROPERTY
@given(SECTORS, CLUSTERS, st.data())
def test_byte_and_cluster_ranges_agree(sectors: int, cluster: int, data: st.DataObject) -> None:
    geometry = Geometry(512 * (sectors + 1), cluster)
    start = data.draw(st.integers(0, geometry.size - 1))
    stop = data.draw(st.integers(start + 1, geometry.size))
    first, last = geometry.touched(start, stop)
    assert first == geometry.cluster_of(start)
    assert last == geometry.cluster_of(stop - 1) + 1
    head, tail = geometry.span(first, last)
    assert head <= start < head + cluster
    assert tail - cluster < stop <= tail
    assert geometry.touched(head, tail) == (first, last)


@pytest.mark.parametrize(
    ("length", "size"), [(0, 0), (511, 0), (512, 512), (1023, 512), (2**63 - 1, 2**63 - 512)]
)
def test_raw_file_is_rounded_up_to_whole_sectors(length: int, size: int) -> None:
    assert virtual_size(length) == size
