"""Streaming a lent overlay while QEMU has it open, and what comes back after it.

QEMU's storage daemon has the monitor and the job of a virtual machine, and starts quickly.
"""

from __future__ import annotations

import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import addcow_mp
from addcow_mp.cli.main import run
from addcow_mp.jobs import qemu_monitor
from support import model
from support.command import ADDCOW, CLUSTER, PATIENCE, Result, pair, tool
from support.lending import features, random_layer, random_session, seen_by_qemu
from support.monitor import (
    Qemu,
    RefusalError,
    need,
    storage_daemon,
    virtual_machine,
    write_over_nbd,
)
from support.processes import running, until

KiB = 1024

#: Copies for longer than a test looks at it: the clusters of :func:`large` take half a minute.
SLOWLY = ("-r", "256k")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty directory; skip where QEMU or the package for its monitor is missing."""
    need("qemu-storage-daemon", "qemu-io", "qemu-img")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def addcow(*words: str) -> Result:
    """Run a command in this process, which is quicker than a new one."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        status = run(words)
    return Result(status, out.getvalue(), err.getvalue())


def succeed(*words: str) -> Result:
    """The same, insisting on success."""
    result = addcow(*words)
    assert result.status == 0, result
    return result


def refused(*words: str, status: int = 1) -> str:
    """The same, insisting on this exit status and one line, which is returned."""
    result = addcow(*words)
    assert result.status == status, result
    assert len(result.stderr.splitlines()) == 1, result
    return result.stderr


def stream(*options: str) -> Result:
    """Stream top.add-cow."""
    return succeed("qemu", "stream", *options, "--qmp", "q", "top.add-cow")


def view() -> bytes:
    """What a guest reads in top.add-cow when it is back."""
    succeed("convert", "-O", "raw", "--jobs", "0", "top.add-cow", "view")
    content = Path("view").read_bytes()
    Path("view").unlink()
    return content


def not_streamed(*options: str) -> str:
    """The one line with which streaming is refused or fails."""
    return refused("qemu", "stream", *options, "--qmp", "q", "top.add-cow")


def lend(*options: str) -> dict[str, Any]:
    """Lend top.add-cow; what QEMU takes for it."""
    succeed("qemu", "export", *options, "top.add-cow")
    found: dict[str, Any] = succeed("qemu", "args", "--output", "json", "top.add-cow").json
    return found


def chain(here: Path) -> bytes:
    """Make an overlay over an overlay over a raw base, with holes and garbage; its view."""
    base = model.raw("EE-EEE0EE", 64 * KiB, cut=700)
    middle = model.overlay("-CD-C0---", base, cluster_size=64 * KiB)
    top = model.overlay("A-b0-AB--xA-", middle, cluster_size=64 * KiB, cut=512)
    model.build(top, str(here))
    return bytes(model.view(top))


def large(here: Path) -> bytes:
    """Make an overlay of 8 MiB over a full base; its view."""
    pair(here, "B" * 128, "A" + "-" * 127)
    return b"A" * CLUSTER + b"B" * 127 * CLUSTER


@contextmanager
def lent(here: Path, export: str = "") -> Iterator[Qemu]:
    """Lend :func:`large` to a running QEMU."""
    large(here)
    with storage_daemon(here, lend(), export=export) as qemu:
        yield qemu


@contextmanager
def slow(here: Path, export: str = "") -> Iterator[tuple[Qemu, subprocess.Popen[str]]]:
    """The same with a stream that has begun and takes long."""
    with lent(here, export) as qemu:
        words = [*ADDCOW, "qemu", "stream", *SLOWLY, "--qmp", "q", "top.add-cow"]
        with subprocess.Popen(words, cwd=here, stderr=subprocess.PIPE, text=True) as process:
            try:
                qemu.until_copied()
                yield qemu, process
            finally:
                process.kill()


def last_line(process: subprocess.Popen[str], status: int) -> str:
    """The one line of a command that fails with this exit status."""
    told = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == status, told
    assert len(told.splitlines()) == 1, told
    return told


def comes_back_whole(here: Path, content: bytes) -> None:
    """Take the overlay back; the raw file is the disk."""
    succeed("qemu", "import", "--discard", "top.add-cow")
    assert not (here / "top.add-cow").exists()
    assert (here / "top.raw").read_bytes() == content
    assert not (here / "top.qcow2").exists()


