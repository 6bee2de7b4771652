"""Tests of errors of the system: each message names the file.

A seccomp filter refuses one system call once the command is loaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from support.command import draw, draw_raw, succeed
from support.seccomp import refusing

pytestmark = pytest.mark.sample(1)

NAMED = re.compile(r"\.(add-cow|raw|img|db|manifest)\b|get memory to share with other processes: ")

#: fstat, as the C library asks for it: with AT_EMPTY_PATH.
FSTAT = "newfstatat/3=4096"

CASES = [
    ("info --backing-chain vm.add-cow", FSTAT),
    ("map vm.add-cow", "lseek/2=3"),
    ("check vm.add-cow", "pread64"),
    ("create -o image_file=disk.raw new.add-cow 1M", "ftruncate"),
    ("convert --jobs 0 -O raw vm.add-cow new.raw", "preadv2"),
    ("convert --jobs 0 -O raw vm.add-cow new.raw", "memfd_create"),
    ("compare --jobs 0 vm.add-cow other.add-cow", "preadv2"),
    ("commit --jobs 0 vm.add-cow", "mmap/3=1"),
    ("commit --jobs 0 vm.add-cow", "fstatfs"),
    ("commit --jobs 0 vm.add-cow", "pwrite64"),
    ("commit --jobs 0 --verify vm.add-cow", "fadvise64"),
    ("commit --jobs 0 --verify vm.add-cow", "mincore"),
    ("flatten --jobs 0 vm.add-cow", "memfd_create"),
    ("flatten --jobs 0 vm.add-cow", "fdatasync"),
    ("flatten --jobs 0 --discard vm.add-cow", "unlink"),
    ("manifest create --jobs 0 vm.add-cow", "rename"),
    ("farm commit --jobs 0 .", "memfd_create"),
    ("farm verify --jobs 0 .", "preadv2"),
    ("farm scrub run --jobs 0 --state scrub.db .", "preadv2"),
]


@pytest.mark.long
@pytest.mark.parametrize(("words", "call"), CASES)
def test_system_error_names_the_file(tmp_path: Path, words: str, call: str) -> None:
    draw_raw(tmp_path / "base.img", "ABCD")
    draw(tmp_path / "vm.add-cow", "-X--", "base.img")
    draw_raw(tmp_path / "other.img", "EFGH")
    draw(tmp_path / "other.add-cow", "Y---", "other.img")
    (tmp_path / "disk.raw").write_bytes(b"x" * 1000)
    if "verify" in words or "scrub" in words:
        for name in ("vm.add-cow", "other.add-cow"):
            succeed("manifest", "create", name, cwd=tmp_path)
    result = refusing([f"{call}:EIO"], *words.split(), cwd=tmp_path, loaded=True)
    assert result.status in (1, 2), result
    told = [line for line in result.said.splitlines() if os.strerror(5) in line]
    assert told, result
    for line in told:
        assert NAMED.search(line), line
