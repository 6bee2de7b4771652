"""Tests of manifests with the oracle, which follows docs/manifest.md alone.

The oracle agrees with the command on many chains. It detects any changed byte of a manifest or a
layer, also where the manifest's own digest is made right again.
"""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

import oracle
from support.command import (
    ALL_ALLOCATED,
    CLUSTER,
    GiB,
    KiB,
    MiB,
    bitmap_length,
    draw,
    draw_raw,
    guest,
    local_clusters,
    overlay_bytes,
    pair,
    patch,
    put,
    succeed,
    virtual_size,
)
from support.seed import SEED

pytestmark = pytest.mark.sample(2)

CHAINS = 24

LEAF = 64 * KiB
GROUP = 256 * LEAF
RECORDS = 4096
DIGEST = 32
COVERED, MIXED, HELD, SEEN = (8 + 32 * place for place in range(4))
DIGESTS = 8 + 4 * 32
"""Where a record has its bitmaps, and where its digests begin."""

Shared = tuple[Path, dict[Path, bytes]]

Z0 = blake3(bytes(LEAF)).digest()


def kind(layer: Path) -> str:
    return "add-cow" if layer.suffix == ".add-cow" else "raw"


def faults(layer: Path) -> list[str]:
    return oracle.manifest_faults(str(layer), kind(layer))


def manifest(layer: Path) -> Path:
    return layer.with_name(f"{layer.name}.manifest")


def make_manifests(top: Path, *options: str) -> dict[Path, str]:
    """Have manifests written from TOP down; return each layer's guest digest, as told."""
    words = ("--output", "json", "--format", kind(top), *options)
    told = succeed("manifest", "create", *words, top.name, cwd=top.parent).json
    names = {each["filename"]: each["guest-digest"] for each in told["manifests"]}
    assert told["guest-digest"] == names[f"{top.name}.manifest"]
    return {top.parent / name.removesuffix(".manifest"): names[name] for name in names}


def assert_agreed(top: Path, layers: set[Path], *options: str) -> None:
    """Have manifests written of LAYERS and no others, and the oracle agree to all of them."""
    told = make_manifests(top, *options)
    assert set(told) == layers
    for layer, digest in told.items():
        assert faults(layer) == []
        assert oracle.guest_digest(str(layer), kind(layer)) == digest


# ---- what is true ----


@pytest.mark.parametrize("number", range(CHAINS))
def test_oracle_accepts_manifests_of_random_chains(number: int, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED}/{number}")
    layers = random_chain(rng, tmp_path)
    assert_agreed(layers[0], set(layers), "--jobs", str(rng.choice([0, 2])))