# All of it


def test_stream_leaves_the_raw_file_as_the_disk_and_frees_the_layers(here: Path) -> None:
    content = chain(here)
    with storage_daemon(here, lend(), export="addcow0"):
        write_over_nbd(here, "write -P 7 70k 3k", "write -z 0 64k", "discard 320k 64k")
        told = stream().stdout
        assert "addcow qemu import --discard top.add-cow" in told
        assert "'top.raw' alone is the disk" in told
        write_over_nbd(here, "write -P 8 512k 512", "read -P 7 70k 3k", "read -P 0 0 64k")
        status = succeed("qemu", "status", "--output", "json", "top.add-cow").json
        assert (status["state"], status["streamed"]) == ("lent", True)
        assert "qemu-storage-da" in status["holder"]
        assert "streamed" in succeed("qemu", "status", "top.add-cow").stdout
        assert "lent to QEMU" in succeed("check", "top.add-cow").stdout
        assert "qemu-storage-da" in refused("qemu", "import", "top.add-cow")
    changed = bytearray(content)
    changed[70 * KiB : 73 * KiB] = b"\7" * 3 * KiB
    changed[: 64 * KiB] = bytes(64 * KiB)
    changed[320 * KiB : 384 * KiB] = bytes(64 * KiB)
    changed[512 * KiB : 512 * KiB + 512] = b"\10" * 512
    shutil.move(here / "top-base-base.raw", here / "kept")
    assert "top-base-base.raw" in refused("qemu", "import", "top.add-cow")
    shutil.move(here / "kept", here / "top-base-base.raw")
    comes_back_whole(here, bytes(changed))
    assert features(here / "top-base.add-cow") == 0
    succeed("check", "top-base.add-cow")


@pytest.mark.sample(2)
@pytest.mark.parametrize("number", range(30))
def test_random_overlays_are_streamed_under_a_writer(
    here: Path, rng: random.Random, number: int
) -> None:
    layer = random_layer(rng)
    while layer.backing is None:
        layer = random_layer(rng)
    model.build(layer, str(here))
    content = model.view(layer)
    sessions = [random_session(rng, content) for _ in range(3)]
    with storage_daemon(here, lend(), export="addcow0"):
        commands = [one for session in sessions for one in ("length", *session)]
        writer = Thread(target=write_over_nbd, args=(here, *commands))
        writer.start()
        stream()
        writer.join()
    comes_back_whole(here, bytes(content))


def test_busy_writer_loses_nothing_while_all_is_copied(here: Path, rng: random.Random) -> None:
    content = bytearray(large_view())
    with slow(here, export="addcow0") as (qemu, process):
        job = qemu.jobs()[0]["device"]
        for _ in range(3):
            write_session(here, rng, content)
        assert qemu.jobs()[0]["device"] == job, "it was not copied meanwhile"
        qemu.execute("block-job-set-speed", device=job, speed=0)
        while process.poll() is None:
            write_session(here, rng, content)
        assert process.returncode == 0
    comes_back_whole(here, bytes(content))


def write_session(here: Path, rng: random.Random, content: bytearray) -> None:
    """Write at random over NBD."""
    commands = [one for _ in range(8) for one in random_session(rng, content)]
    write_over_nbd(here, "length", *commands)


def test_progress_and_result_are_json(here: Path) -> None:
    with lent(here):
        result = stream("--progress-format", "json", "--output", "json")
        again = stream("--output", "json").json
    assert f'"bytes-done": {128 * CLUSTER}, "bytes": {128 * CLUSTER}' in result.stderr
    told = result.json
    assert (told["operation"], told["node"]) == ("qemu stream", "addcow0")
    assert (told["streamed-before"], again["streamed-before"]) == (False, True)
    assert told["left-to-do"] == ["addcow", "qemu", "import", "--discard", "top.add-cow"]


