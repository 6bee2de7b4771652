"""A program that runs a command for which the kernel refuses system calls: a real filter.

    python seccomp_filter.py RULE... -- COMMAND...

A rule is ``CALL:ERROR``, or ``CALL/N=VALUE:ERROR`` for calls whose argument N, counted from 0, has
this value: ``fcntl/1=37:ENOLCK``. What the command starts is bound by the same filter. Calls
without which no program starts are refused from then on when the modules are loaded: with
``addcow`` for the command, and in that process alone.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

#: The numbers of system calls, by the machine.
CALLS = {
    "x86_64": {
        "clone": 56,
        "fork": 57,
        "vfork": 58,
        "clone3": 435,
        "fcntl": 72,
        "close": 3,
        "fchmod": 91,
        "fgetxattr": 193,
        "unlink": 87,
        "rename": 82,
        "newfstatat": 262,
        "mmap": 9,
        "dup": 32,
        "sched_getaffinity": 204,
        "flock": 73,
        "fstatfs": 138,
        "lseek": 8,
        "ioctl": 16,
        "fadvise64": 221,
        "sync_file_range": 277,
        "fallocate": 285,
        "getrandom": 318,
        "memfd_create": 319,
        "copy_file_range": 326,
        "madvise": 28,
        "ftruncate": 77,
        "getdents64": 217,
        "readlink": 89,
        "fdatasync": 75,
        "fsync": 74,
        "preadv2": 327,
        "pread64": 17,
        "pwrite64": 18,
        "mincore": 27,
        "openat2": 437,
    },
    "aarch64": {
        "clone": 220,
        "clone3": 435,
        "fcntl": 25,
        "close": 57,
        "fchmod": 52,
        "fgetxattr": 10,
        "newfstatat": 79,
        "mmap": 222,
        "dup": 23,
        "sched_getaffinity": 123,
        "flock": 32,
        "fstatfs": 44,
        "lseek": 62,
        "ioctl": 29,
        "fadvise64": 223,
        "sync_file_range": 84,
        "fallocate": 47,
        "getrandom": 278,
        "memfd_create": 279,
        "copy_file_range": 285,
        "madvise": 233,
        "ftruncate": 46,
        "getdents64": 61,
        "fdatasync": 83,
        "fsync": 82,
        "preadv2": 286,
        "pread64": 67,
        "pwrite64": 68,
        "mincore": 232,
        "openat2": 437,
    },
}


#: Commands of fcntl, the same on both machines.
F_GETLK, F_SETLK, F_OFD_GETLK, F_OFD_SETLK = 5, 6, 36, 37


_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2


_NUMBER_AT, _ARGUMENTS_AT = 0, 16


def program(rules: list[str]) -> bytes:
    """Return the filter in the kernel's instructions: the first rule that fits decides."""
    calls = CALLS[platform.machine()]
    steps = []
    for rule in rules:
        call, name = rule.split(":")
        call, _, test = call.partition("/")
        answer = struct.pack("HBBI", _RETURN, 0, 0, _ERRNO | getattr(errno, name))
        steps.append(struct.pack("HBBI", _LOAD, 0, 0, _NUMBER_AT))
        if test:
            number, _, value = test.partition("=")
            at = _ARGUMENTS_AT + 8 * int(number)
            steps.append(struct.pack("HBBI", _IF_EQUAL, 0, 3, calls[call]))
            steps.append(struct.pack("HBBI", _LOAD, 0, 0, at))
            steps.append(struct.pack("HBBI", _IF_EQUAL, 0, 1, int(value)))
        else:
            steps.append(struct.pack("HBBI", _IF_EQUAL, 0, 1, calls[call]))
        steps.append(answer)
    return b"".join([*steps, struct.pack("HBBI", _RETURN, 0, 0, _ALLOW)])


def bind(rules: list[str]) -> None:
    """Bind this process, and all that it starts, to the rules."""
    libc = ctypes.CDLL(None, use_errno=True)
    content = ctypes.create_string_buffer(program(rules))
    head = struct.pack("HxxxxxxP", (len(content) - 1) // 8, ctypes.addressof(content))
    wide = [ctypes.c_ulong(0)] * 3
    for words in (
        (_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), *wide),
        (_PR_SET_SECCOMP, ctypes.c_ulong(_FILTER), ctypes.c_char_p(head), *wide[:2]),
    ):
        if libc.prctl(*words):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _run_here(rules: list[str], arguments: list[str]) -> int:
    """Run addcow in this process, bound to the rules once everything is loaded."""
    import pkgutil
    from importlib import import_module

    import addcow_mp
    from addcow_mp.cli.main import run

    for module in pkgutil.walk_packages(addcow_mp.__path__, "addcow_mp."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    from addcow_mp.device import syscalls

    syscalls.start_writing(-1, 0, 0)
    bind(rules)
    return run(arguments)


if __name__ == "__main__":
    cut = sys.argv.index("--")
    if sys.argv[cut + 1] == "addcow":
        sys.exit(_run_here(sys.argv[1:cut], sys.argv[cut + 2 :]))
    bind(sys.argv[1:cut])
    os.execvp(sys.argv[cut + 1], sys.argv[cut + 1 :])  # noqa: S606 - what the test asks for
