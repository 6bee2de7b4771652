"""The sockets on which ``addcow serve`` listens.

They are made here and handed to nbdkit: what stops them is said in one line, and no other program
can take an address between a look at it and its use.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Sequence

from addcow_mp.errors import ImageError, UsageError

#: An address of a Unix socket has 108 bytes, and the path in it ends with a zero.
LONGEST_PATH = 107

#: The descriptors that a program takes over begin here (sd_listen_fds(3)).
_FIRST_PASSED = 3

#: An address of a name may be one that this machine does not have: ``localhost`` without IPv6.
_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def check_path(path: str) -> None:
    """Raise :class:`UsageError` for a path that no socket can have."""
    if not path:
        raise UsageError(message="--socket '': it is empty; give the path of a Unix socket")
    size = len(os.fsencode(path))
    if size > LONGEST_PATH:
        problem = f"it has {size} bytes, and a socket's path at most {LONGEST_PATH}"
        raise UsageError(message=f"--socket {path}: {problem}; give a shorter or a relative path")


def listen_on_path(path: str) -> socket.socket:
    """Listen on a Unix socket; one that a server left behind is replaced.

    Raises :class:`ImageError` where a file or another server stands.
    """
    _remove_stale(path)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        server.bind(path)
        server.listen(socket.SOMAXCONN)
    except OSError as error:
        server.close()
        raise ImageError(path=path, problem=_problem_of_path(error)) from error
    return server


def _problem_of_path(error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return "its directory does not exist; make the directory, or give another --socket"
    if error.errno == errno.EADDRINUSE:
        return "another program made it just now; give another --socket"
    return f"cannot listen on it: {error.strerror}; give another --socket"


def _remove_stale(path: str) -> None:
    """Remove the socket at ``path`` that no program listens on."""
    try:
        found = os.lstat(path)
    except OSError:
        return  # nothing is there, or listening says why it cannot be
    if not stat.S_ISSOCK(found.st_mode):
        problem = "it exists and is no socket; give another --socket, or move it away"
        raise ImageError(path=path, problem=problem)
    reason = _refusal(path)
    if reason in (0, errno.EAGAIN, errno.EPROTOTYPE):  # EAGAIN: its queue is full
        problem = "another server listens there; end it, or give another --socket"
        raise ImageError(path=path, problem=problem)
    if reason not in (errno.ECONNREFUSED, errno.ENOENT):
        problem = f"cannot see whether a server listens there: {os.strerror(reason)}"
        raise ImageError(path=path, problem=f"{problem}; give another --socket")
    try:
        remove_socket(path, (found.st_dev, found.st_ino))
    except OSError as error:
        problem = f"no server listens there, and it cannot be removed: {error.strerror}"
        raise ImageError(path=path, problem=f"{problem}; give another --socket") from error


def _refusal(path: str) -> int:
    """Why a connection to the socket at ``path`` is refused: an errno, or 0 if it is accepted."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            return client.connect_ex(path)
        except OSError as error:
            return error.errno or errno.EINVAL


def identity(path: str) -> tuple[int, int]:
    """Device and inode of the file at ``path``."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def remove_socket(path: str, which: Sequence[int]) -> None:
    """Remove the socket at ``path`` unless another one has taken its place or it is gone."""
    try:
        if identity(path) == tuple(which):
            os.unlink(path)
    except FileNotFoundError:
        pass


def listen_on_port(address: str, port: int) -> list[socket.socket]:
    """Listen on a TCP port at all addresses of the name ``address``. Raises ImageError."""
    missing: OSError | None = None
    servers: list[socket.socket] = []
    try:
        for family, place in _places(address, port):
            try:
                servers.append(_listen_at(family, place))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
        if missing is not None and not servers:
            raise missing
    except OSError as error:
        for server in servers:
            server.close()
        raise _problem_of_port(address, port, error) from error
    return servers


def _places(address: str, port: int) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a name"
        problem = f"no address of this machine ({reason}); give one, such as 127.0.0.1"
        raise ImageError(path=f"--bind {address}", problem=problem) from error
    # A name that is listed twice gives the same address twice.
    return list(dict.fromkeys((family, place) for family, _, _, _, place in found))


def _listen_at(family: socket.AddressFamily, place: tuple[object, ...]) -> socket.socket:
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Connections of a server that has ended do not keep the port.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        server.bind(place)
        server.listen(socket.SOMAXCONN)
    except OSError:
        server.close()
        raise
    return server


def _problem_of_port(address: str, port: int, error: OSError) -> ImageError:
    if error.errno in _NOT_HERE:
        problem = "this machine has no such address; give one of its own, such as 127.0.0.1"
        return ImageError(path=f"--bind {address}", problem=problem)
    if error.errno == errno.EADDRINUSE:
        problem = "another program listens there; end it, or give another --port"
    else:
        problem = f"cannot listen there: {error.strerror}; give another --port or --bind"
    return ImageError(path=f"port {port} of {address}", problem=problem)


def pass_on(servers: Sequence[socket.socket]) -> None:
    """Hand the sockets to the program that replaces this process (sd_listen_fds(3))."""
    end = _FIRST_PASSED + len(servers)
    # Copies above the range first: a socket may stand in the place of another.
    copies = [fcntl.fcntl(one.fileno(), fcntl.F_DUPFD_CLOEXEC, end) for one in servers]
    for one in servers:
        one.close()
    for place, copy in enumerate(copies, _FIRST_PASSED):
        os.dup2(copy, place)
    os.environ.update(LISTEN_FDS=str(len(servers)), LISTEN_PID=str(os.getpid()))
    os.environ.pop("LISTEN_FDNAMES", None)