def test_python_function_streams_in_any_thread_and_continues_after_a_stop(here: Path) -> None:
    seen: list[tuple[int, int]] = []

    def has_begun() -> bool:
        return any(done for done, _ in seen)

    def watch(done: int, total: int) -> None:
        seen.append((done, total))

    content = large(here)
    with storage_daemon(here, lend(), export=""), ThreadPoolExecutor() as threads:
        slowly = partial(addcow_mp.qemu_stream, "top.add-cow", "q", rate=256 * KiB, progress=watch)
        with pytest.raises(addcow_mp.StoppedError):
            threads.submit(slowly, stopping=has_begun).result()
        with pytest.raises(addcow_mp.TimeLimitError, match="the time limit was reached"):
            slowly(time_limit=0)
        done = threads.submit(addcow_mp.qemu_stream, "top.add-cow", "q", progress=watch).result()
        assert (done.size, done.before) == (len(content), False)
        assert seen[-1] == (len(content), len(content))
        assert addcow_mp.qemu_stream("top.add-cow", "q").before
    assert addcow_mp.qemu_import("top.add-cow", discard=True).state_before == "lent"
    assert Path("top.raw").read_bytes() == content


def test_second_stream_says_that_all_is_allocated_already(here: Path) -> None:
    with lent(here):
        assert "100.00" in stream("-p").stderr
        assert "already" in stream().stdout
        assert stream("-q", "-p") == Result(0, "", "")


def test_paused_virtual_machine_is_streamed(here: Path) -> None:
    need("qemu-system-x86_64")
    content = chain(here)
    succeed("qemu", "export", "top.add-cow")
    words = shlex.split(succeed("qemu", "args", "top.add-cow").stdout)
    words[-1] += ",id=vda"
    with virtual_machine(here, *words, "-monitor", "unix:human,server=on,wait=off") as qemu:
        human = refused("qemu", "stream", "--qmp", "human", "top.add-cow")
        assert "no QMP monitor" in human
        qemu.execute("device_del", id="vda")  # a guest would let the disk go
        stream()
        assert "qemu-system" in refused("qemu", "import", "top.add-cow")
    comes_back_whole(here, content)


# Ends before the end


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_cancels_the_job_and_the_next_run_continues(here: Path, number: int) -> None:
    with slow(here) as (qemu, process):
        process.send_signal(number)
        told = last_line(process, 128 + number)
        assert "the same command continues" in told
        assert qemu.jobs() == []
    content = large_view()
    succeed("qemu", "import", "top.add-cow")
    assert view() == content
    succeed("check", "top.add-cow")
    with storage_daemon(here, lend()):
        stream()
    comes_back_whole(here, content)


def large_view() -> bytes:
    """What a guest reads in the overlay of :func:`large`."""
    return b"A" * CLUSTER + b"B" * 127 * CLUSTER


def test_killed_command_leaves_a_job_that_the_next_one_follows(here: Path) -> None:
    with slow(here) as (qemu, process):
        process.kill()
        process.wait()
        (job,) = qemu.jobs()
        with running(
            "qemu", "stream", "-r", "512k", "--qmp", "q", "top.add-cow", cwd=here
        ) as second:
            until(lambda: qemu.jobs()[0]["speed"] == 512 * KiB, "the new rate")
            assert qemu.jobs()[0]["device"] == job["device"]
            second.signal(signal.SIGTERM)
            assert second.end().status == 128 + signal.SIGTERM
        assert qemu.jobs() == []
        stream()
    comes_back_whole(here, large_view())


def test_job_of_another_program_is_left_alone(here: Path) -> None:
    with lent(here) as qemu:
        qemu.execute("block-stream", job_id="theirs", device="addcow0", speed=256 * KiB)
        assert "in use by block job: stream" in not_streamed()
        assert [one["device"] for one in qemu.jobs()] == ["theirs"]


@pytest.mark.long
def test_job_that_another_program_cancels_is_named(here: Path) -> None:
    with slow(here) as (qemu, process):
        qemu.execute("job-cancel", id=qemu.jobs()[0]["device"])
        assert "another program has cancelled" in last_line(process, 1)
        stream()


@pytest.mark.long
def test_job_that_is_paused_in_qemu_is_told_and_waited_for(here: Path) -> None:
    with slow(here) as (qemu, process):
        job = qemu.jobs()[0]["device"]
        qemu.execute("job-pause", id=job)
        assert process.stderr is not None
        assert "paused in QEMU" in process.stderr.readline()
        qemu.execute("job-resume", id=job)
        qemu.execute("block-job-set-speed", device=job, speed=0)
        assert process.wait(PATIENCE) == 0