@pytest.mark.parametrize(
    ("bits", "below"),
    [(bits, "shorter") for bits in range(12, 22)] + [(bits, "longer") for bits in (12, 16, 17, 21)],
)
def test_oracle_accepts_every_cluster_size_over_several_groups(
    bits: int, below: str, tmp_path: Path
) -> None:
    cluster, size = 1 << bits, 2 * GROUP + 3 * LEAF + 5 * 512
    base = tmp_path / "base.img"
    spread(base, size + (7 * LEAF if below == "longer" else -GROUP), step=GROUP // 3)
    top = overlay(tmp_path, "top", size, base, cluster=cluster, local=[0, GROUP // cluster + 1])
    assert_agreed(top, {top, base})


@pytest.mark.parametrize("rest", [512, LEAF - 512, LEAF])
def test_oracle_accepts_an_overlay_that_ends_within_a_leaf_of_its_backing(
    rest: int, tmp_path: Path
) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    top = overlay(tmp_path, "top", LEAF + rest, tmp_path / "base.img")
    assert_agreed(top, {top, tmp_path / "base.img"})


def test_oracle_accepts_a_backing_longer_by_less_than_a_sector(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"b" * (LEAF + 1024 + 511))
    top = overlay(tmp_path, "top", LEAF + 1024, base)
    assert_agreed(top, {top, base})


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, LEAF - 1, LEAF, LEAF + 100, GROUP + 700])
def test_oracle_accepts_a_raw_file_of_any_length(size: int, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    spread(base, size, step=LEAF // 2)
    assert_agreed(base, {base})


def test_oracle_accepts_an_empty_overlay(tmp_path: Path) -> None:
    top = pair(tmp_path, "AB", "")
    assert_agreed(top, {top, tmp_path / "base.img"})


def test_oracle_accepts_an_overlay_without_a_backing(tmp_path: Path) -> None:
    draw(tmp_path / "top.add-cow", "A-0bB", "", cluster=4 * KiB)
    assert_agreed(tmp_path / "top.add-cow", {tmp_path / "top.add-cow"})


@pytest.mark.parametrize("length", [0, 1, 2, CLUSTER, CLUSTER + 1])
def test_oracle_accepts_a_short_or_long_bitmap(length: int, tmp_path: Path) -> None:
    top = pair(tmp_path, "ABCDEFGHIJK", "-BC--F---JK")
    content = top.read_bytes() + b"more"
    top.write_bytes(content[: CLUSTER + length])
    assert_agreed(top, {top, tmp_path / "base.img"})


def test_oracle_ends_the_chain_at_all_allocated(tmp_path: Path) -> None:
    pair(tmp_path, "AB-D", "-B-")
    draw(tmp_path / "whole.add-cow", "a-0B", "top.add-cow", compatible=ALL_ALLOCATED)
    draw(tmp_path / "upper.add-cow", "-U--x", "whole.add-cow", backing_format="add-cow")
    upper, whole = tmp_path / "upper.add-cow", tmp_path / "whole.add-cow"
    assert_agreed(upper, {upper, whole})


@pytest.mark.long
def test_oracle_accepts_a_digest_tree_of_three_levels(tmp_path: Path) -> None:
    size = 4 * GiB + GROUP + 3 * 512
    draw_raw(tmp_path / "base.img", "ABC")
    top = overlay(tmp_path, "top", size, tmp_path / "base.img", cluster=2 * MiB, local=[5, 2049])
    put(tmp_path / "top.raw", size - LEAF - 100, b"near the end")
    put(tmp_path / "top.raw", 5 * 2 * MiB, b"near the start")
    assert_agreed(top, {top, tmp_path / "base.img"})


@pytest.mark.parametrize("size", [0, 512, 3 * LEAF + 512, GROUP, GROUP + 512, 3 * GROUP])
def test_guest_digest_equals_a_plain_computation(size: int, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    spread(base, size, step=5 * LEAF + 512)
    content = base.read_bytes()
    level = [
        blake3(content[at : at + LEAF].ljust(LEAF, b"\0")).digest()
        for at in range(0, max(1, size), LEAF)
    ]
    zero = Z0
    while len(level) > 1 or zero == Z0:
        level += [zero] * (-len(level) % 256)
        level = [
            blake3(b"".join(level[at : at + 256])).digest() for at in range(0, len(level), 256)
        ]
        zero = blake3(zero * 256).digest()
    expected = blake3(b"add-cow guest 1\0" + struct.pack("<Q", size) + level[0]).hexdigest()
    assert oracle.guest_digest(str(base), "raw") == expected


def test_guest_digest_is_equal_in_any_chain(tmp_path: Path) -> None:
    pair(tmp_path, "AB-DEF", "-B0dD-x")
    draw(tmp_path / "upper.add-cow", "--u-U", "top.add-cow", backing_format="add-cow")
    upper = tmp_path / "upper.add-cow"
    (tmp_path / "flat.img").write_bytes(guest(upper, 0, virtual_size(upper)))
    (told,) = make_manifests(tmp_path / "flat.img").values()
    assert oracle.guest_digest(str(upper)) == told


# ---- what is not ----


def various(folder: Path) -> Path:
    """Make an overlay with leaves of every sort over a longer base, manifests beside both.

    Its clusters are of 32 KiB, two a leaf. Leaves 0 and 5 are allocated, 1, 3 and 4 mixed, 2 is the
    base's; 6 is cut by the end, not allocated, and mixed for that.
    """
    draw_raw(folder / "base.img", "ABCDEFGH")
    draw(folder / "top.add-cow", "UUV---W--0X0-", cluster=LEAF // 2)
    make_manifests(folder / "top.add-cow")
    assert faults(folder / "top.add-cow") == faults(folder / "base.img") == []
    return folder / "top.add-cow"


@pytest.fixture
def own_top(tmp_path: Path) -> Path:
    """Give such an overlay to a test that changes its layers."""
    return various(tmp_path)


def with_manifests(top: Path) -> Shared:
    """Return TOP and all the manifests in its directory, as they are."""
    return top, {file: file.read_bytes() for file in top.parent.glob("*.manifest")}


def put_back(shared: Shared) -> Path:
    """Make the manifests again what they were; return the overlay."""
    top, manifests = shared
    for file, content in manifests.items():
        file.write_bytes(content)
    return top


@pytest.fixture(scope="module")
def shared_top(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return with_manifests(various(tmp_path_factory.mktemp("top")))


@pytest.fixture
def top(shared_top: Shared) -> Path:
    """Give such an overlay to a test that changes nothing but its manifests."""
    return put_back(shared_top)


def flip(path: Path, at: int, mask: int = 0xFF) -> None:
    with path.open("rb") as file:
        file.seek(at)
        (byte,) = file.read(1)
    patch(path, at, bytes([byte ^ mask]))


def seal(path: Path) -> None:
    """Make the manifest's own digest right again."""
    content = path.read_bytes()[:-DIGEST]
    path.write_bytes(content + blake3(content).digest())


def beyond_identities(found: list[str]) -> list[str]:
    """Leave out the identities of files, which every write to a file changes."""
    return [fault for fault in found if not fault.startswith("head.files.")]


def test_oracle_finds_any_changed_byte_of_a_manifest(top: Path) -> None:
    rng = random.Random(SEED)
    for layer in (top, top.with_name("base.img")):
        right = manifest(layer).read_bytes()
        for at in some_of(rng, len(right)):
            patch(manifest(layer), at, bytes([right[at] ^ 1 << rng.randrange(8)]))
            assert "own digest: the last 32 bytes" in faults(layer), at
            patch(manifest(layer), at, right[at : at + 1])


def test_oracle_finds_any_changed_byte_of_a_resealed_manifest(top: Path) -> None:
    rng = random.Random(SEED)
    for layer in (top, top.with_name("base.img")):
        right = manifest(layer).read_bytes()
        for at in some_of(rng, len(right) - DIGEST):
            flip(manifest(layer), at)
            seal(manifest(layer))
            found = faults(layer)
            assert found != [], at
            assert "own digest: the last 32 bytes" not in found, at
            manifest(layer).write_bytes(right)


def test_oracle_rejects_a_truncated_or_extended_manifest(top: Path) -> None:
    right = manifest(top).read_bytes()
    for length in (0, 8, 100, RECORDS, RECORDS + 31, len(right) - 32, len(right) - 1):
        manifest(top).write_bytes(right[:length])
        assert faults(top) != [], length
    manifest(top).write_bytes(right + b"\0")
    assert faults(top) != []


@pytest.mark.parametrize(
    ("file", "at", "expected"),
    [
        ("top.raw", 10, {"held digest: leaf 0", "head.guest-digest"}),
        (
            "top.raw",
            LEAF + 10,
            {"held digest: leaf 1", "seen digest: leaf 1", "head.guest-digest"},
        ),
        # garbage under a clear bit: no guest sees it
        ("top.raw", 2 * LEAF, set()),
        ("base.img", LEAF - 1, {"head.backing.guest-digest"}),
        ("base.img", 2 * LEAF, {"head.backing.guest-digest", "head.guest-digest"}),
        (
            "base.img",
            2 * LEAF - 1,
            {"seen digest: leaf 1", "head.backing.guest-digest", "head.guest-digest"},
        ),
        # the leaf that the overlay's end cuts: the guest sees the first half of it
        (
            "base.img",
            6 * LEAF + 9,
            {"seen digest: leaf 6", "head.backing.guest-digest", "head.guest-digest"},
        ),
        ("base.img", 7 * LEAF - 9, {"head.backing.guest-digest"}),
    ],
)
def test_oracle_finds_a_changed_byte_of_data(
    own_top: Path, file: str, at: int, expected: set[str]
) -> None:
    flip(own_top.with_name(file), at)
    assert what(beyond_identities(faults(own_top))) == expected


@pytest.mark.long
def test_oracle_finds_any_changed_byte_but_those_under_a_clear_bit(own_top: Path) -> None:
    rng = random.Random(SEED)
    local = local_clusters(own_top)
    for name in ("top.raw", "base.img"):
        file = own_top.with_name(name)
        for at in rng.sample(range(file.stat().st_size), 60):
            mask = 1 << rng.randrange(8)
            flip(file, at, mask)
            counts = name == "base.img" or at // (LEAF // 2) in local
            assert (beyond_identities(faults(own_top)) != []) == counts, (name, at)
            flip(file, at, mask)


def test_oracle_finds_any_changed_byte_of_a_raw_file(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"A" * (LEAF + 512 + 9))
    make_manifests(base)
    for at in (0, LEAF, LEAF + 511, LEAF + 512):
        flip(base, at)
        assert beyond_identities(faults(base)) != [], at
        flip(base, at)


def test_oracle_finds_any_changed_byte_of_the_header(own_top: Path) -> None:
    rng = random.Random(SEED)
    right = own_top.read_bytes()
    for at in [*range(100), *rng.sample(range(100, LEAF // 2), 40)]:
        flip(own_top, at)
        assert refuses_or_finds(own_top, "head.header-digest"), at
        patch(own_top, at, right[at : at + 1])


def test_oracle_finds_any_changed_bit_of_the_bitmap(own_top: Path) -> None:
    for bit in range(13):
        flip(own_top, LEAF // 2 + bit // 8, 1 << bit % 8)
        found = what(faults(own_top))
        assert "head.bitmap-digest" in found, bit
        assert f"mixed: leaf {bit // 2}" in found or f"covered: leaf {bit // 2}" in found, bit
        flip(own_top, LEAF // 2 + bit // 8, 1 << bit % 8)


# ---- manifests that lie and are sealed again ----


def rewrite_head(layer: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the head of a manifest and nothing else, and seal it."""
    content = manifest(layer).read_bytes()
    length = int.from_bytes(content[12:16], "little")
    head = json.loads(content[16 : 16 + length])
    change(head)
    text = json.dumps(head).encode()
    start = content[:12] + len(text).to_bytes(4, "little") + text
    manifest(layer).write_bytes(start.ljust(RECORDS, b"\0") + content[RECORDS:])
    seal(manifest(layer))


def lie(value: object) -> object:
    """Return something of the same sort that is not true."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, str)
    return value[:-1] + ("1" if value.endswith("0") else "0")


OVERLAY_KEYS = [
    *("kind", "virtual-size", "all-local", "guest-digest", "groups"),
    *(f"files.{file}.{key}" for file in ("image", "cow") for key in oracle.identity("/")),
    *("header-size", "header-digest", "bitmap-digest"),
    *("backing.guest-digest", "backing.virtual-size"),
]
RAW_KEYS = [
    key for key in OVERLAY_KEYS if not key.startswith(("files.cow", "header", "bitmap", "backing"))
]


def test_head_keys_of_these_tests_are_complete(top: Path) -> None:
    for layer, keys in ((top, OVERLAY_KEYS), (top.with_name("base.img"), RAW_KEYS)):
        seen: dict[str, Any] = {}
        rewrite_head(layer, seen.update)
        assert sorted(dotted(seen)) == sorted(keys)


@pytest.mark.parametrize(
    ("name", "key"),
    [("top.add-cow", key) for key in OVERLAY_KEYS] + [("base.img", key) for key in RAW_KEYS],
)
def test_oracle_rejects_a_false_value_in_the_head(top: Path, name: str, key: str) -> None:
    def change(head: dict[str, Any]) -> None:
        *way, last = key.split(".")
        for step in way:
            head = head[step]
        head[last] = lie(head[last])

    rewrite_head(top.with_name(name), change)
    (fault,) = faults(top.with_name(name))
    assert fault.startswith(f"head.{key}: ")


@pytest.mark.parametrize(
    ("bitmap", "word"),
    [(COVERED, "covered"), (MIXED, "mixed")],
)
@pytest.mark.parametrize("leaf", [0, 1, 2, 5, 6, 7, 255])
def test_oracle_rejects_a_false_leaf(top: Path, bitmap: int, word: str, leaf: int) -> None:
    flip(manifest(top), RECORDS + bitmap + leaf // 8, 1 << leaf % 8)
    seal(manifest(top))
    assert faults(top) == [f"{word}: leaf {leaf}"]


def test_oracle_rejects_a_false_digest(top: Path) -> None:
    # The held ones of leaves 0, 1, 3 and 5; the seen ones of leaves 1, 3, 4 and 6.
    names = [f"held digest: leaf {leaf}" for leaf in (0, 1, 3, 5)]
    names += [f"seen digest: leaf {leaf}" for leaf in (1, 3, 4, 6)]
    assert manifest(top).stat().st_size == RECORDS + DIGESTS + DIGEST * (len(names) + 1)
    for number, name in enumerate(names):
        at = RECORDS + DIGESTS + DIGEST * number + 7 * number % DIGEST
        flip(manifest(top), at)
        seal(manifest(top))
        assert faults(top) == [name]
        flip(manifest(top), at)


# ---- whole records ----


@pytest.fixture(scope="module")
def shared_groups(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("groups")
    leaves = [0, 256, 768 + 9]
    top = overlay(folder, "top", 4 * GROUP, None, local=leaves)
    for leaf in leaves:
        put(folder / "top.raw", leaf * LEAF, b"here")
    make_manifests(top)
    assert faults(top) == []
    return with_manifests(top)


@pytest.fixture
def groups(shared_groups: Shared) -> Path:
    """Give an overlay of four groups without a backing; 0, 1 and 3 have one local leaf each."""
    return put_back(shared_groups)


def rewrite_records(layer: Path, *order: int | bytes) -> None:
    """Put these records in their place: those of a number stand there now."""
    content = manifest(layer).read_bytes()
    size = DIGESTS + DIGEST
    old = [content[at : at + size] for at in range(RECORDS, len(content) - DIGEST, size)]
    new = b"".join(each if isinstance(each, bytes) else old[each] for each in order)
    manifest(layer).write_bytes(content[:RECORDS] + new + bytes(DIGEST))
    rewrite_head(layer, lambda head: head.update(groups=len(order)))


def test_oracle_rejects_a_missing_record(groups: Path) -> None:
    rewrite_records(groups, 0, 2)
    assert faults(groups) == ["record missing: group 1"]


# ---- chains ----


def overlay(folder: Path, name: str, size: int, backing: Path | None, **fields: Any) -> Path:
    """Lay down NAME.add-cow and, unless it is there, an image file of zeros."""
    image, path = folder / f"{name}.raw", folder / f"{name}.add-cow"
    with image.open("ab") as file:
        file.truncate(size)
    if backing is not None:
        fields |= {"backing": backing.name, "backing_format": kind(backing)}
    path.write_bytes(overlay_bytes(image=image.name, size=size // 512 * 512, **fields))
    return path


def spread(path: Path, size: int, *, step: int) -> None:
    """Make a sparse raw file with a few bytes at every STEP, each time others."""
    with path.open("wb") as file:
        for at in range(0, size, step):
            file.seek(at)
            file.write(f"{at:24}".encode()[: size - at])
        file.truncate(size)


def random_chain(rng: random.Random, folder: Path) -> list[Path]:
    """Lay down a chain; return those of its layers that a reader consults, topmost first."""
    size = random_size(rng)
    layers = [folder / "base.img"]
    scatter(rng, layers[0], size)
    if rng.random() < 0.15:
        layers = []
    for number in range(rng.randint(0 if layers else 1, 3)):
        size = size if rng.random() < 0.3 else random_size(rng)
        scatter(rng, folder / f"layer{number}.raw", size)
        all_local = rng.random() < 0.1
        backing = layers[0] if layers else None
        fields = random_bits(rng, size // 512 * 512) | {"compatible": int(all_local)}
        path = overlay(folder, f"layer{number}", size, backing, **fields)
        layers = [path] if all_local else [path, *layers]
    return layers


def random_size(rng: random.Random) -> int:
    """Return an empty, small or large size, often just beside the end of a leaf or a group."""
    near = rng.choice([0, 0, rng.randrange(50) * LEAF, rng.randrange(20) * 2 * MiB, 2 * GROUP])
    size = near + 512 * rng.choice([-1, 0, 1, rng.randrange(2000)])
    return max(0, size) + rng.choice([0, 0, 0, rng.randrange(512)])


def random_bits(rng: random.Random, size: int) -> dict[str, Any]:
    """Return a size of clusters and those that are allocated; some bits may be behind the end."""
    cluster = 1 << rng.randint(12, 21)
    room = 8 * bitmap_length(size, cluster)
    count = min(room, -(-size // cluster) + rng.choice([0, 0, 3]))
    dense = rng.choice([0, 0.02, 0.5, 0.98, 1])
    run = rng.choice([1, 1, 16, 100])
    starts = [at for at in range(0, count, run) if rng.random() < dense]
    return {
        "cluster": cluster,
        "local": [at for start in starts for at in range(start, min(start + run, count))],
    }


def scatter(rng: random.Random, path: Path, size: int) -> None:
    """Make a raw file with pieces of noise, of one byte and of zeros here and there."""
    with path.open("wb") as file:
        for _ in range(rng.randrange(12)):
            at, length = rng.randrange(size + 1), rng.choice([1, 512, 5 * KiB, LEAF, 300 * KiB])
            piece = rng.choice([rng.randbytes(length), bytes(length), b"x" * length])
            step = rng.choice([1, 512, LEAF])
            file.seek(at // step * step)
            file.write(piece[: size - file.tell()])
        file.truncate(size)


# ---- words about faults ----


def what(found: list[str]) -> set[str]:
    """Return the faults without the values in them: "head.guest-digest", "mixed: leaf 3"."""
    return {fault.split(":")[0] if fault.startswith("head") else fault for fault in found}


def refuses_or_finds(layer: Path, fault: str) -> bool:
    """Say whether the oracle refuses to read LAYER at all, or else finds FAULT."""
    try:
        return fault in what(faults(layer))
    except (oracle.OracleError, OSError):
        return True


def some_of(rng: random.Random, length: int) -> list[int]:
    """Return some offsets of a manifest, some of each part."""
    parts = [range(16), range(16, 700), range(700, RECORDS), range(RECORDS, length)]
    return [at for part in parts for at in rng.sample(part, min(len(part), 40))]


def dotted(value: dict[str, Any]) -> list[str]:
    """Return the keys of an object and of the objects in it."""
    return [
        f"{key}.{inner}" if inner else key
        for key, each in value.items()
        for inner in (dotted(each) if isinstance(each, dict) else [""])
    ]