def test_qemu_that_ends_meanwhile_costs_one_line(here: Path) -> None:
    with slow(here) as (qemu, process):
        qemu.quit()
        assert "QEMU has ended" in last_line(process, 1)
    succeed("qemu", "import", "top.add-cow")
    assert view() == large_view()


@pytest.mark.long
def test_killed_qemu_loses_nothing(here: Path) -> None:
    with slow(here) as (qemu, process):
        qemu.process.kill()
        assert "QEMU has ended" in last_line(process, 1)
    assert seen_by_qemu("top.add-cow", cwd=here) == large_view()
    succeed("qemu", "import", "top.add-cow")
    assert view() == large_view()


@pytest.mark.long
def test_disk_that_the_guest_lets_go_is_streamed_to_the_end(here: Path) -> None:
    with slow(here, export="addcow0") as (qemu, process):
        qemu.execute("block-export-del", id="disk", mode="hard")
        with pytest.raises(RefusalError, match="in use"):
            qemu.execute("blockdev-del", node_name="addcow0")
        qemu.execute("block-job-set-speed", device=qemu.jobs()[0]["device"], speed=0)
        assert process.wait(PATIENCE) == 0
    comes_back_whole(here, large_view())


def test_failed_copy_is_told_in_qemus_words_and_continues(here: Path) -> None:
    with lent(here) as qemu:
        qemu.limit_files(64 * CLUSTER)
        told = not_streamed()
        assert "File too large" in told
        assert "the same command continues" in told
        qemu.limit_files(-1)
        stream()
    comes_back_whole(here, large_view())


# Which node it is


def test_twin_is_found_by_its_files_and_not_by_its_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(here)
    lend()
    tool("qemu-img", "create", "-q", "-f", "qcow2", "other.qcow2", "1M", cwd=here)
    limited = {"driver": "throttle", "throttle-group": "limits", "node-name": "data"}
    nodes = [
        {"driver": "qcow2", "node-name": "addcow0", "file": _file("other.qcow2")},
        {**limited, "file": _file("top.raw")},
        {"node-name": "vda", "driver": "qcow2", "file": _file("top.qcow2"), "data-file": "data"},
    ]
    (here / "elsewhere").mkdir()
    with storage_daemon(here, *nodes, objects=("throttle-group,id=limits",)):
        monkeypatch.chdir(here / "elsewhere")  # names in QEMU are relative to its directory
        words = ("qemu", "stream", "--output", "json", "--qmp", "../q", "../top.add-cow")
        assert succeed(*words).json["node"] == "vda"
    monkeypatch.chdir(here)
    comes_back_whole(here, large_view())


def test_disk_that_qemu_got_by_its_file_name_is_streamed(here: Path) -> None:
    need("qemu-system-x86_64")
    content = large(here)
    lend("--absolute-data-file")
    with virtual_machine(here, "-drive", "file=top.qcow2,if=virtio"):
        stream()
    comes_back_whole(here, content)


def _file(name: str) -> dict[str, str]:
    return {"driver": "file", "filename": name}


def test_qemu_without_the_twin_is_told_with_what_it_has(here: Path) -> None:
    large(here)
    lend()
    with storage_daemon(here) as qemu:
        assert "it has no qcow2" in not_streamed()
        for number in range(5):
            name = f"other{number}.qcow2"
            tool("qemu-img", "create", "-q", "-f", "qcow2", name, "1M", cwd=here)
            qemu.execute("blockdev-add", driver="qcow2", node_name=f"n{number}", file=_file(name))
        told = not_streamed()
        assert "other" in told
        assert "(node 'n" in told
        assert "and 2 more" in told


def test_twin_over_another_image_file_is_refused(here: Path) -> None:
    large(here)
    node = lend()
    shutil.copy(here / "top.raw", here / "copy.raw")
    node["data-file"]["filename"] = str(here / "copy.raw")
    with storage_daemon(here, node) as qemu:
        told = not_streamed()
        assert "copy.raw" in told
        assert "top.raw" in told
        assert qemu.jobs() == []


def test_sector_twin_is_streamed_only_by_a_qemu_that_survives_it(here: Path) -> None:
    content = large(here)
    with storage_daemon(here, lend("--crash", "relaxed")) as qemu:
        if qemu.version() < (10, 0):
            told = not_streamed()
            assert "would abort" in told
            assert "--crash strict" in told
            return
        stream()
    comes_back_whole(here, content)


# What cannot be streamed, and where there is no QEMU


def test_overlay_that_is_not_lent_cannot_be_streamed(here: Path) -> None:
    chain(here)
    assert "'addcow qemu export' lends it" in not_streamed()
    lend()
    layer = refused("qemu", "stream", "--qmp", "q", "top-base.add-cow")
    assert "the overlay above it" in layer
    (here / "elsewhere").mkdir()
    shutil.move(here / "top.qcow2", here / "elsewhere")
    assert "move its qcow2 file back" in not_streamed()
    model.build(model.overlay("A-", None, cluster_size=64 * KiB), str(here), "alone")
    succeed("qemu", "export", "alone.add-cow")
    told = refused("qemu", "stream", "--qmp", "q", "alone.add-cow")
    assert "no backing file" in told


def test_socket_without_a_monitor_costs_one_line(here: Path) -> None:
    large(here)
    lend()
    assert "cannot connect to QEMU" in not_streamed()
    (here / "q").write_text("")
    assert "cannot connect to QEMU" in not_streamed()
    (here / "q").unlink()
    long = refused("qemu", "stream", "--qmp", "x" * 200, "top.add-cow")
    assert "too long" in long
    assert "'-' is not a file name" in refused(
        "qemu", "stream", "--qmp", "-", "top.add-cow", status=64
    )
    refused("qemu", "stream", "top.add-cow", status=64)


#: Seconds that a test waits for a server that stays silent.
IMPATIENT = 1.0


_GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\n'

GREETINGS = {
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n",
    "the end": b"",
    "half a line": b'{"QMP"',
    "other JSON": b'{"hello": 1}\n',
    "no answers": _GREETING,
}


@pytest.mark.parametrize("kind", GREETINGS)
def test_server_that_is_no_monitor_costs_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    large(here)
    lend()
    if kind in ("half a line", "no answers"):
        monkeypatch.setattr(qemu_monitor, "GREETING", IMPATIENT)
    with answering(here, GREETINGS[kind]):
        assert "no QMP monitor" in not_streamed()


_WELCOME = b'{"return": {}}\n'
_REFUSAL = b'{"error": {"class": "GenericError", "desc": "not now"}, "id": "__qmp#00000"}\n'

FAILURES = {
    "has not answered 'query-version'": (_WELCOME,),
    "no QMP monitor": (_WELCOME + b"nonsense\n",),
    "QEMU has ended": (_WELCOME, b"nonsense\n"),
    "QEMU refuses: not now": (_WELCOME, _REFUSAL),
}


@pytest.mark.parametrize("words", FAILURES)
def test_monitor_that_fails_later_costs_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    large(here)
    lend()
    if "not answered" in words:
        monkeypatch.setattr(qemu_monitor, "ANSWER", IMPATIENT)
    with answering(here, _GREETING, *FAILURES[words]):
        assert words in not_streamed()


def test_stop_while_qemu_is_silent_ends_the_command(here: Path) -> None:
    large(here)
    lend()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("q")
        server.listen()
        with running("qemu", "stream", "--qmp", "q", "top.add-cow", cwd=here) as job:
            client, _ = server.accept()
            with client:
                job.signal(signal.SIGINT)
                ended = job.end()
    assert (ended.status, ended.stderr) == (130, "addcow: interrupted\n")


def test_monitor_with_another_client_costs_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qemu_monitor, "GREETING", IMPATIENT)
    large(here)
    lend()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("q")
        server.listen(0)
        assert "another program uses this monitor" in not_streamed()
        # The connection of that client still waits in the queue, which is full.
        assert "another program uses this monitor" in not_streamed()


@contextmanager
def answering(here: Path, greeting: bytes, *answers: bytes) -> Iterator[None]:
    """Send one client some bytes, and some more for each of its requests; after none, hang up."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(here / "q"))
        server.listen()

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(greeting)
                for answer in answers:
                    client.recv(4096)
                    client.sendall(answer)
                while greeting and client.recv(4096):
                    pass

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(PATIENCE)


def test_missing_package_is_named(here: Path) -> None:
    code = "import sys; sys.modules['qemu'] = None; from addcow_mp.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "qemu", "stream", "--qmp", "q", "top.add-cow"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "addcow: qemu.qmp: it is not installed; pip install 'addcow-mp[qemu]'"
    ]
